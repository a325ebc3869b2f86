"""Exports any keras.applications model with random, but not degenerate, weights: nothing is downloaded.

python models/applications.py --name MobileNetV2 --output DIR [--seed 0] [--input_size N] [--keras tf_keras]

DIR becomes a SavedModel. Such a model recognizes nothing, but has the graph, and close to the ranges of activations, of a
trained one: freshly initialized weights alone let activations fade or explode with depth, and answer every input alike.
tf_keras has models that Keras 3 has no more (RegNet, ResNetRS).
"""

import argparse
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when tensorflow is imported

import keras
import numpy as np
import tensorflow as tf

LIBRARIES = ("keras", "tf_keras")
STATISTICS_BATCH = 16
LARGE_PIXELS = 299**2  # of larger images fewer are taken: Keras keeps all activations of a pass
CLASSIFIER_BATCH = 32  # more than above: it is an inference pass, and a class's logit has one value per image
IMAGE_SIZE = 224  # of models that take any (MobileNetV3, ConvNeXt)
LOGIT_STD = 2.0  # of each class over images; trained classifiers are of this order


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def names(library: ModuleType = keras) -> list[str]:
    """The class names that build() knows."""
    return sorted(name for name, value in vars(library.applications).items() if inspect.isfunction(value))


def resolve(name: str, library: ModuleType = keras) -> str:
    """Returns the exact spelling of a name; ValueError offers the nearest one when there is none."""
    known = {exact.lower(): exact for exact in names(library)}
    if name.lower() in known:
        return known[name.lower()]
    nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0)
    raise ValueError(f"no {library.__name__}.applications model is named {name!r}; the nearest is {known[nearest[0]]}")


def _library(model: Any) -> ModuleType:
    """The Keras that a model is made with."""
    return keras if isinstance(model, keras.Model) else importlib.import_module("tf_keras")


def images(name: str, shape: tuple[int, int, int], count: int, seed: int, library: ModuleType = keras) -> np.ndarray:
    """Random images of `shape`, preprocessed as the named model expects its input.

    Pixels are a sum of noise at several scales with a random brightness and contrast per image: like in photographs most
    of the power is in low frequencies, so that images differ after pooling too, which white noise does not.
    """
    rng = np.random.default_rng(seed)
    height, width, channels = shape
    pixels = np.zeros((count, height, width, channels), np.float32)
    cells = 2
    while cells <= min(height, width):
        noise = rng.normal(size=(count, cells, cells, channels)).astype(np.float32)
        pixels += (
            keras.ops.convert_to_numpy(keras.ops.image.resize(noise, (height, width), interpolation="bilinear")) / cells**0.5
        )
        cells *= 2
    pixels /= pixels.std(axis=(1, 2, 3), keepdims=True) + 1e-6
    brightness = rng.uniform(80, 170, (count, 1, 1, 1))
    contrast = rng.uniform(25, 70, (count, 1, 1, 1))
    pixels = np.clip(brightness + contrast * pixels, 0, 255).astype(np.float32)
    module = sys.modules[getattr(library.applications, resolve(name, library)).__module__]
    return np.asarray(module.preprocess_input(pixels), np.float32)


def leaves(model: Any) -> Iterator[Any]:
    """The layers of a model and of the models inside it."""
    for layer in model.layers:
        if isinstance(layer, _library(model).Model):
            yield from leaves(layer)
        else:
            yield layer


def randomize_scales(model: Any, seed: int) -> None:
    """Spreads the normalizations' gamma and beta, which Keras initializes to ones and zeros, around those values."""
    rng = np.random.default_rng(seed)
    layers = _library(model).layers
    for layer in leaves(model):
        if isinstance(layer, layers.BatchNormalization | layers.LayerNormalization):
            if layer.gamma is not None:
                layer.gamma.assign(rng.uniform(0.7, 1.3, layer.gamma.shape))
            if layer.beta is not None:
                layer.beta.assign(rng.normal(0, 0.1, layer.beta.shape))
        elif type(layer).__name__ == "LayerScale":
            # ConvNeXt's starts at 1e-6, which makes each residual branch vanish; training raises it.
            layer.gamma.assign(rng.uniform(0.1, 0.5, layer.gamma.shape))


def calibrate_batch_normalization(model: Any, batch: np.ndarray) -> None:
    """Sets every moving mean and variance to the statistics of the layer's input on `batch`."""
    layers = _library(model).layers
    normalizations = [layer for layer in leaves(model) if isinstance(layer, layers.BatchNormalization)]
    # Dropout, too, obeys the training flag, but is absent when the model is used.
    dropouts = [layer for layer in leaves(model) if isinstance(layer, layers.Dropout)]
    momenta = [layer.momentum for layer in normalizations]
    rates = [layer.rate for layer in dropouts]
    for layer in normalizations:
        layer.momentum = 0.0
    for layer in dropouts:
        layer.rate = 0.0
    try:
        model(batch, training=True)
    finally:
        for layer, momentum in zip(normalizations, momenta, strict=True):
            layer.momentum = momentum
        for layer, rate in zip(dropouts, rates, strict=True):
            layer.rate = rate


