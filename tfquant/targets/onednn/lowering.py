"""From plan and float graph to the INT8 graph.

Activations are stored with zero points that the kernels do not know: a kernel is told that the range of x is
[0, high - low], and what the stored 0 really means (`QuantSpec.offset`) goes into the bias of whoever reads x.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfquant.errors import PlanError
from tfquant.graph.fake_quant import grids_of
from tfquant.graph.ir import FAKE_QUANT, Graph, Node, Tensor, is_back_edge
from tfquant.plan.kernels import Unit
from tfquant.plan.spec import BITS, S8, U8, QuantPlan, QuantSpec
from tfquant.targets import returns_float, weights
from tfquant.targets.dynamic import FoundRange, find_range
from tfquant.targets.onednn import detours, inplace
from tfquant.targets.onednn.affine import scale_channels
from tfquant.targets.onednn.common import DTYPES


def lower(graph: Graph, units: Mapping[Node, Unit], plan: QuantPlan) -> Graph:
    """The INT8 graph.

    Args:
        graph: the simplified float graph; it is not changed.
        units: what runs in INT8, by root node.
        plan: ranges and weight scales.

    Returns:
        A new graph with the inputs and outputs of `graph`.
    """
    return lower_traced(graph, units, plan)[0]


class Origin(NamedTuple):
    """What a node of the INT8 graph is there for: a "unit", or to "quantize" or "dequantize" a tensor, and the name of that."""

    kind: str
    name: str


def lower_traced(graph: Graph, units: Mapping[Node, Unit], plan: QuantPlan) -> tuple[Graph, dict[str, Origin]]:
    """`lower`, and where its nodes come from, by their names; those that are copies of float ops are not in it.

    Raises:
        PlanError: the plan has fewer than 8 bits somewhere.
    """
    few = [name for name, spec in plan.tensors.items() if spec.bits != BITS[1]] + [*plan.weight_bits]
    if few:
        raise PlanError(
            f"TensorFlow has no kernels below {BITS[1]} bits: such a plan can be simulated, or saved with the format fakequant. "
            f"Received: fewer for {few[0]}"
        )
    lowering = Lowering(graph, units, plan)
    return finish(lowering.run()), lowering.origins


def finish(graph: Graph) -> Graph:
    """Makes what `Lowering.run` returns fast and safe to run, in place; the same graph."""
    detours.run(graph)
    inplace.protect_summands(graph)
    graph.prune()
    graph.infer()
    return graph


_SIZES = frozenset({"Shape", "Size", "Rank"})  # of 8-bit values as of floats
_SIX = 6.0  # where Relu6 ends
# Elements of a sample from which on oneDNN's QuantizeV2 is the faster one.
_ONEDNN_PAYS = 60_000
# Ops that hand 8-bit values on as they are: what is in front of them is quantized, once for all that read it.
_MOVES = frozenset({"Reshape", "Squeeze", "ExpandDims"})


def _elements_per_sample(tensor: Tensor) -> int:
    """As far as sizes are known; rows that a Reshape made of a sample count together."""
    sources = [tensor, *tensor.node.inputs[:1]] if tensor.node.op == "Reshape" else [tensor]
    return max(math.prod(size or 1 for size in (source.shape or ())[1:]) for source in sources)


def _rounded(graph: Graph, units: Iterable[Unit], plan: QuantPlan) -> dict[Tensor, QuantSpec]:
    """Float results that the model itself rounds to 8 bits, and nobody reads otherwise: the kernels store them so.

    That is less to write, and better: a convolution's float result is int32 in steps of its largest channel's scale.
    """
    found = {}
    for unit in units:
        users = [user for user, _ in graph.users(unit.output)]
        if unit.kernel.role != "compute" or not users or any(user.op not in FAKE_QUANT for user in users):
            continue
        if plan.mode != "static" or unit.only_float or not returns_float(graph, unit, plan) or graph.is_shown(unit.output):
            continue
        grids = {grid for user in users for grid in grids_of(user) or (None,)}
        grid = grids.pop()
        if grid is None or grids or grid.most - grid.least != 2 ** BITS[1] - 1 or (unit.clip and grid.least < 0):
            continue
        if unit.clip != "Relu6" or grid.high <= _SIX + grid.step / 2:
            found[unit.output] = QuantSpec(U8, grid.step, -grid.least, "model", unit.output.name)
    return found


class Lowering:
    """What the kernels' `lower` functions work with: the new graph and where each float tensor is in it."""

    def __init__(self, source: Graph, units: Mapping[Node, Unit], plan: QuantPlan) -> None:
        self.source = source
        self.plan = plan
        self.graph = Graph()
        self.graph.library.CopyFrom(source.library)
        self.graph.versions.CopyFrom(source.versions)
        self.origins: dict[str, Origin] = {}
        self._units = units
        self._floats: dict[Tensor, Tensor] = {}
        self._stored: dict[Tensor, Tensor] = {}
        self._made: set[Tensor] = set()
        self._requantized: dict[tuple[Tensor, str, float, int], Tensor] = {}
        self._found: dict[Tensor, FoundRange] = {}
        self._scalars: dict[float, Tensor] = {}
        self._tables: dict[tuple[Tensor, bytes], tuple[Tensor, Tensor]] = {}
        self._back_edges: list[tuple[Node, int, Tensor]] = []
        self._rounded = _rounded(source, units.values(), plan)

    def run(self) -> Graph:
        for tensor in self.source.inputs.values():
            self._copy(tensor.node)
        covered = {node for unit in self._units.values() for node in unit.private(self.source)}
        for node in self.source.order():
            unit = self._units.get(node)
            if unit is not None:
                count = len(self.graph.nodes)
                unit.kernel.lower(self, unit)
                for name in itertools.islice(self.graph.nodes, count, None):
                    self.origins.setdefault(name, Origin("unit", unit.name))
            elif node not in covered and Tensor(node, 0) not in self._floats:
                self._copy(node)
        for twin, slot, tensor in self._back_edges:
            self.graph.set_input(twin, slot, self.as_float(tensor))
        self.graph.effects = [self._floats[node.out].node for node in self.source.effects]
        self.graph.inputs = {key: self._floats[tensor] for key, tensor in self.source.inputs.items()}
        self.graph.outputs = {key: self.as_float(tensor) for key, tensor in self.source.outputs.items()}
        return self.graph

    def _copy(self, node: Node) -> None:
        stored = self._stored.get(node.inputs[0]) if node.op in _SIZES and not node.control else None
        if stored is not None and node.inputs[0] not in self._floats:
            self._floats[node.out] = self.graph.copy_of(node, [stored], T=self.dtype(node.inputs[0])).out
            return
        if node.op in FAKE_QUANT and node.inputs[0] in self._rounded:
            self._floats[node.out] = self.as_float(node.inputs[0])
            return
        # What a loop hands back is not there yet: its first value stands in for it until the end.
        inputs = [node.inputs[0] if is_back_edge(node, tensor.node) else tensor for tensor in node.inputs]
        twin = self.graph.copy_of(node, [self.as_float(tensor) for tensor in inputs])
        twin._value = node._value
        self._back_edges += [(twin, slot, tensor) for slot, tensor in enumerate(node.inputs) if is_back_edge(node, tensor.node)]
        for before in node.control:
            self.graph.add_control(twin, self._floats[before.out].node)
        for index in range(max(1, len(node.dtypes))):
            self._floats[Tensor(node, index)] = Tensor(twin, index)

    # -- where a tensor of the float graph is -------------------------------------------------------------------------
    def spec(self, tensor: Tensor) -> QuantSpec:
        return self._rounded.get(tensor) or self.plan.tensors[tensor.name]

    def dtype(self, tensor: Tensor) -> tf.DType:
        """The 8-bit type that `tensor` is stored in."""
        dynamic = self.plan.dynamic.get(tensor.name)
        return DTYPES[self.spec(tensor).dtype if dynamic is None else dynamic.dtype]

    def returns_float(self, unit: Unit) -> bool:
        return unit.output not in self._rounded and returns_float(self.source, unit, self.plan)

    def put(self, tensor: Tensor, stored: Tensor) -> None:
        """`stored` holds the 8-bit values of `tensor`, which a kernel made so."""
        self._made.add(tensor)
        self._stored[tensor] = stored

    def put_float(self, tensor: Tensor, value: Tensor) -> None:
        self._floats[tensor] = value

    def as_float(self, tensor: Tensor) -> Tensor:
        """`tensor` in float32; dequantized at its first use."""
        if tensor not in self._floats:
            spec = self.spec(tensor)
            low, high = (spec.low, spec.high) if spec.dtype == U8 else (-127 * spec.scale, 127 * spec.scale)
            self._floats[tensor] = self.graph.add(
                "Dequantize",
                [self._stored[tensor], self.scalar(low), self.scalar(high)],
                name=f"{tensor.node.name}/dequantize",
                attrs={
                    "T": DTYPES[spec.dtype],
                    "mode": "MIN_FIRST" if spec.dtype == U8 else "SCALED",
                    "narrow_range": False,
                    "axis": -1,
                    "dtype": tf.float32,
                },
                shapes=[tensor.shape],
                dtypes=[tf.float32],
            ).out
            self.origins[self._floats[tensor].node.name] = Origin("dequantize", tensor.name)
        return self._floats[tensor]

    def stored(self, tensor: Tensor) -> Tensor:
        """`tensor` in its 8-bit form; quantized at its first use."""
        if tensor not in self._stored:
            name = f"{tensor.node.name}/quantize"
            if tensor.name in self.plan.dynamic:
                self._stored[tensor] = self._stored_with_found_range(tensor, tensor.name)
            else:
                self._stored[tensor] = self.quantize(self.as_float(tensor), self.spec(tensor), name)
            self.origins[self._stored[tensor].node.name] = Origin("quantize", tensor.name)
        return self._stored[tensor]

    def _stored_with_found_range(self, tensor: Tensor, name: str) -> Tensor:
        """`tensor` in 8 bits with the range that it has at the call; `name` is that of the tensor which the plan quantizes."""
        node, spec = tensor.node, self.plan.dynamic[name]
        dtype = DTYPES[spec.dtype]
        if node.op in _MOVES:
            source = node.inputs[0]
            if source not in self._stored:
                self._stored[source] = self._stored_with_found_range(source, name)
            self._found[tensor] = self._found[source]
            inputs = [self._stored[source], *(self.as_float(other) for other in node.inputs[1:])]
            attrs = {**node.attrs, "T": dtype}
            return self.graph.add(
                node.op, inputs, name=f"{node.name}/quantized", attrs=attrs, shapes=[tensor.shape], dtypes=[dtype]
            ).out
        value = self.as_float(tensor)
        found = self._found[tensor] = find_range(self.graph, value, tensor.shape, spec, f"{node.name}/range")
        return self._quantize(value, found.low, found.high, spec.dtype, f"{node.name}/quantize")

    def quantize(self, value: Tensor, spec: QuantSpec, name: str) -> Tensor:
        return self._quantize(value, self.scalar(spec.low), self.scalar(spec.high), spec.dtype, name)

    def _quantize(self, value: Tensor, low: Tensor, high: Tensor, dtype: str, name: str) -> Tensor:
        # With narrow_range oneDNN leaves the op to TensorFlow's own kernel. That one is exact for qint8 (oneDNN encodes with
        # 127.5 / max where the kernels decode with 127 / max) and costs 2 us where oneDNN's costs 60 before it does any work
        # (measured), which only large tensors are worth. MIN_FIRST has no narrow range: the result is the same.
        is_unsigned = dtype == U8
        attrs = {
            "T": DTYPES[dtype],
            "mode": "MIN_FIRST" if is_unsigned else "SCALED",
            "round_mode": "HALF_AWAY_FROM_ZERO" if is_unsigned else "HALF_TO_EVEN",
            "narrow_range": not is_unsigned or _elements_per_sample(value) < _ONEDNN_PAYS,
            "axis": -1,
            "ensure_minimum_range": 0.0,  # else ranges below 0.01 would be widened
        }
        inputs = [value, low, high]
        return self.graph.add("QuantizeV2", inputs, name=name, attrs=attrs, shapes=[value.shape], dtypes=[DTYPES[dtype]]).out

    def _multiplied(self, one: Tensor, other: Tensor, name: str) -> Tensor:
        shape = max((one.shape or (), other.shape or ()), key=len)
        return self.graph.add("Mul", [one, other], name=name, attrs={"T": tf.float32}, shapes=[shape], dtypes=[tf.float32]).out

    # -- building blocks ----------------------------------------------------------------------------------------------
    def scalar(self, value: float) -> Tensor:
        if value not in self._scalars:
            array = np.array(value, np.float32)
            self._scalars[value] = self.graph.constant(array, name=f"range/scalar_{len(self._scalars)}")
        return self._scalars[value]

    def constant(self, value: np.ndarray, name: str, dtype: tf.DType | None = None) -> Tensor:
        return self.graph.constant(value, name=name, dtype=dtype)

    def known(self, spec: QuantSpec) -> list[Tensor]:
        """The range that a kernel is told of."""
        if spec.dtype == S8:
            return [self.scalar(-127 * spec.scale), self.scalar(127 * spec.scale)]
        return [self.scalar(0.0), self.scalar(255 * spec.scale)]

    def told(self, tensor: Tensor) -> list[Tensor]:
        """The range that a kernel is told of when it reads `tensor`, which is stored."""
        if tensor.name not in self.plan.dynamic:
            return self.known(self.spec(tensor))
        found = self._found[tensor]
        return [found.low, found.high] if self.dtype(tensor) == tf.qint8 else [self.scalar(0.0), found.width]

    def bias_behind(self, tensor: Tensor, bias: np.ndarray, taps: np.ndarray, name: str) -> Tensor:
        """The bias of a kernel that reads `tensor` with a range that is found at each call, float32 (C,).

        Args:
            tensor: the input, stored.
            bias: the layer's own, (C,).
            taps: what the dequantized weights of an output channel add up to, (C,): the kernel takes a stored 0 for a 0.
            name: of the constants, as a scope.
        """
        own = self.constant(bias.astype(np.float32), f"{name}/bias")
        if self.dtype(tensor) == tf.qint8:
            return own
        low = self._found[tensor].low
        missed = self._multiplied(self.constant(taps.astype(np.float32), f"{name}/taps"), low, f"{name}/offset")
        attrs = {"T": tf.float32}
        return self.graph.add(
            "AddV2", [own, missed], name=f"{name}/bias", attrs=attrs, shapes=[own.shape], dtypes=[tf.float32]
        ).out

    def weights(self, unit: Unit) -> tuple[np.ndarray, np.ndarray]:
        """(int8 weights, float32 scales of the output channels)."""
        return weights.quantized(unit, self.plan)

    def table(self, unit: Unit) -> tuple[Tensor, Tensor]:
        """(int8 rows, float32 scales (rows, 1)) of a unit's table; once for all units that read the same with the same scales."""
        integers, scales = self.weights(unit)
        key = (unit.main.inputs[0], scales.tobytes())
        if key not in self._tables:
            name = unit.main.inputs[0].node.name
            rows = self.constant(np.ascontiguousarray(integers.T), f"{name}/integers")
            self._tables[key] = rows, self.constant(scales[:, None], f"{name}/scales")
        return self._tables[key]

    def fused(
        self,
        op: str,
        name: str,
        operands: Sequence[tuple[Tensor, tf.DType]],
        out: tf.DType,
        attrs: Mapping[str, Any],
        outputs: int = 3,
    ) -> Node:
        """An op of the `_FusedQuantized…` family: all operands are listed as host inputs."""
        dtypes = [out, tf.float32, tf.float32][:outputs]
        types = {
            "Tdevice_inputs": [],
            "Thost_inputs": [dtype for _, dtype in operands],
            "Tdevice_outputs": [],
            "Thost_outputs": dtypes,
        }
        return self.graph.add(op, [tensor for tensor, _ in operands], name=name, attrs={**types, **attrs}, dtypes=dtypes)

    def reshape(self, value: Tensor, shape: Sequence[int], name: str, dtype: tf.DType) -> Tensor:
        target = self.constant(np.array(shape, np.int32), f"{name}/shape")
        known = tuple(None if size == -1 else size for size in shape)
        attrs = {"T": dtype, "Tshape": tf.int32}
        return self.graph.add("Reshape", [value, target], name=name, attrs=attrs, shapes=[known], dtypes=[dtype]).out

    def bitcast(self, value: Tensor, source: tf.DType, target: tf.DType, name: str) -> Tensor:
        return self.graph.add("Bitcast", [value], name=name, attrs={"T": source, "type": target}, dtypes=[target]).out

    def pad(self, value: Tensor, spec: QuantSpec, paddings: np.ndarray | Tensor, name: str) -> Tensor:
        """`value`, an 8-bit tensor, padded with its zero point by `paddings`, (rank, 2)."""
        dtype = DTYPES[spec.dtype]
        zero = np.array(spec.zero_point, np.uint8 if spec.dtype == U8 else np.int8).view(np.uint8)
        padded = self.pad_bytes(self.bitcast(value, dtype, tf.uint8, f"{name}/bytes"), paddings, zero, name)
        return self.bitcast(padded, tf.uint8, dtype, f"{name}/stored")

    def pad_bytes(self, value: Tensor, paddings: np.ndarray | Tensor, fill: np.ndarray, name: str) -> Tensor:
        """`value`, a uint8 tensor, padded with `fill`, one uint8. PadV2 moves bytes as memory does, but quint8 one by one."""
        rows = self.constant(paddings.astype(np.int32), f"{name}/paddings") if isinstance(paddings, np.ndarray) else paddings
        inputs = [value, rows, self.constant(fill.reshape(()), f"{name}/zero_point")]
        attrs = {"T": tf.uint8, "Tpaddings": tf.int32}
        return self.graph.add("PadV2", inputs, name=name, attrs=attrs, dtypes=[tf.uint8]).out

    def requantized(self, tensor: Tensor, spec: QuantSpec) -> Tensor:
        """`tensor` stored with `spec` instead of its own; rounded once where it is there in float."""
        own = self.spec(tensor)
        if (own.dtype, own.scale, own.zero_point) == (spec.dtype, spec.scale, spec.zero_point):
            return self.stored(tensor)
        key = (tensor, spec.dtype, spec.scale, spec.zero_point)
        if key not in self._requantized:
            name = f"{tensor.node.name}/requantize"
            shape = tensor.shape
            if tensor in self._made and own.dtype == spec.dtype == U8 and shape is not None and len(shape) == 4 and shape[3]:
                ones = np.ones(shape[3])
                self._requantized[key] = scale_channels(self, tensor, ones, np.zeros(shape[3]), spec, name)
            else:
                self._requantized[key] = self.quantize(self.as_float(tensor), spec, name)
        return self._requantized[key]
