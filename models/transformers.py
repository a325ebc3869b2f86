"""Exports transformers of the usual sizes with random weights, written with Keras 3 or tf_keras layers: nothing is downloaded.

python models/transformers.py --name BertBase --output DIR [--seed 0] [--keras tf_keras]

DIR becomes a SavedModel. Bert and ViT are made of MultiHeadAttention and Dense layers. HubBert is spelled as KerasHub spells its
blocks: EinsumDense projections, a layer for the positions, a padding mask, sentences of any length.
"""

import argparse
import dataclasses
import difflib
import functools
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when tensorflow is imported

import keras
import numpy as np
import tensorflow as tf

LIBRARIES = ("keras", "tf_keras")
LOGIT_STD = 2.0  # of each class over samples; trained classifiers are of this order
CLASSIFIER_SAMPLES = 16


@dataclasses.dataclass(frozen=True)
class Size:
    """How large an encoder is.

    Attributes:
        kind: "bert", "vit" or "hub".
        layers: number of encoder blocks.
        width: of the vectors; the feed-forward part is four times as wide.
        heads: of the attention.
        length: tokens of a sentence; the side of an image in pixels.
        symbols: size of the vocabulary; the side of a patch in pixels.
        classes: outputs of the classifier.
    """

    kind: str
    layers: int
    width: int
    heads: int
    length: int
    symbols: int
    classes: int


SIZES = {
    "BertBase": Size("bert", 12, 768, 12, 128, 30522, 2),
    "BertTiny": Size("bert", 2, 64, 4, 16, 500, 5),
    "ViTBase": Size("vit", 12, 768, 12, 224, 16, 1000),
    "ViTTiny": Size("vit", 2, 64, 4, 32, 8, 5),
    "HubBertBase": Size("hub", 12, 768, 12, 128, 30522, 2),
    "HubBertTiny": Size("hub", 2, 64, 4, 16, 500, 5),
}


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def resolve(name: str) -> str:
    """Returns the exact spelling of a name; ValueError offers the nearest one when there is none."""
    known = {exact.lower(): exact for exact in SIZES}
    if name.lower() in known:
        return known[name.lower()]
    nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0)
    raise ValueError(f"no transformer is named {name!r}; the nearest is {known[nearest[0]]}")


