"""Tests of tfquant.observe and the specs: exact merging, the collector against NumPy, estimators, zero points."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import functools
import itertools
import math

import numpy as np
import pytest
import tensorflow as tf

from tfquant.errors import DataError, ModelError
from tfquant.graph.ir import Graph
from tfquant.observe.collector import Collector, collect
from tfquant.observe.estimators import ESTIMATORS, mean_min_max, min_max, mse, percentile
from tfquant.observe.statistics import BINS, MIN_EXPONENT, TensorStats, exponent_for
from tfquant.plan.spec import MAX_SCALE, MIN_SCALE, QuantSpec, asymmetric, symmetric

ROWS, WIDTH = 24, 50


def identity_graph(width=WIDTH, ops=()):
    """x, and each of `ops` of x, as tensors to observe."""
    graph = Graph()
    attrs = {"dtype": tf.float32, "shape": tf.TensorShape((None, width))}
    node = graph.add("Placeholder", name="x", attrs=attrs, dtypes=[tf.float32])
    graph.inputs["x"] = node.out
    tensors = [node.out]
    for kind in ops:
        tensors.append(graph.add(kind, [node.out], name=f"layer/{kind}", attrs={"T": tf.float32}, dtypes=[tf.float32]).out)
    graph.outputs.update({tensor.name: tensor for tensor in tensors})
    graph.infer()
    return graph, tensors


@functools.cache
def collector_of(width):
    graph, tensors = identity_graph(width)
    return Collector(graph, tensors)


def gather(*batches):
    """The statistics of each batch alone."""
    collector = collector_of(batches[0].shape[1])
    found = []
    for batch in batches:
        collector.stats.clear()
        collector.update({"x": batch})
        found.extend(collector.stats.values())
    return found


def merged(parts):
    result = parts[0]
    for part in parts[1:]:
        result = result.merge(part)
    return result


def exact(stats):
    """What must not depend on order at all: whole numbers, extremes, and the histogram without empty ends."""
    used = np.flatnonzero(stats.counts)
    first, last = int(used[0]), int(used[-1])
    bins = (stats.exponent, stats.first + first, tuple(int(n) for n in stats.counts[first : last + 1]))
    return (stats.samples, stats.elements, stats.low, stats.high, *bins)


def data_of(kind, rng, rows=ROWS, width=WIDTH):
    normal = rng.normal(size=(rows, width))
    made = {
        "gaussian": lambda: normal,
        "relu": lambda: np.maximum(normal, 0),
        "negative": lambda: -np.abs(normal) - 3,
        "positive": lambda: np.abs(normal) + 1e-3,
        "constant": lambda: np.full((rows, width), 0.7),
        "negative constant": lambda: np.full((rows, width), -1e-7),
        "zero": lambda: np.zeros((rows, width)),
        "mostly zero": lambda: normal * (rng.random((rows, width)) < 0.02),
        "offset": lambda: 1000 + rng.random((rows, width)) * 1e-3,
        "negative offset": lambda: -1000 - rng.random((rows, width)) * 1e-3,
        "huge": lambda: normal * 1e36,
        "tiny": lambda: normal * 1e-15,
        "tiny and large rows": lambda: normal * 10.0 ** rng.integers(-10, 15, (rows, 1)),
        "large": lambda: normal * 1e15,
        "powers of two": lambda: np.sign(normal) * 2.0 ** rng.integers(-30, 30, (rows, width)),
        "outlier": lambda: np.where(np.arange(rows * width).reshape(rows, width) == 77, 1e4, normal),
        "whole numbers": lambda: rng.integers(-128, 128, (rows, width)),
        "heavy tails": lambda: rng.standard_cauchy((rows, width)),
    }
    return made[kind]().astype(np.float32)


KINDS = (
    "gaussian relu negative positive constant|negative constant|zero|mostly zero|offset|negative offset|huge|tiny|"
    "large|tiny and large rows|powers of two|outlier|whole numbers|heavy tails"
)
KINDS = [kind for part in KINDS.split("|") for kind in (part.split() if part.startswith("gaussian") else [part])]


# The histogram


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_in_any_order_gives_exactly_the_same(kind):
    rng = np.random.default_rng(len(kind))
    data = data_of(kind, rng)
    (whole,) = gather(data)
    for _ in range(6):
        cuts = np.sort(rng.choice(np.arange(1, ROWS), size=rng.integers(1, 8), replace=False))
        parts = gather(*[data[a:b] for a, b in itertools.pairwise([0, *cuts, ROWS])])
        rng.shuffle(parts)
        middle = len(parts) // 2
        found = merged(parts)
        assert exact(found) == exact(whole)
        assert exact(merged([merged(parts[:middle]), merged(parts[middle:])] if middle else parts)) == exact(whole)
        scale = float(np.abs(data).max()) * ROWS
        assert abs(found.sum_low - whole.sum_low) <= 1e-12 * scale
        assert abs(found.sum_high - whole.sum_high) <= 1e-12 * scale


# Beside "huge" values "tiny" ones are beyond float32: see test_values_that_a_bin_cannot_see_count_as_zero.
PAIRS = [(a, b) for a in KINDS for b in ("offset", "zero", "tiny", "large", "negative") if (a, b) != ("huge", "tiny")]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_merging_two_kinds_is_gathering_both(first, second):
    rng = np.random.default_rng(3)
    one, other = data_of(first, rng, rows=4), data_of(second, rng, rows=4)
    (whole,) = gather(np.concatenate([one, other]))
    parts = gather(one, other)
    assert exact(parts[0].merge(parts[1])) == exact(parts[1].merge(parts[0])) == exact(whole)


def test_values_that_a_bin_cannot_see_count_as_zero():
    one, other = np.full((1, 8), -1e-30, np.float32), np.full((1, 8), 1e30, np.float32)
    (whole,) = gather(np.concatenate([one, other]))
    edges, counts = whole.histogram()
    assert whole.low == float(np.float32(-1e-30))
    assert counts.sum() == 16
    assert counts[np.flatnonzero(edges[:-1] == 0)[0]] == 8


@pytest.mark.parametrize("kind", KINDS)
def test_collector_counts_as_numpy_does(kind):
    data = data_of(kind, np.random.default_rng(5))
    (stats,) = gather(data)
    assert (stats.samples, stats.elements) == (ROWS, data.size)
    assert (stats.low, stats.high) == (float(data.min()), float(data.max()))
    assert stats.exponent == exponent_for(stats.low, stats.high)
    assert len(stats.counts) <= BINS
    values = data.astype(np.float64)
    assert stats.sum_low == pytest.approx(values.min(1).sum(), rel=1e-12)
    assert stats.sum_high == pytest.approx(values.max(1).sum(), rel=1e-12)
    numbers = np.floor(values / 2.0**stats.exponent).astype(np.int64) - stats.first
    assert numbers.min() == 0
    assert np.array_equal(np.bincount(numbers.reshape(-1), minlength=len(stats.counts)), stats.counts)
    edges, counts = stats.histogram()
    assert len(edges) == len(counts) + 1
    assert edges[0] <= stats.low < edges[1]
    assert counts.sum() == data.size


@pytest.mark.parametrize("kind", ["gaussian", "relu", "offset", "outlier", "huge", "heavy tails", "positive"])
def test_bins_are_as_fine_as_they_can_be(kind):
    (stats,) = gather(data_of(kind, np.random.default_rng(6)))
    spread = stats.high - stats.low
    width = 2.0**stats.exponent
    assert spread / width <= BINS - 2
    assert spread / width > (BINS - 2) / 2 - 1 or width <= max(abs(stats.low), abs(stats.high)) * 2.0**-21


def test_exponents():
    assert exponent_for(0.0, 0.0) == MIN_EXPONENT
    assert exponent_for(0.0, 4094.0) == 1
    assert exponent_for(0.0, 4093.9) == 0
    assert exponent_for(-4094.0, 0.0) == 1
    assert exponent_for(1024.0, 1024.0) == 11 - 22


def test_memory_is_bounded():
    rng = np.random.default_rng(0)
    parts = gather(*[data_of("heavy tails", rng, rows=2) for _ in range(60)])
    result = parts[0]
    for part in parts[1:]:
        result = result.merge(part)
        assert len(result.counts) <= BINS
    assert result.counts.sum() == result.elements == 60 * 2 * WIDTH


def test_counts_pass_32_bits():
    (stats,) = gather(data_of("gaussian", np.random.default_rng(0)))
    for _ in range(32):
        stats = stats.merge(stats)
    assert stats.elements == stats.counts.sum() == ROWS * WIDTH * 2**32


# The collector


def test_collect_over_batches_of_several_tensors():
    graph, tensors = identity_graph(ops=["Relu", "Neg", "Tanh"])
    data = data_of("gaussian", np.random.default_rng(1))
    stats = collect(graph, tensors, [{"x": data[i : i + 7]} for i in range(0, ROWS, 7)])
    assert list(stats) == tensors
    expected = [data, np.maximum(data, 0), -data]
    for tensor, values in zip(tensors, expected, strict=False):
        assert exact(stats[tensor]) == exact(gather(values)[0])
    assert stats[tensors[3]].high == pytest.approx(np.tanh(data.max()), rel=1e-5)


def test_extremes_alone():
    """Of tensors whose histograms nobody needs; batches without a finite extreme do not count."""
    graph, tensors = identity_graph(ops=["Neg", "Reciprocal"])
    data = data_of("gaussian", np.random.default_rng(1))
    collector = Collector(graph, tensors[:1], tensors[1:])
    batches = [data[i : i + 7] for i in range(0, ROWS, 7)]
    for batch in batches:
        collector.update({"x": batch})
    assert list(collector.stats) == tensors[:1]
    assert collector.ends[tensors[1]] == (-data.max(), -data.min())
    low, high = collector.ends[tensors[2]]
    collector.update({"x": np.zeros_like(batches[0])})
    assert collector.ends[tensors[2]] == (low, high)


def test_collector_takes_tensors_of_any_rank():
    graph = Graph()
    attrs = {"dtype": tf.float32, "shape": tf.TensorShape((None, 3, 5, 2))}
    x = graph.add("Placeholder", name="x", attrs=attrs, dtypes=[tf.float32]).out
    graph.inputs["x"] = graph.outputs["y"] = x
    graph.infer()
    data = np.random.default_rng(0).normal(size=(6, 3, 5, 2)).astype(np.float32)
    stats = collect(graph, [x], [{"x": data}])[x]
    assert (stats.samples, stats.elements) == (6, data.size)
    assert stats.sum_high == pytest.approx(data.reshape(6, -1).max(1).astype(np.float64).sum())


@pytest.mark.parametrize(("op", "bad"), [("Log", -1.0), ("Log", 0.0), ("Reciprocal", 0.0), ("Exp", 1000.0)])
def test_values_that_are_not_finite_name_their_op(op, bad):
    graph, tensors = identity_graph(ops=[op])
    data = np.ones((3, WIDTH), np.float32)
    collect(graph, tensors, [{"x": data}])
    data[1, 7] = bad
    with pytest.raises(DataError, match=f"at layer/{op}"):
        collect(graph, tensors, [{"x": data}])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_data_that_is_not_finite_names_the_input(bad):
    graph, tensors = identity_graph(ops=["Relu"])
    data = np.ones((3, WIDTH), np.float32)
    data[2, 3] = bad
    with pytest.raises(DataError, match="first at x"):
        collect(graph, tensors, [{"x": data}])


def test_large_finite_values_are_no_error():
    (stats,) = gather(np.full((ROWS, WIDTH), 3e38, np.float32))
    assert stats.high == float(np.float32(3e38))


def test_no_batches():
    graph, tensors = identity_graph()
    with pytest.raises(DataError, match="no samples"):
        collect(graph, tensors, [])


# Estimators


def stats_of(data):
    return gather(np.asarray(data, np.float32).reshape(len(data), -1))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_min_max(kind):
    data = data_of(kind, np.random.default_rng(1))
    assert min_max(stats_of(data)) == (float(data.min()), float(data.max()))


def test_mean_min_max():
    data = np.array([[-1, 0, 3], [-3, 1, 2], [0.5, 0.5, 4]], np.float32)
    assert mean_min_max(stats_of(data)) == pytest.approx(((-1 - 3 + 0.5) / 3, 3.0))
    data = data_of("gaussian", np.random.default_rng(2))
    assert mean_min_max(stats_of(data)) == pytest.approx((data.min(1).mean(), data.max(1).mean()), rel=1e-6)


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9, 99.999])
@pytest.mark.parametrize("kind", ["gaussian", "relu", "heavy tails", "offset", "negative", "outlier"])
def test_percentile_is_numpys_within_a_bin(kind, percent):
    data = data_of(kind, np.random.default_rng(7), rows=200, width=100)
    stats = stats_of(data)
    width = 2.0**stats.exponent
    low, high = percentile(stats, percent=percent)
    rest = (100 - percent) / (1 if data.min() >= 0 else 2)
    ranked = np.sort(data.reshape(-1).astype(np.float64))
    place = (100 - rest) / 100 * data.size
    least, most = ranked[max(0, math.floor(place) - 2)], ranked[min(data.size - 1, math.ceil(place) + 1)]
    assert least - width <= high <= most + width
    assert high <= data.max()
    if data.min() >= 0:
        assert low == data.min()
    else:
        place = rest / 100 * data.size
        least, most = ranked[max(0, math.floor(place) - 2)], ranked[min(data.size - 1, math.ceil(place) + 1)]
        assert least - width <= low <= most + width
        assert low >= data.min()


def quantization_error(data, low, high):
    """The true mean squared error of 8-bit quantization, through the spec."""
    spec = asymmetric(low, high, "test", "x")
    scale = spec.scale
    values = data.astype(np.float64)
    steps = np.clip(np.round(values / scale) + spec.zero_point, 0, 255) - spec.zero_point
    return float(np.mean((steps * scale - values) ** 2))


@pytest.mark.parametrize(("kind", "outlier"), [("gaussian", 60.0), ("relu", 20.0), ("gaussian", -40.0), ("negative", -60.0)])
def test_mse_clips_an_outlier(kind, outlier):
    data = data_of(kind, np.random.default_rng(1), rows=1000, width=1000)
    data[3, 3] = outlier
    stats = stats_of(data)
    low, high = mse(stats)
    assert max(-low, high) < 0.7 * abs(outlier)
    assert quantization_error(data, low, high) < 0.7 * quantization_error(data, *min_max(stats))


def sample(kind, rng, count):
    made = {
        "gaussian": lambda: rng.normal(size=count),
        "laplace": lambda: rng.laplace(size=count),
        "relu": lambda: np.maximum(rng.normal(size=count), 0),
        "relu6": lambda: np.clip(rng.normal(2, 3, size=count), 0, 6),
        "uniform": lambda: rng.uniform(-1, 3, size=count),
        "shifted": lambda: rng.normal(1, 0.5, size=count),
        "student": lambda: rng.standard_t(4, size=count),
        "swish": lambda: (lambda x: x / (1 + np.exp(-x)))(rng.normal(0, 2, size=count)),
        "two modes": lambda: np.where(rng.random(count) < 0.3, rng.normal(-5, 0.2, count), rng.normal(2, 1, count)),
        "constant": lambda: np.full(count, 0.37),
    }
    return made[kind]().astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "kind", ["gaussian", "laplace", "relu", "relu6", "uniform", "shifted", "student", "swish", "two modes", "constant"]
)
def test_mse_is_never_worse_than_min_max(kind, seed):
    data = sample(kind, np.random.default_rng(seed), 40000).reshape(100, 400)
    stats = stats_of(data)
    low, high = mse(stats)
    assert min(0, stats.low) <= low <= 0 <= high <= max(0, stats.high)
    reference = quantization_error(data, *min_max(stats))
    # Swish crowds at its low end, where rounding errors are not uniform.
    limit = 1.1 if kind == "swish" else 1.01
    assert quantization_error(data, low, high) <= limit * reference + 1e-14
    if kind in ("laplace", "student"):
        assert quantization_error(data, low, high) < 0.96 * reference


@pytest.mark.parametrize("name", list(ESTIMATORS))
@pytest.mark.parametrize("kind", KINDS)
def test_every_estimator_gives_a_range_within_what_was_seen(name, kind):
    data = data_of(kind, np.random.default_rng(9))
    stats = stats_of(data)
    low, high = ESTIMATORS.get(name)(stats, 8)
    assert np.isfinite([low, high]).all()
    assert min(0, stats.low) <= low <= high <= max(0, stats.high)
    spec = asymmetric(low, high, name, "x")
    assert spec.low <= 0 <= spec.high


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_estimators_scale_with_the_data(name):
    """Powers of two change no bin: the range is exactly so much larger."""
    data = data_of("gaussian", np.random.default_rng(11))
    low, high = ESTIMATORS.get(name)(stats_of(data), 8)
    for factor in (2.0**-20, 2.0, 2.0**30):
        assert ESTIMATORS.get(name)(stats_of(data * np.float32(factor)), 8) == (low * factor, high * factor)


# Specs


@pytest.mark.parametrize("seed", range(20))
def test_zero_is_exact_and_one_end_moves_by_half_a_step_at_most(seed):
    rng = np.random.default_rng(seed)
    low, high = sorted(rng.normal(0, 10.0 ** rng.integers(-6, 6), 2))
    spec = asymmetric(low, high, "test", "x")
    low, high = min(low, 0), max(high, 0)
    assert isinstance(spec.zero_point, int)
    assert 0 <= spec.zero_point <= 255
    assert float(np.float32(spec.scale)) == spec.scale
    assert spec.low + spec.zero_point * spec.scale == pytest.approx(0, abs=1e-12 * spec.scale)
    assert spec.high - spec.low == pytest.approx(high - low, rel=1e-6)
    assert max(abs(spec.low - low), abs(spec.high - high)) <= (0.5 + 1e-4) * spec.scale
    assert spec.offset == spec.low


@pytest.mark.parametrize(
    ("low", "high", "zero_point", "scale"),
    [
        (0.0, 2.55, 0, 0.01),
        (-2.55, 0.0, 255, 0.01),
        (1.0, 2.55, 0, 0.01),  # one-sided: 0 is included
        (-2.55, -1.0, 255, 0.01),
        (-1.28, 1.27, 128, 0.01),
        (0.0, 0.0, 0, 1 / 255),
        (0.7, 0.7, 0, 0.7 / 255),
        (-0.7, -0.7, 255, 0.7 / 255),
        (-1e-9, 255.0, 0, 1.0),
        (-255.0, 1e-9, 255, 1.0),
    ],
)
def test_asymmetric(low, high, zero_point, scale):
    spec = asymmetric(low, high, "mse", "group")
    assert spec == QuantSpec("quint8", float(np.float32(scale)), zero_point, "mse", "group")


@pytest.mark.parametrize(
    ("low", "high", "scale"), [(-1.0, 1.27, 0.01), (-1.27, 0.1, 0.01), (0.0, 0.0, 1 / 127), (0.0, 12.7, 0.1), (-12.7, -3, 0.1)]
)
def test_symmetric(low, high, scale):
    spec = symmetric(low, high, "mse", "group")
    assert spec == QuantSpec("qint8", float(np.float32(scale)), 0, "mse", "group")
    assert spec.offset == 0
    assert (spec.low, spec.high) == (-127 * spec.scale, 127 * spec.scale)


@pytest.mark.parametrize("make", [asymmetric, symmetric])
@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1e-40), (-1e-30, 1e-38), (-1e38, 3e38), (0.0, 3.4e38), (-3e38, 0.0), (0.0, 1e-12)]
)
def test_scales_stay_where_float32_can_multiply_them(make, low, high):
    spec = make(low, high, "test", "x")
    assert np.float32(MIN_SCALE) <= np.float32(spec.scale) <= np.float32(MAX_SCALE)
    least, largest = spec.limits
    assert least <= spec.zero_point <= largest
    assert spec.low <= 0 <= spec.high


def test_merge_is_a_new_object():
    one, other = gather(np.ones((2, 3), np.float32), -np.ones((2, 3), np.float32))
    before = exact(one), exact(other)
    both = one.merge(other)
    assert isinstance(both, TensorStats)
    assert (exact(one), exact(other)) == before
    assert (both.low, both.high, both.samples) == (-1.0, 1.0, 4)


def test_what_tensorflow_cannot_run_is_a_model_error():
    with tf.Graph().as_default() as scratch:
        x = tf.compat.v1.placeholder(tf.float32, (None, 4), name="x")
        y = tf.reshape(tf.nn.relu(x), (-1, 8), name="y")
    graph = Graph.from_graph_def(scratch.as_graph_def(), {"x": "x:0"}, {"y": y.name})
    with pytest.raises(ModelError, match=r"cannot run the float model on this data: InvalidArgumentError: .*reshape") as raised:
        collect(graph, [graph.outputs["y"]], [{"x": np.ones((3, 4), np.float32)}])
    assert "\n" not in str(raised.value)
