"""A bundle on disk: what its manifest says, and files that are what the manifest says they are.

A bundle is untrusted input. Paths stay inside its directory, sizes and checksums are compared before a parser sees a
byte, and the graph may read no file but those listed. Weights are numbers and no parser's food: their checksums may be
compared while a session is made of them, but before it is used. The format is described in docs/bundle-format.md.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from edgellm_runtime.arguments import check_flag, check_path
from edgellm_runtime.bundle.limits import MAX_MANIFEST_BYTES, limit_of, read_json
from edgellm_runtime.bundle.manifest import MANIFEST, FileInfo, Manifest
from edgellm_runtime.bundle.weight_files import read_graph, weight_files
from edgellm_runtime.errors import BundleError, first_line
from edgellm_runtime.graphs.onnx_file import ReadGraph
from edgellm_runtime.json_text import json_text

__all__ = ["Bundle", "sha256_of"]

_PIECE = 8 << 20  # of a file at a time; a thread that hashes small ones waits for Python's lock more than it hashes


class Bundle:
    """A checked bundle directory.

    Args:
        path: the directory.
        checksums: whether to read every file and compare its sha256. Sizes are compared in any case.

    Raises:
        BundleError: it is missing, damaged, foreign or newer.
    """

    def __init__(self, path: str | Path, *, checksums: bool = True) -> None:
        self._graphs: dict[str, ReadGraph] = {}
        self._check_sums(self._open(path, checksums)[0])

    @classmethod
    @contextmanager
    def while_checking(cls, path: str | Path, *, checksums: bool = True, beside: bool = True) -> Iterator[Bundle]:
        """A bundle whose weights are compared with their checksums in a thread, while the block runs.

        Everything else has been compared before. The block may prepare what reads the weights, but what it made may be
        used only after it: the block's end raises where a checksum differs, whatever else went wrong over such weights.

        Args:
            path: the directory.
            checksums: as for the class.
            beside: False compares the weights before the block instead, without a thread of its own.

        Raises:
            BundleError: as for the class.
        """
        bundle = cls.__new__(cls)
        (weights, bundle._graphs), faults = bundle._open(path, checksums), list[Exception]()

        def check() -> None:
            try:
                bundle._check_sums(weights)
            except Exception as error:
                faults.append(error)

        thread = threading.Thread(target=check, name="edgellm-checksums", daemon=True)
        if beside:
            thread.start()
        else:
            bundle._check_sums(weights)
        try:
            yield bundle
        finally:
            bundle._graphs = {}  # they take memory, and are read once
            if beside:
                thread.join()
            if faults:
                raise faults[0]

    def _open(self, path: str | Path, checksums: bool) -> tuple[list[str], dict[str, ReadGraph]]:
        """Check all that can be had at once; the files whose checksums are still to be compared, and the graphs."""
        self.path, self._checksums = check_path("path", path), check_flag("checksums", checksums)
        self._root = self.path.absolute()  # what is read later lies there, whatever the current directory is by then
        self.manifest = Manifest.from_json(_read_manifest(self.path), self.path / MANIFEST)
        graphs = self.manifest.graph_files
        if absent := [name for name in graphs if name not in self.manifest.files]:
            raise BundleError(f"{self.path / MANIFEST}: lists no {absent[0]}; export the model again")
        parsed = self.manifest.known_files - self.manifest.engine_files
        for name, info in self.manifest.files.items():
            self._check_size(name, info, limit_of(name) if name in parsed else None)
        read = {name: self._read_graph(name) for name in graphs}
        weights = weight_files(self.path, self.manifest, read)
        for name in self.manifest.files.keys() - weights - self.manifest.known_files:
            self._check_size(name, self.manifest.files[name], limit_of(name))
        if not checksums:
            return [], read
        self._check_sums(self.manifest.files.keys() - weights - set(graphs))
        return sorted(weights), read

    @property
    def nbytes(self) -> int:
        """Bytes of all its files, the manifest left out."""
        return sum(f.bytes for f in self.manifest.files.values())

    @cached_property
    def fingerprint(self) -> str:
        """What tells this bundle from every other and from other versions of itself: a sha256 in hexadecimal.

        It is of what the manifest says of the model and of its files, checksums included.
        """
        said = {
            key: value
            for key, value in self.manifest.to_json().items()
            if key not in ("provenance", "measured", "receipt")
        }
        return hashlib.sha256(json_text(said).encode()).hexdigest()

    def file(self, name: str) -> Path:
        """A listed file's path.

        Raises:
            BundleError: the manifest lists no such file.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: has no {name}; export the model again with it")
        return self._root / name

    def read(self, name: str) -> bytes:
        """A listed file's content, which is compared with its size and its checksum, whatever is at its path by now.

        Raises:
            BundleError: there is no such file, or it was changed.
        """
        file, info = self.file(name), self.manifest.files[name]
        try:
            with file.open("rb") as stream:
                data = stream.read(info.bytes + 1)
        except OSError as error:
            raise BundleError(f"{file}: cannot be read ({error.strerror}); copy the bundle again") from error
        if len(data) != info.bytes or (self._checksums and hashlib.sha256(data).hexdigest() != info.sha256):
            raise BundleError(f"{file}: not the file that was exported; it was changed, copy it again")
        return data

    def take_graph(self, name: str) -> ReadGraph | None:
        """A graph as it was read when it was checked, once and only while the block of :meth:`while_checking` runs."""
        return self._graphs.pop(name, None)

    def _read_graph(self, name: str) -> ReadGraph:
        """A graph file's content, of which the very bytes are compared with their checksum before they are parsed."""
        file, info = self.path / name, self.manifest.files[name]
        with file.open("rb") as stream:
            data = stream.read(info.bytes + 1)
        if self._checksums:
            self._compare(name, hashlib.sha256(data).hexdigest())
        return read_graph(file, data)

    def _check_size(self, name: str, info: FileInfo, most: int | None) -> None:
        file = self.path / name
        if file.is_symlink() and not file.resolve().is_relative_to(self.path.resolve()):
            raise BundleError(
                f"{file}: a symbolic link to {file.readlink()}, outside the bundle, and links are not followed there; "
                f"make a folder of the files themselves: cp -rL {self.path} COPY"
            )
        if not file.is_file():
            raise BundleError(f"{file}: missing or not a plain file; copy the bundle again")
        if (found := file.stat().st_size) != info.bytes:
            raise BundleError(f"{file}: {found} bytes instead of {info.bytes}; copy the bundle again")
        if most is not None and found > most:
            raise BundleError(f"{file}: {found} bytes, of at most {most} for such a file; export the model again")

    def _check_sums(self, names: Iterable[str]) -> None:
        for name in names:
            self._compare(name, sha256_of(self.path / name))

    def _compare(self, name: str, digest: str) -> None:
        file, expected = self.path / name, self.manifest.files[name].sha256
        if digest != expected:
            raise BundleError(
                f"{file}: checksum {digest[:12]}… instead of {expected[:12]}…; the file was changed, copy it again"
            )


def sha256_of(file: Path) -> str:
    """A file's sha256 in hexadecimal."""
    digest, piece = hashlib.sha256(), bytearray(min(_PIECE, max(file.stat().st_size, 1)))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(piece):
            digest.update(memoryview(piece)[:count])
    return digest.hexdigest()


def _read_manifest(path: Path) -> Any:
    file = path / MANIFEST
    if not path.is_dir():
        problem = "is not a directory" if path.exists() else "does not exist"
        raise BundleError(f"{path}: {problem}; a bundle is the directory that 'edgellm export' wrote")
    if not file.is_file():
        raise BundleError(f"{path}: has no {MANIFEST}; a bundle is the directory that 'edgellm export' wrote")
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{file}: {file.stat().st_size} bytes are too many for a manifest; export the model again")
    try:
        return read_json(file, MAX_MANIFEST_BYTES)
    except ValueError as error:
        raise BundleError(f"{file}: not JSON ({first_line(error)}); copy the bundle again") from error
