"""Tests of TFLite files: LiteRT against the simulation, tensor by tensor, and what the files are made of."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfquant
from tfquant.errors import ConfigError, OutputError
from tfquant.exporters import exporting, tflite
from tfquant.exporters.checking import Check, check
from tfquant.exporters.marking import mark
from tfquant.exporters.result import Exported, judge
from tfquant.exporters.tflite import half, running
from tfquant.exporters.tflite.converter import convert
from tfquant.exporters.tflite.flatbuffer import INT4, Model, schema
from tfquant.exporters.tflite.kernels import KERNELS
from tfquant.exporters.tflite.quantizer import Options, quantize
from tfquant.plan.spec import QuantSpec

ROOT = Path(__file__).resolve().parent.parent
IMAGES = {"x": (None, 9, 7, 6)}
CONFIG = tfquant.QuantConfig(verify=False, placement="int8", preset="fast")


def values(*shape: int, seed: int = 0, low: float = -1.0, high: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def samples(inputs: Mapping[str, Sequence[int | None]], low: float = -1.0, high: float = 1.0) -> list[dict[str, np.ndarray]]:
    shapes = {name: [size or 5 for size in shape] for name, shape in inputs.items()}
    return [{n: values(*shape, seed=seed + 7, low=low, high=high) for n, shape in shapes.items()} for seed in range(2)]


def saved(function: Callable, inputs: Mapping[str, Sequence[int | None]], folder: Path) -> Path:
    module = tf.Module()
    specs = [tf.TensorSpec(shape, tf.float32, name=name) for name, shape in inputs.items()]

    def network(*tensors):
        result = function(*tensors)
        named = result if isinstance(result, dict) else {f"y{i}": one for i, one in enumerate(tf.nest.flatten(result))}
        return {name: tf.identity(tensor) for name, tensor in named.items()}

    module.f = tf.function(network, input_signature=specs, autograph=False)
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.f})
    return folder


def quantized(function: Callable, folder: Path, inputs=IMAGES, batches=None, **options) -> tfquant.QuantizedModel:
    config = dataclasses.replace(CONFIG, **options)
    data = None if config.mode != "static" else lambda: iter(batches or samples(inputs))
    return tfquant.quantize(saved(function, inputs, folder / "model"), data, config)


def check_right(result: tfquant.Exported, most: float = 1.01) -> None:
    """All quantized tensors within a step of what the simulation makes of their operands."""
    assert result.check is not None
    assert result.check.tensors
    assert max(tensor.steps for tensor in result.check.tensors) <= most, result.check.layers()
    judge(result)


def zero_point_of(model: tfquant.QuantizedModel) -> tuple[QuantSpec, int]:
    """The spec of the input, and its zero point as int8."""
    spec = model.plan.tensors["x"]
    return spec, spec.zero_point - (128 if spec.dtype == "quint8" else 0)


def ops(content: bytes) -> Counter:
    model = Model(content)
    return Counter(model.name_of(op) for op in model.graph.operators)


def conv(x, height, width, depth, channels, strides=1, padding="SAME", dilations=1, seed=0, size=0.5):
    weights = values(height, width, depth, channels, seed=seed + 1) * size
    y = tf.nn.conv2d(x, weights, strides, padding, dilations=dilations)
    return tf.nn.bias_add(y, values(channels, seed=seed + 2))


def depthwise(x, size, multiplier, strides=1, padding="SAME", dilations=(1, 1)):
    weights = values(size, size, x.shape[-1], multiplier, seed=3)
    y = tf.nn.depthwise_conv2d(x, weights, [1, strides, strides, 1], padding, dilations=dilations)
    return tf.nn.bias_add(y, values(x.shape[-1] * multiplier, seed=4))


def dense(x, depth, channels, seed=0):
    return tf.nn.bias_add(tf.matmul(x, values(depth, channels, seed=seed + 5)), values(channels, seed=seed + 6))


# -- layers --------------------------------------------------------------------------------------------------------------
LAYERS = {
    "3x3": lambda x: conv(x, 3, 3, 6, 8),
    "1x1 to one channel": lambda x: conv(x, 1, 1, 6, 1),
    "asymmetric, odd strides": lambda x: tf.nn.relu(conv(x, 3, 1, 6, 5, strides=(2, 3))),
    "valid": lambda x: tf.nn.relu6(conv(x, 5, 2, 6, 3, padding="VALID")),
    "explicit padding": lambda x: conv(x, 3, 3, 6, 4, padding=[[0, 0], [2, 1], [0, 3], [0, 0]]),
    "dilated": lambda x: conv(x, 3, 3, 6, 4, dilations=2),
    "depthwise": lambda x: tf.nn.relu(depthwise(x, 3, 1)),
    "depthwise with a multiplier": lambda x: depthwise(x, 3, 2, strides=2, padding="VALID"),
    "depthwise, dilated": lambda x: depthwise(x, 3, 1, dilations=(2, 2)),
    "dense": lambda x: dense(tf.reshape(x, [-1, 9 * 7 * 6]), 9 * 7 * 6, 10),
    "dense of rank 3": lambda x: tf.einsum("npc,cd->npd", tf.reshape(x, [-1, 63, 6]), values(6, 4, seed=8)),
    "transposed weights": lambda x: tf.matmul(tf.reshape(x, [-1, 378]), values(5, 378, seed=9), transpose_b=True),
    "conv1d": lambda x: tf.nn.conv1d(tf.reshape(x, [-1, 63, 6]), values(4, 6, 3, seed=10), 2, "SAME"),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", ["int8", "int16"])
def test_layers(name, kind, tmp_path):
    model = quantized(LAYERS[name], tmp_path)
    content, result = tflite.export(model, samples(IMAGES), kind)
    check_right(result, 1.01 if kind == "int8" else 64)
    assert result.float_ops == ()
    assert result.check.sqnr > (120 if kind == "int8" else 55), "the same integers; of 16 bits, hardly a value rounded otherwise"
    weights = next(iter(model.plan.weight_scales))
    stored = [t for t in Model(content).graph.tensors if t.quantization and t.quantization.scale is not None]
    channels = len(model.plan.weight_scales[weights])
    assert any(
        np.array_equal(t.quantization.scale, model.plan.weight_scales[weights])
        for t in stored
        if len(t.quantization.scale) == channels
    )


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (-3.0, 0.0), (-1e-6, 2e-6), (-1e6, 3e5), (0.7, 0.7)],
    ids=["positive", "negative", "tiny", "huge", "equal"],
)
def test_ranges(low, high, tmp_path):
    batches = samples(IMAGES, low, high)
    batches[0]["x"][0, 0, 0, 0] = 0.9 * high  # data that are one number are refused
    scale = max(abs(low), abs(high))
    model = quantized(lambda x: tf.nn.relu(conv(x, 3, 3, 6, 4, size=0.5) * scale), tmp_path, batches=batches)
    _, result = tflite.export(model, batches)
    check_right(result)


def residual(x):
    y = tf.nn.relu(conv(x, 3, 3, 6, 6))
    return tf.nn.relu(conv(y, 3, 3, 6, 6, seed=20) + x)


def joined(x):
    one, other = tf.nn.relu(conv(x, 1, 1, 6, 4)), conv(x, 3, 3, 6, 4, seed=30)
    return conv(tf.concat([one, other * 3], -1), 1, 1, 8, 3, seed=40)


def pooled(x):
    y = tf.nn.max_pool2d(tf.nn.relu(conv(x, 3, 3, 6, 8)), 2, 2, "SAME")
    y = tf.nn.avg_pool2d(y, 3, 1, "SAME")
    return conv(y, 1, 1, 8, 3, seed=50)


def classifier(x):
    y = tf.nn.relu(conv(x, 3, 3, 6, 8))
    y = tf.reshape(tf.nn.avg_pool2d(y, [9, 7], 1, "VALID"), [-1, 8])
    return tf.nn.softmax(dense(y, 8, 5))


def means(x):
    return tf.nn.softmax(dense(tf.reduce_mean(tf.nn.relu(conv(x, 3, 3, 6, 8)), [1, 2]), 8, 5))


def swish(x):
    y = conv(x, 3, 3, 6, 6)
    return conv(y * tf.sigmoid(y), 1, 1, 6, 4, seed=60)


def hard_swish(x):
    y = conv(x, 3, 3, 6, 6)
    return conv(y * tf.nn.relu6(y + 3) * (1 / 6), 1, 1, 6, 4, seed=60)


def excited(x):
    y = tf.nn.relu(conv(x, 3, 3, 6, 6))
    gate = tf.sigmoid(conv(tf.nn.relu(conv(tf.reduce_mean(y, [1, 2], keepdims=True), 1, 1, 6, 3)), 1, 1, 3, 6, seed=9))
    return conv(y * gate, 1, 1, 6, 4, seed=60)


def resized(x):
    y = tf.nn.relu(conv(x, 3, 3, 6, 6))
    return conv(tf.image.resize(y, (18, 14)), 3, 3, 6, 4, seed=60)


def padded(x):
    return conv(tf.pad(tf.nn.relu(conv(x, 3, 3, 6, 6)), [[0, 0], [1, 2], [3, 0], [0, 0]]), 3, 3, 6, 4, padding="VALID", seed=60)


def upsampled(x):
    y = tf.nn.relu(conv(x, 3, 3, 6, 6))
    y = tf.nn.conv2d_transpose(y, values(3, 3, 5, 6, seed=70), [5, 18, 14, 5], 2)
    return conv(tf.nn.relu(y), 1, 1, 5, 3, seed=80)


def attention(x):
    y = tf.reshape(x, [-1, 63, 6])
    query, key, value = (tf.einsum("npc,cd->npd", y, values(6, 4, seed=seed)) for seed in (1, 2, 3))
    weights = tf.nn.softmax(tf.matmul(query, key, transpose_b=True))
    return tf.einsum("npd,de->npe", tf.matmul(weights, value), values(4, 5, seed=4))


NETWORKS = {
    "residual": (residual, {"CONV_2D": 2, "ADD": 1}),
    "concat": (joined, {"CONV_2D": 3, "CONCATENATION": 1}),
    "pooling": (pooled, {"CONV_2D": 2, "MAX_POOL_2D": 1, "AVERAGE_POOL_2D": 1}),
    "classifier": (classifier, {"CONV_2D": 1, "MEAN": 1, "FULLY_CONNECTED": 1, "SOFTMAX": 1}),
    "mean": (means, {"CONV_2D": 1, "MEAN": 1, "FULLY_CONNECTED": 1, "SOFTMAX": 1}),
    "swish": (swish, {"CONV_2D": 2, "LOGISTIC": 1, "MUL": 1}),
    "hard-swish": (hard_swish, {"CONV_2D": 2, "ADD": 1, "MUL": 1}),
    "squeeze and excite": (excited, {"CONV_2D": 4, "MEAN": 1, "LOGISTIC": 1, "MUL": 1}),
    "resize": (resized, {"CONV_2D": 2, "RESIZE_BILINEAR": 1}),
    "pad": (padded, {"CONV_2D": 2, "PAD": 1}),
    "attention": (attention, {"FULLY_CONNECTED": 4, "BATCH_MATMUL": 2, "SOFTMAX": 1}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_no_float_op(name, tmp_path):
    """Between QUANTIZE of the input and DEQUANTIZE of the output."""
    function, wanted = NETWORKS[name]
    model = quantized(function, tmp_path)
    content, result = tflite.export(model, samples(IMAGES))
    check_right(result, 3.01 if "ADD" in wanted or "MUL" in wanted else 1.01)  # a step of a summand may be three of the sum
    assert result.float_ops == ()
    found = ops(content)
    assert wanted.items() <= found.items(), found
    assert found["DEQUANTIZE"] == 1


def deep(x):
    """Seeded layers, most of them padded before; where roundings differ, after as many layers all values do."""
    for seed in range(8):
        y = tf.pad(tf.nn.relu(depthwise(x, 1, 1)), [[0, 0], [1, 1], [1, 1], [0, 0]])
        x = tf.nn.relu(conv(y, 3, 3, 6, 6, padding="VALID", seed=seed, size=1.5))
    return conv(tf.reshape(tf.reduce_mean(x, [1, 2]), [-1, 1, 1, 6]), 1, 1, 6, 5, seed=9)


def test_the_same_integers_behind_many_layers(tmp_path):
    """Down to the mean, whose own rounding by the converter must not stay, and the biases behind a padding."""
    model = quantized(deep, tmp_path)
    batches = [{"x": values(40, 9, 7, 6, seed=3)}]
    content, result = tflite.export(model, batches)
    check_right(result)
    assert result.check.sqnr > 120
    assert max(tensor.off for tensor in result.check.tensors) < 1e-3
    assert ops(content)["QUANTIZE"] == 1, "of the input"


def test_a_layer_that_the_plan_has_in_float(tmp_path):
    """A transposed convolution, which oneDNN has not: with the plan's ranges it is INT8 here."""
    inputs = {"x": (5, 9, 7, 6)}
    model = quantized(upsampled, tmp_path, inputs)
    assert "Conv2DBackpropInput" in [decision.op for decision in model.plan.ops if not decision.int8]
    content, result = tflite.export(model, samples(inputs))
    check_right(result)
    assert result.float_ops == ()
    assert ops(content)["TRANSPOSE_CONV"] == 1


