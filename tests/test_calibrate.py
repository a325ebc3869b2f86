"""Tests of the command line: what it prints, what it writes, and how it refuses."""

import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import corruption
import keras
import numpy as np
import pytest
import tensorflow as tf

LAYERS = keras.layers
ROOT = Path(__file__).resolve().parent.parent

# Starts as `python -m tfquant.calibrate` does, then runs one command after another and writes [code, stdout, stderr] of each.
# What C++ writes to the file descriptors counts too.
DRIVER = """
import json, os, sys, tempfile
from tfquant.quiet import quiet_start
quiet_start()
from absl import app
from absl.testing import flagsaver
from tfquant import calibrate

def run(command):
    held = [tempfile.TemporaryFile() for _ in range(2)]
    saved = [os.dup(1), os.dup(2)]
    for file, number in zip(held, (1, 2)):
        os.dup2(file.fileno(), number)
    try:
        with flagsaver.flagsaver():
            code = calibrate.main(calibrate.parse(["calibrate", *command]))
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        code = f"{type(error).__name__}: {error}"
    sys.stdout.flush(), sys.stderr.flush()
    for number, copy in zip((1, 2), saved):
        os.dup2(copy, number)
        os.close(copy)
    texts = []
    for file in held:
        file.seek(0)
        texts.append(file.read().decode(errors="replace"))
    return [code, *texts]

commands = json.load(open(sys.argv[1]))
results = []
for command in commands:
    results.append(run(command))
    json.dump(results, open(sys.argv[2], "w"))
"""


def environment(folder):
    """Temporary files go to `folder`/tmp, functions are imported from `folder`."""
    (folder / "tmp").mkdir(exist_ok=True)
    path = os.pathsep.join([str(ROOT), str(folder)])
    return {**os.environ, "PYTHONPATH": path, "TMPDIR": str(folder / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}


def run_all(commands, folder):
    """[(code, stdout, stderr)] of commands, all in one process of their own."""
    (folder / "commands.json").write_text(json.dumps([[str(word) for word in command] for command in commands]))
    arguments = [sys.executable, "-c", DRIVER, str(folder / "commands.json"), str(folder / "results.json")]
    found = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=folder, env=environment(folder))
    results = json.loads((folder / "results.json").read_text())
    assert found.returncode == 0, (f"died at {commands[len(results)]}", found.stderr[-2000:])
    for name in ("commands.json", "results.json"):
        (folder / name).unlink()
    return results


def run_one(command, folder, largest_file=None, **variables):
    """(code, stdout, stderr) of a command as a user runs it; a disk may be full for files of more than `largest_file` bytes."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    arguments = [sys.executable, "-m", "tfquant.calibrate", *map(str, command)]
    found = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment(folder) | variables,
        preexec_fn=limit if largest_file is not None else None,
    )
    return found.returncode, found.stdout, found.stderr


def assert_refused(result, *words):
    """Exit code 2, nothing on stdout, one line on stderr that says these words."""
    code, out, err = result
    lines = [line for line in err.splitlines() if line.strip()]
    assert (code, len(lines), out) == (2, 1, ""), (code, err, out)
    assert lines[0].startswith("tfquant.calibrate: ")
    assert len(lines[0]) < 700
    for word in words:
        assert word in lines[0]


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def make_shared(folder):
    """model (a SavedModel), net.keras, net.h5, net.pb (a small GraphDef), data.npz (the input is named image)."""
    keras.utils.set_random_seed(4)
    image = keras.Input((8, 8, 3), name="image")
    x = LAYERS.ReLU(name="relu")(LAYERS.Conv2D(8, 3, padding="same", name="first")(image))
    x = LAYERS.LeakyReLU(name="leaky")(LAYERS.Conv2D(8, 3, name="second")(x))
    x = LAYERS.Conv3D(2, (1, 3, 3), name="odd")(LAYERS.Reshape((1, 6, 6, 8), name="reshape")(x))
    model = keras.Model(image, LAYERS.Dense(3, activation="softmax", name="head")(LAYERS.Flatten(name="flatten")(x)), name="net")
    model.export(folder / "model", verbose=False)
    model.save(folder / "net.keras")
    keras.saving.save_model(model, folder / "net.h5")
    with tf.Graph().as_default() as graph:
        image = tf.compat.v1.placeholder(tf.float32, (None, 8, 8, 3), name="image")
        weights = tf.constant(np.random.default_rng(1).normal(size=(3, 3, 3, 4)).astype(np.float32), name="kernel")
        tf.identity(tf.nn.relu(tf.nn.conv2d(image, weights, 1, "SAME"), name="relu"), name="end")
    (folder / "net.pb").write_bytes(graph.as_graph_def().SerializeToString())
    np.savez(folder / "data.npz", image=np.random.default_rng(0).normal(size=(20, 8, 8, 3)).astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return make_shared(tmp_path_factory.mktemp("shared"))


def make_good(shared, folder):
    command = ["--saved_model", shared / "model", "--data", shared / "data.npz", "--output", folder / "int8"]
    return folder, run_one([*command, "--verify_batch_sizes", "1,2"], folder)


@pytest.fixture(scope="module")
def good(shared, tmp_path_factory):
    """The output of a real run, in a folder of its own, with what it printed."""
    return make_good(shared, tmp_path_factory.mktemp("good"))


# Good runs


def test_the_summary(good, shared):
    folder, (code, out, err) = good
    assert (code, err) == (0, "")
    table = [[cell.strip() for cell in line.split("|")] for line in out.splitlines() if line.count("|") == 3]
    rows = {op: [int(cell) for cell in cells] for op, *cells in table[1:]}
    assert rows["Conv2D"] == [2, 2, 0]
    assert rows["MatMul"] == [1, 1, 0]
    assert rows["Conv3D"] == [1, 0, 1]
    assert rows["LeakyRelu"] == [1, 0, 1]
    first, second, odd, head = 64 * 8 * 27, 36 * 8 * 72, 16 * 2 * 72, 32 * 3
    share = 100 * (first + second + head) / (first + second + odd + head)
    assert f"Multiply-accumulates in INT8: {share:.2f}% of {(first + second + odd + head) / 1000:.3g} k per sample" in out
    assert re.search(r"^  net/odd(_\d)? \(Conv3D\): stock TensorFlow has no INT8 kernel for it$", out, re.MULTILINE)
    found = re.search(r"on 20 calibration samples: agreement ([\d.]+)%, mean KL ([\d.]+) nats, SQNR ([\d.]+) dB", out)
    agreement, divergence, sqnr = map(float, found.groups())
    assert agreement >= 95
    assert divergence < 0.01
    assert sqnr > 25
    before, after = re.search(r"Size: ([\d.]+) kB -> ([\d.]+) kB", out).groups()
    for size, path in ((before, shared / "model"), (after, folder / "int8")):
        total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        assert float(size) == pytest.approx(total / 1000, rel=0.01)
    latencies = re.findall(r"Latency at batch (\d+): ([\d.]+) ms -> ([\d.]+) ms \(([\d.]+)x\)", out)
    assert [size for size, *_ in latencies] == ["1", "2"]
    assert all(float(speedup) == pytest.approx(float(one) / float(other), rel=0.1) for _, one, other, speedup in latencies)
    assert out.splitlines()[-1] == f"Written to {folder / 'int8'}"
    assert sorted(path.name for path in folder.iterdir()) == ["int8", "tmp"]
    assert tree(folder / "tmp") == []


def served(path, shared):
    with np.load(shared / "data.npz") as archive:
        return tf.saved_model.load(str(path)).serve(archive["image"]).numpy()


def test_plan_without_data_and_other_ways_give_the_same(good, shared, tmp_path):
    folder, _ = good
    rest = ["--saved_model", shared / "model", "--output"]
    results = run_all(
        [
            [*rest, tmp_path / "again", "--plan", folder / "int8" / "quant_plan.json"],
            [*rest, tmp_path / "nested" / "data", "--data", shared / "data.npz", "--noverify"],
            ["--saved_model", shared / "net.keras", "--output", tmp_path / "keras", "--data", shared / "data.npz", "--noverify"],
            [*rest, tmp_path / "minmax", "--data", shared / "data.npz", "--noverify", "--estimator=minmax"],
            [*rest, tmp_path / "few", "--data", shared / "data.npz", "--noverify", "--subset_size=5", "--batch_size", "2"],
            [*rest, tmp_path / "served", "--data", shared / "data.npz", "--verify_batch_sizes=", "--signature_keys", "serve"],
        ],
        tmp_path,
    )
    assert [(code, err) for code, _, err in results] == [(0, "")] * 6
    assert ["Latency" in out for _, out, _ in results] == [False] * 6
    assert ["agreement" in out for _, out, _ in results] == [False] * 5 + [True]
    assert (tmp_path / "again" / "quant_plan.json").read_bytes() == (folder / "int8" / "quant_plan.json").read_bytes()
    assert (tmp_path / "again" / "quant_plan.npz").read_bytes() == (folder / "int8" / "quant_plan.npz").read_bytes()
    expected = served(folder / "int8", shared)
    for name in ("again", "nested/data", "keras", "served"):
        assert np.array_equal(served(tmp_path / name, shared), expected)
    assert not np.array_equal(served(tmp_path / "minmax", shared), expected)
    settings = {name: json.loads((tmp_path / name / "quant_plan.json").read_text())["settings"] for name in ("minmax", "few")}
    found = {name: (options["estimator"], options["samples"]) for name, options in settings.items()}
    assert found == {"minmax": ("minmax", 20), "few": ("mse", 5)}
    assert tree(tmp_path / "tmp") == []


def test_an_existing_output(good, shared, tmp_path):
    folder, _ = good
    rest = ["--saved_model", shared / "model", "--plan", folder / "int8", "--output"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("file")
    results = run_all(
        [
            [*rest, tmp_path / "out"],
            [*rest, tmp_path / "file"],
            [*rest, tmp_path / "file", "--overwrite"],
            ["--saved_model", shared / "nothing", "--plan", folder / "int8", "--output", tmp_path / "out", "--overwrite"],
        ],
        tmp_path,
    )
    assert_refused(results[0], "out exists already", "--overwrite")
    assert_refused(results[1], "file exists already")
    assert_refused(results[2], "file is a file: name a folder")
    assert_refused(results[3], "There is no model")
    assert tree(tmp_path) == ["file", "out", "out/mine.txt", "tmp"]
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    ((code, _, err),) = run_all([[*rest, tmp_path / "out", "--overwrite"]], tmp_path)
    assert (code, err) == (0, "")
    assert "out/saved_model.pb" in tree(tmp_path)
    assert "out/mine.txt" not in tree(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out", "tmp"]


def test_help(tmp_path):
    code, out, err = run_one(["--help"], tmp_path)
    assert (code, err) == (0, "")
    for flag in (
        "saved_model",
        "data",
        "plan",
        "output",
        "overwrite",
        "signature_keys",
        "input_dtype",
        "preprocess",
        "subset_size",
        "batch_size",
    ):
        assert f"  --{flag}: " in out
    assert "absl" not in out


# Bad input

FEEDS = """
import os, sys
import numpy as np

