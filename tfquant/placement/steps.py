"""Times of single ops inside of whole graphs, by TensorFlow's own step statistics, in a process of its own.

    python -m tfquant.placement.steps FOLDER

FOLDER/job.json names the graphs, the batch sizes and the threads; FOLDER/times.json is written. A process of its own, because the
size of TensorFlow's thread pool is set once per process, and because a kernel that crashes must not take its caller along.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_JOB, _TIMES = "job.json", "times.json"
_LEAST_RUNS, _WARM_UPS = 5, 3


@dataclasses.dataclass(frozen=True)
class Times:
    """What one graph took at one batch size, medians.

    Attributes:
        total: milliseconds of a call, without the cost of looking on.
        nodes: microseconds of each op by its name; ops that TensorFlow made itself have names of their own.
    """

    total: float
    nodes: Mapping[str, float]


class StepsError(Exception):
    """The graphs could not be run; the message says why."""


def measure(
    graphs: Mapping[str, bytes],
    outputs: Mapping[str, Sequence[str]],
    samples: Mapping[str, np.ndarray],
    batch_sizes: Sequence[int],
    threads: int,
    seconds: float,
) -> dict[tuple[str, int], Times]:
    """Runs graphs in turns and times their ops.

    Args:
        graphs: serialized GraphDefs by name, all with the same placeholders.
        outputs: names of the nodes to run, by the name of the graph.
        samples: by placeholder ("x:0"), arrays (N, ...) whose rows are repeated to the batch size; scalars as they are.
        batch_sizes: the batches to run; 0 stands for the samples as they are.
        threads: intra-op threads.
        seconds: for each batch size.

    Returns:
        By (name of the graph, batch size).

    Raises:
        StepsError: the process failed.
    """
    with tempfile.TemporaryDirectory(prefix="tfquant_") as name:
        folder = pathlib.Path(name)
        for index, content in enumerate(graphs.values()):
            (folder / f"{index}.pb").write_bytes(content)
        arrays = list(samples.items())
        np.savez(folder / "samples.npz", **{str(index): array for index, (_, array) in enumerate(arrays)})  # type: ignore[arg-type]
        job = {
            "graphs": [[graph, list(outputs[graph])] for graph in graphs],
            "feeds": [feed for feed, _ in arrays],
            "batch_sizes": list(batch_sizes),
            "threads": threads,
            "seconds": seconds,
        }
        (folder / _JOB).write_text(json.dumps(job))
        root = pathlib.Path(__file__).resolve().parents[2]
        paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "tfquant.placement.steps", name]
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise StepsError(lines[-1].strip() if lines else f"the process ended with {done.returncode}")
        found = json.loads((folder / _TIMES).read_text())
    return {(entry["graph"], entry["batch_size"]): Times(entry["total"], entry["nodes"]) for entry in found}


def main(folder: pathlib.Path) -> None:
    """The process: reads the job, writes the times."""
    import tensorflow as tf

    job = json.loads((folder / _JOB).read_text())
    with np.load(folder / "samples.npz") as archive:
        samples = {feed: archive[str(index)] for index, feed in enumerate(job["feeds"])}
    config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=job["threads"], inter_op_parallelism_threads=1)
    sessions = {}
    for index, (name, outputs) in enumerate(job["graphs"]):
        content = tf.compat.v1.GraphDef.FromString((folder / f"{index}.pb").read_bytes())
        with tf.Graph().as_default() as graph:
            tf.graph_util.import_graph_def(content, name="")
        present = {node.name for node in content.node}
        feeds = [feed for feed in job["feeds"] if feed.partition(":")[0] in present]
        fetches = [graph.get_operation_by_name(output) for output in outputs]
        sessions[name] = _Session(tf.compat.v1.Session(graph=graph, config=config), fetches, feeds)
    entries = []
    for size in job["batch_sizes"]:
        sized = {key: _resized(value, size) for key, value in samples.items()}
        for name, times in _timed(sessions, sized, job["seconds"]).items():
            entries.append({"graph": name, "batch_size": size, **dataclasses.asdict(times)})
    (folder / _TIMES).write_text(json.dumps(entries))


def _resized(value: np.ndarray, size: int) -> np.ndarray:
    return np.resize(value, (size, *value.shape[1:])) if value.ndim and size else value


@dataclasses.dataclass(frozen=True)
class _Session:
    session: Any
    fetches: Sequence[Any]
    feeds: Sequence[str]

    def run(self, samples: Mapping[str, np.ndarray], **options: Any) -> None:
        self.session.run(self.fetches, {feed: samples[feed] for feed in self.feeds}, **options)


def _timed(sessions: Mapping[str, _Session], samples: Mapping[str, np.ndarray], seconds: float) -> dict[str, Times]:
    import tensorflow as tf

    traced = tf.compat.v1.RunOptions(trace_level=tf.compat.v1.RunOptions.SOFTWARE_TRACE)
    totals: dict[str, list[float]] = {name: [] for name in sessions}
    nodes: dict[str, dict[str, list[float]]] = {name: collections.defaultdict(list) for name in sessions}
    for session in sessions.values():
        for _ in range(_WARM_UPS):
            session.run(samples)
    start, runs = time.perf_counter(), 0
    while runs < _LEAST_RUNS or time.perf_counter() - start < seconds:
        runs += 1
        for name, session in sessions.items():
            begin = time.perf_counter()
            session.run(samples)
            totals[name].append(1e3 * (time.perf_counter() - begin))
            facts = tf.compat.v1.RunMetadata()
            session.run(samples, options=traced, run_metadata=facts)
            for node, spent in _spent(facts).items():
                nodes[name][node].append(spent)
    return {
        name: Times(statistics.median(totals[name]), {node: statistics.median(spent) for node, spent in nodes[name].items()})
        for name in sessions
    }


def _spent(facts: Any) -> dict[str, float]:
    """Microseconds in the kernel of each op."""
    spent: dict[str, float] = collections.defaultdict(float)
    for device in facts.step_stats.dev_stats:
        for entry in device.node_stats:
            spent[entry.node_name.partition(":")[0]] += (entry.op_end_rel_nanos - entry.op_start_rel_nanos) / 1e3
    return spent


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
