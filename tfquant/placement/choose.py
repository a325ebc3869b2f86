"""Which units run in 8 bits."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Mapping, Sequence

from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.placement.costs import Costs
from tfquant.placement.cut import Crossing, cheapest
from tfquant.plan.annotate import Annotation
from tfquant.plan.kernels import Unit


@dataclasses.dataclass(frozen=True)
class Choice:
    """What placement decided.

    Attributes:
        floats: units that stay float, with the reason, by their main node.
        saved: what that saves against INT8 wherever it is possible, as a share of the network's time in float32.
        microseconds: the same at each batch size, per call.
    """

    floats: Mapping[Node, str]
    saved: float
    microseconds: Mapping[int, float]


def choose(graph: Graph, annotation: Annotation, costs: Sequence[Costs]) -> Choice:
    """The cheapest assignment; where there are several batch sizes, each counts by its share of the time in float32.

    Args:
        graph: the simplified float graph.
        annotation: all that could run in INT8.
        costs: of units and conversions, one per batch size.
    """
    named = {unit.name: unit for unit in annotation.units.values()}
    share = {entry.batch_size: 1 / (len(costs) * max(entry.total, 1e-9)) for entry in costs}
    units = {
        name: (
            sum(share[entry.batch_size] * entry.int8[name] for entry in costs),
            sum(share[entry.batch_size] * entry.float32[name] for entry in costs),
        )
        for name in named
    }
    facts = _crossings(graph, annotation)
    crossings = {
        tensor: dataclasses.replace(
            crossing,
            to_int8=sum(share[entry.batch_size] * entry.to_int8(tensor) for entry in costs),
            to_float=sum(share[entry.batch_size] * entry.to_float(tensor) for entry in costs),
        )
        for tensor, crossing in facts.items()
    }
    chosen = cheapest(units, crossings.values())
    if len(chosen) == len(units):
        return Choice({}, 0.0, dict.fromkeys(share, 0.0))
    everything = set(units)
    saved = _cost(units, crossings.values(), everything) - _cost(units, crossings.values(), chosen)
    microseconds = {}
    for entry in costs:
        own = {name: (entry.int8[name], entry.float32[name]) for name in named}
        ways = [
            dataclasses.replace(crossing, to_int8=entry.to_int8(tensor), to_float=entry.to_float(tensor))
            for tensor, crossing in facts.items()
        ]
        microseconds[entry.batch_size] = _cost(own, ways, everything) - _cost(own, ways, chosen)
    # What only moves values follows what is around it: `annotate` sees to that.
    floats = {
        unit.main: _reason(unit, costs)
        for name, unit in named.items()
        if name not in chosen and unit.kernel.role not in ("share", "source")
    }
    return Choice(floats, saved, microseconds)


def _reason(unit: Unit, costs: Sequence[Costs]) -> str:
    """The figures at the batch size at which INT8 loses most."""
    worst = max(costs, key=lambda entry: (entry.int8[unit.name] - entry.float32[unit.name]) / max(entry.total, 1e-9))
    int8, float32 = worst.int8[unit.name] / 1e3, worst.float32[unit.name] / 1e3
    what = "INT8" if int8 > float32 else "INT8, and conversions around it,"
    return f"{what} would take longer than float32: {int8:.3f} ms against {float32:.3f} ms at batch {worst.batch_size}"


def _crossings(graph: Graph, annotation: Annotation) -> dict[Tensor, Crossing]:
    makes = {unit.output: unit for unit in annotation.units.values()}
    readers: dict[Tensor, dict[str, None]] = collections.defaultdict(dict)
    owners: dict[Node, Unit] = {}
    for unit in annotation.units.values():
        owners |= dict.fromkeys(unit.private(graph), unit)
        for tensor in unit.inputs:
            readers[tensor][unit.name] = None
    found = {}
    for tensor in dict.fromkeys([*readers, *makes]):
        maker = makes.get(tensor)
        # A kernel that can return float itself is timed doing so where nobody reads 8 bits.
        is_free = maker is not None and maker.gives_float and tensor not in readers
        shown = graph.is_output(tensor) or any(user not in owners for user, _ in graph.users(tensor))
        found[tensor] = Crossing(maker.name if maker else None, tuple(readers[tensor]), shown and not is_free, 0.0, 0.0)
    return found


def _cost(units: Mapping[str, tuple[float, float]], crossings: Collection[Crossing], chosen: set[str]) -> float:
    total = sum(int8 if name in chosen else float32 for name, (int8, float32) in units.items())
    for crossing in crossings:
        is_stored = crossing.maker in chosen
        if not is_stored and any(reader in chosen for reader in crossing.readers):
            total += crossing.to_int8
        if is_stored and (crossing.shown or any(reader not in chosen for reader in crossing.readers)):
            total += crossing.to_float
    return total
