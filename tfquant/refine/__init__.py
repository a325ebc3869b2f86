"""Algorithms that make the quantized network more faithful, before and after its ranges are read off the data.

| name | what it does | needs |
|---|---|---|
| channel_alignment | centers the channels between two convolutions | quantiles per channel |
| equalization | scales channels to one range, from layer to layer | extremes and power per channel |
| smooth_quant | the same behind LayerNorms | extremes and power per channel |
| sequential_ranges | estimates ranges behind quantized layers | held samples |
| adaround | rounds each weight up or down for the least error of the layer's result | held samples |
| bias_correction | gives each layer the mean that it has in float, layer by layer on its own | a pass over the data |
| full_bias_correction | the same behind quantized layers | held samples |

They run in this order, whatever the order in which they are asked for. What they change are the plan's `edits`, `rounded` and
`tensors`: kernels and their number stay as they are. A new one is a file here, a name in `algorithms.ALGORITHMS` and a line in
`before` or `after`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np

from tfquant.graph.ir import Graph
from tfquant.observe.channels import collect_channels
from tfquant.observe.trials import some_of
from tfquant.plan.annotate import Annotation
from tfquant.plan.edits import apply_edits
from tfquant.plan.spec import Edit, QuantPlan, Shift
from tfquant.refine.alignment import align
from tfquant.refine.bias import local_shifts, merged
from tfquant.refine.chains import Chain, find_chains
from tfquant.refine.equalization import equalize, read_tensors, smooth
from tfquant.refine.layers import find_layers, without_bias
from tfquant.refine.sequential import refine

Batch = Mapping[str, np.ndarray]
Reannotate = Callable[[Graph], Annotation]

# They change biases alone.
CORRECTIONS = {"bias_correction", "full_bias_correction"}
_SEQUENTIAL = {"sequential_ranges", "adaround", "full_bias_correction"}
# Samples are held so that the largest tensor has at most so many values, and there are at most so many samples.
_MOST_VALUES, _MOST_SAMPLES = 64_000_000, 256


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The float graph, edited, and what runs in INT8 of it."""

    annotation: Annotation
    edits: tuple[Edit, ...]


def before(
    graph: Graph, annotation: Annotation, batches: Iterable[Batch], algorithms: Collection[str], again: Reannotate
) -> Prepared:
    """What is done before ranges are read off the data.

    Args:
        graph: the simplified float graph; it is edited in place.
        annotation: what runs in INT8 of it.
        batches: the calibration data, keyed by input name; read once for each of the first three algorithms that fits.
        algorithms: names among `algorithms.ALGORITHMS`.
        again: annotates the edited graph with the same decisions.
    """
    edits: list[Edit] = []

    def make(new: list[Edit]) -> None:
        nonlocal annotation
        if new:
            apply_edits(graph, new)
            edits.extend(new)
            annotation = again(graph)

    steps: dict[str, Callable[[list[Chain]], list[Edit]]] = {
        "channel_alignment": lambda chains: [*align(graph, chains, batches, quantized())],
        "equalization": lambda chains: [*equalize(chains, stats(chains), quantized())],
        "smooth_quant": lambda chains: [*smooth(chains, stats(chains), quantized())],
    }

    def stats(chains: list[Chain]) -> dict:
        return collect_channels(graph, read_tensors(chains), batches)

    def quantized() -> dict:
        return {unit.main: unit for unit in annotation.units.values()}

    for name, step in steps.items():
        found = find_chains(graph) if name in algorithms else []
        # Only those that it works on: without any there is no pass over the data.
        chains = [chain for chain in found if chain.is_normalized == (name == "smooth_quant")]
        if chains:
            make(step(chains))
    if CORRECTIONS & set(algorithms):
        make([*without_bias(graph, find_layers(graph, annotation))])
    return Prepared(annotation, tuple(edits))


def after(
    graph: Graph,
    prepared: Prepared,
    plan: QuantPlan,
    batches: Iterable[Batch],
    algorithms: Collection[str],
    again: Reannotate,
) -> tuple[Annotation, QuantPlan]:
    """What is done once ranges are there; the annotation and the plan of the graph, which is edited in place.

    Args:
        graph: the float graph as `before` left it.
        prepared: what `before` returned.
        plan: ranges and weight scales.
        batches: as for `before`; read once, or up to a bounded number of samples.
        algorithms: names among `algorithms.ALGORITHMS`.
        again: as for `before`.
    """
    annotation, chosen = prepared.annotation, set(algorithms)
    shifts: list[Shift] = []
    if chosen & _SEQUENTIAL and graph.is_pure:
        refined = refine(
            graph,
            annotation,
            plan,
            _held(graph, batches),
            ranges="sequential_ranges" in chosen,
            rounding="adaround" in chosen,
            bias="full_bias_correction" in chosen,
        )
        plan = dataclasses.replace(plan, tensors=refined.tensors, rounded={**plan.rounded, **refined.rounded})
        shifts += refined.shifts
    if "bias_correction" in chosen and "full_bias_correction" not in chosen:
        shifts += local_shifts(graph, find_layers(graph, annotation), plan, batches)
    if shifts:
        apply_edits(graph, shifts)
        annotation = again(graph)
    edits = [edit for edit in prepared.edits if not _is_empty(edit)]
    needed = {edit.op: edit for edit in prepared.edits if isinstance(edit, Shift) and _is_empty(edit)}
    total = merged([*needed.values(), *shifts])
    return annotation, dataclasses.replace(plan, ops=annotation.decisions, edits=(*edits, *total))


def _is_empty(edit: Edit) -> bool:
    return isinstance(edit, Shift) and not edit.values.any()


def _held(graph: Graph, batches: Iterable[Batch]) -> list[Batch]:
    """The first samples, as many as can be held."""
    largest = max((_elements(tensor.shape) for node in graph.order() for tensor in node.inputs), default=1)
    return some_of(batches, min(_MOST_SAMPLES, max(1, _MOST_VALUES // max(largest, 1))))


def _elements(shape: tuple[int | None, ...] | None) -> int:
    return math.prod(size or 1 for size in (shape or ())[1:])
