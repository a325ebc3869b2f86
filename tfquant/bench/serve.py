"""A worker for `interleave`: runs a SavedModel or a frozen GraphDef in stock TensorFlow.

    python -P serve.py '{"model": "int8", "signature_key": "serving_default", "data": null}'

It is run as a script and imports nothing of tfquant: what is timed is what a server runs. Threads and other settings of the
runtime come by the environment (TF_NUM_INTRAOP_THREADS, TF_NUM_INTEROP_THREADS ...).
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

Feed = dict[str, Any]  # tensors by input name
_WARM_RUNS, _WARM_SECONDS, _MOST_WARM_RUNS = 3, 0.3, 50
_MOST_FEEDS = 16


class Refusal(Exception):
    """What cannot be run, as one line."""


class Model:
    """A function of tensors by name.

    Args:
        path: folder of a SavedModel, or of numbered versions of it, or of a frozen_graph.pb, or such a file.
        signature_key: which signature; a GraphDef has none.

    Attributes:
        inputs: name to `tf.TensorSpec`.

    Raises:
        Refusal: there is no such model or signature, or TensorFlow cannot load it.
    """

    def __init__(self, path: str, signature_key: str) -> None:
        found = find(pathlib.Path(path))
        import tensorflow  # noqa: F401  an installation that is at fault is not the model's fault

        try:
            self._function, self.inputs = _graph(found) if found.is_file() else self._signature(found, signature_key)
        except Refusal:
            raise
        except Exception as error:  # TensorFlow raises all kinds on damaged files
            raise Refusal(f"TensorFlow cannot load {path}: {first_line(error)}") from error

    def _signature(self, path: pathlib.Path, key: str) -> tuple[Callable[..., Any], dict[str, Any]]:
        import tensorflow as tf

        self._loaded = tf.saved_model.load(str(path))  # owns the variables
        if key not in self._loaded.signatures:
            known = ", ".join(sorted(self._loaded.signatures)) or "none"
            raise Refusal(f"{path} has no signature {key!r}; it has {known}: name one with --signature_key.")
        function = self._loaded.signatures[key]
        return function, dict(function.structured_input_signature[1])

    def __call__(self, feed: Feed) -> None:
        self._function(**feed)


def find(path: pathlib.Path) -> pathlib.Path:
    """The folder of a SavedModel, or the file of a GraphDef."""
    if path.suffix == ".pb" and path.is_file() and path.name != "saved_model.pb":
        return path
    if path.is_dir():
        if (path / "saved_model.pb").is_file():
            return path
        if (path / "frozen_graph.pb").is_file():
            return path / "frozen_graph.pb"
        versions = [entry.name for entry in path.iterdir() if entry.name.isdecimal() and (entry / "saved_model.pb").is_file()]
        if versions:  # TensorFlow Serving takes the highest
            return path / max(versions, key=int)
    kinds = "a SavedModel (saved_model.pb) {} a frozen GraphDef (frozen_graph.pb)."
    if not path.exists():
        raise Refusal(f"{path} does not exist; wanted is {kinds.format('or')}")
    raise Refusal(f"{path} {'holds' if path.is_dir() else 'is'} neither {kinds.format('nor')}")


def _graph(path: pathlib.Path) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function from the placeholders of a GraphDef to the nodes that nothing reads."""
    import tensorflow as tf

    proto = tf.compat.v1.GraphDef()
    proto.ParseFromString(path.read_bytes())
    wrapped = tf.compat.v1.wrap_function(lambda: tf.import_graph_def(proto, name=""), [])
    feeds, fetches = ends(wrapped.graph.get_operations())
    if not fetches:
        raise Refusal(f"{path} has no output: all that its nodes compute is read by others.")
    pruned = wrapped.prune(feeds, fetches)
    specs = {tensor.op.name: tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in feeds}
    return (lambda **feed: pruned(*(feed[name] for name in specs))), specs


