"""Ranges and weights of models that were trained with fake quantization: read off the graph, without data.

An activation's fake quantization gives its range and goes where the plan stores the tensor in 8 bits, or where it lies within one
kernel; elsewhere it stays, as the float op that it is, so that what runs in float computes what was trained. Where all of them
are wanted (`ALL`), those within a kernel stay, too, which then computes less. Weights are
constants on a grid once they are folded; their integers are found again by their values, after BatchNorm was folded into them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np

from tfquant.graph.fake_quant import Grid, between, bits_of, grids_of, widest
from tfquant.graph.ir import FAKE_QUANT, Graph, Node, Tensor, is_stateful
from tfquant.observe.fewer_bits import Weights
from tfquant.plan.annotate import Annotation, Group, regrouped
from tfquant.plan.kernels import Unit
from tfquant.plan.rounding import nearest
from tfquant.plan.spec import BITS, S8, U8, QuantPlan, QuantSpec, asymmetric, largest
from tfquant.simplify import reshapes

# The source of ranges that fake quantization gave.
LEARNED = "learned"
# Which fake quantizations count: those that no kernel passes over, or all.
FUSED, ALL = "fused", "all"
# What only gives values another shape.
_RESHAPES = frozenset({"Identity", "Reshape", "Squeeze", "ExpandDims"})
# Results that rounding and clipping, in front of the op or behind it, makes the same.
MOVES = _RESHAPES | {"Transpose", "Slice", "StridedSlice", "Pad", "MaxPool"}
# Results within the range of the first input.
_WITHIN = MOVES | {"AvgPool"}
_CLIPS = {"Relu": np.inf, "Relu6": 6.0}
# Weights are on a grid where none is further from it, in its steps; folding a BatchNorm in float32 leaves some 1e-5.
_ON_GRID = 1e-3
# Asymmetric weights of 8 bits reach so far from their zero point.
_MOST = 2 ** BITS[1] - 1
# A share of a grid below 0 that is no more than 1 / 16 of it: fewer than 1 of 3000 values that are clipped, as ranges of largest
# values have it, err less in sum than all values would that are rounded in other steps.
_LITTLE = 16
# Names in a line of warning.
_SHOWN = 3
# Rows of weights that a grid is looked for with, before all are looked at.
_PROBE = 64


@dataclasses.dataclass(frozen=True)
class Learned:
    """What fake quantization said of a graph.

    Attributes:
        grids: name of a tensor, without its fake quantization, to the grids that it was rounded to.
        bits: name of a layer to the bits of its weights.
    """

    grids: Mapping[str, tuple[Grid, ...]] = dataclasses.field(default_factory=dict)
    bits: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.grids or self.bits)

    @property
    def fewer_bits(self) -> bool:
        """Whether some of it has fewer than 8 bits."""
        grids = (grid for several in self.grids.values() for grid in several)
        return any(bits < BITS[1] for bits in (*(grid.bits for grid in grids), *self.bits.values()))

    def of(self, tensor: Tensor) -> tuple[Grid, ...]:
        """The grids of a tensor, or of what it is made of by ops that stay within the ranges of these."""
        own, node = self.grids.get(tensor.name), tensor.node
        if own is not None:
            return own
        if node.op in _WITHIN or _is_correction(node):
            return self.of(node.inputs[0])
        if node.op in _CLIPS:
            before = self.of(node.inputs[0])
            high = min(max((grid.high for grid in before), default=0.0), _CLIPS[node.op])
            return (between(0.0, high, max(grid.bits for grid in before)),) if high > 0 else ()
        if node.op in FAKE_QUANT:  # one that stays: it has several ranges
            return _as_one(grids_of(node))
        if node.op == "ConcatV2":
            parts = [self.of(part) for part in node.inputs[:-1]]
            return tuple(dict.fromkeys(grid for part in parts for grid in part)) if all(parts) else ()
        return ()

    def ranges(self, annotation: Annotation) -> dict[str, Grid]:
        """Names of groups to their grids, as far as they are known."""
        found = {group.name: self._grids(group) for group in annotation.groups if group.known is None}
        return {name: widest(grids) for name, grids in found.items() if grids}

    def lacking(self, annotation: Annotation) -> dict[Tensor, Tensor]:
        """The tensors without a range, each with the one that its group lacks it for."""
        known = self.ranges(annotation)
        found: dict[Tensor, Tensor] = {}
        for group in annotation.groups:
            if group.known is None and group.name not in known:
                culprit = next(tensor for tensor in group.sources if not self._made_of(tensor))
                found |= dict.fromkeys(group.tensors, culprit)
        return found

    def conflicts(self, annotation: Annotation) -> list[str]:
        """Names of groups whose tensors learned different ranges."""
        known = self.ranges(annotation)
        return [group.name for group in annotation.groups if group.name in known and len(self._own(group)) > 1]

    def _own(self, group: Group) -> tuple[Grid, ...]:
        return tuple(dict.fromkeys(grid for tensor in group.tensors for grid in self.grids.get(tensor.name, ())))

    def _grids(self, group: Group) -> tuple[Grid, ...]:
        """Of its tensors, where all that it is made of has ranges."""
        parts = [self._made_of(tensor) for tensor in group.sources]
        if not all(parts):
            return ()
        return self._own(group) or tuple(dict.fromkeys(grid for part in parts for grid in part))

    def _made_of(self, tensor: Tensor) -> tuple[Grid, ...]:
        return self.of(tensor) or self._behind(tensor)

    def _behind(self, tensor: Tensor) -> tuple[Grid, ...]:
        """The grids of what moves the values of a tensor, or joins them to others."""
        readers = [
            user.out for user, slot in tensor.node.users if user.inputs[slot] == tensor and user.op in MOVES | {"ConcatV2"}
        ]
        found = [self.grids.get(reader.name) or self._behind(reader) for reader in readers]
        return tuple(dict.fromkeys(grid for grids in found for grid in grids))

    def regroup(self, graph: Graph, annotation: Annotation) -> Annotation:
        """The annotation, in which tensors keep the ranges that they learned wherever kernels can join different ones."""
        apart = set()
        for unit in annotation.units.values():
            if unit.own_ranges and (joined := self.of(unit.output)):
                apart |= {tensor for tensor in unit.inputs if (own := self.of(tensor)) and widest(own) != widest(joined)}
        return regrouped(graph, annotation, apart) if apart else annotation

    def bits_of(self, unit: Unit) -> int | None:
        """The bits that a unit's weights were trained with; None where they were not."""
        name = unit.name
        while name:  # simplification names what it makes of a layer below it
            if name in self.bits:
                return self.bits[name]
            name = name.rpartition("/")[0]
        return None


