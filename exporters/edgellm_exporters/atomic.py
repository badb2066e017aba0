"""A directory that appears whole or not at all, and takes the place of nothing that is not its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgellm_exporters.errors import ExportError
from edgellm_runtime.bundle import MANIFEST, Manifest
from edgellm_runtime.bundle.signature import SIGNATURE
from edgellm_runtime.errors import BundleError

try:
    import fcntl
except ImportError:  # not POSIX: nothing can be locked, so nothing is swept
    fcntl = None  # type: ignore[assignment]

__all__ = ["check_destination", "scratch_directory", "sweep", "whole_directory"]

_NAMED = 3  # files that an error names
_SCRATCH = re.compile(r"\.(?P<name>.+)\.edgellm-(?P<pid>\d+)-[a-z0-9_]{8}(?P<old>\.old)?")


def check_destination(destination: Path, *, force: bool = False) -> None:
    """Refuse to replace anything but a bundle and, unless ``force`` is given, that too.

    A bundle is a directory whose manifest is edgellm's and lists every file there.

    Raises:
        ExportError: the path holds something else; the text names it.
    """
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise ExportError(f"{destination}: is not a directory; choose another place for the bundle")
    there = sorted(entry.name for entry in destination.iterdir()) if destination.is_dir() else []
    if not there:
        return
    if MANIFEST not in there:
        raise ExportError(f"{destination}: holds {_some(there)} and is no bundle; choose an empty or new directory")
    try:
        manifest = _manifest(destination)
    except (BundleError, OSError, ValueError, RecursionError) as error:
        raise ExportError(
            f"{destination}: holds {_some(there)}, and {MANIFEST} is not one that edgellm reads ({error}); choose an "
            "empty or new directory, or delete this one yourself"
        ) from error
    if foreign := [
        name for name in there if name not in (MANIFEST, SIGNATURE, *manifest.files) or (destination / name).is_dir()
    ]:
        raise ExportError(
            f"{destination}: holds {_some(foreign)} beside the bundle {manifest.name!r}; move that away, or choose "
            "another directory"
        )
    if not force:
        raise ExportError(
            f"{destination}: holds the bundle {manifest.name!r}; replace it with --force (in Python force=True), or "
            "choose another directory"
        )


def _manifest(directory: Path) -> Manifest:
    return Manifest.from_json(json.loads((directory / MANIFEST).read_bytes()), directory / MANIFEST)


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def whole_directory(destination: Path, *, force: bool = False) -> Iterator[Path]:
    """A new directory beside ``destination`` that takes its place when the block ends well, and goes when it does not.

    Args:
        destination: nothing yet, an empty directory or, with ``force``, a bundle.
        force: whether it may replace a bundle.

    Raises:
        ExportError: something else is there, or it cannot be written; the text says why and what to do.
    """
    destination = destination.absolute()
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        sweep(destination.parent)
        check_destination(destination, force=force)
        with scratch_directory(destination) as scratch:
            yield scratch
            _sync(scratch)
            check_destination(destination, force=force)  # what was put there in the meantime is not ours either
            _replace(scratch, destination)
    except OSError as error:
        raise ExportError(
            f"{destination}: cannot be written ({error.strerror or error}); free some space or choose another place"
        ) from error


@contextmanager
def scratch_directory(beside: Path) -> Iterator[Path]:
    """A hidden directory beside a path for as long as the block runs; if the process is killed, :func:`sweep` finds it.

    Its name holds the process's number and a lock is held on it: a number may be another process's by then, and a lock
    ends with its process.
    """
    scratch: Path | None = None
    lock: int | None = None
    try:
        prefix = f".{beside.name}.edgellm-{os.getpid()}-"
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=beside.parent))
        lock = _lock(scratch)
        yield scratch
    finally:  # also when the user interrupts
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sweep(parent: Path) -> None:
    """Remove what processes that were killed left in a directory; a bundle that one was replacing gets its name back.

    What belongs to a living process, to another user, or to a file system without locks stays.
    """
    for entry in sorted(parent.iterdir()):
        found = _SCRATCH.fullmatch(entry.name)
        if found is None or not _own(entry) or _alive(int(found["pid"])):
            continue
        lock = _lock(entry)
        if lock is None:  # its process lives, in another container perhaps
            continue
        try:
            if found["old"] and not (parent / found["name"]).exists():
                entry.rename(parent / found["name"])
            else:
                shutil.rmtree(entry, ignore_errors=True)
        finally:
            os.close(lock)


def _own(entry: Path) -> bool:
    try:
        about = entry.lstat()
    except OSError:  # swept by another export just now
        return False
    return stat.S_ISDIR(about.st_mode) and hasattr(os, "geteuid") and about.st_uid == os.geteuid()


def _alive(process: int) -> bool:
    """Whether another process of that number runs; of this one's number the lock knows more."""
    if process == os.getpid():  # in containers every process may be number 1
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # not ours to signal, so there is one
        return True
    return True


def _lock(directory: Path) -> int | None:
    """A descriptor that locks a directory until it is closed; None if another holds it, or nothing can be locked."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


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
    lock = _lock(destination)  # goes along with the directory when it is renamed
    try:
        destination.rename(old)
        scratch.rename(destination)
    except BaseException:  # an interrupt too must not take away the bundle that was there
        if old.exists() and not destination.exists():
            old.rename(destination)
        raise
    else:
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)
