"""Images of bytes: what the network does to them first goes into the first convolution, which reads them as they are."""

import collections
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from building import Arrays, both, build, disagreements, joined, plan_for, run

import tfquant
from tfquant.data import PREPROCESS
from tfquant.errors import ConfigError, DataError, PlanError
from tfquant.observe.ranges import observed
from tfquant.plan.spec import asymmetric
from tfquant.targets import onednn

RNG = np.random.default_rng(0)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)

PREPROCESSING = {
    "nothing": lambda x: x,
    "unit": lambda x: x * np.float32(1 / 255),
    "tf": lambda x: x * np.float32(1 / 127.5) - 1.0,
    "torch": lambda x: (x / 255.0 - MEAN) / STD,
    "torch_scalar": lambda x: (x - 118.0) / 57.0,
    "efficientnet": lambda x: ((x * np.float32(1 / 255) + 0.0) - MEAN) / np.maximum(STD, 1e-7) * np.float32(1.01),
}


def conv(x, channels=3, outputs=8, strides=1, padding="SAME", size=3, relu=True):
    weights = RNG.normal(size=(size, size, channels, outputs)).astype(np.float32) / size
    bias = RNG.normal(size=outputs).astype(np.float32) / 10
    y = tf.nn.bias_add(tf.nn.conv2d(x, weights, strides, padding), bias)
    return tf.nn.relu(y) if relu else y


def images(*shapes):
    return [{"x": RNG.integers(0, 256, shape).astype(np.uint8)} for shape in shapes]


def sqnr(one: Arrays, other: Arrays) -> float:
    """In dB, of the worst output."""
    exact = {key: value.astype(np.float64) for key, value in one.items()}
    return min(10 * np.log10(np.square(x).sum() / max(np.square(x - other[key]).sum(), 1e-30)) for key, x in exact.items())


def conversions(result) -> int:
    return result.kernels().count("QuantizeV2")


PADDINGS = {"same": "SAME", "valid": "VALID", "explicit": [[0, 0], [3, 1], [0, 2], [0, 0]]}


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("padding", list(PADDINGS))
@pytest.mark.parametrize("kind", list(PREPROCESSING))
def test_bytes_are_the_first_tensor(kind, padding, strides):
    def net(x):
        y = conv(PREPROCESSING[kind](tf.cast(x, tf.float32)), strides=strides, padding=PADDINGS[padding])
        return conv(y, 8, 5, relu=False)

    graph = build(net, {"x": tf.TensorSpec([None, 13, 10, 3], tf.uint8)})
    batches = images((2, 13, 10, 3), (1, 13, 10, 3))
    before = joined(run(graph.copy(), batches))
    copy = graph.copy()
    planned = plan_for(copy, batches)
    assert disagreements(planned, batches) == []
    result = both(graph, batches)
    np.testing.assert_allclose(result.floats["output_0"], before["output_0"], rtol=1e-4, atol=1e-4)
    assert conversions(result) == 0, result.kernels()
    assert sqnr(before, result.int8) > 33


CASES = {
    "one channel": ([None, 9, 8, 1], lambda x: conv(x * np.float32(1 / 127.5) - 1.0, 1)),
    "unknown sizes": ([None, None, None, 3], lambda x: conv(PREPROCESSING["torch"](x))),
    "unknown sizes, valid": ([None, None, None, 3], lambda x: conv(PREPROCESSING["torch"](x), strides=2, padding="VALID")),
    "fixed batch": ([2, 9, 8, 3], lambda x: conv(PREPROCESSING["tf"](x), strides=2)),
    "depthwise": (
        [None, 9, 8, 3],
        lambda x: conv(
            tf.nn.depthwise_conv2d(PREPROCESSING["torch"](x), np.ones([3, 3, 3, 2], np.float32), [1, 1, 1, 1], "SAME"), 6
        ),
    ),
    "two convolutions, one padded": (
        [None, 9, 8, 3],
        lambda x: [conv(PREPROCESSING["torch"](x)), conv(PREPROCESSING["torch"](x), padding="VALID", size=1)],
    ),
    "Pad read twice": (
        [None, 9, 8, 3],
        lambda x: (lambda p: [conv(p, padding="VALID"), conv(p, padding="VALID", size=2)])(
            tf.pad(PREPROCESSING["torch"](x), [[0, 0], [0, 1], [1, 2], [0, 0]])
        ),
    ),
    "MobileNetV2": (
        [None, 16, 16, 3],
        lambda x: tf.nn.relu6(
            conv(tf.pad(PREPROCESSING["tf"](x), [[0, 0], [0, 1], [0, 1], [0, 0]]), strides=2, padding="VALID", relu=False)
        ),
    ),
    "a float op reads the bytes too": (
        [None, 9, 8, 3],
        lambda x: [conv(PREPROCESSING["unit"](x)), tf.math.sin(PREPROCESSING["unit"](x))],
    ),
    "a residual": ([None, 9, 8, 3], lambda x: conv(tf.nn.relu(conv(x, outputs=3, relu=False) + x))),
    "pooled": ([None, 9, 8, 3], lambda x: [conv(x), conv(tf.nn.max_pool2d(x, 2, 2, "VALID"))]),
    "joined": ([None, 9, 8, 3], lambda x: conv(tf.concat([x, conv(x)], 3), 11)),
}


