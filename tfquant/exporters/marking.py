"""What exporters start from: the simulation of a plan, whose fake quantization marks what a runtime stores in 8 bits.

A converter writes its float ops; then the marks become the runtime's quantized tensors, and the float weights, found again by
their values, become the integers that they stand for. So each runtime computes with the integers of the plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import numpy as np

from tfquant.errors import ConfigError
from tfquant.graph.fake_quant import grids_of
from tfquant.graph.ir import FAKE_QUANT, Graph, Node, Tensor, to_attr
from tfquant.observe.ranges import KNOWN
from tfquant.pipeline import QuantizedModel
from tfquant.plan.edits import bias_of
from tfquant.plan.kernels import Unit
from tfquant.plan.results import activations, head_of
from tfquant.plan.spec import BITS, QuantPlan, QuantSpec, asymmetric, largest, symmetric
from tfquant.targets import fakequant, weightonly
from tfquant.targets.fakequant import integers

MARK = "tfquant_mark_"
# Of probabilities, and of tanh: with 8 bits, whose step is 2^-8 and 2^-7; with 16 it is 2^-15.
PROBABILITIES, SIGNED_UNITS = (0.0, 255 / 256), (-1.0, 127 / 128)
_UNIT_RANGES = {PROBABILITIES, SIGNED_UNITS}
SOURCE = "results"  # of a spec that is made of the plan's ranges of float results


@dataclasses.dataclass(frozen=True)
class Weights(integers.Layer):
    """A constant of the marked graph, and the integers that its values stand for.

    Attributes:
        op: type of the op that reads it.
        value: the float32 constant.
        bits: that the integers need.
    """

    op: str
    value: np.ndarray
    bits: int


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What a target can do with 8 bits beyond the plan, as TensorFlow's op types; "GlobalAvgPool" is an AvgPool of all pixels.

    Attributes:
        computes: ops with a kernel whose result has a range of its own, layers included.
        moves: ops that hand values on as they are.
        blends: ops that average values, and whose result has the range of their first input.
        known: op type to the ends of the one range that its result can have.
        rounds: ops whose constant operands are stored in 8 bits.
        symmetric: ops that take their second operand with the zero point 0 alone.
    """

    computes: Collection[str]
    moves: Collection[str]
    blends: Collection[str]
    known: Mapping[str, tuple[float, float]]
    rounds: Collection[str] = ()
    symmetric: Collection[str] = ()


NONE = Kernels((), (), (), {})


@dataclasses.dataclass(frozen=True)
class Marked:
    """A float graph with fake quantization, which simulates the exported model.

    Attributes:
        graph: the graph; its weights have rounded values. A fake quantization is named `MARK` and a number, which the names
            that converters make of it keep.
        weights: what these stand for.
        specs: of each fake quantization, by its name: those of the plan, those added, and those of the model itself.
        names: of a fake quantization to that of the tensor that it rounds.
    """

    graph: Graph
    weights: tuple[Weights, ...]
    specs: Mapping[str, QuantSpec]
    names: Mapping[str, str]

    def in_integers(self, graph: Graph | None = None) -> Graph:
        """The simulation, or one `widened` at outputs, with the sums of integers, rounded as XNNPACK and MLAS round."""
        return integers.in_integers(self.graph if graph is None else graph, self.weights, self.specs, integers.rescaled)

    def in_integers_of_openvino(self, specs: Mapping[str, QuantSpec]) -> Graph:
        """The simulation with the sums of integers, rounded as OpenVINO rounds.

        Args:
            specs: how the file stores what each fake quantization makes, by its name, as "quint8".
        """
        return integers.in_integers(self.graph, self.weights, specs, integers.openvino, joins_sums=True)

    def joined_sums(self) -> tuple[integers.JoinedSum, ...]:
        """The sums that OpenVINO's convolutions compute."""
        return tuple(integers.joined_sums(self.graph, self.weights, self.specs))

    def behind_joined_sums(self, hidden: Collection[str]) -> set[str]:
        """The fake quantizations that follow from joined sums, up to the first that is not hidden; by their names."""
        found: set[str] = set()
        waiting = [self.graph.nodes[entry.add] for entry in self.joined_sums()]
        seen = set(waiting)
        while waiting:
            node = waiting.pop()
            if node.name in self.names and node.name not in hidden:
                found.add(node.name)
                continue
            new = {user for user, _ in node.users} - seen
            seen |= new
            waiting += new
        return found

    def widened(self, names: Collection[str]) -> Graph:
        """The simulation with 16 bits around 0 in place of 8 for the fake quantizations of these names."""
        result = self.graph.copy()
        for name in sorted(names):
            node, spec = result.nodes[name], self.specs[name]
            low, high = spec.low, spec.high
            bound = np.float32(high if spec.limits[1] - spec.zero_point == largest(BITS[1]) else max(-low, high))
            if (low, high) in _UNIT_RANGES:
                bound = np.float32(1 - 2.0**-15)
            for slot, end in ((1, -bound), (2, bound)):
                result.set_input(node, slot, result.constant(np.array(end, np.float32), name=f"{name}/end"))
            node.attrs["num_bits"], node.attrs["narrow_range"] = to_attr(16), to_attr(True)
        result.prune()
        return result


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
        return Marked(weightonly.simulate(graph, plan), tuple(stored), {}, {})
    if plan.mode == "dynamic":
        plan = dataclasses.replace(plan, dynamic={})
    plan = dataclasses.replace(plan, tensors=_with_known(graph, plan, kernels))
    result = fakequant.lower(graph, units, plan)
    stored = [_of_unit(unit, plan) for unit in units.values() if unit.weights is not None and unit.kernel.role == "compute"]
    specs = dict(plan.tensors)
    if plan.mode == "static":
        added = _beyond(graph, units, plan, kernels)
        for tensor, spec in added.items():
            twin = Tensor(result.nodes[tensor.node.name], tensor.index)
            result.replace(twin, fakequant.fake_quantize(result, twin, spec, f"{tensor.node.name}/fake_quantize"))
        _round_for_all(result, graph, plan, kernels)
        stored += _round_layers(result, graph, added, units)
        _round_operands(result, graph, added, kernels)
        specs |= {tensor.name: spec for tensor, spec in added.items()}
    result.prune()
    names = _number_marks(result)
    marks = fakequant.specs_in(result, specs.values())
    if plan.mode == "static":
        _round_biases(result, stored, marks)
    result.prune()
    result.infer()
    return Marked(result, tuple(stored), marks, names)


