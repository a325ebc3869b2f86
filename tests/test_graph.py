"""Tests of tfquant.graph: the IR, patterns and rules, paths, cost."""

import os
import random

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
import tensorflow as tf

from tfquant.graph.cost import macs, macs_per_sample
from tfquant.graph.ir import Graph, Tensor, from_attr, to_attr
from tfquant.graph.paths import layer_of, normalize
from tfquant.graph.patterns import Any, Const, Maybe, Op, Rule, Trace, first_ops, matches, rewrite

FLOAT = {"T": tf.float32}


def start(*shape, name="x"):
    """A graph with one input."""
    graph = Graph()
    node = graph.add("Placeholder", name=name, attrs={"dtype": tf.float32, "shape": tf.TensorShape(shape)}, dtypes=[tf.float32])
    node.shapes = [shape]
    graph.inputs[name] = node.out
    return graph, node.out


def const(graph, value, name="c", dtype=np.float32):
    return graph.constant(np.asarray(value, dtype), name=name)


def op(graph, kind, *inputs, name=None, **attrs):
    return graph.add(kind, inputs, name=name or kind.lower(), attrs={**FLOAT, **attrs}, dtypes=[tf.float32]).out


def finish(graph, **outputs):
    graph.outputs.update(outputs)
    graph.infer()
    return graph


def names(graph):
    return [node.name for node in graph.order()]


def bytes_of(graph):
    return graph.to_graph_def().SerializeToString(deterministic=True)  # the order of a proto's map is the process's own


def run(graph, **feeds):
    with tf.Graph().as_default() as scratch, tf.compat.v1.Session(graph=scratch) as session:
        tf.graph_util.import_graph_def(graph.to_graph_def(), name="")
        fetches = {key: f"{t.node.name}:{t.index}" for key, t in graph.outputs.items()}
        return session.run(fetches, {f"{graph.inputs[key].node.name}:0": value for key, value in feeds.items()})


def assert_consistent(graph):
    """Users and control users mirror inputs and control edges, and all nodes are the graph's own."""
    nodes = list(graph.nodes.values())
    assert [name for name, node in graph.nodes.items() if node.name != name] == []
    edges = {(t.node, node, slot) for node in nodes for slot, t in enumerate(node.inputs)}
    assert edges == {(node, user, slot) for node in nodes for user, slot in node.users}
    controls = {(before, node) for node in nodes for before in node.control}
    assert controls == {(node, user) for node in nodes for user in node.control_users}
    assert {node for edge in edges for node in edge[:2]} <= set(nodes)


# The IR


def test_add_names_and_connects():
    graph, x = start(None, 4)
    one, other = op(graph, "Relu", x), op(graph, "Relu", x)
    both = op(graph, "AddV2", one, other)
    assert [node.name for node in graph.nodes.values()] == ["x", "relu", "relu_1", "addv2"]
    assert graph.users(x) == [(one.node, 0), (other.node, 0)]
    assert graph.users(both) == []
    finish(graph, y=both)
    assert both.shape == (None, 4)
    assert both.dtype == tf.float32
    assert_consistent(graph)


def test_unique_names_avoid_what_is_taken():
    graph, x = start(4)
    made = [op(graph, "Relu", x, name=name).node.name for name in ("a_1", "a", "a", "a", "a_1")]
    assert made == ["a_1", "a", "a_2", "a_3", "a_1_1"]
    assert len(set(graph.nodes)) == len(graph.nodes) == 6


def test_one_tensor_read_twice_by_one_node():
    graph, x = start(4)
    twice = op(graph, "AddV2", x, x)
    other = op(graph, "Relu", x)
    finish(graph, y=twice)
    graph.replace(x, op(graph, "Abs", x))
    assert [t.name for t in twice.node.inputs] == ["abs", "abs"]
    assert [t.name for t in other.node.inputs] == ["abs"]
    assert_consistent(graph)


