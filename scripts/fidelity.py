"""How faithful INT8 is to float32 on real models with real data.

    TFQUANT_ASSETS=path python scripts/fidelity.py [case ...] [--estimator mse]

Needs the folder of models and data that TFQUANT_ASSETS names (default ../shared/assets); its assets.py defines the cases and the
figures. Each case is quantized with its calibration data, saved, loaded again by stock TensorFlow and compared with the float
model: agreement of the largest class and mean KL(float32 || INT8) over all views with their 95% intervals; the metric and the
samples lost and won on the labelled evaluation data; SQNR of INT8 and of the simulation against float32 there.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

import tfquant

ROOT = Path(__file__).resolve().parent.parent


def signature(path: str | Path) -> tuple[Any, Callable[[np.ndarray], np.ndarray]]:
    """(loaded model, function of one array) of a SavedModel with one input and one output."""
    loaded = tf.saved_model.load(str(path))
    function = loaded.signatures["serving_default"]
    (name,) = function.structured_input_signature[1]
    return loaded, lambda x: next(iter(function(**{name: tf.constant(x)}).values())).numpy()


def sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10((reference.astype(np.float64) ** 2).sum() / ((reference - other).astype(np.float64) ** 2).sum()))


def evaluate(assets: Any, name: str, estimator: str) -> bool:
    """Prints a case; returns whether it lost no more than chance."""
    case = assets.CASES[name]
    model: Any = str(case.model)
    if not case.model.is_dir():
        import keras

        model = keras.models.load_model(case.model, compile=False)
    config = tfquant.QuantConfig(estimator=estimator, verify=False)
    result = tfquant.quantize(model, case.calibration(), config)
    simulate = result.simulation()
    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "int8")
        _, int8 = signature(Path(folder) / "int8")
        float32 = result.float_function()

        def batched(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
            return np.concatenate([function(x[i : i + 50]) for i in range(0, len(x), 50)])

        (key,) = result.input_names

        def reference(x: np.ndarray) -> np.ndarray:
            return next(iter(float32({key: x}).values()))

        def simulated(x: np.ndarray) -> np.ndarray:
            return next(iter(simulate({key: x}).values()))

        pairs = [(batched(reference, view), batched(int8, view)) for view in case.views()]
        fidelity = assets.fidelity(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
        x, labels = case.evaluation()
        expected, found, fake = (batched(function, x) for function in (reference, int8, simulated))
    (agreement, *agreement_ends), (kl, *kl_ends) = fidelity["agreement"], fidelity["mean_kl"]
    lost, won = assets.lost_won(expected, found, labels)
    is_chance = lost - won <= 2 * (lost + won) ** 0.5
    print(
        f"{name:17s} agreement {agreement:6.2f} [{agreement_ends[0]:.2f}, {agreement_ends[1]:.2f}]  "
        f"KL {kl:.4f} [{kl_ends[0]:.4f}, {kl_ends[1]:.4f}]  metric {case.metric(found, labels):.2f} "
        f"(float32 {case.metric(expected, labels):.2f})  lost {lost} won {won} {'' if is_chance else '(beyond chance) '} "
        f"SQNR {sqnr(expected, found):.2f} dB (simulation {sqnr(expected, fake):.2f} dB)",
        flush=True,
    )
    return is_chance


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="all by default")
    parser.add_argument("--estimator", default=tfquant.QuantConfig().estimator)
    arguments = parser.parse_args()
    folder = Path(os.environ.get("TFQUANT_ASSETS", ROOT.parent / "shared" / "assets"))
    if not (folder / "assets.py").is_file():
        print(
            f"fidelity: there is no assets.py in {folder}: set TFQUANT_ASSETS to the folder of models and data", file=sys.stderr
        )
        return 2
    sys.path.insert(0, str(folder))
    import assets

    results = [evaluate(assets, name, arguments.estimator) for name in arguments.cases or assets.CASES]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
