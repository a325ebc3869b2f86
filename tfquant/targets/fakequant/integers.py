"""The simulation in integers: the sums of layers are exact, and what is rounded is what kernels round, in their order.

The simulation in floats adds up products of real values, each of which is rounded to 24 bits. Where a sum lies about halfway
between two steps, it becomes another integer than in the kernels: one in 4,000 values of a first layer. Each of these changes
many of the next layer, and after 50 layers nearly all. Integers are exact in float32 up to 2^24, in float64 as far as is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import numpy as np
import tensorflow as tf

from tfquant.graph.ir import FAKE_QUANT, Graph, Node, Tensor
from tfquant.plan.edits import bias_of
from tfquant.plan.kernels import Unit
from tfquant.plan.spec import QuantPlan, QuantSpec
from tfquant.targets import fakequant, weightonly, weights

_LAYERS = frozenset({"Conv2D", "DepthwiseConv2dNative", "MatMul"})
# What hands integers on, and what a rounding may as well stand in front of.
_MOVES = frozenset({"Identity", "Reshape", "Squeeze", "ExpandDims", "Transpose", "Pad", "MaxPool"})
_CLAMPS = frozenset({"Relu", "Relu6"})
_SUMS = frozenset({"Add", "AddV2"})
_SIX = 6.0
_ONE = np.float32(1)
_MOST_EXACT = 2**24  # of float32
_LARGEST_INPUT, _LARGEST_WEIGHT = 255, 127


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer with weights in 8 bits.

    Attributes:
        name: of its op.
        integers: int8, of the shape of the constant that it reads, symmetric.
        scales: float32 (C,).
        axes: of the constant, along which each slice has a scale of its own; their sizes multiply to C.
    """

    name: str
    integers: np.ndarray
    scales: np.ndarray
    axes: tuple[int, ...]

    def taps(self, values: np.ndarray) -> np.ndarray:
        """Sums of values of the shape of `integers`, of each output channel (C,)."""
        others = tuple(axis for axis in range(values.ndim) if axis not in self.axes)
        return np.asarray(values.sum(others).reshape(-1))


def layer_of(unit: Unit, plan: QuantPlan) -> Layer:
    """The layer of a unit that has weights.

    Raises:
        PlanError: as for `weights.quantized`.
    """
    stored, scales = weights.quantized(unit, plan)
    integers = unit.as_constant(stored)
    return Layer(unit.name, integers, scales, weightonly.axes_of(unit.main, unit.weight_slot, integers.ndim) or (0,))


