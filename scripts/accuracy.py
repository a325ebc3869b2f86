"""How accurate INT8 is by tfquant and by other tools, on real models with real data, all in one run.

    TFQUANT_ASSETS=path python scripts/accuracy.py [case ...] [--docs docs/accuracy.md]
    TFQUANT_ASSETS=path python scripts/accuracy.py --algorithms [--docs docs/algorithms.md]
    TFQUANT_ASSETS=path python scripts/accuracy.py --only float32,tfquant_default --flags "--estimator percentile"

Needs the folder of models and data that TFQUANT_ASSETS names (default ../shared/assets). float32 TensorFlow, tfquant with each
of its presets, OpenVINO with NNCF (presets performance and mixed), TFLite, ONNX Runtime and Neural Compressor get the same
calibration data, each tool in an environment of its own. On all views: mean KL(float32 || INT8) in nats and agreement of the
largest output, with 95% intervals; on the labelled data the metric, and the samples lost and won. A peer is better than tfquant
where the interval of the paired difference of the mean KL lies wholly on its side.

--algorithms prints what each algorithm of tfquant alone, and all together, do to the mean KL instead. A finished row is a line of
--json at once, so a run that was ended goes on where it was; --table prints what is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from scripts import cases
from scripts.cases import Figures, Outputs, Prepared
from scripts.common import Parser, Row, append_row, markdown, read_rows
from scripts.peers.building import Workshop
from scripts.peers.failure import Failure
from scripts.peers.sides import SIDES, Setting, Side
from tfquant.algorithms import ALGORITHMS, PRESETS
from tfquant.bench.interleave import WorkerError
from tfquant.machine import cpu_name, usable_cores
from tfquant.quiet import quiet_start
from tfquant.tables import table

KEYS = ("case", "side")  # of a row
FLOAT, OURS = "float32", "tfquant"
# tfquant's files in the runtimes of others, each with how the names of those begin that it is compared with: of the same runtime.
EXPORTED = {"tfquant_tflite": "tflite", "tfquant_onnxruntime": "onnxruntime", "tfquant_openvino": "openvino"}
_BATCH = 50
# NNCF's statistics are those of batches: on these cases it is closer to float32 with 10 than with single samples.
_NNCF_BATCH = 10
_WELL_BELOW = 0.7  # of the best peer's mean KL


# -- who is compared --------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        name: key on the command line and in the JSON.
        title: in tables.
        side: the scripts that build and run it.
        setting: with which options.
    """

    name: str
    title: str
    side: Side
    setting: Setting


def entries() -> dict[str, Entry]:
    """All that are compared: float32, tfquant, and the others."""
    openvino = {
        setting.build["preset"]: dataclasses.replace(setting, build={**setting.build, "calibration_batch": _NNCF_BATCH})
        for setting in SIDES["openvino"].settings
        if setting.run["precision"] == "f32"
    }
    ours = [_ours(preset, f"--preset {preset}") for preset in PRESETS]
    return {
        entry.name: entry
        for entry in (
            Entry(FLOAT, "float32", SIDES[FLOAT], SIDES[FLOAT].settings[0]),
            *ours,
            *(Entry(name, SIDES[name].title, *_first_of(name)) for name in EXPORTED),
            *(
                Entry(f"openvino_{preset}", f"NNCF + OpenVINO, {preset}", SIDES["openvino"], openvino[preset])
                for preset in openvino
            ),
            *(Entry(name, SIDES[name].title, SIDES[name], SIDES[name].settings[0]) for name in ("tflite", "onnxruntime")),
            Entry("neural_compressor", "Neural Compressor INT8", *_first_of("neural_compressor")),
        )
    }


def _first_of(name: str) -> tuple[Side, Setting]:
    return SIDES[name], SIDES[name].settings[0]


def _ours(name: str, flags: str) -> Entry:
    return Entry(f"{OURS}_{name}", f"tfquant, {name}", SIDES[OURS], Setting(name, {"flags": flags}))


