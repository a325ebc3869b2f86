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
MAX_SPREAD = 16.0


def _per_channel(graph: Graph, match: Match) -> str | None:
    if match.nodes["compute"].attr("data_format", "NHWC") != "NHWC":
        return "channels are not last"
    vector = channel_vector(match.value("constant"), match.nodes["compute"].out)
    return None if vector is not None else "not one value per output channel"


def scaled(weights: np.ndarray, op: str, factor: np.ndarray, axis: str) -> np.ndarray:
    """Weights with their "input" or "output" channels multiplied, computed in float64."""
    if op == "DepthwiseConv2dNative":  # (H, W, C, M): output channel c * M + m
        shaped = factor.reshape(weights.shape[2:]) if axis == "output" else factor.reshape(-1, 1)
    else:
        shaped = factor if axis == "output" else factor.reshape(-1, 1)
    return (weights.astype(np.float64) * shaped).astype(weights.dtype)


def rebuilt(graph: Graph, match: Match, weights: np.ndarray, bias: np.ndarray | None, x: Tensor, **attrs: object) -> Tensor:
    """The layer of the match again, with other weights and bias; `attrs` overwrite attributes."""
    compute = match.nodes["compute"]
    constant = graph.constant(weights, name=f"{compute.name}/weights")
    node = graph.copy_of(compute, [x, constant], **attrs)
    if bias is None:
        return node.out
    name = graph.take_name(match.nodes["bias_add"]) if "bias_add" in match.nodes else f"{node.name}/bias_add"
    out = node.out
    assert out.dtype is not None
    vector = graph.constant(bias.astype(weights.dtype), name=f"{name}/bias")
    return graph.add("BiasAdd", [out, vector], name=name, attrs={"T": out.dtype}, shapes=[out.shape], dtypes=[out.dtype]).out


def own_bias(match: Match) -> np.ndarray | None:
    """The bias of the layer of the match, float64 (C,)."""
    return match.value("bias").astype(np.float64) if match.get("bias") else None


def _fold_scale(graph: Graph, match: Match) -> Tensor:
    compute = match.nodes["compute"]
    factor = channel_vector(match.value("constant"), compute.out)
    assert factor is not None
    bias = own_bias(match)
    weights = scaled(match.value("weights"), compute.op, factor.astype(np.float64), "output")
    return rebuilt(graph, match, weights, None if bias is None else bias * factor, match["x"])


def _fold_shift(graph: Graph, match: Match) -> Tensor:
    shift = channel_vector(match.value("constant"), match.nodes["compute"].out)
    assert shift is not None
    bias = own_bias(match)
    return rebuilt(graph, match, match.value("weights"), shift if bias is None else bias + shift, match["x"])


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
        return None if size.min() * MAX_SPREAD >= size.max() > 0 else "the scales differ too much to be good 8-bit weights"
    padded = compute.op != "MatMul" and compute.attr("padding") != "VALID"
    return "the layer pads with zeros, which the shift would not reach" if padded else None


def _fold_into_next(graph: Graph, match: Match) -> Tensor:
    compute = match.nodes["compute"]
    weights = match.value("weights")
    constant = channel_vector(match.value("constant"), match["x"])
    assert constant is not None
    if "scale" in match.nodes:
        factor = constant.astype(np.float64)
        return rebuilt(graph, match, scaled(weights, compute.op, factor, "input"), own_bias(match), match["x"])
    return rebuilt(graph, match, weights, shifted_bias(match, constant), match["x"])


def shifted_bias(match: Match, shift: np.ndarray) -> np.ndarray:
    """The bias of the layer of the match, float64, where its input lacks `shift`, a value per channel, in the padding too."""
    compute, bias = match.nodes["compute"], own_bias(match)
    weighted = scaled(match.value("weights").astype(np.float64), compute.op, shift.astype(np.float64), "input")
    axes = (0, 1) if compute.op == "DepthwiseConv2dNative" else tuple(range(weighted.ndim - 1))
    extra = weighted.sum(axes).reshape(-1)
    return extra if bias is None else bias + extra


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
