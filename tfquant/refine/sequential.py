"""Layer by layer, from the inputs to the outputs: ranges, roundings and biases found behind layers that are quantized already.

The float graph and the simulation run side by side over held samples. At each layer the steps that were asked for look at what
reaches it in both, and change the simulation before the layer itself runs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.observe.collector import stats_of
from tfquant.observe.ranges import group_spec
from tfquant.observe.statistics import TensorStats
from tfquant.plan.annotate import Annotation
from tfquant.plan.edits import bias_of, value_of
from tfquant.plan.rounding import dequantize
from tfquant.plan.spec import QuantPlan, QuantSpec, Shift
from tfquant.progress import progress
from tfquant.refine.bias import shrunk
from tfquant.refine.layers import Layer, find_layers, per_sample
from tfquant.refine.rounding import round_weights
from tfquant.refine.walk import Values, Walker
from tfquant.targets import fakequant, weights


@dataclasses.dataclass(frozen=True)
class Refined:
    """What the steps changed.

    Attributes:
        tensors: the specs of all tensors.
        rounded: int8 weights by layer.
        shifts: of biases.
    """

    tensors: Mapping[str, QuantSpec]
    rounded: Mapping[str, np.ndarray]
    shifts: tuple[Shift, ...]


def refine(
    graph: Graph,
    annotation: Annotation,
    plan: QuantPlan,
    batches: Sequence[Mapping[str, np.ndarray]],
    *,
    ranges: bool = False,
    rounding: bool = False,
    bias: bool = False,
) -> Refined:
    """Runs the steps.

    Args:
        graph: the simplified float graph, with a BiasAdd behind each layer where `bias` is asked for.
        annotation: what runs in INT8 of it.
        plan: ranges and weight scales to start from.
        batches: the samples, keyed by input name.
        ranges: estimate the range of each activation again, from what the layers before make of it.
        rounding: choose for each weight between the integers beside it (AdaRound).
        bias: make the mean of each output channel that of the float layer (bias correction).
    """
    simulation = fakequant.lower(graph, annotation.units, plan)
    floats, quantized = Walker(graph, batches), Walker(simulation, batches)
    ahead = _Ahead(simulation, annotation, plan)
    layers = find_layers(graph, annotation)
    rounded: dict[str, np.ndarray] = {}
    shifts = []
    for layer in progress(layers, "Refining", len(layers)):
        node = simulation.nodes[layer.name]
        if ranges:
            for tensor in layer.unit.inputs:
                ahead.estimate(tensor, quantized)
        if rounding:
            nearest, scales = weights.quantized(layer.unit, plan)
            extra = plan.weight_offsets.get(layer.name), plan.weight_bits.get(layer.name)
            found = round_weights(layer, floats.values(layer.x), quantized.values(node.inputs[0]), nearest, scales, *extra)
            if (found != nearest).any():
                rounded[layer.name] = found
                ahead.set_weights(layer, dequantize(found, scales, extra[0]))
        if bias:
            shift = _shift(floats.values(layer.z), quantized.values(node.out), ahead.bias(node))
            if shift.any():
                shifts.append(Shift(layer.name, shift))
                ahead.add_to_bias(node, shift)
    return Refined(ahead.tensors, rounded, tuple(shifts))


def _shift(expected: Values, found: Values, bias: np.ndarray) -> np.ndarray:
    """What the bias lacks for equal means, float32 (C,)."""
    pairs = zip(expected, found, strict=True)
    errors = np.concatenate([per_sample(one) - per_sample(other) for one, other in pairs]) - bias.astype(np.float64)
    return shrunk(len(errors), errors.sum(0), (errors**2).sum(0))


class _Ahead:
    """The part of the simulation that has not run yet, to be changed."""

    def __init__(self, simulation: Graph, annotation: Annotation, plan: QuantPlan) -> None:
        self.tensors = dict(plan.tensors)
        self._simulation, self._plan = simulation, plan
        self._groups = annotation.quantized
        self._estimated: set[str] = set()

    def estimate(self, tensor: Tensor, walker: Walker) -> None:
        """Reads the range of a tensor's group off what the simulation makes of it, where one tensor alone gives that range."""
        group = self._groups.get(tensor)
        if group is None or group.known is not None or len(group.sources) != 1 or group.name in self._estimated:
            return
        self._estimated.add(group.name)
        (source,) = group.sources
        fake = self._fake_quantization(source)
        if fake is None:
            return
        stats = functools.reduce(TensorStats.merge, map(stats_of, walker.values(fake.inputs[0])))
        settings = {key: str(self._plan.settings[key]) for key in ("activation_mode", "isa")}
        before = self.tensors[source.name]
        spec = group_spec(group, {source: stats}, before.source, bits=before.bits, **settings)
        for member in group.tensors:
            self.tensors[member.name] = spec
            twin = self._fake_quantization(member)
            if twin is not None:
                for slot, end in ((1, spec.low), (2, spec.high)):
                    self._set_constant(twin, slot, np.array(end, np.float32))

    def _fake_quantization(self, tensor: Tensor) -> Node | None:
        found = self._simulation.nodes.get(f"{tensor.node.name}/fake_quantize")
        return found if found is not None and found.inputs[0].name == tensor.name else None

    def set_weights(self, layer: Layer, value: np.ndarray) -> None:
        node = self._simulation.nodes[layer.name]
        shape = value_of(node.inputs[1]).shape
        self._set_constant(node, 1, value.reshape(shape))

    def bias(self, node: Node) -> np.ndarray:
        return value_of(self._bias_add(node).inputs[1])

    def add_to_bias(self, node: Node, shift: np.ndarray) -> None:
        self._set_constant(self._bias_add(node), 1, self.bias(node) + shift)

    def _bias_add(self, node: Node) -> Node:
        found = bias_of(self._simulation, node)
        if found is None:
            raise ValueError(f"{node.name} has no bias: see layers.without_bias")
        return found

    def _set_constant(self, node: Node, slot: int, value: np.ndarray) -> None:
        self._simulation.set_input(node, slot, self._simulation.constant(value, name=f"{node.name}/refined"))
