"""Diagnosis: figures against NumPy and against simulations of single layers, layers made bad in known ways, the command."""

import dataclasses
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import building
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import flagsaver

import tfquant
from tfquant.diagnosis import Measurement
from tfquant.errors import ConfigError, DataError
from tfquant.plan.edits import apply_edits, uncorrected
from tfquant.plan.serialize import load_plan, save_plan
from tfquant.plan.spec import Scaling, Shift, asymmetric
from tfquant.targets import fakequant, returns_float, weights
from tfquant.verify import decibels

ROOT = Path(__file__).resolve().parent.parent
SIZE = 16


def dense_weights(seed, layers=3):
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(SIZE, SIZE)).astype(np.float32) / 4, rng.normal(size=SIZE).astype(np.float32)) for _ in range(layers)
    ]


def dense_net(layers):
    """A function of ReLU layers "dense_0" ...; the last has none."""

    def net(x):
        for index, (kernel, bias) in enumerate(layers):
            with tf.name_scope(f"dense_{index}"):
                x = tf.nn.bias_add(tf.matmul(x, tf.constant(kernel)), tf.constant(bias))
                x = x if index == len(layers) - 1 else tf.nn.relu(x)
        return x

    return net


def in_batches(x, size=20):
    return [{"x": x[start : start + size]} for start in range(0, len(x), size)]


def diagnosed(planned, batches, **settings):
    """The diagnosis of a plan, with other settings."""
    plan = dataclasses.replace(planned.plan, settings={**planned.plan.settings, **settings})
    planned = dataclasses.replace(planned, plan=plan)
    measurement = Measurement(planned.graph, planned.annotation.units, planned.plan)
    for batch in batches:
        measurement.update(batch)
    return measurement.finish("net", sum(len(next(iter(batch.values()))) for batch in batches))


def diagnose_dense(layers, specs=lambda plan: {}, samples=120, x=None, **options):
    """(diagnosis, plan) of a net of dense layers whose plan has other specs for some tensors."""
    if x is None:
        x = np.random.default_rng(9).normal(size=(samples, SIZE)).astype(np.float32)
    batches = in_batches(x)
    planned = building.plan_for(building.build(dense_net(layers), {"x": (None, SIZE)}), batches, **options)
    plan = dataclasses.replace(planned.plan, tensors={**planned.plan.tensors, **specs(planned.plan)})
    return diagnosed(dataclasses.replace(planned, plan=plan), batches), plan


def sqnr(expected, found):
    noise = ((found.astype(np.float64) - expected) ** 2).sum()
    return 10 * np.log10((expected.astype(np.float64) ** 2).sum() / noise) if noise else np.inf


def rounded(x, spec):
    """Numbers in the steps of a spec, as the definition says."""
    low, high = spec.limits
    return (np.clip(np.rint(x / spec.scale) + spec.zero_point, low, high) - spec.zero_point) * spec.scale


def by_name(diagnosis):
    return {layer.layer: layer for layer in diagnosis.layers}