def test_replace_moves_users_and_outputs_and_spares_the_new_node():
    graph, x = start(4)
    first = op(graph, "Relu", x)
    reader = op(graph, "Neg", first)
    finish(graph, y=reader, z=first)
    wrapped = op(graph, "Abs", first)
    graph.replace(first, wrapped)
    assert wrapped.node.inputs == [first]
    assert reader.node.inputs == [wrapped]
    assert graph.outputs == {"y": reader, "z": wrapped}
    assert_consistent(graph)


def test_replace_counts_outputs_by_index():
    graph, x = start(4, 6)
    axis = const(graph, 1, "axis", np.int32)
    split = graph.add("Split", [axis, x], name="split", attrs={**FLOAT, "num_split": 2}, dtypes=[tf.float32] * 2)
    left, right = op(graph, "Relu", Tensor(split, 0)), op(graph, "Neg", Tensor(split, 1))
    finish(graph, left=left, right=right, raw=Tensor(split, 1))
    graph.replace(Tensor(split, 1), op(graph, "Abs", x))
    assert left.node.inputs == [Tensor(split, 0)]
    assert right.node.inputs[0].name == "abs"
    assert graph.outputs["raw"].name == "abs"
    assert graph.users(Tensor(split, 1)) == []
    assert Tensor(split, 1).name == "split:1"


def test_remove_takes_what_only_it_used():
    graph, x = start(4)
    shared = op(graph, "Relu", x)
    dead = op(graph, "AddV2", op(graph, "Neg", shared), const(graph, 1.0))
    finish(graph, y=op(graph, "Abs", shared))
    graph.remove(dead.node)
    assert sorted(graph.nodes) == ["abs", "relu", "x"]
    assert_consistent(graph)


def test_remove_keeps_inputs_outputs_and_what_is_used():
    graph, x = start(4)
    relu = op(graph, "Relu", x)
    finish(graph, y=relu)
    for node in (relu.node, x.node):
        graph.remove(node)
    assert sorted(graph.nodes) == ["relu", "x"]
    used = op(graph, "Neg", x)
    waiting = op(graph, "Abs", x)
    graph.add_control(waiting.node, used.node)
    graph.remove(used.node)
    assert "neg" in graph.nodes
    assert_consistent(graph)


def test_prune_counts_and_keeps_inputs():
    graph, x = start(4)
    unused = graph.add("Placeholder", name="unused", attrs={"dtype": tf.float32}, dtypes=[tf.float32])
    graph.inputs["unused"] = unused.out
    op(graph, "Neg", op(graph, "Abs", x))
    finish(graph, y=op(graph, "Relu", x))
    assert graph.prune() == 2
    assert sorted(graph.nodes) == ["relu", "unused", "x"]
    assert graph.prune() == 0
    assert_consistent(graph)


def test_control_edges():
    graph, x = start(4)
    before = op(graph, "Neg", x)
    after = op(graph, "Relu", x)
    graph.add_control(after.node, before.node)
    graph.add_control(after.node, before.node)
    finish(graph, y=after)
    assert names(graph) == ["x", "neg", "relu"]
    assert list(graph.to_graph_def().node[2].input) == ["x", "^neg"]
    assert graph.prune() == 0
    graph.remove_control(after.node, before.node)
    assert names(graph) == ["x", "relu"]
    assert graph.prune() == 1
    assert_consistent(graph)


def random_graph(seed):
    rng = random.Random(seed)
    graph, x = start(2, 3)
    tensors = [x]
    for _ in range(30):
        if rng.random() < 0.3:
            tensors.append(const(graph, rng.random()))
        kind = rng.choice(["Relu", "Neg", "AddV2", "Mul"])
        made = op(graph, kind, *rng.choices(tensors, k=1 + (kind in ("AddV2", "Mul"))))
        if rng.random() < 0.2:
            graph.add_control(made.node, tensors[rng.randrange(len(tensors))].node)
        tensors.append(made)
    return finish(graph, y=tensors[-1], z=tensors[-4])


@pytest.mark.parametrize("seed", range(8))
def test_order_is_topological_and_the_same_for_the_same_graph(seed):
    graph = random_graph(seed)
    position = {node: i for i, node in enumerate(graph.order())}
    for node in position:
        assert all(position[t.node] < position[node] for t in node.inputs)
        assert all(position[before] < position[node] for before in node.control)
    assert names(graph) == names(random_graph(seed))
    assert bytes_of(graph) == bytes_of(random_graph(seed))


