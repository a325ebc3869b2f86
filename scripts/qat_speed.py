"""What a step of quantization-aware training costs: float32, tfquant.quantize_model with each engine, and TFMOT's own, in turn.

    python scripts/qat_speed.py --models ResNet8,MobileNet --libraries keras,tf_keras --jit_compile 0,1

ResNet8 is that of MLPerf Tiny (32x32 pixels), MobileNet is V1 with alpha 0.5 at 96x96. A step is what `fit` runs of a batch
(forward, backward, SGD with momentum) on made-up images; all that stands in a row of the table runs in one process, in turn, and
the ratios are medians of those within a round.
"""

import gc
import importlib
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from common import Parser, markdown

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 2.0
LIBRARIES = ("keras", "tf_keras")
QUANTIZED = ("tfquant", "engine=tfmot", "TFMOT")


def resnet8(keras):
    """ResNet-8 of MLPerf Tiny's image classification: three stacks of 16, 32 and 64 channels, BatchNorm, L2, 10 classes."""
    layers = keras.layers

    def conv(x, filters, size=3, strides=1):
        return layers.Conv2D(
            filters,
            size,
            strides,
            "same",
            kernel_initializer="he_normal",
            kernel_regularizer=keras.regularizers.L2(1e-4),
        )(x)

    def normalized(x):
        return layers.BatchNormalization()(x)

    def relu(x):
        return layers.Activation("relu")(x)

    inputs = keras.Input((32, 32, 3))
    x = relu(normalized(conv(inputs, 16)))
    for filters, strides in ((16, 1), (32, 2), (64, 2)):
        y = relu(normalized(conv(x, filters, strides=strides)))
        y = normalized(conv(y, filters))
        x = relu(layers.Add()([x if strides == 1 else conv(x, filters, 1, strides), y]))
    x = layers.Flatten()(layers.AveragePooling2D(8)(x))
    return keras.Model(inputs, layers.Dense(10, activation="softmax", kernel_initializer="he_normal")(x))


def mobilenet(keras):
    """MobileNet V1 of keras.applications with random weights, alpha 0.5, 96x96 pixels, 10 classes."""
    return keras.applications.MobileNet((96, 96, 3), alpha=0.5, weights=None, classes=10)


MODELS = {"ResNet8": resnet8, "MobileNet": mobilenet}


def step_of(keras, model, shape, jit_compile):
    """Compiles a model; returns a function that trains on one batch of this shape."""
    import numpy as np
    import tensorflow as tf

    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9), "sparse_categorical_crossentropy", jit_compile=jit_compile)
    rng = np.random.default_rng(0)
    images = rng.uniform(size=shape).astype(np.float32)
    labels = rng.integers(0, 10, shape[0])
    batches = iter(tf.data.Dataset.from_tensors((images, labels)).repeat())
    train = model.make_train_function() or model.train_function
    return lambda: train(batches)


def quantized(library, model):
    """Ways to train it: name to a model of its own."""
    import tfquant

    keras = importlib.import_module(library)
    ways = {"float32": model, "tfquant": tfquant.quantize_model(keras.models.clone_model(model))}
    if library == "tf_keras":
        from tensorflow_model_optimization.quantization import keras as tfmot

        ways["engine=tfmot"] = tfquant.quantize_model(keras.models.clone_model(model), engine="tfmot")
        ways["TFMOT"] = tfmot.quantize_model(keras.models.clone_model(model))
    return ways


def measure(steps, seconds):
    """Milliseconds of each way's steps, the medians of bursts which take turns: name to a list of rounds."""
    runs = {}
    for name, step in steps.items():
        for _ in range(3):  # compiles, and lets the ranges begin
            step()
        began = time.perf_counter()
        step()
        runs[name] = max(1, round(0.5 / (time.perf_counter() - began)))
    found = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    names = list(steps)
    while time.perf_counter() < end or len(found[names[0]]) < 3:
        for name in names:
            times = []
            for _ in range(runs[name] + 1):  # the first finds another's data in the caches
                began = time.perf_counter()
                steps[name]()
                times.append(1000 * (time.perf_counter() - began))
            found[name].append(statistics.median(times[1:]))
        names = [*names[1:], names[0]]
    return found


def main():
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--models", default=",".join(MODELS), help="with commas between")
    parser.add_argument("--libraries", default=",".join(LIBRARIES), help="with commas between")
    parser.add_argument("--jit_compile", default="0,1", help="0, 1 or both: whether XLA compiles the step")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20, help="of measuring, per row")
    arguments = parser.parse_args()
    for flag, given, known in (
        ("--models", arguments.models, MODELS),
        ("--libraries", arguments.libraries, LIBRARIES),
        ("--jit_compile", arguments.jit_compile, ("0", "1")),
    ):
        for word in given.split(","):
            if word not in known:
                parser.error(f"{flag} takes {', '.join(known)}. Received: {word}")
    sys.path.insert(0, str(ROOT))
    heading = (cell for way in QUANTIZED for cell in (f"{way} ms", "ratio"))
    rows = [["model", "library", "jit_compile", "float32 ms", *heading, f"tfquant <= {LIMIT}"]]
    for name in arguments.models.split(","):
        for library in arguments.libraries.split(","):
            keras = importlib.import_module(library)
            for jit_compile in arguments.jit_compile.split(","):
                keras.utils.set_random_seed(0)
                ways = quantized(library, MODELS[name](keras))
                shape = (arguments.batch_size, *ways["float32"].input_shape[1:])
                steps = {key: step_of(keras, way, shape, jit_compile == "1") for key, way in ways.items()}
                found = measure(steps, arguments.seconds)
                row = [name, library, jit_compile, f"{statistics.median(found['float32']):.1f}"]
                ratios = {
                    way: statistics.median(a / b for a, b in zip(times, found["float32"], strict=True))
                    for way, times in found.items()
                }
                for way in QUANTIZED:
                    row += [f"{statistics.median(found[way]):.1f}", f"{ratios[way]:.2f}"] if way in found else ["", ""]
                rows.append([*row, "yes" if ratios["tfquant"] <= LIMIT else "no"])
                print(" ".join(rows[-1]), flush=True)
                keras.backend.clear_session()
                del ways, steps
                gc.collect()
    print("\n".join(markdown(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
