"""Tests of tfquant.simplify: every pass fires as often as it should, and the numbers stay."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfquant.graph.ir import Graph
from tfquant.graph.loading import load_saved_model
from tfquant.simplify import PASSES, affine, canonical, cleanup, constants, reshapes, simplify

LAYERS = keras.layers
TOLERANCE = 1e-5
SHAPE = (None, 9, 9, 4)


def weights(*shape, seed=0, scale=0.5):
    return tf.constant(np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32))


def trace(function, *shapes):
    """The graph of a function, as it stands after freezing; inputs are named x0, x1 ..."""
    specs = [tf.TensorSpec(shape, tf.float32, name=f"x{i}") for i, shape in enumerate(shapes)]
    concrete = tf.function(function, autograph=False).get_concrete_function(*specs)
    outputs = {f"y{i}": tensor.name for i, tensor in enumerate(concrete.outputs)}
    return Graph.from_graph_def(concrete.graph.as_graph_def(), {spec.name: f"{spec.name}:0" for spec in specs}, outputs)


def run(graph, feeds):
    with tf.Graph().as_default() as scratch, tf.compat.v1.Session(graph=scratch) as session:
        tf.graph_util.import_graph_def(graph.to_graph_def(), name="")
        fetches = [f"{tensor.node.name}:{tensor.index}" for tensor in graph.outputs.values()]
        return session.run(fetches, {f"{graph.inputs[key].node.name}:0": value for key, value in feeds.items()})


def counts(graph):
    """How many of each op the outputs need, constants and inputs left out."""
    result = {}
    for node in graph.order():
        if node.op not in ("Const", "Placeholder", "NoOp"):
            result[node.op] = result.get(node.op, 0) + 1
    return result


def check(graph, run_pass=simplify, batch=3, seed=0):
    """Runs `run_pass`, holds the numbers before and after together, and returns (fired, ops left)."""
    rng = np.random.default_rng(seed)
    feeds = {
        key: rng.normal(0, 1, [size or batch for size in tensor.shape]).astype(np.float32) for key, tensor in graph.inputs.items()
    }
    shapes = [tensor.shape for tensor in graph.outputs.values()]
    names = list(graph.outputs)
    expected = run(graph, feeds)
    fired = run_pass(graph)
    graph.prune()
    graph.infer()
    found = run(graph, feeds)
    assert list(graph.outputs) == names
    for one, other in zip(expected, found, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert np.isfinite(one).all()
        assert np.abs(one - other).max() <= TOLERANCE * np.abs(one).max()
    for before, after in zip(shapes, (tensor.shape for tensor in graph.outputs.values()), strict=True):
        assert before == after or before is None or None in before
    return fired, counts(graph)


def conv(x, out=5, kernel=3, seed=0, padding="SAME", strides=1):
    return tf.nn.conv2d(x, weights(kernel, kernel, x.shape[-1], out, seed=seed), strides, padding)


def depthwise(x, multiplier=2, seed=0, padding="SAME"):
    return tf.nn.depthwise_conv2d(x, weights(3, 3, x.shape[-1], multiplier, seed=seed), [1, 1, 1, 1], padding)


# BatchNorm as Keras 3 exports it


def randomize(model, spread=2.0, seed=0):
    """BatchNorm statistics that differ from channel to channel, by up to `spread`, and weights of all signs."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, LAYERS.BatchNormalization):
            size = layer.get_weights()[0].shape
            gamma, variance = (rng.uniform(1, spread, size) for _ in range(2))
            layer.set_weights([gamma, rng.normal(0, 1, size), rng.normal(0, 1, size), variance])


def exported(tmp_path, layers, shape=SHAPE[1:], spread=2.0):
    """The frozen graph of a Keras model that was written and read as a SavedModel."""
    model = keras.Sequential([keras.Input(shape), *layers])
    randomize(model, spread)
    model.export(tmp_path / "model", verbose=False)
    return load_saved_model(tmp_path / "model").graph


