"""Ways of searching for what must return to float, one file each.

A strategy is a function of a `Search`. It asks for trials (`Search.trial`) until one meets the goal or it knows no more; what it
returns is why it stopped. Where the budget is spent, `Search` raises `Stopped`, which a strategy lets pass.
"""

from __future__ import annotations

from collections.abc import Callable

from tfquant.registry import Registry
from tfquant.tuner.search import Search
from tfquant.tuner.strategies.accuracy_aware import accuracy_aware
from tfquant.tuner.strategies.basic import basic
from tfquant.tuner.strategies.bayesian import bayesian
from tfquant.tuner.strategies.hawq import hawq
from tfquant.tuner.strategies.mse import mse

Strategy = Callable[[Search], str]

STRATEGIES: Registry[Strategy] = Registry(
    "strategy",
    {"accuracy_aware": accuracy_aware, "basic": basic, "mse": mse, "hawq": hawq, "bayesian": bayesian},
)
