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
from tensorflow.core.framework import graph_pb2

from tfquant.errors import OutputError
from tfquant.graph.ir import Graph
from tfquant.graph.loading import Endpoint, Source, first_line


def to_function(graph: Graph, graph_def: graph_pb2.GraphDef | None = None) -> Any:
    """A concrete function from the flat inputs of `graph` to its flat outputs, both in the order of the graph's dicts."""
    content = graph_def or graph.to_graph_def()
    # wrap_function keeps the names and needs no Python wrapper for the ops.
    wrapped = tf.compat.v1.wrap_function(lambda: tf.graph_util.import_graph_def(content, name=""), [])
    inputs = [wrapped.graph.get_tensor_by_name(f"{tensor.node.name}:0") for tensor in graph.inputs.values()]
    outputs = [wrapped.graph.get_tensor_by_name(f"{t.node.name}:{t.index}") for t in graph.outputs.values()]
    return wrapped.prune(inputs, outputs)


def to_module(source: Source, graph: Graph) -> tuple[tf.Module, dict[str, Any]]:
    """A module with the endpoints of `source` computed by `graph`, and its signatures."""
    function = to_function(graph)
    module = tf.Module()
    signatures = {key: _signature(source, graph, function, endpoint) for key, endpoint in source.signatures.items()}
    for name, endpoint in source.endpoints.items():
        setattr(module, name, _endpoint(source, graph, function, endpoint))
    for name, other in source.others.items():
        if name.startswith("signature "):
            signatures[name.removeprefix("signature ")] = other
        else:
            setattr(module, name, other)
    if source.others:
        module.original = source.loaded  # what stays float keeps its variables
    return module, {key: signatures[key] for key in sorted(signatures)}


def _caller(source: Source, graph: Graph, function: Any, endpoint: Endpoint) -> Callable[[list[Any]], list[Any]]:
    def call(arguments: list[Any]) -> list[Any]:
        by_name = dict(zip(endpoint.inputs, arguments, strict=True))
        results = dict(zip(graph.outputs, function(*(by_name[key] for key in graph.inputs)), strict=True))
        for key, spec in zip(source.main.outputs, tf.nest.flatten(source.main.structure), strict=True):
            results[key].set_shape(spec.shape)
        return [results[key] for key in endpoint.outputs]

    return call


def _signature(source: Source, graph: Graph, function: Any, endpoint: Endpoint) -> Any:
    call = _caller(source, graph, function, endpoint)
    keywords = endpoint.arguments[1]
    specs = [tf.TensorSpec(keywords[key].shape, keywords[key].dtype, name=key) for key in endpoint.inputs]
    names = sorted(endpoint.structure)

    @tf.function(input_signature=specs, autograph=False)
    def signature(*arguments: Any) -> dict[str, Any]:
        return dict(zip(names, call(list(arguments)), strict=True))

    return signature


def _endpoint(source: Source, graph: Graph, function: Any, endpoint: Endpoint) -> Any:
    call = _caller(source, graph, function, endpoint)

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
        folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
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


def write_saved_model(folder: pathlib.Path, module: tf.Module, signatures: Mapping[str, Any]) -> None:
    tf.saved_model.save(module, str(folder), signatures=dict(signatures))
