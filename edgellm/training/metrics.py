"""The run's log, ``metrics.jsonl``: one JSON object a step, without gaps or repeats however often a run resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

__all__ = ["MetricsLog", "read_metrics"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is empty or cut short


class MetricsLog:
    """Appends to a log from a given step on.

    Args:
        path: the file; lines of steps after ``step`` are dropped, because they will be made again.
        step: updates done.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        pending = path.with_name(path.name + ".tmp")
        pending.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in kept), encoding="utf-8")
        pending.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)  # a line at a time, so that a kill loses none

    def write(self, **values: float | int | None) -> None:
        """Append one line; what is None is left out, and infinities, which JSON has not, are null."""
        shown = {k: v if math.isfinite(v) else None for k, v in values.items() if v is not None}
        self._file.write(json.dumps(shown, allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
