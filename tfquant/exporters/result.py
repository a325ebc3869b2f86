"""What an export made, and whether it is right."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from tfquant.errors import OutputError
from tfquant.exporters.checking import Check

# Outputs that are no closer to the simulation than this are wrong: without a check of the layers, and with one, where a deep
# network may have made noise of every rounding (of two signals that have nothing in common the difference is at -3 dB).
_LEAST_DECIBELS, _LEAST_CHECKED, _LEAST_EXACT = 3.0, -6.0, 35.0
# Nor what is behind the last quantized tensors: float ops alone, which left 120 dB and more.
_LEAST_BEHIND = 60.0


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model in another format.

    Attributes:
        format: "tflite" or "onnx".
        kind: how it is quantized.
        size: bytes of the file.
        float_size: bytes of the float32 constants of the model that it was made of.
        quantized_ops: how many ops compute with integers.
        float_ops: type and name of each op that computes in float, conversions left out.
        check: against the simulation; None where the format's own runtime did not run the file.
        exact: the runtime computes with the integers of the plan, layer by layer.
        notes: more to say, a line each.
        others: checks in other runtimes of the format.
    """

    format: str
    kind: str
    size: int
    float_size: int
    quantized_ops: int
    float_ops: tuple[tuple[str, str], ...]
    check: Check | None
    exact: bool
    notes: tuple[str, ...] = ()
    others: tuple[Check, ...] = ()

    @property
    def checks(self) -> tuple[Check, ...]:
        """Those of all runtimes that ran the file."""
        return self.others if self.check is None else (self.check, *self.others)

    def lines(self) -> list[str]:
        """For people."""
        share = self.size / self.float_size if self.float_size else 0.0
        found = [f"{self.format}, {self.kind}: {self.size / 1e6:.2f} MB, {share:.2f} of the float32 weights"]
        if self.quantized_ops:
            left = collections.Counter(op for op, _ in self.float_ops)
            named = ", ".join(f"{count} {op}" for op, count in left.most_common())
            found.append(f"Ops with integers: {self.quantized_ops}; in float: {named or 'none'}")
        found += self.notes
        return found + ([line for check in self.checks for line in check.lines()] or ["Not verified: no runtime ran the file."])

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def judge(exported: Exported) -> None:
    """Raises `OutputError` where a runtime computes something else than the simulation."""
    for found in exported.checks:
        _judge(found, exported.exact)


def _judge(found: Check, exact: bool) -> None:
    if found.wrong:
        first = found.wrong[0]
        raise OutputError(
            f"{found.runtime} computes {first.name} otherwise than the simulation says: {100 * first.beyond:.2g}% of its "
            f"values are off by up to {first.steps:.1f} steps. Nothing was written; please report it with the model's structure."
        )
    if found.behind is not None and found.behind < _LEAST_BEHIND:
        raise OutputError(
            f"{found.runtime} computes the outputs otherwise than the simulation says: {found.behind:.1f} dB from equal tensors "
            "in front of them. Nothing was written; please report it with the model's structure."
        )
    least = _LEAST_CHECKED if found.behind is not None else _LEAST_DECIBELS if exact else _LEAST_EXACT
    if found.sqnr < least:
        raise OutputError(
            f"The outputs of {found.runtime} are not those of the simulation: {found.sqnr:.1f} dB. Nothing was written; please "
            "report it with the model's structure."
        )
