"""A trained model at its task: translate, answer, summarize, label roles; one input or many, with confidences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgellm_runtime.arguments import check_flag, check_integer, check_list, check_text, is_sequence, shown
from edgellm_runtime.errors import OptionError
from edgellm_runtime.generation.beam import Hypothesis, beam_search, read_prompts
from edgellm_runtime.session import Session
from edgellm_runtime.softmax import log_softmax
from edgellm_runtime.task_spec import TaskSpec
from edgellm_runtime.tasks.prompt import Prompt, encode_prompt, encode_words
from edgellm_runtime.tasks.scripts import check_scripts
from edgellm_runtime.tasks.viterbi import viterbi
from edgellm_runtime.text.tokenizer import Tokenizer

__all__ = ["Answer", "RoleLabels", "Span", "TaskRunner"]

_MOST_WORDS = 10_000  # of a summary
_MAIN = {"translation": "source", "summarization": "text"}  # the field of the tasks that are asked with one text
_WORDS = re.compile(r"\w+(?:['\u2019-]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Answer:
    """What the model answers.

    Args:
        text: without the spaces around it; empty where the model says that the context does not tell.
        confidence: the geometric mean of its tokens' probabilities; of an answer that is chosen among few, its
            probability among them.
        tokens: of the answer, without the end token.
        cut: whether the prompt was too long and lost its end.
        finish_reason: ``eos``, ``length`` where the limit came first, or ``choice``.
    """

    text: str
    confidence: float
    tokens: tuple[int, ...]
    cut: bool
    finish_reason: str


@dataclass(frozen=True)
class Span:
    """Words that have a role together: from ``start`` up to ``end``, which is not part of it."""

    label: str
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class RoleLabels:
    """A sentence's roles for one predicate.

    Args:
        words: of the sentence.
        predicate: which of them it is.
        labels: one for each word.
        spans: the same as spans.
        confidence: the geometric mean of the labels' probabilities.
    """

    words: tuple[str, ...]
    predicate: int
    labels: tuple[str, ...]
    spans: tuple[Span, ...]
    confidence: float


class TaskRunner:
    """A model and what it was trained to do.

    Args:
        session: steps the model.
        tokenizer: the model's own.
        spec: the task.
    """

    def __init__(self, session: Session, tokenizer: Tokenizer, spec: TaskSpec) -> None:
        self.session, self.tokenizer, self.spec = session, tokenizer, spec

    def translate(
        self, source: str | Sequence[str], *, beams: int = 4, length_penalty: float = 1.0,
        max_new_tokens: int | None = None, check_script: bool = True,
    ) -> Any:  # fmt: skip
        """Translate a text, or each of a list of texts in one batch.

        Args:
            source: one or many.
            beams: hypotheses that are followed; 1 is greedy.
            length_penalty: as for :func:`edgellm_runtime.generation.beam.beam_search`.
            max_new_tokens: the most tokens of a translation; None for the task's own limit.
            check_script: refuse texts in another script than the model was trained on.

        Returns:
            An :class:`Answer`, or a list of them.

        Raises:
            OptionError: another task, an empty text, an unexpected script, or an option outside its range.
            ContextError: a text is too long.
        """
        self._check("translation")
        fields = [{"source": text} for text in _many("source", source)]
        if max_new_tokens is not None:
            max_new_tokens = check_integer("max_new_tokens", max_new_tokens, 1)
        return _as_given(source, self._answers(
            fields, "source", beams, length_penalty, max_new_tokens, check_script=check_script
        ))  # fmt: skip

    def answer(
        self, question: str | Sequence[str], context: str | Sequence[str], *, beams: int = 1, check_script: bool = True
    ) -> Any:
        """Answer a question from a context, or each of a list of questions, about one context or a list as long.

        Args:
            question: one or many.
            context: where the answer is.
            beams: hypotheses that are followed; of no use where answers are chosen among few.
            check_script: as for :meth:`translate`.

        Returns:
            An :class:`Answer`, or a list of them; its text is empty where the context does not say.

        Raises:
            OptionError: another task, an empty text, lists of unequal length, or an unexpected script.
            ContextError: the question is too long, or the context where it may not be shortened.
        """
        self._check("qa")
        questions, contexts = _many("question", question), _many("context", context)
        contexts = contexts * len(questions) if isinstance(context, str) else contexts
        if len(contexts) != len(questions):
            raise OptionError(f"{len(questions)} questions for {len(contexts)} contexts; give as many, or one context")
        fields = [{"question": q, "context": c} for q, c in zip(questions, contexts, strict=True)]
        if self.spec.choices:
            check_integer("beams", beams, 1)
            return _as_given(question, [self._choice(f, check_script) for f in fields])
        return _as_given(question, self._answers(fields, "context", beams, 1.0, None, check_script=check_script))

    def summarize(
        self, text: str | Sequence[str], *, words: int | None = None, beams: int = 4, check_script: bool = True
    ) -> Any:
        """Summarize a text, or each of a list.

        Args:
            text: one or many.
            words: about how many a summary is to have; None for the task's usual length.
            beams: hypotheses that are followed.
            check_script: as for :meth:`translate`.

        Returns:
            An :class:`Answer`, or a list of them.

        Raises:
            OptionError: another task, an empty text, an unexpected script, or a length below 1.
            ContextError: a text is too long and may not be shortened.
        """
        self._check("summarization")
        wanted = self.spec.length if words is None else check_integer("words", words, 1, _MOST_WORDS)
        fields = [{"text": t, "length": str(wanted)} for t in _many("text", text)]
        return _as_given(text, self._answers(fields, "text", beams, 1.0, None, check_script=check_script))

    @property
    def asks_one_text(self) -> bool:
        """Whether :meth:`prompt` makes its prompts."""
        return self.spec.name in _MAIN

    def prompt(self, text: str) -> list[int]:
        """What the model is asked with for one text, as token ids for ``generate`` and schedulers.

        Args:
            text: to translate or to summarize, in as many words as is usual.

        Raises:
            OptionError: a task that is asked with more than a text, an empty one, or an unexpected script.
            ContextError: a text is too long.
        """
        if not self.asks_one_text:
            raise OptionError(f"{self.spec.name} is asked with more than a text; use the task's own method")
        main = _MAIN[self.spec.name]
        fields = {main: check_text("text", text), "length": str(self.spec.length)}
        return self._prompt(fields, main, check_script=True).tokens

    def label_roles(self, sentence: str | Sequence[str], predicate: int | str) -> RoleLabels:
        """Find who does what to whom: the roles of a sentence's words for one predicate.

        Args:
            sentence: its words; a text is divided into words and punctuation.
            predicate: which word, from 0, or the word itself where it is there once.

        Raises:
            OptionError: another task, an empty sentence, or a predicate that is not one of its words.
            ContextError: the sentence is too long.
        """
        return self.label_roles_batch([(sentence, predicate)])[0]

    def label_roles_batch(self, items: Sequence[tuple[str | Sequence[str], int | str]]) -> list[RoleLabels]:
        """The same for many pairs of a sentence and a predicate, in one batch."""
        self._check("srl")
        pairs = check_list("items", items, "pairs of a sentence and a predicate", _pair)
        if not pairs:
            return []
        sentences = [_words(sentence) for sentence, _ in pairs]
        predicates = [_predicate(words, p) for words, (_, p) in zip(sentences, pairs, strict=True)]
        encode, token_id = self.tokenizer.encode, self.tokenizer.token_id
        how: dict[str, Any] = {"limit": self.session.max_context, "once": self.session.one_pass}
        encoded = [
            encode_words(encode, token_id, words, p, **how) for words, p in zip(sentences, predicates, strict=True)
        ]
        lengths = np.array([len(e.tokens) for e in encoded], dtype=np.int32)
        padded = np.zeros((len(encoded), lengths.max()), dtype=np.int64)
        for row, e in zip(padded, encoded, strict=True):
            row[: len(e.tokens)] = e.tokens
        state = self.session.new_state(len(encoded), int(lengths.max()))
        logits = self.session.step(padded, state, lengths=lengths, logits="all")
        return [
            self._roles(words, p, logits[i][e.positions])
            for i, (words, p, e) in enumerate(zip(sentences, predicates, encoded, strict=True))
        ]

    def _roles(self, words: Sequence[str], predicate: int, logits: Any) -> RoleLabels:
        labels, confidence = viterbi(logits, self.spec.labels)
        return RoleLabels(tuple(words), predicate, tuple(labels), spans_of(words, labels), confidence)

    def _check(self, task: str) -> None:
        if self.spec.name != task:
            raise OptionError(f"the model was trained for {self.spec.name}, not for {task}; load one that was")

    def _prompt(self, fields: Mapping[str, str], main: str, check_script: bool) -> Prompt:
        if check_flag("check_script", check_script):
            check_scripts(fields[main], main, self.spec.scripts)
        return encode_prompt(self.spec, self.tokenizer.encode, self.tokenizer.token_id, fields)

    def _answers(
        self, fields: Sequence[Mapping[str, str]], main: str, beams: int, length_penalty: float,
        max_new_tokens: int | None, *, check_script: bool,
    ) -> list[Answer]:  # fmt: skip
        if not fields:
            return []
        prompts = [self._prompt(f, main, check_script) for f in fields]
        found = beam_search(
            self.session, [p.tokens for p in prompts], beams=beams, length_penalty=length_penalty,
            max_new_tokens=max_new_tokens or self.spec.max_new_tokens, eos=self.tokenizer.eos_token_ids,
        )  # fmt: skip
        return [self._answer(hypothesis, prompt.cut) for hypothesis, prompt in zip(found, prompts, strict=True)]

    def _answer(self, found: Hypothesis, cut: bool) -> Answer:
        text = self.tokenizer.decode(found.tokens).strip()
        text = "" if self.spec.no_answer and text == self.spec.no_answer else text
        return Answer(text, found.confidence, found.tokens, cut, "eos" if found.ended else "length")

    def _choice(self, fields: Mapping[str, str], check_script: bool) -> Answer:
        """The likeliest of the answers that there are, by the probability of all its tokens and an end."""
        prompt = self._prompt(fields, "context", check_script)
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        choices = [[*self.tokenizer.encode(choice), *end] for choice in self.spec.choices]
        state, first = read_prompts(self.session, [prompt.tokens], max(map(len, choices)))
        scores = np.array([first[0, tokens[0]] for tokens in choices])
        lengths = np.array([max(1, len(tokens) - 1) for tokens in choices], dtype=np.int32)
        if lengths.max() > 1 or end:
            padded = np.zeros((len(choices), lengths.max()), dtype=np.int64)
            for row, tokens in zip(padded, choices, strict=True):
                row[: len(tokens) - 1] = tokens[:-1]
            logits = self.session.step(padded, state.take([0] * len(choices)), lengths=lengths, logits="all")
            for i, tokens in enumerate(choices):
                later = log_softmax(logits[i, : len(tokens) - 1])
                scores[i] += later[np.arange(len(tokens) - 1), tokens[1:]].sum()
        best, shares = int(scores.argmax()), np.exp(scores - scores.max())
        text = self.spec.choices[best]
        text = "" if text == self.spec.no_answer else text
        answered = tuple(choices[best][: len(choices[best]) - len(end)])
        return Answer(text, float(shares[best] / shares.sum()), answered, prompt.cut, "choice")


def spans_of(words: Sequence[str], labels: Sequence[str]) -> tuple[Span, ...]:
    """The spans that labels of the form ``B-X``, ``I-X`` and ``O`` make."""
    starts = [i for i, label in enumerate(labels) if label.startswith("B-")]
    spans = []
    for start in starts:
        end = start + 1
        while end < len(labels) and labels[end] == f"I-{labels[start][2:]}":
            end += 1
        spans.append(Span(labels[start][2:], start, end, " ".join(words[start:end])))
    return tuple(spans)


def _many(name: str, texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else check_list(name, texts, "texts, or one", check_text)


def _as_given(texts: str | Sequence[str], answers: list[Answer]) -> Answer | list[Answer]:
    return answers[0] if isinstance(texts, str) else answers


def _words(sentence: str | Sequence[str]) -> list[str]:
    if isinstance(sentence, str):
        return _WORDS.findall(sentence)
    return check_list("sentence", sentence, "words, or a text", check_text)


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    if not is_sequence(value) or len(value) != 2:
        raise OptionError(f"{name} is {shown(value)}; it must be a sentence and a predicate")
    return value[0], value[1]


def _predicate(words: Sequence[str], predicate: int | str) -> int:
    if not isinstance(predicate, str):
        number = check_integer("predicate", predicate)
        if words and not 0 <= number < len(words):  # that there are none is told elsewhere
            raise OptionError(f"predicate {shown(number)} is outside the sentence; its words are 0 to {len(words) - 1}")
        return number
    places = [i for i, word in enumerate(words) if word == predicate]
    if len(places) != 1:
        where = f"is there {len(places)} times, at {places}; give its number" if places else "is not one of the words"
        raise OptionError(f"the predicate {predicate!r} {where}")
    return places[0]
