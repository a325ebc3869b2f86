"""MaxPool and local AvgPool: they commute with a zero point, so the output keeps the input's range."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tensorflow as tf

from tfquant.graph.ir import Graph
from tfquant.graph.patterns import Any, Match, Op
from tfquant.plan.kernels import Kernel, Unit
from tfquant.targets.onednn import common

if TYPE_CHECKING:
    from tfquant.targets.onednn.lowering import Lowering


def _describe(kernel: Kernel, graph: Graph, match: Match) -> Unit | str:
    node, x = match.root, match["x"]
    reason = common.not_float32(x) or common.not_image(node, x, node.out)
    if reason:
        return reason
    if node.attr("padding") not in ("SAME", "VALID"):
        return "its padding is explicit, which the 8-bit kernel has not"
    window, strides = node.attr("ksize"), node.attr("strides")
    if window[0] != 1 or window[3] != 1 or strides[0] != 1 or strides[3] != 1:
        return "it pools over the batch or the channels"
    assert x.shape is not None and node.out.shape is not None
    if node.op == "AvgPool" and node.out.shape[1:3] == (1, 1):
        return "a mean over the whole map is finer than the steps of its input"
    return Unit(kernel, match, node, (x,), node.out, unsigned=(x,), shrinks=any(step > 1 for step in strides))


def _lower(lowering: Lowering, unit: Unit) -> None:
    node = unit.main
    low, high = lowering.known(lowering.spec(unit.output))
    attrs = {"T": tf.quint8, **{key: node.attr(key) for key in ("ksize", "strides", "padding")}}
    dtypes = [tf.quint8, tf.float32, tf.float32]
    inputs = [lowering.stored(unit.inputs[0]), low, high]
    lowering.put(unit.output, lowering.graph.add(f"Quantized{node.op}", inputs, name=node.name, attrs=attrs, dtypes=dtypes).out)


KERNELS = tuple(
    Kernel(name, "share", Op(op, Any("x"), name="pool"), _describe, _lower)
    for name, op in (("max_pool", "MaxPool"), ("avg_pool", "AvgPool"))
)