@pytest.mark.parametrize("seed", range(8))
def test_random_edits_keep_users_right(seed):
    graph, rng = random_graph(seed), random.Random(seed)
    for _ in range(40):
        order = graph.order()
        node = next((node for node in rng.sample(order, len(order)) if node.inputs), None)
        if node is None:
            break
        early = order[: order.index(node)]
        choice = rng.choice("iiiaaaarp")
        if choice == "i":
            graph.set_input(node, rng.randrange(len(node.inputs)), rng.choice(early).out)
        elif choice == "a":
            graph.replace(node.out, op(graph, "Abs", node.out))
        elif choice == "r":
            graph.replace(node.out, rng.choice(early).out)
            graph.remove(node)
        else:
            graph.prune()
    assert_consistent(graph)
    graph.prune()
    assert_consistent(graph)
    assert set(graph.nodes) == {*names(graph), "x"}


@pytest.mark.parametrize("seed", range(4))
def test_graph_def_round_trip(seed):
    graph = random_graph(seed)
    proto = graph.to_graph_def()
    again = Graph.from_graph_def(proto, {"x": "x:0"}, {key: f"{t.node.name}:{t.index}" for key, t in graph.outputs.items()})
    assert names(again) == names(graph)
    assert bytes_of(again) == bytes_of(graph)
    assert [again.nodes[name].shapes for name in names(graph)] == [node.shapes for node in graph.order()]
    assert_consistent(again)
    feed = np.linspace(-2, 2, 6, dtype=np.float32).reshape(2, 3)
    expected, found = run(graph, x=feed), run(again, x=feed)
    assert all(np.array_equal(expected[key], found[key]) for key in ("y", "z"))


def test_round_trip_of_constants_dtypes_and_versions():
    graph, x = start(2)
    values = {
        "f": np.float32([1.5, -2]),
        "d": np.float64([[1e300]]),
        "i": np.int64([2**40]),
        "b": np.array([True, False]),
        "s": np.array([b"ab", b""], object),
    }
    outputs = {key: graph.constant(value, name=key) for key, value in values.items()}
    outputs["q"] = graph.constant(np.int8([-127, 5]), name="q", dtype=tf.qint8)
    graph.versions.producer = 1087
    finish(graph, y=x, **outputs)
    again = Graph.from_graph_def(graph.to_graph_def(), {"x": "x"}, {key: t.name for key, t in graph.outputs.items()})
    assert again.versions.producer == 1087
    for key, value in values.items():
        found = again.outputs[key].value
        assert found.dtype == value.dtype
        assert np.array_equal(found, value)
    assert again.outputs["q"].dtype == tf.qint8
    assert [int(v) for v in np.ravel(again.outputs["q"].value).astype(np.int8)] == [-127, 5]
    assert again.outputs["y"].value is None


@pytest.mark.parametrize("seed", range(3))
def test_copy_is_equal_and_apart(seed):
    graph = random_graph(seed)
    before = bytes_of(graph)
    twin = graph.copy()
    assert bytes_of(twin) == before
    assert_consistent(twin)
    assert not {id(node) for node in graph.nodes.values()} & {id(node) for node in twin.nodes.values()}
    twin.replace(twin.outputs["y"], op(twin, "Abs", twin.inputs["x"]))
    twin.prune()
    assert bytes_of(graph) == before
    assert_consistent(graph)


@pytest.mark.parametrize(
    "value",
    [3, -1, True, False, 0.5, "SAME", tf.qint8, [1, 2, 2, 1], [], ["a", "b"], [tf.float32, tf.int32], [True, False], [0.5]],
)
def test_attributes_round_trip(value):
    found = from_attr(to_attr(value))
    assert found == value
    assert type(found) is type(value)


def test_attribute_of_unknown_kind():
    with pytest.raises(TypeError, match=r"Received: \{1\}"):
        to_attr({1})


