"""`_QuantizedMatMul` in all its forms against the simulation: every activation, residual adds, rows of larger tensors."""

import os
import subprocess
import sys
from pathlib import Path

import building
import numpy as np
import pytest
import tensorflow as tf
from test_lowering import IS_ONEDNN_ON, MORE, Random, check, conv, floats, fused, last, ops, reasons, samples

from tfquant.plan.spec import U8
from tfquant.targets import onednn

ROOT = np.float32(0.5**0.5)
ACTIVATIONS = {
    "Relu": tf.nn.relu,
    "Relu6": lambda x: tf.nn.relu6(4 * x),
    "LeakyRelu": tf.nn.leaky_relu,
    "Elu": tf.nn.elu,
    "Tanh": tf.tanh,
    "Sigmoid": tf.sigmoid,
    "GeluExact": lambda x: 0.5 * x * tf.math.erfc(-x * ROOT),
    "GeluApproximate": lambda x: tf.nn.gelu(x, approximate=True),
}
SMOOTH = [name for name in ACTIVATIONS if not name.startswith("Relu")]


def dense(x, random, outputs=5, bias=True):
    y = tf.matmul(x, random.weights(x.shape[-1], outputs))
    return tf.nn.bias_add(y, random(outputs)) if bias else y


def left_float(planned):
    """Op types that stay float, but for Reshapes of floats."""
    return [op for op, _ in floats(planned) if op != "Reshape"]


def modes(graph):
    """(fused ops, output mode) of every MatMul."""
    return [(node.attr("fused_ops"), node.attr("output_quant_mode")) for node in graph.order() if node.op == "_QuantizedMatMul"]


# -- activations -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("is_float", [False, True])
@pytest.mark.parametrize("data", ["normal", "positive", "negative", "shifted", "equal", "zero"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name, data, is_float):
    def net(x, random):
        y = ACTIVATIONS[name](dense(x, random, 7))
        return y if is_float else last(y, random)

    planned, lowered = check(net, shape=(24,), batch=9, data=data)
    assert left_float(planned) == []
    clip = name in ("Relu", "Relu6")
    expected = ["BiasAdd", name, "Dequantize"] if is_float else ["BiasAdd", "Relu" if clip else name, "Requantize"]
    assert modes(lowered)[0] == (expected, "SCALED" if is_float or clip else "MIN_FIRST")
    assert set(ops(lowered)) <= {"Placeholder", "Const", "QuantizeV2", "_QuantizedMatMul"}


@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("name", SMOOTH)
def test_activation_of_small_and_large_values(name, size):
    planned, _ = check(lambda x, random: last(ACTIVATIONS[name](dense(x, random, bias=False)), random), shape=(16,), size=size)
    assert left_float(planned) == []


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize(("inputs", "outputs", "rows"), [(1, 1, 1), (1, 5, 3), (7, 1, 1), (17, 3, 1), (64, 33, 2), (3, 130, 5)])
def test_activation_of_odd_shapes(name, inputs, outputs, rows):
    net = lambda x, random: last(ACTIVATIONS[name](dense(x, random, outputs)), random)  # noqa: E731
    planned, lowered = check(net, shape=(inputs,), batch=rows)
    assert left_float(planned) == []
    assert len(modes(lowered)) == 2


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.3, 1.5])
def test_alpha_of_leaky_relu(alpha):
    planned, lowered = check(lambda x, random: last(tf.nn.leaky_relu(dense(x, random), alpha), random), shape=(12,), batch=9)
    (node,) = [node for node in lowered.order() if "LeakyRelu" in (node.attr("fused_ops") or [])]
    assert node.attr("leakyrelu_alpha") == pytest.approx(alpha)
    assert left_float(planned) == []


@pytest.mark.parametrize("options", [{"activation_mode": "symmetric"}, {"isa": "no_vnni"}, {"weights": "per_tensor"}])
@pytest.mark.parametrize("name", SMOOTH)
def test_activation_with_options(name, options):
    random = Random()
    graph = building.build(lambda x: last(ACTIVATIONS[name](dense(x, random, 7)), random), {"x": (None, 24)})
    batches = [{"x": samples(9, (24,))}]
    planned = building.plan_for(graph, batches, **options)
    assert building.disagreements(planned, batches, MORE) == []
    lowered = onednn.lower(planned.graph, planned.annotation.units, planned.plan)
    assert name in modes(lowered)[0][0]
    specs = [spec for key, spec in planned.plan.tensors.items() if key != "x"]
    if "activation_mode" in options:
        assert all(spec.zero_point in (0, 128) for spec in specs)
    elif name == "LeakyRelu":
        assert all(spec.dtype == U8 and spec.low < 0 for spec in specs)


