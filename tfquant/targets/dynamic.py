"""Ranges that are found at each call, as ops of the graph; every target finds them in the same way."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tfquant.graph.ir import Graph, Shape, Tensor
from tfquant.plan.spec import U8, DynamicSpec

# The smallest range of a tensor: products of smaller scales with those of weights leave float32. What is all zero gets it, too.
_SMALLEST = 1e-30


class FoundRange(NamedTuple):
    """The range of a tensor as scalars of the graph, float32.

    Attributes:
        scale: of a step.
        low: the real value of the least integer.
        high: that of the largest.
        width: high - low.
    """

    scale: Tensor
    low: Tensor
    high: Tensor
    width: Tensor


def find_range(graph: Graph, tensor: Tensor, shape: Shape, spec: DynamicSpec, name: str) -> FoundRange:
    """Adds the ops that find the range of a float32 tensor: 0 is in it and exact, one end may move by half a step.

    As `plan.spec.asymmetric` where the zero point is not given, else as `plan.spec.symmetric`.

    Args:
        graph: the graph of `tensor`, edited in place.
        tensor: float32; nothing in it is NaN or infinite.
        shape: of it, as far as it is known.
        spec: how it is quantized.
        name: of the ops, as a scope.
    """

    def constant(value: float) -> Tensor:
        return graph.constant(np.array(value, np.float32), name=f"{name}/constant")

    def add(op: str, *inputs: Tensor) -> Tensor:
        return graph.add(op, inputs, name=f"{name}/{op}", attrs={"T": tf.float32}, shapes=[()], dtypes=[tf.float32]).out

    least, largest = (_extreme(graph, tensor, shape, op, f"{name}/{op}") for op in ("Min", "Max"))
    if spec.zero_point is None:
        low, high = add("Minimum", least, constant(0)), add("Maximum", largest, constant(0))
        width = add("Maximum", add("Sub", high, low), constant(_SMALLEST))
        scale = add("Mul", width, constant(1 / 255))
        low = add("Mul", add("Round", add("RealDiv", low, scale)), scale)
        return FoundRange(scale, low, add("AddV2", low, width), width)
    bound = add("Maximum", add("Maximum", largest, add("Neg", least)), constant(_SMALLEST))
    scale = add("Mul", bound, constant(1 / 127))
    ends = (-128.0, 127.0) if spec.dtype == U8 else (-127.0, 127.0)
    low, high = (add("Mul", scale, constant(end)) for end in ends)
    return FoundRange(scale, low, high, add("Mul", scale, constant(ends[1] - ends[0])))


def _extreme(graph: Graph, tensor: Tensor, shape: Shape, op: str, name: str) -> Tensor:
    if shape is None:
        flat = graph.constant(np.array([-1], np.int32), name=f"{name}/flat")
        attrs = {"T": tf.float32, "Tshape": tf.int32}
        tensor = graph.add("Reshape", [tensor, flat], name=f"{name}/Reshape", attrs=attrs, dtypes=[tf.float32]).out
    axes = graph.constant(np.arange(1 if shape is None else len(shape), dtype=np.int32), name=f"{name}/axes")
    attrs = {"T": tf.float32, "Tidx": tf.int32, "keep_dims": False}
    return graph.add(op, [tensor, axes], name=name, attrs=attrs, shapes=[()], dtypes=[tf.float32]).out
