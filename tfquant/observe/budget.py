"""`--size_budget`: how many bits the weights of each layer get, so that a model fits into so many bytes and errs least."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from tfquant.errors import ConfigError
from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.observe.fewer_bits import Bits, Weights, quantize_weights
from tfquant.observe.trials import Batch, Trials, network_twin, scalars, some_of, twin
from tfquant.plan.annotate import Annotation
from tfquant.plan.footprint import layer_bytes, model_bytes, stored_weights
from tfquant.plan.kernels import Unit
from tfquant.plan.spec import BITS
from tfquant.progress import progress

# Of the calibration data, that errors are measured on.
SAMPLES = 32
# Bits of a layer whose error is followed to the model's outputs; it grows there as it does behind the layer.
_PROBED = 4
_SATURATING = frozenset({"Softmax", "LogSoftmax", "Sigmoid", "Tanh", "Identity"})
_SWITCHES = "tfquant/switches"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One number of bits for the weights of a layer.

    Attributes:
        bits: of a value.
        size: bytes of the layer's weights then.
        error: relative squared error of the outputs of the layers that read them, times what that does to the model's outputs.
    """

    bits: int
    size: int
    error: float


def choose_bits(graph: Graph, annotation: Annotation, batches: Iterable[Batch], bits: Bits, budget: int) -> dict[str, int]:
    """The bits of the weights of each layer, 2 to 8.

    Every layer is computed beside itself with weights of 2, 3 ... 8 bits. Then the whole model is, once for each layer in 4 bits:
    that tells how much an error of the layer does to the model's outputs. From 8 bits everywhere, bits are taken away where that
    error grows least for the bytes that are saved. Errors of many layers do not simply add up: where as many bits for all layers
    as the budget allows are measured to be better, they are taken.

    Args:
        graph: the simplified float graph.
        annotation: of it.
        batches: calibration data; the first `SAMPLES` samples are used.
        bits: how weights of fewer bits are made.
        budget: bytes of the whole model.

    Returns:
        Name of an op to its bits, for all layers with weights.

    Raises:
        ConfigError: with 2 bits everywhere the model is larger than that.
        ModelError: TensorFlow cannot run the float model on the data.
    """
    units = list(annotation.units.values())
    stored = stored_weights(units)
    readers: dict[Node, list[Unit]] = {constant: [] for constant in stored}
    for unit in units:
        if unit.weights is not None and unit.kernel.role == "compute":
            readers[unit.main.inputs[unit.weight_slot].node].append(unit)
    layers = list(readers.values())
    some = some_of(batches, SAMPLES)
    counts = range(BITS[0], BITS[1] + 1)
    columns = [_choices(graph, layers, some, count, bits) for count in progress(counts, "Choosing bits", len(counts))]
    gains = _gains(graph, layers, some, bits, columns[counts.index(_PROBED)])
    choices = [
        sorted(
            (dataclasses.replace(choice, error=choice.error * gain) for choice in options), key=lambda one: (one.size, one.error)
        )
        for gain, *options in zip(gains, *columns, strict=True)
    ]
    eight = {constant: layer_bytes(unit, np.full(_channels(unit), BITS[1]), False) for constant, unit in stored.items()}
    fixed = model_bytes(graph, units, {}, {}) - sum(eight.values())
    least = fixed + sum(options[0].size for options in choices)
    if least > budget:
        raise ConfigError(f"The model has {least} bytes with the fewest bits: raise size_budget. Received: {budget} bytes")
    found = [choice.bits for choice in cheapest(choices, budget - fixed)]
    alike = [[choice.bits for choice in column] for column in columns if sum(choice.size for choice in column) <= budget - fixed]
    has_all = alike and alike[-1][0] == BITS[1]
    best = alike[-1] if has_all else _best(graph, layers, some, bits, [found, *alike[-1:]])
    return {unit.name: count for group, count in zip(layers, best, strict=True) for unit in group}


