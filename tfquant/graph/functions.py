"""Which functions of a SavedModel compute the same: fingerprints read off its protos, calls inlined, blind to names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from tensorflow.core.framework import function_pb2, node_def_pb2
from tensorflow.core.protobuf import meta_graph_pb2

_CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
_IGNORED_ATTRS = frozenset({"_output_shapes", "_has_manual_control_dependencies", "config_proto", "executor_type", "config"})


class Functions:
    """The functions of a meta graph that can be called from outside.

    Attributes:
        signatures: signature key to the name of its function.
        endpoints: name of an attribute of the root to the names of its concrete functions.
    """

    def __init__(self, meta_graph: meta_graph_pb2.MetaGraphDef) -> None:
        self._objects = meta_graph.object_graph_def
        self._library = {f.signature.name: f for f in meta_graph.graph_def.library.function}
        self.signatures: dict[str, str] = {}
        self.endpoints: dict[str, tuple[str, ...]] = {}
        nodes = self._objects.nodes
        for child in nodes[0].children if nodes else ():
            target = nodes[child.node_id]
            if target.WhichOneof("kind") == "function":
                self.endpoints[child.local_name] = tuple(target.function.concrete_functions)
            elif child.local_name == "signatures":
                for entry in target.children:
                    self.signatures[entry.local_name] = nodes[entry.node_id].bare_concrete_function.concrete_function_name

    def fingerprints(self, name: str, inputs: Sequence[str]) -> list[bytes]:
        """A hash of what each flat output of a concrete function computes.

        Args:
            name: of the concrete function.
            inputs: what each of its flat arguments is called; the variables that it captures follow them.

        Raises:
            KeyError: there is no such function, or it has other inputs.
        """
        captured = self._objects.concrete_functions[name].bound_inputs if name in self._objects.concrete_functions else []
        arguments = [f"input {key}".encode() for key in inputs] + [b"variable %d" % node for node in captured]
        function = self._library[name]
        if len(arguments) != len(function.signature.input_arg):
            raise KeyError(name)
        return self._digest(function, arguments)

    def _digest(self, function: function_pb2.FunctionDef, arguments: Sequence[bytes]) -> list[bytes]:
        names = [argument.name for argument in function.signature.input_arg]
        known: dict[str, bytes] = dict(zip(names, arguments, strict=True))
        pending = {node.name: node for node in function.node_def}

        def resolve(reference: str) -> bytes:
            """The hash of a tensor: "argument", or "node:output:index"."""
            stack = [reference]
            while stack:
                name = stack[-1].partition(":")[0]
                if name in known or name not in pending:
                    stack.pop()
                    continue
                missing = [ref for ref in _data(pending[name]) if ref.partition(":")[0] in pending]
                if missing:
                    stack.extend(missing)
                    continue
                self._add(pending.pop(name), known)
            return _lookup(known, reference)

        return [resolve(function.ret[output.name]) for output in function.signature.output_arg]

    def _add(self, node: node_def_pb2.NodeDef, known: dict[str, bytes]) -> None:
        inputs = [_lookup(known, reference) for reference in _data(node)]
        if node.op in _CALLS and node.attr["f"].func.name in self._library:
            for index, digest in enumerate(self._digest(self._library[node.attr["f"].func.name], inputs)):
                known[f"{node.name}:output:{index}"] = digest
            known[node.name] = b""
        elif node.op == "Identity":
            known[node.name] = known[f"{node.name}:output:0"] = inputs[0]
        else:
            state = hashlib.blake2b(node.op.encode(), digest_size=16)
            for key in sorted(set(node.attr) - _IGNORED_ATTRS):
                state.update(key.encode() + node.attr[key].SerializeToString(deterministic=True))
            for digest in inputs:
                state.update(b"|" + digest)
            known[node.name] = state.digest()


def _data(node: node_def_pb2.NodeDef) -> list[str]:
    return [reference for reference in node.input if not reference.startswith("^")]


def _lookup(known: dict[str, bytes], reference: str) -> bytes:
    if reference in known:
        return known[reference]
    name, _, output = reference.partition(":")
    return known[name] + b":" + output.encode()
