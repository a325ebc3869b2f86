"""From a marked graph to ONNX ops by tf2onnx, with markers where 8 bits are stored.

tf2onnx would fold fake-quantized weights into floats, and its passes would tear quantizations from the tensors that they belong
to. So weights are inputs of the graph while it is converted, and quantized activations go through a marker: an op that tf2onnx
moves transposes past and otherwise does not know. `passes` writes what these stand for.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import tensorflow as tf
from tf2onnx import optimizer, tfonnx
from tf2onnx.optimizer.transpose_optimizer import TransposeOptimizer

from tfquant.errors import ModelError
from tfquant.exporters.marking import Marked
from tfquant.graph.ir import Graph, Tensor
from tfquant.targets import fakequant

# The marker; which of all it is; the permutation that turns its tensor to that of the graph, where they differ.
ACTIVATION, NUMBER, LAYOUT = "TfquantActivation", "number", "layout"
# tf2onnx's own passes over quantized tensors are of no use without such.
_LEFT_OUT = ("const_dequantize_optimizer", "q_dq_optimizer")


@dataclasses.dataclass(frozen=True)
class Converted:
    """A graph as ONNX ops, with markers.

    Attributes:
        model: its proto, with inputs that stand for weights behind those of the graph.
        weights: name of such an input to the number of the weights.
        shapes: of tensors, by name, where their rank is known; -1 for a size that is not.
    """

    model: onnx.ModelProto
    weights: Mapping[str, int]
    shapes: Mapping[str, list[int]]


def fake_quantizations(graph: Graph) -> list[Tensor]:
    """The marked activations of a graph, in topological order: the number of each is its marker's."""
    return [node.out for node in graph.order() if node.op == fakequant.OP]


def convert(marked: Marked, names: Mapping[str, str], opset: int, inputs_as_nchw: Sequence[str]) -> Converted:
    """The ops of a marked graph, with markers.

    Args:
        marked: the graph.
        names: of inputs and outputs in the result, by what the graph calls them, where they differ.
        opset: of the result.
        inputs_as_nchw: names of inputs, as the result has them, that it takes as (N, C, ...).

    Raises:
        ModelError: tf2onnx cannot convert it.
    """
    graph = marked.graph.copy()
    _spell_out(graph)
    weights = {graph.nodes[name]: number for name, number in _weights(graph, marked)}
    inputs = {_full_name(tensor): names.get(key, key) for key, tensor in graph.inputs.items()}
    stands_for = {_full_name(node.out): number for node, number in weights.items()}
    outputs = {}
    for key, tensor in graph.outputs.items():
        assert tensor.dtype is not None
        shown = graph.add("Identity", [tensor], name=f"{tensor.node.name}/output", attrs={"T": tensor.dtype}).out
        graph.outputs[key] = shown
        outputs[_full_name(shown)] = names.get(key, key)
    with tf.Graph().as_default() as scratch:
        tf.graph_util.import_graph_def(graph.to_graph_def(placeholders=weights), name="")
    before = logging.getLogger("tf2onnx").level
    logging.getLogger("tf2onnx").setLevel(logging.CRITICAL)
    try:
        found = tfonnx.process_tf_graph(
            scratch,
            opset=opset,
            input_names=[*inputs, *stands_for],
            output_names=[*outputs],
            inputs_as_nchw=[full for full, name in inputs.items() if name in inputs_as_nchw],
            tensors_to_rename={**inputs, **outputs},
            custom_rewriter=[_marking(graph)],
        )
        found = optimizer.optimize_graph(found, optimizers=_passes())
        model, shapes = found.make_model("tfquant"), dict(_shapes(found))
    except Exception as error:  # whatever an op that tf2onnx does not have, or not so, makes it raise
        raise ModelError(f"tf2onnx cannot convert the model at opset {opset}: {_first_line(error)}") from error
    finally:
        logging.getLogger("tf2onnx").setLevel(before)
    unknown = next((node for node in model.graph.node if not node.domain and not _is_known(node.op_type, opset)), None)
    if unknown is not None:
        raise ModelError(f"ONNX has no counterpart of {unknown.op_type} at opset {opset}. Received: {unknown.name}")
    return Converted(model, stands_for, shapes)


