"""Mode dynamic: INT8 matrix products whose ranges are found at each call, without data."""

import json
import subprocess
import sys

import building
import numpy as np
import pytest
import tensorflow as tf
from test_lowering import Random, dense, fused, ops, samples
from test_pipeline import bytes_of, kernel, make

import tfquant
from tfquant.errors import ConfigError, PlanError
from tfquant.plan.spec import S8, U8, DynamicSpec, asymmetric, symmetric
from tfquant.targets import onednn

DYNAMIC = tfquant.QuantConfig(mode="dynamic", verify=False)


def plan(function, depth=24, batches=None, **options):
    random = Random()
    graph = building.build(lambda x: function(x, random), {"x": (None, depth)})
    batches = batches or [{"x": samples(rows, (depth,), size=size)} for rows, size in ((3, 1.0), (5, 40.0), (1, 0.01))]
    return building.dynamic_plan_for(graph, batches, **options), batches


def check(function, **options):
    """(graph with its plan, INT8 graph) where no call disagrees with the simulation; each batch has another range."""
    planned, batches = plan(function, **options)
    assert building.disagreements(planned, batches) == []
    return planned, onednn.lower(planned.graph, planned.annotation.units, planned.plan)


OPTIONS = {
    "asymmetric": ({}, DynamicSpec(U8, None)),
    "symmetric": ({"activation_mode": "symmetric"}, DynamicSpec(S8, 0)),
    "symmetric, no VNNI": ({"activation_mode": "symmetric", "isa": "no_vnni"}, DynamicSpec(U8, 128)),
    "one scale": ({"weights": "per_tensor"}, DynamicSpec(U8, None)),
}


# -- kernels against the simulation ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("depth", "outputs"), [(1, 1), (1, 8), (7, 1), (24, 17), (130, 64)])
def test_products_of_any_shape(depth, outputs, name):
    options, spec = OPTIONS[name]
    planned, lowered = check(lambda x, random: dense(x, random, outputs), depth=depth, **options)
    assert planned.plan.dynamic == {"x": spec}
    assert planned.plan.tensors == {}
    assert fused(lowered) == [["BiasAdd", "Dequantize"]]
    assert "MatMul" not in ops(lowered)


@pytest.mark.parametrize("name", ["asymmetric", "symmetric", "symmetric, no VNNI"])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("data", ["normal", "positive", "negative", "shifted", "equal", "zero"])
def test_ranges_of_any_kind(data, size, rows, name):
    batches = [{"x": samples(rows, (24,), data, size * factor)} for factor in (1.0, 3.0, 0.2)]
    check(lambda x, random: tf.matmul(x, random.weights(24, 9)), batches=batches, **OPTIONS[name][0])


@pytest.mark.parametrize("size", [1e-5, 1e6])
def test_a_bias_far_from_the_products(size):
    """It is added in float: no range of an int32 cuts it off."""
    check(lambda x, random: tf.matmul(x, random.weights(24, 9)) + size * random(9))


@pytest.mark.parametrize("activation", [tf.nn.relu, tf.nn.relu6])
def test_activations(activation):
    _, lowered = check(lambda x, random: activation(4 * dense(x, random)))
    assert [names[1] for names in fused(lowered)] == [activation.__name__.capitalize()]


@pytest.mark.parametrize("name", ["asymmetric", "symmetric", "symmetric, no VNNI"])
def test_the_range_is_that_of_the_call(name):
    options, spec = OPTIONS[name]
    planned, batches = plan(lambda x, random: dense(x, random), **options)
    whole = building.instrument(planned)
    for value, batch in zip(building.run(whole.graph, batches), batches, strict=True):
        low, high = float(batch["x"].min()), float(batch["x"].max())
        wanted = asymmetric(low, high, "", "") if spec.zero_point is None else symmetric(low, high, "", "", spec.dtype)
        assert np.allclose(value["range/x"], [wanted.scale, wanted.low], rtol=1e-6)
        stored = np.clip(np.rint(batch["x"].astype(np.float64) / wanted.scale) + wanted.zero_point, *wanted.limits)
        assert np.abs(value["stored/x"] - stored).max() <= 1e-6


