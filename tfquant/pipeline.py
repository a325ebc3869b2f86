"""quantize(): the way of the data, from any model to INT8."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfquant import verify
from tfquant.config import QuantConfig
from tfquant.data import Batches, InputSpec, open_data
from tfquant.errors import ConfigError, ModelError, PlanError
from tfquant.graph.ir import Graph
from tfquant.graph.loading import Source, first_line, model_inputs
from tfquant.graph.saving import atomic_folder, to_function, to_module, write_saved_model
from tfquant.observe.collector import collect
from tfquant.observe.ranges import make_plan, observed
from tfquant.plan.annotate import Annotation, annotate
from tfquant.plan.kernels import Unit
from tfquant.plan.serialize import load_plan, save_plan
from tfquant.plan.spec import U8, QuantPlan
from tfquant.progress import progress, stage
from tfquant.report import Report, count_ops
from tfquant.simplify import simplify
from tfquant.sources import open_model
from tfquant.targets import fakequant, onednn


def quantize(
    model: Any,
    representative_dataset: Any = None,
    config: QuantConfig | None = None,
    *,
    plan: QuantPlan | str | os.PathLike[str] | None = None,
) -> QuantizedModel:
    """Quantizes a model to INT8.

    Args:
        model: path of a SavedModel or a `.keras` file, or a Keras 3 model.
        representative_dataset: a function that yields samples (`x`, `[x]` or `{name: x}`, each a sample or a batch), a
            `tf.data.Dataset`, a list, an array, or a path to .npz, .npy or a folder of images. Not needed with `plan`.
        config: the options.
        plan: an earlier plan, or the path of its quant_plan.json: its decisions and ranges are used, without data.

    Returns:
        The `QuantizedModel`.

    Raises:
        ModelError: the model cannot be read.
        DataError: the data is missing, empty, of a wrong name, shape or dtype, or not finite.
        PlanError: the plan is not for this model.
        ConfigError: neither data nor a plan is given.
    """
    config = config or QuantConfig()
    given = load_plan(plan) if isinstance(plan, (str, os.PathLike)) else plan
    if given is None and representative_dataset is None:
        raise ConfigError("Quantization needs data or a plan: pass representative_dataset or plan. Received: neither")
    with stage("Loading the model"):
        source = open_model(model, given.signature_key if given is not None else config.signature_key)
    graph = source.graph
    batches = None if representative_dataset is None else _open(source, representative_dataset, config)

    fired = simplify(graph)
    if given is None:
        assert batches is not None
        annotation = annotate(graph, onednn.TABLE)
        stats = collect(graph, observed(annotation), _shown(batches, "Calibrating", config))
        made = make_plan(
            annotation,
            stats,
            target=onednn.TABLE.target,
            signature_key=config.signature_key,
            estimator=config.estimator,
        )
    else:
        annotation, made = apply_plan(graph, given), given
    lowered = onednn.lower(graph, annotation.units, made)

    result = QuantizedModel(source, graph, annotation, made, lowered, fired)
    if config.verify and batches is not None:
        result.verify(batches, config)
    return result


def apply_plan(graph: Graph, plan: QuantPlan) -> Annotation:
    """The annotation that `plan` asks for, on a simplified graph.

    Raises:
        PlanError: the plan belongs to another model (the first op that differs is named), or lacks a range.
    """
    decisions = {decision.name: decision for decision in plan.ops}

    def keep_float(unit: Unit) -> str | None:
        decision = decisions.get(unit.name)
        return None if decision is None or decision.int8 else decision.reason or "the plan keeps it in float"

    if plan.target != onednn.TABLE.target:
        raise PlanError(f"The plan must be for the target {onednn.TABLE.target!r}. Received: {plan.target!r}")
    annotation = annotate(graph, onednn.TABLE, keep_float)
    for found, wanted in zip(annotation.decisions, plan.ops, strict=False):
        if (found.name, found.op, found.key) != (wanted.name, wanted.op, wanted.key):
            same = found.name == wanted.name
            what = (
                f"{wanted.name} has other weights"
                if same
                else f"{found.name} ({found.op}) stands where the plan has {wanted.name}"
            )
            raise PlanError(f"The plan belongs to another model: {what}.")
    if len(annotation.decisions) != len(plan.ops):
        count = len(annotation.decisions)
        raise PlanError(f"The plan belongs to another model: it has {len(plan.ops)} ops to decide on, the model {count}.")
    for group in annotation.groups:
        spec = plan.tensors.get(group.name)
        if spec is not None and group.unsigned and spec.dtype != U8:
            raise PlanError(f"The kernels take {group.name} as {U8} alone. Received: {spec.dtype}")
    missing = [tensor.name for tensor in annotation.quantized if tensor.name not in plan.tensors]
    if missing:
        raise PlanError(f"The plan has no range for {missing[0]}, which its decisions need: calibrate again.")
    return annotation


def _open(source: Source, data: Any, config: QuantConfig) -> Batches:
    specs = [InputSpec(name, shape, dtype) for name, shape, dtype in model_inputs(source)]
    return open_data(data, specs, preprocess=config.preprocess, subset_size=config.subset_size, batch_size=config.batch_size)


def _shown(batches: Batches, title: str, config: QuantConfig) -> Iterator[dict[str, np.ndarray]]:
    total = None if batches.samples is None else -(-batches.samples // config.batch_size)
    return progress(batches, title, total)


class QuantizedModel:
    """An INT8 model: callable like the one it was made from.

    Attributes:
        plan: the decisions and ranges.
        report: what was done, and what it gained.
        graph_def: the INT8 graph; equal for equal plans (compare `SerializeToString(deterministic=True)`).
    """

    def __init__(
        self, source: Source, graph: Graph, annotation: Annotation, plan: QuantPlan, lowered: Graph, fired: Mapping[str, int]
    ) -> None:
        self.plan = plan
        self.graph_def = lowered.to_graph_def()
        self._source, self._graph, self._annotation = source, graph, annotation
        self._module, self._signatures = to_module(source, lowered)
        counts, total, int8 = count_ops(graph, annotation)
        expected = onednn.TABLE.subjects | onednn.TABLE.missing.keys()
        self.report = Report(
            name=source.name,
            ops=counts,
            float_ops=tuple(decision for decision in annotation.decisions if not decision.int8 and decision.op in expected),
            total_macs=total,
            int8_macs=int8,
            simplified=dict(fired),
            size_before=source.size,
            size_after=self.graph_def.ByteSize(),
            left_out=source.dropped,
            kept_float=tuple(source.others),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs, in the structure that the original returns: of its `serve` endpoint, or else of the signature."""
        if hasattr(self._module, "serve"):
            return self._module.serve(*args, **kwargs)
        names = list(self._source.graph.inputs)
        return self._signature(**dict(zip(names, args, strict=False)), **kwargs)

    def _signature(self, **inputs: Any) -> Any:
        function = self._signatures[self._source.signature_key]
        return function(*(tf.convert_to_tensor(inputs[key]) for key in self._source.main.inputs))

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs of the signature."""
        return tuple(self._source.graph.inputs)

    def float_function(self) -> verify.Function:
        """The float model: {input name: array} to {output name: array}."""
        original = self._source.loaded.signatures[self._source.signature_key]

        def run(batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
            try:
                results = original(**{key: tf.convert_to_tensor(value) for key, value in batch.items()})
                return {key: value.numpy() for key, value in results.items()}
            except tf.errors.OpError as error:
                raise ModelError(f"TensorFlow cannot run the float model on this data: {first_line(error)}") from error

        return run

    def simulation(self) -> verify.Function:
        """The same plan with float ops and fake quantization: {input name: array} to {output name: array}, on any machine."""
        simulated = fakequant.lower(self._graph, self._annotation.units, self.plan)
        function = to_function(simulated)

        def run(batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
            results = function(*(tf.constant(batch[key]) for key in simulated.inputs))
            return {key: value.numpy() for key, value in zip(simulated.outputs, results, strict=True)}

        return run

    def verify(self, batches: Batches, config: QuantConfig) -> None:
        """Measures fidelity and latency against the float model into `report`."""

        def lowered(batch: Mapping[str, Any]) -> Mapping[str, np.ndarray]:
            return {key: value.numpy() for key, value in self._signature(**batch).items()}

        reference = self.float_function()
        found = verify.fidelity(reference, lowered, _shown(batches, "Verifying", config))
        self.report = dataclasses.replace(self.report, fidelity=found)
        sizes = [size for size in config.verify_batch_sizes if self._takes(size)]
        if sizes:
            sample = next(iter(batches))
            timed = progress(sizes, "Measuring latency", len(sizes))
            entries = tuple(verify.latency(reference, lowered, sample, [size])[0] for size in timed)
            self.report = dataclasses.replace(self.report, latency=entries)

    def _takes(self, size: int) -> bool:
        """Whether the model's batch dimension allows this size."""
        shapes = [tensor.shape for tensor in self._source.graph.inputs.values()]
        return all(shape is None or (len(shape) > 0 and shape[0] in (None, size)) for shape in shapes)

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Writes the SavedModel, with quant_plan.json and quant_plan.npz in it: whole, or not at all.

        Args:
            path: the folder to make.
            overwrite: replace what is there.

        Raises:
            OutputError: `path` exists and `overwrite` is false, or it cannot be written.
        """
        with atomic_folder(path, overwrite) as folder:
            with stage("Saving"):
                write_saved_model(folder, self._module, self._signatures)
            save_plan(self.plan, folder)
        size = sum(file.stat().st_size for file in pathlib.Path(path).rglob("*") if file.is_file())
        self.report = dataclasses.replace(self.report, size_after=size)
