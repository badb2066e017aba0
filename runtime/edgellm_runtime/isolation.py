"""A bundle's first load in a process of its own, with limits: what crashes, hangs or eats memory does so there.

The process is this interpreter with :mod:`edgellm_runtime.rehearsal`. It is no prison; see docs/security.md.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgellm_runtime import errors
from edgellm_runtime.errors import BundleError, OptionError, RuntimeFault

__all__ = ["Limits", "limits_for", "rehearse"]

_START = "import json,sys;given=json.loads(sys.argv[1]);sys.path[:]=given.pop('path');"
_CODE = _START + "from edgellm_runtime.rehearsal import main;main(**given)"
_GIGABYTE = 1 << 30
_WEIGHT_COPIES = 10  # weights of 4 bits that become floats, beside the file
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # address space


@dataclass(frozen=True)
class Limits:
    """What the process may take.

    Args:
        memory: bytes of address space.
        seconds: of processor time; of time on the wall, twice as many.
    """

    memory: int
    seconds: int


def limits_for(path: Path) -> Limits:
    """Enough for a bundle with files of this size, several times over."""
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file()) if path.is_dir() else 0
    allocated = min(size, _physical_memory())
    return Limits(4 * _GIGABYTE + _WEIGHT_COPIES * allocated, 60 + 60 * allocated // _GIGABYTE)


def rehearse(
    path: str | Path, *, device: str, checksums: bool, limits: Limits | None = None, kernels: str | None = None
) -> None:
    """Load a bundle in a process with limits, render its template there, and run two steps.

    Args:
        path: the bundle's directory.
        device: as for :func:`edgellm_runtime.load`; the rehearsal is on the CPU.
        checksums: likewise.
        limits: None for what its files' sizes suggest.
        kernels: as for :func:`edgellm_runtime.load`.

    Raises:
        OptionError: this platform or this program cannot start such a process.
        BundleError: it crashed, or took more memory or time than it may.
        RuntimeFault: what loading raised there, of its kind.
    """
    if sys.platform != "linux" or not sys.executable:
        raise OptionError(
            f"isolate=True needs Linux and a Python interpreter of its own ({sys.platform}, {sys.executable or 'none'} "
            "here); leave it out, or run the program in a container"
        )
    limits = limits or limits_for(Path(path))
    given = {
        "path": sys.path, "bundle": str(path), "device": device, "checksums": checksums, "limits": asdict(limits),
        "kernels": kernels,
    }  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CODE, json.dumps(given, allow_nan=False)], stdin=subprocess.DEVNULL,
            capture_output=True, timeout=2 * limits.seconds, env={**os.environ, **_ENVIRONMENT}, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise BundleError(f"{path}: loading it takes more than {2 * limits.seconds} s; do not load it") from None
    except OSError as error:
        raise OptionError(f"isolate=True cannot start {sys.executable} ({error}); leave it out") from error
    if (fault := _fault(path, done.returncode, done.stdout, limits)) is not None:
        raise fault


def _fault(path: str | Path, status: int, said: bytes, limits: Limits) -> RuntimeFault | None:
    """What went wrong, from how the process ended and its last line."""
    lines = said.decode("utf-8", "replace").splitlines()
    report: Any = json.loads(lines[-1]) if status == 0 and lines else {}
    if report.get("kind") == "loaded":
        return None
    if report.get("kind") == "memory":
        return BundleError(f"{path}: loading it takes more than {limits.memory / 1e9:.1f} GB; do not load it")
    if "kind" in report:
        kind: type[RuntimeFault] = getattr(errors, report["kind"], BundleError)
        return kind(report["said"])
    if -status in (signal.SIGXCPU, signal.SIGKILL):
        return BundleError(f"{path}: loading it takes more than {limits.seconds} s of processor time; do not load it")
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    return BundleError(f"{path}: loading it ended the process that tried ({how}); do not load it")


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
