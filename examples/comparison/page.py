"""docs/applications.md out of the records in docs/applications: a record's table stands where its name does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comparison.both_ways import FORM, both_ways
from comparison.tables import render, table

__all__ = ["records", "written"]


def records(folder: Path) -> dict[str, Any]:
    """Every record of measurements in a folder, by its file's name."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}


def written(page: str, found: Mapping[str, Any]) -> str:
    """The page with every record's table in its place.

    Args:
        page: in Markdown.
        found: records, by name.

    Raises:
        ValueError: the page has no place for one, or a record lacks what it is set beside.
    """
    patterns = {name: record for name, record in found.items() if record.get("form") != FORM}
    tables = {name: table(r) if name in patterns else both_ways(r, patterns) for name, r in found.items()}
    return render(page, tables)