def _as_one(grids: Sequence[Grid]) -> tuple[Grid, ...]:
    """The widest of them in 8 bits at most, where there is one."""
    grid = widest(grids) if grids else None
    if grid is None:
        return ()
    return (between(grid.low, grid.high, BITS[1]) if grid.bits > BITS[1] else grid,)


def _is_correction(node: Node) -> bool:
    """Whether it is a bias that an algorithm gave a layer."""
    return node.op == "BiasAdd" and node.name == f"{node.inputs[0].node.name}/bias_add"


# -- the graph -------------------------------------------------------------------------------------------------------------
def weight_bits(graph: Graph) -> dict[str, int]:
    """Names of the layers that read fake-quantized constants, before these are folded, and how many bits they have."""
    found: dict[str, int] = {}
    constant = constant_nodes(graph)
    for node in constant:
        bits = bits_of(node) if node.op in FAKE_QUANT else None
        if bits is None:
            continue
        stack, seen = [node], {node}
        while stack:
            for user, _ in stack.pop().users:
                if user not in constant:
                    found[user.name] = max(bits, found.get(user.name, 0))
                elif user not in seen:
                    seen.add(user)
                    stack.append(user)
    return found


def constant_nodes(graph: Graph) -> dict[Node, None]:
    """The nodes that no input of the model has a part in, in topological order."""
    found: dict[Node, None] = {}
    for node in graph.order():
        is_made = bool(node.inputs) and not node.pinned and not is_stateful(node.op)
        if node.op == "Const" or (is_made and all(tensor.node in found for tensor in node.inputs)):
            found[node] = None
    return found


