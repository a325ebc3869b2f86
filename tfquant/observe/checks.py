"""Checks of data that would calibrate badly: samples that tell nothing, labels in place of inputs, a wrong scale.

`DataChecks` looks at the samples alone. `batch_norm_inputs` and `judge_scale` hold them against what the model remembers of
its training data: the moving mean and variance of the first BatchNorm on the way from the inputs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping

import numpy as np

from tfquant.errors import DataError
from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.graph.paths import layer_of
from tfquant.graph.patterns import Any, Match, Maybe, Op, matches

_MOST_CLASSES = 1000  # more distinct values are hardly labels
_FEW_VALUES = 16  # samples of no more integers repeat by nature

# Ratio of standard deviations (data over training) and distance of the means (in the latter). Measured at the first BatchNorm
# of six real models: right data give ratios of 0.83 to 1.6 and shifts below 0.2 with ten samples, 0.28 to 2.5 and below 0.8
# with one; data in 0..255 in place of -1..1 or 0..1 give ratios of 39 and more, the reverse 0.02 and less.
_ERROR_RATIOS = 0.05, 10.0
_WARNING_RATIOS = 0.15, 3.5
_ERROR_SHIFT = 10.0
_WARNING_SHIFT = 1.5
_ENOUGH_VALUES = 30  # per channel; fewer can only be far off
# How well moving statistics that training did not bring far enough from 0 and 1 must explain the values.
_UNTRAINED_FACTOR = 1.5
_UNTRAINED_SHIFT = 0.5
_DEAD = 1e-8  # of the largest variance: a channel that training switched off


class DataChecks:
    """Looks at every sample once; keeps 8 bytes of each.

    Args:
        batched: whether the first axis of every array (but of scalars) counts samples; else a batch is one sample.
    """

    def __init__(self, batched: bool = True) -> None:
        self._batched = batched
        self._samples = 0
        self._distinct: set[bytes] = set()
        self._inputs: dict[str, _InputFacts] = {}

    def update(self, batch: Mapping[str, np.ndarray]) -> None:
        """Adds a batch, keyed by input name."""
        rows = next((len(array) for array in batch.values() if array.ndim), 1) if self._batched else 1
        self._samples += rows
        for row in range(rows):
            digest = hashlib.blake2b(digest_size=8)
            for name in sorted(batch):
                array = batch[name]
                sample = array[row : row + 1] if self._batched and array.ndim else array
                digest.update(repr((name, sample.shape)).encode())
                digest.update(_bytes(sample))
            self._distinct.add(digest.digest())
        for name, array in batch.items():
            self._inputs.setdefault(name, _InputFacts()).update(array, self._batched and array.ndim > 0)

    def finish(self) -> tuple[str, ...]:
        """What is doubtful about the data, one line each.

        Raises:
            DataError: nothing can be learned from the data.
        """
        self._fail_if_worthless()
        found = []
        if self._samples == 1:
            found.append("The calibration data hold a single sample, whose ranges need not be typical: give some hundred.")
        floats = {name: facts for name, facts in self._inputs.items() if facts.is_float and not facts.is_scalar}
        kinds = {name: facts.label_kind() for name, facts in floats.items()}
        are_labels = bool(kinds) and all(kinds.values())  # beside real data they may well be a condition
        natural = are_labels or all(facts.repeats_by_nature for facts in self._inputs.values())
        repeats = self._samples - len(self._distinct)
        if 2 * repeats > self._samples and not natural:
            found.append(
                f"{repeats} of {self._samples} calibration samples repeat others ({len(self._distinct)} are distinct): "
                f"check that the data are read on and shuffled."
            )
        for name, facts in floats.items():
            if facts.is_constant:
                found.append(f"Input {name!r} is {facts.low:g} everywhere in the calibration data: check that it is filled in.")
        if are_labels:
            found += [
                f"Input {name!r} looks like labels ({kind} in all {facts.rows} samples): calibrate with what the model reads."
                for (name, kind), facts in zip(kinds.items(), floats.values(), strict=True)
            ]
        return tuple(found)

    def _fail_if_worthless(self) -> None:
        numeric = [facts for facts in self._inputs.values() if facts.is_numeric]
        is_constant = len(numeric) == len(self._inputs) and all(facts.low == facts.high for facts in numeric)
        if is_constant and any(facts.elements > 1 and not facts.is_scalar for facts in numeric):
            values = ", ".join(f"{name!r}: {facts.low:g}" for name, facts in self._inputs.items())
            raise DataError(
                f"The calibration data are one and the same number everywhere, of which no range can be learned; "
                f"give real samples. Received: {values}."
            )
        if self._samples > 1 and len(self._distinct) == 1:
            raise DataError(
                f"All {self._samples} calibration samples are identical; check that the generator goes on to the next sample. "
                f"Received: one sample {self._samples} times."
            )


class _InputFacts:
    """What is remembered of one input."""

    def __init__(self) -> None:
        self.rows = self.elements = 0
        self.low, self.high = math.inf, -math.inf
        self.dtype_kind = ""
        self.is_scalar = True
        self._row_elements = 0
        self._one_hot = self._classes = True  # until a row is not
        self._values: set[float] = set()

    def update(self, array: np.ndarray, batched: bool) -> None:
        self.dtype_kind = array.dtype.kind
        self.elements += array.size
        self.is_scalar = self.is_scalar and array.ndim == 0
        rows = array.reshape(len(array) if batched else 1, -1)
        self.rows += len(rows)
        self._row_elements = max(self._row_elements, rows.shape[1])
        if not self.is_numeric or not array.size:
            return
        self.low, self.high = min(self.low, float(array.min())), max(self.high, float(array.max()))
        is_flat = array.ndim <= 1 + batched
        if self._one_hot:
            self._one_hot = is_flat and rows.shape[1] > 1 and _is_one_hot(rows)
        if self._classes:
            self._values.update(float(value) for value in np.unique(rows[:, 0])[: _MOST_CLASSES + 1])
            self._classes = is_flat and rows.shape[1] == 1 and self._are_classes()

    @property
    def is_numeric(self) -> bool:
        return self.dtype_kind in "fiub"

    @property
    def is_float(self) -> bool:
        return self.dtype_kind == "f"

    @property
    def is_constant(self) -> bool:
        return self.is_numeric and self.elements > 1 and self.low == self.high

    @property
    def repeats_by_nature(self) -> bool:
        return self.dtype_kind in "iub" and self._row_elements <= _FEW_VALUES

    def label_kind(self) -> str:
        """What the labels look like, or nothing."""
        if self.is_constant or self.rows < 2:
            return ""
        if self._one_hot:
            return f"one 1 among {self._row_elements} values"
        if self._classes and 2 * len(self._values) < self.rows:
            return f"one of {len(self._values)} whole numbers"
        return ""

    def _are_classes(self) -> bool:
        return len(self._values) <= _MOST_CLASSES and all(v.is_integer() and 0 <= v < _MOST_CLASSES for v in self._values)


def _bytes(sample: np.ndarray) -> bytes:
    return repr(sample.tolist()).encode() if sample.dtype.hasobject else np.ascontiguousarray(sample).tobytes()


def _is_one_hot(rows: np.ndarray) -> bool:
    return bool((((rows == 0) | (rows == 1)).all(1) & ((rows == 1).sum(1) == 1)).all())


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """A BatchNorm with the statistics of its training.

    Attributes:
        name: path of its layer.
        x: the tensor that it normalizes.
        mean: float64 of shape (C,).
        variance: float64 of shape (C,).
        axis: of the channels in `x`, -1 or 1.
    """

    name: str
    x: Tensor
    mean: np.ndarray
    variance: np.ndarray
    axis: int


_X, _FACTOR, _MEAN = Any("x"), Any("factor"), Any("mean")
_PRODUCT = Op("Mul", _X, _FACTOR, name="product", shared=True)
# tf.nn.batch_normalization: x * factor + (beta - mean * factor), without beta x * factor + (-mean) * factor.
_FUSED = "FusedBatchNorm|FusedBatchNormV2|FusedBatchNormV3"
_PATTERNS = (
    Op(_FUSED, _X, Any("gamma"), Any("beta"), _MEAN, Any("variance")),
    Op("AddV2|Add", _PRODUCT, Op("Sub", Any("beta"), Op("Mul", _MEAN, _FACTOR, name="m", shared=True), shared=True)),
    Op("AddV2|Add", _PRODUCT, Op("Mul", Op("Neg", _MEAN, shared=True), _FACTOR, name="m", shared=True)),
)
_RSQRT = Op("Rsqrt", Op("AddV2|Add", Any("variance"), Any("epsilon"), shared=True), shared=True)
_SCALED = Maybe("Mul", _RSQRT, Any("gamma"), shared=True)


def batch_norm_inputs(graph: Graph) -> list[BatchNorm]:
    """The BatchNorms that the inputs reach first: none of the others lies on the way from an input to them.

    Those with the statistics of no training (mean 0 and variance 1) are left out, and so is what lies behind them.

    Args:
        graph: the frozen graph as it was loaded; it is only read.
    """
    fed = {tensor.node for tensor in graph.inputs.values()}
    behind: set[Node] = set()  # a BatchNorm
    found = []
    for node in graph.order():
        parents = [tensor.node for tensor in node.inputs]
        if node not in fed and not any(parent in fed for parent in parents):
            continue
        fed.add(node)
        if any(parent in behind for parent in parents):
            behind.add(node)
            continue
        norm = next(_batch_norms(graph, node), None)
        if norm is not None:
            behind.add(node)
            if norm.mean.any() or (norm.variance != 1).any():
                found.append(norm)
    return found


def _batch_norms(graph: Graph, node: Node) -> Iterator[BatchNorm]:
    for pattern in _PATTERNS:
        for match in matches(pattern, graph, node):
            norm = _read(graph, match)
            if norm is not None:
                yield norm


def _read(graph: Graph, match: Match) -> BatchNorm | None:
    """The BatchNorm of a match, or None where a statistic is not a constant."""
    node, x, variance_of = match.root, match["x"], match.get("variance")
    layout = node.attr("data_format", "NHWC")
    if variance_of is not None:
        if node.attr("is_training", True):
            return None
        scope = layer_of(node.name)
    else:
        scaled = next(matches(_SCALED, graph, match["factor"].node), None)
        if scaled is None:
            return None
        variance_of = scaled["variance"]
        scope = layer_of(node.name).removesuffix("/batchnorm")
    mean, variance = _constant(match["mean"]), _constant(variance_of)
    if mean is None or variance is None or x.shape is None or mean.size != variance.size or not variance.size:
        return None
    axis = 1 if layout.startswith("NC") else _channel_axis(variance.shape, x.shape)
    if axis is None:
        return None
    return BatchNorm(scope, x, mean.astype(np.float64).reshape(-1), variance.astype(np.float64).reshape(-1), axis)


def _channel_axis(statistics: tuple[int, ...], shape: tuple[int | None, ...]) -> int | None:
    """The axis of `shape` along which statistics broadcast, or None where that is neither the last nor the second."""
    size = math.prod(statistics)
    if size == (statistics[-1] if statistics else 1) and shape and shape[-1] == size:
        return -1
    if len(statistics) == len(shape) > 2 and statistics[1] == size == shape[1]:
        return 1
    return None


def _constant(tensor: Tensor) -> np.ndarray | None:
    """The value of a tensor that is a constant but for ops which move or cast it."""
    node = tensor.node
    if node.op == "Const":
        return node.value
    if node.op not in ("Identity", "Cast", "Reshape", "ExpandDims", "Squeeze", "StopGradient") or not node.inputs:
        return None
    value = _constant(node.inputs[0])
    # Only where ones stand in the shape can differ.
    if value is None or tensor.shape is None or None in tensor.shape:
        return value if node.op in ("Identity", "Cast", "StopGradient") else None
    return value.reshape([size for size in tensor.shape if size is not None])


def judge_scale(found: BatchNorm, x: np.ndarray) -> tuple[str, str] | None:
    """Holds values that reach a BatchNorm against those that reached it in training.

    Args:
        found: the BatchNorm.
        x: what reaches it, float of the shape of `found.x`, over some samples.

    Returns:
        ("error", line) when the data cannot be what the model was trained on, ("warning", line) when that is doubtful, else
        None; also for values that are not finite.
    """
    mean, variance, count = _moments(found, x)
    live = found.variance > _DEAD * found.variance.max()
    if not count or not live.any() or not (np.isfinite(mean).all() and np.isfinite(variance).all()):
        return None
    ratio, shift = _distance(mean, variance, found, live)
    level = _level(ratio, shift, count)
    if level is None or _is_barely_trained(mean, variance, found, live):
        return None
    line = (
        f"At {found.name}, the first BatchNorm, the data have {ratio:.3g} times the standard deviation that the model learned "
        f"in training (expected about 1), and their mean is off by {shift:.3g} standard deviations (expected about 0): "
        f"check --preprocess, or the scale of the data (0..255, 0..1 or -1..1)."
    )
    return level, line


def _level(ratio: float, shift: float, count: int) -> str | None:
    if count < _ENOUGH_VALUES:
        return "error" if ratio > _ERROR_RATIOS[1] or shift > _ERROR_SHIFT else None
    if not _ERROR_RATIOS[0] <= ratio <= _ERROR_RATIOS[1] or shift > _ERROR_SHIFT:
        return "error"
    if not _WARNING_RATIOS[0] <= ratio <= _WARNING_RATIOS[1] or shift > _WARNING_SHIFT:
        return "warning"
    return None


def _moments(found: BatchNorm, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean and variance per channel, float64 of shape (C,), and the number of values per channel."""
    channels = len(found.mean)
    rows = np.moveaxis(x, found.axis, -1).reshape(-1, channels)
    total, squares = np.zeros(channels), np.zeros(channels)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(rows), 65536):  # as float64 no more at a time
            apart = rows[start : start + 65536] - found.mean
            total += apart.sum(0)
            squares += (apart * apart).sum(0)
        apart_mean = total / max(len(rows), 1)
        variance = np.maximum(squares / max(len(rows), 1) - apart_mean**2, 0)
    return found.mean + apart_mean, variance, len(rows)


def _distance(mean: np.ndarray, variance: np.ndarray, found: BatchNorm, live: np.ndarray) -> tuple[float, float]:
    """Ratio of the standard deviations and distance of the means, each the median over live channels."""
    deviation = np.sqrt(found.variance[live])
    ratio = np.median(np.sqrt(variance[live]) / deviation)
    return float(ratio), float(np.median(np.abs(mean - found.mean)[live] / deviation))


def _is_barely_trained(mean: np.ndarray, variance: np.ndarray, found: BatchNorm, live: np.ndarray) -> bool:
    """Whether the moving statistics are on their way from 0 and 1 to those of the data: after few steps they are off by far."""
    for kept in 1 / (1 + np.exp(np.linspace(-6.9, 11.5, 400))):  # what is left of the start: 0.999 to 0.00001
        if kept > 1.001 * found.variance.min():
            continue  # no variance can have fallen below what is left of the 1
        _, shift = _distance((1 - kept) * mean, variance, found, live)
        factors = np.abs(np.log((kept + (1 - kept) * variance[live]) / found.variance[live])) / 2
        if shift < _UNTRAINED_SHIFT and np.quantile(factors, 0.9) < math.log(_UNTRAINED_FACTOR):
            return True
    return False
