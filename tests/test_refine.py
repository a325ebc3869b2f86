"""Each algorithm on a model made to need it, and on one that it must leave alone."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
from keras import layers

import tfquant
from tfquant.algorithms import ALGORITHMS, PRESETS
from tfquant.errors import ConfigError, PlanError
from tfquant.plan.spec import Scaling, Shift
from tfquant.refine.bias import shrunk
from tfquant.refine.rounding import _solve

RNG = np.random.default_rng(0)
SPREAD = 2.0 ** np.linspace(0, -5, 8)  # of channels whose values differ by a factor of 32


def images(samples=48, size=8, channels=4, seed=1):
    return np.random.default_rng(seed).normal(size=(samples, size, size, channels)).astype(np.float32)


def sqnr(expected, found):
    return 10 * np.log10((expected.astype(np.float64) ** 2).sum() / ((expected - found).astype(np.float64) ** 2).sum())


def quantized(model, data, algorithms, **options):
    config = tfquant.QuantConfig(
        preset="fast", algorithms=algorithms, verify=False, placement="int8", batch_size=16, **{"estimator": "minmax", **options}
    )
    return tfquant.quantize(model, data, config)


def fidelity(model, data, algorithms, fresh, **options):
    """(SQNR in dB of INT8, of the simulation, the result)."""
    result = quantized(model, data, algorithms, **options)
    (name,) = result.input_names
    expected = model(fresh).numpy()
    simulated = next(iter(result.simulation()({name: fresh}).values()))
    return sqnr(expected, np.asarray(result(fresh))), sqnr(expected, simulated), result


def scaled_to(layer, factors):
    """Multiplies the output channels of a layer."""
    kernel, bias = layer.get_weights()
    layer.set_weights([kernel * factors, bias * factors])


def chain(activation="relu", factors=SPREAD, bias=0.1):
    """1x1 convolution, activation, depthwise convolution that makes the channels alike again, 1x1 convolution."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(8, 1, activation=activation, bias_initializer=keras.initializers.Constant(bias), name="first")(inputs)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    model = keras.Model(inputs, layers.Conv2D(5, 1, name="last")(x))
    scaled_to(model.get_layer("first"), factors)
    kernel, offset = model.get_layer("depthwise").get_weights()
    model.get_layer("depthwise").set_weights([kernel / factors[:, None], offset])
    return model


@pytest.mark.parametrize("activation", ["relu", "relu6", "linear"])
def test_equalization_gives_small_channels_their_steps(activation):
    model, fresh = chain(activation), images(seed=2)
    before, _, _ = fidelity(model, images(), (), fresh)
    after, simulated, result = fidelity(model, images(), ("equalization",), fresh)
    (edit,) = [edit for edit in result.plan.edits if isinstance(edit, Scaling)][:1]
    assert after > before + 5
    assert abs(after - simulated) < 0.5
    assert edit.factors.max() / edit.factors.min() > 4
    assert (np.diff(edit.factors[[0, 3, 7]]) > 0).all()


def test_equalization_leaves_even_channels_alone():
    model = chain("relu", np.ones(8))
    kernel, bias = model.get_layer("first").get_weights()
    model.get_layer("first").set_weights([np.sign(kernel) * 0.5, bias])
    kernel, bias = model.get_layer("depthwise").get_weights()
    model.get_layer("depthwise").set_weights([np.full_like(kernel, 0.3), bias])
    assert quantized(model, images(), ("equalization",)).plan.edits == ()


@pytest.mark.parametrize("size", [1.0, 3.0, 30.0])
def test_equalization_never_scales_beyond_relu6(size):
    """Where channels are at 6 most of the time, too: their deviation is large for their extremes."""
    model = chain("relu6", SPREAD * size, bias=0.1 if size < 30 else 4.0)
    result = quantized(model, images(), ("equalization",))
    scalings = [edit for edit in result.plan.edits if isinstance(edit, Scaling) and "first" in edit.producers[0]]
    value = keras.Model(model.input, model.get_layer("first").output)(images()).numpy()
    assert bool(scalings) == bool((value.reshape(-1, 8).max(0) < 3).any())
    for scaling in scalings:
        assert scaling.factors.min() >= 1
        assert (value * scaling.factors).max() <= 6.0001
        assert (scaling.factors[value.reshape(-1, 8).max(0) >= 6] == 1).all()


