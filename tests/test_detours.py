"""Float ops between the kernels: what they become, and that they compute the same."""

import building
import numpy as np
import pytest
import tensorflow as tf

from tfquant.targets import onednn
from tfquant.targets.onednn import detours


def values(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ops(graph):
    return [node.op for node in graph.order() if node.op not in ("Const", "Placeholder")]


def rewritten(function, *shape, unknown=(), inputs=1):
    """The ops of `function` after the detours, which must compute the same."""
    specs = {f"x{i}": (None, *(None if axis in unknown else size for axis, size in enumerate(shape))) for i in range(inputs)}
    graph = building.build(function, specs)
    batches = [{name: 3 * values(2, *shape, seed=seed) for seed, name in enumerate(specs)}]
    (before,) = building.run(graph, batches)
    detours.run(graph)
    graph.prune()
    assert detours.run(graph.copy()) == 0
    (after,) = building.run(graph, batches)
    for key, value in before.items():
        assert after[key].shape == value.shape
        np.testing.assert_allclose(after[key], value, rtol=1e-5, atol=1e-5)
    return ops(graph)


def conv(x, kernel=3, channels=4, strides=1, padding="VALID", depthwise=False, bias=True):
    if depthwise:
        y = tf.nn.depthwise_conv2d(x, values(kernel, kernel, x.shape[3], 1), (1, strides, strides, 1), padding)
    else:
        y = tf.nn.conv2d(x, values(kernel, kernel, x.shape[3], channels), strides, padding)
    return tf.nn.bias_add(y, values(y.shape[3], seed=1)) if bias else y


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize(
    ("size", "kernel", "strides", "pads", "is_same"),
    [
        ((8, 6), 3, 2, ((0, 1), (0, 1)), True),
        ((7, 5), 3, 2, ((1, 1), (1, 1)), True),
        ((8, 6), 5, 2, ((1, 2), (1, 2)), True),
        ((8, 6), 3, 1, ((1, 1), (1, 1)), True),
        ((8, 6), 3, 2, ((1, 1), (1, 1)), False),
        ((8, 6), 3, 1, ((0, 1), (0, 1)), False),
        ((8, 6), 1, 2, ((1, 0), (0, 0)), False),
    ],
)
def test_padding_as_same(size, kernel, strides, pads, is_same, depthwise):
    def net(x):
        return conv(tf.pad(x, [(0, 0), *pads, (0, 0)]), kernel, strides=strides, depthwise=depthwise)

    layer = "DepthwiseConv2dNative" if depthwise else "Conv2D"
    assert rewritten(net, *size, 4) == [*(() if is_same else ("Pad",)), layer, "BiasAdd"]


def test_padding_that_others_read_stays_for_them():
    def net(x):
        padded = tf.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)])
        return [conv(padded, strides=2), tf.nn.relu(padded)]

    found = rewritten(net, 8, 8, 4)
    assert sorted(found) == ["BiasAdd", "Conv2D", "Pad", "Relu"]


def test_padding_of_an_unknown_size():
    assert "Pad" in rewritten(lambda x: conv(tf.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]), strides=2), 8, 8, 4, unknown=(0,))


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("activation", [None, tf.nn.relu, tf.nn.relu6, tf.sigmoid, tf.tanh, tf.nn.elu, tf.nn.leaky_relu])
@pytest.mark.parametrize("bias", [False, True])
def test_convolution_of_one_pixel(bias, activation, padding, strides):
    def net(x):
        y = conv(x, 1, strides=strides, padding=padding, bias=bias)
        return activation(y) if activation else y

    last = [] if activation is None else [rewritten(activation, 3)[0]]
    assert rewritten(net, 1, 1, 6) == ["Reshape", "MatMul", *["BiasAdd"] * bias, *last, "Reshape"]


def test_squeeze_and_excite():
    def net(x):
        squeezed = tf.reduce_mean(x, [1, 2], keepdims=True)
        return x * tf.sigmoid(conv(tf.nn.relu(conv(squeezed, 1, 3)), 1, 8))

    assert rewritten(net, 5, 5, 8).count("MatMul") == 2


