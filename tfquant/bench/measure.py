"""Models against each other: which processes run, what they are asked, what is told of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tfquant.bench.interleave import Times, Worker, race, speedup, throughput_ratio
from tfquant.bench.settings import Setting
from tfquant.machine import cpu_flags, cpu_name, has_vnni, usable_cores
from tfquant.progress import progress
from tfquant.tables import table

_SERVE = pathlib.Path(__file__).with_name("serve.py")
_TELLING = ("TF_", "ONEDNN_", "DNNL_", "OMP_", "KMP_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to run.

    Attributes:
        name: in tables.
        path: folder of a SavedModel, of numbered versions of it, or of a frozen_graph.pb, or such a file.
        signature_key: of a SavedModel.
        data: path of an .npz or .npy with its inputs; None for random ones.
    """

    name: str
    path: str
    signature_key: str = "serving_default"
    data: str | None = None

    def start(self, setting: Setting, label: str = "") -> Worker:
        """A process that runs it; the name is its label where none is given.

        Raises:
            WorkerError: no process can be started.
        """
        options = {"model": self.path, "signature_key": self.signature_key, "data": self.data}
        # -P: the folder of the script is none to import from, nor is what lies in it part of the model.
        command = [sys.executable, "-P", str(_SERVE), json.dumps(options)]
        quiet = {"TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3")}
        return Worker(command, quiet | setting.variables, label or self.name)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is measured: a model under a setting of the runtime, with batches of a size, so many streams at a time."""

    model: Model
    setting: Setting
    batch: int
    streams: int = 1

    @property
    def request(self) -> dict[str, int]:
        return {"batch": self.batch, "streams": self.streams}


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured.

    Attributes:
        entry: what it is of.
        times: of its runs.
        speedup: how many times faster a run is than one of what it is compared with.
        throughput_ratio: how many times the samples per second.
    """

    entry: Entry
    times: Times
    speedup: float
    throughput_ratio: float

    def to_json(self) -> dict[str, Any]:
        times, setting = self.times, self.entry.setting
        return {
            "model": self.entry.model.name,
            "path": self.entry.model.path,
            "batch_size": self.entry.batch,
            "streams": self.entry.streams,
            "intra_op_threads": setting.intra_op,
            "inter_op_threads": setting.inter_op,
            "env": dict(setting.env),
            "runs": len(times.ms),
            "rounds": len(times.rounds),
            "median_ms": times.median,
            "p90_ms": times.percentile(90),
            "p99_ms": times.percentile(99),
            "samples_per_second": times.throughput,
            "speedup": self.speedup,
            "throughput_ratio": self.throughput_ratio,
        }


def measure(races: Sequence[Sequence[Entry]], seconds: float) -> tuple[list[list[Result]], str]:
    """Runs the entries of each race interleaved, and compares them as `compared` says.

    Args:
        races: entries that are compared with each other.
        seconds: of measurement, per entry.

    Returns:
        The results per race, and TensorFlow's version.

    Raises:
        WorkerError: a model cannot be loaded or run.
    """
    with contextlib.ExitStack() as stack:
        processes = {(entry.model, entry.setting): None for entries in races for entry in entries}
        workers = {key: stack.enter_context(key[0].start(key[1])) for key in processes}
        for worker in progress(list(workers.values()), "loading the models", len(workers)):
            worker.ready()
        every = [entry for entries in races for entry in entries]
        for entry in progress(every, "first runs", len(every)):  # what cannot be run is told before minutes were spent
            workers[entry.model, entry.setting].run(entry.request, 1)
        results = [
            compared(entries, race([(workers[entry.model, entry.setting], entry.request) for entry in entries], seconds))
            for entries in progress(races, "measuring", len(races))
        ]
        return results, next(iter(workers.values())).ready()["tensorflow"]


def compared(entries: Sequence[Entry], times: Sequence[Times]) -> list[Result]:
    """The times of a race with their ratios.

    Each entry is compared with the first model's of the same number of threads, or with the very first where there is none.
    Entries of one model alone are all compared with the first.
    """
    is_one_model = len({entry.model for entry in entries}) == 1
    first: dict[int, Times] = {}
    results = []
    for entry, taken in zip(entries, times, strict=True):
        if entry.model == entries[0].model and not is_one_model:
            first.setdefault(entry.setting.intra_op, taken)
        base = first.get(entry.setting.intra_op, times[0])
        results.append(Result(entry, taken, speedup(base, taken), throughput_ratio(base, taken)))
    return results


def results_table(results: Iterable[Result]) -> list[str]:
    """Lines of a table with a row per result."""
    rows: list[tuple[str, ...]] = [
        ("Model", "Batch", "Threads", "Streams", "Median ms", "p90 ms", "p99 ms", "Samples/s", "Speed", "Throughput")
    ]
    for result in results:
        entry, times = result.entry, result.times
        figures = [times.median, times.percentile(90), times.percentile(99)]
        rows.append(
            (
                entry.model.name,
                str(entry.batch),
                str(entry.setting.intra_op),
                str(entry.streams),
                *(f"{figure:.2f}" for figure in figures),
                f"{times.throughput:.1f}",
                f"{result.speedup:.2f}x",
                f"{result.throughput_ratio:.2f}x",
            )
        )
    return table(rows)


def machine_facts(tensorflow: str) -> dict[str, Any]:
    """What one must know of the machine to read the figures."""
    flags = cpu_flags()
    return {
        "cpu": cpu_name(),
        "usable_cores": usable_cores(),
        "vnni": has_vnni(),
        "bf16": bool(flags & {"avx512_bf16", "amx_bf16"}) if flags else None,
        "amx": "amx_int8" in flags if flags else None,
        "tensorflow": tensorflow,
        "python": ".".join(map(str, sys.version_info[:3])),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_TELLING)},
    }
