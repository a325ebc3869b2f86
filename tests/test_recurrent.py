"""Loops, branches and recurrent layers: what their functions read as constants, and their products in INT8 (mode dynamic)."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from test_kinds import run_graph

import tfquant
from tfquant.errors import OutputError, PlanError
from tfquant.graph import bodies
from tfquant.sources import open_model

KERAS = {"keras": keras, "tf_keras": tf_keras}
INT8 = tfquant.QuantConfig(mode="dynamic", placement="int8", verify=False)
FLOAT = tfquant.QuantConfig(ignored_scope=("re:.*",), verify=False, mode="dynamic")


def normal(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def saved(module, function, path, **inputs):
    """A SavedModel of a function over the variables of a module."""
    specs = [tf.TensorSpec(shape, name=name) for name, shape in inputs.items()]
    tf.saved_model.save(module, str(path), signatures=tf.function(function, input_signature=specs))
    return path


def serve(path, x, name="output_0"):
    signature = tf.saved_model.load(str(path)).signatures["serving_default"]
    (key,) = signature.structured_input_signature[1]
    return signature(**{key: tf.constant(x)})[name].numpy()


def externals(path):
    return [node.name for node in open_model(path, tfquant.QuantConfig()).graph.order() if node.external is not None]


def as_graphdef(source, x, tmp_path, config=FLOAT):
    """What the model computes as a frozen GraphDef."""
    result = tfquant.quantize(source, config=config)
    result.save(tmp_path / "frozen", format="graphdef")
    (name,) = result.input_names
    (output,) = result._lowered.outputs
    return run_graph(tmp_path / "frozen" / "frozen_graph.pb", [f"{output}:0"], {f"{name}:0": x})[0]


def sqnr(expected, found):
    assert expected.shape == found.shape
    noise = ((expected.astype(np.float64) - found) ** 2).sum()
    return 10 * np.log10((expected.astype(np.float64) ** 2).sum() / noise) if noise else np.inf


def products(result):
    """Kernels in the functions of the INT8 graph, and the float products that are left there."""
    inner = [node.op for function in result.graph_def.library.function for node in function.node_def]
    return inner.count("_QuantizedMatMul"), inner.count("MatMul")


# -- variables that functions read ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KERAS)
@pytest.mark.parametrize("layer", ["LSTM", "GRU", "SimpleRNN"])
def test_recurrent_layers_as_a_frozen_graph(kind, layer, tmp_path):
    """Keras 3 reads the variables in the loop, tf_keras in front of it."""
    module = KERAS[kind]
    keras.utils.set_random_seed(0)
    inner = getattr(module.layers, layer)
    net = module.Sequential([module.Input((5, 6)), inner(8, return_sequences=True), module.layers.Bidirectional(inner(7))])
    net.export(str(tmp_path / "model"))
    x = normal(3, 5, 6)
    expected = serve(tmp_path / "model", x)
    assert externals(tmp_path / "model") == []
    assert np.abs(as_graphdef(tmp_path / "model", x, tmp_path) - expected).max() < 1e-6


class Holder(tf.Module):
    def __init__(self):
        self.w, self.table = tf.Variable(normal(4, 4, scale=0.5)), tf.Variable(normal(9, 4, seed=1))
        self.written = tf.Variable(normal(4, seed=2))


def loop(step, x, times=3):
    return tf.while_loop(lambda i, _: i < times, lambda i, y: (i + 1, step(y)), (0, x))[1]


def readers(held):
    """Functions whose loops and branches read variables in all the ways there are."""

    def branch(y):
        return tf.cond(tf.reduce_sum(y) > 0, lambda: y @ held.w, lambda: y - held.w[0])

    @tf.function
    def inner(y):
        return tf.tanh(y @ held.w) + tf.cast(tf.shape(held.table)[0], tf.float32)

    return {
        "loop": lambda x: {"y": loop(lambda y: tf.tanh(y @ held.w), x)},
        "condition": lambda x: {
            "y": tf.while_loop(lambda y: tf.reduce_sum(tf.abs(y @ held.w)) < 50, lambda y: (y * 1.5,), (x,))[0]
        },
        "branch": lambda x: {"y": branch(x)},
        "branch in a loop": lambda x: {"y": loop(branch, x)},
        "loop in a loop": lambda x: {"y": loop(lambda y: loop(lambda z: tf.tanh(z @ held.w), y) + held.w[1], x)},
        "loop in a branch": lambda x: {"y": tf.cond(tf.reduce_sum(x) > 9, lambda: x, lambda: loop(lambda y: y @ held.w, x))},
        "case": lambda x: {"y": tf.switch_case(tf.size(x) % 3, [lambda: x, lambda: x @ held.w, lambda: x + held.w[0]])},
        "call in a loop": lambda x: {"y": loop(inner, x)},
        "lookup": lambda x: {"y": loop(lambda y: y + tf.gather(held.table, tf.argmax(y, 1)), x)},
        "lookup of several": lambda x: {"y": loop(lambda y: y + tf.gather_nd(held.table, tf.argmax(y, 1)[:, None]), x)},
        "inside and outside": lambda x: {"y": loop(lambda y: y @ held.w, x) @ held.w},
    }


@pytest.mark.parametrize("kind", readers(Holder()))
def test_variables_that_functions_read(kind, tmp_path):
    held = Holder()
    path = saved(held, readers(held)[kind], tmp_path / "model", x=(None, 4))
    assert externals(path) == []
    for rows, size in ((3, 1.0), (1, -1.0), (4, 0.1)):
        x = size * np.abs(normal(rows, 4))
        found = as_graphdef(path, x, tmp_path / f"{rows}")
        assert np.abs(found - serve(path, x, "y")).max() <= 1e-5 * np.abs(found).max()


@pytest.mark.parametrize("config", [FLOAT, INT8], ids=["float", "int8"])
def test_a_variable_that_a_loop_writes_stays_one(config, tmp_path):
    held = Holder()

    def step(y):
        held.written.assign_add(0.1 * y[0])
        return tf.tanh(y @ held.w) + held.written

    path = saved(held, lambda x: {"y": loop(step, x)}, tmp_path / "model", x=(None, 4))
    assert len(externals(path)) == 1
    result = tfquant.quantize(path, config=config)
    assert products(result) == ((1, 0) if config is INT8 else (0, 1))
    with pytest.raises(OutputError, match="cannot hold tables or variables"):
        result.save(tmp_path / "frozen", format="graphdef")
    result.save(tmp_path / "out")
    x = normal(3, 4)
    before, after = (tf.saved_model.load(str(tmp_path / name)).signatures["serving_default"] for name in ("model", "out"))
    for _ in range(3):
        expected, found = (function(x=tf.constant(x))["y"].numpy() for function in (before, after))
        assert sqnr(expected, found) > (25 if config is INT8 else 100)


def test_variables_beyond_what_a_graph_holds_stay(tmp_path, monkeypatch):
    held = Holder()
    path = saved(held, readers(held)["loop"], tmp_path / "model", x=(None, 4))
    monkeypatch.setattr(bodies, "_MAX_BYTES", held.w.numpy().nbytes)
    assert len(externals(path)) == 1  # there are other constants too
    monkeypatch.setattr(bodies, "_MAX_BYTES", held.w.numpy().nbytes + 100)
    assert externals(path) == []


def test_equal_bytes_however_often_it_is_loaded(tmp_path):
    held = Holder()
    path = saved(held, readers(held)["loop in a loop"], tmp_path / "model", x=(None, 4))
    one, other = (tfquant.quantize(path, config=FLOAT).graph_def for _ in range(2))
    assert one.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True)


# -- products in INT8 ---------------------------------------------------------------------------------------------------------
def simulated(result, x):
    (name,) = result.input_names
    (found,) = result.simulation()({name: x}).values()
    return found


def dynamic_product(x, w, b):
    """x @ w + b with quint8 activations in the range of x, and qint8 weights per output channel; float64."""
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    q = np.clip(np.rint(x / scale) + zero, 0, 255)
    scales = np.abs(w).max(0) / 127
    return scale * scales * ((q - zero) @ np.rint(w / scales)) + b, scale


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_a_cell_is_what_dynamic_quantization_computes(rows, size, tmp_path):
    """One round within a step of the input times the largest weight; further rounds each from what was computed."""
    module = tf.Module()
    module.w, module.b = tf.Variable(normal(24, 24)), tf.Variable(normal(24, seed=1))
    x = normal(rows, 24, seed=2, scale=size)
    for times in (1, 2, 3):
        source = saved(
            module, lambda x, n=times: {"y": loop(lambda y: y @ module.w + module.b, x, n)}, tmp_path / f"{times}", x=(None, 24)
        )
        result = tfquant.quantize(source, config=INT8)
        assert products(result) == (1, 0)
        found = result(normal(rows, 24, seed=2, scale=size))["y"].numpy()
        expected, step = dynamic_product(x.astype(np.float64), module.w.numpy().astype(np.float64), module.b.numpy())
        assert np.abs(found - expected).max() <= 1.01 * step * np.abs(module.w.numpy()).max()
        assert sqnr(expected, found) > 60  # that a value is a step off is the exception
        x = found


def net_of(module, kind):
    """(model, its input of three samples, kernels in INT8)."""
    layers = module.layers
    if kind == "masked":
        words = np.random.default_rng(0).integers(0, 20, (3, 9)).astype(np.int32)
        words[:, 5:] = 0
        embedding = layers.Embedding(20, 12, mask_zero=True, embeddings_initializer="random_normal")
        return module.Sequential([module.Input((9,), dtype="int32"), embedding, layers.LSTM(16)]), words, 2
    x = normal(3, 9, 12)
    given = module.Input((9, 12))
    if kind == "unknown length":
        return module.Sequential([module.Input((None, 12)), layers.LSTM(16, return_sequences=True)]), x, 2
    made = {
        "LSTM": lambda: [layers.LSTM(16)],
        "GRU": lambda: [layers.GRU(16)],
        "GRU, reset before": lambda: [layers.GRU(16, reset_after=False)],
        "SimpleRNN": lambda: [layers.SimpleRNN(16)],
        "sequences": lambda: [layers.LSTM(16, return_sequences=True)],
        "stacked": lambda: [layers.LSTM(16, return_sequences=True), layers.GRU(8)],
        "bidirectional": lambda: [
            layers.Bidirectional(layers.LSTM(16, return_sequences=True)),
            layers.Bidirectional(layers.GRU(8)),
        ],
        "cells": lambda: [layers.RNN(layers.StackedRNNCells([layers.LSTMCell(16), layers.GRUCell(8)]))],
        "backwards": lambda: [layers.LSTM(16, go_backwards=True)],
    }[kind]()
    counts = {"GRU, reset before": 3, "SimpleRNN": 2, "stacked": 4, "bidirectional": 8, "cells": 4}
    return module.Sequential([given, *made]), x, counts.get(kind, 2)


KINDS = ["LSTM", "GRU", "GRU, reset before", "SimpleRNN", "sequences", "stacked", "bidirectional", "cells", "backwards"]


@pytest.mark.parametrize("library", KERAS)
@pytest.mark.parametrize("kind", [*KINDS, "masked", "unknown length"])
def test_recurrent_layers_in_int8(kind, library, tmp_path):
    keras.utils.set_random_seed(0)
    net, x, count = net_of(KERAS[library], kind)
    net.export(str(tmp_path / "model"))
    result = tfquant.quantize(tmp_path / "model", config=INT8)
    inside, left = products(result)
    assert (inside >= count, left) == (True, 0)
    assert all(decision.int8 for decision in result.plan.ops if decision.op == "MatMul")
    result.save(tmp_path / "out")
    for rows in (3, 1):
        expected, found = serve(tmp_path / "model", x[:rows]), serve(tmp_path / "out", x[:rows])
        assert sqnr(expected, found) > 30
        assert sqnr(simulated(result, x[:rows]), found) > 60


@pytest.mark.parametrize("rows", [1, 3])
def test_sequences_of_any_length(rows, tmp_path):
    module = tf.Module()
    module.w = tf.Variable(normal(12, 12, scale=0.3))

    def net(x):
        def step(i, y):
            return i + 1, tf.tanh(y @ module.w + x[:, i])

        return {"y": tf.while_loop(lambda i, _: i < tf.shape(x)[1], step, (0, tf.ones([tf.shape(x)[0], 12])))[1]}

    result = tfquant.quantize(saved(module, net, tmp_path / "model", x=(None, None, 12)), config=INT8)
    assert products(result) == (1, 0)
    result.save(tmp_path / "out")
    for length in (0, 1, 2, 30):
        x = normal(rows, length, 12)
        assert sqnr(serve(tmp_path / "model", x, "y"), serve(tmp_path / "out", x, "y")) > (30 if length else 1e9)


def test_an_empty_batch(tmp_path):
    net, _, _ = net_of(keras, "LSTM")
    net.export(str(tmp_path / "model"), verbose=False)
    assert tfquant.quantize(tmp_path / "model", config=INT8)(np.zeros((0, 9, 12), np.float32)).shape == (0, 16)


@pytest.mark.parametrize("library", KERAS)
def test_a_stateful_layer(library, tmp_path):
    keras.utils.set_random_seed(0)
    layers = KERAS[library].layers
    inputs = KERAS[library].Input(batch_shape=(3, 4, 12))
    KERAS[library].Model(inputs, layers.LSTM(16, stateful=True)(inputs)).export(str(tmp_path / "model"))
    result = tfquant.quantize(tmp_path / "model", config=INT8)
    assert products(result) == (2, 0)
    result.save(tmp_path / "out")
    one, other = (tf.saved_model.load(str(tmp_path / name)).signatures["serving_default"] for name in ("model", "out"))
    (key,) = one.structured_input_signature[1]
    for seed in range(3):
        x = tf.constant(normal(3, 4, 12, seed=seed))
        assert sqnr(one(**{key: x})["output_0"].numpy(), other(**{key: x})["output_0"].numpy()) > 30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp("recurrent") / "model"
    layers = [keras.layers.LSTM(16, return_sequences=True, name="first"), keras.layers.GRU(8, name="second")]
    keras.Sequential([keras.Input((9, 12)), *layers], name="net").export(str(path), verbose=False)
    return path


CELLS = {"first": "lstm_cell", "second": "gru_cell"}
LAYERS = [f"net/{layer}/while/{cell}/{op}" for layer, cell in CELLS.items() for op in ("MatMul", "MatMul_1")]


def test_decisions_have_names_that_tell_the_loop(model):
    result = tfquant.quantize(model, config=INT8)
    assert [decision.name for decision in result.plan.ops] == LAYERS
    assert ("MatMul", 4, 4) in [(count.op, count.total, count.int8) for count in result.report.ops]
    assert result.report.float_ops == ()
    kept = tfquant.quantize(model, config=dataclasses.replace(INT8, ignored_scope=("re:.*gru_cell/MatMul$",)))
    assert [decision.int8 for decision in kept.plan.ops] == [True, True, False, True]
    assert products(kept) == (3, 1)


def test_small_products_stay_float_with_the_reason(model):
    """As measured: 512 units at batch 1, 256 units at batch 16."""
    result = tfquant.quantize(model, config=dataclasses.replace(INT8, placement="table"))
    assert products(result) == (0, 4)
    assert all("in a loop" in decision.reason for decision in result.report.float_ops)
    assert len(result.report.float_ops) == 4
    for units, sizes, count in ((512, (1, 16), 1), (256, (1, 16), 0), (256, (16,), 1), (128, (16,), 0)):
        module = tf.Module()
        module.w = tf.Variable(normal(units, 4 * units))
        net = lambda x: {"y": loop(lambda y: (y @ module.w)[:, : x.shape[1]], x)}  # noqa: B023, E731
        with tempfile.TemporaryDirectory() as folder:
            source = saved(module, net, pathlib.Path(folder) / "model", x=(None, units))
            config = dataclasses.replace(INT8, placement="table", placement_batch_sizes=sizes)
            assert products(tfquant.quantize(source, config=config)) == (count, 1 - count)


def test_static_mode_leaves_them_float_with_the_reason(model):
    result = tfquant.quantize(model, normal(20, 9, 12), tfquant.QuantConfig(verify=False, placement="int8"))
    assert products(result) == (0, 4)
    reasons = [decision.reason for decision in result.report.float_ops if decision.op == "MatMul"]
    assert reasons == ["2 of them stand in the body of a While, which stays as it was"] * 2


def test_a_plan_is_applied_again(model, tmp_path):
    result = tfquant.quantize(model, config=INT8)
    result.save(tmp_path / "out")
    again = tfquant.quantize(model, plan=tmp_path / "out" / "quant_plan.json")
    assert again.graph_def.SerializeToString(deterministic=True) == result.graph_def.SerializeToString(deterministic=True)
    kept = tfquant.quantize(model, config=dataclasses.replace(INT8, placement="table"))
    assert products(tfquant.quantize(model, plan=kept.plan)) == (0, 4)
    with pytest.raises(PlanError, match="has no range for net/first/while"):
        tfquant.quantize(model, plan=dataclasses.replace(result.plan, dynamic={}))


def test_in_another_process(model, tmp_path):
    result, x = tfquant.quantize(model, config=INT8), normal(3, 9, 12)
    result.save(tmp_path / "out")
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, numpy, tensorflow as tf; f = tf.saved_model.load('out').signatures['serving_default'];"
        "(key,) = f.structured_input_signature[1];"
        "numpy.save('y.npy', f(**{key: tf.constant(numpy.load('x.npy'))})['output_0'])"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    assert np.array_equal(np.load(tmp_path / "y.npy"), result(x).numpy())


@pytest.mark.parametrize("format", ["graphdef", "fakequant"])
def test_other_formats(model, format, tmp_path):
    result, x = tfquant.quantize(model, config=INT8), normal(3, 9, 12)
    result.save(tmp_path / "out", format=format)
    if format == "graphdef":
        assert np.array_equal(as_graphdef(model, x, tmp_path, INT8), result(x).numpy())
    else:
        assert sqnr(serve(tmp_path / "out", x), result(x).numpy()) > 60


@pytest.mark.parametrize(
    "options", [{"activation_mode": "symmetric"}, {"isa": "no_vnni"}, {"isa": "no_vnni", "activation_mode": "symmetric"}]
)
def test_options(model, options):
    result, x = tfquant.quantize(model, config=dataclasses.replace(INT8, **options)), normal(3, 9, 12)
    assert sqnr(simulated(result, x), result(x).numpy()) > 60
    assert sqnr(serve(model, x), result(x).numpy()) > 25
    if "isa" in options:
        inner = [node for function in result.graph_def.library.function for node in function.node_def]
        values = [
            tf.make_ndarray(node.attr["value"].tensor) for node in inner if node.attr["dtype"].type == tf.qint8.as_datatype_enum
        ]
        assert len(values) == 4
        assert max(np.abs(value.astype(np.int32)).max() for value in values) <= 64


@pytest.mark.parametrize(
    ("kind", "count", "left"), [("loop in a loop", 1, 0), ("inside and outside", 1, 0), ("branch in a loop", 0, 1)]
)
def test_loops_in_loops_and_branches(kind, count, left, tmp_path):
    """What a branch in a loop holds stays float, with the reason."""
    held = Holder()
    path = saved(held, readers(held)[kind], tmp_path / "model", x=(None, 4))
    result, x = tfquant.quantize(path, config=INT8), normal(3, 4)
    assert products(result) == (count, left)
    assert [decision.op for decision in result.report.float_ops] == ["MatMul"] * left
    assert all("body of a" in decision.reason for decision in result.report.float_ops)
    assert sqnr(serve(path, x, "y"), result(x)["y"].numpy()) > 25
    assert sqnr(simulated(result, x), result(x)["y"].numpy()) > 60


def test_a_layer_that_is_called_twice(tmp_path):
    """Its loops have one function in the source, and each a name of its own in the plan."""
    keras.utils.set_random_seed(0)
    layer, inputs = keras.layers.LSTM(12), [keras.Input((5, 12)) for _ in range(2)]
    keras.Model(inputs, keras.layers.Add()([layer(x) for x in inputs])).export(str(tmp_path / "model"), verbose=False)
    result = tfquant.quantize(tmp_path / "model", config=INT8)
    assert len({decision.name for decision in result.plan.ops}) == 4
    assert products(result)[1] == 0
    data = dict(zip(result.input_names, (normal(2, 5, 12), normal(2, 5, 12, seed=1)), strict=True))
    assert sqnr(next(iter(result.simulation()(data).values())), np.asarray(result(list(data.values())))) > 60


def test_a_product_in_the_condition_stays_float_with_the_reason(tmp_path):
    held = Holder()
    path = saved(held, readers(held)["condition"], tmp_path / "model", x=(None, 4))
    result = tfquant.quantize(path, config=INT8)
    assert products(result) == (0, 1)
    assert [decision.op for decision in result.report.float_ops] == ["MatMul"]
