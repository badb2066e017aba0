"""Change the numbers of tiny bundles in many ways, checksums rewritten, and count which changes verify finds.

    python scripts/mutate.py --seeds 10

Prints a table, then each harmful change that nothing found; clean bundles are verified too, over numbers of threads.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from mutations import HARMFUL, Outcome, made, outcomes, table

from edgellm_runtime import open_session
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.verify import verify

_METHODS = ("none", "int8", "int4", "2:32", "w8a8")
_FAMILIES = ("decoder", "decoder untied with biases", "decoder with q/k norm")
_THREADS = (1, 2, 3, 4)


def main() -> int:
    """Make, change, verify; 1 if a clean bundle was called wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=10, help="of each kind of change, for each model and format")
    parser.add_argument("--methods", nargs="+", default=_METHODS)
    options = parser.parse_args()
    found: list[Outcome] = []
    alarms = clean = 0
    with tempfile.TemporaryDirectory() as scratch:
        for number, family in enumerate(_FAMILIES):
            for method in options.methods:
                folder = Path(scratch) / f"{number}-{method.replace(':', '-')}"
                source = made(method, folder / "source", family)
                bundle = Bundle(source)
                for threads in _THREADS:
                    clean += 1
                    alarms += not verify(bundle, open_session(bundle, threads=threads)).ok
                found += outcomes(source, method, range(options.seeds), folder)
                print(f"{family}, {method}: {len(found)} changes so far", file=sys.stderr, flush=True)
    print(table(found))
    print(f"\n{len(found)} changes; {clean} clean verifications, {alarms} of them false alarms")
    for one in found:
        if one.kl > HARMFUL and not one.found:
            print(f"not found: {one.method}, {one.kind}, KL {one.kl:.2g}")
    return 1 if alarms else 0


if __name__ == "__main__":
    sys.exit(main())