@pytest.mark.parametrize("is_flat", [False, True])
def test_what_several_read_is_quantized_once(is_flat):
    """Query, key and value of an attention, each behind a Reshape of its own or none."""

    def net(x, random):
        y = tf.reshape(x, [-1, 3, 8]) * 2.0
        if is_flat:
            y = tf.reshape(y, [-1, 24])
            return [dense(y, random, 4) for _ in range(3)]
        return [dense(tf.reshape(y, [-1, 8]), random, 4) for _ in range(3)]

    planned, lowered = check(net)
    assert len(fused(lowered)) == len(planned.annotation.units) == 3
    assert [ops(lowered).count(op) for op in ("QuantizeV2", "Min", "Max")] == [1, 1, 1]


def test_a_product_of_a_product():
    """The first one's result leaves in float: its range is not known before."""
    planned, lowered = check(lambda x, random: dense(tf.nn.relu(dense(x, random, 16)), random))
    assert len(planned.plan.dynamic) == 2
    assert fused(lowered) == [["BiasAdd", "Relu", "Dequantize"], ["BiasAdd", "Dequantize"]]


def test_unknown_ranks_and_sizes():
    random = Random()
    weights = random.weights(6, 3)
    graph = building.build(lambda x: tf.raw_ops.MatMul(a=tf.nn.softsign(x), b=weights), {"x": None})
    batches = [{"x": samples(rows, (6,))} for rows in (2, 5)]
    planned = building.dynamic_plan_for(graph, batches)
    assert len(planned.annotation.units) == 1
    assert building.disagreements(planned, batches) == []


def test_convolutions_stay_float_with_the_reason():
    random = Random()
    kernel = random.weights(3, 3, 3, 4)

    def net(x):
        y = tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME"))
        return tf.matmul(tf.reduce_mean(y, (1, 2)), random.weights(4, 2))

    planned = building.dynamic_plan_for(building.build(net, {"x": (None, 6, 6, 3)}), [{"x": samples(2, (6, 6, 3))}])
    decisions = [(decision.op, decision.int8, decision.reason) for decision in planned.plan.ops]
    assert decisions == [("Conv2D", False, "convolutions need ranges from data: calibrate (mode static)"), ("MatMul", True, "")]


# -- whole models ------------------------------------------------------------------------------------------------------------
def two_layers(path):
    module = tf.Module()
    first, second = kernel(32, 48), kernel(48, 6, seed=1)
    module.net = make(lambda x: {"y": tf.nn.gelu(x @ first) @ second}, (None, 32), names=["x"])
    module.first, module.second = first, second
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.net})
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return two_layers(tmp_path_factory.mktemp("dynamic") / "model")


def served(path, x):
    return tf.saved_model.load(str(path)).signatures["serving_default"](x=tf.constant(x))["y"].numpy()


DATA = np.random.default_rng(3).normal(size=(40, 32)).astype(np.float32)


def test_without_data(model, tmp_path):
    result = tfquant.quantize(model, config=DYNAMIC)
    assert result.plan.mode == "dynamic"
    assert [decision.int8 for decision in result.plan.ops] == [True, True]
    result.save(tmp_path / "int8")
    expected, found = served(model, DATA), served(tmp_path / "int8", DATA)
    noise = ((expected - found) ** 2).sum()
    assert 10 * np.log10((expected**2).sum() / noise) > 35
    assert np.array_equal(found, result(DATA)["y"])
    assert np.allclose(result.simulation()({"x": DATA})["y"], found, atol=0.01 * np.abs(found).max())
    assert served(tmp_path / "int8", DATA[:0]).shape == (0, 6)
    assert "Quantized model (mode dynamic)" in str(result.report)
    assert result.report.int8_share == 100
    assert result.report.fidelity is None


