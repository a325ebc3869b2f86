"""The simplify passes that transformers and Conv1D nets need: how often they fire, what is left, and that numbers stay."""

import building
import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from tfquant.config import QuantConfig
from tfquant.graph.execution import executable, unfused
from tfquant.graph.patterns import Any, matches
from tfquant.simplify import contractions, duplicates, gelu, normalization, scalars, simplify, sinking
from tfquant.sources import open_model

TOLERANCE = 2e-5
LIBRARIES = [keras, tf_keras]


def weights(*shape, seed=0, scale=0.5):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def counts(graph):
    """How many of each op the outputs need, constants and inputs left out."""
    result = {}
    for node in graph.order():
        if node.op not in ("Const", "Placeholder", "NoOp"):
            result[node.op] = result.get(node.op, 0) + 1
    return result


def check(graph, run=simplify, sizes=3, size=1.0, unknown=5, tolerance=TOLERANCE):
    """Runs passes over a graph, holds the numbers before and after together; returns (what `run` returned, ops left)."""
    rng = np.random.default_rng(1)
    shapes = {
        key: [sizes if not axis and n is None else n or unknown for axis, n in enumerate(t.shape)]
        for key, t in graph.inputs.items()
    }
    batch = {key: (size * rng.normal(size=shape)).astype(np.float32) for key, shape in shapes.items()}
    before = building.run(graph, [batch])[0]
    known = {key: tensor.shape for key, tensor in graph.outputs.items()}
    fired = run(graph)
    graph.prune()
    graph.infer()
    after = building.run(graph, [batch])[0]
    for key, value in before.items():
        assert after[key].shape == value.shape
        assert np.isfinite(value).all()
        assert np.abs(after[key] - value).max() <= tolerance * np.abs(value).max()
        shape = graph.outputs[key].shape
        assert known[key] is None or len(shape) == len(known[key])
        assert all(old in (None, new) for old, new in zip(known[key] or shape, shape, strict=True))
    again = run(graph)
    assert not (any(again.values()) if isinstance(again, dict) else again)
    return fired, counts(graph)


# -- products with a constant ----------------------------------------------------------------------------------------------
EINSUMS = [
    # equation, shape of x, shape of the constant, Transposes that are needed
    ("abc,cd->abd", (None, 6, 4), (4, 3), 0),
    ("abc,cde->abde", (None, 6, 4), (4, 3, 2), 0),
    ("abcd,cde->abe", (None, 6, 4, 5), (4, 5, 3), 0),
    ("ab,bc->ac", (None, 4), (4, 3), 0),
    ("...a,ab->...b", (None, 2, 6, 4), (4, 3), 0),
    ("...a,ba->...b", (None, 6, 4), (3, 4), 0),
    ("abc,bd->adc", (None, 6, 4), (6, 3), 2),
    ("abc,bd->acd", (None, 6, 4), (6, 3), 1),
    ("abc,cd->adb", (None, 6, 4), (4, 3), 1),
    ("acbe,bef->acf", (None, 2, 3, 4), (3, 4, 5), 0),
    ("abcd,bde->ace", (None, 2, 3, 4), (2, 4, 5), 1),
    ("abcd,dcb->a", (None, 2, 3, 4), (4, 3, 2), 0),
    ("bij,jk->bik", (None, 1, 1), (1, 1), 0),
    ("abc,cdef->abfed", (None, 2, 4), (4, 2, 3, 1), 0),
]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("case", range(len(EINSUMS)))
def test_einsum_with_a_constant(case, swapped):
    equation, shape, constant, transposes = EINSUMS[case]
    w = weights(*constant)
    if swapped:
        sides, out = equation.split("->")
        one, other = sides.split(",")
        graph = building.build(lambda x: tf.einsum(f"{other},{one}->{out}", w, x), {"x": shape})
    else:
        graph = building.build(lambda x: tf.einsum(equation, x, w), {"x": shape})
    fired, left = check(graph, contractions.run)
    assert fired == 1
    assert left.pop("MatMul") == 1
    assert left.pop("Transpose", 0) == transposes
    assert left.pop("Reshape", 0) <= 2
    assert left == {}


