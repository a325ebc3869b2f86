"""Tests of quantization-aware training for every kind of Keras model: what trains, and INT8 against what was trained."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import building
import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tfquant
from tfquant.graph.execution import executable

CLASSES = 5
SAMPLES = 400
IMAGE, SEQUENCE = (8, 8, 3), (6, 8)
EXACT = tfquant.QuantConfig(placement="int8", verify=False)


# -- models ----------------------------------------------------------------------------------------------------------------
def head(k, x):
    return k.layers.Dense(CLASSES)(k.layers.Flatten()(x))


def functional(k, body, shape=IMAGE):
    image = k.Input(shape)
    return k.Model(image, head(k, body(k.layers, image)))


def convs(layers, x, filters=8):
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)))
    return layers.ReLU(6.0)(layers.BatchNormalization(momentum=0.9)(layers.DepthwiseConv2D(3, padding="same")(x)))


def sequential(k):
    layers = k.layers
    return k.Sequential(
        [
            k.Input(IMAGE),
            layers.Conv2D(8, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dropout(0.1),
            layers.Dense(CLASSES),
        ]
    )


def residual(k):
    def body(layers, x):
        x = convs(layers, x)
        y = layers.BatchNormalization(momentum=0.9)(layers.Conv2D(8, 1)(convs(layers, x)))
        return layers.MaxPooling2D()(layers.ReLU()(layers.Add()([x, y])))

    return functional(k, body)


def concatenated(k):
    def body(layers, x):
        x = convs(layers, x)
        return layers.Concatenate()(
            [x, layers.Conv2D(4, 3, padding="same", activation="relu")(x), layers.MaxPooling2D(3, 1, "same")(x)]
        )

    return functional(k, body)


def nested(k):
    """Two levels, one block twice."""
    inner = k.Sequential([k.Input((8, 8, 8)), k.layers.Conv2D(8, 3, padding="same"), k.layers.BatchNormalization(momentum=0.9)])
    given = k.Input((8, 8, 8))
    block = k.Model(given, k.layers.ReLU()(k.layers.Add()([inner(given), given])), name="block")

    def body(layers, x):
        return block(block(layers.Conv2D(8, 3, padding="same")(x)))

    return functional(k, body)


def called(model, shape=IMAGE):
    model(np.zeros((1, *shape), np.float32))
    return model


def subclassed(k):
    class Net(k.Model):
        def __init__(self):
            super().__init__()
            self.conv = k.layers.Conv2D(8, 3, padding="same", activation="relu")
            self.stages = [k.layers.Conv2D(8, 3, padding="same") for _ in range(2)]
            self.norms = {"a": k.layers.BatchNormalization(momentum=0.9), "b": k.layers.BatchNormalization(momentum=0.9)}
            self.dropout, self.flatten, self.dense = k.layers.Dropout(0.2), k.layers.Flatten(), k.layers.Dense(CLASSES)

        def call(self, x, training=False):
            x = self.conv(x)
            for stage, key in zip(self.stages, "ab", strict=True):
                x = tf.nn.relu(self.norms[key](stage(x), training=training) + x)
            if training:
                x = self.dropout(x, training=True)
            return self.dense(self.flatten(x))

    return called(Net())


def without_training(k):
    class Net(k.Model):
        def __init__(self):
            super().__init__()
            self.conv, self.dense = k.layers.Conv2D(8, 3, activation="relu"), k.layers.Dense(CLASSES)

        def call(self, x):
            return self.dense(tf.reduce_mean(self.conv(x), [1, 2]))

    return called(Net())


def custom_layer(k):
    class Mixed(k.layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(name="kernel", shape=(3, 3, shape[-1], 8), initializer="he_normal")
            self.bias = self.add_weight(name="bias", shape=(8,), initializer="zeros")

        def call(self, x):
            y = tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x * 2.0 + 1.0, self.kernel, 1, "SAME"), self.bias))
            return tf.concat([y[:, ::2, ::2], y[:, 1::2, 1::2]], -1)

    def body(layers, x):
        return layers.Conv2D(8, 3)(Mixed()(x))

    return functional(k, body)


def op_lambdas(k):
    def body(layers, x):
        x = layers.Conv2D(8, 3, padding="same")(x * 2 + 1)
        x = x * layers.ReLU(6.0)(x + 3.0) / 6.0  # hard-swish as MobileNetV3 spells it
        return layers.Conv2D(8, 3)(x[:, 1:, :, ::2])

    return functional(k, body)


def keras_ops(k):
    class Gated(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(8)

        def call(self, x):
            y = self.dense(keras.ops.mean(x, axis=(1, 2)))
            return x * keras.ops.expand_dims(keras.ops.expand_dims(keras.ops.sigmoid(y), 1), 1)

    return functional(keras, lambda layers, x: Gated()(layers.Conv2D(8, 3)(x)))


def inner_function(k):
    class Net(k.Model):
        def __init__(self):
            super().__init__()
            self.conv, self.dense = k.layers.Conv2D(8, 3, activation="relu"), k.layers.Dense(CLASSES)

        @tf.function
        def call(self, x):
            return self.dense(tf.reduce_mean(self.conv(x), [1, 2]))

    return called(Net())


def separable(k):
    return functional(k, lambda layers, x: layers.BatchNormalization()(layers.SeparableConv2D(8, 3, activation="relu")(x)))


def conv1d(k):
    def body(layers, x):
        x = layers.Conv1D(8, 3, padding="same", activation="relu")(x)
        return layers.SeparableConv1D(8, 3, dilation_rate=1)(layers.Conv1D(8, 3, padding="causal")(x))

    return functional(k, body, SEQUENCE)


def transposed(k):
    return functional(k, lambda layers, x: layers.Conv2D(8, 3)(layers.Conv2DTranspose(8, 3, activation="relu")(x)))


def grouped(k):
    return functional(k, lambda layers, x: layers.Conv2D(8, 3, groups=2, activation="relu")(layers.Conv2D(8, 1)(x)))


def dilated(k):
    return functional(k, lambda layers, x: layers.Conv2D(8, 3, dilation_rate=2, activation="relu")(layers.Conv2D(8, 1)(x)))


def attention(k):
    def body(layers, x):
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        x = layers.Add()([x, layers.MultiHeadAttention(2, 4)(y, y)])
        y = layers.Dense(16, activation="gelu")(layers.LayerNormalization(epsilon=1e-6)(x))
        return layers.Add()([x, layers.Dense(8)(layers.Dropout(0.1)(y))])

    return functional(k, body, SEQUENCE)


def einsum_dense(k):
    def body(layers, x):
        x = layers.EinsumDense("abc,cd->abd", output_shape=(6, 8), bias_axes="d", activation="relu")(x)
        return layers.EinsumDense("abc,cde->abde", output_shape=(6, 2, 4))(x)

    return functional(k, body, SEQUENCE)


def embedding(k):
    tokens = k.Input((6,), dtype="int32")
    x = k.layers.Embedding(20, 8)(tokens)
    return k.Model(tokens, head(k, k.layers.Dense(8, activation="relu")(x)))


def lstm(k):
    def body(layers, x):
        return layers.Dense(8, activation="relu")(layers.LSTM(8)(layers.Dense(8)(x)))

    return functional(k, body, SEQUENCE)


def norms_elsewhere(k):
    """BatchNorm before a convolution, behind an activation, behind Dense."""

    def body(layers, x):
        x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.ReLU()(layers.Conv2D(8, 3)(x))
        x = layers.Conv2D(8, 3)(layers.BatchNormalization(momentum=0.9)(x))
        return layers.BatchNormalization(momentum=0.9)(layers.Dense(8)(layers.Flatten()(x)))

    return functional(k, body)


def preprocessed(k):
    def body(layers, x):
        x = layers.Rescaling(1 / 2.0, offset=-0.1)(x)
        return layers.Conv2D(8, 3)(layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[1.0, 2.0, 3.0])(x))

    return functional(k, body)


def input_list(k):
    a, b = k.Input(IMAGE, name="a"), k.Input((4,), name="b")
    x = k.layers.Flatten()(k.layers.Conv2D(4, 3, activation="relu")(a))
    return k.Model([a, b], k.layers.Dense(CLASSES)(k.layers.Concatenate()([x, k.layers.Dense(8, activation="relu")(b)])))


def input_dict(k):
    a, b = k.Input(IMAGE, name="a"), k.Input((4,), name="b")
    x = k.layers.Flatten()(k.layers.Conv2D(4, 3, activation="relu")(a))
    y = k.layers.Dense(CLASSES)(k.layers.Concatenate()([x, k.layers.Dense(8, activation="relu")(b)]))
    return k.Model({"a": a, "b": b}, y)


def shared(k):
    def body(layers, x):
        conv = layers.Conv2D(8, 3, padding="same", activation="relu")
        return conv(conv(layers.Conv2D(8, 1)(x)))

    return functional(k, body)


def activation(name):
    def build(k):
        def body(layers, x):
            x = layers.Activation(name)(layers.BatchNormalization(momentum=0.9)(layers.Conv2D(8, 3)(x)))
            return layers.Activation(name)(layers.Conv2D(8, 3)(x))

        return functional(k, body)

    build.__name__ = f"activation_{name}"
    return build


KINDS = [
    sequential,
    residual,
    concatenated,
    nested,
    subclassed,
    without_training,
    custom_layer,
    op_lambdas,
    inner_function,
    separable,
    conv1d,
    transposed,
    grouped,
    dilated,
    attention,
    einsum_dense,
    embedding,
    lstm,
    norms_elsewhere,
    preprocessed,
    input_list,
    input_dict,
    shared,
    activation("swish"),
    activation("gelu"),
    activation("elu"),
]
KERAS_3 = [activation("hard_swish"), keras_ops]
# Of tf_keras these differ from Keras 3 in what they trace; the others are asked for with -m slow.
QUICK = {"residual", "nested", "subclassed", "inner_function", "lstm", "input_dict", "activation_swish"}
MODELS = [pytest.param(keras, kind, id=f"keras-{kind.__name__}") for kind in (*KINDS, *KERAS_3)] + [
    pytest.param(tf_keras, kind, id=f"tf_keras-{kind.__name__}", marks=() if kind.__name__ in QUICK else pytest.mark.slow)
    for kind in KINDS
]


# -- what is done with them ------------------------------------------------------------------------------------------------
def data_for(q, seed=0):
    """Inputs for a quantization-aware model, and labels that depend on them."""
    rng = np.random.default_rng(seed)

    def values(spec):
        shape = (SAMPLES, *spec.shape[1:])
        return rng.normal(size=shape).astype(np.float32) if spec.dtype.is_floating else rng.integers(0, 20, shape)

    x = tf.nest.map_structure(values, q.signature)
    flat = np.concatenate([part.reshape(SAMPLES, -1) for part in tf.nest.flatten(x)], 1)
    return x, (flat @ np.random.default_rng(1).normal(size=(flat.shape[1], CLASSES))).argmax(1)


# Ops that stay float, by the kind of model; all others of which a report must say so are INT8.
FLOAT_OPS = {
    "custom_layer": {"ConcatV2"},  # between float slices
    "transposed": {"Conv2DBackpropInput"},
    "grouped": {"Conv2D"},
    "attention": {"AddV2", "BatchMatMulV2"},  # of LayerNormalization, and products of two activations
    "lstm": {"MatMul", "AddV2"},  # of the loop
}
NOTES = {
    "grouped": [
        "stays in float: it is in a tf.function with jit_compile=True, in which nothing can be rounded while the model trains."
    ],
    "norms_elsewhere": ["are rounded after the training: what stands before the layer is folded into them."] * 2,
    "preprocessed": ["are rounded after the training: what stands before the layer is folded into them."],
}
# Where weights are rounded after the training, some of 400 samples may be others.
SAME, DECIBELS = 0.995, 45
SAME_WITH_NOTES, DECIBELS_WITH_NOTES = 0.97, 30


@pytest.mark.parametrize(("k", "make"), MODELS)
def test_what_trains_is_what_int8_computes(k, make):
    k.utils.set_random_seed(0)
    model = make(k)
    q = tfquant.quantize_model(model)
    assert [note.split(" ", 1)[1] for note in (n.replace("The weights of ", "") for n in q.design.notes)] == NOTES.get(
        make.__name__, []
    )
    x, y = data_for(q)
    before = [np.array(w) for w in model.get_weights()]
    loss = k.losses.SparseCategoricalCrossentropy(from_logits=True)
    q.compile(k.optimizers.Adam(5e-3), loss, jit_compile=False)
    history = q.fit(x, y, batch_size=50, epochs=2, verbose=0).history["loss"]
    assert history[-1] < history[0]
    assert all(
        not np.array_equal(old, new) for old, new in zip(before, model.get_weights(), strict=True) if old.dtype == np.float32
    )

    expected = q.predict(x, verbose=0)
    int8 = tfquant.quantize(q, config=EXACT)
    assert {decision.op for decision in int8.report.float_ops} == FLOAT_OPS.get(make.__name__, set())
    assert {spec.source for spec in int8.plan.tensors.values()} <= {"learned", "known"}
    found = np.asarray(tf.nest.flatten(int8(x))[0])
    is_exact = "rounded after" not in str(q.design.notes)
    assert (expected.argmax(1) == found.argmax(1)).mean() >= (SAME if is_exact else SAME_WITH_NOTES)
    noise = ((expected - found).astype(np.float64) ** 2).sum()
    power = (expected.astype(np.float64) ** 2).sum()
    assert 10 * np.log10(power / max(noise, 1e-30)) >= (DECIBELS if is_exact else DECIBELS_WITH_NOTES)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: keras.layers.Conv2D(8, 3, activation="relu"),
        lambda: keras.layers.DepthwiseConv2D(3, padding="same"),
        lambda: keras.layers.Dense(8),
        lambda: keras.layers.SeparableConv2D(8, 3),
    ],
    ids=["conv", "depthwise", "dense", "separable"],
)
def test_activations_of_single_layers(layer):
    """The simulation is what trained, and each 8-bit value of INT8 is within one step of it."""
    keras.utils.set_random_seed(0)
    image = keras.Input(IMAGE)
    x = layer()(image)
    model = keras.Model(image, keras.layers.Dense(CLASSES)(keras.layers.Flatten()(x)))
    q = tfquant.quantize_model(model)
    samples, y = data_for(q)
    q.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    q.fit(samples, y, batch_size=50, verbose=0)
    int8 = tfquant.quantize(q, config=EXACT)
    batch = {int8.input_names[0]: samples}
    (simulated,) = int8.simulation()(batch).values()
    np.testing.assert_allclose(simulated, q.predict(samples, verbose=0), atol=1e-4)
    planned = building.Planned(int8.graph, int8.annotation, int8.plan, values_of(int8, samples))
    assert building.disagreements(planned, [batch]) == []


def values_of(int8, samples):
    """Outputs and quantized tensors of the float graph, by their names."""
    wanted = int8.graph.outputs | {tensor.name: tensor for tensor in int8.annotation.quantized}
    found = executable(int8.graph, lambda get: {name: get(tensor) for name, tensor in wanted.items()})(tf.constant(samples))
    return {name: value.numpy() for name, value in found.items()}
