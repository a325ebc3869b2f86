"""Ops that were reverted on the way and need not be: they return to INT8."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tfquant.tuner.search import Search, Trial, pieces


def give_back(search: Search, trial: Trial, order: Callable[[Sequence[str]], Sequence[str]] = tuple) -> Trial:
    """Returns ops to INT8 as long as the goal is met: half of them at once, then quarters, and so on, then one by one.

    Args:
        search: the search.
        trial: one that meets the goal.
        order: which are to return first, given those that could in topological order.

    Returns:
        The trial with the fewest of its ops in float.

    Raises:
        Stopped: the budget is spent.
    """
    size = len(trial.reverted) // 2
    while size:
        for chosen in pieces(order([op for op in search.ops if op in trial.reverted]), size):
            left = trial.reverted.difference(chosen)
            if left == trial.reverted or not left:  # everything in INT8 was the first trial
                continue
            found = search.trial(left, f"quantized again: {', '.join(chosen)}")
            if found.met:
                trial = found
        size //= 2
    return trial
