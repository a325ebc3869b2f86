"""Tests of tfquant.simplify.precision: float32 everywhere but at the interface and around what has to stay half."""

import building
import keras
import numpy as np
import pytest
import tensorflow as tf

from tfquant.graph.ir import Graph
from tfquant.graph.loading import load_saved_model
from tfquant.simplify import precision, simplify

LAYERS = keras.layers
HALF = [tf.float16, tf.bfloat16]
SHAPE = (None, 9, 10, 4)
# What a value may be off in half precision, of the largest.
TOLERANCE = {tf.float16: 5e-3, tf.bfloat16: 4e-2}


def weights(*shape, dtype=tf.float32, seed=0, scale=0.3):
    return tf.constant(np.random.default_rng(seed).normal(0, scale, shape).astype(dtype.as_numpy_dtype))


def trace(function, *specs):
    """The graph of a function of tensors with these (shape, dtype)."""
    specs = [tf.TensorSpec(shape, dtype, name=f"x{i}") for i, (shape, dtype) in enumerate(specs)]
    concrete = tf.function(function, autograph=False).get_concrete_function(*specs)
    outputs = {f"y{i}": tensor.name for i, tensor in enumerate(concrete.outputs)}
    return Graph.from_graph_def(concrete.graph.as_graph_def(), {spec.name: spec.name for spec in specs}, outputs)


def values(graph, batch=3, seed=0):
    rng = np.random.default_rng(seed)
    return {
        key: rng.normal(0, 1, [size or batch for size in tensor.shape]).astype(tensor.dtype.as_numpy_dtype)
        for key, tensor in graph.inputs.items()
    }


def half_ops(graph):
    return [node.op for node in graph.order() if set(node.dtypes) & set(HALF)]


def counts(graph):
    ops = [node.op for node in graph.order() if node.op not in ("Const", "Placeholder", "Identity")]
    return {op: ops.count(op) for op in sorted(set(ops))}


def run(graph, feeds):
    return {key: value.astype(np.float64) for key, value in building.run(graph, [feeds])[0].items()}


def check(graph, tolerance, run_pass=precision.run, reference=None):
    """Runs the pass, holds types and numbers against those before (and the graph `reference`); returns (fired, ops left)."""
    feeds = values(graph)
    expected = run(graph, feeds)
    interface = [{key: tensor.dtype for key, tensor in part.items()} for part in (graph.inputs, graph.outputs)]
    fired = run_pass(graph)
    told = {node.name: node.dtypes for node in graph.order()}
    graph.prune()
    graph.infer()
    assert told == {node.name: node.dtypes for node in graph.order()}
    assert interface == [{key: tensor.dtype for key, tensor in part.items()} for part in (graph.inputs, graph.outputs)]
    found = run(graph, feeds)
    for key, value in expected.items():
        assert found[key].shape == value.shape
        assert np.abs(found[key] - value).max() <= tolerance * np.abs(value).max()
    if reference is not None:
        exact = run(reference, {key: value.astype(np.float32) for key, value in feeds.items()})
        for key, value in exact.items():
            assert np.abs(found[key] - value).max() <= 1e-5 * np.abs(value).max()
    again = run_pass(graph)
    assert (again if isinstance(again, int) else sum(again.values())) == 0
    return fired, counts(graph)


def network(dtype):
    """conv, BatchNorm, depthwise, dense: in `dtype`, between Casts."""

    def function(x):
        y = tf.cast(x, dtype)
        y = tf.nn.conv2d(y, tf.cast(weights(3, 3, 4, 8), dtype), 1, "SAME")
        ones = tf.ones([8])
        y = tf.raw_ops.FusedBatchNormV3(
            x=y, scale=ones * 1.5, offset=weights(8), mean=weights(8, seed=1), variance=ones, is_training=False
        )[0]
        y = tf.nn.depthwise_conv2d(tf.nn.relu(y), tf.cast(weights(3, 3, 8, 1, seed=2), dtype), [1, 1, 1, 1], "SAME")
        y = tf.nn.max_pool2d(tf.nn.relu6(y + tf.cast(weights(8, seed=3), dtype)), 2, 2, "VALID")
        y = tf.reduce_mean(tf.concat([y, tf.nn.avg_pool2d(y, 3, 1, "SAME")], -1), [1, 2])
        return tf.cast(tf.matmul(y, tf.cast(weights(16, 5, seed=4), dtype)), tf.float32)

    return function


