"""Tests of where a model is fake-quantized while it trains."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

import tfquant


def test_a_tensor_that_took_in_a_batch_norm_is_rounded_behind_it():
    layers = keras.layers
    inputs = keras.Input((8, 8, 2))
    x = layers.Conv2D(4, 3, name="first")(inputs)  # its bias takes in the BatchNorm, and keeps its name
    x = layers.BatchNormalization(gamma_initializer="random_uniform", beta_initializer="random_normal", name="norm")(x)
    y = layers.Conv2D(4, 1, name="second")(x)
    y = layers.BatchNormalization(gamma_initializer="random_uniform", beta_initializer="random_normal", name="last")(y)
    q = tfquant.quantize_model(keras.Model(inputs, [layers.Conv2D(4, 1, name="third")(x), y]))
    rounded = [key for activation in q.design.activations for key in activation.tensors]
    assert sum("/norm" in key for key in rounded) == 1
    assert not any("/first" in key for key in rounded)
    assert len(q.design.results) == 2
    assert sum("/last" in key for key in q.design.results) == 1
    assert not any("/second" in key for key in q.design.results)