# -- figures ---------------------------------------------------------------------------------------------------------------
def test_figures_against_numpy():
    """All of a dense layer in the middle, whose input range clips, from the definitions."""
    layers = dense_weights(0)
    x = np.random.default_rng(1).normal(size=(130, SIZE)).astype(np.float32)  # the last batch is smaller
    narrow = {}

    def specs(plan):
        spec = plan.tensors["dense_0/Relu"]
        narrow["dense_0/Relu"] = asymmetric(0.0, 0.6 * spec.high, "mse", spec.group)
        return narrow

    diagnosis, plan = diagnose_dense(layers, specs, x=x)
    values = [x.astype(np.float64)]
    for kernel, bias in layers:
        values.append(values[-1] @ kernel + bias)
        if len(values) <= len(layers):
            values[-1] = np.maximum(values[-1], 0)
    kernel, bias = layers[1]
    scales = plan.weight_scales["dense_1/MatMul"]
    kernel8 = np.clip(np.rint(kernel / scales.astype(np.float64)), -127, 127) * scales
    spec, inner = narrow["dense_0/Relu"], values[1]
    alone = np.maximum(rounded(inner, spec) @ kernel8 + bias, 0)
    by_weights = np.maximum(inner @ kernel8 + bias, 0)
    first, second, third = diagnosis.layers
    assert [layer.name for layer in diagnosis.layers] == [f"dense_{i}/MatMul" for i in range(3)]
    assert second.weight_sqnr == pytest.approx(sqnr(kernel, kernel8), abs=1e-3)
    assert second.output_sqnr == pytest.approx(sqnr(values[2], alone), abs=0.01)
    error = alone - values[2]
    share = ((by_weights - values[2]) ** 2).sum() / (error**2).sum()
    assert second.weight_share == pytest.approx(share, rel=0.01)
    mean_share = len(x) * (error.mean(0) ** 2).sum() / (error**2).sum()
    assert second.mean_share == pytest.approx((mean_share - 1 / len(x)) / (1 - 1 / len(x)), rel=0.01)
    (use,) = second.inputs
    assert (use.tensor, use.source, use.bits, use.low, use.high) == ("dense_0/Relu", "mse", 8, spec.low, spec.high)
    assert (use.seen_low, use.seen_high) == pytest.approx((inner.min(), inner.max()), rel=1e-5)
    outside = inner > spec.high + spec.scale / 2
    assert use.clipped == outside.mean()
    assert use.clipped > 0
    clipping = ((inner - spec.high)[outside] ** 2).sum() / ((rounded(inner, spec) - inner) ** 2).sum()
    assert use.clipping == pytest.approx(clipping, rel=0.01)
    assert use.used == pytest.approx(1.0)
    assert use.channel_use == pytest.approx(np.minimum(inner.max(0) / spec.high, 1).mean(), rel=1e-5)
    # The whole simulation: the first layer's errors reach the second.
    x8 = rounded(x.astype(np.float64), plan.tensors["x"])
    scales = plan.weight_scales["dense_0/MatMul"]
    first8 = np.clip(np.rint(layers[0][0] / scales.astype(np.float64)), -127, 127) * scales
    simulated = np.maximum(x8 @ first8 + layers[0][1], 0)
    assert (first.accumulated_sqnr, first.output_sqnr) == pytest.approx((sqnr(inner, simulated),) * 2, abs=0.01)
    through = np.maximum(rounded(simulated, spec) @ kernel8 + bias, 0)
    assert second.accumulated_sqnr == pytest.approx(sqnr(values[2], through), abs=0.01)
    jump = 10 ** (-sqnr(values[2], through) / 10) - 10 ** (-sqnr(inner, simulated) / 10)
    assert second.jump == pytest.approx(jump, rel=0.01)
    (output,) = diagnosis.outputs
    assert output.sqnr == third.accumulated_sqnr
    assert diagnosis.samples == 130


