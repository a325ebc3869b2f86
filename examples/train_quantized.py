"""Quantization-aware training: a Keras model that keeps its accuracy with weights of 3 bits, and an INT8 model without data.

    python examples/train_quantized.py

Handwritten digits that come with scikit-learn; nothing is downloaded. It takes a minute.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from sklearn.datasets import load_digits

import tfquant

STEPS = 40 * (1297 // 64 + 1)


def float_model() -> keras.Model:
    """Depthwise separable, which few bits harm most."""
    layers = keras.layers
    x = inputs = keras.Input((8, 8, 1))
    for width in (16, 32):
        x = layers.SeparableConv2D(width, 3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
        x = layers.MaxPooling2D()(x)
    x = layers.Dense(10, activation="softmax")(layers.Flatten()(x))
    return keras.Model(inputs, x)


def copied(model: keras.Model) -> keras.Model:
    """`quantize_model` trains the model that it is given: another, with the same weights."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def fit(model: keras.Model, x: np.ndarray, y: np.ndarray, rate: float, callbacks: tuple = ()) -> None:
    """40 epochs with a falling learning rate."""
    schedule = keras.optimizers.schedules.CosineDecay(rate, STEPS)
    model.compile(keras.optimizers.Adam(schedule), "sparse_categorical_crossentropy")
    model.fit(x, y, batch_size=64, epochs=40, verbose=0, callbacks=list(callbacks))


def percent(model: keras.Model | tfquant.QuantizedModel, x: np.ndarray, y: np.ndarray) -> float:
    """Accuracy."""
    outputs = model(x)
    return float((np.argmax(np.asarray(outputs), -1) == y).mean() * 100)


def main() -> None:
    keras.utils.set_random_seed(0)
    x, y = load_digits(return_X_y=True)
    x = (x / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    x, test_x, y, test_y = x[:1297], x[1297:], y[:1297], y[1297:]

    model = float_model()
    fit(model, x, y, 1e-2)
    print(f"float32:                     {percent(model, test_x, test_y):.1f}%")

    # 8 bits: ranges begin where calibration has them, and the float model teaches.
    eight = tfquant.quantize_model(copied(model), calibrate=x[:200], teacher=model)
    fit(eight, x, y, 1e-3)
    int8 = tfquant.quantize(eight)  # no data: the ranges were learned
    print(f"trained in 8 bits:           {percent(eight, test_x, test_y):.1f}%, its INT8: {percent(int8, test_x, test_y):.1f}%")

    # Weights of 3 bits, whose steps are learned; ranges and BatchNorm stand still towards the end.
    learned = tfquant.LearnedStepQuantizer()
    three = tfquant.quantize_model(
        model, tfquant.QuantizeConfig(weight_bits=3, weight_quantizer=learned), calibrate=x[:200], teacher=model
    )
    print(f"weights of 3 bits, before:   {percent(three, test_x, test_y):.1f}%")
    schedule = tfquant.QuantizationSchedule(freeze_ranges_after=STEPS * 8 // 10, freeze_batch_norm_after=STEPS * 7 // 10)
    fit(three, x, y, 2e-3, (schedule,))
    print(f"weights of 3 bits, trained:  {percent(three, test_x, test_y):.1f}%")


if __name__ == "__main__":
    main()
