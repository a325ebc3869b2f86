"""The samples that quantization hurts most: groups are ranked on them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tfquant.pipeline import QuantizedModel
from tfquant.tuner.predicting import Arrays, Predict, Predictor
from tfquant.tuner.validation import Validation

SIZE = 300
# Samples per call.
_BATCH = 32
# Squares are compared as shares of this at least.
_TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples of one shape.

    Attributes:
        inputs: by name.
        outputs: those of the float model, by name.
        labels: (N, ...), or None.
    """

    inputs: Arrays
    outputs: Arrays
    labels: np.ndarray | None = None


class Subset:
    """Samples with what the float model makes of them.

    Args:
        batches: the samples.
        validation: what has a value for each of them, or None.
    """

    def __init__(self, batches: Sequence[Batch], validation: Validation | None = None) -> None:
        self.batches, self._validation = batches, validation

    def score(self, model: QuantizedModel) -> tuple[float, ...]:
        """How good a model is on these samples, the more the better: the metric, where samples have one, then minus the NMSE.

        Many models are alike by a metric that counts samples; the outputs tell them apart.
        """
        predict = Predictor(model.int8_function(), model.input_names)
        noise = signal = 0.0
        values: list[np.ndarray] = []
        for batch in self.batches:
            outputs = predict.outputs(batch.inputs)
            parts = _errors(batch.outputs, outputs, whole=True)
            noise, signal = noise + float(parts[0].sum()), signal + float(parts[1].sum())
            if self._validation is not None and batch.labels is not None:
                found = self._validation.scores(_plain(outputs), batch.labels)
                values += [] if found is None else [found]
        error = -noise / max(signal, _TINY)
        if not values:
            return (error,)
        mean = float(np.concatenate(values).mean())
        return (mean if np.isfinite(mean) else -np.inf, error)


def choose(model: QuantizedModel, evaluate: Callable[[Predict], Any], size: int = SIZE) -> Subset:
    """The samples of an evaluation on which a model differs most from the float one.

    By the loss in the metric of each sample where `evaluate` is a `Validation` whose metric has one, then by the normalized
    mean squared error (NMSE) of the outputs. Else the samples are what `evaluate` shows the model; no more than twice `size` are
    in memory.
    """
    split = model.takes(1) and model.takes(2)
    worst = _Worst(size)
    reference, lowered = model.float_function(), model.int8_function()
    if isinstance(evaluate, Validation):
        for inputs, labels in evaluate.samples():
            expected, found = reference(inputs), lowered(inputs)
            losses = _losses(evaluate, expected, found, labels)
            worst.add(inputs, expected, found, split and evaluate.batched, labels, losses)
        return Subset(worst.batches(), evaluate if evaluate.batched else None)

    def shown(inputs: Arrays) -> Arrays:
        expected, found = reference(inputs), lowered(inputs)
        worst.add(inputs, expected, found, split)
        return found

    evaluate(Predictor(shown, model.input_names))
    return Subset(worst.batches())


def _losses(validation: Validation, expected: Arrays, found: Arrays, labels: np.ndarray) -> np.ndarray | None:
    """What each sample lost in the metric."""
    if not validation.batched:
        return None
    before, after = (validation.scores(_plain(outputs), labels) for outputs in (expected, found))
    return None if before is None or after is None else before - after


def _plain(outputs: Arrays) -> Any:
    return outputs if len(outputs) > 1 else next(iter(outputs.values()))


def _errors(expected: Arrays, found: Arrays, whole: bool) -> tuple[np.ndarray, np.ndarray]:
    """Squared error and squared size over all outputs, of each row; of other types than float, how many values differ.

    Args:
        expected: outputs of the float model.
        found: those of another.
        whole: take the rows together: (1,).
    """
    noise: Any = 0.0
    signal: Any = 0.0
    for name, value in expected.items():
        rows = (1, -1) if whole or not value.ndim else (len(value), -1)
        one, other = value.reshape(rows), found[name].reshape(rows)
        if one.dtype.kind == "f" or one.dtype.name == "bfloat16":
            one, other = one.astype(np.float64), other.astype(np.float64)
            difference = np.nan_to_num(one - other, nan=1e30, posinf=1e30, neginf=-1e30)
            noise, signal = noise + np.square(difference).sum(-1), signal + np.square(one).sum(-1)
        else:
            noise, signal = noise + (one != other).sum(-1), signal + np.full(len(one), one.shape[1])
    return np.asarray(noise, np.float64), np.asarray(signal, np.float64)