@dataclasses.dataclass(frozen=True)
class Product:
    """A layer at its place in a graph, where its input is there in 8 bits.

    Attributes:
        graph: the graph, to which ops are added.
        node: the op.
        layer: its weights.
        source: of its input.
        result: of what is made of it with its bias and its activation, where that is at once rounded.
        bias: float64 (C,), or (1,) where it has none.
        summand: what is added to it before, which is there in 8 bits, as reals and with its spec.
        bounds: of what the summand is added to, where that is clipped to their ends and not rounded.
    """

    graph: Graph
    node: Node
    layer: Layer
    source: QuantSpec
    result: QuantSpec | None
    bias: np.ndarray
    summand: tuple[Tensor, QuantSpec] | None = None
    bounds: QuantSpec | None = None

    def sums(self, bias: np.ndarray) -> Tensor:
        """The exact sums of products of integers, 0 standing for 0, and of an int64 bias (C,); rounded once, to float32."""
        stored = self.layer.integers
        most = _LARGEST_INPUT * int(self.layer.taps(np.abs(stored.astype(np.int64))).max(initial=0))
        dtype = tf.float32 if most < _MOST_EXACT else tf.float64
        x = self.steps(self.node.inputs[0], self.source)
        constant = self.constant(stored.astype(dtype.as_numpy_dtype))
        attrs = {**self.node.attrs, "T": dtype}
        total = self.graph.add(
            self.node.op,
            [self.cast(x, dtype), constant],
            name=f"{self.node.name}/sums",
            attrs=attrs,
            shapes=[self.node.out.shape],
            dtypes=[dtype],
        ).out
        if most + int(np.abs(bias).max(initial=0)) >= _MOST_EXACT:
            dtype = tf.float64
        total = self.op("AddV2", self.cast(total, dtype), self.constant(bias.astype(dtype.as_numpy_dtype)))
        # Integers stay as they are. Without that, grappler multiplies the weights by what follows, where the bias is 0.
        return self.op("Rint", self.cast(total, tf.float32))

    def steps(self, x: Tensor, spec: QuantSpec) -> Tensor:
        """Rounded reals as integers, 0 standing for 0."""
        return self.op("Rint", self.op("Mul", x, self.constant(1 / np.float32(spec.scale))))

    def stored(self, x: Tensor, spec: QuantSpec) -> Tensor:
        """Rounded reals as the integers that are stored, the zero point standing for 0."""
        stored = self.op("AddV2", self.steps(x, spec), self.constant(np.float32(spec.zero_point)))
        # Integers stay as they are. Without that, grappler adds the zero point last, and what is rounded before is another sum.
        return self.op("Rint", stored)

    def fused(self, x: Tensor, factor: np.ndarray | np.floating, addend: Tensor | np.floating) -> Tensor:
        """x * factor + addend in float32, rounded once: 53 bits hold the product."""
        added = addend if isinstance(addend, Tensor) else self.constant(addend)
        product = self.op("Mul", self.cast(x, tf.float64), self.constant(factor.astype(np.float64)))
        return self.cast(self.op("AddV2", product, self.cast(added, tf.float64)), tf.float32)

    def op(self, op: str, *inputs: Tensor) -> Tensor:
        """An op on values of one dtype, with the shape of the first."""
        shape, dtype = inputs[0].shape, inputs[0].dtype
        assert dtype is not None
        name = f"{self.node.name}/{op}"
        return self.graph.add(op, inputs, name=name, attrs={"T": dtype}, shapes=[shape], dtypes=[dtype]).out

    def constant(self, value: np.ndarray | np.floating) -> Tensor:
        return self.graph.constant(np.asarray(value), name=f"{self.node.name}/constant")

    def cast(self, value: Tensor, dtype: tf.DType) -> Tensor:
        """A value in another dtype."""
        if value.dtype == dtype:
            return value
        attrs = {"SrcT": value.dtype, "DstT": dtype, "Truncate": False}
        return self.graph.add(
            "Cast", [value], name=f"{self.node.name}/cast", attrs=attrs, shapes=[value.shape], dtypes=[dtype]
        ).out


Formula = Callable[[Product], Tensor]


def rescaled(product: Product) -> Tensor:
    """What XNNPACK and MLAS compute: with the bias in steps of the sums, which are multiplied by one float32, and rounded.

    In XNNPACK the factor is made in operators/convolution-nhwc.c (create_convolution2d_nhwc_qs8_qc8w), in ONNX Runtime in
    QLinearConv::Compute and MlasRequantizeOutput: (input scale * weight scale) / output scale; halves go to the even integer.
    """
    scale, scales = np.float32(product.source.scale), product.layer.scales
    sums = product.sums(_in_steps(product))
    if product.result is None or product.summand is not None:
        real = product.op("Mul", sums, product.constant(scale * scales))
        return real if product.summand is None else product.op("AddV2", real, product.summand[0])
    step = np.float32(product.result.scale)
    rounded = product.op("Rint", product.op("Mul", sums, product.constant(scale * scales / step)))
    return product.op("Mul", rounded, product.constant(step))


def _in_steps(product: Product) -> np.ndarray:
    """The bias in steps of the sums, int64."""
    step = float(np.float32(product.source.scale)) * product.layer.scales.astype(np.float64)
    return np.asarray(np.rint(product.bias / step).astype(np.int64))


