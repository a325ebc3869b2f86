"""The graph that every part works on: nodes, tensors and constants, edited in place in constant time.

A `Graph` is one pure function: `inputs` (placeholders, in the order of the signature) and `outputs` (names to tensors).
Nodes know their users, so that replacing a tensor costs as much as it has users. Constants are held as NumPy arrays and
become protos only when the graph is written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2, function_pb2, graph_pb2, versions_pb2
from tensorflow.python.framework import op_def_registry

# Ops whose results are values of their inputs, unchanged.
_MOVES = frozenset(
    {"Identity", "Reshape", "Squeeze", "ExpandDims", "Transpose", "Pad", "PadV2", "ConcatV2", "Slice", "StridedSlice", "MaxPool"}
)
# Ops that round floats to the values that integers stand for.
FAKE_QUANT = frozenset(
    {
        "FakeQuantWithMinMaxArgs",
        "FakeQuantWithMinMaxVars",
        "FakeQuantWithMinMaxVarsPerChannel",
        "QuantizeAndDequantizeV2",
        "QuantizeAndDequantizeV3",
        "QuantizeAndDequantizeV4",
    }
)
# A model that fake-quantizes its outputs shows what is in front of that.
_SHOWS = _MOVES | FAKE_QUANT
Shape = tuple[int | None, ...] | None
# Constants that tell a shape, an axis or a padding are small; larger ones are weights, whose values no shape function reads.
_LARGEST_SHAPE_CONSTANT = 1024


class Tensor(NamedTuple):
    """One output of a node."""

    node: Node
    index: int = 0  # type: ignore[assignment]  # tuple has a method of this name

    @property
    def name(self) -> str:
        return self.node.name if self.index == 0 else f"{self.node.name}:{self.index}"

    @property
    def shape(self) -> Shape:
        return self.node.shapes[self.index] if self.index < len(self.node.shapes) else None

    @property
    def dtype(self) -> tf.DType | None:
        return self.node.dtypes[self.index] if self.index < len(self.node.dtypes) else None

    @property
    def value(self) -> np.ndarray | None:
        """The constant behind this tensor, or None."""
        return self.node.value if self.node.op == "Const" else None

    def __repr__(self) -> str:
        return f"Tensor({self.name})"


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """An operation. Edit its `inputs` and `control` only through the `Graph` that owns it."""

    name: str
    op: str
    inputs: list[Tensor]
    control: list[Node]
    attrs: dict[str, attr_value_pb2.AttrValue]
    shapes: list[Shape]
    dtypes: list[tf.DType]
    users: dict[tuple[Node, int], None] = dataclasses.field(default_factory=dict)
    control_users: dict[Node, None] = dataclasses.field(default_factory=dict)
    external: Any = None  # a placeholder stands for this tensor of the caller: the handle of a table or of a variable
    pinned: bool = False  # it stands in a loop or a branch made of Switch and Merge: nothing there may be rewritten
    _value: np.ndarray | None = None

    @property
    def out(self) -> Tensor:
        return Tensor(self, 0)

    @property
    def value(self) -> np.ndarray | None:
        if self._value is None and self.op == "Const":
            self._value = tf.make_ndarray(self.attrs["value"].tensor)
        return self._value

    @property
    def constant_bytes(self) -> int:
        """Size of a constant; strings count as nothing."""
        size = self.dtypes[0].size if self.dtypes else from_attr(self.attrs["dtype"]).size
        return _elements(self) * int(size or 0)

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute as a Python value: int, float, bool, str, `tf.DType` or a list of them."""
        return from_attr(self.attrs[name]) if name in self.attrs else default

    def __repr__(self) -> str:
        return f"Node({self.op} {self.name})"


