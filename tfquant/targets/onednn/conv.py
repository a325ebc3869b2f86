"""Conv2D and DepthwiseConv2dNative with padding, bias, residual add and ReLU in one kernel; groups as one convolution each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tensorflow as tf

from tfquant.graph.ir import Graph, Node, Shape, Tensor
from tfquant.graph.padding import conv_paddings
from tfquant.graph.patterns import Any, Const, Match, Maybe, Op
from tfquant.plan.kernels import Kernel, Unit
from tfquant.plan.spec import U8, QuantSpec
from tfquant.targets.onednn import common, matmul

if TYPE_CHECKING:
    from tfquant.targets.onednn.lowering import Lowering

# Up to so many pixels of a sample, a 1x1 convolution is faster as a MatMul: it wakes no second thread for little work (1.2 to
# 2.5 times at batch 1, the same at batch 16; beyond, the convolution is up to 1.3 times as fast at batch 16).
_MATMUL_PIXELS = 28 * 28

# Channels that one of the convolutions of a grouped one reads at least: narrower groups go together, their weights with zeros
# between them. With 32, INT8 is 1.3 to 4.7 times as fast as TensorFlow's float groups at batch 16, 0.6 to 1.9 at batch 1.
_LEAST_WIDTH = 32

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
    reason = common.not_float32(x, conv.out) or common.not_image(conv, x, conv.out) or _pad_reason(match)
    if reason:
        return reason
    inputs: tuple[Tensor, ...] = (x,)
    unsigned: tuple[Tensor, ...] = ()
    if "add" in match.nodes:
        summand = match["summand"]
        if _groups(match) > 1:
            return "it is grouped: the sum is not that of one kernel"
        if not common.same_shape(summand.shape, conv.out.shape):
            return f"the shape {summand.shape} added to it is not that of its result, {conv.out.shape}"
        if summand.value is not None:
            return "a constant is added to it"
        if graph.is_shown(out):
            return "the sum is an output of the model, which is not rounded to 8 bits"
        inputs, unsigned = (x, summand), (summand, out)
    paddings = _paddings(match)
    weights = match.value("weights")
    return Unit(
        kernel=kernel,
        match=match,
        main=conv,
        inputs=inputs,
        output=out,
        weights=weights.reshape(*weights.shape[:2], -1) if conv.op != "Conv2D" else weights,
        bias=match.value("bias") if match.get("bias") else None,
        clip=common.activation(match),
        needs_zero=paddings is None or bool(paddings.any()),
        unsigned=unsigned,
        gives_float="add" not in match.nodes,
        saturates=conv.op == "Conv2D",
    )


def _groups(match: Match) -> int:
    x = match["x"]
    assert x.shape is not None and x.shape[3]
    return x.shape[3] // match.value("weights").shape[2]


def _pad_reason(match: Match) -> str | None:
    if "pad" not in match.nodes:
        return None
    pad, conv = match.nodes["pad"], match.nodes["conv"]
    if conv.attr("padding") == "SAME":
        return "it pads what is padded already"
    paddings = match.value("paddings")
    if paddings.shape != (4, 2) or paddings[[0, 3]].any() or (paddings < 0).any():
        return "the padding before it is not of height and width"
    if pad.op == "PadV2" and (pad.inputs[2].value is None or pad.inputs[2].value != 0):
        return "the padding before it is not with zeros"
    return None


def _paddings(match: Match) -> np.ndarray | None:
    conv, weights = match.nodes["conv"], match.value("weights")
    own = conv_paddings(conv, conv.inputs[0].shape, weights.shape[:2])
    return own + match.value("paddings") if own is not None and "pad" in match.nodes else own


def _lower(lowering: Lowering, unit: Unit) -> None:
    match, conv = unit.match, unit.match.nodes["conv"]
    spec, paddings = lowering.spec(match["x"]), _paddings(match)
    assert unit.weights is not None
    is_float = lowering.returns_float(unit)
    if _is_matmul(unit, paddings, is_float):
        matmul.lower_pointwise(lowering, unit)
        return
    integers, scales = lowering.weights(unit)
    stored, padding = _padded(lowering, unit, paddings)
    out = None if is_float else lowering.spec(unit.output)
    summand = lowering.spec(match["summand"]) if "add" in match.nodes else None
    common.check_clip(unit, out)
    bias = common.folded_bias(0.0 if unit.bias is None else unit.bias, integers, scales, spec, out, summand)
    whole = _Part(conv.name, stored, integers.reshape(match.value("weights").shape), scales, bias)
    results = [_emit(lowering, unit, part, out, padding) for part in _parts(lowering, whole, _groups(match), spec)]
    if out is None:
        lowering.put_float(unit.output, _joined(lowering, results, tf.float32, tf.float32, conv.name))
    else:
        # ConcatV2 is faster on plain bytes than on quint8, and has no qint8.
        lowering.put(unit.output, _joined(lowering, results, common.DTYPES[out.dtype], tf.uint8, conv.name))


class _Part(NamedTuple):
    """One call of the kernel.

    Attributes:
        name: of its node.
        stored: its input.
        weights: int8, (H, W, input channels, output channels).
        scales: of the output channels.
        bias: with the zero points in it.
    """

    name: str
    stored: Tensor
    weights: np.ndarray
    scales: np.ndarray
    bias: np.ndarray


def _parts(lowering: Lowering, whole: _Part, groups: int, spec: QuantSpec) -> list[_Part]:
    """The convolutions that a grouped one consists of: of a group each, or of some where groups are narrow."""
    if groups == 1:
        return [whole]
    depth, dtype = whole.weights.shape[2], common.DTYPES[spec.dtype]
    divisors = [count for count in range(1, groups + 1) if groups % count == 0]
    together = next((count for count in divisors if count * depth >= _LEAST_WIDTH), groups)
    count = groups // together
    if count == 1:
        return [whole._replace(weights=_dense(whole.weights, together))]
    axis = lowering.constant(np.array(3, np.int32), f"{whole.name}/split/axis")
    value = lowering.bitcast(whole.stored, dtype, tf.uint8, f"{whole.name}/bytes")
    attrs = {"num_split": count, "T": tf.uint8}
    node = lowering.graph.add("Split", [axis, value], name=f"{whole.name}/split", attrs=attrs, dtypes=[tf.uint8] * count)
    parts = []
    for index, cut in enumerate(np.array_split(np.arange(whole.scales.size), count)):
        name = f"{whole.name}/part_{index}"
        stored = lowering.bitcast(Tensor(node, index), tf.uint8, dtype, f"{name}/input")
        parts.append(_Part(name, stored, _dense(whole.weights[..., cut], together), whole.scales[cut], whole.bias[cut]))
    return parts


def _dense(weights: np.ndarray, groups: int) -> np.ndarray:
    """The weights of a convolution without groups that computes the same, (H, W, groups * D, C) from (H, W, D, C)."""
    height, width, depth, channels = weights.shape
    result = np.zeros((height, width, groups, depth, groups, channels // groups), weights.dtype)
    for group in range(groups):
        result[:, :, group, :, group] = weights.reshape(height, width, depth, groups, -1)[:, :, :, group]
    return result.reshape(height, width, groups * depth, channels)


def _joined(lowering: Lowering, parts: Sequence[Tensor], dtype: tf.DType, moved_as: tf.DType, name: str) -> Tensor:
    """The channels of all parts behind each other; `dtype` is theirs."""
    if len(parts) == 1:
        return parts[0]
    if dtype != moved_as:
        parts = [lowering.bitcast(part, dtype, moved_as, f"{part.node.name}/bytes") for part in parts]
    axis = lowering.constant(np.array(3, np.int32), f"{name}/join/axis")
    attrs = {"N": len(parts), "T": moved_as, "Tidx": tf.int32}
    result = lowering.graph.add("ConcatV2", [*parts, axis], name=f"{name}/join", attrs=attrs, dtypes=[moved_as]).out
    return result if dtype == moved_as else lowering.bitcast(result, moved_as, dtype, f"{name}/joined")


def _emit(lowering: Lowering, unit: Unit, part: _Part, out: QuantSpec | None, padding: Mapping[str, object]) -> Tensor:
    """The kernel's result: stored as `out` says, or float32 where that is None."""
    match, conv = unit.match, unit.match.nodes["conv"]
    spec = lowering.spec(match["x"])
    fused_ops = ["BiasAdd"]
    operands = [
        (part.stored, common.DTYPES[spec.dtype]),
        (lowering.constant(part.weights, f"{part.name}/weights", tf.qint8), tf.qint8),
        (lowering.constant(part.bias, f"{part.name}/bias"), tf.float32),
    ]
    reach = 127 * part.scales.astype(np.float32)
    ranges = [
        *lowering.known(spec),
        lowering.constant(-reach, f"{part.name}/min_weights"),
        lowering.constant(reach, f"{part.name}/max_weights"),
    ]
    if "add" in match.nodes:
        fused_ops.append("Sum")
        operands.append((lowering.stored(match["summand"]), tf.quint8))
        ranges += lowering.known(lowering.spec(match["summand"]))
    if out is None:
        kind = tf.qint32
        fused_ops += ["Relu"] if unit.clip == "Relu" else []
    else:
        kind = common.DTYPES[out.dtype]
        # The output range begins at the real value of 0: the Relu clips there, as the quantizer would.
        fused_ops += ["Relu", "Requantize"] if out.dtype == U8 else ["Requantize"]
        ranges += lowering.known(out)
    node = lowering.fused(
        _FUSED[conv.op],
        part.name,
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
            "is_filter_const": True,
            "is_bias_const": True,
            "fused_ops": fused_ops,
            "alpha": 0.0,
            **padding,
        },
    )
    return node.out if out is not None else _to_float(lowering, unit, node, spec.scale * float(part.scales.max()))


