"""Arrays in a file that NumPy reads too: an archive that packs nothing, as ``numpy.savez`` writes.

Written whole or not at all, and read as what is untrusted: no array is larger than the bytes that it has there, and
each has the checksum that the archive gives. Large arrays whose slots are used one after another begin at a page, block
by block, so that they can be had as memory without being copied.
"""

from __future__ import annotations

import functools
import io
import math
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.state.file_pages import PAGE, FilePages

if TYPE_CHECKING:
    import zipfile

__all__ = ["ArrayFile", "read_arrays", "write_arrays"]

Array = NDArray[Any]
_MAX_HEADER = 10_000  # bytes of what NumPy writes before an array
_LARGE = 16 * PAGE  # bytes of a block that is worth pages of its own
_LOCAL = struct.Struct("<4s22xHH")  # what an archive has before each member: a mark, and the lengths of two texts
_MARK, _PADDING = b"PK\x03\x04", 0xD935  # the second is what Android's archives are aligned with
_ZIP64 = 20  # bytes of a member's sizes, where they are written with 64 bits


@dataclass(frozen=True, eq=False)
class ArrayFile:
    """What :func:`read_arrays` found.

    Args:
        arrays: by name, where they are in the file; not to be written to, and not for longer than the file is.
        starts: where each one's numbers begin.
        pages: the file's, where they may be kept; None where the arrays are a copy in memory.
    """

    arrays: Mapping[str, Array]
    starts: Mapping[str, int]
    pages: FilePages | None


def write_arrays(path: Path, arrays: Mapping[str, Array], slots: Mapping[str, int] | None = None) -> None:
    """Write a file for :func:`read_arrays`. Where that fails, as on a full disk, what was there before stays.

    Args:
        path: the file.
        arrays: by name.
        slots: by name, of arrays that have more slots than are in use: the axis of the slots. Those of large blocks get
            some more of them, of zeros.

    Raises:
        OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():  # a device or a pipe, whose place none can take
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        return
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o644)
        with os.fdopen(descriptor, "wb") as file:  # which nobody else may write to, or it is not kept as memory
            _write(file, arrays, slots or {})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write(file: IO[bytes], arrays: Mapping[str, Array], slots: Mapping[str, int]) -> None:
    import zipfile  # a tenth of this package's time to import, for what few programs do

    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            _write_array(archive, file, name, array, slots.get(name))
        for member in archive.infolist():
            member.extra = b""  # padding belongs before the member alone, and not into the list at the end too


def _write_array(archive: zipfile.ZipFile, file: IO[bytes], name: str, array: Array, axis: int | None) -> None:
    import zipfile

    more = None if axis is None else _more_slots(array, axis)
    shape = (
        array.shape
        if axis is None
        else (*array.shape[:axis], array.shape[axis] + (more or 0), *array.shape[axis + 1 :])
    )
    header = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    member = zipfile.ZipInfo(f"{name}.npy")
    if more is not None:
        begin = file.tell() + _LOCAL.size + len(member.filename.encode()) + _ZIP64 + 4 + len(header.getvalue())
        member.extra = struct.pack("<HH", _PADDING, -begin % PAGE) + bytes(-begin % PAGE)
    with archive.open(member, "w", force_zip64=True) as out:
        out.write(header.getvalue())
        for block in (
            [array] if axis is None or more is None else map(array.__getitem__, np.ndindex(array.shape[:axis]))
        ):
            out.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
            if more and axis is not None:
                out.write(bytes(more * math.prod(shape[axis + 1 :]) * array.itemsize))


def _more_slots(array: Array, axis: int) -> int | None:
    """How many more slots let every block begin at a page; None: blocks are too small, or slots too large for that."""
    slot = math.prod(array.shape[axis + 1 :]) * array.itemsize
    together = math.lcm(PAGE, slot) if slot else _LARGE + 1
    return -array.shape[axis] % (together // slot) if together <= _LARGE <= array.shape[axis] * slot else None


def read_arrays(path: Path, threads: int = 1) -> ArrayFile:
    """What ``numpy.savez`` or :func:`write_arrays` wrote.

    An archive may unpack to a thousand times its size, and an array may say that it has more elements than there are
    bytes: neither is written by :meth:`edgellm_runtime.state.State.save`, and both are refused before memory is taken.

    Args:
        path: the file.
        threads: that look at checksums.

    Raises:
        Exception: of any kind that NumPy or the reader of archives has; ValueError for what is refused here.
    """
    import zipfile

    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        members, left = archive.infolist(), os.fstat(file.fileno()).st_size
        for member in members:
            left -= member.file_size
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or left < 0:
                raise ValueError(f"{member.filename!r} unpacks to more than it takes")
        if len({member.filename for member in members}) < len(members):
            raise ValueError("two arrays have one name")
        pages = FilePages.of(file)
        if pages is not None:
            whole = pages.bytes
        else:
            file.seek(0)
            whole = np.frombuffer(file.read(), np.uint8)
    places = {member.filename: _place(whole, member) for member in members}
    checked = [(whole[place], member.CRC) for member, place in zip(members, places.values(), strict=True)]
    if threads > 1 and len(whole) > _LARGE:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(threads) as pool:
            right = list(pool.map(_right, checked))
    else:
        right = list(map(_right, checked))
    if not all(right):
        raise ValueError(f"{members[right.index(False)].filename!r} has another checksum")
    arrays, starts = {}, {}
    for filename, place in places.items():
        name = filename.removesuffix(".npy")
        arrays[name], starts[name] = _array(whole, place)
    return ArrayFile(arrays, starts, pages)


def _right(part: tuple[Array, int]) -> bool:
    return zlib.crc32(part[0].data) == part[1]


def _place(whole: Array, member: zipfile.ZipInfo) -> slice:
    """Where a member's bytes are."""
    begin = member.header_offset + _LOCAL.size
    if not 0 <= member.header_offset <= begin <= len(whole):
        raise ValueError(f"{member.filename!r} is outside the file")
    mark, name, extra = _LOCAL.unpack(whole[member.header_offset : begin].tobytes())
    end = begin + name + extra + member.file_size
    if mark != _MARK or end > len(whole):
        raise ValueError(f"{member.filename!r} is outside the file")
    return slice(begin + name + extra, end)


def _array(whole: Array, place: slice) -> tuple[Array, int]:
    """An array and where its numbers begin; one that would take more or less memory than it has bytes is refused."""
    first = whole[place][:_MAX_HEADER].tobytes()
    length = int.from_bytes(first[8:10], "little") + 10 if first[6:7] == b"\x01" else len(first)
    shape, fortran, dtype, size = _described(first[:length])
    start = place.start + size
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != place.stop - start:
        raise ValueError(f"an array of {dtype} {shape} in {place.stop - start} bytes")
    array = np.ndarray(shape, dtype, whole[start : place.stop].data, order="F" if fortran else "C")
    return array, start


@functools.lru_cache(maxsize=64)  # a model's layers are alike
def _described(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, order and type as NumPy wrote them, and how many bytes that takes."""
    data = io.BytesIO(header)
    version = np.lib.format.read_magic(data)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"an array of version {version}")
    return *read(data, max_header_size=_MAX_HEADER), data.tell()
