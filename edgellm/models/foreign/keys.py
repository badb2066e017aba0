"""What a key of a foreign configuration means: read into a field, without effect, or refused by name.

A table of keys is read in its order. Every key of a file is in the table or reported as unknown, so that nothing is
dropped in silence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from edgellm.errors import CheckpointError

__all__ = [
    "MAX_CONTEXT",
    "MAX_LAYERS",
    "METADATA",
    "REQUIRED",
    "Default",
    "Fields",
    "Key",
    "Values",
    "Variant",
    "checked_flag",
    "checked_kinds",
    "checked_positive",
    "checked_whole",
    "choice",
    "flag",
    "inverse",
    "neutral",
    "positive",
    "read_keys",
    "refuse",
    "same_as",
    "whole",
]

# Far above any real model: a damaged file must give an error, not hours of building layers or gigabytes of angles.
MAX_LAYERS, MAX_CONTEXT = 1024, 2**21

Values: TypeAlias = Mapping[str, Any]  # what the file says; nothing of it is believed yet
Fields: TypeAlias = dict[str, Any]  # of our configuration, as far as they are read
Key: TypeAlias = Callable[[str, Values, Fields], None]  # takes its name, the file and the fields; adds to the fields
Default: TypeAlias = Any | Callable[[Fields], Any]
REQUIRED: Any = object()  # a default that there is none


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What one foreign architecture has for itself, beside what the family reads for all.

    Args:
        keys: read in place of the family's of the same name, or besides.
        fields: of our configuration, whatever the file says.
    """

    keys: Mapping[str, Key] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


def read_keys(keys: Mapping[str, Key], values: Values) -> tuple[Fields, list[str]]:
    """The fields that a file gives, and its keys that the table does not have.

    Raises:
        CheckpointError: a value is impossible, or changes what is computed to something that the family cannot do.
    """
    fields: Fields = {}
    for name, key in keys.items():
        key(name, values, fields)
    return fields, [name for name in values if name not in keys]


def refuse(name: str, value: Any) -> CheckpointError:
    """The error for a value that changes the model to one that the family cannot compute."""
    return CheckpointError(f"{name} is {value!r}, which edgellm's form of this model cannot represent; use another one")


def METADATA(_name: str, _values: Values, _fields: Fields) -> None:
    """A key that never changes what is computed."""


def neutral(*allowed: Any) -> Key:
    """A key that changes the model unless it is absent or has one of these values."""

    def take(name: str, values: Values, _fields: Fields) -> None:
        if name in values and values[name] not in allowed:
            raise refuse(name, values[name])

    return take


def whole(into: str, *, default: Default = REQUIRED, limit: int = 2**31) -> Key:
    """A positive whole number, read into a field; null is as good as absent.

    Args:
        into: the field.
        default: where the file has none; a function is given the fields that were read before it.
        limit: the most that is believed.
    """
    return _read(into, default, lambda name, value: checked_whole(name, value, limit))


def positive(into: str, *, default: Default = REQUIRED) -> Key:
    """A positive number, read into a field; arguments as :func:`whole`."""
    return _read(into, default, checked_positive)


def inverse(into: str, *, default: float = 1.0) -> Key:
    """A positive number, read into a field that is its inverse."""

    def take(name: str, values: Values, fields: Fields) -> None:
        fields[into] = 1 / checked_positive(name, values.get(name, default))

    return take


def flag(into: str, *, default: Default = REQUIRED) -> Key:
    """True or false, read into a field; arguments as :func:`whole`."""
    return _read(into, default, checked_flag)


def same_as(field: str) -> Key:
    """A key that must say what a field that was read before it says, or nothing."""

    def take(name: str, values: Values, fields: Fields) -> None:
        if values.get(name, fields[field]) != fields[field]:
            raise refuse(name, values[name])

    return take


def choice(into: str, choices: Mapping[str, Any], *, default: Default = REQUIRED) -> Key:
    """One of some names, read into a field as what stands beside it; any other is refused.

    Args:
        into: the field.
        choices: what each name stands for.
        default: as in :func:`whole`.
    """

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value not in choices:
            raise refuse(name, value)
        return choices[value]

    return _read(into, default, check)


def checked_whole(name: str, value: Any, limit: int = 2**31) -> int:
    """The value, if it is a positive whole number.

    Raises:
        CheckpointError: it is not.
    """
    if type(value) is not int or not 1 <= value <= limit:
        raise CheckpointError(f"{name} is {value!r}; it must be a positive whole number of at most {limit}")
    return value


def checked_flag(name: str, value: Any) -> bool:
    """The value, if it is true or false.

    Raises:
        CheckpointError: it is neither.
    """
    if type(value) is not bool:
        raise CheckpointError(f"{name} is {value!r}; it must be true or false")
    return value


def checked_kinds(name: str, value: Any, known: Collection[str], count: int) -> Sequence[str]:
    """The value, if it is a list that gives each layer a kind that is known.

    Args:
        name: of the key.
        value: what it says.
        known: the file's names of the kinds.
        count: how many layers the model has.

    Raises:
        CheckpointError: it is not.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise refuse(name, value)
    if len(value) != count:
        raise CheckpointError(f"{name} is of {len(value)} layers, but the model has {count}; make them agree")
    for kind in value:
        if not isinstance(kind, str) or kind not in known:
            raise refuse(name, kind)
    return value


def checked_positive(name: str, value: Any) -> float:
    """The value, if it is a positive number.

    Raises:
        CheckpointError: it is not.
    """
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise CheckpointError(f"{name} is {value!r}; it must be a positive number")
    return float(value)


def _read(into: str, default: Default, check: Callable[[str, Any], Any]) -> Key:
    def take(name: str, values: Values, fields: Fields) -> None:
        value = values.get(name)
        if value is not None or default is REQUIRED:
            fields[into] = check(name, value)
        else:
            fields[into] = default(fields) if callable(default) else default

    return take
