"""tfquant's files for other runtimes, as its command line makes them: `format` tflite or onnx; `flags` are more of its flags."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from worker import ROOT, Options, main


def build(options: Options) -> dict[str, Any]:
    output = Path(options["folder"]) / f"model.{options['format']}"
    command = [sys.executable, "-m", "tfquant.export", "--saved_model", options["float32"], "--data", options["calibration"]]
    command += ["--format", options["format"], "--output", str(output), *shlex.split(options.get("flags", ""))]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return {"model": str(output), "files": [str(output)], "report": done.stdout}


if __name__ == "__main__":
    main(build, packages=("tensorflow",))
