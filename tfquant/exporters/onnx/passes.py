"""What markers stand for, written as QuantizeLinear and DequantizeLinear in the patterns that runtimes fuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from tfquant.errors import ModelError
from tfquant.exporters.marking import Weights
from tfquant.exporters.onnx.converter import ACTIVATION, LAYOUT, NUMBER, composed
from tfquant.exporters.onnx.graph import OnnxGraph
from tfquant.plan.spec import S8, U8, QuantSpec

_LAYERS = ("Conv", "Gemm")
_POOLS = ("AveragePool", "GlobalAveragePool")
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
# Of uint8, and what it is in the middle of them: symmetric tensors are stored so, for x86 multiplies uint8 by int8.
_LEVELS, _MIDDLE = 255, 128
_NEARLY_1 = float(np.nextafter(np.float32(1), np.float32(2)))


@dataclasses.dataclass(frozen=True)
class Mark:
    """A tensor that is stored in 8 bits.

    Attributes:
        name: of its fake quantization in the marked graph.
        tensor: what it rounds.
        spec: how.
    """

    name: str
    tensor: str
    spec: QuantSpec

    @property
    def scale(self) -> float:
        """Of the uint8 that ONNX has: OpenVINO takes what has the scale 1 for no quantized tensor, and its readers stay float."""
        return _NEARLY_1 if self.spec.scale == 1 else self.spec.scale

    @property
    def zero_point(self) -> int:
        """Of the uint8 that ONNX has."""
        return _MIDDLE if self.spec.dtype == S8 else self.spec.zero_point

    @property
    def stored(self) -> QuantSpec:
        """The uint8 that ONNX has."""
        return dataclasses.replace(self.spec, dtype=U8, scale=self.scale, zero_point=self.zero_point)


# -- weights ---------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class _Stored:
    """Weights in the layout of their reader.

    Attributes:
        integers: int8.
        channels: of the same shape, which of the scales is that of a value.
    """

    integers: np.ndarray
    channels: np.ndarray

    @property
    def axes(self) -> list[int]:
        """Along which the scale changes."""
        moved = ((axis, np.take(self.channels, [0], axis)) for axis in range(self.channels.ndim))
        return [axis for axis, first in moved if self.channels.size and (self.channels != first).any()]


def write_weights(graph: OnnxGraph, weights: Sequence[Weights], inputs: Mapping[str, int]) -> None:
    """Weights as int8 constants in the layout of their readers, each behind a DequantizeLinear.

    Args:
        graph: the model.
        weights: all of them.
        inputs: of the model, which go: name to which weights they stand for.

    Raises:
        ModelError: some were lost on the way.
    """
    readers = graph.readers()
    found: set[int] = set()
    for name, number in inputs.items():
        entry = weights[number]
        shape = [size if axis in entry.axes else 1 for axis, size in enumerate(entry.value.shape)]
        channels = np.broadcast_to(np.arange(len(entry.scales), dtype=np.int32).reshape(shape), entry.value.shape)
        _write(graph, readers, name, _Stored(entry.integers, channels), entry, found, number)
    graph.drop_inputs(inputs)
    for number, entry in enumerate(weights):
        if number not in found:
            raise ModelError(f"tf2onnx lost the weights of {entry.name} ({entry.op}), which the plan has in 8 bits.")


def _write(
    graph: OnnxGraph,
    readers: Mapping[str, list[tuple[onnx.NodeProto, int]]],
    name: str,
    stored: _Stored,
    entry: Weights,
    found: set[int],
    number: int,
) -> None:
    whole = ""
    for node, slot in readers.get(name, ()):
        moved = _moved(graph, node, slot, stored)
        if moved is not None:
            _write(graph, readers, node.output[0], moved, entry, found, number)
            graph.remove(node)
            continue
        found.add(number)
        if node.op_type == "Gather" and slot == 0 and stored.axes in ([], [0]) and _axis(node) == 0:
            _look_up(graph, node, stored, entry)
            continue
        whole = whole or _dequantized(graph, stored, entry, has_zeros=node.op_type != "Conv")
        if slot < 0:
            raise ModelError(f"The weights of {entry.name} ({entry.op}) are read within a loop or are an output of the model.")
        node.input[slot] = whole


def _axis(node: onnx.NodeProto) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "axis"), 0)


def _moved(graph: OnnxGraph, node: onnx.NodeProto, slot: int, stored: _Stored) -> _Stored | None:
    """What an op that moves values makes of weights; None for other ops."""
    if slot != 0 or len(node.output) != 1:
        return None
    attrs = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    rank = stored.integers.ndim
    if node.op_type == "Identity":
        return stored
    if node.op_type == "Transpose":
        permutation = attrs.get("perm") or range(rank)[::-1]
        return _Stored(stored.integers.transpose(permutation), stored.channels.transpose(permutation))
    shape = graph.value(node.input[1]) if len(node.input) > 1 else None
    if node.op_type == "Reshape" and shape is not None and not attrs.get("allowzero"):
        target = [stored.integers.shape[axis] if size == 0 else int(size) for axis, size in enumerate(shape)]
    elif node.op_type == "Unsqueeze" and shape is not None:
        target = list(np.expand_dims(stored.integers, tuple(int(axis) for axis in shape)).shape)
    elif node.op_type == "Squeeze":
        axes = None if shape is None else tuple(int(axis) for axis in shape)
        target = list(np.squeeze(stored.integers, axes).shape)
    else:
        return None
    return _Stored(stored.integers.reshape(target), stored.channels.reshape(target))


def _dequantized(graph: OnnxGraph, stored: _Stored, entry: Weights, has_zeros: bool) -> str:
    """`has_zeros`: the zero points are spelled out, without which ONNX Runtime fuses convolutions alone."""
    integers = graph.constant(stored.integers, f"{entry.name}/weights")
    name, axes = f"{entry.name}/weights", stored.axes
    if len(axes) > 1:  # no DequantizeLinear has scales along two axes
        shape = [slice(None) if axis in axes else slice(0, 1) for axis in range(stored.channels.ndim)]
        scales = graph.constant(entry.scales[stored.channels[tuple(shape)]], f"{entry.name}/weight_scales")
        return _scaled(graph, integers, scales, name)
    first = tuple(slice(None) if axis in axes else 0 for axis in range(stored.channels.ndim))
    scales = graph.constant(entry.scales[stored.channels[first]], f"{entry.name}/weight_scales")
    inputs = [integers, scales]
    if has_zeros:
        inputs.append(graph.constant(np.zeros(entry.scales[stored.channels[first]].shape, np.int8), f"{entry.name}/weight_zeros"))
    return graph.add("DequantizeLinear", inputs, name, {"axis": axes[0]} if axes else {})


def _look_up(graph: OnnxGraph, node: onnx.NodeProto, stored: _Stored, entry: Weights) -> None:
    """Rows are looked up in 8 bits: a DequantizeLinear in front would make floats of the whole table."""
    integers = graph.constant(stored.integers, f"{entry.name}/weights")
    columns = (slice(None), *(slice(0, 1) for _ in range(stored.channels.ndim - 1)))
    scales = graph.constant(entry.scales[stored.channels[columns]], f"{entry.name}/weight_scales")
    rows = [graph.add("Gather", [table, node.input[1]], f"{entry.name}/rows", {"axis": 0}) for table in (integers, scales)]
    _scaled(graph, rows[0], rows[1], f"{entry.name}/floats", node.output[0])
    graph.remove(node)


def _scaled(graph: OnnxGraph, integers: str, scales: str, name: str, output: str | None = None) -> str:
    floats = graph.add("Cast", [integers], f"{name}/integers", {"to": onnx.TensorProto.FLOAT})
    return graph.add("Mul", [floats, scales], name, output=output)


# -- activations -----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Place:
    """Where a model holds the 8-bit values of a tensor.

    Attributes:
        mark: what they stand for.
        tensor: name of the uint8 tensor.
        layout: the permutation that turns it to the tensor of the marked graph; None where they are alike.
    """

    mark: Mark
    tensor: str
    layout: tuple[int, ...] | None

    def floats(self, stored: np.ndarray) -> np.ndarray:
        """The float32 values, as in the marked graph, of what is stored."""
        values = ((stored.astype(np.int32) - self.mark.zero_point) * np.float64(self.mark.scale)).astype(np.float32)
        return values if self.layout is None else values.transpose(self.layout)


def turn_before_rounding(graph: OnnxGraph) -> int:
    """Transposes behind a marker, of which they are the only readers, come in front of it."""
    readers = graph.readers()
    moved = 0
    for marker in graph.of_type(ACTIVATION):
        users = readers[marker.output[0]]
        if len(users) != 1 or users[0][0].op_type != "Transpose":
            continue
        transpose = users[0][0]
        behind = readers[transpose.output[0]]
        if any(slot < 0 for _, slot in behind):
            continue
        for reader, slot in behind:
            reader.input[slot] = marker.output[0]
        transpose.input[0], marker.input[0] = marker.input[0], transpose.output[0]
        inverse = np.argsort(onnx.helper.get_node_attr_value(transpose, "perm")).tolist()
        _set_layout(marker, composed(inverse, _layout(marker)))
        moved += 1
    return moved


def round_pools(graph: OnnxGraph) -> int:
    """Markers behind the reshape of an average come in front of it, where runtimes fuse them with the pooling."""
    readers, makers = graph.readers(), graph.makers()
    moved = 0
    for marker in graph.of_type(ACTIVATION):
        reshape = makers.get(marker.input[0])
        if reshape is None or reshape.op_type not in ("Reshape", "Squeeze", "Flatten"):
            continue
        pool = makers.get(reshape.input[0])
        if pool is None or pool.op_type not in _POOLS or any(len(readers[node.output[0]]) != 1 for node in (pool, reshape)):
            continue
        behind, layout = readers[marker.output[0]], _layout(marker)
        if any(slot < 0 for _, slot in behind) or (layout is not None and layout != sorted(layout)):
            continue
        _set_layout(marker, None)
        for reader, slot in behind:
            reader.input[slot] = reshape.output[0]
        marker.input[0], reshape.input[0] = pool.output[0], marker.output[0]
        moved += 1
    return moved


def pool_globally(graph: OnnxGraph, shapes: Mapping[str, Sequence[int]]) -> int:
    """Averages over whole images become the op that says so."""
    found = 0
    for node in graph.of_type("AveragePool"):
        attrs = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        size = [*shapes.get(node.input[0], ())][2:]
        if (
            size
            and size == attrs["kernel_shape"]
            and not any(attrs.get("pads", ()))
            and attrs.get("auto_pad", b"") != b"SAME_UPPER"
        ):
            node.op_type = "GlobalAveragePool"
            del node.attribute[:]
            found += 1
    return found


def _layout(marker: onnx.NodeProto) -> list[int] | None:
    return next((list(attribute.ints) for attribute in marker.attribute if attribute.name == LAYOUT), None)


def _set_layout(marker: onnx.NodeProto, layout: list[int] | None) -> None:
    for attribute in [attribute for attribute in marker.attribute if attribute.name == LAYOUT]:
        marker.attribute.remove(attribute)
    if layout is not None:
        marker.attribute.append(onnx.helper.make_attribute(LAYOUT, layout))


def write_activations(graph: OnnxGraph, marks: Sequence[Mark]) -> list[Place]:
    """A QuantizeLinear and a DequantizeLinear in the place of each marker; where they are, before `OnnxGraph.finish`."""
    readers = graph.readers()
    found = []
    for marker in graph.of_type(ACTIVATION):
        mark = marks[int(onnx.helper.get_node_attr_value(marker, NUMBER))]
        scale = graph.constant(np.array(mark.scale, np.float32), f"{mark.tensor}/scale")
        zero_point = graph.constant(np.array(mark.zero_point, np.uint8), f"{mark.tensor}/zero_point")
        graph.remove(marker)
        stored = graph.add("QuantizeLinear", [marker.input[0], scale, zero_point], f"{mark.tensor}/quantized")
        users = readers[marker.output[0]]
        output = marker.output[0] if any(slot < 0 for _, slot in users) else None
        floats = graph.add("DequantizeLinear", [stored, scale, zero_point], f"{mark.tensor}/dequantized", output=output)
        for reader, slot in users:
            if slot >= 0:
                reader.input[slot] = floats
        layout = _layout(marker)
        found.append(Place(mark, stored, None if layout is None else tuple(layout)))
    return found


def drop_activation_functions(graph: OnnxGraph) -> int:
    """Takes out what clips where the quantization behind it does: Relu, and Clip as wide as the range or wider."""
    readers, makers = graph.readers(), graph.makers()
    dropped = 0
    for quantize in graph.of_type("QuantizeLinear"):
        node = makers.get(quantize.input[0])
        if node is None or node.op_type not in ("Relu", "Clip") or len(readers[node.output[0]]) > 1:
            continue
        scale, zero_point = (graph.value(name) for name in quantize.input[1:3])
        assert scale is not None and zero_point is not None
        ends = _ends(graph, node)
        if ends is None or np.rint(ends[0] / float(scale)) + zero_point > 0:
            continue
        if np.rint(ends[1] / float(scale)) + zero_point >= _LEVELS:
            quantize.input[0] = node.input[0]
            graph.remove(node)
            dropped += 1
    return dropped


def _ends(graph: OnnxGraph, node: onnx.NodeProto) -> tuple[float, float] | None:
    """Between which values a Relu or Clip leaves its input as it is."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    ends = [-np.inf, np.inf]
    for slot, name in enumerate(node.input[1:]):
        if name:
            value = graph.value(name)
            if value is None:
                return None
            ends[slot] = float(value)
    return ends[0], ends[1]


