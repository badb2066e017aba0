"""JSON as the standard has it: a number that is none is null, for NaN and Infinity stop other readers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["finite", "json_text"]

_ENCODER = json.JSONEncoder(allow_nan=False)


def json_text(data: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """Data as JSON's text; NaN and infinities as null.

    Args:
        data: of JSON's types.
        indent: spaces a level; None for one line.
        ensure_ascii: write other characters as escapes.
    """
    if indent is None and ensure_ascii:
        try:
            return _ENCODER.encode(data)  # nearly always; looking at each value first takes twice as long
        except (TypeError, ValueError):
            pass
    return json.dumps(finite(data), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def finite(data: Any) -> Any:
    """The data with None for NaN and infinities, at any depth."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return data
