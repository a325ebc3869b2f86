"""What the scripts of all sides share: each of them builds a model with its tool, or serves one to be timed.

    python SCRIPT.py build '{"float32": ..., "calibration": ..., "folder": ..., ...}'
    python SCRIPT.py serve '{"model": ..., "data": ..., "threads": 2, ...}'

They run in the environments of their tools, which do not have tfquant, and speak the protocol of tfquant/bench/interleave.py: the
first line tells what was built, or that the model can run. One request more is answered than there: `{"outputs": "FILE.npz",
"batch": 16}` writes what the model computes for the samples of `data`, in whole batches; with `"inputs": "OTHER.npz"` for all
samples of that file.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "tfquant" / "bench"))

import serve  # noqa: E402

Arrays = dict[str, np.ndarray]
Options = Mapping[str, Any]


class Runner:
    """A model that can run; every tool has its own."""

    def prepare(self, arrays: Arrays) -> Any:
        """Inputs by name as the tool takes them without a copy, where it can; this is not timed."""
        return arrays

    def __call__(self, feed: Any) -> Mapping[str, Any]:
        """Outputs by name; this is timed."""
        raise NotImplementedError


def run_tfquant(command: str, output: Path, options: Options, *flags: str) -> str:
    """Runs `python -m tfquant.COMMAND` on the float model and the calibration data; what it prints.

    Raises:
        RuntimeError: it refuses, with its line.
    """
    call = [sys.executable, "-m", f"tfquant.{command}", "--saved_model", options["float32"], "--data", options["calibration"]]
    call += ["--output", str(output), *flags, *shlex.split(options.get("flags", ""))]
    done = subprocess.run(call, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout


def load_arrays(path: str) -> Arrays:
    """The arrays of an .npz, by input name; the first axis is the sample."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def batches(arrays: Arrays, size: int) -> Iterator[Arrays]:
    """All whole batches of a size, and one of repeated samples where they do not make one."""
    count = len(next(iter(arrays.values())))
    for start in range(0, max(size, count - count % size), size):
        yield {name: array[np.arange(start, start + size) % count] for name, array in arrays.items()}


def _pieces(arrays: Arrays, size: int) -> Iterator[Arrays]:
    """All samples in batches of a size, the last of which may be smaller."""
    for start in range(0, len(next(iter(arrays.values()))), size):
        yield {name: array[start : start + size] for name, array in arrays.items()}


class _Feeds:
    """Gives `serve.Server` the samples in batches."""

    MOST = 16

    def __init__(self, runner: Runner, arrays: Arrays) -> None:
        self._runner = runner
        self._arrays = arrays

    def feeds(self, size: int) -> list[Any]:
        return [self._runner.prepare(batch) for _, batch in zip(range(self.MOST), batches(self._arrays, size), strict=False)]


def main(
    build: Callable[[Options], dict[str, Any]] | None = None,
    load: Callable[[Options], Runner] | None = None,
    packages: tuple[str, ...] = (),
) -> None:
    """Runs a script.

    Args:
        build: gets the options, writes into `folder`, which is the current one, and returns options for `load` (or for the next
            script that builds): `model`, and `files` where that is not all that is needed to run it.
        load: gets the options and returns the model.
        packages: distributions whose versions are told.
    """
    command, options = sys.argv[1], json.loads(sys.argv[2])
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer

    def say(answer: Mapping[str, Any]) -> None:
        print(json.dumps(answer), file=out, flush=True)

    versions = [f"{name} {metadata.version(name)}" for name in packages]
    try:
        if command == "build":
            assert build is not None
            os.chdir(options["folder"])  # some tools leave notes in the current folder
            say({"ready": True, "versions": versions, "built": build(options), "peak_megabytes": _peak_megabytes()})
            return
        assert load is not None
        runner, arrays = load(options), load_arrays(options["data"])
    except Exception as error:  # of any library: the reason belongs into the table
        say({"error": _reason(error)})
        return
    server = serve.Server(runner, _Feeds(runner, arrays))
    say({"ready": True, "versions": versions})
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("quit"):
            return
        try:
            if "outputs" in request:
                size = request["batch"]
                parts = _pieces(load_arrays(request["inputs"]), size) if "inputs" in request else batches(arrays, size)
                _write_outputs(runner, parts, request["outputs"])
                say({"outputs": request["outputs"]})
            else:
                say(server.answer(request))
        except Exception as error:
            say({"error": _reason(error)})


def _write_outputs(runner: Runner, parts: Iterable[Arrays], path: str) -> None:
    results = [{key: np.array(value) for key, value in runner(runner.prepare(part)).items()} for part in parts]
    np.savez(path, **{key: np.concatenate([result[key] for result in results]) for key in results[0]})


def _peak_megabytes() -> float:
    """The largest resident memory of this process so far, or of one that it ran."""
    # Not ru_maxrss of this process, which begins at what its parent held.
    lines = Path("/proc/self/status").read_text().splitlines()
    own = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024


def _reason(error: Exception) -> str:
    """An error as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