@dataclasses.dataclass(frozen=True)
class _Sample:
    rank: tuple[float, float, int]  # what comes first is affected most
    batch: Batch


class _Worst:
    """Keeps the samples that are affected most."""

    def __init__(self, size: int) -> None:
        self._size, self._count = size, 0
        self._samples: list[_Sample] = []
        self._last: tuple[float, float, int] | None = None  # what comes behind it is not kept

    def add(
        self,
        inputs: Arrays,
        expected: Arrays,
        found: Arrays,
        split: bool,
        labels: np.ndarray | None = None,
        losses: np.ndarray | None = None,
    ) -> None:
        """Takes note of a call; where it cannot be split into rows, it is one sample."""
        arrays = (*inputs.values(), *expected.values())
        rows = {len(value) if value.ndim else 0 for value in arrays}
        if not split or len(rows) != 1 or rows == {0}:
            noise, signal = _errors(expected, found, whole=True)
            self._keep((0.0, _share(noise[0], signal[0])), lambda: Batch(_copied(inputs), expected, labels))
        else:
            noise, signal = _errors(expected, found, whole=False)
            for row in range(rows.pop()):
                rank = (0.0 if losses is None else float(losses[row]), _share(noise[row], signal[row]))
                self._keep(rank, functools.partial(_row, inputs, expected, labels, row))
        if len(self._samples) > 2 * self._size:
            self._cut()

    def _keep(self, rank: tuple[float, float], batch: Callable[[], Batch]) -> None:
        place = (-rank[0], -rank[1], self._count)
        self._count += 1
        if self._last is None or place < self._last:
            self._samples.append(_Sample(place, batch()))

    def _cut(self) -> None:
        self._samples = sorted(self._samples, key=lambda sample: sample.rank)[: self._size]
        if len(self._samples) == self._size:
            self._last = self._samples[-1].rank

    def batches(self) -> list[Batch]:
        """The samples, those of one shape joined."""
        self._cut()
        alike: dict[Any, list[Batch]] = {}
        for sample in self._samples:
            arrays = {**sample.batch.inputs, **{f" {name}": value for name, value in sample.batch.outputs.items()}}
            key = tuple((name, value.shape) for name, value in arrays.items())
            is_row = all(shape[:1] == (1,) for _, shape in key)
            alike.setdefault(key if is_row else object(), []).append(sample.batch)
        found = []
        for batches in alike.values():
            found += [_together(batches[start : start + _BATCH]) for start in range(0, len(batches), _BATCH)]
        return found


def _share(noise: float, signal: float) -> float:
    return float(noise / max(signal, _TINY))


def _row(inputs: Arrays, outputs: Arrays, labels: np.ndarray | None, row: int) -> Batch:
    def cut(arrays: Arrays) -> dict[str, np.ndarray]:
        return {name: value[row : row + 1].copy() for name, value in arrays.items()}

    return Batch(cut(inputs), cut(outputs), None if labels is None else labels[row : row + 1].copy())


def _copied(arrays: Arrays) -> dict[str, np.ndarray]:
    return {name: value.copy() for name, value in arrays.items()}


def _together(batches: list[Batch]) -> Batch:
    def join(pieces: Iterator[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        whole = list(pieces)
        return {name: np.concatenate([piece[name] for piece in whole]) for name in whole[0]} if len(whole) > 1 else dict(whole[0])

    labels = [batch.labels for batch in batches if batch.labels is not None]
    return Batch(
        join(batch.inputs for batch in batches),
        join(batch.outputs for batch in batches),
        np.concatenate(labels) if labels else None,
    )
