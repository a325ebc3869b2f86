"""tune(): INT8 as far as the accuracy that a user asks for allows."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

from tfquant.config import QuantConfig
from tfquant.errors import ConfigError, shown
from tfquant.pipeline import QuantizedModel, quantize
from tfquant.progress import stage
from tfquant.tuner.goal import Goal, check_goal
from tfquant.tuner.journal import Journal
from tfquant.tuner.objectives import OBJECTIVES, find_objective
from tfquant.tuner.predicting import Predict, Watched
from tfquant.tuner.result import TuningResult
from tfquant.tuner.search import ALL_INT8, Budget, Objective, Search, Stopped, fingerprint, number
from tfquant.tuner.strategies import STRATEGIES, Strategy
from tfquant.tuner.validation import Validation


def tune(
    model: Any,
    data: Any,
    evaluate: Callable[[Predict], Any],
    *,
    max_drop: float = 0.01,
    drop_type: str = "relative",
    strategy: str | Strategy = "accuracy_aware",
    objective: str | Objective = "accuracy",
    config: QuantConfig | None = None,
    journal: str | os.PathLike[str] | None = None,
    max_trials: int | None = None,
    max_seconds: float | None = None,
) -> TuningResult:
    """Quantizes a model, and returns to float what costs more accuracy than is allowed.

    Args:
        model: as for `quantize`.
        data: calibration data, as for `quantize`; None where the mode needs none.
        evaluate: called with a function that stands for a model; returns a number, higher is better. That function takes
            {input name: array}, or of a model with one input the array alone, and returns NumPy arrays: {output name: array}, or
            of a model with one output the array alone. The float model is evaluated first, then each trial; all must be shown the
            same samples. A `Validation` is an `evaluate` that knows the labels of its samples: they are ranked by.
        max_drop: how much lower than the float model's the value may be.
        drop_type: "relative", as a share of the float model's value (0.01 is one percent); or "absolute", in its units.
        strategy: how to search: a key of `tfquant.tuner.STRATEGIES`, or a function like those.
        objective: which is best of the models that meet the goal: "accuracy", the one with the fewest ops in float; "latency",
            the fastest; "size", the smallest; or an `Objective`.
        config: the options of the quantization; where it says `verify`, the best model is compared with the float one on `data`.
        journal: a file that what is found out is written to at once; a tuning of the same job takes it up from there.
        max_trials: at most so many models are evaluated, the one in INT8 throughout included.
        max_seconds: no trial is begun after so many seconds, those that the journal tells of included.

    Returns:
        The `TuningResult`, with the best model found, whether or not it meets the goal.

    Raises:
        ConfigError: an option has a value that it cannot have, or `evaluate` returns no number.
        ModelError, DataError: as `quantize`.
        OutputError: the journal cannot be written.
    """
    check_goal(max_drop, drop_type)
    search_with = _strategy(strategy)
    if isinstance(objective, str) and objective not in OBJECTIVES:
        raise ConfigError(f"objective must be one of {', '.join(OBJECTIVES)}. Received: {shown(objective)}")
    if not callable(evaluate):
        raise ConfigError(f"evaluate must be a function of a model that returns a number. Received: {type(evaluate).__name__}")
    budget = _budget(max_trials, max_seconds)
    config = config or QuantConfig()
    full = quantize(model, data, dataclasses.replace(config, verify=False))
    if objective == "latency" and full.plan.is_simulated:
        raise ConfigError("The objective latency needs 8 bits: fewer are simulated in float. Received: fewer")
    if isinstance(evaluate, Validation):
        evaluate.bind(full, config)
    watched = Watched(full.float_function(), full.input_names)
    with stage("Evaluating the float model"):
        float_value = number(evaluate(watched))
    if not math.isfinite(float_value):
        raise ConfigError("evaluate must return a finite number for the float model. Received: NaN or infinity")
    if float_value == 0 and drop_type == "relative":
        raise ConfigError(
            "The float model's value is 0, of which no share can be allowed: say drop_type absolute. Received: relative"
        )
    name = evaluate.name if isinstance(evaluate, Validation) else getattr(evaluate, "__qualname__", type(evaluate).__qualname__)
    job = fingerprint(full, name, watched.fingerprint, f"{float_value:.4g}")
    goal = Goal(float_value, float(max_drop), drop_type)
    chosen = find_objective(objective, config.placement_batch_sizes)
    search = Search(full, evaluate, goal, chosen, Journal(journal, job), budget, watched.first)
    stopped = _run(search, search_with)
    strategy_name = strategy if isinstance(strategy, str) else getattr(strategy, "__name__", "strategy")
    result = _result(search, stopped, strategy_name)
    if config.verify and data is not None:
        result.model.verify(full.batches(data, config), config)
    return result


def _strategy(strategy: str | Strategy) -> Strategy:
    if callable(strategy):
        return strategy
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise ConfigError(f"strategy must be one of {', '.join(STRATEGIES)}. Received: {shown(strategy)}")
    return STRATEGIES.get(strategy)


def _budget(trials: Any, seconds: Any) -> Budget:
    if trials is not None and (not isinstance(trials, int) or isinstance(trials, bool) or trials < 1):
        raise ConfigError(f"max_trials must be a whole number of at least 1. Received: {shown(trials)}")
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if seconds is not None and not (is_number and math.isfinite(seconds) and seconds > 0):
        raise ConfigError(f"max_seconds must be a number above 0. Received: {shown(seconds)}")
    return Budget(trials, seconds)


def _run(search: Search, strategy: Strategy) -> str:
    """The whole search; returns why it ended."""
    search.trial((), ALL_INT8)
    try:
        reasons = [strategy(search) or "the strategy came to its end", search.objective.improve(search)]
    except Stopped as reason:
        return str(reason)
    return "; ".join(filter(None, reasons))


def _result(search: Search, stopped: str, strategy: str) -> TuningResult:
    best = search.best
    costs = {trial.number: search.objective.cost(search, trial.reverted) for trial in search.trials if trial.met}
    return TuningResult(
        model=_explained(search),
        met=best.met,
        stopped=stopped,
        trials=tuple(search.trials),
        best=best,
        goal=search.goal,
        strategy=strategy,
        objective=search.objective.name,
        costs=costs,
    )


def _explained(search: Search) -> QuantizedModel:
    """The best model, whose plan tells with which trial each op returned to float."""
    best = search.best
    if not best.reverted:
        return search.full
    reasons = {}
    for op in best.reverted:
        trial = next(trial for trial in search.trials if op in trial.reverted)
        reasons[op] = f"in float since trial {trial.number}, whose value was {trial.value:.6g}"
    return search.full.with_plan(search.plan(best.reverted, reasons))
