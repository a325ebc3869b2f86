"""Which ops run in INT8 and which tensors are quantized: read off the target's kernel table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping

from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.graph.patterns import Trace, first_ops, matches
from tfquant.plan.kernels import KernelTable, Unit
from tfquant.plan.spec import OpDecision

# Why a unit stays float that nothing holds.
NO_GAIN = "converting its inputs or its output would cost more than it saves"


@dataclasses.dataclass(frozen=True)
class Group:
    """Tensors that share one range.

    Attributes:
        name: name of its first tensor.
        tensors: the members, in topological order.
        sources: the members whose values the others repeat: their statistics are those of the group.
        clip: the activation that all sources end with, "" where they differ or have none.
        needs_zero: a member is padded with zeros.
        unsigned: a member must be quint8.
        known: the ends of its range, where the members can have no other.
    """

    name: str
    tensors: tuple[Tensor, ...]
    sources: tuple[Tensor, ...]
    clip: str
    needs_zero: bool
    unsigned: bool
    known: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Annotation:
    """What runs in INT8, before any range is known.

    Attributes:
        units: the INT8 units by their root node, in topological order.
        groups: the quantized tensors.
        decisions: for the plan.
        bodies: of loops that were annotated too, by the name of the loop; `decisions` has theirs.
    """

    units: Mapping[Node, Unit]
    groups: tuple[Group, ...]
    decisions: tuple[OpDecision, ...]
    bodies: Mapping[str, Body] = dataclasses.field(default_factory=dict)

    @property
    def parts(self) -> tuple[Annotation, ...]:
        """This one, and those of the bodies."""
        return (self, *(body.annotation for body in self.bodies.values()))

    @property
    def quantized(self) -> dict[Tensor, Group]:
        return {tensor: group for group in self.groups for tensor in group.tensors}


@dataclasses.dataclass(frozen=True)
class Body:
    """The simplified body of a loop, whose tensors have names unlike all others of the model, and what runs in INT8 there."""

    graph: Graph
    annotation: Annotation


def annotate(graph: Graph, table: KernelTable, keep_float: Callable[[Node], str | None] = lambda node: None) -> Annotation:
    """Decides what runs in INT8.

    Args:
        graph: the simplified float graph.
        table: the target's kernels.
        keep_float: the reason why a node must stay float, and with it all units that cover it, or None.

    Returns:
        The `Annotation`; the same for the same graph.
    """
    order = graph.order()
    position = {node: index for index, node in enumerate(order)}
    found = _find_units(graph, table, order, position, keep_float)
    active = _place(graph, found.units)
    return Annotation(active, _group(graph, active), _decisions(order, found, active))


def regrouped(graph: Graph, annotation: Annotation, apart: Collection[Tensor]) -> Annotation:
    """The same units with other groups: tensors that are `apart` keep their ranges where a kernel can join different ones."""
    return dataclasses.replace(annotation, groups=_group(graph, annotation.units, apart))


def as_decided(decisions: Iterable[OpDecision]) -> Callable[[Node], str | None]:
    """`keep_float` for `annotate`, so that it decides the same again; ops that are new are free."""
    known = {decision.name: decision for decision in decisions}

    def keep_float(node: Node) -> str | None:
        decision = known.get(node.name)
        if decision is None or decision.int8 or decision.reason == NO_GAIN:
            return None
        return decision.reason or "the plan keeps it in float"

    return keep_float


@dataclasses.dataclass
class _Found:
    """What was found in a graph.

    Attributes:
        units: by root node, in topological order.
        held: units that must stay float, with the reason, by their main node.
        reasons: why other nodes have no unit, those included that hold one.
    """

    units: dict[Node, Unit]
    held: dict[Node, tuple[Unit, str]]
    reasons: dict[Node, str]


def _find_units(
    graph: Graph,
    table: KernelTable,
    order: list[Node],
    position: Mapping[Node, int],
    keep_float: Callable[[Node], str | None],
) -> _Found:
    """The largest match at each node that need not stay float, from the outputs backwards."""
    by_op = [(kernel, first_ops(kernel.pattern)) for kernel in table.kernels]
    covered: set[Node] = set()
    units: dict[Node, Unit] = {}
    held: dict[Node, tuple[Unit, str]] = {}
    reasons: dict[Node, str] = {}
    for node in reversed(order):
        if node in covered:
            continue
        trace = Trace()
        for kernel, ops in by_op:
            if node.op not in ops:
                continue
            found: list[Unit] = []
            for match in matches(kernel.pattern, graph, node, trace):
                if not match.nodes or covered.intersection(match.covered):
                    continue
                described = kernel.describe(kernel, graph, match)
                if isinstance(described, str):
                    trace.failed(len(match.nodes), described)
                elif named := {inner: why for inner in match.covered if (why := keep_float(inner))}:
                    held.setdefault(described.main, (described, next(iter(named.values()))))
                    reasons |= named
                elif not found or len(found[0].match.nodes) == len(match.nodes):
                    found.append(described)
            if found:
                # Of two layers that an Add could belong to, the later one: the other's result is then there already.
                unit = max(found, key=lambda unit: position[unit.main])
                units[node] = unit
                covered.update(unit.private(graph))
                break
        else:
            if node.out.dtype is None or not node.out.dtype.is_floating:
                continue
            if node.op in table.missing:
                reasons.setdefault(node, table.missing[node.op])
            elif trace.reason and node.op in table.subjects:
                reasons.setdefault(node, trace.reason)
    return _Found({root: units[root] for root in order if root in units}, held, reasons)


def _place(graph: Graph, units: Mapping[Node, Unit]) -> dict[Node, Unit]:
    """Drops units for which values would have to be converted to 8 bits and back without gain."""
    while True:
        active = _at_hand(units)
        dropped = _useless(graph, units, active)
        if not dropped:
            return {root: unit for root, unit in units.items() if root in active}
        # Others may have been placed because of them.
        units = {root: unit for root, unit in units.items() if root not in dropped}


def _at_hand(units: Mapping[Node, Unit]) -> set[Node]:
    """Units that compute, others that find their inputs in 8 bits (made so, or quantized for others), and sources of these."""
    makes = {unit.output: root for root, unit in units.items() if not unit.only_float}
    active = {root for root, unit in units.items() if unit.kernel.role == "compute"}
    readers = _readers(units)
    changed = True
    while changed:
        changed = False
        for root, unit in units.items():
            if root in active:
                continue
            is_source = unit.kernel.role == "source"
            if readers.get(unit.output, set()) & active if is_source else _has_inputs(unit, makes, readers, active):
                active.add(root)
                changed = True
    return active


def _has_inputs(unit: Unit, makes: Mapping[Tensor, Node], readers: Mapping[Tensor, set[Node]], active: set[Node]) -> bool:
    return all(makes.get(tensor) in active or readers[tensor] & active for tensor in unit.inputs)


def _useless(graph: Graph, units: Mapping[Node, Unit], active: set[Node]) -> set[Node]:
    readers, left = _readers(units), set(active)
    for root, unit in reversed(list(units.items())):
        if unit.kernel.role == "compute" or root not in left:
            continue
        if graph.is_shown(unit.output) and not unit.gives_float:
            left.discard(root)  # an 8-bit output would tie what float tells apart
        elif not readers.get(unit.output, set()) & left and unit.kernel.role in ("share", "source") and not unit.shrinks:
            left.discard(root)  # floats can be moved as they are: the producer may then return float itself
    return active - left


def _readers(units: Mapping[Node, Unit]) -> dict[Tensor, set[Node]]:
    readers: dict[Tensor, set[Node]] = {}
    for root, unit in units.items():
        for tensor in unit.inputs:
            readers.setdefault(tensor, set()).add(root)
    return readers


def _group(graph: Graph, active: Mapping[Node, Unit], apart: Collection[Tensor] = ()) -> tuple[Group, ...]:
    quantized: dict[Tensor, None] = {}
    needed = {tensor for unit in active.values() for tensor in unit.inputs}
    for unit in active.values():
        for tensor in unit.inputs:
            quantized.setdefault(tensor)
        if unit.output in needed or not unit.gives_float:
            quantized.setdefault(unit.output)
    makes = {unit.output: unit for unit in active.values()}
    parent = {tensor: tensor for tensor in quantized}

    def find(tensor: Tensor) -> Tensor:
        while parent[tensor] != tensor:
            parent[tensor] = parent[parent[tensor]]
            tensor = parent[tensor]
        return tensor

    def repeats(tensor: Tensor) -> bool:
        """Whether all values of a tensor are those of others in its group."""
        unit = makes.get(tensor)
        if unit is None or unit.kernel.role != "share":
            return False
        return all(find(source) == find(tensor) for source in unit.inputs)

    clips = dict.fromkeys(quantized, "") | _clips(active)
    known = {unit.output: unit.known for unit in active.values() if unit.known is not None}
    for unit in active.values():
        if unit.kernel.role != "share":
            continue
        inner = {clips[tensor] for tensor in unit.inputs}
        for tensor in unit.inputs:
            # A ReLU is the end of a range: its tensor keeps the range to itself unless all it is joined with end alike.
            # So does what can have no other range, or is to be apart.
            is_free = tensor not in known and tensor not in apart and (clips[tensor] == "" or len(inner) == 1)
            if not unit.own_ranges or is_free:
                parent[find(unit.output)] = find(tensor)
    members: dict[Tensor, list[Tensor]] = {}
    for tensor in quantized:
        members.setdefault(find(tensor), []).append(tensor)
    unsigned = {tensor for unit in active.values() for tensor in unit.unsigned}
    padded = {unit.inputs[0] for unit in active.values() if unit.needs_zero}
    groups = []
    for tensors in members.values():
        sources = tuple(tensor for tensor in tensors if not repeats(tensor))
        kinds = {clips[tensor] for tensor in sources}
        groups.append(
            Group(
                name=tensors[0].name,
                tensors=tuple(tensors),
                sources=sources,
                clip=kinds.pop() if len(kinds) == 1 else "",
                needs_zero=any(tensor in padded for tensor in tensors),
                unsigned=any(tensor in unsigned for tensor in tensors),
                known=next((known[tensor] for tensor in sources if tensor in known), None),
            )
        )
    return tuple(groups)


def _clips(active: Mapping[Node, Unit]) -> dict[Tensor, str]:
    """The activation behind the result of each unit, seen through what only moves values; "" where there is none or several."""
    clips: dict[Tensor, str] = {}
    for unit in active.values():
        kinds = {clips.get(tensor, "") for tensor in unit.inputs} if unit.kernel.role == "share" else {unit.clip}
        clips[unit.output] = kinds.pop() if len(kinds) == 1 else ""
    return clips


def _decisions(order: list[Node], found: _Found, active: Mapping[Node, Unit]) -> tuple[OpDecision, ...]:
    by_main = {unit.main: unit for unit in found.units.values()}
    covered = {node for unit in active.values() for node in unit.match.covered}
    taken = {node for unit in found.units.values() for node in unit.match.covered}
    decisions = []
    for node in order:
        unit = by_main.get(node)
        if unit is not None:
            is_int8 = unit.match.root in active
            decisions.append(OpDecision(unit.name, node.op, unit.kernel.name, unit.key, is_int8, "" if is_int8 else NO_GAIN))
        elif node in found.held and node not in taken:  # else a smaller match that need not stay float has it
            unit, reason = found.held[node]
            decisions.append(OpDecision(unit.name, node.op, unit.kernel.name, unit.key, False, reason))
        elif node in found.reasons and node not in covered and node not in taken:
            decisions.append(OpDecision(node.name, node.op, "", "", False, found.reasons[node]))
    return tuple(decisions)
