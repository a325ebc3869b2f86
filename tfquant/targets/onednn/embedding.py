"""Embeddings: rows of a constant table, stored in 8 bits with a scale each and looked up so; the result is float.

A quarter of the memory, and about the time of the float lookup: less is read, more is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tfquant.graph.ir import Graph
from tfquant.graph.patterns import Any, Const, Match, Op
from tfquant.plan.kernels import Kernel, Unit
from tfquant.targets.lookup import LOOKUPS, is_of_rows, looked_up
from tfquant.targets.onednn import common

if TYPE_CHECKING:
    from tfquant.targets.onednn.lowering import Lowering

# Tables of fewer values stay float: an op more would cost as much as there is to gain.
LEAST_VALUES = 4096


def _describe(kernel: Kernel, graph: Graph, match: Match) -> Unit | str:
    node, table = match.root, match["table"]
    values = match.value("table")
    reason = common.not_float32(table)
    if reason:
        return reason
    if values.ndim != 2 or values.size < LEAST_VALUES:
        return f"its table must be of two axes and at least {LEAST_VALUES} values, it is of shape {values.shape}"
    if not is_of_rows(node):
        return "it does not look up rows"
    other = next((user for user, slot in graph.users(table) if user.op not in LOOKUPS or slot), None)
    if other is not None or graph.is_output(table):
        return f"its table is read by {other.name if other else 'an output'} in float too"
    if not np.isfinite(values).all():
        return "its table holds NaN or infinity"
    return Unit(
        kernel=kernel,
        match=match,
        main=node,
        inputs=(),
        output=node.out,
        weights=values.T,
        is_table=True,
        gives_float=True,
        only_float=True,
    )


def _lower(lowering: Lowering, unit: Unit) -> None:
    node = unit.main
    others = [lowering.as_float(tensor) for tensor in node.inputs[1:]]
    table, scales = lowering.table(unit)
    lowering.put_float(unit.output, looked_up(lowering.graph, node, table, scales, others, unit.name))


KERNEL = Kernel(
    "embedding", "compute", Op("|".join(sorted(LOOKUPS)), Const("table"), Any("indices"), name="lookup"), _describe, _lower
)
