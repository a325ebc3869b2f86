"""Times the sides against each other: first the settings of each among themselves, then the best of all."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scripts.peers.building import Build, Workshop
from scripts.peers.failure import Failure
from scripts.peers.sides import Setting, Side
from tfquant.bench.interleave import Times, Worker, WorkerError, race, speedup

if TYPE_CHECKING:
    from tfquant.verify import Fidelity

REFERENCE, OURS = "float32", "tfquant"
_SEARCH = 0.25  # of the time of the measurement, per setting
_SEARCH_RUNS, _RUNS = 5, 10  # at least


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """A side with one of its settings."""

    side: Side
    setting: Setting
    build: Build


@dataclasses.dataclass(frozen=True)
class Timing:
    """A side at a batch size.

    Attributes:
        candidate: what was the fastest in the search.
        times: of its runs.
        ratio: how many times as long as tfquant's a run takes, the median of the rounds; None where tfquant has no times.
        versions: of the runtime, and of what made the model.
        fidelity: to float32 on the held-out samples; None for float32 itself and where it has no outputs.
        searched: median milliseconds in the search, by setting; empty where there is one setting.
        waited: share of the measurement in which a thread of any process waited for a core; None where Linux does not tell.
    """

    candidate: Candidate
    times: Times
    ratio: float | None
    versions: tuple[str, ...]
    fidelity: Fidelity | None
    searched: Mapping[str, float]
    waited: float | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a side: a timing or the reason why there is none, by batch size."""

    side: Side
    timings: Mapping[int, Timing]
    failures: Mapping[int, str]


