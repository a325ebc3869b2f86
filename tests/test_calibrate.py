"""Tests of the command line: what it prints, what it writes, and how it refuses."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

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


def run_one(command, folder):
    arguments = [sys.executable, "-m", "tfquant.calibrate", *map(str, command)]
    found = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=folder, env=environment(folder))
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


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """model (a SavedModel), net.keras, data.npz (the input is named image)."""
    folder = tmp_path_factory.mktemp("shared")
    keras.utils.set_random_seed(4)
    image = keras.Input((8, 8, 3), name="image")
    x = LAYERS.ReLU(name="relu")(LAYERS.Conv2D(8, 3, padding="same", name="first")(image))
    x = LAYERS.LeakyReLU(name="leaky")(LAYERS.Conv2D(8, 3, name="second")(x))
    x = LAYERS.Conv3D(2, (1, 3, 3), name="odd")(LAYERS.Reshape((1, 6, 6, 8), name="reshape")(x))
    model = keras.Model(image, LAYERS.Dense(3, activation="softmax", name="head")(LAYERS.Flatten(name="flatten")(x)), name="net")
    model.export(folder / "model", verbose=False)
    model.save(folder / "net.keras")
    np.savez(folder / "data.npz", image=np.random.default_rng(0).normal(size=(20, 8, 8, 3)).astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def good(shared, tmp_path_factory):
    """The output of a real run, in a folder of its own, with what it printed."""
    folder = tmp_path_factory.mktemp("good")
    command = ["--saved_model", shared / "model", "--data", shared / "data.npz", "--output", folder / "int8"]
    return folder, run_one([*command, "--verify_batch_sizes", "1,2"], folder)


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
            [*rest, tmp_path / "served", "--data", shared / "data.npz", "--verify_batch_sizes=", "--signature_key", "serve"],
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
    assert settings == {"minmax": {"estimator": "minmax", "samples": 20}, "few": {"estimator": "mse", "samples": 5}}
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
        "signature_key",
        "preprocess",
        "subset_size",
        "batch_size",
    ):
        assert f"  --{flag}: " in out
    assert "absl" not in out


# Bad input


def images_of(shared):
    with np.load(shared / "data.npz") as archive:
        return archive["image"]


def prepare(shared, folder):
    """Broken models, data and plans in `folder`; returns the commands by name, without --output, and words of their errors."""
    model, data = shared / "model", shared / "data.npz"
    images = images_of(shared)

    def broken(name, change):
        shutil.copytree(model, folder / name)
        change(folder / name)
        return folder / name

    def cut(path, share=0.6):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    def npz(name, **arrays):
        np.savez(folder / name, **arrays)
        return folder / name

    bad = images.copy()
    bad[3, 2, 1, 0] = np.nan
    (folder / "empty").mkdir()
    (folder / "text.npz").write_text("nothing")
    (folder / "cut.npz").write_bytes(data.read_bytes()[:3000])
    (folder / "notes.txt").write_text("notes")
    (folder / "bad.keras").write_text("nothing")
    (folder / "damaged.json").write_text('{"format": ')
    (folder / "feeds.py").write_text(
        "import numpy as np\n"
        "def fails():\n    yield np.zeros((8, 8, 3), 'f4')\n    raise RuntimeError('first\\nsecond')\n"
        "def nothing():\n    return iter(())\n"
    )
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_text("no image")
    index, values = "variables/variables.index", "variables/variables.data-00000-of-00001"
    empty_pb = broken("empty_pb", lambda path: (path / "saved_model.pb").write_bytes(b""))
    cases = {
        "no model at all": (["--data", data], "--saved_model is missing"),
        "missing model": (["--saved_model", folder / "none", "--data", data], "There is no model at"),
        "file for a model": (["--saved_model", folder / "notes.txt", "--data", data], "is not a SavedModel"),
        "empty folder for a model": (["--saved_model", folder / "empty", "--data", data], "holds no saved_model.pb"),
        "empty saved_model.pb": (["--saved_model", empty_pb, "--data", data], "corrupt or empty"),
        "missing keras file": (["--saved_model", folder / "none.keras", "--data", data], "There is no model at"),
        "corrupt keras file": (["--saved_model", folder / "bad.keras", "--data", data], "Keras cannot load"),
        "no variables": (
            ["--saved_model", broken("no_variables", lambda path: shutil.rmtree(path / "variables")), "--data", data],
            "TensorFlow cannot load",
        ),
        "cut variables": (
            ["--saved_model", broken("cut_values", lambda path: cut(path / values)), "--data", data],
            "TensorFlow cannot",
        ),
        "cut index": (
            ["--saved_model", broken("cut_index", lambda path: cut(path / index)), "--data", data],
            "TensorFlow cannot",
        ),
        "unknown signature": (
            ["--saved_model", model, "--data", data, "--signature_key=x"],
            "no signature 'x'",
            "serve, serving_default",
        ),
        "missing data": (["--saved_model", model, "--data", folder / "none.npz"], "none.npz"),
        "missing module": (["--saved_model", model, "--data", "no_such_module:f"], "no_such_module"),
        "missing function": (["--saved_model", model, "--data", "feeds:other"], "other"),
        "failing function": (["--saved_model", model, "--data", "feeds:fails"], "first second"),
        "function without samples": (["--saved_model", model, "--data", "feeds:nothing"], "no samples"),
        "wrong input name": (
            ["--saved_model", model, "--data", npz("name.npz", picture=images, label=images)],
            "'picture'",
            "'image'",
        ),
        "one input too many": (["--saved_model", model, "--data", npz("more.npz", image=images, label=images)], "'label'"),
        "wrong shape": (["--saved_model", model, "--data", npz("shape.npz", image=images[:, :7])], "wrong shape", "7, 8, 3"),
        "wrong rank": (["--saved_model", model, "--data", npz("rank.npz", image=images[0])], "wrong shape"),
        "wrong dtype": (["--saved_model", model, "--data", npz("dtype.npz", image=images.astype(complex))], "complex"),
        "text for numbers": (["--saved_model", model, "--data", npz("str.npz", image=np.full(images.shape, "a"))], "'image'"),
        "NaN": (["--saved_model", model, "--data", npz("nan.npz", image=bad)], "NaN", "sample 3"),
        "infinity": (["--saved_model", model, "--data", npz("inf.npz", image=np.where(np.isnan(bad), np.inf, bad))], "infinity"),
        "no samples": (["--saved_model", model, "--data", npz("no.npz", image=images[:0])], "no samples"),
        "no arrays": (["--saved_model", model, "--data", npz("none_in.npz")], "'image'"),
        "text file for data": (["--saved_model", model, "--data", folder / "text.npz"], "text.npz"),
        "cut data": (["--saved_model", model, "--data", folder / "cut.npz"], "cut.npz"),
        "folder without images": (["--saved_model", model, "--data", folder / "empty"], "empty"),
        "image that is none": (["--saved_model", model, "--data", folder / "images"], "a.png"),
        "preprocess without images": (["--saved_model", model, "--data", data, "--preprocess=tf"], "preprocess is for folders"),
        "data and plan": (["--saved_model", model, "--data", data, "--plan", folder / "x"], "Received: both"),
        "neither": (["--saved_model", model], "Received: neither"),
        "missing plan": (["--saved_model", model, "--plan", folder / "none.json"], "There is no plan at"),
        "damaged plan": (["--saved_model", model, "--plan", folder / "damaged.json"], "not a readable plan"),
        "unknown flag": (["--saved_model", model, "--data", data, "--fast"], "fast"),
        "stray word": (["--saved_model", model, "--data", data, "more"], "more"),
        "flag without a value": (["--saved_model", model, "--data"], "data"),
        "no number": (["--saved_model", model, "--data", data, "--subset_size=many"], "many"),
        "no samples wanted": (["--saved_model", model, "--data", data, "--subset_size=0"], "subset_size"),
        "negative batch": (["--saved_model", model, "--data", data, "--batch_size=-3"], "batch_size"),
        "unknown estimator": (["--saved_model", model, "--data", data, "--estimator=best"], "best"),
        "unknown preprocess": (["--saved_model", model, "--data", data, "--preprocess=best"], "best"),
        "bad sizes": (["--saved_model", model, "--data", data, "--verify_batch_sizes=1,x"], "1,x"),
        "size 0": (["--saved_model", model, "--data", data, "--verify_batch_sizes=0"], "verify_batch_sizes"),
    }
    return cases


@pytest.fixture(scope="module")
def refusals(shared, tmp_path_factory):
    """Results of all bad commands by name, run in one process; each had an output folder of its own to leave things in."""
    folder = tmp_path_factory.mktemp("bad")
    cases = prepare(shared, folder)
    before = tree(folder)
    (folder / "out").mkdir()
    commands = {name: [*words, "--output", f"out/{i}/int8"] for i, (name, (words, *_)) in enumerate(cases.items())}
    commands["flag without a value"] = ["--output", "out/x", *cases["flag without a value"][0]]
    results = dict(zip(commands, run_all(list(commands.values()), folder), strict=True))
    left = set(tree(folder)) - set(before) - {"out", "tmp"}
    return results, {name: words for name, (_, *words) in cases.items()}, left


def test_bad_input_is_refused_in_one_line(refusals):
    results, words, _ = refusals
    assert len(results) > 40
    wrong = {}
    for name, result in results.items():
        try:
            assert_refused(result, *words[name])
        except AssertionError:
            wrong[name] = (result, words[name])
    assert wrong == {}


def test_bad_input_leaves_nothing_behind(refusals):
    assert refusals[2] == set()


def test_a_wrong_name_for_the_only_input(shared, tmp_path):
    np.savez(tmp_path / "name.npz", picture=images_of(shared))
    command = ["--saved_model", shared / "model", "--data", "name.npz", "--noverify", "--output", "out"]
    assert_refused(run_all([command], tmp_path)[0], "'picture'", "'image'")


def test_output_that_cannot_be_written(shared, tmp_path):
    (tmp_path / "file").write_text("x")
    rest = ["--saved_model", shared / "model", "--data", shared / "data.npz", "--noverify", "--output"]
    results = run_all([[*rest, "file/int8"], [*rest, "file/a/b"], [*rest, "/proc/int8"], [*rest, ""], rest[:-1]], tmp_path)
    for result in results[:3]:
        assert_refused(result, "Cannot write")
    for result in results[3:]:
        assert_refused(result, "--output is missing")
    assert tree(tmp_path) == ["file", "tmp"]


def test_real_processes_refuse_in_one_line_too(shared, tmp_path):
    """Those where TensorFlow itself has something to say, and one that ends before TensorFlow starts."""
    shutil.copytree(shared / "model", tmp_path / "model")
    values = tmp_path / "model" / "variables" / "variables.data-00000-of-00001"
    values.write_bytes(values.read_bytes()[:100])
    before = tree(tmp_path)
    rest = ["--data", shared / "data.npz", "--output", "int8"]
    assert_refused(run_one(["--saved_model", "model", *rest], tmp_path), "TensorFlow cannot", "model")
    assert_refused(run_one(["--saved_model", shared / "model", *rest, "--fast"], tmp_path), "fast")
    assert [name for name in tree(tmp_path) if name not in before] == ["tmp"]


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
