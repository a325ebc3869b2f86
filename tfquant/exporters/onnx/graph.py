"""ONNX models as objects: nodes, constants and readers by name, and what nobody reads left out when they are written."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

# Of names that tf2onnx makes unique by a count over the whole process.
_COUNT = re.compile(r"__\d+$")
_CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear"})
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
        self._shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}
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
        """A constant; its name, which is that of an equal one where there is one: most zero points are alike."""
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._shared:
            self._shared[key] = name = _free(name, self._taken)
            self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)
        return self._shared[key]

    def add(
        self, op: str, inputs: Sequence[str], name: str, attrs: Mapping[str, Any] | None = None, output: str | None = None
    ) -> str:
        """A new node with one output; its name, which is `name` unless that is taken or `output` is given."""
        output = _free(name, self._taken) if output is None else output
        self.nodes.append(onnx.helper.make_node(op, inputs, [output], name=_free(f"{name}/{op}", self._taken), **(attrs or {})))
        return output

    def add_many(self, op: str, inputs: Sequence[str], outputs: Sequence[str], name: str) -> None:
        """A new node with outputs of these names, which nothing else has."""
        self._taken.update(outputs)
        self.nodes.append(onnx.helper.make_node(op, inputs, outputs, name=_free(f"{name}/{op}", self._taken)))

    def remove(self, node: onnx.NodeProto) -> None:
        """Takes a node out, which nobody may read any more."""
        self.nodes = [other for other in self.nodes if other is not node]

    def drop_inputs(self, names: Collection[str]) -> None:
        """Takes inputs of the model away, which nobody may read any more."""
        kept = [entry for entry in self.model.graph.input if entry.name not in names]
        del self.model.graph.input[:]
        self.model.graph.input.extend(kept)

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
        started: set[int] = set()
        result: list[onnx.NodeProto] = []
        for output in self.outputs:
            root = makers.get(output)
            if root is None or id(root) in started:
                continue
            started.add(id(root))
            stack = [(root, _reads(root))]
            while stack:
                node, reads = stack[-1]
                for name in reads:
                    other = makers.get(name)
                    if other is not None and id(other) not in started:
                        started.add(id(other))
                        stack.append((other, _reads(other)))
                        break
                else:
                    result.append(node)
                    stack.pop()
        return result


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    yield from _captured(node)


def _captured(node: onnx.NodeProto) -> Iterator[str]:
    """What the bodies of a loop or a branch read from outside of them."""
    for body in _bodies(node):
        own = {*_defined(body)}
        read = [name for inner in body.node for name in _reads(inner)] + [output.name for output in body.output]
        yield from (name for name in read if name and name not in own)


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _defined(graph: onnx.GraphProto) -> Iterator[str]:
    """The names that a graph gives, those of its bodies left out."""
    yield from (entry.name for entry in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (name for node in graph.node for name in node.output if name)


def _rename(model: onnx.ModelProto) -> dict[str, str]:
    """Gives nodes and tensors names without the numbers that depend on what was converted before; new names by old ones."""
    kept = [entry.name for entry in (*model.graph.input, *model.graph.output)]
    names = _Names(kept, _around_integers(model.graph))
    return names.give(model.graph, {}, frozenset(kept))


def _around_integers(graph: onnx.GraphProto) -> set[str]:
    """What is said of 8-bit tensors, biases, and the floats in front of QuantizeLinear and behind DequantizeLinear."""
    conversions = [node for node in graph.node if node.op_type in _CONVERSIONS]
    stored = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    stored.update(node.output[0] for node in conversions if node.op_type == "QuantizeLinear")
    return {name for node in conversions for name in (*node.input, *node.output)} - stored


class _Names:
    """Names that no two tensors share, nor two nodes, nor two sizes that are not known.

    An ONNX file holds a name as often as a tensor is read. Nodes, 8-bit tensors and weights have those of their layers; more than
    numbers for what is between would make the file of a small network a tenth larger.

    Args:
        taken: names that are given already.
        numbered: old names of tensors of the main graph that get a number.
    """

    def __init__(self, taken: Iterable[str], numbered: Collection[str]) -> None:
        self._tensors, self._nodes = set(taken), set[str]()
        self._numbered, self._count = numbered, itertools.count()
        self._sizes: dict[str, str] = {}

    def give(self, graph: onnx.GraphProto, outer: Mapping[str, str], kept: Collection[str] = ()) -> dict[str, str]:
        """Renames what a graph and its bodies define.

        Args:
            graph: edited in place.
            outer: new names of what it reads from outside, by old ones.
            kept: what it may not rename.
        """
        new = {**outer, **{name: name for name in kept}}
        for old in _defined(graph):
            if old not in kept:
                new[old] = _free(str(next(self._count)) if old in self._numbered else _tidy(old), self._tensors)
        for tensor in graph.initializer:
            tensor.name = new[tensor.name]
        for entry in (*graph.input, *graph.output):
            entry.name = new.get(entry.name, entry.name)
            for dim in entry.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_param = self._sizes.setdefault(dim.dim_param, f"dim_{len(self._sizes)}")
        del graph.value_info[:]
        for node in graph.node:
            node.name = "" if node.op_type in _CONVERSIONS else _free(_tidy(node.output[0]), self._nodes)
            node.input[:] = [new.get(name, name) for name in node.input]
            node.output[:] = [new.get(name, name) for name in node.output]
            for body in _bodies(node):
                self.give(body, new)
        return new


def _tidy(name: str) -> str:
    return _PORT.sub("", _COUNT.sub("", _PORT.sub("", name)))


def _free(name: str, taken: set[str]) -> str:
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate
