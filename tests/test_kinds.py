"""Every kind of model, from its file to INT8 and back: loaded again, it is close to float32 on data never seen."""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from absl.testing import flagsaver
from google.protobuf import text_format
from tensorflow.core.protobuf import saved_model_pb2

import tfquant
from scripts import cases
from tfquant import calibrate, data
from tfquant.errors import ModelError

V1 = tf.compat.v1
CONV, DEPTHWISE, MATMUL = "_FusedQuantizedConv2D", "_FusedQuantizedDepthwiseConv2D", "_QuantizedMatMul"
LARGEST_DB = 70  # what is closer was not computed in 8 bits


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


IMAGE = (None, 12, 12, 3)
IMAGES, FRESH = normal(40, 12, 12, 3, seed=1), normal(40, 12, 12, 3, seed=2)


@pytest.fixture(autouse=True)
def seed():
    for package in (keras, tf_keras):  # each has a generator of its own
        package.utils.set_random_seed(5)


# Helpers: models


def network(layers, image, channels=8):
    """Conv2D, BatchNormalization, ReLU, Conv2D, mean and Dense(4), of either Keras."""
    x = layers.Conv2D(channels, 3, padding="same")(image)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Conv2D(channels, 3, padding="same", activation="relu")(x)
    return layers.Dense(4)(layers.GlobalAveragePooling2D()(x))


def functional(package=keras, shape=(12, 12, 3)):
    image = package.layers.Input(shape)
    return package.Model(image, network(package.layers, image))


def sequential(package=keras):
    layers = package.layers
    parts = [layers.Input((12, 12, 3)), layers.Conv2D(8, 3, activation="relu"), layers.Conv2D(8, 3, activation="relu")]
    return package.Sequential([*parts, layers.GlobalAveragePooling2D(), layers.Dense(4)])


def subclassed(package=keras):
    class Net(package.Model):
        def __init__(self):
            super().__init__()
            self.one = package.layers.Conv2D(8, 3, activation="relu")
            self.two = package.layers.Conv2D(8, 3, activation="relu")
            self.head = package.layers.Dense(4)

        def call(self, x):
            return self.head(tf.reduce_mean(self.two(self.one(x)), (1, 2)))

    return Net()


def with_depthwise(package):
    layers = package.layers
    parts = [layers.Input((12, 12, 3)), layers.Conv2D(8, 3, activation="relu"), layers.DepthwiseConv2D(3, activation="relu")]
    return package.Sequential([*parts, layers.GlobalAveragePooling2D(), layers.Dense(4)])


def conv(x, filters, variable=tf.constant, seed=0):
    w = normal(3, 3, x.shape[-1], filters, seed=seed) / 5
    return tf.nn.relu(tf.nn.conv2d(x, variable(w), 1, "SAME"))


def mean(x):
    return tf.reduce_mean(x, (1, 2))


class Module(tf.Module):
    """Functions by name, over variables that they share."""

    def __init__(self, **variables):
        super().__init__()
        self.variables_by_name = {name: tf.Variable(value) for name, value in variables.items()}

    def __getitem__(self, name):
        return self.variables_by_name[name]


def function(call, **inputs):
    """A function of tensors with these names; each is (shape, dtype) or a shape of float32."""
    specs = []
    for name, spec in inputs.items():
        shape, dtype = spec if spec and isinstance(spec[-1], tf.DType) else (spec, tf.float32)
        specs.append(tf.TensorSpec(shape, dtype, name=name))
    return tf.function(call, input_signature=specs, autograph=False)


def save_module(module, folder, **signatures):
    for key, signature in signatures.items():
        setattr(module, f"f_{key}", signature)
    tf.saved_model.save(module, str(folder), signatures=signatures)
    return folder


def save_graph(build, path):
    """Writes the GraphDef of what `build` adds to a graph, as text where the suffix says so."""
    with tf.Graph().as_default() as graph:
        build()
    definition = graph.as_graph_def()
    if path.suffix == ".pbtxt":
        path.write_text(text_format.MessageToString(definition))
    else:
        path.write_bytes(definition.SerializeToString())
    return path


def run_graph(path, outputs, feeds):
    """What a session computes from a GraphDef."""
    definition = V1.GraphDef()
    if path.suffix == ".pbtxt":
        text_format.Parse(path.read_text(), definition)
    else:
        definition.ParseFromString(path.read_bytes())
    with tf.Graph().as_default() as graph, V1.Session(graph=graph) as session:
        tf.graph_util.import_graph_def(definition, name="")
        return session.run(outputs, feeds)


# Helpers: what INT8 gives


def sqnr(reference, other):
    reference, other = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    assert reference.shape == other.shape
    return 10 * np.log10((reference**2).sum() / max(((reference - other) ** 2).sum(), 1e-30))


def assert_close(found, expected, least):
    """Output by output, INT8 is closer to the float values than `least` dB, and is not the same."""
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        figure = sqnr(value, found[key])
        print(f"{key}: {figure:.1f} dB")
        assert least < figure < LARGEST_DB, key


def count(result, *kernels):
    ops = [node.op for node in result.graph_def.node]
    return tuple(ops.count(kernel) for kernel in kernels)


def quantize(model, samples, folder, **options):
    """The result, and what is saved of it, loaded again."""
    result = tfquant.quantize(model, samples, tfquant.QuantConfig(verify=False, **options))
    result.save(folder / "int8")
    return result, tf.saved_model.load(str(folder / "int8"))


def call(loaded, key="serving_default", **inputs):
    """The outputs of a signature as arrays."""
    return {name: value.numpy() for name, value in loaded.signatures[key](**as_tensors(inputs)).items()}


def call_one(loaded, x, key="serving_default"):
    """The output of a signature with one input and one output."""
    (name,) = loaded.signatures[key].structured_input_signature[1]
    ((output),) = call(loaded, key, **{name: x}).values()
    return output


def as_tensors(inputs):
    return {name: tf.constant(value) for name, value in inputs.items()}


def command(*words):
    """The exit code of the command line, in this process."""
    with flagsaver.flagsaver():
        return calibrate.main(calibrate.parse(["calibrate", "--noverify", *map(str, words)]))


def refusal(model, samples=IMAGES, **options):
    """The line that a model is refused with."""
    with pytest.raises(ModelError) as found:
        tfquant.quantize(model, samples, tfquant.QuantConfig(verify=False, **options))
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 700
    return str(found.value)


