"""Mode weight_only: weights stored in 8 bits, computed with in float."""

import json
import subprocess
import sys

import building
import numpy as np
import pytest
import tensorflow as tf
from test_lowering import IS_ONEDNN_ON, Random, conv, dense, depthwise, ops, samples
from test_pipeline import bytes_of, make

import tfquant
from tfquant.errors import PlanError
from tfquant.simplify import simplify
from tfquant.targets import weightonly

WEIGHT_ONLY = tfquant.QuantConfig(mode="weight_only", verify=False)


def lowered(function, spec, batch, keep_float=lambda node: None, **options):
    """(float graph, its plan, the graph with 8-bit weights) where that computes what the simulation does, to the bit."""
    random = Random()
    graph = building.build(lambda x: function(x, random), {"x": spec})
    simplify(graph)
    plan = weightonly.make_weight_plan(graph, keep_float, signature_keys=("serving_default",), **options)
    result, simulation = weightonly.lower(graph, plan), weightonly.simulate(graph, plan)
    ((given,), (wanted,)) = (building.run(one, [{"x": batch}]) for one in (result, simulation))
    for key in wanted:
        assert np.array_equal(given[key], wanted[key])
        floats = building.run(graph, [{"x": batch}])[0][key]
        assert np.abs(given[key] - floats).max() <= 0.05 * np.abs(floats).max()
    for weights in weightonly.find_weights(graph, keep_float)[0]:
        scales = weights.shaped(plan.weight_scales[weights.name]).astype(np.float64)
        steps = np.abs(weights.integers(plan.weight_scales[weights.name]) - weights.value / scales)
        assert steps.max() <= 0.5 + 1e-6
    return graph, plan, result


IMAGE = (None, 9, 7, 16)
NETS = {
    "conv": (lambda x, random: conv(x, random, (3, 3), 24), IMAGE, (24,)),
    "conv of an odd number of weights": (lambda x, random: conv(x, random, (3, 3), 9), IMAGE, (9,)),
    "strided and dilated": (
        lambda x, random: conv(conv(x, random, (5, 2), 8, 2), random, (3, 3), 17, dilations=2),
        IMAGE,
        (8, 17),
    ),
    "depthwise": (lambda x, random: depthwise(x, random, (9, 9), 2), IMAGE, (32,)),
    "transposed conv": (
        lambda x, random: tf.nn.conv2d_transpose(x, random.weights(3, 3, 11, 16), [4, 18, 14, 11], 2),
        (4, 9, 7, 16),
        (11,),
    ),
    "conv3d": (lambda x, random: tf.nn.conv3d(x, random.weights(3, 3, 3, 4, 10), (1,) * 5, "SAME"), (None, 3, 5, 4, 4), (10,)),
    "dense": (lambda x, random: dense(x, random, 31), (None, 64), (31,)),
    "transposed dense": (lambda x, random: tf.matmul(x, random(31, 64), transpose_b=True), (None, 64), (31,)),
    "constant on the left": (lambda x, random: tf.matmul(random(40, 32), x), (32, 5), (40,)),
    "products of a batch": (lambda x, random: tf.matmul(x, random(4, 16, 20)), (4, 3, 16), (80,)),
    "einsum": (lambda x, random: tf.einsum("bhi,hio->bho", x, random(4, 16, 20)), (None, 4, 16), (80,)),
}


@pytest.mark.parametrize("name", NETS)
def test_layers(name):
    function, spec, counts = NETS[name]
    batch = samples(spec[0] or 3, spec[1:])
    _, plan, result = lowered(function, spec, batch)
    assert [scales.shape[0] for scales in plan.weight_scales.values()] == list(counts)
    assert [decision.int8 for decision in plan.ops] == [True] * len(counts)
    assert ops(result).count("LeftShift") == len(counts)
    assert building.serve(result, [{"x": batch}]).keys() == result.outputs.keys()


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("kind", ["normal", "positive", "equal", "zero"])
def test_weights_of_any_size(kind, size):
    value = samples(48, (32,), kind, size)
    lowered(lambda x, random: tf.matmul(x, value), (None, 48), samples(5, (48,)))


def test_one_scale_for_all():
    _, plan, _ = lowered(lambda x, random: dense(x, random, 31), (None, 64), samples(3, (64,)), weights="per_tensor")
    assert len({float(scale) for scale in plan.weight_scales["MatMul"]}) == 1


