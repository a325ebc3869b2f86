"""A worker for `openvino_running`: runs ONNX files in OpenVINO's CPU plugin.

    python -P openvino_worker.py

It speaks the lines of `bench.interleave`. A request names files: {"model": ONNX, "feeds": npz of arrays "0", "1" ..., "names": of
the inputs that these are for, "found": npz to write}; the answer is {"names": of the outputs, in that order}. It is run as a
script and imports nothing of tfquant: where OpenVINO crashes, this process alone ends.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np
import openvino

# Float ops are bfloat16 by default where the CPU has it; and no activation is to be quantized that the file has in float.
_OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


def answer(request: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
    """Runs a file.

    Args:
        request: of the form above.
        loaded: the files that were read before, by their paths; it is added to.
    """
    path = request["model"]
    if path not in loaded:
        loaded[path] = openvino.Core().compile_model(path, "CPU", _OPTIONS)
    with np.load(request["feeds"]) as feeds:
        found = loaded[path]({name: feeds[str(number)] for number, name in enumerate(request["names"])})
    named = [(name, value) for output, value in found.items() for name in output.names]
    np.savez(request["found"], **{str(number): value for number, (_, value) in enumerate(named)})
    return {"names": [name for name, _ in named]}


def main() -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    loaded: dict[str, Any] = {}
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("quit"):
            return
        try:
            told = answer(request, loaded)
        except Exception as error:  # OpenVINO raises RuntimeError, and what pybind11 makes of others
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            told = {"error": " ".join(lines)[:300] or type(error).__name__}
        print(json.dumps(told), file=out, flush=True)


if __name__ == "__main__":
    main()
