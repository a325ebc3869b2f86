"""The worst group returns to float, then the next: ranked on the samples that quantization hurts most, checked on all of them."""

from __future__ import annotations

from tfquant.tuner.giving_back import give_back
from tfquant.tuner.reverting import Group
from tfquant.tuner.search import ALL_INT8, Search, Trial


def accuracy_aware(search: Search) -> str:
    """NNCF's accuracy control, with three steps more.

    Groups are ranked by what reverting each gains on the subset. The best is reverted and the model evaluated on the whole
    validation set: where the drop fell, the next follows, else that step is undone and what is left is ranked again. What is
    left is also ranked again when a step gained less than an equal share, of all groups left, of what is lacking: where much is
    wrong, a layer's worth shows only when others are mended. Where no group helps alone, 2, 4, 8 ... of the best are reverted
    together. In the end, ops that need not be in float return to INT8.
    """
    current = search.trial((), ALL_INT8)
    ranking = _Ranking(search)
    while not current.met:
        better = ranking.next(current)
        if better is None:
            better = _several(search, current)
        if better is None:
            return "nothing that is left gains anything"
        current = better
    give_back(search, current)
    return "the goal is met"


class _Ranking:
    """The groups that may come next."""

    def __init__(self, search: Search) -> None:
        self._search = search
        self._order: list[Group] = []
        self._failed: set[Group] = set()

    def next(self, current: Trial) -> Trial | None:
        """The trial of the first group whose reverting gains something, or None where none does."""
        is_new = False
        while True:
            self._order = [group for group in self._order if not current.reverted.issuperset(group.ops)]
            if not self._order and not is_new:
                left = _left(self._search, current, self._failed)
                self._order, is_new = self._search.ranked(current.reverted, left), True
            if not self._order:
                return None
            group = self._order.pop(0)
            trial = self._search.trial(current.reverted.union(group.ops), f"to float: {group}")
            if trial.value > current.value:
                self._failed.clear()
                if (trial.value - current.value) * (1 + len(self._order)) < self._search.goal.least - current.value:
                    self._order = []
                return trial
            self._failed.add(group)
            if not is_new:
                self._order = []


def _several(search: Search, current: Trial) -> Trial | None:
    """The trial of the first 2, 4, 8 ... groups of the ranking together that gain something, or None."""
    order = search.ranked(current.reverted, _left(search, current, set()))
    count = 2
    while order:
        ops = current.reverted.union(*(group.ops for group in order[:count]))
        trial = search.trial(ops, f"to float: the {min(count, len(order))} best together")
        if trial.value > current.value:
            return trial
        if count >= len(order):
            break
        count *= 2
    return None


def _left(search: Search, current: Trial, failed: set[Group]) -> list[Group]:
    return [group for group in search.groups if group not in failed and not current.reverted.issuperset(group.ops)]
