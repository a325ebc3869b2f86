"""Tests of one result in three worlds: the trained model, INT8 and the TFLite file round the same values in the same places."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tfquant
from tfquant.errors import ConfigError
from tfquant.graph.ir import FAKE_QUANT

SAMPLES, CLASSES = 400, 6
RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (SAMPLES, 8, 8, 3)).astype(np.float32)
Y = (X.reshape(SAMPLES, -1) @ RNG.normal(size=(192, CLASSES))).argmax(1)
EXACT = tfquant.QuantConfig(placement="int8", verify=False)
BOTH = pytest.mark.parametrize("k", [keras, tf_keras], ids=["keras", "tf_keras"])


def residual(k=keras, softmax=True):
    """Pixels, a sum of two convolutions, one with its own input, and classes."""
    k.utils.set_random_seed(0)
    layers = k.layers
    image = k.Input((8, 8, 3), name="image")
    x = layers.Conv2D(12, 3, padding="same", name="first")(image)
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.8)(x))
    y = layers.ReLU()(layers.Conv2D(12, 3, padding="same", bias_initializer="random_normal")(x))
    y = layers.BatchNormalization(momentum=0.8)(layers.Conv2D(12, 3, padding="same", use_bias=False, name="inner")(y))
    x = layers.ReLU(name="sum")(layers.Add()([x, y]))
    z = layers.BatchNormalization(momentum=0.8)(layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x))
    x = layers.ReLU()(layers.Add()([z, layers.Conv2D(12, 1, name="short")(x)]))
    x = layers.Dense(CLASSES, activation="softmax" if softmax else None, name="dense")(layers.GlobalAveragePooling2D()(x))
    return k.Model(image, x, name="net")


def trained(k, model, **options):
    q = tfquant.quantize_model(model, calibrate=X[:100], **options)
    from_logits = model.layers[-1].activation is not k.activations.softmax
    q.compile(k.optimizers.Adam(3e-3), k.losses.SparseCategoricalCrossentropy(from_logits=from_logits))
    q.fit(X, Y, batch_size=50, epochs=3, verbose=0)
    return q


def all_forms(q, tmp_path):
    """Outputs of the trained model, of INT8 and of the TFLite file."""
    int8 = tfquant.quantize(q, config=EXACT)
    tfquant.export_tflite(q, tmp_path / "q.tflite")
    run = tf.lite.Interpreter(model_path=str(tmp_path / "q.tflite")).get_signature_runner()
    (key,) = run.get_input_details()
    found = q.predict(X, verbose=0, batch_size=100), tf.nest.flatten(int8(X))[0], next(iter(run(**{key: X}).values()))
    return [np.asarray(one) for one in found], int8


def agreement(one, other):
    return (one.argmax(-1) == other.argmax(-1)).mean()


def fake_quantizations(int8):
    return [node for node in int8.graph.order() if node.op in FAKE_QUANT]


@BOTH
def test_logits_are_rounded_alike(k, tmp_path):
    """The forms differ in values on the edge of a step alone."""
    k.utils.set_random_seed(0)
    layers = k.layers
    model = k.Sequential(
        [
            k.Input((8, 8, 3)),
            layers.Conv2D(12, 3, name="first"),
            layers.BatchNormalization(momentum=0.8),
            layers.ReLU(),
            layers.DepthwiseConv2D(3, use_bias=False),
            layers.BatchNormalization(momentum=0.8),
            layers.ReLU(6.0),
            layers.Flatten(),
            layers.Dense(CLASSES, activation="softmax", name="dense"),
        ]
    )
    q = trained(k, model, portable=True)
    assert [a.name.split("/")[-2] for a in q.design.activations if a.is_given_out] == ["dense"]
    (own, int8, tflite), _ = all_forms(q, tmp_path)
    assert len(np.unique(np.log(own[:, 0] / own[:, 1]).round(4))) < 256  # differences of logits in steps
    assert agreement(own, int8) >= 0.995
    assert agreement(int8, tflite) >= 0.995
    assert agreement(own, tflite) >= 0.995
    # A probability moves by a quarter of itself at most per step of a logit here; LiteRT rounds it to 1 / 256.
    assert np.quantile(np.abs(own - int8), 0.99) <= 1e-4
    assert np.quantile(np.abs(own - tflite), 0.99) <= 0.5 / 256 + 1e-4


@pytest.mark.parametrize("softmax", [True, False])
def test_a_portable_model(softmax, tmp_path):
    q = trained(keras, residual(softmax=softmax), portable=True)
    plain = tfquant.quantize_model(residual(softmax=softmax))
    # Beyond those: two results in front of the first sum and the second, and logits.
    more = len(q.design.activations) - len(plain.design.activations)
    assert more == 3
    assert len(plain.design.results) == more
    assert not q.design.results
    (own, int8, tflite), quantized = all_forms(q, tmp_path)
    for one, other in ((own, int8), (int8, tflite), (own, tflite)):
        assert agreement(one, other) >= 0.995
    if not softmax:
        step = np.diff(np.unique(own)).min()
        assert np.abs(own / step - np.rint(own / step)).max() <= 0.02  # rounded where they are given out
        assert np.mean(np.abs(own - int8) < step / 2) >= 0.97
        assert np.mean(np.abs(int8 - tflite) < step / 2) >= 0.97
    assert quantized.plan.settings["trained_rounding"] == "all"
    assert not [unit for unit in quantized.annotation.units.values() if "add" in unit.match.nodes]
    again = tfquant.quantize(q, plan=quantized.plan)
    assert np.array_equal(np.asarray(tf.nest.flatten(again(X))[0]), int8)


def test_a_file_keeps_that_a_model_is_portable(tmp_path):
    q = tfquant.quantize_model(residual(), calibrate=X[:50], portable=True)
    q.save(tmp_path / "q.keras")
    loaded = keras.models.load_model(tmp_path / "q.keras")
    assert loaded.design == q.design
    assert loaded.design.is_portable
    found, expected = (np.asarray(tf.nest.flatten(tfquant.quantize(one, config=EXACT)(X))[0]) for one in (loaded, q))
    assert np.array_equal(found, expected)


def test_tfmot_is_not_portable():
    with pytest.raises(ConfigError, match=r'TFMOT has no portable: use engine="tfquant"'):
        tfquant.quantize_model(residual(tf_keras), engine="tfmot", portable=True)


def steps_of_biases(found):
    """The layers with a bias, each with the steps of its accumulators, float64 (C,)."""
    return [
        (unit, found.plan.tensors[unit.inputs[0].name].scale * found.plan.weight_scales[unit.name].astype(np.float64))
        for unit in found.annotation.units.values()
        if unit.bias is not None and np.any(unit.bias)
    ]


def test_biases_of_attention():
    """They have an axis for heads, and the queries' factor is folded into theirs."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 12))
    attention = keras.layers.MultiHeadAttention(2, 8, bias_initializer=keras.initializers.RandomNormal(stddev=0.5))
    q = tfquant.quantize_model(
        keras.Model(inputs, attention(inputs, inputs)), calibrate=X[:64].reshape(64, -1)[:, :72].reshape(-1, 6, 12)
    )
    found = [unit.bias / step for unit, step in steps_of_biases(tfquant.quantize(q, config=EXACT))]
    assert [steps.size for steps in found] == [16, 16, 16, 12]
    assert max(np.abs(steps - np.rint(steps)).max() for steps in found) <= 0.01
    assert min(np.abs(steps).max() for steps in found) > 10