def cheapest(choices: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """One choice per layer, of least error in sum, within a budget that the smallest ones fit into.

    Along the lower convex hull of (size, error) of each layer, the step that adds the least error per byte is taken first: the
    best there is for the sizes that this reaches (Lagrange). What is left of the budget then goes where it lowers the error most.

    Args:
        choices: of each layer, by size.
        budget: bytes of all layers.
    """
    hulls = [_hull(options) for options in choices]
    position = [len(hull) - 1 for hull in hulls]
    total = sum(hull[-1].size for hull in hulls)
    heap = [(_slope(hull, len(hull) - 1), layer) for layer, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(heap)
    while total > budget:
        _, layer = heapq.heappop(heap)
        hull, at = hulls[layer], position[layer]
        total -= hull[at].size - hull[at - 1].size
        position[layer] = at - 1
        if at > 1:
            heapq.heappush(heap, (_slope(hull, at - 1), layer))
    found = [hull[at] for hull, at in zip(hulls, position, strict=True)]
    while True:
        better = [
            (own.error - other.error, -layer, other)
            for layer, (own, options) in enumerate(zip(found, choices, strict=True))
            for other in options
            if other.error < own.error and total + other.size - own.size <= budget
        ]
        if not better:
            return found
        _, layer, other = max(better, key=lambda entry: entry[:2])
        total += other.size - found[-layer].size
        found[-layer] = other


def _hull(options: Sequence[Choice]) -> list[Choice]:
    """The choices that are best for some price of a byte, the smallest first; the last has the least error of all."""
    hull: list[Choice] = []
    for option in options:
        if hull and option.error >= hull[-1].error:
            continue  # larger, and no better
        if hull and option.size == hull[-1].size:
            hull.pop()
        while len(hull) > 1 and _rate(hull[-2], hull[-1]) <= _rate(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _rate(small: Choice, large: Choice) -> float:
    """Error that the larger one saves per byte."""
    return (small.error - large.error) / (large.size - small.size)


def _slope(hull: Sequence[Choice], at: int) -> float:
    return _rate(hull[at - 1], hull[at])


def _channels(unit: Unit) -> int:
    assert unit.weights is not None
    return int(unit.weights.shape[-1])


def _made(unit: Unit, count: int, bits: Bits) -> Weights:
    """The weights of a unit in so many bits; with 8, nothing is clipped or corrected."""
    assert unit.weights is not None
    own = bits if count < BITS[1] else dataclasses.replace(bits, clip=False, correct=False, allocate=False)
    return quantize_weights(unit.weights, count, own)


def _choices(graph: Graph, layers: Sequence[Sequence[Unit]], batches: Iterable[Batch], count: int, bits: Bits) -> list[Choice]:
    """For each layer (the units that read the same weights) that of `count` bits, every layer changed alone."""
    copy = graph.copy()
    pairs, owners, sizes = [], [], []
    for index, units in enumerate(layers):
        for unit in units:
            made = _made(unit, count, bits)
            exact = Tensor(copy.nodes[unit.output.node.name], unit.output.index)
            pairs.append((exact, _with_weights(copy, unit, made.values)))
            owners.append(index)
        sizes.append(layer_bytes(unit, made.bits, made.offsets is not None))
    errors = np.bincount(owners, Trials(copy, pairs).run(batches), len(layers))
    return [Choice(count, size, float(error)) for size, error in zip(sizes, errors, strict=True)]


def _gains(
    graph: Graph, layers: Sequence[Sequence[Unit]], batches: Sequence[Batch], bits: Bits, local: Sequence[Choice]
) -> list[float]:
    """For each layer the relative squared error of the model's outputs over that of its own output, with weights of few bits.

    1 for all where the model cannot be computed twice in one graph.
    """
    if not graph.is_pure:
        return [1.0] * len(layers)
    copy = _logits(graph)
    switches = scalars(copy, _SWITCHES, len(layers))
    changed: dict[tuple[str, int], Tensor] = {}
    for switch, units in zip(switches, layers, strict=True):
        for unit in units:
            exact = unit.main.inputs[unit.weight_slot]
            found = unit.as_constant(_made(unit, _PROBED, bits).values)
            assert exact.value is not None
            own = Tensor(copy.nodes[exact.node.name], exact.index)
            change = copy.constant(found - exact.value, name=f"{unit.name}/change")
            attrs, shapes, dtypes = {"T": tf.float32}, [exact.shape], [tf.float32]
            scaled = copy.add("Mul", [change, switch], name=f"{unit.name}/change", attrs=attrs, shapes=shapes, dtypes=dtypes)
            both = copy.add("AddV2", [own, scaled.out], name=f"{unit.name}/changed", attrs=attrs, shapes=shapes, dtypes=dtypes)
            changed[unit.name, unit.weight_slot] = both.out
    pairs = _pairs(copy, changed)
    if not pairs:
        return [1.0] * len(layers)
    trials = Trials(copy, pairs)
    gains = []
    for index, choice in enumerate(progress(local, "Weighing layers", len(local))):
        only = np.eye(len(layers), dtype=np.float32)[index]
        error = float(trials.run({**batch, _SWITCHES: only} for batch in batches).sum())
        gains.append(error / choice.error if choice.error > 0 else 0.0)
    return gains


def _best(
    graph: Graph, layers: Sequence[Sequence[Unit]], batches: Sequence[Batch], bits: Bits, candidates: Sequence[Sequence[int]]
) -> Sequence[int]:
    """That of the candidates, each the bits of all layers, with which the model's outputs err least; else the first."""
    if len(candidates) < 2 or not graph.is_pure:
        return candidates[0]
    copy = _logits(graph)
    pairs, owners = [], []
    for index, counts in enumerate(candidates):
        changed: dict[tuple[str, int], Tensor] = {}
        for units, count in zip(layers, counts, strict=True):
            for unit in units:
                values = unit.as_constant(_made(unit, count, bits).values)
                changed[unit.name, unit.weight_slot] = copy.constant(values, name=f"{unit.name}/trial")
        new = _pairs(copy, changed)
        pairs += new
        owners += [index] * len(new)
    if not pairs:
        return candidates[0]
    errors = np.bincount(owners, Trials(copy, pairs).run(batches), len(candidates))
    return candidates[int(errors.argmin())]


def _logits(graph: Graph) -> Graph:
    """A copy whose outputs are what a softmax or sigmoid at the end reads: behind it an error of a sample that the model is sure
    of can hardly be seen."""
    copy = graph.copy()
    for key, tensor in copy.outputs.items():
        while tensor.node.op in _SATURATING:
            tensor = tensor.node.inputs[0]
        copy.outputs[key] = tensor
    return copy


def _pairs(copy: Graph, changed: Mapping[tuple[str, int], Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The float outputs of a graph, each with that of its twin that reads other weights."""
    outputs = dict(copy.outputs)
    twins = network_twin(copy, changed)
    return [(tensor, twins[key]) for key, tensor in outputs.items() if tensor.dtype == tf.float32 and twins[key] != tensor]


def _with_weights(copy: Graph, unit: Unit, values: np.ndarray) -> Tensor:
    """The output of a unit with other weights, in a copy of its graph."""
    constant = copy.constant(unit.as_constant(values), name=f"{unit.name}/trial")

    def other(node: Node, slot: int, tensor: Tensor) -> Tensor:
        return constant if (node, slot) == (unit.main, unit.weight_slot) else tensor

    return twin(copy, unit, other)
