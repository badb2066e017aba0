"""The table of models that read both ways, beside the best of each task's patterns and what needs no model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from comparison.tables import SCORES, line, number

__all__ = ["FORM", "both_ways"]

FORM = "both-ways"  # of a record that is written so
_TASKS = {"translation": "translation", "srl": "roles", "summarization": "summaries"}
_HEAD = ("task", "model", "updates", "seconds of one core", "score", "int8")


def both_ways(record: Mapping[str, Any], patterns: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows of every task that the record has.

    Args:
        record: of the models that read both ways, by task.
        patterns: the records of the patterns, by task.

    Raises:
        ValueError: a task whose patterns were not measured.
    """
    lines = [line(_HEAD), line(["---"] * len(_HEAD))]
    for task, row in record["rows"].items():
        if task not in patterns:
            raise ValueError(f"no record of {task} to set beside the models that read both ways; compare run {task}")
        lines += map(line, _rows(task, row, patterns[task]))
    return "\n".join(lines) + "\n"


def _rows(task: str, row: Mapping[str, Any], patterns: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    scores, name = list(row["scores"]["float32"]), _TASKS[task]
    first = scores[0]
    beaten = {key: s for key, s in patterns.get("baselines", {}).items() if s[first] > _best(patterns, first)[1]}
    for baseline, found in beaten.items():  # one that no pattern reaches is what there is to beat
        yield name, f"baseline: {baseline}", "", "", _named(found, scores), ""
    pattern, _ = _best(patterns, first)
    best = patterns["rows"][pattern]
    train = best["train"]
    yield (
        name, f"best of below: {pattern}, {train['parameters'] / 1e6:.2f} M", f"{train['steps']:,}",
        f"{train['seconds']:.0f}", _named(best["float32"]["scores"], scores), _plain(best["int8"]["scores"], scores),
    )  # fmt: skip
    yield (
        name, f"{row['model']}, {row['parameters'] / 1e6:.2f} M", f"{row['steps']:,}",
        f"{row['processor_seconds']:.0f}", f"**{_named(row['scores']['float32'], scores)}**",
        _plain(row["scores"]["int8"], scores),
    )  # fmt: skip


def _best(patterns: Mapping[str, Any], score: str) -> tuple[str, float]:
    """The pattern whose bundle scores best, and its score."""
    found = {name: float(row["float32"]["scores"][score]) for name, row in patterns["rows"].items()}
    name = max(found, key=found.__getitem__)
    return name, found[name]


def _named(found: Mapping[str, float], scores: Sequence[str]) -> str:
    return ", ".join(f"{SCORES[score]} {number(found[score])}" for score in scores)


def _plain(found: Mapping[str, float], scores: Sequence[str]) -> str:
    return ", ".join(number(found[score]) for score in scores)
