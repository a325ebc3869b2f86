"""Faults in the middle of a run: data that vanish, processes that crash or are stopped, disks that fill up, two runs at once.

Whatever happens, an old result stays as it was to the byte, and nothing is left beside it or in the folder of temporary files.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import corruption
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent

FEEDS = """
import ctypes, os, shutil, signal, time
import numpy as np

RNG = np.random.default_rng(0)

def batch():
    return RNG.normal(size=(4, 6, 6, 3)).astype("f4")

def dies(number):
    yield batch()
    yield batch()
    signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
    os.kill(os.getpid(), number)
    time.sleep(60)

def segfaults():
    yield from dies(signal.SIGSEGV)

def aborts():
    yield from dies(signal.SIGABRT)

def is_killed():
    yield from dies(signal.SIGKILL)

def reads_nowhere():
    yield batch()
    ctypes.string_at(0)

def waits():
    yield batch()
    open("ready", "w").close()
    time.sleep(60)
    yield batch()

def leaves():
    yield batch()
    os._exit(0)

def closes():
    yield batch()
    raise GeneratorExit

def loses_its_folder():
    for index, name in enumerate(sorted(os.listdir("arrays"))):
        if index == 3:
            shutil.rmtree("arrays")
        yield np.load(os.path.join("arrays", name))
"""

# Python that, after some batches of calibration, changes the files that are read.
SITE = """
import importlib.util, os, sys

def spoil():
    what, _, path = os.environ["SPOIL"].partition(":")
    if what == "remove":
        os.unlink(path)
    elif what == "cut":
        os.truncate(path, os.path.getsize(path) // 2)
    elif what == "replace":
        size = os.path.getsize(path)
        with open(path, "r+b") as file:
            file.write(bytes(size))
    elif what == "folder":
        import shutil
        shutil.rmtree(path)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "tfquant.pipeline":
            return None
        sys.meta_path.remove(self)
        import tfquant.observe.collector as collector
        update, seen = collector.Collector.update, []
        def updated(self, batch):
            update(self, batch)
            seen.append(1)
            if len(seen) == 2:
                spoil()
        collector.Collector.update = updated
        return None

if "SPOIL" in os.environ:
    sys.meta_path.insert(0, Finder())

if "FAIL_AT" in os.environ:
    import errno, io
    real = io.open

    def opened(file, mode="r", *rest, **options):
        if "w" in mode and os.path.basename(str(file)) == os.environ["FAIL_AT"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return real(file, mode, *rest, **options)

    io.open = opened

if "PAUSE_AT" in os.environ:
    import io, time
    real = io.open

    def opened(file, mode="r", *rest, **options):
        if "w" in mode and os.path.basename(str(file)) == os.environ["PAUSE_AT"]:
            open("ready", "w").close()
            end = time.monotonic() + 60
            while time.monotonic() < end and not os.path.exists("go"):
                time.sleep(0.05)
        return real(file, mode, *rest, **options)

    io.open = opened
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    corruption.make_inputs(folder)
    (folder / "feeds.py").write_text(FEEDS)
    (folder / "sitecustomize.py").write_text(SITE)
    (folder / "arrays").mkdir()
    for index in range(5):
        np.save(folder / "arrays" / f"{index}.npy", np.random.default_rng(index).normal(size=(4, 6, 6, 3)).astype(np.float32))
    images = np.random.default_rng(0).normal(size=(300, 6, 6, 3)).astype(np.float32)
    np.save(folder / "long.npy", images)
    np.savez(folder / "long.npz", image=images)
    np.savez_compressed(folder / "packed_long.npz", image=images)
    (folder / "many").mkdir()
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3)).astype(np.uint8)
        (folder / "many" / f"{index:02}.png").write_bytes(corruption.image(pixels, "png"))
    return folder


@pytest.fixture
def place(inputs, tmp_path):
    """A copy of the inputs, with an old result in `int8`."""
    shutil.copytree(inputs, tmp_path / "work")
    (tmp_path / "work" / "int8").mkdir()
    (tmp_path / "work" / "int8" / "saved_model.pb").write_text("of old")
    (tmp_path / "work" / "int8" / "mine").mkdir()
    (tmp_path / "work" / "int8" / "mine" / "notes.txt").write_text("mine")
    return tmp_path / "work"


