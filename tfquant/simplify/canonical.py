"""One spelling for what has many: FusedBatchNorm as Mul + AddV2, Sub and RealDiv by constants, a bias, transposed weights."""

import numpy as np
import tensorflow as tf

from tfquant.graph.ir import Graph, Tensor
from tfquant.graph.patterns import Any, Const, Match, Op, Rule, rewrite

_X, _C = Any("x"), Const("constant")


def binary(graph: Graph, op: str, x: Tensor, constant: np.ndarray, like: Tensor, name: str) -> Tensor:
    """`op(x, constant)` with the dtype and shape of `like`."""
    assert like.dtype is not None
    other = graph.constant(constant.astype(like.dtype.as_numpy_dtype), name=f"{name}/{op}/constant")
    node = graph.add(op, [x, other], name=f"{name}/{op}", attrs={"T": like.dtype}, shapes=[like.shape], dtypes=[like.dtype])
    return node.out


def is_float(graph: Graph, match: Match) -> str | None:
    dtype = match.root.out.dtype
    return None if dtype is not None and dtype.is_floating else "not floating point"


def _batch_norm_check(graph: Graph, match: Match) -> str | None:
    node = match.root
    if node.attr("is_training", True):
        return "it computes the statistics of the batch"
    if node.attr("data_format", "NHWC") != "NHWC":
        return "channels are not last"
    return None


def _batch_norm(graph: Graph, match: Match) -> Tensor:
    node = match.root
    scale, offset, mean, variance = (match.value(key).astype(np.float64) for key in ("scale", "offset", "mean", "variance"))
    factor = scale / np.sqrt(variance + node.attr("epsilon", 1e-4))
    product = binary(graph, "Mul", match["x"], factor, node.out, node.name)
    return binary(graph, "AddV2", product, offset - mean * factor, node.out, node.name)


def _sub(graph: Graph, match: Match) -> Tensor:
    return binary(graph, "AddV2", match["x"], -match.value("constant"), match.root.out, match.root.name)


def _neutral_check(graph: Graph, match: Match) -> str | None:
    neutral = 1.0 if match.root.op == "Mul" else 0.0
    if (match.value("constant") != neutral).any():
        return f"not {neutral:g}"
    x, out = match["x"].shape, match.root.out.shape
    return None if x is not None and x == out else "it broadcasts"


def _neutral(graph: Graph, match: Match) -> Tensor:
    return match["x"]


def _div(graph: Graph, match: Match) -> Tensor:
    constant = match.value("constant").astype(np.float64)
    return binary(graph, "Mul", match["x"], 1.0 / constant, match.root.out, match.root.name)


def _div_check(graph: Graph, match: Match) -> str | None:
    return is_float(graph, match) or ("a divisor is zero" if not match.value("constant").all() else None)


def _bias_check(graph: Graph, match: Match) -> str | None:
    x, constant = match["x"], match.value("constant")
    if x.node.op not in ("Conv2D", "DepthwiseConv2dNative", "MatMul"):
        return "not behind a convolution or MatMul"
    return None if channel_vector(constant, x) is not None else "not one value per channel"


def channel_vector(constant: np.ndarray, x: Tensor) -> np.ndarray | None:
    """`constant` as (C,) where adding it to, or multiplying it with, `x` treats every channel (last axis) alike, else None."""
    if x.shape is None or not x.shape or x.shape[-1] is None or constant.ndim > len(x.shape):
        return None
    if x.node.attr("data_format", "NHWC") not in ("NHWC", "NDHWC"):
        return None
    channels = x.shape[-1]
    if constant.size == 1:
        return np.full(channels, constant.reshape(()))
    return constant.reshape(-1) if constant.shape[-1] == constant.size == channels else None


def _bias(graph: Graph, match: Match) -> Tensor:
    node = match.root
    vector = channel_vector(match.value("constant"), match["x"])
    assert vector is not None
    bias = graph.constant(vector, name=f"{node.name}/bias")
    out = node.out
    assert out.dtype is not None
    name = graph.take_name(node)
    return graph.add("BiasAdd", [match["x"], bias], name=name, attrs={"T": out.dtype}, shapes=[out.shape], dtypes=[out.dtype]).out