@pytest.mark.parametrize("dtype", HALF)
def test_a_network_between_casts(dtype):
    exact = trace(network(tf.float32), (SHAPE, tf.float32))
    fired, left = check(trace(network(dtype), (SHAPE, tf.float32)), TOLERANCE[dtype], reference=exact)
    assert fired >= 12
    assert "Cast" not in left
    graph = trace(network(dtype), (SHAPE, tf.float32))
    simplify(graph)
    simplify(exact)
    assert half_ops(graph) == []
    assert counts(graph) == counts(exact)


@pytest.mark.parametrize("dtype", HALF)
def test_inputs_and_outputs_keep_their_type(dtype):
    def function(x):
        y = tf.nn.relu(tf.nn.conv2d(x, weights(3, 3, 4, 5, dtype=dtype), 1, "SAME"))
        return y, tf.nn.sigmoid(y), tf.cast(y, tf.float32), x

    graph = trace(function, (SHAPE, dtype))
    fired, left = check(graph, TOLERANCE[dtype])
    assert fired >= 4
    assert left["Cast"] == 4
    simplify(graph)
    assert counts(graph)["Cast"] == 3
    assert graph.outputs["y3"] == graph.inputs["x0"]
    assert half_ops(graph).count("Conv2D") == 0
    assert [tensor.dtype for tensor in graph.outputs.values()] == [dtype, dtype, tf.float32, dtype]


def test_models_without_half_precision_are_left_alone():
    def function(x):
        y = tf.cast(tf.cast(x, tf.float64), tf.float32)
        return tf.nn.relu(tf.nn.conv2d(y, weights(3, 3, 4, 5), 1, "SAME")), tf.cast(x > 0, tf.int32)

    graph = trace(function, (SHAPE, tf.float32))
    before = graph.to_graph_def().SerializeToString(deterministic=True)
    assert precision.run(graph) == 0
    assert graph.to_graph_def().SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("dtype", HALF)
def test_lists_of_types(dtype):
    def function(x):
        parts = tf.raw_ops.IdentityN(input=[tf.cast(x, dtype), tf.cast(x, tf.int32), x])
        return tf.nn.relu(parts[0]), parts[1], parts[2]

    graph = trace(function, (SHAPE, tf.float32))
    assert check(graph, TOLERANCE[dtype])[0] > 0
    node = next(node for node in graph.order() if node.op == "IdentityN")
    assert node.attr("T") == [tf.float32, tf.int32, tf.float32]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("middle", [tf.int32, tf.float64, tf.uint8])
def test_casts_of_other_types(dtype, middle):
    def function(x):
        whole = tf.cast(x * 30.0 + 100.0, middle)
        y = tf.cast(whole, dtype)
        return tf.cast(y, tf.float32), tf.nn.tanh(y), tf.cast(tf.nn.relu(y), middle)

    fired, _ = check(trace(function, (SHAPE, tf.float32)), 1e-2)
    assert fired > 0


@pytest.mark.parametrize("dtype", HALF)
def test_from_one_half_precision_to_the_other(dtype):
    other = next(item for item in HALF if item != dtype)
    function = lambda x: tf.nn.relu(tf.cast(tf.nn.tanh(tf.cast(x, other)), dtype))  # noqa: E731
    graph = trace(function, (SHAPE, dtype))
    _, left = check(graph, TOLERANCE[tf.bfloat16])
    assert left == {"Cast": 2, "Relu": 1, "Tanh": 1}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "middle",
    [
        lambda y: tf.bitcast(tf.bitcast(y, tf.uint16), y.dtype),
        lambda y: tf.strings.length(tf.io.serialize_tensor(y)),
        lambda y: y + tf.random.stateless_uniform([1, 4], (1, 2), dtype=y.dtype),
        lambda y: tf.while_loop(lambda i, z: i < 3, lambda i, z: (i + 1, z * 0.5), [0, y])[1],
        lambda y: tf.cond(tf.size(y) > 0, lambda: tf.nn.relu(y), lambda: y),
        lambda y: tf.map_fn(tf.nn.tanh, y),
        lambda y: tf.quantization.quantize_and_dequantize_v2(tf.cast(y, tf.float32), -2.0, 2.0),
    ],
)
def test_what_has_to_stay_half(dtype, middle):
    def function(x):
        y = middle(tf.nn.relu(tf.cast(x, dtype)) * weights(4, dtype=dtype))
        return tf.nn.relu(tf.cast(y, dtype) * weights(1, dtype=dtype)), y

    graph = trace(function, ((None, 4), tf.float32))
    library = graph.library.SerializeToString(deterministic=True)
    fired, _ = check(graph, TOLERANCE[dtype])
    assert fired >= 3
    assert not {"Relu", "Mul"} & set(half_ops(graph))
    assert graph.library.SerializeToString(deterministic=True) == library
    assert precision.run(graph) == 0
    check(trace(function, ((None, 4), tf.float32)), TOLERANCE[dtype], simplify)