def samples(name: str, count: int, seed: int) -> dict[str, np.ndarray]:
    """Random inputs by input name: words as frequent as Zipf's law has them, or images as noise of several scales."""
    size = SIZES[resolve(name)]
    rng = np.random.default_rng(seed)
    if size.kind == "vit":
        pixels = sum(
            np.kron(rng.normal(size=(count, size.length // cell, size.length // cell, 3)), np.ones((1, cell, cell, 1)))
            for cell in (1, 2, 4, 8, 16)
        )
        return {"image": np.clip(pixels / 4, -1, 1).astype(np.float32)}
    frequency = 1 / np.arange(1, size.symbols + 1)
    words = rng.choice(size.symbols, (count, size.length), p=frequency / frequency.sum()).astype(np.int32)
    if size.kind == "bert":
        return {"token_ids": words}
    ends = rng.integers(size.length // 2, size.length + 1, (count, 1))
    mask = (np.arange(size.length) < ends).astype(np.int32)
    return {"token_ids": words * mask, "padding_mask": mask}


@functools.cache
def parts(library: ModuleType) -> dict[str, Any]:
    """The layers that a Keras library itself does not have, as classes of its own."""
    layers = library.layers

    class Positions(layers.Layer):
        """Adds a learned vector per position to (batch, length, width)."""

        def __init__(self, limit: int, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.limit = limit

        def build(self, shape: Any) -> None:
            self.table = self.add_weight(name="table", shape=(self.limit, shape[-1]), initializer="random_normal")

        def call(self, x: Any) -> Any:
            return x + tf.convert_to_tensor(self.table)[: tf.shape(x)[1]]

    class ClassToken(layers.Layer):
        """Puts a learned vector in front of (batch, length, width)."""

        def build(self, shape: Any) -> None:
            self.token = self.add_weight(name="token", shape=(1, 1, shape[-1]), initializer="random_normal")

        def call(self, x: Any) -> Any:
            token = tf.convert_to_tensor(self.token)
            return tf.concat([tf.tile(token, [tf.shape(x)[0], 1, 1]), x], axis=1)

        def compute_output_shape(self, shape: Any) -> tuple[Any, ...]:
            return (shape[0], shape[1] + 1, shape[2])

    class MaskedAttention(layers.Layer):
        """Softmax(q k / sqrt(head) + mask) v over (batch, length, heads, head), for a mask of 1 and 0 (batch, length)."""

        def call(self, inputs: Any) -> Any:
            query, key, value, mask = inputs
            query = tf.multiply(query, 1.0 / float(query.shape[-1]) ** 0.5)
            scores = tf.einsum("aecd,abcd->acbe", key, query)
            scores += (1.0 - tf.cast(mask, scores.dtype))[:, None, None, :] * -1e9
            return tf.einsum("acbe,aecd->abcd", tf.nn.softmax(scores), value)

    return {"Positions": Positions, "ClassToken": ClassToken, "MaskedAttention": MaskedAttention}


def _bert(library: ModuleType, size: Size) -> Any:
    """Post-norm blocks, as BERT has them."""
    layers = library.layers
    ids = library.Input((size.length,), dtype="int32", name="token_ids")
    x = parts(library)["Positions"](size.length, name="positions")(layers.Embedding(size.symbols, size.width, name="words")(ids))
    x = layers.LayerNormalization(epsilon=1e-12, name="embedding_norm")(x)
    for i in range(size.layers):
        attended = layers.MultiHeadAttention(size.heads, size.width // size.heads, name=f"attention_{i}")(x, x)
        x = layers.LayerNormalization(epsilon=1e-12, name=f"attention_norm_{i}")(layers.add([x, attended]))
        hidden = layers.Dense(4 * size.width, activation="gelu", name=f"up_{i}")(x)
        hidden = layers.Dense(size.width, name=f"down_{i}")(hidden)
        x = layers.LayerNormalization(epsilon=1e-12, name=f"norm_{i}")(layers.add([x, hidden]))
    pooled = layers.Dense(size.width, activation="tanh", name="pooler")(x[:, 0])
    return library.Model(ids, layers.Dense(size.classes, name="logits")(pooled))


def _vit(library: ModuleType, size: Size) -> Any:
    """Pre-norm blocks over patches of an image."""
    layers = library.layers
    image = library.Input((size.length, size.length, 3), name="image")
    patches = (size.length // size.symbols) ** 2
    x = layers.Conv2D(size.width, size.symbols, size.symbols, name="patches")(image)
    x = layers.Reshape((patches, size.width))(x)
    x = parts(library)["ClassToken"](name="class_token")(x)
    x = parts(library)["Positions"](patches + 1, name="positions")(x)
    for i in range(size.layers):
        normed = layers.LayerNormalization(epsilon=1e-6, name=f"attention_norm_{i}")(x)
        x = layers.add(
            [x, layers.MultiHeadAttention(size.heads, size.width // size.heads, name=f"attention_{i}")(normed, normed)]
        )
        hidden = layers.LayerNormalization(epsilon=1e-6, name=f"norm_{i}")(x)
        hidden = layers.Dense(4 * size.width, activation="gelu", name=f"up_{i}")(hidden)
        x = layers.add([x, layers.Dense(size.width, name=f"down_{i}")(hidden)])
    x = layers.LayerNormalization(epsilon=1e-6, name="last_norm")(x)
    return library.Model(image, layers.Dense(size.classes, name="logits")(x[:, 0]))


def _hub(library: ModuleType, size: Size) -> Any:
    """Post-norm blocks of EinsumDense layers, over padded sentences of any length."""
    layers = library.layers
    head = size.width // size.heads
    ids = library.Input((None,), dtype="int32", name="token_ids")
    mask = library.Input((None,), dtype="int32", name="padding_mask")
    x = parts(library)["Positions"](size.length, name="positions")(layers.Embedding(size.symbols, size.width, name="words")(ids))
    x = layers.LayerNormalization(epsilon=1e-12, name="embedding_norm")(x)
    for i in range(size.layers):

        def project(name: str, x: Any = x, i: int = i) -> Any:
            layer = layers.EinsumDense("abc,cde->abde", (None, size.heads, head), bias_axes="de", name=f"{name}_{i}")
            return layer(x)

        heads = [project(name) for name in ("query", "key", "value")]
        attended = parts(library)["MaskedAttention"](name=f"attention_{i}")([*heads, mask])
        attended = layers.EinsumDense("abcd,cde->abe", (None, size.width), bias_axes="e", name=f"output_{i}")(attended)
        x = layers.LayerNormalization(epsilon=1e-12, name=f"attention_norm_{i}")(layers.add([x, attended]))
        gelu = functools.partial(tf.nn.gelu, approximate=True)
        hidden = layers.EinsumDense(
            "abc,cd->abd", (None, 4 * size.width), bias_axes="d", activation=gelu, name=f"intermediate_{i}"
        )(x)
        hidden = layers.EinsumDense("abc,cd->abd", (None, size.width), bias_axes="d", name=f"down_{i}")(hidden)
        x = layers.LayerNormalization(epsilon=1e-12, name=f"norm_{i}")(layers.add([x, hidden]))
    pooled = layers.Dense(size.width, activation="tanh", name="pooler")(x[:, 0])
    return library.Model([ids, mask], layers.Dense(size.classes, name="logits")(pooled))


_KINDS = {"bert": _bert, "vit": _vit, "hub": _hub}


def _randomize(model: Any, name: str, seed: int) -> None:
    """Spreads what Keras initializes to zeros and ones, and gives each class logits of mean 0 and a common spread."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        weights = layer.get_weights()
        if type(layer).__name__ == "LayerNormalization":
            layer.set_weights([rng.uniform(0.7, 1.3, weights[0].shape), rng.normal(0, 0.1, weights[1].shape)])
        elif type(layer).__name__ in ("Dense", "EinsumDense", "MultiHeadAttention", "Conv2D"):
            layer.set_weights([rng.normal(0, 0.05, w.shape) if not w.any() else w for w in weights])
    inputs = samples(name, CLASSIFIER_SAMPLES, seed)
    values = np.asarray(model(inputs if len(inputs) > 1 else next(iter(inputs.values())), training=False))
    classifier = model.get_layer("logits")
    kernel, bias = classifier.get_weights()
    scale = LOGIT_STD / max(float(values.std(axis=0).mean()), 1e-12)
    classifier.set_weights([kernel * scale, (bias - values.mean(axis=0)) * scale])


def build(name: str, seed: int = 0, library: ModuleType = keras) -> Any:
    """Builds the named model with seeded weights; reseeds the global generators of Python, NumPy and TensorFlow.

    Args:
        name: a key of `SIZES`, in any case.
        seed: of the weights.
        library: the module `keras` or `tf_keras`, whose layers it is made of.
    """
    size = SIZES[resolve(name)]
    library.utils.set_random_seed(seed)
    model = _KINDS[size.kind](library, size)
    _randomize(model, name, seed)
    return model


def main(argv: Sequence[str] | None = None) -> int:
    """Builds and exports a model; returns the exit code."""
    parser = Parser(prog="transformers", description="Export a transformer with random weights.")
    parser.add_argument("--name", required=True, help=f"one of {', '.join(SIZES)}, in any case")
    parser.add_argument("--output", type=Path, required=True, help="the SavedModel's directory")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: %(default)s)")
    parser.add_argument("--keras", choices=LIBRARIES, default="keras", help="whose layers it is made of (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**32:
        parser.error(f"argument --seed: must be in [0, 2**32), got {args.seed}")
    output = args.output
    if output.exists() and not (output / "saved_model.pb").exists() and (not output.is_dir() or any(output.iterdir())):
        parser.error(f"argument --output: {output} exists and is not a SavedModel")
    try:
        model = build(args.name, args.seed, importlib.import_module(args.keras))
        output.mkdir(parents=True, exist_ok=True)
        model.export(str(output), **({"verbose": False} if args.keras == "keras" else {}))
    except ValueError as error:
        parser.error(str(error).strip().splitlines()[0])
    except (OSError, tf.errors.OpError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "message", None) or error
        print(f"transformers: cannot write to {output}: {reason}", file=sys.stderr)
        return 1
    print(f"{resolve(args.name)}: {model.count_params():,} parameters, in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
