"""INT8 by tfquant against INT8 by other tools, on the same weights, images and cores, in one interleaved run.

    scripts/bench_peers --names ResNet50,MobileNetV2 --batch_sizes 1,16
    scripts/bench_peers --saved_model DIR --data samples.npz --only tfquant,openvino

tfquant, OpenVINO with NNCF, ONNX Runtime, TFLite and Neural Compressor quantize the model with the same samples. Of each side,
float32 TensorFlow included, the fastest setting is looked for at every batch size, and these are timed against each other:
medians of runs, and the median over the rounds of the ratio to tfquant's. What was quantized is kept in --output, and only timed
again the next time. A tool that cannot be installed or fails on a model is shown with the reason.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.common import Parser, numbers
from scripts.peers import models, report
from scripts.peers.building import Workshop
from scripts.peers.comparison import Comparison
from scripts.peers.failure import Failure
from scripts.peers.sides import SIDES
from tfquant.bench.measure import machine_facts
from tfquant.errors import TfquantError
from tfquant.machine import usable_cores
from tfquant.quiet import quiet_start


def tell(line: str) -> None:
    print(f"== {line}", file=sys.stderr, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="bench_peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--names",
        default="",
        help="models of keras.applications or models/transformers.py, with commas between (default: ResNet50)",
    )
    parser.add_argument("--saved_model", type=Path, action="append", default=[], help="or a SavedModel or Keras file; repeatable")
    parser.add_argument("--data", help="samples for --saved_model, as python -m tfquant.calibrate takes them (default: random)")
    parser.add_argument("--preprocess", default="none", help="of images in a folder of --data")
    parser.add_argument("--batch_sizes", type=numbers, default=[1, 16], help="with commas between (default: 1,16)")
    parser.add_argument(
        "--threads", type=int, default=min(2, usable_cores()), help="of each side, on as many cores (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=10, help="of measurement per side and batch size (default: %(default)s)")
    parser.add_argument("--only", default=",".join(SIDES), help="sides, with commas between (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("work/bench_peers"), help="where models are kept (default: %(default)s)"
    )
    parser.add_argument(
        "--environments", type=Path, default=Path("work/peers"), help="where the peers are installed (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=1800, help="seconds that a tool may take for a model (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    options.names = options.names.split(",") if options.names else [] if options.saved_model else ["ResNet50"]
    if unknown := [name for name in options.only if name not in SIDES]:
        parser.error(f"argument --only: there is no side {unknown[0]!r}; there are {', '.join(SIDES)}")
    if not 1 <= options.threads <= usable_cores():
        parser.error(f"argument --threads: this process may use {usable_cores()} cores. Received: {options.threads}")
    if options.seconds <= 0 or options.timeout <= 0:
        parser.error("arguments --seconds and --timeout: must be above 0")
    if options.data and not options.saved_model:
        parser.error("argument --data: is for --saved_model; models by name have images of their own")
    return options


def open_models(options: argparse.Namespace) -> Iterator[models.Model]:
    """The models that were asked for, each made when its turn comes."""
    for name in options.names:
        tell(f"{name}: preparing the model")
        yield models.by_name(name, options.output)
    for path in options.saved_model:
        tell(f"{path}: preparing the model")
        yield models.by_path(path, options.data, options.preprocess, options.output)


def main(arguments: list[str] | None = None) -> int:
    """Compares the sides on each model; returns the exit code."""
    options = parse(arguments)
    quiet_start()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])  # all that is started inherits it
    sides = [side for side in SIDES.values() if side.name in options.only]
    results = {}
    try:
        for model in open_models(options):
            workshop = Workshop(model, options.threads, options.environments, options.timeout, tell)
            results[model.name] = Comparison(workshop, sides, options.batch_sizes, options.seconds, tell).run()
            print(*report.model_lines(model.name, results[model.name], options.batch_sizes), "", sep="\n", flush=True)
    except (Failure, TfquantError) as error:
        print(f"bench_peers: {error}", file=sys.stderr)
        return 2
    if "tfquant" in options.only:
        print(*report.summary_lines(results, options.batch_sizes), sep="\n")
    facts = machine_facts(metadata.version("tensorflow"))
    print(f"\n{facts['cpu']}, {options.threads} threads on as many cores, medians of one interleaved run")
    if options.json:
        figures = {name: report.to_json(outcomes) for name, outcomes in results.items()}
        options.json.write_text(json.dumps({"machine": facts, "threads": options.threads, "models": figures}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
