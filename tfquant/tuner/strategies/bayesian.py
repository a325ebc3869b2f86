"""A tree-structured Parzen estimator says which ops to try in float next; by Optuna."""

from __future__ import annotations

from typing import Any

from tfquant.errors import ConfigError
from tfquant.tuner.search import ALL_INT8, Search, Trial

_SEED = 0
# Proposals, where no budget says how many: so many per op, within limits.
_PER_OP, _LEAST, _MOST = 4, 20, 200


def bayesian(search: Search) -> str:
    """Each op is a choice between INT8 and float; the objective is few ops in float that meet the goal.

    It begins with what the ranking of `accuracy_aware` says: the best 1, 2, 4 ... groups in float. The search has a fixed seed.

    Raises:
        ConfigError: Optuna is not installed.
    """
    optuna = _optuna()
    search.trial((), ALL_INT8)
    if search.best.met:
        return "the goal is met"
    ops = search.ops
    study = optuna.create_study(direction="minimize", sampler=optuna.samplers.TPESampler(seed=_SEED, multivariate=True))
    order = search.ranked(frozenset(), search.groups)
    count = 1
    while count < 2 * len(order):
        first = {op for group in order[:count] for op in group.ops}
        study.enqueue_trial({op: op in first for op in ops})
        count *= 2
    proposals = min(max(_PER_OP * len(ops), _LEAST), _MOST)
    for index in range(proposals):
        asked = study.ask()
        chosen = [op for op in ops if asked.suggest_categorical(op, [False, True])]
        study.tell(asked, _loss(search, search.trial(chosen, f"proposal {index + 1}")))
    return f"{proposals} proposals were tried"


def _loss(search: Search, trial: Trial) -> float:
    """The share of ops in float where the goal is met; else more than 1, by how much is lacking."""
    if trial.met:
        return trial.float_ops / max(len(search.ops), 1)
    start = search.trials[0].value
    lacking = (search.goal.least - trial.value) / max(abs(search.goal.least - start), 1e-12)
    return 1.0 + min(lacking, 1e6)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("The strategy bayesian needs Optuna: pip install 'tfquant[tune]', or choose another.") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
