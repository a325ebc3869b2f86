"""From a SavedModel to frozen graphs: the signature to quantize, and which other functions compute the same."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from tfquant.errors import ModelError
from tfquant.graph.functions import Functions
from tfquant.graph.ir import Graph
from tfquant.graph.paths import normalize

# What TensorFlow raises on files that are not what they should be.
_LOAD_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    RuntimeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    tf.errors.OpError,
)
# A Keras 2 SavedModel holds the call functions of its layers, with training flags: no interface that anybody serves.
_KERAS_ROOT = "_tf_keras"


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A function of the source that computes what the quantized signature computes.

    Attributes:
        arguments: (args, kwargs) of `tf.TensorSpec`s, as the original takes them.
        inputs: for each flat argument, which input of the graph it is.
        outputs: for each flat result, which output of the graph it is.
        structure: the nest of results.
    """

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    structure: Any


@dataclasses.dataclass
class Source:
    """A loaded model.

    Attributes:
        name: how messages call it.
        graph: the frozen float graph of the chosen signature.
        signature_key: its key.
        signatures: signatures that compute the same, the chosen one included.
        endpoints: attributes of the root that are functions and compute the same (`serve` of a Keras 3 export).
        others: signatures and endpoints that compute something else: they stay as they were.
        dropped: names of functions that nothing can serve and that are left out.
        loaded: the object that TensorFlow loaded; keeps the variables of `others` alive.
        size: bytes on disk.
    """

    name: str
    graph: Graph
    signature_key: str
    signatures: dict[str, Endpoint]
    endpoints: dict[str, Endpoint]
    others: dict[str, Any]
    dropped: tuple[str, ...]
    loaded: Any
    size: int

    @property
    def main(self) -> Endpoint:
        return self.signatures[self.signature_key]


def load_saved_model(path: str | os.PathLike[str], signature_key: str = "serving_default") -> Source:
    """Loads a SavedModel and freezes one of its signatures.

    Args:
        path: the folder with `saved_model.pb`.
        signature_key: the signature to quantize.

    Returns:
        The `Source`; its graph's inputs and outputs carry the signature's names.

    Raises:
        ModelError: no SavedModel is there, it is corrupt, or it has no such signature.
    """
    path = pathlib.Path(path)
    proto = _read_proto(path)
    try:
        loaded = _load(path, proto)
    except _LOAD_ERRORS as error:
        raise ModelError(f"TensorFlow cannot load the SavedModel {path}: {first_line(error)}") from error
    signatures = dict(loaded.signatures)
    if signature_key not in signatures:
        known = ", ".join(sorted(signatures)) or "none"
        raise ModelError(f"{path} has no signature {signature_key!r}; use one of its signatures. Received: {known}")
    main = signatures[signature_key]
    graph = _freeze(main, path)
    normalize(graph, _variable_names(main))
    match = _Matcher(proto, signature_key, graph)

    same: dict[str, Endpoint] = {}
    endpoints: dict[str, Endpoint] = {}
    others: dict[str, Any] = {}
    dropped: list[str] = []
    for key, function in signatures.items():
        found = match.signature(key, function)
        if found is None:
            others[f"signature {key}"] = function
        else:
            same[key] = found
    is_keras_2 = _root_identifier(proto).startswith(_KERAS_ROOT)
    for name in sorted(match.functions.endpoints):
        restored = getattr(loaded, name, None)
        found = match.endpoint(name, restored)
        if found is not None:
            endpoints[name] = found
        elif is_keras_2:
            dropped.append(name)
        else:
            others[name] = restored
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Source(path.name, graph, signature_key, same, endpoints, others, tuple(dropped), loaded, size)


def first_line(error: BaseException) -> str:
    """An error's type and message in one line: the first of the message, or all that TensorFlow says of an op that failed."""
    text = error.message if isinstance(error, tf.errors.OpError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip() and line.strip() != "Graph execution error:"]
    told = " ".join(lines if isinstance(error, tf.errors.OpError) else lines[:1])
    return f"{type(error).__name__}: {told[:300] or 'no message'}"


def _read_proto(path: pathlib.Path) -> saved_model_pb2.SavedModel:
    file = path / "saved_model.pb"
    if not path.exists():
        raise ModelError(f"There is no model at {path}: give the folder of a SavedModel or a .keras file.")
    if not file.is_file():
        raise ModelError(f"{path} is not a SavedModel: it holds no saved_model.pb.")
    proto = saved_model_pb2.SavedModel()
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise ModelError(f"{file} is corrupt: {first_line(error)}") from error
    if not proto.meta_graphs:
        raise ModelError(f"{file} is corrupt or empty: it holds no graph.")
    return proto


def _load(path: pathlib.Path, proto: saved_model_pb2.SavedModel) -> Any:
    """Loads without the optimizer's slot variables: inference needs none, and old ones make the loader fail."""
    nodes = proto.meta_graphs[0].object_graph_def.nodes
    if not any(node.slot_variables for node in nodes):
        return tf.saved_model.load(str(path))
    for node in nodes:
        del node.slot_variables[:]
    with tempfile.TemporaryDirectory() as folder:
        for entry in path.iterdir():
            if entry.name not in ("saved_model.pb", "fingerprint.pb"):
                os.symlink(entry.resolve(), pathlib.Path(folder) / entry.name)
        (pathlib.Path(folder) / "saved_model.pb").write_bytes(proto.SerializeToString())
        return tf.saved_model.load(folder)