def test_rows_of_a_table_are_looked_up_in_8_bits():
    def net(x, random):
        found = tf.gather(random(100, 24), tf.cast(x, tf.int32) + 50)
        return tf.reduce_sum(found, 1)

    batch = np.arange(-20, 20).reshape(8, 5).astype(np.float32)
    _, plan, result = lowered(net, (None, 5), batch)
    assert plan.weight_scales["GatherV2"].shape == (100,)
    sizes = {node.out.dtype.name: node.value.size for node in result.order() if node.op == "Const" and node.value.size > 50}
    assert sizes == {"int8": 2400, "float32": 100}


def test_a_table_that_is_a_layer_too():
    """Tied embeddings."""

    def net(x, random):
        table = random(100, 24)
        found = tf.gather(table, tf.cast(x, tf.int32))
        return tf.linalg.matmul(found, tf.constant(table), transpose_b=True)

    lowered(net, (None,), np.arange(12, dtype=np.float32))


@pytest.mark.parametrize(
    "net",
    [
        lambda x, random: dense(x, random, 8),  # few values
        lambda x, random: x * random(40, 64),  # no layer
        lambda x, random: tf.gather(random(40, 64), tf.cast(x[:, 0], tf.int32), axis=1),  # columns
    ],
)
def test_what_stays_float(net):
    _, plan, result = lowered(net, (40, 64), np.zeros((40, 64), np.float32))
    assert plan.ops == ()
    assert "LeftShift" not in ops(result)


def test_a_layer_whose_weights_something_else_reads():
    def net(x, random):
        weights = tf.constant(random(64, 64))
        return tf.matmul(x, weights) + tf.reduce_sum(x) * weights

    _, plan, result = lowered(net, (64, 64), samples(64, (64,)))
    assert [decision.reason for decision in plan.ops] == ["mul (Mul) reads it too, which takes no weights"]
    assert "LeftShift" not in ops(result)


def optimized(graph, batch):
    """The nodes that TensorFlow runs."""
    config = tf.compat.v1.ConfigProto()
    config.graph_options.optimizer_options.opt_level = -1  # without the folding of constants that comes last
    facts = tf.compat.v1.RunMetadata()
    with tf.Graph().as_default() as scratch, tf.compat.v1.Session(graph=scratch, config=config) as session:
        tf.graph_util.import_graph_def(graph.to_graph_def(), name="")
        fetches = [f"{tensor.node.name}:0" for tensor in graph.outputs.values()]
        options = tf.compat.v1.RunOptions(output_partition_graphs=True)
        session.run(fetches, {"x:0": batch}, options=options, run_metadata=facts)
    return [node for part in facts.partition_graphs for node in part.node]


@pytest.mark.skipif(not IS_ONEDNN_ON, reason="oneDNN packs the weights")
@pytest.mark.parametrize("channels", [64, 129])
def test_tensorflow_folds_the_weights_before_onednn_packs_them(channels):
    """Also beyond 100 kB, the size up to which it folds what grows."""

    def net(x, random):
        y = tf.nn.relu(conv(x, random, (3, 3), channels))
        return tf.reshape(y, [-1, 81 * channels]) @ random.weights(81 * channels, 33)

    spec = (None, 9, 9, 64)
    _, _, result = lowered(net, spec, samples(2, spec[1:]))
    nodes = optimized(result, samples(2, spec[1:]))
    assert not [node.op for node in nodes if node.op in ("LeftShift", "RightShift", "Pack", "Cast", "Mul")]
    packed = [node.attr["is_filter_const"].b for node in nodes if "is_filter_const" in node.attr]
    assert packed
    assert all(packed)


# -- whole models ------------------------------------------------------------------------------------------------------------
def net(path):
    """Words and an image to classes; most of it are weights."""
    random = Random(4)
    module = tf.Module()
    module.variables_ = [
        tf.Variable(random(4000, 256)),
        tf.Variable(random.weights(3, 3, 3, 32)),
        tf.Variable(random.weights(288, 1500)),
    ]
    table, kernel, head = module.variables_

    def call(words, image):
        text = tf.reduce_mean(tf.gather(table, words), 1)
        seen = tf.reduce_mean(tf.nn.relu(tf.nn.conv2d(image, kernel, 1, "SAME")), (1, 2))
        return {"y": tf.concat([text, seen], 1) @ head}

    specs = [tf.TensorSpec((None, 6), tf.int32, name="words"), tf.TensorSpec((None, 8, 8, 3), tf.float32, name="image")]
    module.net = tf.function(call, input_signature=specs, autograph=False)
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.net})
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return net(tmp_path_factory.mktemp("weight_only") / "model")


RNG = np.random.default_rng(6)
DATA = {"words": RNG.integers(0, 4000, (20, 6)).astype(np.int32), "image": RNG.normal(size=(20, 8, 8, 3)).astype(np.float32)}


