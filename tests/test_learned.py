"""Tests of models with fake quantization: what their graphs say, the plans made of it, and INT8 against the models themselves."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import dataclasses

import building
import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import flagsaver

import tfquant
from models import digits
from tfquant import calibrate
from tfquant.errors import ConfigError, PlanError
from tfquant.graph.fake_quant import Grid, between, grids_of, widest
from tfquant.graph.ir import FAKE_QUANT
from tfquant.observe.learned import learned_weights, weight_bits
from tfquant.plan.rounding import nearest
from tfquant.plan.serialize import load_plan
from tfquant.simplify import simplify
from tfquant.targets import weights as stored

Q = tf.quantization
X = np.random.default_rng(1).normal(size=(48, 8, 8, 4)).astype(np.float32)
RELU = tf.nn.relu


def heavy(*shape, seed=0):
    """Weights with tails, scaled so that a layer keeps the size of its input."""
    values = np.random.default_rng([seed, *shape]).standard_t(4, shape)
    return (values / np.sqrt(2 * np.prod(shape[:-1]))).astype(np.float32)


def rounded(x, low, high, bits=8, narrow=False):
    return Q.fake_quant_with_min_max_vars(x, low, high, num_bits=bits, narrow_range=narrow)


def per_channel(weights, bits=8, narrow=True):
    reach = np.abs(weights).reshape(-1, weights.shape[-1]).max(0)
    return Q.fake_quant_with_min_max_vars_per_channel(weights, -reach, reach, num_bits=bits, narrow_range=narrow)


def per_tensor(weights, bits=8, narrow=True):
    reach = float(np.abs(weights).max())
    return rounded(weights, -reach, reach, bits, narrow)


def conv(x, weights, padding="SAME"):
    return tf.nn.conv2d(x, weights, 1, padding)


def saved(folder, call, shape=(None, *X.shape[1:])):
    module = tf.Module()
    module.serve = tf.function(lambda x: {"y": call(x)}, input_signature=[tf.TensorSpec(shape, tf.float32, name="x")])
    tf.saved_model.save(module, str(folder), signatures=module.serve)
    return str(folder)


def quantized(folder, call, data=None, **options):
    return tfquant.quantize(saved(folder, call), data, tfquant.QuantConfig(verify=False, **options))


def decibels(reference, other):
    return 10 * np.log10((reference.astype(np.float64) ** 2).sum() / max(((reference - other) ** 2).sum(), 1e-30))


def outputs(model, x=X):
    """Of the original, the simulation and INT8."""
    batch = {model.input_names[0]: x}
    runs = (model.float_function(), model.simulation(), model.int8_function())
    return [next(iter(run(batch).values())) for run in runs]


def units(model):
    return {unit.name: unit for unit in model.annotation.units.values()}


def reasons(model):
    return {decision.name: decision.reason for decision in model.plan.ops if decision.reason}


def deviations(model, x=X):
    """Where kernels are not within a step of the simulation, unit by unit."""
    batches = [{model.input_names[0]: x}]
    planned = building.Planned(model.graph, model.annotation, model.plan, {})
    return [str(found) for found in building.deviations(planned, batches) if found.wrong]


def kept(model):
    """The fake quantizations that stayed."""
    return [node for node in model.graph.order() if node.op in FAKE_QUANT]


# Grids


def around_zero(version):
    def call(x, low, high, bits, narrow, signed=True):
        options = {"range_given": True, "narrow_range": narrow, "signed_input": signed}
        if version == 3:
            return tf.raw_ops.QuantizeAndDequantizeV3(input=x, input_min=low, input_max=high, num_bits=bits, **options)
        op = getattr(tf.raw_ops, f"QuantizeAndDequantizeV{version}")
        return op(input=x, input_min=low, input_max=high, num_bits=bits, **options)

    return call


def args(x, low, high, bits, narrow):
    return Q.fake_quant_with_min_max_args(x, low, high, num_bits=bits, narrow_range=narrow)


def unsigned(x, low, high, bits, narrow):
    return around_zero(2)(x, low, high, bits, False, signed=False)


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("ends", [(-1.0, 1.0), (-0.3, 2.1), (0.0, 3.0), (-4.0, 0.0), (0.5, 3.0), (-1e-3, 5.0)])
@pytest.mark.parametrize("op", [rounded, args, around_zero(2), around_zero(3), around_zero(4), unsigned])
def test_a_grid_holds_the_values_that_the_kernel_rounds_to(op, ends, narrow, bits):
    low, high = ends
    values = np.linspace(-16, 16, 160001, dtype=np.float32)
    inputs = {"x": [None]}
    graph = building.build(lambda x: op(x, low, high, bits, narrow), inputs)
    node = next(node for node in graph.order() if node.op in FAKE_QUANT)
    if op is unsigned and high <= 0:
        assert grids_of(node) == ()
        return
    (grid,) = grids_of(node)
    found = np.unique(building.evaluate(lambda x: op(x, low, high, bits, narrow), inputs, [{"x": values}])["output_0"])
    wanted = grid.step * np.arange(grid.least, grid.most + 1)
    assert grid.bits == bits
    assert grid.most - grid.least <= 2**bits - 1
    assert len(found) == len(wanted)
    assert found == pytest.approx(wanted, abs=1e-5 * grid.step * 2**bits)


def test_ranges_that_are_none(tmp_path):
    graph = building.build(
        lambda x: [
            rounded(x, 0.0, 0.0),
            rounded(x, tf.reduce_min(x), 1.0),
            rounded(x, float("nan"), 1.0),
            Q.quantize_and_dequantize_v2(x, -1.0, 1.0),
        ],
        {"x": [4]},
    )
    found = [node for node in graph.order() if node.op in FAKE_QUANT]
    assert [grids_of(node) for node in found] == [()] * 4
    channels = building.build(
        lambda x: Q.fake_quant_with_min_max_vars_per_channel(x, [-1.0, -2.0], [1.0, 2.0], narrow_range=True), {"x": [3, 2]}
    )
    (node,) = [node for node in channels.order() if node.op in FAKE_QUANT]
    assert grids_of(node) == (Grid(float(np.float32(1 / 127)), -127, 127, 8), Grid(float(np.float32(2 / 127)), -127, 127, 8))


def test_the_widest_grid():
    small, large, few = between(0, 4, 8), between(-1, 4, 8), between(-1, 4, 4)
    assert widest([small, large]) == large
    assert widest([large, few]) == large
    assert widest([few, small]) == between(few.low, 4.0, 8)
    assert (between(-1.0, 1.1, 4).least, between(-1.0, 1.1, 4).most) == (-7, 8)


# Weights


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_are_found_again_up_to_their_sign(bits):
    rng = np.random.default_rng(bits)
    most = 2 ** (bits - 1) - 1
    integers = rng.integers(-most, most + 1, (3, 3, 16, 12))
    integers[0, 0, 0], integers[0, 0, 1] = most, 1
    steps = rng.uniform(1e-4, 1e-1, 12) * rng.choice([-1, 1], 12)
    found = learned_weights((integers * steps).astype(np.float32), bits, 0.0, 127)
    assert found.integers.dtype == np.int8
    assert np.array_equal(found.integers, integers * np.sign(steps))
    assert found.scales == pytest.approx(np.abs(steps), rel=1e-6)
    assert found.bits.tolist() == [bits] * 12
    assert found.offsets is None


def test_one_scale_for_all_channels_stays_one():
    integers = np.random.default_rng(0).integers(-127, 128, (5, 8))
    integers[:, 0] = [2, 4, -6, 8, 0]  # by themselves these are 1, 2, -3, 4
    found = learned_weights((integers * 0.01).astype(np.float32), 8, 0.0, 127)
    assert np.array_equal(found.integers, integers)
    assert found.scales == pytest.approx(np.full(8, 0.01))


def test_weights_on_no_grid_and_zeros():
    weights = heavy(64, 4)
    weights[:, 1] = 0
    weights[:, 2] = np.rint(weights[:, 2] * 40) / 40
    found = learned_weights(weights, 8, 0.0, 127)
    assert found.scales[2] == pytest.approx(1 / 40)
    assert not found.integers[:, 1].any()
    for channel in (0, 3):
        assert np.array_equal(found.integers[:, channel : channel + 1], nearest(weights[:, [channel]], found.scales[[channel]]))
        assert np.abs(found.integers[:, channel]).max() == 127


def test_integers_beyond_eight_bits_are_the_nearest_in_sum():
    """A weight of -128 is clipped rather than all others rounded anew; where many lie beyond, all are rounded anew."""
    few = np.arange(-128, 128).reshape(-1, 1).astype(np.float32) * 0.5
    found = learned_weights(few, 8, 0.0, 127)
    assert found.scales == pytest.approx([0.5])
    assert np.array_equal(found.integers.ravel(), np.maximum(np.arange(-128, 128), -127))
    many = np.arange(-200, 56).reshape(-1, 1).astype(np.float32) * 0.5
    found = learned_weights(many, 8, 0.0, 127)
    assert found.scales == pytest.approx([100 / 127])
    assert np.array_equal(found.integers, nearest(many, found.scales))


@pytest.mark.parametrize(("least", "most", "bits"), [(-8, 7, 4), (-7, 8, 5), (-15, 0, 5), (-2, 1, 2)])
def test_integers_that_are_not_symmetric_have_the_bits_that_they_need(least, most, bits):
    integers = np.arange(least, most + 1).reshape(-1, 1)
    found = learned_weights(integers.astype(np.float32), min(bits, 4), 0.0, 127)
    assert np.array_equal(found.integers, integers)
    assert found.bits.tolist() == [bits]


def test_a_scale_may_have_to_be_larger():
    integers = np.random.default_rng(0).integers(-127, 128, (40, 2))
    integers[0] = 127
    found = learned_weights((integers * np.array([1e-3, 1e-8])).astype(np.float32), 8, np.array([1e-6, 1e-6]), 127)
    assert found.scales == pytest.approx([1e-3, 1e-6])
    assert np.array_equal(found.integers[:, 0], integers[:, 0])
    assert np.array_equal(found.integers[:, 1], np.rint(integers[:, 1] * 1e-2))


def test_bits_of_layers_through_what_moves_and_scales_constants():
    graph = building.build(
        lambda x: tf.matmul(x, tf.transpose(per_tensor(heavy(6, 4), 4)) * 2.0, name="dense") + rounded([1.0] * 6, -1.0, 1.0, 7),
        {"x": [None, 4]},
    )
    assert weight_bits(graph) == {"dense": 4, "add": 7}
    simplify(graph)
    assert not [node for node in graph.order() if node.op in FAKE_QUANT]


# Networks


def network(of_weights=per_channel, bits=8, narrow=True, activation_bits=8, narrow_activations=False):
    """Convolution, depthwise convolution, residual add, pooling and a dense layer behind a mean."""
    bias = heavy(1, 8)[0] * 0.2

    def call(x):
        def short(value, high):
            return rounded(value, 0.0, high, activation_bits, narrow_activations)

        x = rounded(x, -3.0, 3.0, 8, narrow_activations)
        first = short(RELU(conv(x, of_weights(heavy(3, 3, 4, 8), bits, narrow)) + bias), 3.0)
        depthwise = tf.nn.depthwise_conv2d(first, of_weights(heavy(3, 3, 8, 1), bits, narrow), [1, 1, 1, 1], "SAME")
        second = short(RELU(depthwise), 3.0)
        third = conv(second, of_weights(heavy(3, 3, 8, 8, seed=1), bits, narrow)) + bias
        both = short(RELU(third + second), 4.0)
        mean = short(tf.reduce_mean(tf.nn.max_pool2d(both, 2, 2, "SAME"), [1, 2]), 2.5)
        return mean @ of_weights(heavy(8, 5), bits, narrow)

    return call


@pytest.mark.parametrize(
    ("options", "least", "bits"),
    [
        ({}, 35, None),
        ({"of_weights": per_tensor}, 35, None),
        ({"narrow": False}, 32, None),
        ({"narrow_activations": True}, 35, None),
        ({"bits": 4}, 38, 4),
        ({"bits": 4, "narrow": False, "of_weights": per_tensor}, 38, 4),
        ({"bits": 2, "activation_bits": 5}, 28, 2),
    ],
)
def test_a_network_without_data(tmp_path, options, least, bits):
    model = quantized(tmp_path / "net", network(**options))
    plan = model.plan
    assert reasons(model) == {}
    assert {spec.source for spec in plan.tensors.values()} == {"learned"}
    assert plan.tensors["x"].scale == pytest.approx(6 / (254 if options.get("narrow_activations") else 255), rel=1e-6)
    relu = plan.tensors[next(name for name in plan.tensors if name.startswith("Relu"))]
    assert (relu.zero_point, relu.bits) == (0, options.get("activation_bits", 8))
    assert kept(model) == []
    reference, simulated, int8 = outputs(model)
    # It is the model itself, but where weights of -128 are none, and grids of 255 values have one more.
    is_exact = "narrow_activations" not in options and (bits is not None or options.get("narrow", True))
    assert decibels(reference, simulated) >= (100 if is_exact else least)
    assert decibels(reference, int8) >= least
    assert plan.is_simulated == (bits is not None)
    if bits is None:
        assert plan.weight_bits == {}
        assert deviations(model) == []
    else:
        assert {int(count) for counts in plan.weight_bits.values() for count in counts} == {bits}
        assert sorted(plan.weight_bits) == sorted(name for name, unit in units(model).items() if unit.weights is not None)


def test_weights_are_those_of_the_training(tmp_path):
    """The values that the INT8 kernels hold are, bit by bit, near what TensorFlow's fake quantization makes of the weights."""
    model = quantized(tmp_path / "net", network())
    for name, weights in (("Conv2D", heavy(3, 3, 4, 8)), ("Conv2D_1", heavy(3, 3, 8, 8, seed=1)), ("matmul", heavy(8, 5))):
        made = stored.dequantized(units(model)[name], model.plan)
        assert made == pytest.approx(per_channel(weights).numpy(), rel=1e-6)
    assert model.plan.rounded == {}


