"""Configurations of equal size, whatever their layers are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from edgellm.errors import ConfigError
from edgellm.models.hybrid import Hybrid, HybridConfig

__all__ = ["PATTERNS", "equal_sizes", "parameters"]

# Which mixers follow each other, again and again.
PATTERNS: Mapping[str, Sequence[str]] = {
    "recurrent": ("lstm",), "attention": ("attention",), "hybrid": ("lstm", "attention"),
}  # fmt: skip
TOLERANCE = 0.03  # how far sizes may be apart, as a part of the hybrid's
_GRAIN = 16  # widths are multiples of it: the smallest block of weights that are rounded together


def parameters(config: HybridConfig) -> int:
    """How many numbers the model learns; nothing of its size is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in Hybrid(config).parameters())


def equal_sizes(base: HybridConfig, names: Sequence[str] = tuple(PATTERNS)) -> dict[str, HybridConfig]:
    """The base's shape with each pattern, and as many parameters as the hybrid has.

    Where there are recurrences their width makes up the difference, elsewhere the width of the MLPs; all other widths
    are the base's.

    Args:
        base: whose number of blocks and widths are taken; its own pattern is not looked at.
        names: keys of :data:`PATTERNS`.

    Raises:
        ConfigError: no width makes a pattern as large as the hybrid.
    """
    blocks = len(base.pattern)
    wanted = parameters(_patterned(base, "hybrid", blocks))
    sizes = {}
    for name in names:
        config = _patterned(base, name, blocks)
        if name != "hybrid":
            config = _fitted(config, wanted, "recurrent_width" if "lstm" in config.pattern else "mlp_width")
        if abs(parameters(config) - wanted) > TOLERANCE * wanted:
            raise ConfigError(f"{name}: {parameters(config):,} parameters, not {wanted:,}; choose other widths")
        sizes[name] = config
    return sizes


def _patterned(base: HybridConfig, name: str, blocks: int) -> HybridConfig:
    kinds = PATTERNS[name]
    return dataclasses.replace(base, pattern=tuple(kinds[i % len(kinds)] for i in range(blocks)))


def _fitted(config: HybridConfig, wanted: int, field: str) -> HybridConfig:
    """With the width that comes closest; the size grows with it, so halving finds it."""

    def made(n: int) -> HybridConfig:
        change: dict[str, Any] = {field: n * _GRAIN}
        return dataclasses.replace(config, **change)

    low, high = 1, 2
    while parameters(made(high)) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters(made(middle)) < wanted else (low, middle)
    return min(made(low), made(high), key=lambda c: abs(parameters(c) - wanted))
