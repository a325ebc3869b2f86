"""Searches the settings of TensorFlow's runtime that run a model best: all briefly, the best third longer, and so on.

All settings are measured against TensorFlow's own in the same rounds, and what decides is the ratio to it: so settings can be
compared that never ran side by side, and not all processes need to fit into memory at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from tfquant.bench.interleave import Times, Worker, WorkerError, race, speedup, throughput_ratio
from tfquant.bench.settings import LATENCY, OBJECTIVES, SWITCHES, Choice, Setting
from tfquant.machine import free_memory
from tfquant.progress import progress

Start = Callable[[Setting, str], Worker]

_DEFAULT = "TensorFlow's defaults"
_FINALISTS = 3
_MOST_WORKERS = 8
_MEMORY_SHARE = 0.6  # of what is free, for all workers
_LEAST_GAIN = 1.02  # less is noise, and the defaults are the better choice
_ALIKE = 0.99  # of two settings so close the simpler one
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
    with start(default.setting, _DEFAULT) as base:
        tensorflow = base.ready().get("tensorflow", "")
        for stage in range(1, stages + 1):
            heats = _heats(default, left, _capacity(base))
            found: list[Measured] = []
            for heat in progress(heats, f"{title}, stage {stage} of {stages}", len(heats)):
                chosen = {contest: [arm for arm in arms if arm.setting in heat] for contest, arms in left.items()}
                found += _heat(start, base, default, chosen, seconds / 3 ** (stages - stage), stage)
            left = {contest: _best_third(contest, default, found) for contest in contests}
            measured += found
    return Tuning([_choice(contest, default, found) for contest in contests], measured, tensorflow)


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
    ranked = sorted((m for m in found if m.contest == contest and m.arm != default), key=lambda m: -m.score)
    return [measured.arm for measured in ranked[: _third(len(ranked))]]


def _heats(default: Arm, left: Mapping[Contest, Sequence[Arm]], size: int) -> list[set[Setting]]:
    """Parts of the settings, so many processes at a time; that of the default may be there too, with other streams."""
    settings = list(dict.fromkeys(arm.setting for arms in left.values() for arm in arms if arm.setting != default.setting))
    count = max(1, -(-len(settings) // size))
    heats = [set(settings[place::count]) for place in range(count)]
    heats[0].add(default.setting)
    return heats


def _heat(
    start: Start, base: Worker, default: Arm, arms: Mapping[Contest, Sequence[Arm]], seconds: float, stage: int
) -> Iterator[Measured]:
    """Measures these arms beside the default; those whose processes fail are left out."""
    with contextlib.ExitStack() as stack:
        workers = {default.setting: base}
        for arm in itertools.chain.from_iterable(arms.values()):
            if arm.setting not in workers:
                workers[arm.setting] = stack.enter_context(start(arm.setting, _label(arm.setting)))
        for size in dict.fromkeys(contest.batch_size for contest in arms):
            contests = [contest for contest in arms if contest.batch_size == size]
            entries = dict.fromkeys([default, *(arm for contest in contests for arm in arms[contest])])
            times = _race(workers, list(entries), size, seconds)
            for contest in contests:
                for arm in dict.fromkeys([default, *arms[contest]]):
                    if arm in times:
                        score = contest.score(times[default], times[arm])
                        yield Measured(stage, contest, arm, score, times[arm], times[default])


def _race(workers: dict[Setting, Worker], arms: Sequence[Arm], batch_size: int, seconds: float) -> dict[Arm, Times]:
    """The times of the arms whose processes run; the others are taken out of `workers`."""
    while True:
        running = [arm for arm in arms if arm.setting in workers]
        entries = [(workers[arm.setting], {"batch": batch_size, "streams": arm.streams}) for arm in running]
        try:
            return dict(zip(running, race(entries, seconds), strict=True))
        except WorkerError as error:
            if error.label == _DEFAULT:
                raise
            for setting in [setting for setting, worker in workers.items() if worker.label == error.label]:
                workers.pop(setting).kill()


def _choice(contest: Contest, default: Arm, measured: Iterable[Measured]) -> Choice:
    """The best of the last stage; of those that are as good the simplest, and the default where none is better."""
    mine = [found for found in measured if found.contest == contest]
    best = max(mine, key=lambda found: found.score)
    if best.score < _LEAST_GAIN:
        best = next(found for found in mine if found.arm == default)
    else:
        close = [found for found in mine if found.score >= _ALIKE * best.score]
        best = min(
            close, key=lambda found: (len(found.arm.setting.differences(default.setting)), found.arm.streams, -found.score)
        )
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


def _label(setting: Setting) -> str:
    return " ".join(f"{name}={value}" for name, value in setting.variables.items())


def _capacity(worker: Worker) -> int:
    """How many more processes like this one are run at a time."""
    each, free = worker.memory(), free_memory()
    fitting = int(_MEMORY_SHARE * free / each) if each and free is not None else _MOST_WORKERS
    return max(1, min(_MOST_WORKERS - 1, fitting))