@pytest.mark.parametrize(("of_weights", "narrow"), [(per_channel, True), (per_tensor, True), (per_tensor, False)])
def test_batch_norm_is_folded_around_the_integers(tmp_path, of_weights, narrow):
    rng = np.random.default_rng(2)
    gamma, beta, mean, variance = (rng.uniform(*ends, 8).astype(np.float32) for ends in ((-1, 1.5), (-1, 1), (-1, 1), (0.2, 2)))
    weights = heavy(3, 3, 4, 8)

    def call(x):
        y = conv(rounded(x, -3.0, 3.0), of_weights(weights, 8, narrow))
        y = tf.compat.v1.nn.fused_batch_norm(y, gamma, beta, mean, variance, is_training=False)[0]
        return conv(rounded(RELU(y), 0.0, 4.0), of_weights(heavy(3, 3, 8, 4), 8, narrow))

    model = quantized(tmp_path / "net", call)
    reference, simulated, int8 = outputs(model)
    assert min(decibels(reference, simulated), decibels(reference, int8)) >= 40
    integers, scales = stored.quantized(units(model)["Conv2D"], model.plan)
    trained = of_weights(weights, 8, narrow).numpy()
    factors = gamma / np.sqrt(variance + 1e-3)
    assert (integers * scales) == pytest.approx(trained * factors, abs=1e-3 * float(scales.max()))
    reach = np.abs(weights).reshape(-1, 8).max(0) if of_weights is per_channel else np.full(8, np.abs(weights).max())
    steps = reach / 127 if narrow else 2 * reach / 255
    assert scales == pytest.approx(steps * np.abs(factors), rel=1e-4)
    assert np.array_equal(integers, np.rint(trained / steps) * np.sign(gamma))


