"""ONNX models as objects: nodes, constants and readers by name, and what nobody reads left out when they are written."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

# Of names that tf2onnx makes unique by a count over the whole process.
_COUNT = re.compile(r"__\d+$")
_PORT = re.compile(r":0$")


class OnnxGraph:
    """The main graph of a model, which is edited; `finish` writes the edits.

    Attributes:
        model: the proto.
        nodes: in any order until `finish`.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self._constants: dict[str, onnx.TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in [node for node in self.nodes if node.op_type == "Constant"]:
            self._constants[node.output[0]] = tensor = onnx.TensorProto()
            tensor.CopyFrom(onnx.helper.get_node_attr_value(node, "value"))
            tensor.name = node.output[0]
            self.nodes.remove(node)
        self._taken = {*self._constants, *self.inputs, *(name for node in self.nodes for name in (node.name, *node.output))}

    # -- reading ----------------------------------------------------------------------------------------------------------
    @property
    def opset(self) -> int:
        return next(int(entry.version) for entry in self.model.opset_import if entry.domain in ("", "ai.onnx"))

    @property
    def inputs(self) -> list[str]:
        return [entry.name for entry in self.model.graph.input]

    @property
    def outputs(self) -> list[str]:
        return [entry.name for entry in self.model.graph.output]

    def value(self, name: str) -> np.ndarray | None:
        """The constant of this name, or None."""
        return numpy_helper.to_array(self._constants[name]) if name in self._constants else None

    def makers(self) -> dict[str, onnx.NodeProto]:
        """Name of a tensor to the node that makes it, as of now."""
        return {name: node for node in self.nodes for name in node.output}

    def readers(self) -> dict[str, list[tuple[onnx.NodeProto, int]]]:
        """Name of a tensor to who reads it, as of now: (node, slot); slot -1 for what a loop or a branch reads in its body, and
        an empty node for outputs of the model.
        """
        found: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in self.nodes:
            for slot, name in enumerate(node.input):
                found.setdefault(name, []).append((node, slot))
            for name in dict.fromkeys(_captured(node)):
                found.setdefault(name, []).append((node, -1))
        for name in self.outputs:
            found.setdefault(name, []).append((onnx.NodeProto(), -1))
        return found

    def of_type(self, *ops: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if node.op_type in ops]

    # -- writing ----------------------------------------------------------------------------------------------------------
    def constant(self, value: np.ndarray, name: str) -> str:
        """A new constant; its name."""
        name = self._unique(name)
        self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)
        return name

    def add(
        self, op: str, inputs: Sequence[str], name: str, attrs: Mapping[str, Any] | None = None, output: str | None = None
    ) -> str:
        """A new node with one output; its name, which is `name` unless that is taken or `output` is given."""
        output = self._unique(name) if output is None else output
        self.nodes.append(onnx.helper.make_node(op, inputs, [output], name=self._unique(f"{name}/{op}"), **(attrs or {})))
        return output

    def add_many(self, op: str, inputs: Sequence[str], outputs: Sequence[str], name: str) -> None:
        """A new node with outputs of these names, which nothing else has."""
        self._taken.update(outputs)
        self.nodes.append(onnx.helper.make_node(op, inputs, outputs, name=self._unique(f"{name}/{op}")))

    def remove(self, node: onnx.NodeProto) -> None:
        """Takes a node out, which nobody may read any more."""
        self.nodes = [other for other in self.nodes if other is not node]

    def drop_inputs(self, names: Collection[str]) -> None:
        """Takes inputs of the model away, which nobody may read any more."""
        kept = [entry for entry in self.model.graph.input if entry.name not in names]
        del self.model.graph.input[:]
        self.model.graph.input.extend(kept)

    def _unique(self, name: str) -> str:
        candidate, count = name, 0
        while candidate in self._taken:
            count += 1
            candidate = f"{name}_{count}"
        self._taken.add(candidate)
        return candidate

    def finish(self) -> dict[str, str]:
        """Writes all edits to `model`: nodes in order, without what no output needs, under names that any run gives.

        Returns:
            The new names of tensors by their old ones.
        """
        order = self._ordered()
        graph = self.model.graph
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(order)
        used = {name for node in order for name in (*node.input, *_captured(node))} | {*self.outputs}
        graph.initializer.extend(tensor for name, tensor in self._constants.items() if name in used)
        return _rename(self.model)

    def _ordered(self) -> list[onnx.NodeProto]:
        makers = self.makers()
        done: dict[int, onnx.NodeProto] = {}
        started = set()
        for output in self.outputs:
            stack = [makers[output]] if output in makers else []
            while stack:
                node = stack[-1]
                if id(node) in started:
                    stack.pop()
                    done.setdefault(id(node), node)
                    continue
                started.add(id(node))
                reads = (makers[name] for name in (*node.input, *_captured(node)) if name in makers)
                stack.extend(other for other in reads if id(other) not in started)
        return list(done.values())


def _captured(node: onnx.NodeProto) -> Iterator[str]:
    """What the bodies of a loop or a branch read from outside of them, and names of their own."""
    for body in _bodies(node):
        for inner in body.node:
            yield from inner.input
            yield from _captured(inner)
        yield from (output.name for output in body.output)


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _rename(model: onnx.ModelProto) -> dict[str, str]:
    """Gives nodes and tensors names without the numbers that depend on what was converted before."""
    graph = model.graph
    kept = [entry.name for entry in (*graph.input, *graph.output)]
    new: dict[str, str] = dict(zip(kept, kept, strict=True))
    taken = set(kept)
    names: list[str] = []
    _collect(graph.initializer, graph.node, names)
    for old in names:
        if old and old not in new:
            new[old] = _free(_PORT.sub("", _COUNT.sub("", _PORT.sub("", old))), taken)
    _apply(graph, new)
    labels: set[str] = set()
    _label(graph.node, labels)
    symbols: dict[str, str] = {}
    for entry in (*graph.input, *graph.output):
        for dim in entry.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = symbols.setdefault(dim.dim_param, f"dim_{len(symbols)}")
    return new


def _free(name: str, taken: set[str]) -> str:
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def _collect(initializers: Iterable[onnx.TensorProto], nodes: Iterable[onnx.NodeProto], names: list[str]) -> None:
    names.extend(tensor.name for tensor in initializers)
    for node in nodes:
        names.extend(node.output)
        for body in _bodies(node):
            names.extend(entry.name for entry in body.input)
            _collect(body.initializer, body.node, names)


def _apply(graph: onnx.GraphProto, new: Mapping[str, str]) -> None:
    for tensor in graph.initializer:
        tensor.name = new.get(tensor.name, tensor.name)
    for entry in (*graph.input, *graph.output):
        entry.name = new.get(entry.name, entry.name)
    del graph.value_info[:]
    for node in graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
        for body in _bodies(node):
            _apply(body, new)


def _label(nodes: Iterable[onnx.NodeProto], taken: set[str]) -> None:
    for node in nodes:
        node.name = _free(f"{node.output[0]}/{node.op_type}", taken)
        for body in _bodies(node):
            _label(body.node, taken)