def test_what_the_user_keeps_in_float_is_float(tmp_path):
    model = quantized(residual, tmp_path, ignored_scope=("Conv2D_1",))
    content, result = tflite.export(model, samples(IMAGES))
    check_right(result)
    assert "CONV_2D" in {op for op, _ in result.float_ops}
    assert ops(content)["CONV_2D"] == 2


# -- the file --------------------------------------------------------------------------------------------------------------
def test_it_has_the_integers_of_the_plan(tmp_path):
    """Also those that are not the nearest."""
    model = quantized(LAYERS["3x3"], tmp_path, preset="accuracy")
    (name,) = model.plan.weight_scales
    (rounded,) = model.plan.rounded.values()
    content, result = tflite.export(model, samples(IMAGES))
    check_right(result)
    file = Model(content)
    (op,) = [op for op in file.graph.operators if file.name_of(op) == "CONV_2D"]
    assert np.array_equal(file.value(op.inputs[1]), rounded.transpose(3, 0, 1, 2))
    weights = file.tensor(op.inputs[1]).quantization
    assert np.array_equal(weights.scale, model.plan.weight_scales[name])
    assert weights.quantizedDimension == 0
    spec, zero_point = zero_point_of(model)
    held = file.tensor(op.inputs[0]).quantization
    assert (held.scale[0], held.zeroPoint[0]) == (pytest.approx(spec.scale, rel=1e-6), zero_point)
    bias = file.tensor(op.inputs[2]).quantization
    assert bias.scale == pytest.approx(spec.scale * model.plan.weight_scales[name], rel=1e-6)