# Keras files


@pytest.mark.parametrize(("package", "suffix"), [(keras, ".h5"), (tf_keras, ".h5"), (tf_keras, ".hdf5"), (keras, ".keras")])
def test_a_file_that_keras_3_reads(tmp_path, package, suffix):
    model, path = functional(package), tmp_path / f"net{suffix}"
    expected = model(FRESH).numpy()
    model.save(path)
    assert sqnr(expected, keras.models.load_model(path, compile=False)(FRESH)) > 90
    result, loaded = quantize(path, IMAGES, tmp_path)
    assert count(result, CONV, MATMUL) == (2, 1)
    assert_close({"y": call_one(loaded, FRESH)}, {"y": expected}, 37)
    assert result.report.name == path.name


@pytest.mark.parametrize("suffix", [".h5", ".hdf5"])
def test_a_file_that_keras_3_refuses_and_tf_keras_reads(tmp_path, suffix):
    model, path = with_depthwise(tf_keras), tmp_path / f"net{suffix}"
    model.save(path)
    with pytest.raises(TypeError, match="groups"):
        keras.models.load_model(path, compile=False)
    expected = model(FRESH).numpy()
    result, loaded = quantize(path, IMAGES, tmp_path)
    assert count(result, CONV, DEPTHWISE, MATMUL) == (1, 1, 1)
    assert_close({"y": call_one(loaded, FRESH)}, {"y": expected}, 25)


def test_a_keras_file_on_the_command_line(tmp_path, capsys):
    model = with_depthwise(tf_keras)
    model.save(tmp_path / "net.hdf5")
    np.save(tmp_path / "data.npy", IMAGES)
    assert command("--saved_model", tmp_path / "net.hdf5", "--data", tmp_path / "data.npy", "--output", tmp_path / "int8") == 0
    assert "Multiply-accumulates in INT8: 100.00%" in capsys.readouterr().out
    found = call_one(tf.saved_model.load(str(tmp_path / "int8")), FRESH)
    assert_close({"y": found}, {"y": model(FRESH).numpy()}, 25)


# Live models


@pytest.mark.parametrize("package", [keras, tf_keras])
@pytest.mark.parametrize("make", [sequential, functional, subclassed])
def test_a_live_model(tmp_path, package, make):
    model = make(package)
    expected = model(FRESH).numpy()
    result, loaded = quantize(model, IMAGES, tmp_path)
    assert count(result, CONV, MATMUL) == (2, 1)
    assert_close({"y": call_one(loaded, FRESH), "serve": loaded.serve(FRESH)}, {"y": expected, "serve": expected}, 37)
    assert np.array_equal(result(FRESH), loaded.serve(FRESH))


@pytest.mark.parametrize("make", [sequential, functional, subclassed])
def test_a_saved_model_of_tf_keras(tmp_path, make):
    model = make(tf_keras)
    expected = model(FRESH).numpy()
    model.save(tmp_path / "net", save_format="tf")
    result, loaded = quantize(tmp_path / "net", IMAGES, tmp_path)
    assert count(result, CONV, MATMUL) == (2, 1)
    assert_close({"y": call_one(loaded, FRESH)}, {"y": expected}, 37)
    before = tf.saved_model.load(str(tmp_path / "net")).signatures
    assert sorted(before) == sorted(loaded.signatures)
    assert before["serving_default"].structured_outputs.keys() == loaded.signatures["serving_default"].structured_outputs.keys()


@pytest.mark.parametrize("package", [keras, tf_keras])
def test_an_unbuilt_model_is_refused(package):
    assert "Keras cannot export" in refusal(subclassed(package))


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_a_path_of_either_kind(tmp_path, kind):
    model = sequential()
    model.save(tmp_path / "net.keras")
    model.export(tmp_path / "net", verbose=False)
    expected = model(FRESH).numpy()
    for name in ("net", "net.keras"):
        _, loaded = quantize(kind(tmp_path / name), IMAGES, tmp_path / f"from {name}")
        assert_close({"y": call_one(loaded, FRESH)}, {"y": expected}, 37)


# Frozen graphs


def two_heads():
    """split:0 and split:1 are what is asked for; nobody reads them."""
    x = V1.placeholder(tf.float32, IMAGE, name="image")
    y = mean(conv(conv(x, 8), 8, seed=1))
    tf.split(tf.matmul(y, tf.constant(normal(8, 6))), 2, 1, name="split")


@pytest.mark.parametrize("suffix", [".pb", ".pbtxt"])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [((), ("split:1",)), (("image",), ("split", "split:1")), (("image:0",), ("split:0", "split:1"))]
)
def test_a_graph_def(tmp_path, suffix, inputs, outputs):
    path = save_graph(two_heads, tmp_path / f"net{suffix}")
    keys = {"split": "split", "split:0": "split", "split:1": "split_1"}
    tensors = [name if ":" in name else f"{name}:0" for name in outputs]
    expected = dict(zip([keys[name] for name in outputs], run_graph(path, tensors, {"image:0": FRESH}), strict=True))
    result, loaded = quantize(path, IMAGES, tmp_path, inputs=inputs, outputs=outputs)
    assert count(result, CONV, MATMUL) == (2, 1)
    assert_close(call(loaded, image=FRESH), expected, 36)


def test_a_graph_def_whose_inputs_and_outputs_are_found(tmp_path):
    def build():
        x = V1.placeholder(tf.float32, IMAGE, name="scope/image")
        V1.placeholder(tf.float32, (), name="nobody_reads_this")
        tf.identity(mean(conv(conv(x, 8), 8, seed=1)), name="scope/features")

    path = save_graph(build, tmp_path / "net.pb")
    result, loaded = quantize(path, IMAGES, tmp_path)
    assert count(result, CONV) == (2,)
    (expected,) = run_graph(path, ["scope/features:0"], {"scope/image:0": FRESH})
    assert_close({"y": call_one(loaded, FRESH)}, {"y": expected}, 40)


