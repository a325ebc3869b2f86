"""A float TFLite model with marks becomes a quantized one.

The converter writes a fake quantization as QUANTIZE and DEQUANTIZE of a float tensor. An op whose operands and results are marked
so is made to compute in 8 (or 16) bits, by the rules of `kernels`; the others stay float, with conversions around them.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tfquant.errors import ConfigError
from tfquant.exporters.marking import Weights
from tfquant.exporters.tflite.flatbuffer import Model, Quantization, schema, set_quantization
from tfquant.exporters.tflite.forms import MOVES, RATIOS, Forms, Spec, known
from tfquant.exporters.tflite.kernels import RULES, Rule
from tfquant.plan.spec import QuantSpec

# A bias in steps of the accumulators. The plan's scales keep it to half of an int32 and little more (corrections come later), and
# a quarter is left for the products; of an int64, kernels take 48 bits.
_MOST_BIAS = {8: 1.5 * 2.0**30, 16: 2.0**38}
_MOST_KNOWN16 = 2.0  # the scale up to which the table of a function of 16 bits is entered without an overflow


@dataclasses.dataclass(frozen=True)
class Options:
    """How a model is quantized.

    Attributes:
        activations: "int8", "int16", or "float32": weights alone.
        input_type: dtype of the inputs: "float32", "int8", "uint8" or "int16".
        output_type: likewise of the outputs.
        hybrid: with activations "float32": kernels quantize them at each call; else weights become float at loading.
    """

    activations: str = "int8"
    input_type: str = "float32"
    output_type: str = "float32"
    hybrid: bool = False


@dataclasses.dataclass(frozen=True)
class Converted:
    """A TFLite model.

    Attributes:
        content: the file.
        ops: how many ops compute in 8 or 16 bits.
        float_ops: type and result of each op that computes in float.
        tensors: name of a mark to the index of the tensor that holds its integers, in the first graph.
        wide: names of marks that have 16 bits where the others have 8.
    """

    content: bytes
    ops: int
    float_ops: tuple[tuple[str, str], ...]
    tensors: Mapping[str, int]
    wide: frozenset[str] = frozenset()


def quantize(content: bytes, weights: Sequence[Weights], specs: Mapping[str, QuantSpec], options: Options) -> Converted:
    """Makes what is marked compute in 8 or 16 bits.

    Args:
        content: what `convert` made of a marked graph.
        weights: that the marked graph holds.
        specs: of its marks, by their names.
        options: the kind of model.

    Raises:
        ConfigError: an input or output shall be an integer and has no 8-bit form.
    """
    model, stored = Model(content), _by_value(weights)
    parts = []
    for index in model.signature_graphs():
        model.take(index)
        parts.append(_Quantizer(model, stored, specs, options).run())
    model.take(0)
    held = {mark: model.tensor(index) for mark, index in parts[0].held.items()}
    model.root.metadata = None  # which runtime the marked model would need, and how that was converted
    content = model.pack()  # which numbers tensors anew
    model.take(0)
    position = {id(tensor): index for index, tensor in enumerate(model.graph.tensors)}
    return Converted(
        content=content,
        ops=sum(part.count for part in parts),
        float_ops=tuple(op for part in parts for op in part.left),
        tensors={mark: position[id(tensor)] for mark, tensor in held.items() if id(tensor) in position},
        wide=_wide(parts),
    )


def _wide(parts: Sequence[_Quantizer]) -> frozenset[str]:
    """Names of wide marks; where graphs differ the first counts, which is the one whose tensors are compared."""
    by_mark: dict[str, bool] = {}
    for part in reversed(parts):
        by_mark |= part.wide
    return frozenset(mark for mark, is_wide in by_mark.items() if is_wide)


_BYTES = Spec(1.0, -128)  # of a pixel as int8


class _Quantizer:
    """Quantizes the subgraph at hand.

    Attributes:
        count: of ops that compute in 8 or 16 bits.
        left: type and result of those that compute in float.
        held: names of marks to the tensors that hold their integers.
        wide: names of marks to whether they have 16 bits where the others have 8.
    """

    def __init__(self, model: Model, stored: Mapping[bytes, _Stored], specs: Mapping[str, QuantSpec], options: Options) -> None:
        self._model, self._options = model, options
        self._is16 = options.activations == "int16"
        self._forms = Forms(model, self._is16, specs)
        self._stored = stored
        self.count, self.left = 0, list[tuple[str, str]]()
        self._dtype = np.dtype(options.activations if self._is16 else "int8")
        self.held: Mapping[str, int] = {}
        self.wide: Mapping[str, bool] = {}

    def run(self) -> _Quantizer:
        model, graph = self._model, self._model.graph
        ops = self._forms.take_marks(graph.operators)
        if self._options.activations == "int8" and self._options.output_type == "float32":
            self._forms.widen(ops)
        self._take_inputs()
        for op in ops:
            if model.name_of(op) == "AVERAGE_POOL_2D" and int(op.outputs[0]) in self._forms.wanted:
                self._spell_mean(op)
            if self._take_bytes(op):
                continue
            rule = RULES.get(model.name_of(op))
            if self._options.activations == "float32" or rule is None or not self._in_integers(op, rule):
                self._in_float(op)
        self._give_outputs()
        graph.operators = self._forms.finish()
        self.held, self.wide = self._forms.held(), self._forms.marked_wide()
        return self

    # -- ops ----------------------------------------------------------------------------------------------------------------
    def _in_float(self, op: Any) -> None:
        model = self._model
        name = model.name_of(op)
        rule = RULES.get(name)
        op.inputs = [index if index < 0 else self._forms.real(int(index)) for index in op.inputs]
        for slot, index in enumerate(op.inputs):
            stored = self._stored_at(index) if index >= 0 else None
            if stored is not None:
                is_hybrid = self._options.hybrid and rule is not None and rule.kind == "layer" and slot == rule.weights
                op.inputs[slot] = self._constant_weights(index, stored, is_hybrid)
                if is_hybrid:
                    _quantize_inputs(op)
        if any(model.dtype(index) == np.float32 for index in op.outputs) and name != "DEQUANTIZE":
            self.left.append((name, self._model.label(int(op.outputs[0]))))
        self._forms.ops.append(op)

    def _in_integers(self, op: Any, rule: Rule) -> bool:
        """Whether the op was written with 8-bit operands."""
        if not (rule.version16 if self._is16 else rule.version):
            return False
        model = self._model
        slots = rule.inputs or tuple(range(len(op.inputs)))
        if any(model.dtype(int(op.inputs[slot])) != np.float32 for slot in slots):
            return False
        read = {slot: int(op.inputs[slot]) for slot in slots if model.value(op.inputs[slot]) is None}
        specs = {slot: spec for slot, index in read.items() if (spec := self._forms.spec(index)) is not None}
        wanted = self._forms.wanted.get(int(op.outputs[0]), [])
        if not specs and len(wanted) == 1 and model.name_of(op) in MOVES:
            specs = dict.fromkeys(read, wanted[0])  # a float is rounded before it is moved
        if not specs or len(specs) < len(read):
            return False
        first = next(iter(specs.values()))
        if rule.kind == "known":
            results = [known(rule, self._is16 or int(op.outputs[0]) in self._forms.wide)]
            if (self._is16 and first.scale > _MOST_KNOWN16) or any(spec != results[0] for spec in wanted):
                return False
        elif rule.kind in ("shared", "reads"):
            results = [first]
        else:
            results = wanted or ([first] if rule.kind == "joined" else [])
        written = [self._written(op, rule, slots, read, specs, result) for result in results]
        if not written or None in written:
            return False
        for position, twin in enumerate(written):
            twin.opcodeIndex = model.code(model.name_of(op), _version(rule, first, results[position]))
            if rule.kind != "reads":
                twin.outputs = [self._forms.result(int(index), results[position]) for index in op.outputs]
            self._forms.ops.append(twin)
        self.count += 1
        return True

    def _written(
        self, op: Any, rule: Rule, slots: Sequence[int], read: Mapping[int, int], specs: Mapping[int, Spec], result: Spec
    ) -> Any:
        """A copy of an op with 8-bit operands; None where no kernel takes them."""
        scales = [spec.scale for spec in specs.values()]
        product = np.array([math.prod(scales)]) if rule.kind == "product" else np.array(scales)
        least, most = RATIOS.get(rule.kind, (0.0, np.inf))
        if rule.kind != "layer" and not ((product / result.scale >= least) & (product / result.scale < most)).all():
            return None
        if rule.symmetric in specs and specs[rule.symmetric].zero_point:
            return None
        twin, inputs = copy.copy(op), list(op.inputs)
        for slot in slots:
            own = result if rule.kind == "joined" else specs.get(slot)
            inputs[slot] = (
                self._forms.integer(read[slot], own) if slot in read and own else self._constant(int(op.inputs[slot]), own)
            )
        if rule.kind == "layer" and not self._layer(op, rule, inputs, next(iter(specs.values())), result):
            return None
        twin.inputs = inputs
        return twin

    def _take_bytes(self, op: Any) -> bool:
        """Whether a cast of pixels that are stored in 8 bits as they are was written as QUANTIZE, which moves the zero point."""
        model = self._model
        if model.name_of(op) != "CAST" or model.dtype(op.inputs[0]) != np.uint8:
            return False
        if self._forms.wanted.get(int(op.outputs[0])) != [_BYTES]:
            return False
        set_quantization(model.tensor(op.inputs[0]), Quantization((_BYTES.scale,), _BYTES.zero_point + 128))
        self._forms.ops.append(model.op("QUANTIZE", [op.inputs[0]], [self._forms.result(int(op.outputs[0]), _BYTES)], 2))
        return True

    def _spell_mean(self, op: Any) -> None:
        """The mean of all pixels may have a range of its own, their AVERAGE_POOL_2D not, which is then too wide by far."""
        model, pool = self._model, op.builtinOptions
        size, out = (model.tensor(index).shape for index in (op.inputs[0], op.outputs[0]))
        is_whole = tuple(size[1:3]) == (pool.filterHeight, pool.filterWidth) and tuple(out[1:3]) == (1, 1)
        if not is_whole or pool.fusedActivationFunction != schema.ActivationFunctionType.NONE:
            return
        axes = model.constant(np.array([1, 2], np.int32), "pixels")
        options = schema.ReducerOptionsT()
        options.keepDims = True
        op.inputs, op.opcodeIndex = [op.inputs[0], axes], model.code("MEAN", 1)
        op.builtinOptionsType, op.builtinOptions = schema.BuiltinOptions.ReducerOptions, options

    def _constant(self, index: int, spec: Spec | None) -> int:
        """A constant operand in 8 bits: in the form of what it is joined with, or in one of its own."""
        value = self._model.value(index)
        assert value is not None
        if spec is None:
            bound = float(np.abs(value).max()) if value.size else 0.0
            spec = Spec(float(np.float32((bound or 1.0) / np.iinfo(self._dtype).max)), 0, self._is16)
        limits = np.iinfo(self._dtype)
        integers = np.clip(np.rint(value / spec.scale) + spec.zero_point, limits.min, limits.max).astype(self._dtype)
        return self._model.constant(integers, self._model.label(index), spec.quantization)

    def _layer(self, op: Any, rule: Rule, inputs: list[int], spec: Spec, result: Spec) -> bool:
        """Weights and bias of a layer as integers, in `inputs`; False where no kernel takes them."""
        index = int(op.inputs[rule.weights])
        value = self._model.value(index)
        if value is None or value.dtype != np.float32:
            return False
        # The converter may have made one constant of several.
        integers, scales, bits = self._stored_at(index) or _Stored(*_nearest(value, rule.axis), 8)
        ratios = spec.scale * scales.astype(np.float64) / result.scale
        if not ((ratios >= RATIOS["layer"][0]) & (ratios < RATIOS["layer"][1])).all():
            return False
        slot = rule.weights + 1 if rule.weights + 1 not in (rule.inputs or ()) else rule.weights + 2
        bias = self._model.value(int(op.inputs[slot])) if len(op.inputs) > slot and op.inputs[slot] >= 0 else None
        if bias is not None:
            steps = np.abs(bias.reshape(-1).astype(np.float64)) / (spec.scale * scales.astype(np.float64))
            if steps.max(initial=0) > _MOST_BIAS[16 if self._is16 else 8]:
                return False
        is_packed = bits <= 4 and rule.int4 and not self._is16
        name = self._model.label(index)
        quantization = Quantization(tuple(scales.tolist()), 0, rule.axis)
        inputs[rule.weights] = self._model.constant(integers, name, quantization, packed=is_packed)
        if bias is not None:
            step = spec.scale * scales.astype(np.float64)
            dtype = np.int64 if self._is16 else np.int32
            whole = np.rint(bias.astype(np.float64) / step).astype(dtype)
            inputs[slot] = self._model.constant(
                whole,
                self._model.label(int(op.inputs[slot])),
                Quantization(tuple(step.astype(np.float32).tolist())),
            )
        return True

    def _stored_at(self, index: int) -> _Stored | None:
        """The plan's integers of a constant, of its shape, where it has them."""
        value = self._model.value(index)
        if value is None or value.dtype != np.float32 or value.ndim < 2:
            return None
        found = self._stored.get(_digest(value))
        if found is None:
            return None
        return found._replace(integers=found.integers.reshape(value.shape))

    def _constant_weights(self, index: int, stored: _Stored, is_hybrid: bool) -> int:
        """Weights of an op in float: as they are for a kernel that takes them so, or made float once, at loading."""
        integers, scales = stored.integers, stored.scales
        axis = _axis_of(integers, scales, self._model.value(index))
        held = self._model.constant(integers, self._model.label(index), Quantization(tuple(scales.tolist()), 0, axis))
        if is_hybrid:
            return held
        return self._forms.weights(index, held)

    # -- the interface --------------------------------------------------------------------------------------------------------
    def _take_inputs(self) -> None:
        wanted = np.dtype(self._options.input_type)
        if wanted == np.float32:
            return
        for position, index in enumerate(list(map(int, self._model.graph.inputs))):
            if self._model.dtype(index) != np.float32:
                continue
            spec = next(iter(self._forms.wanted.get(index, ())), None)
            if spec is None:
                raise ConfigError(_no_integer("input", self._model.label(index), wanted))
            held = self._model.like(index, spec.dtype, spec.quantization)
            outside = held
            if wanted != spec.dtype:
                outside = self._model.like(index, wanted, Quantization((spec.scale,), _moved(spec, wanted)))
                self._forms.ops.append(self._model.op("QUANTIZE", [outside], [held], 2))
            self._forms.take(index, held, spec)
            self._replace("inputs", position, index, outside)

    def _give_outputs(self) -> None:
        wanted = np.dtype(self._options.output_type)
        for position, index in enumerate(list(map(int, self._model.graph.outputs))):
            if wanted == np.float32 or self._model.dtype(index) != np.float32:
                self._forms.real(index)
                continue
            spec = self._forms.spec(index)
            if spec is None:
                raise ConfigError(_no_integer("output", self._model.label(index), wanted))
            held = self._forms.integer(index, spec)
            if wanted != spec.dtype:
                outside = self._model.like(index, wanted, Quantization((spec.scale,), _moved(spec, wanted)))
                self._forms.ops.append(self._model.op("QUANTIZE", [held], [outside], 2))
                held = outside
            self._replace("outputs", position, index, held)

    def _replace(self, side: str, position: int, old: int, new: int) -> None:
        getattr(self._model.graph, side)[position] = new
        for entry in self._model.signature_entries(side):
            if entry.tensorIndex == old:
                entry.tensorIndex = new


