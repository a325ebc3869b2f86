"""How much worse than the float model the result may be."""

from __future__ import annotations

import dataclasses
import math
import numbers

from tfquant.errors import ConfigError, shown

DROP_TYPES = ("absolute", "relative")
# Of the float value: sums in another order differ by this much.
_SLACK = 1e-9


@dataclasses.dataclass(frozen=True)
class Goal:
    """The value that must be reached; higher is better.

    Attributes:
        float_value: that of the float model; not 0 where the drop is relative.
        max_drop: how much lower the result's may be.
        drop_type: "absolute", in units of the value; or "relative", as a share of the float model's.
    """

    float_value: float
    max_drop: float
    drop_type: str

    @property
    def least(self) -> float:
        """The lowest value that meets the goal."""
        allowed = self.max_drop * (1.0 if self.drop_type == "absolute" else abs(self.float_value))
        return self.float_value - allowed

    def drop(self, value: float) -> float:
        """How much lower a value is than the float model's, in units of `max_drop`."""
        drop = self.float_value - value
        return drop if self.drop_type == "absolute" else drop / abs(self.float_value)

    def is_met(self, value: float) -> bool:
        return value >= self.least - _SLACK * max(abs(self.float_value), abs(self.least))


def check_goal(max_drop: object, drop_type: object) -> None:
    """Raises `ConfigError` for a drop that cannot be."""
    if drop_type not in DROP_TYPES:
        raise ConfigError(f"drop_type must be one of {', '.join(DROP_TYPES)}. Received: {shown(drop_type)}")
    is_number = isinstance(max_drop, numbers.Real) and not isinstance(max_drop, bool)
    if not is_number or not math.isfinite(float(max_drop)) or float(max_drop) < 0:  # type: ignore[arg-type]
        raise ConfigError(f"max_drop must be a number of at least 0. Received: {shown(max_drop)}")
    if drop_type == "relative" and float(max_drop) >= 1:  # type: ignore[arg-type]
        raise ConfigError(
            f"A relative max_drop is a share of the float model's value, below 1: 0.01 is one percent. "
            f"Received: {shown(max_drop)}"
        )
