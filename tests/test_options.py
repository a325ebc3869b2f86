"""Every option does what it says: symmetric ranges, scales per tensor, 7-bit weights, formats, the ignored scope, job files."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import building
import numpy as np
import pytest
import tensorflow as tf
import yaml
from absl.testing import flagsaver
from tensorflow.python.saved_model.loader_impl import parse_saved_model

import tfquant
from tfquant import calibrate
from tfquant.errors import ConfigError, OutputError
from tfquant.jobfile import load_job
from tfquant.machine import has_vnni
from tfquant.pipeline import apply_plan
from tfquant.plan.serialize import load_plan, save_plan
from tfquant.plan.spec import S8, U8
from tfquant.targets import weights

ROOT = Path(__file__).parents[1]
IMAGE = (9, 7, 8)


def normal(*shape, seed=0, size=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * size).astype(np.float32)


def kernel(*shape, seed=0):
    return normal(*shape, seed=seed, size=float(np.prod(shape[:-1])) ** -0.5)


def sqnr(expected, found):
    error = np.square(expected - found, dtype=np.float64).mean()
    return 10 * np.log10(np.square(expected, dtype=np.float64).mean() / max(error, 1e-30))


# -- nets ------------------------------------------------------------------------------------------------------------------
def conv(x, channels=8, size=3, seed=0, padding="SAME"):
    return tf.nn.bias_add(tf.nn.conv2d(x, kernel(size, size, x.shape[3], channels, seed=seed), 1, padding), normal(channels))


def residual(x):
    y = conv(x, seed=1)
    return conv(conv(conv(y, size=1, seed=2), seed=3) + y, 4, seed=4)


def residual_relu(x):
    y = tf.nn.relu(conv(x, seed=1))
    return conv(tf.nn.relu(conv(conv(y, size=1, seed=2), seed=3) + y), 4, seed=4)


def concat(x):
    return conv(tf.concat([conv(x, seed=1), tf.nn.relu(conv(x, seed=2)), x], 3), 4, seed=3)


def max_pool(x):
    return conv(tf.nn.max_pool2d(conv(x, seed=1), 2, 2, "SAME"), 4, seed=2)


def avg_pool(x):
    return conv(tf.nn.avg_pool2d(conv(x, seed=1), 2, 2, "SAME"), 4, seed=2)


def depthwise(x):
    y = tf.nn.depthwise_conv2d(conv(x, seed=1), kernel(3, 3, 8, 1, seed=2) * 3, (1, 1, 1, 1), "SAME")
    return conv(y, 4, size=1, seed=3)


def linear_pad(x):
    return conv(tf.pad(conv(x, seed=1), [(0, 0), (2, 1), (0, 3), (0, 0)]), 4, padding="VALID", seed=2)


def relu_pad(x):
    return conv(tf.pad(tf.nn.relu(conv(x, seed=1)), [(0, 0), (2, 1), (0, 3), (0, 0)]), 4, padding="VALID", seed=2)


def lone_pad(x):
    return conv(tf.nn.max_pool2d(tf.pad(conv(x, seed=1), [(0, 0), (2, 1), (0, 3), (0, 0)]), 2, 1, "VALID"), 4, seed=2)


def dense(x):
    y = tf.reduce_mean(conv(x, seed=1), [1, 2])
    return tf.matmul(y, kernel(8, 5, seed=2)) + normal(5)


NETS = [residual, residual_relu, concat, max_pool, avg_pool, depthwise, linear_pad, relu_pad, lone_pad, dense]


def batches(low_shift=0.4, shape=IMAGE):
    return [{"x": normal(4, *shape, seed=7) + np.float32(low_shift)}, {"x": normal(3, *shape, seed=8) + np.float32(low_shift)}]


def plan(net, shape=IMAGE, **options):
    return building.plan_for(building.build(net, {"x": (None, *shape)}), batches(shape=shape), **options)


def fidelity(net, shape=IMAGE, **options):
    result = building.both(building.build(net, {"x": (None, *shape)}), batches(shape=shape), **options)
    return sqnr(result.floats["output_0"], result.int8["output_0"])


# -- activation_mode -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
def test_symmetric_ranges(net):
    planned = plan(net, activation_mode="symmetric")
    assert all(decision.int8 for decision in planned.plan.ops)
    negative = [spec for spec in planned.plan.tensors.values() if spec.low < 0]
    assert negative
    for spec in negative:
        assert (spec.dtype, spec.zero_point) in ((S8, 0), (U8, 128))
        assert spec.high == pytest.approx(127 * spec.scale)
    for spec in planned.plan.tensors.values():
        assert spec.low < 0 or spec.zero_point == 0
    assert building.disagreements(planned, batches()) == []


@pytest.mark.parametrize("net", [residual, max_pool, avg_pool, lone_pad], ids=lambda net: net.__name__)
def test_symmetric_ranges_of_kernels_that_take_unsigned_values(net):
    """Sums and pools take quint8 alone, whose zero point is then the middle."""
    planned = plan(net, activation_mode="symmetric")
    unsigned = [tensor for unit in planned.annotation.units.values() for tensor in unit.unsigned]
    specs = [planned.plan.tensors[tensor.name] for tensor in unsigned]
    assert {(spec.dtype, spec.zero_point) for spec in specs} == {(U8, 128)}
    assert planned.plan.tensors["x"].dtype == S8


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
def test_symmetric_ranges_cost_little(net):
    asymmetric, symmetric = fidelity(net), fidelity(net, activation_mode="symmetric")
    assert asymmetric > 30
    assert asymmetric - 6 < symmetric < asymmetric + 3


def test_symmetric_ranges_cost_a_bit_where_values_are_shifted():
    """Nearly positive values leave half of the steps unused."""

    def net(x):
        return conv(tf.nn.elu(tf.nn.relu(x) * 4 - 0.5), 4, size=1)

    asymmetric, symmetric = fidelity(net), fidelity(net, activation_mode="symmetric")
    assert 2 < asymmetric - symmetric < 9


@pytest.mark.parametrize("options", [{"activation_mode": "symmetric"}, {"weights": "per_tensor"}, {"isa": "no_vnni"}])
def test_plans_live_on_as_files(options, tmp_path):
    planned = plan(concat, **options)
    save_plan(planned.plan, tmp_path)
    loaded = load_plan(tmp_path)
    assert loaded.tensors == planned.plan.tensors
    assert loaded.ops == planned.plan.ops
    assert loaded.settings == planned.plan.settings
    assert loaded.settings.items() >= options.items()
    assert all(np.array_equal(scales, loaded.weight_scales[name]) for name, scales in planned.plan.weight_scales.items())
    assert list(apply_plan(planned.graph, loaded).units) == list(planned.annotation.units)


# -- weights ---------------------------------------------------------------------------------------------------------------
def uneven(x):
    factors = np.array([1, 1e-2, 0.1, 3, 1e-3, 1, 0.3, 1e-2], np.float32)
    y = tf.nn.conv2d(x, kernel(3, 3, 8, 8, seed=1) * factors, 1, "SAME") / factors
    y = tf.nn.depthwise_conv2d(tf.nn.relu(y), kernel(3, 3, 8, 1, seed=2) * factors[:, None], (1, 1, 1, 1), "SAME") / factors
    y = tf.reduce_mean(y, [1, 2])
    return tf.matmul(y, kernel(8, 8, seed=3) * factors) / factors


def split_scales(x):
    """Channels that differ in size, and that nothing evens out before the end."""
    factors = np.array([1, 1e-2, 0.1, 3, 1e-3, 1, 0.3, 1e-2], np.float32)
    return tf.nn.conv2d(x, kernel(3, 3, 8, 8, seed=1) * factors, 1, "SAME")


@pytest.mark.parametrize("net", [*NETS, uneven], ids=lambda net: net.__name__)
def test_one_scale_for_all_channels(net):
    planned = plan(net, weights="per_tensor")
    computing = [unit for unit in planned.annotation.units.values() if unit.kernel.role == "compute"]
    assert computing
    for unit in computing:
        scales = planned.plan.weight_scales[unit.name]
        assert scales.shape == unit.weights.shape[-1:]
        assert set(scales.tolist()) == {float(scales.max())}
        assert np.abs(weights.quantized(unit, planned.plan)[0].astype(np.int32)).max() == 127
    assert building.disagreements(planned, batches()) == []


def test_one_scale_loses_small_channels():
    graph = building.build(split_scales, {"x": (None, *IMAGE)})
    one, each = (building.both(graph.copy(), batches(), weights=mode).int8["output_0"] for mode in ("per_tensor", "per_channel"))
    floats = building.both(graph, batches()).floats["output_0"]
    small = floats.std((0, 1, 2)) < 0.05
    assert small.sum() >= 3
    assert sqnr(floats[..., small], each[..., small]) > 30
    assert sqnr(floats[..., small], one[..., small]) < sqnr(floats[..., small], each[..., small]) - 10


# -- isa -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("net", [residual, depthwise, dense], ids=lambda net: net.__name__)
def test_seven_bits_where_products_could_saturate(net, mode):
    planned = plan(net, isa="no_vnni", weights=mode)
    limits = {}
    for unit in planned.annotation.units.values():
        if unit.weights is not None:
            integers, _ = weights.quantized(unit, planned.plan)
            limits.setdefault(unit.main.op, set()).add(int(np.abs(integers.astype(np.int32)).max()))
    assert limits["Conv2D"] == {64}
    assert limits.get("DepthwiseConv2dNative", {127}) == {127}
    assert limits.get("MatMul", {64}) == {64}
    assert building.disagreements(planned, batches()) == []


SATURATING = """
import json, sys
sys.path[:0] = {path!r}
import test_options
print(json.dumps(test_options.saturation()))
"""
LAYERS = ["conv", "pointwise", "depthwise", "dense"]
SATURATED = 126  # steps: 129 for 255


def extreme(layer, sign):
    """(function, data): all weights as far from 0 as they get, all inputs at the end of their range."""

    def net(x):
        shapes = {"conv": (3, 3, 16, 16), "pointwise": (1, 1, 16, 16), "depthwise": (3, 3, 16, 1), "dense": (16, 16)}
        value = np.full(shapes[layer], sign * 0.05, np.float32)
        if layer == "dense":
            y = tf.nn.relu(sign * tf.matmul(x, value))
            return [y, tf.matmul(y, np.full((16, 3), 1e-3, np.float32))]
        is_depthwise = layer == "depthwise"
        y = tf.nn.depthwise_conv2d(x, value, (1, 1, 1, 1), "SAME") if is_depthwise else tf.nn.conv2d(x, value, 1, "SAME")
        y = tf.nn.relu(sign * y)
        return tf.nn.depthwise_conv2d(y, np.full((1, 1, 16, 1), 0.5, np.float32), (1, 1, 1, 1), "SAME")

    shape = (16,) if layer == "dense" else (8, 8, 16)
    return net, np.stack([np.ones(shape, np.float32), np.zeros(shape, np.float32)])


def saturation():
    """For a process with other instructions: the largest deviation of each layer's kernel, in steps, and the warnings."""
    steps = {}
    for layer in LAYERS:
        for isa in ("vnni", "no_vnni"):
            found = []
            for sign in (1, -1):
                net, data = extreme(layer, sign)
                planned = building.plan_for(building.build(net, {"x": (None, *data.shape[1:])}), [{"x": data}], isa=isa)
                name = {"dense": "matmul", "depthwise": "depthwise_conv2d"}.get(layer, "conv2d")
                checked = [d for d in building.deviations(planned, [{"x": data}]) if d.kernel == name]
                assert checked
                found += [[d.steps, d.wrong] for d in checked]
            steps[f"{layer} {isa}"] = [max(s for s, _ in found), any(wrong for _, wrong in found)]
    warnings = {}
    with tempfile.TemporaryDirectory() as folder:
        module = tf.Module()
        module.f = tf.function(residual, input_signature=[tf.TensorSpec((None, *IMAGE), name="x")], autograph=False)
        tf.saved_model.save(module, folder, signatures=module.f)
        for isa in ("vnni", "no_vnni"):
            result = tfquant.quantize(folder, batches()[0]["x"], tfquant.QuantConfig(isa=isa, verify=False))
            warnings[isa] = [list(result.report.warnings), str(result.report)]
    signed = [line for net in NETS for line in building.disagreements(plan(net, isa="no_vnni"), batches())]
    return {"steps": steps, "warnings": warnings, "signed": signed, "has_vnni": has_vnni()}


