"""Tests of the tuner: on nets whose layers are made to need float, and on what users do wrong."""

import contextlib
import dataclasses
import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import flagsaver

import tfquant
from tfquant import registry
from tfquant.errors import ConfigError, DataError, PlanError
from tfquant.pipeline import decided
from tfquant.plan.edits import bias_of
from tfquant.plan.serialize import load_plan
from tfquant.plan.spec import Shift
from tfquant.tuner import METRICS, Goal, Latency, Validation
from tfquant.tuner.journal import Journal
from tfquant.tuner.predicting import Predictor
from tfquant.tuner.reverting import Reverter, find_groups
from tfquant.tuner.sensitivity import measure

ROOT = Path(__file__).resolve().parent.parent
CONFIG = tfquant.QuantConfig(verify=False, placement="int8", preset="fast")
WIDTH, CLASSES, DEPTH = 32, 10, 7


def layer(inputs, outputs, rng, outlier=0.0):
    """(weights, bias) of a layer that ignores channel 0 of its input; its own channel 0 is the constant `outlier`, if not 0."""
    weights = rng.normal(0, (2 / inputs) ** 0.5, (inputs, outputs)).astype(np.float32)
    weights[0] = 0
    bias = rng.normal(0, 0.1, outputs).astype(np.float32)
    if outlier:
        weights[:, 0], bias[0] = 0, outlier
    return weights, bias


def dense(x, name, weights, bias):
    with tf.name_scope(name):
        return tf.nn.bias_add(tf.matmul(x, weights), bias)


def chain(outliers):
    """Seven dense layers and a softmax over classes that are about alike in number.

    Args:
        outliers: by the number of a layer, a constant in its input that takes most of the range.
    """
    rng = np.random.default_rng(0)
    widths = [16, *[WIDTH] * (DEPTH - 1), CLASSES]
    layers = [layer(widths[i], widths[i + 1], rng, outliers.get(i + 2, 0.0)) for i in range(DEPTH)]
    x = samples(1000, 9)
    for weights, bias in layers[:-1]:
        x = np.maximum(x @ weights + bias, 0)
    weights, _ = layers[-1]
    logits = x @ weights
    layers[-1] = 4 * weights / logits.std(0), -4 * logits.mean(0) / logits.std(0)

    def network(x):
        for index, (weights, bias) in enumerate(layers, 1):
            x = dense(x, f"dense{index}", weights, bias)
            x = tf.nn.relu(x) if index < DEPTH else tf.nn.softmax(x)
        return {"y": x}

    return network


def saved(folder, network, width=16):
    module = tf.Module()
    spec = tf.TensorSpec((None, width), tf.float32, name="x")
    module.serve = tf.function(network, input_signature=[spec], autograph=False)
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve})
    return folder


def samples(count, seed, width=16):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, data for calibration, and for validation with the float model's own classes as labels."""
    folder = tmp_path_factory.mktemp("tuner")
    model = saved(folder / "chain", chain({4: 100.0, 6: 100.0}))
    np.savez(folder / "data.npz", x=samples(100, 1))
    x = samples(500, 2)
    y = tf.saved_model.load(str(model)).serve(x)["y"].numpy()
    np.savez(folder / "validation.npz", x=x, labels=y.argmax(-1))
    return folder


@pytest.fixture(scope="module")
def data():
    return samples(100, 1)


def tune(folder, data, evaluate=None, model="chain", **options):
    evaluate = evaluate or Validation(folder / "validation.npz")
    options = {"max_drop": 10.0, "drop_type": "absolute", "config": CONFIG} | options
    return tfquant.tune(folder / model, data, evaluate, **options)


def reverted(result):
    return sorted(op.partition("/")[0] for op in result.best.reverted)


@pytest.fixture(scope="module")
def plain(folder, data):
    return tune(folder, data)


# -- the goal is met -------------------------------------------------------------------------------------------------------
def test_the_layers_that_need_float_are_found(plain, folder, data):
    assert (plain.met, reverted(plain), plain.best.float_ops) == (True, ["dense4", "dense6"], 2)
    assert plain.float_value == 100.0
    assert plain.trials[0].value < 75
    assert not plain.trials[0].met
    assert plain.value >= 90.0
    assert plain.stopped == "the goal is met"
    # The model is the one that was measured.
    with np.load(folder / "validation.npz") as archive:
        x, labels = archive["x"], archive["labels"]
    assert 100 * (plain.model(x)["y"].numpy().argmax(-1) == labels).mean() == pytest.approx(plain.value)
    reasons = {decision.name: decision.reason for decision in plain.model.plan.ops if not decision.int8}
    assert all(reasons[op].startswith("reverted by tuning: in float since trial") for op in plain.best.reverted)
    assert not any(name.startswith(("dense4", "dense6")) for name in plain.model.plan.weight_scales)


