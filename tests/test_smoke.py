"""One small model all the way, for every TensorFlow that tfquant supports."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import tfquant

COUNT, CLASSES = 600, 4


def blobs(rng):
    """8x8 images with a bright square in one of four corners, and which."""
    labels = rng.integers(0, CLASSES, COUNT)
    images = rng.random((COUNT, 8, 8, 1)) * 0.4
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.4
    return images.astype(np.float32), labels


def trained(images, labels):
    layers = keras.layers
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 1), name="image")
    x = skip = layers.ReLU()(layers.BatchNormalization(momentum=0.8)(layers.Conv2D(16, 3, padding="same", use_bias=False)(image)))
    x = layers.ReLU(6.0)(layers.BatchNormalization(momentum=0.8)(layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)))
    x = layers.ReLU()(layers.Add()([layers.Conv2D(16, 1)(x), skip]))
    x = layers.Flatten()(layers.MaxPooling2D(2)(x))
    model = keras.Model(image, layers.Dense(CLASSES, activation="softmax")(x))
    model.compile(keras.optimizers.Adam(5e-3), "sparse_categorical_crossentropy")
    model.fit(images, labels, epochs=4, batch_size=20, verbose=0)
    return model


def test_a_small_model_all_the_way(tmp_path):
    images, labels = blobs(np.random.default_rng(0))
    model = trained(images[:400], labels[:400])
    config = tfquant.QuantConfig(subset_size=100, verify_batch_sizes=())
    result = tfquant.quantize(model, images[:400], config)

    ops = [node.op for node in result.graph_def.node]
    counts = [ops.count(op) for op in ("_FusedQuantizedConv2D", "_FusedQuantizedDepthwiseConv2D", "_QuantizedMatMul")]
    assert counts == [2, 1, 1]
    assert not {"Conv2D", "DepthwiseConv2dNative", "MatMul"} & set(ops)
    assert result.report.int8_share == 100
    assert result.report.fidelity.samples == 100

    x, y = images[400:], labels[400:]
    expected, found = model(x).numpy(), result(x).numpy()
    assert (expected.argmax(-1) == y).mean() > 0.95
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.97
    assert 10 * np.log10((expected**2).mean() / ((expected - found) ** 2).mean()) > 25

    result.save(tmp_path / "int8")
    loaded = tf.saved_model.load(str(tmp_path / "int8"))
    assert np.array_equal(loaded.serve(x).numpy(), found)
    (served,) = loaded.signatures["serving_default"](image=tf.constant(x)).values()
    assert np.array_equal(served.numpy(), found)
    again = tfquant.quantize(model, plan=tmp_path / "int8" / "quant_plan.json")
    assert np.array_equal(again(x).numpy(), found)


def test_training_with_fake_quantization(tmp_path):
    images, labels = blobs(np.random.default_rng(0))
    q = tfquant.quantize_model(trained(images[:400], labels[:400]), calibrate=images[:50])
    q.compile(keras.optimizers.Adam(1e-4), "sparse_categorical_crossentropy")
    q.fit(images[:400], labels[:400], epochs=1, batch_size=20, verbose=0)
    expected = np.asarray(q(images[400:]))
    q.save(tmp_path / "q.keras")
    result = tfquant.quantize(tmp_path / "q.keras")
    ops = [node.op for node in result.graph_def.node]
    assert [ops.count(op) for op in ("_FusedQuantizedConv2D", "_FusedQuantizedDepthwiseConv2D", "_QuantizedMatMul")] == [2, 1, 1]
    assert all(spec.source == "learned" for spec in result.plan.tensors.values())
    found = np.asarray(result(images[400:]))
    assert (expected.argmax(-1) == labels[400:]).mean() > 0.95
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.985
    assert 10 * np.log10((expected**2).mean() / ((expected - found) ** 2).mean()) > 35