def test_equal_models_equal_bytes(tmp_path):
    first, second = (tflite.export(quantized(residual, tmp_path / name), [])[0] for name in ("a", "b"))
    assert first == second


def described(file: Model) -> list:
    """Ops with their options, and all that is said of their tensors, whatever the order in which a file has these."""

    def of(index):
        tensor, value = file.tensor(index), file.value(index)
        plain = [None if one is None else np.asarray(one).tolist() for one in (tensor.shape, tensor.shapeSignature, value)]
        return [file.label(index), tensor.type, tensor.hasRank, *plain, _plain(tensor.quantization)]

    indices = [(op, *([of(index) for index in side] for side in (op.inputs, op.outputs))) for op in file.graph.operators]
    return [(file.name_of(op), op.builtinOptionsType, _plain(op.builtinOptions), *sides) for op, *sides in indices]


def _plain(item) -> dict:
    return {} if item is None else {name: np.asarray(value).tolist() for name, value in vars(item).items()}


def test_what_is_stored_once_is_there_for_all_who_refer_to_it(tmp_path):
    path = saved(lambda x: residual(tf.nn.relu(residual(x))), IMAGES, tmp_path / "model")
    content = convert(path, ["serving_default"])
    packed = Model(content).pack()
    assert described(Model(packed)) == described(Model(content))
    assert len(described(Model(packed))) == 6
    assert Model(packed).pack() == packed
    inputs, outputs = ([file.tensor(index).name for index in file.graph.inputs] for file in (Model(packed), Model(content)))
    assert inputs == outputs == [b"serving_default_x:0"]


