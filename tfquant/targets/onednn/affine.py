"""A scale and a shift per channel, a lone ReLU, and the sum of two tensors: all are a 1x1 depthwise convolution.

With one weight per channel the 8-bit weight is +-127 and exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from tfquant.graph.ir import Graph, Tensor
from tfquant.graph.patterns import Any, Const, Match, Maybe, Op
from tfquant.plan.kernels import Kernel, Unit
from tfquant.plan.spec import U8, QuantSpec
from tfquant.simplify.canonical import channel_vector
from tfquant.targets.onednn import common

if TYPE_CHECKING:
    from tfquant.targets.onednn.lowering import Lowering

_AFFINE = Maybe(
    "Relu|Relu6",
    Maybe("AddV2|Add|BiasAdd", Maybe("Mul", Any("x"), Const("scale"), name="mul"), Const("shift"), name="shift_add"),
    name="activation",
)
_ADD = Maybe("Relu|Relu6", Op("AddV2|Add", Any("x"), Any("summand"), name="add"), name="activation")


def _describe_affine(kernel: Kernel, graph: Graph, match: Match) -> Unit | str:
    x, out = match["x"], match.root.out
    reason = common.not_float32(x) or common.not_image(match.root, x, out)
    if reason:
        return reason
    assert x.shape is not None
    channels = x.shape[3] or 0
    scale, shift = (_vector(match, name, x, default) for name, default in (("scale", 1.0), ("shift", 0.0)))
    if scale is None or shift is None or out.shape is None or out.shape[3] != channels:
        return "it does not treat a channel alike"
    main = next(match.nodes[name] for name in ("mul", "shift_add", "activation") if name in match.nodes)
    return Unit(
        kernel=kernel,
        match=match,
        main=main,
        inputs=(x,),
        output=out,
        weights=scale.reshape(1, 1, channels).astype(np.float32),
        bias=shift.astype(np.float32),
        clip=common.activation(match),
    )


def _vector(match: Match, name: str, x: Tensor, default: float) -> np.ndarray | None:
    assert x.shape is not None
    if not match.get(name):
        return np.full(x.shape[3] or 0, default)
    return channel_vector(match.value(name), x)


def _describe_add(kernel: Kernel, graph: Graph, match: Match) -> Unit | str:
    x, summand, out = match["x"], match["summand"], match.root.out
    reason = common.not_float32(x, summand) or common.not_image(match.root, x)
    if reason:
        return reason
    if x.value is not None or summand.value is not None:
        return "a constant is added"
    if not common.same_shape(x.shape, summand.shape):
        return f"the shapes {x.shape} and {summand.shape} differ"
    assert x.shape is not None
    return Unit(
        kernel=kernel,
        match=match,
        main=match.nodes["add"],
        inputs=(x, summand),
        output=out,
        weights=np.ones((1, 1, x.shape[3] or 0), np.float32),
        clip=common.activation(match),
        unsigned=(summand, out),
    )


def _lower(lowering: Lowering, unit: Unit) -> None:
    out = lowering.spec(unit.output)
    common.check_clip(unit, out)
    integers, scales = lowering.weights(unit)
    bias = np.zeros(scales.shape) if unit.bias is None else unit.bias
    summand = unit.inputs[1] if len(unit.inputs) > 1 else None
    lowering.put(unit.output, _emit(lowering, unit.inputs[0], integers, scales, bias, out, unit.name, summand))


def scale_channels(lowering: Lowering, x: Tensor, factor: np.ndarray, shift: np.ndarray, out: QuantSpec, name: str) -> Tensor:
    """x * factor + shift, both (C,), stored with `out`; factors must not be 0."""
    scales = (np.abs(factor) / 127).astype(np.float32)
    return _emit(lowering, x, (127 * np.sign(factor)).astype(np.int8), scales, shift, out, name, None)


def _emit(
    lowering: Lowering,
    x: Tensor,
    integers: np.ndarray,
    scales: np.ndarray,
    shift: np.ndarray,
    out: QuantSpec,
    name: str,
    summand: Tensor | None,
) -> Tensor:
    spec = lowering.spec(x)
    other = lowering.spec(summand) if summand is not None else None
    bias = common.folded_bias(shift, integers, scales, spec, out, other)
    channels = len(scales)
    reach = 127 * scales
    dtype, kind = common.DTYPES[spec.dtype], common.DTYPES[out.dtype]
    operands = [
        (lowering.stored(x), dtype),
        (lowering.constant(integers.reshape(1, 1, channels, 1), f"{name}/weights", tf.qint8), tf.qint8),
        (lowering.constant(bias, f"{name}/bias"), tf.float32),
    ]
    ranges = [
        *lowering.known(spec),
        lowering.constant(-reach, f"{name}/min_weights"),
        lowering.constant(reach, f"{name}/max_weights"),
    ]
    fused_ops = ["BiasAdd"]
    if summand is not None and other is not None:
        fused_ops.append("Sum")
        operands.append((lowering.stored(summand), tf.quint8))
        ranges += lowering.known(other)
    fused_ops += ["Relu", "Requantize"] if out.dtype == U8 else ["Requantize"]
    ranges += lowering.known(out)
    attrs = {
        "Tinput": dtype,
        "Tfilter": tf.qint8,
        "Tbias": tf.float32,
        "Tsummand": kind,
        "out_type": kind,
        "data_format": "NHWC",
        "strides": [1, 1, 1, 1],
        "dilations": [1, 1, 1, 1],
        "padding": "VALID",
        "is_filter_const": True,
        "is_bias_const": True,
        "fused_ops": fused_ops,
        "alpha": 0.0,
    }
    all_operands = operands + [(tensor, tf.float32) for tensor in ranges]
    return lowering.fused("_FusedQuantizedDepthwiseConv2D", name, all_operands, kind, attrs).out


KERNELS = (
    Kernel("add", "elementwise", _ADD, _describe_add, _lower),
    Kernel("affine", "elementwise", _AFFINE, _describe_affine, _lower),
)
