"""Tests of quantize_model(engine="tfmot"): TFMOT's wrappers with the scheme of INT8's kernels."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import subprocess
import sys

import building
import keras
import numpy as np
import pytest

import tfquant
from tfquant.errors import ConfigError, ModelError

tf_keras, _ = building.tfmot()
layers = tf_keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=(96, 8, 8, 2)).astype(np.float32)
Y = (X.mean((1, 2)) > 0) @ [1, 2]


def residual():
    """Conv + BatchNorm + ReLU, depthwise, a residual add, concat, pooling, dense: 4 classes."""
    tf_keras.utils.set_random_seed(0)
    inputs = tf_keras.Input((8, 8, 2))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False)(inputs)
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.8)(x))
    y = layers.DepthwiseConv2D(3, padding="same")(x)
    y = layers.ReLU(6.0)(layers.BatchNormalization(momentum=0.8)(y))
    y = layers.BatchNormalization(momentum=0.8)(layers.Conv2D(8, 1)(y))
    x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.Concatenate()([x, layers.Conv2D(4, 1)(x)])
    x = layers.Flatten()(layers.AveragePooling2D(4)(layers.MaxPooling2D(2)(x)))
    return tf_keras.Model(inputs, layers.Dense(4)(x))


def fitted(model, epochs=2, rate=1e-3):
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf_keras.optimizers.SGD(rate), loss)
    model.fit(X, Y, epochs=epochs, batch_size=32, verbose=0)
    return model


@pytest.fixture(scope="module")
def trained():
    """The float model, and the one that TFMOT made of it, after a few steps."""
    model = fitted(residual(), 4, 0.05)
    return model, fitted(tfquant.quantize_model(model, engine="tfmot"))


def test_int8_is_what_was_trained(trained):
    model, q = trained
    result = tfquant.quantize(q)
    assert {spec.source for spec in result.plan.tensors.values()} == {"learned"}
    other = tfquant.quantize(fitted(tfquant.quantize_model(model)))
    assert [decision.kernel for decision in result.plan.ops if decision.int8] == [
        decision.kernel for decision in other.plan.ops if decision.int8
    ]
    wanted, found = q.predict(X, verbose=0), next(iter(result.int8_function()({result.input_names[0]: X}).values()))
    steps = np.abs(found - wanted) / (np.ptp(wanted) / 255)
    assert np.median(steps) <= 1
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() >= 0.97


@pytest.mark.parametrize("name", ["saved_model", "model.h5"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_files(trained, tmp_path, name):
    _, q = trained
    q.save(tmp_path / name)
    with tfquant.quantize_scope():
        loaded = tf_keras.models.load_model(tmp_path / name)
    assert np.array_equal(loaded.predict(X, verbose=0), q.predict(X, verbose=0))


def test_ranges_begin_at_the_first_values():
    model = residual()
    reference = model.predict(X, verbose=0)
    q = tfquant.quantize_model(model, engine="tfmot")
    before = q.predict(20 * X, verbose=0)  # beyond -6..6
    wanted = model.predict(20 * X, verbose=0)
    assert 10 * np.log10((wanted**2).sum() / ((before - wanted) ** 2).sum()) >= 25
    q = tfquant.quantize_model(model, engine="tfmot")
    q.compile("sgd", tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    q.train_on_batch(X[:32], Y[:32])
    low, high = next(layer for layer in q.layers if layer.name.startswith("quantize_")).get_weights()[0]
    assert (low, high) == (X[:32].min(), X[:32].max())
    assert np.array_equal(model.predict(X, verbose=0), reference)  # it has weights of its own


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: layers.DepthwiseConv2D(1, input_shape=(1, 1, 3)), (1, 1, 3, 1)),
        (lambda: layers.Dense(3, input_shape=(2,)), (2, 3)),
    ],
)
def test_weights_are_rounded_per_channel(layer, shape):
    sizes = np.float32([0.001, 0.1, 10])
    model = tf_keras.Sequential([layer()])
    weights = RNG.uniform(-1, 1, shape).astype(np.float32) * (sizes.reshape(3, 1) if shape[-1] == 1 else sizes)
    model.set_weights([weights, np.zeros(3, np.float32)])
    x = np.ones((1, *model.input_shape[1:]), np.float32)
    found = tfquant.quantize_model(model, engine="tfmot").predict(x, verbose=0)
    # Half a step of a channel's own scale for each of its weights; of one scale for all, a step would be 0.08.
    most = np.abs(weights).reshape(-1, 3).max(0) / 127 / 2 * (weights.size / 3)
    error = np.abs(found - model.predict(x, verbose=0)).reshape(3)
    assert (error <= most * 1.01).all()


def shared():
    layer = layers.Dense(4)
    inputs = tf_keras.Input((4,))
    return tf_keras.Model(inputs, layer(layer(inputs)))


class Subclassed(tf_keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4)

    def call(self, inputs):
        return self.dense(inputs)


def subclassed():
    model = Subclassed()
    model(X[0, 0])
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)]), "TFMOT takes models of tf_keras"),
        (subclassed, "takes Sequential and Functional models"),
        (shared, "called several times"),
        (lambda: tf_keras.Sequential([layers.SeparableConv2D(4, 3, input_shape=(8, 8, 2))]), "TFMOT (rounds|cannot)"),
        (
            lambda: tf_keras.Sequential([tf_keras.Sequential([layers.Dense(4, input_shape=(4,))]), layers.Dense(2)]),
            "TFMOT (rounds|cannot)",
        ),
    ],
)
def test_models_that_it_cannot_take(make, words):
    with pytest.raises(ModelError, match=words) as caught:
        tfquant.quantize_model(make(), engine="tfmot")
    assert 'engine="tfquant"' in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"config": tfquant.QuantizeConfig(weight_bits=4)},
        {"configs": {"dense": tfquant.QuantizeConfig()}},
        {"calibrate": X},
        {"teacher": "model"},
    ],
)
def test_options_that_it_does_not_have(options):
    with pytest.raises(ConfigError, match=f"TFMOT has no {next(iter(options))}: use engine=.tfquant."):
        tfquant.quantize_model(residual(), engine="tfmot", **options)


def test_an_unknown_engine():
    with pytest.raises(ConfigError, match=r"engine must be one of tfquant, tfmot\. Received: 'nncf'"):
        tfquant.quantize_model(residual(), engine="nncf")


OTHER_KERAS = """
import os, tf_keras, tfquant
import tensorflow as tf
tfquant.quantize_model(tf_keras.Sequential([tf_keras.Input((4,)), tf_keras.layers.Dense(3)]), engine="tfmot")
print(tf.keras.layers.Dense is tf_keras.layers.Dense, os.environ.get("TF_USE_LEGACY_KERAS"))
"""


@pytest.mark.parametrize(("legacy", "printed"), [(None, "False None"), ("1", "True 1")])
def test_which_keras_tf_keras_is_stays_as_it_was(legacy, printed):
    environment = {key: value for key, value in os.environ.items() if key != "TF_USE_LEGACY_KERAS"}
    if legacy:
        environment["TF_USE_LEGACY_KERAS"] = legacy
    found = subprocess.run([sys.executable, "-c", OTHER_KERAS], env=environment, capture_output=True, text=True, check=False)
    assert found.stdout.splitlines()[-1:] == [printed], found.stderr


def test_without_tfmot(monkeypatch):
    monkeypatch.delitem(sys.modules, "tfquant.qat.tfmot", raising=False)
    monkeypatch.delattr("tfquant.qat.tfmot", raising=False)
    for name in [name for name in sys.modules if name.startswith("tensorflow_model_optimization")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r'pip install "tfquant\[qat\]"'):
        tfquant.quantize_model(residual(), engine="tfmot")
    with tfquant.quantize_scope():
        pass