def test_what_a_file_holds_besides_its_numbers(tmp_path):
    content, _ = tflite.export(quantized(residual, tmp_path), [])
    file = Model(content)
    tensors = file.graph.tensors
    found = [t.quantization for t in tensors if t.quantization.scale is not None]
    scales, zero_points = ({tuple(getattr(one, name)) for one in found} for name in ("scale", "zeroPoint"))
    numbers = sum(len(buffer.data) for buffer in file.root.buffers if buffer.data is not None)
    numbers += 4 * sum(map(len, scales)) + 8 * sum(map(len, zero_points)) + sum(map(len, {t.name for t in tensors}))
    assert len(content) < numbers + 64 * (len(tensors) + len(file.graph.operators)) + 600
    root = schema.Model.GetRootAsModel(content, 0)
    buffers = [root.Buffers(index)._tab for index in range(root.BuffersLength())]
    starts = [table.Vector(table.Offset(4)) for table in buffers if table.Offset(4)]
    assert len(starts) == 4
    assert {start % 16 for start in starts} == {0}


@pytest.mark.parametrize(("taken", "given"), [("int8", "int8"), ("uint8", "uint8"), ("uint8", "float32"), ("float32", "int8")])
def test_an_interface_of_integers(taken, given, tmp_path):
    model = quantized(classifier, tmp_path)
    batches = samples(IMAGES)
    plain = running.function(tflite.export(model, [])[0], model.signatures)(batches[0])
    content, result = tflite.export(model, batches, "int8", taken, given)
    check_right(result)
    assert "DEQUANTIZE" not in ops(content) or given == "float32"
    file = running.interpreter(content)
    (outside,), (shown,) = file.get_input_details(), file.get_output_details()
    assert (outside["dtype"], shown["dtype"]) == (np.dtype(taken).type, np.dtype(given).type)
    spec, zero_point = zero_point_of(model)
    if taken == "uint8":
        assert outside["quantization"] == (pytest.approx(spec.scale, rel=1e-6), zero_point + 128)
    assert shown["quantization"] == {"int8": (1 / 256, -128), "uint8": (1 / 256, 0), "float32": (0.0, 0)}[given]
    found = running.function(content, model.signatures)(batches[0])["y0"]
    most = 0.0 if given == "float32" else 0.5 / 256 + 1 / 32768
    assert np.abs(found - plain["y0"]).max() <= most, "the same logits; probabilities of 16 bits where they are shown as floats"
    assert (np.unique(found * 256 % 1).size == 1) == (given != "float32")


def expanded(x):
    return tf.transpose(tf.expand_dims(tf.reshape(means(x), [-1, 5, 1]), 1), [0, 2, 1, 3])


def softmax_of(content: bytes) -> tuple[int, np.dtype, tuple[float, int], int]:
    """Of the one SOFTMAX the index of its logits, the dtype, scale and zero point of its result, and its version."""
    file = Model(content)
    (op,) = [op for op in file.graph.operators if file.name_of(op) == "SOFTMAX"]
    held = file.tensor(op.outputs[0]).quantization
    version = file.root.operatorCodes[op.opcodeIndex].version
    return int(op.inputs[0]), file.dtype(op.outputs[0]), (float(held.scale[0]), int(held.zeroPoint[0])), version