def rounds(graph: Graph) -> list[Node]:
    """The fake quantizations of activations whose ranges are constants, in topological order."""
    return [node for node in graph.order() if node.op in FAKE_QUANT and node.inputs[0].value is None and grids_of(node)]


def marks(graph: Graph) -> list[Node]:
    """Those `rounds` that have one range: a tensor in 8 bits can stand for them.

    Where each channel has its own range, what is read in 8 bits is the result, and the fake quantization stays.
    """
    return [node for node in rounds(graph) if len(set(grids_of(node))) == 1]


def take(graph: Graph, nodes: Sequence[Node]) -> dict[str, tuple[Grid, ...]]:
    """Takes fake quantizations out of a graph, in place.

    Args:
        graph: the simplified graph.
        nodes: some of its `marks`, in topological order.

    Returns:
        The grids of the tensors that they rounded, by their names. Where a tensor was reshaped before, it is the first one.
    """
    grids: dict[str, tuple[Grid, ...]] = {}
    own = set(nodes)
    again = {node for node in nodes if _origin(node.inputs[0], ()).node in own}  # what is rounded already has its range
    for node in nodes:
        name = _origin(node.inputs[0], ()).name
        if node not in again:
            grids[name] = tuple(dict.fromkeys((*grids.get(name, ()), *_as_one(grids_of(node)))))
        graph.replace(node.out, node.inputs[0])
        graph.remove(node)
    if nodes:
        reshapes.run(graph)  # what stood on both sides of a fake quantization
        graph.prune()
    return grids


def _origin(tensor: Tensor, rounds: Collection[Node]) -> Tensor:
    """What was reshaped, or rounded by some of `rounds`, to make a tensor."""
    while tensor.node.op in _RESHAPES or tensor.node in rounds:
        tensor = tensor.node.inputs[0]
    return tensor


def settle(
    graph: Graph, annotated: Callable[[Graph], Annotation], bits: Mapping[str, int], rounding: str = FUSED
) -> tuple[Annotation, Learned]:
    """Takes the fake quantizations out of a graph, in place, that INT8 stands for.

    Args:
        graph: the simplified graph.
        annotated: what runs in INT8 of a graph.
        bits: what `weight_bits` returned.
        rounding: `FUSED`, or `ALL`.

    Returns:
        What runs in INT8 of the graph, and what was learned.
    """
    nodes = marks(graph)
    if not nodes:
        return annotated(graph), Learned({}, bits)
    draft = graph.copy()
    learned = Learned(take(draft, marks(draft)), bits)
    own = set(nodes)
    names = {node.name: _origin(node.inputs[0], own).name for node in nodes}
    kept: set[str] = set()
    while True:
        stored = _Stored(draft, learned.regroup(draft, annotated(draft)), rounding)
        new = {name for name, tensor in names.items() if name not in kept and not stored.holds(tensor)}
        kept |= new
        if rounding == FUSED or not new:
            break
        draft = graph.copy()  # what stays lies between the parts of kernels, which take others then
        take(draft, [node for node in marks(draft) if node.name not in kept])
    take(graph, [node for node in nodes if node.name not in kept])
    annotation = learned.regroup(graph, annotated(graph))
    lacking = {tensor.name for tensor in learned.lacking(annotation)}
    if not lacking <= stored.names <= {tensor.name for tensor in annotation.quantized}:
        take(graph, marks(graph))  # what stayed stands in the way of a kernel
        annotation = learned.regroup(graph, annotated(graph))
    return annotation, learned


class _Stored:
    """Which tensors of a graph are in 8 bits, or, with `FUSED`, inside a kernel."""

    def __init__(self, graph: Graph, annotation: Annotation, rounding: str) -> None:
        self._graph = graph
        self._held = set(annotation.quantized)
        self.names = {tensor.name for tensor in annotation.quantized}
        for root, unit in annotation.units.items() if rounding == FUSED else ():
            is_stored = unit.output in self._held
            inside = (node.out for node in unit.private(graph) if node is not root)
            self._held |= {tensor for tensor in inside if is_stored or tensor in unit.main.inputs}

    def holds(self, name: str) -> bool:
        """Whether all that reads a tensor, by its name, does so in 8 bits or after having moved its values."""
        is_there = name.partition(":")[0] in self._graph.nodes
        return not is_there or self._holds(self._graph.tensor(name))

    def _holds(self, tensor: Tensor) -> bool:
        if tensor in self._held:
            return True
        users = [user for user, _ in self._graph.users(tensor)]
        is_moved = bool(users) and all(user.op in MOVES for user in users) and not self._graph.is_output(tensor)
        return is_moved and all(self._holds(user.out) for user in users)


