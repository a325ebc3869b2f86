"""Compares the accuracy of two SavedModels in stock TensorFlow. This process never imports tfquant.

python scripts/compare.py --float32 DIR --int8 DIR --data evaluation.npz
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when tensorflow is imported

import numpy as np
import tensorflow as tf

SIGNATURE = "serving_default"


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


class Model:
    """A SavedModel's signature with one input and one output."""

    def __init__(self, path: Path) -> None:
        if not (path / "saved_model.pb").is_file():
            raise ValueError(f"{path} is not a SavedModel")
        self._loaded = tf.saved_model.load(str(path))  # owns the variables that the signature uses
        if SIGNATURE not in self._loaded.signatures:
            raise ValueError(f"{path} has no signature {SIGNATURE}")
        self._function = self._loaded.signatures[SIGNATURE]
        inputs = self._function.structured_input_signature[1]
        outputs = self._function.structured_outputs
        if len(inputs) != 1 or len(outputs) != 1:
            raise ValueError(f"{path} must have one input and one output, has {sorted(inputs)} and {sorted(outputs)}")
        (self.input_name,) = inputs
        (self._output_name,) = outputs

    def __call__(self, x: tf.Tensor) -> np.ndarray:
        return self._function(**{self.input_name: x})[self._output_name].numpy()


def load_data(path: Path, input_name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the samples and labels in an evaluation.npz."""
    try:
        with np.load(path) as data:
            arrays = {name: data[name] for name in data.files}
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if {input_name, "labels"} - arrays.keys():
        raise ValueError(f"{path} must hold {input_name!r} and 'labels', holds {sorted(arrays)}")
    return arrays[input_name], arrays["labels"]


def predictions(model: Model, x: np.ndarray, batch: int = 256) -> np.ndarray:
    """The class of each sample."""
    return np.concatenate([model(tf.constant(x[i : i + batch])).argmax(axis=-1) for i in range(0, len(x), batch)])


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = Parser(prog="compare", description="Compare the accuracy of two SavedModels.")
    parser.add_argument("--float32", type=Path, required=True, help="the original SavedModel")
    parser.add_argument("--int8", type=Path, required=True, help="the quantized SavedModel")
    parser.add_argument("--data", type=Path, required=True, help="npz with samples under the input's name, and labels")
    args = parser.parse_args(argv)
    try:
        original, quantized = models = [Model(args.float32), Model(args.int8)]
        if original.input_name != quantized.input_name:
            raise ValueError(f"inputs differ in name: {original.input_name!r} and {quantized.input_name!r}")
        x, labels = load_data(args.data, original.input_name)
    except (ValueError, OSError, tf.errors.OpError) as error:
        print(f"compare: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1

    classes = [predictions(model, x) for model in models]
    print(f"accuracy on {len(x)} samples")
    print(f"  float32 {np.mean(classes[0] == labels):8.4f}")
    print(f"  int8    {np.mean(classes[1] == labels):8.4f}   same answer as float32 for {np.mean(classes[0] == classes[1]):.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
