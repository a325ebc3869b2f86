"""Bytes of an image that the network reads as floats: they are quint8 as they are, with steps of 1 that begin at 0.

Padded or not: `simplify.pixels` pads them with what stands for 0, which is rounded to a byte here. PadV2 has one value for all
channels; where they have their own, rows and columns of them are joined to the image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from tfquant.errors import PlanError
from tfquant.graph.ir import Graph, Tensor
from tfquant.graph.patterns import Any, Const, Match, Op
from tfquant.plan.kernels import Kernel, Unit
from tfquant.plan.spec import U8
from tfquant.targets.onednn import common

if TYPE_CHECKING:
    from tfquant.targets.onednn.lowering import Lowering

_RANGE = (0.0, 255.0)
_CAST = Op("Cast", Any("pixels"), name="cast", shared=True)
_SHIFTED = Op("BiasAdd", _CAST, Const("minus_zeros"), name="shifted", shared=True)
_PATTERNS = (
    Op("PadV2", _CAST, Const("paddings"), Const("zeros"), name="pad"),
    Op("BiasAdd", Op("Pad", _SHIFTED, Const("paddings"), name="pad", shared=True), Const("zeros"), name="shifted_back"),
    _CAST,
)


def _describe(kernel: Kernel, graph: Graph, match: Match) -> Unit | str:
    pixels, out = match["pixels"], match.root.out
    if pixels.dtype != tf.uint8 or out.dtype != tf.float32:
        return "it is no image of bytes that is read as float32"
    if match.get("paddings"):
        reason = _not_padded_with_pixels(match)
        if reason:
            return reason
    return Unit(kernel, match, match.root, (), out, known=_RANGE)


def _not_padded_with_pixels(match: Match) -> str | None:
    reason = common.not_image(match.root, match["pixels"])
    if reason:
        return reason
    paddings, zeros = match.value("paddings"), _bytes(match)
    if paddings.shape != (4, 2) or paddings[[0, 3]].any() or (paddings < 0).any():
        return "its padding is not of height and width"
    if zeros.min() < _RANGE[0] or zeros.max() > _RANGE[1]:
        return "it is not padded with pixels"
    if match.get("minus_zeros") and not np.array_equal(match.value("minus_zeros"), -match.value("zeros")):
        return "it is shifted"
    return None


def _bytes(match: Match) -> np.ndarray:
    """What is padded with, rounded as the simulation rounds: (1,) or (C,)."""
    return np.floor(match.value("zeros").astype(np.float32).reshape(-1) + np.float32(0.5))


def _lower(lowering: Lowering, unit: Unit) -> None:
    match, spec = unit.match, lowering.spec(unit.output)
    if (spec.dtype, spec.low, spec.high) != (U8, *_RANGE):
        raise PlanError(f"{unit.output.name} holds pixels: its range must be 0..255. Received: {spec.low:g}..{spec.high:g}")
    value = lowering.as_float(match["pixels"])  # uint8, as in the float model
    if match.get("paddings"):
        value = _pad(lowering, value, match.value("paddings"), _bytes(match).astype(np.uint8), unit.name)
    lowering.put(unit.output, lowering.bitcast(value, tf.uint8, tf.quint8, f"{unit.name}/stored"))


def _pad(lowering: Lowering, value: Tensor, paddings: np.ndarray, fill: np.ndarray, name: str) -> Tensor:
    graph, constant = lowering.graph, lowering.constant
    if len(fill) == 1:
        return lowering.pad_bytes(value, paddings, fill, name)
    for axis in (2, 1):
        borders = {
            amount: _border(lowering, value, axis, amount, fill, name) for amount in sorted({*paddings[axis].tolist()} - {0})
        }
        before, after = ([borders[amount]] if amount else [] for amount in paddings[axis].tolist())
        parts = [*before, value, *after]
        if borders:
            attrs = {"N": len(parts), "T": tf.uint8, "Tidx": tf.int32}
            inputs = [*parts, constant(np.array(axis, np.int32), f"{name}/axis")]
            value = graph.add("ConcatV2", inputs, name=name, attrs=attrs, dtypes=[tf.uint8]).out
    return value


def _border(lowering: Lowering, value: Tensor, axis: int, amount: int, fill: np.ndarray, name: str) -> Tensor:
    """`amount` rows or columns of `fill` (C,), as long as those of `value`."""

    def add(op: str, inputs: list[Tensor], dtype: tf.DType, attrs: dict[str, object]) -> Tensor:
        return lowering.graph.add(op, inputs, name=f"{name}/border/{op}", attrs=attrs, dtypes=[dtype]).out

    keep, more = np.ones(4, np.int32), np.zeros(4, np.int32)
    keep[axis], more[axis] = 0, amount
    size = add("Shape", [value], tf.int32, {"T": tf.uint8, "out_type": tf.int32})
    kept = add("Mul", [size, lowering.constant(keep, f"{name}/border/keep")], tf.int32, {"T": tf.int32})
    sizes = add("AddV2", [kept, lowering.constant(more, f"{name}/border/amount")], tf.int32, {"T": tf.int32})
    pixel = lowering.constant(fill.reshape(1, 1, 1, -1), f"{name}/border/zeros")
    return add("BroadcastTo", [pixel, sizes], tf.uint8, {"T": tf.uint8, "Tidx": tf.int32})


KERNELS = tuple(Kernel("pixels", "source", pattern, _describe, _lower) for pattern in _PATTERNS)
