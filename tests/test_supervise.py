"""Tests of the supervisor: every way in which a child may end, what is said, and that nothing is left."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# `body` is the work; what it may use is imported. The parent's own end is printed, so that nothing runs twice.
SCRIPT = """
import ctypes, os, signal, sys, tempfile, time
from pathlib import Path
from tfquant import supervise as s
from tfquant.unfinished import prefix

def die(number):
    signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
    os.kill(os.getpid(), number)
    time.sleep(60)

def work():
{body}

code = s.supervise(work)
print("end", code, "tensorflow" in sys.modules, flush=True)
sys.exit(code)
"""


def script(body):
    return SCRIPT.format(body="\n".join(f"    {line}" for line in body.splitlines()))


def environment(folder):
    (folder / "tmp").mkdir(exist_ok=True)
    return {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}


def start(body, folder, **options):
    command = [sys.executable, *options.pop("flags", []), "-c", script(body)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment(folder), **options
    )


def run(body, folder, **options):
    process = start(body, folder, **options)
    out, err = process.communicate(timeout=60)
    assert list((folder / "tmp").iterdir()) == []
    return process.returncode, out, err


def wait_for(path):
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not come"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("body", "code", "err"),
    [
        ("return 0", 0, ""),
        ("return 2", 2, ""),
        ("print('no', file=sys.stderr); return 2", 2, "no\n"),
        ("sys.exit()", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('words')", 1, "words\n"),
        ("os.write(2, b'C++ says\\n'); return 0", 0, "C++ says\n"),
        ("raise KeyboardInterrupt", 2, "tfquant.calibrate: Interrupted: nothing was written.\n"),
        ("os._exit(5)", 2, "tfquant.calibrate: The process ended by itself (exit code 5) while starting; nothing was written.\n"),
    ],
)
def test_ordinary_ends(tmp_path, body, code, err):
    assert run(body, tmp_path) == (code, f"end {code} False\n", err)


def test_errors_keep_their_traceback(tmp_path):
    code, out, err = run("raise ValueError('mine')", tmp_path)
    assert (code, out) == (1, "end 1 False\n")
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.endswith("ValueError: mine\n")


def test_output_comes_once_and_in_order(tmp_path):
    body = "print('out'); print('err', file=sys.stderr); import atexit; atexit.register(print, 'last'); return 0"
    assert run(body, tmp_path) == (0, "out\nlast\nend 0 False\n", "err\n")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "s.tell_stage('loading the model'); die(signal.SIGSEGV)",
            "TensorFlow crashed (SIGSEGV) while loading the model; nothing was written. The model may be damaged.",
        ),
        ("die(signal.SIGABRT)", "TensorFlow crashed (SIGABRT) while starting; nothing was written. The model may be damaged."),
        (
            "s.tell_stage('a'); s.tell_stage('b'); ctypes.CDLL(None).abort()",
            "TensorFlow crashed (SIGABRT) while b; nothing was written. The model may be damaged.",
        ),
        ("ctypes.string_at(0)", "TensorFlow crashed (SIGSEGV) while starting; nothing was written. The model may be damaged."),
        ("die(signal.SIGFPE)", "TensorFlow crashed (SIGFPE) while starting; nothing was written. The model may be damaged."),
        (
            "s.tell_stage('quantizing'); die(signal.SIGKILL)",
            "Killed (SIGKILL) while quantizing, perhaps for lack of memory; nothing was written. Try a smaller batch_size.",
        ),
        ("die(signal.SIGUSR1)", "Ended by SIGUSR1 while starting; nothing was written."),
        ("die(signal.SIGRTMIN + 1)", f"Ended by signal {signal.SIGRTMIN + 1} while starting; nothing was written."),
    ],
)
@pytest.mark.parametrize("flags", [[], ["-X", "faulthandler"]])
def test_crashes(tmp_path, body, message, flags):
    """One line, whatever C++ and Python's faulthandler have to say."""
    body = f"os.write(2, b'*** stack smashed\\n' * 100)\n{body}"
    assert run(body, tmp_path, flags=flags) == (2, "end 2 False\n", f"tfquant.calibrate: {message}\n")


def test_what_python_wrote_before_a_crash_is_shown(tmp_path):
    _, _, err = run("print('from a data function', file=sys.stderr); die(signal.SIGSEGV)", tmp_path)
    assert err.splitlines()[0] == "from a data function"
    assert len(err.splitlines()) == 2


def test_a_crash_after_all_work_was_done_is_no_matter(tmp_path):
    body = "import atexit; atexit.register(die, signal.SIGSEGV); print('done'); return {code}"
    for code in (0, 2):
        assert run(body.format(code=code), tmp_path) == (code, f"done\nend {code} False\n", "")


