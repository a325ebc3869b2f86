"""Searches the settings of TensorFlow's runtime that run a model best: all briefly, the best third longer, and so on.

All settings are measured against TensorFlow's own in the same rounds, and what decides is the ratio to it: so settings can be
compared that never ran side by side, and not all processes need to fit into memory at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from tfquant.bench.interleave import Times, Worker, WorkerError, race, speedup, throughput_ratio
from tfquant.bench.settings import LATENCY, OBJECTIVES, SWITCHES, Choice, Setting
from tfquant.machine import free_memory
from tfquant.progress import progress

Start = Callable[[Setting, str], Worker]

_DEFAULT = "TensorFlow's defaults"
_FINALISTS = 3
_MOST_IN_HEAT = 8  # more would take too long for a round
_MOST_WORKERS = 32
_MEMORY_SHARE = 0.6  # of what is free, for all workers
_LEAST_GAIN = 1.02  # less is noise, and the defaults are the better choice
_COST_OF_CHANGE = 0.005  # what each variable that is set has to earn: of settings alike the simpler one goes on
_MOST_NUMBERS = 5


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to run the model."""

    setting: Setting
    streams: int


@dataclasses.dataclass(frozen=True)
class Contest:
    """What is sought: the best way for a batch size and an objective."""

    batch_size: int
    objective: str

    def score(self, default: Times, times: Times) -> float:
        """How many times better than the default."""
        return speedup(default, times) if self.objective == LATENCY else throughput_ratio(default, times)


@dataclasses.dataclass(frozen=True)
class Measured:
    """An arm against the default, which ran beside it; `stage` counts from 1."""

    stage: int
    contest: Contest
    arm: Arm
    score: float
    times: Times
    default_times: Times

    def worth(self, default: Arm) -> float:
        """The score less what its changes have to earn."""
        changes = len(self.arm.setting.differences(default.setting)) + (self.arm.streams > 1)
        return self.score * (1 - _COST_OF_CHANGE) ** changes


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What a search found.

    Attributes:
        choices: the best for each batch size and objective.
        measured: all that was measured.
        tensorflow: the version.
    """

    choices: list[Choice]
    measured: list[Measured]
    tensorflow: str


def ladder(cores: int) -> list[int]:
    """1, 2, 4 ... up to the number of cores: at most five, the largest and 1."""
    numbers = sorted({*itertools.takewhile(lambda n: n < cores, (2**power for power in range(32))), cores})
    return numbers if len(numbers) <= _MOST_NUMBERS else [1, *numbers[1 - _MOST_NUMBERS :]]


def candidates(threads: Sequence[int], streams: Sequence[int], cores: int, env: Sequence[tuple[str, str]] = ()) -> list[Arm]:
    """All ways to run a model, the default first.

    Args:
        threads: sizes of the intra-op pool to try; the largest is that of the default.
        streams: numbers of runs at a time to try.
        cores: of the machine; with several streams, at most two threads per core are tried.
        env: variables that all of them have.
    """
    values = [dict(zip(SWITCHES, chosen, strict=True)) for chosen in itertools.product(*SWITCHES.values())]
    arms = []
    for intra, count, switches in itertools.product(sorted(set(threads), reverse=True), sorted({1, *streams}), values):
        # The pool of one inter-op thread runs one stream after the other.
        for inter in [cores] if count > 1 or cores == 1 else [cores, 1]:
            if count == 1 or intra * count <= 2 * cores:
                arms.append(Arm(Setting(intra, inter, tuple({**dict(env), **switches}.items())), count))
    return arms


def tune(
    start: Start, arms: Sequence[Arm], batch_sizes: Sequence[int], seconds: float, streams: Sequence[int], title: str = "tuning"
) -> Tuning:
    """The best setting for each batch size and objective.

    Args:
        start: starts a process with a setting, and a label.
        arms: what to try; the first is the default that all are compared with.
        batch_sizes: of runs.
        seconds: of measurement per finalist; a third of it in the stage before, and so on.
        streams: runs at a time that a choice for throughput may have.
        title: of the progress bar.

    Raises:
        WorkerError: the model does not run with the default setting.
    """
    default = arms[0]
    contests = [Contest(size, objective) for size in batch_sizes for objective in OBJECTIVES]
    left = {c: [arm for arm in arms[1:] if arm.streams in ((1,) if c.objective == LATENCY else streams)] for c in contests}
    measured: list[Measured] = []
    stages = _stages(max(map(len, left.values())))
    with _Pool(start) as pool:
        tensorflow = pool.worker(default.setting).ready().get("tensorflow", "")
        for stage in range(1, stages + 1):
            heats = _heats(default, left, pool.capacity())
            found: list[Measured] = []
            for heat in progress(heats, f"{title}, stage {stage} of {stages}", len(heats)):
                chosen = {contest: [arm for arm in arms if arm.setting in heat] for contest, arms in left.items()}
                pool.make_room({default.setting, *heat})
                found += _heat(pool, default, chosen, seconds / 3 ** (stages - stage), stage)
            left = {contest: _best_third(contest, default, found) for contest in contests}
            measured += found
    return Tuning([_choice(contest, default, found) for contest in contests], measured, tensorflow)


class _Pool:
    """The processes of the settings: they stay, as many as memory allows, for the stages to come."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._workers: dict[Setting, Worker] = {}
        self._failed: set[Setting] = set()

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.kill()

    def worker(self, setting: Setting) -> Worker:
        """The process of a setting, which may still be loading."""
        if setting not in self._workers:
            self._workers[setting] = self._start(setting, " ".join(f"{k}={v}" for k, v in setting.variables.items()))
        return self._workers[setting]

    def runs(self, setting: Setting) -> bool:
        """Whether the process of a setting has not failed so far."""
        return setting not in self._failed

    def drop(self, label: str) -> Setting:
        """Ends the process of this label, which failed; returns its setting."""
        setting = next(setting for setting, worker in self._workers.items() if worker.label == label)
        self._workers.pop(setting).kill()
        self._failed.add(setting)
        return setting

    def capacity(self) -> int:
        """How many processes may run at a time, going by the memory of the largest so far."""
        each, free = max((worker.memory() for worker in self._workers.values()), default=0), free_memory()
        if not each or free is None:
            return _MOST_WORKERS
        return max(2, min(_MOST_WORKERS, len(self._workers) + int(_MEMORY_SHARE * free / each)))

    def make_room(self, needed: Collection[Setting]) -> None:
        """Ends processes that are not needed now where there would be too many."""
        surplus = len(set(self._workers) | set(needed)) - self.capacity()
        for setting in [setting for setting in self._workers if setting not in needed][: max(0, surplus)]:
            self._workers.pop(setting).close()


