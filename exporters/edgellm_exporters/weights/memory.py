"""Giving memory that is free back, so that what comes next does not add to what was."""

from __future__ import annotations

import ctypes
import gc

__all__ = ["give_back", "trim"]


def give_back() -> None:
    """Drop unreachable objects and return the pages that nothing uses; where the C library cannot, only the former."""
    gc.collect()
    trim()


def trim() -> None:
    """Return the pages that nothing uses, where the C library can: small blocks between them keep large ones alive."""
    try:
        give = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    give(0)
