"""What a quantization costs: its time against a plain float32 pass, and its peak of anonymous memory.

    python scripts/footprint.py --saved_model work/benchmark/ResNet50/float32 --samples 100,1000

For each number of samples, in a process of its own: seconds of a float32 pass over 100 random samples in batches of 10, seconds
of quantizing (loading and saving included, verification left out), and the peak of RssAnon meanwhile.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np


def anonymous_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def measure(path: str, samples: int) -> None:
    """Prints the figures for one number of samples."""
    import tensorflow as tf

    import tfquant

    loaded = tf.saved_model.load(path)
    function = loaded.signatures["serving_default"]
    ((name, spec),) = function.structured_input_signature[1].items()

    def data() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        for _ in range(samples):
            yield rng.normal(size=spec.shape[1:]).astype(np.float32)

    rng = np.random.default_rng(1)
    batches = [tf.constant(rng.normal(size=(10, *spec.shape[1:])).astype(np.float32)) for _ in range(10)]
    function(**{name: batches[0]})
    start = time.perf_counter()
    for batch in batches:
        function(**{name: batch})
    plain = time.perf_counter() - start
    del loaded, function, batches

    peak = [anonymous_megabytes()]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], anonymous_megabytes())
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = tfquant.quantize(path, data, tfquant.QuantConfig(verify=False, subset_size=samples))
        result.save(Path(folder) / "int8")
    took = time.perf_counter() - start
    print(
        f"{samples:5d} samples: quantized in {took:.1f} s; float32 pass over 100 samples {plain:.1f} s; "
        f"peak RssAnon {peak[0]:.0f} MB",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saved_model", required=True)
    parser.add_argument("--samples", default="100,1000", help="with commas between")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.samples.split(",")]
    if len(counts) == 1:
        measure(arguments.saved_model, counts[0])
        return 0
    for count in counts:
        command = [sys.executable, __file__, "--saved_model", arguments.saved_model, "--samples", str(count)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
