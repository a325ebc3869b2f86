"""Fake quantization in a graph: the nodes that round floats to integers and back, and the integers that they stand for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfquant.graph.ir import Node, Tensor

# Steps beyond these leave float32 once they are multiplied.
_STEPS = 1e-15, 1e15


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values that a fake quantization rounds to: step * n, n an integer from `least` to `most`.

    Attributes:
        step: a float32 value.
        least: at most 0.
        most: at least 0.
        bits: that the integers were given; `most - least` is at most 2**bits - 1.
    """

    step: float
    least: int
    most: int
    bits: int

    @property
    def low(self) -> float:
        return self.least * self.step

    @property
    def high(self) -> float:
        return self.most * self.step


def between(low: float, high: float, bits: int) -> Grid:
    """The grid of all integers of `bits` for [low, high], which must hold 0 and not be empty; one end may move by half a step."""
    levels = 2**bits - 1
    step = float(np.float32((high - low) / levels))
    least = -min(max(round(-low / step), 0), levels)
    return Grid(step, least, least + levels, bits)


def bits_of(node: Node) -> int | None:
    """How many bits a fake quantization has; None where that is not a constant."""
    if node.op != "QuantizeAndDequantizeV3":
        return int(node.attr("num_bits", 8))
    value = _value(node.inputs[3])
    return int(value) if value is not None and value.size == 1 else None


def grids_of(node: Node) -> tuple[Grid, ...]:
    """The grids of a fake quantization, one per channel where it has several; none where its range is not a constant.

    The arithmetic is that of TensorFlow's kernels (fake_quant_ops_functor.h, quantize_and_dequantize_op.h).
    """
    bits = bits_of(node)
    if node.pinned or node.out.dtype != tf.float32 or bits is None or not _has_range(node):
        return ()
    ends = _ends(node)
    if ends is None:
        return ()
    is_narrow = bool(node.attr("narrow_range", False))
    grids = []
    for low, high in zip(*ends, strict=True):
        grid = _around_zero(node, low, high, bits, is_narrow) if _is_around_zero(node) else _nudged(low, high, bits, is_narrow)
        if grid is None:
            return ()
        grids.append(grid)
    return tuple(grids)


def widest(grids: Sequence[Grid]) -> Grid:
    """A grid with the range and the bits of all: one of them, where it has both."""
    low, high, bits = min(g.low for g in grids), max(g.high for g in grids), max(g.bits for g in grids)
    return next((g for g in grids if (g.low, g.high, g.bits) == (low, high, bits)), None) or between(low, high, bits)


def _has_range(node: Node) -> bool:
    """Whether its range is an input or an attribute, and not that of each call's values."""
    return not _is_around_zero(node) or bool(node.attr("range_given", False))


def _is_around_zero(node: Node) -> bool:
    return node.op.startswith("QuantizeAndDequantize")


def _ends(node: Node) -> tuple[np.ndarray, np.ndarray] | None:
    """The least and largest values, float32 (ranges,) each."""
    low: np.ndarray | float | None = node.attr("min", -6.0)
    high: np.ndarray | float | None = node.attr("max", 6.0)
    if node.op != "FakeQuantWithMinMaxArgs":
        low, high = (_value(tensor) for tensor in node.inputs[1:3])
    if low is None or high is None:
        return None
    lows, highs = np.atleast_1d(np.asarray(low, np.float32)), np.atleast_1d(np.asarray(high, np.float32))
    is_sound = lows.ndim == 1 and lows.shape == highs.shape and np.isfinite([lows, highs]).all()
    return (lows, highs) if is_sound else None


def _value(tensor: Tensor) -> np.ndarray | None:
    while tensor.node.op == "Identity":
        tensor = tensor.node.inputs[0]
    return tensor.value


def _nudged(low: np.float32, high: np.float32, bits: int, is_narrow: bool) -> Grid | None:
    """The grid of a FakeQuant op, whose zero point is moved to an integer."""
    least, most = int(is_narrow), 2**bits - 1
    step = np.float32((high - low) / np.float32(most - least))
    if not _STEPS[0] < step < _STEPS[1]:
        return None
    exact = float(np.float32(least) - np.float32(low / step))
    zero = least if exact < least else most if exact > most else math.floor(exact + 0.5)
    return Grid(float(step), least - zero, most - zero, bits)


def _around_zero(node: Node, low: np.float32, high: np.float32, bits: int, is_narrow: bool) -> Grid | None:
    """The grid of QuantizeAndDequantize, whose zero point is 0: the end that needs the larger steps counts."""
    is_signed = bool(node.attr("signed_input", True))
    most = 2 ** (bits - 1) - 1 if is_signed else 2**bits - 1
    least = -most - (not is_narrow) if is_signed else 0
    steps = [
        float(np.float32(end / np.float32(count))) for end, count in ((low, least), (high, most)) if count and end * count > 0
    ]
    step = max(steps, default=0.0)
    return Grid(step, least, most, bits) if _STEPS[0] < step < _STEPS[1] else None