def norm(**options):
    return LAYERS.BatchNormalization(**options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape", "op"),
    [
        (lambda bias: LAYERS.Conv2D(5, 3, padding="same", use_bias=bias), (9, 9, 4), "Conv2D"),
        (lambda bias: LAYERS.Conv2D(5, 3, strides=2, use_bias=bias), (9, 9, 4), "Conv2D"),
        (lambda bias: LAYERS.DepthwiseConv2D(3, padding="same", use_bias=bias), (9, 9, 4), "DepthwiseConv2dNative"),
        (lambda bias: LAYERS.DepthwiseConv2D(3, depth_multiplier=3, use_bias=bias), (9, 9, 4), "DepthwiseConv2dNative"),
        (lambda bias: LAYERS.Dense(5, use_bias=bias), (12,), "MatMul"),
    ],
)
def test_keras_batch_norm_behind_a_layer(tmp_path, layer, shape, op, bias):
    graph = exported(tmp_path, [layer(bias), norm(), LAYERS.ReLU()], shape)
    assert counts(graph)["Rsqrt"] == 1
    fired, left = check(graph)
    assert left == {op: 1, "BiasAdd": 1, "Relu": 1}
    assert fired["fold scales and shifts (BatchNorm)"] == 2
    assert fired["fold constants"] >= 2


@pytest.mark.parametrize("options", [{"center": False}, {"scale": False}, {"center": False, "scale": False}])
def test_keras_batch_norm_without_center_or_scale(tmp_path, options):
    layers = [LAYERS.Conv2D(5, 3), norm(**options)]
    model = keras.Sequential([keras.Input((9, 9, 4)), *layers])
    model.export(tmp_path / "model", verbose=False)
    _, left = check(load_saved_model(tmp_path / "model").graph)
    assert left == {"Conv2D": 1, "BiasAdd": 1}


def test_keras_separable_conv_and_batch_norm(tmp_path):
    graph = exported(tmp_path, [LAYERS.SeparableConv2D(6, 3, padding="same"), norm(), LAYERS.ReLU(6.0)])
    _, left = check(graph)
    assert left == {"DepthwiseConv2dNative": 1, "Conv2D": 1, "BiasAdd": 1, "Relu6": 1}


@pytest.mark.parametrize(
    ("layer", "left"),
    [
        (lambda: LAYERS.Conv2D(5, 3, padding="valid"), {"Conv2D": 1, "BiasAdd": 1}),
        (lambda: LAYERS.Conv2D(5, 3, padding="same"), {"AddV2": 1, "Conv2D": 1, "BiasAdd": 1}),
        (lambda: LAYERS.DepthwiseConv2D(3, depth_multiplier=2), {"DepthwiseConv2dNative": 1, "BiasAdd": 1}),
        (lambda: LAYERS.DepthwiseConv2D(3, padding="same"), {"AddV2": 1, "DepthwiseConv2dNative": 1, "BiasAdd": 1}),
    ],
)
def test_keras_batch_norm_before_a_conv(tmp_path, layer, left):
    _, found = check(exported(tmp_path, [norm(), layer()], spread=1.5))
    if "AddV2" in left:  # zeros around the input forbid to move the shift; scale and shift stay together or the scale goes
        assert found in (left, {**left, "Mul": 1})
    else:
        assert found == left


def test_keras_batch_norm_before_dense(tmp_path):
    _, left = check(exported(tmp_path, [norm(), LAYERS.Dense(5)], (12,), spread=1.5))
    assert left == {"MatMul": 1, "BiasAdd": 1}


def test_batch_norm_that_would_spread_the_weights_stays(tmp_path):
    model = keras.Sequential([keras.Input((9, 9, 4)), norm(), LAYERS.Conv2D(5, 3)])
    ones = np.ones(4)
    model.layers[0].set_weights([ones * [1, 1, 1, 40], 0 * ones, 0 * ones, ones])
    model.export(tmp_path / "model", verbose=False)
    _, left = check(load_saved_model(tmp_path / "model").graph)
    assert left["Mul"] == 1


@pytest.mark.parametrize(("padding", "expected"), [("valid", {}), ("same", {"AddV2": 1})])
def test_keras_rescaling_before_a_conv(tmp_path, padding, expected):
    layers = [LAYERS.Rescaling(1 / 127.5, offset=-1.0), LAYERS.Conv2D(5, 3, padding=padding)]
    _, left = check(exported(tmp_path, layers))
    assert left.get("Mul", 0) <= bool(expected)
    assert {op: count for op, count in left.items() if op != "Mul"} == {"Conv2D": 1, "BiasAdd": 1, **expected}


def test_keras_rescaling_without_offset_goes_through_padding(tmp_path):
    _, left = check(exported(tmp_path, [LAYERS.Rescaling(1 / 255), LAYERS.Conv2D(5, 3, padding="same")]))
    assert left == {"Conv2D": 1, "BiasAdd": 1}


