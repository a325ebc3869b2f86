"""Comparisons with other tools: tables of known times, sides that fail, environments, and a run of the two sides at hand."""

import json
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest

from scripts.peers import environments, models, report
from scripts.peers.building import Build, Workshop
from scripts.peers.comparison import Candidate, Comparison, Outcome, Timing
from scripts.peers.environments import Environment
from scripts.peers.failure import Failure
from scripts.peers.sides import SIDES, Setting, Side, Step
from tfquant.bench.interleave import Times, Worker, speedup
from tfquant.verify import Fidelity

ROOT = Path(__file__).resolve().parents[1]

# Runs in no time and says that it took what it was told; with outputs of its own.
FAKE = """
import json, sys
import numpy as np
ms, noise, refuses = float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
print(json.dumps({"ready": True, "versions": ["fake 1.0"]}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request.get("quit"):
        break
    if "outputs" in request:
        rows = np.eye(4, dtype=np.float32)
        np.savez(request["outputs"], scores=rows + noise * rows[::-1])
        print(json.dumps({"outputs": request["outputs"]}), flush=True)
    elif request["batch"] == refuses:
        print(json.dumps({"error": "no kernel for this batch"}), flush=True)
    else:
        print(json.dumps({"ms": [ms * request["batch"]] * request["runs"]}), flush=True)
"""


class FakeWorkshop:
    """Has a side's figures by the label of its setting: (milliseconds per sample, noise of the outputs, batch refused)."""

    def __init__(self, figures):
        self._figures = figures
        self.started = []

    def build(self, side, setting):
        if "broken" in setting.label:
            raise Failure("cannot quantize: no such op")
        return Build("model", str(setting.build.get("kind", "")), 1.5, 2.0, 300.0, ("maker 2.0",))

    def start(self, side, setting, build):
        self.started.append((side.name, setting.label))
        figures = [str(figure) for figure in self._figures[side.name, setting.label]]
        return Worker([sys.executable, "-c", FAKE, *figures], label=f"{side.title}, {setting.label}")


def side(name, *labels):
    return Side(name, name.upper(), (), "", tuple(Setting(label, {"kind": label}) for label in labels))


def compare(figures, batch_sizes=(1, 4)):
    """Outcomes by name, of sides with the settings in `figures`; "broken" ones cannot be built."""
    labels = {}
    for name, label in figures:
        labels.setdefault(name, []).append(label)
    sides = [side(name, *settings) for name, settings in labels.items()]
    said = []
    outcomes = Comparison(FakeWorkshop(figures), sides, list(batch_sizes), 0.01, said.append).run()
    return {outcome.side.name: outcome for outcome in outcomes}, said


def test_each_side_runs_its_fastest_setting_and_is_compared_with_tfquant():
    figures = {
        ("float32", "plain"): (8.0, 0, 0),
        ("tfquant", "slow"): (3.0, 0.1, 0),
        ("tfquant", "fast"): (2.0, 0.1, 0),
        ("peer", "only"): (1.0, 0.5, 0),
    }
    outcomes, _ = compare(figures)
    assert {name: outcome.timings[4].times.median for name, outcome in outcomes.items()} == {
        "float32": 32.0,
        "tfquant": 8.0,
        "peer": 4.0,
    }
    assert {name: outcome.timings[1].ratio for name, outcome in outcomes.items()} == {"float32": 4, "tfquant": 1, "peer": 0.5}
    ours = outcomes["tfquant"].timings[1]
    assert ours.candidate.setting.label == "fast"
    assert ours.searched == {"slow": 3.0, "fast": 2.0}
    assert ours.versions == ("fake 1.0", "maker 2.0")
    # The noise is as far from the signal as its factor says, and turns no answer over.
    assert ours.fidelity.sqnr == pytest.approx(20)
    assert outcomes["peer"].timings[1].fidelity.sqnr == pytest.approx(20 * np.log10(2), abs=1e-5)
    assert ours.fidelity.agreement == 100
    assert outcomes["float32"].timings[1].fidelity is None


