"""The simulation in integers: the sums of layers are exact, and what is rounded is what kernels round, in their order.

The simulation in floats adds up products of real values, each of which is rounded to 24 bits. Where a sum lies about halfway
between two steps, it becomes another integer than in the kernels: one in 4,000 values of a first layer. Each of these changes
many of the next layer, and after 50 layers nearly all. Integers are exact in float32 up to 2^24, in float64 as far as is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

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
    """

    graph: Graph
    node: Node
    layer: Layer
    source: QuantSpec
    result: QuantSpec | None
    bias: np.ndarray
    summand: tuple[Tensor, QuantSpec] | None = None

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
    bias = np.rint(product.bias / (float(scale) * scales.astype(np.float64))).astype(np.int64)
    sums = product.sums(bias=bias)
    if product.result is None or product.summand is not None:
        real = product.op("Mul", sums, product.constant(scale * scales))
        return real if product.summand is None else product.op("AddV2", real, product.summand[0])
    step = np.float32(product.result.scale)
    rounded = product.op("Rint", product.op("Mul", sums, product.constant(scale * scales / step)))
    return product.op("Mul", rounded, product.constant(step))


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
        stored = product.op("AddV2", product.steps(summand, spec), product.constant(np.float32(spec.zero_point)))
        # A fused multiply-add, which rounds once: 53 bits hold the product.
        factor = product.constant(_told(spec.scale, spec.limits[1]).astype(np.float64))
        added = product.op("Mul", product.cast(stored, tf.float64), factor)
        real = product.cast(product.op("AddV2", product.cast(real, tf.float64), added), tf.float32)
    if result is None:
        return real
    step = _told(result.scale, result.limits[1])
    rounded = product.op("Rint", product.op("Mul", real, product.constant(1 / step)))
    if result.zero_point:
        rounded = product.op("Sub", rounded, product.constant(np.float32(result.zero_point)))
    return product.op("Mul", rounded, product.constant(np.float32(result.scale)))


def _told(scale: np.ndarray | float, levels: int) -> np.ndarray:
    """A scale as a kernel makes it of the end of a range that it is told, float32."""
    return np.asarray((levels * np.asarray(scale, np.float64)).astype(np.float32) / np.float32(levels))


def of_onednn(graph: Graph, units: Mapping[Node, Unit], plan: QuantPlan) -> Graph:
    """The simulation of a static plan in the integers of oneDNN's kernels; the arguments are those of `fakequant.lower`."""
    floats = fakequant.lower(graph, units, plan)
    layers = [layer_of(unit, plan) for unit in units.values() if unit.weights is not None and unit.kernel.role == "compute"]
    return in_integers(floats, layers, fakequant.specs_in(floats, plan.tensors.values()), onednn)


def in_integers(graph: Graph, layers: Iterable[Layer], specs: Mapping[str, QuantSpec], formula: Formula) -> Graph:
    """A simulation whose layers compute with integers, where what they read is rounded.

    Args:
        graph: the simulation in floats, which stays as it is.
        layers: the layers; those that the graph does not have, or has with inputs in float, are left as they are.
        specs: by the names of the graph's fake quantizations.
        formula: what kernels make of a layer.

    Returns:
        A graph with the inputs and the outputs of `graph`, and fake quantizations of the same names.
    """
    result = graph.copy()
    for layer in layers:
        node = result.nodes.get(layer.name)
        if node is None or node.op not in _LAYERS or node.attr("data_format", b"NHWC") not in ("NHWC", b"NHWC"):
            continue
        before = mark_before(node.inputs[0])
        if before is None or node.inputs[1].value is None or before.name not in specs:
            continue
        bias_add = bias_of(result, node)
        end = (node if bias_add is None else bias_add).out
        bias = np.zeros(1) if bias_add is None else np.asarray(bias_add.inputs[1].value, np.float64)
        end, summand = _with_summand(result, end, specs)
        behind = _mark_behind(result, end)
        rounded = None if behind is None else specs.get(behind.name)
        result.replace(end, formula(Product(result, node, layer, specs[before.name], rounded, bias, summand)))
    result.prune()
    result.infer()
    return result


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


def _mark_behind(graph: Graph, tensor: Tensor) -> Node | None:
    """The fake quantization that alone rounds a tensor, once it was moved and clamped."""
    while True:
        users = graph.users(tensor)
        if len(users) != 1 or graph.is_output(tensor):
            return None
        ((user, _),) = users
        if user.op in FAKE_QUANT:
            return user
        if user.op not in _MOVES and user.op not in _CLAMPS:
            return None
        tensor = user.out
