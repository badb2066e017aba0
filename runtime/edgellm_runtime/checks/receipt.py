"""A receipt: what a bundle was measured to be, on which text and with what; others can measure it again.

Nothing is believed of one: it is a claim, and whoever has the text holds the bundle to it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgellm_runtime.bundle import sha256_of
from edgellm_runtime.checks.evaluate import windows_of
from edgellm_runtime.checks.machine import processor_name
from edgellm_runtime.errors import OptionError

__all__ = [
    "WITHIN",
    "Asked",
    "beginning_of",
    "compared",
    "differences_from",
    "made_with",
    "make_receipt",
    "read_windows",
]

WITHIN = 0.02  # relative: other kernels' rounding, not another model
_FIGURES = ("perplexity", "reference_perplexity", "kl_mean", "top1_agreement")
_SMALLEST = 1e-6  # of a KL divergence: below, two roundings of float32 are compared
_PACKAGES = ("edgellm", "onnxruntime", "torch", "numpy", "tokenizers")
_CHARACTERS = 16  # a token's share of the text that is encoded at first; more than most texts need
_MARGIN = 64  # tokens before a cut that the cut may have changed


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How much of a text is read.

    Args:
        tokens: the most of them; 0 for all.
        window: tokens read from an empty state at a time.
        skip: tokens at the text's beginning that are left away, such as those that a bundle was calibrated with.

    Raises:
        ValueError: a number of another kind.
    """

    tokens: int = 4096
    window: int = 512
    skip: int = 0

    def __post_init__(self) -> None:
        numbers = (self.tokens, self.window, self.skip)
        if any(type(n) is not int for n in numbers) or min(numbers) < 0:
            raise ValueError(f"tokens, window and skip are {numbers}; they must be whole numbers from 0")


def read_windows(file: Path, encode: Callable[[str], list[int]], asked: Asked, max_context: int) -> list[list[int]]:
    """Windows of a text's tokens.

    Args:
        file: UTF-8 text.
        encode: the bundle's tokenizer.
        asked: how much of it.
        max_context: the most tokens of a window.

    Raises:
        OptionError: it is not UTF-8, or has fewer than two tokens there.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{file}: not UTF-8 at byte {error.start}; convert it first") from error
    tokens = beginning_of(encode, text, asked.skip + asked.tokens if asked.tokens else 0)
    return windows_of(tokens[asked.skip :], min(asked.window, max_context), asked.tokens)


def beginning_of(encode: Callable[[str], list[int]], text: str, limit: int) -> list[int]:
    """At least the first ``limit`` tokens of a text (0: all), encoding little more of it than they need."""
    size = _CHARACTERS * (limit + _MARGIN) if limit else len(text)
    while size < len(text):
        found = encode(text[:size])
        if len(found) >= limit + _MARGIN:
            return found
        size *= 4
    return encode(text)


def make_receipt(text: Path, asked: Asked, figures: Mapping[str, Any], **ran: str) -> dict[str, Any]:
    """What a manifest says of a measurement.

    Args:
        text: that was read.
        asked: how much of it.
        figures: by the names that ``edgellm eval --json`` has for them.
        ran: where it ran, beside versions.
    """
    return {
        "text": {"name": text.name, "bytes": text.stat().st_size, "sha256": sha256_of(text)},
        "asked": {"tokens": asked.tokens, "window": asked.window, "skip": asked.skip},
        "figures": dict(figures), "made_with": {**made_with(), **ran},
        "command": f"edgellm eval BUNDLE --receipt --text {text.name} --against CHECKPOINT",
    }  # fmt: skip


def made_with() -> dict[str, str]:
    """Versions and processor here."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "processor": processor_name() or ""}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def compared(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Sequence[str]:
    """The figures that both have."""
    return [name for name in _FIGURES if name in expected and name in found]


def differences_from(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """The figures that are further from a receipt's than 2%; those that were not measured now are not compared."""
    apart = []
    for name in compared(expected, found):
        size = max(abs(float(expected[name])), _SMALLEST if name == "kl_mean" else 1e-12)
        if not abs(float(found[name]) - float(expected[name])) <= WITHIN * size:
            apart.append(name)
    return apart