@pytest.fixture(scope="module", params=["AVX2", "AVX512_CORE"])
def without_vnni(request):
    return in_process({"ONEDNN_MAX_CPU_ISA": request.param})


def in_process(environment):
    path = [str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(
        [sys.executable, "-c", SATURATING.format(path=path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_seven_bits_do_not_saturate(without_vnni):
    assert without_vnni["has_vnni"] is False
    for layer in LAYERS:
        assert not without_vnni["steps"][f"{layer} no_vnni"][1]
        assert without_vnni["steps"][f"{layer} no_vnni"][0] < 4


@pytest.mark.slow
def test_eight_bits_do_saturate(without_vnni):
    """Without it, nobody would need the option; depthwise convolutions have no pairs to add."""
    for layer in ("conv", "pointwise", "dense"):
        steps, wrong = without_vnni["steps"][f"{layer} vnni"]
        assert wrong
        assert steps >= SATURATED - 1
    assert not without_vnni["steps"]["depthwise vnni"][1]


@pytest.mark.slow
def test_a_machine_that_saturates_is_warned_of(without_vnni):
    (line,), report = without_vnni["warnings"]["vnni"]
    assert line.startswith("this machine has no VNNI: convolutions and MatMuls with 8-bit weights saturate here")
    assert f"Warning: {line}" in report
    lines, report = without_vnni["warnings"]["no_vnni"]
    assert lines == []
    assert "VNNI" not in report


@pytest.mark.slow
def test_seven_bits_agree_for_signed_inputs(without_vnni):
    assert without_vnni["signed"] == []


@pytest.mark.slow
@pytest.mark.skipif(has_vnni() is not True, reason="for machines with VNNI")
def test_nothing_saturates_with_vnni():
    found = in_process({})
    assert not any(wrong for _, wrong in found["steps"].values())
    assert found["warnings"]["vnni"][0] == found["warnings"]["no_vnni"][0] == []
    assert found["signed"] == []


# -- end to end: a model with named layers -----------------------------------------------------------------------------------
class Net(tf.Module):
    """Two blocks and a head."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(11)
        shapes = {"stem": (3, 3, 3, 8), "one": (3, 3, 8, 8), "two": (1, 1, 8, 8), "deep": (3, 3, 8, 1), "head": (8, 5)}
        self.kernels = {key: tf.Variable(kernel(*shape, seed=i)) for i, (key, shape) in enumerate(shapes.items())}
        self.kernels["deep"].assign(self.kernels["deep"] * 3)
        self.norms = [tf.Variable(rng.uniform(0.5, 1.5, 8).astype(np.float32)) for _ in range(4)]

    @tf.function(input_signature=[tf.TensorSpec((None, 10, 10, 3), tf.float32, name="image")])
    def serve(self, image):
        with tf.name_scope("net"):
            with tf.name_scope("stem"):
                x = tf.nn.relu(tf.nn.conv2d(image, self.kernels["stem"], 1, "SAME"))
            with tf.name_scope("block1"):
                with tf.name_scope("conv"):
                    y = tf.nn.conv2d(x, self.kernels["one"], 1, "SAME")
                with tf.name_scope("norm"):
                    y = tf.compat.v1.nn.fused_batch_norm(y, *self.norms, is_training=False)[0]
                with tf.name_scope("act"):
                    y = tf.nn.relu(y)
                with tf.name_scope("conv2"):
                    y = tf.nn.conv2d(y, self.kernels["two"], 1, "SAME") + x
            with tf.name_scope("block2"):
                y = tf.nn.relu(tf.nn.depthwise_conv2d(y, self.kernels["deep"], (1, 1, 1, 1), "SAME"))
            with tf.name_scope("head"):
                y = tf.matmul(tf.reduce_mean(y, [1, 2]), self.kernels["head"])
        return {"probabilities": tf.nn.softmax(y), "logits": y}


DATA, FRESH = normal(40, 10, 10, 3, seed=1), normal(24, 10, 10, 3, seed=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("float") / "model"
    module = Net()
    tf.saved_model.save(module, str(path), signatures=module.serve)
    return path


def quantize(path, **options):
    return tfquant.quantize(path, DATA, tfquant.QuantConfig(**{"verify": False, **options}))


@pytest.fixture(scope="module")
def quantized(model):
    return quantize(model)


def arrays(outputs):
    return {key: np.asarray(value) for key, value in outputs.items()}


def bytes_of(result):
    return result.graph_def.SerializeToString(deterministic=True)


def float_outputs(result):
    return result.float_function()({"image": FRESH})


# -- format ----------------------------------------------------------------------------------------------------------------
def ops_of_saved_model(path):
    graph = parse_saved_model(str(path)).meta_graphs[0].graph_def
    return {node.op for node in graph.node} | {node.op for function in graph.library.function for node in function.node_def}


def test_format_saved_model(quantized, tmp_path):
    quantized.save(tmp_path / "out")
    assert {"_FusedQuantizedConv2D", "_FusedQuantizedDepthwiseConv2D", "_QuantizedMatMul"} <= ops_of_saved_model(tmp_path / "out")
    signature = tf.saved_model.load(str(tmp_path / "out")).signatures["serving_default"]
    expected, found = arrays(quantized(FRESH)), arrays(signature(image=tf.constant(FRESH)))
    assert expected.keys() == found.keys() == {"probabilities", "logits"}
    assert all(np.array_equal(expected[key], found[key]) for key in expected)
    assert not (tmp_path / "out" / "frozen_graph.pb").exists()


def test_format_graphdef(quantized, tmp_path):
    quantized.save(tmp_path / "out", format="graphdef")
    assert sorted(os.listdir(tmp_path / "out")) == ["frozen_graph.pb", "quant_plan.json", "quant_plan.npz"]
    content = tf.compat.v1.GraphDef.FromString((tmp_path / "out" / "frozen_graph.pb").read_bytes())
    nodes = {node.name: node for node in content.node}
    assert nodes["image"].op == "Placeholder"
    assert [node.name for node in content.node if node.op == "Placeholder"] == ["image"]
    assert {"logits", "probabilities"} <= nodes.keys()
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph) as session:
        tf.graph_util.import_graph_def(content, name="")
        found = dict(
            zip(("logits", "probabilities"), session.run(["logits:0", "probabilities:0"], {"image:0": FRESH}), strict=True)
        )
    expected = arrays(quantized(FRESH))
    assert all(np.array_equal(expected[key], found[key]) for key in expected)


class Lookup(tf.Module):
    def __init__(self):
        super().__init__()
        init = tf.lookup.KeyValueTensorInitializer(tf.constant(["a", "b"]), tf.constant([0.5, 2.0]))
        self.table = tf.lookup.StaticHashTable(init, 1.0)
        self.kernel = tf.Variable(kernel(8, 4))

    @tf.function(input_signature=[tf.TensorSpec((None, 8), name="x"), tf.TensorSpec((None,), tf.string, name="word")])
    def serve(self, x, word):
        return {"y": tf.matmul(x, self.kernel) * self.table.lookup(word)[:, None]}


def test_a_graphdef_refuses_a_model_with_a_table(tmp_path):
    module = Lookup()
    tf.saved_model.save(module, str(tmp_path / "model"), signatures=module.serve)
    data = {"x": normal(20, 8), "word": np.array(["a", "b", "c", "a"] * 5, object)}
    result = tfquant.quantize(tmp_path / "model", data, tfquant.QuantConfig(verify=False))
    with pytest.raises(OutputError) as error:
        result.save(tmp_path / "out", format="graphdef")
    assert str(error.value).startswith("A GraphDef cannot hold tables or variables: choose another format. Received: ")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["model"]
    result.save(tmp_path / "out")
    assert (tmp_path / "out" / "saved_model.pb").exists()


WITHOUT_ONEDNN = """
import sys
import numpy as np, tensorflow as tf
folder, data, out = sys.argv[1:]
signature = tf.saved_model.load(folder).signatures["serving_default"]
np.savez(out, **{key: value.numpy() for key, value in signature(image=tf.constant(np.load(data))).items()})
"""


def test_format_fakequant(quantized, tmp_path):
    quantized.save(tmp_path / "out", format="fakequant")
    ops = ops_of_saved_model(tmp_path / "out")
    assert "FakeQuantWithMinMaxVars" in ops
    assert {"Conv2D", "DepthwiseConv2dNative", "MatMul"} <= ops
    assert [op for op in ops if "Quant" in op or op in ("Dequantize", "Requantize")] == ["FakeQuantWithMinMaxVars"]
    simulated = quantized.simulation()({"image": FRESH})
    found = arrays(tf.saved_model.load(str(tmp_path / "out")).signatures["serving_default"](image=tf.constant(FRESH)))
    assert simulated.keys() == found.keys()
    assert all(np.array_equal(simulated[key], found[key]) for key in found)
    np.save(tmp_path / "data.npy", FRESH)
    paths = [str(tmp_path / name) for name in ("out", "data.npy", "found.npz")]
    command = [sys.executable, "-c", WITHOUT_ONEDNN, *paths]
    done = subprocess.run(command, env={**os.environ, "TF_ENABLE_ONEDNN_OPTS": "0"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "found.npz") as other:
        for key, value in found.items():
            assert sqnr(value, other[key]) > 35  # other sums may round to the next step
            assert sqnr(float_outputs(quantized)[key], other[key]) > 25


def test_no_such_format(quantized, tmp_path):
    with pytest.raises(ConfigError, match=r"format must be one of saved_model, graphdef, fakequant\. Received: 'onnx'"):
        quantized.save(tmp_path / "out", format="onnx")
    assert os.listdir(tmp_path) == []


# -- ignored_scope -----------------------------------------------------------------------------------------------------------
STEM, ONE, TWO, DEEP, HEAD = "stem", "one", "two", "deep", "head"
PLACES = {"net/stem": STEM, "net/block1/conv": ONE, "net/block1/conv2": TWO, "net/block2": DEEP, "net/head": HEAD}


def layers(decisions):
    """Which of the net's layers these decisions are about."""
    found = {}
    for decision in decisions:
        if decision.op in ("Conv2D", "DepthwiseConv2dNative", "MatMul"):
            found[PLACES[decision.name.rpartition("/")[0]]] = decision
    return found


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("net/block1/conv", {ONE}),
        ("block1/conv", {ONE}),
        ("block1", {ONE, TWO}),
        ("net/block2/", {DEEP}),
        (r"re:block1/conv\d", {TWO}),
        ("re:.*/Conv2D", {STEM, ONE, TWO}),
        ("type:Conv2D", {STEM, ONE, TWO}),
        ("type:MatMul", {HEAD}),
        ("type:DepthwiseConv2dNative", {DEEP}),
        ("block1/norm", set()),  # it is folded into the weights before, and names nothing then
        ("net", {STEM, ONE, TWO, DEEP, HEAD}),
    ],
)
def test_what_the_ignored_scope_names_stays_float(model, quantized, entry, expected, tmp_path):
    result = quantize(model, ignored_scope=[entry])
    found = layers(result.plan.ops)
    assert {name for name, decision in found.items() if not decision.int8} == expected
    for name in expected:
        assert found[name].reason == f"the ignored scope names it ({entry})"
    reported = layers(result.report.float_ops)
    assert reported.keys() == expected
    if expected:
        assert str(result.report).count(f"the ignored scope names it ({entry})") >= len(expected)
    ops = [node.op for node in result.graph_def.node]
    assert ops.count("Conv2D") == len(expected & {STEM, ONE, TWO})
    assert ops.count("DepthwiseConv2dNative") == len(expected & {DEEP})
    assert ops.count("MatMul") == len(expected & {HEAD})

    floats, outputs = float_outputs(quantized), arrays(result(FRESH))
    assert sqnr(floats["logits"], outputs["logits"]) > min(30, sqnr(floats["logits"], arrays(quantized(FRESH))["logits"]) - 3)
    if entry == "net":
        assert np.allclose(floats["logits"], outputs["logits"], atol=1e-5)

    # The plan keeps it, without the scope being said again.
    result.save(tmp_path / "out")
    again = tfquant.quantize(model, plan=tmp_path / "out" / "quant_plan.json")
    assert again.plan.ops == result.plan.ops
    assert bytes_of(again) == bytes_of(result)


@pytest.mark.parametrize(
    ("entry", "nearest"),
    [("blok1", "block1"), ("net/block1/con", "net/block1/conv"), ("type:Conv3D", "Conv2D"), ("re:stm", "stem")],
)
def test_an_entry_that_names_nothing_offers_the_nearest(model, entry, nearest):
    with pytest.raises(ConfigError) as error:
        quantize(model, ignored_scope=[entry])
    assert f"the nearest are {nearest}" in str(error.value) or f", {nearest}" in str(error.value)
    assert str(error.value).endswith(f"Received: {entry!r}")


# -- job files -----------------------------------------------------------------------------------------------------------------
OPTIONS = [
    {},
    {"activation_mode": "symmetric", "weights": "per_tensor", "isa": "no_vnni"},
    {"estimator": "percentile", "ignored_scope": ["block1/norm", "re:net/block2.*", "type:MatMul"], "subset_size": 20},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["default", "modes", "scope"])
def test_python_a_job_file_and_the_command_line_give_the_same_plan(model, options, tmp_path):
    options = {"verify": False, "batch_size": 8, **options}
    np.save(tmp_path / "data.npy", DATA)
    job = {"saved_model": str(model), "data": "data.npy", "output": "from_job", "quantization": options}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    loaded = load_job(tmp_path / "job.yaml")
    config = tfquant.QuantConfig(**options)
    assert loaded.quantization == config
    assert loaded == dataclasses.replace(
        loaded, saved_model=str(model), data=str(tmp_path / "data.npy"), output=str(tmp_path / "from_job")
    )
    tfquant.quantize(model, DATA, config).save(tmp_path / "from_python")
    flags = ["--saved_model", model, "--data", tmp_path / "data.npy", "--output", tmp_path / "from_flags"]
    for name, value in options.items():
        if name == "ignored_scope":
            flags += [word for entry in value for word in ("--ignored_scope", entry)]
        else:
            flags.append(f"--{name}={str(value).lower() if isinstance(value, bool) else value}")
    for words in (["--config", tmp_path / "job.yaml"], flags):
        with flagsaver.flagsaver():
            assert calibrate.main(calibrate.parse(["calibrate", *map(str, words)])) == 0
    for file in ("quant_plan.json", "quant_plan.npz"):
        expected = (tmp_path / "from_python" / file).read_bytes()
        assert (tmp_path / "from_job" / file).read_bytes() == expected
        assert (tmp_path / "from_flags" / file).read_bytes() == expected


def test_an_activation_alone_stays_float(model, quantized):
    """The layer before it runs in INT8 and returns float."""
    result = quantize(model, ignored_scope=["block1/act"])
    decisions = {decision.name: decision for decision in result.plan.ops}
    (name,) = (name for name, decision in decisions.items() if decision.reason == "the ignored scope names it (block1/act)")
    assert decisions[name].op == "Relu"
    assert layers(result.plan.ops)[ONE].int8
    ops = [node.op for node in result.graph_def.node]
    assert ops.count("Relu") == 1
    assert ops.count("Conv2D") == 0
    again = tfquant.quantize(model, plan=result.plan)
    assert bytes_of(again) == bytes_of(result)
