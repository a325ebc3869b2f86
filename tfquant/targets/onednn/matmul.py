"""MatMul with bias and activation, in 8 bits or with a float result, or with a residual added to that.

Also 1x1 convolutions whose result is wanted in float, or that end with an activation which the convolution's kernel has not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from tfquant.graph.ir import Graph, Tensor
from tfquant.graph.patterns import Any, Const, Match, Maybe, Op
from tfquant.plan.kernels import Kernel, Unit
from tfquant.plan.spec import S8, QuantSpec
from tfquant.targets.onednn import activations, common

if TYPE_CHECKING:
    from tfquant.targets.onednn.lowering import Lowering


def _layer(op: str) -> Op:
    compute = Op(op, Any("x"), Const("weights"), name="compute", shared=True)
    return Maybe("BiasAdd", compute, Const("bias"), name="bias_add", shared=True)


# Behind a Reshape, as a Dense layer on more than two dimensions has it.
_SUM = Op("AddV2|Add", Maybe("Reshape", _layer("MatMul"), name="reshape"), Any("addend"), name="add")


def _describe(kernel: Kernel, graph: Graph, match: Match) -> Unit | str:
    unit = _unit(kernel, graph, match, "MatMul")
    if isinstance(unit, Unit) and unit.main.attr("transpose_a"):
        return "its first operand is transposed"
    return unit


def _unit(kernel: Kernel, graph: Graph, match: Match, op: str, only_float: bool = False) -> Unit | str:
    if "compute" not in match.nodes:
        return f"no {op}"
    node, x, activation = match.nodes["compute"], match["x"], activations.of(match)
    if activation is None:
        return "its activation has no kernel"
    reason = common.not_float32(x, node.out)
    if reason:
        return reason
    unit = Unit(
        kernel=kernel,
        match=match,
        main=node,
        inputs=(x,),
        output=match.root.out,
        weights=match.value("weights"),
        bias=match.value("bias") if match.get("bias") else None,
        clip=activation.clip,
        gives_float=True,
        saturates=True,
        only_float=only_float,
    )
    read = next((inner for inner in match.covered if inner not in unit.private(graph)), None)
    return unit if read is None else f"{read.name} is read by others too"


def _describe_sum(kernel: Kernel, graph: Graph, match: Match) -> Unit | str:
    unit, addend = _unit(kernel, graph, match, "MatMul", only_float=True), match["addend"]
    if isinstance(unit, str):
        return unit
    if unit.main.attr("transpose_a"):
        return "its first operand is transposed"
    if addend.value is not None or addend.node in match.covered:
        return "a constant, or it itself, is added to it"
    made = match.nodes["reshape"].out if "reshape" in match.nodes else unit.main.out
    if made.shape is not None and len(made.shape) == 4:
        return "sums of images have a kernel in 8 bits"
    if not common.same_shape(addend.shape, made.shape):
        return f"the shape {addend.shape} added to it is not that of its result, {made.shape}"
    add = match.nodes["add"]
    slots = tuple((add, slot) for slot, tensor in enumerate(add.inputs) if tensor == addend)
    return common.not_float32(addend) or dataclasses.replace(unit, float_slots=slots)


def _describe_pointwise(kernel: Kernel, graph: Graph, match: Match) -> Unit | str:
    if "compute" not in match.nodes:
        return "no convolution"
    node, x, weights = match.nodes["compute"], match["x"], match.value("weights")
    reason = common.not_image(node, x, node.out)
    if reason:
        return reason
    assert x.shape is not None and node.out.shape is not None
    if weights.shape[:2] != (1, 1) or weights.shape[2] != x.shape[3] or node.attr("strides") != [1, 1, 1, 1]:
        return "its activation has no kernel but behind a 1x1 convolution"
    if activations.of(match) in (None, *map(activations.Activation, ("", *activations.CLIPS))):
        return "the convolution's own kernel has its activation"
    if x.shape[1:3] != node.out.shape[1:3] or node.out.shape[1:].count(None):
        return "it pads, or its sizes are not known"
    return _unit(kernel, graph, match, "convolution")


def _lower(lowering: Lowering, unit: Unit) -> None:
    _emit(lowering, unit, lowering.stored(unit.match["x"]), lambda result, dtype: result)


def _lower_sum(lowering: Lowering, unit: Unit) -> None:
    match = unit.match
    assert unit.weights is not None
    addend = lowering.as_float(match["addend"])
    reshape = match.nodes.get("reshape")
    if reshape is not None:
        addend = lowering.reshape(addend, [-1, unit.weights.shape[-1]], f"{unit.name}/addend", tf.float32)

    def shaped(result: Tensor, dtype: tf.DType) -> Tensor:
        if reshape is None:
            return result
        return lowering.graph.copy_of(reshape, [result, lowering.as_float(reshape.inputs[1])]).out

    _emit(lowering, unit, lowering.stored(match["x"]), shaped, addend)


def lower_pointwise(lowering: Lowering, unit: Unit) -> None:
    """A 1x1 convolution, stride 1, of an image of known size: the same as a MatMul over the pixels."""
    x, shape = unit.match["x"], unit.output.shape
    assert unit.weights is not None and shape is not None
    depth, channels = unit.weights.shape[-2:]
    rows = lowering.reshape(lowering.stored(x), [-1, depth], f"{unit.name}/pixels", lowering.dtype(x))
    target = [-1, *(size for size in shape[1:3] if size is not None), channels]
    _emit(lowering, unit, rows, lambda result, dtype: lowering.reshape(result, target, f"{unit.name}/image", dtype))


def _emit(
    lowering: Lowering,
    unit: Unit,
    stored: Tensor,
    shaped: Callable[[Tensor, tf.DType], Tensor],
    addend: Tensor | None = None,
) -> None:
    """The kernel on `stored`, the unit's input as rows; its result is that of the unit once `shaped` has given it its shape.

    A clip ends the output's range, or nothing does: then the bias takes the output's offset, and Relu clips at the low end. Other
    activations need the sum itself: the kernel adds the zero point behind them (MIN_FIRST).
    """
    x, name = unit.match["x"], unit.name
    out = None if lowering.returns_float(unit) else lowering.spec(unit.output)
    activation = activations.of(unit.match) or activations.Activation("")
    is_range = not activation.name or bool(activation.clip)
    integers, scales = lowering.weights(unit)
    common.check_clip(unit, out)
    reach = 127 * scales.astype(np.float32)
    dtype = lowering.dtype(x)
    operands = [
        (stored, dtype),
        (lowering.constant(integers.reshape(-1, integers.shape[-1]), f"{name}/weights", tf.qint8), tf.qint8),
        (_bias(lowering, unit, out if is_range else None, integers, scales), tf.float32),
        *([(addend, tf.float32)] if addend is not None else []),
    ]
    ranges = [
        *lowering.told(x),
        lowering.constant(-reach, f"{name}/min_weights"),
        lowering.constant(reach, f"{name}/max_weights"),
    ]
    fused_ops = ["BiasAdd"]
    mode = "SCALED"
    if out is None:
        kind = tf.float32
        fused_ops += [activation.name] if activation.name else ["Add"] if addend is not None else []
    else:
        kind = common.DTYPES[out.dtype]
        is_signed = out.dtype == S8
        if not is_range:
            fused_ops.append(activation.name)
        elif not is_signed:
            fused_ops.append("Relu")
        if is_range or is_signed:
            ranges += lowering.known(out)
        else:
            mode = "MIN_FIRST"
            ranges += [lowering.scalar(out.low), lowering.scalar(out.high)]
    fused_ops.append("Dequantize" if out is None else "Requantize")
    attrs = {
        "T1": dtype,
        "T2": tf.qint8,
        "Tbias": tf.float32,
        "U": tf.float32,
        "Tout": kind,
        "transpose_a": False,
        "transpose_b": False,
        "is_weight_const": True,
        "is_bias_const": operands[2][0].value is not None,
        "fused_ops": fused_ops,
        # With MIN_FIRST the kernel adds up all weights at each call whose range is another (measured: 3 times as long).
        "input_quant_mode": "SCALED",
        "output_quant_mode": mode,
        "leakyrelu_alpha": activation.alpha,
    }
    all_operands = operands + [(tensor, tf.float32) for tensor in ranges]
    outputs = 1 if out is None else 3
    result = shaped(lowering.fused("_QuantizedMatMul", name, all_operands, kind, attrs, outputs).out, kind)
    if out is None:
        lowering.put_float(unit.output, result)
    else:
        lowering.put(unit.output, result)


def _bias(lowering: Lowering, unit: Unit, out: QuantSpec | None, integers: np.ndarray, scales: np.ndarray) -> Tensor:
    """The layer's bias with what the zero points of the input, and of the result if it is given, need, float32 (C,)."""
    x, own = unit.match["x"], 0.0 if unit.bias is None else unit.bias
    if x.name in lowering.plan.dynamic:
        return lowering.bias_behind(x, np.broadcast_to(own, scales.shape), common.taps(integers, scales), unit.name)
    return lowering.constant(common.folded_bias(own, integers, scales, lowering.spec(x), out), f"{unit.name}/bias")


KERNELS = (
    *(Kernel("matmul", "compute", pattern, _describe, _lower) for pattern in activations.behind(_layer("MatMul"))),
    Kernel("matmul", "compute", _SUM, _describe_sum, _lower_sum),
)
POINTWISE = tuple(
    Kernel("conv2d", "compute", pattern, _describe_pointwise, lower_pointwise)
    for pattern in activations.behind(_layer("Conv2D"), optional=False)
)