def test_equalization_through_sums_and_pooling():
    keras.utils.set_random_seed(4)
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(8, 1, name="first")(inputs)
    y = layers.Conv2D(8, 3, padding="same", name="second")(layers.ReLU()(x))
    x = layers.MaxPooling2D()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(6, 1, name="third")(x))
    model = keras.Model(inputs, layers.Dense(3, name="last")(x))
    for name in ("first", "second"):
        scaled_to(model.get_layer(name), SPREAD)
    for name in ("second", "third"):
        kernel, bias = model.get_layer(name).get_weights()
        model.get_layer(name).set_weights([kernel / SPREAD[:, None], bias])
    fresh = images(seed=5)
    before, _, _ = fidelity(model, images(), (), fresh)
    after, simulated, result = fidelity(model, images(), ("equalization",), fresh)
    scaling = next(edit for edit in result.plan.edits if isinstance(edit, Scaling))
    assert len(scaling.producers) == len(scaling.consumers) == 2
    assert after > before + 3
    assert abs(after - simulated) < 1


def test_no_equalization_where_others_read_the_channels():
    keras.utils.set_random_seed(4)
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(8, 1, activation="relu", name="first")(inputs)
    model = keras.Model(inputs, [layers.Conv2D(5, 1)(x), layers.Softmax()(x)])
    scaled_to(model.get_layer("first"), SPREAD)
    assert quantized(model, images(), ("equalization",)).plan.edits == ()


def transformer(gamma):
    keras.utils.set_random_seed(5)
    inputs = keras.Input((6, 32))
    norm = layers.LayerNormalization(name="norm")
    x = norm(inputs)
    model = keras.Model(inputs, layers.Dense(16, name="one")(x) + layers.Dense(16, name="other")(x))
    norm.set_weights([gamma, np.zeros(32, np.float32)])
    return model


def test_smooth_quant_moves_outliers_into_weights():
    gamma = np.ones(32, np.float32)
    gamma[3] = 60.0
    data, fresh = (np.random.default_rng(seed).normal(size=(64, 6, 32)).astype(np.float32) for seed in (0, 1))
    before, _, _ = fidelity(transformer(gamma), data, (), fresh)
    after, simulated, result = fidelity(transformer(gamma), data, ("smooth_quant",), fresh)
    (edit,) = result.plan.edits
    assert edit.factors.argmin() == 3
    assert len(edit.consumers) == 2
    assert after > before + 1
    assert abs(after - simulated) < 0.5
    even = transformer(np.ones(32, np.float32))
    assert fidelity(even, data, ("smooth_quant",), fresh)[0] >= fidelity(even, data, (), fresh)[0] - 0.1


def test_channel_alignment_centers_channels():
    offsets = np.linspace(-20, 20, 8).astype(np.float32)

    def model(bias):
        keras.utils.set_random_seed(6)
        inputs = keras.Input((8, 8, 4))
        x = layers.Conv2D(8, 3, name="first")(inputs)
        result = keras.Model(inputs, layers.Conv2D(5, 1, name="second")(x))
        kernel, _ = result.get_layer("first").get_weights()
        result.get_layer("first").set_weights([kernel, bias])
        kernel, _ = result.get_layer("second").get_weights()
        result.get_layer("second").set_weights([kernel, -(offsets @ kernel[0, 0])])  # or all would be one large constant
        return result

    fresh = images(seed=7)
    before, _, _ = fidelity(model(offsets), images(), (), fresh)
    after, simulated, result = fidelity(model(offsets), images(), ("channel_alignment",), fresh)
    first, _ = result.plan.edits
    assert isinstance(first, Shift)
    np.testing.assert_allclose(first.values, -offsets, atol=3)
    assert after > before + 6
    assert abs(after - simulated) < 0.5
    assert quantized(model(0 * offsets), images(), ("channel_alignment",)).plan.edits == ()


def biased(outlier):
    """Weights that all round the same way, where one large weight makes their steps large."""
    inputs = keras.Input((8, 8, 16))
    x = layers.Conv2D(8, 1, name="first")(inputs)
    model = keras.Model(inputs, layers.Conv2D(4, 1, name="second")(layers.ReLU()(x)))
    rng = np.random.default_rng(8)
    kernel = rng.uniform(0.3, 0.45, (1, 1, 16, 8)).astype(np.float32)
    if outlier:
        kernel[0, 0, 0] = 127.0
    else:
        kernel = np.sign(rng.normal(size=kernel.shape)).astype(np.float32)
    model.get_layer("first").set_weights([kernel, np.zeros(8, np.float32)])
    return model


