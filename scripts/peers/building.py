"""Models as the tools of the sides make them, each tool in a process of its own; what was built before is kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from scripts.peers.environments import ENVIRONMENTS, python_of
from scripts.peers.failure import Failure
from scripts.peers.models import Model
from scripts.peers.sides import Setting, Side, Step
from tfquant.bench.interleave import Worker, WorkerError

_ROOT = Path(__file__).resolve().parents[2]
_WORKERS = Path(__file__).parent / "workers"


@dataclasses.dataclass(frozen=True)
class Build:
    """A model that a side can run.

    Attributes:
        model: its path.
        label: the options of the build, where the side has several.
        megabytes: on disk, of what is needed to run it.
        seconds: from float32 to the result, the start of processes included; None for float32 itself.
        peak_megabytes: of resident memory, of the largest process; None for float32 itself.
        versions: of the tools.
        report: what the tool told, where it tells.
    """

    model: str
    label: str
    megabytes: float
    seconds: float | None = None
    peak_megabytes: float | None = None
    versions: tuple[str, ...] = ()
    report: str = ""


class Workshop:
    """Builds and starts the sides' models.

    Args:
        model: the float32 model and its data.
        threads: of each side.
        environments: the folder of the peers' environments.
        timeout: seconds that a step of a build may take, or one answer of a model that runs.
        tell: gets a line about what is being done.
    """

    def __init__(self, model: Model, threads: int, environments: Path, timeout: float, tell: Callable[[str], None]) -> None:
        self._model = model
        self._threads = threads
        self._environments = environments
        self._timeout = timeout
        self._tell = tell

    def build(self, side: Side, setting: Setting) -> Build:
        """The model of a side with a setting, from an earlier run where nothing that it depends on has changed.

        Raises:
            Failure: the tool cannot be installed, or cannot quantize it.
        """
        if not side.build:
            return Build(str(self._model.saved_model), "", _megabytes([self._model.saved_model]))
        folder = self._model.folder / re.sub(r"[^\w.-]+", "_", " ".join([side.name, *map(str, setting.build.values())]))
        # Before all else: what cannot be installed today is no reason to throw away what was built.
        pythons = [self._python(step.environment) for step in side.build]
        note, fingerprint = folder / "build.json", self._fingerprint(side, setting)
        if note.exists():
            kept = json.loads(note.read_text())
            if kept["fingerprint"] == fingerprint:
                return Build(**kept["build"] | {"versions": tuple(kept["build"]["versions"])})
        label = " ".join(map(str, setting.build.values()))
        self._tell(f"{side.title}: quantizing" + (f" ({label})" if label else ""))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        build = self._built(side, setting, label, folder, pythons)
        note.write_text(json.dumps({"fingerprint": fingerprint, "build": dataclasses.asdict(build)}, indent=1))
        return build

    def _built(self, side: Side, setting: Setting, label: str, folder: Path, pythons: Iterable[Path]) -> Build:
        options = {
            "float32": str(self._model.saved_model),
            "calibration": str(self._model.calibration),
            "folder": str(folder),
            "transformer": self._model.is_transformer,
            **setting.build,
        }
        start, peak, versions = time.monotonic(), 0.0, []
        for step, python in zip(side.build, pythons, strict=True):
            facts = self._step(side, step, python, options)
            options |= facts["built"]
            peak = max(peak, facts["peak_megabytes"])
            versions += facts["versions"]
        return Build(
            model=options["model"],
            label=label,
            megabytes=_megabytes(Path(path) for path in options.get("files", [options["model"]])),
            seconds=time.monotonic() - start,
            peak_megabytes=peak,
            versions=tuple(dict.fromkeys(versions)),
            report=options.get("report", ""),
        )

    def _step(self, side: Side, step: Step, python: Path, options: Mapping[str, Any]) -> dict[str, Any]:
        try:
            with self._worker(python, step.script, "build", options, {}, side.title) as worker:
                return worker.ready()
        except WorkerError as error:
            raise Failure(f"cannot quantize: {error.reason}") from error

    def start(self, side: Side, setting: Setting, build: Build) -> Worker:
        """A process that runs a model.

        Raises:
            Failure: the environment that it runs in cannot be installed.
            WorkerError: no process can be started.
        """
        options = {"model": build.model, "data": str(self._model.evaluation), "threads": self._threads, **setting.run}
        python = self._python(setting.environment)
        return self._worker(python, side.run, "serve", options, setting.variables, f"{side.title}, {setting.label}")

    def _worker(
        self, python: Path, script: str, command: str, options: Mapping[str, Any], variables: Mapping[str, str], label: str
    ) -> Worker:
        line = [str(python), str(_WORKERS / script), command, json.dumps(dict(options))]
        return Worker(line, {"TF_CPP_MIN_LOG_LEVEL": "3", **variables}, label, self._timeout)

    def _python(self, environment: str | None) -> Path:
        return Path(sys.executable) if environment is None else python_of(environment, self._environments)

    def _fingerprint(self, side: Side, setting: Setting) -> str:
        """Changes with whatever a build depends on."""
        needs = [ENVIRONMENTS[step.environment].requirements for step in side.build if step.environment is not None]
        digest = hashlib.sha256(repr((dict(setting.build), needs, metadata.version("tensorflow"))).encode())
        scripts = [_WORKERS / script for script in ("worker.py", *(step.script for step in side.build))]
        tool = [_ROOT / "tfquant"] if side.name == "tfquant" else []
        for path in _files([self._model.saved_model, self._model.calibration, *scripts, *tool]):
            if path.suffix != ".pyc":
                digest.update(path.read_bytes())
        return digest.hexdigest()


def _files(paths: Iterable[Path]) -> Iterable[Path]:
    """The files among the paths, and in the folders among them."""
    for path in paths:
        yield from (found for found in sorted(path.rglob("*")) if found.is_file()) if path.is_dir() else (path,)


def _megabytes(paths: Iterable[Path]) -> float:
    return sum(path.stat().st_size for path in _files(paths)) / 1e6