def _no_integer(side: str, name: str, wanted: np.dtype) -> str:
    return f"The {side} {name} is computed in float: ask for the {side} type float32. Received: {wanted}"


def _moved(spec: Spec, dtype: np.dtype) -> int:
    return spec.zero_point + (128 if dtype == np.uint8 else 0)


def _version(rule: Rule, taken: Spec, given: Spec) -> int:
    """Of an op that reads and writes such integers."""
    return (rule.version16 if taken.is16 else rule.mixed) if given.is16 else rule.version


def _quantize_inputs(op: Any) -> None:
    if hasattr(op.builtinOptions, "asymmetricQuantizeInputs"):
        op.builtinOptions.asymmetricQuantizeInputs = True


# -- weights ---------------------------------------------------------------------------------------------------------------
class _Stored(NamedTuple):
    """Weights as integers, in TFLite's layout; `scales` are float32 (C,)."""

    integers: np.ndarray
    scales: np.ndarray
    bits: int


def _digest(value: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(value, np.float32).tobytes(), digest_size=16).digest()


def _by_value(weights: Sequence[Weights]) -> dict[bytes, _Stored]:
    """Each constant by its float values in any layout that it may get."""
    found = {}
    for entry in weights:
        for order in _layouts(entry):
            value, integers = (np.ascontiguousarray(array.transpose(order)) for array in (entry.value, entry.integers))
            found[_digest(value)] = _Stored(integers, entry.scales, entry.bits)
    return found