def without_ranges(annotated: Callable[[Mapping[str, str]], Annotation], learned: Learned) -> dict[str, str]:
    """What must stay float where there are no data, and why: names of nodes to reasons.

    Args:
        annotated: what runs in INT8 of the graph without fake quantization, when such nodes are in float.
        learned: the ranges that are known.
    """
    held: dict[str, str] = {}
    while True:
        annotation = annotated(held)
        lacking = learned.lacking(annotation)
        found = [(unit, dict(_lacks(unit, lacking))) for unit in annotation.units.values()]
        # What moves values may tie a tensor that has a range to one that has none: without it, the others are seen by themselves.
        moves = [names for unit, names in found if names and unit.kernel.role == "share"]
        new = {name: why for names in moves or [names for _, names in found] for name, why in names.items() if name not in held}
        if not new:
            return held
        held |= new


def _lacks(unit: Unit, lacking: Mapping[Tensor, Tensor]) -> Iterator[tuple[str, str]]:
    """The nodes of a unit that read or make a tensor without a range, and why they are not in it."""
    missing = [tensor for tensor in unit.inputs if tensor in lacking]
    for tensor in missing:
        readers = [node for node in unit.match.covered if tensor in node.inputs and tensor != unit.inputs[0]]
        named = next((other for other in missing if lacking[other] == other), tensor)
        for node in readers or [unit.main]:
            yield node.name, f"no fake quantization of its input {named.name}, and no data were given"
    if unit.output in lacking and not missing and not unit.gives_float and not unit.only_float:
        yield unit.match.root.name, f"no fake quantization of its result {unit.output.name}, and no data were given"


# -- the plan --------------------------------------------------------------------------------------------------------------
def notes(learned: Learned, found: Sequence[Node], annotation: Annotation, plan: QuantPlan) -> list[str]:
    """What of the training the plan cannot keep, in a line each.

    Args:
        learned: what fake quantization said.
        found: the `rounds` of the graph, as it was.
        annotation: what runs in INT8.
        plan: the ranges and scales that were made of it.
    """
    other = [
        unit.name
        for unit in annotation.units.values()
        if unit.weights is not None and unit.kernel.role == "compute" and learned.bits_of(unit) and _is_off(unit, plan)
    ]
    lines = {
        "share one range in INT8 and learned several: the widest counts": learned.conflicts(annotation),
        "learned more than 8 bits, and have 8": [node.inputs[0].name for node in found if (bits_of(node) or 0) > BITS[1]],
        "learned a range per channel, for which INT8 has no kernel: they are rounded in float, too": [
            node.inputs[0].name for node in found if len(set(grids_of(node))) > 1
        ],
        "have weights that integers symmetric about 0 cannot hold as they were trained: the nearest ones count": other,
    }
    return [f"{_listed(names)} {what}." for what, names in lines.items() if names]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def _is_off(unit: Unit, plan: QuantPlan) -> bool:
    """Whether a layer's integers are not the weights that it was trained with."""
    assert unit.weights is not None
    scales = plan.weight_scales[unit.name].astype(np.float64)
    integers = plan.rounded.get(unit.name)
    integers = nearest(unit.weights, scales) if integers is None else integers
    return bool((np.abs(unit.weights - integers * scales) > _ON_GRID * scales).any())


