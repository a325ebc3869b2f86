"""Tests of python -m tfquant.benchmark and of the worker that runs models: no time is asserted, but that all was run and told."""

import ast
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import flagsaver

from tfquant import benchmark
from tfquant.bench import serve, settings
from tfquant.bench.interleave import Times, WorkerError
from tfquant.bench.measure import Entry, Model, compared
from tfquant.bench.settings import LATENCY, THROUGHPUT, Choice, Setting
from tfquant.machine import usable_cores

ROOT = Path(__file__).resolve().parent.parent


def saved(path, function, *specs, key="serving_default"):
    module = tf.Module()
    module.served = tf.function(function, input_signature=specs)
    tf.saved_model.save(module, str(path), signatures={key: module.served})
    return path


def image(*shape, dtype=tf.float32, name="x"):
    return tf.TensorSpec(shape, dtype, name)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of small models."""
    folder = tmp_path_factory.mktemp("models")
    kernel = tf.constant(np.random.default_rng(0).normal(size=(3, 3, 3, 8)), tf.float32)

    def network(x):
        return {"y": tf.reduce_mean(tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME")), (1, 2))}

    saved(folder / "one", network, image(None, 8, 8, 3))
    saved(folder / "two", network, image(None, 8, 8, 3))
    saved(folder / "fixed", network, image(4, 8, 8, 3))
    saved(folder / "sizes", network, image(None, None, None, 3))
    saved(folder / "other", network, image(None, 8, 8, 3), key="embed")
    saved(folder / "versions" / "2", network, image(None, 8, 8, 3), key="second")
    saved(folder / "versions" / "10", network, image(None, 8, 8, 3))
    saved(folder / "fails", lambda x: {"y": tf.reshape(x, (1, 192))}, image(None, 8, 8, 3))
    saved(folder / "text", lambda s: {"n": tf.strings.length(s)}, image(None, dtype=tf.string, name="s"))
    saved(
        folder / "many",
        lambda ids, mask, pixels, scale, half: {
            "y": tf.gather(tf.constant([1.0, 2.0]), ids)
            * tf.cast(mask, tf.float32)
            * tf.reduce_sum(tf.cast(pixels, tf.float32), -1, keepdims=True)
            * scale
            + tf.cast(half, tf.float32)
        },
        image(None, 5, dtype=tf.int64, name="ids"),
        image(None, 5, dtype=tf.bool, name="mask"),
        image(None, 7, dtype=tf.uint8, name="pixels"),
        image(name="scale"),
        image(None, 5, dtype=tf.bfloat16, name="half"),
    )
    x = np.random.default_rng(1).normal(size=(6, 8, 8, 3))
    np.savez(folder / "data.npz", x=x)
    np.save(folder / "data.npy", x)
    np.savez(folder / "wrong.npz", z=x)
    np.savez(folder / "shape.npz", x=x[:, :7])
    np.savez(folder / "dtype.npz", x=x.astype(np.complex64))
    np.savez(folder / "text.npz", s=np.array(["a", "bcd", "ef"]))
    np.savez(folder / "numbers.npz", s=np.zeros(3))
    np.savez(folder / "none_left.npz", x=x[:0])
    (folder / "damaged.npz").write_bytes(b"PK\x03\x04 no zip")
    graph = tf.Graph()
    with graph.as_default():
        placeholder = tf.compat.v1.placeholder(tf.float32, (None, 4), "image")
        tf.nn.relu(tf.identity(placeholder, "between"), "scores")
    (folder / "graph").mkdir()
    (folder / "graph" / "frozen_graph.pb").write_bytes(graph.as_graph_def().SerializeToString())
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "saved_model.pb").write_bytes(b"\x0a\xff nothing")
    (folder / "file.txt").write_text("text")
    default = Setting(1, 1)
    chosen = Choice(2, LATENCY, Setting(1, 1, (("TFQUANT_A", "1"),)), 1, default, 1.0, 1.0, 1.0, 1.0, 1.0)
    more = Choice(2, THROUGHPUT, Setting(2, None, (("TFQUANT_A", "2"),)), 3, default, 1.0, 1.0, 1.0, 1.0, 1.0)
    settings.save(folder / "settings.json", [chosen, more], {})
    return folder


def environment(folder, **variables):
    return {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), **variables}


def run(words, folder, prefix=("-m", "tfquant.benchmark"), **variables):
    """(code, stdout, stderr) of a command."""
    command = [sys.executable, *prefix, *map(str, words)]
    found = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env=environment(folder, **variables), timeout=170
    )
    return found.returncode, found.stdout, found.stderr


def rows(out):
    """The cells of the table."""
    return [[cell.strip() for cell in line.split("|")] for line in out.splitlines() if "|" in line]


# The worker


def test_the_worker_needs_nothing_of_tfquant():
    tree = ast.parse(Path(serve.__file__).read_text())
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert "tensorflow" in imported
    assert not [name for name in imported if name.startswith(("tfquant", "."))]


@pytest.mark.parametrize(
    ("name", "key", "data", "batch", "inputs"),
    [
        ("one", "serving_default", None, 3, {"x": ["float32", "(None, 8, 8, 3)"]}),
        ("one", "serving_default", "data.npy", 4, {"x": ["float32", "(None, 8, 8, 3)"]}),
        ("fixed", "serving_default", "data.npz", 4, {"x": ["float32", "(4, 8, 8, 3)"]}),
        ("versions", "serving_default", None, 1, {"x": ["float32", "(None, 8, 8, 3)"]}),
        ("sizes", "serving_default", "data.npz", 2, {"x": ["float32", "(None, None, None, 3)"]}),
        ("other", "embed", None, 1, {"x": ["float32", "(None, 8, 8, 3)"]}),
        ("text", "serving_default", "text.npz", 2, {"s": ["string", "(None,)"]}),
        ("graph", "ignored", None, 5, {"image": ["float32", "(None, 4)"]}),
        ("graph/frozen_graph.pb", "ignored", None, 5, {"image": ["float32", "(None, 4)"]}),
    ],
)
def test_models_that_run(name, key, data, batch, inputs, models):
    model = serve.Model(str(models / name), key)
    fed = serve.Inputs(model.inputs, str(models / data) if data else None)
    assert {name: [spec.dtype.name, str(spec.shape)] for name, spec in model.inputs.items()} == inputs
    times = serve.Server(model, fed).answer({"batch": batch, "runs": 4})["ms"]
    assert len(times) == 4
    assert all(0 < took < 1e5 for took in times)


def test_random_inputs(models):
    model = serve.Model(str(models / "many"), "serving_default")
    (feed,) = serve.Inputs(model.inputs, None).feeds(64)
    assert {name: (value.dtype.name, value.shape.as_list()) for name, value in feed.items()} == {
        "ids": ("int64", [64, 5]),
        "mask": ("bool", [64, 5]),
        "pixels": ("uint8", [64, 7]),
        "scale": ("float32", []),
        "half": ("bfloat16", [64, 5]),
    }
    assert set(np.unique(feed["ids"])) == {0, 1}
    assert set(np.unique(feed["mask"])) == {False, True}
    assert feed["pixels"].numpy().min() < 10 < 245 < feed["pixels"].numpy().max()
    half = tf.cast(feed["half"], tf.float32).numpy()
    assert abs(half.mean()) < 0.3
    assert 0.8 < half.std() < 1.2
    model(feed)


def test_batches_of_the_data(models):
    x = np.load(models / "data.npy").astype(np.float32)
    specs = {"x": image(None, 8, 8, 3)}
    for batch, count in ((1, 6), (2, 3), (4, 1), (6, 1), (16, 1)):
        feeds = serve.Inputs(specs, str(models / "data.npz")).feeds(batch)
        assert len(feeds) == count
        found = np.concatenate([feed["x"].numpy() for feed in feeds])
        assert np.array_equal(found, x[np.arange(count * batch) % 6])
    (feed,) = serve.Inputs({"x": image(4, 8, 8, 3)}, str(models / "data.npz")).feeds(4)
    assert np.array_equal(feed["x"], x[:4])
    np.savez(models / "scalar.npz", x=x, k=np.array([3, 3]))
    (feed,) = serve.Inputs({**specs, "k": image(dtype=tf.int32, name="k")}, str(models / "scalar.npz")).feeds(6)
    assert feed["k"].numpy() == 3
    assert feed["k"].dtype == tf.int32


class Counting:
    """A model that notes what it is called with and how many calls overlap; each batch has its own number in it."""

    def __init__(self):
        self.calls, self.now, self.most, self.lock = [], 0, 0, threading.Lock()

    def __call__(self, feed):
        with self.lock:
            self.calls.append(int(feed["x"].numpy()[0, 0]))
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.002)
        with self.lock:
            self.now -= 1


@pytest.mark.parametrize(("streams", "runs"), [(1, 5), (2, 2), (3, 13), (8, 9)])
def test_streams_do_all_the_runs(streams, runs, tmp_path):
    np.save(tmp_path / "x.npy", np.arange(4).reshape(4, 1))
    model = Counting()
    server = serve.Server(model, serve.Inputs({"x": image(None, 1, dtype=tf.int32)}, str(tmp_path / "x.npy")))
    server.answer({"batch": 1, "runs": streams, "streams": streams})
    model.calls.clear()
    times = server.answer({"batch": 1, "runs": runs, "streams": streams})["ms"]  # warm: these runs alone
    assert len(times) == len(model.calls) == runs
    assert sorted(model.calls) == sorted(np.arange(runs) % 4)
    assert model.most == min(streams, runs + streams)
    assert all(took >= 2 for took in times)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_setting_reaches_tensorflow(threads, models):
    with Model("one", str(models / "one")).start(Setting(threads, threads + 3)) as worker:
        assert worker.ready() == {
            "tensorflow": tf.__version__,
            "inputs": {"x": ["float32", "(None, 8, 8, 3)"]},
            "fixed_batch": None,
        }
        assert all(took > 0 for took in worker.run({"batch": 2, "streams": 2}, 7))
        tasks = Path(f"/proc/{worker._process.pid}/task")
        names = [(task / "comm").read_text().strip() for task in tasks.iterdir()]
        if "tf_Compute" in names:  # older versions do not name their threads
            assert names.count("tf_Compute") == threads + 3
        with pytest.raises(WorkerError, match=r"^one: TensorFlow cannot run .*/one: "):
            worker.run({"batch": 10**12}, 1)
        assert worker.run({"batch": 1}, 1)[0] > 0


# The command


def test_the_comparison(models, tmp_path):
    words = ["--models", f"{models}/one,{models}/graph/../two", "--batch_sizes", "1,3", "--threads", "1", "--streams", "2"]
    words += ["--seconds", "0.01", "--json", tmp_path / "found.json", "--env", "TFQUANT_A=b=c", "--data", models / "data.npz"]
    code, out, err = run(words, tmp_path, TF_TOLD="1")
    assert (code, err) == (0, "")
    head, *body = rows(out)
    assert head == ["Model", "Batch", "Threads", "Streams", "Median ms", "p90 ms", "p99 ms", "Samples/s", "Speed", "Throughput"]
    assert [row[:4] for row in body] == [[name, batch, "1", "2"] for batch in "13" for name in ("one", "two")]
    assert all(row[8:] == ["1.00x", "1.00x"] for row in body[::2])
    assert "one, batch 1: TFQUANT_A=b=c" in out
    assert "Speed and throughput against one: medians of the ratios of " in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == {"machine", "options", "results"}
    assert set(found["machine"]) == {
        "cpu",
        "usable_cores",
        "vnni",
        "bf16",
        "amx",
        "tensorflow",
        "python",
        "environment",
    }
    assert found["machine"]["environment"]["TF_TOLD"] == "1"
    assert found["machine"]["tensorflow"] == tf.__version__
    assert found["options"]["batch_sizes"] == ["1", "3"]
    assert found["options"]["env"] == ["TFQUANT_A=b=c"]
    assert len(found["results"]) == len(body) == 4
    for row, result in zip(body, found["results"], strict=True):
        assert row[0] == result["model"]
        assert result["path"].endswith(row[0])
        assert [str(result[key]) for key in ("batch_size", "intra_op_threads", "streams")] == row[1:4]
        assert result["inter_op_threads"] is None
        assert result["env"] == {"TFQUANT_A": "b=c"}
        assert result["rounds"] >= 5
        assert result["runs"] >= 10
        figures = [result[key] for key in ("median_ms", "p90_ms", "p99_ms", "samples_per_second", "speedup", "throughput_ratio")]
        assert all(math.isfinite(figure) and figure > 0 for figure in figures)
        assert figures[0] <= figures[1] <= figures[2]
        assert row[4:7] == [f"{figure:.2f}" for figure in figures[:3]]
        assert row[7:] == [f"{figures[3]:.1f}", f"{figures[4]:.2f}x", f"{figures[5]:.2f}x"]
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


@contextlib.contextmanager
def flags(*words):
    """The command's flags in this process."""
    saved = flagsaver.save_flag_values(benchmark.FLAGS)
    try:
        benchmark.parse(["benchmark", *map(str, words)])
        yield
    finally:
        flagsaver.restore_flag_values(saved, benchmark.FLAGS)


