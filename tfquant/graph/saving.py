"""From a graph to a SavedModel with the interface of its source, in one atomic step."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow as tf
from google.protobuf.message import EncodeError
from tensorflow.core.protobuf import saved_model_pb2

from tfquant.errors import OutputError
from tfquant.graph.execution import Executable, executable
from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.graph.loading import Endpoint, Source, first_line
from tfquant.unfinished import prefix, remove_stale


def to_module(source: Source, graph: Graph) -> tuple[tf.Module, dict[str, Any]]:
    """A module with the endpoints of `source` computed by `graph`, and its signatures."""
    run = executable(graph)
    module = tf.Module()
    signatures = {key: _signature(source, graph, run, endpoint) for key, endpoint in source.signatures.items()}
    for name, endpoint in source.endpoints.items():
        setattr(module, name, _endpoint(source, graph, run, endpoint))
    handles = list(run.externals)
    for name, other in source.others.items():
        if name.startswith("signature "):
            signatures[name.removeprefix("signature ")] = other
        else:
            setattr(module, name, other)
        for concrete in getattr(other, "concrete_functions", [other]):
            handles += getattr(concrete, "captured_inputs", [])
    # What is saved must be reachable: constants beyond the size of a GraphDef, tables, assets, the variables of what stays float.
    owners = {id(handle): source.owners[id(handle)] for handle in handles if id(handle) in source.owners}
    module.resources = [*(variable for variable, _ in run.variables), *owners.values(), *source.initializers]
    return module, {key: signatures[key] for key in sorted(signatures)}


def _caller(source: Source, graph: Graph, run: Executable, endpoint: Endpoint) -> Callable[[list[Any]], list[Any]]:
    shapes = {
        name: spec.shape
        for key in source.signature_keys
        for name, spec in zip(source.signatures[key].outputs, tf.nest.flatten(source.signatures[key].structure), strict=True)
    }

    def call(arguments: list[Any]) -> list[Any]:
        by_name = dict(zip(endpoint.inputs, arguments, strict=True))
        for key in graph.inputs:
            if key not in by_name:  # of another signature: its part of the graph is pruned away
                by_name[key] = _nothing(graph.inputs[key])
        results = dict(zip(graph.outputs, run(*(by_name[key] for key in graph.inputs)), strict=True))
        for name, shape in shapes.items():
            results[name].set_shape(shape)
        return [results[name] for name in endpoint.outputs]

    return call


def _nothing(tensor: Tensor) -> tf.Tensor:
    shape = [size or 0 for size in tensor.shape or ()]
    return tf.zeros(shape, tensor.dtype)


def _signature(source: Source, graph: Graph, run: Executable, endpoint: Endpoint) -> Any:
    call = _caller(source, graph, run, endpoint)
    keywords = endpoint.arguments[1]
    specs = [tf.TensorSpec(keywords[key].shape, keywords[key].dtype, name=key) for key in endpoint.inputs]
    names = sorted(endpoint.structure)

    @tf.function(input_signature=specs, autograph=False)
    def signature(*arguments: Any) -> dict[str, Any]:
        return dict(zip(names, call(list(arguments)), strict=True))

    return signature


def _endpoint(source: Source, graph: Graph, run: Executable, endpoint: Endpoint) -> Any:
    call = _caller(source, graph, run, endpoint)

    def served(*args: Any, **kwargs: Any) -> Any:
        return tf.nest.pack_sequence_as(endpoint.structure, call(tf.nest.flatten((args, kwargs))))

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
        if path.exists():
            _exchange(folder, path)
        else:
            folder.rename(path)
    except (OSError, tf.errors.OpError) as error:
        raise OutputError(f"Cannot write {path}: {first_line(error)}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exchange(one: pathlib.Path, other: pathlib.Path) -> None:
    """Swaps two folders, in one step where the system can: `other` exists at any moment."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_fdcwd, rename_exchange = -100, 2
    if hasattr(libc, "renameat2"):
        if libc.renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):  # neither: the file system cannot swap
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
    aside = one.with_name(f"{one.name}.old")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


def check_output(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Raises `OutputError` when `path` may not be written."""
    path = pathlib.Path(path)
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} exists already: name another folder, or say --overwrite (overwrite=True in Python).")
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file: name a folder.")


def write_saved_model(folder: pathlib.Path, source: Source, module: tf.Module, signatures: Mapping[str, Any]) -> None:
    """Writes a SavedModel with the tags, method names and extra assets of its source."""
    tf.saved_model.save(module, str(folder), signatures=dict(signatures))
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
        _rename(result, tensor.node, source.names.get(key, key))
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


def _rename(graph: Graph, node: Node, name: str) -> None:
    if node.name == name:
        return
    if name in graph.nodes:
        graph.take_name(graph.nodes[name])
    del graph.nodes[node.name]
    node.name = name
    graph.nodes[name] = node
