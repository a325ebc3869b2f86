"""Placement of a whole network: by the table, or by measuring on this machine, checked in the end on the network itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tfquant.config import QuantConfig
from tfquant.graph.ir import Graph, Node
from tfquant.placement import costs as cost
from tfquant.placement.bfloat16 import choose_bfloat16, narrow
from tfquant.placement.choose import Choice, choose
from tfquant.placement.steps import StepsError
from tfquant.plan.annotate import Annotation, annotate
from tfquant.targets import onednn

KeepFloat = Callable[[Node], str | None]
# Seconds of measurement per batch size.
_SECONDS = 3.0
# A table made on another machine cannot foretell less than this: it then leaves INT8 wherever it is possible.
_FORETOLD_MICROSECONDS, _FORETOLD_SHARE = 200.0, 0.05


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where the ops of a network run.

    Attributes:
        annotation: what runs in INT8.
        bfloat16: names of the float ops in bfloat16; the graph has them so.
        lines: what was measured, for the report.
        warnings: why it could not be measured.
    """

    annotation: Annotation
    bfloat16: tuple[str, ...]
    lines: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def place(
    graph: Graph,
    keep_float: KeepFloat,
    config: QuantConfig,
    samples: Mapping[str, np.ndarray] | None,
    batched: bool = True,
) -> Placed:
    """Decides what runs in INT8, in bfloat16 and in float32.

    Args:
        graph: the simplified float graph; ops that are to be bfloat16 become so, in place.
        keep_float: as for `annotate`.
        config: the options.
        samples: of each input, (N, ...): their shapes count, and where the network is run, their values; or None.
        batched: their first axis counts samples.
    """
    annotation = annotate(graph, onednn.TABLE, keep_float)
    if samples is None or (config.placement == "int8" and config.float == "float32"):
        return Placed(annotation, ())
    sizes = _batch_sizes(graph, config) if batched else [0]
    lines: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    settings = {"activation_mode": config.activation_mode, "weights": config.weights, "isa": config.isa}
    entries, choice = [], Choice({}, 0.0, {})
    if config.placement == "measure":
        try:
            entries = cost.measured(
                graph,
                annotation,
                samples,
                batch_sizes=sizes,
                threads=config.placement_threads,
                seconds=_SECONDS,
                settings=settings,
                with_bfloat16=config.float == "bfloat16",
            )
            choice, lines = _checked(graph, annotation, choose(graph, annotation, entries), keep_float, config, samples, sizes)
        except StepsError as error:
            warnings = (f"placement could not be measured, the table was used: {error}",)
    if not entries:
        try:
            entries = cost.estimated(graph, annotation, samples, batch_sizes=sizes)
        except StepsError:  # running it on the data will tell
            return Placed(annotation, ())
        if config.placement != "int8":
            choice = _foretold(choose(graph, annotation, entries))
    keep = _also(keep_float, choice)
    if choice.floats:
        annotation = annotate(graph, onednn.TABLE, keep)
    if config.float == "float32":
        return Placed(annotation, (), lines, warnings)
    taken = {node for unit in annotation.units.values() for node in unit.private(graph)}
    names = choose_bfloat16(graph, taken, [entry.floats for entry in entries])
    narrow(graph, names)
    return Placed(annotate(graph, onednn.TABLE, keep), names, lines, warnings)


def _batch_sizes(graph: Graph, config: QuantConfig) -> list[int]:
    """The batch sizes to place for: those of the options that the model takes, else (0) the samples as they are."""
    first = {tensor.shape[0] for tensor in graph.inputs.values() if tensor.shape}
    return list(config.placement_batch_sizes) if first == {None} else [0]


def _also(keep_float: KeepFloat, choice: Choice) -> KeepFloat:
    return lambda node: keep_float(node) or choice.floats.get(node)


def _foretold(choice: Choice) -> Choice:
    is_clear = choice.saved > _FORETOLD_SHARE and max(choice.microseconds.values()) > _FORETOLD_MICROSECONDS
    return choice if is_clear else Choice({}, 0.0, {})


def _checked(
    graph: Graph,
    annotation: Annotation,
    choice: Choice,
    keep_float: KeepFloat,
    config: QuantConfig,
    samples: Mapping[str, np.ndarray],
    sizes: Sequence[int],
) -> tuple[Choice, tuple[str, ...]]:
    """The network itself, run each way: the fastest that is nowhere slower than float32, and what was measured.

    Raises:
        StepsError: the graphs cannot be run.
    """
    settings = {"activation_mode": config.activation_mode, "weights": config.weights, "isa": config.isa}
    graphs = {"float32": graph, "INT8 throughout": _lowered(graph, annotation, settings)}
    if choice.floats:
        graphs["as chosen"] = _lowered(graph, annotate(graph, onednn.TABLE, _also(keep_float, choice)), settings)
    times = cost.run(graphs, samples, batch_sizes=sizes, threads=config.placement_threads, seconds=_SECONDS)
    ratios = {name: [times[name, size].total / times["float32", size].total for size in sizes] for name in graphs}
    fit = [name for name in graphs if max(ratios[name]) <= 1]
    best = min(fit, key=lambda name: sum(ratios[name]))
    lines = tuple(
        f"Placement{f' at batch {size}' if size else ''}, {config.placement_threads or 'all'} threads: "
        + ", ".join(f"{name} {times[name, size].total:.2f} ms" for name in graphs)
        for size in sizes
    )
    if best == "as chosen":
        return choice, lines
    if best == "INT8 throughout":
        return Choice({}, 0.0, {}), lines
    reason = f"the network is faster in float32: {lines[0].partition(': ')[2]}"
    return Choice({unit.main: reason for unit in annotation.units.values()}, 0.0, {}), lines


def _lowered(graph: Graph, annotation: Annotation, settings: Mapping[str, str]) -> Graph:
    return onednn.lower(graph, annotation.units, cost.any_plan(annotation, settings))
