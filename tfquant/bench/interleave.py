"""Worker processes that run models, timed in turn: what disturbs the machine meets all of them.

Each runtime, model or setting has a process of its own (thread pools and environment settings are read once per process), which
speaks lines of JSON on stdin and stdout:

    worker -> {"ready": true, ...facts}                 once, when it could run; or {"error": "one line"}
    parent -> {"batch": 16, "runs": 5, ...}
    worker -> {"ms": [8.1, 8.0, 8.3, 8.0, 8.1]}         times of single runs, in the order in which they began; or {"error": ...}
    parent -> {"quit": true}                            it ends; so does the end of stdin

At the first request of a batch size the worker runs some times for itself before it measures. Lines that are no JSON objects are
skipped: libraries like to talk on stdout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import selectors
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import IO, Any

from tfquant.errors import TfquantError
from tfquant.supervise import die_with, signal_name

BURST_SECONDS = 0.3
_QUIT_SECONDS = 5.0


class WorkerError(TfquantError):
    """A worker could not start, refused a request, died, or did not answer in time.

    Attributes:
        label: the worker's.
        reason: why, in one line.
    """

    def __init__(self, label: str, reason: str) -> None:
        self.label = label
        self.reason = " ".join(reason.split())
        super().__init__(f"{label}: {self.reason}")


class Worker:
    """A child process that runs one model and says how long the runs took.

    It never outlives this process, however that ends (Linux), nor the `with` block. It is started at once and loads its model
    by itself: start several, then wait for each by `ready`.

    Args:
        command: program and arguments.
        env: what changes in this process's environment for it; None takes a variable away.
        label: its name in tables and errors.
        timeout: seconds that one answer, or the loading, may take.

    Raises:
        WorkerError: the program cannot be started.
    """

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str | None] | None = None, label: str = "", timeout: float = 1800
    ) -> None:
        self.label = label or os.path.basename(command[-1])
        self._timeout = timeout
        self._facts: dict[str, Any] | None = None
        self._read = bytearray()
        self._is_closed = False
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        changed = {**os.environ, **(env or {})}
        try:
            self._process = subprocess.Popen(
                list(command),
                env={key: value for key, value in changed.items() if value is not None},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                bufsize=0,
                start_new_session=True,  # an interrupt at the terminal comes to this process, which ends the workers
                preexec_fn=functools.partial(die_with, os.getpid()),
            )
        except OSError as error:
            self._stderr.close()
            raise WorkerError(self.label, f"cannot be started: {error}") from error

    def ready(self) -> dict[str, Any]:
        """Waits until the worker can run; returns the facts that it told of itself.

        Raises:
            WorkerError: with its reason why it cannot.
        """
        if self._facts is None:
            facts = self._answer()
            if not facts.pop("ready", False):
                raise WorkerError(self.label, f"its first line does not say that it is ready. Received: {facts}")
            self._facts = facts
        return self._facts

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Sends a request and waits for its answer.

        Raises:
            WorkerError: with the worker's reason, or that of its death.
        """
        self.ready()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(dict(request)).encode() + b"\n")
        except OSError as error:
            raise self._death() from error
        return self._answer()

    def run(self, request: Mapping[str, Any], runs: int) -> list[float]:
        """Milliseconds of so many single runs.

        Raises:
            WorkerError: as `ask`, or its answer has no such times.
        """
        times = self.ask({**request, "runs": runs}).get("ms")
        if not isinstance(times, list) or len(times) != runs or not all(isinstance(t, int | float) and t > 0 for t in times):
            raise WorkerError(self.label, f"{runs} times of runs were asked for. Received: {times}"[:300])
        return [float(t) for t in times]

    def memory(self) -> int:
        """Bytes that the worker holds for itself (anonymous memory); 0 where the system does not say."""
        with contextlib.suppress(OSError):
            for line in pathlib.Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    return int(line.split()[1]) * 1024
        return 0

    def close(self) -> None:
        """Asks the worker to end, and ends it with all that it started where it does not."""
        if not self._is_closed and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.write(b'{"quit": true}\n')
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            self._exit_code(_QUIT_SECONDS)
        self.kill()

    def kill(self) -> None:
        """Ends the worker and all that it started, at once."""
        if self._is_closed:
            return
        self._is_closed = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    def _answer(self) -> dict[str, Any]:
        """The next line that is a JSON object."""
        deadline = time.monotonic() + self._timeout
        while True:
            line = self._line(deadline)
            try:
                answer = json.loads(line)
            except ValueError:
                continue
            if isinstance(answer, dict):
                if "error" in answer:
                    raise WorkerError(self.label, str(answer["error"]))
                return answer

    def _line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._read:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise WorkerError(self.label, f"no answer in {self._timeout:g} seconds")
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    raise self._death()
                self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return bytes(line)

    def _death(self) -> WorkerError:
        """Why the process ended: its signal or exit code, and the last line that it wrote to stderr."""
        code = self._exit_code(_QUIT_SECONDS)
        if code is None:
            return WorkerError(self.label, "closed its stdout")
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        how = f"ended by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        if code == -signal.SIGKILL:
            how += ", perhaps for lack of memory"
        return WorkerError(self.label, f"{how}: {lines[-1][:300]}" if lines else how)

    def _exit_code(self, seconds: float) -> int | None:
        """Waits so long for the process to end by itself. It is not reaped, so that its group's number stays its own."""
        deadline = time.monotonic() + seconds
        while True:
            found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is not None:
                return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
            if time.monotonic() > deadline:
                return None
            time.sleep(0.01)