def _transposed_check(graph: Graph, match: Match) -> str | None:
    return None if match.root.attr("transpose_b") else "not transposed"


def _transposed(graph: Graph, match: Match) -> Tensor:
    node = match.root
    weights = graph.constant(np.ascontiguousarray(match.value("constant").T), name=f"{node.name}/weights")
    return graph.copy_of(node, [match["x"], weights], transpose_b=False).out


def _explicit_check(graph: Graph, match: Match) -> str | None:
    if match.root.attr("padding") != "EXPLICIT":
        return "its padding is not explicit"
    return None if match.root.attr("data_format", "NHWC") == "NHWC" else "channels are not last"


def _explicit(graph: Graph, match: Match) -> Tensor:
    node, x = match.root, match["x"]
    paddings = np.array(node.attr("explicit_paddings"), np.int32).reshape(4, 2)
    assert x.shape is not None
    assert x.dtype is not None
    shape = tuple(None if size is None else size + int(extra.sum()) for size, extra in zip(x.shape, paddings, strict=True))
    constant = graph.constant(paddings, name=f"{node.name}/paddings")
    attrs = {"T": x.dtype, "Tpaddings": tf.int32}
    pad = graph.add("Pad", [x, constant], name=f"{node.name}/pad", attrs=attrs, shapes=[shape], dtypes=[x.dtype])
    return graph.copy_of(node, [pad.out, match["weights"]], padding="VALID", explicit_paddings=[]).out


def _depthwise_check(graph: Graph, match: Match) -> str | None:
    node, x, weights = match.root, match["x"], match.value("weights")
    if node.attr("data_format", "NHWC") != "NHWC" or node.attr("padding") == "EXPLICIT":
        return "channels are not last, or its padding is explicit"
    if x.shape is None or len(x.shape) != 4 or weights.shape[2] != 1 or x.shape[3] in (None, 1):
        return "its groups are not of one channel"
    strides, dilations = node.attr("strides"), node.attr("dilations") or [1] * 4
    if strides[1] != strides[2] or (max(strides) > 1 and max(dilations) > 1):
        return "the depthwise kernel has one stride, and dilates only without"
    return None


def _depthwise(graph: Graph, match: Match) -> Tensor:
    node, x, weights = match.root, match["x"], match.value("weights")
    assert x.shape is not None
    shaped = weights.reshape(*weights.shape[:2], x.shape[3] or 0, -1)  # output c * M + m reads input c, in both
    constant = graph.constant(shaped, name=f"{node.name}/weights")
    attrs = {key: value for key, value in node.attrs.items() if key != "use_cudnn_on_gpu"}
    name, out = graph.take_name(node), node.out
    return graph.add("DepthwiseConv2dNative", [x, constant], name=name, attrs=attrs, shapes=[out.shape], dtypes=node.dtypes).out


RULES = (
    Rule("groups of one channel to a depthwise convolution", Op("Conv2D", _X, Const("weights")), _depthwise_check, _depthwise),
    # TensorFlow's own fused float convolutions crash on explicit padding with a bias, and a folded BatchNorm leaves a bias.
    Rule(
        "explicit padding to Pad",
        Op("Conv2D|DepthwiseConv2dNative", _X, Const("weights")),
        _explicit_check,
        _explicit,
    ),
    Rule(
        "FusedBatchNorm to Mul and AddV2",
        Op("FusedBatchNorm|FusedBatchNormV2|FusedBatchNormV3", _X, *map(Const, ("scale", "offset", "mean", "variance"))),
        _batch_norm_check,
        _batch_norm,
    ),
    Rule("Sub to AddV2", Op("Sub", _X, _C), is_float, _sub),
    Rule("RealDiv to Mul", Op("RealDiv", _X, _C), _div_check, _div),
    Rule("AddV2 of 0, Mul by 1", Op("AddV2|Add|Mul", _X, _C), _neutral_check, _neutral),
    Rule("AddV2 to BiasAdd", Op("AddV2|Add", _X, _C), _bias_check, _bias),
    Rule("MatMul with transposed weights", Op("MatMul", _X, _C), _transposed_check, _transposed),
)


def run(graph: Graph) -> int:
    return sum(rewrite(graph, rule) for rule in RULES)