def test_keras_dropout_and_flatten_with_any_batch(tmp_path):
    layers = [LAYERS.Conv2D(5, 3), LAYERS.Dropout(0.5), LAYERS.Flatten(), LAYERS.Dense(3), LAYERS.Activation("linear")]
    graph = exported(tmp_path, layers)
    assert next(iter(graph.inputs.values())).shape == (None, 9, 9, 4)
    fired, left = check(graph)
    assert left == {"Conv2D": 1, "BiasAdd": 2, "Reshape": 1, "MatMul": 1}
    assert fired["drop identities"] >= 1


# Canonical forms


def batch_norm_3(x, training=False, seed=0, epsilon=1e-3):
    rng = np.random.default_rng(seed)
    channels = x.shape[-1]
    scale, offset, mean = (tf.constant(rng.normal(0, 1, channels).astype(np.float32)) for _ in range(3))
    variance = tf.constant(rng.uniform(0.1, 4, channels).astype(np.float32))
    empty = tf.zeros([0])
    statistics = (empty, empty) if training else (mean, variance)
    result = tf.raw_ops.FusedBatchNormV3(
        x=x, scale=scale, offset=offset, mean=statistics[0], variance=statistics[1], epsilon=epsilon, is_training=training
    )
    return result.y


def test_fused_batch_norm_becomes_a_scale_and_a_shift():
    fired, left = check(trace(batch_norm_3, SHAPE), canonical.run)
    assert (fired, left) == (1, {"Mul": 1, "AddV2": 1, "Identity": 1})


@pytest.mark.parametrize("layer", [conv, depthwise])
def test_fused_batch_norm_goes_into_the_layer_before(layer):
    fired, left = check(trace(lambda x: tf.nn.relu(batch_norm_3(layer(x))), SHAPE))
    name = "Conv2D" if layer is conv else "DepthwiseConv2dNative"
    assert left == {name: 1, "BiasAdd": 1, "Relu": 1}
    assert fired["canonical forms"] == 1
    assert fired["fold scales and shifts (BatchNorm)"] == 2


def test_fused_batch_norm_in_training_stays():
    fired, left = check(trace(lambda x: batch_norm_3(conv(x), training=True), SHAPE), canonical.run)
    assert fired == 0
    assert left["FusedBatchNormV3"] == 1


def test_sub_and_division_by_constants():
    factor = weights(4, seed=1)
    fired, left = check(trace(lambda x: (x - factor) / tf.constant([1.5, -2.0, 3.0, 0.25]), SHAPE), canonical.run)
    assert fired == 2
    assert (left["AddV2"], left["Mul"]) == (1, 1)


def test_sub_from_and_division_of_a_constant_stay():
    fired, left = check(trace(lambda x: tf.constant(2.0) / (tf.constant(3.0) - tf.abs(x) * 0.01), SHAPE), canonical.run)
    assert fired == 0
    assert (left["Sub"], left["RealDiv"]) == (1, 1)


def test_division_by_zero_stays():
    graph = trace(lambda x: x / tf.constant([1.0, 0.0, 1.0, 1.0]), SHAPE)
    assert canonical.run(graph) == 0
    assert counts(graph)["RealDiv"] == 1


def test_whole_numbers_are_left_alone():
    specs = [tf.TensorSpec((None, 4), tf.int32, name="x0")]
    concrete = tf.function(lambda x: (x - 3) * 2 * 5).get_concrete_function(*specs)
    graph = Graph.from_graph_def(concrete.graph.as_graph_def(), {"x0": "x0"}, {"y": concrete.outputs[0].name})
    assert canonical.run(graph) + affine.run(graph) == 0


@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 1, 1, 5), (), (1,)])
def test_add_of_a_channel_vector_is_a_bias(shape):
    fired, left = check(trace(lambda x: weights(*shape, seed=3) + conv(x), SHAPE), canonical.run)
    assert fired == 1
    assert left["BiasAdd"] == 1
    assert "AddV2" not in left


@pytest.mark.parametrize("shape", [(9, 1), (9, 5), (9, 9, 5), (3, 1, 1, 1), (1, 1, 1, 1, 5)])
def test_add_of_anything_else_is_none(shape):
    fired, left = check(trace(lambda x: weights(*shape, seed=3) + conv(x), SHAPE), canonical.run)
    assert fired == 0
    assert left["AddV2"] == 1