@pytest.mark.parametrize("shape", [(None, None, 4), (None, None, 3, None, 4)])
def test_einsum_of_unknown_sizes(shape):
    graph = building.build(lambda x: tf.nn.relu(tf.einsum("...c,cde->...de", x, weights(4, 3, 2))), {"x": shape})
    fired, left = check(graph)
    assert fired["products with a constant to MatMul"] == 1
    assert left == {"MatMul": 1, "Relu": 1, "Reshape": 2, "Shape": 1, "StridedSlice": 1, "ConcatV2": 1}


@pytest.mark.parametrize(
    ("equation", "shape", "constant"),
    [
        ("abc,c->abc", (None, 3, 4), (4,)),  # a product of elements
        ("abc,bcd->abd", (None, 3, 4), (3, 4, 5)),  # another matrix per sample of b
        ("abc,de->abcde", (None, 3, 4), (5, 6)),  # nothing is summed over
        ("aab,bc->ac", (5, 5, 4), (4, 3)),  # a diagonal
        ("abc,cd->ad", (None, 3, 4), (4, 5)),  # a sum over x alone
        ("abc,cde->abd", (None, 3, 4), (4, 5, 6)),  # a sum over the constant alone
    ],
)
def test_other_einsums_stay(equation, shape, constant):
    graph = building.build(lambda x: tf.einsum(equation, x, weights(*constant)), {"x": shape})
    fired, left = check(graph, contractions.run)
    assert fired == 0
    assert "Einsum" in left


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("outer", [(), (1,), (1, 1)])
@pytest.mark.parametrize("shape", [(None, 6, 4), (None, 2, 6, 4), (None, None, 4), (7, 1, 4)])
def test_batch_matmul_with_a_constant(shape, outer, adjoint):
    if len(outer) + 2 > len(shape):
        pytest.skip("the constant has more axes than the tensor")
    w = weights(*outer, 3, 4) if adjoint else weights(*outer, 4, 3)
    op = lambda x: tf.raw_ops.BatchMatMulV2(x=x, y=w, adj_y=adjoint)  # noqa: E731
    fired, left = check(building.build(op, {"x": shape}), contractions.run)
    assert fired == 1
    assert (left["MatMul"], left["Reshape"], "Transpose" in left) == (1, 2, False)


def test_batch_matmul_with_a_constant_on_the_left():
    graph = building.build(lambda x: tf.matmul(weights(5, 6), x), {"x": (None, 6, 4)})
    fired, left = check(graph, contractions.run)
    assert fired == 1
    assert left == {"Transpose": 2, "Reshape": 2, "MatMul": 1}


def test_batch_matmul_with_a_transposed_tensor():
    graph = building.build(lambda x: tf.matmul(x, weights(6, 5), transpose_a=True), {"x": (None, 6, 4)})
    assert check(graph, contractions.run) == (1, {"Transpose": 1, "Reshape": 2, "MatMul": 1})


def test_batch_matmul_with_a_matrix_per_sample_stays():
    graph = building.build(lambda x: tf.matmul(x, weights(2, 4, 5)), {"x": (None, 2, 6, 4)})
    assert check(graph, contractions.run) == (0, {"BatchMatMulV2": 1})


@pytest.mark.parametrize("dtype", [tf.float64, tf.float16])
def test_other_types(dtype):
    w = weights(4, 3).astype(dtype.as_numpy_dtype)
    graph = building.build(lambda x: tf.cast(tf.einsum("abc,cd->abd", tf.cast(x, dtype), w), tf.float32), {"x": (None, 2, 4)})
    tolerance = 1e-3 if dtype == tf.float16 else 1e-6
    assert check(graph, contractions.run, tolerance=tolerance) == (1, {"Cast": 2, "Reshape": 2, "MatMul": 1})