@pytest.mark.parametrize(
    ("shape", "options"),
    [((1, 2, 4), {"kernel": 1}), ((1, 1, 4), {"kernel": 3, "padding": "SAME"}), ((1, 1, 4), {"kernel": 1, "depthwise": True})],
)
def test_other_convolutions_stay(shape, options):
    assert "MatMul" not in rewritten(lambda x: conv(x, **options), *shape)


def test_a_pixel_whose_bias_is_not_alone():
    def net(x):
        y = conv(x, 1, bias=False)
        return [tf.nn.bias_add(y, values(4)), y]

    assert rewritten(net, 1, 1, 4) == ["Reshape", "MatMul", "Reshape", "BiasAdd"]


@pytest.mark.parametrize(("size", "is_small"), [((1, 1, 64), True), ((8, 8, 64), True), ((9, 8, 64), False)])
def test_small_swish(size, is_small):
    assert rewritten(lambda x: x * tf.sigmoid(x), *size) == (["SoftplusGrad"] if is_small else ["Sigmoid", "Mul"])


def test_swish_of_unknown_size_stays():
    assert rewritten(lambda x: x * tf.sigmoid(x), 4, 4, 8, unknown=(0, 1)) == ["Sigmoid", "Mul"]


def test_a_gate_is_no_swish():
    assert "SoftplusGrad" not in rewritten(lambda x, y: x * tf.sigmoid(y), 1, 1, 8, inputs=2)


SIXTH = np.float32(1 / 6)
HARD_SWISH = {
    "gate": lambda x: tf.nn.relu6(x + 3) * SIXTH * x,
    "mirrored": lambda x: x * (SIXTH * tf.nn.relu6(3 + x)),
    "fused": lambda x: (x * SIXTH) * tf.nn.relu6(x + 3),
    "outside": lambda x: (x * tf.nn.relu6(x + 3)) * SIXTH,
}


@pytest.mark.parametrize("spelling", HARD_SWISH)
@pytest.mark.parametrize("depthwise", [False, True])
def test_hard_swish_behind_a_layer(depthwise, spelling):
    """TensorFlow fuses (x / 6) * relu6(x + 3) with the layer before."""
    graph = building.build(lambda x: HARD_SWISH[spelling](conv(x, depthwise=depthwise)), {"x": (None, 6, 6, 4)})
    detours.run(graph)
    node = graph.outputs["output_0"].node
    sixth, relu6 = (tensor.node for tensor in node.inputs)
    if sixth.op == "Relu6":
        sixth, relu6 = relu6, sixth
    assert (node.op, sixth.op, relu6.op, relu6.inputs[0].node.op) == ("Mul", "Mul", "Relu6", "AddV2")
    assert [tensor.value is None for tensor in sixth.inputs].count(False) == 1
    assert rewritten(lambda x: HARD_SWISH[spelling](conv(x, depthwise=depthwise)), 6, 6, 4).count("Mul") == 2


@pytest.mark.parametrize("spelling", HARD_SWISH)
def test_hard_swish_elsewhere(spelling):
    """The factor ends in the weights of the next layer."""
    assert rewritten(lambda x: conv(HARD_SWISH[spelling](x)), 6, 6, 4) == ["AddV2", "Relu6", "Mul", "Conv2D", "BiasAdd"]


@pytest.mark.parametrize(
    "function", [lambda x: tf.nn.relu6(x + 2) * SIXTH * x, lambda x: tf.nn.relu6(x + 3) * 0.3 * x], ids=["shift", "factor"]
)
def test_what_looks_like_hard_swish(function):
    rewritten(lambda x: function(conv(x)), 6, 6, 4)


# -- between kernels -------------------------------------------------------------------------------------------------------
def lowered(function, *shape, batch=3, data="normal"):
    graph = building.build(function, {"x": (None, *shape)})
    batches = [{"x": values(batch, *shape) + (1.5 if data == "shifted" else 0)}]
    planned = building.plan_for(graph, batches)
    assert building.disagreements(planned, batches) == []
    return planned, onednn.lower(planned.graph, planned.annotation.units, planned.plan)


def last(x):
    return conv(x, 3, 3, padding="SAME")


@pytest.mark.parametrize("data", ["normal", "shifted"])
@pytest.mark.parametrize("spelling", HARD_SWISH)
def test_hard_swish_between_kernels(spelling, data):
    lowered(lambda x: last(HARD_SWISH[spelling](conv(x, padding="SAME"))), 9, 7, 4, data=data)