def test_the_order_of_the_graph_needs_more_ops_in_float(plain, folder, data):
    basic = tune(folder, data, strategy="basic")
    assert basic.met
    assert reverted(basic) == [f"dense{index}" for index in range(1, 7)]
    assert plain.best.float_ops < basic.best.float_ops


@pytest.mark.parametrize("strategy", ["mse", "hawq"])
def test_other_rankings_find_the_layers_too(strategy, folder, data):
    found = tune(folder, data, strategy=strategy)
    assert (found.met, reverted(found)) == (True, ["dense4", "dense6"])
    assert [trial.float_ops for trial in found.trials] == [0, 1, 2]


def test_bayesian_search(folder, data):
    pytest.importorskip("optuna")
    found = tune(folder, data, strategy="bayesian", max_trials=12)
    assert found.met
    assert found.best.float_ops <= 3
    again = tune(folder, data, strategy="bayesian", max_trials=12)
    assert [trial.reverted for trial in again.trials] == [trial.reverted for trial in found.trials]


def test_bayesian_search_without_optuna(folder, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"needs Optuna: pip install 'tfquant\[tune\]'"):
        tune(folder, data, strategy="bayesian")


def test_an_easy_goal_needs_one_trial(folder, data):
    found = tune(folder, data, max_drop=100.0)
    assert (found.met, len(found.trials), found.best.float_ops) == (True, 1, 0)
    assert all(decision.int8 for decision in found.model.plan.ops if decision.op == "MatMul")


def test_a_strategy_of_ones_own(folder, data):
    def last_two(search):
        return f"value {search.trial(search.ops[-2:], 'the last two').value:.1f}"

    found = tune(folder, data, strategy=last_two)
    assert (found.met, reverted(found), found.strategy) == (False, ["dense6", "dense7"], "last_two")
    assert found.stopped == f"value {found.trials[1].value:.1f}"


# -- evaluate --------------------------------------------------------------------------------------------------------------
def test_evaluate_as_a_function(folder, data):
    with np.load(folder / "validation.npz") as archive:
        x, labels = archive["x"], archive["labels"]
    seen = []

    def accuracy(model):
        outputs = [model({"x": x[:200]}), model(x[200:])]
        seen.append([type(output) for output in outputs])
        return (np.concatenate(outputs).argmax(-1) == labels).mean()

    found = tune(folder, data, accuracy, max_drop=0.1, drop_type="relative")
    assert (found.met, reverted(found)) == (True, ["dense4", "dense6"])
    assert seen == [[np.ndarray] * 2] * len(seen)
    # The float model, the samples to rank on, and each trial.
    assert len(seen) == 2 + len(found.trials)


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        (lambda model: 0.0, "value is 0, of which no share can be allowed"),
        (lambda model: "good", "evaluate must return a number, higher is better. Received: 'good'"),
        (lambda model: float("nan"), "finite number for the float model"),
        (lambda model: model({"y": samples(4, 0)}), r"must call the model with \{'x': array\}. Received: 'y'"),
        (7, "evaluate must be a function of a model that returns a number. Received: int"),
    ],
)
def test_bad_evaluate(evaluate, words, folder, data):
    with pytest.raises((ConfigError, DataError), match=words):
        tune(folder, data, evaluate, max_drop=0.1, drop_type="relative")


def test_a_trial_whose_value_is_nan_is_the_worst(folder, data):
    values = iter([1.0, float("nan"), 0.5])
    found = tune(folder, data, lambda model: next(values), max_drop=0.1, strategy=lambda s: s.trial(s.ops[:1], "one").step)
    assert [trial.value for trial in found.trials] == [-np.inf, 0.5]
    assert json.loads(found.to_json())["trials"][0]["value"] is None
    assert found.best.number == 2