ATTENTION = [
    # equation, shapes of x and y, Transposes that are needed
    ("btnh,bsnh->bnts", (None, 6, 2, 4), (None, 5, 2, 4), 2),
    ("bnts,bsnh->btnh", (None, 2, 6, 5), (None, 5, 2, 4), 2),
    ("aecd,abcd->acbe", (None, 5, 2, 4), (None, 6, 2, 4), 2),
    ("acbe,aecd->abcd", (None, 2, 6, 5), (None, 5, 2, 4), 2),
    ("bij,bjk->bik", (None, 6, 4), (None, 4, 5), 0),
    ("bij,bkj->bki", (None, 6, 4), (None, 5, 4), 0),
    ("bji,bjk->bik", (None, 4, 6), (None, 4, 5), 0),
    ("...ij,...jk->...ik", (None, 2, 6, 4), (None, 2, 4, 5), 0),
]


@pytest.mark.parametrize("case", range(len(ATTENTION)))
def test_einsum_of_two_tensors(case):
    equation, one, other, transposes = ATTENTION[case]
    graph = building.build(lambda x, y: tf.einsum(equation, x, y), {"x": one, "y": other})
    fired, left = check(graph, contractions.run)
    assert fired == 1
    assert left.pop("BatchMatMulV2") == 1
    assert left == ({"Transpose": transposes} if transposes else {})


@pytest.mark.parametrize(
    ("equation", "one", "other"),
    [
        ("bij,bj->bi", (None, 6, 4), (None, 4)),
        ("bi,bj->bij", (None, 6), (None, 4)),
        ("bijk,bijk->b", (None, 2, 3, 4), (None, 2, 3, 4)),
    ],
)
def test_other_einsums_of_two_tensors_stay(equation, one, other):
    graph = building.build(lambda x, y: tf.einsum(equation, x, y), {"x": one, "y": other})
    assert check(graph, contractions.run) == (0, {"Einsum": 1})


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("shape", [(6, 4), (None, 4), (2, 3, 4), (None, None, 4)])
def test_dense_on_more_dimensions(library, shape):
    """tf_keras and Keras 3 spell it as Tensordot, with a target computed from the shape."""
    inputs = library.Input(shape)
    hidden = library.layers.Dense(5, activation="relu", bias_initializer="random_normal")(inputs)
    graph = open_model(library.Model(inputs, library.layers.Dense(3)(hidden)), QuantConfig()).graph
    fired, left = check(graph)
    assert (left["MatMul"], left["BiasAdd"], left["Reshape"]) == (2, 2, 2)  # in front of the first, behind the last
    is_static = shape.count(None) == 0
    assert is_static == (left == {"Reshape": 2, "MatMul": 2, "BiasAdd": 2, "Relu": 1})
    assert fired["layers beside their activations"] >= 3


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("length", [6, None])
def test_attention(library, length):
    inputs = library.Input((length, 8))
    layer = library.layers.MultiHeadAttention(2, 3, bias_initializer="random_normal")
    graph = open_model(library.Model(inputs, layer(inputs, inputs)), QuantConfig()).graph
    _, left = check(graph)
    assert (left["MatMul"], left["BiasAdd"], left["BatchMatMulV2"], left["Transpose"], left["Softmax"]) == (4, 4, 2, 4, 1)
    assert "Mul" not in left or length is None  # 1 / sqrt(3) is in the weights of the query
    assert "Einsum" not in left


# -- Reshapes --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("function", "shape", "left"),
    [
        (lambda x: tf.reshape(tf.reshape(x, [-1, 4, 6]), [-1, 24]), (None, 24), {}),
        (lambda x: tf.reshape(tf.reshape(x, [-1, 4, 6]), [-1, 8, 3]), (None, 24), {"Reshape": 1}),
        (lambda x: tf.squeeze(tf.expand_dims(x, 1), 1), (None, None, 4), {}),
        (lambda x: tf.expand_dims(tf.squeeze(x, 2), 2), (None, None, 1, 4), {}),
        (lambda x: tf.expand_dims(tf.squeeze(x, 1), 2), (None, 1, 5, 4), {"Reshape": 1}),
        (lambda x: tf.expand_dims(tf.squeeze(x, 1), 2), (None, 1, None, 4), {"Squeeze": 1, "ExpandDims": 1}),
        (lambda x: tf.reshape(x, [tf.shape(x)[0], tf.size(x[0])]), (None, 4, 6), {"Reshape": 1}),
        (lambda x: tf.reshape(x, [-1, tf.shape(x)[1] * tf.shape(x)[2]]), (None, 4, 6), {"Reshape": 1}),
        (lambda x: tf.reshape(x, tf.concat([tf.shape(x)[:1], [2, -1]], 0)), (None, 4, 6), {"Reshape": 1}),
        (lambda x: tf.reshape(x, [tf.shape(x)[0] * tf.shape(x)[1], -1]), (None, None, 6), {"Reshape": 1}),
        (
            lambda x: tf.reshape(x, [tf.shape(x)[0], -1]),
            (None, None, None),
            {"Shape": 1, "StridedSlice": 1, "Pack": 1, "Reshape": 1},
        ),
    ],
)
def test_reshapes(function, shape, left):
    graph = building.build(lambda x: tf.nn.relu(function(tf.nn.relu(x))), {"x": shape})
    assert check(graph)[1] == {"Relu": 2, **left}


