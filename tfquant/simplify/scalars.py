"""A number that multiplies what a layer makes, behind ops that only move it or a product with another tensor: into the weights.

Attention divides its scores by the square root of the size of a head: that goes into the projection of the query.
"""

from __future__ import annotations

from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.graph.patterns import Any, Const, Match, Op, Rule, rewrite
from tfquant.simplify.canonical import binary, is_float

_MOVES = frozenset({"Reshape", "Squeeze", "ExpandDims", "Transpose"})
_PRODUCTS = frozenset({"BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"})
_LAYERS = frozenset({"MatMul", "Conv2D", "DepthwiseConv2dNative"})
_MAX_STEPS = 8


def _way(graph: Graph, tensor: Tensor, steps: int = _MAX_STEPS) -> list[tuple[Node, int]] | None:
    """The ops from a tensor up to the result of a layer, each with the slot that leads on; None where others read between."""
    node = tensor.node
    if node.pinned or not steps or len(graph.users(tensor)) != 1 or graph.is_output(tensor):
        return None
    if node.op == "BiasAdd" and node.inputs[0].node.op in _LAYERS:
        node = node.inputs[0].node
        return [] if len(node.users) == 1 and not graph.is_output(node.out) and node.inputs[1].value is not None else None
    if node.op in _LAYERS:
        return [] if node.inputs[1].value is not None else None
    slots = [0] if node.op in _MOVES else [0, 1] if node.op in _PRODUCTS else []
    for slot in slots:
        rest = _way(graph, node.inputs[slot], steps - 1)
        if rest is not None:
            return [(node, slot), *rest]
    return None


def _check(graph: Graph, match: Match) -> str | None:
    if match.value("number").size != 1 or match.root.out.shape != match["x"].shape:
        return "not a number"
    return is_float(graph, match) or (None if _way(graph, match["x"]) else "it does not come from a layer alone")


def _lift(graph: Graph, match: Match) -> Tensor:
    last, slot = (_way(graph, match["x"]) or [])[-1]
    layer = last.inputs[slot]
    product = binary(graph, "Mul", layer, match.value("number").reshape(()), layer, f"{match.root.name}/before")
    graph.set_input(last, slot, product)
    return match["x"]


RULES = (Rule("number into the weights of a layer", Op("Mul", Any("x"), Const("number")), _check, _lift),)


def run(graph: Graph) -> int:
    return sum(rewrite(graph, rule) for rule in RULES)
