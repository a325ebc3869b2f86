"""The forms in which a TFLite graph holds a tensor: float, and integers with one spec or another."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tfquant.exporters.tflite.flatbuffer import Model, Quantization, schema
from tfquant.exporters.tflite.kernels import RULES, Rule
from tfquant.exporters.tflite.running import marks_of
from tfquant.plan.spec import QuantSpec

# Ops that move values and change none.
MOVES = frozenset({"RESHAPE", "SQUEEZE", "EXPAND_DIMS", "TRANSPOSE"})
# Of the scales of operands to that of the result: what XNNPACK takes, which else refuses the whole file.
RATIOS = {"own": (2.0**-8, 2.0**7), "product": (2.0**-16, 2.0**8), "layer": (2.0**-32, 2.0**8)}
_LEVELS16 = 32767
_CONVERSIONS = frozenset({"QUANTIZE", "DEQUANTIZE"})


@dataclasses.dataclass(frozen=True)
class Spec:
    """A tensor's scale and its zero point as int8, or with `is16` as int16, where it is 0."""

    scale: float
    zero_point: int
    is16: bool = False

    @property
    def quantization(self) -> Quantization:
        return Quantization((self.scale,), self.zero_point)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.int16 if self.is16 else np.int8)

    @property
    def version(self) -> int:
        """Of QUANTIZE and DEQUANTIZE of such integers."""
        return 3 if self.is16 else 2


def known(rule: Rule, is16: bool) -> Spec:
    """The one spec that the result of an op of kind "known" can have."""
    return Spec(*rule.output[int(is16)], is16)


# Results with one range that is known: as int8, and as int16.
_KNOWN16 = {known(rule, False): known(rule, True) for rule in RULES.values() if rule.kind == "known"}


