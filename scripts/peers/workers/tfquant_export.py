"""tfquant's files for other runtimes, as its command line makes them: `format` tflite or onnx; `flags` are more of its flags."""

from pathlib import Path
from typing import Any

from worker import Options, main, run_tfquant


def build(options: Options) -> dict[str, Any]:
    output = Path(options["folder"]) / f"model.{options['format']}"
    report = run_tfquant("export", output, options, "--format", options["format"])
    return {"model": str(output), "files": [str(output)], "report": report}


if __name__ == "__main__":
    main(build, packages=("tensorflow",))