@BOTH
@pytest.mark.parametrize(("norm", "bias"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("kind", ["Conv2D", "DepthwiseConv2D", "Dense", "Conv1D", "SeparableConv2D"])
def test_biases_are_integers_of_the_accumulators(k, kind, norm, bias):
    """The step of pixels times that of weights: a fifth of the result's own here, as long as biases are what they were."""
    k.utils.set_random_seed(1)
    layers = k.layers
    options = {"use_bias": bias, "name": "layer"}
    if bias:
        options["bias_initializer"] = k.initializers.RandomNormal(stddev=3.0)
    shape = {"Dense": (12,), "Conv1D": (16, 12)}.get(kind, (8, 8, 3))
    x = inputs = k.Input(shape)
    size = (3,) if kind in ("DepthwiseConv2D",) else (5,) if kind == "Dense" else (5, 3)
    x = getattr(layers, kind)(*size, **options)(x)
    if norm:
        draw = k.initializers.RandomNormal(1.0, 0.5)
        x = layers.BatchNormalization(
            beta_initializer=draw,
            gamma_initializer=draw,
            moving_mean_initializer=draw,
            moving_variance_initializer=k.initializers.Constant(3600.0),
        )(x)
    model = k.Model(inputs, layers.Flatten()(layers.ReLU()(x)))
    values = RNG.integers(0, 256, (32, *shape)).astype(np.float32)
    q = tfquant.quantize_model(model, calibrate=values)
    found = tfquant.quantize(q, config=EXACT)
    ((unit, step),) = steps_of_biases(found)
    assert np.abs(unit.bias / step).max() > 1
    assert np.abs(unit.bias / step - np.rint(unit.bias / step)).max() <= 0.01
    # Training itself has them as they are.
    ((other, _),) = steps_of_biases(
        tfquant.quantize(model, values, tfquant.QuantConfig(preset="fast", placement="int8", verify=False))
    )
    assert np.abs(other.bias / step - np.rint(other.bias / step)).max() > 0.01
    assert np.abs(unit.bias - other.bias).max() <= 0.501 * step.max()