@pytest.mark.parametrize("function", [classifier, expanded], ids=["as they are", "moved"])
def test_shown_probabilities_have_16_bits(function, tmp_path):
    batches = [{"x": values(200, 9, 7, 6, seed=3, low=-4, high=4)}]
    model = quantized(function, tmp_path, batches=batches)
    content, result = tflite.export(model, batches)
    check_right(result)
    assert result.float_ops == ()
    assert ops(content)["DEQUANTIZE"] == 1
    logits, *rest = softmax_of(content)
    assert rest == [np.dtype("int16"), (2.0**-15, 0), 3]
    found = running.inner(content, {"logits": logits}, {"x": "x"}, {"y0": "y0"}, "serving_default")(batches[0])
    expected = tf.nn.softmax(found["logits"].astype(np.float64)).numpy()
    assert np.ptp(expected, 0).min() > 1e-3
    assert np.abs(found["y0"].reshape(expected.shape) - expected).max() < 0.6 * 2.0**-15
    exact, coarse = model.float_function()(batches[0])["y0"], tflite.export(model, [], output_type="uint8")[0]
    rough = running.function(coarse, model.signatures)(batches[0])["y0"]
    shown, rounded_to_bytes = ((exact * np.log((exact + 1e-6) / (other + 1e-6))).sum() for other in (found["y0"], rough))
    assert 0 < shown < 0.5 * rounded_to_bytes


def decided(x):
    found = means(x)
    return {"scores": found, "best": tf.argmax(found, -1)}


def weighted(x):
    found = means(x)
    return {"scores": found, "more": dense(found, 5, 3, seed=9)}


@pytest.mark.parametrize("function", [decided, weighted], ids=["argmax", "layer"])
def test_probabilities_that_others_read_have_8_bits(function, tmp_path):
    batches = samples(IMAGES, -9, 9)
    model = quantized(function, tmp_path, batches=batches)
    content, result = tflite.export(model, batches)
    check_right(result)
    assert softmax_of(content)[1:] == (np.dtype("int8"), (1 / 256, -128), 2)
    scores = running.function(content, model.signatures)(batches[0])["scores"]
    assert np.array_equal(scores * 256, np.rint(scores * 256))


@pytest.mark.parametrize("first", ["shown", "read"])
def test_each_signature_has_its_own_probabilities(first, tmp_path):
    """Shown by one, and read by the argmax of the other; the tensors of the first are compared."""
    module = tf.Module()
    spec = [tf.TensorSpec(IMAGES["x"], tf.float32, name="x")]
    shown = tf.function(lambda x: {"scores": tf.identity(means(x))}, input_signature=spec, autograph=False)
    read = tf.function(lambda x: {"best": tf.argmax(means(x), -1)}, input_signature=spec, autograph=False)
    module.one, module.other = (shown, read) if first == "shown" else (read, shown)
    tf.saved_model.save(module, str(tmp_path / "model"), signatures={"a": module.one, "b": module.other})
    batches = [{"x": values(40, 9, 7, 6, seed=3, low=-4, high=4)}]
    config = dataclasses.replace(CONFIG, signature_keys=("a", "b"))
    model = tfquant.quantize(tmp_path / "model", lambda: iter(batches), config)
    content, result = tflite.export(model, batches)
    check_right(result)
    found = running.function(content, model.signatures)(batches[0])
    (scores,) = [value for name, value in found.items() if name.endswith("scores")]
    assert np.abs(scores * 2.0**15 % 128).max() > 0, "no multiples of 1/256"
    assert np.array_equal(scores * 2.0**15, np.rint(scores * 2.0**15))


def test_names_and_open_sizes(tmp_path):
    inputs = {"image": (None, 9, 7, 6), "other": (None, 378)}

    def network(image, other):
        y = dense(tf.reshape(image, [-1, 378]), 378, 4)
        return {"scores": tf.nn.softmax(y), "more": dense(other, 378, 3, seed=9)}

    model = quantized(network, tmp_path, inputs)
    content, result = tflite.export(model, samples(inputs))
    check_right(result)
    runner = running.interpreter(content).get_signature_runner("serving_default")
    assert set(runner.get_input_details()) == {"image", "other"}
    assert set(runner.get_output_details()) == {"scores", "more"}
    for size in (1, 3):
        batch = {name: values(size, *shape[1:], seed=1) for name, shape in inputs.items()}
        assert running.function(content, model.signatures)(batch)["scores"].shape == (size, 4)


def test_int16_is_closer_to_float32(tmp_path):
    model, batches = quantized(residual, tmp_path), samples(IMAGES)
    expected = model.float_function()(batches[0])["y0"]
    noise = {}
    for kind in ("int8", "int16"):
        content, _ = tflite.export(model, [], kind)
        noise[kind] = np.square(running.function(content, model.signatures)(batches[0])["y0"] - expected).mean()
    assert noise["int16"] < 0.5 * noise["int8"], "what is left is the rounding of weights"


def test_four_bits(tmp_path):
    """Weights of 4 bits take half a byte; LiteRT computes with them."""
    plain = quantized(LAYERS["3x3"], tmp_path / "8")
    model = quantized(LAYERS["3x3"], tmp_path / "4", weight_bits=4, weight_correction=False)
    content, result = tflite.export(model, samples(IMAGES))
    check_right(result)
    file = Model(content)
    (op,) = [op for op in file.graph.operators if file.name_of(op) == "CONV_2D"]
    assert file.tensor(op.inputs[1]).type == INT4
    assert len(tflite.export(plain, [])[0]) - len(content) > 3 * 3 * 6 * 8 // 2 - 100


