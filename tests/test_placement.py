"""Tests of tfquant.placement: the minimum cut, what is measured and estimated, bfloat16, and a plan that carries it all."""

import itertools
import os
import random

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import building
import keras
import numpy as np
import pytest
import tensorflow as tf

import tfquant
from tfquant.errors import PlanError
from tfquant.placement import costs, decide, steps
from tfquant.placement.bfloat16 import FloatCosts, candidates, choose_bfloat16, narrow
from tfquant.placement.choose import choose
from tfquant.placement.cut import Crossing, cheapest
from tfquant.plan.annotate import annotate
from tfquant.plan.serialize import load_plan
from tfquant.targets import onednn

LAYERS = keras.layers
SAMPLES = {"x": np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)}


def cost_of(units, crossings, chosen):
    total = sum(int8 if name in chosen else other for name, (int8, other) in units.items())
    for crossing in crossings:
        is_stored = crossing.maker in chosen
        total += crossing.to_int8 * (not is_stored and any(reader in chosen for reader in crossing.readers))
        total += crossing.to_float * (is_stored and (crossing.shown or any(r not in chosen for r in crossing.readers)))
    return total


def test_the_cut_is_as_cheap_as_the_best_of_all_assignments():
    rng = random.Random(0)
    for _ in range(200):
        names = [f"unit_{index}" for index in range(rng.randint(1, 7))]
        units = {name: (rng.randint(0, 20), rng.randint(0, 20)) for name in names}
        crossings = []
        for index, maker in enumerate([None, *names]):
            readers = [reader for reader in names[index:] if reader != maker and rng.random() < 0.4]
            crossings.append(Crossing(maker, readers, rng.random() < 0.3, rng.randint(0, 9), rng.randint(0, 9)))
        subsets = itertools.chain.from_iterable(itertools.combinations(names, count) for count in range(len(names) + 1))
        best = min(cost_of(units, crossings, set(subset)) for subset in subsets)
        assert cost_of(units, crossings, cheapest(units, crossings)) == pytest.approx(best, abs=1e-4)


def test_of_equally_cheap_assignments_the_one_with_most_int8():
    assert cheapest({"a": (2.0, 2.0), "b": (0.0, 0.0)}, []) == {"a", "b"}
    assert cheapest({}, []) == set()


def chain():
    """Three convolutions: x -> a -> b -> c -> mean."""
    rng = np.random.default_rng(1)
    kernels = [rng.normal(size=(1, 1, 3, 3)).astype(np.float32) for _ in range(3)]

    def network(x):
        for name, kernel in zip("abc", kernels, strict=True):
            x = tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME", name=name))
        return tf.reduce_mean(x, [1, 2])

    return building.build(network, {"x": (None, 8, 8, 3)})


def made_up(graph, int8, float32, conversion=1.0):
    """Costs of the three units of `chain` in the order of the graph."""
    names = [unit.name for unit in annotate(graph, onednn.TABLE).units.values()]
    one = dict.fromkeys(names, 1.0)
    return costs.Costs(
        batch_size=1,
        int8=dict(zip(names, int8, strict=True)),
        float32=dict(zip(names, float32, strict=True)),
        rest=0.0,
        to_int8=lambda tensor: conversion,
        to_float=lambda tensor: conversion,
        floats=FloatCosts(one, one, lambda tensor: conversion),
    )


@pytest.mark.parametrize(
    ("int8", "float32", "conversion", "expected"),
    [
        ((1, 1, 1), (5, 5, 5), 1.0, []),  # INT8 pays everywhere
        ((1, 9, 1), (5, 5, 5), 1.0, [1]),  # two conversions cost less than b in INT8
        ((1, 9, 1), (5, 5, 5), 3.0, []),  # they cost more
        ((5, 5, 5), (1, 1, 1), 1.0, [0, 1, 2]),
        ((4, 4, 4), (5, 5, 5), 9.0, [0, 1, 2]),  # INT8 saves 3, the conversion at the start alone costs 9
    ],
)
def test_conversions_count(int8, float32, conversion, expected):
    graph = chain()
    annotation = annotate(graph, onednn.TABLE)
    choice = choose(graph, annotation, [made_up(graph, int8, float32, conversion)])
    mains = [unit.main for unit in annotation.units.values()]
    assert [index for index, main in enumerate(mains) if main in choice.floats] == expected
    if expected == [1]:
        assert choice.microseconds == {1: pytest.approx(9 - 5 - 2)}
        assert "0.009 ms against 0.005 ms at batch 1" in choice.floats[mains[1]]