def onednn(product: Product) -> Tensor:
    """What TensorFlow's oneDNN kernels compute: sums of stored integers as reals, with a float32 bias that holds the zero points.

    It is then multiplied by 1 / output scale and rounded, halves to the even integer. Each scale is what TensorFlow makes of a
    range (mkl_conv_ops.cc). In MobileNetV2 that gives all values of the kernels, where other orders of these steps do not.
    """
    source, layer, result = product.source, product.layer, product.result
    scales = _told(source.scale, source.limits[1]) * _told(layer.scales, _LARGEST_WEIGHT)
    taps = layer.taps(layer.integers.astype(np.int64))
    bias = product.bias + source.offset * taps * layer.scales.astype(np.float64)
    for spec, sign in ((result, -1), (product.summand[1] if product.summand is not None else None, 1)):
        bias = bias + (sign * spec.offset if spec is not None else 0.0)
    sums = product.op("Mul", product.sums(source.zero_point * taps), product.constant(scales))
    real = product.op("AddV2", sums, product.constant(bias.astype(np.float32)))
    if product.summand is not None:
        summand, spec = product.summand
        real = product.fused(product.stored(summand, spec), _told(spec.scale, spec.limits[1]), real)
    if result is None:
        return real
    step = _told(result.scale, result.limits[1])
    rounded = product.op("Rint", product.op("Mul", real, product.constant(1 / step)))
    if result.zero_point:
        rounded = product.op("Sub", rounded, product.constant(np.float32(result.zero_point)))
    return product.op("Mul", rounded, product.constant(np.float32(result.scale)))


def openvino(product: Product) -> Tensor:
    """What OpenVINO's CPU plugin computes: sums as reals, with a float32 bias, then x * factor + shift, rounded to even.

    Where a convolution adds what is there in 8 bits, its own result is clipped to its range and not rounded, and all is in steps
    of the other (low_precision_transformations/src/add.cpp, updateOptimizedFormula of intel_cpu/src/dnnl_postops_composer.cpp).
    In three networks that gives all of 60 million values of the kernels.
    """
    source, layer, result = product.source, product.layer, product.result
    scales = np.float32(source.scale) * layer.scales
    bias = _in_steps(product).astype(np.float32) * scales
    real = product.op(
        "AddV2", product.op("Mul", product.sums(np.zeros(1, np.int64)), product.constant(scales)), product.constant(bias)
    )
    unit = _ONE
    if product.summand is not None and product.bounds is not None:
        summand, spec = product.summand
        unit = np.float32(spec.scale)
        clipped = _clipped(product, real, product.bounds, spec)
        real = product.op("AddV2", clipped, product.stored(summand, spec))
    elif product.summand is not None:
        real = product.op("AddV2", real, product.summand[0])
    if result is None:
        return real if product.bounds is None else product.op("Mul", real, product.constant(unit))
    factor, shift = _mapped(result, unit)
    if result.zero_point:
        stored = product.op("Rint", product.fused(real, factor, shift))
        steps = product.op("Sub", stored, product.constant(np.float32(result.zero_point)))
    else:  # oneDNN is told 1 / factor, and divides by that
        steps = product.op("Rint", product.op("Mul", real, product.constant(1 / (1 / factor))))
    return product.op("Mul", steps, product.constant(np.float32(result.scale)))


def _mapped(spec: QuantSpec, unit: np.float32 = _ONE) -> tuple[np.float32, np.float32]:
    """(factor, shift) that make stored values of reals in a unit, as OpenVINO makes them of a FakeQuantize's ends."""
    levels = np.float32(spec.limits[1] - spec.limits[0])
    low, high = (np.float32(end - spec.zero_point) * np.float32(spec.scale) / unit for end in spec.limits)
    return levels / (high - low), (-low * levels) / (high - low)


