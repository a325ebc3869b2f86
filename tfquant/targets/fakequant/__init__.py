"""The simulation: the float graph with quantized weights and a fake quantization behind every quantized activation.

It runs anywhere and is what every other target is held against.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import tensorflow as tf

from tfquant.graph.fake_quant import grids_of
from tfquant.graph.ir import FAKE_QUANT, Graph, Node, Tensor
from tfquant.plan.kernels import Unit
from tfquant.plan.spec import S8, U8, DynamicSpec, QuantPlan, QuantSpec
from tfquant.targets import returns_float, weights
from tfquant.targets.dynamic import find_range

OP = "FakeQuantWithMinMaxVars"


def lower(graph: Graph, units: Mapping[Node, Unit], plan: QuantPlan) -> Graph:
    """The simulation of a plan.

    Args:
        graph: the simplified float graph; it is not changed.
        units: what runs in INT8, by root node.
        plan: ranges and weight scales.

    Returns:
        A new float graph with the inputs and outputs of `graph`.
    """
    result = graph.copy()
    for unit in units.values():
        _round_weights(result, unit, plan)
    made = {unit.output for unit in units.values() if not returns_float(graph, unit, plan)}
    readers = _readers(result, graph, units)
    specs: dict[str, QuantSpec | DynamicSpec] = {**plan.tensors, **plan.dynamic}
    stored = {
        tensor.name for unit in units.values() for tensor in (*unit.inputs, unit.output)
    }  # others are in the bodies of loops
    for name, spec in specs.items():
        if name not in stored:
            continue
        tensor = graph.tensor(name)
        twin = Tensor(result.nodes[tensor.node.name], tensor.index)
        quantized = fake_quantize(result, twin, spec, f"{tensor.node.name}/fake_quantize")
        if tensor in made:
            result.replace(twin, quantized)
        else:
            for node, slot in readers.get(tensor, ()):
                result.set_input(node, slot, quantized)
    for unit in units.values():
        if unit.own_ranges:
            _requantize_inputs(result, unit, plan, made)
    result.prune()
    result.infer()
    return result


def _readers(result: Graph, graph: Graph, units: Mapping[Node, Unit]) -> dict[Tensor, list[tuple[Node, int]]]:
    """Where units read a tensor in 8 bits: (node of `result`, slot). What others read too is copied for the unit."""
    found: dict[Tensor, list[tuple[Node, int]]] = {}
    for unit in units.values():
        private = set(unit.private(graph))
        for node in unit.match.covered:
            twin = result.nodes[node.name]
            if node not in private:
                original, twin = twin, result.add(node.op, twin.inputs, name=f"{unit.name}/{node.op}", attrs=twin.attrs)
                for user in private:
                    for slot, tensor in enumerate(result.nodes[user.name].inputs):
                        if tensor == original.out:
                            result.set_input(result.nodes[user.name], slot, twin.out)
            for slot, tensor in enumerate(node.inputs):
                if tensor in unit.inputs and (node, slot) not in unit.float_slots:
                    found.setdefault(tensor, []).append((twin, slot))
    return found


def _round_weights(result: Graph, unit: Unit, plan: QuantPlan) -> None:
    rounded = rounded_weights(unit, plan)
    if rounded is not None:
        slot, value = rounded
        result.set_input(result.nodes[unit.name], slot, result.constant(value, name=f"{unit.name}/dequantized_weights"))


def rounded_weights(unit: Unit, plan: QuantPlan) -> tuple[int, np.ndarray] | None:
    """(slot of a unit's main op that reads its weights, what its rounded weights stand for: float32 of the constant's shape).

    None where it has no weights to round: those of an affine op are exact.
    """
    if unit.weights is None or unit.kernel.role != "compute":
        return None
    return unit.weight_slot, unit.as_constant(weights.dequantized(unit, plan))


def _requantize_inputs(result: Graph, unit: Unit, plan: QuantPlan, made: set[Tensor]) -> None:
    """Inputs with another range get the range of the output; what is there in float is rounded once."""
    spec = plan.tensors[unit.output.name]
    node = result.nodes[unit.name]
    for slot, original in enumerate(unit.main.inputs):
        own = plan.tensors.get(original.name)
        if original in unit.inputs and own is not None and (own.dtype, own.low, own.high) != (spec.dtype, spec.low, spec.high):
            name = f"{original.node.name}/fake_requantize"
            raw = Tensor(result.nodes[original.node.name], original.index)
            source = node.inputs[slot] if original in made else raw
            result.set_input(node, slot, fake_quantize(result, source, spec, name))


def fake_quantize(graph: Graph, tensor: Tensor, spec: QuantSpec | DynamicSpec, name: str) -> Tensor:
    """`tensor` rounded to the steps of `spec`, still float32."""
    if isinstance(spec, DynamicSpec):
        found = find_range(graph, tensor, tensor.shape, spec, f"{name}/range")
        ends = [found.low, found.high]
    else:
        ends = [graph.constant(np.array(end, np.float32), name=f"{name}/range") for end in (spec.low, spec.high)]
    bits = 8 if isinstance(spec, DynamicSpec) else spec.bits
    attrs = {"num_bits": bits, "narrow_range": spec.dtype == S8}
    return graph.add(OP, [tensor, *ends], name=name, attrs=attrs, shapes=[tensor.shape], dtypes=[tf.float32]).out


def specs_in(graph: Graph, specs: Iterable[QuantSpec]) -> dict[str, QuantSpec]:
    """What each fake quantization with one constant range stands for, by its name.

    Args:
        graph: a simulation.
        specs: of the plan; a fake quantization that has the ends of none of them is the model's own.
    """
    by_ends = {_ends(spec.low, spec.high, spec.dtype == S8): spec for spec in specs}
    found = {}
    for node in graph.order():
        grids = grids_of(node) if node.op in FAKE_QUANT else ()
        if len(grids) != 1:
            continue
        (grid,) = grids
        is_narrow = bool(node.attr("narrow_range"))
        spec = None
        if node.op == OP:
            low, high = (float(tensor.value) for tensor in node.inputs[1:3] if tensor.value is not None)
            spec = by_ends.get(_ends(low, high, is_narrow))
        found[node.name] = spec or QuantSpec(S8 if is_narrow else U8, grid.step, 0 if is_narrow else -grid.least, "model", "")
    return found


def _ends(low: float, high: float, is_narrow: bool) -> tuple[float, float, bool]:
    return float(np.float32(low)), float(np.float32(high)), is_narrow
