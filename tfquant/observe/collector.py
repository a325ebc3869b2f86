"""One pass over the data: the statistics are ops of the graph, only their small results reach Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfquant.errors import DataError, ModelError
from tfquant.graph.execution import Executable, executable, unfused
from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.graph.loading import first_line
from tfquant.observe.statistics import BINS, MIN_EXPONENT, RESOLUTION, TensorStats


class Collector:
    """Runs the float graph over batches and gathers the statistics of the named tensors.

    Args:
        graph: the float graph.
        tensors: the tensors to observe, all float32.
        others: tensors of which the least and the largest value are enough.

    Attributes:
        stats: of `tensors`.
        ends: (low, high) of `others`.
    """

    def __init__(self, graph: Graph, tensors: Sequence[Tensor], others: Sequence[Tensor] = ()) -> None:
        self.stats: dict[Tensor, TensorStats] = {}
        self.ends: dict[Tensor, tuple[float, float]] = {}
        self._graph, self._tensors, self._others = graph, list(tensors), list(others)
        self._run = executable(
            graph, lambda get: ([_reductions(get(tensor)) for tensor in self._tensors], [_ends(get(t)) for t in self._others])
        )

    def update(self, batch: Mapping[str, np.ndarray]) -> None:
        """Adds a batch, keyed by input name.

        Raises:
            DataError: the network makes NaN or infinity of it.
            ModelError: TensorFlow cannot run the float model on it.
        """
        results, ends = called(self._run, self._graph, batch)
        for tensor, result in zip(self._tensors, results, strict=True):
            result = {key: value.numpy() for key, value in result.items()}
            if not np.isfinite([result["low"], result["high"]]).all():
                origin = _first_not_finite(self._graph, batch) or tensor.node
                raise DataError(f"The network computes NaN or infinity from this data, first at {origin.name} ({origin.op}).")
            new = _to_stats(result)
            self.stats[tensor] = self.stats[tensor].merge(new) if tensor in self.stats else new
        for tensor, pair in zip(self._others, ends, strict=True):
            low, high = (float(end) for end in pair.numpy())
            if np.isfinite([low, high]).all():
                before = self.ends.get(tensor, (low, high))
                self.ends[tensor] = min(low, before[0]), max(high, before[1])


def called(run: Executable, graph: Graph, batch: Mapping[str, np.ndarray]) -> Any:
    """What an executable of `graph` returns for a batch, keyed by input name; ops run one by one.

    Raises:
        ModelError: TensorFlow cannot run it.
    """
    try:
        with unfused():
            return run(*(tf.convert_to_tensor(batch[key], tensor.dtype) for key, tensor in graph.inputs.items()))
    except tf.errors.OpError as error:
        raise ModelError(f"TensorFlow cannot run the float model on this data: {first_line(error)}") from error


def _first_not_finite(graph: Graph, batch: Mapping[str, np.ndarray]) -> Node | None:
    """The first op whose result is not finite though what it reads is."""
    nodes = [
        node for node in graph.order() if not node.pinned and node.dtypes and node.dtypes[0].is_floating and node.op != "Const"
    ]
    run = executable(graph, lambda get: [tf.reduce_all(tf.math.is_finite(get(node.out))) for node in nodes])
    for node, is_finite in zip(nodes, called(run, graph, batch), strict=True):
        if not is_finite.numpy():
            return node
    return None


def values(graph: Graph, tensor: Tensor, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """What one tensor is for a batch."""
    return np.asarray(called(executable(graph, lambda get: get(tensor)), graph, batch).numpy())


def collect(graph: Graph, tensors: Sequence[Tensor], batches: Iterable[Mapping[str, np.ndarray]]) -> dict[Tensor, TensorStats]:
    """Statistics of `tensors` over all `batches`; as `consume`."""
    return consume(Collector(graph, tensors), batches).stats


def consume(collector: Collector, batches: Iterable[Mapping[str, np.ndarray]]) -> Collector:
    """Hands all `batches` to a collector; returns it.

    Raises:
        DataError: there is no batch, or the network computes NaN or infinity.
        ModelError: TensorFlow cannot run the float model on the data.
    """
    empty = True
    for batch in batches:
        collector.update(batch)
        empty = False
    if empty:
        raise DataError("The calibration data has no samples: give at least one.")
    return collector


def _ends(value: tf.Tensor) -> tf.Tensor:
    return tf.stack([tf.reduce_min(value), tf.reduce_max(value)])


def _reductions(value: tf.Tensor) -> dict[str, tf.Tensor]:
    """Extremes, sums and a histogram of one batch, as ops. `low` and `high` are per batch, `exponent` as in `statistics`."""
    rank = value.shape.rank
    inner = list(range(1, rank)) if rank else None
    lows, highs = tf.reduce_min(value, inner), tf.reduce_max(value, inner)
    low, high = tf.reduce_min(lows), tf.reduce_max(highs)
    # Powers of two are exact: scaling by them and flooring puts a value into the same bin in every batch.
    low64, high64 = tf.cast(low, tf.float64), tf.cast(high, tf.float64)
    spread, size = (high64 - low64) / (BINS - 2), tf.maximum(tf.abs(low64), tf.abs(high64))
    exponent = tf.reduce_max([_binary_exponent(spread), _binary_exponent(size) - RESOLUTION, MIN_EXPONENT])
    width = tf.pow(tf.constant(2.0, tf.float64), tf.cast(exponent, tf.float64))
    first = tf.floor(low64 / width)
    numbers = tf.floor(value * tf.cast(1.0 / width, tf.float32)) - tf.cast(first, tf.float32)
    indices = tf.clip_by_value(tf.cast(numbers, tf.int32), 0, BINS - 1)
    counts = tf.raw_ops.Bincount(arr=indices, size=BINS, weights=tf.constant([], tf.int32))
    return {
        "samples": tf.size(lows, tf.int64),
        "elements": tf.size(value, tf.int64),
        "low": low,
        "high": high,
        "sum_low": tf.reduce_sum(tf.cast(lows, tf.float64)),
        "sum_high": tf.reduce_sum(tf.cast(highs, tf.float64)),
        "exponent": exponent,
        "first": tf.cast(first, tf.int64),
        "counts": counts,
    }


def _binary_exponent(value: tf.Tensor) -> tf.Tensor:
    """The exponent that `math.frexp` gives for a float64 >= 0, as int32."""
    bits = tf.bitcast(value, tf.int64)
    return tf.cast(tf.bitwise.right_shift(bits, tf.constant(52, tf.int64)), tf.int32) - 1022


def stats_of(value: np.ndarray) -> TensorStats:
    """Statistics of the values of one batch."""
    return _to_stats({key: result.numpy() for key, result in _reductions(tf.convert_to_tensor(value)).items()})


def _to_stats(result: Mapping[str, np.ndarray]) -> TensorStats:
    return TensorStats(
        samples=int(result["samples"]),
        elements=int(result["elements"]),
        low=float(result["low"]),
        high=float(result["high"]),
        sum_low=float(result["sum_low"]),
        sum_high=float(result["sum_high"]),
        exponent=int(result["exponent"]),
        first=int(result["first"]),
        counts=result["counts"].astype(np.int64),
    )
