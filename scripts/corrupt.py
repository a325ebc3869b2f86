"""Damages models, data, plans and job files, and runs the command line on them: it must refuse in a line, or write all.

python scripts/corrupt.py --count 1000 --seed 0 --jobs 2
"""

import argparse
import collections
import queue
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

KINDS = ("refused", "accepted", "crashed", "wrong")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="files to damage (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first; the others follow (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument("--verbose", action="store_true", help="print what comes of each")
    args = parser.parse_args(argv)
    if args.count < 1 or args.jobs < 1 or args.seed < 0:
        parser.error("--count and --jobs must be at least 1, --seed at least 0")

    import corruption  # imports TensorFlow

    start = time.monotonic()
    counts: collections.Counter[str] = collections.Counter()
    live = sys.stderr.isatty() and not args.verbose
    with tempfile.TemporaryDirectory() as name:
        corruption.make_inputs(Path(name))
        for verdict in _parallel(corruption, Path(name), range(args.seed, args.seed + args.count), args.jobs):
            counts[verdict.kind] += 1
            case, done = verdict.case, counts.total()
            if args.verbose or verdict.kind in ("wrong", "crashed"):
                _clear(live)
                print(f"seed {case.seed}: {verdict.kind}: {case.file}, {case.damage}: {verdict.line}")
                if verdict.kind == "wrong":
                    print(f"    command: python -m tfquant.calibrate {' '.join(case.command)}")
                    print(f"    repeat: python scripts/corrupt.py --seed {case.seed} --count 1 --verbose", flush=True)
            if live:
                left = (time.monotonic() - start) / done * (args.count - done)
                print(
                    f"\r\x1b[K{done} of {args.count}, {counts['wrong']} wrong, {left / 60:.0f} min left", end="", file=sys.stderr
                )
                sys.stderr.flush()
    _clear(live)
    print(f"{counts.total()} files: {', '.join(f'{counts[kind]} {kind}' for kind in KINDS)}")
    return 1 if counts["wrong"] else 0


def _parallel(corruption, inputs, seeds, jobs):
    """Verdicts as they come; each job has a process that works through seeds."""
    waiting, done = iter(seeds), queue.SimpleQueue()
    lock = threading.Lock()

    def next_seeds():
        while True:
            with lock:
                seed = next(waiting, None)
            if seed is None:
                return
            yield seed

    def work():
        try:
            for verdict in corruption.corrupt(inputs, next_seeds()):
                done.put(verdict)
        except BaseException as error:  # to be raised where the verdicts are read
            done.put(error)
        done.put(None)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    running = jobs
    while running:
        verdict = done.get()
        if isinstance(verdict, BaseException):
            raise verdict
        if verdict is None:
            running -= 1
        else:
            yield verdict


def _clear(live: bool) -> None:
    if live:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
