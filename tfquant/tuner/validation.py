"""Labelled samples and a metric: an evaluation that knows its single samples."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import pathlib
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from tfquant.config import QuantConfig
from tfquant.data import Batches, InputSpec
from tfquant.errors import ConfigError, DataError, TfquantError, shown
from tfquant.pipeline import QuantizedModel
from tfquant.tuner.metrics import METRICS, Metric
from tfquant.tuner.predicting import Arrays, Predict

LABELS = "labels"
# Samples per call, where calibration has fewer.
_BATCH = 32
_FUNCTION = re.compile(r"[\w.]+:[\w.]+")


class Validation:
    """An `evaluate` for `tune`: the mean of a metric over labelled samples.

    Besides a number it can tell the value of each sample, so that the tuner ranks by the samples that quantization lost.

    Args:
        data: path of an .npz with the model's inputs by name and "labels"; "package.module:function" or a function that yields
            (x, y), each a sample or a batch, x being an array, a list of them or {name: array}; or (x, y) as arrays.
        metric: a name in `METRICS`, "package.module:function", or a function as `tfquant.tuner.metrics` describes.

    Raises:
        DataError: the data do not exist.
        ConfigError: there is no such metric.
    """

    def __init__(self, data: Any, metric: str | Metric = "top1") -> None:
        self._data = _found(data)
        self.metric = metric if callable(metric) else _metric(metric)
        self.name = metric if isinstance(metric, str) else getattr(metric, "__qualname__", "metric")
        self._batches: Batches | None = None

    def bind(self, model: QuantizedModel, config: QuantConfig) -> None:
        """Opens the data for a model; `tune` does so.

        Raises:
            DataError: they do not fit the model.
        """
        specs = model.input_specs
        if any(spec.name == LABELS for spec in specs):
            raise DataError("The model has an input 'labels', as the labels are called: write an evaluate function.")
        whole = dataclasses.replace(config, subset_size=sys.maxsize, batch_size=max(config.batch_size, _BATCH))
        if config.input_dtype == "model":
            whole = dataclasses.replace(whole, preprocess="none")  # arrays come preprocessed
        with _about_validation():
            batched = any(spec.batched for spec in specs if spec.shape != ())
            labels = InputSpec(LABELS, None, _labels_dtype(self._data), batched)
            self._batches = model.batches(self._source(specs), whole, [labels])

    def _source(self, specs: list[InputSpec]) -> Any:
        if isinstance(self._data, pathlib.Path):
            return str(self._data)
        if isinstance(self._data, tuple):
            x, y = self._data
            return _named(x, specs) | {LABELS: np.asarray(y)}
        function = self._data
        return lambda: (_labelled(item, specs) for item in function())

    def __call__(self, predict: Predict) -> float:
        """The mean over all samples.

        Raises:
            DataError: a sample or a label is not what the model or the metric takes.
        """
        scores: list[np.ndarray] = []
        everything: list[tuple[Any, np.ndarray]] = []
        for inputs, labels in self.samples():
            outputs = self.outputs(predict, inputs)
            found = None if everything else self.scores(outputs, labels)
            if found is not None:
                scores.append(found)
            else:
                everything.append((outputs, labels))
        if not everything:
            return float(np.concatenate(scores).mean())
        joined = _joined([outputs for outputs, _ in everything])
        return float(self._scored(joined, np.concatenate([labels for _, labels in everything])))

    def samples(self) -> Iterator[tuple[Arrays, np.ndarray]]:
        """(inputs by name, labels (N, ...)) of each batch."""
        assert self._batches is not None, "bind comes first"
        with _about_validation():
            for batch in self._batches:
                labels = batch.pop(LABELS)
                yield batch, labels if self._batches.batched else labels[np.newaxis]

    @property
    def batched(self) -> bool:
        """Whether the first axis of inputs and outputs counts samples; else each is a call of its own."""
        assert self._batches is not None, "bind comes first"
        return self._batches.batched

    def scores(self, outputs: Any, labels: np.ndarray) -> np.ndarray | None:
        """The value of each sample (N,), or None where the metric has one for all, or none for so few."""
        try:
            found = self._scored(outputs, labels)
        except ConfigError:  # it is asked again with all samples
            return None
        return found if found.ndim else None

    def outputs(self, predict: Predict, inputs: Arrays) -> Any:
        """What the model makes of a batch, the first axis counting samples: an array, or arrays by name."""
        outputs = predict(inputs)
        if self.batched:
            return outputs
        if isinstance(outputs, Mapping):
            return {name: value[np.newaxis] for name, value in outputs.items()}
        return outputs[np.newaxis]

    def _scored(self, outputs: Any, labels: np.ndarray) -> np.ndarray:
        try:
            found = np.asarray(self.metric(outputs, labels))
        except TfquantError:
            raise
        except Exception as error:  # the user's own code
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ConfigError(f"The metric {self.name} failed: {reason}") from error
        if found.ndim > 1 or (found.ndim == 1 and len(found) != len(labels)) or found.dtype.kind not in "fiub":
            raise ConfigError(
                f"A metric must return one number, or one for each of the {len(labels)} samples. "
                f"Received: {found.dtype} of shape {found.shape} from {self.name}"
            )
        return found.astype(np.float64)


def _found(data: Any) -> Any:
    """The data as a path, a function or (x, y), looked at as far as that goes without the model."""
    if isinstance(data, (str, os.PathLike)):
        path = pathlib.Path(data)
        if path.exists():
            _check_labels(path)
            return path
        if isinstance(data, str) and _FUNCTION.fullmatch(data):
            return _imported(data, "yields (x, y)")
        raise DataError(f"The validation data do not exist; give an .npz, module:function or arrays. Received: {data}")
    if isinstance(data, tuple) and len(data) == 2:
        return data
    if callable(data):
        return data
    if isinstance(data, Mapping) or not hasattr(data, "__iter__") or iter(data) is data:
        raise DataError(f"Validation data are an .npz, (x, y), or a function that yields (x, y). Received: {type(data).__name__}")
    return lambda: data


def _check_labels(path: pathlib.Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"The validation data must be an .npz with the model's inputs and 'labels'. Received: {path}") from error
    if LABELS not in names:
        raise DataError(f"The validation data must hold {LABELS!r} beside the inputs. Received: {', '.join(names)} in {path}")


def _metric(name: str) -> Metric:
    if name in METRICS:
        return METRICS.get(name)
    if _FUNCTION.fullmatch(name):
        return _imported(name, "takes (outputs, labels)", ConfigError)
    raise ConfigError(f"metric must be one of {', '.join(METRICS)}, or package.module:function. Received: {shown(name)}")


def _imported(text: str, what: str, error_type: type[DataError | ConfigError] = DataError) -> Callable[..., Any]:
    """The function that "package.module:function" names."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # for good: the function may import its neighbours when it is called
    module, _, name = text.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # the user's own code
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise error_type(f"{text} cannot be imported ({reason}); name a function that {what}.") from error
    if not callable(found):
        raise error_type(f"{text} must be a function that {what}. Received: {type(found).__name__}")
    function: Callable[..., Any] = found
    return function