def test_the_same_reshape_twice():
    def net(x):
        return tf.nn.relu(tf.reshape(x, [-1, 4])), tf.tanh(tf.reshape(x, [-1, 4])), tf.sigmoid(tf.reshape(x, [-1, 2]))

    fired, left = check(building.build(net, {"x": (None, 8)}), duplicates.run)
    assert fired == 1
    assert left == {"Reshape": 2, "Relu": 1, "Tanh": 1, "Sigmoid": 1}


# -- layers beside their activations ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("padding", ["same", "causal", "valid"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_conv1d(library, padding, dilation):
    """An audio net: what ends in 8 bits is Conv2D with its bias, BatchNorm and activation, without a Squeeze in between."""
    layers = library.layers
    inputs = library.Input((20, 4))
    x = layers.Conv1D(6, 3, padding=padding, dilation_rate=dilation, bias_initializer="random_normal", activation="relu")(inputs)
    y = layers.Conv1D(6, 3, padding="causal" if padding == "causal" else "same", use_bias=False)(x)
    y = layers.ReLU()(layers.add([layers.BatchNormalization(beta_initializer="random_normal")(y), x]))
    model = library.Model(inputs, layers.GlobalAveragePooling1D()(layers.MaxPooling1D(2)(y)))
    graph = open_model(model, QuantConfig()).graph
    _, left = check(graph)
    if dilation == 1 or "SpaceToBatchND" not in left:
        assert (left["Conv2D"], left["BiasAdd"], left["Relu"]) == (2, 2, 2)
        moves = sum(left.get(op, 0) for op in ("Squeeze", "ExpandDims", "Reshape"))
        assert moves <= 3  # in front of the first, around the pooling
        relus = [node for node in graph.order() if node.op == "Relu"]
        assert all(len(node.out.shape) == 4 for node in relus)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 4), (3, 1), (1, 1), ()])
def test_constants_in_front_of_a_reshape(shape):
    """A constant on (N, 2, 3, 4) as a constant on (N, 24)."""

    def net(x):
        y = tf.reshape(tf.matmul(x, weights(5, 24)), [-1, 2, 3, 4])
        return tf.tanh(weights(*shape, seed=1) - y * weights(*shape, seed=2))

    fired, left = check(building.build(net, {"x": (None, 5)}), sinking.run)
    assert fired == 3
    assert left == {"MatMul": 1, "Mul": 1, "Sub": 1, "Tanh": 1, "Reshape": 1}


def test_what_broadcasts_stays_behind_the_reshape():
    def net(x):
        y = tf.reshape(tf.matmul(x, weights(5, 24)), [-1, 1, 6, 4])
        return y + weights(2, 1, 4, seed=1), y * x[0, 0], tf.nn.softmax(y)

    fired, _ = check(building.build(net, {"x": (None, 5)}), sinking.run)
    assert fired == 0


def test_sum_of_reshaped_tensors():
    def net(x):
        one, other = (tf.matmul(x, weights(5, 24, seed=seed)) for seed in (1, 2))
        reshape = lambda t: tf.reshape(t, [-1, 6, 4])  # noqa: E731
        return reshape(one) + reshape(other), reshape(one) * tf.sigmoid(reshape(one))

    fired, left = check(building.build(net, {"x": (None, 5)}), sinking.run)
    assert fired == 2  # the sigmoid, the product with it; two tensors may broadcast as their rows
    assert left["Reshape"] == 3