def test_what_fails_is_told_and_the_others_go_on():
    figures = {
        ("float32", "plain"): (8.0, 0, 0),
        ("tfquant", "plain"): (2.0, 0, 0),
        ("unbuilt", "broken"): (1.0, 0, 0),
        ("half", "broken half"): (0.5, 0, 0),
        ("half", "whole"): (1.0, 0, 0),
        ("refusing", "plain"): (1.0, 0, 4),
    }
    outcomes, said = compare(figures)
    assert outcomes["unbuilt"].timings == {}
    assert outcomes["unbuilt"].failures == dict.fromkeys((1, 4), "cannot quantize: no such op")
    assert outcomes["half"].timings[4].candidate.setting.label == "whole"
    assert outcomes["half"].failures == {}
    assert outcomes["refusing"].timings[1].ratio == 0.5
    assert outcomes["refusing"].failures == {4: "plain: no kernel for this batch"}
    assert outcomes["tfquant"].timings[4].times.median == 8.0
    assert "REFUSING: plain: no kernel for this batch" in said


def outcome(name, title, medians, fidelity=None, failures=None, kind="", seconds=None, ours=None):
    labelled = Side(name, title, (), "", (Setting("as it is"),))
    build = Build("model", kind, 12.34, seconds, seconds and 1000.0, ())
    timings = {}
    for batch, median in medians.items():
        times = Times(title, {"batch": batch}, ((median,),) * 5)
        ratio = None if ours is None else speedup(times, Times("", {"batch": batch}, ((ours[batch],),) * 5))
        candidate = Candidate(labelled, labelled.settings[0], build)
        timings[batch] = Timing(candidate, times, ratio, ("runtime 3.1",), fidelity, {}, 0.25 if batch == 16 else 0.01)
    return Outcome(labelled, timings, failures or {})


OURS = {1: 4.0, 16: 25.0}
OUTCOMES = [
    outcome("float32", "float32 TensorFlow", {1: 10.0, 16: 100.0}, ours=OURS),
    outcome("tfquant", "tfquant INT8", OURS, Fidelity(64, 38.25, 98.4375, 0.00321), seconds=20.4, ours=OURS),
    outcome("peer", "Peer INT8", {1: 2.0}, Fidelity(64, 20.0, None, None), {16: "out of memory"}, "mixed", 3.0, OURS),
]


def test_tables_of_known_times():
    assert report.model_lines("Net", OUTCOMES, [1, 16]) == textwrap.dedent("""\
        Net                | b1 ms | / tfquant's | b16 ms | / tfquant's
        -------------------+-------+-------------+--------+------------
        float32 TensorFlow | 10.00 |        2.50 | 100.00 |        4.00
        tfquant INT8       |  4.00 |        1.00 |  25.00 |        1.00
        Peer INT8          |  2.00 |        0.50 | failed |            
        Peer INT8 at batch 16: out of memory
        Batch 16: threads waited for a core 25% of the time: other programs ran beside these

        Quantizing         | seconds | peak MB | MB on disk | agreement | mean KL | SQNR dB
        -------------------+---------+---------+------------+-----------+---------+--------
        float32 TensorFlow |         |         |       12.3 |           |         |        
        tfquant INT8       |      20 |    1000 |       12.3 |     98.4% |  0.0032 |    38.2
        Peer INT8, mixed   |       3 |    1000 |       12.3 |           |         |    20.0

        Settings, the fastest of those tried:
          float32 TensorFlow, batch 1, 16: as it is
            with runtime 3.1
          tfquant INT8, batch 1, 16: as it is
            with runtime 3.1
          Peer INT8, batch 1: as it is
            with runtime 3.1""").split("\n")


def test_the_summary_has_a_column_per_model_and_batch_size():
    assert report.summary_lines({"Net": OUTCOMES, "Other": OUTCOMES}, [16, 1]) == textwrap.dedent("""\
        Time / tfquant's   | Net b16 | Net b1 | Other b16 | Other b1
        -------------------+---------+--------+-----------+---------
        float32 TensorFlow |    4.00 |   2.50 |      4.00 |     2.50
        Peer INT8          |         |   0.50 |           |     0.50""").split("\n")