# -- kinds without data ------------------------------------------------------------------------------------------------------
def large(x):
    y = tf.nn.relu(conv(x, 3, 3, 6, 64))
    return dense(tf.reduce_mean(tf.nn.relu(conv(y, 3, 3, 64, 64, seed=3, size=0.1)), [1, 2]), 64, 20)


@pytest.mark.parametrize(("kind", "share", "least"), [("weights", 0.275, 100), ("dynamic", 0.2725, 25), ("float16", 0.516, 45)])
def test_kinds_that_need_no_data(kind, share, least, tmp_path):
    path = saved(large, IMAGES, tmp_path / "model")
    result = exporting.export_tflite(path, tmp_path / "model.tflite", quantization=kind)
    assert result.size < share * result.float_size
    assert result.size == (tmp_path / "model.tflite").stat().st_size
    assert result.check.sqnr > least, (
        "weights alone are exact but for float sums; ranges found at each call round the activations"
    )
    assert result.check.agreement == 100


def test_float16_constants_have_one_name(tmp_path):
    path = saved(large, IMAGES, tmp_path / "model")
    content = convert(path, ["serving_default"], float16=True)
    tidy = half.tidied(content)
    file = Model(tidy)
    made = [op for op in file.graph.operators if file.name_of(op) == "DEQUANTIZE"]
    assert len(made) == 6
    assert all(file.dtype(op.inputs[0]) == np.float16 for op in made)
    assert [file.label(op.inputs[0]) for op in made] == [file.label(op.outputs[0]) for op in made]
    assert len(tidy) < len(content) - 400
    keys = {"serving_default": ({"x": "x"}, {"y0": "y0"})}
    for batch in samples(IMAGES):
        before, after = (running.function(one, keys)(batch)["y0"] for one in (content, tidy))
        np.testing.assert_array_equal(before, after)


def test_dynamic_kernels_take_integers(tmp_path):
    model = quantized(large, tmp_path, mode="weight_only")
    content, _ = tflite.export(model, [], "dynamic")
    file = Model(content)
    layers = [op for op in file.graph.operators if file.name_of(op) in ("CONV_2D", "FULLY_CONNECTED")]
    assert [file.dtype(op.inputs[1]) for op in layers] == [np.int8] * 2 + [np.int8]
    assert [file.dtype(op.inputs[0]) for op in layers] == [np.float32] * 3


# -- what is wrong is found --------------------------------------------------------------------------------------------------
def wrong(model: tfquant.QuantizedModel, folder: Path, edit: Callable[[Model], None]):
    """The check of a file that was changed."""
    marked = mark(model, KERNELS)
    model.write(folder, marked.graph)
    made = quantize(convert(folder, ["serving_default"]), marked.weights, marked.specs, Options())
    file = Model(made.content)
    edit(file)
    content = file.pack()
    inner = running.inner(content, made.tensors, {"x": "x"}, {"y0": "y0"}, "serving_default")
    simulated = marked.widened(made.wide)
    return check("LiteRT", simulated, running.function(content, model.signatures), samples(IMAGES), inner, marked.names)


def _of(file: Model, op: str, slot: int, number: int = 0):
    found = [one for one in file.graph.operators if file.name_of(one) == op]
    return file.tensor(found[number].inputs[slot])


def _zero_point(file: Model) -> None:
    held = _of(file, "FULLY_CONNECTED", 0).quantization
    held.zeroPoint = held.zeroPoint + 9  # others have the same vector


def _scale(file: Model) -> None:
    held = _of(file, "CONV_2D", 1).quantization
    held.scale = held.scale * np.where(np.arange(len(held.scale)) == 2, 1.1, 1.0)


def _bias(file: Model) -> None:
    buffer = file.root.buffers[_of(file, "CONV_2D", 2).buffer]
    buffer.data = np.zeros_like(buffer.data)


def _axes(file: Model) -> None:
    buffer = file.root.buffers[_of(file, "CONV_2D", 1).buffer]
    buffer.data = buffer.data.reshape(8, 3, 3, 6).transpose(0, 2, 1, 3).reshape(-1).copy()


def _beta(file: Model) -> None:
    (op,) = [op for op in file.graph.operators if file.name_of(op) == "SOFTMAX"]
    op.builtinOptions.beta = 1.01  # a quarter of a step of 8 bits


@pytest.mark.parametrize("edit", [_zero_point, _scale, _bias, _axes, _beta])
def test_wrong_numbers_are_found(edit, tmp_path):
    model = quantized(means, tmp_path)
    exported = tflite.export(model, [])[1]
    right = dataclasses.replace(exported, check=wrong(model, tmp_path / "right", lambda file: None))
    judge(right)
    found = wrong(model, tmp_path / "wrong", edit)
    with pytest.raises(OutputError, match="otherwise than the simulation says"):
        judge(dataclasses.replace(exported, check=found))


