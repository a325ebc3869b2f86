"""What a quantization plan says: frozen data, without a graph.

A tensor x is stored as q = round(x / scale) + zero_point; 0 is always exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

# What a plan quantizes: weights and activations with ranges from data, activations with ranges found at each call, weights alone.
MODES = ("static", "dynamic", "weight_only")
U8, S8 = "quint8", "qint8"
_LIMITS = {U8: (0, 255), S8: (-127, 127)}
# Outside of these, products of scales leave float32.
MIN_SCALE, MAX_SCALE = 1e-15, 1e15


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How one activation is quantized.

    Attributes:
        dtype: "quint8" with a zero point, or "qint8", symmetric, -127..127.
        scale: size of a step, a float32 value.
        zero_point: the integer that stands for 0.
        source: where the range comes from (an estimator, "known" or "user").
        group: tensors of the same group share one range.
    """

    dtype: str
    scale: float
    zero_point: int
    source: str
    group: str

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest integer."""
        return _LIMITS[self.dtype]

    @property
    def low(self) -> float:
        """The real value of the least integer."""
        return (self.limits[0] - self.zero_point) * self.scale

    @property
    def high(self) -> float:
        """The real value of the largest integer."""
        return (self.limits[1] - self.zero_point) * self.scale

    @property
    def offset(self) -> float:
        """What a kernel without zero points misses: the real value of the stored 0."""
        return -self.zero_point * self.scale


def asymmetric(low: float, high: float, source: str, group: str) -> QuantSpec:
    """The quint8 spec for [low, high]: 0 is included and exact, one end may move by half a step."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = _float32((high - low) / 255) if high > low else _float32(1 / 255)
    return QuantSpec(U8, scale, int(np.clip(round(-low / scale), 0, 255)), source, group)


def symmetric(low: float, high: float, source: str, group: str, dtype: str = S8) -> QuantSpec:
    """The spec for [-m, m], m = max(|low|, |high|): qint8, or quint8 with the zero point 128."""
    bound = max(abs(low), abs(high))
    scale = _float32(bound / 127) if bound > 0 else _float32(1 / 127)
    return QuantSpec(dtype, scale, 0 if dtype == S8 else 128, source, group)


def _float32(scale: float) -> float:
    return float(np.float32(np.clip(scale, MIN_SCALE, MAX_SCALE)))


@dataclasses.dataclass(frozen=True)
class DynamicSpec:
    """How one activation is quantized whose range is found anew at each call.

    Attributes:
        dtype: "quint8" or "qint8".
        zero_point: the integer that stands for 0; None where it is found with the range.
    """

    dtype: str
    zero_point: int | None


@dataclasses.dataclass(frozen=True)
class OpDecision:
    """What was decided for an op that could run in INT8.

    Attributes:
        name: name of its main node (the conv of conv + bias + ReLU), a normalized path.
        op: type of that node.
        kernel: name of the target's kernel, "" where none fits.
        key: hash of its weights, "" where it has none.
        int8: whether it runs in INT8.
        reason: why it stays float, "" for INT8.
    """

    name: str
    op: str
    kernel: str
    key: str
    int8: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class QuantPlan:
    """The decisions for one model: what is needed to lower it without data.

    Attributes:
        target: name of the target whose kernel table was read.
        signature_keys: the quantized signatures.
        ops: a decision per op that could run in INT8, in topological order.
        tensors: name of a tensor to its spec, for all quantized activations.
        weight_scales: name of an op to the scales of its output channels, float32 (C,).
        settings: what the ranges were made with, for the reader.
        bfloat16: names of float ops that run in bfloat16, in topological order.
        dynamic: name of a tensor to its spec, for quantized activations whose ranges are found at each call.
        mode: one of `MODES`.
    """

    target: str
    signature_keys: tuple[str, ...]
    ops: tuple[OpDecision, ...]
    tensors: Mapping[str, QuantSpec]
    weight_scales: Mapping[str, np.ndarray]
    settings: Mapping[str, str | int]
    bfloat16: tuple[str, ...] = ()
    dynamic: Mapping[str, DynamicSpec] = dataclasses.field(default_factory=dict)
    mode: str = "static"

    def quantizes(self, tensor: str) -> bool:
        """Whether the plan stores a tensor, named as in its graph, in 8 bits."""
        return tensor in self.tensors or tensor in self.dynamic