@pytest.mark.parametrize("case", list(CASES))
def test_shapes_and_readers(case):
    shape, net = CASES[case]

    def function(x):
        return net(tf.cast(x, tf.float32))

    graph = build(function, {"x": tf.TensorSpec(shape, tf.uint8)})
    sizes = [size or 9 for size in shape[1:]]
    batches = images((2, *sizes), (2, *sizes))
    expected = joined(run(graph.copy(), batches))
    planned = plan_for(graph.copy(), batches)
    assert disagreements(planned, batches) == []
    result = both(graph, batches)
    assert conversions(result) == 0, result.kernels()
    assert sqnr(expected, result.int8) > 30
    assert {spec.source for name, spec in result.plan.tensors.items() if (spec.low, spec.high) == (0, 255)} == {"known"}


@pytest.mark.parametrize("isa", ["vnni", "no_vnni"])
@pytest.mark.parametrize("activation_mode", ["asymmetric", "symmetric"])
def test_options(isa, activation_mode):
    graph = build(lambda x: conv(PREPROCESSING["torch"](tf.cast(x, tf.float32))), {"x": tf.TensorSpec([None, 9, 8, 3], tf.uint8)})
    batches = images((4, 9, 8, 3))
    assert disagreements(plan_for(graph, batches, isa=isa, activation_mode=activation_mode), batches) == []


def stays(net, shape=(None, 9, 8, 3), **options):
    graph = build(lambda x: net(tf.cast(x, tf.float32)), {"x": tf.TensorSpec(shape, tf.uint8)})
    batches = images((3, 9, 8, 3))
    expected = joined(run(graph.copy(), batches))
    planned = plan_for(graph, batches, **options)
    assert disagreements(planned, batches) == []
    return sum(spec.source == "known" for spec in planned.plan.tensors.values()), sqnr(expected, planned.values)


@pytest.mark.parametrize(
    "net",
    [
        lambda x: conv(x * np.float32(1 / 255) + 0.5),  # no pixel is 0
        lambda x: conv((x - 128.0) * np.array([1, 1, 100], np.float32)),  # weights would spread too far
        lambda x: conv(PREPROCESSING["torch"](tf.image.resize(x, [7, 7]))),  # no integers
    ],
)
def test_what_cannot_be_folded_is_quantized(net):
    assert stays(net)[0] == 0


def test_size_that_padding_depends_on():
    assert stays(lambda x: conv(PREPROCESSING["torch"](x), strides=2), (None, None, None, 3))[0] == 0


def test_layer_that_stays_float():
    quantized, quality = stays(lambda x: conv(PREPROCESSING["torch"](x)), ignored=["type:Conv2D"])
    assert quantized == 0
    assert quality > 100


def test_a_plan_that_gives_pixels_another_range():
    graph = build(lambda x: conv(tf.cast(x, tf.float32)), {"x": tf.TensorSpec([None, 9, 8, 3], tf.uint8)})
    planned = plan_for(graph, images((3, 9, 8, 3)))
    tensors = {"Cast": asymmetric(0.0, 100.0, "user", "Cast")}
    plan = dataclasses.replace(planned.plan, tensors={**planned.plan.tensors, **tensors})
    with pytest.raises(PlanError, match=r"Cast holds pixels: its range must be 0\.\.255\. Received: 0\.\.100"):
        onednn.lower(planned.graph, planned.annotation.units, plan)


def test_ranges_of_pixels_need_no_statistics():
    graph = build(lambda x: conv(tf.cast(x, tf.float32)), {"x": tf.TensorSpec([None, 9, 8, 3], tf.uint8)})
    planned = plan_for(graph, images((3, 9, 8, 3)), "percentile")
    assert [tensor.name for tensor in observed(planned.annotation)] == []
    assert planned.plan.tensors["Cast"] == asymmetric(0.0, 255.0, "known", "Cast")


LAYERS = keras.layers


