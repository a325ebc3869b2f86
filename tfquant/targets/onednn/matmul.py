"""MatMul with bias and ReLU, in 8 bits or with a float result; also a 1x1 convolution whose result is wanted in float."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from tfquant.graph.ir import Graph, Tensor
from tfquant.graph.patterns import Any, Const, Match, Maybe, Op
from tfquant.plan.kernels import Kernel, Unit
from tfquant.plan.spec import S8, QuantSpec
from tfquant.targets.onednn import common

if TYPE_CHECKING:
    from tfquant.targets.onednn.lowering import Lowering

_PATTERN = Maybe(
    "Relu|Relu6",
    Maybe("BiasAdd", Op("MatMul", Any("x"), Const("weights"), name="matmul"), Const("bias"), name="bias_add"),
    name="activation",
)


def _describe(kernel: Kernel, graph: Graph, match: Match) -> Unit | str:
    if "matmul" not in match.nodes:
        return "no MatMul"
    node, x = match.nodes["matmul"], match["x"]
    reason = common.not_float32(x, node.out)
    if reason:
        return reason
    if node.attr("transpose_a"):
        return "its first operand is transposed"
    return Unit(
        kernel=kernel,
        match=match,
        main=node,
        inputs=(x,),
        output=match.root.out,
        weights=match.value("weights"),
        bias=match.value("bias") if match.get("bias") else None,
        clip=common.activation(match),
        gives_float=True,
        saturates=True,
    )


def _lower(lowering: Lowering, unit: Unit) -> None:
    x = unit.match["x"]
    out = None if lowering.returns_float(unit) else lowering.spec(unit.output)
    result = _emit(lowering, unit, lowering.stored(x), x, out)
    if out is None:
        lowering.put_float(unit.output, result)
    else:
        lowering.put(unit.output, result)


def lower_pointwise(lowering: Lowering, unit: Unit) -> None:
    """A 1x1 convolution, stride 1: the same as a MatMul over the pixels."""
    x, shape = unit.match["x"], unit.output.shape
    assert unit.weights is not None and shape is not None
    depth, channels = unit.weights.shape[-2:]
    rows = lowering.reshape(lowering.stored(x), [-1, depth], f"{unit.name}/pixels", lowering.dtype(x))
    out = None if lowering.returns_float(unit) else lowering.spec(unit.output)
    result = _emit(lowering, unit, rows, x, out)
    kind = tf.float32 if out is None else common.DTYPES[out.dtype]
    target = [-1, *(size for size in shape[1:3] if size is not None), channels]
    image = lowering.reshape(result, target, f"{unit.name}/image", kind)
    if out is None:
        lowering.put_float(unit.output, image)
    else:
        lowering.put(unit.output, image)


def _emit(lowering: Lowering, unit: Unit, stored: Tensor, x: Tensor, out: QuantSpec | None) -> Tensor:
    """The kernel on the rows `stored` of the 8-bit values of `x`."""
    integers, scales = lowering.weights(unit)
    name = unit.name
    common.check_clip(unit, out)
    reach = 127 * scales.astype(np.float32)
    dtype = lowering.dtype(x)
    operands = [
        (stored, dtype),
        (lowering.constant(integers.reshape(-1, integers.shape[-1]), f"{name}/weights", tf.qint8), tf.qint8),
        (_bias(lowering, unit, x, out, integers, scales), tf.float32),
    ]
    ranges = [
        *lowering.told(x),
        lowering.constant(-reach, f"{name}/min_weights"),
        lowering.constant(reach, f"{name}/max_weights"),
    ]
    if out is None:
        kind, fused_ops = tf.float32, ["BiasAdd", *([unit.clip] if unit.clip else []), "Dequantize"]
    elif out.dtype == S8:
        kind, fused_ops = tf.qint8, ["BiasAdd", "Requantize"]
    else:
        kind, fused_ops = tf.quint8, ["BiasAdd", "Relu", "Requantize"]
    if out is not None:
        ranges += lowering.known(out)
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
        "output_quant_mode": "SCALED",
        "leakyrelu_alpha": 0.2,
    }
    all_operands = operands + [(tensor, tf.float32) for tensor in ranges]
    return lowering.fused("_QuantizedMatMul", name, all_operands, kind, attrs, outputs=1 if out is None else 3).out


def _bias(lowering: Lowering, unit: Unit, x: Tensor, out: QuantSpec | None, integers: np.ndarray, scales: np.ndarray) -> Tensor:
    """The layer's bias with what the zero points of `x` and of the result need, float32 (C,)."""
    own = 0.0 if unit.bias is None else unit.bias
    if x.name in lowering.plan.dynamic:
        return lowering.bias_behind(x, np.broadcast_to(own, scales.shape), common.taps(integers, scales), unit.name)
    return lowering.constant(common.folded_bias(own, integers, scales, lowering.spec(x), out), f"{unit.name}/bias")


KERNEL = Kernel("matmul", "compute", _PATTERN, _describe, _lower)
