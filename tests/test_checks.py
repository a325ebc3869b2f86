"""Tests of tfquant.observe.checks: which data raise, which warn, which BatchNorms are found, and what they say of a scale."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from building import build

from tfquant.errors import DataError
from tfquant.graph.ir import Tensor
from tfquant.observe.checks import BatchNorm, DataChecks, batch_norm_inputs, judge_scale

RNG = np.random.default_rng(0)


def check(*batches, batched=True):
    checks = DataChecks(batched)
    for batch in batches:
        checks.update(batch if isinstance(batch, dict) else {"x": batch})
    return checks.finish()


def noise(*shape):
    return RNG.normal(size=shape).astype(np.float32)


# Samples


def test_good_data_pass():
    assert check(noise(10, 4, 4, 3), noise(3, 4, 4, 3)) == ()
    assert check(*noise(5, 4, 3), batched=False) == ()
    assert check() == ()
    batch = {"x": noise(4, 3), "mask": np.ones((4, 3), bool), "ids": np.zeros((4, 2), np.int32), "t": np.array(1.0, np.float32)}
    assert check(batch) == ()  # masks, ids and scalars may be constant
    assert check({"s": np.array(["a", "b", "c"], object)}) == ()


def test_identical_samples():
    sample = noise(1, 4, 4, 3)
    with pytest.raises(DataError, match=r"All 12 calibration samples are identical.*Received: one sample 12 times"):
        check(*[np.repeat(sample, 4, 0)] * 3)
    with pytest.raises(DataError, match="All 2 calibration samples are identical"):
        check(sample[0], sample[0], batched=False)
    with pytest.raises(DataError, match="All 3 calibration samples are identical"):
        check({"s": np.array(["same"] * 3, object)})
    ids = {"x": np.repeat(sample, 2, 0), "ids": np.array([[1], [2]])}
    assert check(ids) == ()  # one input may be the same


def test_repeats_are_counted():
    five = noise(5, 3)
    assert check(five, five) == ()  # half
    (line,) = check(five, five, five[:1])
    assert line.startswith("6 of 11 calibration samples repeat others (5 are distinct)")
    (line,) = check(*five, *five, *five, batched=False)
    assert line.startswith("10 of 15 ")
    assert check(np.arange(60).reshape(-1, 1) % 3) == ()  # a category of three: it repeats by nature
    (line,) = check(np.arange(60 * 20).reshape(60, 20) % 60)  # sentences, three different ones
    assert line.startswith("57 of 60 ")


def test_samples_of_equal_bytes_and_another_shape_or_input_differ():
    six = np.arange(6, dtype=np.float32)
    assert check(six.reshape(2, 3), six.reshape(3, 2), batched=False) == ()
    strings = [{"a": np.array(a, object), "b": np.array(b, object)} for a, b in (("x", "yz"), ("xy", "z"))]
    assert check(*strings, batched=False) == ()


def test_a_single_sample():
    (line,) = check(noise(1, 3))
    assert "single sample" in line
    (line,) = check(np.array(2.0, np.float32), batched=False)
    assert "single sample" in line
    (line,) = check(np.ones((1, 1), np.float32))  # one number says nothing of being constant
    assert "single sample" in line


def test_one_number_everywhere():
    with pytest.raises(DataError, match=r"one and the same number everywhere.*'x': 0\."):
        check(np.zeros((4, 3), np.float32), np.zeros((4, 3), np.float32))
    with pytest.raises(DataError, match=r"'x': 0, 'y': 7"):
        check({"x": np.zeros((4, 3), np.float32), "y": np.full((4, 2), 7)})
    with pytest.raises(DataError, match="everywhere"):
        check(np.full((3, 3), 0.5, np.float32), batched=False)
    batch = {"x": noise(4, 3), "y": np.full((4, 2), 0.25, np.float32), "t": np.array(3, np.float32)}
    assert check(batch, batch | {"x": noise(4, 3)}) == (
        "Input 'y' is 0.25 everywhere in the calibration data: check that it is filled in.",
    )
    assert check(np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)) == ()


def test_labels():
    one_hot = np.eye(10, dtype=np.float32)
    (line,) = check(one_hot, one_hot[::-1])
    assert line == "Input 'x' looks like labels (one 1 among 10 values in all 20 samples): calibrate with what the model reads."
    for labels in (np.arange(100.0) % 10, np.arange(100.0).reshape(-1, 1) % 10):
        (line,) = check(labels[:50], labels[50:])  # and no word of repeats
        assert "looks like labels (one of 10 whole numbers in all 100 samples)" in line


@pytest.mark.parametrize(
    "x",
    [
        np.arange(100.0) % 10 + 0.5,
        np.arange(100.0) % 10 - 1,
        np.arange(100.0) * 20 % 2000,  # no classes up to a thousand
        np.arange(100.0) % 60,  # nearly as many values as samples
        np.arange(100) % 10,  # integers are what the model reads
        np.concatenate([np.eye(10), np.full((1, 10), 0.1)]),
        np.concatenate([np.eye(10), np.zeros((1, 10))]),
        np.stack([np.eye(10), np.eye(10)[::-1], np.roll(np.eye(10), 1)]),  # (3, 10, 10): one-hot sequences are inputs
    ],
)
def test_no_labels(x):
    assert not any("labels" in line for line in check(x))


def test_labels_beside_real_data_are_a_condition():
    assert check({"x": noise(10, 3), "y": np.eye(10, dtype=np.float32)}) == ()


# BatchNorms

MEAN, VARIANCE = np.array([1.0, 2, 3], np.float32), np.array([4.0, 9, 16], np.float32)
GAMMA, BETA = np.array([2.0, 3, 4], np.float32), np.array([5.0, 6, 7], np.float32)


def normalize(x, gamma=GAMMA, beta=BETA, mean=MEAN, variance=VARIANCE, name="net/bn"):
    """As Keras 3 exports it."""
    mean, variance = tf.convert_to_tensor(mean), tf.convert_to_tensor(variance)  # NumPy would add and negate at once
    with tf.name_scope(name):
        return tf.nn.batch_normalization(x, mean, variance, beta, gamma, 1e-3)


def behind(value):
    """A constant behind what freezing and casting leave."""
    value = tf.expand_dims(tf.cast(tf.identity(tf.constant(value, tf.float64)), tf.float32), 0)
    return tf.reshape(value, [1, 1, 1, 3])


@pytest.mark.parametrize("gamma", [GAMMA, None])
@pytest.mark.parametrize("beta", [BETA, None])
def test_batch_norm_as_exported(gamma, beta):
    graph = build(lambda x: tf.nn.relu(normalize(tf.nn.relu(x, name="before"), gamma, beta)), {"x": (None, 5, 5, 3)})
    nodes = dict(graph.nodes)
    (found,) = batch_norm_inputs(graph)
    assert (found.name, found.x.name, found.axis) == ("net/bn", "before", -1)
    np.testing.assert_array_equal(found.mean, MEAN)
    np.testing.assert_array_equal(found.variance, VARIANCE)
    assert found.mean.dtype == found.variance.dtype == np.float64
    assert graph.nodes == nodes


def test_batch_norm_behind_casts_and_reshapes():
    def model(x):
        return normalize(x, *(behind(value) for value in (GAMMA, BETA, MEAN, VARIANCE)))

    (found,) = batch_norm_inputs(build(model, {"x": (None, 5, 5, 3)}))
    assert (found.name, found.x.name, found.axis) == ("net/bn", "x", -1)
    np.testing.assert_array_equal(found.mean, MEAN)
    np.testing.assert_array_equal(found.variance, VARIANCE)


def test_channels_on_axis_1():
    def model(x):
        return normalize(x, *(tf.reshape(value, [1, 3, 1, 1]) for value in (GAMMA, BETA, MEAN, VARIANCE)))

    (found,) = batch_norm_inputs(build(model, {"x": (None, 3, 5, 5)}))
    assert found.axis == 1
    np.testing.assert_array_equal(found.mean, MEAN)


@pytest.mark.parametrize(("layout", "axis", "shape"), [("NHWC", -1, (None, 5, 5, 3)), ("NCHW", 1, (None, 3, 5, 5))])
@pytest.mark.parametrize("op", ["FusedBatchNorm", "FusedBatchNormV3"])
def test_fused_batch_norm(op, layout, axis, shape):
    def model(x, training=False):
        function = getattr(tf.raw_ops, op)
        return function(
            x=x, scale=GAMMA, offset=BETA, mean=MEAN, variance=VARIANCE, data_format=layout, is_training=training, name="n/bn/F"
        )[0]

    (found,) = batch_norm_inputs(build(model, {"x": shape}))
    assert (found.name, found.x.name, found.axis) == ("n/bn", "x", axis)
    np.testing.assert_array_equal(found.variance, VARIANCE)


def test_no_batch_norm():
    assert batch_norm_inputs(build(lambda x: x * GAMMA + BETA, {"x": (None, 3)})) == []
    statistics = {"x": (None, 3), "mean": (3,), "variance": (3,)}
    assert batch_norm_inputs(build(lambda x, m, v: normalize(x, mean=m, variance=v), statistics)) == []
    constant = build(lambda x: x + normalize(tf.nn.relu(tf.ones((1, 3)))), {"x": (None, 3)})
    assert batch_norm_inputs(constant) == []  # no input reaches it


def test_only_the_first_and_only_trained():
    def model(x, y):
        first = normalize(tf.nn.relu(x), name="first")
        return normalize(first, name="second"), normalize(first + normalize(y, name="other"), name="third")

    shapes = {"x": (None, 3), "y": (None, 3)}
    assert [found.name for found in batch_norm_inputs(build(model, shapes))] == ["first", "other"]

    def untrained(x, y):
        first = normalize(x, mean=np.zeros(3, np.float32), variance=np.ones(3, np.float32), name="first")
        return normalize(first), normalize(y, name="other")

    assert [found.name for found in batch_norm_inputs(build(untrained, shapes))] == ["other"]


def test_a_keras_export(tmp_path):
    import keras

    from tfquant.graph.loading import load_saved_model

    inputs = keras.Input((6, 6, 2))
    x = keras.layers.Conv2D(3, 3, name="conv")(inputs)
    x = keras.layers.BatchNormalization(name="bn")(x)
    model = keras.Model(inputs, keras.layers.BatchNormalization(name="bn_2")(x), name="net")
    model.get_layer("bn").set_weights([GAMMA, BETA, MEAN, VARIANCE])
    model.export(tmp_path / "m", verbose=False)
    (found,) = batch_norm_inputs(load_saved_model(tmp_path / "m").graph)
    assert (found.name, found.x.name, found.axis) == ("net/bn", "net/conv/BiasAdd", -1)
    np.testing.assert_array_equal(found.variance, VARIANCE)


# Scale

CHANNELS = 8
WIDE = BatchNorm("net/bn", Tensor(None), RNG.normal(size=CHANNELS), RNG.uniform(0.2, 3, CHANNELS), -1)


def values(scale=1.0, offset=0.0, shape=(10, 6, 6), found=WIDE):
    """Values whose standard deviation is `scale` times, and whose mean `offset` times, the trained standard deviation off."""
    deviation = np.sqrt(found.variance)
    x = np.random.default_rng(1).normal(size=(*shape, len(found.mean))) * scale + offset
    return (x * deviation + found.mean).astype(np.float32)


@pytest.mark.parametrize(
    ("scale", "offset", "level"),
    [
        (1, 0, None),
        (0.3, 0.7, None),  # a single image
        (2.5, 0, None),
        (4.5, 0, "warning"),
        (9, 0, "warning"),
        (12, 0, "error"),
        (127.5, 60, "error"),
        (0.12, 0, "warning"),
        (0.07, 0, "warning"),
        (0.04, 0, "error"),
        (1 / 255, 0.3, "error"),
        (0, 0, "error"),
        (1, 1.8, "warning"),
        (1, -12, "error"),
    ],
)
def test_scale(scale, offset, level):
    judged = judge_scale(WIDE, values(scale, offset))
    assert (judged and judged[0]) == level
    if judged:
        line = judged[1]
        assert "\n" not in line
        assert "net/bn" in line
        assert "--preprocess" in line


def test_the_line_tells_the_figures():
    rows = np.array([[-4.0], [4.0]] * 20) + 30
    level, line = judge_scale(BatchNorm("a/bn", Tensor(None), np.array([10.0]), np.array([0.25]), -1), rows)
    assert level == "error"
    assert "At a/bn," in line
    assert " 8 times the standard deviation" in line
    assert "off by 40 standard deviations" in line


def test_channels_on_axis_1_are_judged():
    first = dataclasses.replace(WIDE, axis=1)
    x = values(1)
    assert judge_scale(first, np.moveaxis(x, -1, 1)) is None
    assert judge_scale(first, np.moveaxis(x * 255, -1, 1))[0] == "error"


def test_few_values_are_judged_only_when_far_off():
    assert judge_scale(WIDE, values(0, 1, shape=(1,))) is None  # one value does not vary
    assert judge_scale(WIDE, values(0, 2.5, shape=(5,))) is None
    assert judge_scale(WIDE, values(0, 60, shape=(1,)))[0] == "error"
    assert judge_scale(WIDE, values(100, 0, shape=(5,)))[0] == "error"
    assert judge_scale(WIDE, values(1)[:0]) is None


def test_dead_channels_do_not_count():
    variance = np.where(np.arange(CHANNELS) < 6, 1e-20, 2.0)
    found = dataclasses.replace(WIDE, variance=variance)
    x = values(1, found=found)
    x[..., :6] += 3  # off by 3e10 standard deviations where that says nothing
    assert judge_scale(found, x) is None
    assert judge_scale(found, x * 100)[0] == "error"
    assert judge_scale(dataclasses.replace(WIDE, variance=np.zeros(CHANNELS)), x) is None


def test_values_that_are_not_finite_are_for_others():
    x = values(1)
    x[0, 0, 0, 0] = np.nan
    assert judge_scale(WIDE, x) is None
    assert judge_scale(WIDE, np.full((4, CHANNELS), np.inf, np.float32)) is None


@pytest.mark.parametrize("steps", [1, 5, 20, 100, 300])
@pytest.mark.parametrize("deviation", [0.03, 40.0])
def test_short_training_is_not_held_against_the_data(steps, deviation):
    """After few steps the moving statistics are still near 0 and 1, whatever the data are."""
    true = BatchNorm("bn", Tensor(None), WIDE.mean * deviation, WIDE.variance * deviation**2, -1)
    kept = 0.99**steps
    moving = dataclasses.replace(true, mean=(1 - kept) * true.mean, variance=kept + (1 - kept) * true.variance)
    x = values(1, found=true)
    assert judge_scale(moving, x) is None
    if deviation == 40:
        assert judge_scale(moving, x / 255)[0] in ("error", "warning")
    assert judge_scale(moving, x * 255)[0] == "error" or steps < 100