def _clipped(product: Product, real: Tensor, own: QuantSpec, other: QuantSpec) -> Tensor:
    """Reals in steps of what is added to them, less its zero point, clipped to the ends of their own range."""
    levels = np.float32(own.limits[1] - own.limits[0])
    scale, step = np.float32(own.scale), np.float32(other.scale)
    point = np.float32(own.zero_point) + np.float32(other.zero_point) * step / scale
    least, most = ((np.float32(end) - point) * (scale / step) for end in own.limits)
    factor, shift = _mapped(own)
    ratio = (most - least) / levels
    moved = product.fused(real, factor * ratio, shift * ratio + least)
    ends = (product.constant(least), product.constant(levels * ratio + least))
    return product.op("Minimum", product.op("Maximum", moved, ends[0]), ends[1])


def _told(scale: np.ndarray | float, levels: int) -> np.ndarray:
    """A scale as a kernel makes it of the end of a range that it is told, float32."""
    return np.asarray((levels * np.asarray(scale, np.float64)).astype(np.float32) / np.float32(levels))


def of_onednn(graph: Graph, units: Mapping[Node, Unit], plan: QuantPlan) -> Graph:
    """The simulation of a static plan in the integers of oneDNN's kernels; the arguments are those of `fakequant.lower`."""
    floats = fakequant.lower(graph, units, plan)
    layers = [layer_of(unit, plan) for unit in units.values() if unit.weights is not None and unit.kernel.role == "compute"]
    return in_integers(floats, layers, fakequant.specs_in(floats, plan.tensors.values()), onednn)


def in_integers(
    graph: Graph, layers: Iterable[Layer], specs: Mapping[str, QuantSpec], formula: Formula, joins_sums: bool = False
) -> Graph:
    """A simulation whose layers compute with integers, where what they read is rounded.

    Args:
        graph: the simulation in floats, which stays as it is.
        layers: the layers; those that the graph does not have, or has with inputs in float, are left as they are.
        specs: by the names of the graph's fake quantizations.
        formula: what kernels make of a layer.
        joins_sums: the kernel of a convolution adds what its rounded result is added to, and does not round that: the fake
            quantizations in between go. `joined_sums` says which.

    Returns:
        A graph with the inputs and the outputs of `graph`, and fake quantizations of the same names.
    """
    result = graph.copy()
    kept = [layer for layer in layers if _is_in_8_bits(result.nodes.get(layer.name), specs)]
    joined = {entry.layer: entry for entry in joined_sums(result, kept, specs)} if joins_sums else {}
    for layer in kept:
        node = result.nodes[layer.name]
        source = mark_before(node.inputs[0])
        assert source is not None
        bias_add = bias_of(result, node)
        end = (node if bias_add is None else bias_add).out
        bias = np.zeros(1) if bias_add is None else np.asarray(bias_add.inputs[1].value, np.float64)
        bounds, summand = None, None
        if layer.name in joined:
            entry = joined[layer.name]
            add = result.nodes[entry.add]
            other = add.inputs[1 - entry.slot]
            end, bounds, summand = add.out, specs[entry.own], (other, specs[entry.other])
        else:
            end, summand = _with_summand(result, end, specs)
        behind = _mark_behind(result, end)
        rounded = None if behind is None else specs.get(behind.name)
        product = Product(result, node, layer, specs[source.name], rounded, bias, summand, bounds)
        result.replace(end, formula(product))
    result.prune()
    result.infer()
    return result


def _is_in_8_bits(node: Node | None, specs: Mapping[str, QuantSpec]) -> bool:
    """Whether a node is a layer that reads a rounded tensor and constant weights."""
    if node is None or node.op not in _LAYERS or node.attr("data_format", b"NHWC") not in ("NHWC", b"NHWC"):
        return False
    before = mark_before(node.inputs[0])
    return before is not None and before.name in specs and node.inputs[1].value is not None


@dataclasses.dataclass(frozen=True)
class JoinedSum:
    """A sum that the kernel of a convolution computes; all by their names.

    Attributes:
        layer: the convolution.
        own: the fake quantization of its result.
        add: the sum.
        slot: at which the sum reads that.
        other: the fake quantization of what is added.
    """

    layer: str
    own: str
    add: str
    slot: int
    other: str


