"""Biases as runtimes store them, multiples of the accumulators' step: where a model is used, or trains with BatchNorm as it is.

That step is the product of the steps of a layer's input and weights. Where the input is coarse (pixels) it can be a fifth of the
result's own step, so that one value in twenty would be rounded otherwise than in a file for LiteRT, whose biases are integers.
What is added behind a layer may come in several ops, BatchNorm's among them; the last one adds what rounding the sum leaves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from tfquant.graph.execution import executable
from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.plan.kernels import Unit
from tfquant.qat.tracing import ALIASES

if TYPE_CHECKING:
    from tfquant.qat.design import Weight

_ADDS = {"BiasAdd": "add", "Add": "add", "AddV2": "add", "Sub": "subtract"}
_MULTIPLIES = "Mul"
_NORMALIZES = frozenset({"FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"})
_RESHAPES = frozenset({"Reshape", "Squeeze", "ExpandDims"})
# What simplification makes of the constants differs from their own sum by so much of the largest.
_SAME = 1e-4


@dataclasses.dataclass(frozen=True)
class Affine:
    """An op behind a layer that adds a constant to each channel, or multiplies by one.

    Attributes:
        op: its name in the model's graph.
        kind: "add", "subtract" (the constant), "multiply", or "normalize": BatchNorm with its statistics as they are.
        slot: where it reads the constant, of BatchNorm the offset.
        epsilon: of BatchNorm.
    """

    op: str
    kind: str
    slot: int
    epsilon: float = 0.0

    def after(self, offset: tf.Tensor, factor: tf.Tensor, inputs: Sequence[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        """The sum and the factor of each channel behind the op, by those in front of it and what it reads."""
        constant = tf.reshape(tf.cast(inputs[self.slot], tf.float32), [-1])
        if self.kind == "normalize":
            scale, mean, variance = (tf.cast(inputs[slot], tf.float32) for slot in (1, 3, 4))
            gain = scale * tf.math.rsqrt(variance + self.epsilon)
            return (offset - mean) * gain + constant, factor * gain
        if self.kind == "multiply":
            return offset * constant, factor * constant
        return offset + (-constant if self.kind == "subtract" else constant), factor


# -- where they are --------------------------------------------------------------------------------------------------------
def find(
    raw: Graph, units: Iterable[Unit], constants: Collection[Node], names: Mapping[str, str], inputs: Sequence[tf.Tensor]
) -> dict[str, tuple[Affine, ...]]:
    """What is added behind layers: name of a unit to the ops, up to the last that adds.

    Left out are those whose sum is not the bias of the unit: something else was folded into it.

    Args:
        raw: the model's own graph.
        units: layers of the simplified graph.
        constants: nodes of `raw` that no input has a part in.
        names: of nodes of `raw` in the trace.
        inputs: values for the inputs of `raw`.
    """
    chains = {}
    for unit in units:
        node = raw.nodes.get(unit.name)
        found = [] if node is None or unit.weights is None else list(_behind(raw, node, constants, unit.weights.shape[-1]))
        while found and found[-1][1].kind == "multiply":
            found.pop()
        if found and unit.bias is not None:
            chains[unit.name] = unit, found
    read = [tensor for _, chain in chains.values() for node, _ in chain for tensor in node.inputs if tensor.node in constants]
    values = dict(zip(read, executable(raw, lambda get: [get(tensor) for tensor in read])(*inputs), strict=True)) if read else {}
    result = {}
    for name, (unit, chain) in chains.items():
        assert unit.bias is not None
        offset, factor = tf.zeros(unit.bias.shape), tf.ones(unit.bias.shape)
        for node, affine in chain:
            offset, factor = affine.after(offset, factor, [values.get(tensor, offset) for tensor in node.inputs])
        if _is_proportional(offset.numpy(), unit.bias):
            result[name] = tuple(dataclasses.replace(affine, op=names[affine.op]) for _, affine in chain)
    return result


def _is_proportional(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether they are the same but for one factor, which simplification moved (of attention's queries): steps have it, too."""
    sizes = np.abs(one).max(), np.abs(other).max()
    return bool(min(sizes) > 0 and np.abs(one / sizes[0] - other / sizes[1]).max() <= _SAME)