def test_a_single_layer_is_within_a_step(tmp_path):
    model = quantized(tmp_path / "net", lambda x: rounded(conv(rounded(x, -3.0, 3.0), per_channel(heavy(3, 3, 4, 8))), -4.0, 4.0))
    reference, simulated, int8 = outputs(model)
    step = 8 / 255
    assert np.abs(simulated - reference).max() <= 1.01 * step
    assert np.abs(int8 - reference).max() <= 1.01 * step
    assert (int8 == reference).mean() > 0.95
    assert [node.op for node in kept(model)] == ["FakeQuantWithMinMaxVars"]  # outputs are rounded as the model does it
    assert list(model.plan.tensors) == ["x"]


def test_quantize_and_dequantize(tmp_path):
    def qdq(value, reach, **options):
        return Q.quantize_and_dequantize_v2(value, -reach, reach, range_given=True, **options)

    def call(x):
        y = RELU(conv(qdq(x, 3.0, narrow_range=True), qdq(heavy(3, 3, 4, 8), 2.0, narrow_range=True)))
        return conv(qdq(y, 4.0, signed_input=False), qdq(heavy(3, 3, 8, 4), 1.0, narrow_range=True))

    model = quantized(tmp_path / "net", call)
    specs = list(model.plan.tensors.values())
    assert [(spec.dtype, spec.zero_point) for spec in specs] == [("qint8", 0), ("quint8", 0)]
    assert [spec.scale for spec in specs] == pytest.approx([3 / 127, 4 / 255], rel=1e-6)
    assert set(np.round(model.plan.weight_scales["Conv2D"] / (2 / 127), 5)) == {1.0}
    reference, simulated, int8 = outputs(model)
    assert min(decibels(reference, simulated), decibels(reference, int8)) >= 45
    assert deviations(model) == []