def convolutions(x):
    """Residuals, a concat of unlike ranges, pooling, a depthwise convolution, float ops between."""
    rng = np.random.default_rng(5)

    def conv(x, channels, name):
        with tf.name_scope(name):
            kernel = rng.normal(size=(3, 3, x.shape[-1], channels)).astype(np.float32) / 5
            return tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, kernel, 1, "SAME"), rng.normal(size=channels).astype(np.float32)))

    one = conv(x, 8, "one")
    with tf.name_scope("add"):
        residual = one + conv(one, 8, "two")
    wide = tf.concat([3 * conv(residual, 4, "three"), tf.nn.max_pool2d(residual, 2, 1, "SAME")], 3, name="join")
    with tf.name_scope("depth"):
        deep = tf.nn.depthwise_conv2d(wide, rng.normal(size=(3, 3, 12, 1)).astype(np.float32), [1, 1, 1, 1], "VALID")
    swish = deep * tf.sigmoid(deep)
    with tf.name_scope("head"):
        flat = tf.reshape(conv(swish, 4, "last"), [-1, 6 * 6 * 4])
        return {"scores": flat @ rng.normal(size=(144, 5)).astype(np.float32), "map": residual}


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_every_layer_is_as_a_simulation_of_it_alone(mode):
    """In a net of residuals and concats: alone is the simulation of a plan with this unit only, accumulated that of all."""
    batches = in_batches(np.random.default_rng(0).normal(size=(10, 8, 8, 3)).astype(np.float32), 5)
    graph = building.build(convolutions, {"x": (None, 8, 8, 3)})
    planned = (building.plan_for if mode == "static" else building.dynamic_plan_for)(graph, batches)
    diagnosis = diagnosed(planned, batches)
    units, plan = planned.annotation.units, planned.plan
    assert len(diagnosis.layers) == len(units) >= (9 if mode == "static" else 1)
    whole = fakequant.lower(graph, units, plan)
    read = {tensor for unit in units.values() for tensor in unit.inputs}

    def value(simulation, unit):
        """What a unit makes there, rounded where no other unit does that."""
        tensor = simulation.tensor(unit.output.name)
        if unit.output not in read and not returns_float(graph, unit, plan):
            tensor = simulation.tensor(f"{unit.output.node.name}/fake_quantize")
        return building.joined(building.run(simulation, batches, {"value": tensor}))["value"]

    for layer, (root, unit) in zip(diagnosis.layers, units.items(), strict=True):
        expected = building.joined(building.run(graph, batches, {"value": unit.output}))["value"]
        assert layer.accumulated_sqnr == pytest.approx(sqnr(expected, value(whole, unit)), abs=0.02), layer.name
        single = fakequant.lower(graph, {root: unit}, plan)
        assert layer.output_sqnr == pytest.approx(sqnr(expected, value(single, unit)), abs=0.02), layer.name
    if mode == "static":
        layers = {layer.layer: layer for layer in diagnosis.layers if not layer.moves}
        noise = {name: 10 ** (-layer.accumulated_sqnr / 10) for name, layer in layers.items()}
        assert layers["head/last"].jump == pytest.approx(max(0, noise["head/last"] - noise["depth"]), rel=1e-6)  # behind a swish
        assert layers["one"].jump == pytest.approx(noise["one"], rel=1e-6)
    simulated = building.joined(building.run(whole, batches))
    floats = building.joined(building.run(graph, batches))
    for output in diagnosis.outputs:
        assert output.sqnr == pytest.approx(sqnr(floats[output.name], simulated[output.name]), abs=0.02)
    assert {output.name for output in diagnosis.outputs} == {"scores", "map"}
    moved = {layer.kernel for layer in diagnosis.layers if layer.moves}
    assert moved == ({"max_pool", "move"} if mode == "static" else set())
    assert not {layer.kernel for layer in diagnosis.worst(100)} & moved


def test_batches_add_up():
    layers = dense_weights(2)
    x = np.random.default_rng(3).normal(size=(60, SIZE)).astype(np.float32)
    graph = building.build(dense_net(layers), {"x": (None, SIZE)})
    planned = building.plan_for(graph, in_batches(x))
    one, many = (diagnosed(planned, in_batches(x, size)) for size in (60, 7))
    for whole, parts in zip(one.layers, many.layers, strict=True):
        for field in ("output_sqnr", "weight_share", "mean_share", "accumulated_sqnr", "jump"):
            assert getattr(whole, field) == pytest.approx(getattr(parts, field), rel=1e-5, abs=1e-9)
        assert whole.inputs[0].clipped == parts.inputs[0].clipped


def test_outputs_that_are_not_finite_count_where_they_are():
    layers = dense_weights(15)
    mask = np.ones(SIZE, np.float32)
    mask[::3] = 0

    def net(x):
        return dense_net(layers)(x) / mask

    batches = in_batches(np.random.default_rng(3).normal(size=(40, SIZE)).astype(np.float32))
    planned = building.plan_for(building.build(net, {"x": (None, SIZE)}), batches)
    (output,) = diagnosed(planned, batches).outputs
    simulation = fakequant.lower(planned.graph, planned.annotation.units, planned.plan)
    expected, found = (building.joined(building.run(side, batches))["output_0"] for side in (planned.graph, simulation))
    assert np.isinf(expected[:, ::3]).all()
    assert output.sqnr == pytest.approx(sqnr(expected[:, mask > 0], found[:, mask > 0]), abs=0.02)
    assert decibels(1.0, math.inf) == -math.inf


