"""Keeps fused Sum kernels from writing over values that somebody else still reads.

A `_FusedQuantized…` op with Sum computes into the buffer of its summand, whoever else holds it. So it must run after all other
readers of that buffer, under whatever name they know it; where that cannot be, it gets a copy. And since TensorFlow merges nodes
that compute the same, whoever makes such a buffer is marked as unlike all others.
"""

from __future__ import annotations

import tensorflow as tf

from tfquant.graph.ir import Graph, Node, to_attr

# Ops whose output may be the buffer of their input.
_ALIASES = frozenset(
    {"Identity", "Reshape", "Squeeze", "ExpandDims", "Bitcast", "Slice", "StridedSlice", "Split", "SplitV", "Unpack"}
)
_NOT_OURS = frozenset({"Const", "Placeholder", "PlaceholderWithDefault"})
SUMMAND = 3


def is_sum(node: Node) -> bool:
    return node.op.startswith("_FusedQuantized") and "Sum" in (node.attr("fused_ops") or [])


def protect_summands(graph: Graph) -> int:
    """Orders or copies, in place; returns how many copies it took."""
    copies = 0
    for node in [node for node in graph.order() if is_sum(node)]:
        owner, readers = _readers(node)
        others = [reader for reader in readers if reader is not node]
        needs_copy = _is_foreign(owner) or readers.count(node) > 1 or any(_reaches(node, other) for other in others)
        if needs_copy:
            _copy(graph, node)
            copies += 1
            continue
        for other in others:
            if not _reaches(other, node):
                graph.add_control(node, other)
    for node in graph.order():
        if is_sum(node):
            _owner(node).attrs["_written_by"] = to_attr(node.name)
    return copies


def _is_foreign(owner: Node) -> bool:
    """Whether a buffer may be none of this graph's: constants, what is fed, and bytes, which an op may hand on (a Pad by 0)."""
    return owner.op in _NOT_OURS or owner.out.dtype == tf.uint8


def _readers(node: Node) -> tuple[Node, list[Node]]:
    """Who made the summand's buffer, and all that read it, once per slot, aliases seen through."""
    owner = _owner(node)
    found: list[Node] = []
    stack, seen = [owner], {owner}
    while stack:
        for user, slot in stack.pop().users:
            if user.op in _ALIASES and slot == 0:
                if user not in seen:
                    seen.add(user)
                    stack.append(user)
            else:
                found.append(user)
    return owner, found


def _owner(node: Node) -> Node:
    """Who made the buffer of a Sum's summand."""
    owner = node.inputs[SUMMAND].node
    while owner.op in _ALIASES:
        owner = owner.inputs[0].node
    return owner


def _reaches(start: Node, end: Node) -> bool:
    """Whether `end` must run after `start`."""
    stack, seen = [end], {end}
    while stack:
        node = stack.pop()
        if node is start:
            return True
        for before in (*(tensor.node for tensor in node.inputs), *node.control):
            if before not in seen and before.op != "Const":
                seen.add(before)
                stack.append(before)
    return False


def _copy(graph: Graph, node: Node) -> None:
    summand = node.inputs[SUMMAND]
    name = f"{node.name}/summand"
    as_bytes = graph.add("Bitcast", [summand], name=name, attrs={"T": tf.quint8, "type": tf.uint8}, dtypes=[tf.uint8])
    snapshot = graph.add("Snapshot", [as_bytes.out], name=name, attrs={"T": tf.uint8}, dtypes=[tf.uint8])
    back = graph.add("Bitcast", [snapshot.out], name=name, attrs={"T": tf.uint8, "type": tf.quint8}, dtypes=[tf.quint8])
    graph.set_input(node, SUMMAND, back.out)
