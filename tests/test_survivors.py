"""Tests of what must live on: tables, assets, labels, state, loops and branches, functions, strings, half precision, layouts.

Each model is saved, quantized, saved again and loaded where its source is gone. What the quantization may change is held against
the float model in dB on data that calibration has not seen; the rest must be equal.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

import tfquant

LAYERS = keras.layers
V1 = tf.compat.v1
CONV, DEPTHWISE, MATMUL = "_FusedQuantizedConv2D", "_FusedQuantizedDepthwiseConv2D", "_QuantizedMatMul"
WORDS = ["ape", "bee", "cat", "dog", "eel", "fox"]


# -- models and data ----------------------------------------------------------------------------------------------------------
def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def weights(*shape, seed=0):
    """Values that keep the size of what they are multiplied with."""
    return normal(*shape, seed=seed) * np.float32(np.prod(shape[:-1]) ** -0.5)


def kernel(*shape, seed=0):
    return tf.Variable(weights(*shape, seed=seed))


def images(seed=0, count=40, shape=(8, 8, 3)):
    """Calibration data, and data to compare with."""
    return normal(count, *shape, seed=seed), normal(24, *shape, seed=seed + 1000)


def words(seed=0, length=4):
    known = np.array([*WORDS, "yak", "zebu"], object)
    return [np.random.default_rng(seed + i).choice(known, (40, length)) for i in (0, 1000)]


class Net(tf.Module):
    """Two convolutions and a dense layer."""

    def __init__(self, out=6):
        super().__init__()
        self.stem, self.conv, self.head = kernel(3, 3, 3, 16), kernel(3, 3, 16, 16, seed=1), kernel(16, out, seed=2)

    def trunk(self, x):
        return tf.nn.relu(tf.nn.conv2d(tf.nn.relu(tf.nn.conv2d(x, self.stem, 1, "SAME")), self.conv, 2, "SAME"))

    def __call__(self, x):
        return tf.reduce_mean(self.trunk(x), [1, 2]) @ self.head

    def infer(self, x):
        return {"y": self(x)}


def spec(name, *shape, dtype=tf.float32):
    return tf.TensorSpec(shape, dtype, name)


IMAGE = spec("x", None, 8, 8, 3)


def save(path, function, *specs, keep=(), **options):
    """A SavedModel of a function; `keep` are the objects that it uses."""
    module = tf.Module()
    module.keep = list(keep)

    def infer(*inputs):
        return function(*inputs)

    module.infer = tf.function(infer, input_signature=specs, autograph=False, **options)
    tf.saved_model.save(module, str(path), signatures=module.infer)
    return path


@contextlib.contextmanager
def control_flow_v1():
    """Loops and branches of Switch and Merge in the graphs that are made here."""
    was_on = V1.control_flow_v2_enabled()
    V1.disable_control_flow_v2()
    try:
        yield
    finally:
        if was_on:
            V1.enable_control_flow_v2()


def save_v1(path, build, method="tensorflow/serving/predict", tags=("serve",), key="serving_default"):
    """A SavedModel as TensorFlow 1 wrote it; `build` makes a graph and returns its inputs and outputs."""
    with tf.Graph().as_default(), V1.Session() as session, control_flow_v1():
        inputs, outputs = build()
        main_op = V1.tables_initializer() if V1.get_collection(V1.GraphKeys.TABLE_INITIALIZERS) else None
        session.run(V1.global_variables_initializer())
        info = V1.saved_model.build_tensor_info
        signature = V1.saved_model.build_signature_def(
            {name: info(tensor) for name, tensor in inputs.items()}, {name: info(t) for name, t in outputs.items()}, method
        )
        builder = V1.saved_model.Builder(str(path))
        assets = V1.get_collection(V1.GraphKeys.ASSET_FILEPATHS)
        builder.add_meta_graph_and_variables(
            session, list(tags), {key: signature}, assets_collection=assets or None, main_op=main_op
        )
        builder.save()
    return path


def net_v1(x, resource=True):
    """`Net` with variables of TensorFlow 1."""
    values = (weights(3, 3, 3, 16), weights(3, 3, 16, 16, seed=1), weights(16, 6, seed=2))
    stem, conv, head = (
        V1.get_variable(f"w{i}", initializer=tf.constant(value), use_resource=resource) for i, value in enumerate(values)
    )
    x = tf.nn.relu(tf.nn.conv2d(tf.nn.relu(tf.nn.conv2d(x, stem, 1, "SAME")), conv, 2, "SAME"))
    return tf.matmul(tf.reduce_mean(x, [1, 2]), head)


# -- there and back -----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Trip:
    """What came out: outputs on fresh data of the float model, and of the INT8 model when its source was gone."""

    result: tfquant.QuantizedModel
    out: pathlib.Path
    loaded: object
    expected: dict
    found: dict

    def sqnr(self, name="y"):
        return sqnr(self.expected[name], self.found[name])

    def ops(self):
        return collections.Counter(node.op for node in self.result.graph_def.node)

    def reasons(self, op):
        return [decision.reason for decision in self.result.report.float_ops if decision.op == op]

    def serve(self, key="serving_default", **inputs):
        return call(self.loaded, inputs, key)


def sqnr(expected, found):
    expected, found = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    assert expected.shape == found.shape
    noise = ((expected - found) ** 2).sum()
    return 10 * np.log10((expected**2).sum() / noise) if noise else np.inf


def call(loaded, inputs, key="serving_default"):
    signature = loaded.signatures[key]
    specs = signature.structured_input_signature[1]
    tensors = {name: tf.convert_to_tensor(value, specs[name].dtype) for name, value in inputs.items()}
    return {name: value.numpy() for name, value in signature(**tensors).items()}


def in_session(path, inputs, key="serving_default", tags=("serve",)):
    """What a session of TensorFlow 1 computes."""
    with tf.Graph().as_default(), V1.Session() as session:
        definition = V1.saved_model.load(session, list(tags), str(path)).signature_def[key]
        fetches = {name: info.name for name, info in definition.outputs.items()}
        return session.run(fetches, {definition.inputs[name].name: value for name, value in inputs.items()})


def there_and_back(source, calibration, fresh, gone=(), session=True, **options):
    """Quantizes `source`, a folder or a Keras model, and takes the result to where nothing of its source is left."""
    if isinstance(source, tuple):
        model, source = source
        model.export(source, verbose=False)
    expected = call(tf.saved_model.load(str(source)), fresh)
    result = tfquant.quantize(source, calibration, tfquant.QuantConfig(verify=False, **options))
    out = source.parent / "out"
    result.save(out)
    shutil.rmtree(source)
    for file in gone:
        file.unlink()
    loaded = tf.saved_model.load(str(out))
    found = call(loaded, fresh)
    if session:
        same(in_session(out, fresh, tags=result._source.tags), found)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
    return Trip(result, out, loaded, expected, found)


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if value.dtype.kind in "fV":
            assert np.allclose(np.asarray(value, np.float64), np.asarray(other[name], np.float64), rtol=1e-3, atol=1e-4)
        else:
            assert np.array_equal(value, other[name])


def python(script, *arguments, **environment):
    """What a fresh interpreter prints as JSON."""
    found = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={**os.environ, **environment},
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


# -- tables -------------------------------------------------------------------------------------------------------------------
class Vocabulary(tf.Module):
    """Words to rows of an embedding, and classes to labels."""

    def __init__(self, kind, file):
        super().__init__()
        file.write_text("\n".join(WORDS) + "\n")
        lookup, count = tf.lookup, len(WORDS)
        keys, rows = tf.constant(WORDS), tf.range(count, dtype=tf.int64)
        if kind == "static":
            self.table = lookup.StaticHashTable(lookup.KeyValueTensorInitializer(keys, rows), count)
        elif kind == "vocabulary file":
            line, whole = lookup.TextFileIndex.LINE_NUMBER, lookup.TextFileIndex.WHOLE_LINE
            initializer = lookup.TextFileInitializer(str(file), tf.string, whole, tf.int64, line)
            self.table = lookup.StaticVocabularyTable(initializer, 2)
        elif kind == "mutable":
            self.table = lookup.experimental.MutableHashTable(tf.string, tf.int64, count)
            self.table.insert(keys, rows)
        elif kind == "dense":
            self.table = lookup.experimental.DenseHashTable(tf.string, tf.int64, count, "", "?")
            self.table.insert(keys, rows)
        labels = lookup.KeyValueTensorInitializer(rows, keys)
        self.labels = lookup.StaticHashTable(labels, "?")
        self.embedding, self.dense, self.head = kernel(count + 2, 16), kernel(64, 32, seed=1), kernel(32, 7, seed=2)

    def __call__(self, x):
        rows = self.table.lookup(tf.reshape(x, [-1]))  # a DenseHashTable takes vectors only
        h = tf.reshape(tf.gather(self.embedding, rows), [-1, 64])
        y = tf.nn.relu(h @ self.dense) @ self.head
        # The label comes from the input so that no rounding changes it.
        return {"y": y, "label": self.labels.lookup(self.table.lookup(x[:, 0]))}


@pytest.mark.parametrize("kind", ["static", "vocabulary file", "mutable", "dense"])
def test_tables(kind, tmp_path):
    file = tmp_path / "words.txt"
    module = Vocabulary(kind, file)
    source = save(tmp_path / "in", module, spec("x", None, 4, dtype=tf.string), keep=[module])
    calibration, fresh = words()
    trip = there_and_back(source, {"x": calibration}, {"x": fresh}, gone=[file])
    assert trip.ops()[MATMUL] == 2
    assert trip.sqnr() > 25
    assert np.array_equal(trip.found["label"], trip.expected["label"])
    assert set(trip.found["label"]) >= {b"?", b"ape", b"fox"}


def test_tables_of_tensorflow_1(tmp_path):
    """A vocabulary file in the collection of assets, and tables that an op initializes."""
    file = tmp_path / "words.txt"
    file.write_text("\n".join(WORDS) + "\n")

    def build():
        name = tf.constant(str(file))
        V1.add_to_collection(V1.GraphKeys.ASSET_FILEPATHS, name)
        line, whole = tf.lookup.TextFileIndex.LINE_NUMBER, tf.lookup.TextFileIndex.WHOLE_LINE
        table = tf.lookup.StaticVocabularyTable(tf.lookup.TextFileInitializer(name, tf.string, whole, tf.int64, line), 2)
        labels = tf.lookup.StaticHashTable(tf.lookup.TextFileInitializer(name, tf.int64, line, tf.string, whole), "?")
        x = V1.placeholder(tf.string, (None, 4), name="x")
        h = tf.reshape(tf.gather(V1.get_variable("e", initializer=weights(8, 16)), table.lookup(x)), [-1, 64])
        h = tf.nn.relu(tf.matmul(h, V1.get_variable("d", initializer=weights(64, 32, seed=1))))
        y = tf.matmul(h, V1.get_variable("h", initializer=weights(32, 7, seed=2)))
        return {"x": x}, {"y": y, "label": labels.lookup(table.lookup(x[:, 0]))}

    source = save_v1(tmp_path / "in", build, method="tensorflow/serving/classify")
    calibration, fresh = words()
    trip = there_and_back(source, {"x": calibration}, {"x": fresh}, gone=[file])
    assert trip.ops()[MATMUL] == 2
    assert trip.sqnr() > 25
    assert np.array_equal(trip.found["label"], trip.expected["label"])
    assert set(trip.found["label"]) >= {b"?", b"ape", b"fox"}
    assert [asset.read_text().split() for asset in (trip.out / "assets").iterdir()] == [WORDS]


def lookup_model(kind, file):
    keras.utils.set_random_seed(0)
    file.write_text("\n".join(WORDS) + "\n")
    if kind == "IntegerLookup":
        inputs, layer = keras.Input((4,), dtype="int64", name="x"), LAYERS.IntegerLookup(vocabulary=[3, 1, 4, 15, 9])
    elif kind == "TextVectorization":
        inputs = keras.Input((), dtype="string", name="x")
        layer = LAYERS.TextVectorization(vocabulary=str(file), output_sequence_length=4)
    else:
        vocabulary = str(file) if kind == "StringLookup of a file" else WORDS
        inputs, layer = keras.Input((4,), dtype="string", name="x"), LAYERS.StringLookup(vocabulary=vocabulary)
    x = LAYERS.Embedding(12, 16, embeddings_initializer="random_normal")(layer(inputs))
    return keras.Model(inputs, LAYERS.Dense(5)(LAYERS.Dense(32, activation="relu")(LAYERS.Flatten()(x))))


@pytest.mark.parametrize("kind", ["StringLookup", "StringLookup of a file", "TextVectorization", "IntegerLookup"])
def test_lookup_layers(kind, tmp_path):
    file = tmp_path / "words.txt"
    model = lookup_model(kind, file)
    if kind == "IntegerLookup":
        calibration, fresh = (np.random.default_rng(i).integers(0, 16, (40, 4)) for i in range(2))
    elif kind == "TextVectorization":
        calibration, fresh = (np.array([" ".join(row).upper() + "!" for row in rows], object) for rows in words())
    else:
        calibration, fresh = words()
    trip = there_and_back((model, tmp_path / "in"), {"x": calibration}, {"x": fresh}, gone=[file])
    assert trip.ops()[MATMUL] == 2
    assert trip.sqnr("output_0") > 24


def test_a_table_that_grows_when_it_is_called(tmp_path):
    """What the float model would remember, the INT8 model remembers; what calibration showed it is forgotten."""
    table = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)
    table.insert(tf.constant(["old"]), tf.constant([7], tf.int64))
    w = kernel(8, 4)

    def infer(x, word):
        before = table.lookup(word)
        with tf.control_dependencies([before]), tf.control_dependencies([table.insert(word, before + 1)]):
            return {"y": tf.matmul(x, w), "before": tf.identity(before), "size": table.size()}

    specs = spec("x", None, 8), spec("word", None, dtype=tf.string)
    source = save(tmp_path / "in", infer, *specs, keep=[table, w])
    word = np.array([f"w{i}" for i in range(20)], object)
    fresh = {"x": normal(2, 8, seed=1), "word": np.array(["new", "old"], object)}
    trip = there_and_back(source, {"x": normal(20, 8), "word": word}, fresh)
    assert trip.expected["before"].tolist() == trip.found["before"].tolist() == [-1, 7]
    assert trip.found["size"] == trip.expected["size"] == 2
    assert trip.serve(**fresh)["before"].tolist() == [0, 8]
    assert trip.ops()[MATMUL] == 1


# -- assets and labels --------------------------------------------------------------------------------------------------------
def test_assets_are_the_same_files(tmp_path):
    file = tmp_path / "words.txt"
    module = Vocabulary("vocabulary file", file)
    source = save(tmp_path / "in", module, spec("x", None, 4, dtype=tf.string), keep=[module])
    tfquant.quantize(source, {"x": words()[0]}, tfquant.QuantConfig(verify=False)).save(tmp_path / "out")
    before, after = (
        {asset.name: asset.read_bytes() for asset in (tmp_path / name / "assets").iterdir()} for name in ("in", "out")
    )
    assert before == after == {"words.txt": file.read_bytes()}


def test_initializers_run(tmp_path):
    """Tables of a loaded result are full, in a session too, though no one has called an initializer."""
    file = tmp_path / "words.txt"
    module = Vocabulary("vocabulary file", file)
    source = save(tmp_path / "in", module, spec("x", None, 4, dtype=tf.string), keep=[module])
    calibration, fresh = words()
    trip = there_and_back(source, {"x": calibration}, {"x": fresh}, gone=[file])
    script = """