# -- layers made bad in known ways -------------------------------------------------------------------------------------------
def test_a_good_net_has_no_alarm():
    diagnosis, _ = diagnose_dense(dense_weights(4))
    assert diagnosis.alarms == ()
    assert min(layer.output_sqnr for layer in diagnosis.layers) > 30
    assert "No layer is below 20 dB by itself" in str(diagnosis)
    advice = {layer.advice.kind for layer in diagnosis.layers if layer.advice is not None}
    assert advice <= {"adaround", "bias_correction"}  # whose errors are those of any rounding


def test_an_outlier_in_weights_with_one_scale():
    layers = dense_weights(6)
    layers[1][0][3, 5] = 40.0  # the others are about 0.25
    diagnosis, plan = diagnose_dense(layers, weights="per_tensor")
    worst = diagnosis.worst()[0]
    assert (worst.layer, worst.advice.kind) == ("dense_1", "per_channel")
    kernel = layers[1][0].astype(np.float64)
    step = 40.0 / 127
    one_scale = sqnr(kernel, np.rint(kernel / step) * step)
    own = np.abs(kernel).max(0) / 127
    per_channel = sqnr(kernel, np.rint(kernel / own) * own)
    assert plan.weight_scales["dense_1/MatMul"] == pytest.approx(np.full(SIZE, step))
    assert worst.weight_sqnr == pytest.approx(one_scale, abs=0.01)
    assert f"{one_scale:.1f} dB, with a scale per channel {per_channel:.1f} dB" in worst.advice.text
    assert "--weights per_channel" in worst.advice.text
    assert worst.weight_share > 0.9
    # The remedy is one.
    better, _ = diagnose_dense(layers)
    assert by_name(better)["dense_1"].weight_sqnr == pytest.approx(per_channel, abs=0.01)
    assert better.alarms == ()


def test_a_range_that_clips():
    layers = dense_weights(7)

    def specs(plan):
        spec = plan.tensors["dense_0/Relu"]
        return {"dense_0/Relu": asymmetric(0.0, 0.25 * spec.high, "percentile", spec.group)}

    diagnosis, _ = diagnose_dense(layers, specs)
    worst = diagnosis.worst()[0]
    assert (worst.layer, worst.advice.kind) == ("dense_1", "estimator")
    assert "--estimator minmax" in worst.advice.text
    assert f"{worst.clipped:.2%} of its input dense_0/Relu" in worst.advice.text
    assert [layer.layer for layer in diagnosis.alarms] == ["dense_1"]
    assert diagnosis.jumps()[0].layer == "dense_1"
    assert "Below 20 dB by themselves: dense_1" in str(diagnosis)


def test_a_range_far_too_wide():
    def specs(plan):
        spec = plan.tensors["dense_0/Relu"]
        return {"dense_0/Relu": asymmetric(0.0, 50 * spec.high, "minmax", spec.group)}

    diagnosis, _ = diagnose_dense(dense_weights(7), specs)
    worst = diagnosis.worst()[0]
    assert (worst.layer, worst.advice.kind) == ("dense_1", "estimator")
    assert worst.used == pytest.approx(0.02, rel=0.01)
    assert "--estimator mse" in worst.advice.text


@pytest.mark.parametrize(("factor", "source"), [(0.25, "minmax"), (50, "mse"), (50, "entropy")])
def test_a_range_that_no_estimator_would_mend(factor, source):
    """The least and the largest value of other data than these, or what clips already."""

    def specs(plan):
        spec = plan.tensors["dense_0/Relu"]
        return {"dense_0/Relu": asymmetric(0.0, factor * spec.high, source, spec.group)}

    diagnosis, _ = diagnose_dense(dense_weights(7), specs)
    advice = diagnosis.worst()[0].advice
    assert advice.kind == "data"
    assert advice.text.endswith(": calibrate with more samples like these")