def _behind(raw: Graph, node: Node, constants: Collection[Node], channels: int) -> Iterable[tuple[Node, Affine]]:
    """The ops behind a layer that are affine in each channel, one after the other."""
    tensor = node.out
    tail: tuple[int, ...] = (channels,)  # the last axes, which count channels
    while True:
        users = raw.users(tensor)
        if len(users) != 1 or raw.is_output(tensor):
            return
        user, slot = users[0]
        if user.op in ALIASES:
            tensor = Tensor(user, slot if user.op == "IdentityN" else 0)
            continue
        if user.op in _RESHAPES and slot == 0:
            tensor, tail = user.out, _tail(user.out.shape, channels)
            if not tail:
                return
            continue
        affine = _affine(user, slot, constants, tail)
        if affine is None:
            return
        yield user, affine
        tensor = user.out


def _tail(shape: Sequence[int | None] | None, channels: int) -> tuple[int, ...]:
    """The last axes of a shape that count so many channels, () where there are none (attention has heads and their features)."""
    found: tuple[int, ...] = ()
    for size in reversed(shape or ()):
        if size is None:
            break
        found = (size, *found)
        if math.prod(found) == channels:
            return found
    return ()


def _affine(node: Node, slot: int, constants: Collection[Node], tail: tuple[int, ...]) -> Affine | None:
    if node.op in _NORMALIZES:
        is_frozen = not node.attr("is_training", True) and all(tensor.node in constants for tensor in node.inputs[1:])
        return Affine(node.name, "normalize", 2, node.attr("epsilon", 0.0)) if slot == 0 and is_frozen else None
    kind = "multiply" if node.op == _MULTIPLIES else _ADDS.get(node.op, "")
    other = node.inputs[1 - slot] if kind else None
    if other is None or other.node not in constants or (kind == "subtract" and slot == 1):
        return None
    shape = other.shape
    rest = len(shape or ()) - len(tail)
    is_per_channel = shape is not None and shape[rest:] == tail and all(size == 1 for size in shape[:rest])
    return Affine(node.name, kind, 1 - slot) if is_per_channel else None


# -- rounding --------------------------------------------------------------------------------------------------------------
class Biases:
    """What one call of the model adds behind its layers.

    Args:
        weights: of the design.
    """

    def __init__(self, weights: Iterable[Weight]) -> None:
        self._ops = {affine.op: (weight, affine) for weight in weights for affine in weight.behind}
        # Of the layers met: their accumulators' steps, (C,), and the sum and factor of each channel so far.
        self._steps: dict[str, tf.Tensor] = {}
        self._sums: dict[str, tuple[tf.Tensor, tf.Tensor]] = {}

    def layer(self, weight: Weight, x: tf.Tensor, weights: tf.Tensor) -> None:
        """Meets a layer, whose rounded input and weights are given."""
        steps = [step_of(tensor) for tensor in (x, weights)]
        if weight.behind and steps[0] is not None and steps[1] is not None:
            self._steps[weight.op] = tf.reshape(steps[0] * steps[1], [-1])
            self._sums[weight.op] = tf.zeros(()), tf.ones(())

    def corrected(self, name: str | None, inputs: Sequence[tf.Tensor]) -> Sequence[tf.Tensor]:
        """The inputs of an op, of which one has the sum's rounding added, where it is the last to add."""
        weight, affine = self._ops.get(name or "", (None, None))
        if weight is None or affine is None or weight.op not in self._steps:
            return inputs
        offset, factor = self._sums[weight.op] = affine.after(*self._sums[weight.op], inputs)
        if affine != weight.behind[-1]:
            return inputs
        step = self._steps[weight.op] * tf.abs(factor)
        left = tf.stop_gradient(tf.where(step > 0, tf.round(tf.math.divide_no_nan(offset, step)) * step - offset, 0.0))
        constant = inputs[affine.slot]
        change = tf.reshape(-left if affine.kind == "subtract" else left, tf.shape(constant))
        given = list(inputs)
        given[affine.slot] = tf.cast(tf.cast(constant, tf.float32) + change, constant.dtype)
        return given


def step_of(tensor: tf.Tensor) -> tf.Tensor | None:
    """The step of a fake-quantized tensor, (), or (C,) of weights; None where something else made it."""
    op = tensor.op
    while op.type in ALIASES | {"Transpose", "Reshape"}:
        source = op.inputs[tensor.value_index] if op.type == "IdentityN" else op.inputs[0]
        tensor, op = source, source.op
    if op.type not in ("FakeQuantWithMinMaxVars", "FakeQuantWithMinMaxVarsPerChannel"):
        return None
    levels = 2.0 ** op.get_attr("num_bits") - 1 - op.get_attr("narrow_range")
    return (op.inputs[2] - op.inputs[1]) / levels
