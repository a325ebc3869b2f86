"""What stays float between the kernels, spelled so that it takes the fewest and the cheapest ops; equal but for float rounding.

An op that oneDNN splits over threads costs some 60 us before it does any work, others 10 to 15 us; at batch 1 that is most of
what squeeze-and-excite and activations take.
"""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

from tfquant.graph.ir import Graph, Tensor
from tfquant.graph.padding import same_paddings
from tfquant.graph.patterns import Any, Const, Match, Maybe, Op, Rule, rewrite
from tfquant.simplify import affine, hard_swish
from tfquant.simplify.canonical import binary
from tfquant.targets.onednn import common

_X = Any("x")
_ONE_THREAD = 4096  # elements of a sample up to which no second thread is worth its waking


def run(graph: Graph) -> int:
    """Rewrites the float ops of a lowered graph, in place; returns how often it did."""
    return sum(rewrite(graph, rule) for rule in RULES) + affine.run(graph) + rewrite(graph, _QUANTIZE)


def _elements(tensor: Tensor) -> float:
    """Elements of a sample, infinity where they are not known."""
    shape = tensor.shape
    return math.inf if shape is None or None in shape[1:] else math.prod(size or 0 for size in shape[1:])


# -- padding ---------------------------------------------------------------------------------------------------------------
def _same_check(graph: Graph, match: Match) -> str | None:
    conv, x = match.root, match["x"]
    if conv.attr("padding") != "VALID" or common.not_image(conv, x):
        return "it pads, or is not NHWC"
    same = same_paddings(conv, x.shape, match.value("weights").shape[:2])
    return None if same is not None and np.array_equal(same, match.value("paddings")) else "it pads by other amounts than SAME"


def _same(graph: Graph, match: Match) -> Tensor:
    return graph.copy_of(match.root, [match["x"], match["weights"]], padding="SAME").out


# -- one pixel -------------------------------------------------------------------------------------------------------------
_UNARY = "Relu|Relu6|Sigmoid|Tanh|Elu|LeakyRelu"
_PIXEL = Maybe(
    _UNARY,
    Maybe("BiasAdd", Op("Conv2D", _X, Const("weights"), name="conv"), Const("bias"), name="bias_add"),
    name="activation",
)


def _pixel_check(graph: Graph, match: Match) -> str | None:
    if "conv" not in match.nodes:
        return "no convolution"
    conv, x = match.nodes["conv"], match["x"]
    if common.not_image(conv, x, conv.out) or conv.attr("padding") == "EXPLICIT":
        return "not an image, or padded"
    assert x.shape is not None and conv.out.shape is not None
    weights = match.value("weights")
    if x.shape[1:3] != (1, 1) or weights.shape[:3] != (1, 1, x.shape[3]):
        return "more than one pixel"
    users = [user.op for user, _ in match.root.users]
    left = {"conv": {"BiasAdd", *_UNARY.split("|")}, "bias_add": set(_UNARY.split("|"))}
    last = next(iter(match.nodes))
    if len(users) == 1 and users[0] in left.get(last, ()) and not graph.is_output(match.root.out):
        return "what follows belongs to it"
    return None


def _pixel(graph: Graph, match: Match) -> Tensor:
    conv, x, weights = match.nodes["conv"], match["x"], match.value("weights")
    depth, channels = weights.shape[2:]
    matrix = graph.constant(weights.reshape(depth, channels), name=f"{conv.name}/matrix")
    out = _reshape(graph, x, (None, depth), f"{conv.name}/vector")
    attrs = {"T": tf.float32, "transpose_a": False, "transpose_b": False}
    made = {"shapes": [(None, channels)], "dtypes": [tf.float32]}
    out = graph.add("MatMul", [out, matrix], name=f"{conv.name}/product", attrs=attrs, **made).out
    if "bias_add" in match.nodes:
        node = match.nodes["bias_add"]
        out = graph.add("BiasAdd", [out, match["bias"]], name=f"{node.name}/vector", attrs={"T": tf.float32}, **made).out
    if "activation" in match.nodes:
        node = match.nodes["activation"]
        out = graph.add(node.op, [out], name=f"{node.name}/vector", attrs=node.attrs, **made).out
    return _reshape(graph, out, (None, 1, 1, channels), f"{match.root.name}/pixel")


