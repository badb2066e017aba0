"""Codes that take long to compute and are read again, kept on disk meanwhile instead of in memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edgellm_exporters.quantize.plan import Codes, joined, pack, unpack
from edgellm_exporters.weights.scratch_file import Reader, ScratchFile

__all__ = ["ChosenCodes", "CodesOnDisk"]

_LEAST = 1 << 18  # codes that are worth a file's time: a few looked-up rows are computed as quickly


@dataclass(frozen=True)
class _Kept:
    """What reads some codes again, their own packed, and what else there is to them."""

    codes: Reader
    scales: Reader
    zeros: Reader
    bits: int
    padded: int  # codes in a row
    columns: int
    floating: bool

    def read(self, rows: tuple[int, int] | None) -> Codes:
        """All codes, or those of some rows."""
        packed, scales, zeros = (reader(rows).numpy() for reader in (self.codes, self.scales, self.zeros))
        return Codes(unpack(packed, self.bits, self.padded), scales, zeros, self.columns, self.floating)


class CodesOnDisk:
    """Computes codes when they are asked for the first time, and reads them after that.

    Args:
        directory: where the file is to be, None for where temporary files are; it has no name there, and goes with this
            object. A full disk costs time only: what could not be kept is computed again.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._file: ScratchFile | None = None
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
            return self._kept[key].read(rows)
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
        self._file = self._file or ScratchFile(self._directory)
        parts = (pack(codes.codes, bits), codes.scales, codes.zeros)
        readers = [self._file.write(torch.from_numpy(np.require(part, requirements=["C", "W"]))) for part in parts]
        packed, scales, zeros = (reader for reader in readers if reader is not None)
        return _Kept(packed, scales, zeros, bits, codes.codes.shape[1], codes.columns, codes.floating)


class ChosenCodes(Mapping[str, Codes]):
    """Codes by the names of their weights, each read anew; they are not computed again, so a full disk costs memory.

    Args:
        directory: as for :class:`CodesOnDisk`.
    """

    def __init__(self, directory: Path | None) -> None:
        self._disk = CodesOnDisk(directory)
        self._parts: dict[str, list[tuple[int, int]]] = {}  # rows from one to before another, by the weight's name
        self._held: dict[tuple[str, int], Codes] = {}

    def add(self, name: str, parts: Iterable[Codes], bits: int) -> None:
        """Keep the codes of one weight.

        Args:
            name: of the weight.
            parts: of its codes, rows after rows; no two of them are in memory at once.
            bits: of a code.
        """
        places: list[tuple[int, int]] = []
        start = 0
        for part in parts:
            self._keep((name, start), part, bits)
            places.append((start, start := start + len(part.codes)))
            del part  # before the next is computed
        self._parts[name] = places

    def rows(self, name: str, start: int, stop: int) -> Codes:
        """Those of some rows."""
        here = [(first, max(start, first), min(stop, last)) for first, last in self._parts[name]]
        found = [(first, (a - first, b - first)) for first, a, b in here if a < b]
        if len(found) == 1:
            return self._part(name, *found[0])
        return joined((self._part(name, *each) for each in found), stop - start)

    def _keep(self, key: tuple[str, int], codes: Codes, bits: int) -> None:
        self._disk.get(key, bits, lambda: codes)
        if not self._disk.has(key):
            self._held[key] = codes

    def _part(self, name: str, first: int, some: tuple[int, int]) -> Codes:
        """Some rows of the part that begins at a row."""
        key = (name, first)
        if key in self._held:
            return self._held[key].of_rows(*some)
        return self._disk.get(key, 0, lambda: self._held[key], some)

    def __getitem__(self, name: str) -> Codes:
        """All of one weight's."""
        return self.rows(name, 0, self._parts[name][-1][1])

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
