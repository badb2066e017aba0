"""Descriptions of Debian packages, long to short, from the machine's own apt mirror.

python examples/summarization/prepare.py
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from fetch import CACHE, FetchError, from_apt_index, report

RELEASE, INDEX = "bookworm", "main/i18n/Translation-en.xz"
LEAST_WORDS, MOST_WORDS = 30, 220
HELD_OUT = 1000  # descriptions in each of the validation and test parts
_KINDS = re.compile(
    r"(-(dev|doc|dbg|dbgsym|data|common|bin|utils|tools|examples|perl|python|ruby|java|cil|el|core|extra|plugins?|"
    r"headers|source|client|server|gtk\d?|qt\d?|tests?|libs?|runtime|all|base|full|static|cross|l10n|i18n|"
    r"[a-z]{2}(-[a-z]{2})?|amd64|i386|arm\w*|s390x|riscv64|mips\w*|ppc\w*|hppa|sh4|x32|m68k|alpha|sparc64)|[\d.]+)$"
)


def entries(index: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(package, short, long description) of every paragraph of a Translation index."""
    package, short, long = "", "", list[str]()
    for line in [*index, ""]:
        if line.startswith("Package: "):
            package = line[9:].strip()
        elif line.startswith("Description-en: "):
            short, long = line[16:].strip(), []
        elif line.startswith(" ") and short:
            long.append(line[1:])
        elif not line.strip():
            if package and short:
                yield package, short, unwrapped(long)
            package, short = "", ""


def unwrapped(lines: Iterable[str]) -> str:
    """A long description as running text: a dot alone parts paragraphs, an indented line is an item of a list."""
    text = " ".join("" if line.strip() == "." else line.strip() for line in lines)
    return re.sub(r"\s+", " ", text).strip()


def stem(package: str) -> str:
    """What related packages share: ``libfoo2-dev`` and ``python3-foo-doc`` are both ``foo``."""
    name = re.sub(r"^(lib|python3?-|ruby-|golang-|node-|r-cran-|php-|fonts-|gcc-|task-|linux-)", "", package)
    while (shorter := _KINDS.sub("", name)) != name and len(shorter) > 2:
        name = shorter
    return name.rstrip("-.0123456789") or name


def rows_of(found: Iterable[tuple[str, str, str]]) -> dict[str, list[dict[str, str]]]:
    """Rows by stem: long enough to be worth a summary, every text and every summary once."""
    groups: dict[str, list[dict[str, str]]] = {}
    texts, summaries = set[str](), set[str]()
    for package, short, long in found:
        alike = re.sub(r"\W|\d", "", long.lower())[:200]
        if LEAST_WORDS <= len(long.split()) <= MOST_WORDS and alike not in texts and short.lower() not in summaries:
            texts.add(alike)
            summaries.add(short.lower())
            groups.setdefault(stem(package), []).append({"text": long, "summary": short})
    return groups


def divide(groups: dict[str, list[dict[str, str]]], held_out: int) -> dict[str, list[dict[str, str]]]:
    """Parts that share no stem."""
    names = sorted(groups)
    random.Random(0).shuffle(names)
    parts: dict[str, list[dict[str, str]]] = {"test": [], "valid": [], "train": []}
    for name in names:
        part = next((p for p in ("test", "valid") if len(parts[p]) < held_out), "train")
        parts[part] += groups[name]
    return {name: parts[name] for name in ("train", "valid", "test")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/summarization"))
    parser.add_argument("--cache", type=Path, default=CACHE)
    arguments = parser.parse_args()
    index = from_apt_index(
        RELEASE, INDEX, "62f59c3cdca9786e4f7adf9002f9f5729a684adcb4667e58e448dec9b5a46c7f", arguments.cache
    ).decode()
    report(arguments.out, divide(rows_of(entries(index.splitlines())), HELD_OUT))


if __name__ == "__main__":
    try:
        main()
    except FetchError as error:
        sys.exit(f"Error: {error}")