def test_what_a_crash_leaves_is_removed(tmp_path):
    """Temporary files, and the output in the making, but nothing that was there or that is not ours."""
    for name in (".int8.aaaaaaaa", ".int8.bbbbbbbb.old", ".int80.cccccccc", "int8.dddddddd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    body = """
tempfile.mkdtemp()
open(os.path.join(tempfile.mkdtemp(), "x"), "w").close()
open(os.path.join(os.environ["TMPDIR"], "y"), "w").close()
s.tell_output("int8")
made = tempfile.mkdtemp(prefix=prefix(Path("int8")), dir=".")
open(os.path.join(made, "saved_model.pb"), "w").close()
os.mkdir(".int8.eeeeeeee.old")
os.mkdir(".other.eeeeeeee")
die(signal.SIGABRT)"""
    code, _, err = run(body, tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    kept = {".int8.aaaaaaaa", ".int8.bbbbbbbb.old", ".int80.cccccccc", "int8.dddddddd", ".int8.eeeeeeee.old", ".other.eeeeeeee"}
    assert {path.name for path in tmp_path.iterdir()} == kept | {"tmp"}
    assert len(list(tmp_path.rglob("mine"))) == 4


def test_an_output_that_was_written_is_not_denied(tmp_path):
    (tmp_path / "old").mkdir()
    body = "s.tell_output('{name}'); {what}; die(signal.SIGSEGV)"
    assert "; nothing was written." in run(body.format(name="old", what="pass"), tmp_path)[2]
    assert "; new was written." in run(body.format(name="new", what="os.mkdir('new')"), tmp_path)[2]
    assert "; old was written." in run(body.format(name="old", what="os.mkdir('x'), os.replace('x', 'old')"), tmp_path)[2]


SLEEP = """
os.write(2, b"garbage")
try:
    open("ready", "w").close()
    time.sleep(60)
finally:
    time.sleep(0.2)
    open("cleaned", "w").close()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("group", [False, True])
def test_an_interrupt_reaches_the_child(tmp_path, number, group):
    """Sent to the parent alone, or to all processes as a terminal does."""
    process = start(SLEEP, tmp_path, start_new_session=True)
    wait_for(tmp_path / "ready")
    (os.killpg if group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (2, "end 2 False\n", "tfquant.calibrate: Interrupted: nothing was written.\n")
    assert (tmp_path / "cleaned").exists()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_second_interrupt_ends_a_child_that_does_not_listen(tmp_path):
    body = """
s.tell_output("int8")
tempfile.mkdtemp(prefix=prefix(Path("int8")), dir=".")
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
open("ready", "w").close()
time.sleep(60)"""
    process = start(body, tmp_path)
    wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGINT)
    time.sleep(1.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (2, "end 2 False\n", "tfquant.calibrate: Interrupted: nothing was written.\n")
    assert {path.name for path in tmp_path.iterdir()} == {"ready", "tmp"}
    assert list((tmp_path / "tmp").iterdir()) == []


def test_ignored_signals_stay_ignored(tmp_path):
    body = "open('ready', 'w').close(); time.sleep(0.8); return 0"
    process = start(body, tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN), start_new_session=True)
    wait_for(tmp_path / "ready")
    os.killpg(process.pid, signal.SIGHUP)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "end 0 False\n", "")


def test_a_parent_that_is_killed_takes_the_child_along(tmp_path):
    process = start("open('pid', 'w').write(str(os.getpid())); os.rename('pid', 'ready'); time.sleep(60)", tmp_path)
    wait_for(tmp_path / "ready")
    process.kill()
    begin = time.monotonic()
    process.communicate(timeout=30)  # ends when nobody holds the pipes any more
    assert time.monotonic() - begin < 20
    assert process.returncode == -signal.SIGKILL


def test_a_temporary_folder_that_cannot_be_made(tmp_path):
    body = "return 0"
    prelude = "import tempfile; tempfile.tempdir = 'none'"
    command = [sys.executable, "-c", prelude + script(body)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(tmp_path), check=False)
    assert (found.returncode, found.stdout) == (2, "end 2 False\n")
    assert found.stderr.startswith("tfquant.calibrate: Temporary files cannot be written, set TMPDIR: ")
    assert found.stderr.count("\n") == 1


def test_without_fork_the_work_runs_here(tmp_path):
    command = [sys.executable, "-c", "import os; del os.fork" + script("s.tell_stage('x'); print(os.getppid()); return 2")]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(tmp_path), check=False)
    assert (found.returncode, found.stdout, found.stderr) == (2, f"{os.getpid()}\nend 2 False\n", "")


def test_on_a_terminal_bars_are_shown_and_garbage_is_not(tmp_path):
    master, slave = pty.openpty()
    body = """
print(sys.stderr.isatty(), file=sys.stderr)
os.write(2, b"garbage")
sys.stderr.write("\\rbar 50%")
die(signal.SIGSEGV)"""
    command = [sys.executable, "-c", script(body)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=slave, cwd=tmp_path, env=environment(tmp_path))
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 4096):
            shown += piece
    except OSError:  # the other end is closed
        pass
    os.close(master)
    assert process.wait(timeout=30) == 2
    lines = shown.decode().splitlines()
    assert lines[0] == "True"
    assert "bar 50%" in shown.decode()
    assert "garbage" not in shown.decode()
    message = "TensorFlow crashed (SIGSEGV) while starting; nothing was written. The model may be damaged."
    assert lines[-1] == f"\033[Ktfquant.calibrate: {message}"


def test_the_command_line_is_supervised(tmp_path):
    """A data function that crashes; and a refusal that needs no TensorFlow."""
    (tmp_path / "job.yaml").write_text("output: x\nquantization:\n  estimator: foo\n")
    command = [sys.executable, "-m", "tfquant.calibrate", "--config=job.yaml"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(tmp_path), check=False)
    expected = "quantization.estimator must be one of minmax, mean_minmax, percentile, mse, entropy, aciq, auto. Received: 'foo'"
    assert (found.returncode, found.stdout, found.stderr) == (2, "", f"tfquant.calibrate: job.yaml:3: {expected}\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Crash:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'tensorflow':\n"
        "            os.write(2, b'terminate called')\n"
        "            os.abort()\n"
        "sys.meta_path.insert(0, Crash())\n"
    )
    variables = environment(tmp_path) | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "tfquant.calibrate", "--saved_model=m", "--data=d", "--output=o"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables, check=False)
    message = "TensorFlow crashed (SIGABRT) while starting TensorFlow; nothing was written. The model may be damaged."
    assert (found.returncode, found.stdout, found.stderr) == (2, "", f"tfquant.calibrate: {message}\n")
    assert list((tmp_path / "tmp").iterdir()) == []
