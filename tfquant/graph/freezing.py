"""A function that TensorFlow loaded becomes a `Graph`: calls inlined, variables as constants, other resources as externals.

A variable is frozen where it is only read, by ops of the graph itself or in the bodies of loops, branches and calls. What
something writes, and every table, stays a resource: a placeholder whose `external` is the handle, handed over when the graph is
called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2, function_pb2, node_def_pb2
from tensorflow.python.framework.function_def_to_graph import function_def_to_graph_def

from tfquant.graph.bodies import (
    CALLS,
    READS,
    content_name,
    functions,
    give_constants,
    is_only_read,
    replace_reads,
    users_behind_identities,
)
from tfquant.graph.ir import Graph, Node, Tensor, is_stateful

# Ops with an effect that outlives the call; other stateful ops only read, or check (Assert).
_EFFECT = re.compile(
    r"Assign|ResourceScatter|Resource\w*Apply|Resource(Sparse)?Apply|LookupTable(Insert|Import|Remove)|InitializeTable|^Print|WriteFile|Summary"
    r"|PyFunc|Enqueue|TensorArrayWrite|Barrier|MapStage|^Stage$"
)
_REF_VARIABLES = frozenset({"VariableV2", "Variable"})
_TRACE_ATTRS = ("forward_function_name", "backward_function_name")


def freeze(
    function: Any,
    inputs: Iterable[str],
    outputs: Iterable[str],
    values: dict[int, np.ndarray] | None = None,
    kept: Collection[int] = (),
) -> Graph:
    """The graph of a concrete function.

    Args:
        function: the concrete function, as TensorFlow loaded it.
        inputs: what its flat inputs are called; captures come behind them.
        outputs: what its flat outputs are called.
        values: arrays of variables by the id of their handle, shared between functions that read the same.
        kept: ids of captured tensors that others own, resources and the paths of assets; other captures become constants.

    Returns:
        The graph, with shapes and dtypes.
    """
    values = {} if values is None else values
    own = len(function.inputs) - len(function.captured_inputs)
    arguments = [tensor.name for tensor in function.inputs[:own]]
    captures = [(outer, inner.op.name) for outer, inner in zip(function.captured_inputs, function.inputs[own:], strict=True)]
    results = [tensor.name for tensor in function.outputs]
    graph = Graph.from_graph_def(
        function.graph.as_graph_def(),
        dict(zip(inputs, arguments, strict=True)),
        dict(zip(outputs, results, strict=True)),
        [operation.name for operation in function.graph.control_outputs],
        infer=False,
    )
    for outer, name in captures:
        if name not in graph.nodes:
            continue
        node = graph.nodes[name]
        if id(outer) in kept or outer.dtype in (tf.resource, tf.variant):
            node.external = outer
        else:
            value = np.array(outer.numpy(), object if outer.dtype == tf.string else None)
            graph.replace(node.out, graph.constant(value, name=graph.take_name(node), dtype=outer.dtype))
    inline_calls(graph)
    graph.effects = _effects(graph)
    variables = {id(variable.handle): variable for variable in function.graph.variables}
    captured: dict[Node, dict[int, Tensor]] = {}
    for node in [node for node in graph.nodes.values() if node.external is not None]:
        if id(node.external) in variables:
            _freeze_variable(graph, node, variables[id(node.external)], values, captured)
            _tell_shape(graph, node, variables[id(node.external)])
    for node, constants in captured.items():
        give_constants(graph, node, constants)
    graph.prune()
    graph.infer()
    return graph


def freeze_traced(function: Any, values: dict[int, np.ndarray] | None = None) -> Graph:
    """The settled graph of a concrete function of this program, with inputs "input_0" and outputs "output_0" by their numbers.

    Args:
        function: the concrete function.
        values: other values than variables have, by the id of their handle.
    """
    count = len(function.inputs) - len(function.captured_inputs)
    outputs = [f"output_{i}" for i in range(len(function.outputs))]
    graph = freeze(function, [f"input_{i}" for i in range(count)], outputs, values)
    settle(graph)
    return graph


def _effects(graph: Graph) -> list[Node]:
    """The effects that count, those behind a NoOp that groups them included."""
    found: dict[Node, None] = {}
    stack = list(reversed(graph.effects))
    while stack:
        node = stack.pop()
        if has_effect(node, graph.library):
            found[node] = None
        elif node.op == "NoOp":
            stack += reversed(node.control)
    return list(found)


def has_effect(node: Node, library: function_pb2.FunctionDefLibrary) -> bool:
    """Whether running an op, or a function that it calls, changes something."""
    if _EFFECT.search(node.op):
        return True
    names = [function.name for attr in node.attrs.values() for function in functions(attr)]
    return bool(names) and any(_EFFECT.search(inner.op) for inner in _reachable(names, library))


def _reachable(names: list[str], library: function_pb2.FunctionDefLibrary) -> Iterator[node_def_pb2.NodeDef]:
    """The nodes of the functions, and of those that they call."""
    by_name = {function.signature.name: function for function in library.function}
    stack, seen = list(names), set(names)
    while stack:
        function = by_name.get(stack.pop())
        for node in function.node_def if function is not None else ():
            yield node
            new = {function.name for attr in node.attr.values() for function in functions(attr)} - seen
            seen |= new
            stack += sorted(new)


def bodies(graph: Graph, but: Collection[str] = ()) -> Iterator[tuple[Node, node_def_pb2.NodeDef]]:
    """(node of the graph, node inside) for whatever the functions of control flow and of calls that stayed hold.

    Args:
        graph: the graph.
        but: names of loops whose bodies, not their conditions, are left out.
    """
    for node in graph.order():
        keys = [key for key in sorted(node.attrs) if key != "body" or node.name not in but]
        names = [function.name for key in keys for function in functions(node.attrs[key])]
        if names:
            for inner in _reachable(names, graph.library):
                yield node, inner


# -- calls ----------------------------------------------------------------------------------------------------------------
def inline_calls(graph: Graph) -> int:
    """Puts the body of a function in the place of each call; returns how many were inlined.

    A call that XLA must compile is inlined too, unless it holds ops that only XLA has: convolutions in it can then run in INT8.
    """
    library = {function.signature.name: function for function in graph.library.function}
    fired = 0
    queue = [node for node in graph.nodes.values() if node.op in CALLS]
    while queue:
        call = queue.pop()
        function = library.get(call.attrs["f"].func.name)
        if function is None or function.signature.attr or any(node.op.startswith("Xla") for node in function.node_def):
            continue
        queue += [node for node in _inline(graph, call, function) if node.op in CALLS]
        fired += 1
    return fired


def _inline(graph: Graph, call: Node, function: function_pb2.FunctionDef) -> list[Node]:
    body, flat_names = function_def_to_graph_def(function)
    tensors = {argument.name: tensor for argument, tensor in zip(function.signature.input_arg, call.inputs, strict=True)}
    nodes: dict[str, Node] = {}
    for proto in body.node:
        if proto.name not in tensors:
            attrs = {key: value for key, value in proto.attr.items() if key not in ("_output_shapes", "_class")}
            nodes[proto.name] = graph.add(proto.op, name=f"{call.name}/{proto.name}", attrs=attrs)

    def tensor(reference: str) -> Tensor:
        name, _, index = reference.partition(":")
        return tensors[name] if name in tensors else Tensor(nodes[name], int(index or 0))

    for proto in body.node:
        node = nodes.get(proto.name)
        if node is None:
            continue
        for reference in proto.input:
            if not reference.startswith("^"):
                graph.connect(node, tensor(reference))
            elif reference[1:] in nodes:
                graph.add_control(node, nodes[reference[1:]])
        if is_stateful(node.op):
            for before in call.control:
                graph.add_control(node, before)
    effects = [nodes[name] for _, name in sorted(function.control_ret.items()) if name in nodes]
    for index, output in enumerate(function.signature.output_arg):
        flat = flat_names.get(function.ret[output.name], function.ret[output.name])
        graph.replace(Tensor(call, index), tensor(flat))
    for user in list(call.control_users):
        graph.remove_control(user, call)
        for before in effects:
            graph.add_control(user, before)
    if call in graph.effects:
        position = graph.effects.index(call)
        graph.effects[position : position + 1] = [node for node in effects if node not in graph.effects]
    graph.remove(call)
    return list(nodes.values())


# -- variables --------------------------------------------------------------------------------------------------------------
def _freeze_variable(
    graph: Graph, placeholder: Node, variable: Any, values: dict[int, np.ndarray], readers_by_slot: dict[Node, dict[int, Tensor]]
) -> None:
    """Reads of the variable become constants, unless something in the graph writes it.

    Args:
        graph: the graph.
        placeholder: the handle.
        variable: the variable.
        values: as for `freeze`.
        readers_by_slot: gets the nodes that hand the handle to functions, with the constant by the slot of the input.
    """
    for reader, slot in users_behind_identities(graph, placeholder):
        is_writer = reader.op not in READS and has_effect(reader, graph.library)
        if is_writer and not is_only_read(graph.library, reader, slot):
            return
    key = id(placeholder.external)
    if key not in values:
        values[key] = variable.numpy()
    name = graph.take_name(placeholder)
    constant = graph.constant(values[key], name=name, dtype=variable.dtype)
    for reader, slots in replace_reads(graph, placeholder, constant).items():
        readers_by_slot.setdefault(reader, {}).update(dict.fromkeys(slots, constant))


def _tell_shape(graph: Graph, placeholder: Node, variable: Any) -> None:
    """A variable that stays one has a shape, which its handle does not tell."""
    for user, _ in list(placeholder.users):
        if user.op == "ReadVariableOp" and variable.shape.is_fully_defined():
            attrs = {"T": variable.dtype, "shape": variable.shape}
            shaped = graph.add("EnsureShape", name=f"{user.name}/shaped", attrs=attrs)
            graph.replace(user.out, shaped.out)
            graph.connect(shaped, user.out)


def freeze_ref_variables(graph: Graph, read: Callable[[Sequence[str]], Sequence[np.ndarray]]) -> int:
    """The variables of TensorFlow 1 become constants; returns how many.

    Args:
        graph: the graph.
        read: values of variables by their nodes' names.

    Raises:
        ValueError: the graph assigns to one, which a constant cannot keep.
    """
    variables = [node for node in graph.order() if node.op in _REF_VARIABLES]
    for node in graph.order():
        if node.op.startswith("Assign") and node.inputs[0].node in variables:
            raise ValueError(f"{node.name} assigns to the variable {node.inputs[0].name} of TensorFlow 1 in a call")
    for node, value in zip(variables, read([node.name for node in variables]) if variables else (), strict=True):
        name = graph.take_name(node)
        graph.replace(node.out, graph.constant(value, name=name))
        graph.remove(node)
    if variables:
        graph.infer()
    return len(variables)


# -- loops and branches of TensorFlow 1 ----------------------------------------------------------------------------------------
def _pin(graph: Graph) -> int:
    """Marks the nodes that stand in a loop (Enter ... Exit) or a branch (Switch ... Merge); returns how many.

    There a node may run many times or never, so that no rewrite that holds elsewhere holds.
    """
    if not any(node.op in ("Enter", "RefEnter", "Switch", "RefSwitch") for node in graph.nodes.values()):
        return 0
    depth: dict[Node, int] = {}
    for node in graph.order():
        parents = [*(tensor.node for tensor in node.inputs), *node.control]
        outer = max((depth.get(parent, 0) for parent in parents), default=0)
        inside = outer > 0
        if node.op in ("Enter", "RefEnter") or (node.op in ("Switch", "RefSwitch") and not _is_loop(node)):
            outer, inside = outer + 1, True
        elif node.op in ("Exit", "RefExit") or (node.op in ("Merge", "RefMerge") and not _is_loop(node)):
            outer = max(0, outer - 1)
        depth[node] = outer
        node.pinned = inside
    return sum(node.pinned for node in depth)


def _is_loop(node: Node) -> bool:
    """Whether a Switch or Merge belongs to a loop."""
    return any(tensor.node.op in ("LoopCond", "NextIteration", "Enter", "RefEnter") for tensor in node.inputs)


def settle(graph: Graph) -> None:
    """Gives placeholders that nobody feeds their default, takes away the branches that this decides, and pins what is left."""
    for node in list(graph.nodes.values()):
        if node.op == "PlaceholderWithDefault" and all(node is not tensor.node for tensor in graph.inputs.values()):
            graph.replace(node.out, node.inputs[0])
    _resolve_switches(graph)
    graph.prune()
    _pin(graph)


def _resolve_switches(graph: Graph) -> int:
    """Takes away branches whose predicate is a constant (the learning phase of old Keras models); returns how many."""
    switches = [node for node in graph.order() if node.op == "Switch" and _constant(node.inputs[1]) is not None]
    dead: set[Tensor | Node] = set()
    for node in switches:
        taken = int(bool(_constant(node.inputs[1])))
        graph.replace(Tensor(node, taken), node.inputs[0])
        dead.add(Tensor(node, 1 - taken))
    for node in graph.order() if switches else ():
        alive = [tensor for tensor in node.inputs if tensor not in dead and tensor.node not in dead]
        if node.op == "Merge" and len(alive) == 1:
            graph.replace(node.out, alive[0])
        elif node.op != "Merge" and (len(alive) < len(node.inputs) or any(before in dead for before in node.control)):
            dead.add(node)
    for node in graph.nodes.values():
        for before in list(node.control):
            if before.op == "Identity" and before.inputs[0].node in switches:
                graph.remove_control(node, before)
    return len(switches)


def _constant(tensor: Tensor) -> bool | None:
    while tensor.node.op in ("Identity", "PlaceholderWithDefault"):
        tensor = tensor.node.inputs[0]
    if tensor.node.op == "LogicalNot":
        inner = _constant(tensor.node.inputs[0])
        return None if inner is None else not inner
    value = tensor.value
    return None if value is None or value.shape != () else bool(value)


# -- the library --------------------------------------------------------------------------------------------------------------
def tidy_library(graph: Graph) -> None:
    """Keeps the functions that the graph calls, under names made of what they compute.

    The numbers that tracing and loading give names differ from process to process, and TensorFlow knows one function of a name
    for all models in a process.
    """
    library = {function.signature.name: function for function in graph.library.function}
    names: dict[str, str] = {}
    kept = function_pb2.FunctionDefLibrary()

    def tidy(old: str) -> str:
        if old in names or old not in library:
            return names.get(old, old)
        names[old] = old  # a function that calls itself
        function = function_pb2.FunctionDef()
        function.CopyFrom(library[old])
        for key in _TRACE_ATTRS:
            function.attr.pop(key, None)
        for inner in function.node_def:
            inner.ClearField("experimental_debug_info")
            inner.attr.pop("_gradient_op_type", None)
            for key in sorted(key for key, attr in inner.attr.items() if functions(attr)):
                inner.attr[key].CopyFrom(_renamed(inner.attr[key], tidy))
        names[old] = content_name(function, old)
        if all(names[old] != other.signature.name for other in kept.function):
            function.signature.name = names[old]
            kept.function.append(function)
        return names[old]

    for node in graph.order():
        node.attrs.pop("_gradient_op_type", None)
        for key in sorted(key for key, attr in node.attrs.items() if functions(attr)):
            node.attrs[key] = _renamed(node.attrs[key], tidy)
    graph.library.CopyFrom(kept)


def _renamed(attr: attr_value_pb2.AttrValue, rename: Callable[[str], str]) -> attr_value_pb2.AttrValue:
    """An attribute with other names for the functions in it."""
    result = attr_value_pb2.AttrValue()
    result.CopyFrom(attr)
    for function in functions(result):
        function.name = rename(function.name)
    return result