def test_copy_of_overwrites_attributes():
    graph, x = start(4, 4)
    node = op(graph, "MatMul", x, x, transpose_a=False, transpose_b=True).node
    twin = graph.copy_of(node, [x, x], transpose_b=False)
    assert (twin.name, twin.attr("transpose_b"), twin.attr("transpose_a")) == ("matmul", False, False)
    assert node.name == "matmul/replaced"
    assert graph.nodes == {other.name: other for other in graph.nodes.values()}
    assert node.attr("transpose_b") is True
    assert twin.attr("nothing", 7) == 7


# Patterns


def conv_like(graph, x, weights=None, name="conv"):
    weights = const(graph, np.ones((4, 4)), f"{name}/weights") if weights is None else weights
    return op(graph, "MatMul", x, weights, name=name, transpose_a=False, transpose_b=False)


LAYER = Op("MatMul", Any("x"), Const("weights"), name="layer")
BIASED = Maybe("BiasAdd", LAYER, Const("bias"), name="bias_add")
PATTERN = Maybe("Relu|Relu6", BIASED, name="activation")


def found(pattern, graph, root, trace=None):
    return list(matches(pattern, graph, root.node, trace))


def test_maybe_present_and_absent():
    graph, x = start(None, 4)
    layer = conv_like(graph, x)
    biased = op(graph, "BiasAdd", layer, const(graph, np.ones(4), "bias"))
    relu = op(graph, "Relu6", biased)
    finish(graph, y=relu)
    (match,) = found(PATTERN, graph, relu)
    assert [node.name for node in match.covered] == ["relu6", "biasadd", "conv"]
    assert (match["x"], match["weights"].name, match["bias"].name) == (x, "conv/weights", "bias")
    (match,) = found(PATTERN, graph, biased)
    assert list(match.nodes) == ["bias_add", "layer"]
    (match,) = found(PATTERN, graph, layer)
    assert list(match.nodes) == ["layer"]
    assert match.get("bias") is None
    assert found(PATTERN, graph, x) == []
    assert first_ops(PATTERN) == {"Relu", "Relu6", "BiasAdd", "MatMul"}
    assert first_ops(LAYER) == {"MatMul"}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", ["AddV2", "Add", "Mul"])
def test_commutative_ops_fit_both_ways(kind, swapped):
    graph, x = start(None, 4)
    constant = const(graph, np.ones(4))
    node = op(graph, kind, *([constant, x] if swapped else [x, constant]))
    finish(graph, y=node)
    fits = found(Op(kind, Any("x"), Const("c")), graph, node)
    assert [(match["x"].name, match["c"].name) for match in fits] == [("x", "c")]


def test_other_ops_fit_one_way():
    graph, x = start(None, 4)
    node = op(graph, "Sub", const(graph, np.ones(4)), x)
    finish(graph, y=node)
    assert found(Op("Sub", Any("x"), Const("c")), graph, node) == []
    assert len(found(Op("Sub", Const("c"), Any("x")), graph, node)) == 1


def test_two_layers_added_fit_twice():
    graph, x = start(None, 4)
    one, other = conv_like(graph, x, name="one"), conv_like(graph, x, name="other")
    total = op(graph, "AddV2", one, other)
    finish(graph, y=total)
    fits = found(Op("AddV2", LAYER, Any("rest"), name="add"), graph, total)
    assert [(match.nodes["layer"].name, match["rest"].name) for match in fits] == [("one", "other"), ("other", "one")]


def test_same_name_means_same_tensor():
    graph, x = start(None, 4)
    square, product = op(graph, "Mul", x, x), op(graph, "Mul", x, op(graph, "Relu", x))
    finish(graph, y=square, z=product)
    pattern = Op("Mul", Any("x"), Any("x"))
    assert len(found(pattern, graph, square)) >= 1
    assert found(pattern, graph, product) == []