def _is_matmul(unit: Unit, paddings: np.ndarray | None, is_float: bool) -> bool:
    """Whether a unit is better a MatMul over the pixels: for a float result, and where its map is small."""
    match, conv, shape = unit.match, unit.main, unit.main.out.shape
    if conv.op != "Conv2D" or match.value("weights").shape[:2] != (1, 1) or conv.attr("strides") != [1, 1, 1, 1]:
        return False
    if "add" in match.nodes or _groups(match) > 1 or paddings is None or paddings.any() or shape is None or None in shape[1:]:
        return False
    return is_float or math.prod(size or 0 for size in shape[1:3]) <= _MATMUL_PIXELS


def _padded(lowering: Lowering, unit: Unit, paddings: np.ndarray | None) -> tuple[Tensor, dict[str, object]]:
    """The stored input and the kernel's padding attributes.

    A padded 0 would stand for the real value `offset`: where that is not 0, the input is padded with its zero point before.
    """
    assert unit.weights is not None
    x, conv = unit.match["x"], unit.match.nodes["conv"]
    stored, spec, name = lowering.stored(x), lowering.spec(x), f"{conv.name}/pad"
    if paddings is None:
        if spec.offset == 0:
            return stored, {"padding": "SAME"}
        amounts = _same_paddings(lowering, stored, spec, conv, unit.weights.shape[:2], name)
        return lowering.pad(stored, spec, amounts, name), {"padding": "VALID"}
    if not paddings.any():
        return stored, {"padding": "VALID"}
    if spec.offset != 0 or _pads_whole_windows(conv, x.shape, unit.weights.shape[:2], paddings):
        return lowering.pad(stored, spec, paddings, name), {"padding": "VALID"}
    return stored, {"padding": "EXPLICIT", "explicit_paddings": [int(size) for size in paddings.reshape(-1)]}


