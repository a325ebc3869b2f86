"""Tests of the search for runtime settings, on workers whose times are known functions of the setting."""

import itertools
import json
import re
import subprocess

import numpy as np
import pytest

from tfquant.bench import settings, tuning
from tfquant.bench.interleave import WorkerError
from tfquant.bench.settings import LATENCY, THROUGHPUT, Choice, Setting
from tfquant.bench.tuning import Arm, candidates, ladder, tune
from tfquant.errors import ConfigError, OutputError

MEMUSE, CALLER = settings.SWITCHES


class Runs:
    """Stands for the workers: `took` gives milliseconds for (variables, batch, streams)."""

    def __init__(self, took, noise=0.0, memory=0):
        self.took, self.noise, self.memory = took, noise, memory
        self.rng = np.random.default_rng(0)
        self.load = 1.0
        self.alive, self.most, self.started = set(), 0, []

    def start(self, setting, label):
        self.started.append(setting)
        return _Worker(self, setting, label)


class _Worker:
    def __init__(self, runs, setting, label):
        self.runs, self.setting, self.label = runs, setting, label
        runs.alive.add(self)
        runs.most = max(runs.most, len(runs.alive))

    def ready(self):
        return {"tensorflow": "2.x"}

    def memory(self):
        return self.runs.memory

    def run(self, request, runs):
        assert self in self.runs.alive
        took = self.runs.took(self.setting.variables, request["batch"], request["streams"])
        if took is None:
            raise WorkerError(self.label, "does not run")
        self.runs.load *= np.exp(self.runs.rng.normal() * self.runs.noise)  # the machine drifts
        return list(took * self.runs.load * np.exp(self.runs.rng.normal(size=runs) * self.runs.noise))

    def kill(self):
        self.runs.alive.discard(self)

    close = kill


def search(took, cores=2, streams=None, batch_sizes=(1,), **options):
    runs = Runs(took, **options)
    streams = streams or ladder(cores)
    found = tune(runs.start, candidates(ladder(cores), streams, cores), batch_sizes, 0.0, streams)
    assert not runs.alive
    return {(choice.batch_size, choice.objective): choice for choice in found.choices}, found, runs


def plain(variables, batch, streams):
    """Threads help large batches alone, waking them costs; the caller's share helps with several; streams overlap."""
    threads = int(variables["TF_NUM_INTRAOP_THREADS"])
    wake = 0.0 if threads == 1 else 1.0 if variables[CALLER] == "1" else 3.0
    took = 2.0 + 4.0 * batch / threads + wake
    took *= 0.95 if variables[MEMUSE] == "0" else 1.0
    return took * (1 + 0.3 * (streams - 1))


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_the_best_is_found(noise):
    best, found, _ = search(plain, batch_sizes=(1, 16), noise=noise)
    one, sixteen = best[1, LATENCY], best[16, LATENCY]
    assert (one.setting.intra_op, sixteen.setting.intra_op) == (2, 2)
    for choice in (one, sixteen):
        assert dict(choice.setting.env) == {MEMUSE: "0", CALLER: "1"}
        assert choice.streams == 1
    assert best[16, THROUGHPUT].streams == 2
    tolerance = 0.2 if noise else 1e-9
    assert one.gain == pytest.approx(7 / 4.75, rel=tolerance)
    assert best[16, THROUGHPUT].gain == pytest.approx(37 / (35 * 0.95) * 2 / 1.3, rel=tolerance)
    if not noise:
        assert (one.default_ms, one.ms) == pytest.approx((7, 4.75))
    assert found.tensorflow == "2.x"


def test_what_is_tried():
    assert [ladder(cores) for cores in (1, 2, 3, 4, 6, 16)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8, 16]]
    assert ladder(64) == [1, 8, 16, 32, 64]
    arms = candidates([1, 2], [1, 2], 2, (("A", "b"),))
    assert arms[0] == Arm(Setting(2, 2, (("A", "b"), (MEMUSE, "1"), (CALLER, "0"))), 1)
    assert len(arms) == len(set(arms)) == 2 * 4 * 2 + 2 * 4
    assert {arm.setting.inter_op for arm in arms if arm.streams == 2} == {2}
    assert max(arm.setting.intra_op * arm.streams for arm in candidates(ladder(64), ladder(64), 64)) == 128
    assert len(candidates([1], [1], 1)) == 4
    assert candidates([4, 8], [16], 64)[0] == Arm(Setting(8, 64, ((MEMUSE, "1"), (CALLER, "0"))), 1)


def test_the_default_stays_where_nothing_is_better():
    for took in (lambda *_: 5.0, lambda v, b, s: (5.0 - 0.05 * (v[MEMUSE] == "0")) * s):
        best, _, _ = search(took, streams=[1])
        for choice in best.values():
            assert choice.setting == choice.default
            assert (choice.streams, choice.gain) == (1, 1)
            assert "nothing to set" in str(choice)
            assert "export" not in str(choice)


def test_of_settings_alike_the_simpler_one():
    best, _, _ = search(lambda v, b, s: (4.0 if v[MEMUSE] == "0" else 5.0) - 0.001 * int(v["TF_NUM_INTEROP_THREADS"] == "1"))
    assert best[1, LATENCY].setting.differences(best[1, LATENCY].default) == {MEMUSE: "0"}
    assert best[1, THROUGHPUT].streams == 2  # as long as it takes, twice as much at a time
    assert best[1, THROUGHPUT].gain == pytest.approx(2.5)


