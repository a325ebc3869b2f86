"""From statistics to a range. A new estimator is a function here and a line in `ESTIMATORS`; users register theirs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tfquant.errors import ConfigError, shown
from tfquant.observe import clipping
from tfquant.observe.statistics import TensorStats
from tfquant.registry import Registry

Range = tuple[float, float]
# A range for so many bits.
Estimator = Callable[[TensorStats, int], Range]
# Not an estimator: for each tensor the one that errs least (`selection`).
AUTO = "auto"
# With so many bits, values within a step are as good as uniform.
_MANY_BITS = 8
_COARSE = 12
_WINDOWS = 256


def min_max(stats: TensorStats, bits: int = 8) -> Range:
    """All that was seen."""
    return stats.low, stats.high


def mean_min_max(stats: TensorStats, bits: int = 8) -> Range:
    """The mean over samples of their least and largest values (NNCF's default for activations)."""
    return stats.sum_low / stats.samples, stats.sum_high / stats.samples


def percentile(stats: TensorStats, bits: int = 8, percent: float = 99.999) -> Range:
    """The central `percent` of all values, the rest split evenly between both ends, within what was seen (ONNX Runtime)."""
    edges, counts = stats.histogram()
    share = np.concatenate([[0.0], np.cumsum(counts)]) / counts.sum()
    rest = (1 - percent / 100) / (1 if stats.low >= 0 else 2)
    low = stats.low if stats.low >= 0 else float(np.interp(rest, share, edges))
    high = float(np.interp(1 - rest, share, edges))
    low, high = np.clip([low, high], stats.low, stats.high)  # within a bin, both ends may be beyond a constant
    return float(low), float(high)


def mse(stats: TensorStats, bits: int = 8) -> Range:
    """The range with the least mean squared error of asymmetric quantization over the histogram (AIMET, Sony MCT).

    The two ends are searched in turn; with few bits from the best of a coarse grid of both.
    """
    errors = SquaredErrors(stats, bits)
    full_low, full_high = min(stats.low, 0.0), max(stats.high, 0.0)
    fractions = np.concatenate([np.geomspace(0.02, 0.3, 40), np.linspace(0.31, 1.0, 140)])

    def best(lows: np.ndarray, highs: np.ndarray) -> Range:
        lows, highs = np.broadcast_arrays(lows, highs)
        index = int(np.argmin(errors(lows, highs)))
        return float(lows[index]), float(highs[index])

    found = full_low, full_high
    if bits < _MANY_BITS:  # few steps have many local minima
        lows, highs = np.meshgrid(full_low * fractions[::_COARSE], full_high * fractions[::_COARSE])
        found = best(lows.reshape(-1), highs.reshape(-1))
    for _ in range(4):
        before = found
        if full_high > 0:
            found = best(np.array(found[0]), full_high * fractions)
        if full_low < 0:
            found = best(full_low * fractions, np.array(found[1]))
        if found == before:
            break
    return found


def entropy(stats: TensorStats, bits: int = 8) -> Range:
    """The window around 0 that loses the least information when it is quantized (ONNX Runtime, TensorRT).

    Windows grow on both sides, as far as values were seen. What lies outside falls into the bins at the ends; all bins are
    merged to 2**bits levels and spread over those that hold any values again; the least Kullback-Leibler divergence between
    the two distributions wins. The bin of 0 stays as it is, for 0 is exact in every range here; else the zeros of a ReLU
    would decide alone.
    """
    zero, width, counts = stats.around_zero()
    below, above = zero, len(counts) - zero
    levels = 2**bits
    least = levels if min(below, above) == 0 else levels // 2
    largest = max(below, above)
    if largest <= least:
        return stats.low, stats.high
    reaches = np.unique(np.linspace(least, largest, _WINDOWS).astype(np.int64))
    windows = [(zero - min(int(reach), below), zero + min(int(reach), above)) for reach in reaches]
    divergences = [_divergence(counts, start, end, zero, levels) for start, end in windows]
    start, end = windows[int(np.argmin(divergences))]
    return max((start - zero) * width, stats.low), min((end - zero) * width, stats.high)


def _divergence(counts: np.ndarray, start: int, end: int, zero: int, levels: int) -> float:
    """KL(P || Q): P are the bins start..end with the rest in its ends, Q the same bins merged to levels and spread again."""
    inside = counts[start:end].astype(np.float64)
    reference = inside.copy()
    reference[0] += counts[:start].sum()
    reference[-1] += counts[end:].sum()
    is_used = reference > 0
    at_zero = zero - start
    exact = inside[at_zero] if at_zero < len(inside) else 0.0
    spread = is_used.copy()
    if at_zero < len(inside):
        inside[at_zero], spread[at_zero] = 0.0, False
    level = np.arange(len(inside)) * levels // len(inside)
    sums = np.bincount(level, inside, levels)
    sizes = np.bincount(level, spread, levels)
    merged = np.where(spread, sums[level] / np.maximum(sizes[level], 1), 0.0)
    if at_zero < len(inside):
        merged[at_zero] = exact
    p, q = _smoothed(reference), _smoothed(merged)
    return float((p * np.log(p / q)).sum())


def _smoothed(counts: np.ndarray, epsilon: float = 1e-4) -> np.ndarray:
    """A distribution without zeros: each gets `epsilon`, which the others give."""
    is_zero = counts == 0
    zeros = int(is_zero.sum())
    taken = epsilon * zeros / max(len(counts) - zeros, 1)
    values = np.where(is_zero, epsilon, np.maximum(counts - taken, epsilon))
    return np.asarray(values / values.sum())


def aciq(stats: TensorStats, bits: int = 8) -> Range:
    """Analytic clipping: of the ranges that are best for Laplace's and the normal distribution, and all that was seen, the one
    that errs least over the histogram (ACIQ, arXiv:1810.05723).

    The distribution's mean, diversity and deviation are those of the histogram. Values of one sign, as behind a ReLU, are half
    of a distribution: its range is that of one bit more, and begins at 0.
    """
    if stats.high <= 0 and stats.low < 0:
        low, high = aciq(stats.mirrored(), bits)
        return -high, -low
    edges, counts = stats.histogram()
    centers = np.clip((edges[:-1] + edges[1:]) / 2, stats.low, stats.high)
    shares = counts / counts.sum()
    mean = float((shares * centers).sum())
    diversity = float((shares * np.abs(centers - mean)).sum())
    deviation = float(np.sqrt((shares * (centers - mean) ** 2).sum()))
    is_half = stats.low >= 0
    ranges = [(stats.low, stats.high)]
    for reach in (clipping.laplace(bits + is_half) * diversity, clipping.gauss(bits + is_half) * deviation):
        low = 0.0 if is_half else mean - reach
        ranges.append((max(low, stats.low), min(max(mean + reach, stats.low), stats.high)))
    lows, highs = np.array(ranges).T
    return ranges[int(np.argmin(SquaredErrors(stats, bits)(lows, highs)))]


class SquaredErrors:
    """Mean squared errors of asymmetric quantization to ranges, over the histogram of a tensor.

    Outside of [low, high] the error of a value is its distance to the nearest end; inside it is what rounding the middle of its
    bin changes, or, with 8 bits, that of uniform rounding, scale**2 / 12. Values in the bin of 0 are exact.
    """

    def __init__(self, stats: TensorStats, bits: int) -> None:
        edges, counts = stats.histogram()
        self._bits, self._levels = bits, 2**bits - 1
        self._centers, self._weights = (edges[:-1] + edges[1:]) / 2, counts / counts.sum()
        is_exact = (edges[:-1] <= 0) & (edges[1:] > 0)
        self._inexact = 1.0 - float(self._weights[is_exact].sum())
        self._above = _Tail(self._centers, self._weights)
        self._below = _Tail(-self._centers[::-1], self._weights[::-1])
        used = (counts > 0) & ~is_exact
        self._values, self._shares = self._centers[used], self._weights[used]

    def __call__(self, lows: np.ndarray, highs: np.ndarray) -> np.ndarray:
        """The errors of the ranges, each widened to hold 0: float64 (N,) for ends of shape (N,)."""
        lows, highs = np.minimum(lows, 0.0), np.maximum(highs, 0.0)
        steps = np.maximum((highs - lows) / self._levels, np.finfo(np.float32).tiny)
        zeros = np.rint(-lows / steps)  # 0 is made exact, which moves both ends
        if self._bits >= _MANY_BITS:
            exact_lows = -zeros * steps
            outside = self._above(exact_lows + self._levels * steps) + self._below(-exact_lows)
            return np.asarray(outside + self._inexact * steps**2 / 12)
        found = [self._rounded(step, zero) for step, zero in zip(steps, zeros, strict=True)]
        return np.array(found)

    def _rounded(self, step: float, zero: float) -> float:
        stored = np.clip(np.rint(self._values / step), -zero, self._levels - zero) * step
        return float((self._shares * (self._values - stored) ** 2).sum())


class _Tail:
    """sum of weights * (values - end)**2 over values > end, for sorted values."""

    def __init__(self, values: np.ndarray, weights: np.ndarray) -> None:
        self._values = values
        self._sums = [np.append(np.cumsum((weights * values**power)[::-1])[::-1], 0.0) for power in range(3)]

    def __call__(self, end: np.ndarray) -> np.ndarray:
        start = np.searchsorted(self._values, end, side="right")
        zeroth, first, second = (sums[start] for sums in self._sums)
        return np.maximum(second - 2 * end * first + end**2 * zeroth, 0.0)


ESTIMATORS: Registry[Estimator] = Registry(
    "estimator",
    {
        "minmax": min_max,
        "mean_minmax": mean_min_max,
        "percentile": percentile,
        "mse": mse,
        "entropy": entropy,
        "aciq": aciq,
    },
    reserved=(AUTO,),
)


def estimate(name: str, stats: TensorStats, bits: int, tensor: str) -> Range:
    """The range that the estimator `name` gives for a tensor.

    Args:
        name: in `ESTIMATORS`.
        stats: of the tensor.
        bits: that it is to be quantized to.
        tensor: its name, for errors.

    Raises:
        ConfigError: there is no such estimator, or a registered one fails or gives no range.
    """
    estimator = ESTIMATORS.get(name)
    try:
        found = estimator(stats, bits)
    except Exception as error:  # one that a user registered may fail in any way
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ConfigError(f"The estimator {name!r} fails on {tensor}: {reason}") from error
    try:
        low, high = (float(end) for end in found)
    except (TypeError, ValueError):
        low, high = np.nan, np.nan
    if not (np.isfinite([low, high]).all() and low <= high):
        raise ConfigError(
            f"The estimator {name!r} must return finite numbers (low, high), low <= high. Received: {shown(found)} for {tensor}"
        )
    return low, high
