"""Every model of keras.applications, and the transformers of models/: quantized by the command line, run by stock TensorFlow.

    python scripts/coverage.py --names MobileNetV2,BertBase --speed
    python scripts/coverage.py --keras tf_keras --docs docs/coverage.md

Each step of a model (building it, `python -m tfquant.calibrate`, running both) has a process of its own and ends with the
model's time limit. A finished model is a line of --json at once, so a run that was ended goes on where it was; --table prints
what is there.
The weights are random, with the statistics of real activations; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from scripts.common import Parser, Row, append_row, markdown, numbers, read_rows
from tfquant.bench.interleave import Worker, WorkerError, race, speedup
from tfquant.machine import cpu_name, usable_cores

LIBRARIES = ("keras", "tf_keras")
KEYS = ("keras", "name")  # of a row
FRESH = 32  # samples that are compared; fewer of large images
COMPARED_AT_A_TIME = 8
CALIBRATED_AT_A_TIME = 4  # the largest images have 600 x 600 pixels, and calibration keeps more in memory than a run
SLOW_MS = 250.0  # float32 models that take longer for one sample are timed at batch 1 alone
LEAST_RUNS = 5
_ROOT = Path(__file__).resolve().parent.parent
_WORKERS = _ROOT / "scripts" / "peers" / "workers"
_SHARE = re.compile(r"Multiply-accumulates in INT8: ([\d.]+)%")
_REST = re.compile(r"  ([\d.]+)% in float: (.*)")


class Deadline:
    """The time that a model has for all its steps."""

    def __init__(self, seconds: float) -> None:
        self._limit = seconds
        self._end = time.monotonic() + seconds

    def worker(self, script: str, command: str, options: Mapping[str, Any]) -> Worker:
        """A step as a process, whose answer must come before the end.

        Raises:
            WorkerError: there is no time left.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise WorkerError(script, f"not finished after {self._limit:g} seconds")
        variables = {"PYTHONPATH": str(_ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
        return Worker([sys.executable, str(_WORKERS / script), command, json.dumps(options)], variables, script, left)


def measure(name: str, options: argparse.Namespace) -> Row:
    """All figures of a model; "reason" says why it failed, and is empty where it did not."""
    row: Row = {"name": name, "keras": options.keras, "input_size": options.input_size, "reason": ""}
    row["machine"] = f"{cpu_name()}, {options.threads} threads"
    folder = (options.output / f"{options.keras}_{name}").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stage = "building"
    try:
        deadline = Deadline(options.timeout)
        row |= _built(name, folder, deadline, options)
        stage = "quantizing"
        row |= _quantized(folder, deadline)
        stage = "running"
        with contextlib.ExitStack() as stack:
            sides = [stack.enter_context(_served(folder, kind, deadline, options.threads)) for kind in ("float32", "model")]
            row |= _compared(sides, folder)
            if options.speed:
                row["speed"] = _timed(sides, options)
    except WorkerError as error:
        row["reason"] = f"{stage}: {error.reason}"
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return row


def _built(name: str, folder: Path, deadline: Deadline, options: argparse.Namespace) -> Row:
    asked = {
        "name": name,
        "keras": options.keras,
        "input_size": options.input_size,
        "samples": options.samples,
        "fresh": FRESH,
        "folder": str(folder),
    }
    with deadline.worker("recipe.py", "build", asked) as worker:
        facts = worker.ready()
    return {**facts["built"], "versions": facts["versions"]}


def _quantized(folder: Path, deadline: Deadline) -> Row:
    """What the command line gives, and what it took: the start of Python and TensorFlow included."""
    asked = {
        "float32": str(folder / "float32"),
        "calibration": str(folder / "calibration.npz"),
        "folder": str(folder),
        "flags": f"--placement table --batch_size {CALIBRATED_AT_A_TIME}",
    }
    start = time.monotonic()
    with deadline.worker("tfquant_calibrate.py", "build", asked) as worker:
        facts = worker.ready()
    report, seconds = facts["built"]["report"], time.monotonic() - start
    share = _SHARE.search(report)
    return {
        "int8_share": float(share[1]) if share else None,
        "rest": [[float(percent), reason] for percent, reason in _REST.findall(report)],
        "seconds": seconds,
        "peak_mb": facts["peak_megabytes"],
        "int8_mb": sum(Path(path).stat().st_size for path in facts["built"]["files"]) / 1e6,
    }


def _served(folder: Path, kind: str, deadline: Deadline, threads: int) -> Worker:
    asked = {"model": str(folder / kind), "data": str(folder / "evaluation.npz"), "threads": threads}
    return deadline.worker("tensorflow_model.py", "serve", asked)


def _compared(sides: Sequence[Worker], folder: Path) -> Row:
    """How close the outputs are on samples that calibration has not seen."""
    from tfquant.verify import fidelity

    outputs = []
    for side, kind in zip(sides, ("float32", "int8"), strict=True):
        path = folder / f"{kind}.npz"
        side.ask({"outputs": str(path), "batch": COMPARED_AT_A_TIME})
        with np.load(path) as file:
            outputs.append({key: file[key] for key in file.files})
    if not all(np.isfinite(values).all() for values in outputs[1].values()):
        raise WorkerError("int8", "its outputs are not finite")
    float32, int8 = outputs
    found = fidelity(lambda _: float32, lambda _: int8, [{}], lambda _: len(next(iter(float32.values()))))
    return {"samples": found.samples, "sqnr": found.sqnr, "agreement": found.agreement, "mean_kl": found.mean_kl}


def _timed(sides: Sequence[Worker], options: argparse.Namespace) -> Row:
    """Medians in milliseconds and their ratio by batch size, both models in turn."""
    found: Row = {}
    slowest = 0.0
    for batch in sorted(options.batch_sizes):
        if batch > 1 and slowest > SLOW_MS:
            break
        float32, int8 = race([(side, {"batch": batch}) for side in sides], options.seconds, LEAST_RUNS)
        found[str(batch)] = {"float32_ms": float32.median, "int8_ms": int8.median, "ratio": speedup(float32, int8)}
        slowest = float32.median
    return found


# -- the table ------------------------------------------------------------------------------------------------------------
def table_lines(rows: Iterable[Row]) -> list[str]:
    """A Markdown table, a line per model, in the order of their names; and the failures by name."""
    ordered = sorted(rows, key=lambda row: (row["keras"], row["name"]))
    done = [row for row in ordered if not row["reason"]]
    batches = sorted({int(batch) for row in done for batch in row.get("speed", ())})
    heading = ["Model", "Keras", "Parameters", "MACs in INT8", "In float", "SQNR", "Top-1", "MB", "Seconds"]
    heading += [f"Batch {batch}, ms" for batch in batches]
    align = ["left"] * 2 + ["right"] * 2 + ["left"] + ["right"] * (len(heading) - 5)
    lines = markdown([heading, *([*_facts(row), *(_speed(row, batch) for batch in batches)] for row in done)], align)
    failed = [f"- {row['name']} ({row['keras']}) {row['reason']}" for row in ordered if row["reason"]]
    return lines + (["", "Failed:", "", *failed] if failed else [])


def _facts(row: Row) -> list[str]:
    return [
        row["name"] + (f" ({row['input_size']} pixels)" if row["input_size"] else ""),
        row["keras"],
        f"{row['parameters'] / 1e6:.1f} M",
        "" if row["int8_share"] is None else f"{row['int8_share']:.2f}%",
        "<br>".join(f"{percent:.2f}% {reason}" for percent, reason in row["rest"][:2]).replace("|", "\\|"),
        f"{row['sqnr']:.1f} dB",
        "" if row["agreement"] is None else f"{row['agreement']:.0f}%",
        f"{4 * row['parameters'] / 1e6:.1f} -> {row['int8_mb']:.1f}",
        f"{row['seconds']:.0f}",
    ]


def _speed(row: Row, batch: int) -> str:
    found = row.get("speed", {}).get(str(batch))
    return f"{found['float32_ms']:.1f} -> {found['int8_ms']:.1f} ({found['ratio']:.2f}x)" if found else ""


_PAGE = """# Coverage

{done} of {all} models were quantized by `python -m tfquant.calibrate` and run by stock TensorFlow. Made with

{commands}

({machines}).

- **In float**: multiply-accumulates that did not become INT8, with the reason that the tool gives.
- **SQNR, Top-1** (the same largest output): against float32 on samples that calibration has not seen. Nothing is downloaded, so
  the weights are random: deep in such a network all images look much alike, and its classifier, scaled to tell them apart,
  enlarges the rounding errors as well. Trained networks lose far less (`scripts/accuracy.py`).
- **MB**: the float32 weights, and the INT8 model on disk. **Seconds**: of the command, the start of TensorFlow included.
- **ms**: median of a run, float32 and INT8 in turn; the ratio is the median of those of the rounds.

{table}
"""


def document(rows: Sequence[Row]) -> str:
    """The page of the documentation."""
    done = [row for row in rows if not row["reason"]]
    speed = " --speed" if any("speed" in row for row in done) else ""
    libraries = sorted({row["keras"] for row in rows})
    return _PAGE.format(
        done=len(done),
        all=len(rows),
        commands="\n".join(f"    python scripts/coverage.py --keras {library}{speed}" for library in libraries),
        machines="; ".join(dict.fromkeys(f"{', '.join(row['versions'])} on {row['machine']}" for row in done)),
        table="\n".join(table_lines(rows)),
    )


# -- the command ----------------------------------------------------------------------------------------------------------
def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="coverage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", default="", help="of models, with commas between (default: all)")
    parser.add_argument("--keras", choices=LIBRARIES, default="keras", help="whose models they are (default: %(default)s)")
    parser.add_argument("--input_size", type=int, help="height and width of images (default: each model's own)")
    parser.add_argument("--samples", type=int, default=8, help="to calibrate on (default: %(default)s)")
    parser.add_argument("--speed", action="store_true", help="time both models, in turn")
    parser.add_argument("--batch_sizes", type=numbers, default=[1, 16], help="of --speed (default: 1,16)")
    parser.add_argument("--seconds", type=float, default=5, help="of --speed per model and batch size (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=min(2, usable_cores()), help="of running models (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=360, help="seconds that a model may take until it is timed (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("work/coverage"), help="where models are made (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the models there")
    parser.add_argument("--json", type=Path, help="file of finished models, a line each (default: coverage.jsonl in --output)")
    parser.add_argument("--again", action="store_true", help="measure models that are in it again")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    parser.add_argument("--docs", type=Path, help="file for the table as a page, docs/coverage.md for example")
    options = parser.parse_args(arguments)
    for name in ("input_size", "samples", "seconds", "threads", "timeout"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"argument --{name}: must be above 0. Received: {value}")
    options.json = options.json or options.output / "coverage.jsonl"
    options.names = [] if options.table else _names(parser, options)
    return options


def _names(parser: Parser, options: argparse.Namespace) -> list[str]:
    """The names that were asked for, as they are spelled."""
    from models import applications, transformers

    library = importlib.import_module(options.keras)
    known = [*applications.names(library), *transformers.SIZES]
    if not options.names:
        return known
    exact = {name.lower(): name for name in known}
    if unknown := [name for name in options.names.split(",") if name.lower() not in exact]:
        parser.error(f"argument --names: {options.keras} has no {unknown[0]!r}; it has {', '.join(known)}")
    return [exact[name.lower()] for name in options.names.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what is not measured yet and prints the table; returns 1 where a model failed."""
    options = parse(arguments)
    finished = read_rows(options.json, *KEYS)
    todo = [name for name in options.names if options.again or (options.keras, name) not in finished]
    for count, name in enumerate(todo, 1):
        print(f"== {name} ({count} of {len(todo)})", file=sys.stderr, flush=True)
        row = measure(name, options)
        append_row(options.json, row)
        if row["reason"]:
            print(f"   {row['reason']}", file=sys.stderr, flush=True)
    rows = list(read_rows(options.json, *KEYS).values())
    print(*table_lines(rows), sep="\n")
    if options.docs:
        options.docs.parent.mkdir(parents=True, exist_ok=True)
        options.docs.write_text(document(rows))
    return 1 if any(row["reason"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
