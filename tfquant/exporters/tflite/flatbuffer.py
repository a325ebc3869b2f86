"""TFLite models as objects: tensors, constants and ops by name, and what nobody reads left out when they are written."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flatbuffers
import numpy as np
from flatbuffers import number_types
from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.lite.tools import flatbuffer_utils


def _names(kind: type) -> dict[int, str]:
    return {value: name for name, value in vars(kind).items() if isinstance(value, int)}


_OPS = _names(schema.BuiltinOperator)
_TYPES = schema.TensorType
# The 4-bit type is packed in bytes.
DTYPES = {
    _TYPES.FLOAT32: np.dtype(np.float32),
    _TYPES.FLOAT16: np.dtype(np.float16),
    _TYPES.INT64: np.dtype(np.int64),
    _TYPES.INT32: np.dtype(np.int32),
    _TYPES.INT16: np.dtype(np.int16),
    _TYPES.INT8: np.dtype(np.int8),
    _TYPES.UINT8: np.dtype(np.uint8),
}
_TYPE_OF = {dtype: code for code, dtype in DTYPES.items()}
INT4 = _TYPES.INT4
# Of a file that can be edited: beyond, its constants are not in the flatbuffer, whose offsets have 31 bits.
LARGEST = 2**31 - 1
_IDENTIFIER = b"TFL3"
_ALIGNMENT = 16  # of constants, as the schema asks


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a tensor is stored.

    Attributes:
        scales: one, or one per slice along `axis`.
        zero_point: of all slices.
        axis: of the tensor.
    """

    scales: tuple[float, ...]
    zero_point: int = 0
    axis: int = 0


