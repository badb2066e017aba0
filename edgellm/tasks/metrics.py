"""Scores of each task: what its answers are worth beside the references.

The counting is done by the libraries of the field (sacrebleu, rouge-score, seqeval), which load when they are needed;
here is only what they leave open: which tokenizer, which answers count, and which number is the task's own.
"""

from __future__ import annotations

import importlib
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["PRIMARY", "accepted_answers", "better", "bits_per_byte", "is_cjk", "primary", "score", "squad_tokens"]

Example = Mapping[str, Any]

# The one number of each task that tables are sorted by; of questions with closed choices it is the accuracy.
PRIMARY: Mapping[str, str] = {
    "generation": "bits_per_byte", "translation": "chrf", "qa": "f1", "summarization": "rougeL", "srl": "span_f1",
}  # fmt: skip
_EXCLUDED = ("V", "REL")  # the predicate itself: given, not found
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def primary(task: str, scores: Mapping[str, float]) -> str:
    """The name of the score that a task is judged by."""
    return "accuracy" if task == "qa" and "accuracy" in scores else PRIMARY[task]


def better(task: str, a: float, b: float) -> bool:
    """Whether the primary score ``a`` is better than ``b``."""
    return a < b if task == "generation" else a > b


def score(
    task: str, predictions: Sequence[Any], examples: Sequence[Example], *, choices: Sequence[str] = (),
    no_answer: str = "", length: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """Score predictions; shares are in percent.

    Args:
        task: ``translation``, ``qa``, ``summarization`` or ``srl``; text is scored by :func:`bits_per_byte`.
        predictions: a text for each example, or for srl a label for each word.
        examples: what was to be predicted, as the data's lines say it.
        choices: of qa: what every answer is one of; empty: answers are free.
        no_answer: of qa: the answer that means that the context does not say.
        length: of summarization: the words that were asked for; None: as many as each reference has.

    Raises:
        ValueError: another number of predictions than of examples, none at all, or a task without predictions.
        ModuleNotFoundError: the task's library is not installed.
    """
    if not examples or len(predictions) != len(examples):
        raise ValueError(f"{len(predictions)} predictions for {len(examples)} examples; give one for each")
    if task == "translation":
        return _translation(predictions, [e["target"] for e in examples])
    if task == "qa":
        return _questions(predictions, [accepted_answers(e) for e in examples], bool(choices), no_answer)
    if task == "summarization":
        return _summarization(predictions, [e["summary"] for e in examples], length)
    if task == "srl":
        return _roles(predictions, [e["labels"] for e in examples])
    raise ValueError(f"{task} has no predictions to score; it is one of translation, qa, summarization, srl")


def bits_per_byte(nats_per_token: float, tokens: int, size: int) -> float:
    """Bits that a model needs for a byte of text, whatever its tokens are.

    Args:
        nats_per_token: the mean loss.
        tokens: how many tokens the text has.
        size: of the text in UTF-8, bytes.
    """
    return nats_per_token * tokens / size / math.log(2)


def accepted_answers(example: Example) -> list[str]:
    """Every answer of a question that counts as right."""
    return list(example.get("answers") or [example["answer"]])


def is_cjk(texts: Iterable[str]) -> bool:
    """Whether at least half of the letters are Chinese characters, which no spaces part."""
    letters = [c for text in texts for c in text if c.isalpha()]
    return 2 * sum("CJK" in unicodedata.name(c, "") for c in letters) >= max(1, len(letters))


def squad_tokens(text: str) -> list[str]:
    """Words as SQuAD compares them: lower case, without punctuation and articles (Rajpurkar et al., 2016)."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed and scoring needs it; in a clone of edgellm: pip install '.[tasks]'",
            name=error.name,
        ) from error


def _translation(predictions: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    metrics = _need("sacrebleu.metrics")
    tokenizer = "zh" if is_cjk(targets) else "13a"
    chrf = metrics.CHRF().corpus_score(predictions, [targets]).score
    return {"chrf": chrf, "bleu": metrics.BLEU(tokenize=tokenizer).corpus_score(predictions, [targets]).score}


def _questions(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], closed: bool, no_answer: str
) -> dict[str, float]:  # fmt: skip
    nothing = no_answer.strip()
    given = ["" if nothing and p.strip() == nothing else p for p in predictions]
    wanted = [["" if nothing and a.strip() == nothing else a for a in one] for one in answers]
    if closed:
        right = [p.strip().lower() in {a.strip().lower() for a in one} for p, one in _pairs(given, wanted)]
        return {"accuracy": _percent(right)}
    exact = [max(squad_tokens(p) == squad_tokens(a) for a in one) for p, one in _pairs(given, wanted)]
    f1 = [max(_token_f1(p, a) for a in one) for p, one in _pairs(given, wanted)]
    scores = {"f1": _percent(f1), "exact_match": _percent(exact)}
    silent = [not any(map(squad_tokens, one)) for one in wanted]
    if any(silent) and not all(silent):
        scores["f1_answerable"] = _percent([x for x, s in _pairs(f1, silent) if not s])
        scores["no_answer_accuracy"] = _percent([x for x, s in _pairs(f1, silent) if s])
    return scores


def _token_f1(prediction: str, answer: str) -> float:
    """Overlap of two bags of words; as SQuAD 2 has it, nothing is like nothing and unlike everything else."""
    found, wanted = squad_tokens(prediction), squad_tokens(answer)
    if not found or not wanted:
        return float(found == wanted)
    return 2 * sum((Counter(found) & Counter(wanted)).values()) / (len(found) + len(wanted))


def _summarization(predictions: Sequence[str], summaries: Sequence[str], length: int | None) -> dict[str, float]:
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = _need("rouge_score.rouge_scorer").RougeScorer(kinds, use_stemmer=True)
    found = [scorer.score(s, p) for p, s in _pairs(predictions, summaries)]
    wanted = [length or len(s.split()) for s in summaries]
    deviations = [abs(len(p.split()) - n) for p, n in _pairs(predictions, wanted)]
    return {kind: _percent([one[kind].fmeasure for one in found]) for kind in kinds} | {
        "length_deviation": sum(deviations) / len(deviations)
    }


def _roles(predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> dict[str, float]:
    metrics, scheme = _need("seqeval.metrics.v1"), _need("seqeval.scheme")
    wanted, found = ([[_role(label) for label in one] for one in many] for many in (labels, predictions))
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        wanted, found, average="micro", scheme=scheme.IOB2, zero_division=0
    )
    scores = {"span_precision": 100 * float(precision), "span_recall": 100 * float(recall), "span_f1": 100 * float(f1)}
    words = [p == w for one in zip(found, wanted, strict=True) for p, w in zip(*one, strict=True)]
    return scores | {"word_accuracy": _percent(words)}


def _role(label: str) -> str:
    return "O" if label[2:] in _EXCLUDED else label


def _pairs(a: Sequence[Any], b: Sequence[Any]) -> Iterable[tuple[Any, Any]]:
    return zip(a, b, strict=True)


def _percent(shares: Sequence[float]) -> float:
    return 100 * sum(shares) / len(shares)
