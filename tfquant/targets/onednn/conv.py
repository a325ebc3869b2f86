"""Conv2D and DepthwiseConv2dNative with padding, bias, residual add and ReLU in one kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from tfquant.graph.ir import Graph, Tensor
from tfquant.graph.patterns import Any, Const, Match, Maybe, Op
from tfquant.plan.kernels import Kernel, Unit
from tfquant.plan.spec import S8, U8
from tfquant.targets.onednn import common, matmul

if TYPE_CHECKING:
    from tfquant.targets.onednn.lowering import Lowering

_FUSED = {"Conv2D": "_FusedQuantizedConv2D", "DepthwiseConv2dNative": "_FusedQuantizedDepthwiseConv2D"}


def _pattern(op: str) -> Op:
    padded = Maybe("Pad|PadV2", Any("x"), Const("paddings"), name="pad", shared=True)
    conv = Op(op, padded, Const("weights"), name="conv")
    biased = Maybe("BiasAdd", conv, Const("bias"), name="bias_add")
    added = Maybe("AddV2|Add", biased, Any("summand"), name="add")
    return Maybe("Relu|Relu6", added, name="activation")


def _describe(kernel: Kernel, graph: Graph, match: Match) -> Unit | str:
    if "conv" not in match.nodes:
        return "no convolution"
    conv, x, out = match.nodes["conv"], match["x"], match.root.out
    reason = common.not_float32(x, conv.out) or common.not_image(conv, x, conv.out) or _grouped(match) or _pad_reason(match)
    if reason:
        return reason
    inputs: tuple[Tensor, ...] = (x,)
    unsigned: tuple[Tensor, ...] = ()
    if "add" in match.nodes:
        summand = match["summand"]
        if not common.same_shape(summand.shape, conv.out.shape):
            return f"the shape {summand.shape} added to it is not that of its result, {conv.out.shape}"
        if summand.value is not None:
            return "a constant is added to it"
        if graph.is_shown(out):
            return "the sum is an output of the model, which is not rounded to 8 bits"
        inputs, unsigned = (x, summand), (summand, out)
    paddings = _paddings(match)
    if paddings is None:
        return f"its SAME padding depends on the unknown size {x.shape}"
    weights = common.value(match, "weights")
    return Unit(
        kernel=kernel,
        match=match,
        main=conv,
        inputs=inputs,
        output=out,
        weights=weights.reshape(*weights.shape[:2], -1) if conv.op != "Conv2D" else weights,
        bias=common.value(match, "bias") if match.get("bias") else None,
        clip=common.activation(match),
        needs_zero=bool(paddings.any()),
        unsigned=unsigned,
        gives_float="add" not in match.nodes,
    )


def _grouped(match: Match) -> str | None:
    x, conv = match["x"], match.nodes["conv"]
    assert x.shape is not None
    depth = common.value(match, "weights").shape[2]
    return None if depth == x.shape[3] else f"it is grouped ({depth} of {x.shape[3]} channels); no stock kernel ({conv.op})"


def _pad_reason(match: Match) -> str | None:
    if "pad" not in match.nodes:
        return None
    pad, conv = match.nodes["pad"], match.nodes["conv"]
    if conv.attr("padding") == "SAME":
        return "it pads what is padded already"
    paddings = common.value(match, "paddings")
    if paddings.shape != (4, 2) or paddings[[0, 3]].any() or (paddings < 0).any():
        return "the padding before it is not of height and width"
    if pad.op == "PadV2" and (pad.inputs[2].value is None or pad.inputs[2].value != 0):
        return "the padding before it is not with zeros"
    return None


def _paddings(match: Match) -> np.ndarray | None:
    conv, weights = match.nodes["conv"], common.value(match, "weights")
    own = common.conv_paddings(conv, conv.inputs[0].shape, weights.shape[:2])
    return own + common.value(match, "paddings") if own is not None and "pad" in match.nodes else own


def _lower(lowering: Lowering, unit: Unit) -> None:
    match, conv = unit.match, unit.match.nodes["conv"]
    x, spec = match["x"], lowering.spec(match["x"])
    paddings = _paddings(match)
    assert paddings is not None and unit.weights is not None
    is_float = lowering.returns_float(unit)
    is_pointwise = conv.op == "Conv2D" and unit.weights.shape[:2] == (1, 1) and not paddings.any()
    if is_float and is_pointwise and conv.attr("strides") == [1, 1, 1, 1] and conv.out.shape and None not in conv.out.shape[1:]:
        matmul.lower_pointwise(lowering, unit)
        return
    integers, scales = lowering.weights(unit)
    stored = lowering.stored(x)
    if paddings.any() and spec.offset != 0:
        # A padded 0 would stand for `offset`: pad with the zero point instead.
        stored = lowering.pad(stored, spec, x.shape or (), paddings, f"{conv.name}/pad")
        paddings = np.zeros((4, 2), np.int64)
    out = None if is_float else lowering.spec(unit.output)
    summand = lowering.spec(match["summand"]) if "add" in match.nodes else None
    common.check_clip(unit, out)
    bias = common.folded_bias(0.0 if unit.bias is None else unit.bias, integers, scales, spec, out, summand)
    weights = integers.reshape(common.value(match, "weights").shape)
    fused_ops = ["BiasAdd"]
    operands = [
        (stored, tf.qint8 if spec.dtype == S8 else tf.quint8),
        (lowering.constant(weights, f"{conv.name}/weights", tf.qint8), tf.qint8),
        (lowering.constant(bias, f"{conv.name}/bias"), tf.float32),
    ]
    reach = 127 * scales.astype(np.float32)
    ranges = [
        *lowering.known(spec),
        lowering.constant(-reach, f"{conv.name}/min_weights"),
        lowering.constant(reach, f"{conv.name}/max_weights"),
    ]
    if summand is not None:
        fused_ops.append("Sum")
        operands.append((lowering.stored(match["summand"]), tf.quint8))
        ranges += lowering.known(summand)
    if out is None:
        kind = tf.qint32
        fused_ops += ["Relu"] if unit.clip == "Relu" else []
    else:
        kind = tf.qint8 if out.dtype == S8 else tf.quint8
        # The output range begins at the real value of 0: the Relu clips there, as the quantizer would.
        fused_ops += ["Relu", "Requantize"] if out.dtype == U8 else ["Requantize"]
        ranges += lowering.known(out)
    explicit = {"explicit_paddings": [int(size) for size in paddings.reshape(-1)]} if paddings.any() else {}
    node = lowering.fused(
        _FUSED[conv.op],
        conv.name,
        operands + [(tensor, tf.float32) for tensor in ranges],
        kind,
        {
            "Tinput": operands[0][1],
            "Tfilter": tf.qint8,
            "Tbias": tf.float32,
            "Tsummand": kind,
            "out_type": kind,
            "data_format": "NHWC",
            "strides": conv.attr("strides"),
            "dilations": conv.attr("dilations") or [1, 1, 1, 1],
            "padding": "EXPLICIT" if explicit else "VALID",
            "is_filter_const": True,
            "is_bias_const": True,
            "fused_ops": fused_ops,
            "alpha": 0.0,
            **explicit,
        },
    )
    if out is None:
        lowering.put_float(unit.output, _to_float(lowering, unit, node.out, spec.scale * float(scales.max())))
    else:
        lowering.put(unit.output, node.out)


def _to_float(lowering: Lowering, unit: Unit, accumulators: Tensor, scale: float) -> Tensor:
    """int32 accumulators as float32. Whatever ranges the kernel reports, they are in steps of the largest channel's scale."""
    graph, name = lowering.graph, f"{unit.name}/dequantize"
    integers = lowering.bitcast(accumulators, tf.qint32, tf.int32, f"{name}/integers")
    attrs = {"SrcT": tf.int32, "DstT": tf.float32, "Truncate": False}
    floats = graph.add("Cast", [integers], name=f"{name}/cast", attrs=attrs, dtypes=[tf.float32]).out
    scaled = graph.add("Mul", [floats, lowering.scalar(scale)], name=name, attrs={"T": tf.float32}, dtypes=[tf.float32]).out
    if unit.clip == "Relu6":
        return graph.add("Relu6", [scaled], name=f"{unit.name}/relu6", attrs={"T": tf.float32}, dtypes=[tf.float32]).out
    return scaled


KERNELS = (
    Kernel("conv2d", "compute", _pattern("Conv2D"), _describe, _lower),
    Kernel("depthwise_conv2d", "compute", _pattern("DepthwiseConv2dNative"), _describe, _lower),
)