@pytest.mark.parametrize(
    ("sqnr", "behind", "wrong"), [(2.0, 90.0, False), (2.0, None, True), (-7.0, 90.0, True), (30.0, 40.0, True)]
)
def test_outputs_are_judged_by_what_is_in_front_of_them(sqnr, behind, wrong):
    """Where deep networks make noise of roundings, the layers tell whether the file is right."""
    found = Exported("tflite", "int8", 0, 0, 1, (), Check("LiteRT", 8, sqnr, None, (), behind), exact=True)
    with pytest.raises(OutputError, match="outputs") if wrong else contextlib.nullcontext():
        judge(found)


def test_nothing_is_written_where_the_runtime_differs(tmp_path, monkeypatch):
    model = quantized(means, tmp_path)
    real = running.function

    def shifted(*arguments):
        run = real(*arguments)
        return lambda batch: {name: 10 - value for name, value in run(batch).items()}

    monkeypatch.setattr(running, "function", shifted)
    with pytest.raises(OutputError, match="are not those of the simulation"):
        tfquant.export_tflite(model, tmp_path / "y.tflite", debug_dump=tmp_path / "dump.json")
    assert not (tmp_path / "y.tflite").exists()
    dump = json.loads((tmp_path / "dump.json").read_text())
    assert dump["check"]["tensors"][0]["name"] == "x"


# -- what users do -----------------------------------------------------------------------------------------------------------
def test_from_a_plan_and_from_data(tmp_path):
    path, batches = saved(means, IMAGES, tmp_path / "model"), samples(IMAGES)
    tfquant.quantize(path, lambda: iter(batches), CONFIG).save(tmp_path / "int8")
    first = tfquant.export_tflite(path, tmp_path / "a.tflite", plan=tmp_path / "int8" / "quant_plan.json")
    second = tfquant.export_tflite(path, tmp_path / "b.tflite", lambda: iter(batches), CONFIG)
    assert (tmp_path / "a.tflite").read_bytes() == (tmp_path / "b.tflite").read_bytes()
    assert first.notes == ("Compared on made-up samples: give data for real ones.",)
    assert second.notes == ()
    assert second.check.samples == 8
    with pytest.raises(OutputError, match="exists already"):
        tfquant.export_tflite(path, tmp_path / "a.tflite", lambda: iter(batches), CONFIG)


def test_a_keras_model(tmp_path):
    layers = keras.layers
    model = keras.Sequential([keras.Input((9, 7, 6)), layers.Conv2D(8, 3, activation="relu"), layers.Flatten(), layers.Dense(3)])
    result = tfquant.export_tflite(model, tmp_path / "m.tflite", values(20, 9, 7, 6), inference_input_type="uint8")
    check_right(result)
    assert result.float_ops == ()


def test_refusals(tmp_path):
    model = quantized(means, tmp_path)
    for options, message in (
        ({"quantization": "weights"}, "needs a plan of mode weight_only. Received: one of mode static"),
        ({"quantization": "int4"}, "must be one of int8, int16, weights, dynamic, float16. Received: 'int4'"),
        ({"inference_input_type": "int16"}, "the input type is one of float32, int8, uint8. Received: 'int16'"),
        (
            {"quantization": "int16", "inference_output_type": "int8"},
            "the output type is one of float32, int16. Received: 'int8'",
        ),
    ):
        with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
            tfquant.export_tflite(model, tmp_path / "y.tflite", **options)
    float_input = quantized(lambda x: tf.exp(x) * conv(x, 1, 1, 6, 6), tmp_path / "exp", ignored_scope=("type:Conv2D",))
    with pytest.raises(ConfigError, match="is computed in float: ask for the output type float32"):
        tfquant.export_tflite(float_input, tmp_path / "y.tflite", inference_output_type="int8")
    offsets = quantized(LAYERS["3x3"], tmp_path / "4", weight_bits=4)
    with pytest.raises(ConfigError, match="weights around 0"):
        tfquant.export_tflite(offsets, tmp_path / "y.tflite")
    few = quantized(means, tmp_path / "few", activation_bits=4)
    with pytest.raises(ConfigError, match="activations of 8 or 16 bits"):
        tfquant.export_tflite(few, tmp_path / "y.tflite")
    assert not list(tmp_path.glob("*.tflite"))