@pytest.mark.parametrize("kind", ["npz", "arrays", "function", "samples", "named"])
def test_kinds_of_validation_data(kind, folder, data):
    with np.load(folder / "validation.npz") as archive:
        x, labels = archive["x"], archive["labels"]
    kinds = {
        "npz": folder / "validation.npz",
        "arrays": (x, labels),
        "function": lambda: ((x[start : start + 70], labels[start : start + 70]) for start in range(0, 500, 70)),
        "samples": lambda: zip(x, labels, strict=True),
        "named": lambda: [({"x": x}, np.eye(CLASSES)[labels])],
    }
    full = tfquant.quantize(folder / "chain", data, CONFIG)
    validation = Validation(kinds[kind], "top1")
    validation.bind(full, CONFIG)
    found = validation(Predictor(full.int8_function(), full.input_names))
    assert found == pytest.approx(100 * (full(x)["y"].numpy().argmax(-1) == labels).mean())
    assert sum(len(y) for _, y in validation.samples()) == 500


def test_metrics():
    outputs = np.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], np.float32)
    assert METRICS.get("top1")(outputs, np.array([1, 1, 2])).tolist() == [100, 0, 100]
    assert METRICS.get("top1")(outputs, np.eye(3)[[1, 1, 2]]).tolist() == [100, 0, 100]
    wide = np.tile(np.arange(8.0), (2, 1))
    assert METRICS.get("top5")(wide, np.array([3, 2])).tolist() == [100, 0]
    assert METRICS.get("binary_accuracy")(np.array([[0.9], [0.4]]), np.array([1, 1])).tolist() == [100, 0]
    assert METRICS.get("mse")(np.array([[1.0, 3.0]]), np.array([[1.0, 1.0]])).tolist() == [-2]
    assert METRICS.get("mae")(np.array([1.0, 3.0]), np.array([1.0, 1.0])).tolist() == [0, -2]
    with pytest.raises(DataError, match=r"labels of 0 to 2, the model's classes. Received: 1 to 3"):
        METRICS.get("top1")(outputs, np.array([1, 1, 3]))
    with pytest.raises(DataError, match=r"models of one output: use one of your own. Received: a, b"):
        METRICS.get("mse")({"a": outputs, "b": outputs}, outputs)


def test_a_metric_of_all_samples(folder, data):
    calls = []

    def correlation(outputs, labels):
        calls.append(len(labels))
        return np.corrcoef(outputs.argmax(-1), labels)[0, 1]

    full = tfquant.quantize(folder / "chain", data, CONFIG)
    validation = Validation(folder / "validation.npz", correlation)
    validation.bind(full, CONFIG)
    assert validation(Predictor(full.float_function(), full.input_names)) == pytest.approx(1.0)
    assert calls == [32, 500]


# -- goals that cannot be met, budgets -------------------------------------------------------------------------------------
def test_a_goal_that_nothing_meets(folder, data):
    calls = iter(range(100))
    x = samples(100, 3)
    reference = tf.saved_model.load(str(folder / "chain")).serve(x)["y"].numpy()

    def evaluate(model):
        error = np.square(model(x) - reference).mean()
        return 1.0 if next(calls) == 0 else 0.5 - error  # nobody is as good as the float model

    found = tune(folder, data, evaluate, max_drop=0.1)
    assert (found.met, found.stopped) == (False, "nothing that is left gains anything")
    assert found.value == max(trial.value for trial in found.trials)
    assert {"dense4", "dense6"} <= set(reverted(found))
    assert "Goal missed: 0.5 against 1 in float32" in str(found)


def test_budget_of_trials(plain, folder, data):
    found = tune(folder, data, max_trials=2)
    assert (found.met, len(found.trials)) == (False, 2)
    assert found.stopped == "the budget of 2 trials is spent"
    assert found.best == max(found.trials, key=lambda trial: trial.value)
    assert [trial.reverted for trial in found.trials] == [trial.reverted for trial in plain.trials[:2]]


def test_budget_of_seconds(folder, data):
    found = tune(folder, data, max_seconds=1e-9)
    assert (found.met, len(found.trials), found.stopped) == (False, 1, "the budget of 1e-09 seconds is spent")