# Ranges of shared tensors, of ReLU, and of tensors without their own


def test_a_concat_of_tensors_with_their_own_ranges(tmp_path):
    def call(x):
        x = rounded(x, -3.0, 3.0)
        one, other = (
            rounded(conv(x, per_channel(heavy(3, 3, 4, 8, seed=s))), -reach, reach) for s, reach in ((1, 2.0), (2, 3.0))
        )
        return conv(rounded(tf.concat([one, other], 3), -3.0, 3.0), per_channel(heavy(3, 3, 16, 4)))

    model = quantized(tmp_path / "net", call)
    steps = {name: spec.scale * 255 for name, spec in model.plan.tensors.items()}
    assert steps == pytest.approx({"x": 6, "Conv2D": 4, "Conv2D_1": 6, "concat": 6}, rel=1e-6)
    assert model.plan.tensors["Conv2D"].group == "Conv2D"
    assert model.plan.tensors["Conv2D_1"].group == "Conv2D_1" == model.plan.tensors["concat"].group
    assert model.report.warnings == ()
    reference, simulated, int8 = outputs(model)
    assert decibels(reference, simulated) >= 45
    assert decibels(reference, int8) >= 38
    assert deviations(model) == []


def test_a_concat_that_was_rounded_as_a_whole(tmp_path):
    def call(x):
        x = rounded(x, -3.0, 3.0)
        parts = [RELU(conv(x, per_channel(heavy(3, 3, 4, 8)))), conv(x, per_channel(heavy(3, 3, 4, 8, seed=1)))]
        return conv(rounded(tf.concat(parts, 3), -4.0, 4.0), per_channel(heavy(3, 3, 16, 4)))

    model = quantized(tmp_path / "net", call)
    ends = {name: (spec.low, spec.high) for name, spec in model.plan.tensors.items()}
    assert ends["concat"] == ends["Conv2D_1"] == pytest.approx((-3.984, 4.016), abs=1e-3)
    assert ends["Relu"] == pytest.approx((0, 4.016), abs=1e-3)
    assert reasons(model) == {}
    reference, _, int8 = outputs(model)
    assert decibels(reference, int8) >= 38
    assert deviations(model) == []


def test_the_widest_of_ranges_that_kernels_cannot_tell_apart(tmp_path):
    def call(x):
        y = rounded(RELU(conv(rounded(x, -3.0, 3.0), per_channel(heavy(3, 3, 4, 8)))), 0.0, 4.0)
        return conv(rounded(tf.nn.avg_pool2d(y, 2, 2, "VALID"), 0.0, 2.0), per_channel(heavy(3, 3, 8, 4)))

    model = quantized(tmp_path / "net", call)
    assert model.plan.tensors["Relu"].scale == pytest.approx(4 / 255)
    assert set(model.plan.tensors.values()) - {model.plan.tensors["x"]} == {model.plan.tensors["Relu"]}
    assert len(model.plan.tensors) == 3
    assert model.report.warnings == ("Relu share one range in INT8 and learned several: the widest counts.",)


def test_the_range_of_a_mean_is_not_that_of_its_values(tmp_path):
    def call(x):
        y = RELU(conv(rounded(x, -3.0, 3.0), per_channel(heavy(3, 3, 4, 8))))
        return conv(rounded(tf.nn.avg_pool2d(y, 4, 4, "VALID"), 0.0, 0.8), per_channel(heavy(3, 3, 8, 4)))

    model = quantized(tmp_path / "net", call)
    (reason,) = reasons(model).values()
    assert reason == "no fake quantization of its input Relu, and no data were given"
    reference, _, int8 = outputs(model)
    assert decibels(reference, int8) >= 40


@pytest.mark.parametrize("before", [False, True])
def test_a_relu_ends_its_range_at_0(tmp_path, before):
    def call(x):
        y = conv(rounded(x, -3.0, 3.0), per_channel(heavy(3, 3, 4, 8)))
        y = RELU(rounded(y, -4.0, 4.0)) if before else rounded(RELU(y), -4.0, 4.0)
        return conv(y, per_channel(heavy(3, 3, 8, 4)))

    model = quantized(tmp_path / "net", call)
    spec = model.plan.tensors["Relu"]
    assert (spec.zero_point, spec.high) == (0, pytest.approx(128 * 8 / 255, rel=1e-6))
    reference, simulated, int8 = outputs(model)
    assert min(decibels(reference, simulated), decibels(reference, int8)) >= 35
    assert deviations(model) == []


