"""python -m tfquant.calibrate: a float model goes in, an INT8 model comes out.

    python -m tfquant.calibrate --saved_model MODEL --data DATA --output FOLDER
    python -m tfquant.calibrate --saved_model MODEL --plan INT8/quant_plan.json --output FOLDER
    python -m tfquant.calibrate --saved_model MODEL --mode dynamic --output FOLDER
    python -m tfquant.calibrate --saved_model TRAINED_WITH_FAKE_QUANTIZATION --output FOLDER
    python -m tfquant.calibrate --config JOB.yaml

Exit code 0: the output is there, whole. 2: the input was at fault; one line on stderr says what to do, and nothing was written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from tfquant import commandline
from tfquant.errors import ConfigError
from tfquant.quiet import quiet_start
from tfquant.supervise import tell_output, tell_stage

if TYPE_CHECKING:  # NumPy comes with it, and the process that parses flags is about to fork
    from tfquant.jobfile import Job

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "config",
    None,
    "A job file (YAML): saved_model, data, plan, output, overwrite, format, and under quantization the options below; "
    "paths in it are relative to it. Flags override it.",
)
flags.DEFINE_string("saved_model", None, "Folder of a SavedModel, .keras, .h5/.hdf5, or frozen GraphDef (.pb).")
flags.DEFINE_list("signature_keys", ["serving_default"], "Signatures to quantize; with --plan, the plan's own count.")
flags.DEFINE_list("tags", ["serve"], "Tags of the MetaGraph in a SavedModel.")
flags.DEFINE_list("inputs", [], "Inputs of a frozen GraphDef; all placeholders that the outputs need where not given.")
flags.DEFINE_list("outputs", [], "Outputs of a frozen GraphDef; the node that nothing reads where there is but one.")
flags.DEFINE_bool("allow_unsafe_ops", False, "Take models with ops that read or write files, or run code.")
flags.DEFINE_string(
    "data",
    None,
    "Calibration data: .npz keyed by input name, .npy, a folder of images, or package.module:function that yields "
    "x, [x] or {name: x}. A model that was trained with fake quantization needs none.",
)
flags.DEFINE_enum(
    "input_dtype",
    "model",
    ["model", "uint8"],
    "uint8: the result takes pixels of 0..255 and does itself what --preprocess names; the data are pixels, too. "
    "With --plan, the plan's own counts.",
)
flags.DEFINE_enum(
    "preprocess",
    "none",
    ["tf", "torch", "caffe", "unit", "none"],
    "For a folder of images, or --input_dtype uint8: "
    "tf is x/127.5-1, torch is (x/255-mean)/std, caffe is BGR minus the mean, unit is x/255.",
)
flags.DEFINE_integer("subset_size", 300, "At most so many samples are used.", lower_bound=1)
flags.DEFINE_integer("batch_size", 10, "Samples per calibration batch.", lower_bound=1)
flags.DEFINE_string("plan", None, "quant_plan.json of an earlier run: its decisions and ranges are used, without data.")
flags.DEFINE_enum(
    "mode",
    "static",
    ["static", "dynamic", "weight_only"],
    "INT8 with ranges from --data; INT8 matrix products with ranges found at each call; or weights alone in 8 bits. The last two "
    "need no data: where it is given, the result is verified on it.",
)
flags.DEFINE_enum(
    "preset",
    "default",
    ["fast", "default", "accuracy"],
    "Algorithms that make the result more faithful, none of which makes it slower: fast (none), default (what costs little "
    "time), accuracy (all that help, within some minutes).",
)
flags.DEFINE_list(
    "algorithms",
    [],
    "In place of a preset, some of: channel_alignment, equalization, smooth_quant, sequential_ranges, adaround, bias_correction, "
    "full_bias_correction.",
)
flags.DEFINE_string(
    "estimator",
    "mse",
    "How ranges are read off the activations' statistics: minmax, mean_minmax, percentile, mse, entropy, aciq, or one of an "
    "installed package; auto: for each tensor the one with which the layers that read it err least.",
)
flags.DEFINE_enum("activation_mode", "asymmetric", ["asymmetric", "symmetric"], "Activations with zero points, or around 0.")
flags.DEFINE_enum("weights", "per_channel", ["per_channel", "per_tensor"], "A scale per output channel, or one for all.")
flags.DEFINE_integer(
    "weight_bits", 8, "Bits of weights; below 8 the result is a simulation (--format fakequant).", lower_bound=2, upper_bound=8
)
flags.DEFINE_integer(
    "activation_bits",
    8,
    "Bits of activations, but for the model's inputs; below 8 the result is a simulation.",
    lower_bound=2,
    upper_bound=8,
)
flags.DEFINE_bool("bit_allocation", False, "The channels of a layer have --weight_bits on average, by their deviations (ACIQ).")
flags.DEFINE_enum("weight_clipping", "aciq", ["aciq", "none"], "How weights below 8 bits are clipped.")
flags.DEFINE_bool("weight_correction", True, "Restore the mean and the deviation of each channel of weights below 8 bits.")
flags.DEFINE_float(
    "size_budget",
    0.0,
    "Bytes that the model may have, or, up to 1, their share of the float model's: each layer's weights get 2 to 8 bits so that "
    "the outputs err least. The result is a simulation.",
    lower_bound=0.0,
)
flags.DEFINE_enum(
    "trained_rounding",
    "fused",
    ["fused", "all"],
    "Of models with fake quantization: kernels pass over what lies within them, which is faster, or all of it stays.",
)
flags.DEFINE_enum("isa", "vnni", ["vnni", "no_vnni"], "The CPU's instructions; no_vnni for CPUs before AVX512-VNNI.")
flags.DEFINE_multi_string(
    "ignored_scope", [], "What stays float: a layer's path, re:REGEX on paths, or type:OP. Repeat the flag for more."
)
flags.DEFINE_enum(
    "placement",
    "table",
    ["table", "measure", "int8"],
    "What runs in INT8: what a table of costs says pays, what pays on this machine, measured, or whatever can.",
)
flags.DEFINE_list("placement_batch_sizes", ["1", "16"], "Batch sizes that the placement is made for; each counts alike.")
flags.DEFINE_integer(
    "placement_threads", 0, "Threads that placement is measured with; 0: as many as there are cores.", lower_bound=0
)
flags.DEFINE_enum("float", "float32", ["float32", "bfloat16"], "What runs the ops that stay float; bfloat16 where that pays.")
flags.DEFINE_string("output", None, "Folder to write.")
flags.DEFINE_enum(
    "format",
    "saved_model",
    ["saved_model", "graphdef", "fakequant"],
    "What is written there: a SavedModel, a frozen_graph.pb, or a SavedModel that simulates INT8 in float.",
)
flags.DEFINE_bool("overwrite", False, "Replace the output folder if it exists.")
flags.DEFINE_bool("verify", True, "Compare the result with the float model on the data, and measure latency.")
flags.DEFINE_list("verify_batch_sizes", ["1", "16"], "Batch sizes at which latency is measured; empty to skip.")
GROUPS = {
    "Model": ("config", "saved_model", "signature_keys", "tags", "inputs", "outputs", "input_dtype", "allow_unsafe_ops"),
    "Data": ("data", "preprocess", "subset_size", "batch_size"),
    "Quantization": (
        *("mode", "plan", "preset", "algorithms", "estimator", "activation_mode", "weights", "trained_rounding", "isa"),
        "ignored_scope",
    ),
    "Fewer bits": ("weight_bits", "activation_bits", "bit_allocation", "weight_clipping", "weight_correction", "size_budget"),
    "Placement": ("placement", "placement_batch_sizes", "placement_threads", "float"),
    "Output": ("output", "format", "overwrite", "verify", "verify_batch_sizes"),
}


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    logging.set_verbosity(logging.FATAL)  # TensorFlow tells of every file that it writes; errors are raised
    return commandline.run("calibrate", argv, lambda: _run(job_from_flags()))


def job_from_flags(values: flags.FlagValues = FLAGS) -> Job:
    """What is to be done.

    Args:
        values: flags of the names of `GROUPS`.

    Raises:
        ConfigError: an option has a value that it cannot have, or is missing.
    """
    job = read_job(values, is_either=True)
    for name in ("saved_model", "output"):
        if not getattr(job, name):
            raise ConfigError(f"--{name} is missing: see --help.")
    if job.data and job.plan:
        raise ConfigError("Give either --data or --plan. Received: both")
    if job.data:
        job.quantization.check_bits()
        if job.quantization.fewer_bits and job.format != "fakequant":
            raise ConfigError(
                "TensorFlow has no kernels below 8 bits: add --format fakequant, which writes the simulation. "
                f"Received: {job.format}"
            )
    return job


def read_job(values: flags.FlagValues, is_either: bool, own: Collection[str] = ()) -> Job:
    """The job file's job with what the flags say.

    Args:
        values: flags of the names of `GROUPS`.
        is_either: of --data and --plan one takes the place of the other.
        own: flags that mean something else than the job's field of that name.

    Raises:
        ConfigError: an option has a value that it cannot have.
    """
    from tfquant.config import QuantConfig
    from tfquant.jobfile import Job, load_job

    file = values["config"].value
    job = load_job(file) if file else Job()
    changes, options = _given(Job, values), _given(QuantConfig, values)
    changes = {name: value for name, value in changes.items() if name not in own}
    if is_either and ("data" in changes or "plan" in changes):
        changes = {"data": None, "plan": None, **changes}
    for name in {"verify_batch_sizes", "placement_batch_sizes"} & set(options):
        options[name] = commandline.numbers(name, options[name])
    return dataclasses.replace(job, **changes, quantization=dataclasses.replace(job.quantization, **options))


def _given(kind: Any, values: flags.FlagValues) -> dict[str, Any]:
    """The fields of a dataclass that were given as flags."""
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: values[name].value for name in names if name in values and values[name].present}


def _run(job: Job) -> None:
    tell_stage("starting TensorFlow")
    quiet_start()
    from tfquant.graph.saving import check_output
    from tfquant.pipeline import quantize

    assert job.saved_model is not None
    assert job.output is not None
    check_output(job.output, job.overwrite)
    keep_sources(job.output, {"saved_model": job.saved_model, "data": job.data, "config": FLAGS["config"].value})
    tell_output(job.output)
    tell_stage("quantizing the model")
    result = quantize(job.saved_model, job.data or None, job.quantization, plan=job.plan)
    tell_stage("saving")
    result.save(job.output, overwrite=job.overwrite, format=job.format)
    with contextlib.suppress(OSError):  # nobody listens; the model is there
        print(result.report)
        print(f"Written to {pathlib.Path(job.output)}", flush=True)


def keep_sources(output_path: str, sources: Mapping[str, str | None]) -> None:
    """Raises `ConfigError` when writing the output would replace what it is made from: the values of flags, by their names."""
    output = pathlib.Path(os.path.realpath(output_path))
    for name, source in sources.items():
        if source and pathlib.Path(source).exists() and output in (path := pathlib.Path(os.path.realpath(source)), *path.parents):
            raise ConfigError(f"--output would replace --{name}: name another folder. Received: {output_path}")


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags; a wrong one is a line and exit code 2, --help is about these flags alone."""
    return commandline.parse("calibrate", argv, FLAGS, __doc__, GROUPS)


if __name__ == "__main__":
    commandline.start("calibrate", parse, main)