def test_transposed_weights_of_a_matmul():
    fired, left = check(trace(lambda x: tf.matmul(x, weights(5, 12), transpose_b=True), (None, 12)), canonical.run)
    assert (fired, left["MatMul"]) == (1, 1)


# Scales and shifts


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: conv(x) * weights(5, seed=2), {"Conv2D": 1}),
        (lambda x: weights(5, seed=2) * tf.nn.bias_add(conv(x), weights(5, seed=1)), {"Conv2D": 1, "BiasAdd": 1}),
        (lambda x: depthwise(x) * weights(8, seed=2) + weights(8, seed=4), {"DepthwiseConv2dNative": 1, "BiasAdd": 1}),
        (lambda x: tf.nn.bias_add(tf.nn.bias_add(conv(x), weights(5, seed=1)), weights(5, seed=2)), {"Conv2D": 1, "BiasAdd": 1}),
        (lambda x: (conv(x) * 0.5 + 1.0) * weights(5, seed=2) + weights(5, seed=3), {"Conv2D": 1, "BiasAdd": 1}),
        (lambda x: conv(x) * weights(9, 9, 1, seed=2), {"Conv2D": 1, "Mul": 1}),
        (lambda x: conv(x, 1) * weights(5, seed=2), {"Conv2D": 1, "Mul": 1}),
    ],
)
def test_scales_and_shifts_behind_a_layer(function, left):
    assert check(trace(function, SHAPE))[1] == left


def level(channels, seed):
    return tf.constant(np.random.default_rng(seed).uniform(0.5, 2, channels).astype(np.float32))


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: conv(x * level(4, 1)), {"Conv2D": 1}),
        (lambda x: conv(x * level(4, 1) + weights(4, seed=2), padding="VALID"), {"Conv2D": 1, "BiasAdd": 1}),
        (lambda x: depthwise(x * level(4, 1)), {"DepthwiseConv2dNative": 1}),
        (lambda x: depthwise(x + weights(4, seed=2), 3, padding="VALID"), {"DepthwiseConv2dNative": 1, "BiasAdd": 1}),
        (lambda x: conv(x + weights(4, seed=2)), {"AddV2": 1, "Conv2D": 1}),
        (lambda x: conv(x + weights(4, seed=2), padding=[[0, 0], [1, 1], [1, 1], [0, 0]]), {"AddV2": 1, "Pad": 1, "Conv2D": 1}),
        (lambda x: conv(x * weights(9, 1, 4, seed=2)), {"Mul": 1, "Conv2D": 1}),
        (lambda x: tf.nn.conv2d(x * level(4, 1), weights(3, 3, 2, 6), 1, "VALID"), {"Mul": 1, "Conv2D": 1}),  # grouped
    ],
)
def test_scales_and_shifts_before_a_layer(function, left):
    assert check(trace(function, SHAPE))[1] == left


def test_scales_before_a_matmul():
    function = lambda x: tf.matmul(x * level(12, 1) + weights(12, seed=2), weights(12, 5))  # noqa: E731
    assert check(trace(function, (None, 12)))[1] == {"MatMul": 1, "BiasAdd": 1}
    function = lambda x: tf.matmul(x * level(12, 1), weights(7, 5), transpose_a=True)  # noqa: E731
    assert check(trace(function, (7, 12)))[1] == {"Mul": 1, "MatMul": 1}


@pytest.mark.parametrize("count", [2, 3, 6])
def test_chains_of_scales_and_shifts_merge(count):
    def function(x):
        for index in range(count):
            x = x * weights(4, seed=index)
        x = tf.nn.relu(x)
        for index in range(count):
            x = weights(*((4,), (9, 1, 4), (9, 9, 1))[index % 3], seed=index) + x
        return x

    fired, left = check(trace(function, SHAPE))
    assert left == {"Mul": 1, "AddV2": 1, "Relu": 1}
    assert fired["fold scales and shifts (BatchNorm)"] == 2 * (count - 1)


def test_a_scale_that_others_read_too_moves_into_both_layers():
    def function(x):
        scaled = x * level(4, 1)
        return conv(scaled, seed=1), conv(scaled, seed=2), tf.nn.relu(scaled)

    fired, left = check(trace(function, SHAPE))
    assert fired["fold scales and shifts (BatchNorm)"] == 2
    assert left == {"Conv2D": 2, "Mul": 1, "Relu": 1}