def test_a_shift_of_the_mean():
    """All weights of the layer are rounded down by 0.4 steps, and all that it reads is near 5: the error is nearly a constant."""
    layers = dense_weights(8)
    layers[0] = (layers[0][0] / 20, np.full(SIZE, 5.0, np.float32))
    steps = np.random.default_rng(0).integers(-100, 100, size=(SIZE, SIZE)) + 0.4
    steps[0] = 127
    kernel = (steps / 127).astype(np.float32)
    layers[1] = (kernel, 2 - 5 * kernel.sum(0))
    diagnosis, _ = diagnose_dense(layers)
    worst = diagnosis.worst()[0]
    assert (worst.layer, worst.advice.kind) == ("dense_1", "bias_correction")
    assert worst.mean_share > 0.95
    reason = f"{worst.mean_share:.0%} of its error is a shift of the channels' means"
    assert worst.advice.text == f"{reason}: bias_correction, which --preset default has"
    shift = 0.4 / 127 * 5 * (SIZE - 1)
    x = np.random.default_rng(9).normal(size=(120, SIZE)).astype(np.float32)
    output = np.maximum(np.maximum(x @ layers[0][0] + 5, 0) @ kernel + layers[1][1], 0)
    assert worst.output_sqnr == pytest.approx(10 * np.log10((output**2).mean() / shift**2), abs=0.3)
    # What the plan was made with is no advice.
    planned = building.plan_for(building.build(dense_net(layers), {"x": (None, SIZE)}), in_batches(x))
    again = diagnosed(planned, in_batches(x), algorithms="equalization,bias_correction")
    assert again.worst()[0].advice.kind == "adaround"


def test_uneven_channels():
    """One channel is a hundred times as large as the others, whose weights bring them back: they get a few steps."""
    layers = dense_weights(10)
    factors = np.ones(SIZE, np.float32)
    factors[2] = 200.0
    layers[0] = (layers[0][0] * factors, np.abs(layers[0][1]) * factors)
    layers[1] = (layers[1][0] / factors[:, None], layers[1][1])
    diagnosis, _ = diagnose_dense(layers)
    worst = diagnosis.worst()[0]
    assert (worst.layer, worst.advice.kind) == ("dense_1", "smooth_quant")
    assert worst.inputs[0].channel_use < 0.1
    assert "fill" in worst.advice.text


def test_fewer_bits():
    layers = dense_weights(11)
    x = np.random.default_rng(9).normal(size=(120, SIZE)).astype(np.float32)
    planned = building.plan_for(building.build(dense_net(layers), {"x": (None, SIZE)}), in_batches(x))
    name = "dense_2/MatMul"
    few = np.full(SIZE, 3, np.int8)
    scales = {**planned.plan.weight_scales, name: planned.plan.weight_scales[name] * np.float32(127 / 3)}
    plan = dataclasses.replace(planned.plan, weight_scales=scales, weight_bits={name: few})
    worst = diagnosed(dataclasses.replace(planned, plan=plan), in_batches(x)).worst()[0]
    assert (worst.name, worst.advice.kind) == (name, "bits")
    assert "its weights have 3 bits" in worst.advice.text
    unit = next(unit for unit in planned.annotation.units.values() if unit.name == name)
    assert worst.weight_sqnr == pytest.approx(sqnr(layers[2][0], weights.dequantized(unit, plan)), abs=1e-3)
    assert worst.weight_sqnr < 15


