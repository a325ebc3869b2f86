"""The layers that algorithms work on: convolutions and MatMuls with 8-bit weights, in the float graph and in the simulation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.plan.annotate import Annotation
from tfquant.plan.edits import LAYERS, bias_of, value_of
from tfquant.plan.kernels import Unit
from tfquant.plan.spec import Shift


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of a quantized graph.

    Attributes:
        unit: its unit.
        node: its main node.
        x: the float tensor that the node reads: the unit's first input, padded or reshaped.
        z: its result with the bias, in front of an activation or a sum.
    """

    unit: Unit
    node: Node
    x: Tensor
    z: Tensor

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def channels(self) -> int:
        """Output channels."""
        assert self.unit.weights is not None
        return int(self.unit.weights.shape[-1])


def find_layers(graph: Graph, annotation: Annotation) -> list[Layer]:
    """The layers whose weights run in INT8, in topological order."""
    layers = []
    for unit in annotation.units.values():
        if unit.kernel.role != "compute" or unit.weights is None or unit.main.op not in LAYERS or unit.is_table:
            continue
        if unit.main not in unit.private(graph):  # the simulation has another node for the unit
            continue
        bias_add = bias_of(graph, unit.main)
        layers.append(Layer(unit, unit.main, unit.main.inputs[0], unit.main.out if bias_add is None else bias_add.out))
    return layers


def without_bias(graph: Graph, layers: Sequence[Layer]) -> list[Shift]:
    """Edits that give each layer a bias, of 0: who corrects it later then changes no structure."""
    return [Shift(layer.name, np.zeros(layer.channels, np.float32)) for layer in layers if bias_of(graph, layer.node) is None]


def per_sample(value: np.ndarray) -> np.ndarray:
    """Means over space of each sample, float64 (N, C); rows of a matrix count as samples."""
    return (
        np.asarray(value.astype(np.float64).mean(tuple(range(1, value.ndim - 1)))) if value.ndim > 2 else value.astype(np.float64)
    )


def patches(node: Node, x: np.ndarray) -> np.ndarray:
    """What each result of a convolution or MatMul is a weighted sum of: (results, taps), or (results, taps, channels) where it
    is depthwise; the order is that of the weights."""
    if node.op == "MatMul":
        return x.T if node.attr("transpose_a") else x
    height, width = value_of(node.inputs[1]).shape[:2]
    found = tf.image.extract_patches(
        x,
        [1, height, width, 1],
        node.attr("strides"),
        node.attr("dilations") or [1, 1, 1, 1],
        node.attr("padding"),
    ).numpy()
    rows = found.reshape(-1, height * width, x.shape[3])
    return rows if node.op == "DepthwiseConv2dNative" else rows.reshape(len(rows), -1)
