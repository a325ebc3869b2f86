"""tfquant, as its command line does it; `flags` are more of its flags."""

from pathlib import Path
from typing import Any

from worker import Options, main, run_tfquant


def build(options: Options) -> dict[str, Any]:
    output = Path(options["folder"]) / "model"
    report = run_tfquant("calibrate", output, options, "--noverify")
    files = [str(path) for path in output.rglob("*") if path.is_file() and not path.name.startswith("quant_plan")]
    return {"model": str(output), "files": files, "report": report}


if __name__ == "__main__":
    main(build, packages=("tensorflow",))