def test_json_has_the_figures():
    sides = json.loads(json.dumps(report.to_json(OUTCOMES)))
    peer = sides["peer"]
    assert peer["failures"] == {"16": "out of memory"}
    assert peer["batches"]["1"]["median_ms"] == 2.0
    assert peer["batches"]["1"]["ratio_to_tfquant"] == 0.5
    assert peer["batches"]["1"]["build"]["peak_megabytes"] == 1000.0
    assert sides["tfquant"]["batches"]["16"]["fidelity"]["sqnr"] == 38.25
    assert sides["tfquant"]["batches"]["16"]["waited_for_cores"] == 0.25


# Environments


@pytest.fixture
def commands(monkeypatch):
    """The commands that would have been run; `fails` names a part of those that fail."""
    ran = types.SimpleNamespace(lines=[], fails=None)

    def run(command, **_):
        ran.lines.append(" ".join(command))
        failed = ran.fails is not None and ran.fails in ran.lines[-1]
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True)
            (Path(command[-1]) / "bin" / "python").touch()
        return types.SimpleNamespace(returncode=int(failed), stdout="", stderr="note\nERROR: No matching distribution for x\n")

    monkeypatch.setattr(environments.subprocess, "run", run)
    here = ".".join(map(str, sys.version_info[:2]))
    monkeypatch.setitem(environments.ENVIRONMENTS, "peer", Environment("peer", ("x>=1,<2", "y>=3"), (here,)))
    return ran


def test_an_environment_is_made_once(commands, tmp_path):
    python = environments.python_of("peer", tmp_path)
    assert python == tmp_path / "peer" / "bin" / "python"
    assert commands.lines[0] == f"{sys.executable} -m venv {tmp_path / 'peer'}"
    assert commands.lines[1].endswith("x>=1,<2 y>=3")
    assert environments.python_of("peer", tmp_path) == python
    assert len(commands.lines) == 2


def test_an_interrupted_install_is_repeated(commands, tmp_path):
    commands.fails = "pip install"
    with pytest.raises(Failure, match=r"^pip cannot install it: ERROR: No matching distribution for x$"):
        environments.python_of("peer", tmp_path)
    commands.fails = None
    environments.python_of("peer", tmp_path)
    assert ["venv" in line for line in commands.lines] == [True, False, False]


def test_other_requirements_are_installed_again(commands, tmp_path, monkeypatch):
    environments.python_of("peer", tmp_path)
    here = ".".join(map(str, sys.version_info[:2]))
    monkeypatch.setitem(environments.ENVIRONMENTS, "peer", Environment("peer", ("x>=2,<3",), (here,)))
    environments.python_of("peer", tmp_path)
    assert commands.lines[-1].endswith(" x>=2,<3")


def test_a_python_that_is_not_there(commands, tmp_path, monkeypatch):
    monkeypatch.setitem(environments.ENVIRONMENTS, "peer", Environment("peer", ("x",), ("2.7",)))
    with pytest.raises(Failure, match=r"^needs python 2\.7, which is not on the PATH$"):
        environments.python_of("peer", tmp_path)


def test_every_environment_that_a_side_names_is_known():
    for each in SIDES.values():
        named = {step.environment for step in each.build} | {setting.environment for setting in each.settings}
        assert named - {None} <= environments.ENVIRONMENTS.keys()
        for script in (each.run, *(step.script for step in each.build)):
            assert (ROOT / "scripts" / "peers" / "workers" / script).is_file()


