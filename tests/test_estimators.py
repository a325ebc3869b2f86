"""Tests of the estimators: numbers on known distributions, and what each is good for."""

import math

import numpy as np
import pytest

import tfquant
from tfquant import registry
from tfquant.errors import ConfigError
from tfquant.observe import clipping
from tfquant.observe.estimators import ESTIMATORS, SquaredErrors, aciq, entropy, estimate, min_max, mse, percentile
from tfquant.observe.statistics import TensorStats, exponent_for
from tfquant.plan.spec import asymmetric

COUNT = 200_000


def stats_of(values, rows=1):
    """The statistics that the collector gathers of an array."""
    values = np.asarray(values, np.float32).astype(np.float64).reshape(rows, -1)
    low, high = float(values.min()), float(values.max())
    exponent = exponent_for(low, high)
    numbers = np.floor(values / 2.0**exponent).astype(np.int64)
    first = int(numbers.min())
    counts = np.bincount((numbers - first).reshape(-1))
    lows, highs = values.min(1).sum(), values.max(1).sum()
    return TensorStats(rows, values.size, low, high, float(lows), float(highs), exponent, first, counts.astype(np.int64))


KINDS = {
    "normal": lambda normal, laplace: normal,
    "laplace": lambda normal, laplace: laplace,
    "relu": lambda normal, laplace: np.maximum(normal, 0),
    "negative": lambda normal, laplace: -np.abs(laplace) - 0.5,
    "uniform": lambda normal, laplace: np.linspace(-1, 1, len(normal)),
    "shifted": lambda normal, laplace: laplace + 20,
    "sparse": lambda normal, laplace: laplace * (np.arange(len(normal)) % 100 == 0),
    "gap": lambda normal, laplace: np.where(np.arange(len(normal)) == 5, 1e3, normal),
    "constant": lambda normal, laplace: np.full_like(normal, -0.7),
    "zero": lambda normal, laplace: np.zeros_like(normal),
    "tiny": lambda normal, laplace: normal * 1e-20,
    "huge": lambda normal, laplace: normal * 1e30,
    "two values": lambda normal, laplace: np.where(normal > 1, 3.0, 0.0),
}


def values_of(kind, count=COUNT):
    rng = np.random.default_rng(1)
    return KINDS[kind](rng.normal(size=count), rng.laplace(size=count)).astype(np.float32)


def rounding_error(values, low, high, bits):
    """The mean squared error of the values themselves."""
    spec = asymmetric(low, high, "test", "x", bits)
    values = values.astype(np.float64)
    stored = np.clip(np.rint(values / spec.scale) + spec.zero_point, *spec.limits)
    return float(((values - (stored - spec.zero_point) * spec.scale) ** 2).mean())


# Analytic clipping: the published constants, for 1 to 9 bits.


@pytest.mark.parametrize(
    ("function", "published", "digits"),
    [
        (clipping.laplace, (1.863, 2.831, 3.897, 5.029, 6.205, 7.413, 8.646, 9.897, 11.163), 1e-3),
        (clipping.gauss, (1.24, 1.71, 2.15, 2.56, 2.94, 3.29, 3.62, 3.92, 4.22), 1e-2),
    ],
)
def test_published_constants(function, published, digits):
    assert [function(bits) for bits in range(1, 10)] == pytest.approx(published, abs=digits)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_constants_are_the_minima_of_the_published_errors(bits):
    def laplace(a):
        return 2 * math.exp(-a) + a * a / (3 * 4**bits)

    def gauss(a):
        tail = (1 + a * a) * math.erfc(a / math.sqrt(2)) - math.sqrt(2 / math.pi) * a * math.exp(-a * a / 2)
        return tail + a * a / (3 * 4**bits)

    for error, found in ((laplace, clipping.laplace(bits)), (gauss, clipping.gauss(bits))):
        assert error(found) < min(error(found * 0.99), error(found * 1.01))


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize(
    ("kind", "reach"),
    [("laplace", clipping.laplace), ("normal", clipping.gauss)],
)
def test_aciq_finds_the_distribution(kind, reach, bits):
    low, high = aciq(stats_of(values_of(kind)), bits)
    assert (low, high) == pytest.approx((-reach(bits), reach(bits)), rel=0.02)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_aciq_behind_a_relu_takes_one_bit_more(bits):
    values = np.abs(values_of("laplace"))  # half of a distribution: mean and diversity of an exponential one
    low, high = aciq(stats_of(values), bits)
    diversity = 2 / math.e
    ends = (1 + clipping.laplace(bits + 1) * diversity, 1 + clipping.gauss(bits + 1))
    assert low == pytest.approx(0, abs=1e-3)
    assert min(abs(high - end) / end for end in ends) < 0.02
    mirrored = aciq(stats_of(-values), bits)
    assert mirrored == pytest.approx((-high, 0), abs=0.02 * high)


