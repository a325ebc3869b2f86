"""ONNX files for ONNX Runtime and OpenVINO: tf2onnx writes the float ops, and the plan makes integers of them."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from tfquant.errors import ConfigError, ModelError
from tfquant.exporters.checking import Check, check
from tfquant.exporters.marking import NONE, Kernels, mark
from tfquant.exporters.result import Exported, judge
from tfquant.graph.ir import Graph
from tfquant.pipeline import QuantizedModel
from tfquant.verify import fidelity, rows_of

DEFAULT_OPSET = 17
OPSETS = range(13, 19)
# ONNX Runtime has an INT8 convolution for an 8-bit result alone, and an INT8 sum for two 8-bit inputs.
KERNELS = Kernels(
    computes=("Conv2D", "DepthwiseConv2dNative", "Add", "AddV2", "ConcatV2"),
    moves=("Reshape", "Squeeze", "ExpandDims", "Transpose", "MaxPool", "Pad", "Identity"),
    blends=(),
    known={},
)
_KINDS = {"static": "int8", "weight_only": "weights", "dynamic": "dynamic"}


def export(
    model: QuantizedModel,
    samples: Sequence[Mapping[str, np.ndarray]],
    opset: int = DEFAULT_OPSET,
    inputs_as_nchw: Sequence[str] = (),
) -> tuple[bytes, Exported]:
    """Makes an ONNX file of a quantized model, and runs it.

    Args:
        model: its plan says what is quantized, and how. Of mode "dynamic", products with weights find the range of their other
            side at each call, and convolutions have 8-bit weights and compute in float.
        samples: batches keyed by input name, to compare with the simulation on, in ONNX Runtime and in OpenVINO, as far as they
            are installed; without any the file is not run.
        opset: of ONNX, one of `OPSETS`.
        inputs_as_nchw: names of inputs that the file takes as (N, C, ...) where the model has (N, ..., C).

    Returns:
        The file, and what is to be said of it.

    Raises:
        ConfigError: tf2onnx is missing, an option has a value that it cannot have, or the plan has activations below 8 bits.
        ModelError: tf2onnx cannot convert the model at this opset.
        OutputError: the file would be too large, or a runtime does not take it, or it has other weights in mode "dynamic".
    """
    names = _names(model)
    _check(model, names, opset, inputs_as_nchw)
    from tfquant.exporters.onnx import openvino_running, running, writer  # they import tf2onnx, which may be missing

    mode = model.plan.mode
    marked = mark(model, KERNELS if mode == "static" else NONE)
    made = writer.write(marked, names, opset, inputs_as_nchw, dynamic=mode == "dynamic")
    content = writer.pack(made.model)

    def run_in(runtime: str, load: running.Load, layers: Graph, outputs: Graph, hidden: Collection[str] = ()) -> Check:
        """The file in a runtime against simulations: of each layer, of its tensors but the hidden marks, and of the outputs."""
        loose = marked.behind_joined_sums(hidden) if hidden else ()
        file = running.File(content, names, inputs_as_nchw, load)
        if mode == "dynamic":
            close = fidelity(model.simulation(), file.run, samples, rows_of)
            return Check(runtime, close.samples, close.sqnr, close.agreement)
        places = [place for place in made.places if place.mark.name not in hidden]
        inner = file.inner(made.model, places) if places else None
        return check(runtime, layers, file.run, samples, inner, marked.names, outputs, loose)

    found: Check | None = None
    others: tuple[Check, ...] = ()
    fused = running.NOT_RUN
    notes: tuple[str, ...] = ()
    if not running.is_installed():
        notes = ("To run the file here, install onnxruntime: pip install onnxruntime",)
    elif samples:
        fused = running.fused(content)
        notes = fused.lines()
        found = run_in(running.runtime(), running.load, marked.graph, marked.in_integers())
    why_not = openvino_running.why_not()
    if why_not is not None:
        notes += (why_not,)
    elif samples:
        exact = marked.in_integers_of_openvino({place.mark.name: place.mark.stored for place in made.places})
        # A tensor that is shown has one reader more, so its kernel does not write upon it.
        hidden = {name for entry in marked.joined_sums() for name in (entry.own, entry.other)}
        try:
            with openvino_running.process() as load:
                others = (run_in(openvino_running.runtime(), load, exact, exact, hidden),)
        except openvino_running.CannotRun as error:
            notes += (f"{error.label} cannot run the file: {error.reason}",)
    exported = Exported(
        format="onnx",
        kind=f"{_KINDS[mode]}, opset {opset}",
        size=len(content),
        float_size=model.base.constant_bytes,
        quantized_ops=fused.int8,
        float_ops=fused.floats,
        check=found,
        exact=mode != "weight_only",
        notes=notes,
        others=others,
    )
    if found is not None and mode == "dynamic":
        # From call to call other ranges, whose rounding grows from layer to layer: so the weights are looked at alone.
        alone = running.File(writer.pack(writer.write(marked, names, opset, inputs_as_nchw).model), names, inputs_as_nchw)
        with_floats = check(running.runtime(), marked.graph, alone.run, samples)
        judge(dataclasses.replace(exported, check=with_floats, exact=False))
    return content, exported


def _names(model: QuantizedModel) -> dict[str, str]:
    """Of inputs and outputs in the file, by what the graph calls them: their own where there is one signature."""
    found = {}
    for inputs, outputs in model.signatures.values():
        for own, key in (*inputs.items(), *outputs.items()):
            found[key] = own if len(model.signatures) == 1 else key
    return found


def _check(model: QuantizedModel, names: Mapping[str, str], opset: int, inputs_as_nchw: Sequence[str]) -> None:
    if any(importlib.util.find_spec(package) is None for package in ("onnx", "tf2onnx")):
        raise ConfigError('Models are written as ONNX by tf2onnx: install it with pip install "tfquant[onnx]".')
    if opset not in OPSETS:
        raise ConfigError(f"The opset must be from {OPSETS[0]} to {OPSETS[-1]}. Received: {opset}")
    images = [names[spec.name] for spec in model.input_specs if spec.shape is not None and len(spec.shape) in (4, 5)]
    for name in inputs_as_nchw:
        if name not in images:
            known = ", ".join(images) or "there are none"
            raise ConfigError(f"Inputs taken as (N, C, ...) must be of rank 4 or 5: {known}. Received: {name}")
    twice = [name for name, count in collections.Counter(names.values()).items() if count > 1]
    if twice:
        raise ModelError(f"ONNX cannot have an input and an output of one name: rename one of them. Received: {twice[0]}")
