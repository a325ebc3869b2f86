"""LayerNorm over the last axis in one spelling, which targets can know as one op.

    mean, variance = moments(x); scale = gamma * rsqrt(variance + epsilon); y = x * scale + (beta - mean * scale)

Keras 3, tf_keras (where it stands as a FusedBatchNorm that trains, with the samples as channels) and textbooks differ. The axis
is -1, never the number of the last one: that TensorFlow's oneDNN remapper takes for a LayerNorm with an epsilon of 0.001,
whatever it is (measured in 2.18 and 2.21).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from tfquant.graph.ir import Graph, Tensor
from tfquant.graph.patterns import Any, As, Const, Match, Op, Pattern, Rule, matches, rewrite
from tfquant.simplify.canonical import binary, channel_vector, is_float

_X = Any("x")
_MEAN = As("mean", Op("Mean", _X, Const("axes"), name="mean_of", shared=True))
_CENTERED = Op("Sub", _X, _MEAN, name="centered", shared=True)
_DIFFERENCE = As("difference", Op("Sub", _X, _MEAN, name="difference_of", shared=True))  # that may be another op, or the same
_SQUARES = (
    Op("SquaredDifference", _X, _MEAN, name="squares", shared=True),
    Op("SquaredDifference", _MEAN, _X, name="squares", shared=True),
    Op("Square", _DIFFERENCE, name="squares", shared=True),
    Op("Mul", _DIFFERENCE, _DIFFERENCE, name="squares", shared=True),
)


def _deviation(op: str, squares: Pattern) -> Op:
    """The standard deviation, or 1 over it."""
    variance = Op("Mean", squares, Const("axes_of_variance"), name="variance", shared=True)
    return Op(op, Op("AddV2|Add", variance, Const("epsilon"), name="floor", shared=True), name="deviation", shared=True)


def _around(squares: Pattern, scaled: bool) -> Iterator[Op]:
    """x * scale + (beta - mean * scale), in all its forms."""
    inverse = _deviation("Rsqrt", squares)
    scale: Pattern = As("scale", Op("Mul", inverse, Const("gamma"), name="scaled", shared=True) if scaled else inverse)
    product, mean = Op("Mul", _X, scale, name="product"), Op("Mul", _MEAN, scale, name="mean_product")
    minus = Op("Mul", Op("Neg", _MEAN, name="minus"), scale, name="mean_product")
    yield Op("AddV2|Add", product, Op("Sub", Const("beta"), mean, name="shift"), name="norm")
    yield Op("AddV2|Add", product, Op("AddV2|Add", minus, Const("beta"), name="shift"), name="norm")
    yield Op("AddV2|Add", product, minus, name="norm")
    yield Op("Sub", product, mean, name="norm")


CANONICAL = next(_around(_SQUARES[0], scaled=True))
_FORMS = (
    *(form for squares in _SQUARES for scaled in (True, False) for form in _around(squares, scaled)),
    *(Op("Mul", _CENTERED, _deviation("Rsqrt", squares), name="norm") for squares in _SQUARES),
    *(Op("RealDiv", _CENTERED, _deviation("Sqrt", squares), name="norm") for squares in _SQUARES),
)
_FUSED = Op(
    "Reshape",
    Op(
        "FusedBatchNormV3",
        Op("Reshape", _X, name="as_image", shared=True),
        Op("Fill", Any("samples"), Const("one"), name="ones", shared=True),
        Op("Fill", Any("samples_too"), Const("zero"), name="zeros", shared=True),
        name="fused",
    ),
    name="norm",
)


def vectors(match: Match) -> tuple[np.ndarray, np.ndarray, float] | None:
    """(gamma, beta, epsilon), the first two float64 (C,), of a match of one of the forms; None where it is something else."""
    x = match["x"]
    if x.shape is None or len(x.shape) < 2 or x.shape[-1] in (None, 1) or match.root.out.shape != x.shape:
        return None
    if any(not _is_last(match.value(key), len(x.shape)) for key in ("axes", "axes_of_variance")):
        return None
    if not match.nodes["mean_of"].attr("keep_dims") or not match.nodes["variance"].attr("keep_dims"):
        return None
    gamma, beta = (_vector(match, key, x, default) for key, default in (("gamma", 1.0), ("beta", 0.0)))
    epsilon = match.value("epsilon")
    return None if gamma is None or beta is None or epsilon.size != 1 else (gamma, beta, float(epsilon.reshape(())))


def _is_last(axes: np.ndarray, rank: int) -> bool:
    return axes.size == 1 and int(axes.reshape(())) % rank == rank - 1


def _vector(match: Match, key: str, x: Tensor, default: float) -> np.ndarray | None:
    if match.get(key) is None:
        return np.full((x.shape or (0,))[-1] or 0, default)
    found = channel_vector(match.value(key), x)
    return None if found is None else found.astype(np.float64)


def is_canonical(match: Match) -> bool:
    """Whether a match of `CANONICAL` is a LayerNorm that needs no other spelling."""
    if vectors(match) is None or any(match.value(key).ndim != 1 for key in ("gamma", "beta")):
        return False
    return all(match.value(key).tolist() == [-1] for key in ("axes", "axes_of_variance"))


def _check(graph: Graph, match: Match) -> str | None:
    if vectors(match) is None:
        return "no LayerNorm over the last axis"
    if any(is_canonical(found) for found in matches(CANONICAL, graph, match.root)):
        return "it is in order"
    return is_float(graph, match)


def _replace(graph: Graph, match: Match) -> Tensor:
    found = vectors(match)
    assert found is not None
    return _write(graph, match["x"], *found, graph.take_name(match.root))


def _write(graph: Graph, x: Tensor, gamma: np.ndarray, beta: np.ndarray, epsilon: float, name: str) -> Tensor:
    assert x.shape is not None and x.dtype is not None
    small = (*x.shape[:-1], 1)
    axes = graph.constant(np.array([-1], np.int32), name=f"{name}/axes")

    def add(op: str, *inputs: Tensor, shape: tuple[int | None, ...] = x.shape, label: str = "", **attrs: object) -> Tensor:
        node = graph.add(
            op, inputs, name=label or f"{name}/{op}", attrs={"T": x.dtype, **attrs}, shapes=[shape], dtypes=[x.dtype]
        )
        return node.out

    mean = add("Mean", x, axes, shape=small, Tidx=tf.int32, keep_dims=True)
    squares = add("SquaredDifference", x, mean)
    variance = add("Mean", squares, axes, shape=small, Tidx=tf.int32, keep_dims=True)
    inverse = add("Rsqrt", binary(graph, "AddV2", variance, np.array(epsilon), variance, f"{name}/floor"), shape=small)
    scale = binary(graph, "Mul", inverse, gamma, x, f"{name}/scale")
    constant = graph.constant(beta.astype(x.dtype.as_numpy_dtype), name=f"{name}/beta")
    shift = add("Sub", constant, add("Mul", mean, scale))
    return add("AddV2", add("Mul", x, scale), shift, label=name)


# -- tf_keras --------------------------------------------------------------------------------------------------------------
def _fused_check(graph: Graph, match: Match) -> str | None:
    fused, x, inner = match.nodes["fused"], match["x"], match.nodes["as_image"].out.shape
    depth = x.shape[-1] if x.shape else None
    if not fused.attr("is_training", True) or fused.attr("data_format") != "NCHW":
        return "no LayerNorm"
    if match.root.out.shape != x.shape or depth in (None, 1) or inner is None or len(inner) != 4 or inner[0] != 1:
        return "it does not normalize over the last axis"
    if inner[2:] != (depth, 1) or match.value("one") != 1 or match.value("zero") != 0:
        return "it does not normalize over the last axis"
    return None if x.shape is not None and len(x.shape) > 1 else "no LayerNorm"


def _fused(graph: Graph, match: Match) -> Tensor:
    x = match["x"]
    depth = (x.shape or (0,))[-1] or 0
    epsilon = match.nodes["fused"].attr("epsilon", 1e-4)
    return _write(graph, x, np.ones(depth), np.zeros(depth), epsilon, graph.take_name(match.root))


# -- what follows it -------------------------------------------------------------------------------------------------------
def _behind_check(graph: Graph, match: Match) -> str | None:
    norm = next((found for found in matches(CANONICAL, graph, match.nodes["norm"]) if is_canonical(found)), None)
    if norm is None or channel_vector(match.value("constant"), match["x"]) is None or match.root.out.shape != match["x"].shape:
        return "not one value per channel behind a LayerNorm"
    return None


def _behind(graph: Graph, match: Match) -> Tensor:
    found, constant = vectors(match), channel_vector(match.value("constant"), match["x"])
    assert found is not None and constant is not None
    gamma, beta, epsilon = found
    if match.root.op == "Mul":
        gamma, beta = gamma * constant, beta * constant
    else:
        beta = beta + constant
    return _write(graph, match["x"], gamma, beta, epsilon, graph.take_name(match.root))


RULES = (
    *(Rule("LayerNorm", form, _check, _replace) for form in _FORMS),
    Rule("LayerNorm as FusedBatchNorm", _FUSED, _fused_check, _fused),
    Rule(
        "scale or shift into the LayerNorm before",
        Op("Mul|AddV2|Add", CANONICAL, Const("constant"), name="behind"),
        _behind_check,
        _behind,
    ),
)


def run(graph: Graph) -> int:
    return sum(rewrite(graph, rule) for rule in RULES)