def _labelled(item: Any, specs: list[InputSpec]) -> dict[str, Any]:
    """An item (x, y), a sample or a batch, as a dictionary of inputs and labels."""
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise DataError(f"Validation data must yield pairs (x, y). Received: {type(item).__name__}")
    named = _named(item[0], specs)
    labels = np.asarray(item[1])
    is_sample = any(spec.shape and np.ndim(named.get(spec.name, ())) == len(spec.shape) - 1 for spec in specs)
    return named | {LABELS: labels[np.newaxis] if is_sample or not labels.ndim else labels}


def _named(x: Any, specs: list[InputSpec]) -> dict[str, Any]:
    if isinstance(x, Mapping):
        return dict(x)
    values = list(x) if isinstance(x, (tuple, list)) and len(specs) > 1 else [x]
    if len(values) != len(specs):
        names = ", ".join(repr(spec.name) for spec in specs)
        raise DataError(f"Validation data must give an x for each of the model's inputs, {names}. Received: {len(values)}")
    return {spec.name: np.asarray(value) for spec, value in zip(specs, values, strict=True)}


def _joined(outputs: list[Any]) -> Any:
    if isinstance(outputs[0], Mapping):
        return {name: np.concatenate([entry[name] for entry in outputs]) for name in outputs[0]}
    return np.concatenate(outputs)


def _labels_dtype(data: Any) -> str:
    """int64 for classes, else float64."""
    if isinstance(data, pathlib.Path):
        with np.load(data) as archive:
            dtype = archive[LABELS].dtype
    elif isinstance(data, tuple):
        dtype = np.asarray(data[1]).dtype
    else:
        first = next(iter(data()), None)
        dtype = np.asarray(first[1]).dtype if isinstance(first, (tuple, list)) and len(first) == 2 else np.dtype(np.float64)
    return "int64" if dtype.kind in "iub" else "float64"


@contextlib.contextmanager
def _about_validation() -> Iterator[None]:
    """Lets errors of data say which data they are about; what a user's function raises becomes one."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error) if "alidation" in str(error) else f"Validation data: {error}") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"The validation data cannot be read: {type(error).__name__}: {error}") from error