def test_the_drop():
    absolute, relative = Goal(80.0, 0.5, "absolute"), Goal(-0.2, 0.5, "relative")
    assert (absolute.least, absolute.drop(79.0)) == (79.5, 1.0)
    assert [absolute.is_met(value) for value in (79.5, 79.49, 81.0)] == [True, False, True]
    assert relative.least == pytest.approx(-0.3)
    assert relative.drop(-0.3) == pytest.approx(0.5)
    assert [relative.is_met(value) for value in (-0.3, -0.31, 0.0)] == [True, False, True]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_drop": -1}, "max_drop must be a number of at least 0. Received: -1"),
        ({"max_drop": float("nan")}, "max_drop must be a number of at least 0. Received: nan"),
        ({"max_drop": 1.0, "drop_type": "relative"}, "0.01 is one percent. Received: 1.0"),
        ({"drop_type": "percent"}, "drop_type must be one of absolute, relative. Received: 'percent'"),
        ({"strategy": "best"}, "strategy must be one of accuracy_aware, basic, mse, hawq, bayesian. Received: 'best'"),
        ({"objective": "speed"}, "objective must be one of accuracy, latency, size. Received: 'speed'"),
        ({"max_trials": 0}, "max_trials must be a whole number of at least 1. Received: 0"),
        ({"max_seconds": 0}, "max_seconds must be a number above 0. Received: 0"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        tfquant.tune("nowhere", None, lambda model: 1.0, **options)


# -- objectives ------------------------------------------------------------------------------------------------------------
def test_the_fastest(plain, folder, data):
    """A timer that finds dense2 slow in INT8 and dense4 slow in float."""
    base = {f"dense{index}": (1.0, 2.0) for index in range(1, DEPTH + 1)} | {"dense2": (5.0, 1.0)}

    def milliseconds(model):
        int8 = {decision.name.partition("/")[0] for decision in model.plan.ops if decision.int8}
        return sum(quick if name in int8 else slow for name, (quick, slow) in base.items())

    def timer(one, other):
        return milliseconds(other) / milliseconds(one)

    found = tune(folder, data, objective=Latency(timer))
    assert (found.met, reverted(found)) == (True, ["dense2", "dense4", "dense6"])
    assert found.costs[found.best.number] == pytest.approx(9 / 11)
    assert found.best.reverted != plain.best.reverted
    assert "Time" in str(found)


def branches(x):
    """Two narrow parts and a wide one, each hurt by an outlier of its own."""
    rng = np.random.default_rng(5)
    found = []
    for name, width, outlier in (("narrow1", 24, 55.0), ("narrow2", 24, 55.0), ("wide", 256, 80.0)):
        y = tf.nn.relu(dense(x, f"{name}_in", *layer(16, width, rng, outlier)))
        found.append(dense(y, name, *layer(width, 8, rng)))
    return {"y": tf.concat(found, -1)}


@pytest.fixture(scope="module")
def branched(folder):
    return saved(folder / "branches", branches)


def test_the_smallest(branched, folder, data):
    x = samples(200, 4)
    reference = tf.saved_model.load(str(branched)).serve(x)["y"].numpy()

    def evaluate(model):
        return -float(np.square(model(x) - reference).mean())

    error = -tune(folder, data, evaluate, "branches", max_drop=0.0, drop_type="absolute", max_trials=1).value
    goal = 0.65 * error  # wide alone brings half of it, both narrow ones nearly as much
    plain = tune(folder, data, evaluate, "branches", max_drop=goal)
    small = tune(folder, data, evaluate, "branches", max_drop=goal, objective="size")
    assert (plain.met, reverted(plain)) == (True, ["wide"])
    assert (small.met, reverted(small)) == (True, ["narrow1", "narrow2"])
    assert small.best.size < plain.best.size


def test_what_need_not_be_in_float_returns(folder, data):
    """A strategy that reverts all, and `give_back`."""
    from tfquant.tuner.giving_back import give_back

    def everything(search):
        give_back(search, search.trial(search.ops, "everything"))
        return "done"

    found = tune(folder, data, strategy=everything)
    assert (found.met, reverted(found)) == (True, ["dense4", "dense6"])
    assert len(found.trials) < 10


# -- the journal -----------------------------------------------------------------------------------------------------------
def facts(journal, kind):
    lines = [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}")]
    return [tuple(line["ops"]) for line in lines if line["kind"] == kind]


def test_the_journal_keeps_jobs_apart(folder, data, tmp_path):
    journal = tmp_path / "journal"
    tune(folder, data, journal=journal, max_trials=1)
    tune(folder, data[:50], journal=journal, max_trials=1)  # other ranges
    tune(folder, data, journal=journal, max_trials=1, max_drop=1.0)  # the same models
    assert len(journal.read_text().splitlines()) == 2


def test_journal_of_something_else(tmp_path):
    (tmp_path / "notes").write_text("buy milk\n")
    with pytest.raises(ConfigError, match="holds something else than a journal"):
        Journal(tmp_path / "notes", "job")
    with pytest.raises(ConfigError, match="A journal is a file"):
        Journal(tmp_path, "job")


# -- reverting -------------------------------------------------------------------------------------------------------------
def conv(x, name, rng, size=3, channels=8, bias=True):
    weights = rng.normal(0, 0.2, (size, size, x.shape[3], channels)).astype(np.float32)
    with tf.name_scope(name):
        y = tf.nn.conv2d(x, weights, 1, "SAME")
        return tf.nn.bias_add(y, rng.normal(0, 0.1, channels).astype(np.float32)) if bias else y


def residual(x):
    rng = np.random.default_rng(3)
    stem = tf.nn.relu(conv(x, "stem", rng))
    left = conv(stem, "left", rng)
    right = conv(tf.nn.relu(conv(stem, "inner", rng)), "right", rng)
    x = tf.nn.relu(left + right)
    return {"y": conv(tf.nn.relu(conv(x, "between", rng, bias=False)), "head", rng, size=1)}


@pytest.fixture(scope="module")
def quantized_residual(tmp_path_factory):
    module = tf.Module()
    spec = tf.TensorSpec((None, 8, 8, 3), tf.float32, name="x")
    module.serve = tf.function(residual, input_signature=[spec], autograph=False)
    path = tmp_path_factory.mktemp("residual") / "model"
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve})
    images = np.random.default_rng(0).normal(size=(40, 8, 8, 3)).astype(np.float32)
    return tfquant.quantize(path, images, CONFIG), images, path


