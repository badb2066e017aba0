"""Attention windows, read or refused; one as wide as the context changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgellm.models.foreign.keys import Fields, Key, Values, checked_kinds, checked_whole, refuse

__all__ = ["full_attention", "no_window", "windows"]


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


def windows(
    *, default: int | None = None, used: Callable[[Values], bool] = lambda _: True,
    first: tuple[str, int] = ("", 0),
) -> Key:  # fmt: skip
    """``layer_types`` and ``sliding_window`` into the field ``windows``, empty where every layer sees all.

    The fields ``num_layers`` and ``max_context`` were read before.

    Args:
        default: the window where the file does not say.
        used: whether the file's other keys put the window to use.
        first: the key of the first layer that has the window, where the file has no list of the layers' kinds, and the
            number where it has no such key either.
    """

    def take(name: str, values: Values, fields: Fields) -> None:
        count, window = fields["num_layers"], values.get("sliding_window", default)
        start = values.get(*first)
        if type(start) is not int or start < 0:
            raise refuse(first[0], start)
        slides = used(values) and window is not None
        given = values.get(name) or [_KINDS[slides and i >= start] for i in range(count)]
        kinds = checked_kinds(name, given, _KINDS, count)
        if not slides and _KINDS[True] in kinds:
            raise refuse(name, _KINDS[True])
        width = checked_whole("sliding_window", window) if slides else 0
        own = tuple(width if kind == _KINDS[True] and width < fields["max_context"] else 0 for kind in kinds)
        fields["windows"] = own if any(own) else ()

    return take


_KINDS = ("full_attention", "sliding_attention")  # by whether a layer has the window