def test_a_setting_that_fails_is_left_out():
    best, found, _ = search(lambda v, b, s: None if v[CALLER] == "1" else plain(v, b, s))
    assert dict(best[1, LATENCY].setting.env) == {MEMUSE: "0", CALLER: "0"}
    assert {dict(measured.arm.setting.env)[CALLER] for measured in found.measured} == {"0"}
    with pytest.raises(WorkerError, match=r"^TensorFlow's defaults: does not run$"):
        search(lambda v, b, s: None if v[CALLER] == "0" else 1.0)
    best, _, _ = search(
        lambda v, b, s: 1.0 if v["TF_NUM_INTRAOP_THREADS"] == "2" and v[MEMUSE] == "1" and v[CALLER] == "0" else None
    )
    assert best[1, LATENCY].setting == best[1, LATENCY].default
    assert best[1, THROUGHPUT].streams == 2


def test_the_best_third_goes_on():
    _, found, _ = search(plain, cores=4)
    for objective in (LATENCY, THROUGHPUT):
        stages = {}
        for measured in found.measured:
            if measured.contest.objective == objective:
                stages.setdefault(measured.stage, set()).add(measured.arm)
        counts = [len(stages[stage]) - 1 for stage in sorted(stages)]  # the default is always there
        assert counts[-1] == 3
        assert all(after == max(3, -(-before // 3)) for before, after in itertools.pairwise(counts)), counts
        assert all(stages[stage + 1] <= stages[stage] for stage in range(1, len(stages)))


@pytest.mark.parametrize(("free", "most"), [(1, 2), (2.1, 2), (6, 6), (1000, 16), (None, 16)])
def test_no_more_processes_than_memory_has_room_for(free, most, monkeypatch):
    each = 10**9
    runs = Runs(plain, memory=each)

    def free_memory():
        return None if free is None else int(each * (free - len(runs.alive)) / tuning._MEMORY_SHARE)

    monkeypatch.setattr(tuning, "free_memory", free_memory)
    found = tune(runs.start, candidates([1, 2], [1, 2], 2), [1], 0.0, [1, 2])
    assert found.choices[0].setting.intra_op == 2
    assert runs.most <= most
    if free is None or free >= 1000:  # and then none is started twice
        assert len(runs.started) == len(set(runs.started)) == runs.most == 16


def choices():
    default = Setting(2, 2, ((MEMUSE, "1"), (CALLER, "0")))
    fast = Setting(1, 1, ((MEMUSE, "0"), (CALLER, "0"), ("ODD", "it's $5")))
    return [
        Choice(1, LATENCY, fast, 1, default, 2.0, 500.0, 3.0, 333.0, 1.5),
        Choice(16, THROUGHPUT, default, 2, default, 20.0, 800.0, 20.0, 400.0, 2.0),
    ]


def test_what_is_written_can_be_read_and_sourced(tmp_path):
    path = tmp_path / "settings.json"
    assert settings.save(path, choices(), {"cpu": "x"}) == tmp_path / "settings.env"
    assert settings.load(str(path)) == choices()
    assert json.loads(path.read_text())["machine"] == {"cpu": "x"}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["settings.env", "settings.json"]
    command = ["bash", "-euc", f"source {tmp_path}/settings.env; env -0"]
    lines = subprocess.run(command, capture_output=True, env={}, check=True).stdout.decode().split("\0")
    sourced = dict(line.split("=", 1) for line in lines if re.match("TF_|ODD", line))
    assert sourced == {MEMUSE: "0", "ODD": "it's $5", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
    text = path.with_suffix(".env").read_text()
    assert "# batch 1, lowest latency: 2.00 ms; TensorFlow's defaults 3.00 ms, 1.50x" in text
    assert "# or in Python: tf.config.threading.set_intra_op_parallelism_threads(1)" in text
    assert "# batch 16, highest throughput: 800.0 samples/s; TensorFlow's defaults 400.0, 2.00x\n# 2 runs at a time\n" in text
    settings.save(path, choices()[1:], {})
    assert [choice.batch_size for choice in settings.load(str(path))] == [16]


def test_settings_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        settings.save(tmp_path / "none" / "settings.json", choices(), {})


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.pop("objective"),
        lambda entry: entry.update(objective="speed"),
        lambda entry: entry.update(batch_size=0),
        lambda entry: entry.update(streams="2"),
        lambda entry: entry.update(ms="fast"),
        lambda entry: entry["setting"].update(env=[1]),
        lambda entry: entry["setting"].update(intra_op=True),
        lambda entry: entry.update(setting=None),
    ],
)
def test_settings_that_are_none(change, tmp_path):
    path = tmp_path / "settings.json"
    settings.save(path, choices(), {})
    content = json.loads(path.read_text())
    change(content["settings"][1])
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="does not hold runtime settings"):
        settings.load(str(path))


@pytest.mark.parametrize(
    ("text", "words"), [(None, "cannot be read"), ("{", "is no JSON"), ("[]", "does not hold"), ("3", "does not hold")]
)
def test_files_that_are_no_settings(text, words, tmp_path):
    path = tmp_path / "settings.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        settings.load(str(path))
