"""What is remembered of a tensor: extremes, sums and a histogram that merges exactly.

The histogram's bins are [i * 2**e, (i + 1) * 2**e) for whole numbers i: aligned at 0, a power of two wide, and just wide enough
for `BINS` of them to hold all values. Coarser bins are unions of finer ones, so two histograms merge without error, in any order.
(A value 2**126 times smaller than the width of a bin is beyond float32 and counts as 0.)
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

BINS = 4096
# Bins narrower than the largest value's last bits could not be told apart; a constant tensor still needs a width.
RESOLUTION, MIN_EXPONENT = 22, -100


def exponent_for(low: float, high: float) -> int:
    """The least e for which at most `BINS` bins of width 2**e hold [low, high]; `collector` computes the same in the graph."""
    spread, size = (high - low) / (BINS - 2), max(abs(low), abs(high))
    return max(_binary_exponent(spread), _binary_exponent(size) - RESOLUTION, MIN_EXPONENT)


def _binary_exponent(value: float) -> int:
    return math.frexp(value)[1] if value > 0 else MIN_EXPONENT


@dataclasses.dataclass(frozen=True)
class TensorStats:
    """Statistics of one tensor over some samples; `a.merge(b)` is that of both.

    Attributes:
        samples: rows of the first axis.
        elements: number of values.
        low: least value.
        high: largest value.
        sum_low: sum over samples of their least values.
        sum_high: sum over samples of their largest values.
        exponent: e, where the bins are 2**e wide.
        first: number of the first bin: it begins at first * 2**e.
        counts: int64, values per bin.
    """

    samples: int
    elements: int
    low: float
    high: float
    sum_low: float
    sum_high: float
    exponent: int
    first: int
    counts: np.ndarray

    def merge(self, other: TensorStats) -> TensorStats:
        low, high = min(self.low, other.low), max(self.high, other.high)
        exponent = max(exponent_for(low, high), self.exponent, other.exponent)
        parts = [_coarser(stats, exponent) for stats in (self, other)]
        first = min(start for start, _ in parts)
        counts = np.zeros(max(start + len(part) for start, part in parts) - first, np.int64)
        for start, part in parts:
            counts[start - first : start - first + len(part)] += part
        return TensorStats(
            self.samples + other.samples,
            self.elements + other.elements,
            low,
            high,
            self.sum_low + other.sum_low,
            self.sum_high + other.sum_high,
            exponent,
            first,
            counts,
        )

    def histogram(self) -> tuple[np.ndarray, np.ndarray]:
        """(edges, counts): float64 edges, one more than counts."""
        edges = (self.first + np.arange(len(self.counts) + 1)) * 2.0**self.exponent
        return edges, self.counts

    def around_zero(self) -> tuple[int, float, np.ndarray]:
        """(zero, width, counts): a histogram that holds 0, in bins as narrow as `BINS` of them allow.

        Bin i of `counts` is [(i - zero) * width, (i + 1 - zero) * width).
        """
        exponent = max(exponent_for(min(self.low, 0.0), max(self.high, 0.0)), self.exponent)
        first, part = _coarser(self, exponent)
        start, end = min(first, 0), max(first + len(part), 1)
        counts = np.zeros(end - start, np.int64)
        counts[first - start : first - start + len(part)] = part
        return -start, 2.0**exponent, counts

    def mirrored(self) -> TensorStats:
        """Those of the negated values (but for the edges of the bins, which hold their other end then)."""
        return dataclasses.replace(
            self,
            low=-self.high,
            high=-self.low,
            sum_low=-self.sum_high,
            sum_high=-self.sum_low,
            first=-(self.first + len(self.counts)),
            counts=self.counts[::-1],
        )


def _coarser(stats: TensorStats, exponent: int) -> tuple[int, np.ndarray]:
    """(first bin, counts) with bins of width 2**exponent, the empty ends left out."""
    used = np.flatnonzero(stats.counts)
    numbers = (stats.first + used) >> min(exponent - stats.exponent, 62)
    first = int(numbers[0])
    counts = np.zeros(int(numbers[-1]) - first + 1, np.int64)
    np.add.at(counts, numbers - first, stats.counts[used])
    return first, counts
