"""How faithful INT8 is to float32 on real models with real data.

    TFQUANT_ASSETS=path python scripts/fidelity.py [case ...] [--estimator mse]

Needs the folder of models and data that TFQUANT_ASSETS names (default ../shared/assets); its assets.py defines the cases and the
figures. Each case is quantized with its calibration data, saved, loaded again by stock TensorFlow and compared with the float
model: agreement of the largest class and mean KL(float32 || INT8) over all views with their 95% intervals; the metric and the
samples lost and won on the labelled evaluation data; SQNR of INT8 and of the simulation against float32 there.
"""

import argparse
import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Figures:
    """What was measured of a case; agreement and mean_kl are (value, low, high) of the 95% interval."""

    name: str
    agreement: tuple[float, float, float]
    mean_kl: tuple[float, float, float]
    metric: float
    float_metric: float
    lost: int
    won: int
    sqnr: float
    simulated_sqnr: float
    int8_share: float

    @property
    def is_chance(self) -> bool:
        """Whether no more samples were lost than chance allows."""
        return self.lost - self.won <= 2 * (self.lost + self.won) ** 0.5

    def __str__(self) -> str:
        (agreement, *agreement_ends), (kl, *kl_ends) = self.agreement, self.mean_kl
        return (
            f"{self.name:17s} agreement {agreement:6.2f} [{agreement_ends[0]:.2f}, {agreement_ends[1]:.2f}]  "
            f"KL {kl:.4f} [{kl_ends[0]:.4f}, {kl_ends[1]:.4f}]  metric {self.metric:.2f} (float32 {self.float_metric:.2f})  "
            f"lost {self.lost} won {self.won} {'' if self.is_chance else '(beyond chance) '} "
            f"SQNR {self.sqnr:.2f} dB (simulation {self.simulated_sqnr:.2f} dB)  MACs in INT8 {self.int8_share:.2f}%"
        )


def measure(assets: Any, name: str, estimator: str) -> Figures:
    """Quantizes a case of `assets` with its calibration data, saves it, loads it again, and compares it with the float model."""
    case = assets.CASES[name]
    model: Any = str(case.model)
    if not case.model.is_dir():
        import keras

        model = keras.models.load_model(case.model, compile=False)
    result = tfquant.quantize(model, case.calibration(), tfquant.QuantConfig(estimator=estimator, verify=False))
    (key,) = result.input_names
    float_model, simulation = result.float_function(), result.simulation()
    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "int8")
        _loaded, int8 = signature(Path(folder) / "int8")

        def batched(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
            return np.concatenate([function(x[i : i + 50]) for i in range(0, len(x), 50)])

        def reference(x: np.ndarray) -> np.ndarray:
            return next(iter(float_model({key: x}).values()))

        def simulated(x: np.ndarray) -> np.ndarray:
            return next(iter(simulation({key: x}).values()))

        pairs = [(batched(reference, view), batched(int8, view)) for view in case.views()]
        x, labels = case.evaluation()
        expected, found, fake = (batched(function, x) for function in (reference, int8, simulated))
    fidelity = assets.fidelity(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
    lost, won = assets.lost_won(expected, found, labels)
    return Figures(
        name=name,
        agreement=fidelity["agreement"],
        mean_kl=fidelity["mean_kl"],
        metric=case.metric(found, labels),
        float_metric=case.metric(expected, labels),
        lost=lost,
        won=won,
        sqnr=sqnr(expected, found),
        simulated_sqnr=sqnr(expected, fake),
        int8_share=result.report.int8_share,
    )


def find_assets() -> Path:
    """The folder of real models and data, whether it is there or not."""
    return Path(os.environ.get("TFQUANT_ASSETS", ROOT.parent / "shared" / "assets"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="all by default")
    parser.add_argument("--estimator", default=tfquant.QuantConfig().estimator)
    arguments = parser.parse_args()
    folder = find_assets()
    if not (folder / "assets.py").is_file():
        print(
            f"fidelity: there is no assets.py in {folder}: set TFQUANT_ASSETS to the folder of models and data", file=sys.stderr
        )
        return 2
    sys.path.insert(0, str(folder))
    import assets

    passed = True
    for name in arguments.cases or assets.CASES:
        if name not in assets.CASES:
            print(f"fidelity: there is no case {name!r}. Known: {', '.join(assets.CASES)}", file=sys.stderr)
            return 2
        figures = measure(assets, name, arguments.estimator)
        print(figures, flush=True)
        passed &= figures.is_chance
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
