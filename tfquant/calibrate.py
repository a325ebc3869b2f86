"""python -m tfquant.calibrate: a SavedModel goes in, an INT8 SavedModel comes out.

    python -m tfquant.calibrate --saved_model MODEL --data DATA --output FOLDER
    python -m tfquant.calibrate --saved_model MODEL --plan INT8/quant_plan.json --output FOLDER

Exit code 0: the output is there, whole. 2: the input was at fault; one line on stderr says what to do, and nothing was written.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from tfquant.errors import TfquantError
from tfquant.quiet import quiet_start

FLAGS = flags.FLAGS

flags.DEFINE_string("saved_model", None, "Folder of a SavedModel, or a .keras file.")
flags.DEFINE_string(
    "data",
    None,
    "Calibration data: .npz keyed by input name, .npy, a folder of images, or package.module:function that yields "
    "x, [x] or {name: x}.",
)
flags.DEFINE_string("plan", None, "quant_plan.json of an earlier run: its decisions and ranges are used, without data.")
flags.DEFINE_string("output", None, "Folder to write.")
flags.DEFINE_bool("overwrite", False, "Replace the output folder if it exists.")
flags.DEFINE_string("signature_key", "serving_default", "The signature to quantize; others that compute the same follow.")
flags.DEFINE_enum(
    "preprocess",
    "none",
    ["none", "tf", "torch", "caffe", "unit"],
    "For a folder of images: tf is x/127.5-1, torch is (x/255-mean)/std, caffe is BGR minus the mean, unit is x/255.",
)
flags.DEFINE_integer("subset_size", 300, "At most so many samples are used.", lower_bound=1)
flags.DEFINE_integer("batch_size", 10, "Samples per calibration batch.", lower_bound=1)
flags.DEFINE_enum(
    "estimator", "mse", ["mse", "minmax", "mean_minmax", "percentile"], "How ranges are read off the activations' statistics."
)
flags.DEFINE_bool("verify", True, "Compare the result with the float model on the data, and measure latency.")
flags.DEFINE_list("verify_batch_sizes", ["1", "16"], "Batch sizes at which latency is measured; empty to skip.")
_OURS = frozenset(
    {"saved_model", "data", "plan", "output", "overwrite", "signature_key", "preprocess", "subset_size", "batch_size"}
    | {"estimator", "verify", "verify_batch_sizes"}
)


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    logging.set_verbosity(logging.FATAL)  # TensorFlow tells of every file that it writes; errors are raised
    if len(argv) > 1:
        return _refuse(f"Every argument is a --flag. Received: {argv[1]}")
    for name in ("saved_model", "output"):
        if not FLAGS[name].value:
            return _refuse(f"--{name} is missing: see --help.")
    if bool(FLAGS.data) == bool(FLAGS.plan):
        return _refuse("Give either --data or --plan. Received: " + ("both" if FLAGS.data else "neither"))
    try:
        sizes = tuple(int(size) for size in FLAGS.verify_batch_sizes if size.strip())
    except ValueError:
        return _refuse(f"--verify_batch_sizes takes numbers with commas between. Received: {','.join(FLAGS.verify_batch_sizes)}")
    try:
        _run(sizes)
    except TfquantError as error:
        return _refuse(" ".join(str(error).split()))
    except KeyboardInterrupt:
        return _refuse("Interrupted: nothing was written.")
    return 0


def _run(sizes: tuple[int, ...]) -> None:
    from tfquant.config import QuantConfig
    from tfquant.graph.saving import check_output

    check_output(FLAGS.output, FLAGS.overwrite)
    config = QuantConfig(
        signature_key=FLAGS.signature_key,
        subset_size=FLAGS.subset_size,
        batch_size=FLAGS.batch_size,
        estimator=FLAGS.estimator,
        preprocess=FLAGS.preprocess,
        verify=FLAGS.verify,
        verify_batch_sizes=sizes,
    )
    from tfquant.pipeline import quantize

    result = quantize(FLAGS.saved_model, FLAGS.data, config, plan=FLAGS.plan)
    result.save(FLAGS.output, overwrite=FLAGS.overwrite)
    print(result.report)
    print(f"Written to {pathlib.Path(FLAGS.output)}")


def _refuse(message: str) -> int:
    print(f"tfquant.calibrate: {message}", file=sys.stderr)
    return 2


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags; a wrong one is a line and exit code 2, --help is about these flags alone."""
    if any(argument in ("--help", "-h", "-help", "--helpshort", "--helpfull") for argument in argv[1:]):
        print(__doc__)
        for name in sorted(_OURS):
            flag = FLAGS[name]
            print(f"  --{name}: {flag.help} (default: {flag.default_as_str})")
        raise SystemExit(0)
    try:
        return list(FLAGS(list(argv)))
    except flags.Error as error:
        raise SystemExit(_refuse(" ".join(str(error).split()))) from error


if __name__ == "__main__":
    quiet_start()
    app.run(main, flags_parser=parse)
