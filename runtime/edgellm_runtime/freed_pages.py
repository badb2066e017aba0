"""Pages that the C library keeps after what was on them is gone."""

from __future__ import annotations

import ctypes

__all__ = ["trim"]


def trim() -> None:
    """Return the pages that nothing uses, where the C library can: small blocks between them keep large ones alive."""
    try:
        give = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    give(0)
