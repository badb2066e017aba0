"""What a manifest says of how a bundle was quantized, in rows for people; anybody may have written it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgellm_runtime.json_text import json_text

__all__ = ["cache_rows", "quantization_rows"]

_NAMED = 2  # states that a row names
_CACHE = ("cache", "cache_dtype", "cache_left")


def quantization_rows(said: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The method, the formats with the number of weights of each, and whatever else there is."""
    weights = said.get("weights")
    counted = weights if isinstance(weights, Mapping) else {}
    formats = "; ".join(f"{count} in {scheme}" for scheme, count in counted.items())
    rows = [("quantization", f"{said.get('method', 'none')}{': ' if formats else ''}{formats}")]
    shown = {"method", *_CACHE, *(["weights"] if formats else [])}
    rows += [(f"  {name.replace('_', ' ')}", _text(value)) for name, value in said.items() if name not in shown]
    return rows + cache_rows(said)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return json_text({name: _rounded(each) for name, each in value.items()})
    return json_text(_rounded(value))


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def cache_rows(said: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How many states are kept in fewer bits, and which are not though that was asked for; nothing where none is."""
    kept, left = said.get("cache"), said.get("cache_left", {})
    if not isinstance(kept, list) or not isinstance(left, Mapping):
        return []
    shown = ", ".join(f"{name} ({why})" for name, why in list(left.items())[:_NAMED])
    more = f", and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    bits = 16 if said.get("cache_dtype") == "float16" else 8
    counted = f"{len(kept)} of {len(kept) + len(left)} states"
    return [(f"keys and values in {bits} bits", f"{counted}{f'; not {shown}{more}' if left else ''}")]