def algorithm_entries() -> dict[str, Entry]:
    """float32, tfquant without any algorithm, with each alone and with all together."""
    chosen = {"none": "--preset fast", **{name: f"--algorithms {name}" for name in ALGORITHMS}}
    chosen["all"] = f"--algorithms {','.join(ALGORITHMS)}"
    ours = [_ours(f"algorithms_{name}", flags) for name, flags in chosen.items()]
    return {FLOAT: entries()[FLOAT], **{entry.name: entry for entry in ours}}


# -- measuring --------------------------------------------------------------------------------------------------------------
class Bench:
    """Measures entries on one case; what its files need is made when the first of them is due.

    Args:
        assets: the module of cases and figures.
        name: of the case.
        options: of the command line.
    """

    def __init__(self, assets: Any, name: str, options: argparse.Namespace) -> None:
        self._assets, self._name, self._options = assets, name, options
        self._case = assets.CASES[name]
        self._folder = (options.output / name).absolute()
        self._prepared: Prepared | None = None

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder / "data", ignore_errors=True)  # gigabytes, made anew in seconds

    def row(self, entry: Entry) -> Row:
        """All figures of an entry; "reason" says why it failed, and is empty where it did not."""
        row: Row = {"case": self._name, "side": entry.name, "title": entry.title, "reason": ""}
        row["machine"] = f"{cpu_name()}, {self._options.threads} threads"
        try:
            return row | self._measured(entry)
        except (Failure, WorkerError) as error:
            reason = error.reason if isinstance(error, WorkerError) else str(error)
            return row | {"reason": reason}

    def _measured(self, entry: Entry) -> Row:
        if self._prepared is None:
            _tell(f"{self._name}: preparing model and data")
            self._prepared = cases.prepare(self._name, self._case, self._folder)
        found, facts = self._run(entry, self._prepared)
        reference = self._reference(self._prepared) if entry.name != FLOAT else found
        figures = cases.judge(self._assets, self._case, self._prepared.labels, reference, found)
        divergences = cases.divergences(self._assets, reference.views, found.views)
        np.save(_divergences_file(self._options.output, self._name, entry.name), divergences)
        return facts | dataclasses.asdict(figures) | {"samples": len(found.views), "labelled": len(found.labelled)}

    def _run(self, entry: Entry, prepared: Prepared) -> tuple[Outputs, Row]:
        """The outputs of an entry, and what building it took."""
        options = self._options
        workshop = Workshop(prepared.model, options.threads, options.environments.absolute(), options.timeout, _tell)
        build = workshop.build(entry.side, entry.setting)
        with workshop.start(entry.side, entry.setting, build) as worker, tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "outputs.npz"

            def outputs(parts: Iterable[Path]) -> np.ndarray:
                arrays = []
                for part in parts:
                    worker.ask({"outputs": str(path), "batch": _BATCH, "inputs": str(part)})
                    with np.load(path) as file:
                        (only,) = file.values()
                        arrays.append(only)
                return np.concatenate(arrays)

            versions = worker.ready()["versions"]
            found = Outputs(outputs(prepared.views), outputs(prepared.labelled))
        if not all(np.isfinite(array).all() for array in found):
            raise Failure("its outputs are not finite")
        if entry.name == FLOAT:
            np.savez(self._folder / "reference.npz", **found._asdict())
        versions = list(dict.fromkeys([*versions, *build.versions]))
        return found, {"seconds": build.seconds, "megabytes": build.megabytes, "versions": versions}

    def _reference(self, prepared: Prepared) -> Outputs:
        """What float32 computes."""
        path = self._folder / "reference.npz"
        if not path.exists():
            self._run(entries()[FLOAT], prepared)
        with np.load(path) as file:
            return Outputs(**{name: file[name] for name in file.files})


def _divergences_file(output: Path, case: str, side: str) -> Path:
    """Where the KL of each view is kept, for paired comparisons."""
    return output / case / f"{side.replace('/', '_')}.npy"


def _tell(line: str) -> None:
    print(f"== {line}", file=sys.stderr, flush=True)


