"""Spoil tiny bundles, states and checkpoints at random, and report each case that neither works nor is refused.

    python scripts/fuzz.py --minutes 20
    python scripts/fuzz.py --cases 200000

A case is known by its number: ``--first N --cases 1`` runs it again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fuzzing import make_source, run_cases

_AT_ONCE = 10_000  # in one process, if none of them ends it
_IN_MEMORY = "/dev/shm"  # where there is one: each case is a folder of its own


def main() -> int:
    """Run cases until they or the time are over; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--first", type=int, default=1_000_000, help="the first case's number")
    parser.add_argument("--cases", type=int, default=0, help="so many cases, however long they take")
    options = parser.parse_args()
    start, number, failures = time.monotonic(), options.first, 0
    last = options.first + options.cases
    with tempfile.TemporaryDirectory(dir=_IN_MEMORY if os.access(_IN_MEMORY, os.W_OK) else None) as scratch:
        source = Path(scratch) / "source"
        source.mkdir()
        make_source(source)
        while number < last if options.cases else time.monotonic() < start + 60 * options.minutes:
            count = min(_AT_ONCE, last - number) if options.cases else _AT_ONCE
            for failure in run_cases(source, Path(scratch), number, count):
                failures += 1
                print(f"case {failure.number}: {failure.what}", flush=True)
            number += count
            minutes = (time.monotonic() - start) / 60
            print(f"{number - options.first} cases, {failures} failures, {minutes:.1f} minutes", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