def _layouts(entry: Weights) -> list[tuple[int, ...]]:
    """Orders of the axes of a constant: as it is, and as the converter turns it."""
    plain = tuple(range(entry.value.ndim))
    turned = {"Conv2D": (3, 0, 1, 2), "MatMul": (1, 0), "Conv2DBackpropInput": (2, 0, 1, 3)}.get(entry.op)
    return [plain] if turned is None or len(turned) != len(plain) else [plain, turned]


def _axis_of(integers: np.ndarray, scales: np.ndarray, value: np.ndarray | None) -> int:
    """The axis along which the scales fit."""
    if len(scales) == 1 or value is None:
        return 0
    for axis, size in enumerate(integers.shape):
        if size == len(scales):
            shape = [size if index == axis else 1 for index in range(integers.ndim)]
            if np.array_equal(integers * scales.reshape(shape), value):
                return axis
    raise ConfigError(f"Weights have no axis of their {len(scales)} scales. Received: shape {integers.shape}")


def _nearest(value: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    others = tuple(index for index in range(value.ndim) if index != axis)
    bounds = np.abs(value).max(others).astype(np.float64)
    scales = np.where(bounds > 0, bounds / 127, 1.0).astype(np.float32)
    shape = [-1 if index == axis else 1 for index in range(value.ndim)]
    return np.clip(np.rint(value / scales.reshape(shape)), -127, 127).astype(np.int8), scales
