"""How much memory this process has taken, for people who measure."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["peak_rss_mb"]

_STATUS = Path("/proc/self/status")


def peak_rss_mb() -> float | None:
    """The most memory this process has held at once, MiB; None where the system does not say.

    On Linux this is VmHWM, which starts anew with each program. ``getrusage`` would also count what the program that
    started this one had taken.
    """
    if _STATUS.is_file():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
        if "VmHWM" in lines:
            return round(int(lines["VmHWM"].split()[0]) / 1024, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 << 20 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
