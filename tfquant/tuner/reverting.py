"""What may return to float, and the plan in which it has."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from tfquant.errors import PlanError
from tfquant.graph.ir import Graph, Tensor
from tfquant.pipeline import decided
from tfquant.plan.annotate import Annotation
from tfquant.plan.kernels import Unit
from tfquant.plan.spec import U8, OpDecision, QuantPlan

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Group:
    """Ops that return to float in one step.

    Attributes:
        ops: names of their decisions, in topological order.
        shares: the 8-bit tensor that is not rounded to 8 bits any more only where all of them are in float; "" for a single op.
    """

    ops: tuple[str, ...]
    shares: str = ""

    def __str__(self) -> str:
        return f"the {len(self.ops)} readers of {self.shares}" if self.shares else ", ".join(self.ops)


def find_groups(annotation: Annotation, plan: QuantPlan) -> tuple[Group, ...]:
    """Each INT8 op by itself, and those that read a tensor in 8 bits together: its rounding ends when all of them are in float.

    What only moves or passes on 8-bit values is no op of a group: it follows what is around it.

    Args:
        annotation: of the model in INT8 throughout.
        plan: its plan.
    """
    if plan.mode == "weight_only":
        return tuple(Group((decision.name,)) for decision in plan.ops if decision.int8)
    computing = [unit for part in annotation.parts for unit in part.units.values() if unit.kernel.role == "compute"]
    position = {unit.name: index for index, unit in enumerate(computing)}
    found = [Group((unit.name,)) for unit in computing]
    for part in annotation.parts:
        for tensor, readers in _readers(part).items():
            if len(readers) > 1:
                found.append(Group(tuple(sorted(readers, key=position.__getitem__)), tensor.name))
    distinct = {group.ops: group for group in reversed(found)}
    return tuple(sorted(distinct.values(), key=lambda group: ([position[op] for op in group.ops], group.shares)))


def _readers(annotation: Annotation) -> dict[Tensor, set[str]]:
    """The computing units that a quantized tensor reaches in 8 bits, through units that pass values on."""
    found: dict[Tensor, set[str]] = collections.defaultdict(set)
    for unit in reversed(list(annotation.units.values())):
        names = {unit.name} if unit.kernel.role == "compute" else found[unit.output]
        for tensor in unit.inputs:
            found[tensor] |= names
    return found


class Reverter:
    """Makes the plans in which some ops of a plan are in float again.

    Args:
        base: the simplified float graph before the plan's edits.
        plan: of the model in INT8 throughout.
        annotation: what runs in INT8 there.
    """

    def __init__(self, base: Graph, plan: QuantPlan, annotation: Annotation) -> None:
        self._base, self._plan = base, plan
        self._covered = {
            unit.name: {node.name for node in unit.match.covered} for part in annotation.parts for unit in part.units.values()
        }

    def plan(self, ops: Collection[str], reasons: Mapping[str, str]) -> QuantPlan:
        """The plan with `ops` in float: they compute what they did before quantization; all other ranges stay.

        An op that would then need a range that nobody has seen (the other summand of a residual add that was part of a
        reverted convolution) does not take that node in; where that does not help, it returns to float, too.

        Args:
            ops: names of decisions.
            reasons: why, by name; the decisions of the plan tell it.

        Raises:
            PlanError: no such plan can be made.
        """
        kept = {op: f"reverted by tuning: {reasons.get(op, 'for accuracy')}" for op in ops}
        if self._plan.mode == "weight_only":
            return self._pruned(self._decided(kept), None)
        for _ in range(len(self._base.nodes)):
            plan = self._decided(kept)
            graph = self._base.copy()
            annotation = decided(graph, plan)
            beyond = [name for part in annotation.parts for name in self._without_range(part)]
            if not beyond or plan.mode == "dynamic":
                return self._pruned(plan, annotation)
            before = len(kept)
            kept |= dict.fromkeys(beyond, f"reverted by tuning: {', '.join(sorted(ops)[:3])} in float leave it without a range")
            if len(kept) == before:
                break
        raise PlanError(f"No plan has ranges for what is left in INT8 without {', '.join(sorted(ops))}.")

    def _decided(self, kept: Mapping[str, str]) -> QuantPlan:
        """The plan with other decisions, all else untouched."""
        plan = self._plan
        known = {decision.name for decision in plan.ops}
        ops = [
            dataclasses.replace(decision, int8=False, reason=kept[decision.name]) if decision.name in kept else decision
            for decision in plan.ops
        ]
        # Nodes without a decision (the Add of a residual) get one, which keeps them out of units.
        ops += [
            OpDecision(name, self._base.nodes[name].op, "", "", False, reason)
            for name, reason in kept.items()
            if name not in known and name in self._base.nodes
        ]
        return dataclasses.replace(plan, ops=tuple(ops))

    def _without_range(self, annotation: Annotation) -> Iterable[str]:
        """What must not be part of units, so that none needs a range that the plan does not have, or has of another type."""
        missing = {
            tensor
            for tensor, group in annotation.quantized.items()
            if not self._plan.quantizes(tensor.name)
            or (group.unsigned and tensor.name in self._plan.tensors and self._plan.tensors[tensor.name].dtype != U8)
        }
        for unit in annotation.units.values():
            if missing.intersection((*unit.inputs, unit.output)):
                yield from self._grown(unit) or [unit.name]

    def _grown(self, unit: Unit) -> list[str]:
        """The nodes that a unit covers now and did not before."""
        before = self._covered.get(unit.name, set())
        return [node.name for node in unit.match.covered if node.name not in before and node is not unit.main]

    def _pruned(self, plan: QuantPlan, annotation: Annotation | None) -> QuantPlan:
        """The plan as it is written: the decisions that were made, and nothing for what is in float."""
        if annotation is None:
            int8 = {decision.name for decision in plan.ops if decision.int8}
            return dataclasses.replace(plan, weight_scales=_of(int8, plan.weight_scales))
        units = {unit.name for part in annotation.parts for unit in part.units.values()}
        quantized = {tensor.name for part in annotation.parts for tensor in part.quantized}
        dynamic = plan.dynamic
        if plan.mode == "dynamic":  # all of its tensors have one spec, and any may have it
            dynamic = dict.fromkeys(sorted(quantized), next(iter(plan.dynamic.values()))) if plan.dynamic else {}
        return dataclasses.replace(
            plan,
            ops=annotation.decisions,
            tensors=_of(quantized, plan.tensors),
            dynamic=dynamic,
            weight_scales=_of(units, plan.weight_scales),
            rounded=_of(units, plan.rounded),
            weight_bits=_of(units, plan.weight_bits),
            weight_offsets=_of(units, plan.weight_offsets),
        )


def _of(names: Collection[str], mapping: Mapping[str, Value]) -> dict[str, Value]:
    return {name: value for name, value in mapping.items() if name in names}