def served(path, data=DATA):
    signature = tf.saved_model.load(str(path)).signatures["serving_default"]
    return signature(**{key: tf.constant(value) for key, value in data.items()})["y"].numpy()


def sqnr(expected, found):
    return 10 * np.log10((expected**2).sum() / ((expected - found) ** 2).sum())


def test_size_and_closeness(model, tmp_path):
    result = tfquant.quantize(model, config=WEIGHT_ONLY)
    result.save(tmp_path / "small")
    before, after = (sum(file.stat().st_size for file in path.rglob("*")) for path in (model, tmp_path / "small"))
    assert after < 0.27 * before
    expected, found = served(model), served(tmp_path / "small")
    assert sqnr(expected, found) > 38
    assert np.allclose(found, result(**DATA)["y"], atol=1e-6)
    assert np.allclose(found, result.simulation()(DATA)["y"], atol=1e-5)
    text = str(result.report)
    assert "Quantized model (mode weight_only)" in text
    assert "8-bit weights" in text
    assert "Multiply-accumulates" not in text


def test_data_is_used_to_verify(model):
    config = tfquant.QuantConfig(mode="weight_only", verify_batch_sizes=(2,))
    result = tfquant.quantize(model, DATA, config)
    assert result.report.fidelity.sqnr > 38
    assert [entry.batch_size for entry in result.report.latency] == [2]


@pytest.mark.parametrize("format", ["graphdef", "fakequant"])
def test_other_formats(model, tmp_path, format):
    result = tfquant.quantize(model, config=WEIGHT_ONLY)
    result.save(tmp_path / "other", format=format)
    expected = result(**DATA)["y"]
    if format == "fakequant":
        assert np.allclose(served(tmp_path / "other"), expected, atol=1e-5)
        return
    content = tf.compat.v1.GraphDef.FromString((tmp_path / "other" / "frozen_graph.pb").read_bytes())
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph) as session:
        tf.graph_util.import_graph_def(content, name="")
        found = session.run("y:0", {f"{name}:0": value for name, value in DATA.items()})
    assert np.allclose(found, expected, atol=1e-5)


def test_the_plan_applied_again_gives_the_same_bytes(model, tmp_path):
    result = tfquant.quantize(model, config=WEIGHT_ONLY)
    result.save(tmp_path / "small")
    again = tfquant.quantize(model, plan=tmp_path / "small")
    assert bytes_of(again) == bytes_of(result)
    assert again.plan.ops == result.plan.ops
    content = json.loads((tmp_path / "small" / "quant_plan.json").read_text())
    content["ops"][0] |= {"int8": False, "reason": "I say so"}
    (tmp_path / "small" / "quant_plan.json").write_text(json.dumps(content))
    edited = tfquant.quantize(model, plan=tmp_path / "small")
    assert [node.op for node in edited.graph_def.node].count("LeftShift") == 1
    assert [(decision.op, decision.reason) for decision in edited.report.float_ops] == [(content["ops"][0]["op"], "I say so")]


def test_plans_that_do_not_fit(model, tmp_path):
    plan = tfquant.quantize(model, config=WEIGHT_ONLY).plan
    other = tf.Module()
    other.kernel = tf.Variable(Random()(40, 64))
    other.net = make(lambda x: {"y": x @ other.kernel}, (None, 40), names=["x"])
    tf.saved_model.save(other, str(tmp_path / "other"), signatures={"serving_default": other.net})
    with pytest.raises(PlanError, match="belongs to another model"):
        tfquant.quantize(tmp_path / "other", plan=plan)
    name = next(iter(plan.weight_scales))
    plan.weight_scales[name] = plan.weight_scales[name][1:]
    with pytest.raises(PlanError, match=r"The plan needs \d+ weight scales"):
        tfquant.quantize(model, plan=plan)


def test_the_ignored_scope(model):
    config = tfquant.QuantConfig(mode="weight_only", verify=False, ignored_scope=("type:MatMul",))
    result = tfquant.quantize(model, config=config)
    reasons = {decision.op: decision.reason for decision in result.plan.ops}
    assert reasons == {"GatherV2": "", "MatMul": "the ignored scope names it (type:MatMul)"}


def test_on_the_command_line(model, tmp_path):
    command = [sys.executable, "-m", "tfquant.calibrate", "--saved_model", str(model), "--mode=weight_only", "--output"]
    done = subprocess.run([*command, str(tmp_path / "small")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "(mode weight_only)" in done.stdout
    assert sqnr(served(model), served(tmp_path / "small")) > 38
