"""What a person should know of how a model's weights were quantized, as the manifest has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["quantization_notes"]


def quantization_notes(quantization: Mapping[str, Any]) -> list[str]:
    """Notes on what stays float, and on what keeps a checkpoint's codes or does not, and on what was tuned.

    Args:
        quantization: the manifest's.
    """
    return _floats_named(quantization) + _kept_named(quantization) + _tuning_named(quantization.get("tuning", {}))


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


def _tuning_named(tuning: Mapping[str, Any]) -> list[str]:
    """What tuning came to, and which layers are as they were before it."""
    if not tuning:
        return []
    layers, together = tuning["layers"], tuning["together"]
    unreached = [path for path, told in layers.items() if not told["steps"]]
    worse = [path for path, told in layers.items() if told["kept"] and told["steps"]]
    said = f"{len(layers) - len(unreached) - len(worse)} of {len(layers)} layers are tuned"
    if together["steps"] and not together["kept"]:
        said += (
            f", and all together in {together['steps']} steps: KL {together['before']:.3g} to "
            f"{together['after']:.3g} on held-back text"
        )
    elif together["steps"]:
        said += "; tuning all together made held-back text no better, and was dropped"
    notes = [said]
    if worse:
        notes.append(f"{_some(worse)} got no better on held-back text, and kept the codes from before tuning")
    if unreached:
        notes.append(f"{_some(unreached)} were not reached in the minutes given")
    return notes


def _some(paths: list[str]) -> str:
    return f"{len(paths)} layers, such as {paths[0]}," if len(paths) > 1 else f"layer {paths[0]}"