@pytest.mark.parametrize(("low", "steps"), [(-0.1, 255), (-0.2, 255), (-1.0, None)])
def test_a_relu_whose_range_has_nearly_reached_0(tmp_path, low, steps):
    def call(x):
        y = rounded(RELU(conv(rounded(x, -3.0, 3.0), per_channel(heavy(3, 3, 4, 8)))), low, 6.0)
        return conv(y, per_channel(heavy(3, 3, 8, 4)))

    model = quantized(tmp_path / "net", call)
    spec = model.plan.tensors["Relu"]
    reference, simulated, int8 = outputs(model)
    assert spec.zero_point == 0
    if steps:
        assert spec.scale == pytest.approx((6 - low) / 255, rel=1e-6)
        assert decibels(reference, simulated) >= 80  # it is rounded as in the training
        assert decibels(reference, int8) >= 50
    else:
        assert spec.high == pytest.approx(6, abs=0.02)
        assert min(decibels(reference, simulated), decibels(reference, int8)) >= 35


def test_padding_between_a_tensor_and_its_range(tmp_path):
    def call(x):
        y = RELU(conv(rounded(x, -3.0, 3.0), per_channel(heavy(3, 3, 4, 8))))
        y = rounded(tf.pad(rounded(y, 0.0, 3.0), [[0, 0], [1, 1], [1, 1], [0, 0]]), 0.0, 3.0)
        return conv(y, per_channel(heavy(3, 3, 8, 4)), "VALID")

    model = quantized(tmp_path / "net", call)
    assert kept(model) == []
    assert "Pad" not in model.plan.tensors  # the convolution pads
    reference, _, int8 = outputs(model)
    assert decibels(reference, int8) >= 45


def test_layers_on_other_ranks(tmp_path):
    def call(x):
        x = rounded(tf.reshape(x, [-1, 64, 4]), -3.0, 3.0)
        y = rounded(RELU(tf.nn.conv1d(x, per_channel(heavy(3, 4, 8)), 1, "SAME")), 0.0, 3.0)
        y = rounded(RELU(tf.nn.conv1d(y, per_channel(heavy(3, 8, 8)), 1, "SAME")), 0.0, 3.0)
        y = rounded(RELU(tf.einsum("abc,cd->abd", y, per_channel(heavy(8, 6)))), 0.0, 3.0)
        return tf.einsum("abc,cd->abd", y, per_channel(heavy(6, 4)))

    model = quantized(tmp_path / "net", call)
    ops = {decision.op: decision.int8 for decision in model.plan.ops if decision.kernel in ("conv2d", "matmul")}
    assert ops == {"Conv2D": True, "MatMul": True}
    assert all(unit.weights is None or name in model.plan.weight_scales for name, unit in units(model).items())
    reference, simulated, int8 = outputs(model)
    assert min(decibels(reference, simulated), decibels(reference, int8)) >= 40
    moves = [node.op for node in model.graph.order() if node.op in ("Squeeze", "ExpandDims", "Reshape")]
    assert len(moves) <= 4  # those between two convolutions cancel


def test_what_was_trained_per_channel_or_with_more_bits(tmp_path):
    def call(x):
        return conv(
            Q.fake_quant_with_min_max_vars_per_channel(x, [-1.0, -2.0, -3.0, -4.0], [1.0, 2.0, 3.0, 4.0]),
            per_channel(heavy(3, 3, 4, 8)),
        )

    model = quantized(tmp_path / "channels", call)
    assert len(kept(model)) == 1
    assert "x learned a range per channel" in model.report.warnings[0]
    reference, _, int8 = outputs(model)
    assert decibels(reference, int8) >= 38
    model = quantized(tmp_path / "bits", lambda x: conv(rounded(x, -3.0, 3.0, 16), per_channel(heavy(3, 3, 4, 8))))
    assert model.report.warnings == ("x learned more than 8 bits, and have 8.",)
    assert model.plan.tensors["x"].scale == pytest.approx(6 / 255, rel=1e-5)


def test_asymmetric_weights(tmp_path):
    weights = heavy(3, 3, 4, 8)
    low, high = float(weights.min()), float(weights.max()) * 0.3

    def call(bits):
        return lambda x: conv(rounded(x, -3.0, 3.0), rounded(weights, low, high, bits))

    model = quantized(tmp_path / "8", call(8))
    assert model.report.warnings == (
        "Conv2D have weights that integers symmetric about 0 cannot hold as they were trained: the nearest ones count.",
    )
    reference, _, int8 = outputs(model)
    assert decibels(reference, int8) >= 38
    model = quantized(tmp_path / "4", call(4))  # these are integers of 8 bits, of 5 where they reach beyond -8
    assert model.report.warnings == ()
    reference, simulated, _ = outputs(model)
    assert decibels(reference, simulated) >= 50
    assert set(model.plan.weight_bits["Conv2D"].tolist()) <= {4, 5}


# What has no range


def test_without_a_range_and_without_data_an_op_stays_float(tmp_path):
    def call(x):
        y = RELU(conv(rounded(x, -3.0, 3.0), per_channel(heavy(3, 3, 4, 8))))
        return conv(y, per_channel(heavy(3, 3, 8, 4)))

    model = quantized(tmp_path / "net", call)
    assert reasons(model) == {"Conv2D_1": "no fake quantization of its input Relu, and no data were given"}
    assert [decision.name for decision in model.plan.ops if decision.int8] == ["Conv2D"]
    reference, _, int8 = outputs(model)
    assert decibels(reference, int8) >= 50
    model = tfquant.quantize(str(tmp_path / "net"), X)
    assert reasons(model) == {}
    assert [spec.source for spec in model.plan.tensors.values()] == ["learned", "mse"]
    assert model.plan.settings["algorithms"] == ""
    assert model.report.fidelity.sqnr >= 35


