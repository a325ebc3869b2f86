"""What strategies work with: trials of models in which some ops are in float, scores of groups, and the budget."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tfquant.errors import ConfigError, shown
from tfquant.pipeline import QuantizedModel
from tfquant.plan.spec import QuantPlan
from tfquant.progress import progress, stage
from tfquant.tuner.goal import Goal
from tfquant.tuner.journal import Journal
from tfquant.tuner.predicting import Predict, Predictor
from tfquant.tuner.reverting import Group, Reverter, find_groups
from tfquant.tuner.subset import Subset, choose

Ops = frozenset[str]
ALL_INT8 = "everything quantized"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A model that was evaluated on the whole validation set.

    Attributes:
        number: from 1 on.
        step: what was tried.
        reverted: the ops that were asked to be in float.
        float_ops: how many ops are in float that are INT8 in the first trial.
        value: what `evaluate` returned; minus infinity for NaN.
        drop: how much lower than the float model's, in units of `max_drop`.
        met: whether that is within `max_drop`.
        size: bytes of the graph's constants.
        seconds: what the evaluation took.
    """

    number: int
    step: str
    reverted: Ops
    float_ops: int
    value: float
    drop: float
    met: bool
    size: int
    seconds: float


class Objective(Protocol):
    """What the best of the models that meet the goal is."""

    name: str

    def cost(self, search: Search, ops: Ops) -> float:
        """What the model with `ops` in float costs: the least is the best."""

    def improve(self, search: Search) -> str:
        """Looks for a cheaper model than the one that the strategy found, if it found one that meets the goal.

        Returns why it stopped, "" where it had nothing to do.
        """


class Stopped(Exception):
    """Nothing more may be tried; the message says why."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a search may take; None is without limit.

    Attributes:
        trials: evaluations of a model on the whole validation set, the first one in INT8 throughout included.
        seconds: of the search, those of an earlier run that the journal tells included; calibration is not counted.
    """

    trials: int | None = None
    seconds: float | None = None