import sys, json, numpy as np, tensorflow as tf
x = np.array([["ape", "bee", "cat", "dog"], ["eel", "fox", "ape", "bee"]])
found = tf.saved_model.load(sys.argv[1]).signatures["serving_default"](x=tf.constant(x))["label"].numpy().tolist()
with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    signature = tf.compat.v1.saved_model.load(session, ["serve"], sys.argv[1]).signature_def["serving_default"]
    found += session.run(signature.outputs["label"].name, {signature.inputs["x"].name: x}).tolist()
print(json.dumps([label.decode() for label in found]))
"""
    assert python(script, trip.out) == ["ape", "eel", "ape", "eel"]


def labels_of(path):
    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString((path / "saved_model.pb").read_bytes())
    (graph,) = proto.meta_graphs
    return list(graph.meta_info_def.tags), {key: s.method_name for key, s in graph.signature_def.items() if s.method_name}


def test_warm_up_requests_method_names_and_tags(tmp_path):
    def build():
        x = V1.placeholder(tf.float32, (None, 8, 8, 3), name="x")
        return {"x": x}, {"scores": net_v1(x, resource=False)}

    source = save_v1(tmp_path / "in", build, "tensorflow/serving/classify", ("serve", "gpu"))
    (source / "assets.extra").mkdir()
    (source / "assets.extra" / "tf_serving_warmup_requests").write_bytes(b"\x00warm\xff")
    calibration, fresh = images()
    expected = call(tf.saved_model.load(str(source), ["serve", "gpu"]), {"x": fresh})
    config = tfquant.QuantConfig(verify=False, tags=("gpu", "serve"))
    result = tfquant.quantize(source, {"x": calibration}, config)
    result.save(tmp_path / "out")
    shutil.rmtree(source)
    out = tmp_path / "out"
    assert (out / "assets.extra" / "tf_serving_warmup_requests").read_bytes() == b"\x00warm\xff"
    tags, methods = labels_of(out)
    assert sorted(tags) == ["gpu", "serve"]
    assert methods == {"serving_default": "tensorflow/serving/classify"}
    loaded = tf.saved_model.load(str(out), ["serve", "gpu"])
    assert sqnr(expected["scores"], call(loaded, {"x": fresh})["scores"]) > 35
    same(in_session(out, {"x": fresh}, tags=("serve", "gpu")), call(loaded, {"x": fresh}))
    other = tfquant.QuantConfig(verify=False, tags=("train",))
    with pytest.raises(tfquant.errors.ModelError, match=r"the tags train; its graphs have these\. Received: gpu,serve"):
        tfquant.quantize(out, {"x": calibration}, other)


def test_numbered_versions(tmp_path):
    """Of a folder of versions the highest is taken and its number kept; a version by itself is written as it is."""
    calibration, fresh = images()
    for version, factor in (("2", 1.0), ("10", 3.0)):
        net = Net()
        net.head.assign(net.head * factor)
        save(tmp_path / "in" / version, net.infer, IMAGE, keep=[net])
    expected = {v: call(tf.saved_model.load(str(tmp_path / "in" / v)), {"x": fresh})["y"] for v in ("2", "10")}
    (tmp_path / "in" / "notes").mkdir()
    (tmp_path / "in" / "11").mkdir()
    config = tfquant.QuantConfig(verify=False)
    tfquant.quantize(tmp_path / "in", {"x": calibration}, config).save(tmp_path / "out")
    tfquant.quantize(tmp_path / "in" / "2", {"x": calibration}, config).save(tmp_path / "flat")
    shutil.rmtree(tmp_path / "in")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["10"]
    assert (tmp_path / "out" / "10" / "quant_plan.json").is_file()
    assert (tmp_path / "flat" / "saved_model.pb").is_file()
    for folder, version in (("out/10", "10"), ("flat", "2")):
        found = call(tf.saved_model.load(str(tmp_path / folder)), {"x": fresh})["y"]
        assert sqnr(expected[version], found) > 35


# -- loops and branches -------------------------------------------------------------------------------------------------------
def loop(x, step, times=3):
    return tf.while_loop(lambda i, _: i < times, lambda i, a: (i + 1, step(a)), [tf.constant(0), x])[1]


@pytest.mark.parametrize("kind", ["while_loop", "cond", "map_fn", "switch_case"])
def test_loops_and_branches(kind, tmp_path):
    """A convolution before, one inside, and a dense layer behind."""
    net, inner, other = Net(), kernel(3, 3, 16, 16, seed=5), kernel(3, 3, 16, 16, seed=6)

    def conv(x, w=inner):
        return tf.nn.relu(tf.nn.conv2d(x, w, 1, "SAME"))

    def infer(x, choice):
        x = net.trunk(x)
        if kind == "while_loop":
            x = loop(x, conv, times=choice + 1)
        elif kind == "cond":
            x = tf.cond(choice > 0, lambda: conv(x), lambda: conv(x, other))
        elif kind == "map_fn":
            x = tf.map_fn(lambda one: conv(one[None])[0], x)
            x.set_shape([None, 4, 4, 16])
        else:
            x = tf.switch_case(choice, [lambda: conv(x), lambda: conv(x, other), lambda: x])
        return {"y": tf.reduce_mean(x, [1, 2]) @ net.head}

    source = save(tmp_path / "in", infer, IMAGE, spec("choice", dtype=tf.int32), keep=[net, inner, other])
    before = tf.saved_model.load(str(source))
    calibration, fresh = images()
    choices = range(3) if kind == "switch_case" else range(2)
    expected = [call(before, {"x": fresh, "choice": choice})["y"] for choice in choices]

    def batches():
        for i in range(8):
            yield {"x": calibration[i * 5 : i * 5 + 5], "choice": np.int32(i % len(choices))}

    trip = there_and_back(source, batches, {"x": fresh, "choice": np.int32(0)})
    assert (trip.ops()[CONV], trip.ops()[MATMUL]) == (2, 1)
    for choice in choices:
        assert sqnr(expected[choice], trip.serve(x=fresh, choice=choice)["y"]) > 29
    if kind != "map_fn":
        assert all(sqnr(expected[0], values) < 20 for values in expected[1:])
    body = {"while_loop": "While", "cond": "If", "map_fn": "While", "switch_case": "Case"}[kind]
    (reason,) = trip.reasons("Conv2D")
    count = 1 if body == "While" else 2
    assert reason.startswith(f"{count} of them stand in the body of a ")
    assert body in reason
    assert trip.result.report.has_bodies


@pytest.mark.parametrize(
    ("kind", "held_as"),
    [
        *((kind, "constants") for kind in ("loop", "cond", "cond in a loop", "loop in a cond")),
        *(("cond in a loop", held_as) for held_as in ("reference variables", "resource variables")),
    ],
)
def test_loops_and_branches_of_switch_and_merge(kind, held_as, tmp_path):
    def build():
        x = V1.placeholder(tf.float32, (None, 8, 8, 3), name="x")
        choice = V1.placeholder(tf.int32, (), name="choice")
        ws = (weights(3, 3, 3, 16), weights(3, 3, 16, 16, seed=1), weights(16, 16, seed=5), weights(16, 6, seed=2))
        if held_as != "constants":
            is_resource = held_as == "resource variables"
            ws = (V1.get_variable(f"w{i}", initializer=value, use_resource=is_resource) for i, value in enumerate(ws))
        stem, conv, inner, head = map(tf.convert_to_tensor, ws) if kind != "cond in a loop" else ws
        y = tf.nn.relu(tf.nn.conv2d(tf.nn.relu(tf.nn.conv2d(x, stem, 1, "SAME")), conv, 1, "SAME"))

        def step(a):
            """A convolution and a dense layer."""
            a = tf.nn.conv2d(a, conv, 1, "SAME")
            return tf.nn.relu(tf.reshape(tf.matmul(tf.reshape(a, [-1, 16]), inner), tf.shape(a)))

        if kind == "loop":
            y = loop(y, step, times=choice + 1)
        elif kind == "cond":
            y = tf.cond(choice > 0, lambda: step(y), lambda: y * 2 - 1)
        elif kind == "cond in a loop":
            y = loop(y, lambda a: tf.cond(choice > 0, lambda: step(a), lambda: a * 0.5 + 1))
        else:
            y = tf.cond(choice > 0, lambda: loop(y, step), lambda: tf.nn.relu(y - 0.5))
        y = tf.ensure_shape(y, [None, 8, 8, 16])
        y = tf.nn.relu(tf.nn.conv2d(y, conv, 2, "SAME"))
        return {"x": x, "choice": choice}, {"y": tf.matmul(tf.reduce_mean(y, [1, 2]), head)}

    source = save_v1(tmp_path / "in", build)
    assert {"Switch", "Merge"} <= {node.op for node in graph_of(source).node}
    before = tf.saved_model.load(str(source))
    calibration, fresh = images()
    expected = [call(before, {"x": fresh, "choice": choice})["y"] for choice in range(2)]

    def batches():
        for i in range(8):
            yield {"x": calibration[i * 5 : i * 5 + 5], "choice": np.int32(i % 2)}

    trip = there_and_back(source, batches, {"x": fresh, "choice": np.int32(0)})
    assert (trip.ops()[CONV], trip.ops()[MATMUL]) == (3, 1)
    assert (trip.ops()["Conv2D"], trip.ops()["MatMul"]) == (1, 1)
    for choice in range(2):
        assert sqnr(expected[choice], trip.serve(x=fresh, choice=choice)["y"]) > 27
    assert sqnr(*expected) < 20
    for op in ("Conv2D", "MatMul"):
        (reason,) = trip.reasons(op)
        assert "loop" in reason


def graph_of(path):
    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString((path / "saved_model.pb").read_bytes())
    return proto.meta_graphs[0].graph_def


@pytest.mark.parametrize("version", [1, 2])
def test_constants_of_branches_are_not_mixed_up(version, tmp_path):
    """A constant in a branch hangs on its Switch by a control edge alone; equal ones of both branches look alike."""

    def scale(p):
        once = tf.cond(p, lambda: tf.constant(1.0), lambda: tf.constant(2.0))
        same_values = tf.cond(p, lambda: tf.constant(3.0) + 1, lambda: tf.constant(3.0) - 1)
        flipped = tf.cond(tf.logical_not(p), lambda: tf.ones([6]), lambda: tf.zeros([6]))
        return once, same_values, flipped

    def compute(x, p, net):
        once, same_values, flipped = scale(p)
        y = net(x)
        return {"y": once * y, "z": y * same_values, "f": y + flipped, "once": once, "same": same_values, "flipped": flipped}

    if version == 1:

        def build():
            x, p = V1.placeholder(tf.float32, (None, 8, 8, 3), name="x"), V1.placeholder(tf.bool, (), name="p")
            return {"x": x, "p": p}, compute(x, p, net_v1)

        source = save_v1(tmp_path / "in", build)
    else:
        net = Net()
        source = save(tmp_path / "in", lambda x, p: compute(x, p, net), IMAGE, spec("p", dtype=tf.bool), keep=[net])
    before = tf.saved_model.load(str(source))
    calibration, fresh = images()
    expected = {p: call(before, {"x": fresh, "p": p}) for p in (False, True)}

    def batches():
        for i in range(8):
            yield {"x": calibration[i * 5 : i * 5 + 5], "p": np.bool_(i % 2)}

    trip = there_and_back(source, batches, {"x": fresh, "p": np.bool_(True)})
    assert (trip.ops()[CONV], trip.ops()[MATMUL]) == (2, 1)
    for p, wanted in expected.items():
        found = trip.serve(x=fresh, p=p)
        assert (found["once"], found["same"]) == ((1.0, 4.0) if p else (2.0, 2.0))
        assert np.array_equal(found["flipped"], np.full(6, not p, np.float32))
        assert np.allclose(found["z"] / found["y"], found["same"] / found["once"])
        assert all(sqnr(wanted[name], found[name]) > 35 for name in "yzf")


def test_a_learning_phase_is_decided(tmp_path):
    """A branch on a placeholder that nobody feeds is its default one, and what hung on it becomes INT8."""

    def build():
        x = V1.placeholder(tf.float32, (None, 8, 8, 3), name="x")
        phase = V1.placeholder_with_default(False, (), name="phase")
        w, v = tf.constant(weights(3, 3, 3, 16)), tf.constant(weights(3, 3, 16, 16, seed=1))
        h = tf.nn.relu(tf.nn.conv2d(x, w, 1, "SAME"))
        h = tf.cond(phase, lambda: tf.nn.dropout(h, 0.5) * 9, lambda: tf.identity(h))
        h = tf.nn.relu(tf.nn.conv2d(h, v, 1, "SAME"))
        return {"x": x}, {"y": tf.matmul(tf.reduce_mean(h, [1, 2]), tf.constant(weights(16, 6, seed=2)))}

    source = save_v1(tmp_path / "in", build)
    calibration, fresh = images()
    trip = there_and_back(source, {"x": calibration}, {"x": fresh})
    assert (trip.ops()[CONV], trip.ops()[MATMUL]) == (2, 1)
    assert not {"RandomUniform", "Conv2D", "MatMul"} & set(trip.ops())
    assert trip.sqnr() > 40


def test_two_models_with_functions_of_one_name(tmp_path):
    """The library of functions is one for all graphs of a process, and the results of before live on in it."""
    calibration, fresh = images(shape=(8, 8))
    w = kernel(64, 8)

    def scaled(factor):
        return lambda x: {"y": tf.reshape(tf.map_fn(lambda row: row * factor, x), [-1, 64]) @ w}

    trips = []
    for factor in (2.0, 3.0):
        (tmp_path / str(factor)).mkdir()
        source = save(tmp_path / str(factor) / "in", scaled(factor), spec("x", None, 8, 8), keep=[w])
        trips.append(there_and_back(source, {"x": calibration}, {"x": fresh}))
    for trip in trips:
        assert trip.sqnr() > 27
        assert np.array_equal(trip.result(x=fresh)["y"], trip.found["y"])


# -- recurrent layers ---------------------------------------------------------------------------------------------------------
def recurrent(kind):
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((10, 12), name="x")
    if kind == "masked":
        x = inputs = keras.Input((10,), dtype="int32", name="x")
        x = LAYERS.LSTM(16)(LAYERS.Embedding(20, 12, mask_zero=True, embeddings_initializer="random_normal")(x))
    elif kind == "LSTM":
        x = LAYERS.LSTM(16)(LAYERS.Dense(12, activation="relu")(x))
    elif kind == "GRU of unknown length":
        x = inputs = keras.Input((None, 12), name="x")
        x = LAYERS.GRU(16, return_sequences=True)(x)
    elif kind == "Bidirectional":
        x = LAYERS.Bidirectional(LAYERS.GRU(16, return_sequences=True))(x)
        x = LAYERS.Bidirectional(LAYERS.LSTM(8))(x)
    elif kind == "unrolled":
        x = LAYERS.LSTM(16, unroll=True)(x)
    return keras.Model(inputs, LAYERS.Dense(5)(LAYERS.Dense(16, activation="relu")(x)))


@pytest.mark.parametrize(
    ("kind", "floor", "matmuls"),
    # Steps of a loop are not INT8; a masked layer also takes a first step before its loop, to know the shape of its output.
    [("LSTM", 33, 3), ("GRU of unknown length", 30, 2), ("Bidirectional", 27, 2), ("masked", 23, 4), ("unrolled", 20, 22)],
)
def test_recurrent_layers(kind, floor, matmuls, tmp_path):
    calibration, fresh = images(shape=(10, 12))
    if kind == "masked":
        calibration, fresh = (np.random.default_rng(i).integers(0, 20, (40, 10)).astype(np.int32) for i in range(2))
        calibration[:, 6:] = fresh[:, 4:] = 0
    trip = there_and_back((recurrent(kind), tmp_path / "in"), {"x": calibration}, {"x": fresh}, placement="int8")
    assert trip.sqnr("output_0") > floor
    assert trip.ops()[MATMUL] == matmuls
    assert trip.result.report.has_bodies == (kind != "unrolled")
    if kind != "unrolled":
        assert trip.reasons("MatMul")
        assert all("stand in the body of a " in reason for reason in trip.reasons("MatMul"))


def test_a_stateful_recurrent_layer(tmp_path):
    """The state begins at zero whatever calibration left in it, and lives on from call to call."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input(batch_shape=(4, 10, 12), name="x")
    x = LAYERS.Dense(16, activation="relu")(LAYERS.LSTM(16, stateful=True)(LAYERS.Dense(12, activation="relu")(inputs)))
    model = keras.Model(inputs, LAYERS.Dense(5)(x))
    model.export(tmp_path / "in", verbose=False)
    before = tf.saved_model.load(str(tmp_path / "in"))
    fresh = normal(3, 4, 10, 12, seed=1)
    expected = [call(before, {"x": x})["output_0"] for x in fresh]
    trip = there_and_back(tmp_path / "in", {"x": normal(40, 10, 12)}, {"x": fresh[0]}, batch_size=4)
    found = [trip.found["output_0"], *(trip.serve(x=x)["output_0"] for x in fresh[1:])]
    assert all(sqnr(one, other) > 37 for one, other in zip(expected, found, strict=True))
    assert trip.ops()[MATMUL] == 3
    again = trip.serve(x=fresh[0])["output_0"]
    assert not np.array_equal(again, found[0])