def test_a_sum_without_a_range(tmp_path):
    def call(x):
        x = rounded(x, -3.0, 3.0)
        one = rounded(RELU(conv(x, per_channel(heavy(3, 3, 4, 8)))), 0.0, 4.0)
        both = conv(x, per_channel(heavy(3, 3, 4, 8, seed=1))) + one
        return conv(both, per_channel(heavy(3, 3, 8, 4)))

    model = quantized(tmp_path / "net", call)
    found = reasons(model)
    assert "no fake quantization of its input add, and no data were given" in found["Conv2D_2"]
    assert {decision.name for decision in model.plan.ops if decision.int8} >= {"Conv2D", "Conv2D_1"}
    reference, _, int8 = outputs(model)
    assert decibels(reference, int8) >= 40


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        (lambda x: conv(RELU(x), heavy(3, 3, 4, 8)), {}, "needs data or a plan"),
        (lambda x: conv(RELU(x), per_channel(heavy(3, 3, 4, 8))), {}, "needs data or a plan"),
        (lambda x: conv(RELU(x), heavy(3, 3, 4, 8)) + rounded(x[..., :1], -1.0, 1.0), {}, "of no input of a layer"),
        (network(), {"algorithms": ("bias_correction",)}, "Received: algorithms bias_correction"),
        (network(), {"size_budget": 0.2}, "Received: size_budget"),
    ],
)
def test_refused_without_data(tmp_path, call, options, message):
    with pytest.raises(ConfigError, match=message):
        quantized(tmp_path / "net", call, **options)


def test_options_that_would_change_what_was_learned(tmp_path):
    def call(x):
        return conv(RELU(conv(rounded(x, -3.0, 3.0), per_channel(heavy(3, 3, 4, 8)))), per_channel(heavy(3, 3, 8, 4)))

    model = quantized(tmp_path / "net", call, X, algorithms=("equalization", "bias_correction"), estimator="auto")
    assert model.report.warnings == ("Left out, as they change ranges or weights that were learned: equalization.",)
    assert model.plan.settings["algorithms"] == "bias_correction"
    assert model.plan.tensors["x"].source == "learned"
    assert [edit.op for edit in model.plan.edits] == ["Conv2D", "Conv2D_1"]
    made = stored.dequantized(units(model)["Conv2D"], model.plan)
    assert made == pytest.approx(per_channel(heavy(3, 3, 4, 8)).numpy(), rel=1e-6)
    with pytest.raises(
        ConfigError, match=r"gives weights other bits than they were trained with: leave it out\. Received: size_"
    ):
        tfquant.quantize(str(tmp_path / "net"), X, tfquant.QuantConfig(size_budget=0.2))


# Float parts, plans, modes


def test_a_diagnosis_does_not_blame_the_estimator(tmp_path):
    model = quantized(tmp_path / "net", network())
    found = model.diagnose(3 * X)  # a third of the values is clipped
    assert {layer.inputs[0].source for layer in found.layers} == {"learned"}
    assert max(use.clipped for layer in found.layers for use in layer.inputs) > 0.1
    assert "--estimator" not in str(found)


def test_tuning_returns_to_what_was_trained(tmp_path):
    model = quantized(tmp_path / "net", network())
    ops = tuple(op if op.op == "MatMul" else dataclasses.replace(op, int8=False, reason="tried") for op in model.plan.ops)
    plan = dataclasses.replace(model.plan, ops=ops)
    reverted = model.with_plan(plan)
    assert [unit.name for unit in reverted.annotation.units.values()] == ["matmul"]
    assert len(kept(reverted)) == 4
    reference, simulated, _ = outputs(reverted)
    assert decibels(reference, simulated) >= 60


def test_what_runs_in_float_computes_what_was_trained(tmp_path):
    model = quantized(tmp_path / "net", network(), ignored_scope=["Conv2D_1"])
    assert "the ignored scope names it" in reasons(model)["Conv2D_1"]
    assert len(kept(model)) >= 1
    reference, simulated, _ = outputs(model)
    assert decibels(reference, simulated) >= 40
    everything = quantized(tmp_path / "float", network(), ignored_scope=["Conv2D", "depthwise", "Conv2D_1"])
    assert [decision.name for decision in everything.plan.ops if decision.int8] == ["matmul"]
    reference, simulated, _ = outputs(everything)
    assert decibels(reference, simulated) >= 60


def test_activations_that_stay_float_keep_their_rounding(tmp_path):
    def call(x):
        y = rounded(conv(rounded(x, -3.0, 3.0), per_channel(heavy(3, 3, 4, 8))), -1.0, 1.0)  # most values are clipped
        return conv(rounded(tf.nn.swish(y), -0.3, 1.0), per_channel(heavy(3, 3, 8, 4)))

    model = quantized(tmp_path / "net", call)
    assert [tensor for node in kept(model) for tensor in node.inputs[0].node.name.split()] == ["Conv2D"]
    reference, _, int8 = outputs(model)
    assert decibels(reference, int8) >= 40


