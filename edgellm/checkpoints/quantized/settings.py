"""The settings of a quantized checkpoint: each is known to change nothing, has a value that is known, or is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from edgellm.errors import CheckpointError

__all__ = ["Settings", "check_settings", "refused"]

Settings = Mapping[str, Any]
_OFF = (None, False, 0, "")


def check_settings(settings: Settings, allowed: Mapping[str, Collection[Any]], metadata: Collection[str]) -> None:
    """Refuse what may change the meaning of a stored weight.

    Args:
        settings: the ``quantization_config``.
        allowed: settings that matter, and the values of them that are known here; absent is as good as the first.
        metadata: settings that do not matter: how the codes were found, or how kernels of others run.

    Raises:
        CheckpointError: another value, or a setting that nobody here knows and that is not off.
    """
    for name, values in allowed.items():
        if name in settings and not _among(settings[name], values):
            raise refused(name, settings[name], f"; edgellm reads {', '.join(map(repr, values))}")
    for name, value in settings.items():
        if name not in allowed and name not in metadata and not (_among(value, _OFF) or value in ([], {})):
            raise refused(name, value, ", a setting that edgellm does not know")


def refused(name: str, value: Any, why: str) -> CheckpointError:
    """The error for one setting."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:79]}…"
    return CheckpointError(f"quantization_config has {name} {shown}{why}; use the model with its float weights")


def _among(value: Any, values: Collection[Any]) -> bool:
    return any(type(value) is type(other) and value == other for other in values)
