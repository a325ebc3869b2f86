"""A Pad with zeros that no convolution can take: pads 8-bit values with the zero point."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tfquant.graph.ir import Graph
from tfquant.graph.patterns import Any, Const, Match, Op
from tfquant.plan.kernels import Kernel, Unit
from tfquant.targets.onednn import common

if TYPE_CHECKING:
    from tfquant.targets.onednn.lowering import Lowering


def _describe(kernel: Kernel, graph: Graph, match: Match) -> Unit | str:
    node, x = match.root, match["x"]
    reason = common.not_float32(x) or common.not_image(node, x)
    if reason:
        return reason
    if node.op == "PadV2" and (node.inputs[2].value is None or node.inputs[2].value != 0):
        return "it does not pad with zeros"
    paddings = match.value("paddings")
    if paddings[0].any() or (paddings < 0).any():
        return "it pads the batch, or by less than nothing"
    return Unit(kernel, match, node, (x,), node.out)


def _lower(lowering: Lowering, unit: Unit) -> None:
    x, spec = unit.inputs[0], lowering.spec(unit.output)
    paddings = unit.match.value("paddings")
    lowering.put(unit.output, lowering.pad(lowering.stored(x), spec, paddings, unit.name))


KERNEL = Kernel("pad", "share", Op("Pad|PadV2", Any("x"), Const("paddings"), name="pad"), _describe, _lower)