def _root_identifier(proto: saved_model_pb2.SavedModel) -> str:
    nodes = proto.meta_graphs[0].object_graph_def.nodes
    return str(nodes[0].user_object.identifier) if nodes else ""


def _signature_inputs(function: Any) -> tuple[str, ...]:
    """The keyword of each flat input of a loaded signature."""
    return tuple(getattr(function, "_arg_keywords", None) or sorted(function.structured_input_signature[1]))


def _freeze(function: Any, path: pathlib.Path) -> Graph:
    """A signature's graph with its variables as constants."""
    inputs, outputs = _signature_inputs(function), sorted(function.structured_outputs)
    try:
        frozen = convert_variables_to_constants_v2(function, lower_control_flow=False)
    except _LOAD_ERRORS as error:
        raise ModelError(f"TensorFlow cannot freeze the variables of {path}: {first_line(error)}") from error
    tensors = [tensor.name for tensor in frozen.inputs if tensor.dtype != tf.resource]
    if len(tensors) != len(inputs) or len(frozen.outputs) != len(outputs):
        raise ModelError(
            f"The frozen signature of {path} does not match its interface. "
            f"Received: {len(tensors)} inputs and {len(frozen.outputs)} outputs for {list(inputs)} and {outputs}"
        )
    return Graph.from_graph_def(
        frozen.graph.as_graph_def(),
        dict(zip(inputs, tensors, strict=True)),
        {key: tensor.name for key, tensor in zip(outputs, frozen.outputs, strict=True)},
    )


def _variable_names(function: Any) -> dict[str, str]:
    """Name of the placeholder through which a function captures a variable, to the variable's name."""
    names = {id(variable.handle): variable.name.partition(":")[0] for variable in function.graph.variables}
    return {inner.op.name: names[id(outer)] for outer, inner in function.graph.captures if id(outer) in names}


class _Matcher:
    """Finds out how other functions of the model map to the inputs and outputs of the main signature's graph."""

    def __init__(self, proto: saved_model_pb2.SavedModel, signature_key: str, graph: Graph) -> None:
        self.functions = Functions(proto)
        self._main = signature_key
        self._inputs, self._outputs = tuple(graph.inputs), tuple(graph.outputs)
        self._digests: dict[bytes, str] = {}
        if signature_key in self.functions.signatures:
            digests = self.functions.fingerprints(self.functions.signatures[signature_key], self._inputs)
            self._digests = dict(zip(digests, self._outputs, strict=True))

    def signature(self, key: str, function: Any) -> Endpoint | None:
        """The endpoint of a signature, or None when it computes something else."""
        # Flattening a dict sorts its keys, the arguments of the function stand in the order of the keywords.
        inputs, flat = _signature_inputs(function), tuple(sorted(_signature_inputs(function)))
        arguments, structure = function.structured_input_signature, function.structured_outputs
        if key == self._main:
            return Endpoint(arguments, flat, self._outputs, structure)
        outputs = self._map(self.functions.signatures.get(key), inputs)
        return Endpoint(arguments, flat, outputs, structure) if outputs else None

    def endpoint(self, name: str, restored: Any) -> Endpoint | None:
        """The endpoint of a function of the root object, or None when it has several forms or computes something else."""
        concrete = list(getattr(restored, "concrete_functions", []))
        names = self.functions.endpoints[name]
        if len(concrete) != 1 or len(names) != 1:
            return None
        arguments, structure = concrete[0].structured_input_signature, concrete[0].structured_outputs
        specs = tf.nest.flatten(arguments)
        if len(specs) != len(self._inputs) or not all(isinstance(spec, tf.TensorSpec) for spec in specs):
            return None
        inputs = tuple(spec.name for spec in specs)
        if set(inputs) != set(self._inputs):
            inputs = self._inputs
        outputs = self._map(names[0], inputs)
        is_whole = len(outputs) == len(tf.nest.flatten(structure))
        return Endpoint(arguments, inputs, outputs, structure) if outputs and is_whole else None

    def _map(self, function: str | None, inputs: tuple[str, ...]) -> tuple[str, ...]:
        """Which output of the main graph each output of a function is, empty where one is none."""
        if function is None or set(inputs) != set(self._inputs):
            return ()
        try:
            digests = self.functions.fingerprints(function, inputs)
        except KeyError:
            return ()
        mapped = tuple(self._digests.get(digest, "") for digest in digests)
        return mapped if all(mapped) else ()


def as_numpy_dtype(dtype: tf.DType) -> str:
    """The NumPy name of a dtype ("object" for strings)."""
    return str(np.dtype(dtype.as_numpy_dtype))


def model_inputs(source: Source) -> Iterator[tuple[str, tuple[int | None, ...] | None, str]]:
    """(name, shape, dtype) of each input of the chosen signature."""
    for key, tensor in source.graph.inputs.items():
        assert tensor.dtype is not None
        yield key, tensor.shape, as_numpy_dtype(tensor.dtype)
