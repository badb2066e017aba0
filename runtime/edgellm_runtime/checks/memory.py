"""How much memory this process has taken, for people who measure."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["memory_now_and_at_most", "peak_rss_mb"]

_STATUS = Path("/proc/self/status")


def memory_now_and_at_most() -> tuple[int, int]:
    """Bytes in memory now, and the most there have been since the program began; none where the system is not Linux."""
    if not _STATUS.is_file():
        return 0, 0
    said = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    now, most = (int(said.get(name, "0 kB").split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
    return now, most


def peak_rss_mb() -> float | None:
    """The most memory this process has held at once, MiB; None where the system does not say.

    On Linux this is VmHWM, which starts anew with each program. ``getrusage`` would also count what the program that
    started this one had taken.
    """
    _, most = memory_now_and_at_most()
    if most:
        return round(most / (1 << 20), 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 << 20 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
