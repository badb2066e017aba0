"""Codes that take long to compute and are read again, kept on disk meanwhile instead of in memory."""

from __future__ import annotations

import math
import tempfile
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgellm_exporters.quantize.plan import Codes, pack, unpack

__all__ = ["ChosenCodes", "CodesOnDisk"]

_LEAST = 1 << 18  # codes that are worth a file's time: a few looked-up rows are computed as quickly


@dataclass(frozen=True)
class _Place:
    """Where an array lies in the file."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class _Kept:
    """The places of some codes, their own packed, and what else there is to them."""

    codes: _Place
    scales: _Place
    zeros: _Place
    bits: int
    padded: int  # codes in a row
    columns: int
    floating: bool


class CodesOnDisk:
    """Computes codes when they are asked for the first time, and reads them after that.

    Args:
        directory: where the file is to be, None for where temporary files are; it has no name there, and goes with this
            object. A full disk costs time only: what could not be kept is computed again.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._file: IO[bytes] | None = None
        self._kept: dict[Hashable, _Kept] = {}
        self._full = False

    def get(
        self, key: Hashable, bits: int, compute: Callable[[], Codes], rows: tuple[int, int] | None = None
    ) -> Codes:  # fmt: skip
        """The codes of a key.

        Args:
            key: names them; ``compute`` gives the same for one key each time.
            bits: of a code.
            compute: called where they are not kept.
            rows: the first row that is wanted and the one after the last; None for all.
        """
        if key in self._kept:
            return self._read(self._kept[key], rows)
        codes = compute()
        if codes.codes.size >= _LEAST and not self._full:
            try:
                self._kept[key] = self._written(codes, bits)
            except OSError:
                self._full = True
        return codes if rows is None else codes.of_rows(*rows)

    def has(self, key: Hashable) -> bool:
        """Whether the codes of a key are kept."""
        return key in self._kept

    def _written(self, codes: Codes, bits: int) -> _Kept:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115 - goes with this object
            weakref.finalize(self, self._file.close)
        found = _Kept(
            self._append(self._file, pack(codes.codes, bits)), self._append(self._file, codes.scales),
            self._append(self._file, codes.zeros), bits, codes.codes.shape[1], codes.columns, codes.floating,
        )  # fmt: skip
        self._file.flush()
        return found

    @staticmethod
    def _append(file: IO[bytes], array: NDArray[Any]) -> _Place:
        place = _Place(file.seek(0, 2), array.shape, array.dtype)
        file.write(np.ascontiguousarray(array).data)
        return place

    def _read(self, kept: _Kept, rows: tuple[int, int] | None) -> Codes:
        packed, scales, zeros = (self._array(place, rows) for place in (kept.codes, kept.scales, kept.zeros))
        return Codes(unpack(packed, kept.bits, kept.padded), scales, zeros, kept.columns, kept.floating)

    def _array(self, place: _Place, rows: tuple[int, int] | None) -> NDArray[Any]:
        assert self._file is not None
        start, stop = rows or (0, place.shape[0])
        found = np.empty((stop - start, *place.shape[1:]), place.dtype)
        self._file.seek(place.offset + start * math.prod(place.shape[1:]) * place.dtype.itemsize)
        self._file.readinto(found.data)  # type: ignore[attr-defined]
        return found


class ChosenCodes(Mapping[str, Codes]):
    """Codes by the names of their weights, each read anew; they are not computed again, so a full disk costs memory.

    Args:
        directory: as for :class:`CodesOnDisk`.
    """

    def __init__(self, directory: Path | None) -> None:
        self._disk = CodesOnDisk(directory)
        self._rows: dict[str, int] = {}
        self._held: dict[str, Codes] = {}

    def add(self, name: str, codes: Codes, bits: int) -> None:
        """Keep the codes of one weight.

        Args:
            name: of the weight.
            codes: of all its rows.
            bits: of a code.
        """
        self._rows[name] = len(codes.codes)
        self._disk.get(name, bits, lambda: codes)
        if not self._disk.has(name):
            self._held[name] = codes

    def rows(self, name: str, start: int, stop: int) -> Codes:
        """Those of some rows."""
        if name in self._held:
            return self._held[name].of_rows(start, stop)
        return self._disk.get(name, 0, lambda: self._held[name], (start, stop))

    def __getitem__(self, name: str) -> Codes:
        """All of one weight's."""
        return self.rows(name, 0, self._rows[name])

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