def test_aciq_keeps_all_that_clipping_does_not_help():
    values = values_of("uniform")
    assert aciq(stats_of(values), 8) == (float(values.min()), float(values.max()))
    assert aciq(stats_of(values_of("constant")), 4) == (float(np.float32(-0.7)),) * 2


# Entropy


def test_entropy_leaves_a_lone_value_out():
    values = values_of("gap")
    low, high = entropy(stats_of(values), 8)
    assert high < 200
    assert low == float(values.min())


def test_entropy_keeps_a_uniform_distribution():
    values = values_of("uniform")
    low, high = entropy(stats_of(values), 8)
    assert (low, high) == pytest.approx((-1, 1), abs=0.02)


def test_entropy_of_fewer_bins_than_levels_keeps_all():
    values = values_of("two values")[:100]
    assert entropy(stats_of(values), 8) == pytest.approx((0.0, 3.0), abs=1e-3)
    assert entropy(stats_of(values_of("constant")), 8) == pytest.approx((-0.7, -0.7), abs=1e-6)


def test_the_zeros_of_a_relu_do_not_decide():
    values = values_of("relu")
    alone, with_zeros = (entropy(stats_of(part), 4)[1] for part in (values[values > 0], values))
    assert with_zeros == pytest.approx(alone, rel=0.05)


# Fewer bits


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "laplace", "relu", "sparse", "uniform", "gap"])
def test_mse_is_near_the_best_range(kind, bits):
    values = values_of(kind, 20_000)
    stats = stats_of(values)
    found = rounding_error(values, *mse(stats, bits), bits)
    grid = np.linspace(0.02, 1, 50)
    lows = [0.0] if stats.low >= 0 else stats.low * grid
    best = min(rounding_error(values, low, high, bits) for low in lows for high in stats.high * grid)
    assert found <= 1.05 * best


@pytest.mark.parametrize("bits", [2, 4])
def test_fewer_bits_are_clipped_harder(bits):
    stats = stats_of(values_of("laplace"))
    for estimator in (mse, aciq):
        assert estimator(stats, bits)[1] < 0.8 * estimator(stats, 8)[1]
        wide, narrow = (rounding_error(values_of("laplace"), *ends, bits) for ends in (min_max(stats), estimator(stats, bits)))
        assert narrow < 0.5 * wide


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_errors_over_the_histogram_are_those_of_the_values(bits):
    values = values_of("laplace")
    errors = SquaredErrors(stats_of(values), bits)
    ends = [(-2.0, 3.0), (-8.0, 8.0), (0.0, 5.0), (-1.0, 0.0)]
    found = errors(*(np.array(side) for side in zip(*ends, strict=True)))
    assert found == pytest.approx([rounding_error(values, *pair, bits) for pair in ends], rel=0.02)


# All of them


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_any_distribution_gives_a_range_within_what_was_seen(name, kind, bits):
    values = values_of(kind, 5000)
    stats = stats_of(values, rows=10)
    low, high = estimate(name, stats, bits, "x")
    assert min(0, stats.low) <= low <= high <= max(0, stats.high)
    spec = asymmetric(low, high, name, "x", bits)
    assert spec.low <= 0 <= spec.high


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_halves_merge_to_the_range_of_the_whole(name, kind):
    values = values_of(kind, 5000)
    whole = stats_of(values, rows=10)
    merged = stats_of(values[:1500], rows=3).merge(stats_of(values[1500:], rows=7))
    for bits in (4, 8):
        assert estimate(name, merged, bits, "x") == pytest.approx(estimate(name, whole, bits, "x"), rel=1e-12)