def _pads_whole_windows(conv: Node, size: Shape, kernel: Sequence[int], paddings: np.ndarray) -> bool:
    """Whether all taps of some window lie in the padding: the kernels leave such results unset (int32, measured)."""
    strides, dilations = conv.attr("strides"), conv.attr("dilations") or [1] * 4
    for axis in (1, 2):
        before, after = (int(amount) for amount in paddings[axis])
        taps = np.arange(kernel[axis - 1]) * dilations[axis]
        length = size[axis] if size is not None else None
        if length is None:  # taps further apart than the input is long are not to be expected
            if max(before, after) > taps[-1]:
                return True
            continue
        starts = np.arange(-before, length + after - taps[-1], strides[axis])
        inside = (starts[:, None] + taps >= 0) & (starts[:, None] + taps < length)
        if not inside.any(1).all():
            return True
    return False


def _same_paddings(lowering: Lowering, stored: Tensor, spec: QuantSpec, conv: Node, kernel: Sequence[int], name: str) -> Tensor:
    """What SAME pads, as an int32 (4, 2) tensor computed from the size of `stored`; see `conv_paddings`."""
    strides, dilations = conv.attr("strides")[1:3], (conv.attr("dilations") or [1] * 4)[1:3]
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]

    def constant(value: Sequence[object] | int) -> Tensor:
        return lowering.constant(np.array(value, np.int32), f"{name}/constant")

    def add(op: str, *inputs: Tensor, **attrs: object) -> Tensor:
        attrs = attrs or {"T": tf.int32}
        return lowering.graph.add(op, inputs, name=f"{name}/{op}", attrs=attrs, dtypes=[tf.int32]).out

    dtype = common.DTYPES[spec.dtype]
    shape = add("Shape", stored, T=dtype, out_type=tf.int32)
    size = add("Slice", shape, constant([1]), constant([2]), T=tf.int32, Index=tf.int32)
    steps = add("FloorDiv", add("Sub", size, constant(1)), constant(strides))
    total = add("Sub", add("AddV2", add("Mul", steps, constant(strides)), constant(reach)), size)
    total = add("Maximum", total, constant(0))
    before = add("FloorDiv", total, constant(2))
    both = add("Pack", before, add("Sub", total, before), N=2, T=tf.int32, axis=1)
    return add("Pad", both, constant([[1, 1], [0, 0]]), T=tf.int32, Tpaddings=tf.int32)