# -- the tables -------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Standing:
    """The rows of one case, compared.

    Attributes:
        case: its name.
        rows: by side, those that failed too.
        better: sides whose KL is less than that of tfquant's row, beyond chance, by the name of that row.
    """

    case: str
    rows: Mapping[str, Row]
    better: Mapping[str, tuple[str, ...]]

    def best_peer(self, side: str = OURS) -> Row | None:
        """The one with the least mean KL of those that a side is compared with."""
        return min((row for name, row in self.done.items() if is_peer(name, side)), key=_kl, default=None)

    @property
    def done(self) -> dict[str, Row]:
        """The rows with figures."""
        return {name: row for name, row in self.rows.items() if not row["reason"]}

    def ratio(self, row: Row) -> float | None:
        """The mean KL of a row over that of the best peer."""
        peer = self.best_peer(row["side"])
        return _kl(row) / _kl(peer) if peer and _kl(peer) > 0 else None


def is_ours(side: str) -> bool:
    return side.startswith(OURS)


def is_peer(name: str, side: str) -> bool:
    """Whether `name` is what `side` is compared with: any other tool, and of a file for another runtime that runtime's own."""
    return not is_ours(name) and name != FLOAT and name.startswith(EXPORTED.get(side, ""))


def _kl(row: Row) -> float:
    return float(row["mean_kl"][0])


def standings(rows: Mapping[tuple[str, str], Row], output: Path) -> list[Standing]:
    """The rows by case, in the order of their names; the KL of each view is read from `output`, where it is kept."""
    by_case: dict[str, dict[str, Row]] = {}
    for (case, side), row in rows.items():
        by_case.setdefault(case, {})[side] = row
    return [Standing(case, _ordered(found), _better(case, found, output)) for case, found in sorted(by_case.items())]


def _ordered(rows: Mapping[str, Row]) -> dict[str, Row]:
    """float32, tfquant, the others, each in the order of `entries`."""
    known = [*entries(), *sorted(rows)]
    known.sort(key=lambda name: (name != FLOAT, not is_ours(name)))
    return {name: rows[name] for name in dict.fromkeys(known) if name in rows}


def _better(case: str, rows: Mapping[str, Row], output: Path) -> dict[str, tuple[str, ...]]:
    kept = {side: _divergences_file(output, case, side) for side, row in rows.items() if not row["reason"] and side != FLOAT}
    values = {side: np.load(path) for side, path in kept.items() if path.exists()}
    return {
        side: tuple(
            peer
            for peer, theirs in values.items()
            if is_peer(peer, side) and len(theirs) == len(ours) and cases.paired(ours, theirs)[2] < 0
        )
        for side, ours in values.items()
        if is_ours(side)
    }


def case_cells(standing: Standing) -> list[list[str]]:
    """A table of one case: a row per side that has figures."""
    cells = [[standing.case, "Mean KL, nats", "/ best peer's", "Agreement, %", "Metric, %", "Lost", "Won", ""]]
    for side, row in standing.done.items():
        if side == FLOAT:
            cells.append([row["title"], "", "", "", f"{row['metric']:.2f}", "", "", ""])
            continue
        ratio = standing.ratio(row)
        cells.append(
            [
                row["title"],
                _interval(row["mean_kl"], 4),
                "" if ratio is None else f"{ratio:.2f}",
                _interval(row["agreement"], 2),
                f"{row['metric']:.2f}",
                str(row["lost"]),
                str(row["won"]),
                _note(standing, side, row),
            ]
        )
    return cells


def _interval(values: Sequence[float], digits: int) -> str:
    value, low, high = (f"{number:.{digits}f}" for number in values)
    return f"{value} [{low}, {high}]"


def _note(standing: Standing, side: str, row: Row) -> str:
    notes = [] if _figures(row).is_chance else ["lost beyond chance"]
    beaten = [standing.rows[ours]["title"] for ours, better in standing.better.items() if side in better]
    return "; ".join(notes + ([f"better than {' and '.join(beaten)}"] if beaten else []))


def _figures(row: Row) -> Figures:
    return Figures(**{field.name: row[field.name] for field in dataclasses.fields(Figures)})


def failures(standing: Standing) -> list[str]:
    """Why sides have no figures, a line each."""
    return [f"{row['title']} on {standing.case}: {row['reason']}" for row in standing.rows.values() if row["reason"]]


