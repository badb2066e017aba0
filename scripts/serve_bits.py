"""Count how often a row of a batch has the very logits that it has alone: what batching promises, for each format.

    python scripts/serve_bits.py --tokens 5120 runs/smollm2-int8 runs/smollm2-int4

Eight rows of different lengths go on for 64 tokens, once together and once each alone, with the same tokens and each
with its own state, so that differences add up as they do in an answer. The prompts are random tokens, over which a
model is less decided than over text.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgellm_runtime import load
from edgellm_runtime.batching.rows import ApartRows, SharedRows
from edgellm_runtime.session import Session

_ROWS, _STEPS = 8, 64


@dataclass
class Found:
    """What was counted.

    Args:
        tokens: of all rows.
        equal: of them, those whose logits were equal in every bit.
        other: those whose most likely token was another.
        worst: the greatest difference, over the greatest logit.
    """

    tokens: int = 0
    equal: int = 0
    other: int = 0
    worst: float = 0.0


def compare(session: Session, tokens: int, seed: int = 0) -> Found:
    """Go on together and alone for at least so many tokens."""
    rng, found = np.random.default_rng(seed), Found()
    while found.tokens < tokens:
        together, apart = SharedRows(session, _ROWS), ApartRows(session)
        for _ in range(_ROWS):
            state = session.new_state(1, 1)
            session.step(rng.integers(5, session.vocab_size, (1, int(rng.integers(3, 60)))), state)
            together.add(state.fork(), 128)
            apart.add(state, 128)
        chosen = rng.integers(5, session.vocab_size, (_ROWS, 1))
        for _ in range(_STEPS):
            alone = np.concatenate([session.step(chosen[i : i + 1], p).copy() for i, p in enumerate(apart.parts())])
            rows = np.concatenate([session.step(chosen, part) for part in together.parts()])
            found.tokens += _ROWS
            found.equal += int((alone == rows).all(axis=(1, 2)).sum())
            found.other += int((alone.argmax(axis=2) != rows.argmax(axis=2)).sum())
            found.worst = max(found.worst, float(np.abs(alone - rows).max() / np.abs(alone).max()))
            chosen = alone[:, 0].argmax(axis=1)[:, None]
    return found


def main() -> int:
    """Compare bundles and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=5120)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    print("| bundle | tokens | equal in every bit | another most likely token | greatest difference |")
    print("|---|---|---|---|---|", flush=True)
    for bundle in options.bundles:
        f = compare(load(bundle, threads=options.threads).session, options.tokens)
        print(f"| {bundle.name} | {f.tokens:,} | {f.equal:,} | {f.other:,} | {f.worst:.1e} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
