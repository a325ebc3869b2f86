"""Random graphs; `scripts/fuzz.py` takes more of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COUNT = 100


def run_script(*arguments):
    """In a process of its own: this one has run TensorFlow ops and must not fork."""
    command = [sys.executable, str(ROOT / "scripts" / "fuzz.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_random_graphs():
    done = run_script("--count", str(COUNT), "--jobs", "2")
    assert done.stdout == f"{COUNT} graphs: 0 crashes, 0 disagreements\n"
    assert done.returncode == 0


FAULTY = """
import json, os, signal, sys, time
sys.path[:0] = {path!r}
import fuzzing

def find(seed, verbose=False):
    if seed == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if seed == 2:
        raise ValueError("wrong")
    if seed == 3:
        return ["off"]
    if seed == 4:
        time.sleep(100)
    if seed == 5:
        os._exit(3)
    return []

fuzzing.find, fuzzing.TIMEOUT = find, 2.0
results = dict(fuzzing.fuzz(range(7), jobs=3))
print(json.dumps({{seed: failure and [failure.crash, list(failure.found)] for seed, failure in results.items()}}))
"""


def test_failures_are_told_apart():
    path = [str(ROOT), str(ROOT / "tests")]
    done = subprocess.run([sys.executable, "-c", FAULTY.format(path=path)], capture_output=True, text=True, timeout=120)
    results = json.loads(done.stdout)
    assert results["0"] is None
    assert results["1"] == ["SIGSEGV", []]
    assert results["2"][0].startswith("ValueError in <string>:")
    assert results["3"] == ["", ["off"]]
    assert results["4"][0] == "no end after 2 s"
    assert results["5"][0] == "exit status 3 without a result"
    assert results["6"] is None


@pytest.mark.parametrize("arguments", [["--count", "0"], ["--seed", "-1"], ["--jobs", "0"]])
def test_wrong_arguments(arguments):
    done = run_script(*arguments)
    assert done.returncode == 2
    assert "must be" in done.stderr