def ends(nodes: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The placeholders among the operations of a graph, and the tensors that nothing reads."""
    feeds = [node.outputs[0] for node in nodes if node.type == "Placeholder"]
    return feeds, [tensor for node in nodes for tensor in node.outputs if not _is_read(node) and node.type != "Placeholder"]


def _is_read(node: Any) -> bool:
    return any(tensor.consumers() for tensor in node.outputs)


class Inputs:
    """Batches for the inputs of a model: of the data, or random.

    Args:
        specs: name to `tf.TensorSpec`. Where any input has an unknown first dimension, that one is the batch.
        data: path of an .npz by input name or an .npy for one input, the first axis is the sample; None for random values.

    Raises:
        Refusal: the data do not fit, or there are none where they are needed.
    """

    def __init__(self, specs: Mapping[str, Any], data: str | None) -> None:
        self._specs = dict(specs)
        self._arrays = _load(pathlib.Path(data), self._specs) if data else {}
        first = {spec.shape[0] for spec in specs.values() if spec.shape.rank}
        self.fixed_batch: int | None = None
        if first and None not in first and len(first) == 1:
            (self.fixed_batch,) = first

    def feeds(self, batch: int) -> list[Feed]:
        """Batches of one size, to be run in turn: all of the data, up to 16 batches, or one of random values."""
        import tensorflow as tf

        if self.fixed_batch is not None and batch != self.fixed_batch:
            raise Refusal(f"the signature takes batches of {self.fixed_batch} alone. Received: a batch size of {batch}")
        counts = [len(array) for name, array in self._arrays.items() if self._specs[name].shape.rank]
        count = min(_MOST_FEEDS, max(1, max(counts, default=0) // batch))
        rng = np.random.default_rng(0)
        feeds = [{name: self._value(name, batch, place, rng) for name in self._specs} for place in range(count)]
        return [{name: tf.constant(value) for name, value in feed.items()} for feed in feeds]

    def _value(self, name: str, batch: int, place: int, rng: np.random.Generator) -> Any:
        spec = self._specs[name]
        if name in self._arrays:
            array = self._arrays[name]
            if not spec.shape.rank:
                return array.reshape(-1)[0]
            rows = spec.shape[0] or batch
            return array[np.arange(place * rows, (place + 1) * rows) % len(array)]
        if spec.shape.rank is None or None in spec.shape[1:]:
            raise Refusal(f"input {name!r} has no known size, its shape is {spec.shape}: give --data.")
        return _random(name, spec.dtype, [size or batch for size in spec.shape], rng)


def _random(name: str, dtype: Any, shape: list[int], rng: np.random.Generator) -> Any:
    """Normal values for floats, all bytes for pixels, and 0 or 1 for integers: ids that any table has."""
    if dtype.is_floating or dtype.is_complex:
        return rng.normal(size=shape).astype(dtype.as_numpy_dtype)
    if dtype.is_integer or dtype.is_bool:
        high = 256 if dtype.name == "uint8" else 2
        return rng.integers(0, high, size=shape).astype(dtype.as_numpy_dtype)
    raise Refusal(f"input {name!r} is {dtype.name}, of which there are no random values: give --data.")


def _load(path: pathlib.Path, specs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of the inputs, checked."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files} if isinstance(file, np.lib.npyio.NpzFile) else {}
    except (AttributeError, TypeError):  # an array is no context
        arrays = {}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise Refusal(f"--data cannot be read: {first_line(error)}") from error
    if not arrays and len(specs) == 1:
        arrays = {next(iter(specs)): np.load(path)}
    if missing := sorted(set(specs) - set(arrays)):
        raise Refusal(f"--data lacks the inputs {', '.join(missing)}; it holds {', '.join(sorted(arrays)) or 'one array'}.")
    for name, spec in specs.items():
        _check(name, spec, arrays[name])
    text = {name for name, spec in specs.items() if spec.dtype.name == "string"}
    return {n: arrays[n] if n in text else arrays[n].astype(specs[n].dtype.as_numpy_dtype, copy=False) for n in specs}


def _check(name: str, spec: Any, array: np.ndarray) -> None:
    wanted = spec.dtype.as_numpy_dtype
    is_text = spec.dtype.name == "string"
    fits = array.dtype.kind in "SUO" if is_text else np.can_cast(array.dtype, wanted, "same_kind")
    rows = not spec.shape.rank or (array.ndim == spec.shape.rank and spec.shape[1:].is_compatible_with(array.shape[1:]))
    if not fits or not rows or not array.size:
        received = f"{array.dtype.name} {list(array.shape)}"
        raise Refusal(f"--data does not fit the input {name!r}, which is {spec.dtype.name} {spec.shape}. Received: {received}")


class Server:
    """Answers requests for times."""

    def __init__(self, model: Callable[[Feed], None], inputs: Inputs) -> None:
        self._model = model
        self._inputs = inputs
        self._feeds: dict[int, list[Feed]] = {}
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self._warm: set[tuple[int, int]] = set()

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """`{"ms": [...]}` of `runs` single runs of `batch` samples, `streams` at a time, in the order in which they began."""
        batch, streams = int(request["batch"]), int(request.get("streams", 1))
        if batch not in self._feeds:
            self._feeds[batch] = self._inputs.feeds(batch)
        if (batch, streams) not in self._warm:
            start, runs = time.perf_counter(), 0
            while runs < _WARM_RUNS or (time.perf_counter() - start < _WARM_SECONDS and runs < _MOST_WARM_RUNS):
                self._times(batch, streams, streams)
                runs += 1
            self._warm.add((batch, streams))
        return {"ms": self._times(batch, streams, int(request["runs"]))}

    def _times(self, batch: int, streams: int, runs: int) -> list[float]:
        feeds = itertools.cycle(self._feeds[batch])
        work = iter([next(feeds) for _ in range(runs)])
        if streams == 1:
            return [took for _, took in self._stream(work)]
        lock, together = threading.Lock(), threading.Barrier(streams)
        pool = self._pools.setdefault(streams, ThreadPoolExecutor(streams))

        def stream() -> list[tuple[float, float]]:
            together.wait()
            return list(self._stream(_locked(work, lock)))

        futures = [pool.submit(stream) for _ in range(streams)]
        return [took for _, took in sorted(pair for future in futures for pair in future.result())]

    def _stream(self, work: Iterator[Feed]) -> Iterator[tuple[float, float]]:
        """(begin in seconds, milliseconds) of each run."""
        for feed in work:
            begin = time.perf_counter()
            self._model(feed)
            yield begin, (time.perf_counter() - begin) * 1e3


def _locked(work: Iterator[Feed], lock: threading.Lock) -> Iterator[Feed]:
    while True:
        with lock:
            feed = next(work, None)
        if feed is None:
            return
        yield feed


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def main() -> None:
    options = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer

    def say(answer: Mapping[str, Any]) -> None:
        print(json.dumps(answer), file=out, flush=True)

    try:
        model = Model(options["model"], options["signature_key"])
        inputs = Inputs(model.inputs, options.get("data"))
    except Refusal as error:
        say({"error": str(error)})
        return
    import tensorflow as tf

    server = Server(model, inputs)
    specs = {name: [spec.dtype.name, str(spec.shape)] for name, spec in model.inputs.items()}
    say({"ready": True, "tensorflow": tf.__version__, "inputs": specs, "fixed_batch": inputs.fixed_batch})
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("quit"):
            return
        try:
            say(server.answer(request))
        except Refusal as error:
            say({"error": str(error)})
        except Exception as error:  # TensorFlow's errors of a run
            say({"error": f"TensorFlow cannot run {options['model']}: {first_line(error)}"})


if __name__ == "__main__":
    main()
