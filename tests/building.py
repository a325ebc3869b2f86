"""For tests: small graphs from Python functions, and a graph taken through the plan to simulation and INT8.

`disagreements` holds the INT8 graph against the simulation unit by unit: every unit of the simulation gets the values that the
INT8 graph itself computed for its inputs, so that roundings do not add up and each 8-bit value must be right to a step.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when tensorflow is imported

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf.rewriter_config_pb2 import RewriterConfig

from tfquant.graph.execution import executable
from tfquant.graph.ir import Graph, Tensor
from tfquant.observe.collector import collect
from tfquant.observe.ranges import make_dynamic_plan, make_plan, observed
from tfquant.plan.annotate import Annotation, annotate
from tfquant.plan.kernels import Unit
from tfquant.plan.scope import held, resolve
from tfquant.plan.spec import U8, DynamicSpec, OpDecision, QuantPlan, QuantSpec
from tfquant.simplify import simplify
from tfquant.targets import fakequant, onednn, weights
from tfquant.targets.onednn.lowering import Lowering, finish

Shape = Sequence[int | None]
Arrays = dict[str, np.ndarray]

STEPS = 1.01  # what an 8-bit value may be off, in its steps
FLOAT_ERROR = 4e-6  # of the sum of absolute values: what float32 loses in the simulation when it adds some hundred equal terms
ROUNDING = {tf.float16: 2.0**-10, tf.bfloat16: 2.0**-7}  # of a value, in types of half precision
MAX_BIAS = 0.35  # mean error of a tensor in steps: truncation would give 0.5


def tfmot() -> tuple[Any, Any]:
    """tf_keras and TFMOT's API, imported as tfquant does it: TFMOT by itself would change what tf.keras is in this process."""
    if any(importlib.util.find_spec(name) is None for name in ("tf_keras", "tensorflow_model_optimization")):
        pytest.skip('needs the extra "qat"', allow_module_level=True)
    import tfquant.qat.tfmot as engine

    return engine.tf_keras, engine.tfmot


def build(function: Callable[..., Any], inputs: Mapping[str, Shape | tf.TensorSpec]) -> Graph:
    """The graph of a function over TensorFlow ops.

    Args:
        function: gets a tensor per input; returns a tensor, a list or a dict of tensors.
        inputs: name to shape, float32 unless it is a TensorSpec; the order being that of the arguments.
    """
    with tf.Graph().as_default() as scratch:
        result = _traced(function, inputs)
        definition = scratch.as_graph_def()
        return Graph.from_graph_def(definition, {name: name for name in inputs}, {key: t.name for key, t in result.items()})


def evaluate(function: Callable[..., Any], inputs: Mapping[str, Shape | tf.TensorSpec], batches: Sequence[Arrays]) -> Arrays:
    """What a function as for `build` computes, over all batches, without the product's hands on it."""
    with tf.Graph().as_default() as scratch, tf.compat.v1.Session(graph=scratch, config=_config()) as session:
        names = {key: tf.identity(tensor) for key, tensor in _traced(function, inputs).items()}
        return joined([session.run(names, {f"{key}:0": value for key, value in batch.items()}) for batch in batches])


def _traced(function: Callable[..., Any], inputs: Mapping[str, Shape | tf.TensorSpec]) -> dict[str, tf.Tensor]:
    specs = {name: spec if isinstance(spec, tf.TensorSpec) else tf.TensorSpec(spec) for name, spec in inputs.items()}
    result = function(*(tf.compat.v1.placeholder(spec.dtype, spec.shape, name=name) for name, spec in specs.items()))
    if isinstance(result, dict):
        return result
    results = result if isinstance(result, (list, tuple)) else [result]
    return {f"output_{i}": tensor for i, tensor in enumerate(results)}


@dataclasses.dataclass(frozen=True)
class Result:
    """A graph on its way; outputs by name, over all batches.

    Attributes:
        graph: the simplified float graph.
        annotation: units and groups.
        plan: ranges and scales.
        lowered: the INT8 graph.
        floats: outputs of the float graph.
        simulated: outputs of the simulation.
        int8: outputs of the INT8 graph.
    """

    graph: Graph
    annotation: Annotation
    plan: QuantPlan
    lowered: Graph
    floats: Arrays
    simulated: Arrays
    int8: Arrays

    @property
    def decisions(self) -> dict[str, OpDecision]:
        return {decision.name: decision for decision in self.plan.ops}

    def kernels(self) -> list[str]:
        """The ops of the INT8 graph, without constants."""
        return [node.op for node in self.lowered.order() if node.op not in ("Const", "Placeholder")]