# -- numbers ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("side", [0, 1])
def test_number_into_the_weights(side, bias):
    def net(x):
        q, k = (tf.matmul(x, weights(4, 6, seed=seed)) for seed in (1, 2))
        q = tf.nn.bias_add(q, weights(6)) if bias else q
        q, k = (tf.transpose(tf.reshape(t, [-1, 5, 2, 3]), [0, 2, 1, 3]) for t in (q, k))
        k = tf.abs(k)
        return tf.nn.softmax((tf.matmul(q, k, transpose_b=True) if side == 0 else tf.matmul(k, q, transpose_b=True)) * 0.3)

    fired, left = check(building.build(net, {"x": (None, 4)}), simplify, sizes=10)
    assert fired["numbers into weights"] == 1
    assert "Mul" not in left


def test_number_that_others_would_see_stays():
    def net(x):
        y = tf.reshape(tf.matmul(x, weights(4, 6)), [-1, 3, 2])
        return y * 0.3, y

    fired, _ = check(building.build(net, {"x": (None, 4)}), scalars.run)
    assert fired == 0


# -- GELU ------------------------------------------------------------------------------------------------------------------
ROOT, C = np.float32(0.5**0.5), np.float32((2 / np.pi) ** 0.5)
EXACT = {
    "Keras 3": lambda x: 0.5 * x * tf.math.erfc(-x * ROOT),
    "TensorFlow": lambda x: tf.nn.gelu(x),
    "erf": lambda x: 0.5 * x * (1.0 + tf.math.erf(x / np.float32(2**0.5))),
    "inner half": lambda x: x * (0.5 * (1.0 + tf.math.erf(x * ROOT))),
    "cdf": lambda x: x * (0.5 + tf.math.erf(ROOT * x) * 0.5),
    "one minus": lambda x: x * (1.0 - 0.5 * tf.math.erfc(x * ROOT)),
}
APPROXIMATE = {
    "TensorFlow": lambda x: tf.nn.gelu(x, approximate=True),
    "products": lambda x: 0.5 * x * (1.0 + tf.tanh(C * (x + 0.044715 * x * x * x))),
    "square": lambda x: x * 0.5 * (1.0 + tf.tanh(x * 0.7978845608 * (1.0 + 0.044715 * tf.square(x)))),
    "inner half": lambda x: x * (0.5 * (1.0 + tf.tanh(C * (x + 0.044715 * tf.pow(x, 3))))),
}


@pytest.mark.parametrize("kind", ["exact", "approximate"])
@pytest.mark.parametrize("name", sorted({*EXACT, *APPROXIMATE}))
def test_gelu(name, kind):
    functions = EXACT if kind == "exact" else APPROXIMATE
    if name not in functions:
        pytest.skip("no such spelling")
    graph = building.build(lambda x: functions[name](tf.nn.bias_add(x, weights(6))), {"x": (None, 6)})
    fired, left = check(graph, gelu.run, size=3.0)
    assert fired <= 1
    pattern = getattr(gelu, kind)(Any("x"))
    (root,) = (tensor.node for tensor in graph.outputs.values())
    (match,) = [match for match in matches(pattern, graph, root) if gelu.is_gelu(match)]
    assert match["gelu_input"].node.op == "BiasAdd"
    more = {"Erf": 1, "Mul": 3, "AddV2": 1} if kind == "exact" else {"Pow": 1, "Tanh": 1, "Mul": 4, "AddV2": 2}
    assert left == {"BiasAdd": 1, **more}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("approximate", [False, True])