def _stages(arms: int) -> int:
    """How often the best third goes on, until finalists are left and measured."""
    stages = 1
    while arms > _FINALISTS:
        arms = _third(arms)
        stages += 1
    return stages


def _third(count: int) -> int:
    return max(_FINALISTS, -(-count // 3))


def _best_third(contest: Contest, default: Arm, found: Iterable[Measured]) -> list[Arm]:
    ranked = sorted((m for m in found if m.contest == contest and m.arm != default), key=lambda m: -m.worth(default))
    return [measured.arm for measured in ranked[: _third(len(ranked))]]


def _heats(default: Arm, left: Mapping[Contest, Sequence[Arm]], capacity: int) -> list[set[Setting]]:
    """Parts of the settings, to run side by side with the default; that may be in the first too, with other streams."""
    settings = list(dict.fromkeys(arm.setting for arms in left.values() for arm in arms if arm.setting != default.setting))
    count = max(1, -(-len(settings) // (min(capacity, _MOST_IN_HEAT) - 1)))
    heats = [set(settings[place::count]) for place in range(count)]
    heats[0].add(default.setting)
    return heats


def _heat(pool: _Pool, default: Arm, arms: Mapping[Contest, Sequence[Arm]], seconds: float, stage: int) -> Iterator[Measured]:
    """Measures these arms beside the default; those whose processes fail are left out."""
    for size in dict.fromkeys(contest.batch_size for contest in arms):
        contests = [contest for contest in arms if contest.batch_size == size]
        entries = dict.fromkeys([default, *(arm for contest in contests for arm in arms[contest])])
        times = _race(pool, list(entries), size, seconds, least_rounds=2 + stage)
        for contest in contests:
            for arm in dict.fromkeys([default, *arms[contest]]):
                if arm in times:
                    yield Measured(stage, contest, arm, contest.score(times[default], times[arm]), times[arm], times[default])


def _race(pool: _Pool, arms: Sequence[Arm], batch_size: int, seconds: float, least_rounds: int) -> dict[Arm, Times]:
    """The times of the arms whose processes run; the first is the default, which must."""
    while True:
        running = [arm for arm in arms if pool.runs(arm.setting)]
        try:
            entries = [(pool.worker(arm.setting), {"batch": batch_size, "streams": arm.streams}) for arm in running]
            return dict(zip(running, race(entries, seconds, least_rounds=least_rounds), strict=True))
        except WorkerError as error:
            if pool.drop(error.label) == arms[0].setting:
                raise WorkerError(_DEFAULT, error.reason) from error


def _choice(contest: Contest, default: Arm, measured: Iterable[Measured]) -> Choice:
    """The best of the last stage, or the default where none is better."""
    mine = [found for found in measured if found.contest == contest]
    best = max(mine, key=lambda found: found.worth(default))
    if best.score < _LEAST_GAIN:
        best = next(found for found in mine if found.arm == default)
    return Choice(
        contest.batch_size,
        contest.objective,
        best.arm.setting,
        best.arm.streams,
        default.setting,
        best.times.median,
        best.times.throughput,
        best.default_times.median,
        best.default_times.throughput,
        best.score,
    )
