"""TFLite files in LiteRT."""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfquant.errors import OutputError
from tfquant.exporters.marking import MARK
from tfquant.graph.loading import first_line
from tfquant.quiet import held_back
from tfquant.verify import Function


def runtime() -> tuple[str, Any]:
    """(name with version, class of interpreters): of the package ai-edge-litert where it is installed, else of TensorFlow."""
    try:
        from ai_edge_litert.interpreter import Interpreter

        return f"LiteRT {importlib.metadata.version('ai-edge-litert')}", Interpreter
    except ImportError:
        return f"LiteRT of TensorFlow {tf.__version__}", tf.lite.Interpreter


def interpreter(content: bytes, **options: Any) -> Any:
    """An interpreter of a file.

    Raises:
        OutputError: it does not take the file.
    """
    with held_back(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another package will have it one day
        try:
            return runtime()[1](model_content=content, **options)
        except (ValueError, RuntimeError) as error:
            raise OutputError(f"LiteRT does not take the exported model: {first_line(error)}") from error


def function(content: bytes, signature_keys: Mapping[str, tuple[Mapping[str, str], Mapping[str, str]]]) -> Function:
    """The file as {input name: array} to {output name: array}, real values on both sides.

    Args:
        content: the file.
        signature_keys: of each signature its inputs and outputs: from its own names to those of the arrays.
    """
    loaded = interpreter(content, num_threads=2)

    def run(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for key, (inputs, outputs) in signature_keys.items():
            runner = _invoked(loaded.get_signature_runner, signature_key=key)
            takes, gives = runner.get_input_details(), runner.get_output_details()
            results = _invoked(runner, **{name: _stored(batch[inputs[name]], takes[name]) for name in takes})
            found |= {outputs[name]: _real(results[name], details) for name, details in gives.items()}
        return found

    return run


def inner(
    content: bytes, tensors: Mapping[str, int], inputs: Mapping[str, str], outputs: Mapping[str, str], key: str
) -> Function:
    """What a file's quantized tensors and its outputs are for a batch: {input name: array} to {mark or name: real values}.

    Args:
        content: the file.
        tensors: name of a mark to the index of its tensor in the graph of the signature.
        inputs: of that signature, from its own names to those of the arrays.
        outputs: likewise.
        key: of the signature, whose graph is the first.
    """
    loaded = interpreter(content, experimental_preserve_all_tensors=True)
    runner = _invoked(loaded.get_signature_runner, signature_key=key)
    indices = {name: details["index"] for name, details in runner.get_input_details().items()}
    shown = {outputs[name]: details["index"] for name, details in runner.get_output_details().items()} | dict(tensors)
    del runner

    def run(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        by_index = {details["index"]: details for details in loaded.get_input_details()}
        for name, index in indices.items():
            value = _stored(batch[inputs[name]], by_index[index])
            loaded.resize_tensor_input(index, value.shape)
        _invoked(loaded.allocate_tensors)
        for name, index in indices.items():
            loaded.set_tensor(index, _stored(batch[inputs[name]], by_index[index]))
        _invoked(loaded.invoke)
        details = {entry["index"]: entry for entry in loaded.get_tensor_details()}
        return {mark: _real(loaded.get_tensor(index), details[index]) for mark, index in shown.items()}

    return run


def _invoked(call: Callable[..., Any], **arguments: Any) -> Any:
    """Calls into C++, which tells stderr of its delegates and of its errors."""
    failure: Exception | None = None
    with held_back():
        try:
            return call(**arguments)
        except (ValueError, RuntimeError) as error:
            failure = error
    raise OutputError(f"LiteRT cannot run the exported model: {first_line(failure)}") from failure


def marks_of(name: str) -> list[str]:
    """The names of marks in the name of a tensor that the converter made."""
    return re.findall(rf"{MARK}\d+_", name)


def _stored(value: np.ndarray, details: Mapping[str, Any]) -> np.ndarray:
    """Real values as a tensor stores them."""
    dtype, (scale, zero_point) = np.dtype(details["dtype"]), details["quantization"]
    if not scale or not np.issubdtype(dtype, np.integer):
        return value.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(value / scale) + zero_point, limits.min, limits.max).astype(dtype)


def _real(value: np.ndarray, details: Mapping[str, Any]) -> np.ndarray:
    """What a tensor stores, as real values."""
    scale, zero_point = details["quantization"]
    if not scale or not np.issubdtype(value.dtype, np.integer):
        return value
    return ((value.astype(np.float64) - zero_point) * scale).astype(np.float32)
