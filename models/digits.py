"""Trains a small CNN on scikit-learn's digits and exports it with calibration and evaluation data.

python models/digits.py --output DIR [--epochs N] [--seed 0]

DIR/float32           SavedModel
DIR/digits.keras      the same model in Keras' own format
DIR/calibration.npz   200 training samples, under the name of the signature's input
DIR/evaluation.npz    the test split, under the same name, and its "labels"
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when tensorflow is imported

import keras
import numpy as np
import tensorflow as tf

CALIBRATION_SAMPLES = 200
TEST_SAMPLES = 360
SPLIT_SEED = 0  # not --seed: every seed is judged on the same test samples


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    """Reads an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def load_data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns train images, train labels, test images and test labels; images are (8, 8, 1) in [0, 1]."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[..., None]
    labels = digits.target.astype(np.int64)
    x_train, x_test, y_train, y_test = train_test_split(
        images, labels, test_size=TEST_SAMPLES, stratify=labels, random_state=SPLIT_SEED
    )
    return x_train, y_train, x_test, y_test


def build() -> keras.Model:
    """Builds the untrained network."""
    layers = keras.layers

    def conv(x: keras.KerasTensor, filters: int, kernel: int) -> keras.KerasTensor:
        x = layers.Conv2D(filters, kernel, padding="same", use_bias=False)(x)
        return norm(x)

    def norm(x: keras.KerasTensor) -> keras.KerasTensor:
        # With the default of 0.99 the moving statistics lag behind the weights in a training of a few hundred steps.
        return layers.BatchNormalization(momentum=0.9)(x)

    image = keras.Input((8, 8, 1), name="image")
    x = layers.ReLU()(conv(image, 32, 3))

    # Depthwise separable convolution.
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    x = layers.ReLU()(norm(x))
    x = layers.ReLU()(conv(x, 64, 1))
    x = layers.MaxPooling2D(2)(x)

    # Residual block.
    branch = layers.ReLU()(conv(x, 64, 3))
    branch = conv(branch, 64, 3)
    x = layers.ReLU()(layers.Add()([x, branch]))

    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(0.2)(x)
    return keras.Model(image, layers.Dense(10, activation="softmax", name="digit")(x), name="digits")


def train(model: keras.Model, x: np.ndarray, y: np.ndarray, epochs: int) -> None:
    """Trains in place, with a learning rate that falls to zero over the epochs."""
    batch = 32
    schedule = keras.optimizers.schedules.CosineDecay(3e-3, decay_steps=epochs * -(-len(x) // batch))
    model.compile(keras.optimizers.Adam(schedule), loss="sparse_categorical_crossentropy")
    model.fit(x, y, batch_size=batch, epochs=epochs, verbose=0)


def export(model: keras.Model, output: Path, data: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], seed: int) -> None:
    """Writes the models and the data sets below `output`."""
    x_train, _, x_test, y_test = data
    model.save(output / "digits.keras")
    model.export(str(output / "float32"), verbose=False)

    # The name is read back: Keras, not this script, decides how a signature calls its inputs.
    signature = tf.saved_model.load(str(output / "float32")).signatures["serving_default"]
    (name,) = signature.structured_input_signature[1]
    chosen = np.random.default_rng(seed).choice(len(x_train), CALIBRATION_SAMPLES, replace=False)
    np.savez_compressed(output / "calibration.npz", **{name: x_train[chosen]})
    np.savez_compressed(output / "evaluation.npz", **{name: x_test, "labels": y_test})


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, exports and prints the accuracy; returns the exit code."""
    parser = Parser(prog="digits", description="Train a small CNN on scikit-learn's digits and export it.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write to; made if missing")
    parser.add_argument("--epochs", type=positive, default=12, help="passes over the training split (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order and samples (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**32:
        parser.error(f"argument --seed: must be in [0, 2**32), got {args.seed}")

    try:
        args.output.mkdir(parents=True, exist_ok=True)
        data = load_data()
    except OSError as error:
        print(f"digits: cannot write to {args.output}: {error.strerror}", file=sys.stderr)
        return 1
    except ImportError:
        print("digits: needs scikit-learn: pip install 'tfquant[examples]'", file=sys.stderr)
        return 1

    keras.utils.set_random_seed(args.seed)
    model = build()
    train(model, data[0], data[1], args.epochs)
    accuracy = np.mean(np.argmax(model.predict(data[2], verbose=0), axis=-1) == data[3])
    try:
        export(model, args.output, data, args.seed)
    except (OSError, tf.errors.OpError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "message", None) or error
        print(f"digits: cannot write to {args.output}: {reason}", file=sys.stderr)
        return 1
    print(f"accuracy {accuracy:.4f} on {len(data[3])} test samples; model and data in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
