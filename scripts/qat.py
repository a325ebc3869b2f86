"""Quantization-aware training on real data, against float32 that trains as long, and against quantization after the training.

    TFQUANT_ASSETS=path python scripts/qat.py [case ...] [--output DIR] [--docs docs/qat.md]

Cases: resnet8 (MLPerf Tiny's ResNet-8, on CIFAR-10), dscnn (depthwise separable, CIFAR-10), transformer (SST-2) and digits
(scikit-learn's, without the folder of models and data). Each begins with a float model, trained here once on the same data and
kept in DIR. From there float32 and each kind of training take the same steps: batches, learning rates, augmentation.

Columns: the metric on the evaluation data; samples that only float32 got right, and that only this model did, against the float
model that trained as long, or, where no labels were used, the one that all began with (lost - won <= 2 sqrt(lost + won) is
chance); the mean KL(float32 || model) in nats to the float model that all began with; how often the trained model, its INT8
SavedModel and its TFLite file give the same class, two by two.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when tensorflow is imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import keras
import numpy as np
import tensorflow as tf

import tfquant
from scripts import cases
from scripts.common import Parser, Row, append_row, markdown, read_rows
from scripts.peers.failure import Failure

BATCH = 64
SEED = 0
LEAST = 1e-6  # added to each probability
WORDS, LENGTH = 8000, 40  # of the vocabulary and of a sentence


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its data.

    Attributes:
        build: the float model, untrained or as it was published.
        data: (training inputs, labels, evaluation inputs, labels); inputs as the model takes them, but images as bytes.
        augment: of a batch of inputs.
        first: (steps, learning rate) of the float model's training.
        tuning: likewise of what follows.
    """

    build: Callable[[], Any]
    data: Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]
    augment: Callable[[tf.Tensor], tf.Tensor]
    first: tuple[int, float]
    tuning: tuple[int, float]


# -- data ------------------------------------------------------------------------------------------------------------------
def cifar10() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    assets = cases.load_assets()
    parts = (assets._records(f"cifar10/{split}.tfrecord", np.asarray) for split in ("train", "evaluation"))
    (x, y), (test_x, test_y) = parts
    return x.astype(np.uint8), y, test_x.astype(np.uint8), test_y


def sentences() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    folder = cases.find_assets() / "sst2"
    read = {
        split: [line.rsplit("\t", 1) for line in (folder / f"{split}.tsv").read_text().splitlines()]
        for split in ("train", "test")
    }
    counts: dict[str, int] = {}
    for text, _ in read["train"]:
        for word in text.split():
            counts[word] = counts.get(word, 0) + 1
    known = {word: i + 2 for i, word in enumerate(sorted(counts, key=lambda word: (-counts[word], word))[: WORDS - 2])}
    found = []
    for split in ("train", "test"):
        tokens = np.zeros((len(read[split]), LENGTH), np.int32)
        for row, (text, _) in zip(tokens, read[split], strict=True):
            ids = [known.get(word, 1) for word in text.split()][:LENGTH]
            row[: len(ids)] = ids
        found += [tokens, np.array([int(label) for _, label in read[split]])]
    return tuple(found)


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x * 15).astype(np.uint8).reshape(-1, 8, 8, 1)
    return x[:1297], y[:1297], x[1297:], y[1297:]


def flipped(images: tf.Tensor) -> tf.Tensor:
    """Mirrored at random, and moved by up to 4 pixels."""
    images = tf.image.random_flip_left_right(tf.cast(images, tf.float32), seed=SEED)
    size = images.shape[1]
    return tf.image.random_crop(tf.image.resize_with_crop_or_pad(images, size + 8, size + 8), tf.shape(images), seed=SEED)


def as_floats(images: tf.Tensor) -> tf.Tensor:
    return tf.cast(images, tf.float32)


def masked(tokens: tf.Tensor) -> tf.Tensor:
    """One word in ten unknown."""
    drop = tf.random.uniform(tf.shape(tokens), seed=SEED) < 0.1
    return tf.where(drop & (tokens > 0), tf.ones_like(tokens), tokens)


# -- models ----------------------------------------------------------------------------------------------------------------
def resnet8() -> Any:
    return keras.models.load_model(cases.load_assets().CASES["resnet8_cifar10"].model, compile=False)


