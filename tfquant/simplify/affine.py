"""Per-channel scales and shifts (a BatchNorm above all) into the weights and the bias of the op before or behind them."""

import numpy as np

from tfquant.graph.ir import Graph, Tensor
from tfquant.graph.patterns import Any, Const, Match, Maybe, Op, Rule, rewrite
from tfquant.simplify.canonical import binary, channel_vector, is_float

_X, _W, _B, _C = Any("x"), Const("weights"), Const("bias"), Const("constant")
_COMPUTE = Op("Conv2D|DepthwiseConv2dNative|MatMul", _X, _W, name="compute")
_WITH_BIAS = Maybe("BiasAdd", _COMPUTE, _B, name="bias_add")
# A BatchNorm in front of a layer levels its channels. Moved into the weights, it spreads these as far as it levelled the
# channels; beyond this spread 8-bit weights would lose more than an op costs.
_MAX_SPREAD = 16.0


def _per_channel(graph: Graph, match: Match) -> str | None:
    if match.nodes["compute"].attr("data_format", "NHWC") != "NHWC":
        return "channels are not last"
    vector = channel_vector(match.value("constant"), match.nodes["compute"].out)
    return None if vector is not None else "not one value per output channel"


def _scaled(weights: np.ndarray, op: str, factor: np.ndarray, axis: str) -> np.ndarray:
    """Weights with their "input" or "output" channels multiplied, computed in float64."""
    if op == "DepthwiseConv2dNative":  # (H, W, C, M): output channel c * M + m
        shaped = factor.reshape(weights.shape[2:]) if axis == "output" else factor.reshape(-1, 1)
    else:
        shaped = factor if axis == "output" else factor.reshape(-1, 1)
    return (weights.astype(np.float64) * shaped).astype(weights.dtype)


def _rebuilt(graph: Graph, match: Match, weights: np.ndarray, bias: np.ndarray | None, x: Tensor) -> Tensor:
    """The layer of the match again, with other weights and bias."""
    compute = match.nodes["compute"]
    constant = graph.constant(weights, name=f"{compute.name}/weights")
    node = graph.copy_of(compute, [x, constant])
    if bias is None:
        return node.out
    name = graph.take_name(match.nodes["bias_add"]) if "bias_add" in match.nodes else f"{node.name}/bias_add"
    out = node.out
    assert out.dtype is not None
    vector = graph.constant(bias.astype(weights.dtype), name=f"{name}/bias")
    attrs = {"T": out.dtype}
    return graph.add("BiasAdd", [out, vector], name=name, attrs=attrs, shapes=[out.shape], dtypes=[out.dtype]).out


def _bias(match: Match) -> np.ndarray | None:
    return match.value("bias").astype(np.float64) if match.get("bias") else None


def _fold_scale(graph: Graph, match: Match) -> Tensor:
    compute = match.nodes["compute"]
    factor = channel_vector(match.value("constant"), compute.out)
    assert factor is not None
    bias = _bias(match)
    weights = _scaled(match.value("weights"), compute.op, factor.astype(np.float64), "output")
    return _rebuilt(graph, match, weights, None if bias is None else bias * factor, match["x"])


def _fold_shift(graph: Graph, match: Match) -> Tensor:
    shift = channel_vector(match.value("constant"), match.nodes["compute"].out)
    assert shift is not None
    bias = _bias(match)
    return _rebuilt(graph, match, match.value("weights"), shift if bias is None else bias + shift, match["x"])


def _next_check(graph: Graph, match: Match) -> str | None:
    compute, source = match.nodes["compute"], match["x"]
    if compute.attr("data_format", "NHWC") != "NHWC" or compute.attr("transpose_a"):
        return "channels are not last"
    factor = channel_vector(match.value("constant"), source)
    if factor is None:
        return "not one value per input channel"
    if compute.op == "Conv2D" and match.value("weights").shape[2] != len(factor):
        return "the convolution is grouped"
    if "scale" in match.nodes:
        size = np.abs(factor)
        return None if size.min() * _MAX_SPREAD >= size.max() > 0 else "the scales differ too much to be good 8-bit weights"
    padded = compute.op != "MatMul" and compute.attr("padding") != "VALID"
    return "the layer pads with zeros, which the shift would not reach" if padded else None


def _fold_into_next(graph: Graph, match: Match) -> Tensor:
    compute = match.nodes["compute"]
    weights = match.value("weights")
    constant = channel_vector(match.value("constant"), match["x"])
    assert constant is not None
    bias = _bias(match)
    if "scale" in match.nodes:
        return _rebuilt(graph, match, _scaled(weights, compute.op, constant.astype(np.float64), "input"), bias, match["x"])
    shifted = _scaled(weights.astype(np.float64), compute.op, constant.astype(np.float64), "input")
    if compute.op == "DepthwiseConv2dNative":
        extra = shifted.sum((0, 1)).reshape(-1)
    else:
        extra = shifted.sum(tuple(range(weights.ndim - 1)))
    return _rebuilt(graph, match, weights, extra if bias is None else bias + extra, match["x"])


def _behind(op: str, name: str) -> Op:
    """The layer behind a Mul or AddV2 by a constant, which others may read too."""
    inner = Op(op, _X, _C, name=name, shared=True)
    compute = Op("Conv2D|DepthwiseConv2dNative|MatMul", inner, _W, name="compute")
    return Maybe("BiasAdd", compute, _B, name="bias_add")


def _merge(op: str, combine: np.ufunc) -> Rule:
    def replace(graph: Graph, match: Match) -> Tensor:
        constant = combine(match.value("first").astype(np.float64), match.value("second"))
        return binary(graph, op, match["x"], constant, match.root.out, match.root.name)

    pattern = Op(op, Op(op, _X, Const("first"), name="inner"), Const("second"), name="outer")
    return Rule(f"two {op} by constants", pattern, is_float, replace)


RULES = (
    Rule("scale into the layer before", Op("Mul", _WITH_BIAS, _C), _per_channel, _fold_scale),
    Rule("shift into the layer before", Op("AddV2|Add", _WITH_BIAS, _C), _per_channel, _fold_shift),
    Rule(
        "bias into the layer before", Op("BiasAdd", Op("BiasAdd", _COMPUTE, _B, name="bias_add"), _C), _per_channel, _fold_shift
    ),
    _merge("Mul", np.multiply),
    _merge("AddV2", np.add),
    Rule("shift into the layer behind", _behind("AddV2|Add", "shift"), _next_check, _fold_into_next),
    Rule("scale into the layer behind", _behind("Mul", "scale"), _next_check, _fold_into_next),
)


def run(graph: Graph) -> int:
    return sum(rewrite(graph, rule) for rule in RULES)