def test_shared_nodes_need_permission():
    graph, x = start(None, 4)
    layer = conv_like(graph, x)
    relu = op(graph, "Relu", layer)
    finish(graph, y=relu, z=op(graph, "Neg", layer))
    trace = Trace()
    assert found(Op("Relu", LAYER), graph, relu, trace) == []
    assert trace.reason == "conv is read by 2 ops"
    allowed = Op("MatMul", Any("x"), Const("weights"), name="layer", shared=True)
    assert len(found(Op("Relu", allowed), graph, relu)) == 1


def test_outputs_are_not_private():
    graph, x = start(None, 4)
    layer = conv_like(graph, x)
    relu = op(graph, "Relu", layer)
    finish(graph, y=relu, features=layer)
    trace = Trace()
    assert found(Op("Relu", LAYER), graph, relu, trace) == []
    assert trace.reason == "conv is an output of the model"


def test_trace_keeps_the_deepest_reason():
    graph, x = start(None, 4)
    layer = conv_like(graph, x, weights=op(graph, "Neg", x, name="computed"))
    relu = op(graph, "Relu", op(graph, "BiasAdd", layer, const(graph, np.ones(4), "bias")))
    finish(graph, y=relu)
    trace = Trace()
    assert found(Op("Abs", Any("x")), graph, relu, trace) == []
    assert (trace.depth, trace.reason) == (0, "relu is Relu, not Abs")
    assert found(PATTERN, graph, relu, trace) == []
    assert (trace.depth, trace.reason) == (3, "its weights are not a constant (they come from computed)")
    assert found(Op("Relu", Op("Conv2D|Conv3D", Any("x"))), graph, relu, trace) == []
    assert trace.depth == 3


def test_the_largest_match_comes_first():
    graph, x = start(None, 4)
    inner = op(graph, "Relu", x, name="inner")
    outer = op(graph, "Relu", inner, name="outer")
    finish(graph, y=outer)
    pattern = Maybe("Relu", Maybe("Relu", Any("x"), name="first"), name="second")
    sizes = [len(match.nodes) for match in found(pattern, graph, outer)]
    assert sizes == [2, 1, 1, 0]
    assert [match["x"].name for match in found(pattern, graph, outer)][:2] == ["x", "inner"]


def test_only_output_0_is_matched():
    graph, x = start(4, 6)
    axis = const(graph, 1, "axis", np.int32)
    split = graph.add("Split", [axis, x], name="split", attrs={**FLOAT, "num_split": 2}, dtypes=[tf.float32] * 2)
    first, second = op(graph, "Relu", Tensor(split, 0)), op(graph, "Relu", Tensor(split, 1))
    finish(graph, a=first, b=second)
    pattern = Op("Relu", Op("Split", Const("axis"), Any("x"), shared=True))
    assert len(found(pattern, graph, first)) == 1
    assert found(pattern, graph, second) == []


def chain(count):
    graph, x = start(None, 4)
    tensor = x
    for _ in range(count):
        tensor = op(graph, "Neg", tensor)
    return finish(graph, y=tensor)


@pytest.mark.parametrize(("count", "fired"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (7, 3)])
def test_a_rule_fires_wherever_it_fits_without_overlap(count, fired):
    graph = chain(count)
    rule = Rule(
        "two Neg", Op("Neg", Op("Neg", Any("x"), name="inner")), lambda graph, match: None, lambda graph, match: match["x"]
    )
    assert rewrite(graph, rule) == fired
    assert sum(node.op == "Neg" for node in graph.order()) == count - 2 * fired
    assert_consistent(graph)
    feed = np.float32([[1, -2, 3, 0]])
    assert np.array_equal(run(graph, x=feed)["y"], feed * (-1) ** count)


def test_a_check_refuses_one_match_and_takes_the_next():
    graph, x = start(None, 4)
    one, other = conv_like(graph, x, name="one"), conv_like(graph, x, name="other")
    finish(graph, y=op(graph, "AddV2", one, other))
    seen = []

    def check(graph, match):
        seen.append(match.nodes["layer"].name)
        return "not that one" if match.nodes["layer"].name == "one" else None

    rule = Rule("keep the rest", Op("AddV2", LAYER, Any("rest")), check, lambda graph, match: match["rest"])
    assert rewrite(graph, rule) == 1
    assert seen == ["one", "other"]
    assert graph.outputs["y"].name == "one"
    assert "other" not in graph.nodes
    assert rewrite(graph, rule) == 0


