"""What is best among the models that meet the goal: few ops in float, few bytes, or little time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from tfquant import verify
from tfquant.pipeline import QuantizedModel
from tfquant.progress import progress
from tfquant.tuner.giving_back import give_back
from tfquant.tuner.search import Objective, Ops, Search, Trial

# The time of the second model over that of the first, measured in turns.
Timer = Callable[[QuantizedModel, QuantizedModel], float]
# A model is faster if it takes at most this share of the time: what is above may be noise.
_FASTER = 0.98
# Groups that are tried in the place of one that costs much.
_MOST_INSTEAD = 4


class Accuracy:
    """The fewest ops in float."""

    name = "accuracy"

    def cost(self, search: Search, ops: Ops) -> float:
        return next(trial.float_ops for trial in search.trials if trial.reverted == ops)

    def improve(self, search: Search) -> str:
        """The strategy has looked for it."""
        return ""


class Size:
    """The fewest bytes."""

    name = "size"

    def cost(self, search: Search, ops: Ops) -> float:
        found = [trial.size for trial in search.trials if trial.reverted == ops]
        return found[0] if found else search.known("size", ops, lambda: {"bytes": search.model(ops).report.size_after})["bytes"]

    def improve(self, search: Search) -> str:
        """Large ops return to INT8 first; then others that are smaller together are tried in the place of each."""
        best = search.best
        if not best.met or not best.reverted:
            return ""
        saved = {op: self.cost(search, frozenset([op])) for op in best.reverted}
        best = give_back(search, best, lambda ops: sorted(ops, key=lambda op: -saved[op]))
        for op in sorted(best.reverted, key=lambda op: (-saved[op], op)):
            if op in best.reverted:
                best = _replaced(search, best, op, lambda cost, least: cost < least)
        return "nothing smaller was found"


class Latency:
    """The least time.

    Args:
        timer: measures two models; by default their calls in turns, at `batch_sizes` that the model takes, each counting alike.
        batch_sizes: for the default timer.
    """

    name = "latency"

    def __init__(self, timer: Timer | None = None, batch_sizes: Sequence[int] = (1,)) -> None:
        self._timer, self._sizes = timer, tuple(batch_sizes)

    def cost(self, search: Search, ops: Ops) -> float:
        """The time as a share of that in INT8 throughout."""

        def measured() -> dict[str, Any]:
            return {"ratio": self._time(search, search.model(ops)) if ops else 1.0}

        return float(search.known(f"time at {self._sizes}", ops, measured)["ratio"])

    def _time(self, search: Search, model: QuantizedModel) -> float:
        timer = self._timer or (lambda one, other: interleaved(one, other, search.sample, self._sizes))
        return float(timer(search.full, model))

    def improve(self, search: Search) -> str:
        """Reverts what is slower in INT8, returns to INT8 what is slower in float, and tries others in the place of the rest."""
        best = search.best
        if not best.met:
            return ""
        for group in progress(search.groups, "Timing", len(search.groups)):
            best = self._faster(search, best, best.reverted.union(group.ops), f"faster in float? {group}")
        for op in search.ops:
            best = self._faster(search, best, best.reverted.difference([op]), f"faster in INT8? {op}")
        for op in sorted(best.reverted):
            if op in best.reverted:
                best = _replaced(search, best, op, lambda cost, least: cost < _FASTER * least)
        return "nothing faster was found"

    def _faster(self, search: Search, best: Trial, ops: Ops, step: str) -> Trial:
        """The model with `ops` in float, if it is faster than the best and meets the goal, else the best."""
        search.check_budget()
        if ops == best.reverted or self.cost(search, ops) >= _FASTER * self.cost(search, best.reverted):
            return best
        found = search.trial(ops, step)
        return found if found.met else best


def _replaced(search: Search, best: Trial, op: str, cheaper: Callable[[float, float], bool]) -> Trial:
    """The best with other groups in the place of one of its ops, if that meets the goal and is cheaper, else the best."""
    ops = best.reverted.difference([op])
    least = search.objective.cost(search, best.reverted)
    left = [group for group in search.groups if op not in group.ops and not ops.issuperset(group.ops)]
    tried = 0
    for group in search.ranked(ops, left):
        more = ops.union(group.ops)
        if tried == _MOST_INSTEAD:
            break
        if not cheaper(search.objective.cost(search, more), least):
            continue
        tried += 1
        found = search.trial(more, f"instead of {op}: {group}")
        if found.met:
            return found
        ops = more
    return best


def interleaved(
    one: QuantizedModel, other: QuantizedModel, sample: Mapping[str, np.ndarray], batch_sizes: Collection[int]
) -> float:
    """The time of `other` over that of `one`, called in turns: the geometric mean over batch sizes that the model takes."""
    functions = one.int8_function(), other.int8_function()
    own = verify.rows_of(sample)
    sizes = [size for size in batch_sizes if one.takes(size)] or [own]
    found = verify.latency(*functions, sample, sizes)
    return math.exp(sum(math.log(entry.int8 / entry.float32) for entry in found) / len(found))


def find_objective(objective: str | Objective, batch_sizes: Sequence[int]) -> Objective:
    """The objective of a name in `OBJECTIVES`, or the one that is given."""
    made: dict[str, Callable[[], Objective]] = {
        "accuracy": Accuracy,
        "latency": lambda: Latency(batch_sizes=batch_sizes),
        "size": Size,
    }
    return made[objective]() if isinstance(objective, str) else objective


OBJECTIVES = ("accuracy", "latency", "size")
