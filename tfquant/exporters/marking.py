"""What exporters start from: the simulation of a plan, whose fake quantization marks what a runtime stores in 8 bits.

A converter writes its float ops; then the marks become the runtime's quantized tensors, and the float weights, found again by
their values, become the integers that they stand for. So each runtime computes with the integers of the plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import numpy as np

from tfquant.errors import ConfigError
from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.observe.ranges import KNOWN
from tfquant.pipeline import QuantizedModel
from tfquant.plan.kernels import Unit
from tfquant.plan.results import activations, head_of
from tfquant.plan.spec import BITS, QuantPlan, QuantSpec, asymmetric
from tfquant.targets import fakequant, weightonly, weights

SOURCE = "results"  # of a spec that is made of the plan's ranges of float results


@dataclasses.dataclass(frozen=True)
class Weights:
    """A constant of the marked graph, and the integers that its values stand for.

    Attributes:
        name: of the op that reads it.
        op: type of that op.
        value: the float32 constant.
        integers: int8 of its shape, symmetric.
        scales: float32 (C,).
        axes: of the constant, along which each slice has a scale of its own; their sizes multiply to C.
        bits: that the integers need.
    """

    name: str
    op: str
    value: np.ndarray
    integers: np.ndarray
    scales: np.ndarray
    axes: tuple[int, ...]
    bits: int


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What a target can do with 8 bits beyond the plan, as TensorFlow's op types.

    Attributes:
        computes: ops with a kernel whose result has a range of its own, layers included.
        moves: ops whose result has the range of their first input.
        known: op type to the ends of the one range that its result can have.
    """

    computes: Collection[str]
    moves: Collection[str]
    known: Mapping[str, tuple[float, float]]


NONE = Kernels((), (), {})


@dataclasses.dataclass(frozen=True)
class Marked:
    """A float graph with fake quantization, which simulates the exported model.

    Attributes:
        graph: the graph; its weights have rounded values.
        weights: what these stand for.
        specs: name of a tensor to its spec, for all marks: those of the plan and those added.
    """

    graph: Graph
    weights: tuple[Weights, ...]
    specs: Mapping[str, QuantSpec]


def mark(model: QuantizedModel, kernels: Kernels = NONE) -> Marked:
    """The simulation of a model's plan, and of what a target quantizes beyond it.

    Args:
        model: of any mode; of mode "dynamic" weights alone are rounded.
        kernels: what else the target quantizes: results of float ops whose inputs are there in 8 bits, with the plan's `ranges`.

    Raises:
        ConfigError: the plan has activations below 8 bits, or weights that are not symmetric.
    """
    plan = dataclasses.replace(model.plan, bfloat16=())
    _check(plan)
    if plan.bfloat16 != model.plan.bfloat16:
        model = model.with_plan(plan)
    graph, units = model.graph, model.annotation.units
    if plan.mode == "weight_only":
        stored = [_of_constant(entry, scales) for entry, scales in weightonly.planned(graph, plan)]
        return Marked(weightonly.simulate(graph, plan), tuple(stored), {})
    if plan.mode == "dynamic":
        plan = dataclasses.replace(plan, dynamic={})
    result = fakequant.lower(graph, units, plan)
    stored = [_of_unit(unit, plan) for unit in units.values() if unit.weights is not None and unit.kernel.role == "compute"]
    specs = dict(plan.tensors)
    if plan.mode == "static":
        added = _beyond(graph, units, plan, kernels)
        for tensor, spec in added.items():
            twin = Tensor(result.nodes[tensor.node.name], tensor.index)
            result.replace(twin, fakequant.fake_quantize(result, twin, spec, f"{tensor.node.name}/fake_quantize"))
        stored += _round_layers(result, graph, added, units)
        specs |= {tensor.name: spec for tensor, spec in added.items()}
    result.prune()
    result.infer()
    return Marked(result, tuple(stored), specs)


