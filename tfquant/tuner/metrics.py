"""Metrics: what a model's outputs are worth, given the labels; higher is better.

A metric is a function of two arrays, the model's output and the labels, with a row per sample (of a model with several outputs
the first is a dictionary of them by name; labels are int64 where they are whole numbers, else float64). It returns a number per
sample, whose mean over all samples counts; or, where a sample by itself has no value (an area under a curve, a correlation), one
number, and is then given all samples at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tfquant.errors import DataError
from tfquant.registry import Registry

# (outputs, labels) to (N,) or ().
Metric = Callable[[Any, np.ndarray], Any]


def top1(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Percent of samples whose largest class is the label; outputs (N, classes), labels (N,) or one-hot (N, classes)."""
    return _top(outputs, labels, 1)


def top5(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Percent of samples whose label is among the five largest classes; shapes as for `top1`."""
    return _top(outputs, labels, 5)


def binary_accuracy(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Percent of probabilities on the right side of 0.5; outputs and labels (N,) or (N, outputs)."""
    outputs, labels = _alike("binary_accuracy", outputs, labels)
    return 100.0 * ((outputs > 0.5) == (labels > 0.5)).mean(-1)


def mse(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Minus the mean squared error; outputs and labels of one shape."""
    outputs, labels = _alike("mse", outputs, labels)
    return -np.square(outputs - labels).mean(-1)


def mae(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Minus the mean absolute error; outputs and labels of one shape."""
    outputs, labels = _alike("mae", outputs, labels)
    return -np.abs(outputs - labels).mean(-1)


def _top(outputs: Any, labels: np.ndarray, count: int) -> np.ndarray:
    outputs = _one(f"top{count}", outputs)
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise DataError(f"The metric top{count} is for outputs (N, classes). Received: shape {outputs.shape}")
    classes = labels.argmax(-1) if labels.shape == outputs.shape else labels.reshape(len(labels), -1)
    if classes.size != len(outputs):
        raise DataError(f"The metric top{count} is for labels (N,), or one-hot {outputs.shape}. Received: shape {labels.shape}")
    classes = classes.reshape(-1)
    if (classes != np.rint(classes)).any() or (classes < 0).any() or (classes >= outputs.shape[1]).any():
        raise DataError(
            f"The metric top{count} is for labels of 0 to {outputs.shape[1] - 1}, the model's classes. "
            f"Received: {classes.min():g} to {classes.max():g}"
        )
    # Of equal outputs the first counts, as in argmax.
    largest = np.argsort(-outputs, axis=-1, kind="stable")[:, :count]
    return 100.0 * (largest == classes[:, np.newaxis]).any(-1)


def _alike(name: str, outputs: Any, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 (N, values)."""
    outputs = _one(name, outputs)
    if outputs.size != labels.size or len(outputs) != len(labels):
        raise DataError(f"The metric {name} is for labels of the shape of the output, {outputs.shape}. Received: {labels.shape}")
    return outputs.reshape(len(outputs), -1).astype(np.float64), labels.reshape(len(labels), -1).astype(np.float64)


def _one(name: str, outputs: Any) -> np.ndarray:
    if isinstance(outputs, Mapping):
        raise DataError(f"The metric {name} is for models of one output: use one of your own. Received: {', '.join(outputs)}")
    return np.asarray(outputs)


METRICS: Registry[Metric] = Registry(
    "metric", {"top1": top1, "top5": top5, "binary_accuracy": binary_accuracy, "mse": mse, "mae": mae}
)
