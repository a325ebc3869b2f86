"""Half precision (float16 and bfloat16) becomes float32, which the INT8 kernels take: more exact than the model was.

Inputs and outputs of the graph keep their types. So do ops that cannot be had in float32, or whose results would be others
rather than more exact ones: those that call functions (whose bodies are not looked at), random ones, ones that look at bits.
Casts stand between them and the rest.
"""

from __future__ import annotations

import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2
from tensorflow.python.framework import op_def_registry

from tfquant.graph.ir import Graph, Node, Tensor, is_stateful, to_attr

_HALF = frozenset({tf.float16, tf.bfloat16})
_HALF_ENUMS = frozenset(dtype.as_datatype_enum for dtype in _HALF)
_FLOAT = tf.float32.as_datatype_enum
# Inputs, constants (which get a float32 twin), and ops whose results depend on the type itself.
_KEPT = frozenset({"Const", "Placeholder", "PlaceholderWithDefault", "AsString", "Bitcast", "CompareAndBitpack", "Fingerprint"})
_KEPT_WORDS = ("Decode", "Parse", "PyFunc", "Quant", "Random", "Serialize", "Stateless", "Xla")


def run(graph: Graph) -> int:
    return _Walk(graph).run()


class _Walk:
    """One walk over the graph, from the inputs on: what a node reads is float32 already wherever it can be."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._floats: dict[Tensor, Tensor] = {}  # half tensors that stay, in float32

    def run(self) -> int:
        fired = 0
        for node in self.graph.order():
            if self.graph.nodes.get(node.name) is not node:
                continue
            if node.op == "Cast":
                fired += self._cast(node)
            elif _is_widened(node):
                self._widen(node)
                fired += 1
        return fired

    def _widen(self, node: Node) -> None:
        for slot, tensor in enumerate(node.inputs):
            if tensor.dtype in _HALF:
                self.graph.set_input(node, slot, self._float(tensor))
                self.graph.remove(tensor.node)
        node.attrs = {key: _in_float(attr) for key, attr in node.attrs.items()}
        for index, dtype in enumerate(node.dtypes):
            if dtype in _HALF:
                node.dtypes[index] = tf.float32
                self._keep_for_others(Tensor(node, index), dtype)

    def _keep_for_others(self, tensor: Tensor, dtype: tf.DType) -> None:
        """Outputs of the graph and readers that are not widened get the tensor in the type that it had."""
        graph = self.graph
        readers = [(user, slot) for user, slot in graph.users(tensor) if user.op != "Cast" and not _is_widened(user)]
        keys = [key for key, output in graph.outputs.items() if output == tensor]
        if readers or keys:
            half = self._new_cast(tensor, dtype)
            for user, slot in readers:
                graph.set_input(user, slot, half)
            graph.outputs.update(dict.fromkeys(keys, half))

    def _cast(self, node: Node) -> int:
        """A Cast from half precision reads what is widened, or what another Cast has rounded, and vanishes if it can.

        So does one that takes back what was widened.
        """
        source, graph = node.inputs[0], self.graph
        if source.dtype == tf.float32 and source.node.op == "Cast" and node.attr("DstT") in _HALF:
            narrow = source.node.inputs[0]
            if narrow.dtype == node.attr("DstT") and not node.control and not node.control_users:
                graph.replace(node.out, narrow)
                graph.remove(node)
                return 1
        if node.attr("SrcT") not in _HALF or (source.dtype in _HALF and source.node.op != "Cast"):
            return 0
        wide = self._float(source)
        graph.set_input(node, 0, wide)
        graph.remove(source.node)
        node.attrs["SrcT"] = to_attr(tf.float32)
        if node.attr("DstT") == tf.float32 and not node.control:
            graph.replace(node.out, wide)
            graph.remove(node)
        return 1

    def _float(self, tensor: Tensor) -> Tensor:
        if tensor.dtype not in _HALF:
            return tensor
        known = self._floats.get(tensor)
        if known is None or self.graph.nodes.get(known.node.name) is not known.node:  # it may have lost its readers
            known = self._floats[tensor] = self._new_float(tensor)
        return known

    def _new_float(self, tensor: Tensor) -> Tensor:
        if tensor.value is not None:
            return self.graph.constant(tensor.value.astype("float32"), name=f"{tensor.node.name}/float32")
        if tensor.node.op != "Cast":
            return self._new_cast(tensor, tf.float32)
        source = tensor.node.inputs[0]
        if source.dtype == tf.float32 or source.dtype in _HALF:
            return self._float(source)
        return self._new_cast(source, tf.float32)

    def _new_cast(self, tensor: Tensor, dtype: tf.DType) -> Tensor:
        name, shapes = f"{tensor.node.name}/{dtype.name}", [tensor.shape]
        attrs = {"SrcT": tensor.dtype, "DstT": dtype, "Truncate": False}
        return self.graph.add("Cast", [tensor], name=name, attrs=attrs, shapes=shapes, dtypes=[dtype]).out


def _is_widened(node: Node) -> bool:
    """Whether a node works in half precision and can do so in float32."""
    if node.op == "Cast" or node.op in _KEPT or not any(map(_is_half, node.attrs.values())):
        return False
    definition = op_def_registry.get(node.op)
    if definition is None or is_stateful(node.op) or any(word in node.op for word in _KEPT_WORDS):
        return False
    if any(attr.WhichOneof("value") == "func" or attr.list.func for attr in node.attrs.values()):
        return False
    if any(dtype in (tf.variant, tf.resource) for dtype in (*node.dtypes, *(tensor.dtype for tensor in node.inputs))):
        return False
    if any(argument.type in _HALF_ENUMS for argument in (*definition.input_arg, *definition.output_arg)):
        return False
    allowed = {attr.name: attr.allowed_values.list.type for attr in definition.attr}
    return all(not allowed.get(key) or _FLOAT in allowed[key] for key, attr in node.attrs.items() if _is_half(attr))


def _is_half(attr: attr_value_pb2.AttrValue) -> bool:
    return attr.type in _HALF_ENUMS or any(item in _HALF_ENUMS for item in attr.list.type)


def _in_float(attr: attr_value_pb2.AttrValue) -> attr_value_pb2.AttrValue:
    if not _is_half(attr):
        return attr
    result = attr_value_pb2.AttrValue()
    if attr.WhichOneof("value") == "type":
        result.type = _FLOAT
    else:
        result.list.type.extend(_FLOAT if item in _HALF_ENUMS else item for item in attr.list.type)
    return result