def test_time_distributed(tmp_path):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 8, 8, 3), name="x")
    x = LAYERS.TimeDistributed(LAYERS.Conv2D(16, 3, activation="relu"))(inputs)
    x = LAYERS.TimeDistributed(LAYERS.GlobalAveragePooling2D())(x)
    x = LAYERS.TimeDistributed(LAYERS.Dense(12, activation="relu"))(x)
    model = keras.Model(inputs, LAYERS.Dense(4)(LAYERS.Flatten()(x)))
    calibration, fresh = images(shape=(5, 8, 8, 3))
    trip = there_and_back((model, tmp_path / "in"), {"x": calibration}, {"x": fresh})
    assert trip.ops()[MATMUL] + trip.ops()[CONV] == 5 + 6  # Keras unrolls the steps
    assert trip.sqnr("output_0") > 33


# -- functions ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["implements", "noinline", "jit_compile", "custom_gradient", "gradient"])
def test_functions(kind, tmp_path):
    net = Net()
    options = {
        "implements": {"experimental_implements": "addons:Block"},
        "noinline": {"experimental_attributes": {"_noinline": True}},
        "jit_compile": {"jit_compile": True},
    }.get(kind, {})

    def middle(x, w):
        return tf.nn.relu(tf.nn.conv2d(x, w, 2, "SAME"))

    if kind == "custom_gradient":

        @tf.custom_gradient
        def block(x):
            return tf.nn.relu(x) * 1.5, lambda upstream: upstream

        def middle_of(x, w):
            return block(tf.nn.conv2d(x, w, 2, "SAME"))
    else:
        middle_of = tf.function(middle, autograph=False, **options) if options else middle

    def infer(x):
        h = middle_of(tf.nn.relu(tf.nn.conv2d(x, net.stem, 1, "SAME")), net.conv.read_value())
        y = tf.reduce_mean(h, [1, 2]) @ net.head
        # As explanations of a decision are served.
        return {"y": y, "slope": tf.gradients(y, x)[0]} if kind == "gradient" else {"y": y}

    source = save(tmp_path / "in", infer, IMAGE, keep=[net])
    calibration, fresh = images()
    trip = there_and_back(source, {"x": calibration}, {"x": fresh})
    assert trip.sqnr() > 34
    assert trip.ops()[CONV] == 2
    assert not {"PartitionedCall", "StatefulPartitionedCall", "Conv2D", "MatMul"} & set(trip.ops())
    if kind == "gradient":
        assert trip.sqnr("slope") > 3