def learned_spec(group: Group, grid: Grid, isa: str = "vnni") -> QuantSpec:
    """How the tensors of a group are quantized that learned a grid: on this very grid wherever kernels can.

    A ReLU can only end a range that begins at 0. What the grid has below goes: where that is little, to the other end, so that
    values are rounded as they were; else its steps become smaller, so that they are clipped as they were.

    Args:
        group: the group.
        grid: its grid.
        isa: as for `ranges.make_plan`.
    """
    if group.clip:
        moved = QuantSpec(U8, grid.step, 0, LEARNED, group.name, grid.bits)
        is_little = -grid.least * _LITTLE <= 2**grid.bits
        if not is_little or moved.high > _CLIPS[group.clip] + grid.step / 2:
            return asymmetric(0.0, min(grid.high, _CLIPS[group.clip]), LEARNED, group.name, grid.bits)
        return moved
    # Nothing else is qint8, though padding costs it less: a grid from -128 would lose its end, where images have their black.
    is_free = not (group.clip or group.unsigned or isa == "no_vnni")
    if is_free and -grid.least == grid.most == largest(grid.bits):
        return QuantSpec(S8, grid.step, 0, LEARNED, group.name, grid.bits)
    return QuantSpec(U8, grid.step, -grid.least, LEARNED, group.name, grid.bits)


def learned_weights(weights: np.ndarray, bits: int, least: np.ndarray | float, most: int) -> Weights:
    """The integers of weights that were trained on a grid, up to their sign.

    Channels whose grid has none that the kernel bears (a zero point far from the middle, more than 8 bits) get the nearest ones:
    clipped, or on another grid. Where the integers of a channel need more bits than they were given, since they are not symmetric
    about 0, it has those.

    Args:
        weights: float32 (..., C), output channels last.
        bits: that they were trained with.
        least: the smallest scales that the kernel bears, float (C,).
        most: the largest integer that it bears.
    """
    flat = weights.reshape(-1, weights.shape[-1]).astype(np.float64)
    reach = np.abs(flat).max(0, initial=0.0)
    steps = np.full(flat.shape[1], _steps(flat.reshape(-1, 1))[0])
    if np.isnan(steps[0]):
        steps = _steps(flat)
    plain = _positive(np.maximum(reach / most, least))
    learned = _positive(np.where(np.isnan(steps) | (steps < least), plain, steps))
    limit = np.clip(np.rint(flat / learned), -most, most)
    clipped, rounded = (
        ((flat - limit * learned) ** 2).sum(0),
        ((flat - nearest(flat, plain) * plain.astype(np.float64)) ** 2).sum(0),
    )
    scales = np.where(clipped <= rounded, learned, plain)
    integers = np.clip(np.rint(flat / scales), -most, most)
    return Weights(integers.reshape(weights.shape).astype(np.int8), scales, None, _needed(integers, bits))


def _needed(integers: np.ndarray, bits: int) -> np.ndarray:
    """The bits of the channels of integers (N, C) in two's complement, at least `bits`, int8 (C,)."""
    reach = np.maximum(integers.max(0, initial=0), -integers.min(0, initial=0) - 1)
    return np.clip(np.ceil(np.log2(reach + 1)) + 1, min(bits, BITS[1]), BITS[1]).astype(np.int8)


def _steps(flat: np.ndarray) -> np.ndarray:
    """The largest step of each channel of weights (N, C) whose multiples they are, up to 255 times, or NaN, float64 (C,).

    The largest weight is m steps, for some m: each m is tried on some weights, and then on all. A channel of zeros has none.
    """
    reach = np.abs(flat).max(0, initial=0.0)
    steps = np.full(flat.shape[1], np.nan)
    left = np.flatnonzero(reach > 0)
    probe = flat if len(flat) <= _PROBE else np.take_along_axis(flat, np.argpartition(-np.abs(flat), _PROBE, 0)[:_PROBE], 0)
    for most in range(1, _MOST + 1):
        fits = left[_fit(probe[:, left], reach[left] / most)]
        fits = fits[_fit(flat[:, fits], reach[fits] / most)]
        if not fits.size:
            continue
        integers = np.rint(flat[:, fits] / (reach[fits] / most))
        steps[fits] = (flat[:, fits] * integers).sum(0) / (integers**2).sum(0)
        left = np.setdiff1d(left, fits)
    return steps


def _fit(flat: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Whether the channels are multiples of their steps, bool (C,)."""
    multiples = flat / steps
    return np.asarray(np.abs(multiples - np.rint(multiples)).max(0, initial=0.0) <= _ON_GRID)


def _positive(scales: np.ndarray) -> np.ndarray:
    return np.where(scales > 0, np.maximum(scales, np.finfo(np.float32).tiny), 1.0).astype(np.float32)