def stem(kind):
    """A Keras model of images as bytes that begins as one of keras.applications does."""
    keras.utils.set_random_seed(1)
    image = keras.Input((24, 20, 3), dtype="uint8", name="image")
    if kind == "MobileNetV2":
        x = LAYERS.Rescaling(1 / 127.5, -1)(image)
        x = LAYERS.Conv2D(16, 3, 2, padding="same", use_bias=False)(x)
    else:
        x = LAYERS.Rescaling(1 / 255)(image)
        x = LAYERS.Normalization(mean=MEAN, variance=STD**2)(x)
        x = LAYERS.ZeroPadding2D(((0, 1), (0, 1)))(x)
        x = LAYERS.Conv2D(16, 3, 2, padding="valid", use_bias=False)(x)
    x = LAYERS.ReLU(6.0)(LAYERS.BatchNormalization()(x))
    x = LAYERS.Conv2D(8, 3, padding="same", activation="relu")(x)
    return keras.Model(image, LAYERS.Dense(5)(LAYERS.GlobalAveragePooling2D()(x)))


@pytest.mark.parametrize("kind", ["MobileNetV2", "EfficientNet"])
def test_models_that_begin_with_layers_for_preprocessing(kind, tmp_path):
    model, data = stem(kind), RNG.integers(0, 256, (40, 24, 20, 3)).astype(np.uint8)
    result = tfquant.quantize(model, data, tfquant.QuantConfig(placement="int8", verify_batch_sizes=()))
    result.save(tmp_path / "int8")
    ops = collections.Counter(node.op for node in result.graph_def.node)
    assert ops["Cast"] == 0
    assert ops["QuantizeV2"] == 1, "of the mean, for the Dense"
    served = tf.saved_model.load(str(tmp_path / "int8")).signatures["serving_default"]
    assert served.structured_input_signature[1]["image"].dtype == tf.uint8
    for count in (0, 1, 3):
        given = next(iter(served(tf.constant(data[:count])).values())).numpy()
        assert given.shape == (count, 5)
        if count:
            assert sqnr({"": model(data[:count]).numpy()}, {"": given}) > 25
    plan = json.loads((tmp_path / "int8" / "quant_plan.json").read_text())
    assert [spec["source"] for spec in plan["tensors"].values()].count("known") == 1
    again = tfquant.quantize(model, plan=tmp_path / "int8" / "quant_plan.json")
    assert again.graph_def.SerializeToString(deterministic=True) == result.graph_def.SerializeToString(deterministic=True)


# -- models of floats, made to take pixels ------------------------------------------------------------------------------------
def float_stem(channels=3, padding="same"):
    keras.utils.set_random_seed(2)
    image = keras.Input((24, 20, channels), name="image")
    x = LAYERS.Conv2D(16, 3, 2, padding=padding, use_bias=False)(image)
    x = LAYERS.ReLU(6.0)(LAYERS.BatchNormalization()(x))
    x = LAYERS.Conv2D(8, 3, padding="same", activation="relu")(x)
    return keras.Model(image, LAYERS.Dense(5)(LAYERS.GlobalAveragePooling2D()(x)), name="net")


def pixels(count=40, channels=3):
    return RNG.integers(0, 256, (count, 24, 20, channels)).astype(np.uint8)


CONFIG = tfquant.QuantConfig(placement="int8", input_dtype="uint8", verify_batch_sizes=())


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("preprocess", list(PREPROCESS))
def test_preprocessing_becomes_part_of_the_model(preprocess, padding):
    model, data = float_stem(padding=padding), pixels()
    result = tfquant.quantize(model, data, dataclasses.replace(CONFIG, preprocess=preprocess))
    ops = collections.Counter(node.op for node in result.graph_def.node)
    assert (ops["QuantizeV2"], ops["Cast"], ops["ReverseV2"]) == (1, 0, 0)
    expected = model(PREPROCESS[preprocess](data.astype(np.float32))).numpy()
    given = result(data)
    assert given.shape == expected.shape
    assert sqnr({"": expected}, {"": np.asarray(given)}) > 25
    assert result.report.fidelity.sqnr > 25, "which compares with the float model of pixels"
    assert (result.plan.settings["input_dtype"], result.plan.settings["preprocess"]) == ("uint8", preprocess)


@pytest.mark.parametrize("kind", ["saved_model", "keras"])
def test_files(kind, tmp_path):
    model, data, config = float_stem(), pixels(), dataclasses.replace(CONFIG, preprocess="torch")
    path = tmp_path / ("net.keras" if kind == "keras" else "net")
    model.save(path) if kind == "keras" else model.export(path, verbose=False)
    tfquant.quantize(path, data, config).save(tmp_path / "int8")
    loaded = tf.saved_model.load(str(tmp_path / "int8"))
    assert loaded.signatures["serving_default"].structured_input_signature[1]["image"].dtype == tf.uint8
    expected = model(PREPROCESS["torch"](data.astype(np.float32))).numpy()
    assert sqnr({"": expected}, {"": loaded.serve(tf.constant(data)).numpy()}) > 25
    again = tfquant.quantize(path, plan=tmp_path / "int8" / "quant_plan.json")  # which says that it is of pixels
    np.testing.assert_array_equal(again(data[:3]), loaded.serve(tf.constant(data[:3])))


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_modes_without_data(mode):
    model, data = float_stem(), pixels(4)
    config = dataclasses.replace(CONFIG, mode=mode, preprocess="caffe")
    result = tfquant.quantize(model, config=config)
    expected = model(PREPROCESS["caffe"](data.astype(np.float32))).numpy()
    assert sqnr({"": expected}, {"": np.asarray(result(data))}) > 25


