"""Speed of keras.applications models, INT8 against float32: builds, quantizes, saves, and times the loaded SavedModels.

    python scripts/benchmark.py --names ResNet50,MobileNetV2 --batch_sizes 1,16 --output work/benchmark

Both models are timed in a process of their own that never imports tfquant, with two intra-op threads and TensorFlow's default
environment, interleaved; medians and their ratio are printed, and the share of multiply-accumulates in INT8. The weights are
random (nothing is downloaded) with BatchNorm statistics of real activations.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

ROOT = Path(__file__).resolve().parent.parent
CHILD = """
import sys, time
import numpy as np, tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[5]))
models = [tf.saved_model.load(path) for path in sys.argv[1:3]]
functions = [model.signatures["serving_default"] for model in models]
((name, spec),) = functions[0].structured_input_signature[1].items()
rng = np.random.default_rng(0)
for size in map(int, sys.argv[3].split(",")):
    x = tf.constant(rng.normal(size=(size, *spec.shape[1:])).astype(np.float32))
    calls = [lambda f=f: next(iter(f(**{name: x}).values())).numpy() for f in functions]
    for call in calls * 3:
        call()
    times = [[], []]
    start = time.perf_counter()
    while len(times[0]) < 10 or time.perf_counter() - start < float(sys.argv[4]):
        for call, taken in zip(calls, times):
            begin = time.perf_counter()
            call()
            taken.append((time.perf_counter() - begin) * 1e3)
    fp32, int8 = (float(np.median(taken)) for taken in times)
    print(f"  batch {size:3d}: float32 {fp32:8.2f} ms, INT8 {int8:8.2f} ms, {fp32 / int8:.2f}x", flush=True)
"""


def prepare(name: str, folder: Path) -> None:
    """Builds and quantizes a model by name into `folder`/float32 and `folder`/int8, unless they are there."""
    if (folder / "int8").exists():
        return
    sys.path.insert(0, str(ROOT))
    import tfquant
    from models import applications

    model = applications.build(name)
    model.export(str(folder / "float32"), verbose=False)
    data = applications.images(applications.resolve(name), model.input_shape[1:], 32, 1)
    result = tfquant.quantize(str(folder / "float32"), data, tfquant.QuantConfig(verify_batch_sizes=()))
    result.save(folder / "int8")
    (folder / "report.txt").write_text(f"{result.report}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", default="ResNet50,MobileNetV2", help="classes of keras.applications, with commas between")
    parser.add_argument("--batch_sizes", default="1,16", help="with commas between; empty to quantize only")
    parser.add_argument("--output", type=Path, default=Path("work/benchmark"), help="where the models are kept")
    parser.add_argument("--seconds", type=float, default=20, help="of measurement per batch size")
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads")
    arguments = parser.parse_args()
    for name in arguments.names.split(","):
        folder = arguments.output / name
        prepare(name, folder)
        report = (folder / "report.txt").read_text().splitlines()
        print(name, *(line for line in report if line.startswith(("Multiply", "Size", "Against"))), sep="\n  ", flush=True)
        if arguments.batch_sizes:
            paths = [str(folder / kind) for kind in ("float32", "int8")]
            options = [arguments.batch_sizes, str(arguments.seconds), str(arguments.threads)]
            subprocess.run([sys.executable, "-c", CHILD, *paths, *options], check=True, stderr=subprocess.DEVNULL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
