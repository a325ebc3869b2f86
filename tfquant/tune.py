"""python -m tfquant.tune: a float model goes in, an INT8 model comes out that is as accurate as you ask for.

    python -m tfquant.tune --saved_model MODEL --data DATA --validation LABELLED.npz --metric top1 \\
        --max_drop 0.5 --drop_type absolute --output FOLDER
    python -m tfquant.tune ... --objective latency --max_seconds 600
    python -m tfquant.tune ... --strategy bayesian --max_trials 50

Everything is quantized first. Where that costs more accuracy than --max_drop, what costs most returns to float. The best model
found is written in any case, with its plan and tuning.json, which tells what was tried. After a kill, the same command goes on
where it was.

Exit code 0: the output is there, whole, and meets the goal. 3: it is there, but misses the goal. 2: the input was at fault; one
line on stderr says what to do, and no model was written.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pathlib
from collections.abc import Sequence

from absl import flags, logging

from tfquant import calibrate, commandline
from tfquant.errors import ConfigError, OutputError
from tfquant.quiet import quiet_start
from tfquant.supervise import tell_output, tell_stage

MISSED = 3
FLAGS = flags.FlagValues()

_SHARED = {title: tuple(name for name in names if name != "plan") for title, names in calibrate.GROUPS.items()}
for _name in (name for names in _SHARED.values() for name in names):
    flags.DEFINE_flag(copy.deepcopy(calibrate.FLAGS[_name]), flag_values=FLAGS)
flags.DEFINE_string(
    "validation",
    None,
    "Labelled data: .npz with the inputs by name and 'labels', or package.module:function that yields (x, y).",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "metric",
    "top1",
    "What counts, higher is better: top1, top5, binary_accuracy (in percent), mse, mae (with a minus in front), one that a "
    "package has, or package.module:function of (outputs, labels).",
    flag_values=FLAGS,
)
flags.DEFINE_float("max_drop", 0.01, "How much lower than the float model's the metric may be.", flag_values=FLAGS)
flags.DEFINE_string(
    "drop_type",
    "relative",
    "What --max_drop is: relative, a share of the float model's metric (0.01 is one percent), or absolute, in the metric's units "
    "(0.5 of top1 is half a percent).",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "strategy",
    "accuracy_aware",
    "How to search: accuracy_aware, the worst group by its effect on the samples that quantization hurts most; basic, in the "
    "order of the graph; mse, by the error of each op's output; hawq, by what that does to the loss; bayesian, by Optuna; "
    "or one that a package has.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "objective",
    "accuracy",
    "The best of the models that meet the goal: accuracy, the one with the fewest ops in float; latency, the fastest on this "
    "machine at --placement_batch_sizes; size, the smallest.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("max_trials", None, "At most so many models are validated.", flag_values=FLAGS)
flags.DEFINE_float("max_seconds", None, "No trial is begun after so many seconds of search.", flag_values=FLAGS)
flags.DEFINE_string(
    "journal",
    None,
    "File for what is found out, from which a run that was killed goes on; beside the output where not given, and then removed "
    "in the end.",
    flag_values=FLAGS,
)
_GROUPS = {
    **_SHARED,
    "Data": (*_SHARED["Data"], "validation", "metric"),
    "Tuning": ("max_drop", "drop_type", "strategy", "objective", "max_trials", "max_seconds", "journal"),
}


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    logging.set_verbosity(logging.FATAL)  # TensorFlow tells of every file that it writes; errors are raised
    return commandline.run("tune", argv, _run)


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags; a wrong one is a line and exit code 2, --help is about these flags alone."""
    return commandline.parse("tune", argv, FLAGS, __doc__, _GROUPS)


def _run() -> int:
    job = calibrate.job_from_flags(FLAGS)
    if job.plan:
        raise ConfigError(f"tune makes its own plan: leave the plan out. Received: {job.plan}")
    if not FLAGS.validation:
        raise ConfigError("--validation is missing: see --help.")
    assert job.saved_model is not None
    assert job.output is not None
    journal = pathlib.Path(FLAGS.journal or f"{os.path.normpath(job.output)}.tuning.jsonl")
    tell_stage("starting TensorFlow")
    quiet_start()
    from tfquant.graph.saving import check_output
    from tfquant.tuner.journal import check_journal
    from tfquant.tuner.loop import tune
    from tfquant.tuner.result import JSON_NAME
    from tfquant.tuner.validation import Validation

    check_output(job.output, job.overwrite)
    sources = {"saved_model": job.saved_model, "data": job.data, "config": FLAGS.config, "validation": FLAGS.validation}
    calibrate.keep_sources(job.output, sources)
    if pathlib.Path(os.path.realpath(job.output)) in pathlib.Path(os.path.realpath(journal)).parents:
        raise ConfigError(f"--journal must lie outside of --output, which is written in one step. Received: {journal}")
    check_journal(journal)
    tell_output(job.output)
    tell_stage("tuning the model")
    result = tune(
        job.saved_model,
        job.data,
        Validation(FLAGS.validation, FLAGS.metric),
        max_drop=FLAGS.max_drop,
        drop_type=FLAGS.drop_type,
        strategy=FLAGS.strategy,
        objective=FLAGS.objective,
        config=job.quantization,
        journal=journal,
        max_trials=FLAGS.max_trials,
        max_seconds=FLAGS.max_seconds,
    )
    tell_stage("saving")
    result.model.save(job.output, overwrite=job.overwrite, format=job.format, beside={JSON_NAME: result.to_json()})
    if not FLAGS.journal:
        try:
            journal.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"The journal cannot be removed: {error}") from error
    with contextlib.suppress(OSError):  # nobody listens; the model is there
        print(f"{result.model.report}\n\n{result}\nWritten to {pathlib.Path(job.output)}", flush=True)
    return 0 if result.met else MISSED


if __name__ == "__main__":
    commandline.start("tune", parse, main)
