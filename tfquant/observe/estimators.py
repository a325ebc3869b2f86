"""From statistics to a range. A new estimator is a function here and a line in `ESTIMATORS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tfquant.observe.statistics import TensorStats

Range = tuple[float, float]
LEVELS = 255


def min_max(stats: TensorStats) -> Range:
    """All that was seen."""
    return stats.low, stats.high


def mean_min_max(stats: TensorStats) -> Range:
    """The mean over samples of their least and largest values (NNCF's default for activations)."""
    return stats.sum_low / stats.samples, stats.sum_high / stats.samples


def percentile(stats: TensorStats, percent: float = 99.999) -> Range:
    """The central `percent` of all values, the rest split evenly between both ends, within what was seen (ONNX Runtime)."""
    edges, counts = stats.histogram()
    share = np.concatenate([[0.0], np.cumsum(counts)]) / counts.sum()
    rest = (1 - percent / 100) / (1 if stats.low >= 0 else 2)
    low = stats.low if stats.low >= 0 else float(np.interp(rest, share, edges))
    high = float(np.interp(1 - rest, share, edges))
    return max(low, stats.low), min(high, stats.high)


def mse(stats: TensorStats) -> Range:
    """The range with the least mean squared error of 8-bit asymmetric quantization over the histogram (AIMET, Sony MCT).

    Within [low, high] the error of a value is that of uniform rounding, scale**2 / 12; outside, its distance to the nearest
    end. Values in the bin of 0 are exact. The two ends are searched in turn.
    """
    edges, counts = stats.histogram()
    centers = (edges[:-1] + edges[1:]) / 2
    weights = counts / counts.sum()
    inexact = 1.0 - float(weights[(edges[:-1] <= 0) & (edges[1:] > 0)].sum())
    above, below = _Tail(centers, weights), _Tail(-centers[::-1], weights[::-1])
    full_low, full_high = min(stats.low, 0.0), max(stats.high, 0.0)
    fractions = np.concatenate([np.geomspace(0.02, 0.3, 40), np.linspace(0.31, 1.0, 140)])

    def best(lows: np.ndarray, highs: np.ndarray) -> Range:
        steps = (highs - lows) / LEVELS
        exact_lows = -np.rint(-lows / steps) * steps  # 0 is made exact, which moves both ends
        errors = above(exact_lows + LEVELS * steps) + below(-exact_lows) + inexact * steps**2 / 12
        index = int(np.argmin(errors))
        return float(np.broadcast_to(lows, errors.shape)[index]), float(np.broadcast_to(highs, errors.shape)[index])

    found = full_low, full_high
    for _ in range(4):
        before = found
        if full_high > 0:
            found = best(np.array(found[0]), full_high * fractions)
        if full_low < 0:
            found = best(full_low * fractions, np.array(found[1]))
        if found == before:
            break
    return found


class _Tail:
    """sum of weights * (values - end)**2 over values > end, for sorted values."""

    def __init__(self, values: np.ndarray, weights: np.ndarray) -> None:
        self._values = values
        self._sums = [np.append(np.cumsum((weights * values**power)[::-1])[::-1], 0.0) for power in range(3)]

    def __call__(self, end: np.ndarray) -> np.ndarray:
        start = np.searchsorted(self._values, end, side="right")
        zeroth, first, second = (sums[start] for sums in self._sums)
        return np.maximum(second - 2 * end * first + end**2 * zeroth, 0.0)


ESTIMATORS: Mapping[str, Callable[[TensorStats], Range]] = {
    "minmax": min_max,
    "mean_minmax": mean_min_max,
    "percentile": percentile,
    "mse": mse,
}
