"""Random graphs; `scripts/fuzz.py` takes more of them."""

import json
import re
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
    found = re.fullmatch(rf"{COUNT} graphs, (\d+) skipped: 0 crashes, 0 disagreements\n", done.stdout)
    assert found, done.stdout
    assert int(found[1]) <= COUNT // 20
    assert done.returncode == 0


FEATURES = """
import collections, json, sys
sys.path[:0] = {path!r}
import building, fuzzing
found = collections.Counter()
for seed in range(200):
    generator = fuzzing.Generator(seed)
    specs, _ = generator.inputs()
    generator.options()
    generator.ignored(building.build(generator.function, specs))
    found.update(generator.features)
print(json.dumps(found))
"""
EXPECTED = {  # of 200 graphs, at least so many
    "NCHW": 10,
    "NCHW in NHWC": 15,
    "NHWC in NCHW": 1,
    "half": 10,
    "half inputs": 5,
    "bytes": 10,
    "groups": 2,
    "groups of one channel": 10,
    "symmetric": 30,
    "per_tensor": 30,
    "no_vnni": 25,
    "dynamic": 10,
    "ignored scope": 15,
    "several outputs": 100,
    "output of a section": 1,
    "output of another type": 5,
    "cond": 4,
    "while": 4,
    "call": 4,
    "int input": 10,
    "string input": 10,
}


@pytest.mark.slow
def test_what_the_graphs_are_made_of():
    path = [str(ROOT), str(ROOT / "tests")]
    done = subprocess.run([sys.executable, "-c", FEATURES.format(path=path)], capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout)
    assert found.keys() == EXPECTED.keys()
    assert [feature for feature, least in EXPECTED.items() if found[feature] < least] == []


FAULTY = """
import dataclasses, json, os, signal, sys, time
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
    if seed == 7:
        raise fuzzing.Unrunnable("it is too large")
    return []

fuzzing.find, fuzzing.TIMEOUT = find, 2.0
results = dict(fuzzing.fuzz(range(8), jobs=3))
print(json.dumps({{seed: result and list(dataclasses.asdict(result).values())[1:] for seed, result in results.items()}}))
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
    assert results["7"] == ["it is too large"]


@pytest.mark.parametrize("arguments", [["--count", "0"], ["--seed", "-1"], ["--jobs", "0"]])
def test_wrong_arguments(arguments):
    done = run_script(*arguments)
    assert done.returncode == 2
    assert "must be" in done.stderr