@pytest.mark.parametrize("dtype", HALF)
def test_constants_that_both_kinds_read(dtype):
    """The op that stays half gets the constant as it was; folding it back would go on for ever."""

    def function(x):
        shared = weights(4, dtype=dtype)
        bits = tf.bitcast(tf.bitcast(shared, tf.int16) ^ tf.cast(x[0] > 0, tf.int16), dtype)
        return tf.cast(tf.nn.relu(tf.cast(x, dtype) * shared), tf.float32), bits, shared

    graph = trace(function, ((None, 4), tf.float32))
    _, left = check(graph, TOLERANCE[dtype], simplify)
    assert left["Bitcast"] >= 1
    assert half_ops(graph).count("Mul") == 0


def test_what_is_computed_before_stays_before():
    """Control edges survive, also those of a Cast."""

    def function(x):
        y = tf.nn.relu(tf.cast(x, tf.float16))
        with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(x < 1e4), ["too large"])]):
            return tf.cast(y, tf.float32)

    graph = trace(function, (SHAPE, tf.float32))
    check(graph, 5e-3)
    with pytest.raises(tf.errors.InvalidArgumentError, match="too large"):
        building.run(graph, [{"x0": np.full((1, 9, 10, 4), 2e4, np.float32)}])


def test_casts_that_others_wait_for_are_not_counted_again():
    def function(x):
        narrow = tf.cast(tf.cast(x, tf.float32), tf.float16)
        with tf.control_dependencies([narrow]):
            return tf.nn.relu(x) * 2.0, narrow

    check(trace(function, (SHAPE, tf.float16)), 5e-3)


def test_a_cast_that_lost_its_readers_is_made_again():
    def function(x):
        there = tf.cast(tf.cast(x, tf.bfloat16), tf.float32)
        return tf.cast(there, tf.float16), tf.nn.relu(x)

    check(trace(function, (SHAPE, tf.float16)), 4e-2)


# Keras, and INT8


def keras_graph(path, policy, half_output=False):
    before = keras.mixed_precision.dtype_policy()
    keras.mixed_precision.set_global_policy(policy)
    try:
        keras.utils.set_random_seed(1)
        inputs = keras.Input((16, 16, 3))
        y = LAYERS.ReLU()(LAYERS.BatchNormalization()(LAYERS.Conv2D(16, 3, padding="same", use_bias=False)(inputs)))
        z = LAYERS.ReLU()(LAYERS.BatchNormalization()(LAYERS.DepthwiseConv2D(3, padding="same", use_bias=False)(y)))
        z = LAYERS.BatchNormalization()(LAYERS.Conv2D(16, 1, use_bias=False)(z))
        y = LAYERS.MaxPooling2D()(LAYERS.ReLU()(LAYERS.Add()([y, z])))
        y = LAYERS.Conv2D(24, 3, activation="relu")(y)
        y = LAYERS.Dense(32, activation="relu")(LAYERS.Flatten()(y))
        y = LAYERS.Dense(5, dtype=None if half_output else "float32")(y)
        model = keras.Model(inputs, y)
        rng = np.random.default_rng(0)
        for layer in model.layers:
            if isinstance(layer, LAYERS.BatchNormalization):
                size = layer.get_weights()[0].shape
                spread = [rng.uniform(0.7, 1.5, size), rng.normal(0, 0.3, size), rng.normal(0, 0.3, size)]
                layer.set_weights([*spread, rng.uniform(0.5, 1.5, size)])
        model.export(path, verbose=False)
    finally:
        keras.mixed_precision.set_global_policy(before)
    return load_saved_model(path).graph


