"""`--size_budget`: how many bits the weights of each layer get, so that a model fits into so many bytes and errs least."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Sequence

import numpy as np

from tfquant.errors import ConfigError
from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.observe.fewer_bits import Bits, quantize_weights
from tfquant.observe.trials import Batch, Trials, some_of, twin
from tfquant.plan.annotate import Annotation
from tfquant.plan.footprint import layer_bytes, model_bytes, stored_weights
from tfquant.plan.kernels import Unit
from tfquant.plan.spec import BITS
from tfquant.progress import progress

# Of the calibration data, that errors are measured on.
SAMPLES = 32


@dataclasses.dataclass(frozen=True)
class Choice:
    """One number of bits for the weights of a layer.

    Attributes:
        bits: of a value.
        size: bytes of the layer's weights then.
        error: relative squared error of the outputs of the layers that read them.
    """

    bits: int
    size: int
    error: float


def choose_bits(graph: Graph, annotation: Annotation, batches: Iterable[Batch], bits: Bits, budget: int) -> dict[str, int]:
    """The bits of the weights of each layer, 2 to 8.

    Every layer is computed beside itself with weights of 2, 3 ... 8 bits. From 8 bits everywhere, bits are taken away where the
    error of a layer's output grows least for the bytes that are saved.

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
    choices = [sorted(options, key=lambda choice: (choice.size, choice.error)) for options in zip(*columns, strict=True)]
    eight = {constant: layer_bytes(unit, np.full(_channels(unit), BITS[1]), False) for constant, unit in stored.items()}
    fixed = model_bytes(graph, units, {}, {}) - sum(eight.values())
    least = fixed + sum(options[0].size for options in choices)
    if least > budget:
        raise ConfigError(f"The model has {least} bytes with the fewest bits: raise size_budget. Received: {budget} bytes")
    found = cheapest(choices, budget - fixed)
    return {unit.name: choice.bits for group, choice in zip(layers, found, strict=True) for unit in group}


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


def _choices(graph: Graph, layers: Sequence[Sequence[Unit]], batches: Iterable[Batch], count: int, bits: Bits) -> list[Choice]:
    """For each layer (the units that read the same weights) that of `count` bits, every layer changed alone."""
    copy = graph.copy()
    pairs, owners, sizes = [], [], []
    # With 8 bits nothing is clipped or corrected.
    own = bits if count < BITS[1] else dataclasses.replace(bits, clip=False, correct=False, allocate=False)
    for index, units in enumerate(layers):
        for unit in units:
            assert unit.weights is not None
            made = quantize_weights(unit.weights, count, own)
            exact = Tensor(copy.nodes[unit.output.node.name], unit.output.index)
            pairs.append((exact, _with_weights(copy, unit, made.values)))
            owners.append(index)
        sizes.append(layer_bytes(unit, made.bits, made.offsets is not None))
    errors = np.bincount(owners, Trials(copy, pairs).run(batches), len(layers))
    return [Choice(count, size, float(error)) for size, error in zip(sizes, errors, strict=True)]


def _with_weights(copy: Graph, unit: Unit, values: np.ndarray) -> Tensor:
    """The output of a unit with other weights, in a copy of its graph."""
    constant = copy.constant(unit.as_constant(values), name=f"{unit.name}/trial")

    def other(node: Node, slot: int, tensor: Tensor) -> Tensor:
        return constant if (node, slot) == (unit.main, unit.weight_slot) else tensor

    return twin(copy, unit, other)