def joined_sums(graph: Graph, layers: Iterable[Layer], specs: Mapping[str, QuantSpec]) -> Iterator[JoinedSum]:
    """The sums that OpenVINO's convolutions compute: of two rounded tensors, one of which the kernel may write its result upon.

    That is (FuseConvolutionSumAndConvolutionSumActivation of graph_optimizer.cpp): nobody else reads the convolution's result,
    all else that reads the other is in front of the sum, the convolution does not read the other, and a range is behind the sum.
    Of two convolutions it is the first.
    """
    nodes = [graph.nodes.get(layer.name) for layer in layers]
    convolutions = {node for node in nodes if node is not None and node.op != "MatMul" and _is_in_8_bits(node, specs)}
    for add in graph.order():
        if add.op not in _SUMS or add.inputs[0].shape != add.inputs[1].shape or _mark_behind(graph, add.out, _CLAMPS) is None:
            continue
        before = _in_front(add)
        for slot, tensor in enumerate(reversed(add.inputs)):
            own, other = add.inputs[slot].node, mark_before(tensor)
            if own.op not in FAKE_QUANT or other is None or own.name not in specs or other.name not in specs:
                continue
            layer = _made_by(graph, own, specs[own.name])
            if layer is None or layer not in convolutions or len(graph.users(own.out)) != 1:
                continue
            is_free = not graph.is_output(tensor) and all(user is add or user in before for user, _ in graph.users(tensor))
            if is_free and _unpadded(layer.inputs[0]) != tensor:
                yield JoinedSum(layer.name, own.name, add.name, slot, other.name)
                break


def _made_by(graph: Graph, mark: Node, spec: QuantSpec) -> Node | None:
    """The layer whose result, clamped at most by what the range of the fake quantization does itself, this alone rounds."""
    tensor = mark.inputs[0]
    while len(graph.users(tensor)) == 1 and not graph.is_output(tensor):
        node = tensor.node
        if node.op in _CLAMPS:
            if spec.low < 0 or (node.op == "Relu6" and spec.high > _SIX):
                return None
        elif node.op != "BiasAdd":
            return node if node.op in _LAYERS else None
        tensor = node.inputs[0]
    return None


def _unpadded(tensor: Tensor) -> Tensor:
    return tensor.node.inputs[0] if tensor.node.op == "Pad" else tensor


def _in_front(node: Node) -> set[Node]:
    """What a node is computed from."""
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        waiting += [tensor.node for tensor in waiting.pop().inputs if tensor.node not in found]
        found.update(waiting)
    return found


def mark_before(tensor: Tensor) -> Node | None:
    """The fake quantization whose values, moved, a tensor holds."""
    while tensor.node.op in _MOVES:
        tensor = tensor.node.inputs[0]
    return tensor.node if tensor.node.op in FAKE_QUANT else None


def _with_summand(graph: Graph, tensor: Tensor, specs: Mapping[str, QuantSpec]) -> tuple[Tensor, tuple[Tensor, QuantSpec] | None]:
    """A tensor with what alone is added to it, if that is there in 8 bits; and that."""
    users = graph.users(tensor)
    if len(users) == 1 and not graph.is_output(tensor) and users[0][0].op in _SUMS:
        ((add, slot),) = users
        other = add.inputs[1 - slot]
        mark = mark_before(other)
        if mark is not None and mark.name in specs and other.shape == tensor.shape:
            return add.out, (other, specs[mark.name])
    return tensor, None


def _mark_behind(graph: Graph, tensor: Tensor, through: Collection[str] = _MOVES | _CLAMPS) -> Node | None:
    """The fake quantization that alone rounds a tensor, once it was moved and clamped by ops of these types."""
    while True:
        users = graph.users(tensor)
        if len(users) != 1 or graph.is_output(tensor):
            return None
        ((user, _),) = users
        if user.op in FAKE_QUANT:
            return user
        if user.op not in through:
            return None
        tensor = user.out
