"""Loops, branches and recurrent layers: what their functions read as constants."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from test_kinds import run_graph

import tfquant
from tfquant.errors import OutputError
from tfquant.graph import freezing
from tfquant.sources import open_model

KERAS = {"keras": keras, "tf_keras": tf_keras}
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


def test_a_variable_that_a_loop_writes_stays_one(tmp_path):
    held = Holder()

    def step(y):
        held.written.assign_add(y[0])
        return y @ held.w + held.written

    path = saved(held, lambda x: {"y": loop(step, x)}, tmp_path / "model", x=(None, 4))
    assert len(externals(path)) == 1
    result = tfquant.quantize(path, config=FLOAT)
    with pytest.raises(OutputError, match="cannot hold tables or variables"):
        result.save(tmp_path / "frozen", format="graphdef")
    result.save(tmp_path / "out")
    x = normal(3, 4)
    before, after = (tf.saved_model.load(str(tmp_path / name)).signatures["serving_default"] for name in ("model", "out"))
    for _ in range(2):
        expected = before(x=tf.constant(x))["y"].numpy()
        assert np.abs(after(x=tf.constant(x))["y"].numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


def test_variables_beyond_what_a_graph_holds_stay(tmp_path, monkeypatch):
    held = Holder()
    path = saved(held, readers(held)["loop"], tmp_path / "model", x=(None, 4))
    monkeypatch.setattr(freezing, "_MAX_BYTES_IN_BODIES", held.w.numpy().nbytes - 1)
    assert len(externals(path)) == 1
    monkeypatch.setattr(freezing, "_MAX_BYTES_IN_BODIES", held.w.numpy().nbytes)
    assert externals(path) == []


def test_equal_bytes_however_often_it_is_loaded(tmp_path):
    held = Holder()
    path = saved(held, readers(held)["loop in a loop"], tmp_path / "model", x=(None, 4))
    one, other = (tfquant.quantize(path, config=FLOAT).graph_def for _ in range(2))
    assert one.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True)
