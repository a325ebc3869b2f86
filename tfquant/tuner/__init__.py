"""Accuracy-aware tuning: what costs too much accuracy in INT8 returns to float."""

from tfquant.tuner.goal import Goal
from tfquant.tuner.loop import tune
from tfquant.tuner.metrics import METRICS, Metric
from tfquant.tuner.objectives import OBJECTIVES, Accuracy, Latency, Size
from tfquant.tuner.result import TuningResult
from tfquant.tuner.search import Budget, Objective, Search, Stopped, Trial
from tfquant.tuner.strategies import STRATEGIES, Strategy
from tfquant.tuner.validation import Validation

__all__ = [
    "METRICS",
    "OBJECTIVES",
    "STRATEGIES",
    "Accuracy",
    "Budget",
    "Goal",
    "Latency",
    "Metric",
    "Objective",
    "Search",
    "Size",
    "Stopped",
    "Strategy",
    "Trial",
    "TuningResult",
    "Validation",
    "tune",
]