def _number_marks(graph: Graph) -> dict[str, str]:
    """Names of marks to those of the tensors that they round."""
    found: dict[str, str] = {}
    for node in graph.order():
        if node.op == fakequant.OP:
            source = node.inputs[0].name
            name = f"{MARK}{len(found)}_"
            graph.rename(node, name)
            found[name] = f"{found[source]} (again)" if source in found else source
    return found


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
    stored = entry.integers(scales)
    value = stored.astype(np.float32) * entry.shaped(scales)
    reader = next(user for user, _ in entry.constant.users)
    return Weights(entry.name, stored, scales, entry.axes, reader.op, value, BITS[1])


def _of_unit(unit: Unit, plan: QuantPlan) -> Weights:
    layer, rounded = integers.layer_of(unit, plan), fakequant.rounded_weights(unit, plan)
    assert rounded is not None
    bits = plan.weight_bits.get(unit.name)
    most = BITS[1] if bits is None else max(BITS[0], int(bits.max()))
    return Weights(layer.name, layer.integers, layer.scales, layer.axes, unit.main.op, rounded[1], most)


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


def _round_for_all(result: Graph, graph: Graph, plan: QuantPlan, kernels: Kernels) -> None:
    """What the target computes in 8 bits is no longer there in float for those who would read it so."""
    for node in [node for node in result.order() if node.op == fakequant.OP]:
        source = node.inputs[0]
        original = graph.nodes.get(source.node.name)
        if original is None or source.name not in plan.tensors:
            continue
        if _kind(head_of(graph, original)) in (*kernels.computes, *kernels.moves, *kernels.blends, *kernels.known):
            for user, slot in result.users(source):
                if user.op != fakequant.OP:
                    result.set_input(user, slot, node.out)
            result.outputs = {key: node.out if tensor == source else tensor for key, tensor in result.outputs.items()}


def _round_operands(result: Graph, graph: Graph, added: Collection[Tensor], kernels: Kernels) -> None:
    """Constants that runtimes add or multiply with are stored around 0, with the largest as an end of the range."""
    for tensor in added:
        head = head_of(graph, tensor.node)
        if head.op not in kernels.rounds:
            continue
        for slot, operand in enumerate(head.inputs):
            value = operand.value
            if value is None or value.dtype != np.float32:
                continue
            scale = np.float32((np.abs(value).max(initial=0) or 1.0) / largest(BITS[1]))
            rounded = np.rint(value / scale).astype(np.float32) * scale
            result.set_input(result.nodes[head.name], slot, result.constant(rounded, name=f"{head.name}/rounded"))


