"""ONNX files in OpenVINO's CPU plugin, in a process of its own: what they compute."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tfquant import machine
from tfquant.bench.interleave import Worker, WorkerError
from tfquant.exporters.onnx.running import Load, Run

_WORKER = pathlib.Path(__file__).with_name("openvino_worker.py")


class CannotRun(WorkerError):
    """OpenVINO does not take a file, or cannot run it: `reason` says why."""


def why_not() -> str | None:
    """Why files cannot be run in it here, in a line; None where they can."""
    if importlib.util.find_spec("openvino") is None:
        return "To run the file in OpenVINO here, install it: pip install openvino"
    if machine.has_vnni() is False:
        return "Not run in OpenVINO: sums of 8-bit products may overflow on a CPU without VNNI."
    return None


def runtime() -> str:
    """Its name and version."""
    return f"OpenVINO {importlib.metadata.version('openvino')}"


@contextlib.contextmanager
def process() -> Iterator[Load]:
    """What makes functions of files as long as the context lasts: with float ops in float32, and of any batch size.

    Raises:
        CannotRun: of the functions.
    """
    with tempfile.TemporaryDirectory() as name, Worker([sys.executable, "-P", str(_WORKER)], label=runtime()) as worker:
        folder = pathlib.Path(name)
        feeds_path, found_path = folder / "feeds.npz", folder / "found.npz"

        def load(content: bytes) -> Run:
            path = folder / f"{len(list(folder.glob('*.onnx')))}.onnx"
            path.write_bytes(content)

            def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
                arrays: dict[str, Any] = {str(number): value for number, value in enumerate(feeds.values())}
                np.savez(feeds_path, **arrays)
                request = {"model": str(path), "feeds": str(feeds_path), "names": list(feeds), "found": str(found_path)}
                try:
                    told = worker.ask(request)["names"]
                except WorkerError as error:
                    raise CannotRun(error.label, error.reason) from error
                with np.load(found_path) as found:
                    return {name: found[str(number)] for number, name in enumerate(told)}

            return run

        yield load