def sqnr(exact, found):
    exact, found = exact.astype(np.float64), found.astype(np.float64)
    return 10 * np.log10(np.square(exact).mean() / np.square(exact - found).mean())


@pytest.mark.parametrize("half_output", [False, True])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_keras_mixed_precision_gets_the_kernels_of_float32(tmp_path, policy, half_output):
    graph, exact = (keras_graph(tmp_path / name, name, half_output) for name in (policy, "float32"))
    rng = np.random.default_rng(1)
    (key,), (exact_key,) = graph.inputs, exact.inputs
    images = [rng.normal(0, 1, (8, 16, 16, 3)).astype(np.float32) for _ in range(3)]
    batches = [{key: value} for value in images]
    original = building.joined(building.run(graph, batches))
    result = building.both(graph, batches)
    reference = building.both(exact, [{exact_key: value} for value in images])
    (output,), (exact_output,) = result.floats, reference.floats
    wanted = reference.floats[exact_output]

    size = np.abs(wanted).max()
    tolerance = TOLERANCE[tf.float16 if policy == "mixed_float16" else tf.bfloat16]
    assert np.abs(result.floats[output].astype(np.float32) - wanted).max() <= (tolerance if half_output else 1e-5) * size
    assert np.abs(original[output].astype(np.float32) - wanted).max() <= tolerance * size
    assert [op for op in result.kernels() if op != "Cast"] == reference.kernels()
    assert result.kernels().count("Cast") == half_output + reference.kernels().count("Cast")
    assert not {"Conv2D", "DepthwiseConv2dNative", "MatMul", "Relu", "MaxPool"} & set(result.kernels())
    assert sqnr(wanted, result.int8[output]) > 30


@pytest.mark.parametrize("dtype", HALF)
def test_a_model_all_in_half_precision(dtype):
    """Also its input: calibration feeds that type."""

    def network(dtype):
        def function(x):
            y = tf.nn.relu(tf.nn.conv2d(x, weights(3, 3, 4, 8, dtype=dtype), 1, "SAME") + weights(8, dtype=dtype))
            return tf.matmul(tf.reduce_mean(y, [1, 2]), weights(8, 5, dtype=dtype, seed=1))

        return function

    graph = trace(network(dtype), (SHAPE, dtype))
    batches = [{"x0": np.random.default_rng(i).normal(0, 1, (8, 9, 10, 4)).astype(dtype.as_numpy_dtype)} for i in range(2)]
    wanted = building.joined(building.run(graph, batches))["y0"]
    result = building.both(graph, batches)
    assert result.int8["y0"].dtype == wanted.dtype
    assert {"_FusedQuantizedConv2D", "_QuantizedMatMul"} <= set(result.kernels())
    assert sqnr(wanted, result.int8["y0"]) > 25


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_in_nchw(dtype):
    """Both passes: half precision first, then the layout."""

    def network(dtype):
        def function(x):
            def conv(y, out, seed):
                kernel = tf.cast(weights(3, 3, y.shape[1], out, seed=seed), dtype)
                return tf.nn.conv2d(y, kernel, 1, "SAME", data_format="NCHW")

            y = tf.nn.relu(tf.nn.bias_add(conv(tf.cast(x, dtype), 8, 0), tf.cast(weights(8), dtype), "NCHW"))
            return tf.cast(tf.reduce_mean(conv(y, 6, 1) + tf.cast(weights(6, 1, 1), dtype), [2, 3]), tf.float32)

        return function

    graph, exact = (building.build(network(kind), {"x": (None, 4, 9, 10)}) for kind in (dtype, tf.float32))
    batches = [{"x": np.random.default_rng(2).normal(0, 1, (8, 4, 9, 10)).astype(np.float32)}]
    wanted = building.run(exact, batches)[0]["output_0"]
    result = building.both(graph, batches)
    assert np.allclose(result.floats["output_0"], wanted, atol=1e-5)
    assert result.kernels().count("_FusedQuantizedConv2D") == 2
    assert result.kernels().count("Transpose") == 1
    assert sqnr(wanted, result.int8["output_0"]) > 30
