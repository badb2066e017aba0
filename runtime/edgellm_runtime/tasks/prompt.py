"""Prompts of tasks as token ids: the same for training and on the device. Knows no tokenizer, only how to ask one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from edgellm_runtime.errors import ContextError, OptionError
from edgellm_runtime.task_spec import PREDICATE, SEPARATOR, TaskSpec

__all__ = ["Encode", "Prompt", "TokenId", "WordPrompt", "encode_prompt", "encode_words"]

Encode = Callable[[str], list[int]]  # of a text, without special tokens
TokenId = Callable[[str], int | None]  # of a special token's name


class Prompt(NamedTuple):
    """What the model reads before it answers."""

    tokens: list[int]
    cut: bool  # whether a field was shortened


class WordPrompt(NamedTuple):
    """What a labelling model reads."""

    tokens: list[int]
    positions: list[int]  # for each word, where its label's logits are: at its last token of the last reading


def encode_prompt(spec: TaskSpec, encode: Encode, token_id: TokenId, fields: Mapping[str, str]) -> Prompt:
    """The tokens of a task's prompt.

    Args:
        spec: says what the prompt is made of.
        encode: of the model's tokenizer.
        token_id: likewise.
        fields: texts, by the names that the spec gives them.

    Raises:
        OptionError: a field without text, or a special token that the tokenizer lacks.
        ContextError: the prompt is too long, and the spec names no field that may be shortened, or not one long enough.
    """
    pieces: list[list[int]] = []
    cuttable = -1
    for segment in spec.prompt:
        if segment.kind == "token":
            pieces.append([_special(segment.value, token_id)])
        elif segment.kind == "text":
            pieces.append(encode(segment.value))
        else:
            text = fields[segment.value].strip()
            if not text:
                raise OptionError(f"the {segment.value} is empty; give some text")
            if segment.value == spec.cut:
                cuttable = len(pieces)
            pieces.append(encode(text))
    over = sum(map(len, pieces)) - spec.max_prompt
    if over > 0:
        if cuttable < 0 or len(pieces[cuttable]) <= over:
            raise ContextError(
                f"the prompt has {over + spec.max_prompt} tokens, and this model takes {spec.max_prompt}; shorten it"
            )
        del pieces[cuttable][-over:]
    return Prompt([token for piece in pieces for token in piece], over > 0)


def encode_words(
    encode: Encode, token_id: TokenId, words: Sequence[str], predicate: int, *, limit: int | None = None,
    once: bool = False,
) -> WordPrompt:  # fmt: skip
    """The tokens of a sentence to label: read twice, so that each label is chosen with the whole sentence in mind.

    Args:
        encode: of the model's tokenizer.
        token_id: likewise.
        words: of the sentence.
        predicate: which of them is the predicate, from 0.
        limit: the most tokens; None for any number.
        once: read once, by a model whose tokens see those after them.

    Raises:
        OptionError: no words, an empty one, or a predicate outside the sentence.
        ContextError: more tokens than ``limit``.
    """
    if not words or not all(word.strip() for word in words):
        raise OptionError("the sentence is empty or has an empty word; give its words")
    if not 0 <= predicate < len(words):
        raise OptionError(f"predicate {predicate} is outside the sentence; its words are 0 to {len(words) - 1}")
    pieces = [encode(f" {word.strip()}") for word in words]
    pieces[predicate] = [_special(PREDICATE, token_id), *pieces[predicate]]
    sentence = [token for piece in pieces for token in piece]
    before = [] if once else [*sentence, _special(SEPARATOR, token_id)]
    positions, end = [], len(before)
    for piece in pieces:
        end += len(piece)
        positions.append(end - 1)
    tokens = [*before, *sentence]
    if limit is not None and len(tokens) > limit:
        raise ContextError(f"the sentence takes {len(tokens)} tokens, and this model takes {limit}; part it in two")
    return WordPrompt(tokens, positions)


def _special(name: str, token_id: TokenId) -> int:
    found = token_id(name)
    if found is None:
        raise OptionError(f"the tokenizer has no token {name}, which this task needs; use the model's own tokenizer")
    return found
