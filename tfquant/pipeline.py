"""quantize(): the way of the data, from any model to INT8."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import graph_pb2

from tfquant import refine, verify
from tfquant.config import FORMATS, QuantConfig
from tfquant.data import Batches, InputSpec, open_data
from tfquant.diagnosis import Diagnosis, Measurement
from tfquant.errors import ConfigError, DataError, ModelError, PlanError
from tfquant.graph.fake_quant import widest
from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.graph.loading import Source, call_order, first_line, model_inputs
from tfquant.graph.saving import atomic_folder, to_module, write_graph_def, write_saved_model
from tfquant.machine import machine_warnings
from tfquant.observe.budget import choose_bits
from tfquant.observe.checks import DataChecks, batch_norm_inputs, judge_scale
from tfquant.observe.collector import Collector, consume, values
from tfquant.observe.estimators import AUTO
from tfquant.observe.fewer_bits import Bits
from tfquant.observe.learned import ALL, FUSED, Learned, marks, notes, rounds, settle, take, weight_bits, without_ranges
from tfquant.observe.ranges import make_dynamic_plan, make_plan, observed, unknown
from tfquant.observe.selection import select
from tfquant.observe.statistics import TensorStats
from tfquant.placement import Placed, narrow, place, too_small
from tfquant.plan.annotate import Annotation, annotate, as_decided
from tfquant.plan.bodies import annotate_bodies, lower_bodies, read_bodies
from tfquant.plan.edits import apply_edits, in_effect
from tfquant.plan.footprint import model_bytes
from tfquant.plan.results import find_results
from tfquant.plan.scope import held, resolve
from tfquant.plan.serialize import load_plan, save_plan
from tfquant.plan.spec import U8, OpDecision, QuantPlan
from tfquant.progress import progress, stage
from tfquant.report import Report, count_ops, describe_bits, float_macs, in_bodies
from tfquant.simplify import simplify
from tfquant.sources import open_model
from tfquant.targets import fakequant, onednn, weightonly
from tfquant.targets.fakequant import integers
from tfquant.targets.onednn.empty import guard


def quantize(
    model: Any,
    representative_dataset: Any = None,
    config: QuantConfig | None = None,
    *,
    plan: QuantPlan | str | os.PathLike[str] | None = None,
) -> QuantizedModel:
    """Quantizes a model to INT8.

    Args:
        model: path of a SavedModel, of a `.keras` or `.h5` file or of a frozen GraphDef, or a Keras 3 or tf_keras model.
        representative_dataset: a function that yields samples (`x`, `[x]` or `{name: x}`, each a sample or a batch), a
            `tf.data.Dataset`, a list, an array, or a path to .npz, .npy or a folder of images. Needed to calibrate (mode
            "static" without `plan`) what was not trained with fake quantization; else the result is verified on it.
        config: the options.
        plan: an earlier plan, or the path of its quant_plan.json: its decisions and ranges are used, without data.

    Returns:
        The `QuantizedModel`.

    Raises:
        ModelError: the model cannot be read.
        DataError: the data is missing, empty, of a wrong name, shape or dtype, or not finite.
        PlanError: the plan is not for this model.
        ConfigError: neither data nor a plan is given and the model has no fake quantization, or the plan is of another mode, or
            options contradict each other.
    """
    config = config or QuantConfig()
    given = load_plan(plan) if isinstance(plan, (str, os.PathLike)) else plan
    if given is not None:
        if config.mode not in ("static", given.mode):
            raise ConfigError(
                f"The plan is of mode {given.mode}: leave the mode out, or make a new plan. Received: {config.mode}"
            )
        config = dataclasses.replace(config, signature_keys=given.signature_keys, **_input_options(config, given))
    else:
        config.check_bits()
    with stage("Loading the model"):
        source = open_model(model, config)
    graph = source.graph
    batches = None if representative_dataset is None else _open(source, representative_dataset, config)
    warnings = list(machine_warnings(config.isa))
    lines: tuple[str, ...] = ()
    if given is not None:
        fired = simplify(graph)
        base = graph.copy()
        annotation, made = apply_plan(graph, given), given
    else:
        if batches is not None and config.mode == "static":
            warnings += _judge_scale(graph, batches)
        names = [(node.name, node.op) for node in graph.order()]
        bits = weight_bits(graph)
        fired = simplify(graph)
        base = graph.copy()
        bodies = read_bodies(graph) if config.mode == "dynamic" else {}
        keep_float = _held(config, (graph, *bodies.values()), names)
        if config.mode == "static":
            annotation, made, placed, more = _calibrate(source, batches, config, keep_float, bits)
            lines, warnings = placed.lines, [*warnings, *placed.warnings, *more]
        else:
            annotation, made = _plan_without_data(source, config, keep_float, bodies)
        if config.input_dtype != "model":
            told = {"input_dtype": config.input_dtype, "preprocess": config.preprocess}
            made = dataclasses.replace(made, settings={**made.settings, **told})
    result = QuantizedModel(source, base, graph, annotation, made, fired, warnings)
    result.report = dataclasses.replace(result.report, placement=lines)
    if config.verify and batches is not None:
        result.verify(batches, config)
    return result


def diagnose(
    model: Any,
    representative_dataset: Any,
    config: QuantConfig | None = None,
    *,
    plan: QuantPlan | str | os.PathLike[str] | None = None,
) -> Diagnosis:
    """Quantizes a model and tells where it loses accuracy, layer by layer, and what would help.

    Args:
        model: as for `quantize`.
        representative_dataset: likewise; it calibrates, where no plan is given, and is what the errors are measured on.
        config: the options.
        plan: an earlier plan, or the path of its quant_plan.json: it is what is diagnosed.

    Returns:
        The `Diagnosis`.

    Raises:
        ConfigError: the mode is weight_only, or as for `quantize`.
        ModelError: as for `quantize`, and so for `DataError` and `PlanError`.
    """
    config = dataclasses.replace(config or QuantConfig(), verify=False)
    if plan is None:
        _check_diagnosable(config.mode)
    return quantize(model, representative_dataset, config, plan=plan).diagnose(representative_dataset, config)


def _check_diagnosable(mode: str) -> None:
    if mode == "weight_only":
        raise ConfigError(
            "Layers are diagnosed in the modes static and dynamic; in the mode weight_only they compute in float. "
            f"Received: {mode}"
        )


def _input_options(config: QuantConfig, plan: QuantPlan) -> dict[str, Any]:
    """What the plan says of the model's input.

    Raises:
        ConfigError: the options say something else.
    """
    found = {"input_dtype": plan.settings.get("input_dtype", "model")}
    if found["input_dtype"] != "model":
        found["preprocess"] = plan.settings.get("preprocess", "none")
    elif config.input_dtype != "model":
        raise ConfigError(
            "The plan is for the model's own input dtype: leave input_dtype out, or make a new plan. "
            f"Received: {config.input_dtype}"
        )
    return found


KeepFloat = Callable[[Node], str | None]


def _calibrate(
    source: Source, batches: Batches | None, config: QuantConfig, keep_float: KeepFloat, trained: Mapping[str, int]
) -> tuple[Annotation, QuantPlan, Placed, list[str]]:
    """What runs in INT8, with ranges that were learned, or from data; the last is what may be wrong with these.

    Args:
        source: the model, simplified.
        batches: the data; without, what has no learned range stays float.
        config: the options.
        keep_float: what the user keeps in float.
        trained: what `weight_bits` said of the model before it was simplified.
    """
    graph = source.graph
    found = rounds(graph)
    draft = graph.copy() if found else graph  # without fake quantization, to see what INT8 can take
    learned = Learned(take(draft, marks(draft)), trained)
    _check_learned(learned, config, bool(found), batches)
    if config.fewer_bits or learned.fewer_bits:  # a simulation has no speed to place by
        config = dataclasses.replace(config, placement="int8")
    if batches is None:
        keep_float = _with_ranges(draft, keep_float, learned)
    if source.keeps_rounding:
        config = dataclasses.replace(config, trained_rounding=ALL)
    with stage("Placing"):
        sample = None if batches is None else next(iter(batches), None)
        placed = place(draft, keep_float, config, sample, batches is None or batches.batched)
    annotation, decisions = placed.annotation, placed.annotation.decisions
    if found:
        annotation, learned = settle(
            graph, lambda part: annotate(part, onednn.TABLE, as_decided(decisions)), trained, config.trained_rounding
        )
        narrow(graph, placed.bfloat16)

    def again(edited: Graph) -> Annotation:
        return learned.regroup(edited, annotate(edited, onednn.TABLE, as_decided(decisions)))

    algorithms, warnings = _algorithms(learned, config)
    data = () if batches is None else batches
    prepared = refine.before(graph, annotation, data, algorithms, again)
    others = find_results(graph, prepared.annotation, keep_float)
    ends = {tensor.name: source.ranges[tensor.name] for tensor in others if tensor.name in source.ranges}
    ends |= {tensor.name: (grid.low, grid.high) for tensor in others if (own := learned.of(tensor)) and (grid := widest(own))}
    stats: Mapping[Tensor, TensorStats] = {}
    if batches is not None:
        checks = DataChecks(batched=batches.batched)
        collector = Collector(
            graph, observed(prepared.annotation, learned), [tensor for tensor in others if tensor.name not in ends]
        )
        stats = consume(collector, _watched(progress(batches, "Calibrating", batches.count), checks)).stats
        ends |= {tensor.name: found for tensor, found in collector.ends.items()}
        warnings += checks.finish()
    bits = _bits(config)
    if config.size_budget:
        bits = dataclasses.replace(bits, layers=choose_bits(graph, prepared.annotation, data, bits, _budget(source, config)))
    chosen: Mapping[str, str] = {}
    if config.estimator == AUTO:
        chosen = select(
            graph,
            dataclasses.replace(prepared.annotation, groups=tuple(unknown(prepared.annotation, learned))),
            stats,
            data,
            activation_mode=config.activation_mode,
            isa=config.isa,
            bits=bits.activations,
        ).chosen
    made = make_plan(
        prepared.annotation,
        stats,
        target=onednn.TABLE.target,
        signature_keys=source.signature_keys,
        estimator=config.estimator,
        activation_mode=config.activation_mode,
        weights=config.weights,
        isa=config.isa,
        bits=bits,
        chosen=chosen,
        learned=learned,
    )
    made = dataclasses.replace(made, ranges=ends)
    warnings += notes(learned, found, prepared.annotation, made)
    if config.size_budget and not made.is_simulated:
        warnings.append("The model fits into the size budget with 8 bits: without the budget it runs in INT8.")
    annotation, made = refine.after(graph, prepared, made, data, algorithms, again)
    settings = {**made.settings, "algorithms": ",".join(algorithms)}
    if found and config.trained_rounding == ALL:
        settings["trained_rounding"] = ALL
    return annotation, dataclasses.replace(made, bfloat16=placed.bfloat16, settings=settings), placed, warnings


def _check_learned(learned: Learned, config: QuantConfig, has_ranges: bool, batches: Batches | None) -> None:
    """Raises `ConfigError` where options need data that are not there, or would change what was trained."""
    if batches is None and not has_ranges:
        raise ConfigError(
            "Quantization needs data or a plan, but for the modes dynamic and weight_only, and for models with fake "
            "quantization: give data (--data, representative_dataset) or a plan (--plan, plan). Received: neither"
        )
    needing = (
        [f"algorithms {','.join(config.algorithms)}"] if config.algorithms else ["size_budget"] if config.size_budget else []
    )
    if batches is None and needing:
        raise ConfigError(f"Without data there are the learned ranges and weights alone: give data. Received: {needing[0]}")
    if config.size_budget and learned.bits:
        raise ConfigError(
            "A size budget gives weights other bits than they were trained with: leave it out. "
            f"Received: size_budget {config.size_budget:g}"
        )


def _algorithms(learned: Learned, config: QuantConfig) -> tuple[tuple[str, ...], list[str]]:
    """Those that leave what was learned as it is, where something was; a warning for others that were named."""
    if not learned:
        return config.chosen_algorithms, []
    kept = tuple(name for name in config.algorithms if name in refine.CORRECTIONS)
    left = [name for name in config.algorithms if name not in kept]
    return kept, [f"Left out, as they change ranges or weights that were learned: {', '.join(left)}."] if left else []


def _with_ranges(graph: Graph, keep_float: KeepFloat, learned: Learned) -> KeepFloat:
    """Keeps in float besides what has no range without data.

    Raises:
        ConfigError: nothing has.
    """

    def annotated(also: Mapping[str, str]) -> Annotation:
        found = annotate(graph, onednn.TABLE, lambda node: keep_float(node) or also.get(node.name))
        if not any(unit.kernel.role == "compute" for unit in found.units.values()):
            raise ConfigError(
                "The model has fake quantization, but of no input of a layer that can run in INT8: give data. Received: no data"
            )
        return learned.regroup(graph, found)

    held = without_ranges(annotated, learned)
    return lambda node: keep_float(node) or held.get(node.name)


def _bits(config: QuantConfig) -> Bits:
    return Bits(
        weights=config.weight_bits,
        activations=config.activation_bits,
        allocate=config.bit_allocation,
        clip=config.weight_clipping == "aciq",
        correct=config.weight_correction,
    )


def _budget(source: Source, config: QuantConfig) -> int:
    """In bytes."""
    return int(config.size_budget * (source.size if config.size_budget <= 1 else 1))


def _plan_without_data(
    source: Source, config: QuantConfig, keep_float: KeepFloat, bodies: Mapping[str, Graph]
) -> tuple[Annotation, QuantPlan]:
    """Of the modes "dynamic" and "weight_only", which leave fake quantization as it is; `bodies` are those of loops."""
    graph = source.graph
    if config.mode == "weight_only":
        made = weightonly.make_weight_plan(graph, keep_float, signature_keys=source.signature_keys, weights=config.weights)
        return Annotation({}, (), made.ops), made
    table = onednn.TABLES["dynamic"]

    def keep_in_loop(node: Node) -> str | None:
        is_free = config.placement == "int8"
        return keep_float(node) or (None if is_free else too_small(node, table.subjects, config.placement_batch_sizes))

    annotation = annotate_bodies(annotate(graph, table, keep_float), bodies, table, keep_in_loop)
    made = make_dynamic_plan(
        annotation,
        target=onednn.TABLE.target,
        signature_keys=source.signature_keys,
        activation_mode=config.activation_mode,
        weights=config.weights,
        isa=config.isa,
    )
    return annotation, made


def _lower(source: Source, graph: Graph, annotation: Annotation, plan: QuantPlan) -> Graph:
    if plan.mode == "weight_only":
        return weightonly.lower(graph, plan)
    if plan.is_simulated:
        return fakequant.lower(graph, annotation.units, plan)
    lowered = onednn.lower(graph, annotation.units, plan)
    lower_bodies(lowered, annotation.bodies, lambda body: onednn.lower(body.graph, body.annotation.units, plan))
    if any(part.units for part in annotation.parts) and all(
        _keywords(source, key) == list(lowered.inputs) for key in source.signature_keys
    ):
        guard(lowered)
    return lowered


def _held(config: QuantConfig, graphs: Sequence[Graph], names: list[tuple[str, str]]) -> KeepFloat:
    """What the ignored scope keeps in float; entries may also name layers that simplification took away."""
    scope = resolve(config.ignored_scope, [*names, *((node.name, node.op) for graph in graphs for node in graph.order())])
    return lambda node: held(scope, node)


def _judge_scale(graph: Graph, batches: Batches) -> Iterator[str]:
    """Whether the data look as the first BatchNorm was trained on; a warning, or a `DataError`."""
    for found in batch_norm_inputs(graph)[:1]:
        verdict = judge_scale(found, values(graph, found.x, next(iter(batches))))
        if verdict is not None:
            kind, line = verdict
            if kind == "error":
                raise DataError(line)
            yield line


def apply_plan(graph: Graph, plan: QuantPlan) -> Annotation:
    """The annotation that `plan` asks for, on a simplified graph.

    Raises:
        PlanError: the plan belongs to another model (the first op that differs is named), or lacks a range.
    """
    target = weightonly.TARGET if plan.mode == "weight_only" else onednn.TABLE.target
    if plan.target != target:
        raise PlanError(f"The plan must be for the target {target!r}. Received: {plan.target!r}")
    annotation = decided(graph, plan)
    if plan.mode == "weight_only":
        _check_layers(weightonly.find_weights(graph)[1], plan.ops)
        return annotation
    # Which of the other ops are units of their own depends on what an edited plan keeps in float.
    computing = {kernel.name for kernel in onednn.TABLES[plan.mode].kernels if kernel.role == "compute"}
    here, there = ([op for op in ops if op.kernel in computing] for ops in (annotation.decisions, plan.ops))
    _check_layers(here, there)
    for group in annotation.groups:
        spec = plan.tensors.get(group.name)
        if spec is not None and group.unsigned and spec.dtype != U8:
            raise PlanError(f"The kernels take {group.name} as {U8} alone. Received: {spec.dtype}")
    if plan.dynamic and plan.mode != "dynamic":
        raise PlanError(
            f"The range of {next(iter(plan.dynamic))} can be found at each call in mode dynamic alone. Received: {plan.mode}"
        )
    missing = [tensor.name for part in annotation.parts for tensor in part.quantized if not plan.quantizes(tensor.name)]
    if missing:
        raise PlanError(f"The plan has no range for {missing[0]}, which its decisions need: calibrate again.")
    return annotation


def decided(graph: Graph, plan: QuantPlan) -> Annotation:
    """What a plan's edits and decisions make of a simplified graph, in place; whether it has all ranges is not looked at.

    Raises:
        PlanError: it edits a layer that is not there.
    """
    keep_float, learned = as_decided(plan.ops), Learned()
    if plan.mode == "static":
        rounding = str(plan.settings.get("trained_rounding", FUSED))
        _, learned = settle(graph, lambda part: annotate(part, onednn.TABLE, keep_float), {}, rounding)
    narrow(graph, plan.bfloat16)
    apply_edits(graph, in_effect(plan))
    if plan.mode == "weight_only":
        return Annotation({}, (), plan.ops)
    table = onednn.TABLES[plan.mode]
    bodies = read_bodies(graph) if plan.mode == "dynamic" else {}
    return annotate_bodies(learned.regroup(graph, annotate(graph, table, keep_float)), bodies, table, keep_float)


def _check_layers(here: Sequence[OpDecision], there: Sequence[OpDecision]) -> None:
    """Raises `PlanError` when a model has other layers, `here`, than those that a plan decided on."""
    for found, wanted in zip(here, there, strict=False):
        same = found.name == wanted.name
        # Of an op in float the plan has the key with what corrected its bias; nothing is made of its weights.
        if not same or found.op != wanted.op or (found.key != wanted.key and wanted.int8):
            what = (
                f"{wanted.name} has other weights"
                if same
                else f"{found.name} ({found.op}) stands where the plan has {wanted.name}"
            )
            raise PlanError(f"The plan belongs to another model: {what}.")
    if len(here) != len(there):
        raise PlanError(f"The plan belongs to another model: it has {len(there)} layers to decide on, the model {len(here)}.")


def _open(source: Source, data: Any, config: QuantConfig, beside: Sequence[InputSpec] = ()) -> Batches:
    return open_data(
        _by_input_name(source, data),
        [*(InputSpec(*facts) for facts in model_inputs(source)), *beside],
        preprocess="none" if config.input_dtype == "uint8" else config.preprocess,
        subset_size=config.subset_size,
        batch_size=config.batch_size,
        by_position=bool(call_order(source)),
    )


def _by_input_name(source: Source, data: Any) -> Any:
    """Data of the structure that the model's own call takes (a nest of dicts and lists), by the names of the inputs."""
    serve = source.endpoints.get("serve")
    if serve is None or len(serve.arguments[0]) != 1 or not tf.nest.is_nested(serve.arguments[0][0]):
        return data
    structure = serve.arguments[0][0]

    def named(item: Any) -> Any:
        if isinstance(item, Mapping) and set(item) == set(serve.inputs):
            return item
        try:
            if isinstance(item, Mapping) != isinstance(structure, Mapping):
                return item
            tf.nest.assert_same_structure(structure, item, check_types=False)
        except (ValueError, TypeError):
            return item  # `open_data` says what is wrong with it
        return dict(zip(serve.inputs, tf.nest.flatten(item), strict=True))

    if callable(data):
        return lambda: (named(item) for item in data())
    if isinstance(data, (list, tuple, tf.data.Dataset)):
        return lambda: (named(item) for item in data)
    return named(data) if isinstance(data, Mapping) else data