@pytest.mark.parametrize("second", ["relu", "other scale", "output"])
def test_a_layer_with_two_readers_is_not_changed(second):
    def function(x):
        y = conv(x)
        scaled = y * weights(5, seed=1)
        return scaled, {"relu": tf.nn.relu, "other scale": lambda y: y * weights(5, seed=2), "output": tf.identity}[second](y)

    _, left = check(trace(function, SHAPE))
    assert left["Conv2D"] == 1
    assert left["Mul"] == (2 if second == "other scale" else 1)


def test_a_bias_with_two_readers_is_not_changed():
    def function(x):
        y = tf.nn.bias_add(conv(x), weights(5, seed=1))
        return y * weights(5, seed=2), y + weights(5, seed=3), y

    _, left = check(trace(function, SHAPE))
    assert left == {"Conv2D": 1, "BiasAdd": 1, "Mul": 1, "AddV2": 1}


def test_two_layers_with_the_same_weights():
    def function(x):
        shared = weights(3, 3, 4, 5)
        one, other = (tf.nn.conv2d(part, shared, 1, "SAME") for part in (x, tf.nn.relu(x)))
        return one * weights(5, seed=1), other

    assert check(trace(function, SHAPE))[1] == {"Conv2D": 2, "Relu": 1}


@pytest.mark.parametrize("seed", range(6))
def test_random_stacks(seed):
    """Layers with scales and shifts of random shapes between."""
    rng = np.random.default_rng(seed)

    def function(x):
        tensors = [x]
        for step in range(10):
            y = tensors[int(rng.integers(max(0, len(tensors) - 3), len(tensors)))]
            channels = y.shape[-1]
            kind = rng.integers(7)
            shape = [(channels,), (), (1, 1, channels), (9, 1, 1), (1,)][rng.integers(5)]
            if kind == 0:
                y = conv(y, 4, seed=step, kernel=int(rng.choice([1, 3]))) * 0.5
            elif kind == 1:
                y = depthwise(y, 1, seed=step)
            elif kind == 2:
                y = tf.nn.relu(y)
            elif kind == 3:
                y = y + weights(*shape, seed=step)
            elif kind == 4:
                y = weights(*shape, seed=step, scale=1.0) * y
            elif kind == 5:
                y = y / (1.5 + weights(channels, seed=step, scale=0.1)) - weights(*shape, seed=step)
            else:
                y = batch_norm_3(y, seed=step)
            tensors.append(y)
        return tensors[-1], tensors[-2]

    graph = trace(function, SHAPE)
    before = sum(counts(graph).values())
    fired, left = check(graph)
    assert sum(fired.values()) > 0
    assert sum(left.values()) < before
    assert sum(simplify(graph).values()) == 0


# Constants


def test_constants_fold_to_one():
    fired, left = check(trace(lambda x: x * tf.sqrt(tf.reduce_sum(weights(4, 4) ** 2) + 1.0), SHAPE), constants.run)
    assert fired == 1
    assert {op for op in left if op != "Identity"} == {"Mul"}


def test_a_big_fill_stays_an_op():
    graph = trace(lambda x: x + tf.raw_ops.Fill(dims=tf.constant([1, 600, 600, 4]), value=1.0), (None, 600, 600, 4))
    size = graph.to_graph_def().ByteSize()
    assert constants.run(graph) == 0
    assert counts(graph)["Fill"] == 1
    simplify(graph)
    assert counts(graph)["Fill"] == 1
    assert graph.to_graph_def().ByteSize() <= size


def test_a_small_fill_and_what_is_made_of_a_big_one_are_folded():
    fired, left = check(trace(lambda x: x + tf.raw_ops.Fill(dims=tf.constant([9, 4]), value=1.5), SHAPE), constants.run)
    assert fired == 1
    assert "Fill" not in left
    function = lambda x: x + tf.reduce_mean(tf.raw_ops.Fill(dims=tf.constant([1000, 1000]), value=1.5))  # noqa: E731
    fired, left = check(trace(function, SHAPE), constants.run)
    assert fired == 1
    assert "Fill" not in left


def test_what_is_random_or_depends_on_data_stays():
    graph = trace(lambda x: x + tf.random.uniform([4]) + tf.cast(tf.shape(x)[0], tf.float32), SHAPE)
    assert constants.run(graph) == 0
    assert counts(graph)["RandomUniform"] == 1


def test_an_output_that_is_constant():
    fired, left = check(trace(lambda x: (tf.nn.relu(x), tf.reduce_sum(weights(4))), SHAPE))
    assert fired["fold constants"] == 1
    assert left == {"Relu": 1}


