"""From files to a frozen graph: the signatures to quantize, and which other functions compute the same."""

from __future__ import annotations

import dataclasses
import difflib
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf import text_format
from google.protobuf.message import DecodeError
from tensorflow.core.framework import graph_pb2
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2

from tfquant.errors import ModelError
from tfquant.graph.execution import executable
from tfquant.graph.freezing import freeze, freeze_ref_variables, inline_calls, settle, tidy_library
from tfquant.graph.functions import Functions
from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.graph.merging import merge
from tfquant.graph.paths import normalize
from tfquant.graph.safety import refuse_unsafe, unsafe_in_graph_def, unsafe_in_saved_model

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
_NO_OUTPUTS = frozenset({"Const", "NoOp", "Placeholder", "PlaceholderWithDefault", "Assert"})
# What TensorFlow puts before the message of an op that failed.
_CHATTER = ("Graph execution error:", "Detected at node ", 'File "', "<stack traces unavailable>")
_ELEMENTWISE = frozenset({"Cast", "Identity", "Mul", "Sub", "AddV2", "RealDiv", "Minimum", "Maximum"})
_PREDICT = "tensorflow/serving/predict"


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


@dataclasses.dataclass(frozen=True)
class Initializer:
    """What TensorFlow runs when it loads a model.

    Attributes:
        resource: the object that does it when it is tracked.
        externals: handles of the tables and variables, and paths of the assets, that it needs.
    """

    resource: Any
    externals: tuple[Any, ...]


@dataclasses.dataclass
class Source:
    """A loaded model.

    Attributes:
        name: how messages call it.
        graph: the frozen float graph of the chosen signatures.
        signature_keys: their keys; with several, the graph's outputs are called "key/output".
        signatures: signatures that compute the same, the chosen ones included.
        endpoints: attributes of the root that are functions and compute the same (`serve` of a Keras 3 export).
        original: the float signatures as functions of named tensors, by key.
        others: signatures and endpoints that compute something else: they stay as they were.
        owners: id of a handle to the object that owns the table, variable or asset, for all that the model has.
        initializers: of a model of TensorFlow 1: they fill its tables.
        dropped: names of functions that nothing can serve and that are left out.
        method_names: method names of signatures, where they are not the usual one.
        tags: of the meta graph.
        loaded: the object that TensorFlow loaded; keeps its variables alive.
        state: variables and tables that the model may write, with what they held when it was loaded.
        size: bytes on disk.
        extra: folder `assets.extra` to copy, or None.
        version: number of the folder that was chosen among several versions, or "".
        names: of the nodes that are inputs and outputs of a GraphDef, by what the signature calls them.
        keeps_rounding: no kernel may pass over a fake quantization of the model.
        ranges: name of a tensor to the least and the largest value that training gave it, where a model knows.
    """

    name: str
    graph: Graph
    signature_keys: tuple[str, ...]
    signatures: dict[str, Endpoint]
    original: Mapping[str, Callable[..., Mapping[str, Any]]]
    size: int
    endpoints: dict[str, Endpoint] = dataclasses.field(default_factory=dict)
    others: dict[str, Any] = dataclasses.field(default_factory=dict)
    owners: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    initializers: tuple[Initializer, ...] = ()
    dropped: tuple[str, ...] = ()
    method_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tags: tuple[str, ...] = ("serve",)
    loaded: Any = None
    state: tuple[tuple[Any, Any], ...] = ()
    extra: pathlib.Path | None = None
    version: str = ""
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    keeps_rounding: bool = False

    def output_name(self, signature_key: str, output: str) -> str:
        """What the graph calls an output of a signature."""
        return output if len(self.signature_keys) == 1 else f"{signature_key}/{output}"


