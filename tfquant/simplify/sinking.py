"""What only reshapes the result of a layer moves behind the bias and the activation of the layer, so that these meet.

A Dense layer on more than two dimensions is MatMul, Reshape, bias, activation; a Conv1D is Conv2D, Squeeze, bias, activation.
What pads the input of a Conv1D moves behind its ExpandDims likewise.
"""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.graph.patterns import Any, Const, Match, Op, Rule, rewrite

_LAYERS = frozenset({"Conv2D", "DepthwiseConv2dNative", "MatMul"})
_SMOOTH = {"Elu", "Erf", "Erfc", "Exp", "Rsqrt", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Square", "Tanh"}
_UNARY = frozenset({"Abs", "Neg", "Relu", "Relu6", "LeakyRelu", *_SMOOTH})
_BINARY = frozenset({"Add", "AddV2", "BiasAdd", "Maximum", "Minimum", "Mul", "Pow", "RealDiv", "SquaredDifference", "Sub"})
_RESHAPES = "Reshape|Squeeze|ExpandDims"
_MAX_STEPS = 16  # from an op up to its layer


def _is_of_layer(tensor: Tensor) -> bool:
    """Whether a tensor is the result of a layer, or what elementwise ops make of it."""
    for _ in range(_MAX_STEPS):
        node = tensor.node
        if node.pinned:
            return False
        if node.op in _LAYERS:
            return True
        if node.op not in _UNARY | _BINARY:
            return False
        tensor = next((t for t in node.inputs if t.value is None), node.inputs[0])
    return False


def _origin(tensor: Tensor, steps: int = _MAX_STEPS) -> Tensor:
    """The tensor that elementwise ops made a tensor of the same shape of, themselves or with constants."""
    node = tensor.node
    operands = {t for t in node.inputs if t.value is None}
    if node.op not in _UNARY | _BINARY or not steps or any(t.shape is None or t.shape != tensor.shape for t in operands):
        return tensor
    origins = {_origin(t, steps - 1) for t in operands}
    return origins.pop() if len(origins) == 1 else tensor


def _before(constant: np.ndarray, x: Tensor, out: Tensor) -> np.ndarray | None:
    """What a constant operand of the reshaped tensor `out` is for `x`, of which it was reshaped; None where that is no constant.

    Both hold the same values in the same order; so a constant that repeats itself along the first axes of `out` does so for `x`
    where the other axes have as many elements.
    """
    if constant.size == 1:
        return constant.reshape(())
    if x.shape is None or out.shape is None or constant.ndim > len(out.shape):
        return None
    while constant.ndim and constant.shape[0] == 1:
        constant = constant[0]
    for rank in range(constant.ndim, len(out.shape) + 1):
        last = out.shape[len(out.shape) - rank :]
        if None in last:
            return None
        for own in range(len(x.shape) + 1):
            inner = x.shape[len(x.shape) - own :]
            if None not in inner and math.prod(inner) == math.prod(last):  # type: ignore[arg-type]  # no None
                return np.ascontiguousarray(np.broadcast_to(constant, last).reshape(inner))  # type: ignore[arg-type]
    return None


def _operands(node: Node) -> list[Tensor | np.ndarray] | str:
    """What an elementwise op reads once it stands before the reshaping, or the reason why it cannot."""
    moved = [t for t in node.inputs if t.value is None]
    inner = [t.node for t in moved]
    if not inner or any(n.op not in _RESHAPES.split("|") or n.pinned for n in inner) or node.control or node.control_users:
        return "not all that it reads is reshaped"
    sources = [n.inputs[0] for n in inner]
    if not _is_of_layer(sources[0]):
        return "it is not the result of a layer"
    if len(set(moved)) > 1 and not _alike(inner):
        return "what it reads is not reshaped alike"
    if any(source.shape is None for source in sources):
        return "a shape is not known"
    operands: list[Tensor | np.ndarray] = []
    for tensor in node.inputs:
        value = tensor.value
        if value is None:
            operands.append(tensor.node.inputs[0])
            continue
        if node.op == "BiasAdd" and node.attr("data_format", "NHWC") != "NHWC":
            return "channels are not last"
        before = _before(value, sources[0], node.out)
        if before is None or (node.op == "BiasAdd" and before.shape != (sources[0].shape or (0,))[-1:]):
            return "its constant is no constant before the reshaping"
        operands.append(before)
    # A constant that makes more of the tensor than it was.
    return operands if len(set(moved)) > 1 or node.out.shape == moved[0].shape else "it broadcasts"


def _alike(nodes: list[Node]) -> bool:
    """Whether tensors are reshaped in the same way for sure, though their sizes may broadcast."""
    first, *others = nodes
    for other in others:
        if other.op != first.op or (first.op == "Squeeze" and other.attr("squeeze_dims") != first.attr("squeeze_dims")):
            return False
        one, two = (node.inputs[0] for node in (first, other))
        if one.shape is None or two.shape is None or len(one.shape) != len(two.shape):
            return False
        if first.op == "Squeeze" and not first.attr("squeeze_dims"):
            return False
        if first.op == "Reshape" and _origin(one) != _origin(two):
            return False
        for mine, its in zip(first.inputs[1:], other.inputs[1:], strict=True):
            if mine != its and (mine.value is None or its.value is None or not np.array_equal(mine.value, its.value)):
                return False
    return True


def _check(graph: Graph, match: Match) -> str | None:
    found = _operands(match.root)
    return found if isinstance(found, str) else None


def _sink(graph: Graph, match: Match) -> Tensor:
    node = match.root
    operands, inner = _operands(node), next(t.node for t in node.inputs if t.value is None)
    assert not isinstance(operands, str)
    shape, moved, name = node.out.shape, [operand for operand in operands if isinstance(operand, Tensor)], node.name
    inputs = [
        operand if isinstance(operand, Tensor) else graph.constant(operand, name=f"{name}/constant") for operand in operands
    ]
    twin = graph.copy_of(node, inputs)
    sizes = [source.shape for source in moved]
    twin.shapes = [sizes[0] if all(size == sizes[0] for size in sizes) else None]
    outer = graph.add(inner.op, [twin.out, *inner.inputs[1:]], name=f"{name}/reshaped", attrs=inner.attrs, dtypes=twin.dtypes)
    outer.shapes = [shape]
    return outer.out


def _pad_check(graph: Graph, match: Match) -> str | None:
    pad, paddings = match.nodes["pad"], match.value("paddings")
    axis = match.value("axis")
    if pad.op == "PadV2" and (pad.inputs[2].value is None or pad.inputs[2].value != 0):
        return "it does not pad with zeros"
    return None if paddings.shape == (3, 2) and axis.size == 1 else "not the input of a Conv1D"


def _pad(graph: Graph, match: Match) -> Tensor:
    """ExpandDims(Pad(x)) as Pad(ExpandDims(x))."""
    expand, pad, x = match.root, match.nodes["pad"], match["x"]
    axis = int(match.value("axis").reshape(())) % 4
    paddings = np.insert(match.value("paddings"), axis, 0, axis=0).astype(np.int32)
    shape = None if x.shape is None else (*x.shape[:axis], 1, *x.shape[axis:])
    outer, name = expand.out.shape, graph.take_name(pad)
    expanded = graph.copy_of(expand, [x, match["axis"]])
    expanded.shapes = [shape]
    constant = graph.constant(paddings, name=f"{name}/paddings")
    attrs = {"T": x.dtype, "Tpaddings": tf.int32}
    return graph.add("Pad", [expanded.out, constant], name=name, attrs=attrs, shapes=[outer], dtypes=expanded.dtypes).out


_PADDED = Op("Pad|PadV2", Any("x"), Const("paddings"), name="pad")

RULES = (
    Rule("elementwise op before a Reshape", Op("|".join(sorted(_UNARY | _BINARY)), Any("x")), _check, _sink),
    Rule("Pad behind ExpandDims", Op("ExpandDims", _PADDED, Const("axis")), _pad_check, _pad),
)


def run(graph: Graph) -> int:
    return sum(rewrite(graph, rule) for rule in RULES)