def start(folder, *words, **variables):
    command = [sys.executable, "-m", "tfquant.calibrate", *map(str, words)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=corruption.environment(folder) | variables,
        start_new_session=True,
    )


def run(folder, *words, **variables):
    process = start(folder, *words, **variables)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def contents(folder, *but):
    """Path to a digest for all files, to nothing for folders; without the paths that begin with these."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if not name.startswith(("tmp", "__pycache__", *but)):
            found[name] = "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def assert_refused(result, *words):
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1), result
    assert err.startswith("tfquant.calibrate: ")
    for word in words:
        assert word in err


MODEL = "--saved_model=model", "--noverify", "--batch_size=3", "--subset_size=300"


# Data that vanish


@pytest.mark.parametrize(
    ("data", "spoil", "words"),
    [
        ("many", "remove:many/07.png", ("Cannot read many/07.png", "FileNotFoundError")),
        ("many", "cut:many/11.png", ("Cannot read many/11.png", "corrupt or truncated")),
        ("many", "folder:many", ("Cannot read many/06.png", "FileNotFoundError")),
        ("long.npz", "cut:long.npz", ("Cannot read long.npz", "corrupt or truncated")),
        ("long.npz", "replace:long.npz", ("Cannot read long.npz",)),
        ("packed_long.npz", "cut:packed_long.npz", ("Cannot read packed_long.npz", "corrupt or truncated")),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_data_that_vanish_while_they_are_read(place, data, spoil, words, overwrite):
    output = ["--output=int8", "--overwrite"] if overwrite else ["--output=new/int8"]
    before = contents(place, "many", "long.npz", "packed_long.npz")
    assert_refused(run(place, *MODEL, f"--data={data}", *output, SPOIL=spoil), *words)
    assert contents(place, "many", "long.npz", "packed_long.npz") == before
    assert list((place / "tmp").iterdir()) == []


def test_an_npz_that_is_removed_while_it_is_read_is_read_to_its_end(place):
    """The file is open: the first pass goes on; the second, if there is one, is refused."""
    code, out, err = run(place, *MODEL, "--preset=fast", "--data=data.npz", "--output=new", SPOIL="remove:data.npz")
    assert (code, err) == (0, "")
    assert "Written to new" in out
    words = [word for word in MODEL if word != "--noverify"]
    shutil.copyfile(place / "packed.npz", place / "data.npz")
    before = contents(place, "data.npz")
    assert_refused(run(place, *words, "--data=data.npz", "--output=int8", "--overwrite", SPOIL="remove:data.npz"), "data.npz")
    assert contents(place, "data.npz") == before


def test_an_npy_that_is_cut_while_it_is_mapped(place):
    """The system ends a process that reads beyond the end of a mapped file."""
    before = contents(place, "long.npy")
    result = run(place, *MODEL, "--data=long.npy", "--output=int8", "--overwrite", SPOIL="cut:long.npy")
    assert_refused(result, "SIGBUS", "nothing was written")
    assert contents(place, "long.npy") == before
    assert list((place / "tmp").iterdir()) == []


def test_a_function_that_loses_its_files(place):
    before = contents(place, "arrays")
    assert_refused(
        run(place, *MODEL, "--data=feeds:loses_its_folder", "--output=int8", "--overwrite"), "FileNotFoundError", "arrays/3.npy"
    )
    assert contents(place, "arrays") == before


# Old results


@pytest.mark.parametrize(
    ("words", "variables", "expected"),
    [
        (["--saved_model=none", "--data=data.npz"], {}, "There is no model"),
        (["--saved_model=job.yaml", "--data=data.npz"], {}, "is not a SavedModel"),
        (["--saved_model=model", "--data=none.npz"], {}, "do not exist"),
        (["--saved_model=model", "--data=words.npz"], {}, "'words'"),
        (["--saved_model=model", "--plan=none"], {}, "There is no plan"),
        (["--saved_model=net.pb", "--plan=plan"], {}, "belongs to another model"),
        (["--saved_model=model", "--data=feeds:reads_nowhere"], {}, "SIGSEGV"),
        (["--saved_model=words", "--data=words.npz", "--noverify", "--format=graphdef"], {}, "A GraphDef cannot hold"),
        (["--saved_model=model", "--data=data.npz", "--noverify"], {"FAIL_AT": "quant_plan.json"}, "No space left"),
        (["--saved_model=model", "--data=data.npz", "--noverify"], {"FAIL_AT": "quant_plan.npz"}, "No space left"),
        (
            ["--saved_model=model", "--data=data.npz", "--noverify", "--format=graphdef"],
            {"FAIL_AT": "frozen_graph.pb"},
            "No space left",
        ),
    ],
)
def test_an_old_result_outlives_a_failure_at_each_stage(place, words, variables, expected):
    before = contents(place)
    assert_refused(run(place, *words, "--output=int8", "--overwrite", **variables), expected)
    assert contents(place) == before
    assert list((place / "tmp").iterdir()) == []


def test_an_old_result_is_replaced_whole(place):
    code, _, err = run(place, *MODEL, "--data=data.npz", "--output=int8", "--overwrite")
    assert (code, err) == (0, "")
    names = {name.removeprefix("int8/") for name in contents(place) if name.startswith("int8/")}
    assert "mine" not in names
    assert {"saved_model.pb", "quant_plan.json", "quant_plan.npz"} <= names
    assert sorted(path.name for path in place.iterdir() if path.name.startswith(".")) == []


def test_an_output_that_is_a_link_is_replaced(place):
    """The link goes, what it pointed to stays, and no hidden link is left."""
    (place / "int8").rename(place / "elsewhere")
    os.symlink("elsewhere", place / "int8")
    before = contents(place, "int8")
    code, _, err = run(place, *MODEL, "--data=data.npz", "--output=int8", "--overwrite")
    assert (code, err) == (0, "")
    assert (place / "int8" / "saved_model.pb").is_file()
    assert contents(place, "int8") == before
    assert sorted(path.name for path in place.iterdir() if path.name.startswith(".")) == []


# Ends


@pytest.mark.parametrize(
    ("function", "line"),
    [
        ("segfaults", "TensorFlow crashed (SIGSEGV) while Calibrating; nothing was written."),
        ("aborts", "TensorFlow crashed (SIGABRT) while Calibrating; nothing was written."),
        ("reads_nowhere", "TensorFlow crashed (SIGSEGV) while Calibrating; nothing was written."),
        ("is_killed", "Killed (SIGKILL) while Calibrating, perhaps for lack of memory; nothing was written."),
    ],
)
def test_a_crash_in_the_middle(place, function, line):
    before = contents(place)
    assert_refused(run(place, *MODEL, f"--data=feeds:{function}", "--output=int8", "--overwrite"), line)
    assert contents(place) == before
    assert list((place / "tmp").iterdir()) == []


def wait_for(path, process):
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not come"
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("stage", ["calibrating", "saving"])
def test_a_stop_in_the_middle(place, number, group, stage):
    before = contents(place)
    data, variables = ("feeds:waits", {}) if stage == "calibrating" else ("data.npz", {"PAUSE_AT": "quant_plan.json"})
    process = start(place, *MODEL, f"--data={data}", "--output=int8", "--overwrite", **variables)
    wait_for(place / "ready", process)
    (os.killpg if group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (2, "", "tfquant.calibrate: Interrupted: nothing was written.\n")
    (place / "ready").unlink()
    assert contents(place) == before
    assert list((place / "tmp").iterdir()) == []


def test_what_a_kill_leaves_is_removed_by_the_next_run(place):
    """SIGKILL for all processes while saving: nobody is left to clean up."""
    before = contents(place)
    process = start(place, *MODEL, "--data=data.npz", "--output=int8", "--overwrite", PAUSE_AT="quant_plan.json")
    wait_for(place / "ready", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    (place / "ready").unlink()
    hidden = [path.name for path in place.iterdir() if path.name.startswith(".int8.")]
    assert len(hidden) == 1
    assert contents(place, ".int8.") == before
    code, _, err = run(place, *MODEL, "--data=data.npz", "--output=int8", "--overwrite")
    assert (code, err) == (0, "")
    assert [path.name for path in place.iterdir() if path.name.startswith(".int8.")] == []


def test_two_runs_at_the_same_time(place):
    """To different outputs in one folder; and twice to one, of which the last that ends stays."""
    processes = [start(place, *MODEL, "--data=data.npz", f"--output=out/{name}") for name in ("one", "other")]
    results = [(*process.communicate(timeout=100), process.returncode) for process in processes]
    assert [(code, err) for _, err, code in results] == [(0, "")] * 2
    plans = [(place / "out" / name / "quant_plan.json").read_bytes() for name in ("one", "other")]
    assert plans[0] == plans[1]
    assert sorted(path.name for path in (place / "out").iterdir()) == ["one", "other"]
    estimators = ("minmax", "mse")
    processes = [
        start(place, *MODEL, "--data=data.npz", "--output=int8", "--overwrite", f"--estimator={name}") for name in estimators
    ]
    results = [(*process.communicate(timeout=100), process.returncode) for process in processes]
    assert [(code, err) for _, err, code in results] == [(0, "")] * 2
    assert json.loads((place / "int8" / "quant_plan.json").read_text())["settings"]["estimator"] in estimators
    assert [path.name for path in place.iterdir() if path.name.startswith(".int8.")] == []
    assert list((place / "tmp").iterdir()) == []


def test_of_two_runs_to_one_output_the_second_is_refused(place):
    """Without --overwrite nothing is replaced, also not what another run has just written."""
    process = start(place, *MODEL, "--data=data.npz", "--output=new", PAUSE_AT="quant_plan.json")
    wait_for(place / "ready", process)
    (place / "new").mkdir()
    (place / "new" / "mine.txt").write_text("mine")
    (place / "go").touch()
    out, err = process.communicate(timeout=60)
    assert_refused((process.returncode, out, err), "new exists already")
    assert (place / "new" / "mine.txt").read_text() == "mine"


# Surroundings


@pytest.mark.parametrize(("function", "words"), [("leaves", "nothing was written"), ("closes", "GeneratorExit")])
def test_a_function_that_ends_the_process(place, function, words):
    before = contents(place)
    assert_refused(run(place, *MODEL, f"--data=feeds:{function}", "--output=int8", "--overwrite"), words)
    assert contents(place) == before


def shell(folder, line):
    """(code, stderr) of a line of a shell, in which $RUN is the command."""
    words = [sys.executable, "-m", "tfquant.calibrate", *MODEL, "--data=data.npz", "--output=new"]
    variables = corruption.environment(folder) | {"RUN": " ".join(words)}
    found = subprocess.run(["bash", "-c", line], cwd=folder, env=variables, capture_output=True, text=True, check=False)
    return found.returncode, found.stderr


@pytest.mark.parametrize("line", ["$RUN >&-", "$RUN 2>&-", "$RUN >/dev/full", "$RUN | true; exit ${PIPESTATUS[0]}"])
def test_nobody_listens(place, line):
    """The model counts, not what is said of it."""
    if "/dev/full" in line and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    code, err = shell(place, line)
    assert "Traceback" not in err
    assert err.count("\n") <= 1
    assert code == 0
    assert (place / "new" / "quant_plan.npz").is_file()


def test_the_folder_of_work_is_gone(place):
    code, err = shell(place, f"mkdir gone; cd gone; rmdir ../gone; $RUN --saved_model={place}/model --data={place}/data.npz")
    assert (code, err.count("\n")) == (2, 1)


def test_an_output_whose_name_is_no_unicode(place):
    code, err = shell(place, "$RUN --output=$'new\\xff'")
    assert (code, err.count("\n")) == (2, 1)


# Kills


@pytest.mark.slow
def test_kills_while_saving():
    """`scripts/kill.py` takes more."""
    command = [sys.executable, str(ROOT / "scripts" / "kill.py"), "--count", "12", "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    words = done.stdout.split()
    assert words[:2] == ["12", "kills:"]