def test_a_graph_def_keeps_its_names_as_a_graph_def(tmp_path):
    def build():
        x = V1.placeholder(tf.float32, IMAGE, name="net/image")
        y = conv(conv(x, 8), 8, seed=1)
        tf.identity(mean(y), name="net/features")
        tf.nn.softmax(tf.matmul(mean(y), tf.constant(normal(8, 4))), name="net/classes")

    path = save_graph(build, tmp_path / "net.pb")
    np.save(tmp_path / "data.npy", IMAGES)
    words = ["--saved_model", path, "--data", tmp_path / "data.npy", "--output", tmp_path / "int8", "--format", "graphdef"]
    assert command(*words, "--inputs", "net/image", "--outputs", "net/features:0,net/classes") == 0
    names = ["net/features:0", "net/classes:0"]
    expected = dict(zip(names, run_graph(path, names, {"net/image:0": FRESH}), strict=True))
    made = tmp_path / "int8" / "frozen_graph.pb"
    assert_close(dict(zip(names, run_graph(made, names, {"net/image:0": FRESH}), strict=True)), expected, 40)
    again, _ = quantize(path, IMAGES, tmp_path / "again", outputs=names)
    definition = V1.GraphDef.FromString(made.read_bytes())
    assert [node.op for node in definition.node].count(CONV) == count(again, CONV)[0] == 2
    assert [node.name for node in definition.node if node.op == "Placeholder"] == ["net/image"]


def test_an_output_with_an_index_keeps_its_value_as_a_graph_def(tmp_path):
    path = save_graph(two_heads, tmp_path / "net.pb")
    result = tfquant.quantize(path, IMAGES, tfquant.QuantConfig(verify=False, outputs=("split", "split:1")))
    result.save(tmp_path / "int8", format="graphdef")
    expected = run_graph(path, ["split:0", "split:1"], {"image:0": FRESH})
    found = run_graph(tmp_path / "int8" / "frozen_graph.pb", ["split:0", "split_1:0"], {"image:0": FRESH})
    assert_close(dict(enumerate(found)), dict(enumerate(expected)), 36)


@pytest.mark.parametrize("outputs", [("features",), ()])
def test_a_graph_def_with_a_learning_phase(tmp_path, outputs):
    """A placeholder with a default that nobody feeds decides between the branches of a cond."""

    def build():
        V1.disable_control_flow_v2()
        try:
            x = V1.placeholder(tf.float32, IMAGE, name="image")
            phase = V1.placeholder_with_default(False, (), name="keras_learning_phase")
            y = conv(x, 8)
            y = tf.cond(phase, lambda: tf.nn.dropout(y, 0.9), lambda: tf.identity(y))
            tf.identity(mean(conv(y, 8, seed=1)), name="features")
        finally:
            V1.enable_control_flow_v2()

    path = save_graph(build, tmp_path / "net.pb")
    assert "Switch" in {node.op for node in V1.GraphDef.FromString(path.read_bytes()).node}
    result, loaded = quantize(path, IMAGES, tmp_path, outputs=outputs)
    assert count(result, CONV) == (2,)
    assert not any("RandomUniform" in node.op for node in result.graph_def.node)
    (expected,) = run_graph(path, ["features:0"], {"image:0": FRESH})
    assert_close({"y": call_one(loaded, FRESH)}, {"y": expected}, 40)


def test_a_default_that_is_an_input(tmp_path):
    def build():
        x = V1.placeholder(tf.float32, IMAGE, name="image")
        gain = V1.placeholder_with_default(1.0, (), name="gain")
        tf.multiply(gain, mean(conv(conv(x, 8), 8, seed=1)), name="features")

    path = save_graph(build, tmp_path / "net.pb")
    samples = {"image": IMAGES, "gain": np.float32(2)}
    result, loaded = quantize(path, samples, tmp_path, inputs=("image", "gain"))
    assert count(result, CONV) == (2,)
    for gain in (np.float32(2), np.float32(-3)):
        (expected,) = run_graph(path, ["features:0"], {"image:0": FRESH, "gain:0": gain})
        assert_close(call(loaded, image=FRESH, gain=gain), {"features": expected}, 40)


def test_graph_defs_that_are_refused(tmp_path, capsys):
    path = save_graph(two_heads, tmp_path / "net.pb")

    def several():
        x = V1.placeholder(tf.float32, IMAGE, name="image")
        tf.nn.relu(x, name="scores")
        tf.nn.sigmoid(x, name="boxes")

    def unfrozen():
        x = V1.placeholder(tf.float32, IMAGE, name="image")
        w = V1.get_variable("kernel", (3, 3, 3, 8), use_resource=False)
        tf.nn.conv2d(x, w, 1, "SAME", name="y")

    def resources():
        x = V1.placeholder(tf.float32, IMAGE, name="image")
        w = V1.get_variable("kernel", (3, 3, 3, 8), use_resource=True)
        tf.nn.conv2d(x, w, 1, "SAME", name="y")

    line = refusal(save_graph(several, tmp_path / "several.pb"))
    assert "2 nodes" in line
    assert "scores, boxes" in line
    line = refusal(path, outputs=("spilt:1",))
    assert "no node 'spilt'" in line
    assert "nearest names are: split" in line
    assert "no node 'imag'" in refusal(path, inputs=("imag",), outputs=("split",))
    for build in (unfrozen, resources):
        line = refusal(save_graph(build, tmp_path / "unfrozen.pb"), outputs=("y",))
        assert "'kernel' is a variable" in line
    two = tmp_path / "two.pb"
    save_graph(lambda: tf.add(V1.placeholder(tf.float32, (2,), name="a"), V1.placeholder(tf.float32, (2,), name="b"), "y"), two)
    assert "the placeholder 'b' is no input" in refusal(two, inputs=("a",))
    np.save(tmp_path / "data.npy", IMAGES)
    words = ["--data", tmp_path / "data.npy", "--output", tmp_path / "int8"]
    assert command("--saved_model", tmp_path / "several.pb", *words) == 2
    assert "Received: scores, boxes" in capsys.readouterr().err
    assert not (tmp_path / "int8").exists()


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [((), ("split:2",)), (("image:1",), ("split",)), ((), ("Relu:1",))],
)
def test_an_index_that_a_node_does_not_have(tmp_path, inputs, outputs):
    line = refusal(save_graph(two_heads, tmp_path / "net.pb"), inputs=inputs, outputs=outputs)
    assert (inputs or outputs)[0] in line


def test_outputs_whose_names_are_alike(tmp_path):
    def build():
        two_heads()
        tf.identity(V1.get_default_graph().get_tensor_by_name("split:0"), name="split_1")

    path = save_graph(build, tmp_path / "net.pb")
    result = tfquant.quantize(path, IMAGES, tfquant.QuantConfig(verify=False, outputs=("split:1", "split_1", "split")))
    outputs = {key: value.numpy() for key, value in result(FRESH).items()}
    assert sorted(outputs) == ["split", "split_1", "split_1_"]
    assert np.array_equal(outputs["split_1_"], outputs["split"])
    assert np.abs(outputs["split_1"] - outputs["split"]).max() > 0.1


