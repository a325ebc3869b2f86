"""python -m tfquant.export: a model and its plan become a file for LiteRT, or for ONNX Runtime and OpenVINO.

    python -m tfquant.export --saved_model MODEL --plan INT8/quant_plan.json --format tflite --output model.tflite
    python -m tfquant.export --saved_model MODEL --data DATA --format onnx --output model.onnx
    python -m tfquant.export --saved_model MODEL --format tflite --quantization float16 --output model.tflite

The ranges and the weights are those of the plan; without one the model is quantized first, with --data. The file is run in its
own runtime (LiteRT; ONNX Runtime and, where it is installed, OpenVINO) on a few samples (of --data, or made up) and held against
the simulation in the arithmetic of that, layer by layer.

Exit code 0: the file is there, whole, and computes what the simulation does. 2: the input was at fault, or a runtime computes
something else; one line on stderr says so, and nothing was written but --debug_dump.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from tfquant import calibrate, commandline
from tfquant.errors import ConfigError
from tfquant.quiet import quiet_start
from tfquant.supervise import tell_output, tell_stage

if TYPE_CHECKING:  # NumPy comes with it, and the process that parses flags is about to fork
    from tfquant.jobfile import Job

FLAGS = flags.FlagValues()

_SHARED = {title: names for title, names in calibrate.GROUPS.items() if title not in ("Placement", "Output")}
for _name in (name for names in _SHARED.values() for name in names):
    flags.DEFINE_flag(copy.deepcopy(calibrate.FLAGS[_name]), flag_values=FLAGS)
flags.DEFINE_enum("format", None, ["tflite", "onnx"], "What to write.", flag_values=FLAGS)
flags.DEFINE_string("output", None, "The file to write.", flag_values=FLAGS)
flags.DEFINE_bool("overwrite", False, "Replace the file if it exists.", flag_values=FLAGS)
flags.DEFINE_string(
    "debug_dump", None, "File to write: how each quantized tensor agrees with the simulation, as JSON.", flag_values=FLAGS
)
flags.DEFINE_integer("check_samples", 8, "How many samples of --data the file is compared on.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_enum(
    "quantization",
    None,
    ["int8", "int16", "weights", "dynamic", "float16"],
    "int8; int16 (activations of 16 bits, weights of 8); weights (stored in 8 bits, computed with in float); dynamic (weights of "
    "8 bits, activations quantized at each call); float16. By default what the plan's mode says. The last three need no data.",
    flag_values=FLAGS,
)
_TYPES = ["float32", "int8", "uint8", "int16"]
flags.DEFINE_enum("inference_input_type", "float32", _TYPES, "Dtype of the inputs.", flag_values=FLAGS)
flags.DEFINE_enum(
    "inference_output_type",
    "float32",
    _TYPES,
    "Dtype of the outputs. With int8 activations and float32 outputs, final probabilities have 16 bits.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("opset", 17, "Of ONNX, 13 to 18.", flag_values=FLAGS)
flags.DEFINE_list(
    "inputs_as_nchw", [], "Inputs that the file takes as (N, C, H, W) where the model has (N, H, W, C).", flag_values=FLAGS
)
_TFLITE = ("quantization", "inference_input_type", "inference_output_type")
_ONNX = ("opset", "inputs_as_nchw")
_GROUPS = {
    **_SHARED,
    "Output": ("format", "output", "overwrite", "debug_dump", "check_samples"),
    "TFLite": _TFLITE,
    "ONNX": _ONNX,
}


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    logging.set_verbosity(logging.FATAL)  # errors are raised
    return commandline.run("export", argv, lambda: _run(_job()))


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags; a wrong one is a line and exit code 2, --help is about these flags alone."""
    return commandline.parse("export", argv, FLAGS, __doc__, _GROUPS)


def _job() -> Job:
    """The model, the data, the plan and the options.

    Raises:
        ConfigError: an option has a value that it cannot have, is missing, or is of the other format.
    """
    job = calibrate.read_job(FLAGS, is_either=False, own=("format", "output", "overwrite", "quantization"))
    if not job.saved_model:
        raise ConfigError("--saved_model is missing: see --help.")
    for name in ("format", "output"):
        if not FLAGS[name].value:
            raise ConfigError(f"--{name} is missing: see --help.")
    for name in _ONNX if FLAGS.format == "tflite" else _TFLITE:
        if FLAGS[name].present:
            raise ConfigError(f"--{name} is no option of the format {FLAGS.format}. Received: {FLAGS[name].value}")
    return dataclasses.replace(job, quantization=dataclasses.replace(job.quantization, placement="int8"))


def _run(job: Job) -> None:
    output, dump = pathlib.Path(FLAGS.output), FLAGS.debug_dump
    if dump:
        commandline.check_file("debug_dump", pathlib.Path(dump))
    assert job.saved_model is not None
    sources = {"saved_model": job.saved_model, "data": job.data, "plan": job.plan, "config": FLAGS["config"].value}
    calibrate.keep_sources(str(output), sources)
    tell_stage("starting TensorFlow")
    quiet_start()
    from tfquant.exporters import exporting

    tell_output(output)
    tell_stage("exporting the model")
    shared: dict[str, Any] = {
        "plan": job.plan,
        "overwrite": FLAGS.overwrite,
        "debug_dump": dump,
        "check_samples": FLAGS.check_samples,
    }
    own: dict[str, Any] = {name: FLAGS[name].value for name in (_TFLITE if FLAGS.format == "tflite" else _ONNX)}
    if FLAGS.format == "tflite":
        own["quantization"] = own["quantization"] or ""
        found = exporting.export_tflite(job.saved_model, output, job.data, job.quantization, **shared, **own)
    else:
        found = exporting.export_onnx(job.saved_model, output, job.data, job.quantization, **shared, **own)
    with contextlib.suppress(OSError):  # nobody listens; the file is there
        print("\n".join([*found.lines(), f"Written to {output}"]), flush=True)


if __name__ == "__main__":
    commandline.start("export", parse, main)