@pytest.mark.parametrize("value", [-0.01055908203125, 3.14159, -7.3e4, 0.0])
def test_a_percentile_of_a_constant_is_the_constant(value):
    stats = stats_of(np.full(36, value), 4)
    assert percentile(stats) == (stats.low, stats.high)


def test_a_percentile_leaves_its_share_out():
    stats = stats_of(np.linspace(-1, 1, 100_001))
    assert percentile(stats, 8, 90) == pytest.approx((-0.9, 0.9), abs=1e-3)


@pytest.mark.parametrize("name", list(ESTIMATORS))
@pytest.mark.parametrize("value", [-0.010559082, 0.010559082, -1e-7, 3.3e4])
def test_a_constant_is_a_range_of_its_own(name, value):
    stats = stats_of(np.full(1000, value))
    low, high = estimate(name, stats, 8, "x")
    assert min(0, stats.low) <= low <= high <= max(0, stats.high)
    spec = asymmetric(low, high, name, "x")
    assert max(-spec.low, spec.high) == pytest.approx(abs(value), rel=1e-2)


def test_mirrored_statistics():
    values = values_of("negative", 3000)
    stats, mirrored = stats_of(values), stats_of(-values)
    found = stats.mirrored()
    assert (found.low, found.high, found.sum_low, found.sum_high) == (
        mirrored.low,
        mirrored.high,
        mirrored.sum_low,
        mirrored.sum_high,
    )
    edges, counts = found.histogram()
    expected, _ = np.histogram(-values.astype(np.float64), edges + 1e-12)
    assert np.abs(counts - expected).max() <= 1


@pytest.mark.parametrize("kind", ["normal", "relu", "negative", "shifted"])
def test_a_histogram_around_zero_holds_zero_and_all_values(kind):
    values = values_of(kind, 5000)
    zero, width, counts = stats_of(values).around_zero()
    assert 0 <= zero < len(counts) <= 4096
    edges = (np.arange(len(counts) + 1) - zero) * width
    assert edges[zero] == 0
    assert counts.sum() == len(values)
    assert np.array_equal(np.histogram(values.astype(np.float64), edges)[0], counts)


# Those of users


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {kind: {} for kind in registry.GROUPS})


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda stats, bits: 1 / 0, "The estimator 'mine' fails on layer: ZeroDivisionError: division by zero"),
        (lambda stats: (0, 1), "The estimator 'mine' fails on layer: TypeError: "),
        (lambda stats, bits: 3, "finite numbers (low, high), low <= high. Received: 3 for layer"),
        (lambda stats, bits: (1, 0), "finite numbers (low, high), low <= high. Received: (1, 0) for layer"),
        (lambda stats, bits: (0, float("nan")), "finite numbers (low, high), low <= high. Received: (0, nan) for layer"),
        (lambda stats, bits: ("a", "b"), "finite numbers (low, high), low <= high. Received: ('a', 'b') for layer"),
    ],
)
def test_an_estimator_that_fails_is_one_line(registered, function, message):
    tfquant.register_estimator("mine")(function)
    with pytest.raises(ConfigError) as error:
        estimate("mine", stats_of(values_of("normal", 100)), 8, "layer")
    assert message in str(error.value)


def test_registered_names_are_options(registered):
    with pytest.raises(ConfigError, match="estimator must be one of"):
        tfquant.QuantConfig(estimator="mine")
    tfquant.register_estimator("mine")(lambda stats, bits: (stats.low, stats.high))
    assert tfquant.QuantConfig(estimator="mine").estimator == "mine"
    with pytest.raises(ConfigError, match=r"aciq, mine, auto\. Received: 'other'"):
        tfquant.QuantConfig(estimator="other")


def test_the_name_of_the_choice_is_taken():
    with pytest.raises(ConfigError, match="'auto' is one of tfquant's own"):
        tfquant.register_estimator("auto")