def test_the_time_of_an_op_counts_to_the_last_unit_that_reaches_it():
    graph = chain()
    owners = costs._owners(graph, annotate(graph, onednn.TABLE))
    mains = [unit.name for unit in annotate(graph, onednn.TABLE).units.values()]
    assert owners[next(iter(graph.outputs.values())).node.name] == mains[-1]
    assert set(owners.values()) == set(mains)


def test_measured_costs_are_of_all_units_and_batch_sizes():
    graph = chain()
    annotation = annotate(graph, onednn.TABLE)
    found = costs.measured(
        graph, annotation, SAMPLES, batch_sizes=[1, 3], threads=1, seconds=0.1, settings={}, with_bfloat16=True
    )
    names = {unit.name for unit in annotation.units.values()}
    assert [entry.batch_size for entry in found] == [1, 3]
    for entry in found:
        assert set(entry.int8) >= names
        assert set(entry.float32) >= names
        assert all(0 < entry.int8[name] < 1e6 and 0 < entry.float32[name] < 1e6 for name in names)
        assert entry.total >= sum(entry.float32.values())
        first = next(iter(annotation.units.values())).inputs[0]
        assert 0 < entry.to_int8(first) < 1e6
        assert 0 < entry.to_float(first) < 1e6


def test_a_graph_that_cannot_run_is_told_in_a_line():
    graph = chain()
    with pytest.raises(steps.StepsError, match=r"^\S.{10,}$"):
        costs.run({"float32": graph}, {"x": np.zeros((1, 8, 8, 5), np.float32)}, batch_sizes=[1], threads=1, seconds=0.1)


def test_the_table_gives_more_for_more_work():
    graph = chain()
    annotation = annotate(graph, onednn.TABLE)
    small, large = costs.estimated(graph, annotation, SAMPLES, batch_sizes=[1, 64])
    for name in (unit.name for unit in annotation.units.values()):
        assert 0 < small.int8[name] < large.int8[name]
        assert 0 < small.float32[name] < large.float32[name]


def test_what_a_table_cannot_foretell_stays_int8():

    floats = {next(iter(chain().nodes.values())): "slower"}
    tiny = decide._foretold(decide.Choice(floats, 0.5, {1: 20.0, 16: 40.0}))
    clear = decide._foretold(decide.Choice(floats, 0.5, {1: 20.0, 16: 4000.0}))
    assert (tiny.floats, clear.floats) == ({}, floats)


# -- whole models -------------------------------------------------------------------------------------------------------
def network(width=16):
    keras.utils.set_random_seed(3)
    image = keras.Input((8, 8, 3), name="x")
    x = LAYERS.Conv2D(8, 3, activation="relu", padding="same", name="first")(image)
    x = LAYERS.Conv2D(8, 3, activation="relu", name="second")(x)
    x = LAYERS.Flatten()(x)
    return keras.Model(image, LAYERS.Dense(5, name="head")(LAYERS.Dense(width, activation="tanh", name="hidden")(x)))


def totals(monkeypatch, **milliseconds):
    """Lets the networks take these times, and single ops such that `second` is to be float."""

    def run(graphs, samples, *, batch_sizes, threads, seconds):
        return {(name, size): steps.Times(milliseconds[name.replace(" ", "_")], {}) for name in graphs for size in batch_sizes}

    def measured(graph, annotation, samples, *, batch_sizes, **others):
        names = [unit.name for unit in annotation.units.values()]
        int8 = {name: 100.0 if "second" in name else 1.0 for name in names}
        nothing = FloatCosts({}, {}, lambda tensor: 0.0)
        free = lambda tensor: 0.1  # noqa: E731
        return [costs.Costs(size, int8, dict.fromkeys(names, 10.0), 0.0, free, free, nothing) for size in batch_sizes]

    monkeypatch.setattr(decide.cost, "run", run)
    monkeypatch.setattr(decide.cost, "measured", measured)


@pytest.mark.parametrize(
    ("times", "floats"),
    [
        ({"float32": 3.0, "INT8_throughout": 2.0, "as_chosen": 1.0}, ["second"]),
        ({"float32": 3.0, "INT8_throughout": 1.0, "as_chosen": 2.0}, []),
        ({"float32": 1.0, "INT8_throughout": 2.0, "as_chosen": 1.5}, ["first", "second", "hidden", "head"]),
    ],
)
def test_the_network_itself_has_the_last_word(monkeypatch, times, floats, tmp_path):
    totals(monkeypatch, **times)
    model = network()
    result = tfquant.quantize(model, SAMPLES["x"], tfquant.QuantConfig(placement="measure", verify=False))
    held = [d for d in result.plan.ops if not d.int8 and d.kernel and d.op in ("Conv2D", "MatMul")]
    assert [next(name for name in ("first", "second", "hidden", "head") if name in d.name) for d in held] == floats
    assert all("float32" in decision.reason for decision in held)
    assert len(result.report.placement) == 2
    assert "batch 16" in str(result.report)
    result.save(tmp_path / "int8")
    again = tfquant.quantize(model, plan=tmp_path / "int8" / "quant_plan.json")
    one, other = (found.graph_def.SerializeToString(deterministic=True) for found in (result, again))
    assert one == other