# -- strings ------------------------------------------------------------------------------------------------------------------
def encoded(form, seed):
    encode = {"jpeg": tf.io.encode_jpeg, "png": tf.io.encode_png}[form]
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 6, 6, 3))
    pictures = np.kron(pixels, np.ones((1, 4, 4, 1), int)).astype(np.uint8)
    return np.array([encode(picture).numpy() for picture in pictures], object)


@pytest.mark.parametrize("form", ["jpeg", "png"])
def test_images_as_strings(form, tmp_path):
    net = Net()
    decode = {"jpeg": tf.io.decode_jpeg, "png": tf.io.decode_png}[form]

    def read(content):
        image = tf.image.convert_image_dtype(decode(content, channels=3), tf.float32)
        return tf.image.resize(tf.image.central_crop(image, 0.8), [8, 8]) * 2 - 1

    def infer(content):
        return {"y": net(tf.map_fn(read, content, fn_output_signature=tf.float32))}

    source = save(tmp_path / "in", infer, spec("content", None, dtype=tf.string), keep=[net])
    trip = there_and_back(source, {"content": encoded(form, 0)}, {"content": encoded(form, 100)})
    assert (trip.ops()[CONV], trip.ops()[MATMUL]) == (2, 1)
    assert trip.sqnr() > 38


