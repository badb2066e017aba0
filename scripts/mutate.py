"""Change the numbers and the meaning of tiny bundles in many ways, checksums rewritten; count which changes are found.

    python scripts/mutate.py --seeds 2

Prints tables, then each harmful change that nothing found and each layer that diff named wrongly; clean bundles are
verified too, over numbers of threads.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from meanings import MEANINGS
from mutations import CACHE, HARMFUL, Outcome, by_kind, made, outcomes, table
from tiny_bundles import attention_bundle, window_bundle
from tiny_files import copied

from edgellm_runtime import open_session
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.verify import verify
from edgellm_runtime.errors import RuntimeFault

_WEIGHTS = ("none", "int8", "int4", "2:32", "w8a8")
_SUBJECTS = {
    "decoder": (*_WEIGHTS, CACHE),
    "decoder untied with biases": _WEIGHTS,
    "decoder with q/k norm": _WEIGHTS,
    "mixed": ("none", "int8", "int4", "w8a8"),
    "lstm": ("int4", "2:32"),
    "local and mixed": ("none", "int4"),
    "windows and soft caps": ("none", "int8", "2:32", "w8a8", CACHE),
}
_GROUPS = {"mixed": "hybrid", "lstm": "hybrid", "local and mixed": "window", "windows and soft caps": "window"}
_THREADS = range(1, 9)


def main() -> int:
    """Make, change, verify; 1 if a clean bundle was called wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=2, help="of each kind of change, for each model and format")
    parser.add_argument("--families", nargs="+", default=list(_SUBJECTS))
    options = parser.parse_args()
    found: list[Outcome] = []
    alarms = clean = 0
    with tempfile.TemporaryDirectory() as scratch:
        for number, (family, method) in enumerate((f, m) for f in options.families for m in _SUBJECTS[f]):
            folder = Path(scratch) / str(number)
            source = made(method, folder / "source", family)
            bundle = Bundle(source)
            for threads in _THREADS:
                clean += 1
                alarms += not verify(bundle, open_session(bundle, threads=threads)).ok
            group = f"{_GROUPS.get(family, '')} {method}".strip()
            found += outcomes(source, group, range(options.seeds), folder, diff=True)
            print(f"{family}, {method}: {len(found)} changes so far", file=sys.stderr, flush=True)
        found += _meanings(Path(scratch))
    _report(found)
    print(f"\n{len(found)} changes; {clean} clean verifications, {alarms} of them false alarms")
    return 1 if alarms else 0


def _meanings(scratch: Path) -> Iterator[Outcome]:
    """Each change of meaning, of two bundles; what is refused when it is read is found."""
    for source in (attention_bundle(), window_bundle()):
        for name, change in MEANINGS.items():
            folder = scratch / f"{source.parent.name} {name}"
            folder.mkdir()
            change(path := copied(source, folder))
            try:
                bundle = Bundle(path)
                ok = verify(bundle, open_session(bundle, threads=1)).ok
            except RuntimeFault:
                ok = False
            yield Outcome("meaning", "a change of meaning", float("inf"), False, not ok)


def _report(found: Sequence[Outcome]) -> None:
    print(table(found), by_kind(found), sep="\n\n")
    for one in found:
        if one.kl > HARMFUL and not one.found:
            print(f"not found: {one.method}, {one.kind}, KL {one.kl:.2g}")
        if one.expected and one.named != one.expected and one.kl > HARMFUL:
            print(f"named {one.named}, not {one.expected}: {one.method}, {one.kind}, KL {one.kl:.2g}")


if __name__ == "__main__":
    sys.exit(main())
