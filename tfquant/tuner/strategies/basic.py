"""Ops return to float in the order of the graph; then whole types of ops are tried, where they are fewer."""

from __future__ import annotations

import collections

from tfquant.tuner.search import Search
from tfquant.tuner.strategies.in_order import revert_in_order


def basic(search: Search) -> str:
    """Knows nothing of the model: what others are compared with.

    One op more in each trial, from the inputs on, until the goal is met. A type of ops is tried where it has fewer ops than were
    reverted.
    """
    reason = revert_in_order(search, search.ops)
    count = len(search.trials[-1].reverted)
    types = collections.defaultdict(list)
    for decision in search.full.plan.ops:
        if decision.name in search.ops:
            types[decision.op].append(decision.name)
    for op, names in sorted(types.items(), key=lambda entry: (len(entry[1]), entry[0])):
        if len(names) >= count:
            break
        if search.trial(names, f"to float: all {op}").met:
            return "the goal is met"
    return reason
