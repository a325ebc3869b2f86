"""Products of a tensor with a constant become MatMul of rows, whatever they are spelled as; those of two tensors BatchMatMul.

BatchMatMul and Einsum with a constant side are Transpose, Reshape, MatMul, Reshape and Transpose, as far as these do anything:
Dense layers on more than two dimensions, EinsumDense, the projections of MultiHeadAttention. An Einsum of two tensors is
BatchMatMulV2 between Transposes, which others may share.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.graph.patterns import Any, Match, Op, Rule, rewrite
from tfquant.simplify.reshapes import reshaped

_BATCHED = "BatchMatMul|BatchMatMulV2|BatchMatMulV3"


@dataclasses.dataclass(frozen=True)
class Product:
    """A sum of products of two tensors, as an Einsum has it: a label per axis, the axes of equal labels being joined.

    Attributes:
        sides: the labels of the two tensors.
        out: the labels of the result.
    """

    sides: tuple[str, str]
    out: str

    def kinds(self, side: int) -> tuple[str, str, str] | None:
        """The labels of a side that are (in all tensors, in this one and the result, summed over), None if others are left."""
        own, other = self.sides[side], self.sides[1 - side]
        if len(set(own)) < len(own) or len(set(self.out)) < len(self.out):
            return None
        batch = "".join(label for label in own if label in other and label in self.out)
        free = "".join(label for label in own if label not in other and label in self.out)
        summed = "".join(label for label in own if label in other and label not in self.out)
        return (batch, free, summed) if len(batch) + len(free) + len(summed) == len(own) else None


def _product(node: Node) -> Product | None:
    """What a node of two inputs computes, None where it is no such product."""
    first, second = (tensor.shape for tensor in node.inputs[:2])
    if len(node.inputs) != 2 or first is None or second is None:
        return None
    if node.op == "Einsum":
        return _equation(node.attr("equation"), len(first), len(second))
    return _batched(node, len(first), len(second))


def _equation(equation: str, *ranks: int) -> Product | None:
    left, arrow, out = equation.replace(" ", "").partition("->")
    sides = left.split(",")
    if not arrow or len(sides) != 2:
        return None
    spare = [label for label in string.ascii_letters if label not in equation]
    dots = []  # the axes that "..." stands for, counted from the last
    for side, rank in zip(sides, ranks, strict=True):
        count = rank - len(side.replace("...", "")) if "..." in side else 0
        if count > len(spare) or ("..." not in side and len(side) != rank):
            return None
        dots.append("".join(spare[:count][::-1]))
    longest = max(dots, key=len)
    expanded = tuple(side.replace("...", own) for side, own in zip(sides, dots, strict=True))
    return Product((expanded[0], expanded[1]), out.replace("...", longest))


def _batched(node: Node, *ranks: int) -> Product | None:
    """BatchMatMul: the axes before the last two are joined as far as both sides have them."""
    if min(ranks) < 2 or max(ranks) > len(string.ascii_lowercase):
        return None
    outer = string.ascii_lowercase[: max(ranks) - 2]
    first = "KI" if node.attr("adj_x") else "IK"
    second = "JK" if node.attr("adj_y") else "KJ"
    sides = [outer[len(outer) - (rank - 2) :] + inner for rank, inner in zip(ranks, (first, second), strict=True)]
    return Product((sides[0], sides[1]), f"{outer}IJ")


# -- a constant side -------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class _Rows:
    """A product as MatMul: what is done to the tensor `x`, to the constant, and to the result.

    Attributes:
        x: which side is the tensor.
        free: labels of the axes of x that the rows stand for, in order.
        summed: of those that are summed over.
        columns: of those of the constant that the result's columns stand for.
        constant: its value with the axes `summed + columns`.
        out: labels of the result.
    """

    x: int
    free: str
    summed: str
    columns: str
    constant: np.ndarray
    out: str


def _rows(node: Node) -> _Rows | str:
    """How a node becomes a MatMul, or the reason why it does not."""
    product = _product(node)
    constants = [side for side, tensor in enumerate(node.inputs[:2]) if tensor.value is not None]
    if product is None or len(constants) != 1:
        return "no product of a tensor with a constant"
    side = constants[0]
    value, labels = node.inputs[side].value, product.sides[side]
    assert value is not None
    # Axes of size 1 that the constant shares with the tensor and the result are joined with whatever these have there.
    shared = [axis for axis, label in enumerate(labels) if label in product.sides[1 - side] and label in product.out]
    if any(value.shape[axis] != 1 for axis in shared):
        return "the constant differs along an axis that is not summed over"
    given = node.inputs[1 - side].shape or ()
    if node.op == "Einsum" and any(given[product.sides[1 - side].index(labels[axis])] != 1 for axis in shared):
        return "it broadcasts"
    value = value.squeeze(tuple(shared))
    labels = "".join(label for axis, label in enumerate(labels) if axis not in shared)
    both = (product.sides[0], labels) if side == 1 else (labels, product.sides[1])
    product = Product(both, product.out)
    kinds, own = product.kinds(1 - side), product.kinds(side)
    if kinds is None or own is None or kinds[0] or not kinds[2]:
        return "an axis of one side alone is summed over, or none is"
    _, free, summed = kinds
    if product.sides[1 - side] != free + summed:  # a Transpose is needed: then one that leaves none for the result
        free = "".join(label for label in product.out if label in free)
    columns = "".join(label for label in product.out if label in own[1])
    constant = value.transpose([labels.index(label) for label in summed + columns])
    return _Rows(1 - side, free, summed, columns, constant, product.out)


def _check_constant(graph: Graph, match: Match) -> str | None:
    dtype = match.root.out.dtype
    if dtype is None or not dtype.is_floating or any(tensor.dtype != dtype for tensor in match.root.inputs):
        return "not floating point"
    found = _rows(match.root)
    return found if isinstance(found, str) else None


def _to_matmul(graph: Graph, match: Match) -> Tensor:
    node = match.root
    rows, product = _rows(node), _product(node)
    assert isinstance(rows, _Rows) and product is not None
    x, given, name = node.inputs[rows.x], product.sides[rows.x], graph.take_name(node)
    x = _transposed(graph, x, given, rows.free + rows.summed, f"{name}/input")
    depth = math.prod(rows.constant.shape[: len(rows.summed)])
    width = math.prod(rows.constant.shape[len(rows.summed) :])
    assert x.shape is not None and x.dtype is not None
    sizes, columns = list(x.shape[: len(rows.free)]), list(rows.constant.shape[len(rows.summed) :])
    height = math.prod(size for size in sizes if size is not None) if None not in sizes else None
    matrix = x if len(x.shape) == 2 and len(sizes) == 1 else _to_rows(graph, x, height, depth, f"{name}/rows")
    weights = graph.constant(np.ascontiguousarray(rows.constant.reshape(depth, width)), name=f"{name}/weights")
    attrs = {"T": x.dtype, "transpose_a": False, "transpose_b": False}
    shapes, dtypes = [(height, width)], [x.dtype]
    y = graph.add("MatMul", [matrix, weights], name=name, attrs=attrs, shapes=shapes, dtypes=dtypes).out
    if len(sizes) != 1 or len(columns) != 1:
        y = _from_rows(graph, y, x, sizes, columns, f"{name}/result")
    return _transposed(graph, y, rows.free + rows.columns, rows.out, f"{name}/output")


def _transposed(graph: Graph, x: Tensor, labels: str, wanted: str, name: str) -> Tensor:
    if labels == wanted:
        return x
    assert x.shape is not None and x.dtype is not None
    permutation = [labels.index(label) for label in wanted]
    constant = graph.constant(np.array(permutation, np.int32), name=f"{name}/permutation")
    attrs = {"T": x.dtype, "Tperm": tf.int32}
    shapes = [tuple(x.shape[axis] for axis in permutation)]
    return graph.add("Transpose", [x, constant], name=name, attrs=attrs, shapes=shapes, dtypes=[x.dtype]).out


def _to_rows(graph: Graph, x: Tensor, height: int | None, depth: int, name: str) -> Tensor:
    target = graph.constant(np.array([-1, depth], np.int32), name=f"{name}/shape")
    return reshaped(graph, x, target, (height, depth), name)


def _from_rows(graph: Graph, y: Tensor, x: Tensor, sizes: Sequence[int | None], columns: Sequence[int], name: str) -> Tensor:
    """Rows as the first axes of `x`, columns as `columns`."""
    if sizes.count(None) <= 1:
        target = np.array([-1 if size is None else size for size in (*sizes, *columns)], np.int32)
        return reshaped(graph, y, graph.constant(target, name=f"{name}/shape"), (*sizes, *columns), name)
    attrs = {"T": x.dtype, "out_type": tf.int32}
    shape = graph.add("Shape", [x], name=f"{name}/shape_of_input", attrs=attrs, shapes=[(len(x.shape or ()),)], dtypes=[tf.int32])
    ends = [graph.constant(np.array([end], np.int32), name=f"{name}/{end}") for end in (0, len(sizes), 1)]
    masks = dict.fromkeys(("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask"), 0)
    attrs = {"T": tf.int32, "Index": tf.int32, **masks}
    shapes, dtypes = [(len(sizes),)], [tf.int32]
    outer = graph.add("StridedSlice", [shape.out, *ends], name=f"{name}/outer", attrs=attrs, shapes=shapes, dtypes=dtypes)
    inner = graph.constant(np.array(columns, np.int32), name=f"{name}/inner")
    axis = graph.constant(np.array(0, np.int32), name=f"{name}/axis")
    attrs = {"N": 2, "T": tf.int32, "Tidx": tf.int32}
    shapes = [(len(sizes) + len(columns),)]
    target_of = graph.add(
        "ConcatV2", [outer.out, inner, axis], name=f"{name}/shape", attrs=attrs, shapes=shapes, dtypes=[tf.int32]
    )
    return reshaped(graph, y, target_of.out, (*sizes, *columns), name)


# -- two tensors -----------------------------------------------------------------------------------------------------------
def _check_tensors(graph: Graph, match: Match) -> str | None:
    node, product = match.root, _product(match.root)
    dtype = node.out.dtype
    if product is None or any(tensor.value is not None for tensor in node.inputs):
        return "no product of two tensors"
    if dtype is None or not dtype.is_floating:
        return "not floating point"
    kinds = [product.kinds(side) for side in (0, 1)]
    if any(kind is None or len(kind[1]) != 1 or len(kind[2]) != 1 for kind in kinds):
        return "it has not one axis per matrix that is summed over and one that is not"
    for label in kinds[0][0]:  # type: ignore[index]  # BatchMatMulV2 broadcasts likewise, but what is not known may be either
        sizes = {tensor.shape[side.index(label)] for tensor, side in zip(node.inputs, product.sides, strict=True)}  # type: ignore[index]
        if 1 in sizes and len(sizes) > 1:
            return "it broadcasts"
    return None


def _to_batched(graph: Graph, match: Match) -> Tensor:
    node, product = match.root, _product(match.root)
    assert product is not None
    first, second = (product.kinds(side) for side in (0, 1))
    assert first is not None and second is not None
    order = [0, 1] if product.out.index(first[1]) < product.out.index(second[1]) else [1, 0]
    kinds = [(first, second)[side] for side in order]
    batch, name = "".join(label for label in product.out if label in first[0]), graph.take_name(node)
    inputs, inner, shapes = [], [], []
    for side in order:
        matrix = "".join(label for label in product.sides[side] if label not in batch)
        inputs.append(_transposed(graph, node.inputs[side], product.sides[side], batch + matrix, f"{name}/input_{side}"))
        inner.append(matrix)
        shapes.append(dict(zip(batch + matrix, inputs[-1].shape or (), strict=True)))
    attrs = {"T": node.out.dtype, "adj_x": inner[0][1] != kinds[0][2], "adj_y": inner[1][0] != kinds[1][2]}
    labels = batch + kinds[0][1] + kinds[1][1]
    known = {**shapes[1], **shapes[0], **{key: size for shape in shapes for key, size in shape.items() if size is not None}}
    out = [tuple(known[label] for label in labels)]
    y = graph.add("BatchMatMulV2", inputs, name=name, attrs=attrs, shapes=out, dtypes=node.dtypes[:1]).out
    return _transposed(graph, y, labels, product.out, f"{name}/output")


RULES = (
    Rule("product with a constant to MatMul", Op(f"{_BATCHED}|Einsum", Any("x")), _check_constant, _to_matmul),
    Rule("Einsum of two tensors to BatchMatMulV2", Op("Einsum", Any("x")), _check_tensors, _to_batched),
)


def run(graph: Graph) -> int:
    return sum(rewrite(graph, rule) for rule in RULES)