def names(group):
    return {op.partition("/")[0] for op in group.ops}


def test_groups(quantized_residual):
    model, _, _ = quantized_residual
    found = [names(group) for group in find_groups(model.annotation, model.plan)]
    single = sorted(next(iter(group)) for group in found if len(group) == 1)
    assert single == ["between", "head", "inner", "left", "right", "stem"]
    assert [group for group in found if len(group) > 1] == [{"left", "inner"}]


def test_every_op_can_return_by_itself(quantized_residual):
    model, images, path = quantized_residual
    reverter = Reverter(model.base, model.plan, model.annotation)
    expected = model.float_function()({"x": images})["y"]
    for group in find_groups(model.annotation, model.plan):
        plan = reverter.plan(group.ops, {})
        other = model.with_plan(plan)
        held = {decision.name for decision in other.plan.ops if not decision.int8 and decision.op == "Conv2D"}
        assert held == set(group.ops), "the residual add keeps no other convolution out of INT8"
        found = other.int8_function()({"x": images})["y"]
        assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
        simulated = other.simulation()({"x": images})["y"]
        assert np.abs(found - simulated).max() < 0.05 * np.abs(expected).max()
        again = tfquant.quantize(path, plan=plan)
        assert again.graph_def.SerializeToString(deterministic=True) == other.graph_def.SerializeToString(deterministic=True)


def test_a_plan_of_other_signatures(quantized_residual):
    model, _, _ = quantized_residual
    with pytest.raises(PlanError, match=r"must be for the signatures serving_default. Received: serve, embed"):
        model.with_plan(dataclasses.replace(model.plan, signature_keys=("serve", "embed")))


def edited(model, ops, value):
    """The model with all biases of `ops` shifted and their weights set to 0."""
    edits = tuple(Shift(op, np.full(8, value, np.float32), corrects=True) for op in ops)
    plan = dataclasses.replace(model.plan, edits=edits)
    annotation = decided(model.base, plan)
    groups = {tensor.name for tensor in annotation.quantized}
    # A layer that had no bias has one now: its tensor goes by another name.
    renamed = {name: model.plan.tensors.get(name) or model.plan.tensors[name.replace("/bias_add", "")] for name in groups}
    weights = {unit.name: np.zeros(unit.weights.shape, np.int8) for unit in annotation.units.values() if unit.name in ops}
    return model.with_plan(dataclasses.replace(plan, ops=annotation.decisions, tensors=renamed, rounded=weights))