def test_all_outputs_of_a_node_fold():
    def function(x):
        left, right = tf.split(weights(4, 4), 2)
        return x * left + tf.nn.relu(x * right)

    fired, left = check(trace(function, (None, 2, 4)))
    assert fired["fold constants"] == 1
    assert left == {"Mul": 2, "AddV2": 1, "Relu": 1}


# Reshapes


@pytest.mark.parametrize("target", ["known", "inferred"])
def test_flatten_by_the_shape_of_its_input(target):
    def function(x):
        y = tf.nn.relu(x)
        return tf.matmul(tf.reshape(y, [tf.shape(y)[0], 9 * 9 * 4 if target == "known" else -1]), weights(9 * 9 * 4, 3))

    graph = trace(function, SHAPE)
    fired, left = check(graph)
    assert fired["static reshapes"] == 1
    assert left == {"Relu": 1, "Reshape": 1, "MatMul": 1}
    assert graph.outputs["y0"].shape == (None, 3)


def test_reshape_with_two_unknown_sizes_stays():
    graph = trace(lambda x: tf.reshape(x, [tf.shape(x)[0], tf.shape(x)[1] * 9, 4]), (None, None, 9, 4))
    feed = {"x0": np.ones((2, 5, 9, 4), np.float32)}
    expected = run(graph, feed)
    fired = simplify(graph)
    assert fired["static reshapes"] == 0
    assert np.array_equal(run(graph, feed), expected)


def test_reshape_by_a_known_shape():
    fired, left = check(trace(lambda x: tf.reshape(x, tf.stack([tf.shape(x)[0] * 9, 36])), (2, 9, 36)), reshapes.run)
    assert fired <= 1
    assert left["Reshape"] == 1


# Identities and control edges


def test_identities_go():
    def function(x):
        y = tf.raw_ops.Snapshot(input=tf.stop_gradient(tf.identity(x)))
        return tf.identity(tf.nn.relu(y)), y

    graph = trace(function, SHAPE)
    total = sum(counts(graph).values())
    fired, left = check(graph, cleanup.run)
    assert fired == total - 1 >= 4
    assert left == {"Relu": 1}


def test_check_numerics_goes():
    def function(x):
        return tf.nn.relu(tf.debugging.check_numerics(conv(x) * 0.5, "bad"))

    assert check(trace(function, SHAPE))[1] == {"Conv2D": 1, "Relu": 1}


def test_an_output_that_is_an_input():
    graph = trace(lambda x: (tf.identity(x), tf.nn.relu(x)), SHAPE)
    _, left = check(graph)
    assert left == {"Relu": 1}
    assert graph.outputs["y0"] == graph.inputs["x0"]


def test_control_edges_from_ops_without_effect_go():
    def function(x):
        with tf.control_dependencies([tf.raw_ops.NoOp()]):
            y = tf.identity(x)
        with tf.control_dependencies([tf.abs(x)]):
            return tf.nn.relu(y)

    graph = trace(function, SHAPE)
    _, left = check(graph)
    assert left == {"Relu": 1}
    assert [node.control for node in graph.order() if node.control] == []


def test_control_edges_from_ops_with_effects_stay():
    def function(x):
        with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(x < 1e6), ["too large"])]):
            return tf.nn.relu(tf.identity(x))

    graph = trace(function, SHAPE)
    _, left = check(graph)
    assert left["Assert"] == 1
    with pytest.raises(tf.errors.InvalidArgumentError, match="too large"):
        run(graph, {"x0": np.full((1, 9, 9, 4), 1e7, np.float32)})


# All together


def test_every_pass_is_named_and_counted(tmp_path):
    graph = exported(tmp_path, [LAYERS.Conv2D(5, 3), norm(), LAYERS.ReLU()])
    fired = simplify(graph)
    assert list(fired) == list(PASSES)
    assert sum(fired.values()) > 5
    assert sum(simplify(graph).values()) == 0


def test_the_same_graph_gives_the_same_bytes(tmp_path):
    graph = exported(tmp_path, [norm(), LAYERS.Conv2D(5, 3), norm(), LAYERS.ReLU(), LAYERS.Flatten(), LAYERS.Dense(3)])
    twin = graph.copy()
    assert simplify(graph) == simplify(twin)
    assert graph.to_graph_def().SerializeToString(deterministic=True) == twin.to_graph_def().SerializeToString(deterministic=True)
