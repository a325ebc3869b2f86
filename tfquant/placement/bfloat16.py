"""Float ops in bfloat16: which can, which should, and the graph with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import tensorflow as tf

from tfquant.errors import PlanError
from tfquant.graph.ir import Graph, Node, Tensor, to_attr
from tfquant.placement.cut import Crossing, cheapest

_ALL = slice(None)
_FIRST = slice(1)
_COMPUTE: Mapping[str, slice] = {
    "MatMul": _ALL,
    "BatchMatMul": _ALL,
    "BatchMatMulV2": _ALL,
    "Einsum": _ALL,
    "Conv2D": _ALL,
    "DepthwiseConv2dNative": _ALL,
}
# Sums over many values (means, norms) stay float32; Softmax adds up in float32 inside.
_OTHERS: Mapping[str, slice] = {
    **dict.fromkeys(("BiasAdd", "AddV2", "Add", "Sub", "Mul", "Maximum", "Minimum"), _ALL),
    **dict.fromkeys(("Relu", "Relu6", "LeakyRelu", "Elu", "Selu", "Sigmoid", "Tanh", "Softmax", "Square", "Neg"), _ALL),
    **dict.fromkeys(("Reshape", "Transpose", "ExpandDims", "Squeeze", "Pad", "Slice", "StridedSlice", "Tile"), _FIRST),
    **dict.fromkeys(("MaxPool", "Identity"), _FIRST),
}
_SLOTS: Mapping[str, slice] = {**_COMPUTE, **_OTHERS}


def candidates(graph: Graph, taken: Collection[Node]) -> list[Node]:
    """The float32 ops that stock TensorFlow also has in bfloat16, outside of loops and branches.

    Args:
        graph: the simplified float graph.
        taken: nodes that run in INT8.
    """
    return [
        node
        for node in graph.order()
        if node.op in _SLOTS
        and node not in taken
        and not node.pinned
        and node.dtypes[:1] == [tf.float32]
        and all(tensor.dtype == tf.float32 for tensor in node.inputs[_SLOTS[node.op]])
        and any(tensor.value is None for tensor in node.inputs)
        and not graph.is_shown(node.out)  # outputs keep the digits of float32
    ]


def narrow(graph: Graph, names: Iterable[str]) -> int:
    """Makes the named ops bfloat16, in place, with casts where they meet others; returns how many casts that took.

    Raises:
        PlanError: an op is not there, or has no kernel for bfloat16.
    """
    nodes = []
    for name in names:
        node = graph.nodes.get(name)
        if node is None or node.op not in _SLOTS:
            found = "no op of this name" if node is None else node.op
            raise PlanError(f"The plan has {name} in bfloat16, which the model cannot. Received: {found}")
        nodes.append(node)
    narrowed, casts = set(nodes), dict[Tensor, Tensor]()
    count = len(graph.nodes)
    for node in nodes:
        for slot in range(len(node.inputs))[_SLOTS[node.op]]:
            tensor = node.inputs[slot]
            if tensor.node not in narrowed:
                if tensor not in casts:
                    casts[tensor] = _as_bfloat16(graph, tensor)
                graph.set_input(node, slot, casts[tensor])
    for node in nodes:
        node.attrs["T"] = to_attr(tf.bfloat16)
        node.dtypes = [tf.bfloat16]
        readers = [(user, slot) for user, slot in graph.users(node.out) if user not in narrowed]
        if readers or graph.is_output(node.out):
            wide = _cast(graph, node.out, tf.float32)
            for user, slot in readers:
                graph.set_input(user, slot, wide)
            graph.outputs.update({key: wide for key, tensor in graph.outputs.items() if tensor == node.out})
    return sum(node.op == "Cast" for node in list(graph.nodes.values())[count:])


def _as_bfloat16(graph: Graph, tensor: Tensor) -> Tensor:
    if tensor.value is not None:
        return graph.constant(tensor.value.astype(tf.bfloat16.as_numpy_dtype), name=f"{tensor.node.name}/bfloat16")
    return _cast(graph, tensor, tf.bfloat16)


def _cast(graph: Graph, tensor: Tensor, dtype: tf.DType) -> Tensor:
    attrs = {"SrcT": tensor.dtype, "DstT": dtype, "Truncate": False}
    name = f"{tensor.node.name}/{dtype.name}"
    return graph.add("Cast", [tensor], name=name, attrs=attrs, shapes=[tensor.shape], dtypes=[dtype]).out


@dataclasses.dataclass(frozen=True)
class FloatCosts:
    """Microseconds per call of single float ops at one batch size.

    Attributes:
        float32: by the name of the op.
        bfloat16: likewise.
        cast: of a tensor, either way.
    """

    float32: Mapping[str, float]
    bfloat16: Mapping[str, float]
    cast: Callable[[Tensor], float]


def choose_bfloat16(graph: Graph, taken: Collection[Node], costs: Sequence[FloatCosts]) -> tuple[str, ...]:
    """The float ops that are cheaper in bfloat16, casts counted, by name, in topological order.

    Args:
        graph: the simplified float graph.
        taken: nodes that run in INT8.
        costs: per batch size; each counts alike.
    """
    nodes = candidates(graph, taken)
    leaders = _leaders(graph, nodes)
    units: dict[str, tuple[float, float]] = {}
    totals = [sum(entry.float32.values()) or 1.0 for entry in costs]
    for node in nodes:
        narrow_cost, wide_cost = units.get(leaders[node], (0.0, 0.0))
        for entry, total in zip(costs, totals, strict=True):
            narrow_cost += entry.bfloat16.get(node.name, 0.0) / total
            wide_cost += entry.float32.get(node.name, 0.0) / total
        units[leaders[node]] = narrow_cost, wide_cost
    crossings = []
    members = set(nodes)
    read = dict.fromkeys(t for node in nodes for t in (*node.inputs[_SLOTS[node.op]], node.out) if t.value is None)
    for tensor in read:
        users = [user for user, _ in graph.users(tensor)]
        readers = {leaders[user] for user in users if user in members}
        maker = leaders.get(tensor.node)
        shown = graph.is_output(tensor) or any(user not in members for user in users)
        price = sum(entry.cast(tensor) / total for entry, total in zip(costs, totals, strict=True))
        crossings.append(Crossing(maker, tuple(sorted(readers - {maker})), shown, price, price))
    chosen = cheapest(units, crossings)
    return tuple(node.name for node in nodes if leaders[node] in chosen)


def _leaders(graph: Graph, nodes: Sequence[Node]) -> dict[Node, str]:
    """What TensorFlow fuses with the product in front of it (its bias, its activation) goes with it: name of that product."""
    leaders: dict[Node, str] = {}
    members = set(nodes)
    for node in nodes:
        first = node.inputs[0].node
        is_fused = first in members and node.op in _FUSED and len(graph.users(first.out)) == 1 and leaders[first] in graph.nodes
        follows = is_fused and graph.nodes[leaders[first]].op in _COMPUTE
        leaders[node] = leaders[first] if follows else node.name
    return leaders


_FUSED = frozenset({"BiasAdd", "AddV2", "Add", "Relu", "Relu6", "Elu", "LeakyRelu", "Tanh", "Sigmoid"})