def test_what_runs_side_by_side(models):
    one, two = Model("one", str(models / "one")), Model("two", str(models / "two"))
    path = models / "settings.json"
    with flags("--threads", "4,2", "--streams", "1,3", "--env", "A=b"):
        assert benchmark._races([one, two], [2, 8]) == [
            tuple(Entry(model, Setting(count, None, (("A", "b"),)), size, streams) for model in (one, two) for count in (4, 2))
            for size in (2, 8)
            for streams in (1, 3)
        ]
    with flags("--settings", f",{path}", "--threads", "5", "--env", "TFQUANT_A=mine"):
        plain = Setting(5, None, (("TFQUANT_A", "mine"),))
        tuned = Setting(1, 1, (("TFQUANT_A", "mine"),))
        assert benchmark._races([one, two], [2]) == [(Entry(one, plain, 2), Entry(two, tuned, 2))]
    with flags("--settings", path, "--objective", "throughput", "--streams", "1,2"):
        setting = Setting(2, None, (("TFQUANT_A", "2"),))
        assert benchmark._races([one, two], [2]) == [(Entry(one, setting, 2, 3), Entry(two, setting, 2, 3))]
    with flags():
        assert benchmark._races([one], [2]) == [(Entry(one, Setting(usable_cores()), 2),)]


