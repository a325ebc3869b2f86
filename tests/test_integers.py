"""The simulation in integers: sums against NumPy's, results against oneDNN's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests import building
from tfquant.plan.spec import QuantSpec, asymmetric, symmetric
from tfquant.targets import fakequant, onednn
from tfquant.targets.fakequant import integers

IMAGES = {"x": (None, 8, 7, 6)}


def values(*shape: int, seed: int = 0, size: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-size, size, shape).astype(np.float32)


@pytest.mark.parametrize("bias", [0.3, 40000.0], ids=["small", "beyond 24 bits"])
@pytest.mark.parametrize("depth", [9, 700], ids=["exact in float32", "in float64"])
def test_sums_are_those_of_integers(bias, depth):
    """Of a layer between two fake quantizations, against int64; a sum of 700 products may pass 2^24."""
    source, result = asymmetric(-1, 2, "user", "x"), asymmetric(-3, 50000, "user", "y")
    stored = np.random.default_rng(1).integers(-127, 128, (depth, 4)).astype(np.int8)
    scales = np.array([0.01, 0.003, 0.02, 0.011], np.float32)
    offset = values(4, size=bias)

    def layer(x):
        x = tf.quantization.fake_quant_with_min_max_vars(x, source.low, source.high)
        y = tf.nn.relu(tf.nn.bias_add(tf.matmul(x, stored * scales), offset))
        return tf.quantization.fake_quant_with_min_max_vars(y, result.low, result.high)

    graph = building.build(layer, {"x": (None, depth)})
    name = next(node.name for node in graph.order() if node.op == "MatMul")
    specs = fakequant.specs_in(graph, (source, result))
    made = integers.in_integers(graph, [integers.Layer(name, stored, scales, (1,))], specs, integers.rescaled)
    x = np.random.default_rng(2).uniform(-1, 2, (50, depth)).astype(np.float32)
    ((found,),) = (run.values() for run in building.run(made, [{"x": x}]))
    steps = np.rint(np.clip(x, source.low, source.high) / np.float32(source.scale)).astype(np.int64)
    step = source.scale * scales.astype(np.float64)
    sums = steps @ stored.astype(np.int64) + np.rint(offset / step).astype(np.int64)
    assert (np.abs(sums).max() > 2**24) == (bias > 1)
    factor = np.float32(source.scale) * scales / np.float32(result.scale)
    wanted = np.maximum(np.rint(sums.astype(np.float32) * factor), 0)
    assert np.array_equal(np.rint(found / result.scale), np.minimum(wanted, result.limits[1] - result.zero_point))


def conv(x: tf.Tensor, *shape: int, seed: int = 0, **options: Any) -> tf.Tensor:
    y = tf.nn.conv2d(x, values(*shape, seed=seed), options.get("strides", 1), options.get("padding", "SAME"))
    return tf.nn.bias_add(y, values(shape[-1], seed=seed + 1))


def depthwise(x: tf.Tensor) -> tf.Tensor:
    return tf.nn.bias_add(tf.nn.depthwise_conv2d(x, values(3, 3, 6, 2), [1, 2, 2, 1], "SAME"), values(12, seed=2))


def residual(x: tf.Tensor) -> tf.Tensor:
    """Ranges around 0 on all sides of a sum that the kernel of a convolution adds, and one that ends with Relu."""
    left = conv(conv(x, 3, 3, 6, 12, seed=7), 3, 3, 12, 16, seed=9) + conv(x, 1, 1, 6, 16, seed=3)
    return tf.nn.relu(conv(left, 3, 3, 16, 16, seed=11) + left)


def dense(x: tf.Tensor) -> tf.Tensor:
    return tf.matmul(tf.reshape(x, [-1, 8 * 7 * 6]), values(8 * 7 * 6, 9)) + values(9, seed=3)


LAYERS: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "3x3": lambda x: conv(x, 3, 3, 6, 10),
    "relu": lambda x: tf.nn.relu(conv(x, 3, 3, 6, 10)),
    "relu6, valid": lambda x: tf.nn.relu6(conv(x, 3, 3, 6, 10, padding="VALID", strides=2)),
    "padded": lambda x: conv(tf.pad(x, [[0, 0], [1, 2], [2, 0], [0, 0]]), 3, 3, 6, 10, padding="VALID"),
    "1x1": lambda x: conv(x, 1, 1, 6, 10),
    "depthwise": depthwise,
    "sums": residual,
    "no bias": lambda x: tf.nn.conv2d(x, values(3, 3, 6, 10), 1, "SAME"),
    "dense": dense,
}


@pytest.mark.parametrize("signed", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("name", LAYERS)
def test_onednn_has_the_same_integers(name, signed):
    """A layer's result, which another layer reads in 8 bits; that is a 1x1 convolution that hands the values on."""

    def two(x: tf.Tensor) -> tf.Tensor:
        y = LAYERS[name](x)
        depth = y.shape[-1]
        if len(y.shape) == 2:
            return tf.matmul(y, np.eye(depth, dtype=np.float32))
        return tf.nn.conv2d(y, np.eye(depth, dtype=np.float32)[None, None], 1, "SAME")

    spec = (symmetric if signed else asymmetric)(-2, 2, "user", "x")
    steps = np.random.default_rng(5).integers(*spec.limits, (64, 8, 7, 6), endpoint=True) - spec.zero_point
    batches = [{"x": (steps * spec.scale).astype(np.float32)}]
    planned = building.plan_for(building.build(two, IMAGES), batches, specs={"x": spec})
    lowered = onednn.lower(planned.graph, planned.annotation.units, planned.plan)
    (found,) = building.run(lowered, batches)[0].values()
    exact = integers.of_onednn(planned.graph, planned.annotation.units, planned.plan)
    (simulated,) = building.run(exact, batches)[0].values()
    step = max(spec.scale for spec in planned.plan.tensors.values())
    # MatMul, which 1x1 convolutions are there too, adds in another order.
    assert (np.abs(found - simulated) > step / 2).mean() <= (5e-5 if name in ("1x1", "dense") else 0)


