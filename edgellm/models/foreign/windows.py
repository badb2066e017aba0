"""Attention windows, for families whose attention has none: a window as wide as the context changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgellm.models.foreign.keys import Fields, Key, Values, refuse

__all__ = ["full_attention", "no_window"]


def no_window(*, default: int | None = None, used: Callable[[Values], bool] = lambda _: True) -> Key:
    """A window that is refused unless it is as wide as the context; the field ``max_context`` was read before.

    Args:
        default: the window where the file does not say.
        used: whether the file's other keys put the window to use.
    """

    def take(name: str, values: Values, fields: Fields) -> None:
        window = values.get(name, default)
        if used(values) and window is not None and not (type(window) is int and window >= fields["max_context"]):
            raise refuse(name, window)

    return take


def full_attention(name: str, values: Values, _fields: Fields) -> None:
    """A list of the layers' kinds that may hold ``full_attention`` only."""
    kinds: Any = values.get(name) or ()
    if other := [kind for kind in kinds if kind != "full_attention"]:
        raise refuse(name, other[0])
