"""The form of a task, found from its training data and the tokenizer."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from edgellm.tasks.examples import Example
from edgellm_runtime.task_spec import ANSWER, FIELDS, SEPARATOR, Segment, TaskSpec
from edgellm_runtime.tasks.prompt import TokenId
from edgellm_runtime.tasks.scripts import scripts_of

__all__ = ["CUT", "NO_ANSWER", "make_spec", "target_of", "texts_of"]

NO_ANSWER = "no answer"
CUT = {"qa": "context", "summarization": "text"}  # what may lose its end without losing the question
_TARGET = {"translation": "target", "qa": "answer", "summarization": "summary"}
_SOURCE = {"translation": "source", "qa": "context", "summarization": "text"}
_MOST_CHOICES, _CHOICE_LENGTH = 8, 20
_SCRIPT_SHARE, _LOOKED_AT = 0.2, 2000
_ASKED = {
    "translation": "Translate this sentence.\n\n",
    "qa": "Read the text and answer the question with a few words from it.\n\nText: ",
    "summarization": "Describe this in a few words.\n\n",
}


def make_spec(
    task: str, examples: Sequence[Example], token_id: TokenId, *, max_prompt: int, max_new_tokens: int
) -> TaskSpec:
    """What a model that is trained on these examples will say of itself.

    Args:
        task: a name of :data:`edgellm_runtime.task_spec.FIELDS`.
        examples: the training part.
        token_id: of the model's tokenizer, whose special tokens the prompt is made of.
        max_prompt: the most tokens of a prompt.
        max_new_tokens: the most tokens of an answer.
    """
    if task == "generation":
        return TaskSpec(name=task, max_prompt=max_prompt, max_new_tokens=max_new_tokens)
    if task == "srl":
        roles = sorted({label[2:] for e in examples for label in e["labels"] if label != "O"})
        labels = ("O", *(f"{part}-{role}" for role in roles for part in "BI"))
        return TaskSpec(name=task, max_prompt=max_prompt, max_new_tokens=max_new_tokens, labels=labels)
    answers = Counter(target_of(task, e) for e in examples)
    closed = task == "qa" and len(answers) <= _MOST_CHOICES and all(len(a) <= _CHOICE_LENGTH for a in answers)
    return TaskSpec(
        name=task, prompt=_prompt(task, token_id), max_prompt=max_prompt, max_new_tokens=max_new_tokens,
        cut=CUT.get(task, ""), choices=tuple(sorted(answers)) if closed else (),
        no_answer=NO_ANSWER if task == "qa" and answers[NO_ANSWER] else "", scripts=_scripts(task, examples),
        length=_usual_length(examples) if task == "summarization" else 10,
    )  # fmt: skip


def target_of(task: str, example: Example) -> str:
    """The text that an example's prompt is to be answered with."""
    text: str = example[_TARGET[task]].strip()
    return text or NO_ANSWER


def texts_of(task: str, example: Example) -> list[str]:
    """Every text of an example, for a tokenizer to learn from."""
    if task == "srl":
        return [" " + " ".join(example["words"])]
    texts = [example[name] for name in FIELDS[task] if name in example]
    return texts if task == "generation" else [*texts, target_of(task, example)]


def _prompt(task: str, token_id: TokenId) -> tuple[Segment, ...]:
    """Of the special tokens that there are: those of models trained for tasks, those of ChatML, or plain words."""
    if token_id(SEPARATOR) is not None and token_id(ANSWER) is not None:
        return _DEFAULT[task]
    inner = [segment for segment in _DEFAULT[task] if segment.kind == "field"]
    between = Segment("text", "\n\nWords: " if task == "summarization" else "\n\nQuestion: ")
    asked = [Segment("text", _ASKED[task]), inner[0], *([between, inner[1]] if len(inner) > 1 else [])]
    if token_id("<|im_start|>") is None or token_id("<|im_end|>") is None:
        return (*asked, Segment("text", "\n\nAnswer: "))
    start, end = Segment("token", "<|im_start|>"), Segment("token", "<|im_end|>")
    return (
        start, Segment("text", "user\n"), *asked, end, Segment("text", "\n"), start, Segment("text", "assistant\n")
    )  # fmt: skip


_DEFAULT = {
    "translation": (Segment("field", "source"), Segment("token", SEPARATOR)),
    "qa": (
        Segment("field", "context"), Segment("token", SEPARATOR), Segment("field", "question"),
        Segment("token", ANSWER),
    ),
    "summarization": (
        Segment("field", "text"), Segment("token", SEPARATOR), Segment("field", "length"), Segment("token", ANSWER),
    ),
}  # fmt: skip


def _scripts(task: str, examples: Sequence[Example]) -> tuple[str, ...]:
    """Those of a good part of the letters."""
    found = scripts_of(e[_SOURCE[task]] for e in examples[:_LOOKED_AT])
    return tuple(sorted(s for s, n in found.items() if n >= _SCRIPT_SHARE * found.total()))


def _usual_length(examples: Sequence[Example]) -> int:
    return max(1, round(statistics.median(len(e["summary"].split()) for e in examples)))
