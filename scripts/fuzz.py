"""Spoil tiny bundles at random for as long as it is told, and report each case that neither works nor is refused.

    python scripts/fuzz.py --minutes 20

A case is known by its number: ``--first N --cases 1`` runs it again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fuzzing import make_source, run_cases

_AT_ONCE = 500


def main() -> int:
    """Run cases until the time is over; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--first", type=int, default=1_000_000, help="the first case's number")
    parser.add_argument("--cases", type=int, default=0, help="so many cases, however long they take")
    options = parser.parse_args()
    end, number, failures = time.monotonic() + 60 * options.minutes, options.first, 0
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        source.mkdir()
        make_source(source)
        while time.monotonic() < end:
            count = options.cases or _AT_ONCE
            for failure in run_cases(source, Path(scratch), number, count):
                failures += 1
                print(f"case {failure.number}: {failure.what}", flush=True)
            number += count
            print(f"{number - options.first} cases, {failures} failures", flush=True)
            if options.cases:
                break
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