@pytest.mark.parametrize("data", [None, X])
def test_a_plan_gives_the_same_bytes(tmp_path, data):
    def call(x):
        y = rounded(tf.nn.swish(rounded(conv(rounded(x, -3.0, 3.0), per_channel(heavy(3, 3, 4, 8))), -4.0, 4.0)), -0.3, 4.0)
        one, other = RELU(conv(y, per_channel(heavy(3, 3, 8, 8)))), conv(y, per_channel(heavy(3, 3, 8, 8, seed=1)))
        return conv(rounded(tf.concat([one, rounded(other, -2.0, 2.0)], 3), -4.0, 4.0), per_channel(heavy(3, 3, 16, 4)))

    model = quantized(tmp_path / "net", call, data)
    model.save(tmp_path / "int8")
    plan = load_plan(tmp_path / "int8" / "quant_plan.json")
    assert {spec.source for spec in plan.tensors.values()} == {"learned"}
    again = tfquant.quantize(str(tmp_path / "net"), plan=plan)
    assert again.graph_def.SerializeToString(deterministic=True) == model.graph_def.SerializeToString(deterministic=True)
    assert again.with_plan(model.plan).graph_def == model.graph_def
    loaded = tf.saved_model.load(str(tmp_path / "int8"))
    assert np.array_equal(loaded.signatures["serving_default"](x=tf.constant(X))["y"], outputs(model)[2])
    other = saved(tmp_path / "other", network())
    with pytest.raises(PlanError, match="belongs to another model"):
        tfquant.quantize(other, plan=plan)


def test_fewer_bits_come_back_from_a_plan(tmp_path):
    model = quantized(tmp_path / "net", network(bits=4, activation_bits=4, narrow=False))
    with pytest.raises(ConfigError, match="no kernels below 8 bits"):
        model.save(tmp_path / "int8")
    model.save(tmp_path / "fakequant", format="fakequant")
    again = tfquant.quantize(str(tmp_path / "net"), plan=tmp_path / "fakequant" / "quant_plan.json")
    assert again.graph_def.SerializeToString(deterministic=True) == model.graph_def.SerializeToString(deterministic=True)
    assert again.report.size_after < 0.2 * model.report.size_before


def test_a_simulation_is_such_a_model(tmp_path):
    """What tfquant writes as `fakequant` gives its own ranges and integers back."""
    plain = saved(tmp_path / "float", lambda x: conv(RELU(conv(x, heavy(3, 3, 4, 8))), heavy(3, 3, 8, 4)))
    model = tfquant.quantize(plain, X, tfquant.QuantConfig(preset="fast", verify=False))
    model.save(tmp_path / "fakequant", format="fakequant")
    again = tfquant.quantize(str(tmp_path / "fakequant"))
    facts = [[(spec.dtype, spec.zero_point) for spec in one.plan.tensors.values()] for one in (model, again)]
    assert facts[0] == facts[1]
    scales = [[spec.scale for spec in one.plan.tensors.values()] for one in (model, again)]
    assert scales[0] == pytest.approx(scales[1], rel=1e-6)
    assert decibels(outputs(model)[2], outputs(again)[2]) >= 60


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_other_modes_leave_activations_rounded(tmp_path, mode):
    model = quantized(tmp_path / "net", network(), mode=mode)
    assert len(kept(model)) == 5
    reference, _, int8 = outputs(model)
    assert decibels(reference, int8) >= 40


# Trained models


class Rounded(keras.layers.Layer):
    """Fake quantization of activations, with a range that the model saves."""

    def __init__(self, low, high):
        super().__init__()
        self.ends = [self.add_weight(shape=(), initializer="zeros", trainable=False, name=name) for name in ("low", "high")]
        self.ends[0].assign(low)
        self.ends[1].assign(high)

    def call(self, x):
        return rounded(x, *(tf.convert_to_tensor(end) for end in self.ends))


class RoundedConv(keras.layers.Conv2D):
    """A convolution whose kernel is fake-quantized per channel at each call."""

    def call(self, x):
        reach = tf.reduce_max(tf.abs(self.kernel), [0, 1, 2])
        kernel = Q.fake_quant_with_min_max_vars_per_channel(self.kernel, -reach, reach, narrow_range=True)
        return tf.nn.conv2d(x, kernel, self.strides, self.padding.upper()) + self.bias


@pytest.fixture(scope="module")
def images():
    x, y, test, labels = digits.load_data()
    return x, y, test, labels


