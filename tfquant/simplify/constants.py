"""Computes, with TensorFlow's own kernels, what depends on constants alone."""

import numpy as np
import tensorflow as tf

from tfquant.errors import ModelError
from tfquant.graph.ir import FAKE_QUANT, Graph, Node, Tensor, is_stateful
from tfquant.graph.loading import first_line

# A folded constant may be this much larger than what it was made of (a Fill or Tile stays an op).
_MAX_GROWTH_BYTES = 1 << 20
# They pass through a GraphDef, which cannot hold 2 GiB.
_MAX_INPUT_BYTES = 1 << 29
# Ops with state, effects, randomness or a frame of their own; the quantized ones are somebody's decision, but fake quantization
# of a constant is a constant.
_NEVER = ("Random", "Placeholder", "Variable", "VarHandle", "Table", "Iterator", "Switch", "Merge", "Enter", "Exit", "Quant")


def run(graph: Graph) -> int:
    foldable: dict[Node, bool] = {}
    for node in graph.order():
        foldable[node] = not node.pinned and (node.op == "Const" or _can_fold(node, foldable))
    frontier = [
        node
        for node in foldable
        if foldable[node]
        and node.op != "Const"
        and _input_bytes(node) <= _MAX_INPUT_BYTES
        and (not all(foldable.get(user, False) for user, _ in node.users) or graph.is_output(node.out))
    ]
    if not frontier:
        return 0
    fired = 0
    for node, values in zip(frontier, _evaluate(graph, frontier), strict=True):
        if sum(v.nbytes for v in values) > _input_bytes(node) + _MAX_GROWTH_BYTES:
            continue
        for index, value in enumerate(values):
            dtype = node.dtypes[index] if node.dtypes else None
            graph.replace(Tensor(node, index), graph.constant(value, name=f"{node.name}/folded", dtype=dtype))
        graph.remove(node)
        fired += 1
    return fired


def _can_fold(node: Node, foldable: dict[Node, bool]) -> bool:
    if not node.inputs or node.control or (any(word in node.op for word in _NEVER) and node.op not in FAKE_QUANT):
        return False
    if any(attr.WhichOneof("value") == "func" for attr in node.attrs.values()) or any(
        d in (tf.resource, tf.variant) for d in node.dtypes
    ):
        return False
    if not all(foldable.get(tensor.node, False) for tensor in node.inputs):
        return False
    return not is_stateful(node.op)


def _input_bytes(node: Node) -> int:
    total, stack, seen = 0, [node], {node}
    while stack:
        for tensor in stack.pop().inputs:
            if tensor.node not in seen:
                seen.add(tensor.node)
                stack.append(tensor.node)
                total += tensor.value.nbytes if tensor.value is not None else 0
    return total


def _evaluate(graph: Graph, nodes: list[Node]) -> list[list[np.ndarray]]:
    part = Graph()
    part.nodes = graph.nodes
    part.versions.CopyFrom(graph.versions)
    part.outputs = {f"{node.name}:{i}": Tensor(node, i) for node in nodes for i in range(max(1, len(node.dtypes)))}
    with tf.Graph().as_default() as scratch, tf.compat.v1.Session(graph=scratch) as session:
        tf.graph_util.import_graph_def(part.to_graph_def(), name="")
        fetches = [[output.name for output in scratch.get_operation_by_name(node.name).outputs] for node in nodes]
        try:
            return [[np.asarray(value) for value in values] for values in session.run(fetches)]
        except tf.errors.OpError as error:
            raise ModelError(f"TensorFlow cannot compute a constant of the model: {first_line(error)}") from error
