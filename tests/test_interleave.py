"""Tests of the workers and of the rounds that time them: numbers that are known, and every way in which a worker may fail."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tfquant.bench import interleave as module
from tfquant.bench.interleave import Times, Worker, WorkerError, interleave, race, speedup, throughput_ratio

ROOT = Path(__file__).resolve().parent.parent

# A worker whose runs take what its arguments say: milliseconds per sample, and what it does besides.
FAKE = """
import json, os, signal, subprocess, sys, time
options = json.loads(sys.argv[1])
what, log = options.get("what"), options.get("log")
print("a library says hello", flush=True)
print('[1, 2]', flush=True)
if what == "refuses": print(json.dumps({"error": "no such thing\\nreally"}), flush=True); sys.exit(0)
if what == "dies at the start": print("first line\\n  the reason \\n", file=sys.stderr); sys.exit(3)
if what == "is not ready": print(json.dumps({"hello": 1}), flush=True)
if what == "hangs": time.sleep(60)
if what == "starts others": print(json.dumps({"pid": subprocess.Popen(["sleep", "60"]).pid, "ready": True}), flush=True)
print(json.dumps({"ready": True, "fact": os.environ.get("FACT"), "gone": os.environ.get("GONE")}), flush=True)

def note(word):
    if log:
        with open(log, "a") as file: file.write(f"{word} {options['name']}\\n")

asked = []
for line in sys.stdin:
    request = json.loads(line)
    if request.get("quit"):
        if what == "does not quit": time.sleep(60)
        break
    note("begin")
    asked.append(request["runs"])
    runs, streams = request["runs"], request.get("streams", 1)
    if what == "dies": print("out of everything", file=sys.stderr); sys.exit(4)
    if what == "is killed": os.kill(os.getpid(), signal.SIGKILL)
    if what == "closes": os.close(1); time.sleep(60)
    if what == "errs": print(json.dumps({"error": f"batch {request['batch']} is too large"}), flush=True); continue
    if what == "counts wrongly": runs -= 1
    took = options.get("ms", 1.0) * request["batch"]
    times = [1000.0] * streams + [took] * (runs - streams) if what == "is slow at first" else [took] * runs
    if what == "stands still": times = [0] * runs
    note("end")
    print(json.dumps({"ms": times}), flush=True)