def test_openvino_does_not_round_what_it_adds_to():
    """A convolution's result and what is added to it, in NumPy: float32 throughout, but for two fused multiply-adds."""
    source, own, result = asymmetric(-1, 2, "user", "x"), asymmetric(-3.3, 4, "user", "y"), asymmetric(-3, 2.5, "user", "z")
    other = asymmetric(-3.1, 4.2, "user", "s")
    stored = np.random.default_rng(1).integers(-127, 128, (1, 1, 6, 8)).astype(np.int8)
    scales = np.random.default_rng(2).uniform(0.003, 0.006, 8).astype(np.float32)
    bias = values(8)

    def rounded(x: tf.Tensor, spec: QuantSpec) -> tf.Tensor:
        return tf.quantization.fake_quant_with_min_max_vars(x, spec.low, spec.high)

    def layer(x: tf.Tensor, s: tf.Tensor) -> tf.Tensor:
        y = tf.nn.bias_add(tf.nn.conv2d(rounded(x, source), stored * scales, 1, "SAME"), bias)
        return rounded(rounded(s, other) + rounded(y, own), result)

    graph = building.build(layer, {"x": (None, 50, 50, 6), "s": (None, 50, 50, 8)})
    name = next(node.name for node in graph.order() if node.op == "Conv2D")
    layers = [integers.Layer(name, stored, scales, (3,))]
    specs = fakequant.specs_in(graph, (source, own, result, other))
    assert [entry.slot for entry in integers.joined_sums(graph, layers, specs)] == [1]
    made = integers.in_integers(graph, layers, specs, integers.openvino, joins_sums=True)
    rng = np.random.default_rng(3)
    x, s = (rng.integers(0, 255, (100, 50, 50, size), endpoint=True).astype(np.float32) for size in (6, 8))
    batch = {name: (of - spec.zero_point) * np.float32(spec.scale) for name, of, spec in (("x", x, source), ("s", s, other))}
    ((found,),) = (run.values() for run in building.run(made, [batch]))

    def factor_and_shift(spec: QuantSpec, unit: np.floating) -> tuple[np.float32, np.float32]:
        low, high = (np.float32(end - spec.zero_point) * np.float32(spec.scale) / unit for end in (0, 255))
        return np.float32(255) / (high - low), (-low * np.float32(255)) / (high - low)

    def fused(x: np.ndarray, factor: np.float32, shift: np.float32) -> np.ndarray:
        return (x.astype(np.float64) * factor + np.float64(shift)).astype(np.float32)

    step = np.float32(source.scale) * scales
    sums = ((x - source.zero_point).astype(np.float64) @ stored[0, 0].astype(np.float64)).astype(np.float32)
    real = sums * step + np.rint(bias / step.astype(np.float64)).astype(np.float32) * step
    scale, unit = np.float32(own.scale), np.float32(other.scale)
    point = np.float32(own.zero_point) + np.float32(other.zero_point) * unit / scale
    least, most = ((np.float32(end) - point) * (scale / unit) for end in (0, 255))
    factor, shift = factor_and_shift(own, np.float32(1))
    ratio = (most - least) / np.float32(255)
    clipped = np.clip(fused(real, factor * ratio, shift * ratio + least), least, most)
    total = clipped + s
    wanted = np.clip(np.rint(fused(total, *factor_and_shift(result, unit))), 0, 255)
    assert np.array_equal(np.rint(found / np.float32(result.scale)) + result.zero_point, wanted)
    # Sums of sums are what grappler takes to pieces, and adds up in another order.
    sums_of_sums = [node for node in made.order() if node.op == "AddV2" and any(one.node.op == "AddV2" for one in node.inputs)]
    assert not sums_of_sums