def test_what_only_enlarges_errors_is_told_so():
    """The mean is nearly all of what the first layer makes; the second takes differences, of which the errors are most."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(SIZE, SIZE)).astype(np.float32)
    differences = np.eye(SIZE, dtype=np.float32) - np.roll(np.eye(SIZE, dtype=np.float32), 1, 0)
    layers = [(kernel, np.full(SIZE, 300.0, np.float32)), (differences, np.zeros(SIZE, np.float32))]
    diagnosis, _ = diagnose_dense(layers, lambda plan: {"x": asymmetric(-0.5, 0.5, "user", "x")})
    first, second = diagnosis.layers
    assert first.output_sqnr > 35
    assert second.output_sqnr > second.accumulated_sqnr + 6
    assert second.amplifies
    assert not first.amplifies
    assert diagnosis.jumps()[0] == second
    assert "  dense_1: the own error is small: the layer, or float ops in front of it, enlarges that of the layers" in str(
        diagnosis
    )


# -- corrected plans ---------------------------------------------------------------------------------------------------------
def test_the_float_model_is_that_without_corrections():
    layers = dense_weights(12)
    x = np.random.default_rng(9).normal(size=(40, SIZE)).astype(np.float32)
    graph = building.build(dense_net(layers), {"x": (None, SIZE)})
    building.simplify(graph)
    values = np.linspace(0.5, 1.5, SIZE).astype(np.float32)
    factors = np.linspace(0.5, 2, SIZE).astype(np.float32)
    edits = (
        Shift("dense_1/MatMul", values, corrects=True),
        Scaling(("dense_1/MatMul",), ("dense_2/MatMul",), factors),
        Shift("dense_2/MatMul", -values),
    )
    expected = building.joined(building.run(graph, in_batches(x)))["output_0"]
    apply_edits(graph, edits)
    restored = building.joined(building.run(uncorrected(graph, edits), in_batches(x)))["output_0"]
    np.testing.assert_allclose(restored, expected - values, rtol=1e-4, atol=1e-4)
    planned = building.plan_for(graph, in_batches(x))
    plan = dataclasses.replace(planned.plan, edits=edits)
    diagnosis = diagnosed(dataclasses.replace(planned, plan=plan), in_batches(x))
    simulated = building.joined(building.run(fakequant.lower(graph, planned.annotation.units, plan), in_batches(x)))["output_0"]
    (output,) = diagnosis.outputs
    assert output.sqnr == pytest.approx(sqnr(expected - values, simulated), abs=0.05)
    assert output.sqnr < 25  # the shift is no correction at all
    second = by_name(diagnosis)["dense_1"]
    assert second.mean_share > 0.5
    # With a shift that is part of the float model all is as good as without.
    plan = dataclasses.replace(plan, edits=(Shift("dense_1/MatMul", values), *edits[1:]))
    assert diagnosed(dataclasses.replace(planned, plan=plan), in_batches(x)).alarms == ()


def test_corrections_survive_saving(tmp_path):
    layers = dense_weights(12)
    x = np.random.default_rng(9).normal(size=(40, SIZE)).astype(np.float32)
    planned = building.plan_for(building.build(dense_net(layers), {"x": (None, SIZE)}), in_batches(x))
    values = np.ones(SIZE, np.float32)
    edits = (Shift("dense_1/MatMul", values, corrects=True), Shift("dense_2/MatMul", values))
    save_plan(dataclasses.replace(planned.plan, edits=edits), tmp_path)
    found = load_plan(tmp_path).edits
    assert [(edit.op, edit.corrects) for edit in found] == [("dense_1/MatMul", True), ("dense_2/MatMul", False)]


# -- what it says ------------------------------------------------------------------------------------------------------------
def test_json_and_text():
    diagnosis, _ = diagnose_dense(dense_weights(13))
    content = json.loads(json.dumps(diagnosis.to_json(), allow_nan=False))
    assert content["samples"] == 120
    assert [layer["name"] for layer in content["layers"]] == [layer.name for layer in diagnosis.layers]
    assert content["layers"][1]["inputs"][0]["tensor"] == "dense_0/Relu"
    assert content["worst"] == [layer.name for layer in diagnosis.worst()]
    lines = str(diagnosis).splitlines()
    assert lines[0] == "Diagnosis of net on 120 samples: 3 layers in 8 bits"
    rows = [line for line in lines if line.startswith("dense_")]
    assert len(rows) == 3 + len(diagnosis.jumps())
    worst = diagnosis.worst()[0]
    cells = [cell.strip() for cell in rows[0].split("|")]
    assert cells[:3] == [worst.layer, f"{worst.weight_sqnr:.1f}", f"{worst.output_sqnr:.1f}"]
    assert len([line for line in diagnosis.lines(1) if line.startswith("dense_")]) == 2


def test_what_has_no_error_is_null_in_json():
    layers = dense_weights(1)
    diagnosis, _ = diagnose_dense([(127 * np.eye(SIZE, dtype=np.float32), np.zeros(SIZE, np.float32)), *layers])
    first = diagnosis.layers[0]
    assert first.weight_sqnr == math.inf
    assert diagnosis.to_json()["layers"][0]["weight_sqnr"] is None
    assert "exact" in str(diagnosis)


def test_data_that_make_infinity_are_refused():
    layers = dense_weights(14)
    x = np.random.default_rng(9).normal(size=(40, SIZE)).astype(np.float32)
    planned = building.plan_for(building.build(dense_net(layers), {"x": (None, SIZE)}), in_batches(x))
    measurement = Measurement(planned.graph, planned.annotation.units, planned.plan)
    with pytest.raises(DataError, match=r"has no samples"):
        measurement.finish("net", 0)
    with pytest.raises(DataError, match="computes NaN or infinity from this data, first seen at dense_0"):
        measurement.update({"x": np.full((2, SIZE), np.inf, np.float32)})


# -- the product -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def product(tmp_path_factory):
    """A folder with model (a SavedModel) and data.npz."""
    import keras

    folder = tmp_path_factory.mktemp("diagnosis")
    keras.utils.set_random_seed(3)
    layers = [
        keras.Input((8, 8, 3), name="image"),
        keras.layers.Conv2D(8, 3, activation="relu", name="first"),
        keras.layers.Conv2D(8, 3, activation="relu", name="second"),
        keras.layers.Flatten(name="flatten"),
        keras.layers.Dense(5, name="head"),
    ]
    keras.Sequential(layers, name="net").export(folder / "model", verbose=False)
    np.savez(folder / "data.npz", image=np.random.default_rng(0).normal(size=(30, 8, 8, 3)).astype(np.float32))
    return folder


def data_of(folder):
    with np.load(folder / "data.npz") as file:
        return dict(file)


def test_in_python(product, tmp_path):
    config = tfquant.QuantConfig(placement="int8", verify=False)
    result = tfquant.quantize(str(product / "model"), data_of(product), config)
    diagnosis = result.diagnose(data_of(product))
    assert isinstance(diagnosis, tfquant.Diagnosis)
    assert [layer.layer.rpartition("/")[2] for layer in diagnosis.layers if not layer.moves] == ["first", "second", "head"]
    assert diagnosis.samples == 30
    float_model, simulation = result.float_function(), result.simulation()
    expected, found = (np.concatenate(list(run(data_of(product)).values())) for run in (float_model, simulation))
    assert diagnosis.outputs[0].sqnr == pytest.approx(sqnr(expected, found), abs=0.02)
    again = tfquant.diagnose(str(product / "model"), data_of(product), config)
    assert [layer.output_sqnr for layer in again.layers] == pytest.approx([layer.output_sqnr for layer in diagnosis.layers])
    few = tfquant.diagnose(str(product / "model"), data_of(product), tfquant.QuantConfig(subset_size=7), plan=result.plan)
    assert few.samples == 7
    assert few.layers[0].output_sqnr != diagnosis.layers[0].output_sqnr
    with pytest.raises(ConfigError, match="in the mode weight_only they compute in float"):
        tfquant.diagnose(str(product / "model"), data_of(product), tfquant.QuantConfig(mode="weight_only"))


def test_importing_the_command_leaves_the_function():
    command = importlib.import_module("tfquant.diagnose")
    assert tfquant.diagnose is importlib.import_module("tfquant.pipeline").diagnose
    assert command.main is not None
    from tfquant import diagnose

    assert diagnose is tfquant.diagnose


def run(arguments, folder):
    command = [sys.executable, "-m", "tfquant.diagnose", *map(str, arguments)]
    environment = {**building.os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.mark.slow
def test_the_command_finds_a_range_that_was_edited(product, tmp_path):
    config = tfquant.QuantConfig(placement="int8", verify=False)
    tfquant.quantize(str(product / "model"), data_of(product), config).save(tmp_path / "int8")
    path = tmp_path / "int8" / "quant_plan.json"
    plan = json.loads(path.read_text())
    name = next(name for name in plan["tensors"] if "first" in name)
    plan["tensors"][name]["max"] /= 8
    path.write_text(json.dumps(plan))
    arguments = ["--saved_model", product / "model", "--data", product / "data.npz", "--plan", path, "--json", "out.json"]
    done = run([*arguments, "--worst", "2"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["worst"][0] == content["alarms"][0]
    (worst,) = [layer for layer in content["layers"] if layer["name"] == content["worst"][0]]
    assert worst["layer"].endswith("second")
    assert worst["advice"]["kind"] == "estimator"
    assert worst["inputs"][0]["source"] == "user"
    assert worst["inputs"][0]["clipped"] > 0.1
    assert worst["output_sqnr"] < 20
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Diagnosis of ")
    assert lines[-1] == f"Below 20 dB by themselves: {worst['layer']}"
    assert sum("|" in line for line in lines) == 3 + 3 + 2  # two tables of two layers, one of an output


def main(*words):
    command = importlib.import_module("tfquant.diagnose")
    saved = flagsaver.save_flag_values(command.FLAGS)
    try:
        return command.main(command.parse(["diagnose", *map(str, words)]))
    except SystemExit as error:
        return error.code
    finally:
        flagsaver.restore_flag_values(saved, command.FLAGS)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "--saved_model is missing: see --help."),
        (["--saved_model=model"], "--data is missing: see --help."),
        (
            ["--saved_model=model", "--data=data.npz", "--json=no/where.json"],
            "--json names a file in a folder that does not exist",
        ),
        (
            ["--saved_model=model", "--data=data.npz", "--mode=weight_only"],
            "Layers are diagnosed in the modes static and dynamic",
        ),
        (["--saved_model=model", "--data=nothing.npz"], "nothing.npz"),
        (["--saved_model=nowhere", "--data=data.npz"], "nowhere"),
        (["--saved_model=model", "--data=data.npz", "--plan=none.json"], "There is no plan at none.json"),
        (["--saved_model=model", "--data=data.npz", "more"], "Every argument is a --flag. Received: more"),
        (["--worst=0"], "flag --worst=0: 0 is not"),
        (["--output=x"], "Unknown command line flag 'output'"),
    ],
)
def test_bad_input_is_one_line(product, monkeypatch, capsys, words, line):
    monkeypatch.chdir(product)
    assert main(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tfquant.diagnose: ")
    assert err.count("\n") == 1
    assert line in err


def test_help_lists_its_own_flags(capsys):
    assert main("--help") == 0
    out = capsys.readouterr().out
    for flag in ("--saved_model:", "--data:", "--plan:", "--ignored_scope:", "--json:", "--worst:"):
        assert flag in out
    assert "--output:" not in out
    assert "what is diagnosed" in out


def test_flags_of_the_job_count(product, monkeypatch, tmp_path, capsys):
    (tmp_path / "job.yaml").write_text(
        f"saved_model: {product / 'model'}\ndata: {product / 'data.npz'}\nquantization: {{mode: weight_only}}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main("--config=job.yaml") == 2
    assert "Received: weight_only" in capsys.readouterr().err
    assert main("--config=job.yaml", "--mode=dynamic", "--subset_size=5") == 0
    assert capsys.readouterr().out.startswith("Diagnosis of ")