def verdicts(found: Sequence[Standing]) -> list[str]:
    """What the rows of tfquant come to over the cases that others have rows of, too, a line each."""
    compared = [standing for standing in found if standing.best_peer() is not None]
    names = dict.fromkeys(side for standing in compared for side in standing.done if is_ours(side))
    return [_verdict(name, [standing for standing in compared if name in standing.done]) for name in names]


def _verdict(name: str, found: Sequence[Standing]) -> str:
    ratios = [ratio for each in found if (ratio := each.ratio(each.rows[name])) is not None]
    peers = [f"{each.rows[peer]['title']} on {each.case}" for each in found for peer in each.better.get(name, ())]
    lost = [each.case for each in found if not _figures(each.rows[name]).is_chance]
    return (
        f"{found[0].rows[name]['title']}: mean KL below the best peer's in {sum(ratio < 1 for ratio in ratios)} of {len(ratios)} "
        f"cases, at most {_WELL_BELOW} of it in {sum(ratio <= _WELL_BELOW for ratio in ratios)}; "
        f"better beyond chance: {', '.join(peers) or 'no peer'}; lost beyond chance: {', '.join(lost) or 'no case'}"
    )


def algorithm_cells(found: Sequence[Standing], names: Iterable[str]) -> list[list[str]]:
    """A row per choice of algorithms, a column per case: the mean KL, and its ratio to that without any."""
    none = f"{OURS}_algorithms_none"
    cells = [["Mean KL, nats", *(standing.case for standing in found)]]
    for name in names:
        row = [name.removeprefix(f"{OURS}_algorithms_")]
        for standing in found:
            figures, base = standing.done.get(name), standing.done.get(none)
            if figures is None:
                row.append("")
            else:
                ratio = f" ({_kl(figures) / _kl(base):.2f})" if base is not None and name != none and _kl(base) > 0 else ""
                row.append(f"{_kl(figures):.4f}{ratio}")
        cells.append(row)
    return cells


_ALGORITHMS_PAGE = """# Algorithms

What each algorithm of tfquant alone, and all together, do to the mean of KL(float32 || INT8) on real models, in nats; in brackets
the ratio to that without any. Made with

    python scripts/accuracy.py --algorithms

({machines}).

{table}
"""

_PAGE = """# Accuracy

INT8 by tfquant and by other tools on real models, with the same calibration data, in one run. Made with

    python scripts/accuracy.py

({machines}).

- **Mean KL**: of KL(float32 || INT8) in nats, and **agreement**: of the largest output with that of float32, both over all
  views of the evaluation data, with 95% intervals. **/ best peer's**: the mean KL over the least among the other tools. tfquant's
  files for other runtimes are held against what these runtimes' own tools make.
- **Metric, lost, won**: on the labelled data; samples that float32 alone, and that INT8 alone gets right. Lost beyond chance:
  lost - won > 2 sqrt(lost + won).
- **better than**: the 95% interval of the paired difference of the mean KL lies wholly on that tool's side.

{tables}

{verdicts}
"""


def _machines(found: Sequence[Standing]) -> str:
    rows = [row for standing in found for row in standing.done.values()]
    versions = dict.fromkeys(version for row in rows for version in row["versions"])
    return "; ".join([*dict.fromkeys(row["machine"] for row in rows), ", ".join(sorted(versions))])


def algorithms_document(found: Sequence[Standing], names: Sequence[str]) -> str:
    """The page of --algorithms."""
    cells = algorithm_cells(found, names)
    lines = markdown(cells, ["left", *["right"] * (len(cells[0]) - 1)])
    return _ALGORITHMS_PAGE.format(machines=_machines(found), table="\n".join(lines))


def document(found: Sequence[Standing]) -> str:
    """The page of the documentation."""
    tables = []
    for standing in found:
        tables += ["", f"## {standing.case}", *markdown(case_cells(standing), ["left", *["right"] * 6, "left"])]
        tables += [line for reason in failures(standing) for line in ("", reason)]
    return _PAGE.format(
        machines=_machines(found),
        tables="\n".join(tables).strip(),
        verdicts="\n".join(f"- {line}" for line in verdicts(found)),
    )


