"""A directory that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgellm_exporters.errors import ExportError
from edgellm_runtime.bundle import MANIFEST

__all__ = ["check_destination", "whole_directory"]


def check_destination(destination: Path) -> None:
    """Refuse to replace anything but a bundle.

    Raises:
        ExportError: the path holds something else, or its parent cannot be written to.
    """
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise ExportError(f"{destination}: is not a directory; choose another place for the bundle")
    if destination.is_dir() and any(destination.iterdir()) and not (destination / MANIFEST).is_file():
        raise ExportError(f"{destination}: holds files that are not a bundle; choose an empty or new directory")


@contextmanager
def whole_directory(destination: Path) -> Iterator[Path]:
    """A new directory beside ``destination`` that takes its place when the block ends well, and goes when it does not.

    Raises:
        ExportError: it cannot be written; the text says why and what to do.
    """
    destination = destination.absolute()
    check_destination(destination)
    scratch: Path | None = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        yield scratch
        _sync(scratch)
        _replace(scratch, destination)
    except OSError as error:
        raise ExportError(
            f"{destination}: cannot be written ({error.strerror or error}); free some space or choose another place"
        ) from error
    finally:  # also when the user interrupts
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _sync(directory: Path) -> None:
    for file in directory.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _replace(scratch: Path, destination: Path) -> None:
    scratch.chmod(0o755)  # mkdtemp makes it private
    if not destination.exists():
        scratch.rename(destination)
        return
    old = scratch.with_name(scratch.name + ".old")
    try:
        destination.rename(old)
        scratch.rename(destination)
    except BaseException:  # an interrupt too must not take away the bundle that was there
        if old.exists() and not destination.exists():
            old.rename(destination)
        raise
    shutil.rmtree(old, ignore_errors=True)