def test_what_is_compared_with_what():
    one, two = Model("one", "a"), Model("two", "b")

    def result(entries, *took):
        times = [Times(e.model.name, e.request, ((ms,),)) for e, ms in zip(entries, took, strict=True)]
        return [(found.speedup, found.throughput_ratio) for found in compared(entries, times)]

    # Each with the first model's of the same number of threads; where there is none, with the very first.
    entries = [Entry(one, Setting(1), 1), Entry(one, Setting(2), 1), Entry(two, Setting(1), 1), Entry(two, Setting(2), 1, 2)]
    assert result(entries, 8.0, 4.0, 2.0, 2.0) == [(1, 1), (1, 1), (4, 4), (2, 4)]
    assert result([Entry(one, Setting(4), 2), Entry(two, Setting(2), 2, 3)], 6.0, 2.0) == [(1, 1), (3, 9)]
    assert result([Entry(one, Setting(4), 2), Entry(one, Setting(2), 2)], 6.0, 2.0) == [(1, 1), (3, 3)]


def test_runs_with_settings(models, tmp_path):
    words = ["--models", f"{models}/one,{models}/two", "--settings", f",{models}/settings.json", "--batch_sizes", "2"]
    code, out, err = run([*words, "--seconds", "0.01", "--threads", "1", "--names", "a,b"], tmp_path)
    assert (code, err) == (0, "")
    assert [row[:4] for row in rows(out)[1:]] == [["a", "2", "1", "1"], ["b", "2", "1", "1"]]
    assert [line for line in out.splitlines() if "TFQUANT" in line] == ["b, batch 2: TFQUANT_A=1 TF_NUM_INTEROP_THREADS=1"]