RNG = np.random.default_rng(0)
number = 3

def sample():
    return RNG.normal(size=(8, 8, 3)).astype("f4")

def fails():
    yield sample()
    raise RuntimeError("first\\nsecond")

def fails_late():
    for _ in range(15):
        yield sample()
    raise OSError(5, "Input/output error", "disk")

def exits():
    yield sample()
    sys.exit("enough")

def exits_well():
    yield sample()
    sys.exit(0)

def nothing():
    return iter(())

def returns_none():
    return None

def yields_none():
    yield None

def yields_text():
    yield "image"

def yields_ragged():
    yield [[1.0, 2.0], [3.0]]

def with_labels():
    for index in range(8):
        yield sample(), np.int64(index)

def as_pair():
    yield [sample()[None], np.array([1])]

def other_name():
    yield {"picture": sample()}

def one_too_many():
    yield {"image": sample(), "label": 1}

def wrong_shape():
    yield np.zeros((4, 8, 3), "f4")

def changes_shape():
    yield sample()
    yield sample()[:5]

def not_finite():
    yield sample()
    yield np.full((8, 8, 3), np.inf, "f4")

def same():
    one = sample()
    for _ in range(12):
        yield one

def needs_more(path):
    yield sample()

async def waits():
    return [sample()]

class Strange(Exception):
    def __str__(self):
        raise ValueError("no text")

def fails_strangely():
    yield sample()
    raise Strange
