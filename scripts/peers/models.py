"""The models that are compared, as SavedModels with samples to calibrate on and others to judge by."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from scripts.peers.failure import Failure

Arrays = dict[str, np.ndarray]

CALIBRATION, EVALUATION = 32, 64  # samples
_CALIBRATION_SEED, _EVALUATION_SEED = 1, 2


@dataclasses.dataclass(frozen=True)
class Model:
    """A float32 model with its data.

    Attributes:
        name: in tables.
        saved_model: its folder.
        calibration: an .npz by input name, which every side calibrates on.
        evaluation: likewise, other samples: what is timed and compared with float32.
        is_transformer: whether it is one, which some tools want to be told.
        folder: where its quantized models are kept.
    """

    name: str
    saved_model: Path
    calibration: Path
    evaluation: Path
    is_transformer: bool
    folder: Path


def by_name(name: str, output: Path) -> Model:
    """A model of keras.applications, or one of models/transformers.py, with random weights; built in `output` unless it is there.

    Raises:
        Failure: there is no such name.
    """
    from models import applications, transformers

    is_transformer = name.lower() in map(str.lower, transformers.SIZES)
    recipes = transformers if is_transformer else applications
    try:
        name = recipes.resolve(name)
    except ValueError as error:
        raise Failure(f"{error}; the transformers are {', '.join(transformers.SIZES)}") from error
    folder = output / name
    if not (folder / "float32" / "saved_model.pb").exists():
        recipes.build(name).export(str(folder / "float32"), verbose=False)
    inputs = inputs_of(folder / "float32")

    def samples(count: int, seed: int) -> Arrays:
        if is_transformer:
            return transformers.samples(name, count, seed)
        ((key, spec),) = inputs.items()
        return {key: applications.images(name, tuple(spec.shape[1:]), count, seed)}

    calibration, evaluation = samples(CALIBRATION, _CALIBRATION_SEED), samples(EVALUATION, _EVALUATION_SEED)
    return _with_data(name, folder / "float32", calibration, evaluation, is_transformer, folder)


def by_path(path: Path, data: str | None, preprocess: str, output: Path) -> Model:
    """A user's model.

    Args:
        path: folder of a SavedModel, or a Keras file, which is exported to `output`.
        data: calibration data as tfquant takes them, of which the first third at most calibrates and others are held out; random
            values where None.
        preprocess: of images in a folder.
        output: the model gets a folder there.

    Raises:
        Failure: there is no such model, or no data for it.
        TfquantError: the data do not fit.
    """
    folder = output / path.resolve().stem
    saved_model = path
    if path.is_file():
        import keras

        saved_model = folder / "float32"
        keras.models.load_model(path, compile=False).export(str(saved_model), verbose=False)
    if not (saved_model / "saved_model.pb").is_file():
        raise Failure(f"{path} is not a SavedModel, nor a Keras file")
    inputs = inputs_of(saved_model)
    samples = _random(inputs) if data is None else _read(data, preprocess, inputs)
    count = len(next(iter(samples.values())))
    if count < 2:
        raise Failure(f"one sample is to calibrate on, another to compare with. Received: {count}")
    cut = min(CALIBRATION, max(1, count // 3))
    parts = [{name: array[part] for name, array in samples.items()} for part in (slice(cut), slice(cut, cut + EVALUATION))]
    reads_tokens = any(spec.dtype.is_integer and spec.dtype.size >= 4 for spec in inputs.values())
    return _with_data(path.resolve().stem, saved_model, *parts, reads_tokens, folder)


def inputs_of(path: Path) -> dict[str, Any]:
    """Name to TensorSpec of the signature that is served."""
    import tensorflow as tf

    signatures = tf.saved_model.load(str(path)).signatures
    if "serving_default" not in signatures:
        raise Failure(f"{path} has no signature serving_default; it has {', '.join(signatures) or 'none'}")
    return dict(signatures["serving_default"].structured_input_signature[1])


def _read(data: str, preprocess: str, inputs: dict[str, Any]) -> Arrays:
    from tfquant.data import InputSpec, open_data

    specs = [InputSpec(name, tuple(spec.shape), spec.dtype.name) for name, spec in inputs.items()]
    batches = list(open_data(data, specs, preprocess=preprocess, subset_size=CALIBRATION + EVALUATION, by_position=False))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in inputs}


def _random(inputs: dict[str, Any]) -> Arrays:
    rng = np.random.default_rng(_CALIBRATION_SEED)
    for name, spec in inputs.items():
        if not spec.dtype.is_floating or spec.shape.rank is None or None in spec.shape[1:]:
            raise Failure(f"input {name!r} is {spec.dtype.name} {spec.shape}, of which there are no random values: give --data")
    return {
        name: rng.normal(size=(CALIBRATION + EVALUATION, *spec.shape[1:])).astype(spec.dtype.as_numpy_dtype)
        for name, spec in inputs.items()
    }


def _with_data(
    name: str, saved_model: Path, calibration: Arrays, evaluation: Arrays, is_transformer: bool, folder: Path
) -> Model:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{kind}.npz" for kind in ("calibration", "evaluation")]
    for path, arrays in zip(paths, (calibration, evaluation), strict=True):
        np.savez(path, **arrays)
    return Model(name, saved_model.resolve(), *(path.resolve() for path in paths), is_transformer, folder.resolve())