def examples(seed, count=30):
    found = []
    for row, word in zip(normal(count, 12, seed=seed), words(seed)[0][:count, 0], strict=True):
        feature = {
            "numbers": tf.train.Feature(float_list=tf.train.FloatList(value=row)),
            "word": tf.train.Feature(bytes_list=tf.train.BytesList(value=[word.encode()])),
            "tags": tf.train.Feature(int64_list=tf.train.Int64List(value=range(int(abs(row[0]) * 2)))),
        }
        found.append(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
    return np.array(found, object)


def classify(x, embedding, dense, head, tags):
    """As a canned Estimator: serialized examples in, scores and classes out."""
    features = {
        "numbers": tf.io.FixedLenFeature([12], tf.float32),
        "word": tf.io.FixedLenFeature([], tf.string, default_value="?"),
        "tags": tf.io.VarLenFeature(tf.int64),
    }
    parsed = tf.io.parse_example(x, features)
    row = tf.strings.to_hash_bucket_fast(parsed["word"], 20)
    counts = tf.reduce_sum(tf.sparse.to_dense(tf.sparse.map_values(tf.ones_like, parsed["tags"], tf.float32)), 1)
    bag = tf.nn.embedding_lookup_sparse(tags, parsed["tags"], None, combiner="sum")
    bag = tf.concat([bag, tf.zeros([tf.shape(row)[0] - tf.shape(bag)[0], 8])], 0)
    h = tf.concat([parsed["numbers"], tf.gather(embedding, row), bag, counts[:, None]], 1)
    y = tf.matmul(tf.nn.relu(tf.matmul(h, dense)), head)
    names = tf.tile(tf.constant(["yes", "no", "maybe"])[None], [tf.shape(y)[0], 1])
    return {"scores": y, "classes": names}


@pytest.mark.parametrize("version", [1, 2])
def test_serialized_examples(version, tmp_path):
    values = weights(20, 16), weights(37, 32, seed=1), weights(32, 3, seed=2), weights(10, 8, seed=3)
    if version == 1:

        def build():
            x = V1.placeholder(tf.string, (None,), name="inputs")
            ws = [V1.get_variable(f"w{i}", initializer=value, use_resource=False) for i, value in enumerate(values)]
            return {"inputs": x}, classify(x, *ws)

        source = save_v1(tmp_path / "in", build, "tensorflow/serving/classify")
    else:
        ws = [tf.Variable(value) for value in values]
        source = save(tmp_path / "in", lambda x: classify(x, *ws), spec("inputs", None, dtype=tf.string), keep=ws)
    trip = there_and_back(source, {"inputs": examples(0)}, {"inputs": examples(100)})
    assert trip.ops()[MATMUL] == 2
    assert trip.sqnr("scores") > 22
    assert np.array_equal(trip.found["classes"], trip.expected["classes"])
    if version == 1:
        assert labels_of(trip.out)[1] == {"serving_default": "tensorflow/serving/classify"}


# -- half precision -----------------------------------------------------------------------------------------------------------
def half_net(policy, out="float32", dtype="float32"):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3), dtype=dtype, name="x")
    x = LAYERS.Conv2D(16, 3, padding="same", use_bias=False, dtype=policy)(inputs)
    x = skip = LAYERS.ReLU(dtype=policy)(LAYERS.BatchNormalization(dtype=policy)(x))
    x = LAYERS.DepthwiseConv2D(3, padding="same", use_bias=False, dtype=policy)(x)
    x = LAYERS.ReLU(6.0, dtype=policy)(LAYERS.BatchNormalization(dtype=policy)(x))
    x = LAYERS.Add(dtype=policy)([LAYERS.Conv2D(16, 1, dtype=policy)(x), skip])
    x = LAYERS.GlobalAveragePooling2D(dtype=policy)(LAYERS.MaxPooling2D(dtype=policy)(x))
    model = keras.Model(inputs, LAYERS.Dense(5, dtype=out)(x))
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, LAYERS.BatchNormalization):  # as if it had been trained
            gamma, beta, mean, variance = layer.get_weights()
            drawn = rng.uniform(0.5, 1.5, gamma.shape), rng.normal(0, 0.2, beta.shape), rng.normal(0, 0.3, mean.shape)
            layer.set_weights([*drawn, rng.uniform(0.3, 1.0, variance.shape)])
    return model


