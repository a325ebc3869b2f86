"""Takes random graphs to INT8 and holds them against the simulation, tensor by tensor; each in a process of its own.

python scripts/fuzz.py --count 10000 --seed 0 --jobs 2
"""

import argparse
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="graphs to make (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first; the others follow (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument("--verbose", action="store_true", help="print each graph and how far its tensors are off")
    args = parser.parse_args(argv)
    if args.count < 1 or args.jobs < 1 or args.seed < 0:
        parser.error("--count and --jobs must be at least 1, --seed at least 0")

    import fuzzing  # imports TensorFlow

    start = time.monotonic()
    crashes = disagreements = skipped = done = 0
    live = sys.stderr.isatty() and not args.verbose
    for seed, failure in fuzzing.fuzz(range(args.seed, args.seed + args.count), args.jobs, args.verbose):
        done += 1
        if isinstance(failure, fuzzing.Skipped):
            skipped += 1
        elif failure is not None:
            crashes += bool(failure.crash)
            disagreements += not failure.crash
            _clear(live)
            print(f"seed {seed}: {failure.crash or failure.found[0]}")
            for line in failure.found[0 if failure.crash else 1 :]:
                print(f"    {line}")
            print(f"    repeat: python scripts/fuzz.py --seed {seed} --count 1 --verbose", flush=True)
        if live:
            left = (time.monotonic() - start) / done * (args.count - done)
            text = f"{done} of {args.count}, {crashes} crashes, {disagreements} disagreements, {left / 60:.0f} min left"
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    _clear(live)
    print(f"{done} graphs, {skipped} skipped: {crashes} crashes, {disagreements} disagreements")
    return 1 if crashes or disagreements else 0


def _clear(live: bool) -> None:
    if live:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
