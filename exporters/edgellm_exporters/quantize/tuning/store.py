"""Layers that are finished, kept in a directory, so that tuning that was stopped goes on from there.

A file a layer, written whole or not at all. What is in the directory is believed only of the very same work: of other
weights, codes, text or settings it is cleared away.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.quantize.plan import Codes
from edgellm_exporters.quantize.tuning.chosen import CodedWeight

__all__ = ["ROOM", "FinishedLayers", "forget", "work_digest"]

_WORK = "tuning.json"  # what the directory is of; also tells that it is ours
ROOM = "room-"  # begins the names of directories for what layers compute
_WORDS = "own-words.npy"
_PARTS = ("codes", "scales", "zeros")


def work_digest(coded: Mapping[str, CodedWeight], settings: Mapping[str, Any]) -> str:
    """What tells this work from any other: the codes that it begins with, and how it goes on.

    Args:
        coded: by each name that the model has for a weight.
        settings: that change the outcome, as JSON.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, allow_nan=False).encode())
    for name in sorted(coded):
        one = coded[name]
        digest.update(json.dumps([name, one.name, asdict(one.scheme)], allow_nan=False).encode())
        for part in (one.codes.codes, one.codes.scales, one.codes.zeros, one.column.numpy(), one.row.numpy()):
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


class FinishedLayers:
    """Codes of layers, by path, on disk.

    Args:
        directory: where they are; made here, and cleared where it is of other work.
        digest: of the work, see :func:`work_digest`.

    Raises:
        QuantizeError: the directory holds something else.
    """

    def __init__(self, directory: Path, digest: str) -> None:
        self.directory = directory
        work = directory / _WORK
        if directory.exists() and any(directory.iterdir()) and not work.is_file():
            raise QuantizeError(f"{directory}: holds something else than tuned layers; move it away")
        for left in directory.glob(f"{ROOM}*") if work.is_file() else ():  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        if work.is_file() and work.read_text(encoding="utf-8", errors="replace") != digest:
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        work.write_text(digest, encoding="utf-8")

    def load(self, path: str, coded: Mapping[str, CodedWeight]) -> tuple[dict[str, CodedWeight], dict[str, Any]] | None:
        """A layer's weights and what was told of it, or None where it is not finished.

        Args:
            path: the layer's.
            coded: its weights as they were before.
        """
        try:
            with np.load(self._file(path), allow_pickle=False) as found:
                told: dict[str, Any] = json.loads(str(found["told"]))
                parts = {name: Codes(*(found[f"{name}/{part}"] for part in _PARTS)) for name in coded}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None
        if any(parts[n].codes.shape != c.codes.codes.shape or parts[n].codes.max() > c.scheme.top
               for n, c in coded.items()):  # fmt: skip
            return None
        return {name: coded[name].with_codes(codes) for name, codes in parts.items()}, told

    def save(self, path: str, coded: Mapping[str, CodedWeight], told: Mapping[str, Any]) -> None:
        """Keep a finished layer.

        Args:
            path: the layer's.
            coded: its weights.
            told: what to say of it, as JSON.
        """
        arrays = {f"{name}/{part}": getattr(c.codes, part) for name, c in coded.items() for part in _PARTS}
        beside = self.directory / f".{os.getpid()}.npz"
        try:
            np.savez(beside, told=np.array(json.dumps(told, allow_nan=False)), **arrays)
            beside.replace(self._file(path))
        finally:
            beside.unlink(missing_ok=True)

    def load_words(self, rows: int, time: int) -> Tensor | None:
        """Text that the model wrote, (rows, time) or less, where time was up, or None where there is none."""
        try:
            found = np.load(self.directory / _WORDS, allow_pickle=False)
        except (OSError, ValueError):
            return None
        fits = found.ndim == 2 and 0 < len(found) <= rows and found.shape[1] == time and found.dtype == np.int64
        return torch.from_numpy(found) if fits else None

    def save_words(self, words: Tensor) -> None:
        """Keep text that the model wrote."""
        beside = self.directory / f".{os.getpid()}.npy"
        try:
            np.save(beside, words.numpy())
            beside.replace(self.directory / _WORDS)
        finally:
            beside.unlink(missing_ok=True)

    def _file(self, path: str) -> Path:
        return self.directory / f"{path}.npz"


def forget(directory: Path) -> None:
    """Remove a directory of finished layers, and nothing else: the work is done."""
    if (directory / _WORK).is_file():
        shutil.rmtree(directory, ignore_errors=True)
