"""python -m tfquant.diagnose: where a model loses accuracy in INT8, layer by layer, and what would help.

    python -m tfquant.diagnose --saved_model MODEL --data DATA
    python -m tfquant.diagnose --saved_model MODEL --data DATA --plan INT8/quant_plan.json --json diagnosis.json
    python -m tfquant.diagnose --config JOB.yaml

Of each layer the error of its 8-bit weights, of its output when it alone is quantized, and of its output in the whole simulation,
as signal-to-noise ratios; how many values its ranges clip, and how much of them is used. The largest errors come with what would
help. Nothing is written but --json.

Exit code 0: all was measured. 2: the input was at fault; one line on stderr says what to do.
"""

from __future__ import annotations

import contextlib
import copy
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags, logging

from tfquant import calibrate, commandline
from tfquant.errors import ConfigError
from tfquant.quiet import quiet_start
from tfquant.supervise import tell_stage

if TYPE_CHECKING:  # NumPy comes with it, and the process that parses flags is about to fork
    from tfquant.jobfile import Job

FLAGS = flags.FlagValues()

_SHARED = {title: names for title, names in calibrate.GROUPS.items() if title != "Output"}
for _name in (name for names in _SHARED.values() for name in names if name != "plan"):
    flags.DEFINE_flag(copy.deepcopy(calibrate.FLAGS[_name]), flag_values=FLAGS)
flags.DEFINE_string(
    "plan",
    None,
    "quant_plan.json of an earlier run: what is diagnosed. Without it the model is quantized first, with the same data.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("worst", 10, "How many layers each table shows.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("json", None, "File to write: all figures of all layers.", flag_values=FLAGS)
_GROUPS = {**_SHARED, "Output": ("worst", "json")}


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    logging.set_verbosity(logging.FATAL)  # errors are raised
    return commandline.run("diagnose", argv, lambda: _run(_job()))


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags; a wrong one is a line and exit code 2, --help is about these flags alone."""
    return commandline.parse("diagnose", argv, FLAGS, __doc__, _GROUPS)


def _job() -> Job:
    """The model, the data and the options.

    Raises:
        ConfigError: an option has a value that it cannot have, or is missing.
    """
    job = calibrate.read_job(FLAGS, is_either=False)
    for name in ("saved_model", "data"):
        if not getattr(job, name):
            raise ConfigError(f"--{name} is missing: see --help.")
    return job


def _run(job: Job) -> None:
    if FLAGS.json:
        commandline.check_file("json", pathlib.Path(FLAGS.json))
    tell_stage("starting TensorFlow")
    quiet_start()
    from tfquant.pipeline import diagnose

    tell_stage("diagnosing the model")
    found = diagnose(job.saved_model, job.data, job.quantization, plan=job.plan)
    if FLAGS.json:
        commandline.write_json("json", pathlib.Path(FLAGS.json), found.to_json())
    with contextlib.suppress(OSError):  # nobody listens; the file is there
        print("\n".join(found.lines(FLAGS.worst)), flush=True)


if __name__ == "__main__":
    commandline.start("diagnose", parse, main)
