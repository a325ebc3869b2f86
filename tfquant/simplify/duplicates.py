"""Ops that move the same tensor in the same way, or compute the same sizes, become one: what reads them then shares its input."""

from tfquant.graph.ir import Graph, Node

_MOVES = frozenset({"Reshape", "Squeeze", "ExpandDims", "Transpose"})
_SIZES = frozenset({"Shape", "Slice", "StridedSlice", "ConcatV2", "Pack"})  # of integers


def run(graph: Graph) -> int:
    fired = 0
    seen: dict[tuple[object, ...], Node] = {}
    for node in graph.order():
        is_size = node.op in _SIZES and node.out.dtype is not None and node.out.dtype.is_integer
        if not (is_size or node.op in _MOVES) or node.pinned or node.control or node.control_users:
            continue
        inputs = [t if t.value is None else (t.value.tobytes(), t.value.dtype.str, t.value.shape) for t in node.inputs]
        attrs = [(key, node.attrs[key].SerializeToString(deterministic=True)) for key in sorted(node.attrs)]
        first = seen.setdefault((node.op, *inputs, *attrs), node)
        if first is not node:
            graph.replace(node.out, first.out)
            graph.remove(node)
            fired += 1
    return fired