class Forms:
    """What holds each tensor of the subgraph at hand, and the ops that convert between forms where one is asked for.

    Attributes:
        ops: the ops of the new graph so far.
        wanted: index of a tensor to the specs that it was marked with.
        wide: tensors that `widen` gave 16 bits.
    """

    def __init__(self, model: Model, is16: bool, specs: Mapping[str, QuantSpec]) -> None:
        self.ops: list[Any] = []
        self.wanted: dict[int, list[Spec]] = {}
        self.wide: set[int] = set()
        self._model, self._is16, self._specs = model, is16, specs
        # A tensor that stands for another in 8 bits: the result of DEQUANTIZE to (what QUANTIZE read, its spec).
        self._marks: dict[int, tuple[int, Spec]] = {}
        self._names: dict[str, tuple[int, Spec]] = {}
        # What is there: the integers that a tensor was computed as, other forms, and floats that were written.
        self._native: dict[int, tuple[int, Spec]] = {}
        self._forms: dict[tuple[int, Spec], int] = {}
        self._floats: set[int] = set()

    def held(self) -> dict[str, int]:
        """By the names of marks the tensors that hold their integers, where there are such."""
        forms = {(index, spec): tensor for index, (tensor, spec) in self._native.items()} | self._forms
        return {mark: forms[form] for mark, form in self._names.items() if form in forms}

    def marked_wide(self) -> dict[str, bool]:
        """By the names of marks whether `widen` gave them 16 bits."""
        return {mark: index in self.wide for mark, (index, _) in self._names.items()}

    # -- marks ------------------------------------------------------------------------------------------------------------
    def take_marks(self, ops: Sequence[Any]) -> list[Any]:
        """Notes what QUANTIZE and DEQUANTIZE of floats say; returns the other ops."""
        quantized: dict[int, tuple[int, Spec]] = {}
        stands_for: dict[int, int] = {}
        rest = []
        for op in ops:
            name = self._model.name_of(op)
            op.inputs = [stands_for.get(int(index), int(index)) for index in op.inputs]
            if self._is_of_converter(op):
                stands_for[int(op.outputs[0])] = int(op.inputs[0])
            elif name == "QUANTIZE" and self._model.dtype(op.inputs[0]) == np.float32:
                spec = self._spec_of(self._model.tensor(op.outputs[0]))
                quantized[int(op.outputs[0])] = (int(op.inputs[0]), spec)
                specs = self.wanted.setdefault(int(op.inputs[0]), [])
                if spec not in specs:
                    specs.append(spec)
                for mark in marks_of(self._model.tensor(op.outputs[0]).name.decode())[:1]:
                    self._names[mark] = quantized[int(op.outputs[0])]
            elif name == "DEQUANTIZE" and int(op.inputs[0]) in quantized:
                self._marks[int(op.outputs[0])] = quantized[int(op.inputs[0])]
            else:
                rest.append(op)
        self._move_marks(rest)
        return rest

    def _is_of_converter(self, op: Any) -> bool:
        """Whether an op rounds as no mark says: the converter rounds the mean of a quantized tensor to the range of that."""
        model, name = self._model, self._model.name_of(op)
        if name == "DEQUANTIZE":
            return bool(model.dtype(op.inputs[0]) == np.float32)  # what it read goes
        if name != "QUANTIZE":
            return False
        source, result = (model.tensor(index[0]).name.decode() for index in (op.inputs, op.outputs))
        return result.startswith(f"{source};") and not marks_of(result)

    def _move_marks(self, ops: Sequence[Any]) -> None:
        """The converter writes a mark behind what only moves values; who computes these is to give them that range."""
        readers = collections.Counter(int(index) for op in ops for index in op.inputs)
        for op in reversed(ops):
            source, result = int(op.inputs[0]) if len(op.inputs) else -1, int(op.outputs[0])
            if self._model.name_of(op) in MOVES and len(self.wanted.get(result, ())) == 1 and readers[source] == 1:
                self.wanted.setdefault(source, self.wanted[result])

    def _spec_of(self, tensor: Any) -> Spec:
        """What a mark says; its tensor is uint8 or int8.

        The converter makes a scale of the ends of a range, which may be the plan's or the float32 next to it.
        """
        scale, zero_point = np.float32(tensor.quantization.scale[0]), int(tensor.quantization.zeroPoint[0])
        for mark in marks_of(tensor.name.decode())[:1]:
            own = self._specs.get(mark)
            if own is not None and math.isclose(own.scale, scale, rel_tol=1e-6):
                scale = np.float32(own.scale)
        is_unsigned = tensor.type == schema.TensorType.UINT8
        zero_point -= 128 if is_unsigned else 0
        if not self._is16:
            return Spec(float(scale), zero_point)
        for narrow, wide in _KNOWN16.items():
            if zero_point == narrow.zero_point and math.isclose(float(scale), narrow.scale, rel_tol=1e-6):
                return wide
        bound = 127 if zero_point == 0 else max(128 + zero_point, 127 - zero_point)
        return Spec(float(np.float32(bound * float(scale) / _LEVELS16)), 0, True)

    def widen(self, ops: Sequence[Any]) -> None:
        """Gives 16 bits to results of ops that can write these from 8, where the caller of the model alone reads them, as floats.

        Probabilities in steps of 1/256 are most of what a classifier in 8 bits loses.

        Args:
            ops: those that are no marks.
        """
        readers: dict[int, list[Any]] = collections.defaultdict(list)
        for op in ops:
            for index in {*map(int, op.inputs)}:
                readers[index].append(op)
        for op in ops:
            rule = RULES.get(self._model.name_of(op))
            if rule is not None and rule.mixed:
                self._widen(int(op.outputs[0]), known(rule, False), known(rule, True), readers)

    def _widen(self, first: int, narrow: Spec, wide: Spec, readers: Mapping[int, Sequence[Any]]) -> None:
        found, ahead = list[int](), [first]
        while ahead:
            index = ahead.pop()
            found.append(index)
            ahead += [mark for mark, (source, _) in self._marks.items() if source == index]
            for op in readers.get(index, ()):
                if self._model.name_of(op) not in MOVES:
                    return
                ahead.append(int(op.outputs[0]))
        if not set(found) & {*map(int, self._model.graph.outputs)}:
            return
        if any(spec != narrow for index in found for spec in self.wanted.get(index, ())):
            return
        self.wide.update(found)
        for index in self.wide & self.wanted.keys():
            self.wanted[index] = [wide]
        self._marks |= {mark: (index, wide) for mark, (index, _) in self._marks.items() if index in found}
        self._names |= {name: (index, wide) for name, (index, _) in self._names.items() if index in found}

    # -- forms of a tensor --------------------------------------------------------------------------------------------------
    def spec(self, index: int) -> Spec | None:
        """In which 8-bit form an op reads a tensor, where it has one."""
        if index in self._marks:
            return self._marks[index][1]
        return self._native[index][1] if index in self._native else None

    def integer(self, index: int, spec: Spec) -> int:
        """The tensor that holds another in this form."""
        if (index, spec) in self._forms:
            return self._forms[index, spec]
        if index in self._marks:
            source, own = self._marks[index]
            held = self.integer(source, own)
            found = held if own == spec else self._requantized(index, held, spec, own)
        elif index in self._native:
            held, own = self._native[index]
            found = held if own == spec else self._requantized(index, held, spec, own)
        else:
            found = self._requantized(index, index, spec)
        self._forms[index, spec] = found
        return found

    def _requantized(self, like: int, source: int, spec: Spec, before: Spec | None = None) -> int:
        """QUANTIZE of a float, or of integers with the spec `before`; by way of floats where no kernel does that at once."""
        least, most = RATIOS["own"]
        if before is not None and not least <= before.scale / spec.scale < most:
            between = self._model.like(like, np.float32, None)
            self.ops.append(self._model.op("DEQUANTIZE", [source], [between], before.version))
            source = between
        made = self._model.like(like, spec.dtype, spec.quantization)
        self.ops.append(self._model.op("QUANTIZE", [source], [made], spec.version))
        return made

    def real(self, index: int) -> int:
        """The tensor as float32."""
        if index in self._floats or (index not in self._marks and index not in self._native):
            return index
        source, spec = self._marks.get(index) or (index, self._native[index][1])
        self.ops.append(self._model.op("DEQUANTIZE", [self.integer(source, spec)], [index], spec.version))
        self._floats.add(index)
        return index

    def result(self, index: int, spec: Spec) -> int:
        """The tensor that an op computes another as."""
        made = self._model.like(index, spec.dtype, spec.quantization)
        self._native.setdefault(index, (made, spec))
        self._forms[index, spec] = made
        return made

    def take(self, index: int, held: int, spec: Spec) -> None:
        """Says that the integers of a tensor are there from the beginning."""
        self._native[index] = (held, spec)

    def weights(self, index: int, held: int) -> int:
        """A constant as float, made of integers once, at loading."""
        if (index, _AS_FLOAT) not in self._forms:
            made = self._model.like(index, np.float32, None)
            self.ops.append(self._model.op("DEQUANTIZE", [held], [made], 5))
            self._forms[index, _AS_FLOAT] = made
        return self._forms[index, _AS_FLOAT]

    def finish(self) -> list[Any]:
        """The ops, but for conversions that nobody reads."""
        read = collections.Counter(int(index) for op in self.ops for index in op.inputs)
        read.update(map(int, self._model.graph.outputs))
        kept = []
        for op in reversed(self.ops):
            if self._model.name_of(op) in _CONVERSIONS and not read[int(op.outputs[0])]:
                read[int(op.inputs[0])] -= 1
            else:
                kept.append(op)
        return kept[::-1]


_AS_FLOAT = Spec(0.0, 0)  # the float form of weights among the forms of a tensor