def _watched(batches: Iterator[dict[str, np.ndarray]], checks: DataChecks) -> Iterator[dict[str, np.ndarray]]:
    for batch in batches:
        checks.update(batch)
        yield batch


class QuantizedModel:
    """An INT8 model: callable like the one it was made from. With fewer bits, it is their simulation.

    Attributes:
        plan: the decisions and ranges.
        report: what was done, and what it gained.
        graph_def: the graph; equal for equal plans (compare `SerializeToString(deterministic=True)`).
    """

    def __init__(
        self,
        source: Source,
        base: Graph,
        graph: Graph,
        annotation: Annotation,
        plan: QuantPlan,
        fired: Mapping[str, int],
        warnings: Sequence[str] = (),
    ) -> None:
        """Made by `quantize`: `base` is the simplified float graph as it is for all plans, `graph` what this plan made of it."""
        self.plan = plan
        lowered = _lower(source, graph, annotation, plan)
        self._source, self._base, self._graph, self._annotation, self._lowered = source, base, graph, annotation, lowered
        self._module, self._signatures = to_module(source, lowered)
        bodies = [body.graph for body in annotation.bodies.values()]
        if plan.mode == "weight_only":
            names = {decision.name for decision in plan.ops if decision.int8}
            counts, _, _ = count_ops(graph, {node for node in graph.order() if node.name in names})
            total, int8, rest = 0, 0, dict[str, int]()
            expected = weightonly.LAYERS
        else:
            covered = {node for part in annotation.parts for unit in part.units.values() for node in unit.match.covered}
            counts, total, int8 = count_ops(graph, covered, bodies)
            rest = float_macs(graph, covered, annotation.decisions)
            table = onednn.TABLES[plan.mode]
            expected = table.subjects | table.missing.keys()
        inside = tuple(d for part in (graph, *bodies) for d in in_bodies(part, expected, annotation.bodies))
        self.report = Report(
            name=source.name,
            mode=plan.mode,
            ops=counts,
            float_ops=(
                *(decision for decision in annotation.decisions if not decision.int8 and decision.op in expected),
                *inside,
            ),
            total_macs=total,
            int8_macs=int8,
            simplified=dict(fired),
            size_before=source.size,
            size_after=self._size(),
            left_out=source.dropped,
            kept_float=tuple(source.others),
            warnings=tuple(warnings),
            bfloat16=len(plan.bfloat16),
            has_bodies=bool(inside or any(body.annotation.decisions for body in annotation.bodies.values())),
            float_macs=rest,
            simulated=describe_bits(plan, annotation.units.values()) if plan.is_simulated else "",
        )

    def _size(self) -> int:
        """Bytes of the constants; of a simulation those that it stands for."""
        if not self.plan.is_simulated:
            return self._lowered.constant_bytes
        return model_bytes(self._graph, self._annotation.units.values(), self.plan.weight_bits, self.plan.weight_offsets)

    def with_plan(self, plan: QuantPlan) -> QuantizedModel:
        """The same model by another plan; it is not loaded again.

        Raises:
            PlanError: the plan is not for this model, or lacks a range (see `apply_plan`).
        """
        if plan.signature_keys != self.plan.signature_keys:
            raise PlanError(
                f"The plan must be for the signatures {', '.join(self.plan.signature_keys)}. "
                f"Received: {', '.join(plan.signature_keys)}"
            )
        graph = self._base.copy()
        annotation = apply_plan(graph, plan)
        report = self.report
        other = QuantizedModel(self._source, self._base, graph, annotation, plan, report.simplified, report.warnings)
        other.report = dataclasses.replace(other.report, placement=report.placement)
        return other

    def batches(self, data: Any, config: QuantConfig, beside: Sequence[InputSpec] = ()) -> Batches:
        """Data of any kind that `quantize` takes, as checked batches.

        Args:
            data: as `quantize` takes it, with what is `beside`.
            config: its `preprocess`, `subset_size` and `batch_size` count.
            beside: what the data hold besides the model's inputs.

        Raises:
            DataError: they do not fit the model.
        """
        return _open(self._source, data, config, beside)

    @property
    def base(self) -> Graph:
        """A copy of the simplified float graph, before a plan edits it."""
        return self._base.copy()

    @property
    def graph(self) -> Graph:
        """The simplified float graph with the plan's edits; it must not be changed."""
        return self._graph

    @property
    def name(self) -> str:
        """Of the model, for messages."""
        return self._source.name

    @property
    def signatures(self) -> dict[str, tuple[dict[str, str], dict[str, str]]]:
        """Of each quantized signature the inputs and outputs: from its own names to those of the graph."""
        found = {}
        for key in self._source.signature_keys:
            inputs = {name: name for name in _keywords(self._source, key)}
            found[key] = (inputs, {name: self._source.output_name(key, name) for name in self._source.signatures[key].structure})
        return found

    def write(self, folder: str | os.PathLike[str], graph: Graph) -> None:
        """Writes a SavedModel with this model's interface and another graph, which has its inputs and outputs, into a folder.

        Raises:
            OutputError: TensorFlow cannot save it.
        """
        write_saved_model(pathlib.Path(folder), self._source, *to_module(self._source, graph))

    @property
    def annotation(self) -> Annotation:
        """What runs in INT8."""
        return self._annotation

    @property
    def input_specs(self) -> list[InputSpec]:
        """The model's inputs, in the order of arguments where that is known."""
        return [InputSpec(*facts) for facts in model_inputs(self._source)]

    @property
    def graph_def(self) -> graph_pb2.GraphDef:
        return self._lowered.to_graph_def()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs, in the structure that the original returns: of its `serve` endpoint, or else of the first signature."""
        if hasattr(self._module, "serve"):
            return self._module.serve(*args, **kwargs)
        key = self._source.signature_keys[0]
        names = _keywords(self._source, key)
        return self._signature(key, {**dict(zip(names, args, strict=False)), **kwargs})

    def _signature(self, key: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        names = self._source.signatures[key].inputs
        specs = self._source.signatures[key].arguments[1]
        return dict(self._signatures[key](*(tf.convert_to_tensor(inputs[name], specs[name].dtype) for name in names)))

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs of the signatures."""
        return tuple(self._source.graph.inputs)

    def float_function(self) -> verify.Function:
        """The float model: {input name: array} to {output name: array}."""

        def run(batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
            try:
                return self._all(batch, lambda key, inputs: self._source.original[key](**inputs))
            except tf.errors.OpError as error:
                raise ModelError(f"TensorFlow cannot run the float model on this data: {first_line(error)}") from error

        return run

    def int8_function(self) -> verify.Function:
        """The INT8 model: {input name: array} to {output name: array}."""
        return lambda batch: self._all(batch, self._signature)

    def _all(
        self, batch: Mapping[str, Any], call: Callable[[str, Mapping[str, Any]], Mapping[str, Any]]
    ) -> dict[str, np.ndarray]:
        """The outputs of all quantized signatures, by their names in the graph."""
        found: dict[str, np.ndarray] = {}
        for key in self._source.signature_keys:
            specs = self._source.signatures[key].arguments[1]
            inputs = {name: tf.convert_to_tensor(batch[name], specs[name].dtype) for name in _keywords(self._source, key)}
            for name, value in call(key, inputs).items():
                found[self._source.output_name(key, name)] = value.numpy()
        return found

    def simulation(self, *, exact: bool = False) -> verify.Function:
        """The same plan on any machine: {input name: array} to {output name: array}.

        Args:
            exact: sum integers and round them in the order of oneDNN's kernels; else float ops with fake quantization, whose
                sums differ in their last bits, so that some values are rounded to another integer. Only mode "static" in 8
                bits has kernels to repeat; others are simulated in float.
        """
        if exact and self.plan.mode == "static" and not self.plan.is_simulated:
            return verify.simulation(integers.of_onednn(self._graph, self._annotation.units, self.plan))
        return verify.simulation(self._simulated())

    def _simulated(self) -> Graph:
        if self.plan.mode == "weight_only":
            return weightonly.simulate(self._graph, self.plan)
        simulated = fakequant.lower(self._graph, self._annotation.units, self.plan)
        bodies = self._annotation.bodies
        lower_bodies(simulated, bodies, lambda body: fakequant.lower(body.graph, body.annotation.units, self.plan))
        return simulated

    def verify(self, batches: Batches, config: QuantConfig) -> None:
        """Measures fidelity and latency against the float model into `report`."""
        reference, lowered = self.float_function(), self.int8_function()
        found = verify.fidelity(reference, lowered, progress(batches, "Verifying", batches.count), batches.rows)
        self.report = dataclasses.replace(self.report, fidelity=found)
        is_timed = batches.batched and not self.plan.is_simulated
        sizes = [size for size in config.verify_batch_sizes if self.takes(size)] if is_timed else []
        if sizes:
            sample = next(iter(batches))
            timed = progress(sizes, "Measuring latency", len(sizes))
            entries = tuple(verify.latency(reference, lowered, sample, [size])[0] for size in timed)
            self.report = dataclasses.replace(self.report, latency=entries)

    def diagnose(self, representative_dataset: Any, config: QuantConfig | None = None) -> Diagnosis:
        """The error of every layer by itself and accumulated, in the simulation, and what would help.

        Args:
            representative_dataset: what to measure on, as for `quantize`.
            config: how to read it: `subset_size`, `batch_size` and `preprocess`.

        Raises:
            ConfigError: the plan is of mode weight_only.
            DataError: as for `quantize`.
            ModelError: TensorFlow cannot run the float model on the data.
        """
        _check_diagnosable(self.plan.mode)
        config = config or QuantConfig()
        config = dataclasses.replace(config, **_input_options(config, self.plan))
        batches = _open(self._source, representative_dataset, config)
        measurement = Measurement(self._graph, self._annotation.units, self.plan)
        samples = 0
        for batch in progress(batches, "Diagnosing", batches.count):
            measurement.update(batch)
            samples += batches.rows(batch)
        inside = sum(len(body.annotation.units) for body in self._annotation.bodies.values())
        return measurement.finish(self.report.name, samples, inside)

    def takes(self, size: int) -> bool:
        """Whether the model's batch dimension allows this size."""
        shapes = [tensor.shape for tensor in self._source.graph.inputs.values()]
        return all(not shape or shape[0] in (None, size) for shape in shapes)

    def save(
        self,
        path: str | os.PathLike[str],
        overwrite: bool = False,
        format: str = "saved_model",
        beside: Mapping[str, str] | None = None,
    ) -> None:
        """Writes the model, with quant_plan.json and quant_plan.npz beside it: whole, or not at all.

        Args:
            path: the folder to make. A model that was chosen among numbered versions gets its number as a folder in it.
            overwrite: replace what is there.
            format: "saved_model"; "graphdef", a frozen_graph.pb; or "fakequant", a SavedModel that simulates INT8 with float
                ops and runs anywhere.
            beside: text files to write beside the plan, by name.

        Raises:
            ConfigError: there is no such format, or the model has fewer than 8 bits and the format is not "fakequant".
            OutputError: `path` exists and `overwrite` is false, or it cannot be written, or the format cannot hold the model.
        """
        if format not in FORMATS:
            raise ConfigError(f"format must be one of {', '.join(FORMATS)}. Received: {format!r}")
        if self.plan.is_simulated and format != "fakequant":
            raise ConfigError(
                "TensorFlow has no kernels below 8 bits: save the model with the format fakequant, its simulation. "
                f"Received: {format}"
            )
        for variable, value in self._source.state:  # calibration and verification ran the model
            variable.assign(value)
        with atomic_folder(path, overwrite) as whole:
            folder = whole / self._source.version
            folder.mkdir(exist_ok=True)
            with stage("Saving"):
                if format == "graphdef":
                    write_graph_def(folder, self._source, self._lowered)
                elif format == "fakequant":
                    write_saved_model(folder, self._source, *to_module(self._source, self._simulated()))
                else:
                    write_saved_model(folder, self._source, self._module, self._signatures)
            save_plan(self.plan, folder)
            for name, text in (beside or {}).items():
                (folder / name).write_text(text)
        if self.plan.is_simulated:  # the size of its floats tells nothing
            return
        size = sum(file.stat().st_size for file in pathlib.Path(path).rglob("*") if file.is_file())
        self.report = dataclasses.replace(self.report, size_after=size)


def _keywords(source: Source, key: str) -> list[str]:
    """The inputs of a signature in the order of the graph's."""
    return [name for name in source.graph.inputs if name in source.signatures[key].arguments[1]]
