"""Kills processes that save a result over another one: what is there then must be the old result or the new one, whole.

python scripts/kill.py --count 200 --jobs 2

A process saves two results over one another, in turn, until SIGKILL ends it and its children: half of the times at a random
moment, half of the times at a random system call of a save as Python's audit events tell of them.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

TIMEOUT = 120.0

# Arguments: the model, the data, the output, the audit event of a save to end at, the number of the save that it is of.
# Tells "begin 1", "end 1 312" (events), "begin 0", ... of its saves. Event 0: it never ends. -1: it writes both results once,
# for comparison. -2: it saves once and ends.
SAVER = """
import os, signal, sys
from tfquant.quiet import quiet_start
quiet_start()
from tfquant import QuantConfig, quantize

model, data, output, event, number = sys.argv[1:4] + [int(word) for word in sys.argv[4:6]]
results = [quantize(model, data, QuantConfig(estimator=name, verify=False)) for name in ("minmax", "mean_minmax")]
events = [0, False]

def watch(name, arguments):
    if events[1]:
        events[0] += 1
        if events[0] == event:
            os.killpg(0, signal.SIGKILL)

if event >= 0:
    sys.addaudithook(watch)
    for index in range(10**6):
        which = (index + 1) % 2
        os.write(1, f"begin {which}\\n".encode())
        events[:] = [0, event > 0 and index == number]
        results[which].save(output, overwrite=True)
        count, events[1] = events[0], False
        os.write(1, f"end {which} {count}\\n".encode())
elif event == -1:
    for index, result in enumerate(results):
        result.save(f"{output}{index}")
else:
    results[0].save(output, overwrite=True)
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="processes to kill (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    args = parser.parse_args(argv)
    if args.count < 1 or args.jobs < 1 or args.seed < 0:
        parser.error("--count and --jobs must be at least 1, --seed at least 0")

    from tfquant.quiet import quiet_start

    quiet_start()
    with tempfile.TemporaryDirectory() as name:
        return _Kills(Path(name), args.count, args.seed).run(args.jobs)