@pytest.mark.parametrize("algorithm", ["bias_correction", "full_bias_correction"])
def test_bias_correction_restores_the_mean(algorithm):
    def data(seed):
        x = np.random.default_rng(seed).uniform(0.9, 1.1, (48, 8, 8, 16)).astype(np.float32)
        x[..., 0] *= 0.01
        return x

    fresh = data(1)
    before, _, _ = fidelity(biased(True), data(0), (), fresh)
    after, simulated, result = fidelity(biased(True), data(0), (algorithm,), fresh)
    shift = next(edit for edit in result.plan.edits if edit.op.startswith("first") or "first" in edit.op)
    missing = (biased(True).get_layer("first").get_weights()[0][0, 0, 1:] * 1.0).sum(0)  # all of them round to 0
    np.testing.assert_allclose(shift.values, missing, rtol=0.05)
    assert after > before + 15
    assert abs(after - simulated) < 0.5
    exact = quantized(biased(False), images(channels=16), (algorithm,))
    largest = max((np.abs(edit.values).max() for edit in exact.plan.edits), default=0.0)
    assert largest < 0.02


def test_shrunk_mean():
    errors = np.random.default_rng(9).normal(size=(1000, 200))
    errors[:, :100] += 1.0
    found = shrunk(1000, errors.sum(0), (errors**2).sum(0))
    np.testing.assert_allclose(found[:100], errors[:, :100].mean(0), rtol=0.01)
    assert (found[100:] == 0).mean() > 0.5
    assert np.abs(found[100:]).mean() < np.abs(errors[:, 100:].mean(0)).mean() / 2
    assert shrunk(1, np.array([2.0]), np.array([4.0])) == 2


def test_rounding_finds_the_best_of_all_neighbours():
    rng = np.random.default_rng(10)
    x = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 8)) + 0.1 * rng.normal(size=(500, 8))
    gram = x.T @ x / len(x)
    exact = rng.uniform(-9, 9, (8, 5))
    found = _solve(gram, gram, exact, np.rint(exact), np.floor(exact), np.ceil(exact))

    def error(value):
        return np.einsum("ko,kl,lo->o", value - exact, gram, value - exact)

    assert (np.abs(found - exact) < 1).all()
    corners = np.array(list(np.ndindex(*[2] * 8)), np.float64)
    best = np.stack([error(np.floor(exact) + corner[:, None]) for corner in corners]).min(0)
    assert (error(found) <= error(np.rint(exact))).all()
    assert error(found).sum() < 0.3 * error(np.rint(exact)).sum()
    assert error(found).sum() < 4 * best.sum()


def dense(kernel):
    inputs = keras.Input((16,))
    model = keras.Model(inputs, layers.Dense(kernel.shape[1], name="dense")(inputs))
    model.get_layer("dense").set_weights([kernel.astype(np.float32), np.zeros(kernel.shape[1], np.float32)])
    return model


def test_adaround_uses_what_inputs_have_in_common():
    rng = np.random.default_rng(11)
    mixed = rng.normal(size=(1, 16))
    data, fresh = (rng.uniform(-1, 1, (256, 1)) @ mixed for _ in range(2))
    kernel = rng.uniform(-0.02, 0.02, (16, 6))
    kernel[0] = 1.0  # its steps are large for the others
    before, _, _ = fidelity(dense(kernel), data.astype(np.float32), (), fresh.astype(np.float32))
    after, simulated, result = fidelity(dense(kernel), data.astype(np.float32), ("adaround",), fresh.astype(np.float32))
    (integers,) = result.plan.rounded.values()
    exact = kernel / (np.abs(kernel).max(0) / 127)
    assert (np.abs(integers - exact) < 1.0001).all()
    assert after > before + 3
    assert abs(after - simulated) < 0.5
    whole = rng.integers(-127, 128, (16, 6)).astype(np.float64)
    whole[0] = 127
    assert quantized(dense(whole / 127), data.astype(np.float32), ("adaround",)).plan.rounded == {}


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, "same", 1), (2, "valid", 1), (1, "valid", 2), (2, "same", 1)])
def test_adaround_of_convolutions(stride, padding, dilation):
    keras.utils.set_random_seed(12)
    inputs = keras.Input((9, 7, 4))
    x = layers.Conv2D(6, 3, strides=stride, padding=padding, dilation_rate=dilation, name="conv", activation="relu")(inputs)
    x = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="depthwise")(x)
    model = keras.Model(inputs, layers.Dense(3, name="dense")(layers.GlobalAveragePooling2D()(x)))
    for name in ("conv", "depthwise"):
        kernel, bias = model.get_layer(name).get_weights()
        kernel.reshape(9, -1)[4] *= 20
        model.get_layer(name).set_weights([kernel, bias])
    rng = np.random.default_rng(13)
    smooth = [np.repeat(rng.normal(size=(64, 9, 1, 4)), 7, 2).astype(np.float32) for _ in range(2)]
    before, _, _ = fidelity(model, smooth[0], (), smooth[1])
    after, simulated, result = fidelity(model, smooth[0], ("adaround",), smooth[1])
    assert len(result.plan.rounded) >= 2
    assert after > before
    assert abs(after - simulated) < 1