# SavedModels of TensorFlow 1


def save_tf1(folder, tags=(("serve",),), resource=False, method="tensorflow/serving/predict", keys=("serving_default",)):
    """One meta graph per set of tags, over the same variables; returns the outputs for FRESH of the last."""
    builder = V1.saved_model.Builder(str(folder))
    for index, names in enumerate(tags):
        with tf.Graph().as_default() as graph, V1.Session(graph=graph) as session:
            x = V1.placeholder(tf.float32, IMAGE, name="x")

            def variable(value):
                return V1.get_variable(f"kernel_{len(value)}_{value.shape[-2]}", initializer=value, use_resource=resource)

            y = conv(conv(x, 8, variable), 8, variable, seed=1)
            if "train" in names:
                y = tf.nn.dropout(y, 0.5)
            y = tf.matmul(mean(y), variable(normal(8, 4)))
            signature = V1.saved_model.build_signature_def(
                {"images": V1.saved_model.build_tensor_info(x)}, {"scores": V1.saved_model.build_tensor_info(y)}, method
            )
            session.run(V1.global_variables_initializer())
            signatures = dict.fromkeys(keys, signature)
            if index:
                builder.add_meta_graph(list(names), signatures)
            else:
                builder.add_meta_graph_and_variables(session, list(names), signatures)
            expected = session.run(y, {x: FRESH})
    builder.save()
    return expected


def labels(folder):
    """[(tags, {signature: method name})] of each meta graph."""
    proto = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    return [
        (
            sorted(graph.meta_info_def.tags),
            {key: value.method_name for key, value in graph.signature_def.items() if key[:2] != "__"},
        )
        for graph in proto.meta_graphs
    ]


@pytest.mark.parametrize("resource", [False, True])
@pytest.mark.parametrize("tags", [(("serve",),), (("serve", "gpu"),), (("train",), ("serve",))])
def test_a_saved_model_of_tensorflow_1(tmp_path, resource, tags):
    expected = save_tf1(tmp_path / "net", tags, resource)
    result, loaded = quantize(tmp_path / "net", IMAGES, tmp_path, tags=tags[-1])
    assert count(result, CONV, MATMUL) == (2, 1)
    assert_close(call(loaded, images=FRESH), {"scores": expected}, 38)
    assert labels(tmp_path / "int8") == [(sorted(tags[-1]), {"serving_default": "tensorflow/serving/predict"})]
    kept = [shape for _, shape in tf.train.list_variables(str(tmp_path / "int8" / "variables" / "variables")) if shape]
    assert kept == []  # no float weights come along


def test_tensorflow_1_aliases_and_method_names(tmp_path):
    method = "tensorflow/serving/classify"
    expected = save_tf1(tmp_path / "net", (("serve", "gpu"),), method=method, keys=("serving_default", "alias"))
    np.save(tmp_path / "data.npy", IMAGES)
    words = ["--data", tmp_path / "data.npy", "--output", tmp_path / "int8", "--tags", "serve,gpu"]
    assert command("--saved_model", tmp_path / "net", *words) == 0
    assert labels(tmp_path / "int8") == [(["gpu", "serve"], dict.fromkeys(("serving_default", "alias"), method))]
    loaded = tf.saved_model.load(str(tmp_path / "int8"), ["serve", "gpu"])
    for key in ("serving_default", "alias"):
        assert_close(call(loaded, key, images=FRESH), {"scores": expected}, 38)
    with tf.Graph().as_default() as graph, V1.Session(graph=graph) as session:
        meta = V1.saved_model.load(session, ["serve", "gpu"], str(tmp_path / "int8"))
        alias = meta.signature_def["alias"]
        found = session.run(alias.outputs["scores"].name, {alias.inputs["images"].name: FRESH})
    assert_close({"scores": found}, {"scores": expected}, 38)


def test_wrong_tags_are_refused(tmp_path):
    save_tf1(tmp_path / "net", (("train",), ("serve", "gpu")))
    for tags in (("serve",), ("gpu",), ("serve", "tpu")):
        line = refusal(tmp_path / "net", tags=tags)
        assert f"tags {','.join(tags)}" in line
        assert "Received: train; gpu,serve" in line


# Several signatures


def several_signatures(folder):
    """embed and classify share a trunk; other computes from another input; plain has no weights."""
    module = Module(trunk=normal(3, 3, 3, 8) / 5, head=normal(8, 4, seed=1), own=normal(6, 5, seed=2))

    def trunk(x):
        return mean(tf.nn.relu(tf.nn.conv2d(x, module["trunk"], 1, "SAME")))

    return save_module(
        module,
        folder,
        embed=function(lambda x: {"embedding": trunk(x)}, x=IMAGE),
        classify=function(lambda x: {"scores": trunk(x) @ module["head"]}, x=IMAGE),
        other=function(lambda z: {"o": z @ module["own"]}, z=(None, 6)),
        clash=function(lambda x: {"c": x @ module["own"]}, x=(None, 6)),
        plain=function(lambda x: {"p": tf.nn.softmax(mean(x))}, x=IMAGE),
    )


LEAST = {"embed": 48, "classify": 34, "other": 25, "clash": 25}


@pytest.mark.parametrize(
    ("keys", "kernels"),
    [
        (("embed",), (1, 0)),
        (("classify",), (1, 1)),
        (("embed", "classify"), (1, 1)),
        (("classify", "embed"), (1, 1)),
        (("classify", "other"), (1, 2)),
        (("embed", "classify", "other"), (1, 2)),
    ],
)
def test_the_named_signatures_are_quantized_and_no_other(tmp_path, keys, kernels):
    several_signatures(tmp_path / "net")
    samples = {"x": IMAGES} | ({"z": normal(40, 6, seed=1)} if "other" in keys else {})
    result, after = quantize(tmp_path / "net", samples, tmp_path, signature_keys=keys)
    assert count(result, CONV, MATMUL) == kernels
    before = tf.saved_model.load(str(tmp_path / "net"))
    assert sorted(after.signatures) == sorted(before.signatures)
    for key in before.signatures:
        (name,) = before.signatures[key].structured_input_signature[1]
        x = {name: normal(20, 6, seed=3) if key in ("other", "clash") else FRESH}
        expected, found = call(before, key, **x), call(after, key, **x)
        if key in keys:
            assert_close(found, expected, LEAST[key])
        else:
            assert {name: np.array_equal(value, found[name]) for name, value in expected.items()} == dict.fromkeys(found, True)


