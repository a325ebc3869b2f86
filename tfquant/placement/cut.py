"""The cheapest assignment of units to INT8 or float, conversions counted: a minimum cut.

Each unit costs something in INT8 and something in float, and a tensor costs a conversion where it is made in one and read in
the other: one, however many read it. Such costs are submodular, so the cheapest assignment is the minimum cut of a graph, found
exactly (Kolmogorov and Zabih, "What energy functions can be minimized via graph cuts?", 2004).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import networkx as nx

# Costs are whole numbers of this many parts: cuts of floating-point numbers may not end.
_PARTS = 1_000_000
_INT8, _FLOAT = "int8", "float"


@dataclasses.dataclass(frozen=True)
class Crossing:
    """A tensor that units make or read.

    Attributes:
        maker: the unit that makes it, or None where a float op does.
        readers: the units that read it.
        shown: float ops read it too, or it is an output.
        to_int8: what it costs to quantize it.
        to_float: what it costs to dequantize it.
    """

    maker: str | None
    readers: Collection[str]
    shown: bool
    to_int8: float
    to_float: float


def cheapest(units: Mapping[str, tuple[float, float]], crossings: Iterable[Crossing]) -> set[str]:
    """The units that are to be INT8.

    Args:
        units: cost in INT8 and in float by name; any unit, but the same one throughout.
        crossings: the tensors between them.

    Returns:
        The names of the units in INT8; of equally cheap assignments, one with as many as possible.
    """
    largest = max((max(pair) for pair in units.values()), default=0.0) or 1.0
    graph = nx.DiGraph()
    graph.add_nodes_from([_INT8, _FLOAT])

    def pay(start: object, end: object, cost: float) -> None:
        """`cost` where `start` is on the INT8 side and `end` on the other."""
        amount = round(_PARTS * cost / largest)
        before = graph.get_edge_data(start, end, {"capacity": 0})["capacity"]
        graph.add_edge(start, end, capacity=before + amount)

    def forbid(start: object, end: object) -> None:
        graph.add_edge(start, end)  # without a capacity: infinite

    for name, (int8, float32) in units.items():
        pay(("unit", name), _FLOAT, int8)
        pay(_INT8, ("unit", name), float32)
    for index, crossing in enumerate(crossings):
        maker = ("unit", crossing.maker) if crossing.maker is not None else _FLOAT
        if crossing.readers:
            stored = ("stored", index)  # on the INT8 side where a reader is
            for reader in crossing.readers:
                forbid(("unit", reader), stored)
            pay(stored, maker, crossing.to_int8)
        if crossing.maker is None:
            continue
        if crossing.shown:
            pay(maker, _FLOAT, crossing.to_float)
        elif crossing.readers:
            floats = ("floats", index)  # on the float side where a reader is
            for reader in crossing.readers:
                forbid(floats, ("unit", reader))
            pay(maker, floats, crossing.to_float)
    _, (_, float_side) = nx.minimum_cut(graph, _INT8, _FLOAT)
    return {name for name in units if ("unit", name) not in float_side}
