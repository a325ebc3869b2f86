"""Random small graphs, each checked in a process of its own.

`find(seed)` builds the graph of a seed, takes it through plan, simulation and INT8 and says what is wrong with it. `fuzz` does
so for many seeds in forked processes, since a kernel that is used wrongly ends its process by a signal.

Each graph has a plain twin, which computes the same in NHWC and float32 with no special spelling: what the simplified graph
computes is held against it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import building
import numpy as np
import tensorflow as tf

from tfquant.errors import ModelError
from tfquant.graph.ir import Graph
from tfquant.pipeline import apply_plan
from tfquant.targets import onednn

TIMEOUT = 120.0  # seconds per graph
MAX_ELEMENTS = 20_000  # of a tensor, per sample
MAX_VALUE = 1e15
SIMPLIFIED = 1e-3  # of the largest values: what float32 may lose when factors are folded
TO_NHWC, TO_NCHW = [0, 2, 3, 1], [0, 3, 1, 2]
IGNORED = ("Conv2D", "DepthwiseConv2dNative", "MatMul", "MaxPool", "AvgPool", "AddV2", "ConcatV2", "Relu", "FusedBatchNormV3")
# Sizes that were not known differ, or TensorFlow fused what its kernels cannot do (FusedBatchNorm and Tanh).
CANNOT_RUN = (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError, tf.errors.AbortedError, ModelError)


@dataclasses.dataclass
class Case:
    """A graph with data.

    Attributes:
        graph: the float graph.
        batches: two of them.
        expected: the outputs, as the plain twin computes them.
        options: mode, estimator, activation_mode, weights and isa.
        ignored: entries of the ignored scope.
        log: what it is made of.
        features: what is special about it.
    """

    graph: Graph
    batches: list[building.Arrays]
    expected: building.Arrays
    options: dict[str, str]
    ignored: tuple[str, ...]
    log: list[str]
    features: set[str]


class Unrunnable(Exception):
    """The float graph is of no use: TensorFlow cannot run it, or it computes what no range can hold."""


class Generator:
    """Makes the random graph of a seed, or its plain twin.

    Attributes:
        plain: NHWC and float32 throughout; what NCHW ops compute is had by Transposes around NHWC ones.
        format: of images, where the generator is just now: "NHWC" or "NCHW".
        dtype: of tensors, likewise; the plain twin only rounds constants to it.
    """

    def __init__(self, seed: int, plain: bool = False) -> None:
        self.rng = np.random.default_rng(seed)
        self.plain = plain
        self.format = "NHWC"
        self.dtype: tf.DType = tf.float32
        self.log: list[str] = []
        self.features: set[str] = set()
        self._images: list[tf.Tensor] = []  # in `format` and `dtype`
        self._vectors: list[tf.Tensor] = []  # (N, C)
        self._sequences: list[tf.Tensor] = []  # (N, T, C), float32, of known sizes
        self._shown: list[tf.Tensor] = []  # outputs from inside of sections
        self._beside: dict[str, tf.Tensor] = {}  # inputs of other types
        self._depth = 0

    # -- choices ------------------------------------------------------------------------------------------------------
    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def integer(self, low: int, high: int) -> int:
        """Of low..high, both included."""
        return int(self.rng.integers(low, high + 1))

    def pick(self, options: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
        if weights is None:
            return options[int(self.rng.integers(len(options)))]
        chances = np.array(weights, float)
        return options[int(self.rng.choice(len(options), p=chances / chances.sum()))]

    def channels(self) -> int:
        return self.pick([self.integer(1, 20), 8 * self.integer(1, 4)], [2, 1])

    def any_of(self, tensors: Sequence[tf.Tensor]) -> tf.Tensor:
        """One of them, a late one rather than an early one."""
        return self.pick(tensors, 1.5 ** np.arange(len(tensors)))

    # -- constants ----------------------------------------------------------------------------------------------------
    def weights(self, *shape: int, outputs: int = 1) -> np.ndarray:
        """Weights; the last `outputs` axes are output channels. Sometimes these differ wildly, are zero or all alike."""
        if math.prod(shape) > 1 << 22:
            raise Unrunnable(f"weights of shape {shape} would take all the time")
        fan_in = max(1, int(np.prod(shape[:-outputs])))
        values = self.rng.normal(self.pick([0.0, 0.5, -0.5], [3, 1, 1]), 1, shape) / np.sqrt(fan_in)
        kind = self.pick(["plain", "wild", "dead", "all dead", "sparse", "equal"], [4, 3, 2, 0.2, 0.5, 0.3])
        last = shape[-outputs:]
        if kind == "wild":
            values *= 10.0 ** self.rng.uniform(-4, 0.5, last)
        elif kind == "dead":
            values *= self.rng.random(last) < 0.6
        elif kind == "all dead":
            values *= 0
        elif kind == "sparse":
            values *= self.rng.random(shape) < 0.2
        elif kind == "equal":
            values[...] = values.flat[0]
        return values.astype(np.float32)

    def vector(self, size: int) -> np.ndarray:
        """A bias or a shift."""
        if size is None:
            raise Unrunnable("the channels of a tensor are unknown")
        kind = self.pick(["plain", "zero", "wild", "negative", "huge", "tiny"], [4, 1, 1, 1, 0.3, 0.3])
        values = self.rng.normal(size=size)
        if kind == "zero":
            values *= 0
        elif kind == "wild":
            values *= 10.0 ** self.rng.uniform(-4, 1, size)
        elif kind == "negative":
            values = -np.abs(values)
        elif kind in ("huge", "tiny"):
            values *= 1e4 if kind == "huge" else 1e-5
        return values.astype(np.float32)

    def factors(self, size: int) -> np.ndarray:
        """Scales of a BatchNorm: any sign, at times zero."""
        values = self.rng.uniform(0.3, 2, size) * self.rng.choice([-1, 1], size, p=[0.2, 0.8])
        if self.chance(0.2):
            values *= 10.0 ** self.rng.uniform(-3, 1, size)
        if self.chance(0.15):
            values *= self.rng.random(size) < 0.7
        return values.astype(np.float32)

    def data(self, shape: Sequence[int]) -> np.ndarray:
        kind = self.pick(
            ["normal", "positive", "negative", "image", "shifted", "outliers", "sparse", "equal", "zero"],
            [6, 2, 1, 2, 2, 1, 1, 0.4, 0.3],
        )
        size = self.pick([1.0, 10.0 ** self.rng.uniform(-6, 6), 1e-6, 1e6], [5, 2, 0.5, 0.5])
        values = self.rng.normal(size=shape)
        if kind in ("positive", "negative"):
            values = np.abs(values) * (1 if kind == "positive" else -1)
        elif kind == "image":
            values = self.rng.integers(0, 256, shape) / 255
        elif kind == "shifted":
            values += self.rng.uniform(-5, 5)
        elif kind == "outliers":
            values *= np.where(self.rng.random(shape) < 0.01, 50, 1)
        elif kind == "sparse":
            values *= self.rng.random(shape) < 0.1
        elif kind == "equal":
            values[...] = self.rng.normal()
        elif kind == "zero":
            values *= 0
        self.log.append(f"data {kind} x {size:.3g}")
        return (values * size).astype(np.float32)

    # -- layouts and types --------------------------------------------------------------------------------------------

    def sizes(self, x: tf.Tensor) -> list[int | None]:
        """Height, width and channels."""
        return [x.shape[self.axis(axis)] for axis in (1, 2, 3)]

    def axis(self, axis: int) -> int:
        """The axis in `format` of an axis in NHWC."""
        return axis if self.format == "NHWC" else (0, 2, 3, 1)[axis]

    def ordered(self, sizes: Sequence[Any]) -> list[Any]:
        """What is given for N, H, W and C, in the order of `format`."""
        return [sizes[axis] for axis in ((0, 1, 2, 3) if self.format == "NHWC" else (0, 3, 1, 2))]

    def formatted(self, op: Callable[[tf.Tensor, str], tf.Tensor], x: tf.Tensor) -> tf.Tensor:
        """An op with a data format."""
        if self.format == "NHWC" or not self.plain:
            return op(x, self.format)
        return tf.transpose(op(tf.transpose(x, TO_NHWC), "NHWC"), TO_NCHW)

    def rounded(self, value: np.ndarray | float) -> np.ndarray:
        """A constant as it is in `dtype`."""
        array = np.asarray(value, np.float32).astype(self.dtype.as_numpy_dtype)
        return array.astype(np.float32) if self.plain else array

    def constant(self, value: np.ndarray | float) -> tf.Tensor:
        if self.dtype != tf.float32 and self.chance(0.3):  # a float32 variable of mixed precision, which simplification takes up
            return tf.constant(value, tf.float32) if self.plain else tf.cast(tf.constant(value, tf.float32), self.dtype)
        return tf.constant(self.rounded(value))

    def cast(self, x: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        return tf.identity(x) if self.plain else tf.cast(x, dtype)

    def per_channel(self, value: np.ndarray, rank: int) -> tf.Tensor:
        """One value per channel, to be added to or multiplied with a tensor of that rank."""
        if rank == 4 and self.format == "NCHW":
            value = value.reshape(self.pick([(-1, 1, 1), (1, -1, 1, 1)]))
        return self.constant(value)

    # -- ops ----------------------------------------------------------------------------------------------------------
    def activate(self, x: tf.Tensor, lively: float = 0.6) -> tf.Tensor:
        kind = self.pick(["none", "relu", "relu6", "other"], [1 - lively, lively * 0.7, lively * 0.2, lively * 0.1])
        self.log[-1] += f" {kind}" if kind != "none" else ""
        return {"none": lambda t: t, "relu": tf.nn.relu, "relu6": tf.nn.relu6, "other": self.island}[kind](x)

    def island(self, x: tf.Tensor) -> tf.Tensor:
        kinds = ["swish", "hard swish", "leaky", "sigmoid", "tanh", "softmax", "elu", "abs", "gelu", "gelu with tanh"]
        kind = self.pick(kinds)
        self.log[-1] += f" {kind}"
        sixth = self.rounded(1 / 6)
        functions = {
            "swish": lambda t: t * tf.sigmoid(t),
            "hard swish": lambda t: t * (tf.nn.relu6(t + 3) * sixth),
            "leaky": tf.nn.leaky_relu,
            "sigmoid": tf.sigmoid,
            "tanh": tf.tanh,
            "softmax": lambda t: tf.nn.softmax(t, self.axis(3) if len(t.shape) == 4 else 1),
            "elu": tf.nn.elu,
            "abs": tf.abs,
            "gelu": self.gelu,
            "gelu with tanh": lambda t: tf.nn.gelu(t, approximate=True),
        }
        return functions[kind](x)

    def gelu(self, x: tf.Tensor) -> tf.Tensor:
        spelling = self.pick(["erf", "erfc", "inner half"])
        root, half, one = (self.constant(number) for number in (0.5**0.5, 0.5, 1.0))
        if self.plain or spelling == "erf":
            return half * x * (tf.math.erf(x * root) + one)
        return half * x * tf.math.erfc(-x * root) if spelling == "erfc" else x * (half * (tf.math.erf(x * root) + one))

    def shifted(self, x: tf.Tensor) -> tf.Tensor:
        """A bias, in one of its spellings, or none."""
        kind = self.pick(["BiasAdd", "none", "AddV2", "BatchNorm", "Sub"], [5, 2, 1, 2, 0.3])
        self.log[-1] += f" {kind}" if kind != "none" else ""
        if kind == "BatchNorm":
            return self.batch_norm(x)
        if kind == "none":
            return x
        rank, vector = len(x.shape), self.vector(x.shape[self.axis(3) if len(x.shape) == 4 else 1])
        if kind == "BiasAdd":
            bias = self.constant(vector)
            return self.formatted(lambda t, f: tf.nn.bias_add(t, bias, f), x) if rank == 4 else tf.nn.bias_add(x, bias)
        other = self.per_channel(vector, rank)
        return x + other if kind == "AddV2" else x - other

    def batch_norm(self, x: tf.Tensor) -> tf.Tensor:
        rank = len(x.shape)
        size = x.shape[self.axis(3) if rank == 4 else 1]
        if rank == 4 and self.chance(0.6):
            mean, variance = self.vector(size), self.rng.uniform(0.1, 4, size).astype(np.float32)
            scale, offset = self.factors(size), self.vector(size)
            norm = tf.compat.v1.nn.fused_batch_norm
            return self.formatted(lambda t, f: norm(t, scale, offset, mean, variance, is_training=False, data_format=f)[0], x)
        return x * self.per_channel(self.factors(size), rank) + self.per_channel(self.vector(size), rank)

    def convolve(self, x: tf.Tensor, channels: int | None = None, keep: bool = False) -> tf.Tensor:
        """A convolution with padding, bias and activation; `keep` keeps height and width."""
        height, width, depth = self.sizes(x)
        depthwise = self.chance(0.35) and (channels is None or channels == depth)
        kernel = self.pick([(1, 1), (3, 3), (1, 7), (5, 2), (2, 2), (5, 5), (3, 1)], [4, 5, 1, 1, 1, 1, 1])
        dilations = (1, 1) if self.chance(0.85) else (self.integer(1, 2), self.integer(1, 3))
        strides = (1, 1) if keep or max(dilations) > 1 or self.chance(0.6) else (self.integer(1, 3), self.integer(1, 3))
        if depthwise or depth == 1:
            # With one channel in and one column out, oneDNN reads beyond its input where the strides differ, in float as in INT8.
            strides = (strides[0], strides[0])
        padding = "SAME" if keep else self.pick(["SAME", "VALID", "PAD", "EXPLICIT"], [5, 3, 1.5, 1])
        pads = [(0, 0), (self.integer(0, 3), self.integer(0, 3)), (self.integer(0, 3), self.integer(0, 3)), (0, 0)]
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        inner = [
            None if n is None else n + (sum(p) if padding in ("PAD", "EXPLICIT") else 0)
            for n, p in zip((height, width), pads[1:3], strict=True)
        ]
        if padding != "SAME" and any((n or 1) < r for n, r in zip(inner, reach, strict=True)):
            kernel, dilations = (1, 1), (1, 1)
        name = "depthwise" if depthwise else "conv"
        self.log.append(f"{name} {kernel} strides {strides} {padding} dilations {dilations} of {_shape(x)}")
        if padding in ("PAD", "EXPLICIT"):
            self.log[-1] += f" {pads[1:3]}"
        mode: Any = padding
        # TensorFlow itself crashes on some float convolutions with explicit padding, when a bias follows.
        if padding == "PAD" or (padding == "EXPLICIT" and self.plain):
            x, mode = tf.pad(x, self.ordered(pads)), "VALID"
        elif padding == "EXPLICIT":
            mode = self.ordered(pads)
        groups = 1
        if depthwise:
            multiplier = 1 if channels is not None else self.pick([1, 2, 3], [6, 1, 1])
            weights = self.constant(self.weights(*kernel, depth, multiplier, outputs=2))
        else:
            outputs = channels or self.channels()
            if channels is None and depth > 1 and self.chance(0.08):
                groups = depth if self.chance(0.6) else self.pick([n for n in range(2, depth + 1) if depth % n == 0])
                outputs = groups * max(1, outputs // groups)
                # No stock kernel dilates in groups with strides, and the depthwise one has one stride.
                self.features.add("groups of one channel" if groups == depth else "groups")
            weights = self.constant(self.weights(*kernel, depth // groups, outputs))
            self.log[-1] += f" -> {outputs}" + (f" in {groups} groups" if groups > 1 else "")
            if groups == depth > 1 and self.plain and strides[0] == strides[1]:
                depthwise, weights = True, tf.reshape(weights, [*kernel, depth, outputs // depth])

        def convolved(t: tf.Tensor, data_format: str) -> tf.Tensor:
            if not depthwise:
                return tf.nn.conv2d(t, weights, strides, mode, data_format, dilations)
            steps = (1, *strides, 1) if data_format == "NHWC" else (1, 1, *strides)
            return tf.nn.depthwise_conv2d(t, weights, steps, mode, data_format, dilations)

        return self.formatted(convolved, x)

    def conv(self, x: tf.Tensor) -> tf.Tensor:
        if self.chance(0.06):  # one layer, called twice
            state = self.rng.bit_generator.state
            self._keep(self.activate(self.shifted(self.convolve(x))))
            self.rng.bit_generator.state = state
        return self.activate(self.shifted(self.convolve(x)))

    def residual(self, x: tf.Tensor) -> tf.Tensor:
        """An Add: of a conv and its input, of a conv and something else, of two convs, of what there is."""
        branch = x
        for _ in range(self.integer(0, 2)):
            branch = self.convolve(branch, self.sizes(x)[2], keep=True)
            branch = self.shifted(branch)
            if self.chance(0.4):
                branch = self.activate(branch)
        others = [t for t in self._images if t is not branch and _same(t, branch)]
        other = self.any_of(others) if others else self.shifted(self.convolve(x, self.sizes(x)[2], keep=True))
        kind = self.pick(["plain", "alias", "constant", "row", "broadcast", "twice"], [8, 2, 0.5, 0.5, 1, 0.5])
        if kind == "alias" and None not in other.shape[1:]:
            first, second, third = other.shape[1:]
            other = tf.reshape(tf.reshape(tf.identity(other), [-1, first * second, third]), [-1, first, second, third])
        elif kind == "constant" and None not in other.shape[1:]:
            other = self.constant(self.rng.normal(size=(1, *other.shape[1:])))
        elif kind == "row":
            other = self.per_channel(self.rng.normal(size=self.sizes(other)[2]), 4)
        elif kind == "broadcast":
            other = tf.reduce_mean(other, [self.axis(1), self.axis(2)], keepdims=True)
        elif kind == "twice":
            other = branch
        self.log.append(f"add {kind} of {_shape(branch)} and {_shape(other)}")
        y = branch + other if self.chance(0.7) else other + branch
        return self.activate(y)

    def lone_batch_norm(self, x: tf.Tensor) -> tf.Tensor:
        self.log.append(f"batch norm of {_shape(x)}")
        return self.activate(self.batch_norm(x))

    def scalar_op(self, x: tf.Tensor) -> tf.Tensor:
        number = float(np.float32(self.rng.uniform(-3, 3)))
        kind = self.pick(["*", "+", "/", "-", "r-"])
        self.log.append(f"{kind} {number:.3f} of {_shape(x)}")
        other = self.constant(number or 1.0)
        return {"*": x * other, "+": x + other, "/": x / other, "-": x - other, "r-": other - x}[kind]

    def pool(self, x: tf.Tensor) -> tf.Tensor:
        height, width = (n or 1 for n in self.sizes(x)[:2])
        window = (min(self.integer(1, 3), height), min(self.integer(1, 3), width))
        strides = (self.integer(1, 3), self.integer(1, 3))
        padding, kind = self.pick(["SAME", "VALID"]), self.pick(["max", "avg"])
        self.log.append(f"{kind} pool {window} strides {strides} {padding} of {_shape(x)}")
        op = tf.nn.max_pool2d if kind == "max" else tf.nn.avg_pool2d
        return self.formatted(lambda t, f: op(t, window, strides, padding, f), x)

    def pad(self, x: tf.Tensor) -> tf.Tensor:
        pads = [(0, 0), (self.integer(0, 2), self.integer(0, 2)), (self.integer(0, 2), self.integer(0, 2)), (0, 0)]
        if self.chance(0.2):
            pads[3] = (self.integer(0, 2), self.integer(0, 2))
        kind = self.pick(["zeros", "constant", "reflect"], [8, 1, 1])
        self.log.append(f"pad {pads[1:]} {kind} of {_shape(x)}")
        if kind == "reflect" and None not in x.shape[1:] and all(n > 2 for n in x.shape[1:]):
            return tf.pad(x, self.ordered(pads), "REFLECT")
        return tf.pad(x, self.ordered(pads), constant_values=1.5 if kind == "constant" else 0)

    def concat(self, x: tf.Tensor) -> tf.Tensor:
        logical = self.pick([3, 1, 2], [8, 1, 1])
        axis = self.axis(logical)
        fitting = [
            t for t in self._images if all(a == b for i, (a, b) in enumerate(zip(t.shape, x.shape, strict=True)) if i != axis)
        ]
        parts = [x] + [self.any_of(fitting) for _ in range(self.integer(1, 3))] if fitting else [x]
        if len(parts) == 1 or self.chance(0.4):
            y = self.shifted(self.convolve(x, None if logical == 3 else self.sizes(x)[2], keep=True))
            parts.append(self.activate(y))
        if self.chance(0.03) and None not in x.shape[1:] and logical != 3:
            parts.append(tf.zeros_like(x))
        self.rng.shuffle(order := list(range(len(parts))))
        self.log.append(f"concat on {axis} of {[_shape(parts[i]) for i in order]}")
        return tf.concat([parts[i] for i in order], axis)

    def reshape(self, x: tf.Tensor) -> tf.Tensor:
        height, width, depth = self.sizes(x)
        self.log.append(f"reshape of {_shape(x)}")
        if None in (height, width):
            return tf.squeeze(tf.expand_dims(x, 1), 1)
        kind = self.pick(["turn", "line", "squeeze", "channels"])
        self.log[-1] += f" {kind}"
        if kind == "turn":
            return tf.reshape(x, self.ordered([-1, width, height, depth]))
        if kind == "line":
            return tf.reshape(x, self.ordered([-1, 1, height * width, depth]))
        if kind == "channels" and width % 2 == 0:
            return tf.reshape(x, self.ordered([-1, height, width // 2, depth * 2]))
        return tf.squeeze(tf.expand_dims(x, 1), 1)

    def gate(self, x: tf.Tensor) -> tf.Tensor:
        """Squeeze and excitation."""
        depth = self.sizes(x)[2]
        self.log.append(f"gate of {_shape(x)}")

        def layer(t: tf.Tensor, outputs: int) -> tf.Tensor:
            weights = self.constant(self.weights(1, 1, self.sizes(t)[2], outputs))
            t = self.formatted(lambda u, f: tf.nn.conv2d(u, weights, 1, "SAME", f), t)
            return t + self.per_channel(self.vector(outputs), 4)

        hidden = tf.nn.relu(layer(tf.reduce_mean(x, [self.axis(1), self.axis(2)], keepdims=True), 3))
        return x * tf.sigmoid(layer(hidden, depth))

    def alone(self, x: tf.Tensor) -> tf.Tensor:
        self.log.append(f"activation of {_shape(x)}")
        return self.activate(x, lively=1.0)

    def to_vector(self, x: tf.Tensor) -> tf.Tensor:
        height, width, depth = self.sizes(x)
        space = [self.axis(1), self.axis(2)]
        if None in (height, width) or self.chance(0.5):
            kind = self.pick(["mean", "max", "squeezed mean"], [4, 1, 1])
            self.log.append(f"global {kind} of {_shape(x)}")
            if kind == "squeezed mean":
                return tf.squeeze(tf.reduce_mean(x, space, keepdims=True), space)
            return (tf.reduce_max if kind == "max" else tf.reduce_mean)(x, space)
        if self.chance(0.3):
            self.log.append(f"global pool of {_shape(x)}")
            pooled = self.formatted(lambda t, f: tf.nn.avg_pool2d(t, (height, width), 1, "VALID", f), x)
            return tf.reshape(pooled, [-1, depth])
        self.log.append(f"flatten of {_shape(x)}")
        return tf.reshape(x, [-1, height * width * depth])

    def dense(self, x: tf.Tensor) -> tf.Tensor:
        outputs = self.pick([1, self.channels()], [1, 6])
        self.log.append(f"dense of {_shape(x)} -> {outputs}")
        transposed = self.chance(0.2)
        weights = self.weights(x.shape[1], outputs)
        y = tf.matmul(x, self.constant(weights.T if transposed else weights), transpose_b=transposed)
        return self.activate(self.shifted(y))

    def vector_op(self, x: tf.Tensor) -> tf.Tensor:
        kind = self.pick(["add", "concat", "island", "image"])
        self.log.append(f"vector {kind} of {_shape(x)}")
        others = [t for t in self._vectors if t.shape[1] == x.shape[1]]
        if kind == "add":
            return self.activate(x + self.any_of(others))
        if kind == "concat":
            return tf.concat([x, self.any_of(self._vectors)], 1)
        if kind == "image":
            self._images.append(tf.reshape(x, self.ordered([-1, 1, 1, x.shape[1]])))
            return x
        return self.island(x)

    # -- sequences ----------------------------------------------------------------------------------------------------
    def to_sequence(self, x: tf.Tensor) -> tf.Tensor | None:
        """An image as a sequence of its pixels, None where it cannot be."""
        height, width, depth = self.sizes(x)
        if self.dtype != tf.float32 or None in (height, width, depth) or height * width > 60:
            return None
        self.log.append(f"sequence of {_shape(x)}")
        return tf.reshape(x if self.format == "NHWC" else tf.transpose(x, TO_NHWC), [-1, height * width, depth])

    def product(self, x: tf.Tensor, outputs: int) -> tf.Tensor:
        """A layer on the last axis of a sequence, in one of its spellings."""
        length, depth = x.shape[1:]
        weights = self.weights(depth, outputs)
        spelling = self.pick(["tensordot", "einsum", "matmul", "transposed", "rows"])
        self.log.append(f"dense as {spelling} of {_shape(x)} -> {outputs}")
        if self.plain or spelling == "rows":
            return tf.reshape(tf.matmul(tf.reshape(x, [-1, depth]), weights), [-1, length, outputs])
        if spelling == "tensordot":
            return tf.tensordot(x, weights, 1)
        if spelling == "einsum":
            return tf.einsum("abc,cd->abd", x, weights)
        return tf.matmul(x, weights) if spelling == "matmul" else tf.matmul(x, weights.T[None], transpose_b=True)

    def layer(self, x: tf.Tensor, outputs: int) -> tf.Tensor:
        y = self.product(x, outputs)
        if self.chance(0.8):
            vector = self.vector(outputs)
            y = tf.nn.bias_add(y, vector) if self.chance(0.5) else y + vector
        return y

    def layer_norm(self, x: tf.Tensor) -> tf.Tensor:
        """Of values whose variance is neither nothing nor all."""
        depth = x.shape[2]
        self.log.append(f"layer norm of {_shape(x)}")
        ramp, gamma, beta = (self.rng.normal(size=depth).astype(np.float32) for _ in range(3))
        spelling = self.pick(["Keras 3", "tf.nn", "textbook"])
        if depth < 4:
            return tf.tanh(x)
        x = tf.tanh(x) + ramp
        mean, variance = tf.nn.moments(x, [2], keepdims=True)
        if self.plain or spelling == "textbook":
            return (x - mean) / tf.sqrt(variance + 1e-3) * gamma + beta
        if spelling == "tf.nn":
            return tf.nn.batch_normalization(x, mean, variance, beta, gamma, 1e-3)
        scale = tf.math.rsqrt(variance + 1e-3) * gamma
        return x * scale + (-mean * scale + beta)

    def attention(self, x: tf.Tensor) -> tf.Tensor:
        heads, size = self.integer(1, 3), self.integer(1, 5)
        length = x.shape[1]
        self.log.append(f"attention of {heads} heads of {size} on {_shape(x)}")
        q, k, v = (tf.reshape(tf.tanh(self.layer(x, heads * size)), [-1, length, heads, size]) for _ in range(3))
        scale = float(np.float32(size**-0.5))
        is_before, is_einsum = self.chance(0.5), self.chance(0.6) and not self.plain
        q = q * scale if is_before else q
        if is_einsum:
            scores = tf.einsum("btnh,bsnh->bnts", q, k)
        else:
            q, k, v = (tf.transpose(t, [0, 2, 1, 3]) for t in (q, k, v))
            scores = tf.matmul(q, k, transpose_b=True)
        shares = tf.nn.softmax(scores if is_before else scores * scale)
        y = tf.einsum("bnts,bsnh->btnh", shares, v) if is_einsum else tf.transpose(tf.matmul(shares, v), [0, 2, 1, 3])
        return self.layer(tf.reshape(y, [-1, length, heads * size]), x.shape[2])

    def conv1d(self, x: tf.Tensor) -> tf.Tensor:
        outputs, kernel = self.channels(), self.integer(1, 3)
        padding = self.pick(["SAME", "VALID"]) if kernel <= x.shape[1] else "SAME"
        self.log.append(f"conv1d {kernel} {padding} of {_shape(x)} -> {outputs}")
        weights = self.weights(kernel, x.shape[2], outputs)
        y = tf.nn.conv2d(x[:, None], weights[None], 1, padding)[:, 0] if self.plain else tf.nn.conv1d(x, weights, 1, padding)
        return self.activate(y + self.vector(outputs))

    def sequence_op(self, x: tf.Tensor) -> None:
        kind = self.pick(["dense", "norm", "attention", "residual", "conv1d", "leave"], [4, 2, 2, 3, 2, 2])
        if kind == "dense":
            x = self.activate(self.layer(x, self.channels()), lively=0.8)
        elif kind == "norm":
            x = self.layer_norm(x)
        elif kind == "attention":
            x = self.attention(x)
        elif kind == "residual":
            self.log.append("residual")
            hidden = self.activate(self.layer(x, self.channels()), lively=0.9)
            y = self.layer(hidden, x.shape[2])
            x = x + y if self.chance(0.5) else y + x
        elif kind == "conv1d":
            x = self.conv1d(x)
        else:
            self.log.append(f"vector of {_shape(x)}")
            self._vectors.append(tf.reduce_mean(x, 1) if self.chance(0.5) else x[:, 0])
            return
        if int(np.prod(x.shape[1:])) <= MAX_ELEMENTS:
            self._sequences.append(x)

    # -- parts of another layout or type, and what is no plain graph ---------------------------------------------------
    def section(self, x: tf.Tensor) -> tf.Tensor:
        """Some ops in the other layout, or in half precision."""
        if self._depth > 1:
            return self.conv(x)
        kind = self.pick(["layout", "half"]) if self.dtype == tf.float32 else "layout"
        return self.other_layout(x) if kind == "layout" else self.half(x)

    def other_layout(self, x: tf.Tensor) -> tf.Tensor:
        outer = self.format
        inner = "NHWC" if outer == "NCHW" else "NCHW"
        self.features.add(f"{inner} in {outer}")
        permutations = {"NHWC": TO_NHWC, "NCHW": TO_NCHW}
        self.log.append(f"to {inner} from {_shape(x)}")
        self.format = inner
        x, vectors = self.inner(tf.transpose(x, permutations[inner]))
        self.format = outer
        self._vectors += vectors
        self.log.append(f"to {outer} from {_shape(x)}")
        return tf.transpose(x, permutations[outer])

    def half(self, x: tf.Tensor) -> tf.Tensor:
        dtype = self.pick([tf.float16, tf.bfloat16])
        self.features.add("half")
        self.log.append(f"to {dtype.name} from {_shape(x)}")
        self.dtype = dtype
        x, vectors = self.inner(self.cast(x, dtype))
        self.dtype = tf.float32
        self._vectors += [self.cast(vector, tf.float32) for vector in vectors]
        self.log.append("to float32")
        return self.cast(x, tf.float32)

    def inner(self, x: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Ops that see nothing but `x`: an image, and the vectors that were made."""
        images, vectors = self._images, self._vectors
        self._images, self._vectors = [x], []
        self._depth += 1
        self.grow(self.integer(1, 4))
        self._depth -= 1
        x, made = self.any_of(self._images), self._vectors
        if self.chance(0.1):
            self.features.add("output of a section")
            self._shown.append(tf.identity(self.any_of(self._images)))
        self._images, self._vectors = images, vectors
        return x, made

    def float_body(self, x: tf.Tensor) -> Callable[[tf.Tensor], tf.Tensor]:
        """A function that keeps the shape, for the body of a function; it draws nothing when it is traced."""
        if len(x.shape) == 4 and self.format == "NHWC" and self.chance(0.5):
            weights = self.weights(1, 1, x.shape[3], x.shape[3])
            return lambda t: tf.nn.relu(tf.nn.conv2d(t, weights, 1, "SAME"))
        if len(x.shape) == 2 and self.chance(0.5):
            weights = self.weights(x.shape[1], x.shape[1])
            return lambda t: tf.tanh(tf.matmul(t, weights))
        factor = float(self.rng.uniform(-1, 1))
        return lambda t: t * factor + tf.nn.leaky_relu(t)

    def control(self, x: tf.Tensor) -> tf.Tensor:
        """A branch, a loop or a call of a function."""
        if self.dtype != tf.float32 or (len(x.shape) == 2 and (x.shape[1] or 0) > 512):  # square weights of that width
            return self.alone(x)
        kind = self.pick(["cond", "while", "call"])
        self.features.add(kind)
        self.log.append(f"{kind} on {_shape(x)}")
        body, other = self.float_body(x), self.float_body(x)
        if kind == "call":
            return tf.function(body, autograph=False)(x)
        # What decides is the same for any batch.
        integers = self._beside.get("k")
        least = tf.reduce_min(integers) if integers is not None else tf.cast(tf.reduce_min(tf.tanh(tf.abs(x))), tf.int32)
        if kind == "cond":
            is_true = least >= self.pick([0, 1000])
            return tf.cond(is_true, lambda: body(x), lambda: other(x))
        rounds = tf.minimum(tf.maximum(least, 0), 0) + self.integer(0, 3)
        return tf.while_loop(lambda i, t: i < rounds, lambda i, t: (i + 1, body(t)), [0, x])[1]

    def conditioned(self, x: tf.Tensor) -> tf.Tensor:
        """A factor per sample, or a vector, from the input of another type."""
        name = self.pick(list(self._beside))
        numbers = self._beside[name] if name == "k" else tf.strings.length(self._beside[name])
        self.log.append(f"from {name}, with {_shape(x)}")
        if self.chance(0.5):
            table = self.constant(self.rng.normal(size=(self.pick([5, 5000]), self.channels())))
            self._vectors.append(tf.gather(table, numbers))
            return x
        return x * tf.reshape(tf.cast(numbers + 1, tf.float32 if self.plain else self.dtype), [-1, 1, 1, 1])

    # -- the whole ------------------------------------------------------------------------------------------------------
    def function(self, *inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        floats = [self.preprocessed(x) for x in inputs if x.dtype not in (tf.int32, tf.string)]
        self._beside = {x.op.name: x for x in inputs if x.dtype in (tf.int32, tf.string)}
        self._images, self._vectors, self._sequences, self._shown = list(floats), [], [], []
        self.grow(self.integer(2, 12))
        made = [t for t in (*self._images, *self._vectors, *self._sequences) if not any(t is x for x in floats)]
        unread = [t for t in made if not t.op.outputs[0].consumers()]
        outputs = unread + [t for t in made if not any(t is u for u in unread) and self.chance(0.08)]
        if len(unread) > 1 and self.chance(0.5):
            outputs = outputs[1:]
        outputs += self._shown
        if len(outputs) > 1:
            self.features.add("several outputs")
        for name, x in self._beside.items():
            if self.chance(0.3):
                self.features.add("output of another type")
                outputs.append(x * 2 if name == "k" else tf.strings.upper(x))
        self.log.append(f"outputs {[f'{t.name} {_shape(t)}' for t in outputs]}")
        return {f"out_{i}": t for i, t in enumerate(outputs)}

    def preprocessed(self, x: tf.Tensor) -> tf.Tensor:
        """An image of bytes as a network takes it; other inputs as they are."""
        if x.dtype != tf.uint8:
            return x
        channels = x.shape[3 if self.format == "NHWC" else 1]
        image = tf.cast(x, tf.float32 if self.plain else self.dtype)
        kind = self.pick(["nothing", "scale", "around zero", "normalize", "shift"])
        self.log.append(f"bytes {_shape(x)}, {kind}")
        if kind == "normalize":
            means, deviations = self.rng.uniform(0, 255, channels), self.rng.uniform(20, 80, channels)
            return (image - self.per_channel(means, 4)) / self.per_channel(deviations, 4)
        if kind in ("scale", "around zero"):
            image = image * self.constant(1 / 255 if kind == "scale" else 1 / 127.5)
        return {"around zero": -1.0, "shift": float(np.float32(self.rng.uniform(-200, 20)))}.get(kind, 0.0) + image

    def grow(self, count: int) -> None:
        """`count` more layers."""
        ops = {
            self.conv: 8,
            self.residual: 4,
            self.lone_batch_norm: 1,
            self.scalar_op: 0.5,
            self.pool: 1.5,
            self.pad: 0.7,
            self.concat: 1.5,
            self.reshape: 0.7,
            self.gate: 0.3,
            self.alone: 0.7,
            self.section: 1.2,
            self.control: 0.5,
            **({self.conditioned: 4} if self._beside else {}),
        }
        for _ in range(count):
            if self._vectors and self.chance(0.3):
                x = self.any_of(self._vectors)
                if self.chance(0.05):
                    self._keep(self.control(x))
                else:
                    self._keep((self.dense if self.chance(0.7) else self.vector_op)(x))
            elif self._sequences and self._depth == 0 and self.chance(0.6):
                self.sequence_op(self.any_of(self._sequences))
            elif self.chance(0.1):
                self._keep(self.to_vector(self.any_of(self._images)))
            elif self._depth == 0 and self.chance(0.08):
                x = self.to_sequence(self.any_of(self._images))
                self._sequences += [x] if x is not None else []
            else:
                self._keep(self.pick(list(ops), list(ops.values()))(self.any_of(self._images)))

    def _keep(self, x: tf.Tensor) -> None:
        known = [n or 8 for n in x.shape[1:]]
        if 0 in known or int(np.prod(known)) > MAX_ELEMENTS:
            return
        (self._images if len(x.shape) == 4 else self._vectors).append(x)

    def inputs(self) -> tuple[dict[str, tf.TensorSpec], list[building.Arrays]]:
        """Specs and data of the inputs, which also decide on layout and type of the whole."""
        if self.chance(0.12):
            self.format = "NCHW"
            self.features.add("NCHW")
        if self.chance(0.06):
            self.dtype = self.pick([tf.float16, tf.bfloat16])
            self.features.add("half inputs")
        names = ["x"] if self.chance(0.85) else ["x", "z"]
        shapes = {name: (self.integer(1, 13), self.integer(1, 13), self.channels()) for name in names}
        unknown = self.chance(0.05)
        sizes = self.pick([(4, 1), (3, 2), (1, 5), (2, 2)])
        specs, parts = {}, {}
        for name, (height, width, depth) in shapes.items():
            known = [None, None, None, depth] if unknown else [None, height, width, depth]
            specs[name] = tf.TensorSpec(self.ordered(known), tf.float32 if self.plain else self.dtype)
            data = self.data(self.ordered([sum(sizes), height, width, depth]))
            parts[name] = self.rounded(np.clip(data, -6e4, 6e4) if self.dtype == tf.float16 else data)
        if self.chance(0.12):
            self.features.add("bytes")
            specs["x"] = tf.TensorSpec(specs["x"].shape, tf.uint8)
            parts["x"] = self.rng.integers(0, 256, parts["x"].shape).astype(np.uint8)
        other = self.pick(["none", "k", "s"], [8, 1, 1])
        if other == "k":
            specs["k"], parts["k"] = tf.TensorSpec([None], tf.int32), self.rng.integers(0, 5, sum(sizes)).astype(np.int32)
        elif other == "s":
            specs["s"] = tf.TensorSpec([None], tf.string)
            parts["s"] = self.rng.choice(np.array(["", "a", "bc", "def", "ghij"], object), sum(sizes))
        if other != "none":
            self.features.add({"k": "int input", "s": "string input"}[other])
        self.log.append(f"inputs {specs}, sizes {sizes}")
        return specs, [{n: v[: sizes[0]] for n, v in parts.items()}, {n: v[sizes[0] :] for n, v in parts.items()}]

    def options(self) -> dict[str, str]:
        options = {
            "mode": self.pick(["static", "dynamic"], [7, 1]),
            "estimator": self.pick(["minmax", "mse", "percentile", "mean_minmax"], [6, 1, 1, 1]),
            "activation_mode": self.pick(["asymmetric", "symmetric"], [3, 1]),
            "weights": self.pick(["per_channel", "per_tensor"], [3, 1]),
            "isa": self.pick(["vnni", "no_vnni"], [3, 1]),
        }
        self.features |= {value for value in options.values() if value in ("dynamic", "symmetric", "per_tensor", "no_vnni")}
        self.log.append(f"options {options}")
        return options

    def ignored(self, graph: Graph) -> tuple[str, ...]:
        """Entries that name nodes of the graph."""
        if self.chance(0.85):
            return ()
        nodes = [node for node in graph.order() if node.op in IGNORED]
        chosen = [self.pick(nodes) for _ in range(self.integer(1, 2))] if nodes else []
        entries = {self.pick([node.name, f"type:{node.op}", f"re:{re.escape(node.name)}"], [4, 1, 1]) for node in chosen}
        if entries:
            self.features.add("ignored scope")
            self.log.append(f"ignored {entries}")
        return tuple(sorted(entries))


def make(seed: int) -> Case:
    """The graph of a seed, with its data.

    Raises:
        Unrunnable: TensorFlow cannot run its plain twin, or there is none.
    """
    generator = Generator(seed)
    specs, batches = generator.inputs()
    options = generator.options()
    graph = building.build(generator.function, specs)
    drawn = generator.rng.bit_generator.state
    ignored = generator.ignored(graph)
    twin = Generator(seed, plain=True)
    plain_specs, plain_batches = twin.inputs()
    twin.options()
    try:
        expected = building.evaluate(twin.function, plain_specs, plain_batches)
    except CANNOT_RUN as error:
        raise Unrunnable(_first_words(error)) from error
    if twin.rng.bit_generator.state != drawn:  # where TensorFlow knows more sizes in one layout than in the other
        raise Unrunnable("the twin is another graph")
    return Case(graph, batches, expected, options, ignored, generator.log, generator.features)


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _shape(x: tf.Tensor) -> str:
    return "x".join(str(n or "?") for n in x.shape)


def _same(one: tf.Tensor, other: tf.Tensor) -> bool:
    return list(one.shape) == list(other.shape)


# -- checking ------------------------------------------------------------------------------------------------------------
def find(seed: int, verbose: bool = False) -> list[str]:
    """What is wrong with the graph of `seed`.

    Raises:
        Unrunnable: nothing can be said of it.
    """
    case = make(seed)
    if verbose:
        for line in case.log:
            print("   ", line)
    try:
        planned = _planned(case)
    except CANNOT_RUN as error:
        raise Unrunnable(_first_words(error)) from error
    largest = max((_largest(values) for values in (*planned.values.values(), *case.expected.values())), default=0.0)
    if not largest <= MAX_VALUE:
        raise Unrunnable(f"values reach {largest:g}")
    if verbose:
        for decision in planned.plan.ops:
            print("   ", decision.name, decision.op, decision.kernel, "INT8" if decision.int8 else decision.reason)
    lowered = onednn.lower(planned.graph, planned.annotation.units, planned.plan)
    if verbose:
        for node in lowered.order():
            if node.op != "Const":
                inputs = [tensor.name for tensor in node.inputs if tensor.node.op != "Const"]
                print("     ", node.name, node.op, inputs, [before.name for before in node.control])
    found = unlike(planned, case.expected) + applied(planned)
    found += building.check_plan(planned) + building.rounded_outputs(planned.graph, lowered)
    deviations = building.deviations(planned, case.batches)
    if verbose:
        for deviation in deviations:
            print("   ", "WRONG" if deviation.wrong else "ok", deviation)
    found += [str(deviation) for deviation in deviations if deviation.wrong]
    return found + repeated(planned, lowered, case.batches)


def _planned(case: Case) -> building.Planned:
    options = dict(case.options)
    if options.pop("mode") == "static":
        return building.plan_for(case.graph, case.batches, ignored=case.ignored, **options)
    del options["estimator"]
    return building.dynamic_plan_for(case.graph, case.batches, ignored=case.ignored, **options)


def _largest(values: np.ndarray) -> float:
    return 0.0 if values.dtype == object else float(np.abs(values.astype(np.float64)).max(initial=0))


def unlike(planned: building.Planned, expected: building.Arrays) -> list[str]:
    """The outputs of the simplified graph that are not those of the plain twin."""
    found = []
    inner = max((_largest(planned.values[name]) for name in (*planned.plan.tensors, *planned.plan.dynamic)), default=0.0)
    for key, tensor in planned.graph.outputs.items():
        given, wanted = planned.values[key], expected[key]
        if given.shape != wanted.shape:
            found.append(f"output {key} is of shape {given.shape}, not {wanted.shape}")
        elif not tensor.dtype.is_floating:
            found += [] if np.array_equal(given, wanted) else [f"output {key} differs"]
        else:
            size = _largest(wanted)
            allowed = size * max(SIMPLIFIED, building.ROUNDING.get(tensor.dtype, 0.0)) + SIMPLIFIED * inner
            if tensor.dtype == tf.float16:
                allowed += 2.0**-25  # half a step of its smallest numbers
            difference = float(np.abs(given.astype(np.float64) - wanted).max(initial=0))
            if not difference <= allowed:
                found.append(f"output {key} of the simplified graph is {difference:.3g} off, {allowed:.3g} allowed of {size:.3g}")
    return found


def applied(planned: building.Planned) -> list[str]:
    """Whether the plan means the same to the graph that it was made of."""
    again = apply_plan(planned.graph, planned.plan)
    found = []
    if [unit.name for unit in again.units.values()] != [unit.name for unit in planned.annotation.units.values()]:
        found.append("the plan applied again has other units")
    if again.groups != planned.annotation.groups:
        found.append("the plan applied again has other groups")
    return found


# Float ops may differ in the last bits with the position of a value in its tensor, and the next rounding may then tip over.
_EXACT = frozenset(
    {"Placeholder", "Const", "QuantizeV2", "Dequantize", "_FusedQuantizedConv2D", "_FusedQuantizedDepthwiseConv2D"}
    | {"_QuantizedMatMul", "QuantizedMaxPool", "QuantizedAvgPool", "ConcatV2", "Pad", "PadV2", "MirrorPad", "MaxPool"}
    | {"Reshape", "Squeeze", "ExpandDims", "BroadcastTo", "Bitcast", "Snapshot", "Identity", "Cast", "Transpose"}
    | {"Relu", "Relu6", "Mul", "AddV2", "BiasAdd", "Abs", "Neg", "Sub", "Min", "Max", "Minimum", "Maximum", "RealDiv", "Round"}
)


def repeated(planned: building.Planned, lowered: Graph, batches: Sequence[building.Arrays]) -> list[str]:
    """Whether the served graph gives the same thrice, in any batch, and the same as the one with more outputs."""
    found = []
    first = building.serve(lowered, batches)
    for _ in range(2):
        again = building.serve(lowered, batches)
        found += [f"output {key} differs from run to run" for key in first if not np.array_equal(first[key], again[key])]
    whole = building.instrument(planned)
    watched = building.joined(building.run(whole.graph, batches))
    together = building.serve(lowered, [{key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}])
    exact = all(node.op in _EXACT for node in lowered.order())
    others = {"when it is watched": watched}
    if not planned.plan.dynamic:  # else the range is that of all samples of a call
        others["in another batch"] = together
    for what, other in others.items():
        for key in first:
            size = _largest(first[key])
            if first[key].shape != other[key].shape:
                found.append(f"output {key} has another shape {what}")
                continue
            if first[key].dtype == object:
                found += [] if np.array_equal(first[key], other[key]) else [f"output {key} differs {what}"]
                continue
            difference = float(np.abs(first[key].astype(np.float64) - other[key]).max(initial=0))
            if exact and not difference <= 1e-6 * size:  # Grappler may fuse float ops in one way or another
                found.append(f"output {key} differs {what} by {difference} of {size}")
    return found


# -- many ----------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Failure:
    """What became of a seed: `crash` names the signal, or what was raised; `found` lists the disagreements."""

    seed: int
    crash: str
    found: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A seed whose graph nothing can be said of, and why."""

    seed: int
    reason: str


@dataclasses.dataclass
class _Job:
    seed: int
    pid: int
    pipe: int
    start: float
    received: bytes = b""


def fuzz(seeds: Sequence[int], jobs: int = 2, verbose: bool = False) -> Iterator[tuple[int, Failure | Skipped | None]]:
    """Checks each seed in a forked process; yields seeds as they are done, with what is wrong.

    The calling process must not have run a TensorFlow op: its thread pools would not survive the fork.
    """
    waiting = list(reversed(seeds))
    running: dict[int, _Job] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                job = _start(waiting.pop(), verbose)
                running[job.pipe] = job
            ready, _, _ = select.select(list(running), [], [], 1.0)
            for pipe in list(running):
                job = running[pipe]
                if pipe in ready:
                    received = os.read(pipe, 1 << 20)
                    job.received += received
                    if received:
                        continue
                    result = _end(job)
                elif time.monotonic() - job.start > TIMEOUT:
                    os.kill(job.pid, signal.SIGKILL)
                    _end(job)
                    result = Failure(job.seed, f"no end after {TIMEOUT:.0f} s", ())
                else:
                    continue
                del running[pipe]
                yield job.seed, result
    finally:
        for job in running.values():
            os.kill(job.pid, signal.SIGKILL)
            _end(job)


def _start(seed: int, verbose: bool) -> _Job:
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return _Job(seed, pid, reading, time.monotonic())
    os.close(reading)
    if not verbose:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
    try:
        tf.config.threading.set_intra_op_parallelism_threads(2)
        tf.config.threading.set_inter_op_parallelism_threads(2)
        result: tuple[str, tuple[str, ...], str] = "", tuple(find(seed, verbose)), ""
    except Unrunnable as error:
        if verbose:
            print(f"    skipped: {error}")
        result = "", (), str(error) or "unknown"
    except Exception as error:
        if verbose:
            traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:500]
        result = f"{type(error).__name__} in {os.path.basename(place.filename)}:{place.lineno}: {text}", (), ""
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(pickle.dumps(result))
    sys.stdout.flush()
    os._exit(0)


def _end(job: _Job) -> Failure | Skipped | None:
    os.close(job.pipe)
    _, status = os.waitpid(job.pid, 0)
    if os.WIFSIGNALED(status):
        return Failure(job.seed, signal.Signals(os.WTERMSIG(status)).name, ())
    if not job.received:
        return Failure(job.seed, f"exit status {os.WEXITSTATUS(status)} without a result", ())
    crash, found, skipped = pickle.loads(job.received)
    if skipped:
        return Skipped(job.seed, skipped)
    return Failure(job.seed, crash, found) if crash or found else None