def _check(plan: QuantPlan) -> None:
    fewer = next((name for name, spec in plan.tensors.items() if spec.bits < BITS[1]), None)
    if fewer is not None:
        raise ConfigError(
            f"Exported models have activations of 8 or 16 bits: calibrate with --activation_bits 8. Received: {fewer}"
        )
    if any(offsets.any() for offsets in plan.weight_offsets.values()):
        name = next(name for name, offsets in plan.weight_offsets.items() if offsets.any())
        raise ConfigError(
            "Exported models have weights around 0: calibrate with --weight_correction=false, which shifts none. "
            f"Received: offsets of {name}"
        )


# -- weights ---------------------------------------------------------------------------------------------------------------
def _of_constant(entry: weightonly.Weights, scales: np.ndarray) -> Weights:
    integers = entry.integers(scales)
    value = integers.astype(np.float32) * entry.shaped(scales)
    reader = next(user for user, _ in entry.constant.users)
    return Weights(entry.name, reader.op, value, integers, scales, entry.axes, BITS[1])


def _of_unit(unit: Unit, plan: QuantPlan) -> Weights:
    integers, scales = weights.quantized(unit, plan)
    rounded = fakequant.rounded_weights(unit, plan)
    assert rounded is not None
    slot, value = rounded
    bits = plan.weight_bits.get(unit.name)
    return Weights(
        name=unit.name,
        op=unit.main.op,
        value=value,
        integers=unit.as_constant(integers),
        scales=scales,
        axes=weightonly.axes_of(unit.main, slot, value.ndim) or (0,),
        bits=BITS[1] if bits is None else max(BITS[0], int(bits.max())),
    )


def _round_layers(result: Graph, graph: Graph, added: Collection[Tensor], units: Mapping[Node, Unit]) -> list[Weights]:
    """Rounds the weights of layers that the plan has in float and the target does not."""
    covered = {node for unit in units.values() for node in unit.match.covered}
    found = []
    for tensor in added:
        layer = head_of(graph, tensor.node)
        slot = next((s for s, one in enumerate(layer.inputs) if _is_weights(layer, s, one)), None)
        if slot is None or layer in covered:
            continue
        value = layer.inputs[slot].value
        assert value is not None
        axes = weightonly.axes_of(layer, slot, value.ndim)
        assert axes is not None
        entry = weightonly.Weights(layer.name, layer.inputs[slot].node, axes)
        made = _of_constant(entry, entry.scales())
        found.append(dataclasses.replace(made, name=layer.name, op=layer.op))
        result.set_input(result.nodes[layer.name], slot, result.constant(made.value, name=f"{layer.name}/dequantized_weights"))
    return found


def _is_weights(layer: Node, slot: int, tensor: Tensor) -> bool:
    value = tensor.value
    return (
        value is not None
        and value.dtype == np.float32
        and value.ndim > 1
        and weightonly.axes_of(layer, slot, value.ndim) is not None
    )


# -- activations -----------------------------------------------------------------------------------------------------------
def _beyond(graph: Graph, units: Mapping[Node, Unit], plan: QuantPlan, kernels: Kernels) -> dict[Tensor, QuantSpec]:
    """The tensors that the target stores in 8 bits and the plan does not, in topological order."""
    at_hand = {graph.tensor(name) for name in plan.tensors}
    found: dict[Tensor, QuantSpec] = {}
    for node in graph.order():
        out = node.out
        if out in at_hand:
            continue
        head = head_of(graph, node)
        inputs = activations(head)
        if not (inputs and all(tensor in at_hand for tensor in inputs)) and head.op != "Placeholder":
            continue
        if node.op in kernels.moves:
            at_hand.add(out)
            continue
        ends = kernels.known.get(node.op)
        if ends is None and head.op in kernels.computes:
            ends = plan.ranges.get(out.name)
        if ends is not None:
            found[out] = asymmetric(*ends, KNOWN if node.op in kernels.known else SOURCE, out.name)
            at_hand.add(out)
    return found