def test_gelu_of_keras(library, approximate):
    inputs = library.Input((6, 4))
    name = "gelu" if not approximate else lambda x: library.activations.gelu(x, approximate=True)
    outputs = library.layers.Dense(5, activation=name, bias_initializer="random_normal")(inputs)
    graph = open_model(library.Model(inputs, outputs), QuantConfig()).graph
    _, left = check(graph)
    assert (left["MatMul"], left["BiasAdd"], left["Reshape"], left["Mul"]) == (1, 1, 2, 4 if approximate else 3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * tf.sigmoid(1.702 * x),
        lambda x: x * tf.tanh(tf.math.softplus(x)),
        lambda x: 0.5 * x * (1.0 + tf.math.erf(x * 0.7)),
        lambda x: 0.5 * x * (1.0 + tf.tanh(0.8 * (x + 0.044715 * x * x * x))),
        lambda x: 0.6 * x * (1.0 + tf.math.erf(x * ROOT)),
        lambda x: 0.5 * x * (1.0 + tf.math.erf(x * ROOT)) * weights(6),
    ],
)
def test_other_functions_are_not_gelu(function):
    graph = building.build(lambda x: function(tf.nn.bias_add(x, weights(6))), {"x": (None, 6)})
    before = counts(graph)
    fired, left = check(graph, gelu.run)
    assert fired == 0 or "Erf" in before  # that with a factor per channel holds one
    assert left == before


def test_gelu_whose_parts_are_read_elsewhere_stays():
    def net(x):
        half = 0.5 * x
        return half * tf.math.erfc(-x * ROOT), half

    assert check(building.build(net, {"x": (None, 6)}), gelu.run)[0] == 0


# -- LayerNorm -------------------------------------------------------------------------------------------------------------
LAYER_NORM = {"Mean": 2, "SquaredDifference": 1, "AddV2": 2, "Rsqrt": 1, "Mul": 3, "Sub": 1}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}, {"scale": False, "center": False}])
@pytest.mark.parametrize("shape", [(6, 8), (None, 8), (8,), (3, 2, 8)])
@pytest.mark.parametrize("epsilon", [1e-12, 1e-3])
def test_layer_norm(library, options, shape, epsilon):
    inputs = library.Input(shape)
    layer = library.layers.LayerNormalization(epsilon=epsilon, **options)
    model = library.Model(inputs, layer(inputs))
    layer.set_weights([weights(8, seed=seed) for seed in range(len(layer.get_weights()))])
    graph = open_model(model, QuantConfig()).graph
    fired, left = check(graph, size=0.05)
    assert fired["LayerNorm in one spelling"] >= 1
    assert left == LAYER_NORM


def moments(x):
    mean = tf.reduce_mean(x, -1, keepdims=True)
    return mean, tf.reduce_mean(tf.square(x - mean), -1, keepdims=True)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, m, v, g, b: (x - m) / tf.sqrt(v + 1e-6) * g + b,
        lambda x, m, v, g, b: g * ((x - m) * tf.math.rsqrt(v + 1e-6)) + b,
        lambda x, m, v, g, b: (x - m) * tf.math.rsqrt(v + 1e-6),
        lambda x, m, v, g, b: tf.nn.batch_normalization(x, m, v, b, g, 1e-6),
        lambda x, m, v, g, b: tf.nn.batch_normalization(x, m, v, None, None, 1e-6),
    ],
)
def test_layer_norm_by_hand(function):
    graph = building.build(lambda x: function(x, *moments(x), weights(8, seed=1), weights(8, seed=2)), {"x": (None, 6, 8)})
    assert check(graph)[1] == LAYER_NORM


@pytest.mark.parametrize("axis", [1, [1, 2]])
def test_layer_norm_over_other_axes_stays(axis):
    inputs = keras.Input((6, 8))
    graph = open_model(keras.Model(inputs, keras.layers.LayerNormalization(axis=axis)(inputs)), QuantConfig()).graph
    assert check(graph, normalization.run)[0] == 0


def test_layer_norm_is_right_with_the_remapper():
    """TensorFlow fuses LayerNorm over the axis rank - 1 and takes its epsilon for 0.001: it must not know our spelling."""
    x = 0.01 * weights(4, 6, 8, seed=3)
    inputs = tf_keras.Input((6, 8))
    model = tf_keras.Model(inputs, tf_keras.layers.LayerNormalization(epsilon=1e-12)(inputs))
    graph = open_model(model, QuantConfig()).graph
    simplify(graph)
    (found,) = executable(graph)(tf.constant(x))
    with unfused():
        (expected,) = executable(graph)(tf.constant(x))
    assert np.abs(found - expected).max() < 1e-5
    np.testing.assert_allclose(np.std(found, axis=-1), 1, atol=1e-3)