def test_depthwise_convolution_of_bgr():
    image = keras.Input((24, 20, 3), name="image")
    x = LAYERS.DepthwiseConv2D(3, padding="same", depth_multiplier=4)(image)
    model, data = keras.Model(image, LAYERS.Conv2D(5, 1)(LAYERS.ReLU()(x))), pixels()
    result = tfquant.quantize(model, data, dataclasses.replace(CONFIG, preprocess="caffe"))
    expected = model(PREPROCESS["caffe"](data.astype(np.float32))).numpy()
    assert sqnr({"": expected}, {"": np.asarray(result(data))}) > 25


def two_inputs():
    one, other = keras.Input((8, 8, 3), name="one"), keras.Input((8, 8, 3), name="other")
    return keras.Model([one, other], LAYERS.Conv2D(4, 3)(LAYERS.Add()([one, other])))


def of(shape, dtype="float32"):
    x = keras.Input(shape, dtype=dtype, name="x")
    return keras.Model(x, LAYERS.Flatten()(LAYERS.Rescaling(0.5)(x)))


@pytest.mark.parametrize(
    ("model", "preprocess", "words"),
    [
        (two_inputs, "tf", ("for models of one input", "Received: 2 inputs: 'one' float32")),
        (lambda: of((8, 8, 3), "uint8"), "tf", ("takes uint8 already", "input 'x' uint8")),
        (lambda: of((8, 8, 3), "int32"), "tf", ("floating-point images", "input 'x' int32")),
        (lambda: of((8,)), "tf", ("(N, H, W, C) or (H, W, C)", "input 'x' float32 (None, 8)")),
        (lambda: of((8, 8, 4)), "tf", ("1 or 3 channels", "(None, 8, 8, 4)")),
        (lambda: of((8, 8, 1)), "torch", ("'torch' needs RGB", "(None, 8, 8, 1)")),
    ],
)
def test_models_that_take_no_image(model, preprocess, words):
    with pytest.raises(ConfigError) as caught:
        tfquant.quantize(model(), np.zeros((4, 8, 8, 3), np.uint8), dataclasses.replace(CONFIG, preprocess=preprocess))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_does_not_go_together(tmp_path):
    model, data = float_stem(), pixels()
    with pytest.raises(DataError, match=r"cannot be cast safely; convert it to uint8\. Received: float32"):
        tfquant.quantize(model, data.astype(np.float32), CONFIG)
    tfquant.quantize(model, data.astype(np.float32), tfquant.QuantConfig(verify=False)).save(tmp_path / "int8")
    with pytest.raises(ConfigError, match=r"leave input_dtype out, or make a new plan\. Received: uint8"):
        tfquant.quantize(model, config=CONFIG, plan=tmp_path / "int8" / "quant_plan.json")
    with pytest.raises(ConfigError, match=r"input_dtype must be one of model, uint8\. Received: 'int8'"):
        tfquant.QuantConfig(input_dtype="int8")


def test_command_line(tmp_path):
    float_stem().export(tmp_path / "net", verbose=False)
    (tmp_path / "pictures").mkdir()
    for index in range(12):
        picture = tf.io.encode_png(RNG.integers(0, 256, (40, 50, 3)).astype(np.uint8))
        (tmp_path / "pictures" / f"{index}.png").write_bytes(picture.numpy())
    words = ["--saved_model=net", "--data=pictures", "--input_dtype=uint8", "--placement=int8", "--verify_batch_sizes="]

    def run_command(*more):
        command = [sys.executable, "-m", "tfquant.calibrate", *words, *more]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=ENVIRONMENT)

    done = run_command("--preprocess=caffe", "--output=int8")
    assert done.returncode == 0, done.stderr
    assert "SQNR" in done.stdout
    signature = tf.saved_model.load(str(tmp_path / "int8")).signatures["serving_default"]
    assert signature.structured_input_signature[1]["image"].dtype == tf.uint8
    refused = run_command("--preprocess=best", "--output=other")
    assert refused.returncode == 2
    assert "best" in refused.stderr
    of((8, 8, 3), "uint8").export(tmp_path / "bytes", verbose=False)
    refused = run_command("--saved_model=bytes", "--output=other")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert "takes uint8 already" in refused.stderr
    assert not (tmp_path / "other").exists()
