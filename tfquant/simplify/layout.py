"""Images become NHWC, the only layout that the INT8 kernels take; what is left of Transposes goes to the ends of the graph.

An op in NCHW becomes one in NHWC between two Transposes. The one behind it moves down, through ops that can as well work on
NHWC, until it meets the one before the next such op and both vanish. The one before the first such op moves up likewise, as
far as nobody else reads what it passes. Each permutation moves in one direction only, so that this ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from tfquant.graph.ir import Graph, Node, Shape, Tensor, to_attr

_TO_NHWC, _TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)  # also: the axis in NHWC of each axis of NCHW is _TO_NCHW[axis]


@dataclasses.dataclass(frozen=True)
class Move:
    """How an op on NCHW images computes the same on NHWC ones.

    Attributes:
        images: the inputs that are images.
        vectors: the inputs with one entry per dimension.
        constants: inputs that become other constants.
        attrs: attributes that change.
        results: the outputs that are images; none where the order of dimensions no longer shows.
    """

    images: Sequence[int] = (0,)
    vectors: Sequence[int] = ()
    constants: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)
    attrs: Mapping[str, object] = dataclasses.field(default_factory=dict)
    results: Sequence[int] = (0,)


_Rule = Callable[[Node], Move | None]


# -- ops with a data format ------------------------------------------------------------------------------------------------
# Op to (the input that is an image, attributes with an entry, or a pair, per dimension).
_WINDOW = ("ksize", "strides", "explicit_paddings")
_CONV = ("strides", "dilations", "explicit_paddings")
_FORMATS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "Conv2D": (0, _CONV),
    "DepthwiseConv2dNative": (0, _CONV),
    "Conv2DBackpropInput": (2, _CONV),
    "MaxPool": (0, _WINDOW),
    "AvgPool": (0, _WINDOW),
    "BiasAdd": (0, ()),
    "FusedBatchNorm": (0, ()),
    "FusedBatchNormV2": (0, ()),
    "FusedBatchNormV3": (0, ()),
    "DepthToSpace": (0, ()),
    "SpaceToDepth": (0, ()),
}


def _formatted(node: Node) -> Move | None:
    if node.op not in _FORMATS or node.attr("data_format") != "NCHW":
        return None
    image, keys = _FORMATS[node.op]
    attrs: dict[str, object] = {"data_format": "NHWC"}
    if node.op == "BiasAdd" and _rank(node.inputs[image]) != 4:
        return None
    for key in keys:
        entries = node.attr(key)
        if entries:
            attrs[key] = np.reshape(entries, (4, -1))[list(_TO_NHWC)].reshape(-1).tolist()
    vectors: tuple[int, ...] = ()
    if node.op == "Conv2DBackpropInput":
        if node.inputs[0].shape not in ((2,), (4,)):
            return None
        vectors = (0,) if node.inputs[0].shape == (4,) else ()
    return Move((image,), vectors, attrs=attrs)


# -- ops that work on any layout -------------------------------------------------------------------------------------------
def _elementwise(node: Node) -> Move | None:
    images, constants = [], {}
    for slot, tensor in enumerate(node.inputs):
        rank = _rank(tensor)
        if rank == 4:
            images.append(slot)
        elif rank in (1, 2, 3) and tensor.value is not None:
            constants[slot] = tensor.value.reshape((1,) * (4 - rank) + tensor.value.shape).transpose(_TO_NHWC)
        elif rank != 0:
            return None
    return Move(images, constants=constants) if images else None


def _concat(node: Node) -> Move | None:
    *images, axis = range(len(node.inputs))
    axes = _axes(node.inputs[axis])
    if axes is None or any(_rank(node.inputs[slot]) != 4 for slot in images):
        return None
    return Move(images, constants={axis: axes})


def _per_dimension(*vectors: int) -> _Rule:
    def rule(node: Node) -> Move | None:
        whole = all((node.inputs[slot].shape or (None,))[0] == 4 for slot in vectors)
        return Move(vectors=vectors) if whole and _rank(node.inputs[0]) == 4 else None

    return rule


def _reduction(node: Node) -> Move | None:
    axes = _axes(node.inputs[1])
    if axes is None or _rank(node.inputs[0]) != 4:
        return None
    if node.attr("keep_dims"):
        return Move(constants={1: axes})
    return Move(constants={1: axes}, results=()) if _keep_order(axes) else None


def _squeeze(node: Node) -> Move | None:
    dims = node.attr("squeeze_dims")
    if not dims or _rank(node.inputs[0]) != 4:
        return None
    axes = np.array([_TO_NCHW[dim % 4] for dim in dims])
    return Move(attrs={"squeeze_dims": sorted(axes.tolist())}, results=()) if _keep_order(axes) else None


def _reshape(node: Node) -> Move | None:
    """Where the elements of both layouts have the same order; other Reshapes need their Transpose."""
    shape = node.inputs[0].shape
    if shape is None or len(shape) != 4 or node.inputs[1].value is None:
        return None
    return Move(results=()) if shape[1] == 1 or shape[2:] == (1, 1) else None


def _split(image: int, axis: int) -> _Rule:
    def rule(node: Node) -> Move | None:
        axes = _axes(node.inputs[axis])
        if axes is None or _rank(node.inputs[image]) != 4:
            return None
        return Move((image,), constants={axis: axes}, results=range(len(node.dtypes)))

    return rule


def _strided_slice(node: Node) -> Move | None:
    values = [tensor.value for tensor in node.inputs[1:4]]
    if any(node.attr(key) for key in ("ellipsis_mask", "new_axis_mask", "shrink_axis_mask")) or _rank(node.inputs[0]) != 4:
        return None
    constants, given = {}, 0
    for slot, (value, default) in enumerate(zip(values, (0, 0, 1), strict=True), start=1):
        if value is None:
            return None
        given = len(value)
        constants[slot] = np.array([*value, *[default] * (4 - given)], value.dtype)[list(_TO_NHWC)]
    attrs = {}
    for key in ("begin_mask", "end_mask"):
        mask = (node.attr(key) or 0) | (15 << given & 15)  # dimensions that are not told are whole
        attrs[key] = sum((mask >> axis & 1) << _TO_NCHW[axis] for axis in range(4))
    return Move(constants=constants, attrs=attrs)


def _all(ops: str, rule: _Rule) -> dict[str, _Rule]:
    return dict.fromkeys(ops.split("|"), rule)


# A Transpose may as well stand before these as behind them: it is no larger there.
_SAME_SIZE: Mapping[str, _Rule] = {
    **_all(
        "Abs|Cast|Ceil|CheckNumerics|Elu|Erf|Exp|Floor|Identity|LeakyRelu|Log|Log1p|LogicalNot|Neg|PreventGradient", _elementwise
    ),
    **_all("Reciprocal|Relu|Relu6|Rint|Round|Rsqrt|Selu|Sigmoid|Sign|Snapshot|Softplus|Softsign|Sqrt|Square|Tanh", _elementwise),
    **_all("Add|AddN|AddV2|Div|DivNoNan|FloorDiv|FloorMod|Maximum|Minimum|Mul|MulNoNan|Pow|RealDiv|Sub", _elementwise),
    **_all("Equal|Greater|GreaterEqual|Less|LessEqual|LogicalAnd|LogicalOr|NotEqual|SquaredDifference", _elementwise),
    **_all("ClipByValue|FakeQuantWithMinMaxArgs|FakeQuantWithMinMaxVars|SelectV2|StopGradient", _elementwise),
    **_all("MirrorPad|Pad|PadV2", _per_dimension(1)),
}
_RULES: Mapping[str, _Rule] = {
    **_SAME_SIZE,
    **_all("All|Any|ArgMax|ArgMin|Max|Mean|Min|Prod|Sum", _reduction),
    "ConcatV2": _concat,
    "Reshape": _reshape,
    "Slice": _per_dimension(1, 2),
    "Split": _split(1, 0),
    "SplitV": _split(0, 2),
    "Squeeze": _squeeze,
    "StridedSlice": _strided_slice,
    "Tile": _per_dimension(1),
}


def run(graph: Graph) -> int:
    return _Walk(graph).run()


class _Walk:
    """One walk over the graph, from the inputs on: whatever a node reads has been looked at before."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.fired = 0
        self._nodes = graph.order()
        self._moves = {node: _RULES[node.op](node) for node in self._nodes if node.op in _RULES}
        self._wanted = self._find_wanted()
        self._known: dict[Tensor, Tensor] = {}  # to NHWC by a Transpose that is there

    def run(self) -> int:
        for node in self._nodes:
            if self.graph.nodes.get(node.name) is not node:
                continue
            if node.op == "Transpose":
                self._transpose(node)
            elif node.op == "Shape":
                self._shape(node)
            else:
                move = _formatted(node) or self._moves.get(node)
                if move is not None and (node.op in _FORMATS or self._pays(node, move)):
                    self._apply(node, move)
        return self.fired

    def _find_wanted(self) -> set[Node]:
        """The nodes whose results somebody wants in NHWC, maybe further down."""
        wanted: set[Node] = set()
        for node in reversed(self._nodes):
            formatted, move = _formatted(node), self._moves.get(node)
            if _permutation(node) == _TO_NHWC:
                wanted.add(node.inputs[0].node)
            elif formatted is not None:
                wanted.update(node.inputs[slot].node for slot in formatted.images)
            elif move is not None and (node in wanted or not move.results):
                wanted.update(node.inputs[slot].node for slot in move.images)
        return wanted

    def _pays(self, node: Node, move: Move) -> bool:
        """Whether NHWC brings no more Transposes than there are."""
        images = [node.inputs[slot] for slot in move.images]
        lifted = {tensor for tensor in images if _permutation(tensor.node) == _TO_NCHW}
        if not lifted:
            return False
        # How many vanish with this reader, and how many would be new.
        gone = sum(
            all(user is node for user, _ in self.graph.users(tensor)) and not self.graph.is_output(tensor) for tensor in lifted
        )
        new = sum(self._free(tensor) is None for tensor in set(images))
        if new:
            return node in self._wanted and new <= gone
        return not move.results or node in self._wanted or (len(move.results) == 1 and gone > 0)

    def _apply(self, node: Node, move: Move) -> None:
        graph = self.graph
        self._moves.pop(node, None)
        for slot in move.images:
            self._feed(node, slot, self._image(node.inputs[slot], node))
        for slot in move.vectors:
            self._feed(node, slot, self._permuted(node.inputs[slot], _TO_NHWC, node.name))
        for slot, value in move.constants.items():
            self._feed(node, slot, graph.constant(np.asarray(value, order="C"), name=f"{node.name}/nhwc"))
        node.attrs.update({key: to_attr(value) for key, value in move.attrs.items()})
        for index in move.results:
            result = Tensor(node, index)
            if index < len(node.shapes):
                node.shapes[index] = _shape(result.shape, _TO_NHWC)
            if graph.users(result) or graph.is_output(result):
                graph.replace(result, self._new(result, _TO_NCHW))
        self.fired += 1

    def _transpose(self, node: Node) -> None:
        graph, permutation = self.graph, _permutation(node)
        if permutation is None:
            return
        if permutation == _TO_NHWC and self._free(node.inputs[0]) is None and self._liftable(node.inputs[0], node):
            self._image(node.inputs[0], node)
        inner = _permutation(node.inputs[0].node)
        if inner is not None:
            permutation = tuple(inner[axis] for axis in permutation)
            self._feed(node, 0, node.inputs[0].node.inputs[0])
            self._feed(node, 1, graph.constant(np.array(permutation, np.int32), name=f"{node.name}/permutation"))
            node.attrs["Tperm"] = to_attr(tf.int32)
            self.fired += 1
        source = node.inputs[0]
        if permutation == tuple(range(len(permutation))) and not node.control and not node.control_users:
            graph.replace(node.out, source)
            graph.remove(node)
            self.fired += inner is None
        elif permutation == _TO_NHWC:
            self._known[source] = node.out

    def _shape(self, node: Node) -> None:
        """The shape of what only shapes are taken of is that of the NHWC image, permuted."""
        source = node.inputs[0]
        if _permutation(source.node) != _TO_NCHW or self.graph.is_output(source):
            return
        if any(user.op != "Shape" for user, _ in self.graph.users(source)):
            return
        self._feed(node, 0, source.node.inputs[0])
        self.graph.replace(node.out, self._permuted(node.out, _TO_NCHW, node.name))
        self.fired += 1

    # -- tensors in NHWC -------------------------------------------------------------------------------------------------
    def _free(self, tensor: Tensor) -> Callable[[], Tensor] | None:
        """How to get the tensor in NHWC without a Transpose, if it can be."""
        node, shape, known = tensor.node, tensor.shape, self._known.get(tensor)
        if _permutation(node) == _TO_NCHW:
            return lambda: node.inputs[0]
        if known is not None and self.graph.nodes.get(known.node.name) is known.node and known.node.inputs[0] == tensor:
            return lambda: known
        value = tensor.value
        if value is not None and value.ndim == 4:
            transposed = value.transpose(_TO_NHWC)
            return lambda: self.graph.constant(np.asarray(transposed, order="C"), name=f"{node.name}/nhwc", dtype=tensor.dtype)
        if shape is not None and len(shape) == 4 and shape[2:] == (1, 1) and shape[1] is not None:
            return lambda: self._reshaped(tensor)
        return None

    def _image(self, tensor: Tensor, reader: Node) -> Tensor:
        """The tensor in NHWC for its reader, by a Transpose as far up as it can be moved."""
        free = self._free(tensor)
        if free is not None:
            return free()
        chain: list[tuple[Node, Move]] = []
        top = tensor
        while self._free(top) is None and (move := self._liftable(top, reader)) is not None:
            reader = top.node
            chain.append((reader, move))
            top = self._moved(reader, move)
        free = self._free(top)
        result = free() if free is not None else self._new(top, _TO_NHWC)
        self._known[top] = result
        for node, move in reversed(chain):
            self._apply(node, move)
        return tensor if chain else result

    def _liftable(self, tensor: Tensor, reader: Node) -> Move | None:
        node = tensor.node
        move = self._moves.get(node) if node.op in _SAME_SIZE else None
        if move is None or self.graph.is_output(tensor) or any(user is not reader for user, _ in self.graph.users(tensor)):
            return None
        return move if len({node.inputs[slot] for slot in move.images if node.inputs[slot].value is None}) == 1 else None

    @staticmethod
    def _moved(node: Node, move: Move) -> Tensor:
        return next(node.inputs[slot] for slot in move.images if node.inputs[slot].value is None)

    def _new(self, tensor: Tensor, permutation: tuple[int, ...]) -> Tensor:
        name = f"{tensor.node.name}/{'to_nhwc' if permutation == _TO_NHWC else 'to_nchw'}"
        constant = self.graph.constant(np.array(permutation, np.int32), name=f"{name}/permutation")
        attrs = {"T": _dtype(tensor), "Tperm": tf.int32}
        shapes = [_shape(tensor.shape, permutation)]
        return self.graph.add("Transpose", [tensor, constant], name=name, attrs=attrs, shapes=shapes, dtypes=[_dtype(tensor)]).out

    def _reshaped(self, tensor: Tensor) -> Tensor:
        """A tensor of one pixel; its elements have the same order in both layouts."""
        assert tensor.shape is not None
        source = tensor.node.inputs[0] if tensor.node.op == "Reshape" else tensor
        name, shape = f"{tensor.node.name}/to_nhwc", _shape(tensor.shape, _TO_NHWC)
        constant = self.graph.constant(np.array([-1, 1, 1, tensor.shape[1]], np.int32), name=f"{name}/shape")
        attrs = {"T": _dtype(tensor), "Tshape": tf.int32}
        result = self.graph.add("Reshape", [source, constant], name=name, attrs=attrs, shapes=[shape], dtypes=[_dtype(tensor)])
        return result.out

    def _permuted(self, vector: Tensor, permutation: tuple[int, ...], name: str) -> Tensor:
        """A tensor with one entry per dimension, in the order of the other layout."""
        graph, dtype = self.graph, _dtype(vector)
        indices = np.array(permutation, np.int32)
        if vector.value is not None:
            return graph.constant(vector.value[indices], name=f"{name}/nhwc")
        inputs = [
            vector,
            graph.constant(indices, name=f"{name}/order"),
            graph.constant(np.array(0, np.int32), name=f"{name}/axis"),
        ]
        attrs = {"Tparams": dtype, "Tindices": tf.int32, "Taxis": tf.int32, "batch_dims": 0}
        return graph.add("GatherV2", inputs, name=f"{name}/permuted", attrs=attrs, shapes=[vector.shape], dtypes=[dtype]).out

    def _feed(self, node: Node, slot: int, tensor: Tensor) -> None:
        before = node.inputs[slot].node
        self.graph.set_input(node, slot, tensor)
        self.graph.remove(before)


def _permutation(node: Node) -> tuple[int, ...] | None:
    if node.op != "Transpose" or node.inputs[1].value is None:
        return None
    rank = node.inputs[1].value.size
    return tuple(int(axis) % rank for axis in node.inputs[1].value)


def _axes(tensor: Tensor) -> np.ndarray | None:
    """The axes of an NCHW image, in NHWC."""
    if tensor.value is None:
        return None
    axes = np.array(_TO_NCHW)[tensor.value % 4].astype(tensor.value.dtype)
    return np.sort(axes) if axes.ndim else axes


def _keep_order(axes: np.ndarray) -> bool:
    """Whether what is left without these axes of NHWC has the same order in both layouts."""
    left = [axis for axis in _TO_NCHW if axis not in np.atleast_1d(axes)]
    return left == sorted(left)


def _rank(tensor: Tensor) -> int | None:
    return None if tensor.shape is None else len(tensor.shape)


def _shape(shape: Shape, permutation: tuple[int, ...]) -> Shape:
    return None if shape is None else tuple(shape[axis] for axis in permutation)


def _dtype(tensor: Tensor) -> tf.DType:
    assert tensor.dtype is not None
    return tensor.dtype
