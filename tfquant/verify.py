"""The lowered model against the float one: fidelity on data, latency side by side."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfquant.graph.execution import executable
from tfquant.graph.ir import Graph

Function = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
_MIN_SECONDS, _MIN_RUNS, _MAX_RUNS = 1.5, 8, 200


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """How close the outputs are.

    Attributes:
        samples: number of samples.
        sqnr: signal-to-quantization-noise ratio of all outputs, in dB.
        agreement: percent of samples with the same largest class, None where no output is (N, classes).
        mean_kl: mean KL(float32 || INT8) in nats over those rows (their softmax where they are not probabilities), or None.
    """

    samples: int
    sqnr: float
    agreement: float | None
    mean_kl: float | None


@dataclasses.dataclass(frozen=True)
class Latency:
    """Median time of a call in milliseconds, both models called in turn."""

    batch_size: int
    float32: float
    int8: float

    @property
    def speedup(self) -> float:
        return self.float32 / self.int8


def rows_of(batch: Mapping[str, np.ndarray]) -> int:
    """How many samples a batch has: the length of its longest array, 1 where all are scalars."""
    return max((len(value) for value in batch.values() if value.ndim), default=1)


def simulation(graph: Graph) -> Function:
    """A float graph as {input name: array} to {output name: array}."""
    run = executable(graph)

    def function(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = run(*(tf.convert_to_tensor(batch[key], tensor.dtype) for key, tensor in graph.inputs.items()))
        return {key: value.numpy() for key, value in zip(graph.outputs, results, strict=True)}

    return function


def fidelity(
    reference: Function,
    lowered: Function,
    batches: Iterable[Mapping[str, np.ndarray]],
    rows_of: Callable[[Mapping[str, np.ndarray]], int],
) -> Fidelity:
    """Compares two functions over batches, keeping sums alone; `rows_of` counts the samples of a batch."""
    signal = noise = divergence = 0.0
    samples = rows = agreed = 0
    for batch in batches:
        expected, found = reference(batch), lowered(batch)
        samples += rows_of(batch)
        for key, value in expected.items():
            if not _is_float(value):
                continue
            one, other = value.astype(np.float64), found[key].astype(np.float64)
            signal += float((one**2).sum())
            noise += float(((one - other) ** 2).sum())
            if one.ndim == 2 and one.shape[1] > 1:
                rows += len(one)
                agreed += int((one.argmax(-1) == other.argmax(-1)).sum())
                divergence += float(_divergence(one, other).sum())
    return Fidelity(samples, decibels(signal, noise), 100 * agreed / rows if rows else None, divergence / rows if rows else None)


def decibels(signal: float, noise: float) -> float:
    """The signal-to-noise ratio of two sums of squares in dB; infinite without noise, minus infinite where that is infinite."""
    if noise == 0 or not math.isfinite(noise):
        return math.inf if noise == 0 else -math.inf
    return 10 * math.log10(max(signal, 1e-300) / noise)


def _is_float(value: np.ndarray) -> bool:
    return np.issubdtype(value.dtype, np.floating) or value.dtype == tf.bfloat16.as_numpy_dtype


def _divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference || other) per row in nats; 1e-6 is added to every probability."""
    is_softmax = bool(reference.min() >= 0 and np.allclose(reference.sum(-1), 1, atol=1e-3))
    p, q = (_probabilities(rows, is_softmax) for rows in (reference, other))
    return np.asarray((p * (np.log(p + 1e-6) - np.log(q + 1e-6))).sum(-1))


def _probabilities(rows: np.ndarray, is_softmax: bool) -> np.ndarray:
    if not is_softmax:
        rows = np.exp(rows - rows.max(-1, keepdims=True))
    rows = np.maximum(rows, 0)
    return np.asarray(rows / np.maximum(rows.sum(-1, keepdims=True), 1e-12))


def latency(
    reference: Callable[[Mapping[str, Any]], Any],
    lowered: Callable[[Mapping[str, Any]], Any],
    sample: Mapping[str, np.ndarray],
    batch_sizes: Sequence[int],
) -> tuple[Latency, ...]:
    """Medians of interleaved calls.

    Args:
        reference: the float model, called with a batch of tensors by input name.
        lowered: the INT8 model, likewise.
        sample: a batch, repeated or cut to each size.
        batch_sizes: the sizes to measure.
    """
    results = []
    for size in batch_sizes:
        sized = {key: np.resize(value, (size, *value.shape[1:])) if value.ndim else value for key, value in sample.items()}
        batch = {key: tf.constant(value) for key, value in sized.items()}  # converting them is not the model's work
        times: tuple[list[float], list[float]] = ([], [])
        for function in (reference, lowered) * 2:
            function(batch)
        start = time.perf_counter()
        while len(times[0]) < _MIN_RUNS or (time.perf_counter() - start < _MIN_SECONDS and len(times[0]) < _MAX_RUNS):
            for function, taken in zip((reference, lowered), times, strict=True):
                begin = time.perf_counter()
                function(batch)
                taken.append((time.perf_counter() - begin) * 1e3)
        results.append(Latency(size, *(float(np.median(taken)) for taken in times)))
    return tuple(results)