def _spell_out(graph: Graph) -> None:
    """Ops that ONNX does not have, by others: erfc(x) as 1 - erf(x)."""
    for node in [node for node in graph.order() if node.op == "Erfc"]:
        (x,) = node.inputs
        assert x.dtype is not None
        facts: Any = {"attrs": {"T": x.dtype}, "shapes": [x.shape], "dtypes": [x.dtype]}
        one = graph.constant(np.ones((), x.dtype.as_numpy_dtype), name=f"{node.name}/one")
        erf = graph.add("Erf", [x], name=f"{node.name}/erf", **facts)
        graph.replace(node.out, graph.add("Sub", [one, erf.out], name=f"{node.name}/sub", **facts).out)


def _is_known(op: str, opset: int) -> bool:
    if op == ACTIVATION:
        return True
    try:
        onnx.defs.get_schema(op, opset)
    except onnx.defs.SchemaError:
        return False
    return True


def _shapes(converted: Any) -> Iterator[tuple[str, list[int]]]:
    for node in converted.get_nodes():
        for name in node.output:
            shape = converted.get_shape(name)
            if shape is not None:
                yield name, shape


def _full_name(tensor: Tensor) -> str:
    return f"{tensor.node.name}:{tensor.index}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _marking(graph: Graph) -> Callable[[Any, Any], Any]:
    """A rewriter of tf2onnx's graph, run when its own rewriters found their patterns and before the ops are translated."""
    numbers = {tensor.node.name: number for number, tensor in enumerate(fake_quantizations(graph))}

    def rewrite(converted: Any, ops: Any) -> Any:
        for node in list(converted.get_nodes()):
            if node.type == fakequant.OP and node.name in numbers:
                source, output = node.input[0], node.output[0]
                shape, dtype = converted.get_shape(output), converted.get_dtype(output)
                converted.remove_node(node.name)
                attrs = {NUMBER: numbers[node.name]}
                converted.make_node(ACTIVATION, [source], attrs, outputs=[output], name=node.name, shapes=[shape], dtypes=[dtype])
        return converted.get_nodes()

    return rewrite


def _weights(graph: Graph, marked: Marked) -> Iterator[tuple[str, int]]:
    """Names of the constants that are weights of the plan, with the number of these.

    Raises:
        ModelError: the graph lacks some.
    """
    for number, weights in enumerate(marked.weights):
        reader = graph.nodes.get(weights.name)
        found = [
            tensor.node.name
            for tensor in (reader.inputs if reader is not None else ())
            if tensor.value is not None
            and tensor.value.shape == weights.value.shape
            and np.array_equal(tensor.value, weights.value)
        ]
        if not found:
            raise ModelError(f"The weights of {weights.name} ({weights.op}) are not in the graph that is exported.")
        yield found[0], number


class _Transposes(TransposeOptimizer):
    """Moves transposes past the markers, too."""

    def _initialize_handlers(self) -> None:
        super()._initialize_handlers()
        self._handler_map[ACTIVATION] = self._pass_marker

    def _pass_marker(self, transpose: Any, marker: Any) -> bool:
        permutation = list(transpose.get_attr_value("perm"))
        moved = bool(self._simple_through_handler(transpose, marker))
        if moved:
            marker.set_attr(LAYOUT, composed(permutation, marker.get_attr_value(LAYOUT)))
        return moved


def composed(first: Sequence[int], second: Sequence[int] | None) -> list[int]:
    """The permutation that does what `first` and then `second` do."""
    return [*first] if second is None else [first[axis] for axis in second]


def _passes() -> dict[str, Any]:
    passes = {name: made for name, made in optimizer._get_optimizers().items() if name not in _LEFT_OUT}
    return {**passes, "optimize_transpose": _Transposes}
