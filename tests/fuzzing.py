"""Random small graphs, each checked in a process of its own.

`find(seed)` builds the graph of a seed, takes it through plan, simulation and INT8 and says what is wrong with it. `fuzz` does
so for many seeds in forked processes, since a kernel that is used wrongly ends its process by a signal.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import building
import numpy as np
import tensorflow as tf

from tfquant.errors import ModelError
from tfquant.graph.ir import Graph
from tfquant.targets import onednn

TIMEOUT = 120.0  # seconds per graph
MAX_ELEMENTS = 20_000  # of a tensor, per sample
MAX_VALUE = 1e15


@dataclasses.dataclass
class Case:
    """A graph with data: two batches."""

    graph: Graph
    batches: list[building.Arrays]
    log: list[str]


class Generator:
    """Makes the random graph of a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.log: list[str] = []
        self._images: list[tf.Tensor] = []  # (N, H, W, C)
        self._vectors: list[tf.Tensor] = []  # (N, C)

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

    # -- ops ----------------------------------------------------------------------------------------------------------
    def activate(self, x: tf.Tensor, lively: float = 0.6) -> tf.Tensor:
        kind = self.pick(["none", "relu", "relu6", "other"], [1 - lively, lively * 0.7, lively * 0.2, lively * 0.1])
        self.log[-1] += f" {kind}" if kind != "none" else ""
        return {"none": lambda t: t, "relu": tf.nn.relu, "relu6": tf.nn.relu6, "other": self.island}[kind](x)

    def island(self, x: tf.Tensor) -> tf.Tensor:
        kind = self.pick(["swish", "leaky", "sigmoid", "tanh", "softmax", "elu", "abs"])
        self.log[-1] += f" {kind}"
        functions = {
            "swish": lambda t: t * tf.sigmoid(t),
            "leaky": tf.nn.leaky_relu,
            "sigmoid": tf.sigmoid,
            "tanh": tf.tanh,
            "softmax": tf.nn.softmax,
            "elu": tf.nn.elu,
            "abs": tf.abs,
        }
        return functions[kind](x)

    def shifted(self, x: tf.Tensor) -> tf.Tensor:
        """A bias, in one of its spellings, or none."""
        kind = self.pick(["BiasAdd", "none", "AddV2", "BatchNorm", "Sub"], [5, 2, 1, 2, 0.3])
        self.log[-1] += f" {kind}" if kind != "none" else ""
        size = x.shape[-1]
        if kind == "BiasAdd":
            return tf.nn.bias_add(x, self.vector(size))
        if kind == "AddV2":
            return x + self.vector(size)
        if kind == "Sub":
            return x - self.vector(size)
        return self.batch_norm(x) if kind == "BatchNorm" else x

    def batch_norm(self, x: tf.Tensor) -> tf.Tensor:
        size = x.shape[-1]
        if len(x.shape) == 4 and self.chance(0.6):
            mean, variance = self.vector(size), self.rng.uniform(0.1, 4, size).astype(np.float32)
            scale, offset = self.factors(size), self.vector(size)
            return tf.compat.v1.nn.fused_batch_norm(x, scale, offset, mean, variance, is_training=False)[0]
        return x * self.factors(size) + self.vector(size)

    def convolve(self, x: tf.Tensor, channels: int | None = None, keep: bool = False) -> tf.Tensor:
        """A convolution with padding, bias and activation; `keep` keeps height and width."""
        _, height, width, depth = x.shape
        depthwise = self.chance(0.35) and (channels is None or channels == depth)
        kernel = self.pick([(1, 1), (3, 3), (1, 7), (5, 2), (2, 2), (5, 5), (3, 1)], [4, 5, 1, 1, 1, 1, 1])
        dilations = (1, 1) if self.chance(0.85) else (self.integer(1, 2), self.integer(1, 3))
        strides = (1, 1) if keep or max(dilations) > 1 or self.chance(0.6) else (self.integer(1, 3), self.integer(1, 3))
        if depthwise or depth == 1:
            # With one channel in and one column out, oneDNN reads beyond its input where the strides differ, in float as in INT8.
            strides = (strides[0], strides[0])
        # No EXPLICIT: TensorFlow itself crashes on some float convolutions with it, when a bias follows.
        padding = "SAME" if keep else self.pick(["SAME", "VALID", "PAD"], [5, 3, 2])
        pads = [(0, 0), (self.integer(0, 3), self.integer(0, 3)), (self.integer(0, 3), self.integer(0, 3)), (0, 0)]
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        inner = [
            None if n is None else n + (sum(p) if padding == "PAD" else 0)
            for n, p in zip((height, width), pads[1:3], strict=True)
        ]
        if padding != "SAME" and any((n or 1) < r for n, r in zip(inner, reach, strict=True)):
            kernel, dilations = (1, 1), (1, 1)
        name = "depthwise" if depthwise else "conv"
        self.log.append(f"{name} {kernel} strides {strides} {padding} dilations {dilations} of {_shape(x)}")
        mode: Any = padding
        if padding == "PAD":
            x, mode = tf.pad(x, pads), "VALID"
            self.log[-1] += f" {pads[1:3]}"
        if depthwise:
            multiplier = 1 if channels is not None else self.pick([1, 2, 3], [6, 1, 1])
            weights = self.weights(*kernel, depth, multiplier, outputs=2)
            y = tf.nn.depthwise_conv2d(x, weights, (1, *strides, 1), mode, dilations=dilations)
        else:
            groups = 2 if depth % 2 == 0 and channels is None and self.chance(0.04) else 1
            outputs = channels or self.channels()
            outputs += groups * (outputs % groups > 0) - outputs % groups
            y = tf.nn.conv2d(x, self.weights(*kernel, depth // groups, outputs), (1, *strides, 1), mode, dilations=dilations)
            self.log[-1] += f" -> {outputs}" + (f" in {groups} groups" if groups > 1 else "")
        return y

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
            branch = self.convolve(branch, x.shape[-1], keep=True)
            branch = self.shifted(branch)
            if self.chance(0.4):
                branch = self.activate(branch)
        others = [t for t in self._images if t is not branch and _same(t, branch)]
        other = self.any_of(others) if others else self.shifted(self.convolve(x, x.shape[-1], keep=True))
        kind = self.pick(["plain", "alias", "constant", "row", "broadcast", "twice"], [8, 2, 0.5, 0.5, 1, 0.5])
        if kind == "alias" and None not in other.shape[1:]:
            _, height, width, depth = other.shape
            other = tf.reshape(tf.reshape(tf.identity(other), [-1, height * width, depth]), [-1, height, width, depth])
        elif kind == "constant" and None not in other.shape[1:]:
            other = tf.constant(self.rng.normal(size=(1, *other.shape[1:])).astype(np.float32))
        elif kind == "row":
            other = tf.constant(self.rng.normal(size=(other.shape[-1],)).astype(np.float32))
        elif kind == "broadcast":
            other = tf.reduce_mean(other, [1, 2], keepdims=True)
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
        return {"*": x * number, "+": x + number, "/": x / (number or 1.0), "-": x - number, "r-": number - x}[kind]

    def pool(self, x: tf.Tensor) -> tf.Tensor:
        height, width = (n or 1 for n in x.shape[1:3])
        window = (min(self.integer(1, 3), height), min(self.integer(1, 3), width))
        strides = (self.integer(1, 3), self.integer(1, 3))
        padding, kind = self.pick(["SAME", "VALID"]), self.pick(["max", "avg"])
        self.log.append(f"{kind} pool {window} strides {strides} {padding} of {_shape(x)}")
        return (tf.nn.max_pool2d if kind == "max" else tf.nn.avg_pool2d)(x, window, strides, padding)

    def pad(self, x: tf.Tensor) -> tf.Tensor:
        pads = [(0, 0), (self.integer(0, 2), self.integer(0, 2)), (self.integer(0, 2), self.integer(0, 2)), (0, 0)]
        if self.chance(0.2):
            pads[3] = (self.integer(0, 2), self.integer(0, 2))
        kind = self.pick(["zeros", "constant", "reflect"], [8, 1, 1])
        self.log.append(f"pad {pads[1:]} {kind} of {_shape(x)}")
        if kind == "reflect" and None not in x.shape[1:] and all(n > 2 for n in x.shape[1:]):
            return tf.pad(x, pads, "REFLECT")
        return tf.pad(x, pads, constant_values=1.5 if kind == "constant" else 0)

    def concat(self, x: tf.Tensor) -> tf.Tensor:
        axis = self.pick([3, 1, 2], [8, 1, 1])
        fitting = [
            t for t in self._images if all(a == b for i, (a, b) in enumerate(zip(t.shape, x.shape, strict=True)) if i != axis)
        ]
        parts = [x] + [self.any_of(fitting) for _ in range(self.integer(1, 3))] if fitting else [x]
        if len(parts) == 1 or self.chance(0.4):
            y = self.shifted(self.convolve(x, None if axis == 3 else x.shape[-1], keep=True))
            parts.append(self.activate(y))
        if self.chance(0.03) and None not in x.shape[1:] and axis != 3:
            parts.append(tf.zeros_like(x))
        self.rng.shuffle(order := list(range(len(parts))))
        self.log.append(f"concat on {axis} of {[_shape(parts[i]) for i in order]}")
        return tf.concat([parts[i] for i in order], axis)

    def reshape(self, x: tf.Tensor) -> tf.Tensor:
        _, height, width, depth = x.shape
        self.log.append(f"reshape of {_shape(x)}")
        if None in (height, width):
            return tf.squeeze(tf.expand_dims(x, 1), 1)
        kind = self.pick(["turn", "line", "squeeze", "channels"])
        self.log[-1] += f" {kind}"
        if kind == "turn":
            return tf.reshape(x, [-1, width, height, depth])
        if kind == "line":
            return tf.reshape(x, [-1, 1, height * width, depth])
        if kind == "channels" and width % 2 == 0:
            return tf.reshape(x, [-1, height, width // 2, depth * 2])
        return tf.squeeze(tf.expand_dims(x, 1), 1)

    def gate(self, x: tf.Tensor) -> tf.Tensor:
        """Squeeze and excitation."""
        mean = tf.reduce_mean(x, [1, 2], keepdims=True)
        self.log.append(f"gate of {_shape(x)}")
        hidden = tf.nn.relu(tf.nn.conv2d(mean, self.weights(1, 1, x.shape[3], 3), 1, "SAME") + self.vector(3))
        return x * tf.sigmoid(tf.nn.conv2d(hidden, self.weights(1, 1, 3, x.shape[3]), 1, "SAME") + self.vector(x.shape[3]))

    def alone(self, x: tf.Tensor) -> tf.Tensor:
        self.log.append(f"activation of {_shape(x)}")
        return self.activate(x, lively=1.0)

    def to_vector(self, x: tf.Tensor) -> tf.Tensor:
        _, height, width, depth = x.shape
        if None in (height, width) or self.chance(0.5):
            kind = self.pick(["mean", "max", "squeezed mean"], [4, 1, 1])
            self.log.append(f"global {kind} of {_shape(x)}")
            if kind == "squeezed mean":
                return tf.squeeze(tf.reduce_mean(x, [1, 2], keepdims=True), [1, 2])
            return (tf.reduce_max if kind == "max" else tf.reduce_mean)(x, [1, 2])
        if self.chance(0.3):
            self.log.append(f"global pool of {_shape(x)}")
            return tf.reshape(tf.nn.avg_pool2d(x, (height, width), 1, "VALID"), [-1, depth])
        self.log.append(f"flatten of {_shape(x)}")
        return tf.reshape(x, [-1, height * width * depth])

    def dense(self, x: tf.Tensor) -> tf.Tensor:
        outputs = self.pick([1, self.channels()], [1, 6])
        self.log.append(f"dense of {_shape(x)} -> {outputs}")
        transposed = self.chance(0.2)
        weights = self.weights(x.shape[1], outputs)
        y = tf.matmul(x, np.ascontiguousarray(weights.T) if transposed else weights, transpose_b=transposed)
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
            image = self._image(tf.reshape(x, [-1, 1, 1, x.shape[1]]))
            self._images.append(image)
            return x
        return self.island(x)

    def _image(self, x: tf.Tensor) -> tf.Tensor:
        return x

    # -- the whole ------------------------------------------------------------------------------------------------------
    def function(self, *inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        self._images, self._vectors = list(inputs), []
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
        }
        for _ in range(self.integer(2, 12)):
            if self._vectors and self.chance(0.3):
                x = self.any_of(self._vectors)
                self._keep((self.dense if self.chance(0.7) else self.vector_op)(x))
            elif self.chance(0.1):
                self._keep(self.to_vector(self.any_of(self._images)))
            else:
                self._keep(self.pick(list(ops), list(ops.values()))(self.any_of(self._images)))
        made = [t for t in (*self._images, *self._vectors) if not any(t is x for x in inputs)]
        unread = [t for t in made if not t.op.outputs[0].consumers()]
        outputs = unread + [t for t in made if not any(t is u for u in unread) and self.chance(0.08)]
        if len(unread) > 1 and self.chance(0.5):
            outputs = outputs[1:]
        self.log.append(f"outputs {[f'{t.name} {_shape(t)}' for t in outputs]}")
        return {f"out_{i}": t for i, t in enumerate(outputs)}

    def _keep(self, x: tf.Tensor) -> None:
        known = [n or 8 for n in x.shape[1:]]
        if 0 in known or int(np.prod(known)) > MAX_ELEMENTS:
            return
        (self._images if len(x.shape) == 4 else self._vectors).append(x)

    def case(self) -> Case:
        names = ["x"] if self.chance(0.85) else ["x", "z"]
        shapes = {name: (self.integer(1, 13), self.integer(1, 13), self.channels()) for name in names}
        unknown = self.chance(0.05)
        specs = {name: (None, None, None, s[2]) if unknown else (None, *s) for name, s in shapes.items()}
        graph = building.build(self.function, specs)
        sizes = self.pick([(4, 1), (3, 2), (1, 5), (2, 2)])
        parts = {name: self.data((sum(sizes), *shape)) for name, shape in shapes.items()}
        batches = [{n: v[: sizes[0]] for n, v in parts.items()}, {n: v[sizes[0] :] for n, v in parts.items()}]
        return Case(graph, batches, [f"inputs {specs}, sizes {sizes}", *self.log])


def _shape(x: tf.Tensor) -> str:
    return "x".join(str(n or "?") for n in x.shape)


def _same(one: tf.Tensor, other: tf.Tensor) -> bool:
    return list(one.shape) == list(other.shape)


# -- checking ------------------------------------------------------------------------------------------------------------
def find(seed: int, verbose: bool = False) -> list[str]:
    """What is wrong with the graph of `seed`."""
    generator = Generator(seed)
    case = generator.case()
    if verbose:
        for line in case.log:
            print("   ", line)
    try:
        building.run(case.graph, case.batches)
        planned = building.plan_for(case.graph, case.batches)
    except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError, tf.errors.AbortedError, ModelError) as error:
        if verbose:
            print(f"    TensorFlow cannot run it in float: {' '.join(str(error).split())[:300]}")
        return []  # sizes that were not known differ, or it fused what its kernels cannot do (FusedBatchNorm and Tanh)
    if max((float(np.abs(values).max(initial=0)) for values in planned.values.values()), default=0.0) > MAX_VALUE:
        return []  # such ranges are cut off
    if verbose:
        for decision in planned.plan.ops:
            print("   ", decision.name, decision.op, decision.kernel, "INT8" if decision.int8 else decision.reason)
    lowered = onednn.lower(planned.graph, planned.annotation.units, planned.plan)
    if verbose:
        for node in lowered.order():
            if node.op != "Const":
                inputs = [tensor.name for tensor in node.inputs if tensor.node.op != "Const"]
                print("     ", node.name, node.op, inputs, [before.name for before in node.control])
    found = building.check_plan(planned) + building.rounded_outputs(planned.graph, lowered)
    deviations = building.deviations(planned, case.batches)
    if verbose:
        for deviation in deviations:
            print("   ", "WRONG" if deviation.wrong else "ok", deviation)
    found += [str(deviation) for deviation in deviations if deviation.wrong]
    return found + repeated(planned, lowered, case.batches)


# Float ops may differ in the last bits with the position of a value in its tensor, and the next rounding may then tip over.
_EXACT = frozenset(
    {"Placeholder", "Const", "QuantizeV2", "Dequantize", "_FusedQuantizedConv2D", "_FusedQuantizedDepthwiseConv2D"}
    | {"_QuantizedMatMul", "QuantizedMaxPool", "QuantizedAvgPool", "ConcatV2", "Pad", "PadV2", "MirrorPad", "MaxPool"}
    | {"Reshape", "Squeeze", "ExpandDims", "Bitcast", "Snapshot", "Identity", "Cast"}
    | {"Relu", "Relu6", "Mul", "AddV2", "BiasAdd", "Abs", "Neg", "Sub"}
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
    for what, other in (("when it is watched", watched), ("in another batch", together)):
        for key in first:
            size = float(np.abs(first[key]).max(initial=0))
            if first[key].shape != other[key].shape:
                found.append(f"output {key} has another shape {what}")
                continue
            difference = float(np.abs(first[key] - other[key]).max(initial=0))
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


@dataclasses.dataclass
class _Job:
    seed: int
    pid: int
    pipe: int
    start: float
    received: bytes = b""


def fuzz(seeds: Sequence[int], jobs: int = 2, verbose: bool = False) -> Iterator[tuple[int, Failure | None]]:
    """Checks each seed in a forked process; yields seeds as they are done.

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
                    failure = _end(job)
                elif time.monotonic() - job.start > TIMEOUT:
                    os.kill(job.pid, signal.SIGKILL)
                    _end(job)
                    failure = Failure(job.seed, f"no end after {TIMEOUT:.0f} s", ())
                else:
                    continue
                del running[pipe]
                yield job.seed, failure
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
        result = "", tuple(find(seed, verbose))
    except Exception as error:
        if verbose:
            traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:500]
        result = f"{type(error).__name__} in {os.path.basename(place.filename)}:{place.lineno}: {text}", ()
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(pickle.dumps(result))
    sys.stdout.flush()
    os._exit(0)


def _end(job: _Job) -> Failure | None:
    os.close(job.pipe)
    _, status = os.waitpid(job.pid, 0)
    if os.WIFSIGNALED(status):
        return Failure(job.seed, signal.Signals(os.WTERMSIG(status)).name, ())
    if not job.received:
        return Failure(job.seed, f"exit status {os.WEXITSTATUS(status)} without a result", ())
    crash, found = pickle.loads(job.received)
    return Failure(job.seed, crash, found) if crash or found else None
