"""From a bundle's path to something that runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgellm_runtime.engines import LIBRARIES
from edgellm_runtime.errors import BackendError, BundleError

if TYPE_CHECKING:
    from edgellm_runtime.bundle import Bundle
    from edgellm_runtime.model import Model
    from edgellm_runtime.session import Session

__all__ = ["DEVICES", "load", "open_session"]

DEVICES = ("auto", "cpu")


def load(
    path: str | Path, *, device: str = "auto", threads: int | None = None, checksums: bool = True
) -> Model:  # fmt: skip
    """Open a bundle, ready to generate.

    Args:
        path: the bundle's directory.
        device: ``cpu``, or ``auto`` for the best that this installation has.
        threads: CPU threads for one step; None for every core that this process may use.
        checksums: whether to read and compare every file's checksum first; leave it on for bundles from elsewhere.

    Returns:
        A model with ``generate``, ``stream``, ``chat`` and ``conversation``. Its tokenizer is read with the first text,
        and a file that is none is refused then.

    Raises:
        BundleError: the bundle is missing, damaged, foreign or newer than this runtime.
        BackendError: no library can run it here, or the device is not there.
    """
    from edgellm_runtime.bundle import Bundle
    from edgellm_runtime.model import Model
    from edgellm_runtime.tokenizer import Tokenizer, check_info

    with Bundle.while_checking(path, checksums=checksums) as bundle:
        session = open_session(bundle, device=device, threads=threads)
    info = bundle.manifest.tokenizer
    if info is None:
        return Model(session, None, bundle)
    file = bundle.file("tokenizer.json")
    check_info(file, info, session.vocab_size)
    # Read with the first text: for a vocabulary of 50,000 that takes 0.1 s and 40 MB, which token ids need not pay.
    return Model(session, lambda: Tokenizer(file, info, vocab_size=session.vocab_size), bundle)


def open_session(bundle: Bundle, *, device: str = "auto", threads: int | None = None) -> Session:
    """Steps of an opened bundle, without text; arguments and errors as :func:`load`."""
    from edgellm_runtime.backends.ort import OrtBackend
    from edgellm_runtime.bundle import GRAPH
    from edgellm_runtime.session import Session

    if device not in DEVICES:
        raise BackendError(f"unknown device {device!r}; this runtime has {', '.join(DEVICES)}")
    if threads is not None and threads < 1:
        raise BackendError(f"{threads} threads; give at least 1, or none for every core")
    manifest = bundle.manifest
    _check_requirements(bundle)
    if manifest.graphs:
        return _session_of_roles(bundle, threads)
    backend = OrtBackend(bundle.file(GRAPH), manifest.signature, threads=threads)
    return Session(
        backend, manifest.signature, max_context=manifest.max_context, ragged_chunks=manifest.ragged_chunks,
        vocab_size=manifest.vocab_size or None,
    )  # fmt: skip


def _session_of_roles(bundle: Bundle, threads: int | None) -> Session:
    from edgellm_runtime.backends.ort_roles import OrtRolesBackend
    from edgellm_runtime.roles import Roles
    from edgellm_runtime.session import Session

    manifest, roles = bundle.manifest, Roles.of(bundle.manifest)
    backend = OrtRolesBackend(bundle.path, roles, manifest.signature, threads=threads)
    return Session(
        backend, manifest.signature, max_context=manifest.max_context, ragged_chunks=manifest.ragged_chunks,
        chunk=roles.longest, vocab_size=manifest.vocab_size or None, capacity=manifest.capacity,
    )  # fmt: skip


def _check_requirements(bundle: Bundle) -> None:
    """Compare the libraries that the bundle needs with those installed, before any work."""
    requires = bundle.manifest.target.get("requires", {})
    if not isinstance(requires, dict) or not requires.keys() <= {"onnxruntime", *LIBRARIES}:
        raise BundleError(
            f"{bundle.path}: needs {requires!r}, which this runtime does not know; install a newer edgellm"
        )
    from edgellm_runtime.backends.ort import library

    found, needed = library().__version__, str(requires.get("onnxruntime", "0"))
    if _numbers(found) < _numbers(needed):
        raise BackendError(
            f"{bundle.path}: needs ONNX Runtime {needed}, here is {found}; pip install 'onnxruntime>={needed}'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