def load_saved_model(
    path: str | os.PathLike[str],
    signature_keys: Sequence[str] = ("serving_default",),
    tags: Collection[str] = ("serve",),
    allow_unsafe_ops: bool = False,
) -> Source:
    """Loads a SavedModel and freezes some of its signatures.

    Args:
        path: the folder with `saved_model.pb`, or one with numbered versions of it: the highest is taken.
        signature_keys: the signatures to quantize.
        tags: of the meta graph; a model with one alone needs none.
        allow_unsafe_ops: load it though its ops read or write files, or call Python.

    Returns:
        The `Source`; its graph's inputs and outputs carry the signature's names.

    Raises:
        ModelError: no SavedModel is there, it is corrupt, unsafe, or it has no such signature.
    """
    path, version = _chosen_version(pathlib.Path(path))
    proto = _read_proto(path)
    meta_graph = _meta_graph(proto, tags, path)
    refuse_unsafe(unsafe_in_saved_model(proto, meta_graph.meta_info_def.tags), str(path), allow_unsafe_ops)
    try:
        loaded = _load(path, proto, meta_graph)
    except _LOAD_ERRORS as error:
        raise ModelError(f"TensorFlow cannot load the SavedModel {path}: {first_line(error)}") from error
    signatures = dict(loaded.signatures)
    for key in signature_keys:
        if key not in signatures:
            known = ", ".join(sorted(signatures)) or "none"
            raise ModelError(f"{path} has no signature {key!r}; use one of its signatures. Received: {known}")
    chosen = {key: signatures[key] for key in signature_keys}
    owners = _owners(loaded)
    source = Source(
        name=path.name,
        graph=_freeze(chosen, path, meta_graph, owners),
        signature_keys=tuple(signature_keys),
        signatures={},
        original={key: _by_keyword(function) for key, function in chosen.items()},
        size=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        owners=owners,
        initializers=tuple(_initializers(loaded, owners)),
        tags=tuple(meta_graph.meta_info_def.tags),
        loaded=loaded,
        extra=path / "assets.extra" if (path / "assets.extra").is_dir() else None,
        version=version,
    )
    source.state = tuple(_state(source))
    source.method_names = {
        key: signature.method_name
        for key, signature in meta_graph.signature_def.items()
        if signature.method_name not in ("", _PREDICT)
    }
    match = _Matcher(meta_graph, source, chosen)
    for key, function in signatures.items():
        found = match.signature(key, function)
        if found is None:
            source.others[f"signature {key}"] = function
        else:
            source.signatures[key] = found
    is_keras_2 = _root_identifier(meta_graph).startswith(_KERAS_ROOT)
    dropped = []
    for name in sorted(match.functions.endpoints):
        restored = getattr(loaded, name, None)
        found = match.endpoint(name, restored)
        if found is not None:
            source.endpoints[name] = found
        elif is_keras_2:
            dropped.append(name)
        else:
            source.others[name] = restored
    source.dropped = tuple(dropped)
    return source


def load_graph_def(
    path: str | os.PathLike[str], inputs: Sequence[str], outputs: Sequence[str], allow_unsafe_ops: bool = False
) -> Source:
    """Loads a frozen GraphDef.

    Args:
        path: the binary proto, or its text form (.pbtxt).
        inputs: names of its placeholders, "image" or "image:0"; all that the outputs need where empty.
        outputs: names of its results, "softmax" or "detections:1"; the last node where there is but one.
        allow_unsafe_ops: load it though its ops read or write files, or call Python.

    Returns:
        A `Source` with the signature "serving_default", whose inputs and outputs are called as the nodes are.

    Raises:
        ModelError: it cannot be read, is not frozen, or has no such nodes.
    """
    path = pathlib.Path(path)
    proto = _read_graph_def(path)
    names = {node.name for node in proto.node}
    if not outputs:
        read = {reference.partition(":")[0].lstrip("^") for node in proto.node for reference in node.input}
        switches = {node.name for node in proto.node if node.op == "Switch"}
        outputs = [
            node.name
            for node in proto.node
            if node.name not in read
            and node.op not in _NO_OUTPUTS
            and not (node.op == "Identity" and node.input[0].partition(":")[0] in switches)  # the pivot of a branch
        ]
        if len(outputs) != 1:
            raise ModelError(
                f"{path} has {len(outputs)} nodes that nothing reads: say which are its --outputs. "
                f"Received: {', '.join(outputs[:8]) or 'none'}"
            )
    inputs = inputs or _placeholders(proto, outputs)
    for name in (*inputs, *outputs):
        node, _, index = name.partition(":")
        if index and not index.isdecimal():
            raise ModelError(f"A tensor is named node or node:0. Received: {name}")
        if node not in names:
            near = ", ".join(difflib.get_close_matches(node, names, 3)) or "none"
            raise ModelError(f"{path} has no node {node!r}; the nearest names are: {near}")
    refuse_unsafe(unsafe_in_graph_def(proto, outputs, inputs), str(path), allow_unsafe_ops)
    loose = _loose_ends(proto, inputs, outputs)
    if loose:
        raise ModelError(f"{path} is not a frozen graph of these inputs: {loose[0]}; freeze its variables, or name all inputs.")
    try:
        keys = {_as_keyword(name): name for name in inputs}
        if len(keys) < len(inputs):
            raise ModelError(f"The inputs must have different names. Received: {', '.join(inputs)}")
        results: dict[str, str] = {}
        for name in outputs:
            results[_unused(_as_key(name), results)] = name
        graph = Graph.from_graph_def(proto, keys, results, infer=False)
        for tensor in graph.inputs.values():
            _make_placeholder(graph, tensor)
        inline_calls(graph)
        settle(graph)
        tidy_library(graph)
        graph.infer()
        original = executable(graph.copy())
    except _LOAD_ERRORS as error:
        raise ModelError(f"TensorFlow cannot import the graph {path}: {first_line(error)}") from error

    def run(**tensors: Any) -> dict[str, Any]:
        results = original(*(tensors[key] for key in graph_inputs))
        return dict(zip(graph_outputs, results, strict=True))

    graph_inputs, graph_outputs = list(graph.inputs), list(graph.outputs)
    keywords = {key: tf.TensorSpec(t.shape, t.dtype, name=key) for key, t in graph.inputs.items()}
    structure = {key: tf.TensorSpec(t.shape, t.dtype, name=key) for key, t in graph.outputs.items()}
    endpoint = Endpoint(((), keywords), tuple(sorted(graph_inputs)), tuple(sorted(graph_outputs)), structure)
    key = "serving_default"
    nodes = {_as_keyword(name): name.removesuffix(":0") for name in inputs}
    nodes |= {key: name.removesuffix(":0") for key, name in results.items() if ":" not in name.removesuffix(":0")}
    return Source(path.name, graph, (key,), {key: endpoint}, {key: run}, path.stat().st_size, names=nodes)