def _to_float(lowering: Lowering, unit: Unit, kernel: Node, scale: float) -> Tensor:
    """int32 accumulators as float32. Whatever ranges the kernel reports, they are in steps of the largest channel's scale."""
    graph, shape = lowering.graph, unit.output.shape
    if shape is not None and kernel.name != unit.main.name:
        shape = (*shape[:3], None)
    # MIN_FIRST is the mode that uses all threads; these ends make it a multiplication by `scale`, exactly.
    ends = [lowering.scalar(sign * 2.0**31 * scale) for sign in (-1, 1)]
    attrs = {"T": tf.qint32, "mode": "MIN_FIRST", "narrow_range": False, "axis": -1, "dtype": tf.float32}
    name = f"{kernel.name}/dequantize"
    result = graph.add("Dequantize", [kernel.out, *ends], name=name, attrs=attrs, shapes=[shape], dtypes=[tf.float32]).out
    if unit.clip == "Relu6":
        attrs = {"T": tf.float32}
        return graph.add("Relu6", [result], name=f"{kernel.name}/relu6", attrs=attrs, shapes=[shape], dtypes=[tf.float32]).out
    return result


KERNELS = (
    Kernel("conv2d", "compute", _pattern("Conv2D"), _describe, _lower),
    Kernel("depthwise_conv2d", "compute", _pattern("DepthwiseConv2dNative"), _describe, _lower),
)
