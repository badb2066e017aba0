"""Examples as token ids with what is to be learned at each position. The prompts are those of the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgellm.tasks.examples import Example
from edgellm.tasks.specs import target_of
from edgellm_runtime.errors import ContextError
from edgellm_runtime.task_spec import FIELDS, TaskSpec
from edgellm_runtime.tasks.prompt import Encode, TokenId, encode_prompt, encode_words

__all__ = ["Encoded", "EncodedExamples", "class_weights_of", "encode_examples"]


class Encoded(NamedTuple):
    """One example: inputs, targets and weights are (time,), a source (source,); it is empty where there is none."""

    inputs: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    source: npt.NDArray[np.int32] = np.zeros(0, np.int32)

    @property
    def size(self) -> int:
        """Tokens to read."""
        return len(self.inputs) + len(self.source)


@dataclass(frozen=True)
class EncodedExamples:
    """What became of some examples.

    Args:
        rows: those that fit.
        shortened: how many prompts lost their end.
        dropped: how many did not fit.
    """

    rows: Sequence[Encoded]
    shortened: int
    dropped: int


def encode_examples(
    spec: TaskSpec, encode: Encode, token_id: TokenId, end: int, examples: Iterable[Example], *,
    prompt_loss: float = 0.0, class_weights: Mapping[str, float] | None = None, start: Sequence[int] = (),
    once: bool = False,
) -> EncodedExamples:  # fmt: skip
    """Encode examples for training.

    Args:
        spec: the task.
        encode: of the model's tokenizer.
        token_id: likewise.
        end: the token that ends an answer.
        examples: of that task.
        prompt_loss: how much a prompt's tokens count beside the answer's.
        class_weights: how much examples with these answers, or words with these labels, count; None: all alike.
        start: what answers begin with in a model that reads prompts as sources; none: prompt and answer are one row.
        once: whether the model reads words to label once, in one pass.
    """
    rows: list[Encoded] = []
    shortened = dropped = 0
    cached = _Cached(encode)
    for example in examples:
        try:
            if spec.name == "srl":
                rows.append(_labelled(spec, cached, token_id, example, class_weights or {}, once))
                continue
            row, cut = _answered(spec, cached, token_id, end, example, prompt_loss, class_weights or {}, start)
        except ContextError:
            dropped += 1
            continue
        rows.append(row)
        shortened += cut
    return EncodedExamples(rows, shortened, dropped)


def class_weights_of(spec: TaskSpec, examples: Sequence[Example]) -> dict[str, float]:
    """The inverse square root of how common each label or choice is, of mean 1 over the data; empty for other tasks."""
    if spec.labels:
        counts = Counter(label for e in examples for label in e["labels"])
    elif spec.choices:
        counts = Counter(target_of(spec.name, e) for e in examples)
    else:
        return {}
    raw = {name: (count / counts.total()) ** -0.5 for name, count in counts.items()}
    mean = sum(raw[name] * count for name, count in counts.items()) / counts.total()
    return {name: value / mean for name, value in raw.items()}


class _Cached:
    """Remembers the tokens of words, which repeat."""

    def __init__(self, encode: Encode) -> None:
        self._encode, self._known = encode, dict[str, list[int]]()

    def __call__(self, text: str) -> list[int]:
        if len(text) > 24:
            return self._encode(text)
        if text not in self._known:
            self._known[text] = self._encode(text)
        return list(self._known[text])


def _answered(
    spec: TaskSpec, encode: Encode, token_id: TokenId, end: int, example: Example, prompt_loss: float,
    class_weights: Mapping[str, float], start: Sequence[int],
) -> tuple[Encoded, bool]:  # fmt: skip
    answer = target_of(spec.name, example)
    fields = {name: str(example.get(name, "")) for name in FIELDS[spec.name]}
    if "length" in fields:
        fields["length"] = str(len(answer.split()))
    prompt = encode_prompt(spec, encode, token_id, fields)
    target = [*encode(answer), end]
    if len(target) > spec.max_new_tokens:
        raise ContextError("the answer is too long")
    before = start or prompt.tokens
    tokens = np.array([*before, *target], dtype=np.int32)
    weights = np.full(len(tokens) - 1, 0.0 if start else prompt_loss, dtype=np.float32)
    weights[len(before) - 1 :] = class_weights.get(answer, 1.0)
    source = np.array(prompt.tokens if start else [], dtype=np.int32)
    return Encoded(tokens[:-1], tokens[1:], weights, source), prompt.cut


def _labelled(
    spec: TaskSpec, encode: Encode, token_id: TokenId, example: Example, class_weights: Mapping[str, float], once: bool
) -> Encoded:
    prompt = encode_words(encode, token_id, example["words"], example["predicate"], limit=spec.max_prompt, once=once)
    targets, weights = np.zeros(len(prompt.tokens), np.int32), np.zeros(len(prompt.tokens), np.float32)
    number = {label: i for i, label in enumerate(spec.labels)}
    kept = [(p, label) for p, label in zip(prompt.positions, example["labels"], strict=True) if label in number]
    for position, label in kept:  # a label that only validation data has cannot be learned
        targets[position], weights[position] = number[label], class_weights.get(label, 1.0)
    return Encoded(np.array(prompt.tokens, np.int32), targets, weights)
