"""ResNet50 before and after: quantizes it, and prints what that did to its size, its answers and its speed.

    python examples/resnet50.py                      # random weights, nothing is downloaded
    python examples/resnet50.py --saved_model DIR --data IMAGES --preprocess caffe
    python examples/resnet50.py --peers              # and against INT8 by other tools, which are installed first

work/resnet50/int8 is an ordinary SavedModel then. With --peers scripts/bench_peers.py follows: all sides on the same weights,
images and cores, each with its best settings; the first time that takes some twenty minutes.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import tfquant
from scripts import bench_peers
from scripts.peers import models
from scripts.peers.failure import Failure
from tfquant.quiet import quiet_start


def main() -> int:
    """Runs the example; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saved_model", type=Path, help="your own, a SavedModel or a Keras file (default: random weights)")
    parser.add_argument("--data", help="samples for it: a folder of images, .npz or .npy")
    parser.add_argument("--preprocess", default="none", help="of images in a folder: tf, torch, caffe, unit or none")
    parser.add_argument("--output", type=Path, default=Path("work/resnet50"), help="(default: %(default)s)")
    parser.add_argument("--peers", action="store_true", help="compare with OpenVINO, ONNX Runtime, TFLite, Neural Compressor")
    options = parser.parse_args()
    quiet_start()
    try:
        if options.saved_model is None:
            model = models.by_name("ResNet50", options.output)
        else:
            model = models.by_path(options.saved_model, options.data, options.preprocess, options.output)
        with np.load(model.calibration) as samples:
            result = tfquant.quantize(str(model.saved_model), dict(samples))
        result.save(options.output / "int8", overwrite=True)
    except (Failure, tfquant.TfquantError) as error:
        print(f"resnet50: {error}", file=sys.stderr)
        return 2
    print(result.report)
    if not options.peers:
        return 0
    chosen = ["--names", "ResNet50"] if options.saved_model is None else ["--saved_model", str(options.saved_model)]
    if options.data:
        chosen += ["--data", options.data, "--preprocess", options.preprocess]
    return bench_peers.main([*chosen, "--output", str(options.output)])


if __name__ == "__main__":
    sys.exit(main())
