"""TFLite models as objects: tensors, constants and ops by name, and what nobody reads left out when they are written."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.lite.tools import flatbuffer_utils


def _names(kind: type) -> dict[int, str]:
    return {value: name for name, value in vars(kind).items() if isinstance(value, int)}


_OPS = _names(schema.BuiltinOperator)
_TYPES = schema.TensorType
# The 4-bit type is packed in bytes.
DTYPES = {
    _TYPES.FLOAT32: np.dtype(np.float32),
    _TYPES.INT64: np.dtype(np.int64),
    _TYPES.INT32: np.dtype(np.int32),
    _TYPES.INT16: np.dtype(np.int16),
    _TYPES.INT8: np.dtype(np.int8),
    _TYPES.UINT8: np.dtype(np.uint8),
}
_TYPE_OF = {dtype: code for code, dtype in DTYPES.items()}
INT4 = _TYPES.INT4


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
        """The file; tensors and operator codes that nothing needs are left out, and what is there twice."""
        for index in range(len(self.root.subgraphs)):
            self.take(index)
            self._drop_tensors()
        self._drop_buffers()
        self._drop_codes()
        written: dict[tuple[str, bytes], int] = {}
        for graph in self.root.subgraphs:
            for tensor in graph.tensors:
                if tensor.quantization is not None and tensor.quantization.scale is not None:
                    tensor.quantization = _Parameters(tensor.quantization, written)
        return bytes(flatbuffer_utils.convert_object_to_bytearray(self.root))

    def _drop_tensors(self) -> None:
        graph = self.graph
        used = {*_indices(graph.inputs), *_indices(graph.outputs)}
        for op in graph.operators:
            used.update(_indices(op.inputs), _indices(op.outputs), _indices(op.intermediates))
        kept = [index for index in range(len(graph.tensors)) if index in used]
        new = {old: index for index, old in enumerate(kept)} | {-1: -1}
        graph.tensors = [graph.tensors[index] for index in kept]
        for item in (graph, *graph.operators):
            item.inputs, item.outputs = ([new[index] for index in _indices(one)] for one in (item.inputs, item.outputs))
        for op in graph.operators:
            op.intermediates = [new[index] for index in _indices(op.intermediates)]
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


class _Parameters(schema.QuantizationParametersT):
    """Quantization parameters that share their vectors within a file: the zero points of all channels of all layers are 0, and
    would take twice as many bytes as the scales.
    """

    def __init__(self, plain: Any, written: dict[tuple[str, bytes], int]) -> None:
        super().__init__()
        self.scale, self.zeroPoint, self.quantizedDimension = plain.scale, plain.zeroPoint, plain.quantizedDimension
        self._written = written

    def Pack(self, builder: Any) -> int:
        scale, zero_point = (
            self._vector(builder, np.asarray(values, dtype))
            for values, dtype in ((self.scale, np.float32), (self.zeroPoint, np.int64))
        )
        schema.QuantizationParametersStart(builder)
        schema.QuantizationParametersAddScale(builder, scale)
        schema.QuantizationParametersAddZeroPoint(builder, zero_point)
        schema.QuantizationParametersAddQuantizedDimension(builder, self.quantizedDimension)
        return int(schema.QuantizationParametersEnd(builder))

    def _vector(self, builder: Any, values: np.ndarray) -> int:
        key = str(values.dtype), values.tobytes()
        if key not in self._written:
            self._written[key] = builder.CreateNumpyVector(values)
        return self._written[key]


def set_quantization(tensor: Any, quantization: Quantization | None) -> None:
    """Writes the parameters of a `TensorT`."""
    tensor.quantization = schema.QuantizationParametersT()
    if quantization is not None:
        tensor.quantization.scale = np.array(quantization.scales, np.float32)
        tensor.quantization.zeroPoint = np.full(len(quantization.scales), quantization.zero_point, np.int64)
        tensor.quantization.quantizedDimension = quantization.axis


def _indices(values: Any) -> list[int]:
    return [] if values is None else [int(value) for value in values]


def _packed(value: np.ndarray) -> np.ndarray:
    """Two 4-bit integers in a byte, the first in its lower half."""
    flat = value.reshape(-1).astype(np.int8)
    flat = np.concatenate([flat, np.zeros(flat.size % 2, np.int8)]) & 0x0F
    return (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8)