@pytest.mark.parametrize("kind", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
def test_half_precision(kind, tmp_path):
    """Mixed: only the inner layers are half. Otherwise the inputs and outputs are so too, and stay so."""
    is_mixed = kind.startswith("mixed")
    model = half_net(kind) if is_mixed else half_net(kind, out=kind, dtype=kind)
    dtype = tf.float32 if is_mixed else tf.as_dtype(kind)
    calibration, fresh = (values.astype(dtype.as_numpy_dtype) for values in images())
    trip = there_and_back((model, tmp_path / "in"), {"x": calibration}, {"x": fresh}, session=is_mixed or kind == "float16")
    assert (trip.ops()[CONV], trip.ops()[DEPTHWISE], trip.ops()[MATMUL]) == (2, 1, 1)
    assert not {"Conv2D", "DepthwiseConv2dNative", "MatMul", "FusedBatchNormV3"} & set(trip.ops())
    signature = trip.loaded.signatures["serving_default"]
    assert {s.dtype for s in signature.structured_input_signature[1].values()} == {dtype}
    assert {s.dtype for s in signature.structured_outputs.values()} == {dtype}
    assert trip.sqnr("output_0") > 33


# -- layouts, groups, shared weights ------------------------------------------------------------------------------------------
def transposes(trip):
    return trip.ops()["Transpose"]


def test_channels_first_layers(tmp_path):
    keras.utils.set_random_seed(0)
    first = {"data_format": "channels_first"}
    inputs = keras.Input((3, 12, 12), name="x")
    x = skip = LAYERS.ReLU()(LAYERS.BatchNormalization(axis=1)(LAYERS.Conv2D(16, 3, padding="same", **first)(inputs)))
    x = LAYERS.ReLU()(LAYERS.Conv2D(16, 3, padding="same", **first)(x))
    x = LAYERS.Add()([LAYERS.Conv2D(16, 1, **first)(x), skip])
    x = LAYERS.MaxPooling2D(2, **first)(x)
    x = LAYERS.Concatenate(axis=1)([LAYERS.DepthwiseConv2D(3, padding="same", **first)(x), x])
    x = LAYERS.AveragePooling2D(2, **first)(LAYERS.Conv2D(16, 1, activation="relu", **first)(x))
    model = keras.Model(inputs, LAYERS.Dense(5)(LAYERS.GlobalAveragePooling2D(**first)(x)))
    calibration, fresh = images(shape=(3, 12, 12))
    trip = there_and_back((model, tmp_path / "in"), {"x": calibration}, {"x": fresh})
    ops = trip.ops()
    assert (ops[CONV], ops[DEPTHWISE], ops[MATMUL]) == (3, 1, 2)  # the last 1x1 convolution too
    assert transposes(trip) == 1  # of the input
    assert trip.sqnr("output_0") > 38


@pytest.mark.parametrize("shown", [False, True])
def test_convolutions_in_nchw(shown, tmp_path):
    """One Transpose for the input, and one for an output that is an image."""
    w, v, b, head = kernel(3, 3, 3, 16), kernel(3, 3, 16, 16, seed=1), kernel(16, seed=2), kernel(16, 6, seed=3)

    def infer(x):
        x = tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, w, 1, "SAME", data_format="NCHW"), b, data_format="NCHW"))
        x = tf.nn.max_pool2d(x, 2, 2, "VALID", data_format="NCHW")
        x = tf.nn.relu(tf.nn.conv2d(x, v, 1, [[0, 0], [0, 0], [1, 1], [1, 1]], data_format="NCHW"))
        y = tf.reduce_mean(x, [2, 3]) @ head
        return {"y": y, "image": x} if shown else {"y": y}

    source = save(tmp_path / "in", infer, spec("x", None, 3, 8, 8), keep=[w, v, b, head])
    calibration, fresh = images(shape=(3, 8, 8))
    trip = there_and_back(source, {"x": calibration}, {"x": fresh})
    assert (trip.ops()[CONV], trip.ops()[MATMUL]) == (2, 1)
    assert transposes(trip) == 1 + shown
    assert trip.sqnr() > 38
    if shown:
        assert trip.sqnr("image") > 38


