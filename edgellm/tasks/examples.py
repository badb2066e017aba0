"""Examples of tasks from JSON Lines, each line checked; a fault is told with its file and line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgellm.errors import TrainingError

__all__ = ["Example", "read_examples"]

Example = Mapping[str, Any]

# What a line of each task must hold: texts, some of which may be empty.
_TEXTS: Mapping[str, Mapping[str, bool]] = {
    "generation": {"text": False},
    "translation": {"source": False, "target": False},
    "qa": {"context": False, "question": False, "answer": True},  # an empty answer: the context does not say
    "summarization": {"text": False, "summary": False},
}


def read_examples(path: Path, task: str, limit: int = 0) -> list[Example]:
    """The examples of a file.

    Args:
        path: JSON Lines, in UTF-8.
        task: a name of :data:`edgellm_runtime.task_spec.FIELDS`.
        limit: the most to read; 0 for all.

    Raises:
        TrainingError: the file cannot be read, holds no example, or a line is none; names the place.
    """
    found: list[Example] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    found.append(_checked(line, task, f"{path}:{number}"))
                if limit and len(found) == limit:
                    break
    except OSError as error:
        raise TrainingError(f"{path} cannot be read ({error.strerror}); name a .jsonl file") from None
    if not found:
        raise TrainingError(f"{path} holds no example; write one JSON object a line")
    return found


def _checked(line: bytes, task: str, place: str) -> Example:
    try:
        data = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise TrainingError(f"{place}: not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{place}: not JSON ({error}); write one object a line") from None
    if not isinstance(data, dict):
        raise TrainingError(f"{place}: not an object; a line of {task} holds {_wanted(task)}")
    if task == "srl":
        _check_roles(data, place)
        return data
    for name, may_be_empty in _TEXTS[task].items():
        value = data.get(name)
        if not isinstance(value, str):
            raise TrainingError(f"{place}: {name!r} is not there or no text; a line of {task} holds {_wanted(task)}")
        if not value.strip() and not may_be_empty:
            raise TrainingError(f"{place}: {name!r} is empty; give some text, or leave the line out")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise TrainingError(f"{place}: {name!r} holds half a surrogate pair, which is no text; repair it")
    _check_answers(data, place)
    return data


def _check_answers(data: Mapping[str, Any], place: str) -> None:
    answers = data.get("answers", [])
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise TrainingError(f"{place}: 'answers' is no list of texts; list every answer that is right")


def _check_roles(data: Mapping[str, Any], place: str) -> None:
    words, labels, predicate = data.get("words"), data.get("labels"), data.get("predicate")
    checks: Sequence[tuple[Callable[[], bool], str]] = (
        (lambda: _texts(words), "'words' is no list of words"),
        (lambda: _texts(labels), "'labels' is no list of labels"),
        (lambda: len(words) == len(labels), "there are not as many labels as words"),  # type: ignore[arg-type]
        (lambda: type(predicate) is int, "'predicate' is no whole number"),
        (lambda: 0 <= predicate < len(words), f"predicate {predicate} is outside the sentence"),  # type: ignore[arg-type, operator]
    )  # fmt: skip
    for holds, fault in checks:
        if not holds():
            raise TrainingError(f"{place}: {fault}; a line of srl holds {_wanted('srl')}")
    before = "O"
    for word, label in zip(words, labels, strict=True):  # type: ignore[arg-type]
        if label != "O" and (label[:2] not in ("B-", "I-") or len(label) == 2):
            raise TrainingError(f"{place}: {word!r} has the label {label!r}; use O, B-ROLE or I-ROLE")
        if label.startswith("I-") and before[2:] != label[2:]:
            raise TrainingError(f"{place}: {word!r} has {label} after {before}; a span begins with B-{label[2:]}")
        before = label


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) and item.strip() for item in value)


def _wanted(task: str) -> str:
    if task == "srl":
        return '{"words": ["The", "cat", "sat"], "predicate": 2, "labels": ["B-A0", "I-A0", "O"]}'
    return "{" + ", ".join(f'"{name}": "..."' for name in _TEXTS[task]) + "}"
