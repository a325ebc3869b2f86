"""ConcatV2 on 8-bit values: all inputs are stored with the range of the output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tfquant.graph.ir import Graph
from tfquant.graph.patterns import Any, Match, Op
from tfquant.plan.kernels import Kernel, Unit
from tfquant.targets.onednn import common

if TYPE_CHECKING:
    from tfquant.targets.onednn.lowering import Lowering


def _describe(kernel: Kernel, graph: Graph, match: Match) -> Unit | str:
    *parts, axis = match.root.inputs
    if axis.value is None:
        return "its axis is not a constant"
    reason = common.not_float32(*parts)
    if reason:
        return reason
    if any(part.value is not None for part in parts):
        return "one of its inputs is a constant"
    return Unit(kernel, match, match.root, tuple(dict.fromkeys(parts)), match.root.out, own_ranges=True)


def _lower(lowering: Lowering, unit: Unit) -> None:
    node, spec = unit.main, lowering.spec(unit.output)
    *parts, axis = node.inputs
    inputs = [lowering.requantized(part, spec) for part in parts]
    inputs.append(lowering.as_float(axis))
    dtype = common.DTYPES[spec.dtype]
    attrs = {"N": len(parts), "T": dtype, "Tidx": axis.dtype}
    lowering.put(unit.output, lowering.graph.add("ConcatV2", inputs, name=node.name, attrs=attrs, dtypes=[dtype]).out)


KERNEL = Kernel("concat", "share", Op("ConcatV2", Any("first"), name="concat"), _describe, _lower)
