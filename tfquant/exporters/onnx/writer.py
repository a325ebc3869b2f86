"""A marked graph as an ONNX model with 8-bit tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx

from tfquant.errors import ModelError, OutputError
from tfquant.exporters.marking import Marked
from tfquant.exporters.onnx import passes
from tfquant.exporters.onnx.converter import convert, fake_quantizations
from tfquant.exporters.onnx.graph import OnnxGraph
from tfquant.exporters.onnx.passes import Mark, Place
from tfquant.graph.loading import first_line

# A proto cannot hold 2 GiB.
_LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Written:
    """A model in ONNX.

    Attributes:
        model: its proto.
        places: where it holds the tensors that are stored in 8 bits.
    """

    model: onnx.ModelProto
    places: tuple[Place, ...]


def write(
    marked: Marked, names: Mapping[str, str], opset: int, inputs_as_nchw: Sequence[str] = (), dynamic: bool = False
) -> Written:
    """The ONNX model of a marked graph.

    Args:
        marked: the graph.
        names: of inputs and outputs in the model, by what the graph calls them.
        opset: 13 or more.
        inputs_as_nchw: names of inputs that the model takes as (N, C, ...) where the graph has (N, ..., C).
        dynamic: products with 8-bit weights find the range of their other side at each call.

    Raises:
        ModelError: an op has no counterpart at this opset.
    """
    converted = convert(marked, names, opset, inputs_as_nchw)
    graph = OnnxGraph(converted.model)
    passes.write_weights(graph, marked.weights, converted.weights)
    passes.turn_before_rounding(graph)
    passes.pool_globally(graph, converted.shapes)
    passes.round_pools(graph)
    places = passes.write_activations(graph, _marks(marked))
    passes.drop_activation_functions(graph)
    passes.spell_paddings(graph)
    passes.join_paddings(graph)
    if dynamic:
        passes.write_dynamic(graph)
    else:
        passes.join_biases(graph, converted.shapes)
        passes.write_biases(graph)
    passes.unpack_weights(graph)
    passes.keep_in_float(graph)
    renamed = graph.finish()
    kept = [dataclasses.replace(place, tensor=renamed[place.tensor]) for place in places if place.tensor in renamed]
    return Written(graph.model, tuple(kept))


def pack(model: onnx.ModelProto) -> bytes:
    """The file: equal bytes for equal models.

    Raises:
        OutputError: it would be too large.
        ModelError: it is no valid ONNX.
    """
    if model.ByteSize() > _LARGEST:
        raise OutputError(f"An ONNX file cannot hold 2 GiB. Received: {model.ByteSize() / 2**30:.1f} GiB")
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"The converted model is not valid ONNX: {first_line(error)}") from error
    return model.SerializeToString(deterministic=True)


def _marks(marked: Marked) -> list[Mark]:
    """By number: what each marker stands for."""
    nodes = (tensor.node for tensor in fake_quantizations(marked.graph))
    return [Mark(node.name, marked.names.get(node.name, node.name), marked.specs[node.name]) for node in nodes]