def test_sequential_ranges_know_what_is_clipped_before():
    """Rare peaks are cut off in front of the second layer, of whose values they would be too many to be cut off there."""
    inputs = keras.Input((32, 32, 64))
    x = layers.Conv2D(64, 1, name="first", use_bias=False)(inputs)
    x = layers.Conv2D(2, 1, name="second", use_bias=False)(x)
    model = keras.Model(inputs, layers.Conv2D(2, 1, name="third", use_bias=False)(x))
    model.get_layer("first").set_weights([np.eye(64, dtype=np.float32)[None, None]])
    kernel = np.zeros((1, 1, 64, 2), np.float32)
    kernel[0, 0, 0] = 1.0, -1.0
    model.get_layer("second").set_weights([kernel])
    model.get_layer("third").set_weights([np.eye(2, dtype=np.float32)[None, None]])
    data = images(32, 32, 64)
    rows = data.reshape(-1, 64)
    rows[:: len(rows) // 6, 0] = 400.0
    options = {"estimator": "percentile"}
    plans = [quantized(model, data, names, **options).plan for names in ((), ("sequential_ranges",))]
    widths = [max(spec.high - spec.low for name, spec in plan.tensors.items() if "second" in name) for plan in plans]
    assert widths[0] > 700
    assert widths[1] < 100


def test_all_together_in_any_order_and_the_plan_again():
    model, data, fresh = chain(), images(), images(seed=2)
    every, simulated, result = fidelity(model, data, ALGORITHMS, fresh)
    other = quantized(model, data, ALGORITHMS[::-1])
    bytes_of = [each.graph_def.SerializeToString(deterministic=True) for each in (result, other)]
    assert bytes_of[0] == bytes_of[1]
    assert every > fidelity(model, data, (), fresh)[0] + 5
    assert abs(every - simulated) < 0.5


def test_a_saved_plan_gives_the_same_model(tmp_path):
    model, data = chain(), images()
    result = quantized(model, data, PRESETS["accuracy"])
    assert {type(edit) for edit in result.plan.edits} == {Scaling, Shift}
    assert result.plan.rounded
    result.save(tmp_path / "int8")
    again = tfquant.quantize(model, plan=tmp_path / "int8")
    first, second = (each.graph_def.SerializeToString(deterministic=True) for each in (result, again))
    assert first == second
    keras.utils.set_random_seed(99)
    stranger = keras.Sequential([keras.Input((8, 8, 4)), layers.Conv2D(8, 1), layers.ReLU(), layers.Conv2D(5, 1)])
    with pytest.raises(PlanError, match="another model"):
        tfquant.quantize(stranger, plan=tmp_path / "int8")


def test_unknown_algorithms_are_refused():
    with pytest.raises(ConfigError, match=r"algorithms must be some of channel_alignment, .*Received: 'magic'"):
        tfquant.QuantConfig(algorithms=("magic",))
    with pytest.raises(ConfigError, match="preset must be one of fast, default, accuracy"):
        tfquant.QuantConfig(preset="performance")
    assert tfquant.QuantConfig(preset="fast").chosen_algorithms == ()
    assert tfquant.QuantConfig(algorithms=["adaround"]).chosen_algorithms == ("adaround",)