def test_weights_of_a_shared_trunk_are_there_once(tmp_path):
    several_signatures(tmp_path / "net")
    result, _ = quantize(tmp_path / "net", IMAGES, tmp_path, signature_keys=("embed", "classify"))
    weights = [
        node for node in result.graph_def.node if node.op == "Const" and node.attr["dtype"].type == tf.qint8.as_datatype_enum
    ]
    shapes = sorted(tuple(size.size for size in node.attr["value"].tensor.tensor_shape.dim) for node in weights)
    assert shapes == [(3, 3, 3, 8), (8, 4)]


def test_signatures_that_disagree_on_an_input_are_refused(tmp_path):
    several_signatures(tmp_path / "net")
    line = refusal(tmp_path / "net", signature_keys=("embed", "clash"))
    assert "must agree on the input 'x'" in line
    assert "(None, 12, 12, 3)" in line
    assert "(None, 6)" in line
    assert "no signature 'x'" in refusal(tmp_path / "net", signature_keys=("embed", "x"))


def test_several_signatures_on_the_command_line(tmp_path):
    several_signatures(tmp_path / "net")
    np.savez(tmp_path / "data.npz", x=IMAGES, z=normal(40, 6, seed=1))
    words = ["--data", tmp_path / "data.npz", "--output", tmp_path / "int8", "--signature_keys", "classify,other"]
    assert command("--saved_model", tmp_path / "net", *words) == 0
    before, after = (tf.saved_model.load(str(tmp_path / name)) for name in ("net", "int8"))
    assert_close(call(after, "classify", x=FRESH), call(before, "classify", x=FRESH), LEAST["classify"])
    z = normal(20, 6, seed=3)
    assert_close(call(after, "other", z=z), call(before, "other", z=z), LEAST["other"])
    assert np.array_equal(call_one(after, FRESH, "embed"), call_one(before, FRESH, "embed"))


def test_disagreeing_signatures_one_after_the_other(tmp_path):
    """As the line that refuses both at once says."""
    several_signatures(tmp_path / "net")
    quantize(tmp_path / "net", IMAGES, tmp_path / "one", signature_keys=("embed",))
    samples, z = normal(40, 6, seed=1), normal(20, 6, seed=3)
    _, after = quantize(tmp_path / "one" / "int8", samples, tmp_path / "two", signature_keys=("clash",))
    before = tf.saved_model.load(str(tmp_path / "net"))
    assert_close(call(after, "embed", x=FRESH), call(before, "embed", x=FRESH), LEAST["embed"])
    assert_close(call(after, "clash", x=z), call(before, "clash", x=z), LEAST["clash"])
    assert np.array_equal(call_one(after, FRESH, "classify"), call_one(before, FRESH, "classify"))


# Nested inputs and outputs


def nested_functional():
    layers = keras.layers
    a, b = keras.Input((12, 12, 3), name="a"), keras.Input((5,), name="b")
    features = layers.Concatenate()([network(layers, a), layers.Dense(8, activation="relu")(b)])
    return keras.Model({"a": a, "more": [b]}, {"scores": layers.Dense(4)(features), "rest": layers.Dense(2)(features)})


def nested_subclassed():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = functional()
            self.side, self.head, self.last = (keras.layers.Dense(size) for size in (8, 4, 2))

        def call(self, inputs):
            x = keras.ops.concatenate([self.inner(inputs["a"]), self.side(inputs["more"][0])], -1)
            return [self.head(x), self.last(x)]

    return Net()


def nested(a, b):
    return {"a": a, "more": [b]}


@pytest.mark.parametrize("make", [nested_functional, nested_subclassed])
@pytest.mark.parametrize("form", ["nested", "nested batches", "by name"])
def test_nested_inputs_and_outputs(tmp_path, make, form):
    model = make()
    b, fresh = normal(40, 5, seed=3), nested(FRESH, normal(40, 5, seed=4))
    expected = model(fresh)
    model.export(tmp_path / "net", verbose=False)
    before = tf.saved_model.load(str(tmp_path / "net"))
    names = sorted(before.signatures["serving_default"].structured_input_signature[1])
    forms = {
        "nested": nested(IMAGES, b),
        "nested batches": lambda: (nested(IMAGES[i : i + 8], b[i : i + 8]) for i in range(0, 40, 8)),
        "by name": dict(zip(names, (IMAGES, b), strict=True)),
    }
    result, loaded = quantize(model, forms[form], tmp_path)
    assert count(result, CONV) == (2,)
    layer = keras.layers.TFSMLayer(str(tmp_path / "int8"), call_endpoint="serve")
    for found in (loaded.serve(tf.nest.map_structure(tf.constant, fresh)), layer(fresh), result(fresh)):
        tf.nest.assert_same_structure(expected, found)
        flat, reference = tf.nest.flatten(found), tf.nest.flatten(expected)
        assert_close(dict(enumerate(flat)), dict(enumerate(reference)), 27)
    inputs = dict(zip(names, (FRESH, fresh["more"][0]), strict=True))
    assert_close(call(loaded, **inputs), call(before, **inputs), 27)


def test_an_endpoint_with_nested_outputs_beside_a_flat_signature(tmp_path):
    module = Module(w=normal(3, 3, 3, 8) / 5, v=normal(8, 4, seed=1))

    def run(image):
        x = mean(tf.nn.relu(tf.nn.conv2d(image, module["w"], 1, "SAME")))
        return x, x @ module["v"]

    module.infer = function(lambda image: {"features": [run(image)[0]], "more": {"scores": (run(image)[1],)}}, image=IMAGE)
    flat = function(lambda image: dict(zip(("features", "scores"), run(image), strict=True)), image=IMAGE)
    save_module(module, tmp_path / "net", serving_default=flat)
    result, after = quantize(tmp_path / "net", IMAGES, tmp_path)
    assert count(result, CONV, MATMUL) == (1, 1)
    before = tf.saved_model.load(str(tmp_path / "net"))
    expected, found = before.infer(FRESH), after.infer(FRESH)
    tf.nest.assert_same_structure(expected, found)
    assert_close(dict(enumerate(tf.nest.flatten(found))), dict(enumerate(tf.nest.flatten(expected))), 34)
    assert np.array_equal(found["more"]["scores"][0], call(after, image=FRESH)["scores"])