def test_the_command_line(tmp_path):
    path = saved(means, IMAGES, tmp_path / "model")
    np.savez(tmp_path / "data.npz", x=values(20, 9, 7, 6))

    def run(*flags):
        command = [sys.executable, "-m", "tfquant.export", "--saved_model", str(path), *flags]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    done = run("--data", str(tmp_path / "data.npz"), "--format", "tflite", "--output", str(tmp_path / "m.tflite"))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("tflite, int8: ")
    assert lines[1] == "Ops with integers: 4; in float: none"
    assert "8 samples" in lines[2]
    assert lines[-1] == f"Written to {tmp_path / 'm.tflite'}"
    for flags, message in (
        (["--format", "tflite", "--opset", "13", "--output", "y"], "--opset is no option of the format tflite. Received: 13"),
        (["--format", "onnx"], "--output is missing: see --help."),
        (["--output", "y"], "--format is missing: see --help."),
        (["--format", "tflite", "--output", str(tmp_path / "m.tflite"), "--quantization", "float16"], "exists already"),
    ):
        refused = run(*flags)
        assert refused.returncode == 2
        assert refused.stderr.startswith("tfquant.export: ")
        assert message in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_a_channel_of_next_to_no_weights(tmp_path):
    """Its scale is as small as its bias allows."""

    def network(x):
        weights = values(3, 3, 6, 4, seed=1) * np.array([1, 1, 1e-12, 0], np.float32)
        return tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, weights, 1, "SAME"), np.array([0.5, -0.5, 3.0, 2.0], np.float32)))

    model = quantized(network, tmp_path, preset="default")
    (scales,) = model.plan.weight_scales.values()
    assert scales[2] > 1e-11
    _, result = tflite.export(model, samples(IMAGES))
    check_right(result)
    assert result.float_ops == ()


# -- models that were trained with fake quantization ---------------------------------------------------------------------------
def rounded(x, low, high):
    return tf.quantization.fake_quant_with_min_max_args(x, low, high)


def trained(x):
    y = rounded(x, -1.0, 1.0)
    for seed, (depth, channels) in enumerate([(6, 8), (8, 8)]):
        weights = values(3, 3, depth, channels, seed=seed) * 0.5
        ends = np.abs(weights).max((0, 1, 2))
        weights = tf.quantization.fake_quant_with_min_max_vars_per_channel(weights, -ends, ends, narrow_range=True)
        y = rounded(tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(y, weights, 1, "SAME"), values(channels, seed=9))), 0.0, 6.0)
    y = tf.reduce_mean(y, [1, 2])
    return rounded(dense(rounded(y, 0.0, 4.0), 8, 5), -8.0, 8.0)


def test_learned_ranges(tmp_path):
    """No data: the file computes what was trained, to the rounding of kernels."""
    path = saved(trained, IMAGES, tmp_path / "model")
    result = tfquant.export_tflite(path, tmp_path / "m.tflite")
    check_right(result)
    assert result.float_ops == ()
    content = (tmp_path / "m.tflite").read_bytes()
    assert ops(content) == {"QUANTIZE": 1, "CONV_2D": 2, "MEAN": 1, "FULLY_CONNECTED": 1, "DEQUANTIZE": 1}
    batch = samples(IMAGES)[0]
    expected = tf.saved_model.load(str(path)).signatures["serving_default"](x=tf.constant(batch["x"]))["y0"].numpy()
    found = running.function(content, {"serving_default": ({"x": "x"}, {"y0": "y0"})})(batch)["y0"]
    step = 16 / 255
    assert np.abs(found - expected).max() <= 1.01 * step


def test_ops_that_litert_does_not_have(tmp_path):
    """They are taken over, and the file says so; it is not run."""
    path = saved(lambda x: tf.nn.relu(conv(x, 3, 3, 6, 4)) + tf.tan(x[..., :4]), IMAGES, tmp_path / "model")
    result = tfquant.export_tflite(path, tmp_path / "m.tflite", samples(IMAGES)[0]["x"], CONFIG)
    assert result.check is None
    assert result.notes == ("It needs LiteRT's Flex delegate, for Tan.",)
    assert result.lines()[-1] == "Not verified: no runtime ran the file."
    assert ops((tmp_path / "m.tflite").read_bytes())["CONV_2D"] == 1


def test_images_of_bytes(tmp_path):
    """What the model takes as bytes the file takes as bytes; nothing becomes float on the way."""
    layers = keras.layers
    stem = [
        keras.Input((9, 7, 3), dtype="uint8"),
        layers.Rescaling(1 / 127.5, offset=-1.0),
        layers.Conv2D(8, 3, activation="relu"),
    ]
    model = keras.Sequential([*stem, layers.GlobalAveragePooling2D(), layers.Dense(4)])
    pixels = np.random.default_rng(0).integers(0, 256, (20, 9, 7, 3)).astype(np.uint8)
    result = tfquant.export_tflite(model, tmp_path / "m.tflite", pixels, CONFIG)
    check_right(result)
    assert result.float_ops == ()
    content = (tmp_path / "m.tflite").read_bytes()
    assert "CAST" not in ops(content)
    (outside,) = running.interpreter(content).get_input_details()
    assert outside["dtype"] == np.uint8


def test_attention(tmp_path):
    """The converter moves the rounding of keys, queries and values behind their reshapes and transpositions."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((6, 16))
    model = keras.Model(inputs, keras.layers.MultiHeadAttention(4, 4)(x, x))
    data = values(32, 6, 16)
    result = tfquant.export_tflite(model, tmp_path / "net.tflite", data, tfquant.QuantConfig(placement="int8"))
    check_right(result)
    names = {tensor.name.rpartition("/")[2] for tensor in result.check.tensors if tensor.sqnr > 60}
    assert {"Einsum", "Einsum_1", "Softmax"} <= names, result.check.layers()