def to_attr(value: Any) -> attr_value_pb2.AttrValue:
    """A Python value as the proto of a node's attribute."""
    attr = attr_value_pb2.AttrValue()
    if isinstance(value, attr_value_pb2.AttrValue):
        return value
    if isinstance(value, bool):
        attr.b = value
    elif isinstance(value, tf.DType):
        attr.type = value.as_datatype_enum
    elif isinstance(value, int):
        attr.i = value
    elif isinstance(value, float):
        attr.f = value
    elif isinstance(value, str):
        attr.s = value.encode()
    elif isinstance(value, tf.TensorShape):
        attr.shape.CopyFrom(value.as_proto())
    elif isinstance(value, (list, tuple)):
        attr.list.SetInParent()
        for item in value:
            single = to_attr(item)
            field = single.WhichOneof("value")
            getattr(attr.list, field).append(getattr(single, field))
    else:
        raise TypeError(f"No attribute can hold a {type(value).__name__}. Received: {value!r}")
    return attr


def from_attr(attr: attr_value_pb2.AttrValue) -> Any:
    """The inverse of `to_attr`; tensors, functions and shapes stay protos."""
    field = attr.WhichOneof("value")
    if field == "list":
        for name in ("s", "i", "f", "b", "type"):
            items = getattr(attr.list, name)
            if items:
                return [_scalar(name, item) for item in items]
        return []
    return _scalar(field, getattr(attr, field)) if field else None


def _scalar(field: str, value: Any) -> Any:
    if field == "s":
        return value.decode(errors="replace")
    return tf.as_dtype(value) if field == "type" else value