def test_data_is_used_to_verify(model):
    config = tfquant.QuantConfig(mode="dynamic", verify_batch_sizes=(4,))
    result = tfquant.quantize(model, DATA, config)
    assert result.report.fidelity.samples == 40
    assert result.report.fidelity.sqnr > 35
    assert [entry.batch_size for entry in result.report.latency] == [4]
    assert bytes_of(result) == bytes_of(tfquant.quantize(model, config=DYNAMIC))


def test_the_plan_applied_again_gives_the_same_bytes(model, tmp_path):
    result = tfquant.quantize(model, config=tfquant.QuantConfig(mode="dynamic", verify=False, activation_mode="symmetric"))
    result.save(tmp_path / "int8")
    content = json.loads((tmp_path / "int8" / "quant_plan.json").read_text())
    assert content["mode"] == "dynamic"
    entry = {"dtype": "qint8", "range": "dynamic", "zero_point": 0}
    assert list(content["tensors"].values()) == [entry, entry]
    again = tfquant.quantize(model, plan=tmp_path / "int8")
    assert bytes_of(again) == bytes_of(result)
    again.save(tmp_path / "again")
    for name in ("quant_plan.json", "quant_plan.npz"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "int8" / name).read_bytes()


def test_an_edited_plan(model, tmp_path):
    tfquant.quantize(model, config=DYNAMIC).save(tmp_path / "int8")
    file = tmp_path / "int8" / "quant_plan.json"
    content = json.loads(file.read_text())
    content["ops"][0] |= {"int8": False, "reason": "I say so"}
    file.write_text(json.dumps(content))
    result = tfquant.quantize(model, plan=file)
    assert [node.op for node in result.graph_def.node].count("_QuantizedMatMul") == 1
    for name, value in (("range", "static"), ("zero_point", 3), ("zero_point", "0"), ("dtype", "qint32")):
        wrong = json.loads(json.dumps(content))
        next(iter(wrong["tensors"].values()))[name] = value
        file.write_text(json.dumps(wrong))
        with pytest.raises(PlanError, match="must have a range, or be 'quint8' or 'qint8'"):
            tfquant.quantize(model, plan=file)


def test_the_ignored_scope(model):
    config = tfquant.QuantConfig(mode="dynamic", verify=False, ignored_scope=("type:MatMul",))
    assert [decision.int8 for decision in tfquant.quantize(model, config=config).plan.ops] == [False, False]


def test_a_plan_of_another_mode(model, tmp_path):
    static = tfquant.quantize(model, DATA, tfquant.QuantConfig(verify=False, placement="int8"))
    with pytest.raises(ConfigError, match=r"The plan is of mode static.*Received: dynamic"):
        tfquant.quantize(model, plan=static.plan, config=DYNAMIC)
    dynamic = tfquant.quantize(model, config=DYNAMIC)
    assert tfquant.quantize(model, plan=dynamic.plan).plan.mode == "dynamic"


def test_on_the_command_line(model, tmp_path):
    command = [sys.executable, "-m", "tfquant.calibrate", "--saved_model", str(model), "--mode", "dynamic", "--output"]
    done = subprocess.run([*command, str(tmp_path / "int8")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "(mode dynamic)" in done.stdout
    assert "Multiply-accumulates in INT8: 100.00%" in done.stdout
    (tmp_path / "job.yaml").write_text(f"saved_model: {model}\noutput: job\nquantization:\n  mode: dynamic\n")
    command = [sys.executable, "-m", "tfquant.calibrate", "--config", str(tmp_path / "job.yaml")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    for name in ("quant_plan.json", "quant_plan.npz"):
        assert (tmp_path / "job" / name).read_bytes() == (tmp_path / "int8" / name).read_bytes()
