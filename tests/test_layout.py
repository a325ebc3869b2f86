"""Tests of tfquant.simplify.layout: NCHW goes, the numbers stay, and Transposes are left at the ends at most."""

import building
import keras
import numpy as np
import pytest
import tensorflow as tf

from tfquant.graph.loading import load_saved_model
from tfquant.simplify import layout, simplify

RAW = tf.raw_ops
SHAPE = (None, 4, 9, 10)
TO_NHWC, TO_NCHW = [0, 2, 3, 1], [0, 3, 1, 2]


def weights(*shape, seed=0, scale=0.3):
    return tf.constant(np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32))


def conv(x, out=6, kernel=3, stride=1, padding="SAME", groups=1, dilation=1, seed=0, pads=()):
    return RAW.Conv2D(
        input=x,
        filter=weights(kernel, kernel, x.shape[1] // groups, out, seed=seed),
        strides=[1, 1, stride, stride],
        dilations=[1, 1, dilation, dilation],
        padding=padding,
        explicit_paddings=list(pads),
        data_format="NCHW",
    )


def depthwise(x, stride=1, padding="SAME", pads=(), multiplier=1):
    kernel = weights(3, 3, x.shape[1], multiplier, seed=5)
    strides = [1, 1, stride, stride]
    return RAW.DepthwiseConv2dNative(
        input=x, filter=kernel, strides=strides, padding=padding, explicit_paddings=list(pads), data_format="NCHW"
    )


def bias(x, seed=7):
    return RAW.BiasAdd(value=x, bias=weights(x.shape[1], seed=seed), data_format="NCHW")


def norm(x, op="FusedBatchNormV3", seed=3):
    rng = np.random.default_rng(seed)
    scale, variance = (tf.constant(rng.uniform(0.5, 2, x.shape[1]).astype(np.float32)) for _ in range(2))
    offset, mean = weights(x.shape[1], seed=seed), weights(x.shape[1], seed=seed + 1)
    options = {"epsilon": 1e-3, "is_training": False, "data_format": "NCHW"}
    return getattr(RAW, op)(x=x, scale=scale, offset=offset, mean=mean, variance=variance, **options)[0]


def max_pool(x, size=2, stride=2, padding="VALID", pads=()):
    sizes = {"ksize": [1, 1, size, size], "strides": [1, 1, stride, stride]}
    return RAW.MaxPool(input=x, padding=padding, explicit_paddings=list(pads), data_format="NCHW", **sizes)


def avg_pool(x, size=2, padding="VALID"):
    sizes = [1, 1, size, size]
    return RAW.AvgPool(value=x, ksize=sizes, strides=sizes, padding=padding, data_format="NCHW")


def block(x, out=6, seed=0, **options):
    return tf.nn.relu(norm(conv(x, out, seed=seed, **options), seed=seed))


def values(graph, batch=3):
    rng = np.random.default_rng(0)
    feeds = {
        key: rng.normal(0, 1, [size or batch for size in tensor.shape]).astype(np.float32) for key, tensor in graph.inputs.items()
    }
    return feeds


def counts(graph):
    result = {}
    for node in graph.order():
        if node.op not in ("Const", "Placeholder"):
            result[node.op] = result.get(node.op, 0) + 1
    return result


def check(graph, run=layout.run, tolerance=2e-6):
    """Runs the pass until it is still, holds numbers, types and shapes against those before, returns the ops left."""
    feeds = values(graph)
    expected = building.run(graph, [feeds])[0]
    types = {key: (tensor.dtype, tensor.shape) for key, tensor in graph.outputs.items()}
    fired = 0
    for _ in range(4):
        now = run(graph)
        fired += now if isinstance(now, int) else sum(now.values())
    again = run(graph)
    assert (again if isinstance(again, int) else sum(again.values())) == 0
    assert all(user.inputs[slot].node is node for node in graph.order() for user, slot in node.users)
    told = {node.name: (node.shapes, node.dtypes) for node in graph.order() if node.op != "Const"}
    graph.prune()
    graph.infer()
    for name, (shapes, dtypes) in told.items():
        node = graph.nodes[name]
        assert dtypes == node.dtypes
        for one, other in zip(shapes, node.shapes, strict=True):
            assert one is None or other is None or all(a in (b, None) or b is None for a, b in zip(one, other, strict=True))
    found = building.run(graph, [feeds])[0]
    for key, value in expected.items():
        assert found[key].shape == value.shape
        assert found[key].dtype == value.dtype
        assert np.abs(found[key].astype(np.float64) - value).max() <= tolerance * max(1.0, np.abs(value).max())
        assert graph.outputs[key].dtype == types[key][0]
    assert not [node for node in graph.order() if node.attr("data_format") == "NCHW"]
    return counts(graph)


@pytest.mark.parametrize(
    "layer",
    [
        conv,
        lambda x: conv(x, stride=2, padding="VALID"),
        lambda x: conv(x, stride=2, padding="EXPLICIT", pads=[0, 0, 0, 0, 1, 2, 0, 3]),
        lambda x: conv(x, groups=2),
        lambda x: conv(x, dilation=2),
        lambda x: conv(x, kernel=1),
        depthwise,
        lambda x: depthwise(x, 2, multiplier=2),
        lambda x: depthwise(x, padding="EXPLICIT", pads=[0, 0, 0, 0, 0, 1, 2, 1]),
        bias,
        norm,
        lambda x: norm(x, "FusedBatchNorm"),
        lambda x: norm(x, "FusedBatchNormV2"),
        max_pool,
        lambda x: max_pool(x, 3, 1, "SAME"),
        avg_pool,
        lambda x: avg_pool(x, 3, "SAME"),
    ],
)
def test_each_op_with_a_data_format(layer):
    left = check(building.build(layer, {"x": SHAPE}))
    assert left.pop("Transpose") == 2
    assert list(left.values()) == [1]


@pytest.mark.parametrize("batch", [3, None])
def test_transposed_convolution(batch):
    def function(x):
        size = tf.stack([tf.shape(x)[0], 5, 18, 20]) if batch is None else [3, 5, 18, 20]
        kernel = weights(3, 3, 5, 4)
        return tf.nn.relu(tf.nn.conv2d_transpose(tf.nn.relu(x), kernel, size, [1, 1, 2, 2], "SAME", "NCHW"))

    left = check(building.build(function, {"x": (batch, *SHAPE[1:])}), tolerance=1e-5)
    assert left["Conv2DBackpropInput"] == 1
    assert left["Transpose"] <= 3


def test_explicit_padding_of_a_pool():
    """TensorFlow has no such kernel for NCHW on CPU: the numbers are those of -inf around the image."""
    graph = building.build(lambda x: max_pool(x, 3, 2, "EXPLICIT", [0, 0, 0, 0, 1, 0, 1, 1]), {"x": SHAPE})
    feeds = values(graph)
    padded = np.pad(feeds["x"], [[0, 0], [0, 0], [1, 0], [1, 1]], constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2]
    assert layout.run(graph) == 1
    assert np.array_equal(building.run(graph, [feeds])[0]["output_0"], windows.max((-1, -2)))


@pytest.mark.parametrize(
    "between",
    [
        tf.nn.relu,
        tf.nn.relu6,
        tf.nn.leaky_relu,
        tf.nn.elu,
        tf.nn.selu,
        tf.sigmoid,
        tf.tanh,
        tf.nn.softplus,
        tf.identity,
        lambda x: x * tf.sigmoid(x),
        lambda x: x * tf.nn.relu6(x + 3.0) / 6.0,
        lambda x: tf.nn.relu(x) - weights(6, 1, 1) * tf.nn.relu(-x),
        lambda x: x * 2.0,
        lambda x: weights(6, 1, 1) - x,
        lambda x: x * weights(1, 6, 1, 1),
        lambda x: x + weights(10),
        lambda x: x + weights(9, 1),
        lambda x: x / weights(1),
        lambda x: tf.maximum(x, weights(6, 9, 10)),
        lambda x: tf.minimum(x, weights(1, 1, 9, 10)),
        lambda x: tf.where(x > 0.1, x, x * 0.1),
        lambda x: tf.clip_by_value(x, -0.5, 0.5),
        lambda x: tf.cast(tf.cast(x, tf.float64), tf.float32),
        lambda x: tf.concat([x, tf.nn.relu(x)], 1),
        lambda x: tf.concat([x, tf.nn.relu(x)], -1),
        lambda x: tf.concat([x, x], 2),
        lambda x: tf.add_n([x, tf.nn.relu(x), x]),
        lambda x: tf.pad(x, [[0, 0], [0, 0], [1, 2], [3, 0]]),
        lambda x: tf.pad(x, [[0, 0], [1, 0], [1, 2], [3, 0]], constant_values=-1.0),
        lambda x: tf.pad(x, [[0, 0], [0, 0], [1, 2], [3, 0]], "REFLECT"),
        lambda x: x * tf.reduce_mean(x, [2, 3], keepdims=True),
        lambda x: x - tf.reduce_max(x, -1, keepdims=True) * tf.reduce_sum(x, 1, keepdims=True),
        lambda x: tf.concat(tf.split(x, 3, 1)[::-1], 1),
        lambda x: tf.concat(tf.split(x, [4, 2], 1)[::-1], 1),
        lambda x: x[:, 1:, ::2, 1:-1],
        lambda x: x[:, :4],
        lambda x: tf.slice(x, [0, 2, 1, 3], [-1, 3, 4, 5]),
        lambda x: tf.tile(x, [1, 2, 1, 1]),
    ],
)
def test_transposes_vanish_around(between):
    """Of an ordinary op between two convolutions."""
    graph = building.build(lambda x: conv(between(conv(x)), seed=1), {"x": SHAPE})
    assert check(graph, tolerance=1e-5)["Transpose"] == 2
    graph = building.build(lambda x: tf.reduce_sum(between(conv(x)), [2, 3]), {"x": (3, *SHAPE[1:])})
    assert check(graph, tolerance=1e-5)["Transpose"] == 1


def residual(x):
    y = block(x, 6, stride=2)
    for seed in (2, 4):
        y = tf.nn.relu(norm(conv(block(y, seed=seed), seed=seed + 1)) + y)
    y = max_pool(tf.concat([y, block(tf.pad(y, [[0, 0], [0, 0], [1, 1], [1, 1]]), padding="VALID", seed=8)], 1))
    gate = tf.sigmoid(conv(tf.nn.relu(conv(tf.reduce_mean(y, [2, 3], keepdims=True), 3, 1)), 12, 1, seed=9))
    return depthwise(y * gate)


@pytest.mark.parametrize("run", [layout.run, simplify])
def test_a_whole_network(run):
    image = building.build(residual, {"x": SHAPE})
    assert check(image, run, 1e-5)["Transpose"] == 2
    head = lambda x: tf.matmul(tf.reduce_mean(residual(x), [2, 3]), weights(12, 5))  # noqa: E731
    assert check(building.build(head, {"x": SHAPE}), run, 1e-5)["Transpose"] == 1
    from_nhwc = lambda x: head(tf.transpose(x, TO_NCHW))  # noqa: E731
    assert "Transpose" not in check(building.build(from_nhwc, {"x": (None, 9, 10, 4)}), run, 1e-5)
    both_ends = lambda x: tf.transpose(residual(tf.transpose(x, TO_NCHW)), TO_NHWC)  # noqa: E731
    assert "Transpose" not in check(building.build(both_ends, {"x": (None, 9, 10, 4)}), run, 1e-5)


def test_unknown_sizes():
    graph = building.build(lambda x: block(block(x), seed=2), {"x": (None, 4, None, None)})
    feeds = {"x": np.random.default_rng(0).normal(0, 1, (2, 4, 7, 8)).astype(np.float32)}
    expected = building.run(graph, [feeds])[0]["output_0"]
    simplify(graph)
    assert counts(graph)["Transpose"] == 2
    assert np.allclose(building.run(graph, [feeds])[0]["output_0"], expected, atol=1e-5)


def test_squeeze_and_excite_with_dense_layers():
    def function(x):
        y = block(x)
        gate = tf.sigmoid(tf.matmul(tf.reduce_mean(y, [2, 3]), weights(6, 6)))
        return tf.reduce_mean(conv(y * tf.reshape(gate, [-1, 6, 1, 1]), seed=2), [2, 3])

    assert check(building.build(function, {"x": SHAPE}), simplify, 1e-5)["Transpose"] == 1


def test_normalization_before_the_first_convolution():
    """The Transpose of the input goes in front of it, and the scale into the convolution."""

    def function(x):
        y = (x - weights(1, 4, 1, 1)) / tf.constant([1.0, 2.0, 0.5, 1.5], shape=[4, 1, 1])
        return tf.reduce_mean(conv(tf.pad(y, [[0, 0], [0, 0], [1, 1], [2, 0]]), padding="VALID"), [2, 3])

    left = check(building.build(function, {"x": SHAPE}), tolerance=1e-5)
    assert left["Transpose"] == 1
    graph = building.build(function, {"x": SHAPE})
    layout.run(graph)
    assert graph.inputs["x"].node.users.keys() == {(n, 0) for n in graph.order() if n.op == "Transpose"}


@pytest.mark.parametrize(("height", "transposes"), [(9, 2), (1, 1)])
def test_flatten(height, transposes):
    """Its order shows, unless an image is one pixel."""

    def function(x):
        y = tf.nn.relu(conv(x))
        y = avg_pool(y, 9) if height == 1 else y
        size = y.shape[1] * y.shape[2] * y.shape[3]
        return tf.matmul(tf.reshape(y, [tf.shape(y)[0], size]), weights(size, 3))

    left = check(building.build(function, {"x": (None, 4, 9, 9)}), simplify, 1e-5)
    assert left["Transpose"] == transposes
    assert left["Reshape"] == 1


@pytest.mark.parametrize("axes", [[2, 3], [3, 2], [-1, -2], [1], [1, 2, 3], [0, 1], [2], [0, 3], [3]])
def test_reductions_that_drop_axes(axes):
    order_shows = sorted(axes) in ([2], [0, 3], [3])
    graph = building.build(lambda x: tf.reduce_mean(conv(x), axes), {"x": SHAPE})
    assert check(graph)["Transpose"] == 1 + order_shows


def test_squeeze_and_arg_max():
    graph = building.build(lambda x: (tf.squeeze(avg_pool(conv(x), 9), [2, 3]), tf.argmax(conv(x), 1)), {"x": (None, 4, 9, 9)})
    assert check(graph)["Transpose"] == 1


def test_an_image_that_others_read_in_nchw():
    """An output and a Reshape need the order of NCHW; the next convolution does not wait for them."""

    def function(x):
        y = tf.nn.relu(conv(x))
        return y, tf.reshape(y, [-1, 90]), tf.reduce_mean(conv(tf.tanh(y), seed=1), [2, 3])

    assert check(building.build(function, {"x": SHAPE}))["Transpose"] == 2


def test_softmax_over_the_width_stays():
    left = check(building.build(lambda x: conv(tf.nn.softmax(conv(x)), seed=1), {"x": SHAPE}))
    assert left["Transpose"] == 4


def test_an_operand_in_nchw_is_transposed_where_it_pays():
    def function(x, z):
        return tf.reduce_mean(conv(tf.nn.relu(conv(x) + tf.reshape(z, [-1, 6, 9, 10])), seed=1), [2, 3])

    assert check(building.build(function, {"x": SHAPE, "z": (None, 540)}))["Transpose"] == 2


@pytest.mark.parametrize(
    "function",
    [
        lambda x: tf.nn.relu(tf.transpose(x, [0, 2, 1, 3])),
        lambda x: tf.matmul(tf.transpose(x, [0, 2, 1, 3]), tf.transpose(x, [0, 2, 3, 1])),
        lambda x: (tf.nn.relu(y := tf.transpose(x, TO_NCHW)), tf.tanh(y)),
        lambda x: tf.transpose(tf.nn.conv2d(x, weights(3, 3, 4, 5), 1, "SAME"), TO_NCHW),
        lambda x: tf.reshape(tf.transpose(x, TO_NCHW), [-1, 16]),
        lambda x: tf.transpose(x, TO_NHWC),
        lambda x: tf.split(tf.transpose(x, TO_NCHW), 2, 1),
    ],
)
def test_ordinary_transposes_stay(function):
    graph = building.build(function, {"x": (None, 8, 8, 4)})
    before = counts(graph)
    assert layout.run(graph) == 0
    assert counts(graph) == before


def test_transposes_merge():
    def function(x):
        y = tf.transpose(tf.transpose(x, [0, 2, 1, 3]), [0, 2, 1, 3])
        return tf.nn.relu(y), tf.transpose(tf.transpose(x, [0, 2, 1, 3]), [3, 2, 1, 0]), tf.transpose(x, [0, 1, 2, 3])

    assert check(building.build(function, {"x": (None, 8, 8, 4)})) == {"Relu": 1, "Transpose": 1}


def test_what_waits_for_a_transpose_waits_on():
    """A Transpose by the identity that others wait for cannot go; it must not be counted again and again."""

    def function(x):
        y = tf.transpose(x, [0, 1, 2, 3])
        with tf.control_dependencies([y]):
            return tf.nn.relu(conv(x)) + tf.reduce_sum(y)

    assert check(building.build(function, {"x": SHAPE}), tolerance=1e-5)["Conv2D"] == 1


def test_batch_norm_in_training():
    def function(x):
        ones, empty = tf.ones([4]), tf.zeros([0])
        options = {"scale": ones, "offset": ones, "mean": empty, "variance": empty, "data_format": "NCHW"}
        return RAW.FusedBatchNormV3(x=x, is_training=True, **options)[:2]

    left = check(building.build(function, {"x": SHAPE}), tolerance=1e-5)
    assert (left["FusedBatchNormV3"], left["Transpose"]) == (1, 2)


def test_a_loop_is_left_alone():
    def function(x):
        body = lambda i, y: (i + 1, conv(tf.nn.relu(y), 4) * 0.5)  # noqa: E731
        return tf.while_loop(lambda i, y: i < 3, body, [0, x], shape_invariants=[tf.TensorShape([]), tf.TensorShape(SHAPE)])[1]

    concrete = tf.function(function).get_concrete_function(tf.TensorSpec(SHAPE, tf.float32, name="x"))
    graph = building.Graph.from_graph_def(concrete.graph.as_graph_def(), {"x": "x"}, {"y": concrete.outputs[0].name})
    library = graph.library.SerializeToString(deterministic=True)
    assert layout.run(graph) == 0
    assert graph.library.SerializeToString(deterministic=True) == library


@pytest.mark.parametrize("seed", range(8))
def test_random_networks(seed):
    def function(x):
        rng = np.random.default_rng(seed)
        tensors = [x]
        for step in range(14):
            y = tensors[int(rng.integers(max(0, len(tensors) - 3), len(tensors)))]
            same = [t for t in tensors if t.shape[1:] == y.shape[1:]]
            other = same[int(rng.integers(len(same)))]
            kind = int(rng.integers(12))
            shape = [(y.shape[1], 1, 1), (), (1, 1, 10), (1, y.shape[1], 9, 1), (10,)][rng.integers(5)]
            match kind:
                case 0:
                    y = conv(y, 4, seed=step)
                case 1:
                    y = bias(depthwise(y))
                case 2:
                    y = norm(y, seed=step)
                case 3:
                    y = max_pool(y, 3, 1, "SAME")
                case 4:
                    y = y + other
                case 5:
                    y = tf.concat([y, other], 1)[:, 1:5]
                case 6:
                    y = y * weights(*shape, seed=step) + weights(*shape, seed=step)
                case 7:
                    y = tf.nn.relu(y)
                case 8:
                    y = y * tf.sigmoid(tf.reduce_mean(y, [2, 3], keepdims=True))
                case 9:
                    y = tf.transpose(tf.nn.softmax(tf.transpose(y, TO_NHWC)), TO_NCHW)
                case 10:
                    y = tf.concat(tf.split(y, 2, 1)[::-1], 1) if y.shape[1] % 2 == 0 else y
                case _:
                    y = tf.reshape(tf.reshape(y, [-1, y.shape[1] * 90]), [-1, y.shape[1], 9, 10])
            tensors.append(y)
        return tensors[-1], tf.reduce_mean(tensors[-2], [2, 3]), tensors[-5]

    check(building.build(function, {"x": SHAPE}), tolerance=1e-5)
    check(building.build(function, {"x": SHAPE}), simplify, 1e-4)


# INT8


def sqnr(exact, found):
    return 10 * np.log10(np.square(exact).mean() / np.square(exact.astype(np.float64) - found).mean())


def test_nchw_gets_the_kernels_of_nhwc():
    def network(x):
        y = tf.nn.relu(bias(conv(x, 8)))
        y = tf.nn.relu(norm(depthwise(y)))
        y = tf.nn.relu(norm(conv(tf.pad(y, [[0, 0], [0, 0], [1, 1], [1, 1]]), 8, padding="VALID", seed=4)) + y)
        return tf.matmul(tf.reduce_mean(conv(max_pool(y), 16, seed=5), [2, 3]), weights(16, 5))

    graph = building.build(network, {"x": SHAPE})
    rng = np.random.default_rng(1)
    batches = [{"x": rng.normal(0, 1, (8, 4, 9, 10)).astype(np.float32)} for _ in range(3)]
    expected = building.joined(building.run(graph, batches))["output_0"]
    result = building.both(graph, batches)
    assert np.allclose(result.floats["output_0"], expected, atol=1e-5)
    assert [unit.kernel.name for unit in result.annotation.units.values()].count("conv2d") == 3
    kernels = result.kernels()
    assert not {"Conv2D", "DepthwiseConv2dNative", "MatMul", "Relu"} & set(kernels)
    assert kernels.count("Transpose") == 1
    assert sqnr(expected, result.int8["output_0"]) > 30


def test_keras_channels_first(tmp_path):
    layers = keras.layers
    first = {"data_format": "channels_first"}
    model = keras.Sequential(
        [
            keras.Input((3, 18, 18)),
            layers.Conv2D(8, 3, padding="same", use_bias=False, **first),
            layers.BatchNormalization(axis=1),
            layers.ReLU(),
            layers.MaxPool2D(**first),
            layers.ZeroPadding2D(1, **first),
            layers.DepthwiseConv2D(3, **first),
            layers.BatchNormalization(axis=1),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(**first),
            layers.Dense(5),
        ]
    )
    rng = np.random.default_rng(0)
    for layer in model.layers:
        layer.set_weights([value + rng.uniform(0.1, 0.2, value.shape) for value in layer.get_weights()])
    model.export(tmp_path / "model", verbose=False)
    graph = load_saved_model(tmp_path / "model").graph
    left = check(graph, simplify, 1e-5)
    assert left["Transpose"] == 1
    assert (left["Conv2D"], left["DepthwiseConv2dNative"], left["BiasAdd"], left["Relu"]) == (1, 1, 3, 2)