def _reshape(graph: Graph, x: Tensor, shape: tuple[int | None, ...], name: str) -> Tensor:
    target = graph.constant(np.array([-1 if size is None else size for size in shape], np.int32), name=f"{name}/shape")
    attrs = {"T": tf.float32, "Tshape": tf.int32}
    return graph.add("Reshape", [x, target], name=name, attrs=attrs, shapes=[shape], dtypes=[tf.float32]).out


# -- activations -----------------------------------------------------------------------------------------------------------
def _swish_check(graph: Graph, match: Match) -> str | None:
    return None if _elements(match["x"]) <= _ONE_THREAD and match["x"].dtype == tf.float32 else "not small"


def _swish(graph: Graph, match: Match) -> Tensor:
    """SoftplusGrad(g, x) is g * sigmoid(x), in one op that TensorFlow does not replace by oneDNN's."""
    root, x = match.root, match["x"]
    attrs = {"T": tf.float32}
    return graph.add("SoftplusGrad", [x, x], name=root.name, attrs=attrs, shapes=root.shapes, dtypes=root.dtypes).out


def _hard_swish_check(graph: Graph, match: Match) -> str | None:
    if not hard_swish.is_hard_swish(match):
        return "not relu6(x + 3) * x * factor"
    ends_layer = _ends_layer(graph, match) and np.isclose(match.value("sixth"), 1 / 6)
    return "it is as it should be" if ("fused" if ends_layer else "outside") in match.nodes else None


def _ends_layer(graph: Graph, match: Match) -> bool:
    """Whether x is the biased result of a float convolution that nobody else reads: TensorFlow then fuses hard-swish into it."""
    bias_add = match["x"].node
    if bias_add.op != "BiasAdd" or len(bias_add.users) != 2 or graph.is_output(bias_add.out):
        return False
    conv = bias_add.inputs[0].node
    return conv.op in ("Conv2D", "DepthwiseConv2dNative") and len(conv.users) == 1 and not graph.is_output(conv.out)


def _hard_swish(graph: Graph, match: Match) -> Tensor:
    x, root, name = match["x"], match.root, match.root.name
    is_fused = _ends_layer(graph, match) and np.isclose(match.value("sixth"), 1 / 6)
    attrs = {"T": tf.float32}
    shifted = binary(graph, "AddV2", x, match.value("three"), x, name)
    relu6 = graph.add("Relu6", [shifted], name=f"{name}/Relu6", attrs=attrs, shapes=[x.shape], dtypes=[tf.float32]).out
    first = binary(graph, "Mul", x, match.value("sixth"), x, name) if is_fused else x
    product = graph.add("Mul", [first, relu6], name=name, attrs=attrs, shapes=root.shapes, dtypes=[tf.float32]).out
    return product if is_fused else binary(graph, "Mul", product, match.value("sixth"), x, name)


# -- conversions -----------------------------------------------------------------------------------------------------------
def _factor_check(graph: Graph, match: Match) -> str | None:
    factor = match.value("factor")
    if factor.size != 1 or match["x"].shape != match.nodes["mul"].out.shape:
        return "not a number"
    return None if 1e-6 < float(factor.reshape(())) < 1e6 else "negative, or too large or small"


def _factor(graph: Graph, match: Match) -> Tensor:
    node, factor, value = match.root, float(match.value("factor").reshape(())), match["x"]
    if "shift" in match.nodes:
        value = binary(graph, "AddV2", value, match.value("offset") / factor, value, node.name)
    ends = [graph.constant((match.value(end) / factor).astype(np.float32), name=f"{node.name}/{end}") for end in ("low", "high")]
    return graph.copy_of(node, [value, *ends]).out


_QUANTIZE = Rule(
    "a factor into QuantizeV2",
    Op(
        "QuantizeV2",
        Maybe("AddV2", Op("Mul", _X, Const("factor"), name="mul"), Const("offset"), name="shift"),
        Const("low"),
        Const("high"),
    ),
    _factor_check,
    _factor,
)
RULES = (
    Rule(
        "padding as SAME",
        Op("Conv2D|DepthwiseConv2dNative", Op("Pad", _X, Const("paddings"), name="pad", shared=True), Const("weights")),
        _same_check,
        _same,
    ),
    Rule("convolution of one pixel to MatMul", _PIXEL, _pixel_check, _pixel),
    Rule("small swish", Op("Mul", _X, Op("Sigmoid", _X, name="sigmoid"), name="swish"), _swish_check, _swish),
    *(Rule("hard-swish", pattern, _hard_swish_check, _hard_swish) for pattern in hard_swish.PATTERNS),
)
