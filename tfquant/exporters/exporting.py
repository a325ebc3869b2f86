"""A model becomes a file for another runtime: from any model that `quantize` takes to a file that was run."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfquant.config import QuantConfig
from tfquant.errors import ConfigError, OutputError, TfquantError
from tfquant.exporters import onnx, tflite
from tfquant.exporters.result import Exported, judge
from tfquant.graph.loading import first_line
from tfquant.pipeline import QuantizedModel, quantize
from tfquant.plan.spec import QuantPlan
from tfquant.progress import stage
from tfquant.unfinished import write_file

# Samples that a file is compared with the simulation on: at once, and by default.
SAMPLES = 8
# Sizes of axes of made-up samples that the model leaves open: of images, of others.
_PIXELS, _LENGTH = 64, 16
_NEEDS_NO_DATA = frozenset({"weights", "dynamic", "float16"})
Samples = Sequence[Mapping[str, np.ndarray]]
Plan = QuantPlan | str | os.PathLike[str]


def export_tflite(
    model: Any,
    path: str | os.PathLike[str],
    representative_dataset: Any = None,
    config: QuantConfig | None = None,
    *,
    plan: Plan | None = None,
    quantization: str = "",
    inference_input_type: str = "float32",
    inference_output_type: str = "float32",
    overwrite: bool = False,
    debug_dump: str | os.PathLike[str] | None = None,
    check_samples: int = SAMPLES,
) -> Exported:
    """Writes a model as a TFLite file, and holds it against the simulation of its plan.

    Args:
        model: a `QuantizedModel`, or what `quantize` takes.
        path: the file to write.
        representative_dataset: samples as for `quantize`. They calibrate, where there is no plan, and the first of them are what
            the file is compared on; without them that is done on made-up samples.
        config: the options of the quantization, where there is no plan.
        plan: an earlier plan, or the path of its quant_plan.json: the file gets its ranges and its weights.
        quantization: "int8"; "int16" (activations of 16 bits, weights of 8); "weights" (stored in 8 bits, computed with in
            float); "dynamic" (weights of 8 bits, activations quantized at each call); or "float16". By default what the plan's
            mode says; the last three need no data.
        inference_input_type: dtype of the inputs: "float32", with "int8" also "int8" and "uint8", with "int16" also "int16".
        inference_output_type: likewise of the outputs. With "int8" and float32 outputs, probabilities that nothing else reads
            have 16 bits: LiteRT's kernels compute these, but not its reference kernels, nor LiteRT for Microcontrollers.
        overwrite: replace what is there.
        debug_dump: a JSON file to write: how each quantized tensor agrees with the simulation. It is written in any case.
        check_samples: how many samples of the dataset the file is compared on.

    Returns:
        What is to be said of the file.

    Raises:
        ConfigError: an option has a value that it cannot have, or there are neither data nor a plan where they are needed.
        OutputError: `path` cannot be written, or the runtime computes something else than the simulation: nothing is written.
        ModelError: the converter cannot write the model; or as for `quantize`, and so `DataError` and `PlanError`.
    """

    def make(quantized: QuantizedModel, samples: Samples) -> tuple[bytes, Exported]:
        return tflite.export(quantized, samples, quantization, inference_input_type, inference_output_type)

    needs_data = quantization not in _NEEDS_NO_DATA
    return _export(model, path, representative_dataset, config, plan, overwrite, debug_dump, check_samples, needs_data, make)


def export_onnx(
    model: Any,
    path: str | os.PathLike[str],
    representative_dataset: Any = None,
    config: QuantConfig | None = None,
    *,
    plan: Plan | None = None,
    opset: int = onnx.DEFAULT_OPSET,
    inputs_as_nchw: Sequence[str] = (),
    overwrite: bool = False,
    debug_dump: str | os.PathLike[str] | None = None,
    check_samples: int = SAMPLES,
) -> Exported:
    """Writes a model as an ONNX file with QuantizeLinear and DequantizeLinear, and holds it against the simulation of its plan.

    Args:
        model: a `QuantizedModel`, or what `quantize` takes.
        path: the file to write.
        representative_dataset: as for `export_tflite`.
        config: the options of the quantization, where there is no plan. Its mode counts: "static", "dynamic" or "weight_only".
        plan: as for `export_tflite`.
        opset: of ONNX, 13 to 18.
        inputs_as_nchw: names of inputs that the file takes as (N, C, H, W) where the model has (N, H, W, C).
        overwrite: replace what is there.
        debug_dump: as for `export_tflite`, and so `check_samples`.

    Returns:
        What is to be said of the file; it is run in ONNX Runtime and in OpenVINO, as far as they are installed.

    Raises:
        ConfigError: tf2onnx is missing; or as for `export_tflite`, and so the others.
    """

    def make(quantized: QuantizedModel, samples: Samples) -> tuple[bytes, Exported]:
        return onnx.export(quantized, samples, opset, inputs_as_nchw)

    return _export(model, path, representative_dataset, config, plan, overwrite, debug_dump, check_samples, True, make)


def _export(
    model: Any,
    path: str | os.PathLike[str],
    data: Any,
    config: QuantConfig | None,
    plan: Plan | None,
    overwrite: bool,
    debug_dump: str | os.PathLike[str] | None,
    check_samples: int,
    needs_data: bool,
    make: Callable[[QuantizedModel, Samples], tuple[bytes, Exported]],
) -> Exported:
    path = pathlib.Path(path)
    check_file(path, overwrite)
    if check_samples < 1:
        raise ConfigError(f"check_samples must be at least 1. Received: {check_samples}")
    if not isinstance(model, QuantizedModel):
        # Where INT8 pays is a question of the runtime; this table is of another.
        config = dataclasses.replace(config or QuantConfig(placement="int8"), verify=False)
        if plan is None and data is None and not needs_data:
            config = dataclasses.replace(config, mode="weight_only")
        model = quantize(model, data, config, plan=plan)
    samples, note = _samples(model, data, config or QuantConfig(), check_samples)
    with stage("Exporting"):
        content, exported = make(model, samples)
    exported = dataclasses.replace(exported, notes=(*exported.notes, *note))
    if debug_dump is not None:
        _write(pathlib.Path(debug_dump), json.dumps(exported.to_json(), indent=1) + "\n")
    judge(exported)
    _write(path, content)
    return exported


def check_file(path: pathlib.Path, overwrite: bool) -> None:
    """Raises `OutputError` when a file may not be written."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder: name a file.")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} exists already: name another file, or say --overwrite (overwrite=True in Python).")


