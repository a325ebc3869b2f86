"""A Reshape whose target is computed from the input's shape gets a constant target: Flatten, GlobalPooling + Reshape."""

import math

import numpy as np

from tfquant.graph.ir import Graph, Node


def run(graph: Graph) -> int:
    fired = 0
    for node in graph.order():
        if node.op == "Reshape" and not node.pinned and node.inputs[1].value is None:
            target = _target(node)
            if target is not None:
                graph.set_input(node, 1, graph.constant(target, name=f"{node.name}/static_shape"))
                fired += 1
    return fired


def _target(node: Node) -> np.ndarray | None:
    """The target shape with one -1, where at most one of its entries is unknown."""
    pack, out = node.inputs[1].node, node.out.shape
    if pack.op != "Pack":
        entries = list(out) if out is not None else None
    else:
        entries = [None if t.value is None else int(t.value) for t in pack.inputs]
        if out is not None and len(out) == len(entries):
            entries = [k if e in (None, -1) else e for e, k in zip(entries, out, strict=True)]
        rest = _rest_of_sample(node, pack)
        if rest is not None:
            entries = [None, rest]
    if entries is None or sum(entry in (None, -1) for entry in entries) > 1:
        return None
    return np.array([-1 if entry is None else entry for entry in entries], np.int32)


def _rest_of_sample(node: Node, pack: Node) -> int | None:
    """The size of a sample where the target is [batch, -1], the batch taken from the shape of the input itself."""
    source = node.inputs[0]
    if len(pack.inputs) != 2 or pack.inputs[1].value is None or int(pack.inputs[1].value) != -1:
        return None
    first = pack.inputs[0].node
    if first.op != "StridedSlice" or first.inputs[0].node.op != "Shape" or first.inputs[0].node.inputs[0] != source:
        return None
    begin = first.inputs[1].value
    if begin is None or begin.tolist() != [0] or source.shape is None or None in source.shape[1:]:
        return None
    return math.prod(size for size in source.shape[1:] if size is not None)
