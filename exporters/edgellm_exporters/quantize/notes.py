"""What a person should know of how a model's weights were quantized, as the manifest has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["quantization_notes"]


def quantization_notes(quantization: Mapping[str, Any]) -> list[str]:
    """Notes on what stays float, and on what keeps a checkpoint's codes or does not.

    Args:
        quantization: the manifest's.
    """
    return _floats_named(quantization) + _kept_named(quantization)


def _floats_named(quantization: Mapping[str, Any]) -> list[str]:
    """A note on each matrix that no block fits."""
    return [
        f"{name} ({rows} x {columns}) stays float, because its rows divide into no block of the format"
        for name, (rows, columns) in quantization.get("floats", {}).items()
    ]


def _kept_named(quantization: Mapping[str, Any]) -> list[str]:
    """Notes on matrices that the checkpoint stores as codes: those that keep them, and why others do not."""
    notes = [f"{count} matrices keep the checkpoint's own codes"] if (count := quantization.get("kept")) else []
    left: dict[str, list[str]] = {}
    for name, why in quantization.get("left", {}).items():
        left.setdefault(why, []).append(name)
    return notes + [f"{len(n)} matrices, such as {n[0]}, do not keep their codes: {why}" for why, n in left.items()]