class _Kills:
    def __init__(self, folder: Path, count: int, seed: int) -> None:
        self._folder, self._count, self._seed = folder, count, seed
        self._lock = threading.Lock()
        self._started = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    def run(self, jobs: int) -> int:
        import numpy as np

        self._make_model()
        self._call("results", -1, 0).wait(TIMEOUT)
        self._expected = [self._outputs(self._folder / f"results{index}") for index in (0, 1)]
        self._plans = [(self._folder / f"results{index}" / "quant_plan.json").read_bytes() for index in (0, 1)]
        assert not np.array_equal(*self._expected)
        assert self._plans[0] != self._plans[1]
        threads = [threading.Thread(target=self._work, args=(index,)) for index in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for line in self.wrong:
            print(line)
        counts = self.counts
        print(
            f"{counts['kills']} kills: {counts['during']} during a save ({counts['old']} left the old result, "
            f"{counts['new']} the new one), {counts['between']} between saves; {len(self.wrong)} wrong; "
            f"{counts['left']} left hidden folders, of which the next saves cleared {counts['cleared']}"
        )
        return 1 if self.wrong or counts["kills"] != self._count else 0

    def _make_model(self) -> None:
        import numpy as np
        import tensorflow as tf

        rng = np.random.default_rng(0)
        first, second = (tf.constant(rng.normal(size=size).astype(np.float32)) for size in ((3, 3, 3, 8), (3, 3, 8, 4)))

        @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 3), tf.float32, name="image")])
        def serve(image):
            x = tf.nn.relu(tf.nn.conv2d(image, first, 1, "SAME"))
            return {"y": tf.nn.conv2d(x, second, 1, "SAME")}

        tf.saved_model.save(tf.Module(), str(self._folder / "model"), signatures=serve)
        self._images = rng.normal(size=(20, 8, 8, 3)).astype(np.float32)
        np.savez(self._folder / "data.npz", image=self._images)

    def _outputs(self, path: Path):
        import tensorflow as tf

        loaded = tf.saved_model.load(str(path))
        return loaded.signatures["serving_default"](image=tf.constant(self._images))["y"].numpy()

    def _call(self, output: str, event: int, number: int) -> subprocess.Popen:
        words = [str(self._folder / name) for name in ("model", "data.npz", output)]
        temporary = self._folder / f"tmp-{output.partition('/')[0]}"
        temporary.mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-c", SAVER, *words, str(event), str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
        )

    def _work(self, job: int) -> None:
        place = self._folder / f"job{job}"
        place.mkdir()
        shutil.copytree(self._folder / "results0", place / "int8")
        hidden: set[str] = set()  # what kills left so far
        events = 100  # of a save; learned
        while True:
            with self._lock:
                if self._started == self._count:
                    break
                number = self._started
                self._started += 1
            rng = random.Random(self._seed * 1_000_003 + number)
            at_event = number % 2 == 1
            process = self._call(f"job{job}/int8", rng.randint(1, events) if at_event else 0, rng.randint(0, 3))
            lines, error = self._kill(process, rng, at_event)
            events = next((int(line.split()[2]) for line in lines if line.startswith("end") and int(line.split()[2])), events)
            found = {path.name for path in place.iterdir()} - {"int8"}
            with self._lock:
                self.counts["kills"] += 1
                if any(line.startswith("end") for line in lines) and hidden:
                    self.counts["cleared"] += len(hidden - found)
                    hidden &= found
                self.counts["left"] += len(found - hidden)
                wrong = error or self._judge(place / "int8", lines)
                if wrong:
                    self.wrong.append(f"kill {number}: {wrong}")
            hidden |= found
            if wrong:
                shutil.rmtree(place)
                place.mkdir()
                shutil.copytree(self._folder / "results0", place / "int8")
                hidden = set()
            shutil.rmtree(self._folder / f"tmp-job{job}", ignore_errors=True)
        self._call(f"job{job}/int8", -2, 0).wait(TIMEOUT)
        found = {path.name for path in place.iterdir()} - {"int8"}
        with self._lock:
            self.counts["cleared"] += len(hidden - found)
            if found:
                self.wrong.append(f"a save that succeeded left {', '.join(sorted(found))}")

    def _kill(self, process: subprocess.Popen, rng: random.Random, at_event: bool) -> tuple[list[str], str]:
        """What the process told until it was killed, and what went wrong."""
        received, error = b"", ""
        assert process.stdout is not None
        begin = time.monotonic()
        end = None if at_event else float("inf")
        while True:
            left = TIMEOUT if end is None or end == float("inf") else max(0.0, end - time.monotonic())
            ready, _, _ = select.select([process.stdout], [], [], left)
            if not ready:
                if end is None or end == float("inf"):
                    error = f"nothing to hear of it for {TIMEOUT:.0f} s"
                break
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                break
            received += piece
            if end == float("inf"):
                end = time.monotonic() + rng.uniform(0, 0.8)
            if received.count(b"end") > 20 or time.monotonic() - begin > TIMEOUT:  # it has fewer events than thought
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        while piece := os.read(process.stdout.fileno(), 1 << 16):
            received += piece
        process.stdout.close()
        code = process.wait()
        if code != -signal.SIGKILL and not error:
            error = f"it ended by itself with {code}"
        return received.decode().splitlines(), error

    def _judge(self, path: Path, lines: list[str]) -> str:
        """What is wrong with the output, or nothing; counts."""
        import numpy as np

        try:
            outputs = self._outputs(path)
            plan = (path / "quant_plan.json").read_bytes()
            json.loads(plan)
        except Exception as error:  # TensorFlow raises a dozen kinds
            return f"it does not load: {type(error).__name__}: {error}"[:300]
        which = next((index for index in (0, 1) if np.array_equal(outputs, self._expected[index])), None)
        if which is None:
            return "the outputs are those of neither"
        if plan != self._plans[which]:
            return "the plan is of the other result"
        names = {str(file.relative_to(path)) for file in path.rglob("*")}
        whole = {str(file.relative_to(self._folder / "results0")) for file in (self._folder / "results0").rglob("*")}
        if names != whole:
            return f"files are missing or too many: {', '.join(sorted(names ^ whole))}"
        last = lines[-1].split() if lines else []
        if last[:1] == ["begin"]:
            self.counts["during"] += 1
            self.counts["new" if which == int(last[1]) else "old"] += 1
        else:
            self.counts["between"] += 1
            if last and which != int(last[1]):
                return f"result {last[1]} was saved, and {which} is there"
        return ""


if __name__ == "__main__":
    sys.exit(main())