def ordered_forms(one, other):
    """Pairs by position."""
    return {
        "generator of lists": lambda: ([a, b] for a, b in zip(one, other, strict=True)),
        "generator of tuples": lambda: zip(one, other, strict=True),
        "list of lists": [[a, b] for a, b in zip(one, other, strict=True)],
        "list of tuples": list(zip(one, other, strict=True)),
        "dataset": tf.data.Dataset.from_tensor_slices((one, other)).batch(8),
    }


FORMS = list(ordered_forms(np.zeros((1, 1)), np.zeros((1, 1))))


@pytest.mark.parametrize("package", [keras, tf_keras])
@pytest.mark.parametrize("form", FORMS)
def test_samples_by_position_are_in_the_order_of_the_model(tmp_path, package, form):
    """Both inputs have one shape, and their names sort the other way: swapped, the ranges would be far off."""
    layers = package.layers
    first, second = package.Input((8,), name="zeta"), package.Input((8,), name="alpha")
    features = [layers.Dense(8, activation="relu")(x) for x in (first, second)]
    model = package.Model([first, second], layers.Dense(4)(layers.Concatenate()(features)))
    samples = ordered_forms(normal(40, 8, seed=1), 50 * normal(40, 8, seed=2))[form]
    fresh = [normal(40, 8, seed=3), 50 * normal(40, 8, seed=4)]
    result, loaded = quantize(model, samples, tmp_path)
    assert count(result, MATMUL) == (3,)
    assert_close({"y": loaded.serve(fresh)}, {"y": np.asarray(model(fresh))}, 25)


@pytest.mark.parametrize("form", ["function", "list", "dataset"])
def test_samples_of_the_structure_of_the_call(tmp_path, form):
    """Whose keys are not the names of the inputs."""
    layers = keras.layers
    a, b = keras.Input((12, 12, 3), name="picture"), keras.Input((5,), name="facts")
    features = layers.Concatenate()([network(layers, a), layers.Dense(8, activation="relu")(b)])
    model = keras.Model({"a": a, "b": b}, layers.Dense(4)(features))
    whole = {"a": IMAGES, "b": normal(40, 5, seed=3)}
    samples = [dict(zip(whole, pair, strict=True)) for pair in zip(*whole.values(), strict=True)]
    forms = {"function": lambda: iter(samples), "list": samples, "dataset": tf.data.Dataset.from_tensor_slices(whole).batch(8)}
    fresh = {"a": FRESH, "b": normal(40, 5, seed=4)}
    result, loaded = quantize(model, forms[form], tmp_path)
    assert count(result, CONV) == (2,)
    assert_close({"y": loaded.serve(fresh)}, {"y": model(fresh).numpy()}, 30)


def test_a_dictionary_of_inputs_on_the_command_line(tmp_path):
    model = nested_functional()
    model.save(tmp_path / "net.keras")
    model.export(tmp_path / "net", verbose=False)
    before = tf.saved_model.load(str(tmp_path / "net"))
    names = sorted(before.signatures["serving_default"].structured_input_signature[1])
    np.savez(tmp_path / "data.npz", **dict(zip(names, (IMAGES, normal(40, 5, seed=3)), strict=True)))
    words = ["--data", tmp_path / "data.npz", "--output", tmp_path / "int8"]
    assert command("--saved_model", tmp_path / "net.keras", *words) == 0
    inputs = dict(zip(names, (FRESH, normal(40, 5, seed=4)), strict=True))
    assert_close(call(tf.saved_model.load(str(tmp_path / "int8")), **inputs), call(before, **inputs), 28)


# Optional inputs and default arguments


@keras.saving.register_keras_serializable("kinds")
class Sum(keras.layers.Layer):
    """Of one or two."""

    def call(self, x, y=None):
        return x if y is None else x + y

    def compute_output_shape(self, x_shape, y_shape=None):
        return x_shape


def test_an_optional_input(tmp_path):
    a, b = keras.Input((12, 12, 3), name="a"), keras.Input((4,), name="b", optional=True)
    model = keras.Model([a, b], Sum()(network(keras.layers, a), b))
    model.save(tmp_path / "net.keras")
    samples, fresh = {"a": IMAGES, "b": normal(40, 4, seed=3)}, {"a": FRESH, "b": normal(40, 4, seed=4)}
    expected = model([fresh["a"], fresh["b"]]).numpy()
    for name, source in (("live", model), ("file", tmp_path / "net.keras")):
        result, loaded = quantize(source, samples, tmp_path / name)
        assert count(result, CONV, MATMUL) == (2, 1)
        ((found),) = call(loaded, **fresh).values()
        assert_close({"y": found}, {"y": expected}, 50)
        assert np.array_equal(loaded.serve([fresh["a"], fresh["b"]]), found)


class WithDefaults(tf.Module):
    """A signature beside functions of the same weights that take options."""

    def __init__(self):
        super().__init__()
        self.w, self.v = tf.Variable(normal(3, 3, 3, 8) / 5), tf.Variable(normal(8, 4, seed=1))
        self.serve = function(lambda image: {"y": self.run(image, False)}, image=IMAGE)
        self.infer = tf.function(self._infer, autograph=False)
        self.masked = tf.function(self._masked, autograph=False)

    def run(self, image, training):
        x = mean(tf.nn.relu(tf.nn.conv2d(image, self.w, 1, "SAME")))
        return (x * 2 if training else x) @ self.v

    def _infer(self, image, training=False):
        return self.run(image, training)

    def _masked(self, image, mask=None):
        y = self.run(image, False)
        return y if mask is None else tf.where(mask[:, None], y, 0.0)

    @tf.function(autograph=False)
    def __call__(self, image, training=False):
        return self.run(image, training)