def _read_graph_def(path: pathlib.Path) -> graph_pb2.GraphDef:
    proto = graph_pb2.GraphDef()
    try:
        if path.suffix == ".pbtxt":
            text_format.Parse(path.read_text(), proto)
        else:
            proto.ParseFromString(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(f"There is no model at {path}.") from error
    except (OSError, DecodeError, text_format.ParseError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not a readable GraphDef: {first_line(error)}") from error
    if not proto.node:
        raise ModelError(f"{path} is not a GraphDef, or an empty one: it holds no node.")
    return proto


def _needed(proto: graph_pb2.GraphDef, outputs: Sequence[str]) -> set[str]:
    """Names of the nodes that the outputs need."""
    nodes = {node.name: node for node in proto.node}
    stack, seen = [name.partition(":")[0] for name in outputs], set[str]()
    while stack:
        name = stack.pop()
        if name not in seen:
            seen.add(name)
            stack += [reference.partition(":")[0].lstrip("^") for reference in nodes[name].input] if name in nodes else []
    return seen


def _placeholders(proto: graph_pb2.GraphDef, outputs: Sequence[str]) -> list[str]:
    needed = _needed(proto, outputs)
    return [node.name for node in proto.node if node.op == "Placeholder" and node.name in needed]


def _loose_ends(proto: graph_pb2.GraphDef, inputs: Sequence[str], outputs: Sequence[str]) -> list[str]:
    """What the outputs need and nothing gives."""
    nodes = {node.name: node for node in proto.node}
    fed = {name.partition(":")[0] for name in inputs}
    found = []
    for name in sorted(_needed(proto, outputs) - fed):
        if name not in nodes:
            found.append(f"{name!r} is read but missing")
        elif nodes[name].op == "Placeholder":
            found.append(f"the placeholder {name!r} is no input")
        elif nodes[name].op in ("VariableV2", "Variable", "VarHandleOp"):
            found.append(f"{name!r} is a variable")
    return found


def _make_placeholder(graph: Graph, tensor: Tensor) -> None:
    """An input in the middle of a graph is cut off from what made it."""
    node = tensor.node
    if node.op == "Placeholder" and not tensor.index:
        return
    if tensor.index or node.op not in ("PlaceholderWithDefault", "Identity"):
        raise ModelError(f"An input must be a placeholder. Received: {tensor.name} ({node.op})")
    name = graph.take_name(node)
    dtype = node.attrs["dtype" if "dtype" in node.attrs else "T"]
    attrs = {"dtype": dtype, **({"shape": node.attrs["shape"]} if "shape" in node.attrs else {})}
    new = graph.add("Placeholder", name=name, attrs=attrs)
    graph.replace(tensor, new.out)
    for key, other in graph.inputs.items():
        if other == tensor:
            graph.inputs[key] = new.out


def _unused(key: str, taken: Collection[str]) -> str:
    while key in taken:
        key += "_"
    return key


def _as_keyword(name: str) -> str:
    return re.sub(r"\W", "_", name.removesuffix(":0"))


def _as_key(name: str) -> str:
    return name.removesuffix(":0").replace(":", "_")


def first_line(error: BaseException) -> str:
    """An error's type and message in one line: the first of the message, or all that TensorFlow says of an op that failed."""
    text = error.message if isinstance(error, tf.errors.OpError) else str(error)
    text = re.sub(r"\{\{function_node .*?\}\} ?", "", text)
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith(_CHATTER)]
    told = " ".join(lines if isinstance(error, tf.errors.OpError) else lines[:1])
    return f"{type(error).__name__}: {told[:300] or 'no message'}"


def _chosen_version(path: pathlib.Path) -> tuple[pathlib.Path, str]:
    """The folder itself, or the highest of the numbered versions in it, as TensorFlow Serving picks it."""
    if (path / "saved_model.pb").exists() or not path.is_dir():
        return path, ""
    versions = [entry.name for entry in path.iterdir() if entry.name.isdecimal() and (entry / "saved_model.pb").is_file()]
    if not versions:
        return path, ""
    version = max(versions, key=int)
    return path / version, version


def _read_proto(path: pathlib.Path) -> saved_model_pb2.SavedModel:
    file = path / "saved_model.pb"
    if not path.exists():
        raise ModelError(f"There is no model at {path}: give the folder of a SavedModel, or a .keras, .h5 or .pb file.")
    if not file.is_file():
        raise ModelError(f"{path} is not a SavedModel: it holds no saved_model.pb.")
    proto = saved_model_pb2.SavedModel()
    try:
        proto.ParseFromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise ModelError(f"{file} is corrupt: {first_line(error)}") from error
    if not proto.meta_graphs:
        raise ModelError(f"{file} is corrupt or empty: it holds no graph.")
    return proto


def _meta_graph(proto: saved_model_pb2.SavedModel, tags: Collection[str], path: pathlib.Path) -> meta_graph_pb2.MetaGraphDef:
    """The meta graph with these tags; the only one where the tags are the usual ones."""
    for meta_graph in proto.meta_graphs:
        if set(meta_graph.meta_info_def.tags) == set(tags):
            return meta_graph
    if len(proto.meta_graphs) == 1 and set(tags) == {"serve"}:
        return proto.meta_graphs[0]
    known = "; ".join(",".join(sorted(meta_graph.meta_info_def.tags)) or "none" for meta_graph in proto.meta_graphs)
    raise ModelError(f"{path} has no graph with the tags {','.join(tags)}; its graphs have these. Received: {known}")


def _load(path: pathlib.Path, proto: saved_model_pb2.SavedModel, meta_graph: meta_graph_pb2.MetaGraphDef) -> Any:
    """Loads without the optimizer's slot variables: inference needs none, and old ones make the loader fail."""
    tags = list(meta_graph.meta_info_def.tags)
    nodes = meta_graph.object_graph_def.nodes
    if not any(node.slot_variables for node in nodes):
        return tf.saved_model.load(str(path), tags)
    for node in nodes:
        del node.slot_variables[:]
    with tempfile.TemporaryDirectory() as folder:
        for entry in path.iterdir():
            if entry.name not in ("saved_model.pb", "fingerprint.pb"):
                os.symlink(entry.resolve(), pathlib.Path(folder) / entry.name)
        (pathlib.Path(folder) / "saved_model.pb").write_bytes(proto.SerializeToString())
        return tf.saved_model.load(folder, tags)


def _root_identifier(meta_graph: meta_graph_pb2.MetaGraphDef) -> str:
    nodes = meta_graph.object_graph_def.nodes
    return str(nodes[0].user_object.identifier) if nodes else ""


def _owners(loaded: Any) -> dict[int, Any]:
    """Id of a handle to the object whose table, variable or asset it is."""
    found: dict[int, Any] = {}
    for thing in tf.train.TrackableView(loaded).descendants():
        for name in ("handle", "resource_handle", "asset_path"):
            try:
                handle = getattr(thing, name, None)
            except (ValueError, AttributeError, NotImplementedError):  # a property that this kind of object does not have
                continue
            if handle is not None:
                found.setdefault(id(handle), thing)
    return found


def _initializers(loaded: Any, owners: Mapping[int, Any]) -> Iterator[Initializer]:
    """The initializer of a model of TensorFlow 1, if it does anything, without the variables that it captured for nothing."""
    initializer: Any = getattr(loaded, "initializer", None)
    function = getattr(initializer, "_init_fn", None)
    if function is None:
        return
    assets = list(initializer._asset_paths)
    inputs, outputs = ([f"{index}" for index in range(len(items))] for items in (assets, function.outputs))
    graph = freeze(function, inputs, outputs, kept=owners)
    if graph.effects:
        run = executable(graph)
        yield Initializer(type(initializer)(run, assets), (*run.externals, *(asset.asset_path for asset in assets)))


def _state(source: Source) -> Iterator[tuple[Any, Any]]:
    """Variables and tables with what they hold."""
    for node in source.graph.order():
        if node.external is None:
            continue
        owner = source.owners.get(id(node.external))
        if isinstance(owner, tf.Variable):
            yield owner, owner.numpy()
        for user, _ in node.users:
            if user.op.startswith("LookupTableInsert"):
                table = _Table(node.external, user.attr("Tin"), user.attr("Tout"))
                yield table, table.read()
                break


@dataclasses.dataclass(frozen=True)
class _Table:
    """A table that the model writes, assigned to as a variable is."""

    handle: Any
    keys: tf.DType
    values: tf.DType

    def read(self) -> Any:
        return tf.raw_ops.LookupTableExportV2(table_handle=self.handle, Tkeys=self.keys, Tvalues=self.values)

    def assign(self, content: Any) -> None:
        tf.raw_ops.LookupTableImportV2(table_handle=self.handle, keys=content[0], values=content[1])


def _signature_inputs(function: Any) -> tuple[str, ...]:
    """The keyword of each flat input of a loaded signature."""
    return tuple(getattr(function, "_arg_keywords", None) or sorted(function.structured_input_signature[1]))


def _by_keyword(function: Any) -> Callable[..., Mapping[str, Any]]:
    def run(**tensors: Any) -> Mapping[str, Any]:
        return dict(function(**tensors))

    return run


def _freeze(
    functions: Mapping[str, Any], path: pathlib.Path, meta_graph: meta_graph_pb2.MetaGraphDef, kept: Collection[int]
) -> Graph:
    """The signatures as one graph, with their variables as constants."""
    values: dict[int, np.ndarray] = {}
    graphs = {}
    for key, function in functions.items():
        inputs, outputs = _signature_inputs(function), sorted(function.structured_outputs)
        try:
            graphs[key] = freeze(function, inputs, outputs, values, kept)
            freeze_ref_variables(graphs[key], lambda names: _ref_variables(path, meta_graph, names))
        except _LOAD_ERRORS as error:
            raise ModelError(f"TensorFlow cannot freeze signature {key!r} of {path}: {first_line(error)}") from error
        settle(graphs[key])
        normalize(graphs[key], variable_names(function))
    graph = merge(graphs)
    tidy_library(graph)
    return graph


def _ref_variables(path: pathlib.Path, meta_graph: meta_graph_pb2.MetaGraphDef, names: Sequence[str]) -> list[np.ndarray]:
    """The values of variables as TensorFlow 1 had them, which only a session can restore."""
    with tf.Graph().as_default() as scratch, tf.compat.v1.Session(graph=scratch) as session:
        tf.compat.v1.saved_model.load(session, list(meta_graph.meta_info_def.tags), str(path))
        return [np.asarray(value) for value in session.run([f"{name}:0" for name in names])]


def variable_names(function: Any) -> dict[str, str]:
    """Name of the placeholder through which a function captures a variable, to the variable's name."""
    names = {id(variable.handle): variable.name.partition(":")[0] for variable in function.graph.variables}
    return {inner.op.name: names[id(outer)] for outer, inner in function.graph.captures if id(outer) in names}


class _Matcher:
    """Finds out how other functions of the model map to the inputs and outputs of the graph."""

    def __init__(self, meta_graph: meta_graph_pb2.MetaGraphDef, source: Source, chosen: Mapping[str, Any]) -> None:
        self.functions = Functions(meta_graph)
        self._definitions = meta_graph.signature_def
        self._source = source
        self._inputs = tuple(source.graph.inputs)
        self._digests: dict[bytes, str] = {}
        self._tensors: dict[str, str] = {}
        for key, function in chosen.items():
            outputs = [source.output_name(key, name) for name in sorted(function.structured_outputs)]
            if key in self.functions.signatures:
                digests = self.functions.fingerprints(self.functions.signatures[key], _signature_inputs(function))
                self._digests |= dict(zip(digests, outputs, strict=True))
            for name, info in self._definitions[key].outputs.items():
                self._tensors.setdefault(info.name, source.output_name(key, name))

    def signature(self, key: str, function: Any) -> Endpoint | None:
        """The endpoint of a signature, or None when it computes something else."""
        # Flattening a dict sorts its keys, the arguments of the function stand in the order of the keywords.
        inputs, flat = _signature_inputs(function), tuple(sorted(_signature_inputs(function)))
        arguments, structure = function.structured_input_signature, function.structured_outputs
        if key in self._source.signature_keys:
            outputs = tuple(self._source.output_name(key, name) for name in sorted(structure))
        elif self.functions.signatures:
            outputs = self._map(self.functions.signatures.get(key), inputs)
        else:
            outputs = self._same_tensors(key)
        return Endpoint(arguments, flat, outputs, structure) if outputs else None

    def _same_tensors(self, key: str) -> tuple[str, ...]:
        """For signatures of TensorFlow 1, which name tensors of one graph."""
        definition, main = self._definitions[key], self._definitions[self._source.signature_keys[0]]
        if {name: info.name for name, info in definition.inputs.items()} != {n: info.name for n, info in main.inputs.items()}:
            return ()
        mapped = tuple(self._tensors.get(definition.outputs[name].name, "") for name in sorted(definition.outputs))
        return mapped if all(mapped) else ()

    def endpoint(self, name: str, restored: Any) -> Endpoint | None:
        """The endpoint of a function of the root object, or None when it has several forms or computes something else."""
        concrete = list(getattr(restored, "concrete_functions", []))
        names = self.functions.endpoints[name]
        if len(concrete) != 1 or len(names) != 1:
            return None
        arguments, structure = concrete[0].structured_input_signature, concrete[0].structured_outputs
        specs = tf.nest.flatten(arguments)
        if not all(isinstance(spec, tf.TensorSpec) for spec in specs):
            return None
        inputs = tuple(spec.name for spec in specs)
        if not set(inputs) <= set(self._inputs) or len(set(inputs)) < len(inputs):
            if len(inputs) != len(self._inputs):
                return None
            inputs = self._inputs
        outputs = self._map(names[0], inputs)
        is_whole = len(outputs) == len(tf.nest.flatten(structure))
        return Endpoint(arguments, inputs, outputs, structure) if outputs and is_whole else None

    def _map(self, function: str | None, inputs: tuple[str, ...]) -> tuple[str, ...]:
        """Which output of the graph each output of a function is, empty where one is none."""
        if function is None or not set(inputs) <= set(self._inputs):
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


def model_inputs(source: Source) -> Iterator[tuple[str, tuple[int | None, ...] | None, str, bool]]:
    """(name, shape, dtype, whether its first axis can be a batch) of each input, in the order of arguments where known."""
    for key in call_order(source) or tuple(source.graph.inputs):
        tensor = source.graph.inputs[key]
        assert tensor.dtype is not None
        yield key, tensor.shape, as_numpy_dtype(tensor.dtype), not _gets_a_batch(source.graph, tensor)


def call_order(source: Source) -> tuple[str, ...]:
    """The inputs in the order of positional arguments; empty where no function of the model tells it."""
    if len(source.graph.inputs) == 1 or source.loaded is None:
        return tuple(source.graph.inputs)  # a GraphDef has the order in which its inputs were named
    for name in sorted(source.endpoints, key=lambda name: name != "serve"):
        endpoint = source.endpoints[name]
        if set(endpoint.inputs) == set(source.graph.inputs) and not endpoint.arguments[1]:
            return endpoint.inputs
    return ()


def _gets_a_batch(graph: Graph, tensor: Tensor) -> bool:
    """Whether the model itself puts a batch axis before an input: it then takes one sample per call."""
    stack, seen = [tensor], {tensor}
    while stack:
        for user, slot in graph.users(stack.pop()):
            if slot == 0 and _adds_first_axis(user):
                return True
            if user.op in _ELEMENTWISE and user.out not in seen:
                seen.add(user.out)
                stack.append(user.out)
    return False


def _adds_first_axis(node: Node) -> bool:
    if node.op == "ExpandDims":
        return node.inputs[1].value is not None and int(node.inputs[1].value) == 0
    if node.op == "Pack":
        return len(node.inputs) == 1 and node.attr("axis", 0) == 0
    return node.op == "StridedSlice" and bool(node.attr("new_axis_mask", 0) & 1)
