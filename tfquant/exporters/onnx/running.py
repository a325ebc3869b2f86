"""ONNX files as functions; in ONNX Runtime, what they compute, and what was fused."""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from tfquant.errors import OutputError
from tfquant.exporters.onnx.passes import Place
from tfquant.graph.loading import first_line
from tfquant.verify import Function

# A loaded file: arrays by the names of its inputs, to arrays by those of its outputs.
Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
Load = Callable[[bytes], Run]

_SILENT = 4
_CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear"})
# Ops that compute nothing, or hand on what they get.
_MOVES = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Gather", "Slice", "Split", "Identity", "Cast", "Shape", "Pad"}
    | {"ReorderInput", "ReorderOutput", "Constant"}
)
# Besides those whose names begin as QLinearConv's.
_INTEGER = frozenset({"QGemm", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger", "NhwcMaxPool"})


def is_installed() -> bool:
    """Whether there is ONNX Runtime."""
    return importlib.util.find_spec("onnxruntime") is not None


def runtime() -> str:
    """Its name and version."""
    return f"ONNX Runtime {importlib.metadata.version('onnxruntime')}"


@dataclasses.dataclass(frozen=True)
class Fused:
    """What ONNX Runtime makes of a file before it runs it.

    Attributes:
        int8: how many ops compute with integers.
        floats: type and result of each op that computes in float.
        conversions: how many QuantizeLinear and DequantizeLinear remain.
    """

    int8: int
    floats: tuple[tuple[str, str], ...]
    conversions: int

    def lines(self) -> tuple[str, ...]:
        """For people."""
        return (f"QuantizeLinear and DequantizeLinear that ONNX Runtime did not fuse: {self.conversions}",)


NOT_RUN = Fused(0, (), 0)


def load(content: bytes) -> Run:
    """A file as a function of its inputs, in ONNX Runtime.

    Raises:
        OutputError: ONNX Runtime does not take it; or, of the function, cannot run it.
    """
    loaded = session(content)
    names = [output.name for output in loaded.get_outputs()]

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return dict(zip(names, loaded.run(names, feeds), strict=True))
        except Exception as error:  # onnxruntime has a class of its own per kind
            raise OutputError(f"ONNX Runtime cannot run the exported model: {first_line(error)}") from error

    return run


class File:
    """A file as functions.

    Args:
        content: the file.
        names: of its inputs and outputs, by what the simulation calls them.
        inputs_as_nchw: the inputs that it takes as (N, C, ...).
        load: makes a function of a file, in a runtime.

    Raises:
        OutputError: the runtime does not take it.
    """

    def __init__(self, content: bytes, names: Mapping[str, str], inputs_as_nchw: Sequence[str], load: Load = load) -> None:
        self._names, self._turned, self._load = names, frozenset(inputs_as_nchw), load
        self._loaded = load(content)

    def run(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """{input name: array} to {output name: array}, by the names that the simulation has."""
        return self._outputs(self._run(self._loaded, batch), batch)

    def inner(self, model: onnx.ModelProto, places: Sequence[Place]) -> Function:
        """{input name: array} to {mark: array of real values}, and to the outputs of that run.

        Args:
            model: what the file holds.
            places: where it holds 8-bit tensors.
        """
        shown = onnx.ModelProto()
        shown.CopyFrom(model)
        for place in places:
            shown.graph.output.append(onnx.helper.make_tensor_value_info(place.tensor, onnx.TensorProto.UINT8, None))
        loaded = self._load(shown.SerializeToString())

        def run(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            found = self._run(loaded, batch)
            return {place.mark.name: place.floats(found[place.tensor]) for place in places} | self._outputs(found, batch)

        return run

    def _run(self, loaded: Run, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        feeds = {}
        for key, value in batch.items():
            name = self._names[key]
            feeds[name] = np.ascontiguousarray(np.moveaxis(value, -1, 1)) if name in self._turned else value
        return loaded(feeds)

    def _outputs(self, found: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {key: found[name] for key, name in self._names.items() if key not in batch}


def fused(content: bytes) -> Fused:
    """What becomes of a file before ONNX Runtime runs it.

    Raises:
        OutputError: ONNX Runtime does not take it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "optimized.onnx")
        session(content, path)
        nodes = list(onnx.load(path).graph.node)
    counts = collections.Counter(_kind(node) for node in nodes)
    floats = tuple((node.op_type, node.output[0]) for node in nodes if _kind(node) == "float")
    return Fused(counts["int8"], floats, counts["conversion"])


def _kind(node: onnx.NodeProto) -> str:
    if node.op_type in _CONVERSIONS:
        return "conversion"
    if node.op_type in _INTEGER or node.op_type.startswith("QLinear"):
        return "int8"
    return "move" if node.op_type in _MOVES else "float"


def session(content: bytes, optimized: str = "") -> Any:
    """A session of a model on the CPU.

    Args:
        content: the model.
        optimized: file to write what becomes of it.

    Raises:
        OutputError: ONNX Runtime does not take it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.optimized_model_filepath = optimized
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own per kind
        raise OutputError(f"ONNX Runtime does not take the exported model: {first_line(error)}") from error
