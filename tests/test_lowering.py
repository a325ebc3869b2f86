"""Every lowering rule against the simulation: each 8-bit tensor within one step of what its unit should make of its inputs."""

import os
import subprocess
import sys
from pathlib import Path

import building
import numpy as np
import pytest
import tensorflow as tf

from tfquant.plan.spec import S8, U8
from tfquant.targets import onednn

# Without oneDNN, QuantizedAvgPool truncates (-0.5 steps on average), and QuantizeV2 to qint8 takes the range that the lowering
# widens for oneDNN at its word (gain 127 / 127.5: half a step at the ends).
IS_ONEDNN_ON = os.environ.get("TF_ENABLE_ONEDNN_OPTS") != "0"
MORE = {} if IS_ONEDNN_ON else {"avg_pool": 1.0, "float": 0.5}

IMAGE = (9, 7, 8)


class Random:
    """Weights and data, the same for the same seed."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape):
        return self.rng.normal(size=shape).astype(np.float32)

    def weights(self, *shape):
        return (self.rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)


def samples(count, shape, kind="normal", size=1.0):
    rng = np.random.default_rng(7)
    values = rng.normal(size=(count, *shape))
    if kind in ("positive", "negative"):
        values = np.abs(values) * (1 if kind == "positive" else -1)
    elif kind == "shifted":
        values = values * 0.5 + 1.5
    elif kind == "equal":
        values[...] = 0.7
    elif kind == "zero":
        values[...] = 0
    return (values * size).astype(np.float32)


def conv(x, random, kernel=(1, 1), channels=8, strides=1, padding="SAME", dilations=1, bias=True):
    y = tf.nn.conv2d(x, random.weights(*kernel, x.shape[3], channels), strides, padding, dilations=dilations)
    return tf.nn.bias_add(y, random(channels)) if bias else y


def depthwise(x, random, kernel=(3, 3), multiplier=1, stride=1, padding="SAME", bias=True):
    weights = random.weights(*kernel, x.shape[3], multiplier)
    y = tf.nn.depthwise_conv2d(x, weights, (1, stride, stride, 1), padding)
    return tf.nn.bias_add(y, random(x.shape[3] * multiplier)) if bias else y


def dense(x, random, outputs=5):
    return tf.nn.bias_add(tf.matmul(x, random.weights(x.shape[1], outputs)), random(outputs))


def last(x, random):
    """A layer with a float result, so that `x` is an 8-bit tensor."""
    return conv(x, random, channels=3) if len(x.shape) == 4 else dense(x, random, 3)


def plan(function, shape=IMAGE, batch=3, data="normal", size=1.0, unknown=()):
    """A function of (tensor, Random) with its plan, and the data."""
    random = Random()
    specs = {"x": (None, *(None if axis in unknown else length for axis, length in enumerate(shape)))}
    graph = building.build(lambda x: function(x, random), specs)
    batches = [{"x": samples(batch, shape, data, size)}]
    return building.plan_for(graph, batches), batches


def check(function, **options):
    """Takes a function of (tensor, Random) to INT8; returns (graph with its plan, INT8 graph) where nothing disagrees."""
    planned, batches = plan(function, **options)
    assert building.disagreements(planned, batches, MORE) == []
    return planned, onednn.lower(planned.graph, planned.annotation.units, planned.plan)


def floats(planned):
    """(op, reason) of what stays float."""
    return [(decision.op, decision.reason) for decision in planned.plan.ops if not decision.int8]


def reasons(planned, op):
    return [reason for other, reason in floats(planned) if other == op]


def ops(graph):
    return [node.op for node in graph.order()]


def fused(graph):
    """The fused ops of every oneDNN kernel."""
    return [node.attr("fused_ops") for node in graph.order() if node.attr("fused_ops")]


def activation(name):
    return {"none": lambda x: x, "relu": tf.nn.relu, "relu6": lambda x: tf.nn.relu6(4 * x)}[name]


# -- convolutions ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("padding", ["SAME", "VALID", "pad"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 3), (1, 2), (3, 1)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 7), (5, 2)])
def test_conv(kernel, strides, padding):
    case = sum(kernel) + 3 * sum(strides) + 5 * len(padding)
    depth, channels = [1, 3, 8, 17][case % 4], [8, 17, 3, 1][(case // 2) % 4]

    def net(x, random):
        if padding == "pad":
            x = tf.pad(x, [(0, 0), (2, 1), (0, 3), (0, 0)])
        y = conv(x, random, kernel, channels, strides, "VALID" if padding == "pad" else padding, bias=case % 3 > 0)
        return last(activation(["none", "relu", "relu6"][case % 3 - 1])(y), random)

    planned, lowered = check(net, shape=(9, 7, depth), batch=[1, 3][case % 2], data=["normal", "shifted"][case // 3 % 2])
    assert floats(planned) == []
    assert len(fused(lowered)) == 2
    assert "Conv2D" not in ops(lowered)


@pytest.mark.parametrize("name", ["none", "relu", "relu6"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layer", ["conv", "depthwise", "dense"])
@pytest.mark.parametrize("is_float", [False, True])
def test_bias_and_activation(layer, bias, name, is_float):
    def net(x, random):
        if layer == "conv":
            y = conv(x, random, (3, 3), bias=bias)
        elif layer == "depthwise":
            y = depthwise(x, random, bias=bias)
        else:
            y = tf.matmul(x, random.weights(24, 7)) + (random(7) if bias else 0.0)
        y = activation(name)(y)
        return y if is_float else last(y, random)

    planned, lowered = check(net, shape=(24,) if layer == "dense" else IMAGE)
    assert [decision.int8 for decision in planned.plan.ops] == [True] * (1 if is_float else 2)
    assert len(fused(lowered)) == (1 if is_float else 2)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("dilations", [(2, 2), (1, 3), (2, 1)])
def test_dilated_conv(dilations, padding):
    planned, lowered = check(lambda x, random: last(conv(x, random, (3, 3), 8, 1, padding, dilations), random), shape=(11, 9, 3))
    assert floats(planned) == []
    assert "Conv2D" not in ops(lowered)


def test_explicit_padding():
    pads = [[0, 0], [2, 1], [0, 3], [0, 0]]
    planned, lowered = check(lambda x, random: last(tf.nn.relu(conv(x, random, (3, 3), 8, 2, pads, bias=False)), random))
    assert floats(planned) == []
    assert "Conv2D" not in ops(lowered)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_depthwise(multiplier, stride, padding):
    depth = [1, 3, 8, 17][(multiplier + stride) % 4]
    kernel = [(3, 3), (1, 1), (5, 2)][(multiplier * stride) % 3]
    data = ["normal", "shifted"][multiplier % 2]
    net = lambda x, random: last(depthwise(x, random, kernel, multiplier, stride, padding), random)  # noqa: E731
    planned, lowered = check(net, shape=(9, 7, depth), data=data)
    assert floats(planned) == []
    assert "_FusedQuantizedDepthwiseConv2D" in ops(lowered)


@pytest.mark.parametrize("data", ["normal", "shifted", "positive", "negative"])
@pytest.mark.parametrize("channels", [3, 8, 12])
def test_padded_input_below_zero(data, channels):
    """Symmetric ranges go as qint8, others as quint8 padded with their zero point; positive ones need neither."""
    planned, lowered = check(lambda x, random: last(conv(x, random, (3, 3)), random), shape=(9, 7, channels), data=data)
    spec = planned.plan.tensors["x"]
    assert spec.dtype == (S8 if data == "normal" else U8)
    assert ("PadV2" in ops(lowered)) == (data in ("shifted", "negative"))
    assert ("EXPLICIT" in [node.attr("padding") for node in lowered.order()]) == (data in ("normal", "positive"))
    if data == "normal":
        assert spec.zero_point == 0


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("data", ["normal", "positive", "negative", "shifted", "equal", "zero"])
def test_ranges(data, size):
    def net(x, random):
        y = conv(x, random, (3, 3)) if size == 1 else conv(x, random, (3, 3), bias=False)
        y = depthwise(tf.nn.relu(y), random, bias=False)
        return last(tf.nn.max_pool2d(y, 2, 2, "SAME"), random)

    planned, _ = check(net, data=data, size=size)
    assert floats(planned) == []


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layer", ["conv", "depthwise", "dense", "batch norm"])
@pytest.mark.parametrize("kind", ["dead", "all dead", "uneven"])
def test_uneven_channels(kind, layer, bias):
    factor = {"dead": [1, 0, 1, 0, 0, 2, 1, 1], "all dead": [0] * 8, "uneven": [1, 1e-6, 1e-3, 10, 1, 0.1, 1e-4, 0]}[kind]

    def net(x, random):
        factors = np.array(factor, np.float32)
        if layer == "conv":
            y = tf.nn.conv2d(x, random.weights(3, 3, 8, 8) * factors, 1, "SAME")
        elif layer == "depthwise":
            y = tf.nn.depthwise_conv2d(x, random.weights(3, 3, 8, 1) * factors[:, None], (1, 1, 1, 1), "SAME")
        elif layer == "dense":
            y = tf.matmul(x, random.weights(12, 8) * factors)
        else:
            y = tf.nn.max_pool2d(conv(x, random), 2, 2, "SAME") * factors
        y = tf.nn.bias_add(y, random(8)) if bias else y
        return [last(y, random), last(tf.nn.relu(y), random)]

    planned, _ = check(net, shape=(12,) if layer == "dense" else IMAGE)
    assert [op for op, _ in floats(planned) if op != "Relu"] == []


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 5), (5, 1), (1, 1), (17, 3), (64, 33)])
@pytest.mark.parametrize("transposed", [False, True])
def test_matmul(inputs, outputs, transposed):
    def net(x, random):
        weights = random.weights(outputs, inputs) if transposed else random.weights(inputs, outputs)
        return last(tf.nn.relu(tf.nn.bias_add(tf.matmul(x, weights, transpose_b=transposed), random(outputs))), random)

    planned, lowered = check(net, shape=(inputs,), batch=9)
    assert floats(planned) == []
    assert ops(lowered).count("_QuantizedMatMul") == 2


# -- sums ------------------------------------------------------------------------------------------------------------------
def count_sums(graph):
    return sum("Sum" in names for names in fused(graph))


@pytest.mark.parametrize("layer", [conv, depthwise])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_residual(layer, relu, swapped):
    def net(x, random):
        y = tf.nn.relu(conv(x, random))
        z = layer(conv(y, random, (3, 3)), random)
        z = y + z if swapped else z + y
        return last(tf.nn.relu(z) if relu else z, random)

    planned, lowered = check(net)
    assert floats(planned) == []
    assert count_sums(lowered) == 1
    assert "Snapshot" not in ops(lowered)  # the conv runs last, nothing has to be copied


def later_consumers(x, random):
    y = tf.nn.relu(conv(x, random))
    z = tf.nn.relu(conv(conv(y, random, (3, 3)), random) + y)
    return [last(conv(z, random), random), last(tf.nn.max_pool2d(y, 2, 2, "SAME"), random), last(y, random)]


def own_input(x, random):
    y = tf.nn.relu(conv(x, random))
    return last(tf.nn.relu(conv(y, random, (3, 3)) + y), random)


def own_input_twice(x, random):
    y = tf.nn.relu(conv(x, random))
    return [last(conv(y, random, (3, 3)) + y, random), last(conv(y, random, (3, 3)) + y, random)]


def aliased(x, random):
    y = tf.nn.relu(conv(x, random))
    z = tf.squeeze(tf.expand_dims(tf.identity(tf.reshape(tf.reshape(y, [-1, 63, 8]), [-1, 9, 7, 8])), 1), 1)
    return [last(tf.nn.relu(conv(conv(y, random), random) + z), random), last(y, random)]


def of_input(x, random):
    return last(tf.nn.relu(conv(conv(x, random), random) + x), random)


def long_skip(x, random):
    y = tf.nn.relu(conv(x, random))
    z = y
    for _ in range(3):
        z = tf.nn.relu(conv(z, random, (3, 3)))
    return last(z + y, random)


def two_long_skips(x, random):
    y = tf.nn.relu(conv(x, random))
    z = tf.nn.relu(conv(y, random))
    return [last(tf.nn.max_pool2d(z, 1, 1, "SAME") + y, random), last(tf.nn.max_pool2d(y, 1, 1, "SAME") + z, random)]


def itself(x, random):
    y = tf.nn.relu(conv(x, random))
    return last(y + y, random)


def chain(x, random):
    y = conv(x, random)
    for _ in range(4):
        y = conv(tf.nn.relu(depthwise(conv(y, random), random)), random) + y
    return last(y, random)


def twin_layers(x, random):
    weights, more, other = (random.weights(3, 3, 8, 8) for _ in range(3))
    one, two = (tf.nn.relu(tf.nn.conv2d(x, weights, 1, "SAME")) for _ in range(2))
    return [last(tf.nn.conv2d(x, w, 1, "SAME") + y, random) for y, w in ((one, more), (two, other))]


def three_readers(x, random):
    y = tf.nn.relu(conv(x, random))
    return [last(conv(conv(y, random), random) + y, random) for _ in range(3)]


SUMS = {  # net: fused sums
    later_consumers: 1,
    own_input: 1,
    aliased: 1,
    of_input: 1,
    long_skip: 1,
    two_long_skips: 2,
    itself: 1,
    chain: 4,
}


@pytest.mark.parametrize("net", SUMS, ids=lambda net: net.__name__)
@pytest.mark.parametrize("data", ["normal", "positive"])
def test_sums(net, data):
    planned, lowered = check(net, data=data)
    assert count_sums(lowered) == SUMS[net]
    assert [op for op, _ in floats(planned) if op != "MaxPool"] == []


# TensorFlow merges nodes that compute the same. Two summands must not become one buffer, neither in a function nor in what a
# SavedModel runs (loaded as a function or as a TF1 session).
CRASHING = """
import sys, tempfile
sys.path[:0] = {path!r}
import building, numpy as np, test_lowering
from tfquant.targets import onednn
planned, batches = test_lowering.plan(test_lowering.{net})
lowered = onednn.lower(planned.graph, planned.annotation.units, planned.plan)
assert building.disagreements(planned, batches) == []
first = building.serve(lowered, batches)
for _ in range(3):
    again = building.serve(lowered, batches)
    assert all(np.array_equal(first[key], again[key]) for key in first)