"""


def images_of(shared):
    with np.load(shared / "data.npz") as archive:
        return archive["image"]


def cut(path, share=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def saved(path, function, *specs, **attributes):
    """A SavedModel of one function of float32 tensors `image`."""
    module = tf.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    signature = tf.function(function, input_signature=specs)
    tf.saved_model.save(module, str(path), signatures={"serving_default": signature})
    return path


def kernel(*shape):
    return tf.constant(np.random.default_rng(1).normal(size=shape).astype(np.float32))


def flag_cases(shared, folder):
    model, data = shared / "model", shared / "data.npz"
    rest = ["--saved_model", model, "--data", data]
    job = folder / "job.yaml"
    job.write_text(f"saved_model: {model}\ndata: {data}\nplan: {folder / 'x.json'}\n")
    return {
        "no model at all": (["--data", data], "--saved_model is missing"),
        "unknown flag": ([*rest, "--fast"], "Unknown command line flag 'fast'"),
        "flag of an old name": ([*rest, "--signature_key=x"], "signature_key", "signature_keys"),
        "stray word": ([*rest, "more"], "Every argument is a --flag. Received: more"),
        "flag without a value": (["--saved_model", model, "--data"], "--data"),
        "no number": ([*rest, "--subset_size=many"], "subset_size", "many"),
        "no samples wanted": ([*rest, "--subset_size=0"], "subset_size"),
        "negative batch": ([*rest, "--batch_size=-3"], "batch_size"),
        "broken number": ([*rest, "--batch_size=1.5"], "batch_size", "1.5"),
        "unknown estimator": ([*rest, "--estimator=best"], "best", "minmax"),
        "unknown preprocess": ([*rest, "--preprocess=best"], "best", "torch"),
        "unknown format": ([*rest, "--format=tflite"], "tflite", "saved_model"),
        "unknown mode": ([*rest, "--mode=qat"], "qat", "weight_only"),
        "dynamic mode with data and plan": ([*rest, "--mode=dynamic", "--plan", folder / "x"], "Received: both"),
        "unknown activation mode": ([*rest, "--activation_mode=none"], "none", "asymmetric"),
        "unknown weights": ([*rest, "--weights=per_group"], "per_group", "per_channel"),
        "unknown isa": ([*rest, "--isa=avx"], "avx", "no_vnni"),
        "no truth value": ([*rest, "--verify=maybe"], "maybe"),
        "bad sizes": ([*rest, "--verify_batch_sizes=1,x"], "1,x"),
        "size 0": ([*rest, "--verify_batch_sizes=0"], "verify_batch_sizes"),
        "data and plan": ([*rest, "--plan", folder / "x"], "Received: both"),
        "data and plan in a job file": (["--config", job], "Received: both"),
        "neither data nor plan": (["--saved_model", model], "Received: neither"),
        "inputs of a SavedModel": ([*rest, "--inputs=image"], "inputs and outputs are for frozen GraphDefs"),
        "outputs of a Keras file": (["--saved_model", shared / "net.keras", "--data", data, "--outputs=x"], "frozen GraphDefs"),
        "no signature keys": ([*rest, "--signature_keys="], "signature_keys must not be empty"),
        "signature twice": ([*rest, "--signature_keys=serve,serve"], "signature_keys", "'serve' twice"),
        "preprocess without images": ([*rest, "--preprocess=tf"], "preprocess is for folders"),
        "ignored scope names nothing": ([*rest, "--ignored_scope=net/secund"], "the nearest are", "second", "'net/secund'"),
        "ignored type that is none": ([*rest, "--ignored_scope=type:Conv2d"], "nearest are Conv2D", "'type:Conv2d'"),
        "ignored pattern is broken": ([*rest, "--ignored_scope=re:net/(a"], "no regular expression", "position 4"),
        "ignored pattern fits nothing": ([*rest, "--ignored_scope=re:conv[0-9]+"], "ignored_scope", "'re:conv[0-9]+'"),
        "ignored scope is empty": ([*rest, "--ignored_scope="], "ignored_scope", "not empty"),
    }


def model_cases(shared, folder):
    model, data = shared / "model", shared / "data.npz"
    index, values = "variables/variables.index", "variables/variables.data-00000-of-00001"
    spec = tf.TensorSpec((None, 8, 8, 3), tf.float32, name="image")
    rest = ["--data", data]

    def broken(name, change):
        shutil.copytree(model, folder / name)
        change(folder / name)
        return ["--saved_model", folder / name, *rest]

    def copied(name, share):
        path = folder / f"cut_{name}"
        shutil.copyfile(shared / name, path)
        cut(path, share)
        return ["--saved_model", path, *rest]

    def text(name):
        (folder / name).write_text("nothing of the sort")
        return ["--saved_model", folder / name, *rest]

    def graph_def(name, change=lambda proto: None):
        proto = tf.compat.v1.GraphDef.FromString((shared / "net.pb").read_bytes())
        change(proto)
        (folder / name).write_bytes(proto.SerializeToString())
        return ["--saved_model", folder / name, *rest]

    def unknown_op(proto):
        next(node for node in proto.node if node.op == "Relu").op = "Relux"

    def second_end(proto):
        node = proto.node.add()
        node.CopyFrom(next(node for node in proto.node if node.op == "Relu"))
        node.name = "relu2"

    def no_such_tensor(proto):
        next(node for node in proto.node if node.op == "Relu").input[0] = "gone"

    def unfrozen(proto):
        node = next(node for node in proto.node if node.op == "Const" and node.name == "kernel")
        node.op = "VariableV2"
        node.attr["shape"].shape.CopyFrom(node.attr["value"].tensor.tensor_shape)
        del node.attr["value"]

    @keras.saving.register_keras_serializable("mine")
    class Doubled(LAYERS.Layer):
        def call(self, x):
            return x * 2

    def layers(layer, name):
        image = keras.Input((8, 8, 3), name="image")
        keras.Model(image, LAYERS.Dense(2)(LAYERS.Flatten()(layer(image)))).save(folder / name)
        return ["--saved_model", folder / name, *rest]

    def reads_file(image):
        size = tf.strings.length(tf.io.read_file("/etc/hostname"))
        return {"y": tf.reduce_sum(image, [1, 2]) + tf.cast(size, tf.float32)}

    def calls_python(image):
        result = tf.py_function(lambda x: x * 2, [image], tf.float32)
        return {"y": tf.reduce_sum(tf.ensure_shape(result, (None, 8, 8, 3)), [1, 2])}

    def sevenths(image):
        return {"y": tf.linalg.matmul(tf.reshape(image, (7, -1, 192)), kernel(7, 192, 2))}

    os.symlink(folder / "round", folder / "round")
    (folder / "empty").mkdir()
    (folder / "pb_is_folder" / "saved_model.pb").mkdir(parents=True)
    (folder / "versions" / "7" / "variables").mkdir(parents=True)
    lambdas = LAYERS.Lambda(lambda x: x + 1)
    cases = {
        "missing model": (["--saved_model", folder / "none", *rest], "There is no model at"),
        "missing Keras file": (["--saved_model", folder / "none.keras", *rest], "There is no model at"),
        "missing GraphDef": (["--saved_model", folder / "none.pb", *rest], "There is no model at"),
        "links in a circle for a model": (["--saved_model", folder / "round", *rest], "round"),
        "model of a name too long": (["--saved_model", folder / ("n" * 300), *rest], "nnn"),
        "text file for a model": (text("notes.txt"), "is not a SavedModel"),
        "text as .keras": (text("notes.keras"), "not a .keras file"),
        "text as .h5": (text("notes.h5"), "not an HDF5 file"),
        "text as .pb": (text("notes.pb"), "GraphDef"),
        "text as .pbtxt": (text("notes.pbtxt"), "GraphDef"),
        "empty folder for a model": (["--saved_model", folder / "empty", *rest], "holds no saved_model.pb"),
        "folder of versions without a model": (["--saved_model", folder / "versions", *rest], "holds no saved_model.pb"),
        "saved_model.pb is a folder": (["--saved_model", folder / "pb_is_folder", *rest], "holds no saved_model.pb"),
        "empty saved_model.pb": (broken("no_pb", lambda path: (path / "saved_model.pb").write_bytes(b"")), "corrupt or empty"),
        "cut saved_model.pb": (broken("cut_pb", lambda path: cut(path / "saved_model.pb")), "corrupt"),
        "no variables": (broken("no_variables", lambda path: shutil.rmtree(path / "variables")), "TensorFlow cannot load"),
        "cut variables": (broken("cut_values", lambda path: cut(path / values)), "TensorFlow cannot"),
        "cut index": (broken("cut_index", lambda path: cut(path / index)), "TensorFlow cannot"),
        "cut .keras": (copied("net.keras", 0.6), "damaged or not a .keras file"),
        "cut .h5": (copied("net.h5", 0.6), "damaged or not an HDF5 file"),
        "cut .pb": (copied("net.pb", 0.6), "GraphDef"),
        "unknown signature": (
            ["--saved_model", model, *rest, "--signature_keys=x"],
            "no signature 'x'",
            "serve, serving_default",
        ),
        "wrong tags": (["--saved_model", model, *rest, "--tags=train,gpu"], "no graph with the tags train,gpu", "serve"),
        "GraphDef with two ends": (graph_def("ends.pb", second_end), "2 nodes that nothing reads", "end, relu2"),
        "GraphDef without such an input": ([*graph_def("in.pb"), "--inputs=picture", "--outputs=end"], "no node 'picture'"),
        "GraphDef without such an output": ([*graph_def("out.pb"), "--outputs=edn"], "no node 'edn'", "nearest names are: end"),
        "GraphDef whose input is computed": (
            [*graph_def("mid.pb"), "--inputs=image,relu", "--outputs=end"],
            "must be a placeholder",
        ),
        "GraphDef whose placeholder is no input": (
            [*graph_def("other.pb"), "--inputs=relu", "--outputs=end"],
            "the placeholder 'image' is no input",
        ),
        "GraphDef with an output index too high": ([*graph_def("high.pb"), "--outputs=end:5"], "end"),
        "GraphDef with variables": (graph_def("unfrozen.pb", unfrozen), "'kernel' is a variable"),
        "GraphDef with a missing node": ([*graph_def("gone.pb", no_such_tensor), "--outputs=end"], "'gone' is read but missing"),
        "GraphDef with an unknown op": (graph_def("unknown.pb", unknown_op), "Relux"),
        ".keras with an unknown layer": (layers(Doubled(), "custom.keras"), "Keras cannot load", "Doubled"),
        ".h5 with an unknown layer": (layers(Doubled(), "custom.h5"), "Doubled"),
        ".keras with a Lambda layer": (layers(lambdas, "lambda.keras"), "Lambda", "--allow_unsafe_ops"),
        ".h5 with a Lambda layer": (layers(lambdas, "lambda.h5"), "Lambda", "--allow_unsafe_ops"),
        "model that reads a file": (
            ["--saved_model", saved(folder / "reads", reads_file, spec), *rest],
            "ReadFile",
            "--allow_unsafe_ops",
        ),
        "model that calls Python": (
            ["--saved_model", saved(folder / "python", calls_python, spec), *rest],
            "EagerPyFunc",
            "--allow_unsafe_ops",
        ),
        "model that calls Python that is gone": (
            ["--saved_model", folder / "python", *rest, "--allow_unsafe_ops"],
            "cannot run the float model",
            "callback",
        ),
        "model without inputs": (
            ["--saved_model", saved(folder / "fed", lambda: {"y": tf.ones((1, 3))}), *rest],
            "model with none",
        ),
        "model that fails on its data": (
            ["--saved_model", saved(folder / "float", sevenths, spec), *rest],
            "cannot run the float model",
        ),
    }
    return cases


def data_cases(shared, folder):
    images = images_of(shared)
    model = ["--saved_model", shared / "model", "--data"]
    (folder / "feeds.py").write_text(FEEDS)
    (folder / "exits.py").write_text("raise SystemExit('no')\n")
    (folder / "raises.py").write_text("raise ValueError('at import')\n")
    (folder / "unfinished.py").write_text("def f(:\n")
    (folder / "text.npz").write_text("nothing")
    (folder / "text.npy").write_text("nothing")
    (folder / "data.csv").write_text("1,2,3\n")
    (folder / "empty.npz").write_bytes(b"")
    (folder / "cut.npz").write_bytes((shared / "data.npz").read_bytes()[:3000])
    (folder / "no_images").mkdir()
    (folder / "no_images" / "readme.txt").write_text("none")

    def npz(name, **arrays):
        np.savez(folder / f"{name}.npz", **arrays)
        return [*model, folder / f"{name}.npz"]

    def npy(name, array):
        np.save(folder / f"{name}.npy", array)
        return [*model, folder / f"{name}.npy"]

    def feed(name):
        return [*model, f"feeds:{name}"]

    def pictures(name, suffix, change):
        path = folder / name
        path.mkdir()
        picture = np.random.default_rng(2).integers(0, 256, (12, 10, 3)).astype(np.uint8)
        for index in range(3):
            (path / f"{index}.{suffix}").write_bytes(corruption.image(picture + index, suffix))
        (path / f"1.{suffix}").write_bytes(change((path / f"1.{suffix}").read_bytes()))
        return [*model, path]

    bad = images.copy()
    bad[3, 2, 1, 0] = np.nan
    infinite = images.copy()
    infinite[5, 0, 0, 0] = -np.inf
    version_3 = io.BytesIO()
    np.lib.format.write_array(version_3, images, version=(3, 0))
    (folder / "version_3.npz").write_bytes(b"")
    with zipfile.ZipFile(folder / "version_3.npz", "w") as archive:
        archive.writestr("image.npy", version_3.getvalue())
    named = np.zeros(20, [("größe", "f4"), ("x", "f4")])

    @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 3), tf.float32, name="image")])
    def explodes(image):
        x = tf.nn.conv2d(image, kernel(3, 3, 3, 4), 1, "SAME", name="before")
        return {"y": tf.nn.conv2d(tf.exp(tf.abs(x) * 50, name="explosion"), kernel(3, 3, 4, 2), 1, "SAME", name="after")}

    tf.saved_model.save(tf.Module(), str(folder / "explodes"), signatures=explodes)
    image = keras.Input((8, 8, 3), name="image")
    norm = LAYERS.BatchNormalization(name="norm")
    scaled = keras.Model(image, LAYERS.Conv2D(4, 3)(LAYERS.ReLU()(norm(image))), name="scaled")
    norm.moving_mean.assign([0.1, 0.2, 0.0])
    norm.moving_variance.assign([0.3, 0.2, 0.25])
    scaled.export(folder / "scaled", verbose=False)
    bytes_of = np.random.default_rng(3).integers(0, 256, images.shape).astype(np.float32)
    eight = tf.TensorSpec((8, 8, 8, 3), tf.float32, name="image")
    saved(folder / "fixed", lambda image: {"y": tf.nn.conv2d(image, kernel(3, 3, 3, 4), 1, "SAME")}, eight)
    data = shared / "data.npz"
    cases = {
        "missing data": ([*model, folder / "none.npz"], "do not exist", "none.npz"),
        "no data but an empty name": ([*model, ""], "Received: neither"),
        "data of an unknown kind": ([*model, folder / "data.csv"], "an .npz, an .npy or a folder of images", "data.csv"),
        "wrong input name": (npz("name", picture=images, label=images), "'picture'", "'image'"),
        "one input too many": (npz("more", image=images, label=images), "'label'"),
        "wrong shape": (npz("shape", image=images[:, :7]), "wrong shape", "7, 8, 3"),
        "wrong rank": (npz("rank", image=images[0]), "wrong shape"),
        "wrong dtype": (npz("dtype", image=images.astype(complex)), "complex"),
        "text for numbers": (npz("str", image=np.full(images.shape, "a")), "'image'", "convert it to float32"),
        "NaN": (npz("nan", image=bad), "NaN", "sample 3"),
        "infinity": (npz("inf", image=infinite), "infinity", "sample 5"),
        "too large for float32": (npz("large", image=images.astype(np.float64) * 1e300), "infinity (as float32)"),
        "no samples": (npz("no", image=images[:0]), "no samples"),
        "samples of no elements": (npz("hollow", image=images[:, :0]), "wrong shape"),
        "no arrays": (npz("none_in"), "'image'"),
        "wrong name for the only input": (npz("only", picture=images), "'picture'", "'image'"),
        "pickled objects": (npz("pickled", image=np.array([{"a": 1}, None], object)), "pickled Python objects"),
        "Fortran order": (npz("fortran", image=np.asfortranarray(images)), "Fortran order"),
        "text file as .npz": ([*model, folder / "text.npz"], "text.npz", "not readable, corrupt or truncated"),
        "empty file as .npz": ([*model, folder / "empty.npz"], "empty.npz"),
        "cut .npz": ([*model, folder / "cut.npz"], "cut.npz"),
        ".npz of format 3": ([*model, folder / "version_3.npz"], "npy format version (3, 0)"),
        "text file as .npy": ([*model, folder / "text.npy"], "text.npy"),
        "pickled .npy": (npy("pickled", np.array([{"a": 1}, None], object)), "pickled.npy"),
        ".npy with names in it": (npy("named", named), "named.npy"),
        "NaN in .npy": (npy("nan", bad), "NaN", "sample 3"),
        "folder without images": ([*model, folder / "no_images"], "no images"),
        "broken jpg": (pictures("jpg_broken", "jpg", lambda content: content[:200]), "1.jpg"),
        "broken png": (pictures("png_broken", "png", lambda content: content[:-40]), "1.png"),
        "broken bmp": (pictures("bmp_broken", "bmp", lambda content: content[:100]), "1.bmp"),
        "empty image": (pictures("png_empty", "png", lambda content: b""), "1.png"),
        "text as image": (pictures("png_text", "png", lambda content: b"no image"), "1.png"),
        "image of no pixels": (pictures("bmp_hollow", "bmp", lambda content: content[:18] + bytes(8) + content[26:]), "1.bmp"),
        "missing module": ([*model, "no_such_module:f"], "no_such_module"),
        "module with a syntax error": ([*model, "unfinished:f"], "unfinished", "SyntaxError"),
        "module that raises": ([*model, "raises:f"], "ValueError: at import"),
        "module that exits": ([*model, "exits:f"], "SystemExit: no"),
        "missing function": (feed("other"), "has no 'other'"),
        "function that is a number": (feed("number"), "Received: int"),
        "function that needs an argument": (feed("needs_more"), "path"),
        "coroutine": (feed("waits"), "coroutine"),
        "failing function": (feed("fails"), "RuntimeError: first second"),
        "function that fails late": (feed("fails_late"), "OSError", "Input/output error"),
        "function that fails without words": (feed("fails_strangely"), "Strange"),
        "function that exits": (feed("exits"), "enough"),
        "function that exits with 0": (feed("exits_well"), "exit"),
        "function without samples": (feed("nothing"), "no samples"),
        "function that returns None": (feed("returns_none"), "NoneType"),
        "function that yields None": (feed("yields_none"), "'image'"),
        "function that yields text": (feed("yields_text"), "'image'"),
        "function that yields ragged lists": (feed("yields_ragged"), "image"),
        "function that yields labels": (feed("with_labels"), "drop labels"),
        "function that yields a pair": (feed("as_pair"), "drop labels"),
        "function that yields another name": (feed("other_name"), "'picture'"),
        "function that yields one too many": (feed("one_too_many"), "'label'"),
        "function that yields a wrong shape": (feed("wrong_shape"), "wrong shape"),
        "function that changes the shape": (feed("changes_shape"), "wrong shape", "item 1"),
        "function that yields infinity": (feed("not_finite"), "infinity", "sample 1"),
        "identical samples": (feed("same"), "identical", "12 times"),
        "one number everywhere": (npz("constant", image=np.ones_like(images)), "same number everywhere", "'image': 1"),
        "data of another scale": (
            ["--saved_model", folder / "scaled", "--data", *npz("bytes", image=bytes_of)[-1:]],
            "At scaled/norm, the first BatchNorm",
            "--preprocess",
        ),
        "data that explode": (
            ["--saved_model", folder / "explodes", "--data", data],
            "NaN or infinity",
            "first at explosion (Exp)",
        ),
        "fewer samples than the fixed batch": (
            ["--saved_model", folder / "fixed", "--data", data, "--subset_size=5"],
            "at least 8",
            "Received: 5",
        ),
        "too few samples for the fixed batch": (
            ["--saved_model", folder / "fixed", "--data", *npz("five", image=images[:5])[-1:]],
            "exactly 8",
            "5 samples",
        ),
    }
    return cases


def plan_cases(shared, folder, plan):
    content = json.loads((plan / "quant_plan.json").read_text())
    with np.load(plan / "quant_plan.npz") as archive:
        scales = dict(archive)
    first, second = list(content["tensors"])[:2]

    def plan_of(name, change=lambda content: None, arrays=scales):
        path = folder / name
        path.mkdir()
        copy = json.loads(json.dumps(content))
        text = change(copy)
        (path / "quant_plan.json").write_text(text if isinstance(text, str) else json.dumps(copy))
        if arrays is not None:
            np.savez(path / "quant_plan.npz", **arrays)
        return ["--saved_model", shared / "model", "--plan", path / "quant_plan.json"]

    def put(value, *keys):
        def change(content):
            for key in keys[:-1]:
                content = content[key]
            content[keys[-1]] = value

        return change

    def drop(*keys):
        def change(content):
            for key in keys[:-1]:
                content = content[key]
            del content[keys[-1]]

        return change

    def damaged(name, change):
        words = plan_of(name)
        path = folder / name / "quant_plan.npz"
        path.write_bytes(change(path.read_bytes()))
        return words

    key = next(iter(scales))
    image = keras.Input((8, 8, 3), name="image")
    keras.utils.set_random_seed(9)
    other = keras.Model(image, LAYERS.Conv2D(8, 3, name="else")(image), name="other")
    other.export(folder / "other", verbose=False)
    again = keras.models.load_model(shared / "net.keras")
    again.get_layer("second").kernel.assign_add(np.full((3, 3, 8, 8), 0.01))
    again.export(folder / "again", verbose=False)
    good = plan / "quant_plan.json"

    def reversed_range(content):
        content["tensors"][first].update(min=1.0, max=-1.0)

    def without_0(content):
        content["tensors"][first].update(min=1, max=2)

    (folder / "no_plan").mkdir()
    cases = {
        "missing plan": (["--saved_model", shared / "model", "--plan", folder / "none.json"], "There is no plan at"),
        "folder without a plan": (["--saved_model", shared / "model", "--plan", folder / "no_plan"], "There is no plan at"),
        "plan that is no JSON": (plan_of("p_json", lambda content: '{"format": '), "not a readable plan"),
        "plan that is binary": (["--saved_model", shared / "model", "--plan", plan / "quant_plan.npz"], "not a readable plan"),
        "plan that is a list": (plan_of("p_list", lambda content: "[]"), "Received: 'list'"),
        "plan that nests deeply": (plan_of("p_deep", lambda content: "[" * 100000), "not a readable plan"),
        "plan of another version": (plan_of("p_version", put("tfquant.plan/9", "format")), "Received: 'tfquant.plan/9'"),
        "plan without ops": (plan_of("p_ops", drop("ops")), "damaged", "ops"),
        "plan whose ops are text": (plan_of("p_ops_text", put("none", "ops")), "damaged"),
        "plan whose tensors are a list": (plan_of("p_tensors", put([], "tensors")), "damaged"),
        "plan without a range": (plan_of("p_range", drop("tensors", first)), f"no range for {first}"),
        "plan for another target": (plan_of("p_target", put("tpu", "target")), "'tpu'"),
        "plan without signatures": (plan_of("p_keys", put([], "signature_keys")), "signature_keys"),
        "plan of another signature": (plan_of("p_key", put(["x"], "signature_keys")), "no signature 'x'"),
        "plan with a signature that is a number": (plan_of("p_key_3", put([3], "signature_keys")), "signature_keys"),
        "plan whose signature is empty": (plan_of("p_key_0", put([""], "signature_keys")), "signature_keys"),
        "range the wrong way round": (plan_of("p_reversed", reversed_range), first, "1.0..-1.0"),
        "range without 0": (plan_of("p_zero", without_0), first, "hold 0"),
        "range of NaN": (plan_of("p_nan", put(float("nan"), "tensors", first, "min")), first, "nan"),
        "range of infinity": (plan_of("p_inf", put(float("inf"), "tensors", first, "max")), first, "inf"),
        "range that is text": (plan_of("p_text", put("wide", "tensors", first, "max")), "damaged"),
        "range that is null": (plan_of("p_null", put(None, "tensors", first, "max")), "damaged"),
        "unknown dtype": (plan_of("p_dtype", put("int4", "tensors", first, "dtype")), "'int4'"),
        "zero point that is text": (plan_of("p_zp", put("0", "tensors", first, "zero_point")), "zero_point"),
        "group with two ranges": (
            plan_of("p_group", put(content["tensors"][first]["group"], "tensors", second, "group")),
            "the range of its group",
            first,
        ),
        "op that is no truth value": (plan_of("p_int8", put("yes", "ops", 0, "int8")), "'int8' must be a bool"),
        "settings that are a number": (plan_of("p_settings", put(3, "settings")), "damaged"),
        "plan without its .npz": (plan_of("p_no_npz", arrays=None), "must lie beside its .json"),
        "damaged .npz of a plan": (damaged("p_cut", lambda content: content[:100]), "not a readable .npz"),
        "text as .npz of a plan": (damaged("p_txt", lambda content: b"nothing"), "not a readable .npz"),
        "NaN in the .npz of a plan": (
            plan_of("p_npz_nan", arrays={**scales, key: scales[key] * np.float32("nan")}),
            "must be positive float32",
        ),
        "negative scales": (plan_of("p_negative", arrays={**scales, key: -scales[key]}), "must be positive float32"),
        "scales of another dtype": (plan_of("p_f64", arrays={**scales, key: scales[key].astype(float)}), "float32"),
        "scales too few": (plan_of("p_few", arrays={**scales, key: scales[key][:-1]}), "needs 8 weight scales", "(7,)"),
        "scales missing": (
            plan_of("p_gone", arrays={name: scales[name] for name in scales if name != key}),
            "needs 8 weight scales",
        ),
        "no scales": (plan_of("p_none", arrays={}), "Received: none"),
        "static plan in mode dynamic": (
            ["--saved_model", shared / "model", "--plan", good, "--mode=dynamic"],
            "The plan is of mode static",
            "Received: dynamic",
        ),
        "static plan in mode weight_only": (
            ["--saved_model", shared / "model", "--plan", good, "--mode=weight_only"],
            "The plan is of mode static",
            "Received: weight_only",
        ),
        "plan of a mode that has another target": (plan_of("p_weights", put("weight_only", "mode")), "'weight_only'", "'onednn'"),
        "plan of an unknown mode": (plan_of("p_mode", put("fast", "mode")), "'mode' must be one of static, dynamic", "'fast'"),
        "static plan with a dynamic range": (
            plan_of("p_dynamic", put({"dtype": "quint8", "range": "dynamic", "zero_point": None}, "tensors", first)),
            first,
            "in mode dynamic alone",
        ),
        "dynamic range of a wrong type": (
            plan_of("p_dynamic_s32", put({"dtype": "qint32", "range": "dynamic", "zero_point": 0}, "tensors", first)),
            first,
            "'qint32'",
        ),
        "plan of another model": (["--saved_model", folder / "other", "--plan", good], "belongs to another model"),
        "plan of other weights": (["--saved_model", folder / "again", "--plan", good], "second", "has other weights"),
    }
    return cases


def job_cases(shared, folder):
    def job(name, text):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--config", folder / name]

    paths = f"saved_model: {shared / 'model'}\ndata: {shared / 'data.npz'}\n"
    return {
        "missing job file": (["--config", folder / "none.yaml"], "There is no job file at"),
        "folder for a job file": (["--config", folder], "A job file is a YAML file"),
        "empty job file": (job("empty.yaml", ""), "empty.yaml:1", "Received: nothing"),
        "job file that is no YAML": (job("bad.yaml", f"{paths}quantization: [\n"), "bad.yaml:", "no YAML"),
        "job file with tabs": (job("tabs.yaml", f"{paths}quantization:\n\testimator: mse\n"), "tabs.yaml:4", "spaces"),
        "job file that is binary": (job("binary.yaml", b"\xff\xfe\x00\x01"), "binary.yaml:1"),
        "job file with an unknown option": (job("key.yaml", f"{paths}speed: 3\n"), "key.yaml:3", "'speed'"),
        "job file with an option elsewhere": (job("place.yaml", f"{paths}estimator: mse\n"), "belongs under quantization"),
        "job file with an unknown value": (
            job("value.yaml", f"{paths}quantization:\n  estimator: best\n"),
            "value.yaml:4",
            "'best'",
        ),
        "job file with text for a number": (
            job("type.yaml", f"{paths}quantization:\n  subset_size: many\n"),
            "type.yaml:4",
            "whole number",
            "'many'",
        ),
        "job file with 0 samples": (job("zero.yaml", f"{paths}quantization:\n  subset_size: 0\n"), "zero.yaml:4", "at least 1"),
        "job file with a list for a path": (job("list.yaml", "saved_model: [a, b]\n"), "list.yaml:1", "must be a string"),
        "job file with an option twice": (job("twice.yaml", f"{paths}data: x\n"), "twice.yaml:3", "after line 2"),
        "job file with a broken pattern": (
            job("re.yaml", f"{paths}quantization:\n  ignored_scope: ['re:(']\n"),
            "re.yaml:4",
            "no regular expression",
        ),
        "job file with Python in it": (job("python.yaml", "saved_model: !!python/object/apply:os.getcwd []\n"), "python.yaml:1"),
        "job file with a NUL in a path": (
            job("nul.yaml", f'saved_model: "a\\0b"\ndata: {shared / "data.npz"}\n'),
            "There is no model at",
        ),
        "job file with a NUL in the data": (
            job("nul2.yaml", f'saved_model: {shared / "model"}\ndata: "a\\0b"\n'),
            "do not exist",
        ),
    }


def output_cases(shared, folder):
    """These name an output of their own."""
    (folder / "file").write_text("x")
    (folder / "taken").mkdir()
    (folder / "taken" / "mine.txt").write_text("mine")
    os.symlink(folder / "nowhere", folder / "dangling")
    os.symlink(folder / "ring", folder / "ring")
    corruption.vocabulary_model(folder / "words")
    np.savez(folder / "words.npz", words=np.array([["red", "green"], ["blue", "red"]]))
    rest = ["--saved_model", shared / "model", "--data", shared / "data.npz", "--noverify", "--output"]
    return {
        "no output": (rest[:-1], "--output is missing"),
        "output of no name": ([*rest, ""], "--output is missing"),
        "output exists": ([*rest, "taken"], "taken exists already", "--overwrite"),
        "output is a file": ([*rest, "file"], "file exists already"),
        "output is a file to replace": ([*rest, "file", "--overwrite"], "file is a file: name a folder"),
        "output is a link to nothing": ([*rest, "dangling"], "dangling exists already"),
        "output below a file": ([*rest, "file/int8"], "Cannot write"),
        "output deep below a file": ([*rest, "file/a/b"], "Cannot write"),
        "output below a ring of links": ([*rest, "ring/int8"], "Cannot write"),
        "output where nothing can be written": ([*rest, "/proc/int8"], "Cannot write"),
        "output of a name too long": ([*rest, "n" * 300], "nnn", "too long"),
        "output of a name just too long": ([*rest, "n" * 250], "Cannot write", "too long"),
        "output is the folder itself": ([*rest, ".", "--overwrite"], "Cannot write"),
        "output is the root": ([*rest, "/", "--overwrite"], "would replace"),
        "GraphDef of a model with a table": (
            ["--saved_model", "words", "--data", "words.npz", "--noverify", "--format=graphdef", "--output", "out"],
            "A GraphDef cannot hold tables",
        ),
    }


# Python that fails to open one file to write, as on a disk that became full.
FULL_DISK = """
import errno, io, os
real = io.open