# Paths


def named(*paths, prefix=""):
    """A graph whose ops have these names."""
    graph, x = start(4)
    for index, path in enumerate(paths):
        graph.outputs[f"y{index}"] = op(graph, "Relu", x, name=prefix + path)
    graph.infer()
    normalize(graph)
    assert_consistent(graph)
    return [graph.outputs[f"y{index}"].name for index in range(len(paths))]


@pytest.mark.parametrize(
    "prefix", ["StatefulPartitionedCall/", "PartitionedCall_1/", "StatefulPartitionedCall/StatefulPartitionedCall_2/", "Func/"]
)
def test_saved_model_prefixes_go(prefix):
    assert named("block/conv/Relu", "Relu", prefix=prefix) == ["block/conv/Relu", "Relu"]


def test_prefix_in_the_middle_or_in_part_stays():
    assert named("a/PartitionedCall/b", "PartitionedCaller/c") == ["a/PartitionedCall/b", "PartitionedCaller/c"]


def test_retrace_suffix_goes_on_all_levels_that_have_it():
    assert named("net_1/conv_1/BiasAdd", "net_1/bn_1/add_1", "net_1/relu_1/Relu", "Identity") == [
        "net/conv/BiasAdd",
        "net/bn/add_1",
        "net/relu/Relu",
        "Identity",
    ]
    assert named("net_7/block_7/conv_7/A", "net_7/block_7/conv_7/B") == ["net/block/conv/A", "net/block/conv/B"]


def test_legitimate_suffixes_stay():
    assert named("net_1/conv_1_1/A", "net_1/conv_2_1/A", "net_1/conv_1/A") == ["net/conv_1/A", "net/conv_2/A", "net/conv/A"]
    assert named("net_1/conv_1/A", "net_1/conv_2/A") == ["net/conv_1/A", "net/conv_2/A"]
    assert named("net/conv_1/A", "net/conv_1/B") == ["net/conv_1/A", "net/conv_1/B"]
    assert named("conv_1", "conv_2") == ["conv_1", "conv_2"]


def test_names_stay_unique_and_inputs_keep_theirs():
    graph, x = start(4, name="image")
    for index, path in enumerate(["StatefulPartitionedCall/a/b", "PartitionedCall/a/b", "a/b", "PartitionedCall/image"]):
        graph.outputs[f"y{index}"] = op(graph, "Relu", x, name=path)
    finish(graph)
    normalize(graph)
    assert [tensor.name for tensor in graph.outputs.values()] == ["a/b", "a/b_1", "a/b_2", "image_1"]
    assert graph.inputs["image"].name == "image"
    assert graph.nodes["image"].op == "Placeholder"
    assert_consistent(graph)


def test_normalize_is_stable():
    graph = random_graph(3)
    normalize(graph)
    first = names(graph)
    normalize(graph)
    assert names(graph) == first


def test_normalize_forgets_nodes_that_nobody_needs():
    graph, x = start(4)
    relu = op(graph, "Relu", x)
    op(graph, "Neg", relu)
    finish(graph, y=relu)
    normalize(graph)
    assert sorted(graph.nodes) == ["relu", "x"]
    assert graph.users(relu) == []


def test_keras_layers_with_default_names_keep_them():
    import keras

    from tfquant.config import QuantConfig
    from tfquant.sources import open_model

    keras.backend.clear_session()
    x = image = keras.Input((8, 8, 3))
    for _ in range(3):
        x = keras.layers.ReLU()(keras.layers.Conv2D(4, 3)(x))
    graph = open_model(keras.Model(image, x), QuantConfig()).graph
    normalize(graph)
    layers = [layer_of(node.name).split("/")[1] for node in graph.order() if node.op in ("Conv2D", "Relu")]
    assert layers == ["conv2d", "re_lu", "conv2d_1", "re_lu_1", "conv2d_2", "re_lu_2"]


def test_layer_of():
    assert [layer_of(name) for name in ("net/conv/BiasAdd", "conv")] == ["net/conv", "conv"]


