"""From a graph to a SavedModel with the interface of its source, in one atomic step."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow as tf
from google.protobuf.message import EncodeError
from tensorflow.core.protobuf import saved_model_pb2

from tfquant.errors import OutputError
from tfquant.graph.execution import Executable, executable
from tfquant.graph.ir import Graph, Node
from tfquant.graph.loading import Endpoint, Source, first_line
from tfquant.unfinished import prefix, remove, remove_stale


def to_module(source: Source, graph: Graph) -> tuple[tf.Module, dict[str, Any]]:
    """A module with the endpoints of `source` computed by `graph`, and its signatures."""
    parts: dict[frozenset[str], _Part] = {}
    for endpoint in (*source.signatures.values(), *source.endpoints.values()):
        inputs = frozenset(endpoint.inputs)
        if inputs not in parts:
            parts[inputs] = _part(source, graph, inputs)
    module = tf.Module()
    signatures = {key: _signature(parts[frozenset(e.inputs)], e) for key, e in source.signatures.items()}
    for name, endpoint in source.endpoints.items():
        setattr(module, name, _endpoint(parts[frozenset(endpoint.inputs)], endpoint))
    handles = [handle for part in parts.values() for handle in part.run.externals]
    for name, other in source.others.items():
        if name.startswith("signature "):
            signatures[name.removeprefix("signature ")] = other
        else:
            setattr(module, name, other)
        for concrete in getattr(other, "concrete_functions", [other]):
            handles += getattr(concrete, "captured_inputs", [])
    for initializer in source.initializers:
        handles += initializer.externals
    # What is saved must be reachable: constants beyond the size of a GraphDef, tables, assets, the variables of what stays float.
    owners = {id(handle): source.owners[id(handle)] for handle in handles if id(handle) in source.owners}
    variables = [variable for part in parts.values() for variable, _ in part.run.variables]
    module.resources = [*variables, *owners.values(), *(initializer.resource for initializer in source.initializers)]
    return module, {key: signatures[key] for key in sorted(signatures)}


@dataclasses.dataclass(frozen=True)
class _Part:
    """What the signatures with the same inputs need of a graph.

    Attributes:
        inputs: of the graph, in order.
        run: from them to the outputs.
        shapes: name of an output to its shape, in order.
    """

    inputs: tuple[str, ...]
    run: Executable
    shapes: Mapping[str, tf.TensorShape]

    def __call__(self, endpoint: Endpoint, arguments: list[Any]) -> list[Any]:
        by_name = dict(zip(endpoint.inputs, arguments, strict=True))
        results = dict(zip(self.shapes, self.run(*(by_name[key] for key in self.inputs)), strict=True))
        for name, shape in self.shapes.items():
            results[name].set_shape(shape)
        return [results[name] for name in endpoint.outputs]


def _part(source: Source, graph: Graph, inputs: frozenset[str]) -> _Part:
    shapes = {
        name: spec.shape
        for key in source.signature_keys
        if frozenset(source.signatures[key].inputs) == inputs
        for name, spec in zip(source.signatures[key].outputs, tf.nest.flatten(source.signatures[key].structure), strict=True)
    }
    part = graph.copy()
    part.inputs = {key: tensor for key, tensor in part.inputs.items() if key in inputs}
    part.outputs = {name: part.outputs[name] for name in shapes}
    part.prune()
    return _Part(tuple(part.inputs), executable(part), shapes)


def _signature(part: _Part, endpoint: Endpoint) -> Any:
    keywords = endpoint.arguments[1]
    specs = [tf.TensorSpec(keywords[key].shape, keywords[key].dtype, name=key) for key in endpoint.inputs]
    names = sorted(endpoint.structure)

    @tf.function(input_signature=specs, autograph=False)
    def signature(*arguments: Any) -> dict[str, Any]:
        return dict(zip(names, part(endpoint, list(arguments)), strict=True))

    return signature


def _endpoint(part: _Part, endpoint: Endpoint) -> Any:
    def served(*args: Any, **kwargs: Any) -> Any:
        return tf.nest.pack_sequence_as(endpoint.structure, part(endpoint, tf.nest.flatten((args, kwargs))))

    if not endpoint.arguments[1]:
        return tf.function(served, input_signature=endpoint.arguments[0], autograph=False)
    restored = tf.function(served, autograph=False)
    restored.get_concrete_function(*endpoint.arguments[0], **endpoint.arguments[1])
    return restored


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool) -> Iterator[pathlib.Path]:
    """A folder to fill, that takes the name `path` when all went well and vanishes when it did not.

    Raises:
        OutputError: `path` exists and `overwrite` is false, or it cannot be written.
    """
    path = pathlib.Path(path)
    check_output(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path)
        folder = pathlib.Path(tempfile.mkdtemp(prefix=prefix(path), dir=path.parent))
    except OSError as error:
        raise OutputError(f"Cannot write next to {path}: {first_line(error)}") from error
    try:
        yield folder
        folder.chmod(0o755)
        _take_name(folder, path, overwrite)
    except (OSError, tf.errors.OpError) as error:
        raise OutputError(f"Cannot write {path}: {first_line(error)}") from error
    finally:
        remove(folder)


def _take_name(folder: pathlib.Path, path: pathlib.Path, overwrite: bool) -> None:
    """`folder` becomes `path`, in one step where the system can; what was there goes by the name of `folder`, to be removed."""
    if _rename(folder, path, _NO_REPLACE):
        return
    if not overwrite:
        raise OutputError(_exists(path))
    if not _rename(folder, path, _EXCHANGE):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


_NO_REPLACE, _EXCHANGE = 1, 2


def _rename(one: pathlib.Path, other: pathlib.Path, how: int) -> bool:
    """Renames in one step; False where `other` is there and must not be, or is not and must."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_fdcwd = -100
    if hasattr(libc, "renameat2"):
        if libc.renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), how) == 0:
            return True
        if ctypes.get_errno() == (errno.EEXIST if how == _NO_REPLACE else errno.ENOENT):
            return False
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):  # neither: the file system cannot do it
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
    if os.path.lexists(other) == (how == _NO_REPLACE):
        return False
    if how == _NO_REPLACE:
        one.rename(other)
        return True
    aside = one.with_name(f"{one.name}.old")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)
    return True


