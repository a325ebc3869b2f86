"""Speed of keras.applications models, INT8 against float32: builds, quantizes, saves, and runs tfquant.benchmark on each.

    python scripts/benchmark.py --names ResNet50,MobileNetV2 --output work/benchmark --batch_sizes 1,16 --seconds 20

What this script does not know goes to `python -m tfquant.benchmark` (--threads, --streams, --settings, --tune_runtime ...), where
{name} stands for the model's. The share of multiply-accumulates in INT8 is printed too. The weights are random (nothing is
downloaded) with BatchNorm statistics of real activations.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

ROOT = Path(__file__).resolve().parent.parent


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--names", default="ResNet50,MobileNetV2", help="classes of keras.applications, with commas between")
    parser.add_argument("--output", type=Path, default=Path("work/benchmark"), help="where the models are kept")
    parser.add_argument("--models_only", action="store_true", help="quantize, and run no benchmark")
    arguments, rest = parser.parse_known_args()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    for name in arguments.names.split(","):
        folder = arguments.output / name
        prepare(name, folder)
        report = (folder / "report.txt").read_text().splitlines()
        print(name, *(line for line in report if line.startswith(("Multiply", "Size", "Against"))), sep="\n  ", flush=True)
        if not arguments.models_only:
            command = [sys.executable, "-m", "tfquant.benchmark", "--models", f"{folder / 'float32'},{folder / 'int8'}"]
            found = subprocess.run([*command, *(word.replace("{name}", name) for word in rest)], env=environment, check=False)
            if found.returncode:
                return found.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