@pytest.mark.parametrize("groups", [2, 4, 16])
def test_grouped_convolutions(groups, tmp_path):
    net, grouped = Net(), kernel(3, 3, 16 // groups, 16, seed=7)

    def infer(x):
        x = tf.nn.relu(tf.nn.conv2d(net.trunk(x), grouped, 1, "SAME"))
        return {"y": tf.reduce_mean(x, [1, 2]) @ net.head}

    source = save(tmp_path / "in", infer, IMAGE, keep=[net, grouped])
    calibration, fresh = images()
    trip = there_and_back(source, {"x": calibration}, {"x": fresh})
    assert trip.sqnr() > 32
    assert (trip.ops()[CONV], trip.ops()[DEPTHWISE], trip.ops()["Conv2D"]) == ((2, 1, 0) if groups == 16 else (3, 0, 0))
    assert not trip.reasons("Conv2D")


def test_two_layers_that_read_one_variable(tmp_path):
    w, head = kernel(3, 3, 3, 16), kernel(16, 6, seed=1)

    def infer(x):
        one = tf.nn.relu(tf.nn.conv2d(x, w, 1, "SAME"))
        other = tf.nn.relu(tf.nn.conv2d(tf.abs(x) * 9, w, 2, "SAME"))
        return {"y": tf.reduce_mean(one, [1, 2]) @ head, "z": tf.reduce_mean(other, [1, 2]) @ head}

    source = save(tmp_path / "in", infer, IMAGE, keep=[w, head])
    calibration, fresh = images()
    trip = there_and_back(source, {"x": calibration}, {"x": fresh})
    assert (trip.ops()[CONV], trip.ops()[MATMUL]) == (2, 2)
    assert trip.sqnr("y") > 38
    assert trip.sqnr("z") > 38


def test_an_embedding_tied_to_the_output_projection(tmp_path):
    table, dense = kernel(50, 16), kernel(16, 16, seed=1)

    def infer(ids):
        h = tf.nn.relu(tf.reduce_mean(tf.gather(table, ids), 1) @ dense)
        return {"logits": tf.matmul(h, table, transpose_b=True), "rows": tf.gather(table, ids)}

    source = save(tmp_path / "in", infer, spec("ids", None, 5, dtype=tf.int32), keep=[table, dense])
    ids = [np.random.default_rng(i).integers(0, 50, (60, 5)).astype(np.int32) for i in range(2)]
    trip = there_and_back(source, {"ids": ids[0]}, {"ids": ids[1]})
    assert trip.ops()[MATMUL] == 2
    assert trip.sqnr("logits") > 35
    assert np.array_equal(trip.found["rows"], trip.expected["rows"])  # the embedding itself is not rounded


@pytest.mark.parametrize("kind", ["siamese", "again on its own result"])
def test_a_layer_that_runs_twice(kind, tmp_path):
    keras.utils.set_random_seed(0)
    layer = LAYERS.Conv2D(8, 3, padding="same", activation="relu")
    one, other = keras.Input((8, 8, 8), name="one"), keras.Input((8, 8, 8), name="other")
    if kind == "siamese":
        pooled = [LAYERS.GlobalAveragePooling2D()(layer(x)) for x in (one, other)]
        result = LAYERS.Concatenate()([*pooled, LAYERS.Subtract()(pooled)])
    else:
        result = LAYERS.GlobalAveragePooling2D()(LAYERS.Add()([layer(layer(layer(one))), other]))
    model = keras.Model([one, other], LAYERS.Dense(4)(result))
    calibration, fresh = (dict(zip(("one", "other"), pair, strict=True)) for pair in _pairs())
    trip = there_and_back((model, tmp_path / "in"), calibration, fresh)
    assert (trip.ops()[CONV], trip.ops()[MATMUL]) == (2 if kind == "siamese" else 3, 1)
    assert trip.sqnr("output_0") > 38


def _pairs():
    one, other = images(shape=(8, 8, 8)), images(5, shape=(8, 8, 8))
    return zip(one, (values * 3 for values in other), strict=True)


# -- state and effects --------------------------------------------------------------------------------------------------------
def test_variables_that_the_model_writes(tmp_path):
    """They begin where the source's began, not where calibration left them, and live on; also in branches and loops."""
    net, calls, mean, many = Net(), tf.Variable(5), tf.Variable(tf.zeros([3])), tf.Variable(0.0)

    def infer(x):
        count = calls.assign_add(1)
        average = mean.assign(0.5 * mean + 0.5 * tf.reduce_mean(x, [0, 1, 2]))
        tf.cond(count > 6, lambda: many.assign_add(100.0), lambda: many.assign_add(1.0))
        return {"y": net(x - average), "count": count, "mean": average, "many": many.read_value()}

    source = save(tmp_path / "in", infer, IMAGE, keep=[net, calls, mean, many])
    before = tf.saved_model.load(str(source))
    calibration, fresh = images()
    steps = np.split(fresh, 3)
    expected = [call(before, {"x": x}) for x in steps]
    trip = there_and_back(source, {"x": calibration + 3}, {"x": steps[0]})
    found = [trip.found, *(trip.serve(x=x) for x in steps[1:])]
    assert [int(step["count"]) for step in found] == [6, 7, 8]
    assert [float(step["many"]) for step in found] == [float(step["many"]) for step in expected] == [1, 101, 201]
    for one, other in zip(expected, found, strict=True):
        assert np.allclose(one["mean"], other["mean"], atol=1e-6)
        assert sqnr(one["y"], other["y"]) > 36
    assert (trip.ops()[CONV], trip.ops()[MATMUL]) == (2, 1)
    # A result that has run and is saved once more begins anew, too.
    trip.result(fresh)
    trip.result.save(tmp_path / "again")
    assert int(call(tf.saved_model.load(str(tmp_path / "again")), {"x": fresh})["count"]) == 6


def test_a_variable_of_tensorflow_1_that_the_model_writes(tmp_path):
    """A resource variable that the graph of a session writes counts on."""

    def build():
        x = V1.placeholder(tf.float32, (None, 8, 8, 3), name="x")
        calls = V1.get_variable("calls", initializer=5, use_resource=True)
        count = tf.identity(V1.assign_add(calls, 1))
        return {"x": x}, {"y": net_v1(x), "count": count}

    source = save_v1(tmp_path / "in", build)
    calibration, fresh = images()
    trip = there_and_back(source, {"x": calibration}, {"x": fresh})
    assert trip.sqnr() > 35
    assert [int(trip.found["count"]), int(trip.serve(x=fresh)["count"])] == [6, 7]


def test_prints_and_assertions(tmp_path, capfd):
    """Both still run, the assertion still refuses, and INT8 is on both sides of them."""
    net = Net()

    def infer(x):
        with tf.control_dependencies([tf.debugging.assert_less(tf.reduce_max(x), 100.0, message="too bright")]):
            x = net.trunk(tf.identity(x))
        tf.print("rows:", tf.shape(x)[0])
        return {"y": tf.reduce_mean(x, [1, 2]) @ net.head}

    source = save(tmp_path / "in", infer, IMAGE, keep=[net])
    calibration, fresh = images()
    trip = there_and_back(source, {"x": calibration}, {"x": fresh})
    assert (trip.ops()[CONV], trip.ops()[MATMUL]) == (2, 1)
    assert trip.sqnr() > 35
    capfd.readouterr()
    trip.serve(x=fresh[:7])
    assert "rows: 7" in capfd.readouterr().err
    with pytest.raises(tf.errors.InvalidArgumentError, match="too bright"):
        trip.serve(x=fresh * 1000)


@pytest.mark.parametrize("kind", ["stateless seed", "dropout", "noise", "generator"])
def test_random_numbers(kind, tmp_path):
    calibration, fresh = images()
    keras.utils.set_random_seed(0)
    if kind in ("stateless seed", "generator"):
        net = Net()
        generator = tf.random.Generator.from_seed(3) if kind == "generator" else None

        def infer(x):
            if generator is None:
                noise = tf.random.stateless_uniform([8, 8, 3], (1, 2), -0.1, 0.1)
            else:
                noise = generator.uniform([8, 8, 3], -0.1, 0.1)
            return {"y": net(x + noise), "noise": noise}

        source = save(tmp_path / "in", infer, IMAGE, keep=[net, *filter(None, [generator])])
    else:
        inputs = keras.Input((8, 8, 3), name="x")
        x = LAYERS.Conv2D(16, 3, activation="relu")(LAYERS.GaussianNoise(0.5)(inputs))
        x = LAYERS.GlobalAveragePooling2D()(LAYERS.SpatialDropout2D(0.5)(x))
        y = LAYERS.Dense(6)(LAYERS.Dropout(0.5)(x))
        outputs = {"y": y}
        if kind == "noise":  # random when the model is served
            outputs["noise"] = Noise()(inputs)
        source = (keras.Model(inputs, outputs), tmp_path / "in")
    trip = there_and_back(source, {"x": calibration}, {"x": fresh}, session=False)
    assert trip.ops()[CONV] >= 1
    assert trip.ops()[MATMUL] == 1
    assert trip.sqnr() > 35
    again = trip.serve(x=fresh)
    if kind != "dropout":
        assert np.array_equal(trip.found["noise"], trip.expected["noise"])
        assert np.array_equal(again["noise"], trip.found["noise"]) == (kind == "stateless seed")
    else:
        assert np.array_equal(again["y"], trip.found["y"])


class Noise(LAYERS.Layer):
    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(7)

    def call(self, x):
        return keras.random.uniform((8, 8), seed=self.seeds)


# -- other kinds of tensors ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["ragged", "sparse", "array"])
def test_other_tensors_inside(kind, tmp_path):
    table, dense, head = kernel(30, 16), kernel(16, 32, seed=1), kernel(32, 5, seed=2)

    def ragged(x):
        """Letters of words, as many as there are."""
        rows = tf.strings.to_hash_bucket_fast(tf.strings.bytes_split(x), 30)
        assert isinstance(rows, tf.RaggedTensor)
        return tf.reduce_mean(tf.ragged.map_flat_values(tf.nn.embedding_lookup, table, rows), 1)

    def sparse(x):
        many = tf.strings.length(x)
        kept = tf.sparse.from_dense(tf.sequence_mask(many, 30, tf.float32) * (tf.cast(many[:, None], tf.float32) + 1.0))
        assert isinstance(kept, tf.SparseTensor)
        return tf.sparse.sparse_dense_matmul(kept, table) * 0.1

    def array(x):
        rows = tf.gather(table, tf.strings.to_hash_bucket_fast(x, 30))
        found = tf.TensorArray(tf.float32, 3, element_shape=[None, 16])
        for i in range(3):
            found = found.write(i, rows * (1.0 + i))
        return tf.reduce_sum(loop_array(found), 0)

    def loop_array(found):
        doubled = tf.TensorArray(tf.float32, 3, element_shape=[None, 16])
        step = lambda i, a: (i + 1, a.write(i, found.read(i) * 2.0))  # noqa: E731
        return tf.while_loop(lambda i, _: i < 3, step, [tf.constant(0), doubled])[1].stack()

    look_up = {"ragged": ragged, "sparse": sparse, "array": array}[kind]

    def infer(x):
        return {"y": tf.nn.relu(look_up(x) @ dense) @ head}

    source = save(tmp_path / "in", infer, spec("x", None, dtype=tf.string), keep=[table, dense, head])
    rng = np.random.default_rng(0)
    texts = np.array(["".join(rng.choice(list("abcdefghij"), rng.integers(1, 9))) for _ in range(80)], object)
    trip = there_and_back(source, {"x": texts[:50]}, {"x": texts[50:]})
    assert trip.ops()[MATMUL] == 2
    assert trip.sqnr() > 34


# -- large models -------------------------------------------------------------------------------------------------------------
def test_large_constants_become_variables(tmp_path, monkeypatch):
    """What a GraphDef cannot hold, here with a small limit: float constants, INT8 weights and biases."""
    net, table = Net(), kernel(40, 192, seed=3)

    def infer(x, ids):
        return {"y": net(x + tf.reshape(tf.gather(table, ids), [-1, 8, 8, 3]))}

    source = save(tmp_path / "in", infer, IMAGE, spec("ids", None, dtype=tf.int32), keep=[net, table])
    calibration, fresh = (
        {"x": x, "ids": np.random.default_rng(i).integers(0, 40, len(x)).astype(np.int32)} for i, x in enumerate(images())
    )
    config = tfquant.QuantConfig(verify=False)
    plain = tfquant.quantize(source, calibration, config)
    expected = call(tf.saved_model.load(str(source)), fresh)["y"]
    plain.save(tmp_path / "plain")
    monkeypatch.setattr("tfquant.graph.execution.MAX_CONSTANT_BYTES", 0)
    split = tfquant.quantize(source, calibration, config)
    split.save(tmp_path / "split")
    monkeypatch.undo()
    shutil.rmtree(source)
    assert plain.graph_def == split.graph_def
    np.savez(tmp_path / "fresh.npz", **fresh)
    script = """
import sys, json, numpy as np, tensorflow as tf
signature = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
found = signature(**{name: tf.constant(value) for name, value in np.load(sys.argv[2]).items()})["y"]
np.save(sys.argv[3], found.numpy())
kinds = {}
for name, shape in tf.train.list_variables(sys.argv[1] + "/variables/variables"):
    if name.endswith(".ATTRIBUTES/VARIABLE_VALUE"):
        value = tf.train.load_variable(sys.argv[1] + "/variables/variables", name)
        kinds.setdefault(str(value.dtype), []).append(list(value.shape))
print(json.dumps(kinds))
"""
    kinds = {
        name: python(script, tmp_path / name, tmp_path / "fresh.npz", tmp_path / f"{name}.npy") for name in ("plain", "split")
    }
    found = {name: np.load(tmp_path / f"{name}.npy") for name in kinds}
    assert np.array_equal(found["plain"], found["split"])
    assert sqnr(expected, found["split"]) > 33
    assert kinds["plain"] == {}
    assert [40, 192] in kinds["split"]["int8"]  # the table
    assert [3, 3, 16, 16] in kinds["split"]["int8"]
    assert [16, 6] in kinds["split"]["int8"]
    assert [16] in kinds["split"]["int32"] + kinds["split"]["float32"]
    same(in_session(tmp_path / "split", fresh), {"y": found["split"]})


def lack_of_room(folder):
    """Why a model of more than 2 GiB cannot be tested here, or None."""
    memory = next(int(line.split()[1]) for line in pathlib.Path("/proc/meminfo").read_text().splitlines() if "Available" in line)
    free = shutil.disk_usage(folder).free
    if memory < 16 * 2**20:
        return f"needs 16 GiB of memory, {memory / 2**20:.1f} GiB are available"
    return f"needs 7 GB of disk, {free / 1e9:.1f} GB are free" if free < 7e9 else None


@pytest.mark.slow
def test_a_model_past_2_gib(tmp_path):
    reason = lack_of_room(tmp_path)
    if reason:
        pytest.skip(reason)
    make = """
import sys, numpy as np, tensorflow as tf
module = tf.Module()
rng = np.random.default_rng(0)
module.table = tf.Variable(tf.random.stateless_normal((8_700_000, 64), (1, 2)))
module.dense = tf.Variable(rng.normal(size=(64, 128)).astype(np.float32) / 8)
module.head = tf.Variable(rng.normal(size=(128, 4)).astype(np.float32) / 11)
@tf.function(input_signature=[tf.TensorSpec((None, 8), tf.int32, "ids")], autograph=False)
def infer(ids):
    return {"y": tf.nn.relu(tf.reduce_mean(tf.gather(module.table, ids), 1) @ module.dense) @ module.head}
module.infer = infer
tf.saved_model.save(module, sys.argv[1], signatures=infer)
found = infer(tf.constant(np.load(sys.argv[2])["fresh"]))["y"]
np.save(sys.argv[3], found.numpy())
print(0)
"""
    quantize = """
import sys, json, numpy as np, tfquant
config = tfquant.QuantConfig(verify=False, ignored_scope=("type:GatherV2",))  # in 8 bits it would be small
result = tfquant.quantize(sys.argv[1], np.load(sys.argv[2])["calibration"], config)
result.save(sys.argv[3])
print(json.dumps([node.op for node in result._lowered.order()]))
"""
    load = """
import sys, numpy as np, tensorflow as tf
signature = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
np.save(sys.argv[3], signature(ids=tf.constant(np.load(sys.argv[2])["fresh"]))["y"].numpy())
print(0)
"""
    rng = np.random.default_rng(0)
    ids = {name: rng.integers(0, 8_700_000, (40, 8)).astype(np.int32) for name in ("calibration", "fresh")}
    np.savez(tmp_path / "ids.npz", **ids)
    python(make, tmp_path / "in", tmp_path / "ids.npz", tmp_path / "float.npy")
    ops = python(quantize, tmp_path / "in", tmp_path / "ids.npz", tmp_path / "out")
    shutil.rmtree(tmp_path / "in")
    python(load, tmp_path / "out", tmp_path / "ids.npz", tmp_path / "int8.npy")
    assert ops.count(MATMUL) == 2
    assert sqnr(np.load(tmp_path / "float.npy"), np.load(tmp_path / "int8.npy")) > 30
    data = sum(file.stat().st_size for file in (tmp_path / "out" / "variables").iterdir())
    assert data > 2**31
    assert (tmp_path / "out" / "saved_model.pb").stat().st_size < 1e6
    shutil.rmtree(tmp_path / "out")


# -- the same in any process --------------------------------------------------------------------------------------------------
def test_any_process_gives_the_same_bytes(tmp_path):
    """Tables, loops, a branch and two signatures, whatever the order of sets and however many functions were traced before."""
    file = tmp_path / "words.txt"
    module = Vocabulary("vocabulary file", file)
    module.inner = kernel(7, 7, seed=9)
    specs = [spec("x", None, 4, dtype=tf.string), spec("choice", dtype=tf.int32)]

    def one(x, choice):
        found = module(x)
        y = loop(found["y"], lambda a: tf.nn.relu(a @ module.inner))
        return {**found, "y": tf.cond(choice > 0, lambda: y @ module.inner, lambda: y)}

    def other(x, choice):
        return {"z": loop(module(x)["y"], lambda a: a * 0.5, times=choice) @ module.inner}

    module.one, module.other = (tf.function(f, input_signature=specs, autograph=False) for f in (one, other))
    tf.saved_model.save(module, str(tmp_path / "in"), signatures={"one": module.one, "other": module.other})
    np.save(tmp_path / "x.npy", words()[0].astype(str))
    script = """
import sys, json, hashlib, pathlib, numpy as np, tensorflow as tf, tfquant
for i in range(int(sys.argv[4])):
    tf.function(lambda x: tf.while_loop(lambda y: y < 9, lambda y: y + 1, [x])[0])(i)
x = np.load(sys.argv[2]).astype(object)
data = lambda: ({"x": x[i * 10:i * 10 + 10], "choice": np.int32(i % 2)} for i in range(4))
result = tfquant.quantize(sys.argv[1], data, tfquant.QuantConfig(verify=False, signature_keys=("one", "other")))
result.save(sys.argv[3])
found = {name: (pathlib.Path(sys.argv[3]) / name).read_bytes() for name in ("quant_plan.json", "quant_plan.npz")}
found["graph_def"] = result.graph_def.SerializeToString(deterministic=True)
print(json.dumps({name: hashlib.sha256(content).hexdigest() for name, content in found.items()}))
"""
    found = [
        python(script, tmp_path / "in", tmp_path / "x.npy", tmp_path / f"out{i}", i, PYTHONHASHSEED=str(i * 17)) for i in range(3)
    ]
    assert found[0] == found[1] == found[2]
