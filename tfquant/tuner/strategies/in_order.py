"""Ops return to float one after the other, in an order that is known beforehand."""

from __future__ import annotations

from collections.abc import Iterable

from tfquant.tuner.search import ALL_INT8, Search


def revert_in_order(search: Search, ops: Iterable[str]) -> str:
    """Reverts one op more per trial until the goal is met; returns why it stopped."""
    trial = search.trial((), ALL_INT8)
    for op in ops:
        if trial.met:
            break
        trial = search.trial(trial.reverted.union([op]), f"to float: {op}")
    return "the goal is met" if trial.met else "everything is in float"
