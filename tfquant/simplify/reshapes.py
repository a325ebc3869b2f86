"""A Reshape whose target is computed from the input's shape gets a constant target: Flatten, GlobalPooling + Reshape."""

import numpy as np

from tfquant.graph.ir import Graph, Node, Tensor


def run(graph: Graph) -> int:
    fired = 0
    for node in graph.order():
        if node.op == "Reshape" and node.inputs[1].value is None:
            target = _target(node)
            if target is not None:
                graph.set_input(node, 1, graph.constant(target, name=f"{node.name}/static_shape"))
                fired += 1
    return fired


def _target(node: Node) -> np.ndarray | None:
    """The target shape with one -1, where at most one of its entries is unknown."""
    pack = node.inputs[1].node
    if pack.op == "Pack":
        entries = [None if t.value is None else int(t.value) for t in pack.inputs]
        known = _same_as_input(node, pack.inputs)
        entries = [k if e is None else e for e, k in zip(entries, known, strict=True)]
    elif node.out.shape is not None:
        entries = list(node.out.shape)
    else:
        return None
    if sum(entry is None or entry == -1 for entry in entries) > 1:
        return None
    return np.array([-1 if entry is None else entry for entry in entries], np.int32)


def _same_as_input(node: Node, entries: list[Tensor]) -> list[int | None]:
    shape = node.out.shape
    return [None] * len(entries) if shape is None or len(shape) != len(entries) else list(shape)
