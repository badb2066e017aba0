"""Files of Marian, the translators' toolkit: a model's tensors, its settings, and the words of its shortlist.

The binary file: a version, a header for each tensor (lengths and type), names, shapes, then the tensors, each on a
multiple of 256 bytes. Matrices of 8 bits hold codes, those of products in the order of PyTorch's linear layers, and
then the number that codes are divided by. The shortlist: for each source token the numbers of words that it may stand
for. As https://github.com/browsermt/marian-dev writes both.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from edgellm.codes import CodeFormat, StoredCodes
from edgellm.errors import CheckpointError

__all__ = ["SHORTLIST", "MarianSource", "Shortlist", "read_lists", "read_settings", "read_shortlist"]

SHORTLIST = "shortlist"  # the name that the words of a shortlist have among the tensors
_VERSION, _SETTINGS = 1, "special:model.yml"
_FLOAT32, _INT8 = 0x404, 0x4101  # types of Marian's: 32-bit floats; 8-bit codes in no processor's own order
_BYTES = 0x101
_MIDDLE = 128  # the code of 0
_GROUP = 32  # of columns: kernels round what they multiply by blocks of as many, and the fewer the closer
_MOST_TENSORS, _MOST_NAME, _MOST_DIMENSIONS = 65536, 4096, 8
_TABLES = ("Wemb", "_ln_scale", "_ln_bias")  # ends of names of what no product turns round
_MAGIC = 0xF11A48D5013417F5
_MOST_WORDS = 1 << 28
_MOST_LISTED = 1024  # words for one source token; the table has room for so many for each


class _Stored(NamedTuple):
    kind: int
    shape: tuple[int, ...]
    offset: int
    size: int


class MarianSource:
    """The tensors and settings of a model's file, and of its shortlist.

    Vectors have one dimension, and matrices of products the shape of PyTorch's linear layers: (outputs, inputs).

    Args:
        path: the file, in Marian's binary form.
        shortlist: the words of source tokens, or None.

    Raises:
        CheckpointError: it is no whole file of that kind, or holds a type of numbers that is not read.
    """

    def __init__(self, path: Path, shortlist: Shortlist | None = None) -> None:
        self._path, self.shortlist = path, shortlist
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                self._tensors = _headers(file, size)
        except (OSError, ValueError, struct.error, UnicodeDecodeError, OverflowError) as error:
            raise CheckpointError(f"{path} is no whole file of Marian's ({error}); copy it again") from error
        self.settings = read_settings(self._bytes(_SETTINGS)) if _SETTINGS in self._tensors else {}
        self.coded = any(t.kind == _INT8 for t in self._tensors.values())

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape, without those that only Marian's own arithmetic needs."""
        found = {
            name: _turned(name, tensor.shape) for name, tensor in self._tensors.items()
            if tensor.kind != _BYTES and not name.endswith("_QuantMultA")
        }  # fmt: skip
        return found if self.shortlist is None else found | {SHORTLIST: self.shortlist.table.shape}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor in float32, or the rows from one index up to another.

        Raises:
            CheckpointError: the file was cut short since it was opened, or codes have no number to be divided by.
        """
        if name == SHORTLIST and self.shortlist is not None:
            whole = torch.from_numpy(self.shortlist.table.astype(np.float32))
        else:
            whole = torch.from_numpy(self._numbers(name))
        return whole if rows is None else whole[rows[0] : rows[1]]

    def _numbers(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        tensor = self._tensors[name]
        if tensor.kind == _INT8:
            codes, scale = self._coded(name)
            return codes.astype(np.float32) / scale
        shape, count = _turned(name, tensor.shape), int(np.prod(tensor.shape))
        found = np.frombuffer(self._bytes(name), "<f4", count)
        return found.reshape(shape[::-1]).T.copy() if _is_turned(name, tensor.shape) else found.reshape(shape).copy()

    def _coded(self, name: str) -> tuple[np.ndarray[Any, np.dtype[np.int8]], np.float32]:
        """Codes, in the shape that the tensor is read in, and what they are divided by."""
        shape, data = _turned(name, self._tensors[name].shape), self._bytes(name)
        count = int(np.prod(shape))
        (scale,) = struct.unpack_from("<f", data, count)
        if not scale > 0 or not np.isfinite(scale):
            raise CheckpointError(f"{self._path}: {name} has codes to be divided by {scale}; copy the file again")
        return np.frombuffer(data, np.int8, count).reshape(shape), np.float32(scale)

    def code_format(self, name: str) -> CodeFormat | None:
        """See :class:`edgellm.codes.CodedWeights`; a matrix has one scale, which is that of each of its groups."""
        tensor = self._tensors.get(name)
        if tensor is None or tensor.kind != _INT8 or len(shape := _turned(name, tensor.shape)) != 2:
            return None
        return CodeFormat(8, _GROUP if shape[1] % _GROUP == 0 else shape[1], symmetric=True)

    def codes(self, name: str) -> StoredCodes:
        """See :class:`edgellm.codes.CodedWeights`."""
        form, (codes, scale) = self.code_format(name), self._coded(name)
        assert form is not None
        groups = (len(codes), codes.shape[1] // form.group)
        return StoredCodes(
            form, (codes.astype(np.int16) + _MIDDLE).astype(np.uint8), np.full(groups, 1 / scale, np.float32),
            np.full(groups, _MIDDLE, np.uint8),
        )  # fmt: skip

    def _bytes(self, name: str) -> bytes:
        tensor = self._tensors[name]
        try:
            with self._path.open("rb") as file:
                file.seek(tensor.offset)
                data = file.read(tensor.size)
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be read ({error.strerror}); copy it again") from error
        if len(data) != tensor.size:
            raise CheckpointError(f"{self._path}: tensor {name} ends early; copy the file again")
        return data


def _is_turned(name: str, shape: Sequence[int]) -> bool:
    return len(shape) == 2 and shape[0] > 1 and not name.endswith(_TABLES)


def _turned(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if _is_turned(name, shape):
        return shape[::-1]
    return shape[1:] if len(shape) == 2 and shape[0] == 1 else shape


def _headers(file: Any, size: int) -> dict[str, _Stored]:
    """Where each tensor is; nothing of what the file says is believed before it is compared with its size."""

    def take(form: str) -> tuple[Any, ...]:
        data = file.read(struct.calcsize(form))
        return struct.unpack(form, data)

    version, count = take("<2Q")
    if version != _VERSION or count > _MOST_TENSORS:
        raise ValueError(f"version {version} with {count} tensors")
    heads = [take("<4Q") for _ in range(count)]  # length of the name, type, dimensions, bytes
    names = []
    for length, *_ in heads:
        if not 1 < length <= _MOST_NAME:
            raise ValueError(f"a name of {length} bytes")
        names.append(take(f"<{length}s")[0][:-1].decode())
    shapes = []
    for _, _, dimensions, _ in heads:
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"{dimensions} dimensions")
        shapes.append(take(f"<{dimensions}i"))
    (padding,) = take("<Q")
    at, found = file.tell() + padding, dict[str, _Stored]()
    for (_, kind, _, length), name, shape in zip(heads, names, shapes, strict=True):
        found[name] = _checked(name, _Stored(kind, shape, at, length), size)
        at += length
    if len(found) < count:
        raise ValueError("two tensors have one name")
    return found


def _checked(name: str, tensor: _Stored, size: int) -> _Stored:
    needed = {_FLOAT32: 4, _INT8: 1, _BYTES: 1}.get(tensor.kind)
    if needed is None:
        raise ValueError(f"{name} is of type {tensor.kind:#x}; read are floats and 8-bit codes of type 'intgemm8'")
    if not tensor.shape or min(tensor.shape) < 1:
        raise ValueError(f"{name} has shape {tensor.shape}")
    count = 1
    for length in tensor.shape:  # in Python's numbers, which do not overflow
        count *= length
    if count * needed + (4 if tensor.kind == _INT8 else 0) > tensor.size or tensor.offset + tensor.size > size:
        raise ValueError(f"{name} ends early")
    return tensor


def read_lists(data: bytes) -> dict[str, list[str]]:
    """The lists of plain words in a YAML text: a ``key:`` line, and a ``- word`` line for each.

    Args:
        data: UTF-8.
    """
    found: dict[str, list[str]] = {}
    key = ""
    for line in data.decode("utf-8", "replace").splitlines():
        word = line.strip()
        if word.startswith("- "):
            found.setdefault(key, []).append(word[2:].strip().strip("\"'"))
        elif word and not line[0].isspace():
            key = word.partition(":")[0]
    return found


def read_settings(data: bytes) -> dict[str, str]:
    """The plain ones of a YAML text: ``key: value`` lines, as they are written; lists and what they hold are left out.

    Args:
        data: UTF-8, closed by zeros or not.
    """
    lines = data.rstrip(b"\0").decode("utf-8", "replace").splitlines()
    pairs = (line.partition(":") for line in lines if line and not line[0].isspace() and line[0] not in "-#")
    return {key.strip(): value.strip().strip("\"'") for key, colon, value in pairs if colon}


class Shortlist(NamedTuple):
    """The words that source tokens may stand for: (source tokens, most words) int32, filled up with 0."""

    commonest: int
    table: np.ndarray[Any, np.dtype[np.int32]]


def read_shortlist(path: Path, vocab_size: int) -> Shortlist:
    """Read a shortlist's binary file.

    Raises:
        CheckpointError: it is damaged, or of another vocabulary.
    """
    try:
        data = path.read_bytes()
        magic, _, commonest, _, offsets, words = struct.unpack_from("<6Q", data)
        if magic != _MAGIC or offsets != vocab_size + 1 or words > _MOST_WORDS or commonest > vocab_size:
            raise ValueError(
                f"it has {offsets} offsets, {words} words and the first {commonest} for a vocabulary of {vocab_size}"
            )
        if len(data) != 48 + 8 * offsets + 4 * words:
            raise ValueError(f"it has {len(data)} bytes")
        starts: np.ndarray[Any, np.dtype[np.int64]] = np.frombuffer(data, "<u8", offsets, 48).astype(np.int64)
        listed = np.frombuffer(data, "<u4", words, 48 + 8 * offsets)
        lengths = starts[1:] - starts[:-1]
        if (lengths < 0).any() or starts[0] != 0 or starts[-1] != words or (len(listed) and listed.max() >= vocab_size):
            raise ValueError("its offsets or words are outside it")
        if (most := int(lengths.max())) > _MOST_LISTED:
            raise ValueError(f"it lists {most} words for one token; at most {_MOST_LISTED} are read")
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is no shortlist of this model ({error}); copy it again") from error
    table = np.zeros((vocab_size, max(1, most)), np.int32)
    rows = np.repeat(np.arange(vocab_size), lengths)
    table[rows, np.arange(words) - np.repeat(starts[:-1], lengths)] = listed
    return Shortlist(int(commonest), table)
