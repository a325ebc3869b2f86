"""tfquant, as its command line does it; `flags` are more of its flags."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from worker import ROOT, Options, main


def build(options: Options) -> dict[str, Any]:
    output = Path(options["folder"]) / "model"
    command = [sys.executable, "-m", "tfquant.calibrate", "--saved_model", options["float32"], "--data", options["calibration"]]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    command += ["--output", str(output), "--noverify", *shlex.split(options.get("flags", ""))]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    files = [str(path) for path in output.rglob("*") if path.is_file() and not path.name.startswith("quant_plan")]
    return {"model": str(output), "files": files, "report": done.stdout}


if __name__ == "__main__":
    main(build, packages=("tensorflow",))