# Cost


def conv2d(graph, x, kernel, op_name="Conv2D", stride=1, padding="SAME", dilation=1):
    weights = const(graph, np.zeros(kernel), "weights")
    strides, dilations = [1, stride, stride, 1], [1, dilation, dilation, 1]
    attrs = {"strides": strides, "padding": padding, "dilations": dilations, "data_format": "NHWC", "explicit_paddings": []}
    return op(graph, op_name, x, weights, **attrs)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "expected"),
    [
        ((3, 3, 4, 8), 1, "SAME", 10 * 12 * 8 * 3 * 3 * 4),
        ((3, 3, 4, 8), 1, "VALID", 8 * 10 * 8 * 3 * 3 * 4),
        ((5, 3, 4, 2), 2, "SAME", 5 * 6 * 2 * 5 * 3 * 4),
        ((1, 1, 2, 6), 1, "SAME", 10 * 12 * 6 * 2),  # two groups
    ],
)
@pytest.mark.parametrize("batch", [None, 7])
def test_macs_of_conv2d(kernel, stride, padding, expected, batch):
    graph, x = start(batch, 10, 12, 4)
    y = conv2d(graph, x, kernel, stride=stride, padding=padding)
    finish(graph, y=y)
    assert macs(y.node) == (batch or 1) * expected


@pytest.mark.parametrize(("multiplier", "expected"), [(1, 5 * 6 * 4 * 3 * 3), (3, 5 * 6 * 12 * 3 * 3)])
def test_macs_of_depthwise(multiplier, expected):
    graph, x = start(None, 10, 12, 4)
    y = conv2d(graph, x, (3, 3, 4, multiplier), "DepthwiseConv2dNative", stride=2)
    finish(graph, y=y)
    assert macs(y.node) == expected


@pytest.mark.parametrize(("transposed", "shape"), [(False, (20, 5)), (True, (5, 20))])
def test_macs_of_matmul(transposed, shape):
    graph, x = start(None, 20)
    y = op(graph, "MatMul", x, const(graph, np.zeros(shape)), transpose_a=False, transpose_b=transposed)
    finish(graph, y=y)
    assert macs(y.node) == 20 * 5


def test_macs_of_batch_matmul_and_transposed_conv():
    graph, x = start(None, 3, 20)
    y = op(graph, "BatchMatMulV2", x, const(graph, np.zeros((20, 5))), adj_x=False, adj_y=False)
    finish(graph, y=y)
    assert macs(y.node) == 3 * 20 * 5
    graph, x = start(2, 6, 7, 4)
    size = const(graph, [2, 12, 14, 3], "size", np.int32)
    attrs = {"strides": [1, 2, 2, 1], "padding": "SAME", "dilations": [1, 1, 1, 1], "data_format": "NHWC"}
    weights = const(graph, np.zeros((3, 3, 3, 4)), "weights")
    y = op(graph, "Conv2DBackpropInput", size, weights, x, **attrs, explicit_paddings=[])
    finish(graph, y=y)
    assert y.shape == (2, 12, 14, 3)
    assert macs(y.node) == 2 * 6 * 7 * 4 * 3 * 3 * 3


@pytest.mark.parametrize("batch", [None, 1, 6])
def test_macs_per_sample(batch):
    """Rows of a product are those of one sample, whatever stands in front of them."""
    graph, x = start(batch, 5, 20)
    rows = op(graph, "Reshape", x, const(graph, [-1, 20], "rows", np.int32))
    y = op(graph, "MatMul", rows, const(graph, np.zeros((20, 3)), "weights"), transpose_a=False, transpose_b=False)
    finish(graph, y=y)
    assert macs_per_sample(graph)[y.node.name] == 5 * 20 * 3


def test_no_macs_where_nothing_is_multiplied_or_known():
    graph, x = start(None, None, None, 4)
    y = conv2d(graph, x, (3, 3, 4, 8))
    relu = op(graph, "Relu", y)
    finish(graph, y=relu)
    assert (macs(y.node), macs(relu.node)) == (0, 0)