def test_a_keras_model_whose_layers_round(images, tmp_path):
    x, y, test, labels = images
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            Rounded(0.0, 1.0),
            RoundedConv(12, 3, padding="same"),
            layers.BatchNormalization(momentum=0.8),
            layers.ReLU(),
            Rounded(0.0, 4.0),
            RoundedConv(16, 3),
            layers.ReLU(),
            Rounded(0.0, 6.0),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    model.fit(x, y, epochs=4, batch_size=32, verbose=0)
    accuracy = model.evaluate(test, labels, verbose=0)[1]
    assert accuracy > 0.85
    result = tfquant.quantize(model)
    assert {spec.source for spec in result.plan.tensors.values()} == {"learned"}
    assert len([decision for decision in result.plan.ops if decision.int8 and decision.kernel in ("conv2d", "matmul")]) == 3
    reference, simulated, int8 = outputs(result, test)
    for found in (simulated, int8):
        assert (found.argmax(-1) == reference.argmax(-1)).mean() >= 0.99
        assert decibels(reference, found) >= 35
    assert deviations(result, test) == []


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A tf_keras model that tensorflow-model-optimization quantized, trained for some steps, and its SavedModel."""
    tf_keras, tfmot = building.tfmot()
    x, y, _, _ = images
    layers = tf_keras.layers
    tf_keras.utils.set_random_seed(0)
    model = tf_keras.Sequential(
        [
            layers.Conv2D(8, 3, padding="same", use_bias=False, input_shape=(8, 8, 1)),
            layers.BatchNormalization(momentum=0.8),
            layers.ReLU(),
            layers.DepthwiseConv2D(3, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.8),
            layers.ReLU(),
            layers.Conv2D(16, 1),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    model.fit(x, y, epochs=6, batch_size=32, verbose=0)
    model = tfmot.quantize_model(model)
    model.compile("adam", loss)
    model.fit(x, y, epochs=1, batch_size=32, verbose=0)
    folder = tmp_path_factory.mktemp("trained") / "tfmot"
    model.save(folder)
    return model, str(folder)


def test_a_model_of_tensorflow_model_optimization(trained, images):
    test, labels = images[2:]
    for source in trained:
        result = tfquant.quantize(source)
        kernels = {decision.kernel for decision in result.plan.ops if decision.int8}
        assert kernels >= {"conv2d", "depthwise_conv2d", "matmul"}
        assert reasons(result) == {}
        assert {spec.source for spec in result.plan.tensors.values()} == {"learned"}
        assert result.report.warnings == ()
        reference, simulated, int8 = outputs(result, test)
        assert (reference.argmax(-1) == labels).mean() > 0.85
        for found in (simulated, int8):
            assert (found.argmax(-1) == reference.argmax(-1)).mean() >= 0.99
            assert decibels(reference, found) >= 30
    names = [name for name, unit in units(result).items() if unit.weights is not None]
    assert len(names) == 4
    for name in names:  # the integers are those of the training: none is further from the weights than float32 rounds
        unit = units(result)[name]
        steps = np.abs(stored.dequantized(unit, result.plan) - unit.weights) / result.plan.weight_scales[name]
        assert steps.max() < 1e-3


def test_the_command_line(tmp_path, capsys):
    source, output = saved(tmp_path / "net", network()), tmp_path / "int8"

    def run(*words):
        with flagsaver.flagsaver():
            return calibrate.main(calibrate.parse(["calibrate", *map(str, words)])), *capsys.readouterr()

    def served(folder):
        return tf.saved_model.load(str(folder)).signatures["serving_default"](x=tf.constant(X))["y"].numpy()

    code, out, err = run("--saved_model", source, "--output", output)
    assert (code, err.strip()) == (0, "")
    assert "Written to" in out
    assert {spec.source for spec in load_plan(output / "quant_plan.json").tensors.values()} == {"learned"}
    assert decibels(served(source), served(output)) >= 35
    code, _, err = run("--saved_model", source, "--plan", output / "quant_plan.json", "--output", tmp_path / "again")
    assert (code, err.strip()) == (0, "")
    assert np.array_equal(served(tmp_path / "again"), served(output))
    np.savez(tmp_path / "data.npz", x=X)
    code, out, _ = run("--saved_model", source, "--data", tmp_path / "data.npz", "--output", tmp_path / "verified")
    assert code == 0
    assert "Against float32 on 48 calibration samples" in out
    assert np.array_equal(served(tmp_path / "verified"), served(output))
    plain = saved(tmp_path / "plain", lambda x: conv(RELU(x), heavy(3, 3, 4, 8)))
    code, _, err = run("--saved_model", plain, "--output", tmp_path / "none")
    assert code == 2
    assert err.count("\n") == 1
    assert "and for models with fake quantization: give data" in err
    assert not (tmp_path / "none").exists()


# Kernels that pass over fake quantization


def summing(x):
    """A sum of two convolutions that were rounded by themselves; then a result that stays float."""
    x = rounded(x, -3.0, 3.0)
    one = rounded(conv(x, per_channel(heavy(3, 3, 4, 8))), -1.5371, 1.4219)
    other = rounded(conv(x, per_channel(heavy(1, 1, 4, 8, seed=1))), -1.1173, 1.2341)
    both = rounded(RELU(one + other), 0.0, 2.0133)
    return tf.tanh(rounded(conv(both, per_channel(heavy(3, 3, 8, 4))), -1.0, 1.1))


@pytest.mark.parametrize("rounding", ["fused", "all"])
def test_all_that_was_rounded_or_what_kernels_leave(tmp_path, rounding):
    model = quantized(tmp_path / "net", summing, trained_rounding=rounding)
    reference, simulated, int8 = outputs(model)
    is_all = rounding == "all"
    assert len(kept(model)) == (3 if is_all else 1)
    assert sum("add" in unit.match.nodes for unit in units(model).values()) == (0 if is_all else 1)
    # Where all stay, values differ that lie on the edge of a step, and what they are summed into.
    differ = [np.mean(np.abs(found - reference) > 1e-5) for found in (simulated, int8)]
    assert max(differ) <= 0.01 if is_all else min(differ) >= 0.1
    assert deviations(model) == []
    again = tfquant.quantize(str(tmp_path / "net"), plan=model.plan)
    assert np.array_equal(outputs(again)[2], int8)
    # The kernels store what is rounded behind them: nothing is left to do for an op in float.
    model.save(tmp_path / "int8")
    content = tf.saved_model.load(str(tmp_path / "int8")).signatures["serving_default"].graph.as_graph_def()
    ops = [node.op for function in content.library.function for node in function.node_def] + [node.op for node in content.node]
    assert not FAKE_QUANT.intersection(ops)
