"""What needs no model: the scores that a trained one has to beat.

Each baseline learns from the training examples alone, in seconds, and answers the test examples as a model would.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from edgellm.tasks.metrics import is_cjk, squad_tokens

__all__ = ["Dictionary", "predict_baselines"]

Example = Mapping[str, Any]
Predictions = dict[str, list[Any]]

_PAIRS = 20_000  # translations that the dictionary is learned from: ten seconds
_ROUNDS = 5  # of expectation and maximization
_REACH = 6  # words from the predicate on each side whose distance is told apart
_SENTENCE_ENDS = ".!?。！？"  # noqa: RUF001


def predict_baselines(
    task: str, train: Sequence[Example], examples: Sequence[Example], *, no_answer: str = "", closed: bool = False,
    length: int | None = None,
) -> Predictions:  # fmt: skip
    """The answers of each baseline of a task.

    Args:
        task: ``translation``, ``qa``, ``summarization`` or ``srl``; of text see :mod:`edgellm.tasks.ngrams`.
        train: what they learn from.
        examples: what they answer; the answers in them are not looked at.
        no_answer: of qa: the answer that means that the context does not say.
        closed: of qa: whether answers are a few choices, so that pieces of the context are none.
        length: of summarization: words that are asked for; None: the mean of the training summaries.

    Returns:
        By name, a prediction for each example.

    Raises:
        ValueError: no training examples, or a task without predictions.
    """
    if not train:
        raise ValueError("no training examples; a baseline learns from some")
    makers: Mapping[str, Callable[[], Predictions]] = {
        "translation": lambda: _translation(train, examples),
        "qa": lambda: _questions(train, examples, no_answer, closed),
        "summarization": lambda: _summarization(train, examples, length),
        "srl": lambda: _roles(train, examples),
    }
    if task not in makers:
        raise ValueError(f"{task} has no such baselines; it is one of {', '.join(makers)}")
    return makers[task]()


class Dictionary:
    """The most likely translation of each word by IBM model 1 (Brown et al., 1993), word by word in the source's order.

    Args:
        pairs: source and target texts; the first 20,000 are read. Chinese texts are taken character by character.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        kept = [pair for _, pair in zip(range(_PAIRS), pairs, strict=False)]
        self._cut_source, self._cut_target = (is_cjk(side) for side in zip(*kept, strict=True))
        rows = [(_words(s.lower(), self._cut_source), _words(t, self._cut_target)) for s, t in kept]
        chances: dict[str, dict[str, float]] = {}
        for _ in range(_ROUNDS):
            chances = _maximize(rows, chances)
        self._best = {source: max(row, key=lambda t: (row[t], t)) for source, row in chances.items() if row}

    def translate(self, text: str) -> str:
        """Each word by its likeliest translation; unknown words stay as they are."""
        words = [self._best.get(word.lower(), word) for word in _words(text, self._cut_source)]
        return ("" if self._cut_target else " ").join(words)


def _maximize(
    rows: Sequence[tuple[list[str], list[str]]], chances: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """One round: p(target word | source word) from the counts that the last round's chances expect; none: uniform."""
    counts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for sources, targets in rows:
        for target in targets:
            weights = [chances[s].get(target, 0.0) if chances else 1.0 for s in sources]
            total = sum(weights) or 1.0
            for source, weight in zip(sources, weights, strict=True):
                if weight > 1e-4 * total:  # keeps the table from holding every pair of words
                    counts[source][target] += weight / total
    return {s: {t: c / total for t, c in row.items()} for s, row in counts.items() for total in [sum(row.values())]}


def _words(text: str, by_character: bool) -> list[str]:
    return [c for c in text if not c.isspace()] if by_character else text.split()


def _translation(train: Sequence[Example], examples: Sequence[Example]) -> Predictions:
    dictionary = Dictionary((e["source"], e["target"]) for e in train)
    return {
        "copy of the source": [e["source"] for e in examples],
        "word by word": [dictionary.translate(e["source"]) for e in examples],
    }


def _questions(train: Sequence[Example], examples: Sequence[Example], no_answer: str, closed: bool) -> Predictions:
    common = Counter(e["answer"] for e in train).most_common(1)[0][0]
    found: Predictions = {"most frequent answer": [common] * len(examples)}
    if closed:
        return found
    if no_answer and common not in ("", no_answer):
        found["no answer"] = [no_answer] * len(examples)
    found["likeliest sentence"] = [_sentence(e["context"], e["question"]) for e in examples]
    return found


def _sentence(context: str, question: str) -> str:
    """The sentence that shares most words with the question, without those words; of equal ones the first."""
    for end in _SENTENCE_ENDS:
        context = context.replace(end, end + "\n")
    asked = set(squad_tokens(question))
    best = max(context.split("\n"), key=lambda s: len(asked & set(squad_tokens(s))))
    return " ".join(word for word in best.split() if not asked & set(squad_tokens(word))) or best.strip()


def _summarization(train: Sequence[Example], examples: Sequence[Example], length: int | None) -> Predictions:
    mean = sum(len(e["summary"].split()) for e in train) / len(train)
    wanted = length or max(1, round(mean))
    return {f"first {wanted} words": [" ".join(e["text"].split()[:wanted]) for e in examples]}


def _roles(train: Sequence[Example], examples: Sequence[Example]) -> Predictions:
    """The most frequent label by distance from the predicate; and by that and the word, where it was seen there."""
    places: dict[int, Counter[str]] = defaultdict(Counter)
    words: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    for example in train:
        for i, (word, label) in enumerate(zip(example["words"], example["labels"], strict=True)):
            place = _place(i, example["predicate"])
            places[place][label] += 1
            words[word.lower(), place][label] += 1
    by_place = {place: counts.most_common(1)[0][0] for place, counts in places.items()}
    by_word = {key: counts.most_common(1)[0][0] for key, counts in words.items()}

    def labels(example: Example, known: Mapping[tuple[str, int], str]) -> list[str]:
        where = [_place(i, example["predicate"]) for i in range(len(example["words"]))]
        keys = zip(example["words"], where, strict=True)
        return _repaired([known.get((word.lower(), place)) or by_place.get(place, "O") for word, place in keys])

    return {
        "label by distance": [labels(e, {}) for e in examples],
        "label by word and distance": [labels(e, by_word) for e in examples],
    }


def _place(i: int, predicate: int) -> int:
    return max(-_REACH, min(_REACH, i - predicate))


def _repaired(labels: Sequence[str]) -> list[str]:
    """An I-X that follows neither B-X nor I-X begins a span."""
    result: list[str] = []
    for label in labels:
        inside = label.startswith("I-") and not (result and result[-1][2:] == label[2:] and result[-1] != "O")
        result.append("B-" + label[2:] if inside else label)
    return result