@dataclasses.dataclass(frozen=True)
class Planned:
    """A simplified graph with its plan.

    Attributes:
        graph: the float graph.
        annotation: units and groups.
        plan: ranges and scales.
        values: of the float graph's outputs, and of all quantized tensors by their names.
    """

    graph: Graph
    annotation: Annotation
    plan: QuantPlan
    values: Arrays


def plan_for(
    graph: Graph,
    batches: Sequence[Arrays],
    estimator: str = "minmax",
    specs: Mapping[str, QuantSpec] | None = None,
    ignored: Sequence[str] = (),
    **options: str,
) -> Planned:
    """Simplifies `graph` in place and makes its plan.

    Args:
        graph: the float graph.
        batches: values of its inputs.
        estimator: how ranges are found.
        specs: replace those of the named tensors.
        ignored: entries of an ignored scope.
        options: activation_mode, weights and isa.
    """
    names = [(node.name, node.op) for node in graph.order()]
    simplify(graph)
    scope = resolve(ignored, [*names, *((node.name, node.op) for node in graph.order())])
    annotation = annotate(graph, onednn.TABLE, lambda node: held(scope, node))
    stats = collect(graph, observed(annotation), batches)
    plan = make_plan(annotation, stats, target="onednn", signature_keys=("serving_default",), estimator=estimator, **options)
    if specs:
        plan = dataclasses.replace(plan, tensors={**plan.tensors, **specs})
    fetches = dict(graph.outputs) | {name: graph.tensor(name) for name in plan.tensors}
    return Planned(graph, annotation, plan, joined(run(graph, batches, fetches)))


def dynamic_plan_for(graph: Graph, batches: Sequence[Arrays], ignored: Sequence[str] = (), **options: str) -> Planned:
    """As `plan_for`, with ranges that are found at each call; options: activation_mode, weights and isa."""
    names = [(node.name, node.op) for node in graph.order()]
    simplify(graph)
    scope = resolve(ignored, [*names, *((node.name, node.op) for node in graph.order())])
    annotation = annotate(graph, onednn.TABLES["dynamic"], lambda node: held(scope, node))
    plan = make_dynamic_plan(annotation, target="onednn", signature_keys=("serving_default",), **options)
    fetches = dict(graph.outputs) | {name: graph.tensor(name) for name in plan.dynamic}
    return Planned(graph, annotation, plan, joined(run(graph, batches, fetches)))


def both(
    graph: Graph,
    batches: Sequence[Arrays],
    estimator: str = "minmax",
    specs: Mapping[str, QuantSpec] | None = None,
    **options: str,
) -> Result:
    """Float, simulation and INT8 of `graph`, which is simplified in place; options as for `plan_for`."""
    planned = plan_for(graph, batches, estimator, specs, **options)
    units, plan = planned.annotation.units, planned.plan
    lowered = onednn.lower(graph, units, plan)
    simulated = joined(run(fakequant.lower(graph, units, plan), batches))
    floats = {key: planned.values[key] for key in graph.outputs}
    return Result(graph, planned.annotation, plan, lowered, floats, simulated, serve(lowered, batches))


def serve(graph: Graph, batches: Sequence[Arrays]) -> Arrays:
    """The outputs as the product computes them: by a concrete function."""
    function = executable(graph)
    parts = [function(*(tf.constant(batch[key]) for key in graph.inputs)) for batch in batches]
    return {key: np.concatenate([part[i].numpy() for part in parts]) for i, key in enumerate(graph.outputs)}


