"""Giving memory that is free back, so that what comes next does not add to what was."""

from __future__ import annotations

import gc

from edgellm_runtime.freed_pages import trim

__all__ = ["give_back"]


def give_back() -> None:
    """Drop unreachable objects and return the pages that nothing uses; where the C library cannot, only the former."""
    gc.collect()
    trim()
