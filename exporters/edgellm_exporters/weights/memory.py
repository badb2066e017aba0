"""Giving memory that is free back, so that what comes next does not add to what was."""

from __future__ import annotations

import ctypes
import gc
import os

from edgellm_runtime.freed_pages import trim

__all__ = ["SET_BY_USERS", "give_back", "give_back_large_blocks"]

_LARGE = 4 << 20  # bytes
_MMAP_THRESHOLD = -3  # as malloc.h has it
SET_BY_USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")  # by these variables


def give_back() -> None:
    """Drop unreachable objects and return the pages that nothing uses; where the C library cannot, only the former."""
    gc.collect()
    trim()


def give_back_large_blocks() -> None:
    """From now on, have pages of this process's large blocks returned when they are freed, where it has glibc.

    Left alone, glibc takes the size of each large block that is freed, up to 32 MiB, as one that it had better keep
    (mallopt(3)): exports that use blocks of many sizes were seen to hold 250 MiB for nothing. A user's own settings in
    the environment stay.
    """
    if any(name in os.environ for name in SET_BY_USERS):
        return
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    set_option(_MMAP_THRESHOLD, _LARGE)
