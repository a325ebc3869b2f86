"""What several kernels need: checks that give a reason, biases with zero points in them."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfquant.errors import PlanError
from tfquant.graph.ir import Node, Shape, Tensor
from tfquant.graph.patterns import Match
from tfquant.plan.kernels import Unit
from tfquant.plan.spec import S8, U8, QuantSpec

DTYPES = {U8: tf.quint8, S8: tf.qint8}


def not_float32(*tensors: Tensor) -> str | None:
    for tensor in tensors:
        if tensor.dtype != tf.float32:
            return f"{tensor.name} is {tensor.dtype.name if tensor.dtype else 'of unknown type'}, the kernels take float32 models"
    return None


def not_image(node: Node, *tensors: Tensor) -> str | None:
    """Why the tensors are not (N, H, W, C) with known channels."""
    if node.attr("data_format", "NHWC") != "NHWC":
        return f"its data format is {node.attr('data_format')}, not NHWC"
    for tensor in tensors:
        if tensor.shape is None or len(tensor.shape) != 4 or tensor.shape[3] is None:
            return f"the shape of {tensor.name} is {tensor.shape}: the kernel needs (N, H, W, C) with known C"
    return None


def same_shape(one: Shape, other: Shape) -> bool:
    """Whether two shapes are equal as far as they are known, the sample's part being known."""
    if one is None or other is None or len(one) != len(other) or None in one[1:]:
        return False
    return one[1:] == other[1:] and (one[0] is None or other[0] is None or one[0] == other[0])


def activation(match: Match) -> str:
    return match.nodes["activation"].op if "activation" in match.nodes else ""


def taps(integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What the dequantized weights of each output channel add up to, float64 (C,)."""
    return np.asarray(integers.reshape(-1, integers.shape[-1]).astype(np.int64).sum(0) * scales.astype(np.float64))


def folded_bias(
    bias: np.ndarray | float,
    integers: np.ndarray,
    scales: np.ndarray,
    spec: QuantSpec,
    out: QuantSpec | None,
    summand: QuantSpec | None = None,
) -> np.ndarray:
    """The bias that makes a kernel without zero points compute one with them, float32 (C,).

    conv(x) = conv(scale * q) + offset_x * sum(W), y - offset_y is what the kernel stores, and a summand r lacks offset_r.

    Args:
        bias: the layer's own.
        integers: int8 weights, output channels last.
        scales: theirs.
        spec: of the input.
        out: of the output, None where it is float.
        summand: of the fused residual.
    """
    result = np.asarray(bias, np.float64) + spec.offset * taps(integers, scales)
    if out is not None:
        result = result - out.offset
    if summand is not None:
        result = result + summand.offset
    return np.broadcast_to(result, scales.shape).astype(np.float32)


def check_clip(unit: Unit, out: QuantSpec | None) -> None:
    """Raises `PlanError` when the output range does not end where the activation that it stands for does."""
    if out is None or not unit.clip:
        return
    if out.offset != 0:
        raise PlanError(f"{unit.output.name} ends with {unit.clip}: its range must begin at 0. Received: {out.low:g}")
    if unit.clip == "Relu6" and out.high > 6 + out.scale / 2:
        raise PlanError(f"{unit.output.name} ends with Relu6: its range must end at 6 at most. Received: {out.high:g}")