def test_weights_and_biases_return_as_they_were(quantized_residual):
    model, images, _ = quantized_residual
    ops = [op for group in find_groups(model.annotation, model.plan) if len(group.ops) == 1 for op in group.ops]
    wrong = edited(model, ops, 3.0)
    expected = model.float_function()({"x": images})["y"]
    assert np.abs(wrong.int8_function()({"x": images})["y"] - expected).max() > 1
    reverter = Reverter(wrong.base, wrong.plan, wrong.annotation)
    plan = reverter.plan(ops, {})
    assert (dict(plan.tensors), dict(plan.rounded), dict(plan.weight_scales)) == ({}, {}, {})
    floats = wrong.with_plan(plan).int8_function()({"x": images})["y"]
    np.testing.assert_allclose(floats, expected, atol=1e-5)
    one = next(op for op in ops if op.startswith("between"))
    kept = reverter.plan([one], {})
    assert one not in kept.rounded
    assert len(kept.rounded) == len(ops) - 1
    graph, base = wrong.with_plan(kept).graph, wrong.base
    for op in ops:
        bias, before = (bias_of(part, part.nodes[op]) for part in (graph, base))
        shift = bias.inputs[1].value - (0 if before is None else before.inputs[1].value)
        np.testing.assert_allclose(shift, 0.0 if op == one else 3.0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "default"},
        {"preset": "accuracy"},
        {"algorithms": ("channel_alignment", "equalization", "bias_correction")},
        {"mode": "dynamic"},
        {"mode": "weight_only"},
        {"weight_bits": 4},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_everything_in_float_is_the_float_model(options, folder, data):
    """In every mode, and where the plan has edits and weights that are rounded otherwise."""
    config = tfquant.QuantConfig(verify=False, placement="int8", **options)

    def everything(search):
        for op in search.ops:
            search.trial([op], "one")
        return search.trial(search.ops, "everything").step

    x = samples(300, 4)
    reference = tf.saved_model.load(str(folder / "chain")).serve(x)["y"].numpy()

    def evaluate(model):
        return -float(np.square(model(x) - reference).mean())

    found = tune(folder, data, evaluate, max_drop=1e-9, config=config, strategy=everything)
    count = len(found.trials) - 2
    assert [trial.float_ops for trial in found.trials] == [0, *[1] * count, count]
    assert count == (5 if config.mode == "weight_only" else DEPTH)  # it leaves small constants alone
    errors = [-trial.value for trial in found.trials]
    assert errors[-1] < 1e-9 < errors[0]
    assert max(errors) < 1.5 * errors[0], "what is scaled or shifted between layers is so in float, too"
    assert found.best == found.trials[-1]
    assert not any(decision.int8 for decision in found.model.plan.ops)
    assert (found.model.plan.weight_scales, found.model.plan.tensors, found.model.plan.dynamic) == ({}, {}, {})


# -- sensitivity -----------------------------------------------------------------------------------------------------------
def test_sensitivity_foretells_the_loss(folder, data):
    """The curvature of each layer against the KL divergence that it causes alone."""
    model = tfquant.quantize(folder / "chain", data, dataclasses.replace(CONFIG, preset="fast"))
    x = samples(300, 6)
    found = measure(model, [{"x": part} for part in np.split(x, 10)], with_curvature=True)
    expected = model.float_function()({"x": x})["y"].astype(np.float64)
    reverter = Reverter(model.base, model.plan, model.annotation)
    ops = [group.ops[0] for group in find_groups(model.annotation, model.plan)]
    for op in ops:
        alone = model.with_plan(reverter.plan([other for other in ops if other != op], {}))
        other = alone.int8_function()({"x": x})["y"].astype(np.float64)
        divergence = float((expected * (np.log(expected + 1e-12) - np.log(other + 1e-12))).sum(-1).mean())
        assert 0.7 < found[op].curvature / divergence < 1.3, (op, found[op], divergence)
    worst = sorted(ops, key=lambda op: -found[op].curvature)[:2]
    assert {op.partition("/")[0] for op in worst} == {"dense4", "dense6"}
    tf.random.set_seed(3)
    assert measure(model, [{"x": part} for part in np.split(x, 10)], with_curvature=True) == found, "whatever the global seed"


def test_the_error_of_a_layer_is_its_own(folder, data):
    """It is that of its weights and inputs in 8 bits, not what errors before it make of it."""
    model = tfquant.quantize(folder / "chain", data, CONFIG)
    x = samples(100, 6)
    found = measure(model, [{"x": x}])
    for unit in list(model.annotation.units.values())[:1]:
        spec, scales = model.plan.tensors["x"], model.plan.weight_scales[unit.name].astype(np.float64)
        integers = np.clip(np.rint(x / spec.scale) + spec.zero_point, 0, 255) - spec.zero_point
        rounded = np.maximum(integers * spec.scale @ (np.rint(unit.weights / scales) * scales) + unit.bias, 0)
        exact = np.maximum(x @ unit.weights + unit.bias, 0)
        expected = np.square(rounded - exact).sum() / np.square(exact).sum()
        assert found[unit.name].mse == pytest.approx(expected, rel=1e-3)
    assert found["dense2/MatMul"].mse < 1e-3, "and what is behind it is not worse for it"
    assert found["dense4/MatMul"].mse > 3e-3


