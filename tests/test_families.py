"""One small network of every family that people serve, tensor by tensor against the simulation, and how much of it is INT8."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import sys
from pathlib import Path

import building
import keras
import numpy as np
import pytest

import tfquant
from tfquant.config import QuantConfig
from tfquant.report import count_ops
from tfquant.sources import open_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import transformers

LAYERS = keras.layers


def conv(x, channels, size=3, activation="relu", **options):
    x = LAYERS.Conv2D(channels, size, padding="same", use_bias=False, **options)(x)
    x = LAYERS.BatchNormalization()(x)
    return LAYERS.Activation(activation)(x) if activation else x


def unet():
    image = keras.Input((16, 16, 3))
    first = conv(image, 8)
    second = conv(LAYERS.MaxPooling2D()(first), 16)
    x = conv(LAYERS.MaxPooling2D()(second), 16)
    x = LAYERS.Concatenate()([LAYERS.Conv2DTranspose(16, 2, strides=2)(x), second])
    x = LAYERS.Concatenate()([LAYERS.UpSampling2D(interpolation="bilinear")(conv(x, 8)), first])
    return keras.Model(image, LAYERS.Conv2D(2, 1)(conv(x, 8)))


def deeplab():
    image = keras.Input((16, 16, 3))
    x = conv(image, 8, strides=2)
    x = conv(LAYERS.DepthwiseConv2D(3, padding="same", dilation_rate=2)(x), 16, 1)
    pooled = conv(LAYERS.GlobalAveragePooling2D(keepdims=True)(x), 8, 1)
    branches = [conv(x, 8, 1), conv(x, 8, dilation_rate=2), conv(x, 8, dilation_rate=3), LAYERS.UpSampling2D(8)(pooled)]
    x = conv(LAYERS.Concatenate()(branches), 8, 1)
    return keras.Model(image, LAYERS.UpSampling2D(2, interpolation="bilinear")(LAYERS.Conv2D(3, 1)(x)))


def resnext():
    image = keras.Input((12, 12, 8))
    x = skip = conv(image, 16, 1)
    x = conv(conv(x, 16, groups=4), 16, 1, None)
    x = LAYERS.Activation("relu")(LAYERS.Add()([x, skip]))
    return keras.Model(image, LAYERS.Dense(5)(LAYERS.GlobalAveragePooling2D()(x)))


def regnet():
    image = keras.Input((12, 12, 8))
    x = skip = conv(image, 16, 1)
    x = conv(x, 16, groups=2)
    gate = LAYERS.GlobalAveragePooling2D(keepdims=True)(x)
    gate = LAYERS.Conv2D(16, 1, activation="sigmoid")(LAYERS.Conv2D(4, 1, activation="relu")(gate))
    x = conv(LAYERS.Multiply()([x, gate]), 16, 1, None)
    return keras.Model(image, LAYERS.Dense(5)(LAYERS.GlobalAveragePooling2D()(LAYERS.ReLU()(LAYERS.Add()([x, skip])))))


def yolo():
    image = keras.Input((16, 16, 3))
    x = conv(image, 8, activation="leaky_relu", strides=2)
    route = conv(x, 16, activation="leaky_relu", strides=2)
    x = conv(conv(route, 8, 1, "leaky_relu"), 16, activation="leaky_relu")
    x = LAYERS.Add()([x, route])
    x = LAYERS.Concatenate()([LAYERS.MaxPooling2D(size, 1, "same")(x) for size in (3, 5)] + [x])
    head = LAYERS.Reshape((-1, 3, 7))(LAYERS.Conv2D(21, 1)(x))
    boxes, classes = head[..., :4], LAYERS.Activation("sigmoid")(head[..., 4:])
    return keras.Model(image, [boxes, classes])


def ssd():
    image = keras.Input((16, 16, 3))
    maps = [conv(image, 8, strides=2)]
    maps.append(conv(conv(maps[0], 8, 1), 16, strides=2))
    boxes = [LAYERS.Reshape((-1, 4))(LAYERS.Conv2D(8, 3, padding="same")(x)) for x in maps]
    classes = [LAYERS.Reshape((-1, 3))(LAYERS.Conv2D(6, 3, padding="same")(x)) for x in maps]
    scores = LAYERS.Activation("softmax")(LAYERS.Concatenate(axis=1)(classes))
    return keras.Model(image, [LAYERS.Concatenate(axis=1)(boxes), scores])


def audio():
    sound = keras.Input((64, 4))
    x = LAYERS.Conv1D(8, 5, strides=2, activation="relu", padding="same")(sound)
    x = LAYERS.BatchNormalization()(LAYERS.Conv1D(8, 3, dilation_rate=2, padding="causal", activation="relu")(x))
    x = LAYERS.SeparableConv1D(16, 3, activation="relu")(LAYERS.MaxPooling1D()(x))
    return keras.Model(sound, LAYERS.Dense(5)(LAYERS.GlobalAveragePooling1D()(x)))


def recurrent(layer):
    series = keras.Input((6, 4))
    x = LAYERS.Dense(8, activation="relu")(series)
    return keras.Model(series, LAYERS.Dense(3)(LAYERS.Dense(8, activation="relu")(layer(8)(x))))


def wide_and_deep():
    user, item, facts = keras.Input((), dtype="int32"), keras.Input((3,), dtype="int32"), keras.Input((5,))
    deep = [LAYERS.Embedding(20, 8)(user), LAYERS.Flatten()(LAYERS.Embedding(30, 4)(item)), facts]
    x = LAYERS.Concatenate()(deep)
    for width in (16, 8):
        x = LAYERS.Dense(width, activation="relu")(x)
    wide = LAYERS.Dense(1)(facts)
    return keras.Model([user, item, facts], LAYERS.Activation("sigmoid")(LAYERS.Add()([LAYERS.Dense(1)(x), wide])))


def dlrm():
    ids, dense = keras.Input((4,), dtype="int32"), keras.Input((6,))
    bottom = LAYERS.Dense(8, activation="relu")(LAYERS.Dense(16, activation="relu")(dense))
    rows = LAYERS.Concatenate(axis=1)([LAYERS.Reshape((1, 8))(bottom), LAYERS.Embedding(20, 8)(ids)])
    products = LAYERS.Flatten()(LAYERS.Dot(axes=2)([rows, rows]))
    x = LAYERS.Dense(16, activation="relu")(LAYERS.Concatenate()([bottom, products]))
    return keras.Model([ids, dense], LAYERS.Dense(1, activation="sigmoid")(x))


def ncf():
    user, item = keras.Input((), dtype="int32"), keras.Input((), dtype="int32")
    factors = LAYERS.Multiply()([LAYERS.Embedding(20, 8)(user), LAYERS.Embedding(30, 8)(item)])
    x = LAYERS.Concatenate()([LAYERS.Embedding(20, 8)(user), LAYERS.Embedding(30, 8)(item)])
    x = LAYERS.Dense(8, activation="relu")(LAYERS.Dense(16, activation="relu")(x))
    return keras.Model([user, item], LAYERS.Dense(1, activation="sigmoid")(LAYERS.Concatenate()([factors, x])))


def head(x):
    return LAYERS.Dense(5, activation="softmax")(LAYERS.GlobalAveragePooling2D()(x))


def gated(x, middle, gate):
    """Squeeze and excite."""
    channels = x.shape[-1]
    y = LAYERS.Reshape((1, 1, channels))(LAYERS.GlobalAveragePooling2D()(x))
    y = LAYERS.Conv2D(channels, 1, activation=gate)(LAYERS.Conv2D(4, 1, activation=middle)(y))
    return LAYERS.Multiply()([x, y])


def depthwise(x, size, activation, **options):
    x = LAYERS.BatchNormalization()(LAYERS.DepthwiseConv2D(size, padding="same", use_bias=False, **options)(x))
    return LAYERS.Activation(activation)(x)


def mobilenet_v2():
    image = keras.Input((12, 12, 3))
    x = skip = conv(conv(image, 8, activation="relu6", strides=2), 6, 1, None)
    x = conv(depthwise(conv(x, 24, 1, "relu6"), 3, "relu6"), 6, 1, None)
    return keras.Model(image, head(conv(LAYERS.Add()([x, skip]), 16, 1, "relu6")))


def mobilenet_v3():
    image = keras.Input((12, 12, 3))
    x = skip = conv(LAYERS.Rescaling(1 / 127.5, -1.0)(image), 8, activation="hard_swish", strides=2)
    x = gated(depthwise(conv(x, 24, 1, "hard_swish"), 5, "hard_swish"), "relu", "hard_sigmoid")
    return keras.Model(image, head(LAYERS.Add()([conv(x, 8, 1, None), skip])))


def efficientnet():
    image = keras.Input((12, 12, 3))
    x = LAYERS.Normalization(mean=[0.4, 0.5, 0.6], variance=[0.05, 0.04, 0.06])(LAYERS.Rescaling(1 / 255)(image))
    x = skip = conv(x, 8, activation="swish", strides=2)
    x = gated(depthwise(conv(x, 24, 1, "swish"), 3, "swish"), "swish", "sigmoid")
    return keras.Model(image, head(LAYERS.Add()([conv(x, 8, 1, None), skip])))


def efficientnet_v2():
    image = keras.Input((12, 12, 3))
    x = skip = conv(LAYERS.Rescaling(1 / 128, -1.0)(image), 8, activation="swish", strides=2)
    x = LAYERS.Add()([conv(conv(x, 16, activation="swish"), 8, 1, None), skip])
    return keras.Model(image, head(conv(depthwise(conv(x, 16, 1, "swish"), 3, "swish", strides=2), 8, 1, None)))


def resnet_v2():
    image = keras.Input((12, 12, 3))
    x = LAYERS.MaxPooling2D(3, 2, "same")(LAYERS.Conv2D(8, 3, padding="same")(image))
    for channels in (8, 16):
        before = LAYERS.ReLU()(LAYERS.BatchNormalization()(x))
        y = LAYERS.Conv2D(channels, 3, padding="same")(conv(before, 8, 1))
        x = LAYERS.Add()([LAYERS.Conv2D(channels, 1)(before), y])
    return keras.Model(image, head(LAYERS.ReLU()(LAYERS.BatchNormalization()(x))))


def inception():
    image = keras.Input((12, 12, 3))
    x = conv(image, 8, strides=2)
    branches = [conv(x, 4, 1), conv(conv(x, 4, (1, 7)), 8, (7, 1)), conv(conv(x, 4, 1), 4, 3)]
    branches.append(conv(LAYERS.AveragePooling2D(3, 1, "same")(x), 4, 1))
    x = LAYERS.Concatenate()(branches)
    return keras.Model(image, head(LAYERS.Concatenate()([conv(x, 8, 3, strides=2), LAYERS.MaxPooling2D(3, 2, "same")(x)])))


def densenet():
    image = keras.Input((12, 12, 3))
    x = LAYERS.MaxPooling2D(3, 2, "same")(conv(image, 8))
    for _ in range(3):
        y = LAYERS.ReLU()(LAYERS.BatchNormalization()(x))
        x = LAYERS.Concatenate()([x, LAYERS.Conv2D(4, 3, padding="same", use_bias=False)(conv(y, 8, 1))])
    x = LAYERS.Conv2D(8, 1)(LAYERS.ReLU()(LAYERS.BatchNormalization()(x)))
    return keras.Model(image, head(LAYERS.AveragePooling2D(2)(x)))


def separable(x, channels, size=3, **options):
    return LAYERS.BatchNormalization()(LAYERS.SeparableConv2D(channels, size, padding="same", use_bias=False, **options)(x))


def xception():
    image = keras.Input((12, 12, 3))
    x = conv(image, 8, strides=2)
    y = separable(LAYERS.ReLU()(separable(x, 12)), 12)
    x = LAYERS.Add()([LAYERS.MaxPooling2D(3, 2, "same")(y), conv(x, 12, 1, None, strides=2)])
    return keras.Model(image, head(LAYERS.Add()([separable(LAYERS.ReLU()(x), 12), x])))


def nasnet():
    image = keras.Input((12, 12, 3))
    x = conv(image, 8, activation=None)
    y = LAYERS.ReLU()(x)
    parts = [
        LAYERS.Add()([separable(y, 8, 5), separable(y, 8)]),
        LAYERS.Add()([LAYERS.AveragePooling2D(3, 1, "same")(x), conv(y, 8, 1, None)]),
        LAYERS.Add()([separable(LAYERS.ReLU()(separable(y, 8)), 8), x]),
    ]
    return keras.Model(image, head(LAYERS.ReLU()(LAYERS.Concatenate()(parts))))


def convnext():
    image = keras.Input((12, 12, 3))
    x = LAYERS.LayerNormalization(epsilon=1e-6)(LAYERS.Conv2D(8, 4, 4)(image))
    for _ in range(2):
        y = LAYERS.LayerNormalization(epsilon=1e-6)(LAYERS.DepthwiseConv2D(7, padding="same")(x))
        x = LAYERS.Add()([x, LAYERS.Dense(8)(LAYERS.Dense(32, activation="gelu")(y))])
    return keras.Model(image, head(x))


# Family: (what builds it, the least share of multiply-accumulates in INT8 in percent).
FAMILIES = {
    "MobileNetV2": (mobilenet_v2, 100),
    "MobileNetV3": (mobilenet_v3, 100),
    "EfficientNet": (efficientnet, 100),
    "EfficientNetV2": (efficientnet_v2, 100),
    "ResNetV2": (resnet_v2, 100),
    "Inception": (inception, 100),
    "DenseNet": (densenet, 100),
    "Xception": (xception, 100),
    "NASNet": (nasnet, 100),
    "ConvNeXt": (convnext, 100),
    "BERT": (lambda: transformers.build("BertTiny"), 96),
    "ViT": (lambda: transformers.build("ViTTiny"), 96),
    "KerasHub": (lambda: transformers.build("HubBertTiny"), 99),
    "U-Net": (unet, 97),
    "DeepLab": (deeplab, 99),
    "ResNeXt": (resnext, 99),
    "RegNet": (regnet, 99),
    "YOLO": (yolo, 99),
    "SSD": (ssd, 99),
    "audio": (audio, 99),
    "wide and deep": (wide_and_deep, 99),
    "DLRM": (dlrm, 79),
    "NCF": (ncf, 99),
}


def inputs_of(graph, count):
    rng = np.random.default_rng(0)
    found = {}
    for key, tensor in graph.inputs.items():
        shape = (count, *(size or 7 for size in tensor.shape[1:]))
        is_float = tensor.dtype.is_floating
        found[key] = rng.normal(size=shape).astype(np.float32) if is_float else rng.integers(0, 20, shape).astype(np.int32)
    return found


@pytest.mark.parametrize("layer", [LAYERS.LSTM, LAYERS.GRU])
def test_recurrent_nets(layer):
    """Their loops hold variables, so that they are run whole: the outputs of the kernels against those of the simulation."""
    keras.utils.set_random_seed(1)
    x = np.random.default_rng(0).normal(size=(16, 6, 4)).astype(np.float32)
    result = tfquant.quantize(recurrent(layer), x, QuantConfig(placement="int8", verify=False))
    assert sum(decision.int8 for decision in result.plan.ops) == 3  # the Dense layers around it
    assert any("body" in decision.reason for decision in result.report.float_ops)
    (name,) = result.input_names
    simulated = next(iter(result.simulation()({name: x}).values()))
    assert np.abs(result(x).numpy() - simulated).max() <= 0.01 * np.abs(simulated).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tmp_path):
    make, least = FAMILIES[family]
    keras.utils.set_random_seed(1)
    model = make()
    model.export(str(tmp_path / "model"), verbose=False)
    graph = open_model(tmp_path / "model", QuantConfig()).graph
    batches = [inputs_of(graph, 3)]
    planned = building.plan_for(graph, batches)
    _, total, int8 = count_ops(graph, {node for unit in planned.annotation.units.values() for node in unit.match.covered})
    assert 100 * int8 / total >= least
    assert building.disagreements(planned, batches) == []