def run(
    graph: Graph,
    batches: Sequence[Arrays],
    fetches: Mapping[str, Tensor] | None = None,
    feeds: Sequence[Mapping[Tensor, np.ndarray]] | None = None,
) -> list[Arrays]:
    """Values of `fetches` (the outputs, unless told) by name, per batch.

    Args:
        graph: what to run.
        batches: values of the inputs.
        fetches: name to tensor.
        feeds: per batch, values of more tensors.
    """
    fetches = graph.outputs if fetches is None else fetches
    twin = graph.copy()
    fed = feeds[0] if feeds else {}
    twin.outputs = {tensor.name: twin.tensor(tensor.name) for tensor in (*fetches.values(), *fed)}
    with tf.Graph().as_default() as scratch, tf.compat.v1.Session(graph=scratch, config=_config()) as session:
        tf.graph_util.import_graph_def(twin.to_graph_def(), name="")
        # TensorFlow may fuse a fetched tensor away; one that something reads it keeps.
        names = {key: tf.identity(scratch.get_tensor_by_name(_full_name(tensor))) for key, tensor in fetches.items()}
        results = []
        for index, batch in enumerate(batches):
            values = {graph.inputs[key]: value for key, value in batch.items()} | dict(feeds[index] if feeds else {})
            results.append(session.run(names, {_full_name(tensor): value for tensor, value in values.items()}))
    return results


def _config() -> Any:
    """Float ops one by one, as the collector runs them."""
    config = tf.compat.v1.ConfigProto()
    config.graph_options.rewrite_options.remapping = RewriterConfig.OFF
    return config


def _full_name(tensor: Tensor) -> str:
    return f"{tensor.node.name}:{tensor.index}"


