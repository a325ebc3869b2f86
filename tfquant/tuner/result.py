"""What a tuning came to."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from tfquant.pipeline import QuantizedModel
from tfquant.tables import table
from tfquant.tuner.goal import Goal
from tfquant.tuner.search import Trial

JSON_NAME = "tuning.json"
FORMAT = "tfquant.tuning/1"
_LONGEST_STEP = 60


@dataclasses.dataclass(frozen=True)
class TuningResult:
    """The result of a tuning; `str()` is the table that the command line prints.

    Attributes:
        model: the best model found.
        met: whether it meets the goal.
        stopped: why the search ended.
        trials: all models that were evaluated on the whole validation set.
        best: the trial of `model`.
        goal: what was asked for, with the value of the float model.
        strategy: its name.
        objective: its name.
        costs: of the trials that meet the goal, by their numbers, where the objective told them apart.
    """

    model: QuantizedModel
    met: bool
    stopped: str
    trials: tuple[Trial, ...]
    best: Trial
    goal: Goal
    strategy: str
    objective: str
    costs: dict[int, float] = dataclasses.field(default_factory=dict)

    @property
    def float_value(self) -> float:
        """What `evaluate` returned for the float model."""
        return self.goal.float_value

    @property
    def value(self) -> float:
        """What it returned for `model`."""
        return self.best.value

    def __str__(self) -> str:
        is_timed = self.objective == "latency"
        header = ("Trial", "Float ops", "Value", "Drop", "Size", *(("Time",) if is_timed else ()), "Goal", "Step")
        rows = [header]
        for trial in self.trials:
            cost = self.costs.get(trial.number)
            rows.append(
                (
                    f"{trial.number}{' *' if trial is self.best else ''}",
                    str(trial.float_ops),
                    f"{trial.value:.6g}",
                    self._drop(trial.drop),
                    f"{trial.size / 1e3:.1f} kB",
                    *((f"{cost:.3f}" if cost is not None else "",) if is_timed else ()),
                    "met" if trial.met else "missed",
                    _cut(trial.step),
                )
            )
        lines = table(rows)
        word = "met" if self.met else "missed"
        lines += [
            "",
            f"Goal {word}: {self.value:.6g} against {self.float_value:.6g} in float32, a drop of {self._drop(self.best.drop)}, "
            f"{self._drop(self.goal.max_drop)} {self.goal.drop_type} allowed",
            f"Stopped: {self.stopped}",
            f"Best: trial {self.best.number}, {self.best.float_ops} ops in float"
            + (f": {', '.join(sorted(self.best.reverted))}" if self.best.reverted else ""),
        ]
        if is_timed:
            lines.append("Time is that of the model in INT8 throughout = 1, both called in turns")
        return "\n".join(lines)

    def _drop(self, drop: float) -> str:
        return f"{100 * drop:.3g}%" if self.goal.drop_type == "relative" else f"{drop:.4g}"

    def to_json(self) -> str:
        """All of it but the model, as the text of tuning.json."""
        content = {
            "format": FORMAT,
            "met": self.met,
            "stopped": self.stopped,
            "strategy": self.strategy,
            "objective": self.objective,
            "goal": {**dataclasses.asdict(self.goal), "least": self.goal.least},
            "best": self.best.number,
            "trials": [self._entry(trial) for trial in self.trials],
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def _entry(self, trial: Trial) -> dict[str, Any]:
        return {
            "number": trial.number,
            "step": trial.step,
            "reverted": sorted(trial.reverted),
            "float_ops": trial.float_ops,
            "value": trial.value if math.isfinite(trial.value) else None,
            "drop": trial.drop if math.isfinite(trial.drop) else None,
            "met": trial.met,
            "size": trial.size,
            "seconds": round(trial.seconds, 6),
            "cost": self.costs.get(trial.number),
        }


def _cut(step: str) -> str:
    return step if len(step) <= _LONGEST_STEP else f"{step[: _LONGEST_STEP - 3]}..."
