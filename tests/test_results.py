"""Tests of what other targets can store in 8 bits of a plan's float results."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import building
import numpy as np
import pytest
import tensorflow as tf

import tfquant
from tfquant.plan.annotate import annotate
from tfquant.plan.results import find_results, head_of
from tfquant.plan.serialize import load_plan, save_plan
from tfquant.simplify import simplify
from tfquant.targets.onednn import TABLE

IMAGES = {"x": (None, 8, 8, 4)}


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def conv(x: tf.Tensor, name: str, seed: int = 0) -> tf.Tensor:
    with tf.name_scope(name):
        y = tf.nn.conv2d(x, values(3, 3, 4, 4, seed=seed), 1, "SAME", name="conv")
        return tf.nn.bias_add(y, values(4, seed=seed), name="bias")


def results(function, keep_float=lambda node: None) -> list[str]:
    graph = building.build(function, IMAGES)
    simplify(graph)
    annotation = annotate(graph, TABLE, keep_float)
    return [tensor.name for tensor in find_results(graph, annotation, keep_float)]


def residual(x):
    return tf.nn.relu(conv(tf.nn.relu(conv(x, "one"), name="first"), "other", 1) + x, name="last")


def test_ends_of_what_is_computed_at_once():
    """The summand, which oneDNN adds up within the convolution, and the result, which the model shows; no bias or ReLU inside."""
    assert results(residual) == ["other/bias", "last"]


def test_a_classifier():
    def network(x):
        y = tf.reduce_mean(tf.nn.relu(conv(x, "one")), [1, 2], name="mean")
        return tf.nn.softmax(tf.nn.bias_add(tf.matmul(y, values(4, 3)), values(3), name="scores"))

    assert results(network) == ["Relu", "scores"], "the mean is read in 8 bits, the layer in front of it is not"


def test_inside_of_composites():
    def norm(x):
        y = conv(x, "one")
        mean, variance = tf.nn.moments(y, [-1], keepdims=True)
        y = (y - mean) * tf.math.rsqrt(variance + 1e-3) * values(4, seed=3) + values(4, seed=4)
        return tf.nn.relu(y, name="last")

    assert results(norm)[0] == "one/bias"
    assert len(results(norm)) == 2, "LayerNorm and its ReLU"

    def gelu(x):
        return tf.nn.gelu(conv(x, "one"))

    assert len(results(gelu)) == 1


def test_what_the_user_holds():
    assert results(residual, lambda node: "held" if node.name == "other/conv" else None) == ["first", "last"]


def test_heads():
    graph = building.build(residual, IMAGES)
    heads = {name: head_of(graph, graph.nodes[name]).name for name in ("one/bias", "first", "last")}
    assert heads == {"one/bias": "one/conv", "first": "one/conv", "last": "add"}


def test_ranges_in_the_plan(tmp_path):
    module = tf.Module()
    module.f = tf.function(lambda x: {"y": residual(x)}, input_signature=[tf.TensorSpec(IMAGES["x"], tf.float32, name="x")])
    tf.saved_model.save(module, str(tmp_path / "model"), signatures={"serving_default": module.f})
    data = values(20, 8, 8, 4, seed=5)
    config = tfquant.QuantConfig(verify=False, placement="int8", preset="fast")
    plan = tfquant.quantize(tmp_path / "model", data, config).plan
    expected = module.f(tf.constant(data))["y"].numpy()
    assert plan.ranges["last"] == pytest.approx((expected.min(), expected.max()), rel=1e-5)
    save_plan(plan, tmp_path)
    assert load_plan(tmp_path / "quant_plan.json").ranges == plan.ranges
    text = (tmp_path / "quant_plan.json").read_text()
    (tmp_path / "quant_plan.json").write_text(text.replace(f'"last": [\n   {plan.ranges["last"][0]}', '"last": [\n   1e9'))
    with pytest.raises(tfquant.PlanError, match="the ends of the range of last must be finite and in order"):
        load_plan(tmp_path / "quant_plan.json")