@pytest.mark.parametrize("kind", ["input", "part"])
def test_gelu_whose_parts_are_read_elsewhere(kind):
    def net(x, random):
        y = dense(x, random, 7)
        half = 0.5 * y
        z = half * tf.math.erfc(-y * ROOT)
        return [last(z, random), last(y, random) if kind == "input" else half]

    planned, lowered = check(net, shape=(24,), batch=9)
    assert all(decision.int8 for decision in planned.plan.ops if decision.op == "MatMul")
    assert not any("GeluExact" in names for names, _ in modes(lowered))


def test_activation_that_others_read_too():
    def net(x, random):
        y = tf.tanh(dense(x, random, 7))
        return [last(y, random), y * 2.0]

    _, lowered = check(net, shape=(24,), batch=9)
    assert modes(lowered)[0] == (["BiasAdd", "Tanh", "Requantize"], "MIN_FIRST")


# -- rows of larger tensors ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["Relu", "GeluExact", "GeluApproximate", "Tanh"])
@pytest.mark.parametrize("shape", [(6, 12), (1, 12), (3, 2, 12)])
def test_layers_on_more_dimensions(name, shape):
    """Between the two layers nothing is reshaped or dequantized."""

    def net(x, random):
        y = ACTIVATIONS[name](tf.tensordot(x, random.weights(12, 7), 1) + random(7))
        return tf.tensordot(y, random.weights(7, 3), 1) + random(3)

    planned, lowered = check(net, shape=shape)
    assert left_float(planned) == []
    kinds = [op for op in ops(lowered) if op != "Const"]
    assert kinds == ["Placeholder", "Reshape", "QuantizeV2", "_QuantizedMatMul", "_QuantizedMatMul", "Reshape"]


@pytest.mark.parametrize("equation", ["abc,cde->abde", "abc,cd->abd", "abc,cd->adb"])
def test_einsum(equation):
    def net(x, random):
        weights = random.weights(12, 3, 2) if "cde" in equation else random.weights(12, 5)
        return tf.einsum(equation, x, weights)

    planned, lowered = check(net, shape=(6, 12))
    assert left_float(planned) == []
    assert ops(lowered).count("_QuantizedMatMul") == 1


def test_rows_of_unknown_sizes():
    def net(x, random):
        y = tf.nn.gelu(tf.einsum("abc,cd->abd", x, random.weights(12, 7)) + random(7))
        return tf.einsum("abc,cd->abd", y, random.weights(7, 3)) + random(3)

    planned, lowered = check(net, shape=(6, 12), unknown=(0,))
    assert [decision.int8 for decision in planned.plan.ops if decision.op == "MatMul"] == [True, True]
    assert "Dequantize" not in ops(lowered)  # nobody needs floats to see a shape


def test_the_shape_of_8_bit_values():
    def net(x, random):
        y = tf.tanh(dense(x, random, 7))
        return [last(y, random), tf.shape(y), tf.reshape(tf.size(y), [1])]

    _, lowered = check(net, shape=(12,))
    assert "Dequantize" not in ops(lowered)


# -- residual adds ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("shape", [(12,), (6, 12), (1, 12)])
def test_residual(shape, swapped):
    """The sum is float, as what reads it is: a LayerNorm, say."""

    def net(x, random):
        flat = tf.reshape(x, [-1, 12]) if len(shape) > 1 else x
        y = dense(flat, random, 12)
        y = tf.reshape(y, [-1, *shape]) if len(shape) > 1 else y
        return tf.nn.softmax(x + y if swapped else y + x)

    planned, lowered = check(net, shape=shape)
    assert left_float(planned) == []
    assert fused(lowered) == [["BiasAdd", "Add", "Dequantize"]]
    assert "AddV2" not in ops(lowered)


