"""Damaged files of every kind; `scripts/corrupt.py` takes more of them."""

import collections
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import corruption
import pytest

ROOT = Path(__file__).parents[1]
COUNT = 40


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    corruption.make_inputs(folder)
    return folder


def run_script(*arguments):
    command = [sys.executable, str(ROOT / "scripts" / "corrupt.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


def test_good_inputs_are_taken(inputs):
    """All commands, with nothing damaged."""
    worker = corruption.Worker(inputs)
    try:
        for index, (files, command) in enumerate(corruption.TARGETS):
            assert all((inputs / name).is_file() for name in files)
            verify = () if command[0].startswith("--config") else ("--noverify",)
            code, out, err = worker.ask({"run": [*command, *verify, f"--output=good/{index}"]})
            assert (code, err) == (0, "")
            assert out.endswith(f"Written to good/{index}\n")
    finally:
        worker.close()


def test_cases_repeat_and_differ(inputs):
    cases = [corruption.make_case(inputs, seed) for seed in range(200)]
    assert cases == [corruption.make_case(inputs, seed) for seed in range(200)]
    assert {case.damage.removesuffix(" inside") for case in cases} == set(corruption.DAMAGE)
    assert {case.file for case in cases} == {name for files, _ in corruption.TARGETS for name in files}
    assert sum(case.content == (inputs / case.file).read_bytes() for case in cases) < 10
    for case in cases:
        if case.damage.endswith(" inside"):
            (inputs / "changed.zip").write_bytes(case.content)
            with zipfile.ZipFile(inputs / "changed.zip") as archive:
                assert archive.testzip() is None
    (inputs / "changed.zip").unlink()


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        ((0, "Written", ""), ""),
        ((0, "", "Corrupt JPEG data: 9 extraneous bytes before marker 0xda\n"), ""),
        ((2, "", "tfquant.calibrate: no\n"), ""),
        ((2, "", ""), "0 lines"),
        ((2, "", "tfquant.calibrate: no\nmore\n"), "2 lines"),
        ((2, "", "no\n"), "1 lines"),
        ((2, "Quantized", "tfquant.calibrate: no\n"), "stdout"),
        ((1, "", "Traceback (most recent call last):\nValueError: x\n"), "exit code 1: ValueError: x"),
        ((-11, "", ""), "exit code -11: no word"),
        (("no end after 120 s", "", ""), "no end"),
    ],
)
def test_what_is_allowed(answer, wrong):
    found = corruption._wrong_line(answer)
    assert bool(found) == bool(wrong)
    assert wrong in found


CRASHES = "import os\ndef f():\n    os.abort()\n"
LEAVES = "import os, numpy as np\ndef f():\n    open('stray', 'w').close()\n    raise ValueError('wrong')\n"
HALF = """
import numpy as np
import tfquant.pipeline
tfquant.pipeline.save_plan = lambda plan, folder: None
def f():
    for index in range(3):
        yield np.full((6, 6, 3), index, "f4")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "kind", "line"),
    [
        (CRASHES, "crashed", "TensorFlow crashed (SIGABRT) while "),
        (LEAVES, "wrong", "left behind: stray"),
        (HALF, "wrong", "the output lacks quant_plan.json, quant_plan.npz"),
        ("import time\nf = lambda: time.sleep(100)\n", "wrong", "no end after 15 s"),
    ],
)
def test_failures_are_told_apart(inputs, monkeypatch, module, kind, line):
    """Data functions that do what TensorFlow might do."""
    (inputs / "feed.py").write_text(module)
    target = (("feed.py",), ("--saved_model=model", "--data=feed:f"))
    monkeypatch.setattr(corruption, "TARGETS", (target,))
    monkeypatch.setattr(corruption, "_damaged", lambda content, *_: content)
    monkeypatch.setattr(corruption, "TIMEOUT", 15.0)
    (verdict,) = corruption.corrupt(inputs, [0])
    assert (verdict.kind, verdict.line[: len(line)]) == (kind, line)
    (inputs / "feed.py").unlink()


@pytest.mark.slow
def test_damaged_files(inputs):
    verdicts = list(corruption.corrupt(inputs, range(COUNT)))
    kinds = collections.Counter(verdict.kind for verdict in verdicts)
    assert [(verdict.case.seed, verdict.line) for verdict in verdicts if verdict.kind == "wrong"] == []
    assert kinds["refused"] > COUNT // 2
    assert kinds["accepted"] >= 2


@pytest.mark.slow
def test_the_script():
    done = run_script("--count", "3", "--jobs", "2", "--seed", "3")
    assert re.fullmatch(r"3 files: \d refused, \d accepted, 0 crashed, 0 wrong\n", done.stdout)
    assert done.returncode == 0


@pytest.mark.parametrize("arguments", [["--count", "0"], ["--seed", "-1"], ["--jobs", "0"]])
def test_wrong_arguments(arguments):
    done = run_script(*arguments)
    assert done.returncode == 2
    assert "must be" in done.stderr
