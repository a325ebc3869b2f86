"""Multiply-accumulates of ops and graphs."""

import math

from tfquant.graph.ir import Graph, Node, Shape


def macs(node: Node) -> int:
    """Multiply-accumulates of `node`, with 1 for a first dimension that is not known; 0 where others are not, or it has none."""
    rule = _RULES.get(node.op)
    return rule(node) if rule else 0


def macs_per_sample(graph: Graph) -> dict[str, int]:
    """Multiply-accumulates for one sample, by names of nodes.

    Rows of a product are known only for a batch of known size: [-1, 768] of a transformer is batch times sequence.
    """
    shapes = {key: (1, *tensor.shape[1:]) for key, tensor in graph.inputs.items() if tensor.shape and tensor.shape[0] is None}
    known = {tensor.shape[0] for tensor in graph.inputs.values() if tensor.shape}
    try:
        single = graph.resized(shapes) if shapes else graph
    except ValueError:
        single = graph  # batch sizes that depend on each other
    batch = (known.pop() or 1) if len(known) == 1 else 1
    return {node.name: macs(node) // batch for node in single.nodes.values()}


def _elements(shape: Shape) -> int:
    if shape is None or any(size is None for size in shape[1:]):
        return 0
    return math.prod((size or 0) if axis else 1 if size is None else size for axis, size in enumerate(shape))


def _convolution(node: Node) -> int:
    weights = node.inputs[1].shape
    if weights is None or any(size is None for size in weights):
        return 0
    return _elements(node.out.shape) * math.prod(size for size in weights[:-1] if size is not None)


def _depthwise(node: Node) -> int:
    weights = node.inputs[1].shape
    return _elements(node.out.shape) * math.prod(size or 0 for size in weights[:2]) if weights else 0


def _transposed(node: Node) -> int:
    weights = node.inputs[1].shape
    return _elements(node.inputs[2].shape) * math.prod(size or 0 for size in weights[:-1]) if weights else 0


def _matmul(node: Node) -> int:
    first = node.inputs[0].shape
    if first is None:
        return 0
    depth = first[-2 if node.attr("transpose_a") or node.attr("adj_x") else -1]
    return _elements(node.out.shape) * (depth or 0)


_RULES = {
    "Conv2D": _convolution,
    "Conv3D": _convolution,
    "DepthwiseConv2dNative": _depthwise,
    "Conv2DBackpropInput": _transposed,
    "MatMul": _matmul,
    "BatchMatMul": _matmul,
    "BatchMatMulV2": _matmul,
    "BatchMatMulV3": _matmul,
}