import tensorflow as tf
from tfquant.graph.execution import executable
function = executable(lowered)
names = list(lowered.inputs)
specs = [tf.TensorSpec(lowered.inputs[name].shape, tf.float32, name=name) for name in names]
module = tf.Module()
module.f = tf.function(lambda *x: dict(zip(lowered.outputs, function(*x))), input_signature=specs, autograph=False)
expected = function(*(tf.constant(batches[0][name]) for name in names))
with tempfile.TemporaryDirectory() as folder:
    tf.saved_model.save(module, folder, signatures=module.f)
    found = tf.saved_model.load(folder).signatures["serving_default"](**{{n: tf.constant(batches[0][n]) for n in names}})
    for key, value in zip(lowered.outputs, expected):
        assert np.array_equal(value, found[key])
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        signature = tf.compat.v1.saved_model.load(session, ["serve"], folder).signature_def["serving_default"]
        feeds = {{signature.inputs[name].name: batches[0][name] for name in names}}
        for _ in range(3):
            results = session.run({{key: info.name for key, info in signature.outputs.items()}}, feeds)
            assert all(np.array_equal(value, results[key]) for key, value in zip(lowered.outputs, expected))
"""


@pytest.mark.parametrize("net", [own_input_twice, twin_layers, three_readers], ids=lambda net: net.__name__)
def test_sums_that_tensorflow_could_merge(net):
    path = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    done = subprocess.run([sys.executable, "-c", CRASHING.format(path=path, net=net.__name__)], capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


@pytest.mark.parametrize("kind", ["constant", "row", "broadcast"])
def test_summand_that_no_kernel_takes(kind):
    def net(x, random):
        y = tf.nn.relu(conv(x, random))
        if kind == "constant":
            other = tf.constant(random(1, *IMAGE))
        else:
            other = tf.reduce_mean(y, [1, 2] if kind == "broadcast" else [1], keepdims=True)
        return last(tf.nn.relu(conv(y, random, (3, 3)) + other), random)

    planned, lowered = check(net)
    reason = "a constant is added" if kind == "constant" else "the shape (None, 1, "
    (found,) = [why for op, why in floats(planned) if op == "AddV2"]
    assert found.startswith(reason)
    assert count_sums(lowered) == 0


# -- other ops ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["none", "relu", "relu6"])
@pytest.mark.parametrize("fused_op", [False, True])
def test_lone_batch_norm(name, fused_op):
    def net(x, random):
        y = tf.nn.max_pool2d(tf.nn.relu(conv(x, random)), 2, 2, "SAME")
        scale, shift = random(8), random(8)
        if fused_op:
            y = tf.compat.v1.nn.fused_batch_norm(y, scale, shift, random(8), random(8) ** 2 + 0.1, is_training=False)[0]
        else:
            y = y * scale + shift
        y = activation(name)(y)
        return [last(y, random), last(tf.nn.max_pool2d(y, 2, 2, "SAME"), random)]

    planned, lowered = check(net)
    assert floats(planned) == []
    assert "_FusedQuantizedDepthwiseConv2D" in ops(lowered)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("window", "strides"), [((2, 2), (2, 2)), ((3, 3), (2, 2)), ((3, 2), (1, 3)), ((1, 1), (1, 1))])
@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("data", ["normal", "shifted"])
def test_pool(kind, window, strides, padding, data):
    pool = tf.nn.max_pool2d if kind == "max" else tf.nn.avg_pool2d
    net = lambda x, random: last(pool(conv(x, random), window, strides, padding), random)  # noqa: E731
    planned, lowered = check(net, data=data)
    assert floats(planned) == []
    assert ("QuantizedMaxPool" if kind == "max" else "QuantizedAvgPool") in ops(lowered)


@pytest.mark.parametrize("kind", ["mean", "kept", "pool", "max"])
def test_global_pooling(kind):
    def net(x, random):
        y = tf.nn.relu(conv(x, random))
        if kind == "kept":
            return last(tf.reduce_mean(y, [1, 2], keepdims=True), random)
        if kind == "pool":
            return last(tf.nn.avg_pool2d(y, IMAGE[:2], 1, "VALID"), random)
        return last((tf.reduce_mean if kind == "mean" else tf.reduce_max)(y, [1, 2]), random)

    planned, lowered = check(net)
    assert [op for op, _ in floats(planned)] == (["AvgPool"] if kind == "pool" else [])
    assert "QuantizedAvgPool" not in ops(lowered)
    assert len(fused(lowered)) == 2
    assert "Relu" not in planned.plan.tensors  # the mean is that of the float result


def concatenated(kinds, axis=3):
    def net(x, random):
        makers = {
            "relu": lambda: tf.nn.relu(conv(x, random)),
            "relu6": lambda: tf.nn.relu6(4 * conv(x, random)),
            "signed": lambda: conv(x, random),
            "large": lambda: 5 * conv(x, random),
            "large relu": lambda: tf.nn.relu(5 * conv(x, random)),
            "input": lambda: x,
            "float": lambda: tf.nn.leaky_relu(conv(x, random)),
        }
        return last(tf.concat([makers[kind]() for kind in kinds], axis), random)

    return net


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize(
    "kinds",
    [
        ["relu", "relu"],
        ["signed", "large"],
        ["relu", "relu6"],
        ["signed", "input", "signed"],
        ["relu", "large relu"],
        ["relu", "signed"],
        ["large relu", "signed"],
        ["large relu", "input"],
    ],
    ids="-".join,
)
def test_concat(kinds, axis):
    planned, lowered = check(concatenated(kinds, axis))
    assert floats(planned) == []
    assert ops(lowered).count("ConcatV2") == 1


@pytest.mark.parametrize("read", [False, True])
def test_concat_with_a_float_tensor(read):
    """It is quantized for the concat where another layer reads it in 8 bits anyway."""

    def net(x, random):
        y = tf.nn.leaky_relu(conv(x, random, (3, 3)))
        z = last(tf.concat([y, conv(x, random)], 3), random)
        return [z, last(y, random)] if read else z

    planned, lowered = check(net)
    assert [op for op, _ in floats(planned)] == ([] if read else ["ConcatV2"])
    assert ops(lowered).count("QuantizeV2") == 2


def test_concat_of_one_tensor():
    def net(x, random):
        y = tf.nn.relu(conv(x, random))
        return last(tf.concat([y, y, tf.nn.max_pool2d(y, 3, 1, "SAME")], -1), random)

    planned, _ = check(net)
    assert floats(planned) == []


@pytest.mark.parametrize("channels", [3, 4, 8])
@pytest.mark.parametrize("data", ["normal", "positive"])
def test_lone_pad(channels, data):
    def net(x, random):
        y = tf.pad(conv(x, random, channels=channels), [(0, 0), (1, 2), (0, 1), (0, 0)])
        return [last(tf.nn.max_pool2d(y, 2, 2, "VALID"), random), last(tf.nn.avg_pool2d(y, 2, 2, "VALID"), random)]

    planned, lowered = check(net, data=data)
    assert floats(planned) == []
    assert "PadV2" in ops(lowered)


@pytest.mark.parametrize("kind", ["channels", "value", "reflect"])
def test_other_pads(kind):
    def net(x, random):
        y = conv(x, random)
        pads = [(0, 0), (1, 2), (0, 1), (0, 2) if kind == "channels" else (0, 0)]
        y = tf.pad(y, pads, "REFLECT" if kind == "reflect" else "CONSTANT", constant_values=1.5 if kind == "value" else 0)
        return last(tf.nn.max_pool2d(y, 2, 2, "SAME"), random)

    check(net)


@pytest.mark.parametrize("kind", ["flatten", "reshape", "squeeze", "image"])
def test_moves(kind):
    def net(x, random):
        y = tf.nn.relu(conv(x, random, (3, 3), strides=2))
        if kind == "flatten":
            return last(tf.reshape(y, [-1, 5 * 4 * 8]), random)
        if kind == "reshape":
            return last(tf.reshape(y, [-1, 4, 5, 8]), random)
        if kind == "squeeze":
            return last(tf.squeeze(tf.expand_dims(y, 2), 2), random)
        return last(tf.reshape(last(tf.reshape(y, [-1, 160]), random), [-1, 1, 1, 3]), random)

    planned, lowered = check(net)
    assert floats(planned) == []
    assert ops(lowered).count("QuantizeV2") == 1


@pytest.mark.parametrize("kind", ["swish", "softmax", "leaky", "gelu", "gate"])
def test_float_islands(kind):
    def net(x, random):
        y = conv(x, random, (3, 3))
        if kind == "gate":
            y = y * tf.sigmoid(conv(tf.reduce_mean(y, [1, 2], keepdims=True), random))
        else:
            functions = {"swish": tf.nn.silu, "softmax": tf.nn.softmax, "leaky": tf.nn.leaky_relu, "gelu": tf.nn.gelu}
            y = functions[kind](y)
        return last(conv(y, random, (3, 3)), random)

    planned, lowered = check(net)
    assert [op for op, _ in floats(planned) if op in ("Conv2D", "MatMul")] == []
    assert "Conv2D" not in ops(lowered)


def test_swish_costs_no_affine():
    """tf.nn.silu multiplies by a beta of 1."""
    _, lowered = check(lambda x, random: last(tf.nn.silu(conv(x, random)), random))
    assert "_FusedQuantizedDepthwiseConv2D" not in ops(lowered)


@pytest.mark.parametrize("layer", ["conv", "depthwise"])
@pytest.mark.parametrize("pads", [(2, 2, 0, 0), (0, 1, 3, 2), (1, 0, 0, 0)])
@pytest.mark.parametrize("kernel", [(1, 1), (1, 3), (3, 1)])
@pytest.mark.parametrize("data", ["positive", "normal", "shifted"])
@pytest.mark.parametrize("is_float", [True, False])
def test_windows_that_lie_in_the_padding(layer, pads, kernel, data, is_float):
    def net(x, random):
        top, bottom, left, right = pads
        x = tf.pad(x, [(0, 0), (top, bottom), (left, right), (0, 0)])
        y = {"conv": conv, "depthwise": depthwise}[layer](x, random, kernel, padding="VALID")
        return y if is_float else last(y, random)

    check(net, data=data)


@pytest.mark.parametrize(("kernel", "dilations"), [((5, 2), (2, 2)), ((1, 2), (1, 4)), ((3, 3), (1, 3)), ((2, 2), (4, 2))])
@pytest.mark.parametrize("shape", [(9, 1, 12), (3, 2, 8), (1, 1, 4)])
@pytest.mark.parametrize("is_float", [True, False])
@pytest.mark.parametrize("data", ["positive", "normal", "shifted"])
def test_dilations_wider_than_the_input(kernel, dilations, shape, is_float, data):
    def net(x, random):
        y = conv(x, random, kernel, channels=4, dilations=dilations)
        return y if is_float else last(y, random)

    check(net, shape=shape, data=data)


# -- groups ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("data", ["normal", "shifted"])
@pytest.mark.parametrize("is_float", [False, True])
@pytest.mark.parametrize(
    ("channels", "groups", "outputs", "kernels"),
    [
        (64, 2, 64, 2),
        (64, 16, 64, 2),
        (8, 4, 8, 1),
        (48, 3, 24, 1),
        (33, 3, 6, 1),
        (96, 3, 192, 3),
        (40, 20, 40, 1),
        (10, 5, 5, 1),
    ],
)
def test_groups(channels, groups, outputs, kernels, is_float, data):
    """As many convolutions as it takes for each to read 32 channels."""
    case = channels + outputs + 2 * is_float
    strides, padding = [1, 2][case % 2], ["SAME", "VALID"][case // 3 % 2]
    kernel = [(3, 3), (1, 1), (5, 2)][case % 3]

    def net(x, random):
        weights = random.weights(*kernel, channels // groups, outputs)
        y = tf.nn.bias_add(tf.nn.conv2d(x, weights, strides, padding), random(outputs))
        y = activation(["none", "relu", "relu6"][case // 2 % 3])(y)
        return y if is_float else last(y, random)

    planned, lowered = check(net, shape=(9, 7, channels), batch=[1, 3][case // 2 % 2], data=data)
    assert floats(planned) == []
    assert len(fused(lowered)) == kernels + (not is_float)
    assert "Conv2D" not in ops(lowered)


@pytest.mark.parametrize("unknown", [(0, 1), (1,)])
def test_groups_of_unknown_size(unknown):
    def net(x, random):
        return last(tf.nn.relu(tf.nn.conv2d(x, random.weights(3, 3, 32, 64), 2, "SAME")), random)

    planned, lowered = check(net, shape=(9, 7, 64), unknown=unknown)
    assert floats(planned) == []
    assert len(fused(lowered)) == 3


@pytest.mark.parametrize("size", [1e-4, 1e4])
@pytest.mark.parametrize("data", ["positive", "negative", "equal", "zero"])
def test_groups_of_any_range(data, size):
    def net(x, random):
        return last(tf.nn.conv2d(x, random.weights(3, 3, 32, 64), 1, "SAME"), random)

    check(net, shape=(5, 6, 64), data=data, size=size)


def test_sums_of_groups_are_added_by_themselves():
    def net(x, random):
        skip = tf.nn.relu(conv(x, random, channels=64))
        y = tf.nn.conv2d(skip, random.weights(3, 3, 32, 64), 1, "SAME")
        return last(tf.nn.relu(y + skip), random)

    planned, lowered = check(net)
    assert floats(planned) == []
    assert ["Sum" in names for names in fused(lowered)] == [False] * 3 + [True, False]


# -- decisions -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {"strides": 1},
        {"strides": 2},
        {"strides": 2, "kernel": (5, 2)},
        {"strides": 3, "kernel": (2, 3)},
        {"strides": 2, "padding": "VALID"},
        {"kernel": (1, 1)},
    ],
)
@pytest.mark.parametrize("data", ["normal", "shifted", "positive"])
def test_unknown_size(options, data):
    net = lambda x, random: last(tf.nn.relu(conv(x, random, **{"kernel": (3, 3), **options})), random)  # noqa: E731
    planned, _ = check(net, unknown=(0, 1), data=data)
    assert floats(planned) == []


def test_reason_weights():
    def net(x, random):
        weights = tf.reshape(tf.reduce_mean(x, [0, 1, 2])[:8], [1, 1, 8, 1])
        return [tf.nn.conv2d(x, weights, 1, "SAME"), last(x, random)]

    planned, _ = check(net)
    (reason,) = reasons(planned, "Conv2D")
    assert reason.startswith("its weights are not a constant")


def test_reason_transposed():
    planned, _ = check(lambda x, random: tf.matmul(x, random(3, 4), transpose_a=True), shape=(5,))
    assert floats(planned) == [("MatMul", "its first operand is transposed")]


@pytest.mark.parametrize("kind", ["conv", "sum", "pool", "concat", "batch norm", "shared"])
def test_outputs_are_not_rounded(kind):
    """`check` refuses an output that is an 8-bit value."""

    def net(x, random):
        y = tf.nn.relu(conv(x, random))
        if kind == "conv":
            return conv(y, random, (3, 3))
        if kind == "sum":
            return conv(y, random, (3, 3)) + y
        if kind == "pool":
            return tf.nn.max_pool2d(y, 2, 2, "SAME")
        if kind == "concat":
            return tf.concat([y, conv(x, random)], 3)
        if kind == "batch norm":
            return tf.nn.max_pool2d(y, 2, 2, "SAME") * random(8) + random(8)
        return [y, last(y, random)]

    check(net)


@pytest.mark.parametrize("kind", ["reshape", "flatten"])
def test_shared_outputs_behind_a_move(kind):
    def net(x, random):
        y = conv(x, random)
        return [tf.reshape(y, [-1, 504] if kind == "flatten" else [-1, 7, 9, 8]), last(y, random)]

    check(net)


def test_output_inside_a_unit():
    def net(x, random):
        y = tf.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
        return [y, last(conv(y, random, (3, 3), padding="VALID"), random)]

    check(net)


# -- without oneDNN ------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not IS_ONEDNN_ON, reason="this is it")
@pytest.mark.slow
def test_without_onednn():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    chosen = (
        "test_conv or test_dilated or test_depthwise or test_ranges or test_pool or test_residual or test_sums or test_concat"
    )
    done = subprocess.run(
        [*command, "-k", f"({chosen}) and not merge and not without"],
        env={**os.environ, "TF_ENABLE_ONEDNN_OPTS": "0"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:]
