"""TFLite files: TensorFlow's converter writes the float ops, and the plan makes integers of them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence

import numpy as np

from tfquant.errors import ConfigError
from tfquant.exporters.checking import STEPS, STEPS_OF_TABLES, Check, check
from tfquant.exporters.marking import NONE, mark
from tfquant.exporters.result import Exported
from tfquant.exporters.tflite import half, running
from tfquant.exporters.tflite.converter import convert
from tfquant.exporters.tflite.flatbuffer import LARGEST, flex_ops
from tfquant.exporters.tflite.kernels import KERNELS
from tfquant.exporters.tflite.quantizer import Converted, Options, quantize
from tfquant.pipeline import QuantizedModel
from tfquant.plan.spec import MODES

KINDS = ("int8", "int16", "weights", "dynamic", "float16")
_KIND_OF_MODE = {"static": "int8", "weight_only": "weights", "dynamic": "dynamic"}
_MODES = {"int8": ("static",), "int16": ("static",), "weights": ("weight_only",), "dynamic": ("weight_only", "dynamic")}
_INTERFACES = {"int8": ("float32", "int8", "uint8"), "int16": ("float32", "int16")}


def export(
    model: QuantizedModel,
    samples: Sequence[Mapping[str, np.ndarray]],
    kind: str = "",
    input_type: str = "float32",
    output_type: str = "float32",
) -> tuple[bytes, Exported]:
    """Makes a TFLite file of a quantized model, and runs it.

    Args:
        model: its plan says what is quantized, and how.
        samples: batches keyed by input name, to compare with the simulation on; without any the file is not run.
        kind: "int8"; "int16" (activations of 16 bits, weights of 8); "weights" (stored in 8 bits, computed with in float);
            "dynamic" (weights of 8 bits, activations quantized at each call); "float16". By default what the plan's mode says.
        input_type: dtype of the inputs: "float32", or with "int8" also "int8" and "uint8", with "int16" also "int16".
        output_type: likewise of the outputs; with "int8" and float32 outputs, probabilities that nothing else reads are int16
            before they become float32.

    Returns:
        The file, and what is to be said of it.

    Raises:
        ConfigError: the plan is of another mode, or an interface is asked for that the kind does not have.
        ModelError: the converter cannot write the model.
        OutputError: LiteRT does not take the file, or cannot run it.
    """
    kind = kind or _KIND_OF_MODE[model.plan.mode]
    _check_kind(model, kind, input_type, output_type)
    if kind == "float16":
        graph, marked = model.base, None
    else:
        marked = mark(model, KERNELS if model.plan.mode == "static" else NONE)
        graph = marked.graph
    with tempfile.TemporaryDirectory() as folder:
        model.write(folder, graph)
        content = convert(folder, list(model.signatures), float16=kind == "float16")
    simulated, exact = graph, None
    if marked is None:
        made = Converted(half.tidied(content) if len(content) <= LARGEST else content, 0, (), {})
    else:
        activations = kind if kind in ("int8", "int16") else "float32"
        made = quantize(
            content, marked.weights, marked.specs, Options(activations, input_type, output_type, hybrid=kind == "dynamic")
        )
        simulated = marked.widened(marked.names if kind == "int16" else made.wide)
        exact = marked.in_integers(simulated) if kind == "int8" else None
    found: Check | None = None
    flex = flex_ops(made.content)
    if samples and not flex:
        names = {} if marked is None else marked.names
        run = running.function(made.content, model.signatures)
        key, (inputs, outputs) = next(iter(model.signatures.items()))
        inner = running.inner(made.content, made.tensors, inputs, outputs, key) if made.tensors else None
        steps = STEPS_OF_TABLES if kind == "int16" else STEPS
        found = check(running.runtime()[0], simulated, run, samples, inner, names, exact, steps=steps)
    exported = Exported(
        format="tflite",
        kind=kind,
        size=len(made.content),
        float_size=model.base.constant_bytes,
        quantized_ops=made.ops,
        float_ops=made.float_ops,
        check=found,
        exact=kind in ("int8", "int16"),
        notes=(f"It needs LiteRT's Flex delegate, for {', '.join(flex)}.",) if flex else (),
    )
    return made.content, exported


def _check_kind(model: QuantizedModel, kind: str, input_type: str, output_type: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"The quantization of a TFLite model must be one of {', '.join(KINDS)}. Received: {kind!r}")
    modes = _MODES.get(kind, MODES)
    if model.plan.mode not in modes:
        wanted = " or ".join(modes)
        raise ConfigError(f"TFLite's quantization {kind} needs a plan of mode {wanted}. Received: one of mode {model.plan.mode}")
    for side, asked in (("input", input_type), ("output", output_type)):
        known = _INTERFACES.get(kind, ("float32",))
        if asked not in known:
            raise ConfigError(f"With the quantization {kind} the {side} type is one of {', '.join(known)}. Received: {asked!r}")