"""


def fake(label="fake", env=None, timeout=30, **options):
    return Worker([sys.executable, "-c", FAKE, json.dumps({"name": label, **options})], env, label, timeout)


def is_running(process):
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    return False


def wait_until_gone(processes):
    end = time.monotonic() + 20
    while any(is_running(process) for process in processes):
        assert time.monotonic() < end, [process for process in processes if is_running(process)]
        time.sleep(0.02)


def test_known_times_give_known_figures():
    with fake("slow", ms=100) as slow, fake("fast", ms=25.0) as fast:
        assert slow.ready() == {"fact": None, "gone": None}
        found = interleave([slow, fast], [{"batch": 1}, {"batch": 4, "streams": 2}], seconds=0)
    assert [[times.label for times in row] for row in found] == [["slow", "fast"]] * 2
    assert [[times.median for times in row] for row in found] == [[100, 25], [400, 100]]
    assert [[times.throughput for times in row] for row in found] == [[10, 40], [20, 80]]
    for row in found:
        assert (speedup(*row), throughput_ratio(*row), speedup(*reversed(row))) == (4, 4, 0.25)
    # Bursts of 0.3 s, the first run of each stream not counted, five rounds and at least ten runs.
    assert [[[len(burst) for burst in times.rounds] for times in row] for row in found] == [
        [[3] * 5, [12] * 5],
        [[2] * 5, [6] * 5],
    ]


def test_the_first_run_of_each_stream_is_not_counted():
    with fake(what="is slow at first", ms=50) as worker:
        ((times,),) = interleave([worker], [{"batch": 1, "streams": 3}], seconds=0)
    assert set(times.ms) == {50}
    assert times.throughput == 60


@pytest.mark.parametrize(("least_runs", "least_rounds", "rounds"), [(1, 1, 1), (1, 7, 7), (100, 1, 34)])
def test_at_least_so_many_runs_and_rounds(least_runs, least_rounds, rounds):
    with fake(ms=100) as worker:
        (times,) = race([(worker, {"batch": 1})], 0, least_runs, least_rounds)
    assert len(times.rounds) == rounds
    assert len(times.ms) == 3 * rounds


def test_one_runs_at_a_time_and_the_order_rotates(tmp_path):
    log = tmp_path / "log"
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(fake(name, ms=200, log=str(log))) for name in "abc"]
        race([(worker, {"batch": 1}) for worker in workers], 0, least_rounds=4)
    lines = log.read_text().split("\n")[:-1]
    assert all(one == other.replace("end", "begin") for one, other in zip(lines[::2], lines[1::2], strict=True))
    order = "".join(line[-1] for line in lines[::2])
    assert order == "abc" + "abc" + "bca" + "cab" + "abc" + ("bca" + "cab" + "abc" + "bca" + "cab" + "abc")[: len(order) - 15]


def test_a_worker_may_stand_in_several_entries():
    with fake(ms=10) as worker:
        one, four = race([(worker, {"batch": 2}), (worker, {"batch": 2, "streams": 4})], 0)
    assert (one.throughput, four.throughput) == (100, 400)
    assert (speedup(one, four), throughput_ratio(one, four)) == (1, 4)


def test_percentiles():
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 10, 101):
        values = rng.random(count)
        times = Times("a", {"batch": 1}, (tuple(values[: count // 2]), tuple(values[count // 2 :])))
        for percent in (0, 37.5, 50, 90, 99, 100):
            assert times.percentile(percent) == pytest.approx(np.percentile(values, percent))
        assert times.median == pytest.approx(np.median(values))


def test_ratios_are_of_the_same_round():
    # The machine is three times slower in every other round: the ratio is 2 in each, that of the overall medians need not be.
    load = [1, 3, 1, 3, 3, 1, 3]
    first = Times("a", {"batch": 1}, tuple((8.0 * times, 9.0 * times, 80.0) for times in load))
    other = Times("b", {"batch": 2}, tuple((4.0 * times, 4.5 * times, 1.0 * times) for times in load))
    assert speedup(first, other) == 9 / 4
    fifth = Times("b", {"batch": 1}, tuple((10.0 * times,) for times in load))
    tenth = Times("c", {"batch": 1, "streams": 3}, tuple((20.0 * times, 40.0 * times) for times in load))
    assert throughput_ratio(fifth, tenth) == pytest.approx(1)
    assert speedup(fifth, tenth) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="shorter"):
        speedup(first, Times("d", {"batch": 1}, ((1.0,),)))


def test_the_environment_of_a_worker(monkeypatch):
    monkeypatch.setenv("GONE", "here")
    monkeypatch.setenv("FACT", "old")
    with fake(env={"FACT": "new", "GONE": None}) as worker:
        assert worker.ready() == {"fact": "new", "gone": None}
        assert worker.memory() > 1e6


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("refuses", "no such thing really"),
        ("dies at the start", "ended with exit code 3: the reason"),
        ("is not ready", "its first line does not say that it is ready. Received: {'hello': 1}"),
        ("hangs", "no answer in 0.5 seconds"),
        ("dies", "ended with exit code 4: out of everything"),
        ("is killed", "ended by SIGKILL, perhaps for lack of memory"),
        ("closes", "closed its stdout"),
        ("errs", "batch 16 is too large"),
        ("counts wrongly", "2 times of runs were asked for. Received: [16.0]"),
        ("stands still", "2 times of runs were asked for. Received: [0, 0]"),
    ],
)
def test_the_reason_of_a_failure(what, reason, monkeypatch):
    monkeypatch.setattr(module, "_QUIT_SECONDS", 0.5)
    good = fake("good")
    bad = fake("bad", timeout=0.5 if what == "hangs" else 30, what=what)
    with pytest.raises(WorkerError) as caught, good, bad:
        interleave([good, bad], [{"batch": 16}], seconds=0)
    assert str(caught.value) == f"bad: {reason}"
    assert (caught.value.label, caught.value.reason) == ("bad", reason)
    wait_until_gone([good._process.pid, bad._process.pid])


def test_a_refusal_is_not_the_end():
    with fake(what="errs") as worker:
        for _ in range(2):
            with pytest.raises(WorkerError, match="batch 3 is too large"):
                worker.run({"batch": 3}, 1)


def test_a_command_that_does_not_exist(tmp_path):
    with pytest.raises(WorkerError, match=r"^nothing: cannot be started: .*No such file"):
        Worker([str(tmp_path / "nothing")])


def test_closing(monkeypatch):
    monkeypatch.setattr(module, "_QUIT_SECONDS", 0.3)
    for what in ("runs", "does not quit", "starts others"):
        worker = fake(what=what)
        others = [worker.ready()["pid"]] if what == "starts others" else []
        worker.close()
        worker.close()
        worker.kill()
        wait_until_gone([worker._process.pid, *others])


def test_an_error_in_the_block_ends_all_at_once():
    worker = fake(what="starts others")
    others = [worker.ready()["pid"], worker._process.pid]
    with pytest.raises(KeyboardInterrupt), worker:
        raise KeyboardInterrupt
    wait_until_gone(others)


PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
from tests_of_workers import fake
workers = [fake(), fake(what="hangs")]
workers[0].ready()
print(*(worker._process.pid for worker in workers), flush=True)
workers[1].ready()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_parent(number, tmp_path):
    (tmp_path / "tests_of_workers.py").write_text(Path(__file__).read_text())
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as parent:
        workers = [int(word) for word in parent.stdout.readline().split()]
        assert len(workers) == 2
        assert all(is_running(worker) for worker in workers)
        parent.send_signal(number)
    wait_until_gone(workers)
