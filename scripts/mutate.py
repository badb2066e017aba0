"""Change the numbers and the meaning of tiny bundles in many ways, checksums rewritten; count which changes are found.

    python scripts/mutate.py --seeds 2
    python scripts/mutate.py --families decoder --write a.json; python scripts/mutate.py --join a.json b.json

Prints tables, then each harmful change that nothing found and each layer that diff named wrongly; clean bundles are
verified too, over numbers of threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from meanings import MEANINGS
from mutations import CACHE, HALVES, HARMFUL, Outcome, by_kind, made, outcomes, table
from tiny_bundles import attention_bundle, window_bundle
from tiny_files import copied

from edgellm_runtime import open_session
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.verify import verify
from edgellm_runtime.errors import RuntimeFault

_WEIGHTS = ("none", "int8", "int4", "2:32", "w8a8")
_SUBJECTS = {
    "decoder": (*_WEIGHTS, CACHE, HALVES),
    "decoder untied with biases": _WEIGHTS,
    "decoder with q/k norm": _WEIGHTS,
    "mixed": ("none", "int8", "int4", "w8a8"),
    "lstm": ("int4", "2:32"),
    "local and mixed": ("none", "int4"),
    "windows and soft caps": ("none", "int8", "2:32", "w8a8", CACHE, HALVES),
}
_GROUPS = {"mixed": "hybrid", "lstm": "hybrid", "local and mixed": "window", "windows and soft caps": "window"}
_MEANING = "meaning"
_THREADS = range(1, 9)


def main() -> int:
    """Make, change, verify; 1 if a clean bundle was called wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=2, help="of each kind of change, for each model and format")
    parser.add_argument("--families", nargs="+", default=[*_SUBJECTS, _MEANING], help="some of them alone")
    parser.add_argument("--write", type=Path, help="where to write what was found, for --join")
    parser.add_argument("--join", nargs="+", type=Path, help="print the tables of what was written, and change nothing")
    options = parser.parse_args()
    run = _Run()
    if options.join:
        for file in options.join:
            run.add(_Run(**json.loads(file.read_text())))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            for number, family in enumerate(options.families):
                run.take(family, options.seeds, Path(scratch) / str(number))
    if options.write:
        options.write.write_text(json.dumps(dataclasses.asdict(run), allow_nan=False))
    found = [Outcome(**one) for one in run.found]
    _report(found)
    print(f"\n{len(found)} changes; {run.clean} clean verifications, {run.alarms} of them false alarms")
    return 1 if run.alarms else 0


@dataclass
class _Run:
    """What was found, and how many clean bundles were verified, and of these called wrong."""

    found: list[dict[str, Any]] = field(default_factory=list)
    clean: int = 0
    alarms: int = 0

    def add(self, other: _Run) -> None:
        self.found += other.found
        self.clean += other.clean
        self.alarms += other.alarms

    def take(self, family: str, seeds: int, folder: Path) -> None:
        """Each method of a family."""
        if family == _MEANING:
            self.found += [dataclasses.asdict(one) for one in _meanings(folder)]
            return
        for method in _SUBJECTS[family]:
            each = folder / method.replace(":", "-")
            bundle = Bundle(source := made(method, each / "source", family))
            for threads in _THREADS:
                self.clean += 1
                self.alarms += not verify(bundle, open_session(bundle, threads=threads)).ok
            group = f"{_GROUPS.get(family, '')} {method}".strip()
            self.found += [dataclasses.asdict(one) for one in outcomes(source, group, range(seeds), each, diff=True)]
            print(f"{family}, {method}: {len(self.found)} changes so far", file=sys.stderr, flush=True)


def _meanings(scratch: Path) -> Iterator[Outcome]:
    """Each change of meaning, of two bundles; what is refused when it is read is found."""
    for source in (attention_bundle(), window_bundle()):
        for name, change in MEANINGS.items():
            folder = scratch / f"{source.parent.name} {name}"
            folder.mkdir(parents=True)
            change(path := copied(source, folder))
            try:
                bundle = Bundle(path)
                ok = verify(bundle, open_session(bundle, threads=1)).ok
            except RuntimeFault:
                ok = False
            yield Outcome(_MEANING, "a change of meaning", float("inf"), False, not ok)


def _report(found: Sequence[Outcome]) -> None:
    print(table(found), by_kind(found), sep="\n\n")
    for one in found:
        if one.kl > HARMFUL and not one.found:
            print(f"not found: {one.method}, {one.kind}, KL {one.kl:.2g}")
        if one.expected and one.named != one.expected and one.kl > HARMFUL:
            print(f"named {one.named}, not {one.expected}: {one.method}, {one.kind}, KL {one.kl:.2g}")


if __name__ == "__main__":
    sys.exit(main())
