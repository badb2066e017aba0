"""What callers pass in, checked: one function for each kind of argument, used at the whole public surface.

Each gives the value back, as the plain type that it stands for, or raises an OptionError that names the argument, what
came and what it must be. Nothing is guessed: a text of digits is no number, bytes are no list of token ids, 1.9 is no
whole number and "no" is no flag.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgellm_runtime.errors import OptionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "check_choice", "check_flag", "check_instance", "check_integer", "check_integers", "check_list", "check_number",
    "check_path", "check_progress", "check_text", "is_sequence", "shown",
]  # fmt: skip

_T = TypeVar("_T")
_SHOWN = 100  # characters of a value in a message


def shown(value: Any) -> str:
    """A value for a message: its repr, shortened."""
    try:
        if isinstance(value, int) and value.bit_length() > _SHOWN * 3:  # Python refuses to write very long ones
            return f"an integer of {value.bit_length()} bits"
        text = repr(value)
    except Exception:  # a repr of the caller's may do anything
        return f"a {type(value).__name__}"
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def check_integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """A whole number (not a bool, not 2.0) of at least ``low`` and at most ``high``; None: any."""
    try:
        number = None if type(value).__name__ in ("bool", "bool_") else operator.index(value)
    except Exception:  # NumPy, PyTorch and others refuse in ways of their own
        number = None
    if number is None or (low is not None and number < low) or (high is not None and number > high):
        bounds = "" if low is None and high is None else f" from {low} to {high}"
        bounds = f" of at most {high}" if low is None and high is not None else bounds
        bounds = f" of at least {low}" if high is None and low is not None else bounds
        raise OptionError(f"{name} is {shown(value)}; it must be an integer{bounds}")
    return number


def check_integers(name: str, value: Any) -> NDArray[np.int64]:
    """One whole number, or an array or list of them."""
    import numpy as np

    try:
        array = np.asarray(value)
        if array.size and array.dtype.kind not in "iu":  # a cast would round, and hide a mistake
            raise TypeError(f"dtype {array.dtype}")
    except Exception as error:  # rows of unequal length, and what objects raise that only look like arrays
        raise OptionError(f"{name} is {shown(value)}; it must be whole numbers") from error
    return array.astype(np.int64, copy=False)


def check_number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> float:
    """A finite number from ``low`` (itself left out if ``open_low``) to ``high``."""
    try:
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.nan
    # written so that NaN fails, and infinity too, since every upper bound is finite
    if not ((low < number if open_low else low <= number) and number <= high):
        bounds = f"{'above' if open_low else 'at least'} {low:g} and at most {high:g}"
        raise OptionError(f"{name} is {shown(value)}; it must be a number {bounds}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """True or False; neither 0 nor "no"."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise OptionError(f"{name} is {shown(value)}; it must be True or False")
    return bool(value)


def check_progress(value: Any) -> Callable[[int, int], None] | None:
    """A function that is told how many of how many tokens have been read, or None."""
    if value is not None and not callable(value):
        raise OptionError(f"progress is {shown(value)}; it must be a function of two numbers of tokens, or None")
    found: Callable[[int, int], None] | None = value
    return found


def check_text(name: str, value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise OptionError(f"{name} is {shown(value)}; it must be a text")
    return value


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """One of a few words."""
    if not isinstance(value, str) or value not in choices:
        raise OptionError(f"{name} is {shown(value)}; it must be one of {', '.join(choices)}")
    return value


def check_list(name: str, value: Any, what: str, check: Callable[[str, Any], _T]) -> list[_T]:
    """A list or another sequence; neither a text nor bytes, whose members would be taken for the things meant.

    Args:
        name: of the argument.
        value: what came.
        what: its members are, in the plural, for the message.
        check: of one member, given a name such as ``stop[1]`` and the member.
    """
    if not is_sequence(value):
        raise OptionError(f"{name} is {shown(value)}; it must be a list of {what}")
    return [check(f"{name}[{i}]", item) for i, item in enumerate(value)]


def is_sequence(value: Any) -> bool:
    """Whether a value has members in an order: lists, tuples, arrays of an axis; no texts, bytes, mappings, sets."""
    if isinstance(value, (str, bytes, bytearray, memoryview, Mapping)):
        return False
    return isinstance(value, Sequence) or (hasattr(value, "__array__") and getattr(value, "ndim", 0) > 0)


def check_path(name: str, value: Any) -> Path:
    """A path of the file system."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value or "\0" in value or not _is_encodable(value):
        raise OptionError(f"{name} is {shown(value)}; it must be the path of a file or a folder")
    return Path(value)


def _is_encodable(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def check_instance(name: str, value: Any, kind: type[_T], remedy: str) -> _T:
    """An object of one of this package's own classes.

    Args:
        name: of the argument.
        value: what came.
        kind: of which it must be.
        remedy: where one comes from.
    """
    if not isinstance(value, kind):
        raise OptionError(f"{name} is {shown(value)}; it must be a {kind.__name__}: {remedy}")
    return value
