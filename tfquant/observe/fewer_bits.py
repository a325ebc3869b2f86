"""Weights in 2 to 8 bits: clipped, with bits given to the channels that need them, and with their moments restored.

All three are those of ACIQ (arXiv:1810.05723). What comes out can be simulated; TensorFlow has no kernels below 8 bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from tfquant.observe import clipping
from tfquant.plan.kernels import Unit
from tfquant.plan.rounding import dequantize, levels, nearest
from tfquant.plan.spec import BITS

# A deviation of so small a share of a step is a rounding error of the computation.
_NO_DEVIATION = 1e-6


@dataclasses.dataclass(frozen=True)
class Bits:
    """How many bits a plan has.

    Attributes:
        weights: of the weights of a layer.
        activations: of activations, but for those that no quantized layer computes.
        layers: name of an op to the bits of its weights, where these are others.
        allocate: the channels of a layer have so many bits on average, by their deviations.
        clip: weights are clipped where that lowers their mean squared error.
        correct: scales and offsets restore the mean and the deviation of each channel.
    """

    weights: int = 8
    activations: int = 8
    layers: Mapping[str, int] = dataclasses.field(default_factory=dict)
    allocate: bool = False
    clip: bool = True
    correct: bool = True

    def of(self, unit: Unit) -> int:
        """The bits of the weights of a unit; what is no layer, but a scale and a shift, has 8."""
        return self.layers.get(unit.name, self.weights) if unit.kernel.role == "compute" else BITS[1]

    @property
    def settings(self) -> dict[str, str | int]:
        """What a plan tells of it; nothing where all has 8 bits."""
        if self.weights == self.activations == BITS[1] and not self.layers:
            return {}
        return {
            "weight_bits": "mixed" if self.layers else self.weights,
            "activation_bits": self.activations,
            "bit_allocation": self.allocate,
            "weight_clipping": "aciq" if self.clip else "none",
            "weight_correction": self.correct,
        }


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights in fewer than 8 bits.

    Attributes:
        integers: int8, of the shape of the float weights.
        scales: float32 (C,): what one step is worth.
        offsets: float32 (C,): what the integer 0 stands for; None for 0.
        bits: of each channel, int8 (C,).
    """

    integers: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None
    bits: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """The float32 weights that they stand for."""
        return dequantize(self.integers, self.scales, self.offsets)


def quantize_weights(weights: np.ndarray, count: int, bits: Bits, is_shared: bool = False) -> Weights:
    """Weights in `count` bits.

    Args:
        weights: float32 (..., C), output channels last.
        count: 2 to 8; the mean of the channels where `bits.allocate`.
        bits: what is done.
        is_shared: all channels have the scale of the largest, before it is corrected.
    """
    flat = weights.reshape(-1, weights.shape[-1]).astype(np.float64)
    channels = flat.shape[-1]
    own = allocated(np.sqrt((flat**2).mean(0)), count) if bits.allocate else np.full(channels, count, np.int8)
    if is_shared:
        scales = np.full(channels, _scales(flat.reshape(-1, 1), own[:1], bits.clip)[0])
    else:
        scales = _scales(flat, own, bits.clip)
    integers = nearest(flat, scales, own)
    offsets = None
    if bits.correct:
        scales, offsets = restored(flat, integers, scales)
    return Weights(integers.reshape(weights.shape), scales, offsets, own)


def allocated(sizes: np.ndarray, mean: int) -> np.ndarray:
    """Bits of each channel, int8 (C,), with the given mean: 0, or 2 to 8.

    The error of a layer is least where the number of a channel's levels grows with its size to the power of 2/3:
    log2 B_i = c + 2/3 log2 size_i, rounded and clamped, with the c that gives the mean. What is left of the sum by rounding goes
    to those that lost most of it. 1 bit is none, as symmetric integers of 1 bit are all 0.

    Args:
        sizes: of the channels, float (C,): their deviations (from 0, about which integers are symmetric).
        mean: 2 to 8.
    """
    total = mean * len(sizes)
    if not (sizes > 0).any():
        return np.full(len(sizes), mean, np.int8)
    with np.errstate(divide="ignore"):
        wanted = 2 / 3 * np.log2(sizes)

    def rounded(level: float) -> np.ndarray:
        bits = np.clip(np.rint(wanted + level), BITS[0], BITS[1])
        return np.where(wanted + level < 1, 0.0, bits)

    low = -float(wanted.max()) - 1.0  # nothing for anybody
    high = BITS[1] - float(wanted[sizes > 0].min())  # all that there is
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rounded(middle).sum() <= total else (low, middle)
    bits = rounded(low)
    left = total - int(bits.sum())
    lost_most = [channel for channel in np.argsort(bits - wanted, kind="stable") if sizes[channel] > 0]
    while left > 0:
        before = left
        for channel in lost_most:
            step = BITS[0] if bits[channel] == 0 else 1
            if bits[channel] < BITS[1] and step <= left:
                bits[channel] += step
                left -= step
        if left == before:
            break
    return bits.astype(np.int8)


def _scales(flat: np.ndarray, bits: np.ndarray, clip: bool) -> np.ndarray:
    """Scales of the channels, float32 (C,), of weights (N, C): of the ranges max |w|, and those that are best for Laplace's and
    the normal distribution, the one with the least squared error."""
    largest, most = np.abs(flat).max(0), np.maximum(levels(bits), 1)
    bounds = [largest]
    if clip:
        mean = flat.mean(0)
        # Symmetric integers of n bits have 2**n - 1 levels.
        exact = np.log2(2 * most + 1)
        for reach, spread in (
            (clipping.laplace, np.abs(flat - mean).mean(0)),
            (clipping.gauss, flat.std(0)),
        ):
            half = np.array([reach(float(count)) for count in exact]) * spread
            bounds.append(np.minimum(np.abs(mean) + half, largest))
    choices = np.stack([_positive(bound / most) for bound in bounds])
    errors = np.stack([((flat - nearest(flat, scales, bits) * scales.astype(np.float64)) ** 2).sum(0) for scales in choices])
    return np.asarray(np.take_along_axis(choices, errors.argmin(0)[None], 0)[0])


def _positive(scales: np.ndarray) -> np.ndarray:
    return np.where(scales > 0, np.maximum(scales, np.finfo(np.float32).tiny), 1.0).astype(np.float32)


def restored(flat: np.ndarray, integers: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scales, offsets), float32 (C,), with which integers (N, C) have the mean and the deviation of each channel of the weights.

    A channel whose integers are all alike gets its mean back alone.
    """
    values = integers * scales.astype(np.float64)
    found, wanted = values.std(0), flat.std(0)
    factors = np.where(found > _NO_DEVIATION * scales, wanted / np.maximum(found, np.finfo(np.float64).tiny), 1.0)
    restored_scales = _positive(scales * factors)
    offsets = flat.mean(0) - (integers * restored_scales.astype(np.float64)).mean(0)
    return restored_scales, offsets.astype(np.float32)
