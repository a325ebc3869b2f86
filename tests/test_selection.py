"""Tests of the choice of an estimator per tensor: its errors are those that NumPy finds, and none is better."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest

import tfquant
from tfquant import registry
from tfquant.graph.loading import Source
from tfquant.observe.collector import collect
from tfquant.observe.estimators import ESTIMATORS
from tfquant.observe.ranges import group_spec, observed
from tfquant.observe.selection import select
from tfquant.plan.annotate import annotate
from tfquant.simplify import simplify
from tfquant.sources import open_model
from tfquant.targets import onednn


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(2)
    x = keras.Input((8, 8, 3), name="x")
    y = keras.layers.Conv2D(8, 3, padding="same", activation="relu", name="first")(x)
    z = keras.layers.Conv2D(8, 3, padding="same", name="second")(y)
    z = keras.layers.Add()([y, z])
    z = keras.layers.MaxPooling2D(2)(z)
    z = keras.layers.Flatten()(z)
    return keras.Model(x, keras.layers.Dense(5, name="head")(z))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(3)
    samples = rng.normal(size=(40, 8, 8, 3)).astype(np.float32)
    samples[0, 0, 0, 0] = 40.0  # a lone value that costs resolution
    return samples


def prepared(model, data):
    source: Source = open_model(model, tfquant.QuantConfig())
    simplify(source.graph)
    annotation = annotate(source.graph, onednn.TABLE)
    batches = [{"x": data[i : i + 8]} for i in range(0, len(data), 8)]
    return source.graph, annotation, collect(source.graph, observed(annotation), batches), batches


@pytest.mark.parametrize("bits", [4, 8])
def test_the_choice_is_never_worse_than_the_best_single_estimator(model, data, bits):
    found = select(*prepared(model, data), bits=bits)
    singles = {name: sum(errors[name] for errors in found.errors.values()) for name in ESTIMATORS}
    mixed = sum(found.errors[group][name] for group, name in found.chosen.items())
    assert all(np.isfinite(list(singles.values())))
    assert mixed <= min(singles.values())
    assert all(errors[found.chosen[group]] == min(errors.values()) for group, errors in found.errors.items())
    assert mixed < (0.7 if bits == 4 else 1) * singles["minmax"]


def test_errors_are_those_of_the_layers_outputs(model, data):
    """The first layer alone, in NumPy: its output from quantized images against that from floats, behind the ReLU."""
    graph, annotation, stats, batches = prepared(model, data)
    found = select(graph, annotation, stats, batches)
    group = annotation.groups[0]
    kernel, bias = (variable.numpy() for variable in model.get_layer("first").weights)

    def output(x):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(np.float64)
        taps = sum(padded[:, i : i + 8, j : j + 8] @ kernel[i, j] for i in range(3) for j in range(3))
        return np.maximum(taps + bias, 0)

    exact = output(data)
    for name in ("minmax", "percentile"):
        spec = group_spec(group, stats, name)
        stored = np.clip(np.rint(data / spec.scale) + spec.zero_point, *spec.limits)
        noise = ((output((stored - spec.zero_point) * spec.scale) - exact) ** 2).sum()
        assert found.errors[group.name][name] == pytest.approx(noise / (exact**2).sum(), rel=1e-2)


def test_auto_is_an_estimator_of_the_plan(model, data):
    plan = tfquant.quantize(
        model, data, tfquant.QuantConfig(estimator="auto", verify=False, placement="int8", preset="fast")
    ).plan
    assert plan.settings["estimator"] == "auto"
    sources = {spec.source for spec in plan.tensors.values()}
    assert sources <= set(ESTIMATORS)
    chosen = select(*prepared(model, data)).chosen
    assert {spec.group: spec.source for spec in plan.tensors.values()} == chosen


def test_registered_estimators_take_part(model, data, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {kind: {} for kind in registry.GROUPS})

    @tfquant.register_estimator("narrow")
    def narrow(stats, bits):
        return stats.low / 1000, stats.high / 1000

    found = select(*prepared(model, data))
    assert all(errors["narrow"] > 0.5 for errors in found.errors.values())
    assert "narrow" not in found.chosen.values()