class Search:
    """The state of a tuning.

    Attributes:
        full: the model in INT8 throughout.
        groups: what can be reverted.
        goal: what is to be reached.
        objective: what the best model is.
        budget: what the search may take.
        trials: what was tried.
        sample: a batch of inputs that `evaluate` showed the float model.
    """

    def __init__(
        self,
        full: QuantizedModel,
        evaluate: Callable[[Predict], Any],
        goal: Goal,
        objective: Objective,
        journal: Journal,
        budget: Budget = Budget(),
        sample: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.full, self.goal, self.objective, self.budget = full, goal, objective, budget
        self.sample = dict(sample or {})
        self._evaluate, self._journal = evaluate, journal
        self._reverter = Reverter(full.base, full.plan, full.annotation)
        self.groups = find_groups(full.annotation, full.plan)
        self.trials: list[Trial] = []
        self._tried: dict[Ops, Trial] = {}
        self._begin, self._earlier = time.monotonic(), 0.0
        self._counted: set[tuple[str, Ops]] = set()  # facts whose seconds are in the one or the other
        self._model = functools.lru_cache(maxsize=3)(self._build)

    # -- models -----------------------------------------------------------------------------------------------------
    @functools.cached_property
    def ops(self) -> tuple[str, ...]:
        """The ops that can be reverted, in topological order."""
        return tuple(dict.fromkeys(op for group in self.groups for op in group.ops if len(group.ops) == 1))

    def plan(self, ops: Ops, reasons: Mapping[str, str] | None = None) -> QuantPlan:
        """The plan with `ops` in float."""
        return self._reverter.plan(ops, reasons or {})

    def model(self, ops: Ops) -> QuantizedModel:
        """The model with `ops` in float; the last ones are kept."""
        return self._model(ops)

    def _build(self, ops: Ops) -> QuantizedModel:
        return self.full.with_plan(self.plan(ops)) if ops else self.full

    def float_ops(self, model: QuantizedModel) -> int:
        """How many ops are in float there that the model in INT8 throughout has in INT8."""
        int8 = {decision.name for decision in model.plan.ops if decision.int8}
        return sum(op not in int8 for op in self.ops)

    # -- what is found out --------------------------------------------------------------------------------------------
    def trial(self, ops: Collection[str], step: str) -> Trial:
        """Evaluates the model with `ops` in float on the whole validation set, unless that is known.

        Raises:
            Stopped: the budget is spent.
        """
        ops = frozenset(ops)
        if ops in self._tried:
            return self._tried[ops]
        if self.trials:
            self.check_budget()
        facts = self.known("trial", ops, lambda: self._measured(ops, step))
        value = -math.inf if facts["value"] is None else float(facts["value"])
        trial = Trial(
            number=len(self.trials) + 1,
            step=step,
            reverted=ops,
            float_ops=int(facts["float_ops"]),
            value=value,
            drop=self.goal.drop(value),
            met=self.goal.is_met(value),
            size=int(facts["size"]),
            seconds=float(facts["seconds"]),
        )
        self.trials.append(trial)
        self._tried[ops] = trial
        return trial

    def _measured(self, ops: Ops, step: str) -> dict[str, Any]:
        model = self.model(ops)
        begin = time.monotonic()
        with stage(f"Trial {len(self.trials) + 1}: {step}"):
            value = number(self._evaluate(Predictor(model.int8_function(), model.input_names)))
        return {
            "value": value if math.isfinite(value) else None,
            "float_ops": self.float_ops(model),
            "size": model.report.size_after,
            "seconds": time.monotonic() - begin,
        }

    def score(self, ops: Collection[str]) -> tuple[float, ...]:
        """How good the model with `ops` in float is on the samples that quantization hurts most (see `Subset.score`).

        Raises:
            Stopped: the budget is spent.
        """
        ops = frozenset(ops)
        self.check_budget()

        def measured() -> dict[str, Any]:
            begin = time.monotonic()
            found = self.subset.score(self.model(ops))
            return {"score": list(found), "seconds": time.monotonic() - begin}

        return tuple(self.known("score", ops, measured)["score"])

    def ranked(self, ops: Ops, groups: Iterable[Group]) -> list[Group]:
        """Groups by what reverting each, besides `ops`, gains; the best first, and of equal ones the smallest.

        Raises:
            Stopped: the budget is spent.
        """
        groups = list(groups)
        scores = {group: self.score(ops.union(group.ops)) for group in progress(groups, "Ranking", len(groups))}
        position = {group: index for index, group in enumerate(groups)}
        return sorted(groups, key=lambda group: ([-part for part in scores[group]], len(group.ops), position[group]))

    def known(self, kind: str, ops: Collection[str], find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Facts about a set of ops: what the journal tells, else what `find` finds, which is noted.

        Args:
            kind: names the facts; together with the ops it must say all that they depend on.
            ops: the set.
            find: returns what JSON can hold; "seconds" counts for the budget.
        """
        key, facts = (kind, frozenset(ops)), self._journal.recall(kind, ops)
        if facts is None:
            facts = self._journal.note(kind, ops, **find())
        elif key not in self._counted:
            self._earlier += float(facts.get("seconds", 0.0))
        self._counted.add(key)
        return facts

    @functools.cached_property
    def subset(self) -> Subset:
        """The samples that quantization hurts most."""
        with stage("Choosing the samples that are affected most"):
            return choose(self.full, self._evaluate)

    # -- where the search stands --------------------------------------------------------------------------------------
    @property
    def best(self) -> Trial:
        """Of the trials that meet the goal the cheapest, or else the one with the highest value and the fewest ops in float."""
        met = [trial for trial in self.trials if trial.met]
        if met:
            return min(met, key=lambda trial: (self.objective.cost(self, trial.reverted), -trial.value, trial.number))
        return min(self.trials, key=lambda trial: (-trial.value, trial.float_ops, trial.number))

    def check_budget(self) -> None:
        """Raises `Stopped` when no further trial may be made: then nothing needs to be known for one."""
        trials, seconds = self.budget.trials, self.budget.seconds
        if trials is not None and len(self.trials) >= trials:
            raise Stopped(f"the budget of {trials} trials is spent")
        if seconds is not None and time.monotonic() - self._begin + self._earlier >= seconds:
            raise Stopped(f"the budget of {seconds:g} seconds is spent")


def number(value: Any) -> float:
    """What `evaluate` returned, as a float; infinity and NaN count as the worst.

    Raises:
        ConfigError: it is no number.
    """
    try:
        found = float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"evaluate must return a number, higher is better. Received: {shown(value)}") from error
    return found + 0.0 if math.isfinite(found) else -math.inf  # no minus in front of 0


def fingerprint(full: QuantizedModel, *facts: object) -> str:
    """What tells one job from others: the model, its plan and these facts."""
    state = hashlib.blake2b(digest_size=12)
    state.update(full.graph_def.SerializeToString(deterministic=True))
    state.update(repr([(d.name, d.key, d.int8) for d in full.plan.ops]).encode())
    state.update(repr(facts).encode())
    return state.hexdigest()


def pieces(items: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    """The items, `size` at a time."""
    for start in range(0, len(items), size):
        yield tuple(items[start : start + size])