def _write(path: pathlib.Path, content: str | bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {first_line(error)}") from error


# -- samples ---------------------------------------------------------------------------------------------------------------
def _samples(model: QuantizedModel, data: Any, config: QuantConfig, count: int) -> tuple[Samples, tuple[str, ...]]:
    """Batches to compare on, and what is to be said of them."""
    if data is not None:
        few = dataclasses.replace(config, subset_size=count, batch_size=SAMPLES)
        return list(model.batches(data, few)), ()
    made = made_up(model)
    try:
        model.float_function()(made)
    except (TfquantError, tf.errors.OpError, ValueError):
        return [], ("The model does not take made-up samples: give data to compare on.",)
    return [made], ("Compared on made-up samples: give data for real ones.",)


def made_up(model: QuantizedModel) -> dict[str, np.ndarray]:
    """Values for the inputs, the same at each call: floats in the range that the plan has for them, integers 0 and 1, pixels."""
    rng = np.random.default_rng(0)
    found = {}
    for spec in model.input_specs:
        dims = list(spec.shape or ())
        open_size = _PIXELS if len(dims) == 4 else _LENGTH
        shape = [size or (SAMPLES if axis == 0 else open_size) for axis, size in enumerate(dims)]
        dtype = np.dtype(spec.dtype)
        if dtype.kind == "f":
            found[spec.name] = rng.uniform(*_range(model, spec.name), shape).astype(dtype)
        elif dtype.kind in "iub":
            found[spec.name] = rng.integers(0, 256 if dtype == np.uint8 else 2, shape).astype(dtype)
        else:
            found[spec.name] = np.full(shape, "", object)
    return found


def _range(model: QuantizedModel, name: str) -> tuple[float, float]:
    tensor = model.graph.inputs[name].name
    spec = model.plan.tensors.get(tensor)
    return (spec.low, spec.high) if spec is not None else model.plan.ranges.get(tensor, (-1.0, 1.0))
