"""What each option of generation may be, in one place for callers and for bundles, which may set some of them.

A bundle's manifest carries such defaults; nothing that it says is believed before it is checked here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from edgellm_runtime.arguments import check_integer, check_list, check_number, check_text, shown
from edgellm_runtime.errors import OptionError

__all__ = ["RANGES", "check_defaults", "check_token"]


def check_token(name: str, value: object) -> int:
    """A token id of any vocabulary."""
    return check_integer(name, value, 0, 2**31 - 1)


def _check_tokens(name: str, value: object) -> tuple[int, ...]:
    return tuple(check_list(name, value, "token ids", check_token))


def _check_stops(name: str, value: object) -> tuple[str, ...]:
    return tuple(check_list(name, [value] if isinstance(value, str) else value, "texts", _check_stop))


def _check_stop(_: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise OptionError(f"stop holds {shown(value)}; each stop must be a text of at least one character")
    return check_text("stop", value)


# Those that a bundle may set: an option's name, and what takes that name and a value and gives the value checked.
RANGES: Mapping[str, Callable[[str, Any], Any]] = {
    "temperature": partial(check_number, low=0, high=1e6),
    "top_k": partial(check_integer, low=0),
    "top_p": partial(check_number, low=0, high=1, open_low=True),
    "min_p": partial(check_number, low=0, high=1),
    "repetition_penalty": partial(check_number, low=0.01, high=100),
    "no_repeat_ngram": partial(check_integer, low=0),
    "banned_tokens": _check_tokens,
    "min_tokens": partial(check_integer, low=0),
    "max_new_tokens": partial(check_integer, low=0),
    "stop": _check_stops,
}


def check_defaults(values: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Options that a model sets for whoever says nothing else, each in its range.

    Args:
        values: option's name to value, as JSON has it.
        vocab_size: how many tokens there are.

    Raises:
        OptionError: an option that no model may set, a value outside its range, or a token outside the vocabulary.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in RANGES:
            raise OptionError(f"{shown(name)} is no option that a model sets; those are {', '.join(RANGES)}")
        found[name] = RANGES[name](name, value)
    if (last := max(found.get("banned_tokens", ()), default=0)) >= vocab_size:
        raise OptionError(f"banned_tokens has token {last}, outside the vocabulary of {vocab_size}")
    if found.get("min_tokens", 0) > found.get("max_new_tokens", 2**62):
        raise OptionError(f"min_tokens is {found['min_tokens']}, above max_new_tokens, {found['max_new_tokens']}")
    return found
