"""Weights stored in 8 bits and computed with in float.

The integers are a constant of int32, four in each, that a few ops take apart and scale. None of these makes more bytes than it
reads: so TensorFlow's own optimizer folds them, before anything runs, into the float constants that oneDNN packs once. (It folds
nothing that grows: a Cast of int8 would be computed late, and its result packed anew at each call, as that of a variable is.)
Rows of a table are looked up in 8 bits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfquant.errors import PlanError
from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.plan.spec import OpDecision, QuantPlan
from tfquant.targets.lookup import LOOKUPS, is_of_rows, looked_up

TARGET = "weight_only"
# Constants of fewer values stay float.
LEAST_VALUES = 1024
_LEVELS = 127
Axes = tuple[int, ...]
KeepFloat = Callable[[Node], str | None]


# -- which constants are weights --------------------------------------------------------------------------------------------
def _last(node: Node, rank: int) -> Axes:
    return (rank - 1,)


def _before_last(node: Node, rank: int) -> Axes:
    return (rank - 2,)


def _depthwise(node: Node, rank: int) -> Axes:
    return (2, 3)


def _product(side: int) -> Callable[[Node, int], Axes]:
    """All axes but the one that is summed over."""

    def axes(node: Node, rank: int) -> Axes:
        flags = ("transpose_b", "adj_y") if side else ("transpose_a", "adj_x")
        is_turned = any(node.attr(flag) for flag in flags)
        summed = rank - (1 if is_turned == bool(side) else 2)
        return tuple(axis for axis in range(rank) if axis != summed)

    return axes


def _einsum(side: int) -> Callable[[Node, int], Axes]:
    """The axes that the result has, too."""

    def axes(node: Node, rank: int) -> Axes:
        terms, _, result = str(node.attr("equation")).replace(" ", "").partition("->")
        labels = terms.split(",")[side]
        kept = tuple(axis for axis, label in enumerate(labels) if label in result)
        return kept if "." not in labels and 0 < len(kept) < rank else _last(node, rank)

    return axes


def _rows(node: Node, rank: int) -> Axes | None:
    """Of a lookup along the first axis."""
    return (0,) if is_of_rows(node) else None


_PRODUCTS = ("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
# By op type and slot of the weights: the axes along which each slice has a scale of its own.
_AXES: Mapping[tuple[str, int], Callable[[Node, int], Axes | None]] = {
    **{(op, 1): _last for op in ("Conv2D", "Conv3D")},
    ("DepthwiseConv2dNative", 1): _depthwise,
    **{(op, 1): _before_last for op in ("Conv2DBackpropInput", "Conv3DBackpropInputV2")},
    **{(op, side): _product(side) for op in _PRODUCTS for side in (0, 1)},
    **{("Einsum", side): _einsum(side) for side in (0, 1)},
    **{(op, 0): _rows for op in LOOKUPS},
}


LAYERS = frozenset(op for op, _ in _AXES)


@dataclasses.dataclass(frozen=True)
class Weights:
    """A constant that holds the weights of one layer or several.

    Attributes:
        name: of the first op that reads it.
        constant: the node.
        axes: those along which each slice has a scale of its own.
    """

    name: str
    constant: Node
    axes: Axes

    @property
    def value(self) -> np.ndarray:
        """The float32 weights."""
        assert self.constant.value is not None
        return self.constant.value

    @property
    def key(self) -> str:
        """Hash of shape and values."""
        state = hashlib.blake2b(repr(self.value.shape).encode(), digest_size=8)
        state.update(np.ascontiguousarray(self.value).tobytes())
        return state.hexdigest()

    def scales(self) -> np.ndarray:
        """max |w| / 127 of each slice, float32 (C,)."""
        others = tuple(axis for axis in range(self.value.ndim) if axis not in self.axes)
        largest = np.abs(self.value).max(others).astype(np.float64).reshape(-1) / _LEVELS
        scales = np.maximum(largest, np.finfo(np.float32).tiny)
        return np.where(largest > 0, scales, 1.0).astype(np.float32)

    def shaped(self, scales: np.ndarray) -> np.ndarray:
        """Scales (C,) in a shape that broadcasts over the weights."""
        shape = [size if axis in self.axes else 1 for axis, size in enumerate(self.value.shape)]
        return scales.reshape(shape)

    def integers(self, scales: np.ndarray) -> np.ndarray:
        """int8 of the shape of the weights, symmetric in -127..127."""
        steps = np.rint(self.value.astype(np.float64) / self.shaped(scales).astype(np.float64))
        return np.clip(steps, -_LEVELS, _LEVELS).astype(np.int8)


def find_weights(graph: Graph, keep_float: KeepFloat = lambda node: None) -> tuple[list[Weights], tuple[OpDecision, ...]]:
    """The constants of `graph` that are stored in 8 bits, and a decision on each that holds weights.

    Args:
        graph: the simplified float graph.
        keep_float: the reason why the weights of a node must stay float, or None.
    """
    found, decisions = [], []
    order = graph.order()
    position = {node: index for index, node in enumerate(order)}
    for node in order:
        if node.op != "Const" or node.dtypes[0] != tf.float32 or graph.is_output(node.out):
            continue
        value = node.value
        if value is None or value.ndim < 2 or value.size < LEAST_VALUES:
            continue
        readers = sorted(graph.users(node.out), key=lambda reader: position.get(reader[0], len(order)))
        axes = [axes_of(reader, slot, value.ndim) for reader, slot in readers]
        first = next((own for own in axes if own is not None), None)
        if first is None:
            continue
        main = readers[axes.index(first)][0]
        weights = Weights(main.name, node, first)
        reasons = [
            f"{reader.name} ({reader.op}) reads it too, which takes no weights"
            for (reader, _), own in zip(readers, axes, strict=True)
            if own is None
        ]
        reasons += [reason for reader, _ in readers if (reason := keep_float(reader))]
        if not np.isfinite(value).all():
            reasons.append("it holds NaN or infinity")
        decisions.append(OpDecision(main.name, main.op, "weights", weights.key, not reasons, reasons[0] if reasons else ""))
        if not reasons:
            found.append(weights)
    return found, tuple(decisions)


def axes_of(reader: Node, slot: int, rank: int) -> Axes | None:
    """The axes of a constant of `rank` along which each slice has a scale of its own; None where `slot` takes no weights."""
    rule = _AXES.get((reader.op, slot))
    return None if rule is None or reader.pinned else rule(reader, rank)


# -- the plan ---------------------------------------------------------------------------------------------------------------
def make_weight_plan(
    graph: Graph, keep_float: KeepFloat, *, signature_keys: tuple[str, ...], weights: str = "per_channel"
) -> QuantPlan:
    """The plan of the mode "weight_only".

    Args:
        graph: the simplified float graph.
        keep_float: as for `find_weights`.
        signature_keys: of the signatures that the graph computes.
        weights: "per_channel", or "per_tensor": one scale for all.
    """
    found, decisions = find_weights(graph, keep_float)
    scales = {entry.name: entry.scales() for entry in found}
    if weights == "per_tensor":
        scales = {name: np.full_like(own, own.max()) for name, own in scales.items()}
    return QuantPlan(
        target=TARGET,
        signature_keys=signature_keys,
        ops=decisions,
        tensors={},
        weight_scales=scales,
        settings={"weights": weights},
        mode="weight_only",
    )


def planned(graph: Graph, plan: QuantPlan) -> list[tuple[Weights, np.ndarray]]:
    """The weights that the plan stores in 8 bits, with their scales (C,).

    Raises:
        PlanError: the plan has no scales for one, or not as many as it needs.
    """
    stored = {decision.name for decision in plan.ops if decision.int8}
    result = []
    for weights in find_weights(graph)[0]:
        if weights.name not in stored:
            continue
        scales, count = plan.weight_scales.get(weights.name), math.prod(weights.value.shape[axis] for axis in weights.axes)
        if scales is None or scales.shape != (count,):
            received = "none" if scales is None else f"shape {scales.shape}"
            raise PlanError(f"The plan needs {count} weight scales for {weights.name}. Received: {received}")
        result.append((weights, scales))
    return result


# -- the graphs -------------------------------------------------------------------------------------------------------------
def simulate(graph: Graph, plan: QuantPlan) -> Graph:
    """The float graph with the values that its 8-bit weights stand for.

    Raises:
        PlanError: the plan lacks scales.
    """
    result = graph.copy()
    for weights, scales in planned(graph, plan):
        value = weights.integers(scales).astype(np.float32) * weights.shaped(scales)
        twin = result.nodes[weights.constant.name]
        result.replace(twin.out, result.constant(value, name=f"{weights.name}/weights"))
    result.prune()
    return result


def lower(graph: Graph, plan: QuantPlan) -> Graph:
    """The graph with weights in 8 bits, which computes what `simulate` does.

    Args:
        graph: the simplified float graph; it is not changed.
        plan: of the mode "weight_only".

    Raises:
        PlanError: the plan lacks scales.
    """
    result = graph.copy()
    ops = _Ops(result)
    for weights, scales in planned(graph, plan):
        integers, twin = weights.integers(scales), result.nodes[weights.constant.name]
        readers = result.users(twin.out)
        lookups = [node for node, _ in readers if node.op in LOOKUPS]
        if lookups:
            table = ops.constant(integers, f"{weights.name}/integers")
            rows = ops.constant(weights.shaped(scales), f"{weights.name}/scales")
        for node in lookups:
            name = result.take_name(node)
            result.replace(node.out, looked_up(result, node, table, rows, node.inputs[1:], name))
        if len(lookups) < len(readers):
            whole = ops.dequantized(integers, weights.shaped(scales), f"{weights.name}/weights")
            for node, slot in readers:
                if node not in lookups:
                    result.set_input(node, slot, whole)
    result.prune()
    result.infer()
    return result


class _Ops:
    """Adds ops that make floats of integers."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._shared: dict[tuple[int, ...], Tensor] = {}

    def constant(self, value: np.ndarray, name: str) -> Tensor:
        return self._graph.constant(value, name=name)

    def _numbers(self, *values: int) -> Tensor:
        if values not in self._shared:
            array = np.array(values if len(values) > 1 else values[0], np.int32)
            self._shared[values] = self.constant(array, "weights/numbers")
        return self._shared[values]

    def _add(self, op: str, inputs: Sequence[Tensor], dtype: tf.DType, name: str, **attrs: Any) -> Tensor:
        return self._graph.add(op, inputs, name=f"{name}/{op}", attrs=attrs or {"T": dtype}, dtypes=[dtype]).out

    def _cast(self, x: Tensor, source: tf.DType, name: str) -> Tensor:
        return self._add("Cast", [x], tf.float32, name, SrcT=source, DstT=tf.float32, Truncate=False)

    def dequantized(self, integers: np.ndarray, scales: np.ndarray, name: str) -> Tensor:
        """int8 integers times scales, float32, by ops that TensorFlow folds."""
        flat = integers.reshape(-1)
        padded = np.concatenate([flat, np.zeros(-flat.size % 4, np.int8)])
        four = self.constant(padded.view("<i4"), f"{name}/four")
        rows = self._add("Pack", [four] * 4, tf.int32, name, N=4, T=tf.int32, axis=1)
        # The wanted byte to the top, then down again with its sign.
        high = self._add("LeftShift", [rows, self._numbers(24, 16, 8, 0)], tf.int32, name)
        bytes_ = self._add("RightShift", [high, self._numbers(24)], tf.int32, name)
        if padded.size > flat.size:
            line = self._reshape(bytes_, (padded.size,), f"{name}/line")
            ends = [self.constant(np.array([size], np.int32), f"{name}/size") for size in (0, flat.size)]
            bytes_ = self._add("Slice", [line, *ends], tf.int32, name, T=tf.int32, Index=tf.int32)
        shaped = self._reshape(bytes_, integers.shape, name)
        return self._scaled(self._cast(shaped, tf.int32, name), self.constant(scales, f"{name}/scales"), name)

    def _reshape(self, x: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
        target = self.constant(np.array(shape, np.int32), f"{name}/shape")
        return self._add("Reshape", [x, target], tf.int32, name, T=tf.int32, Tshape=tf.int32)

    def _scaled(self, x: Tensor, scales: Tensor, name: str) -> Tensor:
        return self._add("Mul", [x, scales], tf.float32, name)
