"""Ops that only move values and take 8-bit tensors as they are: Reshape, Squeeze, ExpandDims."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tfquant.graph.ir import Graph
from tfquant.graph.patterns import Any, Match, Op
from tfquant.plan.kernels import Kernel, Unit
from tfquant.targets.onednn import common

if TYPE_CHECKING:
    from tfquant.targets.onednn.lowering import Lowering


def _describe(kernel: Kernel, graph: Graph, match: Match) -> Unit | str:
    reason = common.not_float32(match["x"])
    return reason or Unit(kernel, match, match.root, (match["x"],), match.root.out)


def _lower(lowering: Lowering, unit: Unit) -> None:
    dtype = common.DTYPES[lowering.spec(unit.output).dtype]
    inputs = [lowering.stored(unit.inputs[0]), *(lowering.as_float(tensor) for tensor in unit.main.inputs[1:])]
    node = lowering.graph.copy_of(unit.main, inputs, T=dtype)
    node.dtypes = [dtype]
    lowering.put(unit.output, node.out)


KERNEL = Kernel("move", "share", Op("Reshape|Squeeze|ExpandDims", Any("x"), name="move"), _describe, _lower)
