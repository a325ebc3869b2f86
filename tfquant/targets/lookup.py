"""Lookups of rows in a table of 8 bits, computed with in float."""

from collections.abc import Sequence

import tensorflow as tf

from tfquant.graph.ir import Graph, Node, Tensor

LOOKUPS = frozenset({"Gather", "GatherV2"})


def is_of_rows(node: Node) -> bool:
    """Whether a lookup is one along the first axis, the same table for all samples."""
    axis = node.inputs[2].value if len(node.inputs) > 2 else 0
    return axis is not None and int(axis) == 0 and not node.attr("batch_dims", 0)


def looked_up(graph: Graph, node: Node, table: Tensor, scales: Tensor, others: Sequence[Tensor], name: str) -> Tensor:
    """The rows, float32 of the shape of the lookup's result: integers are looked up, and the scales of their rows.

    Args:
        graph: takes the ops.
        node: the lookup in the float table.
        table: int8, of the float table's shape.
        scales: float32, one per row, in a shape that broadcasts over the table.
        others: the inputs of `node` behind its table, in `graph`.
        name: of the result; what is in front of it has it as a scope.
    """
    parts = []
    for source, dtype in ((table, tf.int8), (scales, tf.float32)):
        attrs = {**node.attrs, "Tparams": dtype}
        parts.append(graph.add(node.op, [source, *others], name=f"{name}/rows", attrs=attrs, dtypes=[dtype]).out)
    attrs = {"SrcT": tf.int8, "DstT": tf.float32, "Truncate": False}
    steps = graph.add("Cast", parts[:1], name=f"{name}/Cast", attrs=attrs, dtypes=[tf.float32]).out
    return graph.add("Mul", [steps, parts[1]], name=name, attrs={"T": tf.float32}, dtypes=[tf.float32]).out
