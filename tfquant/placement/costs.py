"""What units and conversions cost: measured inside of the whole graph, or estimated from a table."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfquant.graph.cost import macs
from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.graph.loading import first_line
from tfquant.observe.ranges import make_plan, observed
from tfquant.observe.statistics import BINS, TensorStats
from tfquant.placement import steps
from tfquant.placement.bfloat16 import FloatCosts, candidates, narrow
from tfquant.plan.annotate import Annotation
from tfquant.plan.kernels import Unit
from tfquant.plan.spec import QuantPlan
from tfquant.targets import onednn
from tfquant.targets.onednn.lowering import Origin, lower_traced

TABLE = pathlib.Path(__file__).with_name("table.json")
# Sizes at which conversions are timed where the graph has none.
_PROBES = (1_000, 100_000, 2_000_000)
# From about here on all threads take part, and waking them costs something.
_SHARED_ELEMENTS = 30_000


@dataclasses.dataclass(frozen=True)
class Costs:
    """Microseconds per call at one batch size.

    Attributes:
        batch_size: the batch size.
        int8: of a unit's kernel, by its name.
        float32: of the float ops that it stands for. Both with the other float ops that read what it makes.
        rest: of the float ops in front of all units.
        to_int8: of quantizing a tensor.
        to_float: of dequantizing it.
        floats: of single float ops.
    """

    batch_size: int
    int8: Mapping[str, float]
    float32: Mapping[str, float]
    rest: float
    to_int8: Callable[[Tensor], float]
    to_float: Callable[[Tensor], float]
    floats: FloatCosts

    @property
    def total(self) -> float:
        """Of the whole network in float32."""
        return sum(self.float32.values()) + self.rest


def sized(graph: Graph, samples: Mapping[str, np.ndarray], size: int) -> Graph:
    """A copy of `graph` whose inputs have the shapes of `samples`, `size` rows of them (0: as they are), and all that follows.

    Raises:
        StepsError: the graph refuses them.
    """
    shapes = {key: (size, *x.shape[1:]) if size and x.ndim else x.shape for key, x in samples.items()}
    try:
        return graph.resized(shapes)
    except ValueError as error:
        raise steps.StepsError(f"the model refuses data of its shapes: {first_line(error)}") from error


def any_plan(annotation: Annotation, settings: Mapping[str, Any]) -> QuantPlan:
    """A plan with made-up ranges: kernels take the same time whatever the values are."""
    stats = {tensor: _made_up() for tensor in observed(annotation)}
    return make_plan(annotation, stats, target=onednn.TABLE.target, signature_keys=("any",), estimator="minmax", **settings)


def _made_up() -> TensorStats:
    counts = np.zeros(BINS, np.int64)
    counts[[0, 2]] = 1
    return TensorStats(1, 2, -1.0, 1.0, -1.0, 1.0, exponent=0, first=-1, counts=counts)


# -- measured -----------------------------------------------------------------------------------------------------------
def measured(
    graph: Graph,
    annotation: Annotation,
    samples: Mapping[str, np.ndarray],
    *,
    batch_sizes: Sequence[int],
    threads: int,
    seconds: float,
    settings: Mapping[str, Any],
    with_bfloat16: bool = False,
) -> list[Costs]:
    """Runs the float graph and the INT8 graph in turns and reads the time of each op off TensorFlow's step statistics.

    Args:
        graph: the simplified float graph.
        annotation: all that could run in INT8.
        samples: by input name, (N, ...) each; rows are repeated to the batch sizes.
        batch_sizes: the batches to run.
        threads: intra-op threads.
        seconds: for each batch size.
        settings: of `make_plan`.
        with_bfloat16: time float ops in bfloat16 too, wherever they can.

    Raises:
        StepsError: the graphs cannot be run apart from their model, or the process failed.
    """
    lowered, origins = lower_traced(graph, annotation.units, any_plan(annotation, settings))
    graphs = {"float32": graph, "int8": lowered}
    if with_bfloat16:
        graphs["bfloat16"] = graph.copy()
        narrow(graphs["bfloat16"], [node.name for node in candidates(graph, ())])
    times = run(graphs, samples, batch_sizes=batch_sizes, threads=threads, seconds=seconds)
    owners = _owners(graph, annotation)
    results = []
    for size in batch_sizes:
        shaped = sized(graph, samples, size)
        probes = times["probes", size].nodes
        casts = _by_size(shaped, [probes[f"cast_{n}"] for n in _PROBES])
        narrowed = times["bfloat16", size].nodes if with_bfloat16 else {}
        floats = FloatCosts(times["float32", size].nodes, narrowed, casts)
        wide, thin = _per_owner(owners, floats.float32), _per_owner(owners, floats.bfloat16)
        float32 = {name: min(spent, thin[name]) if with_bfloat16 else spent for name, spent in wide.items()}
        kinds: dict[str, dict[str, float]] = {way: collections.defaultdict(float) for way in ("unit", *_KINDS)}
        kinds["unit"] |= dict.fromkeys(owners.values(), 0.0)
        for name, spent in times["int8", size].nodes.items():
            way, owner = origins.get(name, Origin("unit", owners.get(name, "")))
            kinds[way][owner] += spent
        to_int8, to_float = (_conversion(shaped, kinds[way], [probes[f"{way}_{n}"] for n in _PROBES]) for way in _KINDS)
        results.append(Costs(size, kinds["unit"], float32, float32.pop(""), to_int8, to_float, floats))
    return results


def _per_owner(owners: Mapping[str, str], nodes: Mapping[str, float]) -> dict[str, float]:
    spent = dict.fromkeys(["", *owners.values()], 0.0)
    for name, microseconds in nodes.items():
        spent[owners.get(name, "")] += microseconds
    return spent


def _owners(graph: Graph, annotation: Annotation) -> dict[str, str]:
    """By name of a float op, the unit that its time counts to: the one that covers it, or the last one whose result reaches it.

    So that a unit has the same ops in both graphs: TensorFlow fuses float ops with what is in front of them (a convolution with
    the sigmoid and the product of a swish), the INT8 graph may have them apart.
    """
    covered = {node: unit for unit in annotation.units.values() for node in unit.private(graph)}
    order = graph.order()
    position = {node: index for index, node in enumerate(order)}
    owners: dict[str, str] = {}
    last: dict[Node, Unit] = {}
    for node in order:
        behind = [last[tensor.node] for tensor in node.inputs if tensor.node in last]
        unit = covered.get(node) or max(behind, key=lambda unit: position[unit.main], default=None)
        if unit is not None:
            last[node] = unit
            owners[node.name] = unit.name
    return owners


_KINDS = ("quantize", "dequantize")


def run(
    graphs: Mapping[str, Graph],
    samples: Mapping[str, np.ndarray],
    *,
    batch_sizes: Sequence[int],
    threads: int,
    seconds: float,
) -> dict[tuple[str, int], steps.Times]:
    """`steps.measure` for graphs that have the same inputs; beside them, as "probes", conversions of several sizes.

    Raises:
        StepsError: the graphs cannot be run apart from their model, or the process failed.
    """
    for graph in graphs.values():
        external = next((node for node in graph.order() if node.external is not None), None)
        if external is not None:
            raise steps.StepsError(f"{external.name} is a table or a variable of the model")
    for key, value in samples.items():
        if value.dtype == object:
            raise steps.StepsError(f"the input {key} holds strings")
    first = next(iter(graphs.values()))
    feeds = {f"{tensor.node.name}:0": samples[key] for key, tensor in first.inputs.items()}
    contents = {name: graph.to_graph_def() for name, graph in graphs.items()}
    outputs = {name: [tensor.node.name for tensor in graph.outputs.values()] for name, graph in graphs.items()}
    if any(content.ByteSize() >= 2**31 for content in contents.values()):
        raise steps.StepsError("the model is larger than a GraphDef can be")
    serialized = {name: content.SerializeToString() for name, content in contents.items()}
    serialized["probes"], outputs["probes"] = _probes()
    return steps.measure(serialized, outputs, feeds, batch_sizes, threads, seconds)


def _probes() -> tuple[bytes, list[str]]:
    """A graph that quantizes and dequantizes tensors of `_PROBES` elements."""
    with tf.Graph().as_default() as graph:
        for count in _PROBES:
            x = tf.random.uniform([count], -1, 1)
            attrs = {"mode": "MIN_FIRST", "ensure_minimum_range": 0.0, "round_mode": "HALF_AWAY_FROM_ZERO"}
            stored = tf.raw_ops.QuantizeV2(
                input=x, min_range=-1.0, max_range=1.0, T=tf.quint8, name=f"quantize_{count}", **attrs
            ).output
            tf.raw_ops.Dequantize(input=stored, min_range=-1.0, max_range=1.0, mode="MIN_FIRST", name=f"dequantize_{count}")
            tf.raw_ops.Cast(x=x, DstT=tf.bfloat16, name=f"cast_{count}")
    return graph.as_graph_def().SerializeToString(), [f"{kind}_{count}" for count in _PROBES for kind in ("dequantize", "cast")]


def _conversion(graph: Graph, found: Mapping[str, float], probes: Sequence[float]) -> Callable[[Tensor], float]:
    """The cost of converting a tensor: its own where that was timed, else by its size between those of the probes."""

    by_size = _by_size(graph, probes)
    return lambda tensor: found[tensor.name] if tensor.name in found else by_size(tensor)


def _by_size(graph: Graph, probes: Sequence[float]) -> Callable[[Tensor], float]:
    return lambda tensor: float(np.interp(elements(graph.tensor(tensor.name)), _PROBES, probes))


def elements(tensor: Tensor) -> int:
    """How many there are, unknown sizes counted as 1."""
    return math.prod(size or 1 for size in tensor.shape or ())


# -- estimated ----------------------------------------------------------------------------------------------------------
def estimated(
    graph: Graph, annotation: Annotation, samples: Mapping[str, np.ndarray], *, batch_sizes: Sequence[int]
) -> list[Costs]:
    """What the table that comes with tfquant says; the same on every machine.

    Args:
        graph: the simplified float graph.
        annotation: all that could run in INT8.
        samples: by input name, (N, ...) each: their shapes count.
        batch_sizes: the batch sizes.

    Raises:
        StepsError: the graph refuses these shapes.
    """
    results = []
    for size in batch_sizes:
        shaped = sized(graph, samples, size)
        rows = {unit.name: (kind(unit), features(unit, shaped)) for unit in annotation.units.values()}
        int8, float32 = ({name: _estimate(which, *row) for name, row in rows.items()} for which in ("int8", "float32"))
        to_int8, to_float, cast = (functools.partial(_convert, shaped, way) for way in (*_KINDS, "cast"))
        wide, thin = ({node.name: _float_op(way, node) for node in shaped.order()} for way in ("float32", "bfloat16"))
        floats = FloatCosts(wide, thin, cast)
        results.append(Costs(size, int8, float32, 0.0, to_int8, to_float, floats))
    return results


def kind(unit: Unit) -> str:
    """Units of one kind cost in proportion to their `features`."""
    if unit.weights is None or unit.weights.ndim != 4:
        return unit.kernel.name
    (*_, channels), size = unit.inputs[0].shape or (None,), unit.weights.shape
    if channels is not None and size[2] < channels:
        return f"{unit.kernel.name}_grouped"
    return f"{unit.kernel.name}_1x1" if size[:2] == (1, 1) else unit.kernel.name


def features(unit: Unit, graph: Graph) -> tuple[float, ...]:
    """What a unit's time depends on: 1, whether threads share the work (0 to 1), and in millions: multiply-accumulates,
    elements read, made, and of its weights.

    Args:
        unit: the unit.
        graph: the float graph with known sizes.
    """
    twins = [graph.tensor(tensor.name) for tensor in unit.inputs]
    out = graph.tensor(unit.output.name)
    products = sum(macs(graph.nodes[node.name]) for node in unit.match.covered)
    weights = 0 if unit.weights is None else unit.weights.size
    read, made = sum(map(elements, twins)), elements(out)
    return 1.0, min(1.0, (read + made) / _SHARED_ELEMENTS), *(number / 1e6 for number in (products, read, made, weights))


@functools.cache
def table() -> Mapping[str, Any]:
    """The table: microseconds per feature, by how it runs and by kind; "" stands for kinds that it does not know."""
    found: dict[str, Any] = json.loads(TABLE.read_text())
    return found


def _estimate(which: str, name: str, facts: Sequence[float]) -> float:
    rows = table()[which]
    return float(np.dot(rows.get(name, rows[""]), facts))


def _float_op(way: str, node: Node) -> float:
    """Microseconds of a float op; the table has a rate for products and one for what only reads and writes."""
    per_product, per_element = table()["ops"][way]
    return float((per_product * macs(node) + per_element * elements(node.out)) / 1e6)


def _convert(graph: Graph, way: str, tensor: Tensor) -> float:
    return float(np.interp(elements(graph.tensor(tensor.name)), _PROBES, table()[way]))
