"""Tests of tfquant.pipeline: a model goes in, and what comes out is a drop-in for it, wherever TensorFlow loads it."""

import json
import os
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfquant
from tfquant.errors import ConfigError, DataError, ModelError, OutputError
from tfquant.report import Report

LAYERS = keras.layers
CONFIG = tfquant.QuantConfig(verify=False)


def build():
    keras.utils.set_random_seed(3)

    def norm(x):
        return LAYERS.BatchNormalization()(x)

    image = keras.Input((12, 12, 3), name="image")
    x = skip = LAYERS.ReLU()(norm(LAYERS.Conv2D(16, 3, padding="same", use_bias=False, name="stem")(image)))
    x = LAYERS.ReLU(6.0)(norm(LAYERS.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise")(x)))
    x = norm(LAYERS.Conv2D(16, 1, use_bias=False, name="pointwise")(x))
    x = LAYERS.ReLU()(LAYERS.Add()([x, skip]))
    x = LAYERS.MaxPooling2D(2)(x)
    x = LAYERS.GlobalAveragePooling2D()(x)
    x = LAYERS.Dropout(0.3)(x)
    x = LAYERS.Dense(4, activation="softmax", name="head")(x)
    model = keras.Model(image, x, name="net")
    # A step of training moves the statistics of the BatchNorms away from 0 and 1.
    rng = np.random.default_rng(0)
    images = rng.normal(size=(64, 12, 12, 3)).astype(np.float32)
    labels = images[:, :6, :6].mean((1, 2, 3)) > 0
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(images, labels + 2 * (images[:, 6:].mean((1, 2, 3)) > 0), epochs=4, batch_size=16, verbose=0)
    return model


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(1).normal(size=(40, 12, 12, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def quantized(model, data):
    return tfquant.quantize(model, data, CONFIG)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("float") / "model"
    model.export(path, verbose=False)
    return path


@pytest.fixture(scope="module")
def saved(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "model"
    quantized.save(path)
    return path


def bytes_of(result):
    return result.graph_def.SerializeToString(deterministic=True)


def ops_of(result):
    return [node.op for node in result.graph_def.node]


def python(script, *arguments):
    """What a fresh interpreter prints as JSON."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


def interface(signature):
    """Names, dtypes and static shapes of a signature."""
    arguments = {key: (spec.dtype, spec.shape.as_list()) for key, spec in signature.structured_input_signature[1].items()}
    results = {key: (spec.dtype, spec.shape.as_list()) for key, spec in signature.structured_outputs.items()}
    return arguments, results


def make(function, *shapes, names=None):
    """A function with tensors of these shapes as arguments."""
    names = names or [f"x{i}" for i in range(len(shapes))]
    specs = [tf.TensorSpec(shape, tf.float32, name=name) for shape, name in zip(shapes, names, strict=True)]
    return tf.function(function, input_signature=specs, autograph=False)


def kernel(*shape, seed=0):
    return tf.Variable(np.random.default_rng(seed).normal(0, 0.3, shape).astype(np.float32))


# Ways in


def test_result_is_close_and_made_of_int8_kernels(model, quantized, data):
    ops = ops_of(quantized)
    assert ops.count("_FusedQuantizedConv2D") == 2
    assert ops.count("_FusedQuantizedDepthwiseConv2D") == 1
    assert ops.count("_QuantizedMatMul") == 1
    assert ops.count("QuantizedMaxPool") == 1
    assert not {"Conv2D", "DepthwiseConv2dNative", "MatMul", "MaxPool"} & set(ops)
    expected, found = model(data).numpy(), quantized(data).numpy()
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert 10 * np.log10((expected**2).mean() / ((expected - found) ** 2).mean()) > 30
    assert (expected.argmax(-1) == found.argmax(-1)).mean() >= 0.9


def test_a_keras_file_a_saved_model_and_the_model_give_the_same(model, exported, quantized, data, tmp_path):
    model.save(tmp_path / "net.keras")
    from_file = tfquant.quantize(tmp_path / "net.keras", data, CONFIG)
    from_folder = tfquant.quantize(str(exported), data, CONFIG)
    assert bytes_of(from_folder) == bytes_of(quantized)
    assert from_folder.plan.ops == quantized.plan.ops
    assert [d.key for d in from_file.plan.ops] == [d.key for d in quantized.plan.ops]
    assert np.array_equal(from_file(data), quantized(data))


def test_two_runs_give_the_same(model, quantized, data):
    again = tfquant.quantize(model, data, CONFIG)
    assert again.plan.ops == quantized.plan.ops
    assert dict(again.plan.tensors) == dict(quantized.plan.tensors)
    assert list(again.plan.tensors) == list(quantized.plan.tensors)
    assert bytes_of(again) == bytes_of(quantized)


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_batch_size_changes_nothing(model, quantized, data, batch_size):
    config = tfquant.QuantConfig(verify=False, batch_size=batch_size)
    again = tfquant.quantize(model, data, config)
    for name, spec in again.plan.tensors.items():
        other = quantized.plan.tensors[name]
        assert (spec.dtype, spec.zero_point) == (other.dtype, other.zero_point)
        assert spec.scale == pytest.approx(other.scale, rel=1e-5)


@pytest.mark.parametrize("estimator", ["minmax", "mean_minmax", "percentile", "mse", "entropy", "aciq"])
def test_every_estimator(model, data, estimator):
    result = tfquant.quantize(model, data, tfquant.QuantConfig(verify=False, estimator=estimator))
    assert {spec.source for spec in result.plan.tensors.values()} == {estimator}
    assert result.plan.settings["estimator"] == estimator
    assert np.abs(result(data).numpy() - model(data).numpy()).max() < 0.1


def data_forms(data):
    return {
        "array": data,
        "list of samples": list(data),
        "dictionary": {"image": data},
        "generator of samples": lambda: iter(data),
        "generator of lists": lambda: ([x] for x in data),
        "generator of batches": lambda: ({"image": data[i : i + 8]} for i in range(0, len(data), 8)),
        "dataset": tf.data.Dataset.from_tensor_slices(data).batch(8),
    }


@pytest.mark.parametrize("form", list(data_forms(np.zeros((1, 1), np.float32))))
def test_every_form_of_data(model, quantized, data, form):
    assert bytes_of(tfquant.quantize(model, data_forms(data)[form], CONFIG)) == bytes_of(quantized)


def test_the_float_model_is_not_modified(model, exported, data, tmp_path):
    before = [value.copy() for value in model.get_weights()]
    expected = model(data).numpy()
    files = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in exported.rglob("*") if file.is_file()}
    tfquant.quantize(model, data, CONFIG).save(tmp_path / "one")
    tfquant.quantize(exported, data, CONFIG).save(tmp_path / "other")
    assert np.array_equal(model(data).numpy(), expected)
    assert all(np.array_equal(one, other) for one, other in zip(before, model.get_weights(), strict=True))
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in exported.rglob("*") if file.is_file()} == files


# Ways out


def test_interface_is_the_original_one(exported, saved):
    before, after = tf.saved_model.load(str(exported)), tf.saved_model.load(str(saved))
    assert sorted(before.signatures) == sorted(after.signatures) == ["serve", "serving_default"]
    for key in before.signatures:
        assert interface(before.signatures[key]) == interface(after.signatures[key])
    assert interface(after.signatures["serve"])[0] == {"image": (tf.float32, [None, 12, 12, 3])}
    one, other = (loaded.serve.concrete_functions[0] for loaded in (before, after))
    assert [spec.shape for spec in tf.nest.flatten(one.structured_input_signature)] == [
        spec.shape for spec in tf.nest.flatten(other.structured_input_signature)
    ]
    assert one.structured_outputs.shape == other.structured_outputs.shape


def test_loaded_where_tfquant_is_never_imported(quantized, saved, data, tmp_path):
    np.save(tmp_path / "data.npy", data)
    script = """
import sys, json, numpy as np, tensorflow as tf
loaded = tf.saved_model.load(sys.argv[1])
x = tf.constant(np.load(sys.argv[2]))
results = [loaded.signatures["serving_default"](image=x), loaded.signatures["serve"](image=x), loaded.serve(x)]
import keras
results.append(keras.layers.TFSMLayer(sys.argv[1], call_endpoint="serve")(x))
results.append(keras.layers.TFSMLayer(sys.argv[1], call_endpoint="serving_default")(x))
values = [next(iter(r.values())) if isinstance(r, dict) else r for r in results]
with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    meta = tf.compat.v1.saved_model.load(session, ["serve"], sys.argv[1])
    signature = meta.signature_def["serving_default"]
    (fetch,) = [info.name for info in signature.outputs.values()]
    values.append(session.run(fetch, {signature.inputs["image"].name: np.load(sys.argv[2])}))
np.save(sys.argv[3], np.stack([np.asarray(v) for v in values]))
print(json.dumps([name for name in sys.modules if name.startswith("tfquant")]))
"""
    assert python(script, saved, tmp_path / "data.npy", tmp_path / "found.npy") == []
    found = np.load(tmp_path / "found.npy")
    expected = quantized(data).numpy()
    assert found.shape == (6, *expected.shape)
    assert all(np.array_equal(values, expected) for values in found)


def test_saved_model_cli_runs_it(saved, quantized, data, tmp_path):
    np.savez(tmp_path / "in.npz", image=data)
    command = ["run", "--dir", saved, "--tag_set", "serve", "--signature_def", "serving_default"]
    command += ["--inputs", f"image={tmp_path / 'in.npz'}[image]", "--outdir", tmp_path]
    script = "import sys; from tensorflow.python.tools.saved_model_cli import main; sys.exit(main())"
    found = subprocess.run([sys.executable, "-c", script, *map(str, command)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    (file,) = tmp_path.glob("*.npy")
    assert np.array_equal(np.load(file), quantized(data).numpy())


def test_batches_of_any_size(saved, model, quantized, data):
    serve = tf.saved_model.load(str(saved)).serve
    whole = quantized(data).numpy()
    for size in (1, 3, 17, 40):
        found = serve(data[:size]).numpy()
        assert np.array_equal(found, quantized(data[:size]).numpy())
        assert np.abs(found - whole[:size]).max() < 1e-3


def test_an_empty_batch(quantized, saved, data):
    assert quantized(data[:0]).shape == (0, 4)
    loaded = tf.saved_model.load(str(saved)).signatures["serving_default"]
    for size in (0, 3, 0):
        (found,) = loaded(**{quantized.input_names[0]: tf.constant(data[:size])}).values()
        assert np.array_equal(found, quantized(data[:size]))


def test_plan_lies_beside_the_model(saved, quantized):
    plan = tfquant.load_plan(saved / "quant_plan.json")
    assert plan.ops == quantized.plan.ops
    assert {file.name for file in saved.iterdir()} >= {"saved_model.pb", "variables", "quant_plan.json", "quant_plan.npz"}


def test_save_does_not_overwrite(saved, quantized, data, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        quantized.save(target)
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "mine.txt"]
    quantized.save(target, overwrite=True)
    assert not (target / "mine.txt").exists()
    assert np.array_equal(tf.saved_model.load(str(target)).serve(data).numpy(), quantized(data).numpy())
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    quantized.save(target, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_save_makes_parents_and_sets_the_size(quantized, tmp_path):
    quantized.save(tmp_path / "a" / "b" / "c")
    size = sum(file.stat().st_size for file in (tmp_path / "a" / "b" / "c").rglob("*") if file.is_file())
    assert quantized.report.size_after == size
    assert (tmp_path / "a" / "b" / "c").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("kind", ["write", "plan"])
def test_a_failing_save_leaves_nothing(quantized, tmp_path, monkeypatch, kind):
    def fail(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "keep").write_text("x")
    monkeypatch.setattr(f"tfquant.pipeline.{'write_saved_model' if kind == 'write' else 'save_plan'}", fail)
    for name, overwrite in (("new", False), ("old", True)):
        with pytest.raises(OutputError, match="No space left"):
            quantized.save(tmp_path / name, overwrite=overwrite)
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")) == ["old", "old/keep"]


def test_a_saved_result_loads_again_as_a_keras_layer_in_a_model(saved, quantized, data):
    image = keras.Input((12, 12, 3))
    layer = keras.layers.TFSMLayer(str(saved), call_endpoint="serve")
    wrapped = keras.Model(image, layer(image))
    assert np.array_equal(wrapped.predict(data, batch_size=40, verbose=0), quantized(data).numpy())


# Other interfaces


class Two(tf.Module):
    """A network, and something else beside it."""

    def __init__(self):
        super().__init__()
        self.w, self.v = kernel(3, 3, 3, 8), kernel(3, 3, 3, 5, seed=1)
        self.infer = make(self._infer, (None, 8, 8, 3), names=["image"])
        self.embed = make(self._embed, (None, 8, 8, 3), names=["image"])
        self.count = tf.function(
            lambda words: tf.strings.length(words), input_signature=[tf.TensorSpec([None], tf.string, "words")]
        )

    def _infer(self, image):
        return {"scores": tf.reduce_mean(tf.nn.relu(tf.nn.conv2d(image, self.w, 1, "SAME")), [1, 2])}

    def _embed(self, image):
        return {"embedding": tf.reduce_mean(tf.nn.conv2d(image, self.v, 1, "SAME"), [1, 2])}


def save_module(module, path, **signatures):
    tf.saved_model.save(module, str(path), signatures=signatures)
    return path


def test_functions_that_compute_something_else_stay_as_they_were(tmp_path):
    module = Two()
    save_module(module, tmp_path / "in", serving_default=module.infer, embed=module.embed, count=module.count)
    x = np.random.default_rng(0).normal(size=(10, 8, 8, 3)).astype(np.float32)
    result = tfquant.quantize(tmp_path / "in", x, CONFIG)
    assert sorted(name.removeprefix("signature ") for name in result.report.kept_float) == ["count", "count", "embed", "embed"]
    result.save(tmp_path / "out")
    before, after = (tf.saved_model.load(str(tmp_path / name)) for name in ("in", "out"))
    assert sorted(after.signatures) == ["count", "embed", "serving_default"]
    for key in after.signatures:
        assert interface(before.signatures[key]) == interface(after.signatures[key])
    embedding = after.signatures["embed"](image=tf.constant(x))["embedding"].numpy()
    assert np.array_equal(embedding, before.signatures["embed"](image=tf.constant(x))["embedding"].numpy())
    assert np.array_equal(after.embed(x)["embedding"].numpy(), embedding)
    assert after.count(tf.constant(["a", "abc"])).numpy().tolist() == [1, 3]
    one, other = (loaded.infer(x)["scores"].numpy() for loaded in (before, after))
    assert np.array_equal(other, after.signatures["serving_default"](image=tf.constant(x))["scores"].numpy())
    assert 0 < np.abs(one - other).max() < 0.05
    assert np.array_equal(other, result(x)["scores"].numpy())


def test_another_signature_is_quantized_when_asked_for(tmp_path):
    module = Two()
    save_module(module, tmp_path / "in", serving_default=module.infer, embed=module.embed)
    x = np.random.default_rng(0).normal(size=(10, 8, 8, 3)).astype(np.float32)
    result = tfquant.quantize(tmp_path / "in", x, tfquant.QuantConfig(verify=False, signature_keys=("embed",)))
    assert result.plan.signature_keys == ("embed",)
    result.save(tmp_path / "out")
    before, after = (tf.saved_model.load(str(tmp_path / name)) for name in ("in", "out"))
    assert np.array_equal(before.infer(x)["scores"].numpy(), after.infer(x)["scores"].numpy())
    difference = np.abs(before.embed(x)["embedding"].numpy() - after.embed(x)["embedding"].numpy()).max()
    assert 0 < difference < 0.05
    again = tfquant.quantize(tmp_path / "in", plan=tmp_path / "out" / "quant_plan.json")
    assert bytes_of(again) == bytes_of(result)


def test_several_inputs_and_outputs(tmp_path):
    keras.utils.set_random_seed(1)
    left, right = keras.Input((8, 8, 3), name="zeta"), keras.Input((8, 8, 2), name="alpha")
    x = LAYERS.Concatenate()([LAYERS.Conv2D(8, 3, activation="relu")(left), LAYERS.Conv2D(8, 3, activation="relu")(right)])
    x = LAYERS.Conv2D(8, 3, activation="relu")(x)
    pooled = LAYERS.GlobalAveragePooling2D()(x)
    model = keras.Model([left, right], {"map": x, "classes": LAYERS.Dense(3)(pooled), "box": LAYERS.Dense(4)(pooled)})
    rng = np.random.default_rng(0)
    data = {
        "alpha": rng.normal(size=(16, 8, 8, 2)).astype(np.float32),
        "zeta": rng.normal(size=(16, 8, 8, 3)).astype(np.float32),
    }
    result = tfquant.quantize(model, data, CONFIG)
    expected = model([data["zeta"], data["alpha"]])
    found = result([data["zeta"], data["alpha"]])
    assert sorted(found) == ["box", "classes", "map"]
    for key, value in expected.items():
        assert found[key].shape == value.shape
        assert 0 < np.abs(found[key].numpy() - value.numpy()).max() < 0.1 * np.abs(value.numpy()).max()
    result.save(tmp_path / "out")
    model.export(tmp_path / "in", verbose=False)
    before, after = (tf.saved_model.load(str(tmp_path / name)) for name in ("in", "out"))
    for key in ("serve", "serving_default"):
        assert interface(before.signatures[key]) == interface(after.signatures[key])
        loaded = after.signatures[key](**{name: tf.constant(value) for name, value in data.items()})
        assert {name: np.array_equal(value, found[name]) for name, value in loaded.items()} == dict.fromkeys(found, True)
    served = after.serve([data["zeta"], data["alpha"]])
    assert all(np.array_equal(served[key], found[key]) for key in found)


def test_inputs_of_one_shape_are_not_swapped(tmp_path):
    """The order of names differs from the order of arguments."""
    w = kernel(3, 3, 3, 8)
    module = tf.Module()
    module.w = w
    module.f = make(
        lambda b, a: {"y": tf.nn.relu(tf.nn.conv2d(b, w, 1, "SAME")) - tf.nn.conv2d(a, 2 * w, 1, "SAME")},
        (None, 8, 8, 3),
        (None, 8, 8, 3),
        names=["b", "a"],
    )
    save_module(module, tmp_path / "in", serving_default=module.f)
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(6, 8, 8, 3)).astype(np.float32) for _ in range(2))
    result = tfquant.quantize(tmp_path / "in", {"a": a, "b": b}, CONFIG)
    result.save(tmp_path / "out")
    before, after = (tf.saved_model.load(str(tmp_path / name)) for name in ("in", "out"))
    expected = before.f(b, a)["y"].numpy()
    for found in (after.f(b, a), after.signatures["serving_default"](a=tf.constant(a), b=tf.constant(b))):
        assert 0 < np.abs(found["y"].numpy() - expected).max() < 0.05 * np.abs(expected).max()


def test_one_tensor_under_two_output_names_and_an_input_that_is_an_output(tmp_path):
    w = kernel(3, 3, 3, 8)
    module = tf.Module()
    module.w = w

    def function(x):
        y = tf.nn.relu(tf.nn.conv2d(x, w, 1, "SAME"))
        return {"one": y, "other": y, "same": x, "pooled": tf.reduce_max(y, [1, 2])}

    module.f = make(function, (None, 8, 8, 3), names=["x"])
    save_module(module, tmp_path / "in", serving_default=module.f)
    x = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype(np.float32)
    result = tfquant.quantize(tmp_path / "in", x, CONFIG)
    found = {key: value.numpy() for key, value in result(x).items()}
    assert np.array_equal(found["same"], x)
    assert np.array_equal(found["one"], found["other"])
    assert np.array_equal(found["pooled"], found["one"].max((1, 2)))
    assert "_FusedQuantizedConv2D" in ops_of(result)
    result.save(tmp_path / "out")
    loaded = tf.saved_model.load(str(tmp_path / "out")).signatures["serving_default"](x=tf.constant(x))
    assert all(np.array_equal(loaded[key], found[key]) for key in found)


def test_a_fixed_batch_and_an_unused_input(tmp_path):
    w = kernel(3, 3, 3, 8)
    module = tf.Module()
    module.w = w
    function = make(lambda x, unused: {"y": tf.nn.conv2d(x, w, 1, "SAME")}, (4, 8, 8, 3), (4, 1), names=["x", "unused"])
    save_module(module, tmp_path / "in", serving_default=function)
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(9, 8, 8, 3)).astype(np.float32), "unused": np.zeros((9, 1), np.float32)}
    config = tfquant.QuantConfig(verify_batch_sizes=(1, 4))
    result = tfquant.quantize(tmp_path / "in", data, config)
    assert result.plan.settings["samples"] == 8
    assert [entry.batch_size for entry in result.report.latency] == [4]
    result.save(tmp_path / "out")
    before, after = (tf.saved_model.load(str(tmp_path / name)) for name in ("in", "out"))
    assert interface(before.signatures["serving_default"]) == interface(after.signatures["serving_default"])


def test_a_model_with_nothing_to_quantize(tmp_path):
    module = tf.Module()
    module.f = make(lambda x: {"y": tf.nn.softmax(x * 2)}, (None, 5), names=["x"])
    save_module(module, tmp_path / "in", serving_default=module.f)
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    result = tfquant.quantize(tmp_path / "in", x, tfquant.QuantConfig(verify_batch_sizes=()))
    assert result.report.int8_share == 0
    assert np.allclose(result(x)["y"], tf.nn.softmax(x * 2), rtol=1e-6)
    result.save(tmp_path / "out")
    assert tfquant.load_plan(tmp_path / "out").ops == ()


def test_subclassed_model_and_custom_layer(data):
    @keras.saving.register_keras_serializable("tests")
    class Scaled(keras.layers.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.conv = LAYERS.Conv2D(8, 3)

        def call(self, x):
            return keras.ops.relu(self.conv(x)) * 0.5

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.scaled, self.head = Scaled(), LAYERS.Dense(3)

        def call(self, x):
            return self.head(keras.ops.mean(self.scaled(x), (1, 2)))

    keras.utils.set_random_seed(0)
    model = Net()
    expected = model(data).numpy()
    result = tfquant.quantize(model, data, CONFIG)
    assert ops_of(result).count("_FusedQuantizedConv2D") == 1
    assert 0 < np.abs(np.asarray(result(data)) - expected).max() < 0.05 * np.abs(expected).max()


# Errors and the report


def test_errors(model, data, tmp_path):
    with pytest.raises(ConfigError, match="needs data or a plan"):
        tfquant.quantize(model)
    with pytest.raises(ModelError, match=r"Received: builtins\.int"):
        tfquant.quantize(3, data)
    with pytest.raises(ModelError, match="There is no model"):
        tfquant.quantize(tmp_path / "none.keras", data)
    (tmp_path / "bad.keras").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ModelError, match=r"is damaged or not a \.keras file"):
        tfquant.quantize(tmp_path / "bad.keras", data)
    with pytest.raises(ModelError, match=r"no signature 'x'.*Received: serve, serving_default"):
        tfquant.quantize(model, data, tfquant.QuantConfig(signature_keys=["x"]))
    with pytest.raises(DataError, match="wrong shape"):
        tfquant.quantize(model, data[:, :5])
    with pytest.raises(ModelError, match="Keras cannot export"):
        tfquant.quantize(keras.Sequential([LAYERS.Dense(3)]), data)


@pytest.mark.parametrize(
    "options", [{"subset_size": 0}, {"batch_size": 0}, {"estimator": "best"}, {"verify_batch_sizes": (1, 0)}, {"preprocess": "x"}]
)
def test_options_that_cannot_be(model, data, options):
    with pytest.raises(ConfigError, match="Received"):
        tfquant.quantize(model, data, tfquant.QuantConfig(**options))


def test_report_in_numbers(model, data):
    result = tfquant.quantize(model, data, tfquant.QuantConfig(verify_batch_sizes=(2,)))
    report = result.report
    assert isinstance(report, Report)
    stem, depthwise, pointwise, head = 144 * 16 * 27, 144 * 16 * 9, 144 * 16 * 16, 16 * 4
    assert report.total_macs == report.int8_macs == stem + depthwise + pointwise + head
    assert report.float_macs == {}
    counts = {count.op: (count.total, count.int8) for count in report.ops}
    assert counts["Conv2D"] == (2, 2)
    assert counts["DepthwiseConv2dNative"] == (1, 1)
    assert counts["MatMul"] == (1, 1)
    assert counts["Softmax"] == (1, 0)
    assert report.fidelity.samples == 40
    expected, found = model(data).numpy(), result(data).numpy()
    assert report.fidelity.agreement == pytest.approx(100 * (expected.argmax(-1) == found.argmax(-1)).mean())
    noise = ((expected.astype(float) - found) ** 2).sum()
    assert report.fidelity.sqnr == pytest.approx(10 * np.log10((expected.astype(float) ** 2).sum() / noise), abs=0.01)
    assert 0 < report.fidelity.mean_kl < 0.01
    ((entry),) = report.latency
    assert entry.batch_size == 2
    assert entry.speedup == pytest.approx(entry.float32 / entry.int8)
    assert report.size_before == sum(value.nbytes for value in model.get_weights())
    text = str(report)
    assert "Multiply-accumulates in INT8: 100.00% of 120 k per sample" in text
    assert "Latency at batch 2:" in text
    assert str(tfquant.quantize(model, plan=result.plan).report).count("Latency") == 0


def test_data_with_a_plan_is_used_to_verify(model, quantized, data):
    config = tfquant.QuantConfig(verify_batch_sizes=())
    result = tfquant.quantize(model, data, config, plan=quantized.plan)
    assert bytes_of(result) == bytes_of(quantized)
    assert result.report.fidelity.samples == 40
    assert tfquant.quantize(model, plan=quantized.plan).report.fidelity is None
