"""Tests of 2 to 8 bits: integers, allocation, correction, the simulation against NumPy, and what it brings on real digits."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfquant
from models import digits
from tfquant import verify
from tfquant.errors import ConfigError, PlanError
from tfquant.observe.fewer_bits import Bits, allocated, quantize_weights
from tfquant.plan.rounding import levels, nearest
from tfquant.plan.serialize import load_plan, save_plan
from tfquant.plan.spec import QuantPlan, asymmetric

NAIVE = Bits(clip=False, correct=False)
CLIPPED = Bits(clip=True, correct=False)


def heavy(shape, seed=0):
    """Weights with tails, of another size in each channel, around means that are not 0."""
    rng = np.random.default_rng(seed)
    sizes = 2.0 ** rng.uniform(-6, 0, shape[-1])
    return (rng.standard_t(4, shape) * sizes + 0.1 * sizes).astype(np.float32)


def errors(weights, found):
    return ((weights.astype(np.float64) - found.values) ** 2).reshape(-1, weights.shape[-1]).sum(0)


# Weights


@pytest.mark.parametrize("count", range(2, 9))
def test_naive_weights_are_the_nearest_of_all_levels(count):
    weights = heavy((3, 3, 8, 16))
    found = quantize_weights(weights, count, NAIVE)
    most = 2 ** (count - 1) - 1
    assert found.integers.dtype == np.int8
    assert found.integers.shape == weights.shape
    assert np.array_equal(np.abs(found.integers).reshape(-1, 16).max(0), np.full(16, most))
    assert found.offsets is None
    assert np.array_equal(found.bits, np.full(16, count))
    scales = np.abs(weights).reshape(-1, 16).max(0) / most
    assert found.scales == pytest.approx(scales, rel=1e-6)
    assert (np.abs(found.values - weights) <= found.scales * 0.501).all()


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_clipping_lowers_the_error_of_every_channel_or_leaves_it(count):
    weights = heavy((3, 3, 64, 16))
    before, after = (
        errors(weights, quantize_weights(weights, count, NAIVE)),
        errors(weights, quantize_weights(weights, count, CLIPPED)),
    )
    assert (after <= before).all()
    assert after.sum() < {2: 0.5, 3: 0.5, 4: 0.65, 6: 1.0}[count] * before.sum()


def test_clipping_leaves_a_channel_alone_that_has_no_tails():
    weights = np.linspace(-1, 1, 4096, dtype=np.float32)[:, None]
    for count in (4, 7):
        assert quantize_weights(weights, count, CLIPPED).scales == quantize_weights(weights, count, NAIVE).scales


@pytest.mark.parametrize("count", range(2, 8))
def test_correction_restores_mean_and_deviation(count):
    weights = heavy((5, 5, 8, 16))
    found = quantize_weights(weights, count, Bits(correct=True)).values.reshape(-1, 16)
    flat = weights.reshape(-1, 16)
    assert found.mean(0) == pytest.approx(flat.mean(0), rel=1e-4, abs=1e-7)
    assert found.std(0) == pytest.approx(flat.std(0), rel=1e-4)


def test_correction_of_channels_that_are_constant_or_zero():
    weights = np.zeros((9, 3), np.float32)
    weights[:, 1] = 0.25
    weights[0, 2] = 1.0
    found = quantize_weights(weights, 3, Bits(correct=True))
    assert found.values[:, :2] == pytest.approx(weights[:, :2], abs=1e-7)
    assert found.values[:, 2].mean() == pytest.approx(1 / 9, rel=1e-5)
    assert np.isfinite(found.scales).all()
    assert (found.scales > 0).all()


def test_one_scale_for_all_channels():
    weights = heavy((64, 16))
    found = quantize_weights(weights, 4, NAIVE, is_shared=True)
    assert len(set(found.scales.tolist())) == 1
    assert np.abs(found.integers).max() == 7


# Allocation


@pytest.mark.parametrize("mean", range(2, 8))
@pytest.mark.parametrize("seed", range(5))
def test_allocation_keeps_the_mean(mean, seed):
    sizes = 2.0 ** np.random.default_rng(seed).normal(0, 3, 40)
    bits = allocated(sizes, mean)
    assert bits.sum() == mean * 40
    assert set(bits.tolist()) <= {0, 2, 3, 4, 5, 6, 7, 8}
    order = np.argsort(sizes)
    assert (np.diff(bits[order].astype(int)) >= -1).all()  # larger channels have more, but for what is left by rounding


def test_allocation_follows_the_power_of_two_thirds():
    bits = allocated(2.0 ** np.array([-3.0, -1.5, 0.0, 1.5, 3.0]), 5)
    assert bits.tolist() == [3, 4, 5, 6, 7]


def test_allocation_of_equal_and_of_dead_channels():
    assert allocated(np.ones(6), 4).tolist() == [4] * 6
    assert allocated(np.zeros(6), 3).tolist() == [3] * 6
    assert allocated(np.array([0.0, 1.0, 1.0, 1.0]), 3).tolist() == [0, 4, 4, 4]
    assert allocated(np.array([0.0, 0.0, 1.0]), 6).tolist() == [0, 0, 8]


@pytest.mark.parametrize("count", [3, 4, 6])
def test_allocation_lowers_the_error_at_the_same_size(count):
    weights = heavy((3, 3, 64, 32))
    plain, given = (quantize_weights(weights, count, dataclasses.replace(CLIPPED, allocate=flag)) for flag in (False, True))
    assert given.bits.sum() == plain.bits.sum()
    assert errors(weights, given).sum() < 0.6 * errors(weights, plain).sum()
    limits = np.where(given.bits > 0, 2.0 ** (given.bits.astype(int) - 1) - 1, 0)
    assert (np.abs(given.integers).reshape(-1, 32).max(0) <= limits).all()


def test_levels_and_nearest():
    assert levels(np.array([0, 2, 3, 4, 8], np.int8)).tolist() == [0, 1, 3, 7, 127]
    weights = np.array([[0.4, -9.0, 9.0], [-0.6, 1.4, 100.0]])
    assert nearest(weights, np.ones(3), np.array([2, 0, 4])).tolist() == [[0, 0, 7], [-1, 0, 7]]


# The simulation


@pytest.fixture(scope="module")
def dense():
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(24, activation="relu"), keras.layers.Dense(24), keras.layers.Dense(5)]
    return keras.Sequential([keras.Input((12,), name="x"), *layers])


@pytest.fixture(scope="module")
def points():
    return np.random.default_rng(2).normal(size=(80, 12)).astype(np.float32)


def options(**changes):
    return tfquant.QuantConfig(**{"verify": False, "preset": "fast", **changes})


def rounded(values, spec):
    stored = np.clip(np.rint(values / spec.scale) + spec.zero_point, *spec.limits)
    return (stored - spec.zero_point) * spec.scale


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_simulation_computes_what_numpy_does(dense, points, bits, correct):
    found = tfquant.quantize(
        dense, points, options(weight_bits=bits, activation_bits=bits, weight_correction=correct, placement="int8")
    )
    plan = found.plan
    assert plan.is_simulated == (bits < 8)
    specs = list(plan.tensors.values())
    assert [spec.bits for spec in specs] == [8, bits, bits]
    assert all(spec.limits == ((0, 2**spec.bits - 1) if spec.dtype == "quint8" else spec.limits) for spec in specs)
    x = points.astype(np.float64)
    layers = zip(dense.layers, plan.weight_scales, specs, strict=True)
    for index, (layer, name, spec) in enumerate(layers):
        weights, bias = (variable.numpy().astype(np.float64) for variable in layer.weights)
        integers = plan.rounded.get(name, nearest(weights, plan.weight_scales[name]))
        assert np.abs(integers).max() <= 2 ** (bits - 1) - 1
        x = rounded(x, spec) @ (integers * plan.weight_scales[name] + plan.weight_offsets.get(name, 0)) + bias
        x = np.maximum(x, 0) if index == 0 else x
    simulated = next(iter(found.simulation()({"x": points}).values()))
    step = 2.0 * specs[-1].scale * np.abs(dense.layers[-1].weights[0].numpy()).max()
    off = np.abs(simulated - x)
    assert (off > 1e-3 * np.abs(x).max()).mean() < 0.01  # a value between two steps may go either way
    assert off.max() <= step + 1e-3
    if bits < 8:
        assert np.allclose(found(tf.constant(points)).numpy(), simulated, atol=1e-5)


def test_weights_alone_or_activations_alone(dense, points):
    weights = tfquant.quantize(dense, points, options(weight_bits=4))
    assert {spec.bits for spec in weights.plan.tensors.values()} == {8}
    assert {tuple(bits.tolist()) for bits in weights.plan.weight_bits.values()} == {(4,) * 24, (4,) * 5}
    activations = tfquant.quantize(dense, points, options(activation_bits=3))
    assert not activations.plan.weight_bits
    assert [spec.bits for spec in activations.plan.tensors.values()] == [8, 3, 3]


def test_a_plan_of_few_bits_is_saved_and_applied_again(dense, points, tmp_path):
    found = tfquant.quantize(dense, points, options(weight_bits=3, activation_bits=5, bit_allocation=True))
    save_plan(found.plan, tmp_path)
    loaded = load_plan(tmp_path)
    assert loaded.weight_offsets.keys() == found.plan.weight_bits.keys() == loaded.rounded.keys()
    again = tfquant.quantize(dense, config=options(), plan=loaded)
    one, other = (graph.graph_def.SerializeToString(deterministic=True) for graph in (found, again))
    assert one == other
    (name, *_) = loaded.weight_offsets
    short = dataclasses.replace(loaded, weight_offsets={name: loaded.weight_offsets[name][1:]})
    with pytest.raises(PlanError, match=rf"needs 24 weight offsets for {name}\. Received: shape \(23,\)"):
        tfquant.quantize(dense, config=options(), plan=short)


def test_it_is_saved_as_a_simulation_alone(dense, points, tmp_path):
    found = tfquant.quantize(dense, points, options(weight_bits=4))
    with pytest.raises(ConfigError) as error:
        found.save(tmp_path / "int8")
    message = (
        "TensorFlow has no kernels below 8 bits: save the model with the format fakequant, its simulation. Received: saved_model"
    )
    assert str(error.value) == message
    assert not (tmp_path / "int8").exists()
    size = found.report.size_after
    found.save(tmp_path / "fake", format="fakequant")
    loaded = tf.saved_model.load(str(tmp_path / "fake"))
    served = next(iter(loaded.signatures["serving_default"](x=tf.constant(points)).values())).numpy()
    assert np.allclose(served, next(iter(found.simulation()({"x": points}).values())), atol=1e-6)
    assert found.report.size_after == size


def test_the_report_says_what_it_is_and_what_it_would_take(dense, points):
    found = tfquant.quantize(dense, points, tfquant.QuantConfig(weight_bits=4, activation_bits=4))
    text = str(found.report)
    assert (
        "Simulated: weights of 4 bits; activations of 4 bits, 1 of 3 of 8. Stock TensorFlow has no kernel below 8 bits." in text
    )
    assert "Multiply-accumulates quantized: 100.00%" in text
    assert "were its weights stored in these bits" in text
    assert not found.report.latency
    assert found.report.fidelity is not None
    values = (12 * 24 + 24 * 24 + 24 * 5) // 2
    biases = 4 * (24 + 24 + 5)
    assert found.report.size_after - (values + 3 * biases) in range(64)  # biases, scales, offsets; and what shapes take


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bit_allocation": True}, "bit_allocation needs weight_bits below 8, or a size_budget. Received: neither"),
        (
            {"bit_allocation": True, "weight_bits": 4, "weights": "per_tensor"},
            "bit_allocation needs weights per_channel. Received: per_tensor",
        ),
        ({"size_budget": 0.2, "weight_bits": 4}, "Give either weight_bits or a size_budget, which finds them. Received: both"),
        ({"weight_bits": 4, "mode": "dynamic"}, "Fewer than 8 bits need the mode static. Received: dynamic"),
        (
            {"activation_bits": 4, "placement": "measure"},
            "Fewer than 8 bits are simulated, which has no speed to place by. Received: placement measure",
        ),
    ],
)
def test_options_that_contradict_each_other(dense, points, changes, message):
    with pytest.raises(ConfigError) as error:
        tfquant.quantize(dense, points, options(**changes))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_bits": 1}, "weight_bits must be at least 2. Received: 1"),
        ({"weight_bits": 9}, "weight_bits must be at most 8. Received: 9"),
        ({"activation_bits": 4.0}, "activation_bits must be a whole number. Received: 4.0"),
        ({"weight_clipping": "mse"}, "weight_clipping must be one of aciq, none. Received: 'mse'"),
        ({"size_budget": -1}, "size_budget must be at least 0. Received: -1"),
        ({"size_budget": "10%"}, "size_budget must be a number. Received: '10%'"),
        ({"size_budget": float("nan")}, "size_budget must be a number. Received: nan"),
    ],
)
def test_options_that_cannot_be(changes, message):
    with pytest.raises(ConfigError) as error:
        options(**changes)
    assert str(error.value) == message


def test_plans_tell_their_bits(dense, points):
    plain = tfquant.quantize(dense, points, options()).plan
    assert "weight_bits" not in plain.settings
    assert not plain.is_simulated
    spec = asymmetric(0, 1, "x", "x", 4)
    assert QuantPlan("t", ("s",), (), {"x": spec}, {}, {}).is_simulated
    few = tfquant.quantize(dense, points, options(weight_bits=4, activation_bits=6)).plan
    assert (few.settings["weight_bits"], few.settings["activation_bits"]) == (4, 6)


def test_tuning_takes_few_bits_back_to_float(dense, points):
    """A goal that no layer in 2 bits meets: in the end nothing of them is left in the plan."""
    exact = dense(points).numpy()

    def evaluate(predict):
        return -float(np.abs(predict(points) - exact).max())

    config = options(weight_bits=2, activation_bits=2, estimator="minmax")
    found = tfquant.tune(dense, points, evaluate, max_drop=1e-5, drop_type="absolute", config=config)
    assert found.met
    plan = found.model.plan
    assert not plan.is_simulated
    assert not plan.weight_offsets
    assert not plan.rounded


# What it brings


@pytest.fixture(scope="module")
def trained():
    """(model, calibration samples, test samples, labels)"""
    keras.utils.set_random_seed(0)
    x, y, x_test, y_test = digits.load_data()
    model = digits.build()
    digits.train(model, x, y, epochs=6)
    return model, x[:100], x_test, y_test


def kl(found, x):
    """Mean KL(float32 || simulation) in nats."""
    (key,) = found.input_names
    result = verify.fidelity(found.float_function(), found.simulation(), [{key: x}], lambda batch: len(batch[key]))
    return result.mean_kl


def test_most_of_what_naive_few_bits_lose_comes_back(trained):
    """ACIQ's published behaviour in kind: clipping, allocation and correction at 3 bits on digits."""
    model, calibration, x, _ = trained
    naive = {"estimator": "minmax", "weight_clipping": "none", "weight_correction": False}
    steps = {
        "naive": naive,
        "clipped": naive | {"estimator": "aciq", "weight_clipping": "aciq"},
        "allocated": naive | {"estimator": "aciq", "weight_clipping": "aciq", "bit_allocation": True},
        "corrected": {"estimator": "aciq", "bit_allocation": True},
    }
    lost = {
        name: kl(tfquant.quantize(model, calibration, options(weight_bits=3, activation_bits=3, **changes)), x)
        for name, changes in steps.items()
    }
    print(lost)
    assert lost["clipped"] < 0.6 * lost["naive"]
    assert lost["corrected"] < 0.25 * lost["naive"]
    assert lost["allocated"] < 1.3 * lost["clipped"]  # what it costs in one layer it gains in another, here


def test_rounding_and_bias_correction_know_of_the_bits(trained):
    """AdaRound keeps to the levels of each channel, counts what the integer 0 stands for, and helps beyond ACIQ."""
    model, calibration, x, _ = trained
    bits = {"weight_bits": 3, "activation_bits": 4, "estimator": "mse", "bit_allocation": True}
    plain, rounded = (tfquant.quantize(model, calibration, options(**bits, algorithms=names)) for names in ((), ("adaround",)))
    assert any((rounded.plan.rounded[name] != integers).any() for name, integers in plain.plan.rounded.items())
    for name, integers in rounded.plan.rounded.items():
        most = levels(rounded.plan.weight_bits[name])
        assert (np.abs(integers).reshape(-1, len(most)).max(0) <= most).all()
    assert kl(rounded, x) < 0.7 * kl(plain, x)