# -- the command -----------------------------------------------------------------------------------------------------------
def command(folder, place, **changes):
    options = {
        "saved_model": folder / "chain",
        "data": folder / "data.npz",
        "validation": folder / "validation.npz",
        "max_drop": 10,
        "drop_type": "absolute",
        "placement": "int8",
        "preset": "fast",
        "verify": False,
        "output": place,
    } | changes
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


def run_command(words, folder, **variables):
    arguments = [sys.executable, "-m", "tfquant.tune", *words]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]), **variables}
    found = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=folder, env=env)
    return found.returncode, found.stdout, found.stderr


def test_command(plain, folder, tmp_path):
    code, out, err = run_command(command(folder, tmp_path / "int8", verify=True, verify_batch_sizes=""), folder)
    assert (code, err) == (0, "")
    assert "Goal met:" in out
    assert "agreement" in out
    content = json.loads((tmp_path / "int8" / "tuning.json").read_text())
    assert (content["met"], len(content["trials"])) == (True, len(plain.trials))
    assert content["trials"][content["best"] - 1]["reverted"] == sorted(plain.best.reverted)
    plan = load_plan(tmp_path / "int8" / "quant_plan.json")
    assert {op.name for op in plan.ops if op.reason.startswith("reverted by tuning")} == set(plain.best.reverted)
    with np.load(folder / "validation.npz") as archive:
        y = tf.saved_model.load(str(tmp_path / "int8")).serve(archive["x"])["y"].numpy()
        assert 100 * (y.argmax(-1) == archive["labels"]).mean() == pytest.approx(plain.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8"]


def test_a_killed_command_goes_on_to_the_same_answer(plain, folder, tmp_path):
    (tmp_path / "functions.py").write_text(
        "import os, signal, numpy as np\n"
        "def pairs():\n"
        "    with open('calls', 'a') as file:\n"
        "        file.write('.')\n"
        "    if os.path.getsize('calls') == int(os.environ['KILL_AT']):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"    with np.load({str(folder / 'validation.npz')!r}) as archive:\n"
        "        yield archive['x'], archive['labels']\n"
    )
    journal = tmp_path / "int8.tuning.jsonl"
    words = command(folder, tmp_path / "int8", validation="functions:pairs")
    # Once for the type of the labels, the float model, the first trial and the samples to rank on; then in the second trial.
    code, _, err = run_command(words, tmp_path, KILL_AT="5")
    assert (code, "Killed (SIGKILL) while Trial 2" in err) == (2, True), err
    assert (facts(journal, "trial"), len(facts(journal, "score"))) == ([()], DEPTH)
    with journal.open("a") as file:
        file.write('{"job": "half a li')
    (tmp_path / "calls").unlink()
    code, _, err = run_command([*words, f"--journal={journal}"], tmp_path, KILL_AT="0")
    assert (code, err) == (0, "")
    trials, scores = (facts(journal, kind) for kind in ("trial", "score"))
    assert len(trials) == len(set(trials)) == len(plain.trials)
    assert len(scores) == len(set(scores))
    # The first trial is not evaluated again, nor are the samples chosen that nothing is ranked on any more.
    assert (tmp_path / "calls").stat().st_size == 2 + len(plain.trials) - 1
    content = json.loads((tmp_path / "int8" / "tuning.json").read_text())
    assert [(trial["reverted"], trial["value"]) for trial in content["trials"]] == [
        (sorted(trial.reverted), trial.value) for trial in plain.trials
    ]
    assert content["best"] == plain.best.number


def test_command_that_misses_the_goal(folder, tmp_path):
    (tmp_path / "functions.py").write_text(
        "import numpy as np\n"
        "def pairs():\n"
        f"    with np.load({str(folder / 'validation.npz')!r}) as archive:\n"
        "        yield from zip(archive['x'], archive['labels'])\n"
        "def share(outputs, labels):\n"
        "    return outputs.argmax(-1) == labels\n"
        "def last(search):\n"
        "    search.trial(search.ops[-1:], 'the last')\n"
        "    return 'it knows no more'\n"
    )
    installed = tmp_path / "own-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[tfquant.metrics]\nshare = functions:share\n[tfquant.strategies]\nlast = functions:last\n"
    )
    changes = {
        "strategy": "last", "validation": "functions:pairs", "metric": "share", "max_drop": 0.01,
        "drop_type": "relative", "journal": tmp_path / "journal",
    }  # fmt: skip
    code, out, err = run_command(command(folder, tmp_path / "int8", **changes), tmp_path)
    assert (code, err) == (3, "")
    assert "Goal missed:" in out
    assert "Stopped: it knows no more" in out
    assert json.loads((tmp_path / "int8" / "tuning.json").read_text())["met"] is False
    assert [len(ops) for ops in facts(tmp_path / "journal", "trial")] == [0, 1]


