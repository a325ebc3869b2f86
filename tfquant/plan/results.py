"""Which results of float ops a target with more kernels can store in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import tensorflow as tf

from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.graph.patterns import Any, matches
from tfquant.plan.annotate import Annotation
from tfquant.simplify import gelu, hard_swish, normalization

_LAYERS = frozenset(
    {"Conv2D", "DepthwiseConv2dNative", "Conv2DBackpropInput", "MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"}
)
_SUMS = frozenset({"Add", "AddV2", "BiasAdd"})
# What runtimes of 8 bits have a kernel with a range of its own for; others move values, or have one range that is known.
_OPS = (
    _LAYERS
    | _SUMS
    | {"Sub", "Mul", "Mean", "Sum", "Maximum", "Minimum", "ResizeBilinear", "ResizeNearestNeighbor", "ConcatV2", "AvgPool"}
    | {"Relu", "Relu6", "LeakyRelu", "Elu", "Placeholder"}
)
_BIASED = frozenset({"Conv2D", "DepthwiseConv2dNative", "Conv2DBackpropInput", "MatMul"})
_FUSED_ACTIVATIONS = frozenset({"Relu", "Relu6"})
_FUSES_ACTIVATION = _SUMS | {"Conv2D", "DepthwiseConv2dNative", "MatMul", "Sub", "Mul", "ConcatV2", "AvgPool"}


def find_results(graph: Graph, annotation: Annotation, keep_float: Callable[[Node], str | None]) -> list[Tensor]:
    """Float32 tensors that the plan does not quantize, and that end what runtimes compute in one op.

    Those between a convolution and the sum that oneDNN computes with it are among them; not those within a LayerNorm, GELU or
    hard-swish, whose steps 8 bits would spoil.

    Args:
        graph: the float graph.
        annotation: what runs in INT8 of it.
        keep_float: the reason why the user keeps a node in float, or None.

    Returns:
        The tensors, in topological order.
    """
    inside = _interior(graph)
    quantized = annotation.quantized
    return [
        node.out
        for node in graph.order()
        if node.op in _OPS
        and node.out.dtype == tf.float32
        and not node.pinned
        and node not in inside
        and node.out not in quantized
        and _has_batch(node.out)
        and not _goes_on(graph, node)
        and not any(keep_float(part) for part in _parts(graph, node))
    ]


def head_of(graph: Graph, node: Node) -> Node:
    """The op that `node`, the bias or the activation behind it, is computed with: itself, where it is none of these."""
    return _parts(graph, node)[-1]


def _parts(graph: Graph, node: Node) -> list[Node]:
    """What is computed in one op, the last first."""
    found = [node]
    while True:
        inputs = activations(found[-1])
        if len(inputs) != 1 or not _goes_on(graph, inputs[0].node):
            return found
        found.append(inputs[0].node)


def activations(node: Node) -> list[Tensor]:
    """The float32 tensors that an op reads and that are no constants."""
    return [tensor for tensor in node.inputs if tensor.value is None and tensor.dtype == tf.float32]


def _has_batch(tensor: Tensor) -> bool:
    return tensor.shape is None or len(tensor.shape) > 1


def _interior(graph: Graph) -> set[Node]:
    found: set[Node] = set()
    for node in graph.order():
        for covered in _composites(graph, node):
            found.update(covered)
    return found


def _composites(graph: Graph, node: Node) -> Iterator[list[Node]]:
    """The nodes, without the last, of each op made of many that ends at `node`."""
    x = Any("x")
    for pattern, is_it in (
        (normalization.CANONICAL, normalization.is_canonical),
        (gelu.exact(x), gelu.is_gelu),
        (gelu.approximate(x), gelu.is_gelu),
        *((pattern, hard_swish.is_hard_swish) for pattern in hard_swish.PATTERNS),
    ):
        for match in matches(pattern, graph, node):
            if is_it(match):
                yield [inner for inner in match.covered if inner is not node]
                break


def _goes_on(graph: Graph, node: Node) -> bool:
    """Whether its only reader is computed with it: a bias, or an activation."""
    users = graph.users(node.out)
    if len(users) != 1 or graph.is_output(node.out):
        return False
    user, slot = users[0]
    if user.op in _FUSED_ACTIVATIONS:
        return node.op in _FUSES_ACTIVATION and not any(tensor.node.op == "Conv2DBackpropInput" for tensor in node.inputs)
    return node.op in _BIASED and user.op in _SUMS and user.inputs[1 - slot].value is not None
