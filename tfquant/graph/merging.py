"""Several graphs as one: equal inputs are shared, and what computes the same is there once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from tfquant.errors import ModelError
from tfquant.graph.ir import Graph, Node, Tensor, is_back_edge, is_stateful


def merge(graphs: Mapping[str, Graph]) -> Graph:
    """One graph with the inputs of all, by their names, and with the outputs of all, called "key/output".

    A single graph is returned as it is.

    Raises:
        ModelError: two graphs have different inputs of one name, or one has effects.
    """
    if len(graphs) == 1:
        return next(iter(graphs.values()))
    for key, graph in graphs.items():
        if graph.effects:
            raise ModelError(
                f"A signature that changes something can only be quantized alone. Received: {key!r} with "
                f"{graph.effects[0].name} ({graph.effects[0].op}), among {', '.join(graphs)}"
            )
    result = Graph()
    known: dict[Hashable, Node] = {}
    for key, graph in graphs.items():
        for function in graph.library.function:
            if all(function.signature.name != other.signature.name for other in result.library.function):
                result.library.function.add().CopyFrom(function)
        result.versions.CopyFrom(graph.versions)
        twins: dict[Node, Node] = {}
        for name, tensor in graph.inputs.items():
            twins[tensor.node] = _input(result, name, tensor)
        for node in graph.order():
            if node not in twins:
                twins[node] = _copy(result, node, twins, known)
        for node, twin in twins.items():
            for slot, tensor in enumerate(node.inputs):
                if is_back_edge(node, tensor.node):
                    result.set_input(twin, slot, Tensor(twins[tensor.node], tensor.index))
        for name, tensor in graph.outputs.items():
            result.outputs[f"{key}/{name}"] = Tensor(twins[tensor.node], tensor.index)
    return result


def _input(result: Graph, name: str, tensor: Tensor) -> Node:
    other = result.inputs.get(name)
    if other is None:
        node = result.copy_of(tensor.node, [])
        result.inputs[name] = node.out
        return node
    if (other.dtype, other.shape) != (tensor.dtype, tensor.shape):
        raise ModelError(
            f"The signatures must agree on the input {name!r}; quantize one, and then the other in the result. "
            f"Received: {other.dtype} {other.shape} and {tensor.dtype} {tensor.shape}"
        )
    return other.node


def _copy(result: Graph, node: Node, twins: Mapping[Node, Node], known: dict[Hashable, Node]) -> Node:
    inputs = [node.inputs[0] if is_back_edge(node, tensor.node) else tensor for tensor in node.inputs]
    tensors = [Tensor(twins[tensor.node], tensor.index) for tensor in inputs]
    control = [twins[before] for before in node.control]
    attrs = tuple(
        (name, node.attrs[name].SerializeToString(deterministic=True)) for name in sorted(node.attrs) if name != "value"
    )
    content: Hashable = ()
    if node.op == "Const":
        content = node.attrs["value"].SerializeToString() if node._value is None else id(node._value)
    key = (node.op, attrs, content, id(node.external), tuple((id(t.node), t.index) for t in tensors), tuple(map(id, control)))
    may_share = (not is_stateful(node.op) or node.external is not None) and not node.pinned
    if may_share and key in known:
        return known[key]
    twin = result.copy_of(node, tensors)
    twin._value = node._value
    for before in control:
        result.add_control(twin, before)
    if may_share:
        known[key] = twin
    return twin
