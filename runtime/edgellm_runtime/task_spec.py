"""What a model was trained to do, and how its prompt is put together: the same words in training and on the device.

Standard library only. A bundle's manifest carries a :class:`TaskSpec`; nothing that it says is believed before it is
checked here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgellm_runtime.spec import SpecError

__all__ = ["ANSWER", "FIELDS", "PREDICATE", "SEPARATOR", "Segment", "TaskSpec"]

SEPARATOR, ANSWER, PREDICATE = (
    "<|sep|>",
    "<|answer|>",
    "<|predicate|>",
)  # special tokens of tokenizers trained for tasks

# What a prompt of each task may name. A causal model reads the last line's words twice, the second time for their
# labels, so that it knows the whole sentence when it decides.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "generation": ("text",),
    "translation": ("source",),
    "qa": ("context", "question"),
    "summarization": ("text", "length"),
    "srl": ("words",),
}


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a prompt.

    Args:
        kind: ``text`` as it stands, a special ``token`` by its name, or a ``field`` that the caller fills.
        value: the text, the token's name or the field's name.
    """

    kind: str
    value: str

    def to_json(self) -> dict[str, str]:
        return {self.kind: self.value}


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """A task and its form.

    Args:
        name: a key of :data:`FIELDS`.
        prompt: pieces, in order; what follows them is the answer, up to an end-of-text token.
        max_prompt: the most tokens that a prompt may have.
        max_new_tokens: the most that an answer may have.
        cut: the field that is shortened, at its end, when the prompt is too long; empty: such a prompt is refused.
        choices: when not empty, the answer is one of these.
        no_answer: the answer that means: the context does not say. Empty: there is none.
        labels: of ``srl``, in the order of the logits: ``O``, and ``B-X`` and ``I-X`` for each role X.
        scripts: Unicode scripts, as in the names of characters (``LATIN``, ``CJK``), that at least half of a text's
            letters must be in; empty: any.
        length: of ``summarization``, the words that are asked for when the caller does not say.

    Raises:
        SpecError: a value that no task can have.
    """

    name: str
    prompt: tuple[Segment, ...] = ()
    max_prompt: int = 256
    max_new_tokens: int = 64
    cut: str = ""
    choices: tuple[str, ...] = ()
    no_answer: str = ""
    labels: tuple[str, ...] = ()
    scripts: tuple[str, ...] = ()
    length: int = 10

    def __post_init__(self) -> None:
        if self.name not in FIELDS:
            raise SpecError(f"unknown task {self.name!r}; known: {', '.join(FIELDS)}")
        fields = FIELDS[self.name]
        for segment in self.prompt:
            if segment.kind not in ("text", "token", "field"):
                raise SpecError(f"{self.name}: a prompt's piece is text, token or field, not {segment.kind!r}")
            if segment.kind == "field" and segment.value not in fields:
                raise SpecError(f"{self.name}: the prompt names {segment.value!r}; it may name {', '.join(fields)}")
        named = [s.value for s in self.prompt if s.kind == "field"]
        if len(named) != len(set(named)):
            raise SpecError(f"{self.name}: the prompt names a field twice: {named}")
        if self.cut and self.cut not in named:
            raise SpecError(f"{self.name}: the field to shorten, {self.cut!r}, is not in the prompt")
        for what in ("max_prompt", "max_new_tokens", "length"):
            value = getattr(self, what)
            if type(value) is not int or not 1 <= value < 2**31:
                raise SpecError(f"{self.name}: {what} is {value!r}; it must be a positive whole number")
        if (self.name == "srl") != bool(self.labels):
            raise SpecError(f"{self.name}: labels belong to srl, which needs them")
        if len(set(self.labels)) != len(self.labels) or len(set(self.choices)) != len(self.choices):
            raise SpecError(f"{self.name}: a label or a choice is named twice")
        if self.labels and self.labels[0] != "O":
            raise SpecError(f"{self.name}: the first label is {self.labels[0]!r}; it must be 'O', of words in no role")
        if bad := [x for x in self.labels[1:] if x[:2] not in ("B-", "I-") or "B-" + x[2:] not in self.labels]:
            raise SpecError(f"{self.name}: labels {bad} are neither B-X nor an I-X whose B-X is there")

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "prompt": [s.to_json() for s in self.prompt], "max_prompt": self.max_prompt,
            "max_new_tokens": self.max_new_tokens, "cut": self.cut, "choices": list(self.choices),
            "no_answer": self.no_answer, "labels": list(self.labels), "scripts": list(self.scripts),
            "length": self.length,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Any) -> TaskSpec:
        """Check and read what :meth:`to_json` gave.

        Raises:
            SpecError: a value of the wrong kind, an unknown key, or one that no task can have.
        """
        if not isinstance(data, dict) or not isinstance(data.get("name"), str):
            raise SpecError("a task is an object with a name")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := data.keys() - known:
            raise SpecError(f"unknown keys {sorted(unknown)} in a task")
        read: dict[str, Any] = {k: data[k] for k in data.keys() - {"prompt", "choices", "labels", "scripts"}}
        for key in ("cut", "no_answer"):
            if not isinstance(read.get(key, ""), str):
                raise SpecError(f"a task's {key} is {read[key]!r}; it must be a text")
        for key in ("choices", "labels", "scripts"):
            items = data.get(key, [])
            if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
                raise SpecError(f"a task's {key} is {items!r}; it must be a list of texts")
            read[key] = tuple(items)
        return cls(prompt=tuple(map(_segment, data.get("prompt", []))), **read)


def _segment(data: Any) -> Segment:
    if not isinstance(data, dict) or len(data) != 1 or not isinstance(next(iter(data.values())), str):
        raise SpecError(f"{data!r} is not a piece of a prompt")
    ((kind, value),) = data.items()
    return Segment(str(kind), value)