@pytest.mark.parametrize("data", ["normal", "positive", "shifted", "zero"])
def test_residual_of_two_layers(data):
    def net(x, random):
        y = tf.nn.relu(dense(x, random, 12))
        z = dense(y, random, 12) + dense(x, random, 12)
        return [last(z, random), tf.nn.softmax(z)]

    planned, lowered = check(net, shape=(12,), batch=9, data=data)
    assert left_float(planned) == []
    assert sum("Add" in names for names, _ in modes(lowered)) == 1


def test_residual_whose_summand_others_read():
    """The kernel may write into the summand's buffer only where nobody else reads it; it sees to that itself."""

    def net(x, random):
        y = tf.tanh(x)
        outs = []
        for _ in range(3):
            outs += [tf.nn.softmax(dense(y, random, 12) + y), y * 2.0]
        return [*outs, tf.identity(y)]

    planned, lowered = check(net, shape=(12,), batch=9)
    assert sum("Add" in names for names, _ in modes(lowered)) == 3
    batches = [{"x": samples(9, (12,))}]
    first = building.serve(lowered, batches)
    for _ in range(3):
        again = building.serve(lowered, batches)
        assert all(np.array_equal(first[key], again[key]) for key in first)
    values = building.run(planned.graph, batches)[0]
    assert np.array_equal(first["output_6"], values["output_6"])


@pytest.mark.parametrize("kind", ["row", "unknown", "constant", "itself"])
def test_sums_that_stay(kind):
    def net(x, random):
        y = tf.reshape(dense(tf.reshape(x, [-1, 12]), random, 12), [-1, 6, 12])
        if kind == "row":
            return tf.nn.softmax(y + tf.reduce_mean(x, 1, keepdims=True))
        if kind == "itself":
            return tf.nn.softmax(y + y)
        return tf.nn.softmax(y + (x if kind == "unknown" else random(6, 12)))

    planned, lowered = check(net, shape=(6, 12), unknown=(0,) if kind == "unknown" else ())
    assert not any("Add" in names for names, _ in modes(lowered))
    assert ops(lowered).count("AddV2") == 1
    assert "added" in reasons(planned, "AddV2")[0]


def test_relu_behind_a_residual_stays():
    planned, lowered = check(lambda x, random: last(tf.nn.relu(dense(x, random, 12) + x), random), shape=(12,), batch=9)
    assert sum("Add" in names for names, _ in modes(lowered)) == 1
    assert ops(lowered).count("Relu") == 1
    assert left_float(planned) == []


# -- 1x1 convolutions ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("is_float", [False, True])
@pytest.mark.parametrize("shape", [(9, 7, 8), (1, 1, 3), (4, 5, 1), (3, 3, 17)])
@pytest.mark.parametrize("name", SMOOTH)
def test_pointwise_convolution(name, shape, is_float):
    def net(x, random):
        y = ACTIVATIONS[name](conv(x, random, channels=6))
        return y if is_float else last(y, random)

    planned, lowered = check(net, shape=shape, batch=2)
    assert left_float(planned) == []
    assert name in modes(lowered)[0][0]
    assert "Conv2D" not in ops(lowered)


@pytest.mark.parametrize("options", [{"kernel": (3, 3)}, {"strides": 2}])
def test_other_convolutions_keep_the_activation_apart(options):
    planned, lowered = check(lambda x, random: last(tf.nn.leaky_relu(conv(x, random, **options)), random))
    assert ops(lowered).count("LeakyRelu") == 1
    assert all(decision.int8 for decision in planned.plan.ops if decision.op == "Conv2D")


def test_yolo_block():
    def net(x, random):
        y = tf.nn.leaky_relu(conv(x, random, channels=4), 0.1)
        y = tf.nn.leaky_relu(conv(y, random, (3, 3)), 0.1) + x
        return last(y, random)

    _, lowered = check(net)
    assert any("LeakyRelu" in names for names, _ in modes(lowered))


# -- without oneDNN --------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not IS_ONEDNN_ON, reason="this is it")
@pytest.mark.slow
def test_without_onednn():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", "(activation or residual or dimensions or pointwise) and not small and not without"],
        env={**os.environ, "TF_ENABLE_ONEDNN_OPTS": "0"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:]