# The command, with the sides that need no environment


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(SavedModel, data) of a small convolutional net."""
    import keras

    folder = tmp_path_factory.mktemp("tiny")
    keras.utils.set_random_seed(0)
    layers = [keras.Input((16, 16, 3), name="image"), keras.layers.Conv2D(8, 3, activation="relu"), keras.layers.Flatten()]
    model = keras.Sequential([*layers, keras.layers.Dense(10)])
    model.export(str(folder / "net"), verbose=False)
    samples = np.random.default_rng(0).normal(size=(48, 16, 16, 3)).astype(np.float32)
    np.savez(folder / "samples.npz", image=samples)
    return folder / "net", folder / "samples.npz"


def bench(tmp_path, *arguments):
    command = [sys.executable, str(ROOT / "scripts" / "bench_peers.py"), "--output", str(tmp_path / "kept"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)


@pytest.mark.slow
def test_two_sides_all_the_way(tiny, tmp_path):
    saved_model, data = tiny
    arguments = ["--saved_model", str(saved_model), "--data", str(data), "--only", "float32,tfquant", "--seconds", "0.1"]
    arguments += ["--batch_sizes", "1,4", "--threads", "1", "--json", "figures.json"]
    done = bench(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert "tfquant INT8: quantizing" in done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["threads"] == 1
    sides = figures["models"]["net"]
    assert list(sides) == ["float32", "tfquant"]
    for batch in ("1", "4"):
        plain, ours = (sides[name]["batches"][batch] for name in ("float32", "tfquant"))
        assert plain["median_ms"] > 0
        assert plain["ratio_to_tfquant"] > 0
        assert ours["ratio_to_tfquant"] == 1
        assert ours["fidelity"]["samples"] == 32  # 16 of 48 calibrate
        assert ours["fidelity"]["sqnr"] > 25
        assert ours["build"]["peak_megabytes"] > 100
        assert ours["build"]["megabytes"] < plain["build"]["megabytes"]
        assert len(ours["searched_ms"]) == len(SIDES["tfquant"].settings)
    lines = done.stdout.splitlines()
    assert lines[0].split("|")[0].strip() == "net"
    assert any(line.startswith("float32 TensorFlow") for line in lines)


def test_what_a_build_depends_on_changes_it(tiny, tmp_path, monkeypatch):
    saved_model, _ = tiny
    built = []

    def step(self, side, step, python, options):
        built.append(options["kind"])
        (Path(options["folder"]) / "model").write_bytes(b"1" * 500_000)
        return {"built": {"model": str(Path(options["folder"]) / "model")}, "versions": ["x 1"], "peak_megabytes": 7.0}

    monkeypatch.setattr(Workshop, "_step", step)
    calibration = tmp_path / "calibration.npz"
    calibration.write_bytes(b"one")
    model = models.Model("net", saved_model, calibration, calibration, False, tmp_path)
    workshop = Workshop(model, 1, tmp_path, 10, lambda _: None)
    peer = Side("peer", "Peer", (Step("tflite_int8.py"),), "", (Setting("a", {"kind": "a"}), Setting("b", {"kind": "b"})))
    build = workshop.build(peer, peer.settings[0])
    assert (build.megabytes, build.peak_megabytes, build.versions) == (0.5, 7.0, ("x 1",))
    assert workshop.build(peer, peer.settings[0]) == build
    workshop.build(peer, peer.settings[1])
    assert built == ["a", "b"]
    calibration.write_bytes(b"two")
    workshop.build(peer, peer.settings[0])
    assert built == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--only", "tfquant,tensorrt"], "there is no side 'tensorrt'"),
        (["--threads", "0"], "this process may use"),
        (["--batch_sizes", "1,0"], "invalid numbers value: '1,0'"),
        (["--seconds", "0"], "must be above 0"),
        (["--data", "x.npz"], "is for --saved_model"),
        (["--names", "ResNet5"], "the nearest is ResNet50"),
        (["--saved_model", "nowhere"], "nowhere is not a SavedModel, nor a Keras file"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, arguments, line):
    done = bench(tmp_path, *arguments)
    told = [each for each in done.stderr.splitlines() if not each.startswith("== ")]
    assert done.returncode == 2
    assert len(told) == 1, done.stderr
    assert told[0].startswith("bench_peers: ")
    assert line in told[0]
