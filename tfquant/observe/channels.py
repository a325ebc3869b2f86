"""Statistics per channel (the last axis), which algorithms before and after the quantization ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from tfquant.graph.execution import executable
from tfquant.graph.ir import Graph, Tensor
from tfquant.observe.collector import called


@dataclasses.dataclass(frozen=True)
class ChannelStats:
    """Statistics of the channels of one tensor over some samples; `a.merge(b)` is that of both.

    Attributes:
        count: values per channel.
        low: least values, float64 (C,).
        high: largest values, float64 (C,).
        total: sums, float64 (C,).
        squares: sums of squares, float64 (C,).
        active: how many values are not 0, float64 (C,).
    """

    count: int
    low: np.ndarray
    high: np.ndarray
    total: np.ndarray
    squares: np.ndarray
    active: np.ndarray

    def merge(self, other: ChannelStats) -> ChannelStats:
        return ChannelStats(
            self.count + other.count,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            self.total + other.total,
            self.squares + other.squares,
            self.active + other.active,
        )

    @property
    def largest(self) -> np.ndarray:
        """The largest absolute values, float64 (C,)."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    @property
    def power(self) -> np.ndarray:
        """Means of the squares, float64 (C,)."""
        return self.squares / max(self.count, 1)


def collect_channels(
    graph: Graph, tensors: Sequence[Tensor], batches: Iterable[Mapping[str, np.ndarray]]
) -> dict[Tensor, ChannelStats]:
    """Channel statistics of float `tensors` with a known last axis over all `batches`, in one pass."""
    run = executable(graph, lambda get: [_reductions(get(tensor)) for tensor in tensors])
    found: dict[Tensor, ChannelStats] = {}
    for batch in batches:
        for tensor, (count, *values) in zip(tensors, called(run, graph, batch), strict=True):
            stats = ChannelStats(int(count.numpy()), *(value.numpy().astype(np.float64) for value in values))
            found[tensor] = found[tensor].merge(stats) if tensor in found else stats
    return found


def channel_quantiles(
    graph: Graph, tensors: Sequence[Tensor], batches: Iterable[Mapping[str, np.ndarray]], share: float
) -> dict[Tensor, tuple[np.ndarray, np.ndarray]]:
    """Below and above which `share` of the values of each channel lie, float64 (C,): means over the batches (as NNCF has it)."""
    run = executable(graph, lambda get: [get(tensor) for tensor in tensors])
    totals = [np.zeros((2, int((tensor.shape or (0,))[-1] or 0))) for tensor in tensors]
    count = 0
    for batch in batches:
        count += 1
        for total, value in zip(totals, called(run, graph, batch), strict=True):
            total += np.quantile(value.numpy().reshape(-1, total.shape[1]), (share, 1 - share), axis=0)
    return {tensor: (total[0] / count, total[1] / count) for tensor, total in zip(tensors, totals, strict=True)}


def _reductions(value: tf.Tensor) -> tuple[tf.Tensor, ...]:
    rows = tf.reshape(value, tf.stack([-1, tf.shape(value)[-1]]))  # the static shape may be lost behind large constants
    wide = tf.cast(rows, tf.float64)
    return (
        tf.shape(rows, tf.int64)[0],
        tf.reduce_min(rows, 0),
        tf.reduce_max(rows, 0),
        tf.reduce_sum(wide, 0),
        tf.reduce_sum(wide * wide, 0),
        tf.math.count_nonzero(rows, 0),
    )