def joined(parts: Sequence[Arrays]) -> Arrays:
    """The arrays of all batches behind each other."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


# -- what can be said without running it -----------------------------------------------------------------------------------
def check_plan(planned: Planned) -> list[str]:
    """Ranges that do not hold the data they were made of (min-max), weights far from the float ones, ops left out."""
    found = _check_options(planned)
    plan, units = planned.plan, planned.annotation.units
    for name, spec in plan.tensors.items():
        values = planned.values[name]
        low, high, margin = float(values.min()), float(values.max()), 0.51 * spec.scale
        if spec.source == "minmax" and not spec.low - margin <= low <= high <= spec.high + margin:
            found.append(f"{name} is in [{low}, {high}], its range is [{spec.low}, {spec.high}]")
    for unit in units.values():
        if unit.weights is not None:
            made, scales = weights.dequantized(unit, plan), plan.weight_scales[unit.name]
            error = float((np.abs(made.astype(np.float64) - unit.weights) / scales).max())
            if not error <= 0.501:
                found.append(f"the weights of {unit.name} are {error} steps off")
    covered = {node for unit in units.values() for node in unit.match.covered}
    reasons = {decision.name: decision.reason for decision in plan.ops}
    for node in planned.graph.order():
        before = [tensor.node.inputs[0].node if tensor.node.op == "BiasAdd" else tensor.node for tensor in node.inputs]
        named = [node, *(n for n in before if n.op == "Mul")]  # a Mul names its AddV2, too
        if not node.out.dtype.is_floating or node.op not in onednn.TABLES[plan.mode].subjects or node in covered:
            continue
        if not any(reasons.get(other.name) for other in named):
            found.append(f"{node.op} {node.name} is float without a reason")
    return found


def _check_options(planned: Planned) -> list[str]:
    """Specs and weights that are not as the options of the plan say."""
    found = []
    plan, settings = planned.plan, planned.plan.settings
    for name, spec in plan.tensors.items():
        is_symmetric = spec.zero_point == (0 if spec.dtype != U8 else 128)
        if settings["activation_mode"] == "symmetric" and spec.low < 0 and not is_symmetric:
            found.append(f"{name} is not symmetric: {spec}")
    for unit in planned.annotation.units.values():
        if unit.weights is None:
            continue
        integers, scales = weights.quantized(unit, plan)
        if settings["weights"] == "per_tensor" and unit.kernel.role == "compute" and len(set(scales.tolist())) > 1:
            found.append(f"the scales of {unit.name} differ: {scales}")
        limit = 64 if settings["isa"] == "no_vnni" and unit.saturates else 127
        largest = int(np.abs(integers.astype(np.int32)).max(initial=0))
        if largest > limit:
            found.append(f"the weights of {unit.name} reach {largest}")
    return found


def rounded_outputs(graph: Graph, lowered: Graph) -> list[str]:
    """The outputs of the model that are 8-bit values, looked at through what only moves them."""
    found = []
    for key in graph.outputs:
        node = lowered.outputs[key].node
        while node.op in ("Reshape", "Squeeze", "ExpandDims", "Identity"):
            node = node.inputs[0].node
        if node.op == "Dequantize" and node.attr("T") != tf.qint32:
            found.append(f"output {key} ({graph.outputs[key].name}) is an 8-bit value")
    return found


# -- unit by unit ----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Instrumented:
    """The INT8 graph with what its units compute as further outputs.

    Attributes:
        graph: with outputs "stored/NAME", the integers of a quantized tensor, "float/NAME", a unit's float result, and
            "range/NAME", scale and least value where they are found at the call.
        stored: the NAMEs of the former.
        floats: of the latter.
    """

    graph: Graph
    stored: tuple[str, ...]
    floats: tuple[str, ...]


def instrument(planned: Planned) -> Instrumented:
    """What `onednn.lower` makes, with more outputs.

    A fetch does not keep a Sum kernel from writing over a tensor. So a Cast reads each of them, and the lowering has to
    protect that reader like any other.
    """
    graph, units, plan = planned.graph, planned.annotation.units, planned.plan
    lowering = Lowering(graph, units, plan)
    result = lowering.run()
    stored, floats = [], []
    for name, spec in (plan.tensors | plan.dynamic).items():
        tensor = graph.tensor(name)
        if tensor in lowering._stored:
            source, plain = (tf.quint8, tf.uint8) if spec.dtype == U8 else (tf.qint8, tf.int8)
            if name in plan.dynamic:
                found = lowering._found[tensor]
                attrs = {"N": 2, "T": tf.float32, "axis": 0}
                both = result.add("Pack", [found.scale, found.low], name="check/range", attrs=attrs, dtypes=[tf.float32])
                result.outputs[f"range/{name}"] = both.out
            bits = lowering.bitcast(lowering._stored[tensor], source, plain, f"check/{tensor.node.name}/bits")
            attrs = {"SrcT": plain, "DstT": tf.int32, "Truncate": False}
            cast = result.add("Cast", [bits], name=f"check/{tensor.node.name}", attrs=attrs, dtypes=[tf.int32])
            result.outputs[f"stored/{name}"] = cast.out
            stored.append(name)
    for unit in units.values():
        if lowering.returns_float(unit):
            result.outputs[f"float/{unit.output.name}"] = lowering.as_float(unit.output)
            floats.append(unit.output.name)
    finish(result)
    return Instrumented(result, tuple(stored), tuple(floats))


@dataclasses.dataclass(frozen=True)
class Cut:
    """The simulation with a placeholder in the place of every tensor that the INT8 graph quantizes, or returns in float.

    Attributes:
        graph: the simulation.
        raw: name to what a unit computes, or else to the float value that is quantized.
        fake: name to the fake quantization of it.
        quantized: name to the placeholder of its quantized value.
        floats: name to that of a unit's float result, which is also what `fake` then reads.
    """

    graph: Graph
    raw: dict[str, Tensor]
    fake: dict[str, Tensor]
    quantized: dict[str, Tensor]
    floats: dict[str, Tensor]


def cut_simulation(planned: Planned, floats: Sequence[str]) -> Cut:
    sim = fakequant.lower(planned.graph, planned.annotation.units, planned.plan)
    quantized_names = (*planned.plan.tensors, *planned.plan.dynamic)
    names = (*quantized_names, *floats)
    raw = {name: sim.tensor(name) for name in names if name.partition(":")[0] in sim.nodes}
    fake = {}
    for name in quantized_names:
        start = f"{name.partition(':')[0]}/fake_quantize"
        readers = [user for user, _ in sim.users(raw[name])] if name in raw else []
        for node in readers:
            if node.op == "FakeQuantWithMinMaxVars" and node.name.startswith(start):
                fake[name] = node.out
    quantized = {name: _cut(sim, tensor, f"cut/{name}") for name, tensor in fake.items()}
    returned = {name: _cut(sim, raw[name], f"cut_float/{name}") for name in floats}
    return Cut(sim, raw, fake, quantized, returned)


def _cut(graph: Graph, tensor: Tensor, name: str) -> Tensor:
    name = name.replace(":", "/output_")
    place = graph.add("Placeholder", name=name, attrs={"dtype": tf.float32}, dtypes=[tf.float32], shapes=[tensor.shape]).out
    graph.replace(tensor, place)
    return place


@dataclasses.dataclass(frozen=True)
class Deviation:
    """How far a tensor of the INT8 graph is from the simulation of the unit that makes it.

    Attributes:
        name: of the tensor, or "output KEY".
        kernel: of the unit.
        steps: the largest difference, in steps.
        bias: the mean difference, ties left out.
        allowed: for `steps`.
        detail: for the reader.
    """

    name: str
    kernel: str
    steps: float
    bias: float
    allowed: float
    detail: str

    @property
    def wrong(self) -> bool:
        return not self.steps <= self.allowed or not abs(self.bias) <= max(MAX_BIAS, self.allowed - STEPS + MAX_BIAS)

    def __str__(self) -> str:
        bias = f", bias {self.bias:.3f}" if self.bias else ""
        return f"{self.name} ({self.kernel}): {self.steps:.4g} steps{bias}, {self.allowed:.4g} allowed; {self.detail}"


def deviations(planned: Planned, batches: Sequence[Arrays], more: Mapping[str, float] | None = None) -> list[Deviation]:
    """Every quantized tensor, float result of a unit and output of the model, held against the simulation.

    Args:
        planned: the graph and its plan.
        batches: by input name.
        more: kernel to the further steps that it is allowed.
    """
    whole = instrument(planned)
    values = run(whole.graph, batches)
    if not planned.plan.dynamic:
        return _compared(planned, whole, planned.plan.tensors, batches, values, more or {})
    found = []
    for batch, value in zip(batches, values, strict=True):
        specs = {name: _spec_of(spec, value[f"range/{name}"]) for name, spec in planned.plan.dynamic.items()}
        found += _compared(planned, whole, planned.plan.tensors | specs, [batch], [value], more or {})
    return found


def _spec_of(spec: DynamicSpec, found: np.ndarray) -> QuantSpec:
    """What a call made of a spec; `found` is (scale, least value)."""
    scale, low = (float(number) for number in found)
    least = 0 if spec.dtype == U8 else -127
    return QuantSpec(spec.dtype, scale, least - round(low / scale), "found", "")


def _compared(
    planned: Planned,
    whole: Instrumented,
    specs: Mapping[str, QuantSpec],
    batches: Sequence[Arrays],
    values: Sequence[Arrays],
    more: Mapping[str, float],
) -> list[Deviation]:
    """`values`, of the instrumented graph, against the simulation."""
    plan = planned.plan
    cut = cut_simulation(planned, whole.floats)
    feeds: list[dict[Tensor, np.ndarray]] = [{} for _ in batches]
    for fed, value in zip(feeds, values, strict=True):
        for name in whole.stored:
            spec = specs[name]
            if name in cut.quantized:
                fed[cut.quantized[name]] = ((value[f"stored/{name}"] - spec.zero_point) * spec.scale).astype(np.float32)
        fed |= {cut.floats[name]: value[f"float/{name}"] for name in whole.floats}
    fetches = {f"fake/{name}": tensor for name, tensor in cut.fake.items()}
    fetches |= {f"exact/{name}": tensor.node.inputs[0] for name, tensor in cut.fake.items()}
    fetches |= {f"float/{name}": cut.raw[name] for name in whole.floats}
    fetches |= {key: cut.graph.outputs[key] for key in planned.graph.outputs}
    given, wanted = joined(values), joined(run(cut.graph, batches, fetches, feeds))

    units = {unit.output.name: unit for unit in planned.annotation.units.values()}
    found = []
    for name in whole.stored:
        if name not in cut.fake:
            found.append(Deviation(name, "?", np.inf, 0.0, 0.0, "the simulation does not have it"))
            continue
        spec = specs[name]
        unit = None if name in whole.floats else units.get(name)
        fake = wanted[f"fake/{name}"].astype(np.float64) / spec.scale + spec.zero_point
        exact = np.clip(wanted[f"exact/{name}"].astype(np.float64) / spec.scale + spec.zero_point, *spec.limits)
        allowed = STEPS + FLOAT_ERROR * _mass(unit, plan, specs) / spec.scale
        found.append(_deviation(name, unit, given[f"stored/{name}"], np.rint(fake), exact, allowed, more))
    for name in whole.floats:
        unit = units[name]
        # A kernel sums integers, and rounds the bias to one; rows of a table are products alone.
        steps = specs[unit.inputs[0].name].scale if unit.inputs else 1e-6
        step = steps * float(plan.weight_scales[unit.name].max())
        kernel, simulated = (source[f"float/{name}"].astype(np.float64) / step for source in (given, wanted))
        deviation = _deviation(
            name, unit, kernel, simulated, simulated, STEPS + FLOAT_ERROR * _mass(unit, plan, specs) / step, more
        )
        found.append(dataclasses.replace(deviation, bias=0.0))  # that of a channel is the rounding of its bias
    largest = max((max(-spec.low, spec.high) for spec in specs.values()), default=0.0)
    for key, tensor in planned.graph.outputs.items():  # what is left are float ops on equal values
        if not tensor.dtype.is_floating:
            is_equal = np.array_equal(given[key], wanted[key])
            found.append(Deviation(f"output {key}", "?", 0.0 if is_equal else np.inf, 0.0, 0.0, tensor.dtype.name))
            continue
        result, simulated = (source[key].astype(np.float64) for source in (given, wanted))
        size = float(np.abs(simulated).max(initial=1e-30))
        step = max(1e-5 * size, FLOAT_ERROR * largest, ROUNDING.get(tensor.dtype, 0.0) * size)
        found.append(_deviation(f"output {key}", None, result / step, simulated / step, simulated / step, 1.0, more))
    return found


def _mass(unit: Unit | None, plan: QuantPlan, specs: Mapping[str, QuantSpec]) -> float:
    """The largest sum of absolute values that one output of the unit adds up."""
    if unit is None or unit.weights is None or not unit.inputs:
        return 0.0
    x, *others = (specs[tensor.name] for tensor in unit.inputs)
    integers, scales = weights.quantized(unit, plan)
    taps = np.abs(integers.reshape(-1, len(scales)).astype(np.float64)).sum(0) * scales
    bias = 0.0 if unit.bias is None else np.abs(unit.bias)
    return float((taps * (x.high - x.low) + bias).max()) + sum(other.high - other.low for other in others)


def _deviation(
    name: str,
    unit: Unit | None,
    given: np.ndarray,
    simulated: np.ndarray,
    exact: np.ndarray,
    allowed: float,
    more: Mapping[str, float],
) -> Deviation:
    kernel = unit.kernel.name if unit is not None else "float"
    allowed += more.get(kernel, 0.0)
    if given.shape != simulated.shape:
        return Deviation(name, kernel, np.inf, 0.0, allowed, f"shape {given.shape}, simulated {simulated.shape}")
    if not given.size:
        return Deviation(name, kernel, 0.0, 0.0, allowed, "empty")
    off = np.where(given == simulated, 0.0, np.abs(given - simulated))
    worst = np.unravel_index(int(off.argmax()), off.shape)
    clear = np.abs(exact % 1 - 0.5) > 0.05  # ties may go either way
    bias = float((given - simulated)[clear].mean()) if np.count_nonzero(clear) >= 200 else 0.0
    place = ", ".join(str(int(i)) for i in worst)
    count = int((~(off <= allowed)).sum())
    detail = f"{given[worst]:.7g} for {exact[worst]:.7g} at [{place}] of {given.shape}, {count} of {off.size} wrong"
    return Deviation(name, kernel, float(off.max()), bias, allowed, detail)


def disagreements(planned: Planned, batches: Sequence[Arrays], more: Mapping[str, float] | None = None) -> list[str]:
    """All that is wrong with the plan and the INT8 graph; nothing where it is as promised."""
    lowered = onednn.lower(planned.graph, planned.annotation.units, planned.plan)
    found = check_plan(planned) + rounded_outputs(planned.graph, lowered)
    return found + [str(deviation) for deviation in deviations(planned, batches, more) if deviation.wrong]