# -- the command ------------------------------------------------------------------------------------------------------------
def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="of assets.py (default: all)")
    parser.add_argument("--only", default="", help=f"sides, with commas between (default: all of {', '.join(entries())})")
    parser.add_argument("--flags", default="", help="of tfquant.calibrate, for one more row of tfquant with these")
    parser.add_argument("--algorithms", action="store_true", help="compare the algorithms of tfquant")
    parser.add_argument("--threads", type=int, default=min(2, usable_cores()), help="of each side (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=1800, help="seconds that a tool may take for one step (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("work/accuracy"), help="where models are kept (default: %(default)s)")
    parser.add_argument(
        "--environments", type=Path, default=Path("work/peers"), help="where the peers are installed (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="file of finished rows, a line each (default: accuracy.jsonl in --output)")
    parser.add_argument("--again", action="store_true", help="measure rows that are in it again")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    parser.add_argument("--docs", type=Path, help="file for the table as a page, docs/accuracy.md for example")
    options = parser.parse_args(arguments)
    if options.timeout <= 0 or options.threads <= 0:
        parser.error("arguments --timeout and --threads: must be above 0")
    options.json = options.json or options.output / "accuracy.jsonl"
    return options


def _chosen(options: argparse.Namespace) -> dict[str, Entry]:
    """The entries that were asked for.

    Raises:
        Failure: there is no such side.
    """
    known = algorithm_entries() if options.algorithms else entries()
    names = options.only.split(",") if options.only else list(known)
    if unknown := [name for name in names if name not in known]:
        raise Failure(f"there is no side {unknown[0]!r}; there are {', '.join(known)}")
    chosen = {name: known[name] for name in names}
    if options.flags:
        extra = _ours(options.flags, options.flags)
        chosen[extra.name] = extra
    return chosen


def _cases(assets: Any, names: Sequence[str]) -> list[str]:
    if unknown := [name for name in names if name not in assets.CASES]:
        raise Failure(f"there is no case {unknown[0]!r}; there are {', '.join(assets.CASES)}")
    return list(names or assets.CASES)


def _measure(assets: Any, names: Sequence[str], chosen: Mapping[str, Entry], options: argparse.Namespace) -> None:
    """Adds the rows that are not there yet to the file."""
    finished = read_rows(options.json, *KEYS)
    for name in names:
        todo = [entry for entry in chosen.values() if options.again or (name, entry.name) not in finished]
        with Bench(assets, name, options) as bench:
            for entry in todo:
                _tell(f"{name}: {entry.title}")
                row = bench.row(entry)
                append_row(options.json, row)
                if row["reason"]:
                    _tell(f"{name}: {entry.title}: {row['reason']}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what is not measured yet and prints the tables; returns 1 where tfquant failed or lost beyond chance."""
    options = parse(arguments)
    try:
        chosen = _chosen(options)
        if not options.table:
            quiet_start()
            assets = cases.load_assets()
            _measure(assets, _cases(assets, options.cases), chosen, options)
    except Failure as failure:
        print(f"accuracy: {failure}", file=sys.stderr)
        return 2
    rows = {
        key: row
        for key, row in read_rows(options.json, *KEYS).items()
        if key[1] in chosen and (not options.cases or key[0] in options.cases)
    }
    found = standings(rows, options.output)
    names = [name for name in chosen if name != FLOAT]
    if options.algorithms:
        print(*table(algorithm_cells(found, names)), sep="\n")
    else:
        for standing in found:
            print(*table(case_cells(standing)), *failures(standing), "", sep="\n")
        print(*verdicts(found), sep="\n")
    if options.docs:
        options.docs.parent.mkdir(parents=True, exist_ok=True)
        options.docs.write_text(algorithms_document(found, names) if options.algorithms else document(found))
    ours = [row for (_, side), row in rows.items() if is_ours(side)]
    return 1 if any(row["reason"] or not _figures(row).is_chance for row in ours) else 0


if __name__ == "__main__":
    sys.exit(main())