def _exists(path: pathlib.Path) -> str:
    return f"{path} exists already: name another folder, or say --overwrite (overwrite=True in Python)."


def check_output(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Raises `OutputError` when `path` may not be written."""
    path = pathlib.Path(path)
    if os.path.lexists(path) and not overwrite:
        raise OutputError(_exists(path))
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file: name a folder.")


def write_saved_model(folder: pathlib.Path, source: Source, module: tf.Module, signatures: Mapping[str, Any]) -> None:
    """Writes a SavedModel with the tags, method names and extra assets of its source."""
    try:
        tf.saved_model.save(module, str(folder), signatures=dict(signatures))
    except (AssertionError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise OutputError(f"TensorFlow cannot save {source.name}: {first_line(error)}") from error
    _keep_labels(folder, source)
    if source.extra is not None:
        shutil.copytree(source.extra, folder / source.extra.name)


def _keep_labels(folder: pathlib.Path, source: Source) -> None:
    """TensorFlow always writes the tag "serve" and the method name of Predict."""
    if not source.method_names and set(source.tags) == {"serve"}:
        return
    file, proto = folder / "saved_model.pb", saved_model_pb2.SavedModel()
    proto.ParseFromString(file.read_bytes())
    for meta_graph in proto.meta_graphs:
        del meta_graph.meta_info_def.tags[:]
        meta_graph.meta_info_def.tags.extend(source.tags)
        for key, name in source.method_names.items():
            if key in meta_graph.signature_def:
                meta_graph.signature_def[key].method_name = name
    file.write_bytes(proto.SerializeToString(deterministic=True))
    (folder / "fingerprint.pb").unlink(missing_ok=True)  # it is of the proto before, and optional


def write_graph_def(folder: pathlib.Path, source: Source, graph: Graph) -> None:
    """Writes frozen_graph.pb, whose inputs and outputs are nodes of the names that the signature has.

    Raises:
        OutputError: the model needs resources that a GraphDef cannot hold.
    """
    kept = [node.name for node in graph.order() if node.external is not None]
    if kept:
        raise OutputError(
            f"A GraphDef cannot hold tables or variables: choose another format. Received: {', '.join(kept[:3])} in {source.name}"
        )
    result = graph.copy()
    for key, tensor in result.inputs.items():
        _give_name(result, tensor.node, source.names.get(key, key))
    for key, tensor in result.outputs.items():
        name = source.names.get(key, key)
        holder = result.nodes.get(name)
        if holder is tensor.node and tensor.index == 0:
            continue
        if holder is not None:
            result.take_name(holder)
        assert tensor.dtype is not None
        result.outputs[key] = result.add("Identity", [tensor], name=name, attrs={"T": tensor.dtype}).out
    try:
        content = result.to_graph_def().SerializeToString(deterministic=True)
    except (ValueError, MemoryError, EncodeError) as error:
        raise OutputError(
            f"A GraphDef cannot hold {source.name}: choose another format. Received: {first_line(error)}"
        ) from error
    (folder / "frozen_graph.pb").write_bytes(content)


def _give_name(graph: Graph, node: Node, name: str) -> None:
    if node.name == name:
        return
    if name in graph.nodes:
        graph.take_name(graph.nodes[name])
    graph.rename(node, name)