@pytest.fixture
def refused(capsys):
    """Runs a command that is to be refused; returns its line."""

    module = importlib.import_module("tfquant.tune")

    def run(words):
        state = flagsaver.save_flag_values(module.FLAGS)
        try:
            with contextlib.suppress(SystemExit):
                assert module.main(module.parse(["tune", *words])) == 2
        finally:
            flagsaver.restore_flag_values(state, module.FLAGS)
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("tfquant.tune: ")
        return line

    return run


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"validation": None}, "--validation is missing"),
        ({"output": None}, "--output is missing"),
        ({"validation": "nowhere.npz"}, "The validation data do not exist"),
        ({"validation": "{folder}/data.npz"}, "must hold 'labels' beside the inputs. Received: x in"),
        ({"validation": "{folder}/chain/saved_model.pb"}, "must be an .npz with the model's inputs and 'labels'"),
        ({"validation": "{folder}/short.npz"}, "the same number of samples for every input"),
        ({"validation": "{folder}/classes.npz"}, "labels of 0 to 9, the model's classes. Received: 0 to 10"),
        ({"validation": "nobody:there"}, "nobody:there cannot be imported"),
        ({"metric": "top2"}, "metric must be one of top1, top5, binary_accuracy, mse, mae, or package.module:function"),
        ({"metric": "mse"}, "The metric mse is for labels of the shape of the output"),
        ({"metric": "json:loads"}, "The metric json:loads failed: TypeError"),
        ({"max_drop": "much"}, "max_drop"),
        ({"max_drop": 5, "drop_type": "relative"}, "0.01 is one percent"),
        ({"strategy": "best"}, "strategy must be one of"),
        ({"objective": "speed"}, "objective must be one of"),
        ({"max_trials": "0"}, "max_trials must be a whole number"),
        ({"journal": "{folder}"}, "A journal is a file"),
        ({"journal": "{folder}/data.npz"}, "holds something else than a journal"),
        ({"journal": "{output}/journal"}, "--journal must lie outside of --output"),
        ({"output": "{folder}", "overwrite": True}, "--output would replace --saved_model"),
        ({"plan": "quant_plan.json"}, "Unknown command line flag 'plan'"),
        ({"data": None}, "Quantization needs data or a plan"),
    ],
)
def test_refused_commands(changes, words, refused, folder, tmp_path):
    with np.load(folder / "validation.npz") as archive:
        np.savez(folder / "short.npz", x=archive["x"], labels=archive["labels"][:7])
        np.savez(folder / "classes.npz", x=archive["x"], labels=archive["labels"] + (archive["labels"] == 9))
    output = tmp_path / "int8"
    changes = {
        name: value.format(folder=folder, output=output) if isinstance(value, str) else value for name, value in changes.items()
    }
    assert words in refused(command(folder, output, **changes))
    assert not output.exists()


def test_the_example_tunes_with_its_own_metric_and_strategy(capsys):
    try:
        runpy.run_path(str(ROOT / "examples" / "own_strategy.py"), run_name="__main__")
    finally:
        registry._registered["metric"].pop("worst_class", None)
        registry._registered["strategy"].pop("ends_first", None)
    out = capsys.readouterr().out
    assert "2 from each end" in out
    assert "Goal met:" in out


def test_help_says_the_exit_codes():
    code, out, err = run_command(["--help"], ROOT)
    assert (code, err) == (0, "")
    assert "3: it is there, but misses the goal" in out
    assert "--max_drop" in out
    assert "--saved_model" in out


def test_the_function_and_the_command_are_not_in_each_others_way():
    script = """
import sys
import tfquant.tuner, tfquant
assert tfquant.tune is tfquant.tuner.tune
import tfquant.tune
try:
    tfquant.tune("nowhere", None, len, max_drop=-1)
except tfquant.ConfigError as error:
    print(error)
assert tfquant.tune is tfquant.tuner.tune
print(sys.modules["tfquant.tune"].main.__name__, tfquant.Validation.__name__)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=env)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == ["max_drop must be a number of at least 0. Received: -1", "main Validation"]
