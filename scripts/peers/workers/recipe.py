"""Exports a model of models/applications.py or models/transformers.py, with samples to calibrate on and others to judge by."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
from worker import ROOT, Options, main

sys.path.insert(0, str(ROOT))

_CALIBRATION_SEED, _EVALUATION_SEED = 1, 2


def build(options: Options) -> dict[str, Any]:
    from models import applications, transformers

    name, library = options["name"], importlib.import_module(options["keras"])
    if name in transformers.SIZES:
        model = transformers.build(name, library=library)
    else:
        model = applications.build(name, input_size=options["input_size"], library=library)
    folder = Path(options["folder"])
    model.export(str(folder / "float32"))

    def samples(count: int, seed: int) -> dict[str, np.ndarray]:
        if name in transformers.SIZES:
            return transformers.samples(name, count, seed)
        (key,) = model.input_names if options["keras"] == "tf_keras" else [tensor.name for tensor in model.inputs]
        shape = model.input_shape[1:]
        return {key: applications.images(name, shape, applications.affordable(shape, count), seed, library)}

    np.savez(folder / "calibration.npz", **samples(options["samples"], _CALIBRATION_SEED))
    np.savez(folder / "evaluation.npz", **samples(options["fresh"], _EVALUATION_SEED))
    return {"parameters": model.count_params()}


if __name__ == "__main__":
    main(build, packages=("tensorflow",))