class Comparison:
    """Compares sides on one model.

    Args:
        workshop: builds and starts their models.
        sides: who is compared.
        batch_sizes: samples per run.
        seconds: of measurement, per side and batch size.
        tell: gets a line about what is being done.
    """

    def __init__(
        self, workshop: Workshop, sides: Sequence[Side], batch_sizes: Sequence[int], seconds: float, tell: Callable[[str], None]
    ) -> None:
        self._workshop = workshop
        self._sides = sides
        self._batch_sizes = batch_sizes
        self._seconds = seconds
        self._tell = tell
        self._failures: dict[tuple[str, int], str] = {}

    def run(self) -> list[Outcome]:
        """Builds, searches and measures."""
        candidates = {side.name: self._candidates(side) for side in self._sides}  # all first: building needs the memory
        best: dict[int, dict[Candidate, Mapping[str, float]]] = {batch: {} for batch in self._batch_sizes}
        with contextlib.ExitStack() as stack:
            workers: dict[Candidate, Worker] = {}
            for side in self._sides:
                found, running = self._search(side, candidates[side.name], stack)
                workers |= running
                for batch, (candidate, searched) in found.items():
                    best[batch][candidate] = searched
            timings = self._measure(best, workers)
        return [self._outcome(side, timings) for side in self._sides]

    def _outcome(self, side: Side, timings: Mapping[int, Sequence[Timing]]) -> Outcome:
        found = {batch: each for batch, every in timings.items() for each in every if each.candidate.side is side}
        reasons = {batch: self._failures.get((side.name, batch), "") for batch in self._batch_sizes if batch not in found}
        return Outcome(side, found, reasons)

    def _fail(self, side: Side, reason: str, batch: int | None = None) -> None:
        self._tell(f"{side.title}: {reason}")
        for size in self._batch_sizes if batch is None else [batch]:
            self._failures[side.name, size] = reason

    def _candidates(self, side: Side) -> list[Candidate]:
        """A side's settings whose model could be built."""
        found: list[Candidate] = []
        builds: dict[str, Build | None] = {}
        for setting in side.settings:
            key = repr(dict(setting.build))
            if key not in builds:
                try:
                    builds[key] = self._workshop.build(side, setting)
                except Failure as failure:
                    builds[key] = None
                    self._fail(side, str(failure))
            if build := builds[key]:
                found.append(Candidate(side, setting, build))
        return found

    def _search(
        self, side: Side, candidates: Sequence[Candidate], stack: contextlib.ExitStack
    ) -> tuple[dict[int, tuple[Candidate, Mapping[str, float]]], dict[Candidate, Worker]]:
        """By batch size the fastest setting and the medians of all; and the fastest as running workers, which `stack` ends."""
        best: dict[int, tuple[Candidate, Mapping[str, float]]] = {}
        with contextlib.ExitStack() as losers:
            workers, stacks = {}, {}
            for candidate in candidates:
                try:
                    worker = self._workshop.start(candidate.side, candidate.setting, candidate.build)
                except (Failure, WorkerError) as error:
                    self._fail(side, str(error))
                else:
                    stacks[candidate] = losers.enter_context(contextlib.ExitStack())
                    workers[candidate] = stacks[candidate].enter_context(worker)
            if len(workers) == 1:
                best = {batch: (candidate, {}) for candidate in workers for batch in self._batch_sizes}
            elif workers:
                self._tell(f"{side.title}: looking for the best of {len(workers)} settings")
                for batch in self._batch_sizes:
                    if times := self._race(workers, batch, _SEARCH * self._seconds, _SEARCH_RUNS):
                        medians = {candidate.setting.label: taken.median for candidate, taken in times.items()}
                        best[batch] = (min(times, key=lambda candidate: times[candidate].median), medians)
            running = {candidate: workers[candidate] for candidate, _ in best.values()}
            for candidate in running:
                stack.enter_context(stacks[candidate].pop_all())
        return best, running

    def _measure(
        self, best: Mapping[int, Mapping[Candidate, Mapping[str, float]]], workers: Mapping[Candidate, Worker]
    ) -> dict[int, list[Timing]]:
        """The timings by batch size."""
        result = {}
        self._tell("comparing outputs")
        fidelities = self._fidelities(workers)
        for batch, chosen in best.items():
            self._tell(f"measuring at batch {batch}")
            pressure = _Pressure()
            times = self._race({candidate: workers[candidate] for candidate in chosen}, batch, self._seconds, _RUNS)
            waited = pressure.share()
            ours = next((taken for candidate, taken in times.items() if candidate.side.name == OURS), None)
            result[batch] = [
                Timing(
                    candidate,
                    taken,
                    None if ours is None else speedup(taken, ours),
                    tuple(dict.fromkeys((*workers[candidate].ready()["versions"], *candidate.build.versions))),
                    fidelities.get(candidate),
                    chosen[candidate],
                    waited,
                )
                for candidate, taken in times.items()
            ]
        return result

    def _race(self, workers: Mapping[Candidate, Worker], batch: int, seconds: float, runs: int) -> dict[Candidate, Times]:
        """The times of all that can run this batch size; who cannot is noted, and the others go on without."""
        running = dict(workers)
        while running:
            try:
                times = race([(worker, {"batch": batch}) for worker in running.values()], seconds, runs)
            except WorkerError as error:
                failed = next(candidate for candidate, worker in running.items() if worker.label == error.label)
                self._fail(failed.side, f"{failed.setting.label}: {error.reason}", batch)
                del running[failed]
            else:
                return dict(zip(running, times, strict=True))
        return {}

    def _fidelities(self, workers: Mapping[Candidate, Worker]) -> dict[Candidate, Fidelity]:
        """Of all but float32."""
        outputs = {}
        with tempfile.TemporaryDirectory() as folder:
            for number, (candidate, worker) in enumerate(workers.items()):
                path = Path(folder) / f"{number}.npz"
                try:
                    worker.ask({"outputs": str(path), "batch": self._batch_sizes[-1]})
                except WorkerError as error:
                    self._tell(str(error))  # the race will meet it too
                else:
                    with np.load(path) as file:
                        outputs[candidate] = {key: file[key] for key in file.files}
        reference = next((found for candidate, found in outputs.items() if candidate.side.name == REFERENCE), None)
        if reference is None:
            return {}
        others = {candidate: found for candidate, found in outputs.items() if candidate.side.name != REFERENCE}
        for candidate, found in list(others.items()):
            if found.keys() != reference.keys():
                self._tell(f"{candidate.side.title}: outputs {', '.join(found)} are not {', '.join(reference)}: not compared")
                del others[candidate]
        return {candidate: _compared(reference, found) for candidate, found in others.items()}


class _Pressure:
    """How much of the time since its making something waited for a core, by Linux's pressure stall information."""

    def __init__(self) -> None:
        self._start, self._waited = time.monotonic(), _microseconds_waited()

    def share(self) -> float | None:
        now = _microseconds_waited()
        return None if now is None or self._waited is None else (now - self._waited) / 1e6 / (time.monotonic() - self._start)


def _microseconds_waited() -> int | None:
    try:
        some = Path("/proc/pressure/cpu").read_text().splitlines()[0]
    except OSError:  # a kernel without it
        return None
    return int(some.rpartition("=")[2])


def _compared(reference: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> Fidelity:
    from tfquant.verify import fidelity  # imports TensorFlow

    return fidelity(lambda _: reference, lambda _: found, [{}], lambda _: len(next(iter(reference.values()))))