# On a machine of one core there are four ways to run a model.
TUNE = """
import sys
from tfquant import benchmark
benchmark.usable_cores = lambda: 1
sys.exit(benchmark.main(benchmark.parse(["benchmark", *sys.argv[1:]])))
"""


def test_tuning(models, tmp_path):
    model = saved(tmp_path / "int8", lambda x: {"y": 2 * x}, image(None, 3))
    (model / "quant_plan.json").write_text("{}")
    words = ["--models", model, "--tune_runtime", "--batch_sizes", "2", "--seconds", "0.01", "--objective", "throughput"]
    code, out, err = run([*words, "--json", tmp_path / "all.json"], tmp_path, ("-c", TUNE))
    assert (code, err) == (0, "")
    assert "int8: the best of 4 settings\n" in out
    assert f"Written to {model}/runtime_settings.json and runtime_settings.env" in out
    found = settings.load(str(model / "runtime_settings.json"))
    assert [(choice.batch_size, choice.objective) for choice in found] == [(2, THROUGHPUT), (2, LATENCY)]
    text = (model / "runtime_settings.env").read_text()
    for choice in found:
        assert choice.gain >= 1
        assert choice.streams == choice.setting.intra_op == 1
        assert str(choice) in out
        changes = choice.setting.differences(choice.default)
        assert bool(changes) == (choice.gain > 1)
        assert all(f"export {name}={value}" in text for name, value in changes.items())
    measured = json.loads((tmp_path / "all.json").read_text())["models"][0]["measured"]
    assert len(measured) == 2 * 4  # the default and three others, per objective
    assert {entry["stage"] for entry in measured} == {1}
    assert {tuple(entry["env"].values()) for entry in measured} == {("1", "0"), ("1", "1"), ("0", "0"), ("0", "1")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json", "int8"]


def test_a_model_of_the_user_is_left_alone(models, tmp_path):
    for path in (models / "one", models / "graph" / "frozen_graph.pb"):
        model = Model("one", str(path))
        with flags():
            assert benchmark._settings_path(model, 1) is None
        with flags("--settings", tmp_path / "mine.json"):
            assert benchmark._settings_path(model, 1) == tmp_path / "mine.json"
    (tmp_path / "quant_plan.json").write_text("{}")
    (tmp_path / "frozen_graph.pb").write_bytes(b"")
    for path in (tmp_path, tmp_path / "frozen_graph.pb"):
        with flags():
            assert benchmark._settings_path(Model("mine", str(path)), 2) == tmp_path / "runtime_settings.json"


def test_help(tmp_path):
    code, out, err = run(["--help"], tmp_path)
    assert (code, err) == (0, "")
    for name in ("models", "names", "batch_sizes", "threads", "streams", "seconds", "env", "tune_runtime", "settings", "json"):
        assert f"  --{name}: " in out
    assert [line for line in out.splitlines() if line in ("Models:", "Measurement:", "Runtime:", "Output:")]
    assert "absl" not in out


def bad_input(models):
    """Name to (arguments, words of the line)."""
    one = ["--models", models / "one"]
    both = ["--models", f"{models}/one,{models}/two"]
    tune = [*one, "--tune_runtime"]
    return {
        "no models": ([], "--models is missing"),
        "a word": ([*one, "int8"], "Every argument is a --flag. Received: int8"),
        "an unknown flag": ([*one, "--batch", "1"], "batch"),
        "no number": ([*one, "--batch_sizes", "1,x"], "--batch_sizes takes numbers with commas between. Received: 1,x"),
        "no samples": ([*one, "--batch_sizes", "0"], "--batch_sizes takes numbers above 0. Received: 0"),
        "no streams": ([*one, "--streams", "0"], "--streams takes numbers above 0. Received: 0"),
        "threads below 0": ([*one, "--threads", "2,-1"], "--threads takes numbers above 0. Received: 2,-1"),
        "no time": ([*one, "--seconds", "0"], "--seconds must be above 0. Received: 0.0"),
        "time without end": ([*one, "--seconds", "inf"], "--seconds must be above 0. Received: inf"),
        "too few names": ([*both, "--names", "a"], "--names must be as many as --models, and distinct. Received: a"),
        "names twice": ([*both, "--names", "a,a"], "--names must be as many as --models, and distinct. Received: a,a"),
        "the same model twice": (["--models", f"{models}/one,{models}/one"], "--names must be"),
        "env without value": ([*one, "--env", "A"], "--env takes KEY=VALUE. Received: A"),
        "env without name": ([*one, "--env", "=a"], "--env takes KEY=VALUE. Received: =a"),
        "env of threads": ([*one, "--env", "TF_NUM_INTRAOP_THREADS=1"], "is given by --threads"),
        "env that is searched": (
            [*tune, "--env", "TF_MKL_OPTIMIZE_PRIMITIVE_MEMUSE=0"],
            "--tune_runtime searches the values of TF_MKL",
        ),
        "an unknown objective": ([*one, "--objective", "speed"], "objective"),
        "settings that are none": ([*one, "--settings", models / "file.txt"], "is no JSON of runtime settings"),
        "settings that are not there": ([*one, "--settings", models / "none.json"], "The settings cannot be read"),
        "settings without the batch": (
            [*one, "--settings", models / "settings.json"],
            "--settings has no entry for batches of 1 (latency); it has 2 (latency), 2 (throughput).",
        ),
        "too many settings": (
            [*one, "--settings", "a.json,b.json"],
            "--settings takes one file, or one per model. Received: 2 for 1",
        ),
        "settings of two models": ([*both, "--tune_runtime", "--settings", "a.json"], "--settings names one .json file"),
        "settings that are no JSON": ([*tune, "--settings", "a.env"], "--settings names one .json file"),
        "settings in no folder": ([*tune, "--settings", models / "none" / "a.json"], "a folder that does not exist"),
        "JSON in no folder": ([*one, "--json", models / "none" / "a.json"], "a folder that does not exist"),
        "JSON that is a folder": ([*one, "--json", models / "empty"], "--json names a file that cannot be written"),
        "no folder": (["--models", f"{models}/one,{models}/none"], "none: ", "does not exist"),
        "a signature that is not there": (
            ["--models", models / "other"],
            "other: ",
            "no signature 'serving_default'; it has embed",
        ),
        "a batch that fails": (["--models", models / "fails", "--batch_sizes", "1,2"], "fails: TensorFlow cannot run"),
        "tuning what does not run": (
            ["--models", models / "fails", "--tune_runtime", "--batch_sizes", "2", "--threads", "1", "--streams", "1"],
            "TensorFlow's defaults: TensorFlow cannot run",
        ),
    }


@pytest.mark.parametrize("kind", ["SavedModel", "GraphDef"])
def test_profile(models, tmp_path, kind):
    path = models / "one"
    if kind == "GraphDef":
        graph = tf.Graph()
        with graph.as_default():
            x = tf.compat.v1.placeholder(tf.float32, (None, 8, 8, 3), "x")
            tf.reduce_mean(tf.nn.relu(tf.nn.conv2d(x, tf.ones((3, 3, 3, 8)), 1, "SAME")), (1, 2), name="y")
        path = tmp_path / "one.pb"
        path.write_bytes(graph.as_graph_def().SerializeToString())
    words = ["--models", path, "--batch_sizes", "1,4", "--seconds", "0.3", "--profile", "--json", "found.json"]
    code, out, err = run(words, tmp_path)
    assert (code, err) == (0, "")
    profiles = json.loads((tmp_path / "found.json").read_text())["profiles"]
    assert [found["batch_size"] for found in profiles] == [1, 4]
    for found in profiles:
        assert sum(facts["count"] for op, facts in found["ops"].items() if "Conv2D" in op) == 1
        assert found["ops"]["Mean"]["count"] == 1
        assert all(0 <= facts["ms"] <= 5 * found["median_ms"] for facts in found["ops"].values())
    printed = [row for row in rows(out) if len(row) == 4]
    assert [row[0].partition(", ")[2] for row in printed if row[1] == "Ops"] == ["batch 1", "batch 4"]
    shares = [float(row[3].rstrip("%")) for row in printed if row[1] != "Ops"]
    assert sum(shares) == pytest.approx(200, abs=0.1 * len(shares))


def test_bad_input_is_refused_in_one_line(models, tmp_path):
    failures = []
    for name, (words, *told) in bad_input(models).items():
        code, out, err = run(words, tmp_path)
        lines = err.splitlines()
        is_good = (code, out, len(lines)) == (2, "", 1) and lines[0].startswith("tfquant.benchmark: ") and len(lines[0]) < 700
        if not is_good or not all(word in err for word in told):
            failures.append((name, code, out, err))
    assert not failures
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("none", None, "does not exist; wanted is a SavedModel (saved_model.pb) or a frozen GraphDef (frozen_graph.pb)."),
        ("empty", None, "holds neither a SavedModel"),
        ("file.txt", None, "is neither a SavedModel"),
        ("one/saved_model.pb", None, "is neither a SavedModel"),
        ("broken", None, "TensorFlow cannot load"),
        ("fixed", None, "the signature takes batches of 4 alone. Received: a batch size of 2"),
        ("sizes", None, "input 'x' has no known size, its shape is (None, None, None, 3): give --data."),
        ("text", None, "input 's' is string, of which there are no random values: give --data."),
        ("one", "none.npz", "--data cannot be read"),
        ("one", "none.npy", "--data cannot be read"),
        ("one", "damaged.npz", "--data cannot be read"),
        ("one", "file.txt", "--data cannot be read"),
        ("one", "wrong.npz", "--data lacks the inputs x; it holds z."),
        ("many", "data.npy", "--data lacks the inputs half, ids, mask, pixels, scale; it holds one array."),
        (
            "one",
            "shape.npz",
            "--data does not fit the input 'x', which is float32 (None, 8, 8, 3). Received: float64 [6, 7, 8, 3]",
        ),
        ("one", "dtype.npz", "--data does not fit the input 'x', which is float32 (None, 8, 8, 3). Received: complex64"),
        ("text", "numbers.npz", "--data does not fit the input 's', which is string (None,). Received: float64 [3]"),
        ("one", "none_left.npz", "--data does not fit the input 'x'"),
    ],
)
def test_what_the_worker_refuses(name, data, words, models):
    def prepare():
        model = serve.Model(str(models / name), "serving_default")
        serve.Inputs(model.inputs, str(models / data) if data else None).feeds(2)

    with pytest.raises(serve.Refusal) as caught:
        prepare()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def children(process):
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_is_left_behind(number, models, tmp_path):
    command = [sys.executable, "-m", "tfquant.benchmark", "--models", f"{models}/one,{models}/two", "--seconds", "600"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment(tmp_path)
    )
    end = time.monotonic() + 60
    while len(workers := children(process.pid)) < 2:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < end + 30, workers
        time.sleep(0.05)
    if number != signal.SIGKILL:
        assert (process.returncode, out, err) == (2, "", "tfquant.benchmark: Interrupted: nothing was written.\n")
    assert list(tmp_path.iterdir()) == []