# -- paddings --------------------------------------------------------------------------------------------------------------
def spell_paddings(graph: OnnxGraph) -> int:
    """Convolutions of images of any size, without strides, say how they pad: ONNX Runtime finds that for no dilated one."""
    spelled = 0
    for conv in graph.of_type("Conv"):
        attrs = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in conv.attribute}
        if attrs.get("auto_pad") != b"SAME_UPPER" or any(stride != 1 for stride in attrs.get("strides", ())):
            continue
        dilations = attrs.get("dilations", [1] * len(attrs["kernel_shape"]))
        total = [dilation * (size - 1) for dilation, size in zip(dilations, attrs["kernel_shape"], strict=True)]
        pads = [*(size // 2 for size in total), *(size - size // 2 for size in total)]
        kept = [attribute for attribute in conv.attribute if attribute.name not in ("auto_pad", "pads")]
        del conv.attribute[:]
        conv.attribute.extend([*kept, onnx.helper.make_attribute("pads", pads)])
        spelled += 1
    return spelled


def join_paddings(graph: OnnxGraph) -> int:
    """Zeros that a Pad puts around images become the padding of the convolution that reads them."""
    makers = graph.makers()
    joined = 0
    for conv in graph.of_type("Conv"):
        pad = makers.get(conv.input[0])
        if pad is None or pad.op_type != "Pad":
            continue
        before = _zeros(graph, pad)
        attrs = {attribute.name: attribute for attribute in conv.attribute}
        if before is None or ("auto_pad" in attrs and attrs["auto_pad"].s != b"NOTSET"):
            continue
        start, end = before[: len(before) // 2], before[len(before) // 2 :]
        if any((*start[:2], *end[:2])) or min(before) < 0:
            continue
        added = [*start[2:], *end[2:]]
        own = list(attrs["pads"].ints) if "pads" in attrs else [0] * len(added)
        if "pads" in attrs:
            conv.attribute.remove(attrs["pads"])
        conv.attribute.append(onnx.helper.make_attribute("pads", [one + other for one, other in zip(own, added, strict=True)]))
        conv.input[0] = pad.input[0]
        joined += 1
    return joined


def _zeros(graph: OnnxGraph, pad: onnx.NodeProto) -> list[int] | None:
    """How many zeros a Pad puts before and behind each axis; None where it does other things."""
    mode = next((attribute.s for attribute in pad.attribute if attribute.name == "mode"), b"constant")
    value = graph.value(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.zeros(())
    pads = graph.value(pad.input[1])
    if mode != b"constant" or pads is None or value is None or value.any() or len(pad.input) > 3:
        return None
    return [int(size) for size in pads]


# -- biases ----------------------------------------------------------------------------------------------------------------
def join_biases(graph: OnnxGraph, shapes: Mapping[str, Sequence[int]]) -> int:
    """A MatMul of matrices and the constant added to its result become a Gemm, which has a bias.

    Args:
        shapes: of the tensors whose rank is known.
    """
    readers = graph.readers()
    joined = 0
    for matmul in graph.of_type("MatMul"):
        users = readers[matmul.output[0]]
        if len(users) != 1 or users[0][0].op_type != "Add" or len(shapes.get(matmul.output[0], ())) != 2:
            continue
        add, slot = users[0]
        bias = graph.value(add.input[1 - slot])
        if bias is None or bias.ndim != 1:
            continue
        output, constant = add.output[0], add.input[1 - slot]
        graph.remove(matmul)
        graph.remove(add)
        graph.add("Gemm", [*matmul.input, constant], matmul.output[0], output=output)
        joined += 1
    return joined


def write_biases(graph: OnnxGraph) -> int:
    """Biases of layers whose input and weights are quantized become int32, in steps of the accumulators."""
    makers = graph.makers()
    written = 0
    for node in graph.of_type(*_LAYERS):
        if len(node.input) < 3 or any(attribute.name in ("alpha", "beta") and attribute.f != 1 for attribute in node.attribute):
            continue
        bias = graph.value(node.input[2])
        scales = [_scale(graph, _dequantizer(makers, node.input[0])), _scale(graph, makers.get(node.input[1]))]
        if bias is None or scales[0] is None or scales[1] is None or scales[0].ndim or scales[1].size not in (1, bias.size):
            continue
        step = (scales[0] * scales[1]).astype(np.float32)
        integers = np.rint(bias.astype(np.float64).reshape(-1) / step.astype(np.float64))
        if not step.all() or np.abs(integers).max(initial=0) > np.iinfo(np.int32).max:
            continue
        name = f"{node.output[0]}/bias"
        stored = graph.constant(integers.astype(np.int32), f"{name}/integers")
        step_name = graph.constant(np.broadcast_to(step, bias.shape) if step.ndim else step, f"{name}/scales")
        node.input[2] = graph.add("DequantizeLinear", [stored, step_name], name, {"axis": 0} if step.ndim else {})
        written += 1
    return written


def _dequantizer(makers: Mapping[str, onnx.NodeProto], name: str) -> onnx.NodeProto | None:
    """The DequantizeLinear that a tensor comes from, moved about at most."""
    node = makers.get(name)
    while node is not None and node.op_type in _MOVES:
        node = makers.get(node.input[0])
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _scale(graph: OnnxGraph, node: onnx.NodeProto | None) -> np.ndarray | None:
    """The scales of a DequantizeLinear."""
    return graph.value(node.input[1]) if node is not None and node.op_type == "DequantizeLinear" else None


# -- weights of layers that compute in float --------------------------------------------------------------------------------
def unpack_weights(graph: OnnxGraph) -> int:
    """Weights of layers whose other side is no 8-bit tensor are made float by Cast and Mul, which runtimes do once.

    A DequantizeLinear they keep and run at each call: MobileNetV2 with 8-bit weights took 29 ms in ONNX Runtime and 67 ms in
    OpenVINO so, and 24 and 8 ms this way.
    """
    makers, readers = graph.makers(), graph.readers()
    unpacked = 0
    for node in graph.of_type("DequantizeLinear"):
        integers, scales = graph.value(node.input[0]), graph.value(node.input[1])
        if integers is None or integers.dtype != np.int8 or scales is None:
            continue
        users = readers.get(node.output[0], [])
        if any(reader.op_type in (*_LAYERS, "MatMul") and _dequantizer(makers, reader.input[0]) for reader, _ in users):
            continue
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        shape = [-1 if scales.ndim and axis == own else 1 for own in range(integers.ndim)]
        factors = graph.constant(scales.reshape(shape), f"{node.input[1]}/factors")
        graph.remove(node)
        _scaled(graph, node.input[0], factors, f"{node.output[0]}/unpacked", node.output[0])
        unpacked += 1
    return unpacked


def keep_in_float(graph: OnnxGraph) -> int:
    """Layers with float weights between 8-bit tensors keep these.

    ONNX Runtime would store them in 8 bits of its own choice; a LeakyRelu that changes nothing keeps it from that, and is fused
    into the layer.
    """
    makers, readers = graph.makers(), graph.readers()
    kept = 0
    for node in graph.of_type(*_LAYERS, "ConvTranspose"):
        weights = makers.get(node.input[1])
        is_stored = weights is not None and weights.op_type == "DequantizeLinear"
        users = readers[node.output[0]]
        if is_stored or _dequantizer(makers, node.input[0]) is None or any(slot < 0 for _, slot in users):
            continue
        same = graph.add("LeakyRelu", [node.output[0]], f"{node.output[0]}/float", {"alpha": 1.0})
        for reader, slot in users:
            reader.input[slot] = same
        kept += 1
    return kept


# -- ranges that are found at each call --------------------------------------------------------------------------------------
def write_dynamic(graph: OnnxGraph) -> int:
    """Products with int8 weights read their other side in 8 bits, with the range that it has in the call.

    ONNX Runtime fuses DynamicQuantizeLinear, MatMulInteger and what scales the result to one kernel.
    """
    makers = graph.makers()
    written = 0
    for matmul in graph.of_type("MatMul"):
        weights = makers.get(matmul.input[1])
        scales = _scale(graph, weights)
        if weights is None or scales is None:
            continue
        integers = graph.value(weights.input[0])
        axis = next((attribute.i for attribute in weights.attribute if attribute.name == "axis"), 1)
        if integers is None or integers.ndim != 2 or (scales.ndim and axis != 1):
            continue
        name = matmul.output[0]
        stored, scale, zero_point = (f"{name}/{part}" for part in ("quantized", "scale", "zero_point"))
        graph.add_many("DynamicQuantizeLinear", [matmul.input[0]], [stored, scale, zero_point], name)
        inputs = [stored, weights.input[0], zero_point]
        sums = graph.add("MatMulInteger", inputs, f"{name}/sums")
        floats = graph.add("Cast", [sums], f"{name}/floats", {"to": onnx.TensorProto.FLOAT})
        factors = graph.add("Mul", [scale, weights.input[1]], f"{name}/factors")
        graph.remove(matmul)
        graph.add("Mul", [floats, factors], name, output=name)
        written += 1
    return written