def opened(file, mode="r", *rest, **options):
    if "w" in mode and os.path.basename(str(file)) == os.environ.get("FULL_AT"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
    return real(file, mode, *rest, **options)

io.open = opened
"""


def real_cases(shared, folder):
    """For processes of their own: (words, options of `run_one`, words of the error). They write to int8."""
    (folder / "sitecustomize.py").write_text(FULL_DISK)
    spec = tf.TensorSpec((None, 8, 8, 3), tf.float32, name="image")
    module = tf.Module()
    module.table = tf.Variable(tf.random.stateless_normal((50000,), (1, 2)))
    signatures = {
        "serving_default": tf.function(lambda image: {"y": tf.nn.conv2d(image, kernel(3, 3, 3, 4), 1, "SAME")}, [spec]),
        "other": tf.function(lambda image: {"y": image[:, 0, 0] + tf.reduce_sum(module.table)}, [spec]),
    }
    tf.saved_model.save(module, str(folder / "large"), signatures=signatures)
    shutil.copytree(shared / "model", folder / "cut")
    cut(folder / "cut" / "variables" / "variables.data-00000-of-00001", 0.1)
    data = ["--data", shared / "data.npz", "--noverify", "--output", "int8"]
    model = ["--saved_model", shared / "model", *data]
    large = ["--saved_model", "large", *data]
    graph = [*model, "--format=graphdef"]
    return {
        "cut variables, process": (["--saved_model", "cut", *data], {}, "TensorFlow cannot", "cut"),
        "unknown flag, process": ([*model, "--fast"], {}, "Unknown command line flag 'fast'"),
        "no place for temporary files": (model, {"largest_file": 0}, "Temporary files cannot be written, set TMPDIR"),
        "little place for temporary files": (model, {"largest_file": 30}, "File too large"),
        "disk full at the Keras export": (
            ["--saved_model", shared / "net.keras", *data],
            {"largest_file": 3000},
            "cannot export",
            "File too large",
        ),
        "disk full at the variables": (large, {"largest_file": 100_000}, "Cannot write int8", "variables", "File too large"),
        "disk full at saved_model.pb": (model, {"largest_file": 10_000}, "Cannot write int8", "saved_model.pb", "File too large"),
        "disk full at the GraphDef": (graph, {"largest_file": 5_000}, "Cannot write int8", "File too large"),
        "disk full at the plan": (model, {"FULL_AT": "quant_plan.json"}, "Cannot write int8", "No space left on device"),
        "disk full at the plan's arrays": (graph, {"FULL_AT": "quant_plan.npz"}, "Cannot write int8", "No space left on device"),
        "disk full at frozen_graph.pb": (graph, {"FULL_AT": "frozen_graph.pb"}, "Cannot write int8", "No space left on device"),
        "data function that crashes": (
            ["--saved_model", shared / "model", "--data", "crash:f", *data[2:]],
            {},
            "SIGSEGV",
            "nothing was written",
        ),
    }


# Rows that are not as they should be yet.
def prepare(shared, folder, plan):
    """Broken inputs in `folder`; returns the commands by what is wrong, without --output, and words of their errors."""
    cases = {}
    for kind, make in (("flags", flag_cases), ("models", model_cases), ("job", job_cases)):
        (folder / kind).mkdir()
        cases |= make(shared, folder / kind)
    (folder / "plans").mkdir()
    return cases | data_cases(shared, folder) | plan_cases(shared, folder / "plans", plan)


def refuse_all(shared, plan, folder):
    """[(what is wrong, the command, words of the error, its result)] of all bad input, and what was left behind.

    Most commands run in one process; each has an output folder of its own to leave things in.
    """
    for name in ("inputs", "outputs", "real"):
        (folder / name).mkdir()
    inputs, outputs, rows, left = folder / "inputs", folder / "outputs", [], []
    cases = prepare(shared, inputs, plan)
    commands = [[*words, "--output", f"out/{i}/int8"] for i, (words, *_) in enumerate(cases.values())]
    flag = list(cases).index("flag without a value")
    commands[flag] = ["--output", "out/x", *cases["flag without a value"][0]]
    before = {*tree(inputs), "out", "tmp"}
    (inputs / "out").mkdir()
    results = run_all(commands, inputs)
    jpeg = list(cases).index("broken jpg")  # libjpeg writes to stderr itself, which the parent of a real process keeps back
    results[jpeg] = run_one(commands[jpeg], inputs)
    rows += [(name, *row) for name, *row in zip(cases, commands, [case[1:] for case in cases.values()], results, strict=True)]
    left += [name for name in tree(inputs) if name not in before]

    cases = output_cases(shared, outputs)
    before = {*tree(outputs), "tmp"}
    commands = [words for words, *_ in cases.values()]
    results = run_all(commands, outputs)
    rows += [(name, *row) for name, *row in zip(cases, commands, [case[1:] for case in cases.values()], results, strict=True)]
    left += [name for name in tree(outputs) if name not in before]

    cases = real_cases(shared, folder / "real")
    (folder / "real" / "crash.py").write_text("import os, signal\ndef f():\n    os.kill(os.getpid(), signal.SIGSEGV)\n")
    before = {*tree(folder / "real"), "tmp"}
    for name, (words, options, *expected) in cases.items():
        rows.append((name, words, expected, run_one(words, folder / "real", **options)))
        left += [f"{name}: {path}" for path in tree(folder / "real") if path not in before]
    return rows, left


@pytest.fixture(scope="module")
def refusals(shared, good, tmp_path_factory):
    return refuse_all(shared, good[0] / "int8", tmp_path_factory.mktemp("bad"))


def failures(rows):
    wrong = {}
    for name, _, words, result in rows:
        try:
            assert_refused(result, *words)
        except AssertionError:
            wrong[name] = result, words
    return wrong


def test_bad_input_is_refused_in_one_line(refusals):
    rows, _ = refusals
    assert len(rows) > 200
    assert len({name for name, *_ in rows}) == len(rows)
    assert failures(rows) == {}


def test_bad_input_leaves_nothing_behind(refusals):
    assert refusals[1] == []


def table():
    """Prints all bad input and what comes of it, as Markdown."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("shared", "good", "bad"):
            (folder / part).mkdir()
        shared = make_shared(folder / "shared")
        make_good(shared, folder / "good")
        rows, left = refuse_all(shared, folder / "good" / "int8", folder / "bad")
        print("| What is wrong | Command | What comes out |\n| --- | --- | --- |")
        for title, command, _, (code, out, err) in rows:
            said = [line for line in err.splitlines() if line.strip()]
            line = (
                said[0].removeprefix("tfquant.calibrate: ") if (code, out, len(said)) == (2, "", 1) else f"WRONG: {code} {said}"
            )
            cells = [title, " ".join(map(str, command)), line]
            cells = [re.sub(rf"{re.escape(name)}/\w+/|\0", "", cell)[:300].replace("|", "\\|") for cell in cells]
            print(f"| {' | '.join(cells)} |")
        print(f"\n{len(rows)} rows; left behind: {', '.join(left) or 'nothing'}")


def test_odd_plans_are_taken(shared, good, tmp_path):
    """Ranges that nobody would measure: what is written loads and computes finite numbers."""
    plan, _ = good[0] / "int8", None
    content = json.loads((plan / "quant_plan.json").read_text())
    first = next(iter(content["tensors"]))
    with np.load(plan / "quant_plan.npz") as archive:
        original = dict(archive)
    commands = []
    for index, (change, factor) in enumerate([({"max": 1e300}, 1), ({"min": 0, "max": 1e-300}, 1), ({}, 1e-30), ({}, 1e30)]):
        (tmp_path / f"plan{index}").mkdir()
        copy = json.loads(json.dumps(content))
        copy["tensors"][first].update(change)
        (tmp_path / f"plan{index}" / "quant_plan.json").write_text(json.dumps(copy))
        scales = {name: array * np.float32(factor) for name, array in original.items() if name.startswith("weight_scales/")}
        np.savez(tmp_path / f"plan{index}" / "quant_plan.npz", **{**original, **scales})
        commands.append(["--saved_model", shared / "model", "--plan", f"plan{index}", "--output", f"out{index}"])
    results = run_all(commands, tmp_path)
    assert [(code, err) for code, _, err in results] == [(0, "")] * 4
    for index in range(4):
        assert np.isfinite(served(tmp_path / f"out{index}", shared)).all()


# Damage


def damaged(content, rng):
    content = bytearray(content)
    if rng.random() < 0.3:
        del content[rng.randrange(len(content)) :]
    else:
        for _ in range(rng.choice([1, 1, 5])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def run_damaged(shared, tmp_path, changes):
    """Results for copies of the model, each with one file changed."""
    commands = []
    for index, (name, change) in enumerate(changes):
        folder = tmp_path / f"model{index}"
        shutil.copytree(shared / "model", folder)
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        commands.append(["--saved_model", folder, "--data", shared / "data.npz", "--noverify", "--output", f"out/{index}"])
    return run_all(commands, tmp_path)


def test_damaged_models_are_refused_or_run(shared, tmp_path):
    """Bits flipped in, and pieces cut off, the files of the SavedModel."""
    rng = random.Random(0)
    names = ["saved_model.pb"] * 3 + ["variables/variables.index", "variables/variables.data-00000-of-00001"]
    results = run_damaged(shared, tmp_path, [(rng.choice(names), lambda content: damaged(content, rng)) for _ in range(60)])
    wrong = []
    for index, result in enumerate(results):
        if result[0] == 0 and result[2] == "":
            assert (tmp_path / "out" / str(index) / "saved_model.pb").is_file()
            continue
        try:
            assert_refused(result)
            assert not (tmp_path / "out" / str(index)).exists()
        except AssertionError:
            wrong.append((index, result))
    assert wrong == []
    assert 5 < sum(code == 2 for code, *_ in results) < 60
    assert tree(tmp_path / "tmp") == []


def test_an_op_that_tensorflow_does_not_know(shared, tmp_path):
    change = ("saved_model.pb", lambda content: content.replace(b"LeakyRelu", b"LeakyRemu"))
    assert_refused(run_damaged(shared, tmp_path, [change])[0], "LeakyRemu")


def test_a_damaged_fingerprint_is_no_matter(shared, tmp_path):
    ((code, _, err),) = run_damaged(shared, tmp_path, [("fingerprint.pb", lambda content: content[:20])])
    assert (code, err) == (0, "")


if __name__ == "__main__":
    if sys.argv[1:] != ["--table"]:
        sys.exit("python tests/test_calibrate.py --table")
    table()