def _is_weights(layer: Node, slot: int, tensor: Tensor) -> bool:
    value = tensor.value
    return (
        value is not None
        and value.dtype == np.float32
        and value.ndim > 1
        and weightonly.axes_of(layer, slot, value.ndim) is not None
    )


def _round_biases(graph: Graph, stored: Collection[Weights], specs: Mapping[str, QuantSpec]) -> None:
    """Biases become multiples of the accumulators' step, as runtimes store them.

    Left out, that would turn one value in a thousand of a layer's result to the next step, and deep in a network most.
    """
    for entry in stored:
        layer = graph.nodes.get(entry.name)
        bias_add = bias_of(graph, layer) if layer is not None else None
        if layer is None or bias_add is None:
            continue
        mark = next((mark for tensor in activations(layer) if (mark := integers.mark_before(tensor)) is not None), None)
        spec = None if mark is None else specs.get(mark.name)
        bias = bias_add.inputs[1].value
        if spec is None or bias is None or bias.shape != entry.scales.shape:
            continue
        step = spec.scale * entry.scales.astype(np.float64)
        value = (np.rint(bias.astype(np.float64) / step) * step).astype(np.float32)
        graph.set_input(bias_add, 1, graph.constant(value, name=f"{bias_add.name}/rounded"))


# -- activations -----------------------------------------------------------------------------------------------------------
def _with_known(graph: Graph, plan: QuantPlan, kernels: Kernels) -> dict[str, QuantSpec]:
    """The plan's specs, but where the target's kernel knows one range alone, and that is about the plan's."""
    found = dict(plan.tensors)
    for name, spec in plan.tensors.items():
        ends = kernels.known.get(graph.tensor(name).node.op)
        if ends is not None and ends[1] - ends[0] < 2 * (spec.high - spec.low):
            found[name] = asymmetric(*ends, KNOWN, spec.group)
    return found


def _beyond(graph: Graph, units: Mapping[Node, Unit], plan: QuantPlan, kernels: Kernels) -> dict[Tensor, QuantSpec]:
    """The tensors that the target stores in 8 bits and the plan does not, in topological order."""
    at_hand = {graph.tensor(name): spec for name, spec in plan.tensors.items()}
    found: dict[Tensor, QuantSpec] = {}
    for node in graph.order():
        out = node.out
        if node.op in FAKE_QUANT and out not in at_hand:  # of the model itself, which kept it
            grids = set(grids_of(node))
            if len(grids) == 1:
                (grid,) = grids
                at_hand[out] = asymmetric(grid.low, grid.high, SOURCE, out.name)
            continue
        if out in at_hand or any(user.op in FAKE_QUANT for user, _ in out.node.users):
            continue
        head = head_of(graph, node)
        inputs = activations(head)
        if not (inputs and all(tensor in at_hand for tensor in inputs)) and head.op != "Placeholder":
            continue
        kind = _kind(head)
        if kind in (*kernels.moves, *kernels.blends):
            at_hand[out] = at_hand[inputs[0]]
            if kind in kernels.blends:
                found[out] = at_hand[out]
            continue
        ends = kernels.known.get(node.op)
        if ends is None and kind in kernels.computes:
            ends = plan.ranges.get(out.name)
        if ends is not None:
            source = KNOWN if node.op in kernels.known else SOURCE
            is_symmetric = node.op not in kernels.known and _is_read_symmetric(graph, out, kernels)
            own = (symmetric if is_symmetric else asymmetric)(*ends, source, out.name)
            found[out] = at_hand[out] = own if node.op in kernels.known else _read_as(graph, out, plan, kernels) or own
    return found


def _read_as(graph: Graph, tensor: Tensor, plan: QuantPlan, kernels: Kernels) -> QuantSpec | None:
    """The spec with which the plan quantizes a tensor once it was moved, where nobody else reads it."""
    while True:
        users = graph.users(tensor)
        if len(users) != 1 or graph.is_output(tensor) or users[0][0].op not in kernels.moves:
            return None
        tensor = users[0][0].out
        if tensor.name in plan.tensors:
            return plan.tensors[tensor.name]


def _is_read_symmetric(graph: Graph, tensor: Tensor, kernels: Kernels) -> bool:
    """Whether an op of `Kernels.symmetric` reads it as its second operand, once it was moved."""
    return any(
        (user.op in kernels.symmetric and slot == 1)
        or (user.op in kernels.moves and slot == 0 and _is_read_symmetric(graph, user.out, kernels))
        for user, slot in graph.users(tensor)
    )


def _kind(node: Node) -> str:
    is_global = node.op == "AvgPool" and node.out.shape is not None and node.out.shape[1:3] == (1, 1)
    return "GlobalAvgPool" if is_global else node.op