def test_endpoints_with_default_arguments_stay(tmp_path):
    module = WithDefaults()
    image, mask = tf.TensorSpec(IMAGE, name="image"), tf.TensorSpec((None,), tf.bool, name="mask")
    for option in (False, True):
        module.infer.get_concrete_function(image, training=option)
        module.__call__.get_concrete_function(image, training=option)
    module.masked.get_concrete_function(image, mask=None)
    module.masked.get_concrete_function(image, mask=mask)
    tf.saved_model.save(module, str(tmp_path / "net"), signatures=module.serve)
    result, after = quantize(tmp_path / "net", IMAGES, tmp_path)
    assert count(result, CONV, MATMUL) == (1, 1)
    before = tf.saved_model.load(str(tmp_path / "net"))
    assert_close(call(after, image=FRESH), call(before, image=FRESH), 20)
    some = tf.constant(np.arange(len(FRESH)) % 2 == 0)
    for expected, found in [
        (before.infer(FRESH), after.infer(FRESH)),
        (before.infer(FRESH, training=True), after.infer(FRESH, training=True)),
        (before.masked(FRESH), after.masked(FRESH)),
        (before.masked(FRESH, mask=some), after.masked(FRESH, mask=some)),
        (before(FRESH), after(FRESH)),
        (before(FRESH, training=True), after(FRESH, training=True)),
    ]:
        assert np.array_equal(expected, found)
    assert_close({"y": after.serve(FRESH)["y"]}, {"y": before.serve(FRESH)["y"]}, 34)


# Types of inputs


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_ids(tmp_path, dtype):
    layers = keras.layers
    ids = keras.Input((7,), dtype=dtype, name="ids")
    x = layers.Conv1D(16, 3, activation="relu")(layers.Embedding(30, 16)(ids))
    model = keras.Model(ids, layers.Dense(4)(layers.Dense(16, activation="relu")(layers.Flatten()(x))))
    samples, fresh = (np.random.default_rng(seed).integers(0, 30, (60, 7)).astype(dtype) for seed in (1, 2))
    result, loaded = quantize(model, samples, tmp_path)
    assert count(result, MATMUL)[0] >= 2
    assert loaded.signatures["serving_default"].structured_input_signature[1]["ids"].dtype == dtype
    assert_close({"y": call_one(loaded, fresh)}, {"y": model(fresh).numpy()}, 30)


def test_images_of_bytes(tmp_path):
    image = keras.Input((12, 12, 3), dtype="uint8", name="image")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(keras.ops.cast(image, "float32"))
    model = keras.Model(image, network(keras.layers, x))
    samples, fresh = (np.random.default_rng(seed).integers(0, 256, (40, 12, 12, 3), np.uint8) for seed in (1, 2))
    result, loaded = quantize(model, samples, tmp_path)
    assert count(result, CONV, MATMUL) == (2, 1)
    assert loaded.signatures["serving_default"].structured_input_signature[1]["image"].dtype == tf.uint8
    assert_close({"y": call_one(loaded, fresh)}, {"y": model(fresh).numpy()}, 37)


def test_a_mask(tmp_path):
    image, mask = keras.Input((12, 12, 3), name="image"), keras.Input((12, 12), dtype="bool", name="mask")
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(image)
    x = keras.ops.where(keras.ops.expand_dims(mask, -1), x, 0.0)
    model = keras.Model([image, mask], network(keras.layers, x))
    masks, other = (np.random.default_rng(seed).random((40, 12, 12)) < 0.7 for seed in (1, 2))
    result, loaded = quantize(model, {"image": IMAGES, "mask": masks}, tmp_path)
    assert count(result, CONV, MATMUL) == (3, 1)
    ((found),) = call(loaded, image=FRESH, mask=other).values()
    assert_close({"y": found}, {"y": model([FRESH, other]).numpy()}, 32)


def test_strings(tmp_path):
    layers, words = keras.layers, ["fox", "owl", "bat"]
    text = keras.Input((5,), dtype="string", name="text")
    x = layers.Embedding(4, 8)(layers.StringLookup(vocabulary=words)(text))
    model = keras.Model(text, layers.Dense(4)(layers.Dense(32, activation="relu")(layers.Flatten()(x))))
    samples, fresh = (np.random.default_rng(seed).choice([*words, "ant"], (60, 5)) for seed in (1, 2))
    expected = model(tf.constant(fresh)).numpy()
    model.save(tmp_path / "net.keras")
    for name, source in (("live", model), ("file", tmp_path / "net.keras")):
        result, loaded = quantize(source, samples, tmp_path / name)
        assert count(result, MATMUL) == (2,)
        assert_close({"y": call_one(loaded, fresh)}, {"y": expected}, 37)


# Unknown sizes, scalars, and signatures without a batch


def test_unknown_sizes(tmp_path):
    model = functional(shape=(None, None, 3))
    sizes = [(10, 14), (16, 9), (12, 12), (31, 7)]

    def samples():
        for i in range(24):
            yield normal(1 + i % 3, *sizes[i % 4], 3, seed=i)

    result, loaded = quantize(model, samples, tmp_path)
    assert count(result, CONV, MATMUL) == (2, 1)
    ((spec),) = loaded.signatures["serving_default"].structured_input_signature[1].values()
    assert spec.shape.as_list() == [None, None, None, 3]
    for shape in ((1, 13, 13), (4, 17, 5), (2, 1, 1), (3, 40, 33), (7, 2, 3)):
        x = normal(*shape, 3, seed=99)
        assert_close({str(shape): call_one(loaded, x)}, {str(shape): model(x).numpy()}, 31)


def save_unbatched(folder, *shape):
    """A signature that takes one image of this shape, without a batch."""
    module = Module(one=normal(3, 3, 3, 8) / 5, two=normal(3, 3, 8, 8) / 5)

    def run(image):
        x = tf.nn.relu(tf.nn.conv2d(image[None], module["one"], 1, "SAME"))
        return {"features": mean(tf.nn.relu(tf.nn.conv2d(x, module["two"], 1, "SAME")))[0]}

    return save_module(module, folder, serving_default=function(run, image=shape))


@pytest.mark.parametrize("shape", [(12, 12, 3), (None, None, 3)])
def test_one_image_per_call_from_a_function(tmp_path, shape):
    save_unbatched(tmp_path / "net", *shape)
    result = tfquant.quantize(tmp_path / "net", lambda: iter(IMAGES), tfquant.QuantConfig(verify=False))
    assert result.plan.settings["samples"] == len(IMAGES)
    other = tfquant.quantize(tmp_path / "net", IMAGES, tfquant.QuantConfig(verify=False))
    assert dict(result.plan.tensors) == dict(other.plan.tensors)