def logits(model: Any, batch: np.ndarray) -> np.ndarray:
    """The classifier's outputs before its softmax, as (images, classes)."""
    library, classifier = _library(model), _classifier(model)
    size = affordable(batch.shape[1:], STATISTICS_BATCH)
    activation, classifier.activation = classifier.activation, library.activations.linear
    try:
        inner = library.Model(model.inputs[0], classifier.output)
        parts = [inner(batch[i : i + size], training=False) for i in range(0, len(batch), size)]
    finally:
        classifier.activation = activation
    return np.concatenate([np.asarray(part).reshape(len(part), -1) for part in parts])


def affordable(shape: tuple[int, ...], count: int) -> int:
    """How many images of `shape` (height, width, channels) are as much work as `count` of the usual size, at most `count`."""
    return min(count, max(count // 4, count * LARGE_PIXELS // (shape[0] * shape[1])))


def _classifier(model: Any) -> Any:
    # MobileNet's and MobileNetV3's is a 1x1 convolution.
    layers = _library(model).layers
    return [layer for layer in leaves(model) if isinstance(layer, layers.Dense | layers.Conv2D)][-1]


def calibrate_classifier(model: Any, batch: np.ndarray) -> None:
    """Gives each class logits of mean 0 and a common spread on `batch`, so that the softmax is neither flat nor constant."""
    values = logits(model, batch)
    classifier = _classifier(model)
    scale = LOGIT_STD / max(float(values.std(axis=0).mean()), 1e-12)
    kernel, bias = classifier.get_weights()
    classifier.set_weights([kernel * scale, bias - scale * values.mean(axis=0)])


def build(name: str, seed: int = 0, input_size: int | None = None, library: ModuleType = keras) -> Any:
    """Builds the named model with seeded weights; reseeds the global generators of Python, NumPy and TensorFlow.

    Args:
        name: a class of `library`.applications, in any case.
        seed: of the weights.
        input_size: height and width of the input; None for the model's own.
        library: the module `keras` or `tf_keras`.
    """
    constructor = getattr(library.applications, resolve(name, library))
    library.utils.set_random_seed(seed)
    model = constructor(weights=None, input_shape=None if input_size is None else (input_size, input_size, 3))
    if None in model.input_shape[1:]:
        model = constructor(weights=None, input_shape=(IMAGE_SIZE, IMAGE_SIZE, 3))
    shape = model.input_shape[1:]
    batch = images(name, shape, affordable(shape, CLASSIFIER_BATCH), seed, library)
    randomize_scales(model, seed)
    calibrate_batch_normalization(model, batch[: affordable(shape, STATISTICS_BATCH)])
    calibrate_classifier(model, batch)
    return model


def main(argv: Sequence[str] | None = None) -> int:
    """Builds and exports a model; returns the exit code."""
    parser = Parser(prog="applications", description="Export a keras.applications model with random weights.")
    parser.add_argument("--name", required=True, help="class name in keras.applications, in any case")
    parser.add_argument("--output", type=Path, required=True, help="the SavedModel's directory")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: %(default)s)")
    parser.add_argument("--input_size", type=int, help="height and width of the input (default: the model's own)")
    parser.add_argument("--keras", choices=LIBRARIES, default="keras", help="whose model it is (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**32:
        parser.error(f"argument --seed: must be in [0, 2**32), got {args.seed}")
    if (
        args.output.exists()
        and not (args.output / "saved_model.pb").exists()
        and (not args.output.is_dir() or any(args.output.iterdir()))
    ):
        parser.error(f"argument --output: {args.output} exists and is not a SavedModel")

    try:
        library = importlib.import_module(args.keras)
        resolve(args.name, library)
        args.output.mkdir(parents=True, exist_ok=True)  # before the slow part, which an unwritable place would waste
        # Keras judges input_size: the smallest that works differs from model to model.
        model = build(args.name, args.seed, args.input_size, library)
        model.export(str(args.output), **({"verbose": False} if args.keras == "keras" else {}))
    except ValueError as error:
        parser.error(str(error).strip().splitlines()[0])
    except (OSError, tf.errors.OpError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "message", None) or error
        print(f"applications: cannot write to {args.output}: {reason}", file=sys.stderr)
        return 1
    print(f"{model.name}: {model.count_params():,} parameters, input {model.input_shape[1:]}, in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