@dataclasses.dataclass(frozen=True)
class Times:
    """What one worker took for one request.

    Attributes:
        label: the worker's.
        request: the request, with `batch`, and `streams` where several run at a time.
        rounds: milliseconds of single runs, per round.
    """

    label: str
    request: Mapping[str, Any]
    rounds: tuple[tuple[float, ...], ...]

    @property
    def ms(self) -> list[float]:
        """All runs, in milliseconds."""
        return [time for burst in self.rounds for time in burst]

    @property
    def median(self) -> float:
        """Median milliseconds of a run."""
        return statistics.median(self.ms)

    def percentile(self, percent: float) -> float:
        """Milliseconds that so many percent of the runs do not exceed, interpolated between runs."""
        ordered = sorted(self.ms)
        place = (len(ordered) - 1) * percent / 100
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    @property
    def throughput(self) -> float:
        """Samples per second: the median of the rounds."""
        return statistics.median(self.throughput_of(burst) for burst in self.rounds)

    def throughput_of(self, burst: Sequence[float]) -> float:
        """Samples per second of one round: so many streams, each busy with one batch after the other (Little's law)."""
        return self.request["batch"] * self.request.get("streams", 1) * 1000 / statistics.fmean(burst)


def speedup(first: Times, other: Times) -> float:
    """How many times `other` is faster per run: the median over the rounds of the ratio of their medians there."""
    return _ratio(first, other, lambda times, burst: 1 / statistics.median(burst))


def throughput_ratio(first: Times, other: Times) -> float:
    """How many times the samples per second of `first`: the median over the rounds of the ratio there."""
    return _ratio(first, other, Times.throughput_of)


def _ratio(first: Times, other: Times, speed: Callable[[Times, Sequence[float]], float]) -> float:
    pairs = zip(first.rounds, other.rounds, strict=True)
    return statistics.median(speed(other, theirs) / speed(first, ours) for ours, theirs in pairs)


def interleave(
    workers: Sequence[Worker], requests: Sequence[Mapping[str, Any]], seconds: float, least_runs: int = 10
) -> list[list[Times]]:
    """Asks the workers in turn, one running at a time, in rounds of short bursts whose order rotates.

    Args:
        workers: with distinct labels; all are loaded before the first is timed.
        requests: what is asked of each: at least `batch`; `streams` where several runs are to overlap.
        seconds: of measurement, per worker and request.
        least_runs: that each worker does of each request, however long they take.

    Returns:
        Per request, per worker: the times, with the same number of rounds for all workers.

    Raises:
        WorkerError: the first that a worker raised.
    """
    return [race([(worker, request) for worker in workers], seconds, least_runs) for request in requests]


def race(
    entries: Sequence[tuple[Worker, Mapping[str, Any]]], seconds: float, least_runs: int = 10, least_rounds: int = 5
) -> list[Times]:
    """As `interleave`, for one request of each entry; a worker may stand in several.

    Args:
        entries: workers with what is asked of each.
        seconds: of measurement, per entry.
        least_runs: of each entry.
        least_rounds: of all; a ratio is the median of as many.

    Returns:
        The times of each entry.

    Raises:
        WorkerError: the first that a worker raised.
    """
    for worker, _ in entries:
        worker.ready()  # none loads while another is timed
    counts = [_burst(worker, request) for worker, request in entries]
    rounds: list[list[tuple[float, ...]]] = [[] for _ in entries]
    start, turn = time.perf_counter(), 0
    while (
        turn < least_rounds
        or time.perf_counter() - start < seconds * len(entries)
        or min(turn * count for count in counts) < least_runs
    ):
        for place in range(len(entries)):
            index = (turn + place) % len(entries)
            worker, request = entries[index]
            # The first run of each stream finds another's data in the caches, and its own threads asleep.
            streams = request.get("streams", 1)
            rounds[index].append(tuple(worker.run(request, counts[index] + streams)[streams:]))
        turn += 1
    return [Times(worker.label, request, tuple(bursts)) for (worker, request), bursts in zip(entries, rounds, strict=True)]


def _burst(worker: Worker, request: Mapping[str, Any]) -> int:
    """How many runs make a burst; asking warms the worker up for this request."""
    streams = request.get("streams", 1)
    took = statistics.fmean(worker.run(request, 2 * streams)[streams:])
    return streams * max(1, round(BURST_SECONDS * 1000 / took))