def test_a_model_that_cannot_be_run_apart_is_placed_by_the_table(tmp_path):
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer([0, 1], [0.5, 1.5]), 0.0)

    class Model(tf.Module):
        def __init__(self):
            self.table = table
            self.kernel = tf.Variable(np.eye(4, dtype=np.float32))

        @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, name="x")])
        def serve(self, x):
            return tf.matmul(x, self.kernel) * self.table.lookup(tf.constant(1))

    model = Model()
    tf.saved_model.save(model, tmp_path / "model", signatures=model.serve)
    data = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    result = tfquant.quantize(tmp_path / "model", data, tfquant.QuantConfig(placement="measure", verify=False))
    assert [line for line in result.report.warnings if "placement could not be measured" in line and "table" in line]
    assert result.report.int8_share == 100


# -- bfloat16 -----------------------------------------------------------------------------------------------------------
def attention():
    rng = np.random.default_rng(5)
    kernel = rng.normal(size=(6, 6)).astype(np.float32)

    def function(x):
        keys = tf.matmul(tf.reshape(x, [-1, 6]), kernel)
        keys = tf.reshape(keys, tf.shape(x))
        weights = tf.nn.softmax(tf.matmul(x, keys, transpose_b=True) / 3.0)
        return {"y": tf.reduce_sum(tf.matmul(weights, x), 1), "weights": weights}

    return building.build(function, {"x": (None, 5, 6)})


def test_bfloat16_ops_give_the_same_but_for_its_digits():
    graph = attention()
    x = np.random.default_rng(0).normal(size=(3, 5, 6)).astype(np.float32)
    expected = building.serve(graph, [{"x": x}])
    names = [node.name for node in candidates(graph, ())]
    assert {graph.nodes[name].op for name in names} >= {"MatMul", "BatchMatMulV2"}
    assert not any(graph.is_output(graph.nodes[name].out) for name in names)
    casts = narrow(graph, names)
    graph.infer()
    assert casts == sum(node.op == "Cast" for node in graph.order()) >= 2
    assert all(graph.nodes[name].dtypes[0] == tf.bfloat16 for name in names)
    found = building.serve(graph, [{"x": x}])
    for key, value in expected.items():
        assert found[key].dtype == np.float32
        # 8 bits of a float each, a handful of roundings behind one another.
        assert np.abs(found[key] - value).max() <= 0.05 * np.abs(value).max()
        assert np.abs(found[key] - value).max() > 0


def test_casts_count_for_bfloat16():
    graph = attention()
    names = [node.name for node in candidates(graph, ())]
    every = {node.name: 4.0 for node in graph.order()}
    half = {node.name: 2.0 for node in graph.order()}
    cheap = choose_bfloat16(graph, (), [FloatCosts(every, half, lambda tensor: 0.1)])
    dear = choose_bfloat16(graph, (), [FloatCosts(every, half, lambda tensor: 100.0)])
    assert set(cheap) == set(names)
    assert dear == ()


def test_a_plan_keeps_what_runs_in_bfloat16(tmp_path):
    data = SAMPLES["x"]
    model = network(4096)
    config = tfquant.QuantConfig(verify=False, float="bfloat16", ignored_scope=["first", "hidden"])
    every = tfquant.quantize(model, data, config)
    assert every.plan.bfloat16
    assert "Float ops in bfloat16" in str(every.report)
    every.save(tmp_path / "mixed")
    plan = load_plan(tmp_path / "mixed")
    assert plan.bfloat16 == every.plan.bfloat16
    again = tfquant.quantize(model, plan=plan)
    one, other = (found.graph_def.SerializeToString(deterministic=True) for found in (every, again))
    assert one == other
    float32 = model(data).numpy()
    for found in (every(data), tf.saved_model.load(tmp_path / "mixed").serve(data)):
        noise = ((found.numpy() - float32) ** 2).sum()
        assert 10 * np.log10((float32**2).sum() / noise) > 25
    simulated = next(iter(every.simulation()({"x": data}).values()))
    assert np.abs(simulated - every(data).numpy()).max() <= 0.03 * np.abs(float32).max()


def test_a_plan_for_other_ops_is_refused():
    graph = attention()
    with pytest.raises(PlanError, match="no op of this name"):
        narrow(graph, ["nowhere"])