class Graph:
    """A function as a graph of nodes.

    Attributes:
        nodes: name to `Node`, in the order of insertion.
        inputs: signature input name to its placeholder's tensor.
        outputs: output name to tensor.
        effects: nodes that must run though no output needs them (they assign to a variable, print, fill a table).
        library: the functions that control flow ops of the graph call.
    """

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.effects: list[Node] = []
        self.library = function_pb2.FunctionDefLibrary()
        self.versions = versions_pb2.VersionDef()
        self._suffix: dict[str, int] = {}

    # -- building ---------------------------------------------------------------------------------------------------
    def unique(self, name: str) -> str:
        """`name`, with a number behind it where it is taken."""
        if name not in self.nodes:
            return name
        count = self._suffix.get(name, 0)
        while True:
            count += 1
            candidate = f"{name}_{count}"
            if candidate not in self.nodes:
                self._suffix[name] = count
                return candidate

    def add(
        self,
        op: str,
        inputs: Iterable[Tensor] = (),
        *,
        name: str,
        attrs: Mapping[str, Any] | None = None,
        control: Iterable[Node] = (),
        shapes: Iterable[Shape] = (None,),
        dtypes: Iterable[tf.DType] = (),
    ) -> Node:
        """A new node; attributes are Python values or protos."""
        node = Node(
            name=self.unique(name),
            op=op,
            inputs=[],
            control=[],
            attrs={key: to_attr(value) for key, value in (attrs or {}).items()},
            shapes=list(shapes),
            dtypes=list(dtypes),
        )
        self.nodes[node.name] = node
        for tensor in inputs:
            self.connect(node, tensor)
        for other in control:
            self.add_control(node, other)
        return node

    def constant(self, value: np.ndarray, *, name: str, dtype: tf.DType | None = None) -> Tensor:
        """A constant; `dtype` names a quantized type that NumPy does not have (`value` then holds the plain integers)."""
        dtype = dtype or tf.as_dtype(value.dtype)
        node = self.add("Const", name=name, attrs={"dtype": dtype}, shapes=[value.shape], dtypes=[dtype])
        node._value = value
        return node.out

    def take_name(self, node: Node) -> str:
        """The name of `node`, for the node that is to replace it; `node` goes by another from now on."""
        name = node.name
        position = self.nodes.pop(name)
        node.name = self.unique(f"{name}/replaced")
        self.nodes[node.name] = position
        return name

    def rename(self, node: Node, name: str) -> None:
        """Gives `node` a name that is free; its place in the order of nodes is the last."""
        del self.nodes[node.name]
        node.name = self.unique(name)
        self.nodes[node.name] = node

    def copy_of(self, node: Node, inputs: Iterable[Tensor], **changes: Any) -> Node:
        """`node` (of this graph, whose name it takes, or another) again, reading `inputs`; `changes` overwrite attributes."""
        attrs = {**node.attrs, **{key: to_attr(value) for key, value in changes.items()}}
        name = self.take_name(node) if self.nodes.get(node.name) is node else node.name
        twin = self.add(node.op, inputs, name=name, attrs=attrs, shapes=node.shapes, dtypes=node.dtypes)
        twin.external, twin.pinned = node.external, node.pinned
        return twin

    def connect(self, node: Node, tensor: Tensor) -> None:
        """`tensor` becomes the next input of `node`."""
        tensor.node.users[node, len(node.inputs)] = None
        node.inputs.append(tensor)

    # -- editing ----------------------------------------------------------------------------------------------------
    def set_input(self, node: Node, slot: int, tensor: Tensor) -> None:
        del node.inputs[slot].node.users[node, slot]
        node.inputs[slot] = tensor
        tensor.node.users[node, slot] = None

    def add_control(self, node: Node, before: Node) -> None:
        """`before` runs before `node`."""
        if before not in node.control:
            node.control.append(before)
            before.control_users[node] = None

    def remove_control(self, node: Node, before: Node) -> None:
        """`node` no longer waits for `before`."""
        node.control.remove(before)
        del before.control_users[node]

    def replace(self, old: Tensor, new: Tensor) -> None:
        """Whoever reads `old`, an output of the graph included, reads `new`; `new` itself may still read `old`."""
        for user, slot in self.users(old):
            if user is not new.node:
                self.set_input(user, slot, new)
        for key, tensor in self.outputs.items():
            if tensor == old:
                self.outputs[key] = new

    def remove(self, node: Node) -> None:
        """Takes out a node that has no users, then the nodes that only it used."""
        stack = [node]
        while stack:
            node = stack.pop()
            if node.users or node.control_users or self.nodes.get(node.name) is not node or self._is_kept(node):
                continue
            del self.nodes[node.name]
            for slot, tensor in enumerate(node.inputs):
                del tensor.node.users[node, slot]
                stack.append(tensor.node)
            for other in node.control:
                del other.control_users[node]
                stack.append(other)

    def _is_kept(self, node: Node) -> bool:
        shown = (*self.outputs.values(), *self.inputs.values())
        return any(tensor.node is node for tensor in shown) or node in self.effects

    def prune(self) -> int:
        """Removes what no output needs; returns how many nodes went."""
        keep = {node.name for node in self.order()} | {tensor.node.name for tensor in self.inputs.values()}
        gone = [node for name, node in self.nodes.items() if name not in keep]
        for node in gone:
            for slot, tensor in enumerate(node.inputs):
                tensor.node.users.pop((node, slot), None)
            for other in node.control:
                other.control_users.pop(node, None)
            del self.nodes[node.name]
        return len(gone)

    # -- reading ----------------------------------------------------------------------------------------------------
    def users(self, tensor: Tensor) -> list[tuple[Node, int]]:
        """Who reads this tensor: (node, slot), in order of connection."""
        return [(user, slot) for user, slot in tensor.node.users if user.inputs[slot].index == tensor.index]

    @property
    def constant_bytes(self) -> int:
        """Size of all constants that outputs need, and of those in the functions of the library; strings count as nothing."""
        return sum(node.constant_bytes for node in self.order() if node.op == "Const") + library_bytes(self.library)

    def is_output(self, tensor: Tensor) -> bool:
        return any(tensor == other for other in self.outputs.values())

    def is_shown(self, tensor: Tensor) -> bool:
        """Whether its very values are an output of the model: they may be moved or picked among, but not computed with."""
        stack, seen = [tensor], {tensor}
        while stack:
            shown = stack.pop()
            if self.is_output(shown):
                return True
            moved = {user.out for user, slot in self.users(shown) if user.op in _SHOWS}
            stack.extend(moved - seen)
            seen |= moved
        return False

    def order(self) -> list[Node]:
        """The nodes that outputs and effects need, each behind what it reads; the same for the same graph.

        What a loop made of Merge and NextIteration hands back comes behind the Merge that reads it.
        """
        done: set[Node] = set()
        result: list[Node] = []
        roots = [*(tensor.node for tensor in self.outputs.values()), *self.effects]
        for root in roots:  # grows: what loops hand back is found on the way
            if root in done:
                continue
            done.add(root)
            stack = [(root, _parents(root))]
            while stack:
                node, parents = stack[-1]
                for parent in parents:
                    if is_back_edge(node, parent):
                        roots.append(parent)
                    elif parent not in done:
                        done.add(parent)
                        stack.append((parent, _parents(parent)))
                        break
                else:
                    result.append(node)
                    stack.pop()
        return result

    @property
    def is_pure(self) -> bool:
        """Whether nodes may run in pieces, or twice: none has effects, waits for what it does not read, or hands values back."""
        return not self.effects and not any(node.pinned or node.control for node in self.order())

    # -- protos -----------------------------------------------------------------------------------------------------
    @classmethod
    def from_graph_def(
        cls,
        graph_def: graph_pb2.GraphDef,
        inputs: Mapping[str, str],
        outputs: Mapping[str, str],
        effects: Iterable[str] = (),
        infer: bool = True,
    ) -> Graph:
        """A graph from a GraphDef.

        Args:
            graph_def: the GraphDef; constants are shared with it, not copied.
            inputs: signature input name to the name of its placeholder.
            outputs: output name to "node:index".
            effects: names of nodes that must run though no output needs them.
            infer: find out shapes and dtypes.
        """
        graph = cls()
        graph.library.CopyFrom(graph_def.library)
        graph.versions.CopyFrom(graph_def.versions)
        for proto in graph_def.node:
            attrs = {key: value for key, value in proto.attr.items() if key not in ("_output_shapes", "_class")}
            node = Node(proto.name, proto.op, [], [], attrs, [], [])
            graph.nodes[proto.name] = node
        for proto in graph_def.node:
            node = graph.nodes[proto.name]
            for ref in proto.input:
                if ref.startswith("^"):
                    graph.add_control(node, graph.nodes[ref[1:]])
                else:
                    graph.connect(node, graph.tensor(ref))
        graph.inputs = {key: graph.tensor(ref) for key, ref in inputs.items()}
        graph.outputs = {key: graph.tensor(ref) for key, ref in outputs.items()}
        graph.effects = [graph.nodes[name] for name in effects]
        graph.prune()
        if infer:
            graph.infer()
        return graph

    def tensor(self, ref: str) -> Tensor:
        name, _, index = ref.partition(":")
        return Tensor(self.nodes[name], int(index or 0))

    def to_graph_def(self, placeholders: Collection[Node] = ()) -> graph_pb2.GraphDef:
        """The needed nodes and the inputs as a GraphDef: equal for equal graphs, and so are its bytes when it is serialized
        with `SerializeToString(deterministic=True)` (without, protobuf orders attributes as it likes).

        Args:
            placeholders: constants that are to be placeholders of their shape.
        """
        result = graph_pb2.GraphDef()
        result.library.CopyFrom(self.library)
        result.versions.CopyFrom(self.versions)
        order = self.order()
        present, replaced = set(order), set(placeholders)
        order = [t.node for t in self.inputs.values() if t.node not in present] + order
        for node in order:
            proto = result.node.add()
            proto.name, proto.op = node.name, node.op
            proto.input.extend(tensor.name for tensor in node.inputs)
            proto.input.extend(f"^{other.name}" for other in node.control)
            if node in replaced:
                proto.op = "Placeholder"
                proto.attr["dtype"].CopyFrom(node.attrs["dtype"])
                proto.attr["shape"].CopyFrom(to_attr(tf.TensorShape(_constant_shape(node))))
                continue
            for key in sorted(node.attrs):
                proto.attr[key].CopyFrom(node.attrs[key])
            if node.op == "Const" and "value" not in node.attrs:
                assert node.value is not None
                proto.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(node.value, dtype=node.dtypes[0]))
        return result

    def infer(self) -> None:
        """Shapes and dtypes of all tensors, from TensorFlow's own shape functions."""
        large = [node for node in self.nodes.values() if node.op == "Const" and _elements(node) > _LARGEST_SHAPE_CONSTANT]
        with tf.Graph().as_default() as scratch:
            tf.graph_util.import_graph_def(self.to_graph_def(large), name="")
        for node in self.nodes.values():
            try:
                operation = scratch.get_operation_by_name(node.name)
            except KeyError:
                continue
            node.shapes = [_shape(tensor.shape) for tensor in operation.outputs]
            node.dtypes = [tensor.dtype for tensor in operation.outputs]

    def resized(self, shapes: Mapping[str, Sequence[int | None]]) -> Graph:
        """A copy whose inputs have these shapes, by their keys, and all that follows has what comes of them.

        Raises:
            ValueError: an op refuses them.
        """
        result = self.copy()
        for key, shape in shapes.items():
            result.inputs[key].node.attrs["shape"] = to_attr(tf.TensorShape(shape))
        result.infer()
        return result

    def copy(self) -> Graph:
        """Another graph of equal nodes; the arrays of the constants are shared."""
        other = Graph()
        other.library.CopyFrom(self.library)
        other.versions.CopyFrom(self.versions)
        for node in self.nodes.values():
            twin = Node(node.name, node.op, [], [], dict(node.attrs), list(node.shapes), list(node.dtypes))
            twin._value, twin.external, twin.pinned = node._value, node.external, node.pinned
            other.nodes[node.name] = twin
        for node in self.nodes.values():
            twin = other.nodes[node.name]
            for tensor in node.inputs:
                other.connect(twin, Tensor(other.nodes[tensor.node.name], tensor.index))
            for before in node.control:
                other.add_control(twin, other.nodes[before.name])
        other.inputs = {key: Tensor(other.nodes[t.node.name], t.index) for key, t in self.inputs.items()}
        other.outputs = {key: Tensor(other.nodes[t.node.name], t.index) for key, t in self.outputs.items()}
        other.effects = [other.nodes[node.name] for node in self.effects]
        return other


def library_bytes(library: function_pb2.FunctionDefLibrary) -> int:
    """Size of the constants in functions."""
    protos = [proto for function in library.function for proto in function.node_def if proto.op == "Const"]
    return sum(Node(proto.name, proto.op, [], [], dict(proto.attr), [], []).constant_bytes for proto in protos)


def is_stateful(op: str) -> bool:
    """Whether TensorFlow says that the op has state or effects; an op that it does not know may have."""
    definition = op_def_registry.get(op)
    return definition is None or bool(definition.is_stateful)


def _elements(node: Node) -> int:
    return math.prod(_constant_shape(node))


def _constant_shape(node: Node) -> tuple[int, ...]:
    if node._value is not None:
        return node._value.shape
    return tuple(dim.size for dim in node.attrs["value"].tensor.tensor_shape.dim)


def is_back_edge(node: Node, parent: Node) -> bool:
    """Whether `node` reads what a later round of its loop computes."""
    return parent.op == "NextIteration" and node.op == "Merge"


def _parents(node: Node) -> Iterator[Node]:
    yield from (tensor.node for tensor in node.inputs)
    yield from node.control


def _shape(shape: tf.TensorShape) -> Shape:
    return None if shape.rank is None else tuple(shape.as_list())
