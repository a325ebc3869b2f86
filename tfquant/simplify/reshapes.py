"""Reshapes with constant targets, and none more than needed.

A target that is computed from the input's shape becomes a constant where one of its entries at most is unknown (Flatten,
Tensordot, attention heads). What reshapes a reshaped tensor reads the first one; what changes nothing goes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.graph.patterns import Any, Match, Op, Rule, rewrite

_MAX_DEPTH = 12  # of the ops that compute a target
_MAX_RANK = 16  # entries of a target


def run(graph: Graph) -> int:
    return _static_targets(graph) + sum(rewrite(graph, rule) for rule in RULES)


# -- targets ---------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Dim:
    """A size: a number times sizes that are not known.

    Attributes:
        factor: the number; -1 alone stands for what is left.
        unknown: sorted; an axis of a tensor, or an entry of a vector of integers.
    """

    factor: int
    unknown: tuple[tuple[str, int], ...] = ()

    def __mul__(self, other: Dim) -> Dim:
        return Dim(self.factor * other.factor, tuple(sorted(self.unknown + other.unknown)))

    def over(self, other: Dim) -> Dim | None:
        """The quotient, or None where it is not known to be a whole number."""
        left = Counter(self.unknown)
        left.subtract(other.unknown)
        if other.factor <= 0 or self.factor % other.factor or min(left.values(), default=0) < 0:
            return None
        return Dim(self.factor // other.factor, tuple(sorted(left.elements())))


_LEFT = Dim(-1)


def _static_targets(graph: Graph) -> int:
    fired = 0
    for node in graph.order():
        if node.op == "Reshape" and not node.pinned and node.inputs[1].value is None:
            target = _target(node)
            if target is not None:
                graph.set_input(node, 1, graph.constant(target, name=f"{node.name}/static_shape"))
                node.shapes = [tuple(None if size == -1 else int(size) for size in target)]
                fired += 1
    return fired


def _target(node: Node) -> np.ndarray | None:
    """The target shape with one -1, where at most one of its entries is unknown."""
    source, out = node.inputs[0], node.out.shape
    found = _dims(node.inputs[1])
    if found is None:
        return None
    entries = list(found)
    if out is not None and len(out) == len(entries):
        entries = [entry if size is None else Dim(size) for entry, size in zip(entries, out, strict=True)]
    if entries.count(_LEFT) == 1 and source.shape is not None:
        rest = _product(entry for entry in entries if entry != _LEFT)
        left = _product(_sizes(source)).over(rest)
        if left is not None:
            entries[entries.index(_LEFT)] = left
    sizes = [-1 if entry.unknown else entry.factor for entry in entries]
    return None if sizes.count(-1) > 1 or (-1 in sizes and 0 in sizes) else np.array(sizes, np.int32)


def _product(dims: Iterable[Dim]) -> Dim:
    result = Dim(1)
    for dim in dims:
        result *= dim
    return result


def _sizes(tensor: Tensor) -> list[Dim]:
    """The sizes of a tensor of known rank."""
    assert tensor.shape is not None
    return [Dim(1, ((tensor.name, axis),)) if size is None else Dim(size) for axis, size in enumerate(tensor.shape)]


def _array(dims: list[Dim]) -> np.ndarray:
    result = np.empty(len(dims), object)
    result[:] = dims
    return result


def _scalar(dim: Dim) -> np.ndarray:
    return _array([dim]).reshape(())


def _dims(tensor: Tensor, depth: int = 0) -> np.ndarray | None:
    """A scalar or vector of integers as an array of `Dim`, None where it is something else or its length is not known."""
    value, shape = tensor.value, tensor.shape
    if value is not None:
        return _array([Dim(int(entry)) for entry in value.reshape(-1)]).reshape(value.shape) if value.ndim < 2 else None
    rule = _RULES.get(tensor.node.op) if depth < _MAX_DEPTH and not tensor.node.pinned else None
    result = rule(tensor.node, depth + 1) if rule is not None else None
    if result is not None and result.ndim < 2:
        return result
    if shape is None or len(shape) > 1 or None in shape or (shape and (shape[0] or 0) > _MAX_RANK):
        return None
    opaque = [Dim(1, ((f"{tensor.name} entry", entry),)) for entry in range((shape[0] or 0) if shape else 1)]
    return _array(opaque).reshape(shape)  # type: ignore[arg-type]  # known sizes


def _all(tensors: Iterable[Tensor], depth: int) -> list[np.ndarray] | None:
    found = [_dims(tensor, depth) for tensor in tensors]
    return None if any(dims is None for dims in found) else found  # type: ignore[return-value]


def _shape(node: Node, depth: int) -> np.ndarray | None:
    source = node.inputs[0]
    return _array(_sizes(source)) if source.shape is not None else None


def _first(node: Node, depth: int) -> np.ndarray | None:
    return _dims(node.inputs[0], depth)


def _pack(node: Node, depth: int) -> np.ndarray | None:
    parts = _all(node.inputs, depth)
    return np.stack(parts) if parts and not node.attr("axis") else None


def _concat(node: Node, depth: int) -> np.ndarray | None:
    parts = _all(node.inputs[:-1], depth)
    return np.concatenate(parts) if parts and all(part.ndim == 1 for part in parts) else None


def _gather(node: Node, depth: int) -> np.ndarray | None:
    params, indices = _dims(node.inputs[0], depth), node.inputs[1].value
    if params is None or params.ndim != 1 or indices is None or (indices >= len(params)).any():
        return None
    return np.asarray(params[indices], object)


def _strided_slice(node: Node, depth: int) -> np.ndarray | None:
    source = _dims(node.inputs[0], depth)
    begin, end, stride = (tensor.value for tensor in node.inputs[1:4])
    if source is None or source.ndim != 1 or begin is None or end is None or stride is None or len(begin) != 1:
        return None
    if node.attr("ellipsis_mask") or node.attr("new_axis_mask"):
        return None
    if node.attr("shrink_axis_mask"):
        return _scalar(source[int(begin[0])]) if -len(source) <= begin[0] < len(source) else None
    first = None if node.attr("begin_mask") else int(begin[0])
    last = None if node.attr("end_mask") else int(end[0])
    return np.asarray(source[slice(first, last, int(stride[0]))], object)


def _slice(node: Node, depth: int) -> np.ndarray | None:
    source = _dims(node.inputs[0], depth)
    begin, size = (tensor.value for tensor in node.inputs[1:3])
    if source is None or source.ndim != 1 or begin is None or size is None:
        return None
    end = None if size[0] == -1 else int(begin[0] + size[0])
    return np.asarray(source[int(begin[0]) : end], object)


def _prod(node: Node, depth: int) -> np.ndarray | None:
    factors = _dims(node.inputs[0], depth)
    return None if factors is None or node.attr("keep_dims") else _scalar(_product(factors.reshape(-1)))


def _mul(node: Node, depth: int) -> np.ndarray | None:
    factors = _all(node.inputs, depth)
    return np.asarray(np.multiply(*factors), object) if factors else None


_RULES: Mapping[str, Callable[[Node, int], np.ndarray | None]] = {
    "Shape": _shape,
    "Cast": _first,
    "Identity": _first,
    "Pack": _pack,
    "ConcatV2": _concat,
    "Gather": _gather,
    "GatherV2": _gather,
    "Slice": _slice,
    "StridedSlice": _strided_slice,
    "Prod": _prod,
    "Mul": _mul,
}


# -- fewer of them ---------------------------------------------------------------------------------------------------------
def reshaped(graph: Graph, x: Tensor, target: Tensor, shape: tuple[int | None, ...] | None, name: str) -> Tensor:
    """`x` reshaped to `target`, a vector of integers; `shape` is what is known of the result."""
    assert x.dtype is not None and target.dtype is not None
    attrs = {"T": x.dtype, "Tshape": target.dtype}
    return graph.add("Reshape", [x, target], name=name, attrs=attrs, shapes=[shape], dtypes=[x.dtype]).out


def _axes(node: Node) -> list[int] | None:
    """The axes of size 1 that a Squeeze takes out or an ExpandDims puts in, as counted in the larger tensor."""
    larger = node.inputs[0].shape if node.op == "Squeeze" else node.out.shape
    if larger is None:
        return None
    if node.op == "ExpandDims":
        axis = node.inputs[1].value
        return None if axis is None else [int(axis.reshape(())) % len(larger)]
    dims = node.attr("squeeze_dims")
    return sorted(int(dim) % len(larger) for dim in dims) if dims else None


def _back_check(graph: Graph, match: Match) -> str | None:
    inner, outer = match.nodes["inner"], match.root
    if inner.op == outer.op or _axes(inner) is None or _axes(inner) != _axes(outer):
        return "it does not undo the other"
    return None


def _same_check(graph: Graph, match: Match) -> str | None:
    shape, target = match["x"].shape, match.root.inputs[1].value
    if shape is None or target is None or len(shape) != target.size:
        return "it changes the shape"
    known = [size == entry for size, entry in zip(shape, target, strict=True) if entry != -1]
    return None if all(known) else "it changes the shape"


def _twice_check(graph: Graph, match: Match) -> str | None:
    node = match.root
    if node.op == "Reshape":
        return None
    return None if node.out.shape is not None and node.out.shape.count(None) <= 1 else "two sizes are not known"


def _twice(graph: Graph, match: Match) -> Tensor:
    node, shape = match.root, match.root.out.shape
    if node.op == "Reshape":
        target = node.inputs[1]
    else:
        assert shape is not None
        sizes = [-1 if size is None else size for size in shape]
        target = graph.constant(np.array(sizes, np.int32), name=f"{node.name}/static_shape")
    return reshaped(graph, match["x"], target, shape, graph.take_name(node))


def _x(graph: Graph, match: Match) -> Tensor:
    return match["x"]


def _shape_check(graph: Graph, match: Match) -> str | None:
    target = match["target"]
    if target.dtype != match.root.out.dtype or target.value is not None:
        return "its target is of another type, or a constant"
    entries = _dims(target)
    if entries is None or any(entry == _LEFT or "entry" in name for entry in entries for name, _ in entry.unknown):
        return "its target may leave a size open"
    return None


def _target_of(graph: Graph, match: Match) -> Tensor:
    return match["target"]


def _inner(ops: str) -> Op:
    return Op(ops, Any("x"), name="inner", shared=True)


RULES = (
    Rule("Squeeze and ExpandDims that undo each other", Op("Squeeze|ExpandDims", _inner("Squeeze|ExpandDims")), _back_check, _x),
    Rule(
        "Reshape of a reshaped tensor",
        Op("Reshape|Squeeze|ExpandDims", _inner("Reshape|Squeeze|ExpandDims")),
        _twice_check,
        _twice,
    ),
    Rule(
        "Shape of a Reshape",
        Op("Shape", Op("Reshape", Any("x"), Any("target"), name="reshape", shared=True)),
        _shape_check,
        _target_of,
    ),
    Rule("Reshape to the same shape", Op("Reshape", Any("x")), _same_check, _x),
)
