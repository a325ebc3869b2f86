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
# Kernels have 8 bits; the simulation takes any number from the first to the second.
BITS = 2, 8
# Outside of these, products of scales leave float32.
MIN_SCALE, MAX_SCALE = 1e-15, 1e15


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How one activation is quantized.

    Attributes:
        dtype: "quint8" with a zero point, or "qint8", symmetric, -127..127.
        scale: size of a step, a float32 value.
        zero_point: the integer that stands for 0.
        source: where the range comes from (an estimator, "known", "learned" or "user").
        group: tensors of the same group share one range.
        bits: of an integer; with fewer than 8, the plan can be simulated alone.
    """

    dtype: str
    scale: float
    zero_point: int
    source: str
    group: str
    bits: int = 8

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest integer."""
        return (0, 2**self.bits - 1) if self.dtype == U8 else (-largest(self.bits), largest(self.bits))

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


def largest(bits: int) -> int:
    """The largest integer of a symmetric range."""
    return int(2 ** (bits - 1)) - 1


def asymmetric(low: float, high: float, source: str, group: str, bits: int = 8) -> QuantSpec:
    """The quint8 spec for [low, high]: 0 is included and exact, one end may move by half a step."""
    low, high = min(low, 0.0), max(high, 0.0)
    steps = 2**bits - 1
    scale = _float32((high - low) / steps) if high > low else _float32(1 / steps)
    return QuantSpec(U8, scale, int(np.clip(round(-low / scale), 0, steps)), source, group, bits)


def symmetric(low: float, high: float, source: str, group: str, dtype: str = S8, bits: int = 8) -> QuantSpec:
    """The spec for [-m, m], m = max(|low|, |high|): qint8, or quint8 with its middle as the zero point."""
    bound = max(abs(low), abs(high))
    scale = _float32((bound if bound > 0 else 1.0) / largest(bits))
    return QuantSpec(dtype, scale, 0 if dtype == S8 else largest(bits) + 1, source, group, bits)


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
class Shift:
    """An edit of the float graph before it is annotated: the bias of an op grows.

    Attributes:
        op: name of a convolution or MatMul; one without a bias gets one.
        values: float32 (C,), what is added.
        corrects: it makes up for an error of the quantization: the float model is without it.
    """

    op: str
    values: np.ndarray
    corrects: bool = False


@dataclasses.dataclass(frozen=True)
class Scaling:
    """An edit of the float graph before annotation: channels are multiplied where they are made, divided where they are read.

    Attributes:
        producers: names of convolutions and MatMuls, whose output channels and biases are multiplied, and of the last nodes of
            LayerNorms, whose gamma and beta are.
        consumers: names of those whose weights' input channels are divided.
        factors: float32 (C,), positive.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    factors: np.ndarray


Edit = Shift | Scaling


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
        edits: of the simplified float graph, in order, before it is annotated.
        rounded: name of an op to its int8 weights, where they are not the nearest: of the shape of `Unit.weights`.
        weight_bits: name of an op to the bits of its output channels, int8 (C,), where they are not 8: for the simulation alone.
            The integers of a channel of 0 bits are 0.
        weight_offsets: name of an op to what the integer 0 of its output channels stands for, float32 (C,), where that is not 0:
            for the simulation alone.
        ranges: name of a tensor that stays float to the least and the largest value that the data gave it: for targets that
            can quantize more.
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
    edits: tuple[Edit, ...] = ()
    rounded: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    weight_bits: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    weight_offsets: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    @property
    def is_simulated(self) -> bool:
        """Whether no kernel can run it: it has fewer than 8 bits."""
        return bool(self.weight_bits or self.weight_offsets) or any(spec.bits < BITS[1] for spec in self.tensors.values())

    def quantizes(self, tensor: str) -> bool:
        """Whether the plan stores a tensor, named as in its graph, in 8 bits."""
        return tensor in self.tensors or tensor in self.dynamic
