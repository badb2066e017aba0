"""Cut the excerpts that the tests train on out of prepared data: ``python examples/excerpts.py``.

They are the first rows of each part that are short, so that a few steps of training take seconds. The licence of each
is its source's, named in the examples' README files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from comparison.work import FOLDERS
from fetch import write_jsonl

ROWS = {"train": 120, "valid": 16, "test": 20}
MOST_CHARACTERS = 700  # of a row
CUT = 600  # characters that are left of an article


def short(task: str, path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a file that are short enough; articles are cut at a sentence's end."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if task == "generation":
                row = {"text": row["text"][:CUT].rpartition(" . ")[0] + " ."}
                if len(row["text"]) < CUT // 2:
                    continue  # a piece of a table
            if len(json.dumps(row, ensure_ascii=False, allow_nan=False)) <= MOST_CHARACTERS:
                yield row


def main() -> None:
    for task, folder in FOLDERS.items():
        for part, count in ROWS.items():
            rows = [
                row for _, row in zip(range(count), short(task, Path("data") / task / f"{part}.jsonl"), strict=False)
            ]
            out = Path("examples") / folder / "excerpt" / f"{part}.jsonl"
            print(f"{out}: {write_jsonl(out, rows)} examples, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
