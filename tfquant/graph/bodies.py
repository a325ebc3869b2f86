"""The functions of loops, branches and calls: read as graphs, written again, given constants in the place of arguments."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2, function_pb2
from tensorflow.python.framework import op_def_registry
from tensorflow.python.framework.function_def_to_graph import function_def_to_graph_def

from tfquant.graph.ir import Graph, Node, Tensor, is_stateful, library_bytes, to_attr

CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
LOOPS = frozenset({"While", "StatelessWhile"})
_BRANCHES = frozenset({"If", "StatelessIf", "Case", "StatelessCase"})
# TensorFlow's notes on what a loop or a branch reads, by position.
_NOTES = ("_read_only_resource_inputs", "_num_original_outputs")
_TRACE_NUMBERS = re.compile(r"(_\d+)+$")
_DIGEST = re.compile(r"_[0-9a-f]{16}$")
_LOOKUPS: Mapping[str, str] = {"ResourceGather": "GatherV2", "ResourceGatherNd": "GatherNd"}
# A GraphDef is a proto, which cannot hold 2 GiB, and constants of functions cannot leave it again as others can.
_MAX_BYTES = 256_000_000
# Control flow of TensorFlow 1, where a node may run many times or never.
_FRAMES = frozenset({"Switch", "RefSwitch", "Merge", "RefMerge", "Enter", "RefEnter"})
READS = frozenset({"ReadVariableOp", "VariableShape", *_LOOKUPS})


class UnreadableError(Exception):
    """A function cannot be read as a graph, or does with an argument what cannot be done with a constant."""


# -- functions and graphs -------------------------------------------------------------------------------------------------
def functions(attr: attr_value_pb2.AttrValue) -> list[attr_value_pb2.NameAttrList]:
    """The functions that an attribute names."""
    return [*([attr.func] if attr.WhichOneof("value") == "func" else []), *attr.list.func]


def read_function(library: function_pb2.FunctionDefLibrary, name: str) -> Graph:
    """A function as a graph whose inputs and outputs are called as its arguments and results, in order.

    Raises:
        UnreadableError: there is no such function, it has type parameters, calls others as ops of their names, or holds control
            flow of TensorFlow 1.
    """
    original = next((function for function in library.function if function.signature.name == name), None)
    if original is None or original.signature.attr:
        raise UnreadableError(name)
    if any(node.op in _FRAMES or op_def_registry.get(node.op) is None for node in original.node_def):
        raise UnreadableError(name)
    function = function_pb2.FunctionDef()
    function.CopyFrom(original)
    for node in function.node_def:  # TensorFlow would look for functions among those that it knows by now
        for key in [key for key, attr in node.attr.items() if functions(attr)]:
            del node.attr[key]
    content, flat = function_def_to_graph_def(function)
    by_name = {node.name: node for node in content.node}
    for node in original.node_def:
        for key, attr in node.attr.items():
            by_name[node.name].attr[key].CopyFrom(attr)
    content.library.CopyFrom(called(library, [original]))
    inputs = {argument.name: argument.name for argument in function.signature.input_arg}
    results = {result.name: function.ret[result.name] for result in function.signature.output_arg}
    effects = [node for _, node in sorted(function.control_ret.items())]
    return Graph.from_graph_def(content, inputs, {key: flat.get(ref, ref) for key, ref in results.items()}, effects)


def called(library: function_pb2.FunctionDefLibrary, callers: Iterable[Any]) -> function_pb2.FunctionDefLibrary:
    """The functions of a library that others (or protos with a `node_def`) call, and those that these call."""
    by_name = {function.signature.name: function for function in library.function}
    names: dict[str, None] = {}
    stack = list(callers)
    while stack:
        for node in stack.pop().node_def:
            new = [f.name for key in sorted(node.attr) for f in functions(node.attr[key]) if f.name in by_name]
            stack += [by_name[name] for name in new if name not in names]
            names |= dict.fromkeys(new)
    result = function_pb2.FunctionDefLibrary()
    result.function.extend(by_name[name] for name in names)
    return result


def write_function(graph: Graph, old: str, library: function_pb2.FunctionDefLibrary) -> str:
    """Adds a graph, with its constants and with the functions that it calls, to a library.

    Returns:
        The function's name: `old` with a number made of what it computes.
    """
    function = function_pb2.FunctionDef()
    places = {tensor.node.name: key for key, tensor in graph.inputs.items()}

    def reference(name: str, index: int) -> str:
        return places[name] if name in places else f"{name}:{_output(graph.nodes[name], index)}"

    for position, (key, tensor) in enumerate(graph.inputs.items()):
        assert tensor.dtype is not None
        function.signature.input_arg.add(name=key, type=tensor.dtype.as_datatype_enum)
        notes = function.arg_attr[position].attr
        notes["_output_shapes"].CopyFrom(to_attr([tf.TensorShape(tensor.shape)]))
        for name, attr in tensor.node.attrs.items():
            if name.startswith("_"):
                notes[name].CopyFrom(attr)
    for key, tensor in graph.outputs.items():
        assert tensor.dtype is not None
        function.signature.output_arg.add(name=key, type=tensor.dtype.as_datatype_enum)
        function.ret[key] = reference(tensor.node.name, tensor.index)
    content = graph.to_graph_def()
    for node in content.node:
        if node.name in places:
            continue
        for slot, ref in enumerate(node.input):
            if not ref.startswith("^"):
                source, _, index = ref.partition(":")
                node.input[slot] = reference(source, int(index or 0))
        function.node_def.append(node)
        function.signature.is_stateful |= is_stateful(node.op)
    for effect in graph.effects:
        function.control_ret[effect.name] = effect.name
        function.signature.control_output.append(effect.name)
    function.signature.name = content_name(function, old)
    _add_functions(library, [function, *called(graph.library, [function]).function])
    return function.signature.name


def _add_functions(library: function_pb2.FunctionDefLibrary, added: Iterable[function_pb2.FunctionDef]) -> None:
    names = {function.signature.name for function in library.function}
    library.function.extend(function for function in added if function.signature.name not in names)


def content_name(function: function_pb2.FunctionDef, old: str) -> str:
    """A name made of what the function computes, in place of one with the numbers of its trace; its own name is not counted.

    TensorFlow knows one function of a name for all models in a process, and the numbers differ from process to process.
    """
    function.signature.name = ""
    digest = hashlib.blake2b(function.SerializeToString(deterministic=True), digest_size=8).hexdigest()
    base = _DIGEST.sub("", old.removeprefix("__inference_").removeprefix("__forward_"))
    return f"{_TRACE_NUMBERS.sub('', base) or 'function'}_{digest}"


def _output(node: Node, index: int) -> str:
    """How a function names an output of a node: "product:0"."""
    for argument in op_def_registry.get(node.op).output_arg:
        count = 1
        if argument.number_attr:
            count = int(node.attr(argument.number_attr))
        elif argument.type_list_attr:
            count = len(node.attrs[argument.type_list_attr].list.type)
        if index < count:
            return f"{argument.name}:{index}"
        index -= count
    raise AssertionError(f"{node.name} has no output {index}")


def prune_library(graph: Graph) -> None:
    """Drops the functions that nothing calls."""
    caller = function_pb2.FunctionDef()
    for node in graph.nodes.values():
        if any(functions(attr) for attr in node.attrs.values()):
            caller.node_def.add(attr=node.attrs)
    graph.library.CopyFrom(called(graph.library, [caller]))


# -- constants in the place of arguments -------------------------------------------------------------------------------------
def give_constants(graph: Graph, node: Node, constants: Mapping[int, Tensor]) -> bool:
    """The functions of a loop, a branch or a call get constants of their own in the place of what they are handed.

    Args:
        graph: the graph of `node`, edited in place: a node that reads less replaces it.
        node: the loop, branch or call.
        constants: by the slot of an input of `node`, a constant; the input is that, or a handle of a variable that holds it and
            that nobody writes.

    Returns:
        Whether it could be done: a loop must hand on what it gets, of a variable only the value may be read, and functions must
        not hold more than a GraphDef can.
    """
    is_loop = node.op in LOOPS
    first = 1 if node.op in _BRANCHES else 0
    if not (is_loop or first or node.op in CALLS) or min(constants) < first:
        return False
    if library_bytes(graph.library) + sum(tensor.node.constant_bytes for tensor in constants.values()) > _MAX_BYTES:
        return False
    handles = [slot for slot, tensor in constants.items() if node.inputs[slot] != tensor]
    if is_loop and any(graph.users(Tensor(node, slot)) or graph.is_output(Tensor(node, slot)) for slot in handles):
        return False
    attrs = {key: attr for key, attr in node.attrs.items() if key not in _NOTES}
    library = function_pb2.FunctionDefLibrary()
    given = {slot - first: tensor for slot, tensor in constants.items()}
    try:
        for key in sorted(attrs):
            if functions(attrs[key]):
                attrs[key] = _copied(attrs[key])
                for function in functions(attrs[key]):
                    body = read_function(graph.library, function.name)
                    _take_constants(body, given, hands_on=is_loop and key == "body")
                    function.name = write_function(body, function.name, library)
    except UnreadableError:
        return False
    _add_functions(graph.library, library.function)
    kept = [slot for slot in range(len(node.inputs)) if slot not in constants]
    types = "T" if is_loop else "Tin"
    attrs[types] = _copied(attrs[types])
    attrs[types].list.type[:] = [attrs[types].list.type[slot - first] for slot in kept if slot >= first]
    shapes, dtypes = node.shapes, node.dtypes
    if is_loop:
        shapes, dtypes = ([row[slot] for slot in kept if slot < len(row)] for row in (shapes, dtypes))
        if attrs.get("output_shapes") and attrs["output_shapes"].list.shape:
            before = attrs["output_shapes"].list.shape
            attrs["output_shapes"] = attr_value_pb2.AttrValue()
            attrs["output_shapes"].list.shape.extend(before[slot] for slot in kept)
    inputs = [node.inputs[slot] for slot in kept]
    name = graph.take_name(node)
    new = graph.add(node.op, inputs, name=name, attrs=attrs, control=node.control, shapes=shapes, dtypes=dtypes)
    if is_loop:
        for slot, tensor in constants.items():
            graph.replace(Tensor(node, slot), tensor)
        for position, slot in enumerate(kept):
            graph.replace(Tensor(node, slot), Tensor(new, position))
    else:
        for index in sorted({user.inputs[slot].index for user, slot in node.users} | _shown(graph, node)):
            graph.replace(Tensor(node, index), Tensor(new, index))
    for user in list(node.control_users):
        graph.remove_control(user, node)
        graph.add_control(user, new)
    graph.effects = [new if effect is node else effect for effect in graph.effects]
    graph.remove(node)
    return True


def _copied(attr: attr_value_pb2.AttrValue) -> attr_value_pb2.AttrValue:
    result = attr_value_pb2.AttrValue()
    result.CopyFrom(attr)
    return result


def _shown(graph: Graph, node: Node) -> set[int]:
    return {tensor.index for tensor in graph.outputs.values() if tensor.node is node}


def _take_constants(body: Graph, constants: Mapping[int, Tensor], hands_on: bool) -> None:
    """Constants in the place of arguments, by their position; with `hands_on` the results at these positions go, too.

    Raises:
        UnreadableError: such a result is not the argument, or something else is done with a variable than to read it.
    """
    arguments, results = list(body.inputs.items()), list(body.outputs)
    for position, tensor in constants.items():
        key, argument = arguments[position]
        if hands_on:
            if _source(body.outputs[results[position]]) != argument:
                raise UnreadableError(key)
            del body.outputs[results[position]]
        assert tensor.value is not None
        constant = body.constant(tensor.value, name=f"{key}/constant", dtype=tensor.dtype)
        if argument.dtype == tf.resource:
            for user, slots in replace_reads(body, argument.node, constant).items():
                if not give_constants(body, user, dict.fromkeys(slots, constant)):
                    raise UnreadableError(key)
            if any(_source(shown) == argument for shown in body.outputs.values()):
                raise UnreadableError(key)
        else:
            body.replace(argument, constant)
        del body.inputs[key]
    body.prune()


def is_handed_on(body: Graph, position: int) -> bool:
    """Whether what a body of a loop returns at a position is what it gets there."""
    return _source(list(body.outputs.values())[position]) == list(body.inputs.values())[position]


def _source(tensor: Tensor) -> Tensor:
    while tensor.node.op == "Identity":
        tensor = tensor.node.inputs[0]
    return tensor


def replace_reads(graph: Graph, handle: Node, value: Tensor) -> dict[Node, list[int]]:
    """Whoever reads a variable, in place, reads a constant.

    Args:
        graph: the graph.
        handle: stands for the variable, which nothing writes.
        value: the constant.

    Returns:
        Who does something else with the handle, and in which slots.
    """
    assert value.dtype is not None and value.value is not None
    left: dict[Node, list[int]] = {}
    for user, slot in users_behind_identities(graph, handle):
        if user.op == "ReadVariableOp":
            new = value
        elif user.op == "VariableShape":
            dtype = user.attr("out_type", tf.int32)
            new = graph.constant(np.array(value.value.shape, dtype.as_numpy_dtype), name=f"{user.name}/shape")
        elif user.op in _LOOKUPS:
            new = _lookup(graph, user, value)
        else:
            left.setdefault(user, []).append(slot)
            continue
        graph.replace(user.out, new)
        for behind in list(user.control_users):
            graph.remove_control(behind, user)
        if user in graph.effects:
            graph.effects.remove(user)
        graph.remove(user)
    return left


def is_only_read(library: function_pb2.FunctionDefLibrary, node: Node, slot: int) -> bool:
    """Whether what a loop, branch or call gets as this input, the handle of a variable, is but read, whatever else it writes."""
    if node.op not in LOOPS | _BRANCHES | CALLS:
        return False
    names = [function.name for attr in node.attrs.values() for function in functions(attr)]
    try:
        for body in [read_function(library, name) for name in names]:
            argument = list(body.inputs.values())[slot - (node.op in _BRANCHES)].node
            users = users_behind_identities(body, argument)
            if any(user.op not in READS and not is_only_read(library, user, place) for user, place in users):
                return False
    except UnreadableError:
        return False
    return True


def users_behind_identities(graph: Graph, handle: Node) -> Iterator[tuple[Node, int]]:
    """Who reads a handle, and in which slots."""
    for user, slot in graph.users(handle.out):
        if user.op == "Identity":
            yield from users_behind_identities(graph, user)
        else:
            yield user, slot


def _lookup(graph: Graph, reader: Node, table: Tensor) -> Tensor:
    name = graph.take_name(reader)
    attrs: dict[str, Any] = {"Tparams": table.dtype, "Tindices": reader.attrs["Tindices"]}
    inputs = [table, reader.inputs[1]]
    if reader.op == "ResourceGather":
        dims = reader.attr("batch_dims", 0)
        attrs |= {"batch_dims": dims, "Taxis": tf.int32}
        inputs.append(graph.constant(np.array(dims, np.int32), name=f"{name}/axis"))
    return graph.add(_LOOKUPS[reader.op], inputs, name=name, attrs=attrs).out
