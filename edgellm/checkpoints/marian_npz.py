"""Marian's own checkpoints, ``.npz``, as OPUS-MT publishes them: NumPy arrays, and the settings as bytes among them.

Nothing in such a file is executed: arrays of objects are refused, and so are compressed ones, which Marian does not
write. Matrices of products stand there as (inputs, outputs).
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellm.checkpoints.marian_file import read_settings
from edgellm.errors import CheckpointError

__all__ = ["NpzSource", "read_vocabulary"]

_SETTINGS, _TABLE, _BIAS = "special:model.yml", "Wemb", "decoder_ff_logit_out_b"
_MOST_BYTES = 64 << 20  # of a vocabulary
_MOST_MEMBERS = 65536


class NpzSource:
    """The tensors and settings of a model's file.

    Vectors have one dimension, and matrices of products the shape of PyTorch's linear layers: (outputs, inputs). The
    table of embeddings and the bias of logits have a row more than the file, of zeros: what every answer begins with.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is no whole file of that kind.
    """

    coded = False
    shortlist = None

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._stored = _shapes(archive)
            self.settings = read_settings(self._array(_SETTINGS).tobytes()) if _SETTINGS in self._stored else {}
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise CheckpointError(f"{path} is no whole file of Marian's ({error}); copy it again") from error

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        return {name: _turned(name, shape) for name, shape in self._stored.items() if not name.startswith("special:")}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor in float32, or the rows from one index up to another.

        Raises:
            CheckpointError: the file was cut short since it was opened.
        """
        try:
            array = self._array(name).astype(np.float32)
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise CheckpointError(f"{self._path}: {name} cannot be read ({error}); copy the file again") from error
        if name == _TABLE:
            array = np.concatenate([array, np.zeros((1, array.shape[1]), np.float32)])
        elif name == _BIAS:
            array = np.concatenate([array.reshape(1, -1), np.zeros((1, 1), np.float32)], axis=1)
        else:
            array = array.T if array.ndim == 2 and array.shape[0] > 1 else array.reshape(-1)
        whole = torch.from_numpy(np.ascontiguousarray(array))
        return whole if rows is None else whole[rows[0] : rows[1]]

    def _array(self, name: str) -> Any:
        with np.load(self._path, allow_pickle=False) as file:
            return file[name]


def _shapes(archive: zipfile.ZipFile) -> dict[str, tuple[int, ...]]:
    """Of each array; nothing of what a header says is believed before it is compared with the file's size."""
    members = archive.infolist()
    if len(members) > _MOST_MEMBERS:
        raise ValueError(f"{len(members)} arrays")
    found = dict[str, tuple[int, ...]]()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{member.filename} is compressed, as Marian writes none")
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read: Any = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in read:
                raise ValueError(f"{member.filename} is of version {version}")
            shape, _, dtype = read[version](file)
        count = 1
        for length in shape:  # in Python's numbers, which do not overflow
            count *= length
        if dtype.hasobject or dtype.kind not in "fiu" or count * dtype.itemsize > member.file_size:
            raise ValueError(f"{member.filename} holds {dtype} of shape {shape}")
        found[member.filename.removesuffix(".npy")] = shape
    return found


def _turned(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name == _TABLE and len(shape) == 2:
        return (shape[0] + 1, shape[1])
    if name == _BIAS:
        return (1, int(np.prod(shape)) + 1)
    if len(shape) == 2:
        return shape[::-1] if shape[0] > 1 else shape[1:]
    return shape


def read_vocabulary(path: Path) -> dict[str, int]:
    """The tokens' numbers in a vocabulary of Marian's, a line ``token: number`` for each, in YAML.

    Raises:
        CheckpointError: it is damaged.
    """
    found = dict[str, int]()
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        for line in path.read_text(encoding="utf-8").split("\n"):
            if not line.strip():
                continue
            token, colon, number = line.rpartition(":")
            token = token.strip(" ")
            if token[:1] == '"':
                token = json.loads(token)
            elif token[:1] == "'":
                token = token[1:-1].replace("''", "'")
            if not colon or not isinstance(token, str) or not number.strip().isdecimal() or token in found:
                raise ValueError(f"line {line[:80]!r}")
            found[token] = int(number)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no vocabulary of Marian's ({error}); copy it again") from error
    return found