def test_one_image_per_call(tmp_path):
    save_unbatched(tmp_path / "net", 12, 12, 3)
    result, after = quantize(tmp_path / "net", IMAGES, tmp_path)
    assert count(result, CONV) == (2,)
    assert result.plan.settings["samples"] == len(IMAGES)
    before = tf.saved_model.load(str(tmp_path / "net"))
    expected, found = (np.stack([call_one(loaded, image) for image in FRESH]) for loaded in (before, after))
    assert_close({"features": found}, {"features": expected}, 47)
    np.save(tmp_path / "data.npy", IMAGES)
    words = ["--data", tmp_path / "data.npy", "--output", tmp_path / "again"]
    assert command("--saved_model", tmp_path / "net", *words) == 0
    again = tf.saved_model.load(str(tmp_path / "again"))
    assert np.array_equal(np.stack([call_one(again, image) for image in FRESH]), found)


@pytest.mark.parametrize("form", ["one for all", "one each"])
def test_a_scalar_beside_a_batch(tmp_path, form):
    module = Module(one=normal(3, 3, 3, 8) / 5, two=normal(3, 3, 8, 8) / 5)

    def run(image, gain):
        x = tf.nn.relu(tf.nn.conv2d(image * gain, module["one"], 1, "SAME"))
        return {"features": mean(tf.nn.relu(tf.nn.conv2d(x, module["two"], 1, "SAME")))}

    save_module(module, tmp_path / "net", serving_default=function(run, image=IMAGE, gain=()))
    gain = np.float32(2) if form == "one for all" else np.repeat(np.float32([0.5, 1, 2]), [10, 10, 20])
    result, after = quantize(tmp_path / "net", {"image": IMAGES, "gain": gain}, tmp_path)
    assert count(result, CONV) == (2,)
    before = tf.saved_model.load(str(tmp_path / "net"))
    for value in (np.float32(1), np.float32(2)):
        assert_close(call(after, image=FRESH, gain=value), call(before, image=FRESH, gain=value), 43)


@pytest.mark.parametrize("samples", [{"x": normal(20), "a": normal(20, seed=1)}, {"x": normal(20), "a": np.float32(2)}])
def test_scalars_alone(tmp_path, samples):
    module = Module(b=np.float32(3))
    save_module(module, tmp_path / "net", serving_default=function(lambda x, a: {"y": a * x + module["b"]}, x=(), a=()))
    config = tfquant.QuantConfig(verify_batch_sizes=(1,))
    result = tfquant.quantize(tmp_path / "net", samples, config)
    result.save(tmp_path / "int8")
    assert result.report.int8_share == 0
    assert result.report.fidelity.samples == 20
    loaded = tf.saved_model.load(str(tmp_path / "int8"))
    assert call(loaded, x=np.float32(2), a=np.float32(-4)) == {"y": np.float32(-5)}


# Real models without a case of their own

ASSETS = cases.find_assets()
real = pytest.mark.skipif(
    not (ASSETS / "models").is_dir(), reason=f"no models and data in {ASSETS}: TFQUANT_ASSETS names their folder"
)


def photos(size, split="evaluation", samples=20):
    """RGB / 255, resized and cropped as the product does it."""
    spec = data.InputSpec("image", (None, size, size, 3), "float32")
    batches = data.open_data(ASSETS / "imagenet" / split, [spec], preprocess="unit", subset_size=samples)
    return np.concatenate([batch["image"] for batch in batches])


@real
def test_visual_wake_words_from_either_file(tmp_path):
    paths = [ASSETS / "models" / f"mlperf_vww_96{suffix}" for suffix in (".h5", ".keras")]
    with pytest.raises(TypeError, match="groups"):
        keras.models.load_model(paths[0], compile=False)
    images, fresh = photos(96, "calibration", 40), photos(96, samples=40)
    expected = keras.models.load_model(paths[1], compile=False)(fresh).numpy()
    decisions, ranges, outputs = [], [], []
    for path in paths:
        result, loaded = quantize(path, images, tmp_path / path.suffix)
        assert count(result, CONV, DEPTHWISE, MATMUL) == (2, 13, 13)  # eleven 1x1 convolutions of small maps
        assert result.report.int8_share == 100
        decisions.append([(decision.op, decision.kernel, decision.int8, decision.reason) for decision in result.plan.ops])
        ranges.append(
            [(spec.dtype, spec.zero_point, pytest.approx(spec.scale, rel=1e-4)) for spec in result.plan.tensors.values()]
        )
        outputs.append(call_one(loaded, fresh))
        assert_close({path.name: outputs[-1]}, {path.name: expected}, 26)
    assert decisions[0] == decisions[1]
    assert ranges[0] == [(dtype, zero_point, scale.expected) for dtype, zero_point, scale in ranges[1]]
    assert sqnr(*outputs) > 50  # float32 folds the BatchNorms to other last bits, which turns a rounding here and there


@real
def test_an_autoencoder_of_sounds(tmp_path):
    """Frames of a log-mel spectrogram: 5 frames of 128 bands, random walks in dB."""
    path = ASSETS / "models" / "mlperf_ad01.h5"
    bands = [np.cumsum(normal(200, 5, 128, seed=seed), -1) * 2 - 30 for seed in (1, 2)]
    samples, fresh = (x.reshape(-1, 640).astype(np.float32) for x in bands)
    result, loaded = quantize(path, samples, tmp_path)
    assert result.report.int8_share == 100
    assert count(result, MATMUL) == (10,)
    expected = result.float_function()(dict.fromkeys(result.input_names, fresh))
    ((expected),) = expected.values()
    assert_close({"y": call_one(loaded, fresh)}, {"y": expected}, 28)


@real
def test_a_detector_of_masks(tmp_path, capsys):
    path = ASSETS / "models" / "face_mask_detection.pb"
    names = ["loc_branch_concat_1/concat", "cls_branch_concat_1/concat"]
    fresh = photos(260)
    words = ["--data", ASSETS / "imagenet" / "calibration", "--preprocess", "unit", "--subset_size", 30]
    words += ["--inputs", "data_1", "--outputs", ",".join(names), "--output", tmp_path / "int8"]
    assert command("--saved_model", path, *words) == 0
    print(capsys.readouterr().out)
    expected = run_graph(path, [f"{name}:0" for name in names], {"data_1:0": fresh})
    found = call(tf.saved_model.load(str(tmp_path / "int8")), data_1=fresh)
    assert_close(found, dict(zip(names, expected, strict=True)), 22)
