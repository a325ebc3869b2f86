"""Ops return to float by the error that each makes in its own output, the largest first."""

from __future__ import annotations

from tfquant.tuner.search import Search
from tfquant.tuner.sensitivity import Sensitivity, measure
from tfquant.tuner.strategies.in_order import revert_in_order


def mse(search: Search) -> str:
    """One op more in each trial, by the mean squared error of its output as a share of the output's mean square.

    Each is measured with float inputs: what ops before it do wrong is not counted against it.
    """
    return revert_in_order(search, by_sensitivity(search, "mse"))


def by_sensitivity(search: Search, kind: str) -> list[str]:
    """The ops by a field of `Sensitivity`, the largest first; those that cannot be measured (in bodies of loops) come last."""

    def measured() -> dict[str, dict[str, float]]:
        found = measure(search.full, [batch.inputs for batch in search.subset.batches], with_curvature=kind == "curvature")
        return {"values": {op: getattr(entry, kind) for op, entry in found.items()}}

    assert kind in Sensitivity.__annotations__
    values = search.known(kind, (), measured)["values"]
    position = {op: index for index, op in enumerate(search.ops)}
    return sorted(search.ops, key=lambda op: (-values.get(op, -1.0), position[op]))
