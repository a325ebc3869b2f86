"""Where the time of a model goes, by type of op."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from tfquant.bench.interleave import Worker
from tfquant.bench.measure import Entry
from tfquant.tables import table

_LEAST_SHARE = 0.01  # ops below go together


@dataclasses.dataclass(frozen=True)
class Profile:
    """What the ops of a model took.

    Attributes:
        entry: what was run.
        ms: median milliseconds of a run in a session with one inter-op thread, while nobody looked on.
        ops: by type of op, (how many were run, milliseconds of them all), the largest first. Types are those of the optimized
            graph: `_Mkl...` are oneDNN's.
    """

    entry: Entry
    ms: float
    ops: dict[str, tuple[int, float]]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.entry.model.name,
            "batch_size": self.entry.batch,
            "intra_op_threads": self.entry.setting.intra_op,
            "median_ms": self.ms,
            "ops": {op: {"count": count, "ms": ms} for op, (count, ms) in self.ops.items()},
        }


def profile(entry: Entry, seconds: float) -> Profile:
    """Runs a model for so long, in a process of its own, and asks TensorFlow for the times of its ops.

    Raises:
        WorkerError: it cannot be loaded or run.
    """
    model = entry.model
    options = {"model": model.path, "signature_key": model.signature_key, "data": model.data}
    command = [sys.executable, "-m", "tfquant.bench.trace", json.dumps(options)]
    with Worker(command, {"TF_CPP_MIN_LOG_LEVEL": "3", **entry.setting.variables}, model.name) as worker:
        answer = worker.ask({"batch": entry.batch, "seconds": seconds})
    ops = {op: (int(count), float(ms)) for op, (count, ms) in answer["ops"].items()}
    return Profile(entry, float(answer["ms"]), dict(sorted(ops.items(), key=lambda item: -item[1][1])))


def profile_table(profile: Profile) -> list[str]:
    """Lines of a table: what takes a hundredth of the time or more, all other ops, and what is no op's time."""
    total = sum(ms for _, ms in profile.ops.values())
    whole = max(total, profile.ms)
    large = {op: facts for op, facts in profile.ops.items() if facts[1] >= _LEAST_SHARE * whole}
    small = [facts for op, facts in profile.ops.items() if op not in large]
    rows = [(op, str(count), ms) for op, (count, ms) in large.items()]
    rows.append(("other ops", str(sum(count for count, _ in small)), sum(ms for _, ms in small)))
    rows.append(("between the ops", "", whole - total))
    heading = (f"{profile.entry.model.name}, batch {profile.entry.batch}", "Ops", "ms", "Share")
    return table([heading, *((op, count, f"{ms:.3f}", f"{100 * ms / whole:.1f}%") for op, count, ms in rows)])
