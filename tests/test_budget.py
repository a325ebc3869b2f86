"""Tests of the search for bits under a budget, and of the choice of estimators, against NumPy and against every other choice."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import itertools

import building
import fuzzing
import keras
import numpy as np
import pytest

import tfquant
from tfquant.errors import ConfigError
from tfquant.observe.budget import Choice, cheapest, choose_bits
from tfquant.observe.collector import collect
from tfquant.observe.fewer_bits import Bits
from tfquant.observe.ranges import make_plan, observed
from tfquant.observe.selection import select
from tfquant.plan.annotate import annotate
from tfquant.plan.footprint import model_bytes
from tfquant.simplify import simplify
from tfquant.targets import fakequant, onednn


def curve(rng, values):
    """The choices of one layer: errors fall to about a quarter with each bit."""
    size = int(rng.integers(50, 500))
    error = 10.0 ** rng.uniform(-1, 2)
    falls = rng.uniform(0.15, 0.5, values)
    return [Choice(bits + 2, size * (bits + 2) // 8, float(error * falls[: bits + 1].prod())) for bits in range(values)]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_is_clearly_better(seed):
    rng = np.random.default_rng(seed)
    choices = [curve(rng, 5) for _ in range(4)]
    sizes = [sum(choice.size for choice in found) for found in itertools.product(*choices)]
    for budget in np.quantile(sizes, (0.05, 0.3, 0.6, 1.0)):
        found = cheapest(choices, int(budget))
        assert sum(choice.size for choice in found) <= budget
        allowed = [one for one in itertools.product(*choices) if sum(choice.size for choice in one) <= budget]
        best = min(sum(choice.error for choice in one) for one in allowed)
        # A greedy choice misses the best one by less than one step of one layer.
        assert sum(choice.error for choice in found) <= 1.6 * best
    assert [choice.bits for choice in cheapest(choices, sum(sizes))] == [6] * 4


def test_the_least_budget_and_layers_that_gain_nothing():
    flat = [Choice(2, 10, 1.0), Choice(3, 15, 1.0), Choice(4, 20, 1.0)]
    falling = [Choice(2, 10, 1.0), Choice(3, 15, 0.2), Choice(4, 20, 0.1)]
    assert [choice.bits for choice in cheapest([flat, falling], 20)] == [2, 2]
    assert [choice.bits for choice in cheapest([flat, falling], 29)] == [2, 3]
    assert [choice.bits for choice in cheapest([flat, falling], 1000)] == [2, 4]
    tied = [Choice(8, 10, 0.1), Choice(2, 10, 0.5), Choice(7, 11, 0.2)]
    assert [choice.bits for choice in cheapest([sorted(tied, key=lambda one: (one.size, one.error))], 100)] == [8]


@pytest.fixture(scope="module")
def model():
    """Three convolutions, of which the second has channels that hardly matter to its output."""
    keras.utils.set_random_seed(5)
    layers = [
        keras.layers.Conv2D(16, 3, activation="relu", name="first"),
        keras.layers.Conv2D(32, 3, activation="relu", name="second"),
        keras.layers.Conv2D(32, 3, name="third"),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(10, name="head"),
    ]
    return keras.Sequential([keras.Input((12, 12, 3), name="x"), *layers])


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return rng.laplace(size=(48, 12, 12, 3)).astype(np.float32)


def options(**changes):
    return tfquant.QuantConfig(**{"verify": False, "preset": "fast", **changes})


def bits_of(plan):
    return {name: float(bits.mean()) for name, bits in plan.weight_bits.items()}


@pytest.mark.parametrize("allocate", [False, True])
def test_a_budget_is_kept_and_used(model, data, allocate):
    plain = tfquant.quantize(model, data, options(placement="int8"))
    for share in (0.1, 0.13, 0.2):
        found = tfquant.quantize(model, data, options(size_budget=share, bit_allocation=allocate))
        budget = share * found.report.size_before
        assert 0.9 * budget < found.report.size_after <= budget
        assert set(bits_of(found.plan).values()) <= set(range(2, 8))
    in_bytes = tfquant.quantize(model, data, options(size_budget=int(budget), bit_allocation=allocate))
    assert bits_of(in_bytes.plan) == bits_of(found.plan)
    large = tfquant.quantize(model, data, options(size_budget=1.0))
    assert not large.plan.is_simulated
    assert "The model fits into the size budget with 8 bits: without the budget it runs in INT8." in large.report.warnings
    assert large.plan.weight_scales.keys() == plain.plan.weight_scales.keys()
    assert all(np.array_equal(large.plan.weight_scales[name], scales) for name, scales in plain.plan.weight_scales.items())


def test_a_mix_errs_less_than_as_many_bits_everywhere(model, data):
    def noise(found):
        reference, other = (next(iter(run({"x": data}).values())) for run in (found.float_function(), found.simulation()))
        return float(((reference - other) ** 2).sum())

    uniform = tfquant.quantize(model, data, options(weight_bits=4))
    mixed = tfquant.quantize(model, data, options(size_budget=uniform.report.size_after))
    assert mixed.report.size_after <= uniform.report.size_after
    assert len(set(bits_of(mixed.plan).values())) > 1
    assert noise(mixed) < noise(uniform)


def test_a_budget_that_no_bits_can_keep(model, data):
    with pytest.raises(
        ConfigError, match=r"The model has \d+ bytes with the fewest bits: raise size_budget\. Received: 100 bytes"
    ):
        tfquant.quantize(model, data, options(size_budget=100))


@pytest.mark.parametrize("seed", range(200, 206))
def test_any_graph_can_have_few_bits(seed):
    """Random graphs of all kinds of units: each has a best estimator, and bits that keep a budget."""
    case = fuzzing.make(seed)
    simplify(case.graph)
    annotation = annotate(case.graph, onednn.TABLE)
    units = annotation.units
    stats = collect(case.graph, observed(annotation), case.batches)
    selection = select(case.graph, annotation, stats, case.batches, bits=4)
    assert all(np.isfinite(list(errors.values())).all() for errors in selection.errors.values())

    def plan(bits):
        options = {"target": "onednn", "signature_keys": ("any",), "estimator": "auto", "chosen": selection.chosen}
        return make_plan(annotation, stats, bits=bits, **options)

    def size(found):
        return model_bytes(case.graph, units.values(), found.weight_bits, found.weight_offsets)

    few = plan(Bits(weights=4, activations=4, allocate=seed % 2 == 0))
    budget = size(few) + 100  # a channel of few values has its bits in whole bytes
    mixed = plan(Bits(layers=choose_bits(case.graph, annotation, case.batches, Bits(), budget)))
    assert size(mixed) <= budget
    for found in (few, mixed):
        simulation = fakequant.lower(case.graph, units, found)
        for outputs in building.run(simulation, case.batches, dict(simulation.outputs)):
            assert all(np.isfinite(value).all() for value in outputs.values() if value.dtype.kind == "f")