class Model:
    """A model of which one subgraph at a time is edited.

    Attributes:
        root: the `ModelT`.
        graph: the `SubGraphT` at hand, the first at the beginning.
    """

    def __init__(self, content: bytes) -> None:
        self.root = flatbuffer_utils.convert_bytearray_to_object(bytearray(content))
        self.graph = self.root.subgraphs[0]

    def signature_graphs(self) -> list[int]:
        """The subgraphs that signatures call, or the first; others are bodies of loops and branches."""
        return sorted({signature.subgraphIndex for signature in self.root.signatureDefs or ()}) or [0]

    def take(self, index: int) -> None:
        """Makes another subgraph the one at hand."""
        self.graph = self.root.subgraphs[index]

    def signature_entries(self, side: str) -> list[Any]:
        """The `TensorMapT` of "inputs" or "outputs" of all signatures that call the subgraph at hand."""
        return [
            entry
            for signature in self.root.signatureDefs or ()
            if self.root.subgraphs[signature.subgraphIndex] is self.graph
            for entry in getattr(signature, side)
        ]

    # -- reading ----------------------------------------------------------------------------------------------------------
    def name_of(self, op: Any) -> str:
        """The type of an op: CONV_2D; or the name of a custom op."""
        code = self.root.operatorCodes[op.opcodeIndex]
        builtin = max(code.builtinCode, code.deprecatedBuiltinCode)
        return code.customCode.decode() if builtin == schema.BuiltinOperator.CUSTOM else _OPS[builtin]

    def tensor(self, index: int) -> Any:
        """The `TensorT` of the subgraph at hand."""
        return self.graph.tensors[index]

    def label(self, index: int) -> str:
        """The name of a tensor, without those of all else that the converter fused into its op."""
        return str(self.tensor(index).name.decode().partition(";")[0])

    def dtype(self, index: int) -> Any:
        """The NumPy dtype of a tensor; None where there is none such."""
        return DTYPES.get(self.tensor(index).type)

    def value(self, index: int) -> np.ndarray | None:
        """The constant that a tensor is, or None."""
        tensor = self.tensor(index)
        data, dtype = self.root.buffers[tensor.buffer].data, self.dtype(index)
        if data is None or dtype is None:
            return None
        shape = () if tensor.shape is None else tuple(tensor.shape)
        return np.frombuffer(np.asarray(data, np.uint8).tobytes(), dtype).reshape(shape)

    # -- writing ----------------------------------------------------------------------------------------------------------
    def constant(self, value: np.ndarray, name: str, quantization: Quantization | None = None, packed: bool = False) -> int:
        """A new constant; `packed` int8 values of 4 bits are stored two in a byte.

        Returns:
            The index of its tensor.
        """
        buffer = schema.BufferT()
        buffer.data = np.frombuffer((_packed(value) if packed else np.ascontiguousarray(value)).tobytes(), np.uint8)
        self.root.buffers.append(buffer)
        index = self.activation(value.shape, value.shape, value.dtype, name, quantization)
        self.tensor(index).buffer = len(self.root.buffers) - 1
        if packed:
            self.tensor(index).type = INT4
        return index

    def like(self, index: int, dtype: Any, quantization: Quantization | None) -> int:
        """A new tensor of the shape and name of another."""
        tensor = self.tensor(index)
        return self.activation(tensor.shape, tensor.shapeSignature, dtype, self.label(index), quantization)

    def activation(self, shape: Any, signature: Any, dtype: Any, name: str, quantization: Quantization | None) -> int:
        """A new tensor without a value; its index."""
        tensor = schema.TensorT()
        tensor.shape = None if shape is None else np.array(shape, np.int32)
        tensor.shapeSignature = None if signature is None or tuple(signature) == tuple(shape) else np.array(signature, np.int32)
        tensor.type, tensor.buffer, tensor.name = _TYPE_OF[np.dtype(dtype)], 0, name.encode()
        tensor.hasRank = shape is not None
        set_quantization(tensor, quantization)
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def op(self, name: str, inputs: Iterable[int], outputs: Iterable[int], version: int = 1, options: Any = None) -> Any:
        """A new op of a builtin type, which is not in the graph yet; `options` as (type, object)."""
        op = schema.OperatorT()
        op.opcodeIndex = self.code(name, version)
        op.inputs, op.outputs = [*inputs], [*outputs]
        op.builtinOptionsType, op.builtinOptions = options or (schema.BuiltinOptions.NONE, None)
        return op

    def code(self, name: str, version: int) -> int:
        """The index of an operator code; it is made where there is none."""
        builtin = getattr(schema.BuiltinOperator, name)
        for index, code in enumerate(self.root.operatorCodes):
            if max(code.builtinCode, code.deprecatedBuiltinCode) == builtin and code.version == version:
                return index
        code = schema.OperatorCodeT()
        code.builtinCode, code.version = builtin, version
        code.deprecatedBuiltinCode = min(builtin, 127)
        self.root.operatorCodes.append(code)
        return len(self.root.operatorCodes) - 1

    def pack(self) -> bytes:
        """The file; tensors and operator codes that nothing needs are left out, and what is there twice. The names of tensors
        inside are their labels.
        """
        for index in range(len(self.root.subgraphs)):
            self.take(index)
            self._drop_tensors()
            self._shorten_names()
        self._drop_buffers()
        self._drop_codes()
        builder = _Builder()
        builder.Finish(self.root.Pack(builder), file_identifier=_IDENTIFIER)
        return bytes(builder.Output())

    def _shorten_names(self) -> None:
        shown = {*_indices(self.graph.inputs), *_indices(self.graph.outputs)}
        for index, tensor in enumerate(self.graph.tensors):
            if index not in shown and tensor.name is not None:
                tensor.name = self.label(index).encode()

    def _drop_tensors(self) -> None:
        graph = self.graph
        used = {*_indices(graph.inputs), *_indices(graph.outputs)}
        for op in graph.operators:
            used.update(_indices(op.inputs), _indices(op.outputs), _indices(op.intermediates))
        kept = [index for index in range(len(graph.tensors)) if index in used]
        new = {old: index for index, old in enumerate(kept)} | {-1: -1}
        graph.tensors = [graph.tensors[index] for index in kept]
        for item in (graph, *graph.operators):
            item.inputs, item.outputs = (_vector(new[index] for index in _indices(one)) for one in (item.inputs, item.outputs))
        for op in graph.operators:
            between = [new[index] for index in _indices(op.intermediates)]
            op.intermediates = _vector(between) if between else None
        for entry in (*self.signature_entries("inputs"), *self.signature_entries("outputs")):
            entry.tensorIndex = new[entry.tensorIndex]

    def _drop_buffers(self) -> None:
        users = [tensor for graph in self.root.subgraphs for tensor in graph.tensors] + [*(self.root.metadata or ())]
        kept: list[Any] = [self.root.buffers[0]]  # 0 is that of all tensors without a value
        new, same = {0: 0}, dict[bytes, int]()
        for old in sorted({user.buffer for user in users} - {0}):
            data = self.root.buffers[old].data
            key = None if data is None else hashlib.blake2b(np.asarray(data, np.uint8).tobytes(), digest_size=16).digest()
            if key is None or key not in same:
                kept.append(self.root.buffers[old])
                if key is not None:
                    same[key] = len(kept) - 1
                new[old] = len(kept) - 1
            else:
                new[old] = same[key]
        for user in users:
            user.buffer = new[user.buffer]
        self.root.buffers, self.root.metadataBuffer = kept, None

    def _drop_codes(self) -> None:
        ops = [op for graph in self.root.subgraphs for op in graph.operators]
        kept = sorted({op.opcodeIndex for op in ops})
        new = {old: index for index, old in enumerate(kept)}
        self.root.operatorCodes = [self.root.operatorCodes[index] for index in kept]
        for op in ops:
            op.opcodeIndex = new[op.opcodeIndex]


