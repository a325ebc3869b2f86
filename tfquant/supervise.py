"""Runs the command in a child process: TensorFlow's C++ ends the process on some damaged models, and so does a lack of memory.

The parent imports nothing of TensorFlow. It waits, and when the child died it says so in one line and removes what was left.
What the child has to tell lies as files in a folder that the parent made, where a crash cannot take it away:

    stage    what was being done
    output   what was to be written, and what lay there before
    code     the exit code, once all work was done
    native   what C++ wrote to stderr: shown after an ordinary end, garbage after a crash or an interrupt
    tmp/     the child's temporary files
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from tfquant.unfinished import remove_stale

REFUSED = 2
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE})
_PR_SET_PDEATHSIG = 1
# Of two signals in so short a time the second is an echo of the first: terminals and `timeout` signal the whole process group.
_ECHO_SECONDS = 1.0

_notes: pathlib.Path | None = None  # in the child: the folder
_command = "calibrate"  # what is run, for lines about it


def tell_stage(stage: str) -> None:
    """Notes what is being done now ("loading the model"), for the line about a crash; nothing outside of `supervise`."""
    if _notes is not None:
        with contextlib.suppress(OSError):  # a full disk has its own line
            (_notes / "stage").write_text(stage)


def tell_output(path: str | os.PathLike[str]) -> None:
    """Notes what is to be written, so that what a crash leaves beside it is removed; nothing outside of `supervise`."""
    if _notes is not None:
        with contextlib.suppress(OSError):
            output = pathlib.Path(path).absolute()
            note = {"path": str(output), "shown": str(path), "inode": _inode(output)}
            (_notes / "output").write_text(json.dumps(note))


def open_streams() -> None:
    """Gives a process whose stdout or stderr is closed (`>&-`) ones that lead nowhere."""
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def supervise(work: Callable[[], int], command: str = "calibrate") -> int:
    """Runs `work` in a child process where the system has them, and else here.

    Args:
        work: imports TensorFlow itself; returns the exit code, or raises as a main program may.
        command: `calibrate` of tfquant.calibrate.

    Returns:
        The exit code of `work`; 2 when the child died or was interrupted, after one line on stderr.
    """
    global _command
    _command = command
    if not hasattr(os, "fork"):
        return work()
    try:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="tfquant-"))
    except OSError as error:
        return _say(f"Temporary files cannot be written, set TMPDIR: {error}")
    try:
        (folder / "tmp").mkdir()
        (folder / "native").touch()
        return _Parent(folder).run(work)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Parent:
    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._child = 0
        self._ended = False
        self._interrupted: float | None = None

    def run(self, work: Callable[[], int]) -> int:
        signals = interrupts()
        sys.stdout.flush()
        sys.stderr.flush()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until both sides have their handlers
        parent = os.getpid()
        self._child = os.fork()
        if self._child == 0:
            _run_child(work, self._folder, parent, signals, mask)
        before = {number: signal.signal(number, self._forward) for number in signals}
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            # The child is not reaped yet: its number stays its own while signals may be sent to it.
            os.waitid(os.P_PID, self._child, os.WEXITED | os.WNOWAIT)
            self._ended = True
            code = os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])
            return self._end(code)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self._ended:
            return
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
            os.kill(self._child, number)
        elif now - self._interrupted > _ECHO_SECONDS:
            os.kill(self._child, signal.SIGKILL)  # C++ that takes long does not hear of interrupts

    def _end(self, code: int) -> int:
        """The exit code for the child's, with all said and removed."""
        done = self._note("code")
        if done:
            native = (self._folder / "native").read_bytes()
            # What was refused has its line; an interrupted import of TensorFlow tells all that it held back.
            if native and int(done) != REFUSED and self._interrupted is None:
                print(native.decode(errors="replace"), end="", file=sys.stderr, flush=True)
            return int(done)
        written = self._remove_unfinished()
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)  # a progress bar stands there
        if self._interrupted is not None:
            return _say(f"Interrupted: {written}.")
        stage = self._note("stage") or "starting"
        if -code == signal.SIGKILL:
            return _say(f"Killed (SIGKILL) while {stage}, perhaps for lack of memory; {written}. Try a smaller batch_size.")
        if code >= 0:
            return _say(f"The process ended by itself (exit code {code}) while {stage}; {written}.")
        if -code in _CRASHES:
            return _say(f"TensorFlow crashed ({signal_name(-code)}) while {stage}; {written}. The model may be damaged.")
        return _say(f"Ended by {signal_name(-code)} while {stage}; {written}.")

    def _note(self, name: str) -> str:
        try:
            return (self._folder / name).read_text()
        except OSError:
            return ""

    def _remove_unfinished(self) -> str:
        """Removes the hidden folders that the child left beside the output; returns what was written."""
        nothing = "nothing was written"
        try:
            note = json.loads(self._note("output"))
        except ValueError:
            return nothing
        output = pathlib.Path(note["path"])
        remove_stale(output)
        return nothing if _inode(output) in (None, note["inode"]) else f"{note['shown']} was written"


def _run_child(
    work: Callable[[], int], folder: pathlib.Path, parent: int, signals: list[signal.Signals], mask: set[int | signal.Signals]
) -> NoReturn:
    """Runs `work` and ends the process."""
    global _notes
    code = 1
    try:
        try:
            _notes = folder
            os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")
            die_with(parent)
            _part_stderr(folder / "native")
            for number in signals:
                signal.signal(number, interrupt_once)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            faulthandler.disable()
            code = _code(work)
        except KeyboardInterrupt:
            code = _say("Interrupted: nothing was written.")
        _ignore_interrupts()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads any more
                stream.flush()
        with contextlib.suppress(OSError):
            (folder / "code").write_text(str(code))
        atexit._run_exitfuncs()  # they end the processes that data functions started
    finally:
        os._exit(code)  # the frames below belong to the parent


def _code(work: Callable[[], int]) -> int:
    """The exit code, as Python would exit."""
    try:
        return work() & 0xFF
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1


def die_with(parent: int) -> None:
    """In a child process: a parent that is killed outright takes it along (Linux)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)


def _part_stderr(native: pathlib.Path) -> None:
    """Python goes on writing to stderr, progress bars included; file descriptor 2, C++'s stderr, becomes a file."""
    python = os.dup(2)
    os.set_inheritable(python, False)
    sys.stderr = open(python, "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")  # noqa: SIM115
    file = os.open(native, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 2)
    os.close(file)


def interrupts() -> list[signal.Signals]:
    """The signals that interrupt a command. Those that are ignored (nohup, a shell's background jobs) stay so."""
    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN]


def interrupt_once(number: int, frame: FrameType | None) -> None:
    """A handler: the first signal raises `KeyboardInterrupt`, later ones do not disturb."""
    _ignore_interrupts()  # what is being removed after the first one is to be removed in peace
    raise KeyboardInterrupt


def _ignore_interrupts() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _inode(path: pathlib.Path) -> int | None:
    try:
        return path.lstat().st_ino
    except OSError:
        return None


def signal_name(number: int) -> str:
    """A signal as people name it."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _say(message: str) -> int:
    print(f"tfquant.{_command}: {message}", file=sys.stderr, flush=True)
    return REFUSED