def dscnn(widths: tuple[int, ...] = (32, 64, 128, 128, 256, 256), size: int = 32, channels: int = 3, pixel: float = 255.0) -> Any:
    """Depthwise separable, as MobileNet v1: half the size at each second block."""
    layers = keras.layers
    x = inputs = keras.Input((size, size, channels))
    x = layers.Rescaling(2 / pixel, -1)(x)
    x = layers.Conv2D(widths[0], 3, padding="same", use_bias=False)(x)
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    for index, width in enumerate(widths[1:]):
        x = layers.DepthwiseConv2D(3, strides=1 + index % 2, padding="same", use_bias=False)(x)
        x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
        x = layers.Conv2D(width, 1, use_bias=False)(x)
        x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    x = layers.Dense(10, activation="softmax")(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, x)


def transformer(width: int = 64, heads: int = 4, count: int = 2) -> Any:
    """An encoder with LayerNorm in front, pooled by its mean over the words."""
    layers = keras.layers
    inputs = keras.Input((LENGTH,), dtype="int32")
    places = layers.Embedding(LENGTH, width)(keras.ops.arange(LENGTH))
    x = layers.Dropout(0.3)(layers.Embedding(WORDS, width)(inputs) + places)
    for _ in range(count):
        y = layers.LayerNormalization()(x)
        x = x + layers.Dropout(0.3)(layers.MultiHeadAttention(heads, width // heads)(y, y))
        y = layers.Dense(2 * width, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dropout(0.3)(layers.Dense(width)(y))
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(layers.Dropout(0.3)(x)))


CASES = {
    "resnet8": Case(resnet8, cifar10, flipped, (1500, 2e-3), (1000, 1e-3)),
    "dscnn": Case(dscnn, cifar10, flipped, (2500, 4e-3), (800, 1e-3)),
    "transformer": Case(transformer, sentences, masked, (1200, 1e-3), (400, 2e-4)),
    "digits": Case(lambda: dscnn((16, 32, 32), 8, 1, 225.0), digits, as_floats, (600, 5e-3), (300, 1e-3)),
}
LEARNED = tfquant.LearnedStepQuantizer()
# Name of a row to (bits of the weights, options of quantize_model).
TRAINED = {
    "W8A8, trained": (8, {}),
    "W8A8, trained, portable": (8, {"portable": True}),
    "W8A8, trained, LSQ, by the float model alone": (8, {"lsq": True, "teacher_share": 1.0, "slow": 0.02}),
    "W4A8, trained": (4, {}),
    "W4A8, trained, LSQ": (4, {"lsq": True}),
    "W4A8, trained, LSQ, with the float model": (4, {"lsq": True, "teacher_share": 0.5}),
}
FLOAT, TUNED = "float32", "float32, trained as long"
PLAIN = {"preset": "fast", "estimator": "minmax", "weight_clipping": "none", "weight_correction": False}
# Name of a row to (bits of the weights, options of quantize).
AFTER: dict[str, tuple[int, dict[str, Any]]] = {
    "W8A8, after the training": (8, {}),
    "W4A8, after the training": (4, {}),
    "W4A8, after the training, nearest values": (4, PLAIN),
}
KINDS = (FLOAT, TUNED, *AFTER, *TRAINED)


# -- training --------------------------------------------------------------------------------------------------------------
def batches(x: np.ndarray, y: np.ndarray, augment: Callable[[tf.Tensor], tf.Tensor], steps: int) -> tf.data.Dataset:
    """The same batches at each call."""
    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=SEED).repeat().batch(BATCH)
    return data.map(lambda inputs, labels: (augment(inputs), labels)).take(steps)


def fit(model: Any, case: Case, data: Any, steps: int, rate: float, callbacks: Any = ()) -> None:
    keras.utils.set_random_seed(SEED)
    schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
    model.compile(keras.optimizers.Adam(schedule), "sparse_categorical_crossentropy", jit_compile=False)
    model.fit(batches(*data[:2], case.augment, steps), epochs=1, verbose=0, callbacks=list(callbacks))


def float_model(name: str, case: Case, data: Any, folder: Path) -> Path:
    """Trained once, and kept."""
    path = folder / f"{name}.keras"
    if not path.exists():
        keras.utils.set_random_seed(SEED)
        model = case.build()
        fit(model, case, data, *case.first)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            model.save(Path(scratch) / path.name)
            (Path(scratch) / path.name).rename(path)
    return path


# -- figures ---------------------------------------------------------------------------------------------------------------
def predicted(model: Any, x: np.ndarray) -> np.ndarray:
    """Outputs of a Keras model, or of a `QuantizedModel` (of its simulation where it has fewer than 8 bits)."""
    if isinstance(model, tfquant.QuantizedModel):
        run = model.simulation() if model.plan.is_simulated else model.int8_function()
        (key,) = model.input_names
        return np.concatenate([next(iter(run({key: part}).values())) for part in parts(x)])
    return np.concatenate([np.asarray(model(tf.constant(part), training=False)) for part in parts(x)])


def parts(x: np.ndarray, size: int = 100) -> Iterator[np.ndarray]:
    for start in range(0, len(x), size):
        part = x[start : start + size]
        yield part.astype(np.float32) if part.dtype == np.uint8 else part


def run_tflite(path: Path, x: np.ndarray) -> np.ndarray:
    """Outputs of a TFLite file."""
    runner = tf.lite.Interpreter(model_path=str(path), num_threads=2).get_signature_runner("serving_default")
    (key,) = runner.get_input_details()
    return np.concatenate([next(iter(runner(**{key: part}).values())) for part in parts(x)])


def rows(name: str, folder: Path, kinds: Sequence[str]) -> Iterator[Row]:
    """The rows of a case that are wanted: figures of each kind of training."""
    case = CASES[name]
    data = case.data()
    path = float_model(name, case, data, folder)
    x, _, test_x, test_y = data
    calibration = next(iter(parts(x[:200], 200)))

    def load() -> Any:
        return keras.models.load_model(path, compile=False)

    start = predicted(load(), test_x)
    tuned_path = folder / f"{name}_tuned.keras"
    if not tuned_path.exists():
        tuned = load()
        fit(tuned, case, data, *case.tuning)
        tuned.save(tuned_path)
    tuned = predicted(keras.models.load_model(tuned_path, compile=False), test_x)

    def row(kind: str, outputs: np.ndarray, **more: Any) -> Row:
        reference = tuned if has_labels(kind) else start
        right, other = reference.argmax(-1) == test_y, outputs.argmax(-1) == test_y
        divergence = (start * (np.log(start + LEAST) - np.log(outputs + LEAST))).sum(-1)
        return {
            "case": name,
            "kind": kind,
            "metric": float(other.mean() * 100),
            "lost": int((right & ~other).sum()),
            "won": int((~right & other).sum()),
            "mean_kl": float(divergence.mean()),
            **more,
        }

    if FLOAT in kinds:
        yield row(FLOAT, start)
    if TUNED in kinds:
        yield row(TUNED, tuned)
    for kind, (bits, extra) in AFTER.items():
        if kind in kinds:
            options = tfquant.QuantConfig(weight_bits=bits, verify=False, placement="int8", **extra)
            yield row(kind, predicted(tfquant.quantize(load(), calibration, options), test_x))
    for kind, (bits, options) in TRAINED.items():
        if kind in kinds:
            yield row(kind, **trained(load(), case, data, bits, calibration, options, folder))


def has_labels(kind: str) -> bool:
    """Whether a row's model was trained on the labels, and not on the first float model's outputs alone, or not at all."""
    return kind == TUNED or (kind in TRAINED and TRAINED[kind][1].get("teacher_share", 0.0) < 1)


def trained(
    model: Any, case: Case, data: Any, bits: int, calibration: np.ndarray, options: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Trains a model with fake quantization; the outputs of its INT8, and how its three forms agree."""
    quantizers = {"weight_quantizer": LEARNED, "activation_quantizer": LEARNED} if options.get("lsq") else {}
    share = options.get("teacher_share", 0.0)
    if share == 1:  # the teacher has no noise, which would be learned
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.Dropout):
                layer.rate = 0.0
    q = tfquant.quantize_model(
        model,
        tfquant.QuantizeConfig(weight_bits=bits, **quantizers),
        calibrate=calibration,
        teacher=model if share else None,
        teacher_share=share,
        portable=options.get("portable", False),
    )
    steps, rate = case.tuning
    # Statistics of other batches would make another model than the one that teaches alone.
    frozen = 0 if share == 1 else int(0.7 * steps)
    schedule = tfquant.QuantizationSchedule(freeze_ranges_after=int(0.8 * steps), freeze_batch_norm_after=frozen)
    fit(q, case, data, steps, rate * options.get("slow", 1.0), [schedule])
    test_x = data[2]
    own, int8 = predicted(q, test_x), tfquant.quantize(q)
    outputs = predicted(int8, test_x)
    found = {"outputs": outputs, "int8": same(own, outputs)}
    if bits == 8:
        file = folder / "trained.tflite"
        tfquant.export_tflite(q, file, overwrite=True)
        tflite = run_tflite(file, test_x)
        found |= {"tflite": same(outputs, tflite), "trained_tflite": same(own, tflite)}
    return found


def same(one: np.ndarray, other: np.ndarray) -> float:
    """How often the largest output is the same, in percent."""
    return float((one.argmax(-1) == other.argmax(-1)).mean() * 100)


INTRODUCTION = (
    "# Quantization-aware training on real data",
    "",
    "`python scripts/qat.py --docs docs/qat.md`; 2 cores, Keras 3, Adam with cosine decay, batches of 64. Each kind of training",
    "begins with the same float model and takes the same steps: *float32, trained as long* is that without rounding.",
    "*Lost* samples are those that only that model gets right, *won* those that only this one does; *by the float model alone*",
    "and *after the training* are held against the float model that all began with. Mean KL, in nats, is that to the latter.",
    "The last columns: how often two of the trained model, its INT8 SavedModel and its TFLite file give the same class.",
    "*Portable* models round what a convolution hands to a sum, as LiteRT does, in training and in INT8. *LSQ* learns the steps.",
    "Weights of 4 bits are those of a simulation; *nearest values* is what no algorithm helps.",
)
HEAD = ("case", "", "metric", "lost", "won", "mean KL", "trained = INT8", "INT8 = TFLite", "trained = TFLite")


def table(found: list[Row]) -> list[str]:
    def share(row: Row, key: str) -> str:
        return f"{row[key]:.2f}%" if key in row else ""

    lines = [
        (
            row["case"],
            row["kind"],
            f"{row['metric']:.2f}%",
            str(row["lost"]),
            str(row["won"]),
            f"{row['mean_kl']:.4f}",
            share(row, "int8"),
            share(row, "tflite"),
            share(row, "trained_tflite"),
        )
        for row in found
    ]
    return markdown([HEAD, *lines], ("left", "left", *["right"] * 7))


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"some of {', '.join(CASES)} (default: all)")
    parser.add_argument("--output", type=Path, default=Path("qat"), help="float models and rows (default: %(default)s)")
    parser.add_argument("--docs", type=Path, help="write the table to this Markdown file")
    parser.add_argument("--kinds", default="", help="only rows whose name begins with this")
    arguments = parser.parse_args()
    for name in arguments.cases:
        if name not in CASES:
            parser.error(f"there is no case {name!r}. Known: {', '.join(CASES)}")
    path = arguments.output / "qat.jsonl"
    try:
        for name in arguments.cases or CASES:
            done = {kind for case, kind in read_rows(path, "case", "kind") if case == name}
            kinds = [kind for kind in KINDS if kind.startswith(arguments.kinds) and kind not in done]
            for row in rows(name, arguments.output, kinds):
                append_row(path, {key: value for key, value in row.items() if key != "outputs"})
                print("\n".join(table([row])[2:]), flush=True)
    except Failure as failure:
        parser.error(str(failure))
    order = {(name, kind): place for place, (name, kind) in enumerate(itertools.product(CASES, KINDS))}
    found = sorted(read_rows(path, "case", "kind").values(), key=lambda row: order[row["case"], row["kind"]])
    if arguments.docs:
        arguments.docs.write_text("\n".join([*INTRODUCTION, "", *table(found), ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