def flex_ops(content: bytes) -> list[str]:
    """The ops of TensorFlow that a file takes over as they are, which LiteRT alone does not have."""
    codes = flatbuffer_utils.convert_bytearray_to_object(bytearray(content)).operatorCodes
    names = {code.customCode.decode() for code in codes if code.customCode}
    return sorted(name.removeprefix("Flex") for name in names if name.startswith("Flex"))


class _Field(NamedTuple):
    """A field of a table: its slot, its type, and its value, which of a reference is what it refers to."""

    slot: int
    flags: Any
    value: Any


class _Builder(flatbuffers.Builder):  # type: ignore[misc]
    """Writes each string, each vector of numbers and each table once, however many refer to it.

    Of small networks the graph is a good part of the file, and most of its shapes, names, zero points and options of ops are
    there many times. Fields of a table are kept until it ends, for it to be compared with others.
    """

    def __init__(self) -> None:
        super().__init__(1024)
        self._written: dict[Any, int] = {}
        self._fields: list[_Field] = []

    def CreateString(self, s: bytes | str, encoding: str = "utf-8", errors: str = "strict") -> int:
        return self._once(s, lambda: super(_Builder, self).CreateString(s, encoding, errors))

    def CreateNumpyVector(self, x: np.ndarray) -> int:
        if x.dtype == np.uint8:  # constants, of which there are no two alike
            self.Prep(_ALIGNMENT, x.nbytes)
            return int(super().CreateNumpyVector(x))
        return self._once((x.dtype.str, x.tobytes()), lambda: super(_Builder, self).CreateNumpyVector(x))

    def PrependSlot(self, flags: Any, o: int, x: Any, d: Any) -> None:
        if x != d:
            self._fields.append(_Field(o, flags, x))

    def PrependUOffsetTRelativeSlot(self, o: int, x: int, d: int) -> None:
        if x != d:
            self._fields.append(_Field(o, number_types.UOffsetTFlags, x))

    def EndObject(self) -> int:
        fields, self._fields = tuple(self._fields), []
        if fields in self._written:
            self.nested, self.current_vtable = False, None
        else:
            for field in sorted(fields, key=lambda field: -field.flags.bytewidth):  # so there are no gaps between them
                if field.flags is number_types.UOffsetTFlags:
                    super().PrependUOffsetTRelative(field.value)
                else:
                    self.Prepend(field.flags, field.value)
                self.Slot(field.slot)
            self._written[fields] = int(super().EndObject())
        return self._written[fields]

    def _once(self, key: Any, write: Callable[[], int]) -> int:
        if key not in self._written:
            self._written[key] = int(write())
        return self._written[key]


def set_quantization(tensor: Any, quantization: Quantization | None) -> None:
    """Writes the parameters of a `TensorT`."""
    tensor.quantization = schema.QuantizationParametersT()
    if quantization is not None:
        tensor.quantization.scale = np.array(quantization.scales, np.float32)
        tensor.quantization.zeroPoint = np.full(len(quantization.scales), quantization.zero_point, np.int64)
        tensor.quantization.quantizedDimension = quantization.axis


def _vector(indices: Iterable[int]) -> np.ndarray:
    return np.array([*indices], np.int32)


def _indices(values: Any) -> list[int]:
    return [] if values is None else [int(value) for value in values]


def _packed(value: np.ndarray) -> np.ndarray:
    """Two 4-bit integers in a byte, the first in its lower half."""
    flat = value.reshape(-1).astype(np.int8)
    flat = np.concatenate([flat, np.zeros(flat.size % 2, np.int8)]) & 0x0F
    return (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8)
