"""Multiply-accumulates of an op for one sample."""

import math

from tfquant.graph.ir import Node, Shape


def macs(node: Node) -> int:
    """Multiply-accumulates that `node` needs for one sample, 0 where its shapes are not known or it has none."""
    rule = _RULES.get(node.op)
    return rule(node) if rule else 0


def _elements(shape: Shape) -> int:
    """Elements of a sample: the first dimension is the batch."""
    if shape is None or any(size is None for size in shape[1:]):
        return 0
    return math.prod(size for size in shape[1:] if size is not None)


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
