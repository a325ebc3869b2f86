"""Channels scaled so that they fill the range of their tensor alike: cross-layer equalization and SmoothQuant.

One scale for all channels of an activation leaves few steps to the channels with small values. A factor s_c per channel, taken
out of the weights behind, gives them more. What that costs there is weighed up: for each layer that reads the tensor the noise
of its result is estimated, in units of its signal, as

    step_x^2 / 12 * sum_co |W_co|^2 / s_c^2  +  sum_o step_o^2 / 12 * taps * sum_c s_c^2 E[x_c^2],

step_x = (range of s * x) / 255, step_o = max_c (|W_co| / s_c) / 127: rounding of activations and of weights, independent errors
of variance step^2 / 12. Depthwise layers have a step per channel, so the second term does not change. Of a family of factors
the one with the least noise is taken, none where that gains little.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tfquant.graph.ir import Node, Tensor
from tfquant.observe.channels import ChannelStats
from tfquant.plan.edits import taps_of
from tfquant.plan.spec import Scaling
from tfquant.refine.chains import Chain

# The noise must fall at least to this share: values beyond the extremes that the samples show are not in the estimate, and there
# are the more of them, the more channels fill the range.
_WORTH = 0.8
# Extremes of few samples are chance: a channel counts as wide as so many times the root mean square of its values but zeros at
# least; one with fewer such values than the second number might be of any width, and counts as the widest.
_LEAST_WIDTH, _LEAST_VALUES = 4.0, 32
# A channel whose values are smaller still than this share of the largest may have been seen too rarely.
_LEAST_SHARE = 1 / 32
# Factors (largest share)^-power: 1 makes all channels alike, 1/2 is as far as cross-layer equalization goes. Beyond that the
# extremes of few samples count for too much.
_POWERS = (0.1, 0.2, 0.3, 0.4, 0.5)
_CLIP = 6.0  # of Relu6
_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """A layer that reads the tensor of a chain.

    Attributes:
        stats: of what it reads.
        energy: sums of squared weights over the taps, (C, O).
        peak: largest absolute weights over the taps, (C, O).
        taps: how many.
        is_depthwise: an output channel has one input channel.
    """

    stats: ChannelStats
    energy: np.ndarray
    peak: np.ndarray
    taps: int
    is_depthwise: bool

    @property
    def width(self) -> np.ndarray:
        """The largest absolute value that is to be expected of each channel, (C,)."""
        active = np.maximum(self.stats.active, 1.0)
        width = np.maximum(self.stats.largest, _LEAST_WIDTH * np.sqrt(self.stats.squares / active))
        return np.where(self.stats.active < _LEAST_VALUES, max(float(width.max()), 0.0), width)

    def noise(self, factors: np.ndarray) -> float:
        """Noise over signal of its result, with the channels of its input multiplied by `factors`."""
        low = min(float((self.stats.low * factors).min()), 0.0)
        high = max(float((self.stats.high * factors).max()), 0.0)
        power = self.stats.power
        activations = ((high - low) / 255) ** 2 / 12 * float((self.energy.sum(1) / factors**2).sum())
        if self.is_depthwise:
            steps = self.peak / 127
            weights = float(((steps**2).sum(1) * power).sum()) / 12 * self.taps
        else:
            steps = (self.peak / factors[:, None]).max(0) / 127
            weights = float((steps**2).sum() * (factors**2 * power).sum()) / 12 * self.taps
        signal = float((self.energy.sum(1) * power).sum())
        return (activations + weights) / max(signal, np.finfo(np.float64).tiny)


def equalize(chains: Iterable[Chain], stats: Mapping[Tensor, ChannelStats], quantized: Mapping[Node, object]) -> list[Scaling]:
    """Cross-layer equalization.

    Args:
        chains: those that layers alone make.
        stats: of what the consumers read.
        quantized: the layers that run in INT8; others have no noise.
    """
    found = []
    for chain in chains:
        readers = _readers(chain, stats, quantized)
        if readers:
            share = np.max([_share(reader.width) for reader in readers], axis=0)
            found += _best(chain, readers, [share**-power for power in _POWERS], stats)
    return found


def smooth(chains: Iterable[Chain], stats: Mapping[Tensor, ChannelStats], quantized: Mapping[Node, object]) -> list[Scaling]:
    """SmoothQuant: factors w^(1 - alpha) / a^alpha with the largest absolute values a of the activations and w of all weights
    that read them. Arguments as for `equalize`, but for the chains, which LayerNorms make."""
    found = []
    for chain in chains:
        readers = _readers(chain, stats, quantized)
        if readers:
            activations = np.max([_share(reader.width) for reader in readers], axis=0)
            weights = np.max([_share(reader.peak.max(1)) for reader in readers], axis=0)
            candidates = [weights ** (1 - alpha) / activations**alpha for alpha in _ALPHAS]
            found += _best(chain, readers, candidates, stats)
    return found


def _share(largest: np.ndarray) -> np.ndarray:
    top = float(largest.max())
    return np.maximum(largest / top, _LEAST_SHARE) if top > 0 else np.ones_like(largest)


def _best(
    chain: Chain, readers: Sequence[_Reader], candidates: Sequence[np.ndarray], stats: Mapping[Tensor, ChannelStats]
) -> list[Scaling]:
    def noise(factors: np.ndarray) -> float:
        return sum(reader.noise(factors) for reader in readers)

    before = noise(np.ones(chain.channels))
    if chain.clipped:  # scaled up alone, and never beyond where the values are cut off
        largest = np.max([stats[tensor].largest for tensor in chain.clipped], axis=0)
        most = np.maximum(_CLIP / np.maximum(largest, np.finfo(np.float32).tiny), 1.0)
        candidates = [np.clip(factors / factors.min(), 1.0, most) for factors in candidates]
    best = min(candidates, key=noise)
    if not noise(best) < _WORTH * before:
        return []
    names = [tuple(node.name for node in nodes) for nodes in (chain.producers, chain.consumers)]
    return [Scaling(names[0], names[1], best.astype(np.float32))]


def _readers(chain: Chain, stats: Mapping[Tensor, ChannelStats], quantized: Mapping[Node, object]) -> list[_Reader]:
    readers = []
    for node in chain.consumers:
        if node not in quantized:
            continue
        weights = taps_of(node)
        readers.append(
            _Reader(
                stats[node.inputs[0]],
                (weights**2).sum(0),
                np.abs(weights).max(0),
                len(weights),
                node.op == "DepthwiseConv2dNative",
            )
        )
    return readers


def read_tensors(chains: Iterable[Chain]) -> list[Tensor]:
    """Whose channel statistics `equalize` and `smooth` need."""
    return list(dict.fromkeys(tensor for chain in chains for tensor in (*chain.read, *chain.clipped)))
