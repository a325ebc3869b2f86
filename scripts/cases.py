"""The real models and data that TFQUANT_ASSETS names, and how close the outputs of others are to those of float32.

The folder's assets.py defines the cases (model, calibration and evaluation data, label-free views, metric) and the figures.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scripts.peers.failure import Failure
from scripts.peers.models import Model, inputs_of

ROOT = Path(__file__).resolve().parent.parent
# Samples in a file of inputs.
PART = 100
_RESAMPLED = 2000
Interval = tuple[float, float, float]


class Outputs(NamedTuple):
    """What a model computes, (N, classes) each.

    Attributes:
        views: of all label-free views.
        labelled: of the evaluation data.
    """

    views: np.ndarray
    labelled: np.ndarray


def find_assets() -> Path:
    """The folder of real models and data, whether it is there or not."""
    return Path(os.environ.get("TFQUANT_ASSETS", ROOT.parent / "shared" / "assets"))


def load_assets() -> Any:
    """The module assets.py of that folder.

    Raises:
        Failure: it is not there.
    """
    folder = find_assets()
    if not (folder / "assets.py").is_file():
        raise Failure(f"there is no assets.py in {folder}: set TFQUANT_ASSETS to the folder of models and data")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module("assets")


def saved_model(case: Any, folder: Path) -> Path:
    """The SavedModel of a case; that of a Keras file is written to `folder`, unless it is there."""
    if case.model.is_dir():
        return Path(case.model)
    path = folder / "float32"
    if not (path / "saved_model.pb").exists():
        import keras

        keras.models.load_model(case.model, compile=False).export(str(path), verbose=False)
    return path


# -- the data, as files for the processes of the tools ----------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Prepared:
    """A case as files.

    Attributes:
        model: the float32 model with its calibration data.
        views: of inputs, at most `PART` samples each.
        labelled: likewise.
        labels: (N,) of the latter.
    """

    model: Model
    views: tuple[Path, ...]
    labelled: tuple[Path, ...]
    labels: np.ndarray


def prepare(name: str, case: Any, folder: Path) -> Prepared:
    """Writes model and data of a case into `folder`."""
    folder = folder.resolve()
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    path = saved_model(case, folder)
    (key,) = inputs_of(path)
    calibration = data / "calibration.npz"
    np.savez(calibration, **{key: case.calibration()})
    samples, labels = case.evaluation()
    labelled = tuple(_written(data, "labelled", key, _parts(samples)))
    views = tuple(_written(data, "views", key, (part for view in case.views() for part in _parts(view))))
    return Prepared(Model(name, path, calibration, labelled[0], False, folder), views, labelled, labels)


def _parts(samples: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(samples), PART):
        yield samples[start : start + PART]


def _written(folder: Path, kind: str, key: str, parts: Iterator[np.ndarray]) -> Iterator[Path]:
    for index, part in enumerate(parts):
        path = folder / f"{kind}_{index:03}.npz"
        np.savez(path, **{key: part})
        yield path


# -- the figures ------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Figures:
    """How close a model is to float32; intervals are (value, low, high) with the ends of 95%.

    Attributes:
        agreement: percent of the views with the same largest output.
        mean_kl: mean KL(float32 || model) in nats over the views.
        metric: of the case, on the labelled data.
        lost: labelled samples that float32 alone gets right.
        won: those that the model alone gets right.
    """

    agreement: Interval
    mean_kl: Interval
    metric: float
    lost: int
    won: int

    @property
    def is_chance(self) -> bool:
        """Whether no more samples were lost than chance allows."""
        return self.lost - self.won <= 2 * (self.lost + self.won) ** 0.5


def judge(assets: Any, case: Any, labels: np.ndarray, reference: Outputs, found: Outputs) -> Figures:
    """The figures of `found` against the float model's `reference`."""
    close = assets.fidelity(reference.views, found.views)
    lost, won = assets.lost_won(reference.labelled, found.labelled, labels)
    return Figures(close["agreement"], close["mean_kl"], case.metric(found.labelled, labels), lost, won)


def divergences(assets: Any, reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL(reference || found) of each row in nats, as `assets.fidelity` has it, float64 (N,)."""
    are_probabilities = bool(reference.min() >= 0 and np.allclose(reference.sum(-1), 1, atol=1e-3))
    p, q = (assets.probabilities(rows, are_probabilities) for rows in (reference, found))
    return np.asarray((p * (np.log(p + 1e-6) - np.log(q + 1e-6))).sum(-1))


def paired(ours: np.ndarray, theirs: np.ndarray) -> Interval:
    """Mean of theirs - ours over the same samples, with its 95% bootstrap interval (fixed seed).

    Args:
        ours: float64 (N,).
        theirs: likewise.
    """
    difference = theirs - ours
    picks = np.random.default_rng(0).integers(0, len(difference), (_RESAMPLED, len(difference)))
    low, high = np.quantile(difference[picks].mean(-1), (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)
