"""The arrays of a saved state's file: written whole or not at all, and read as what is untrusted, none of them larger
than the bytes that it has there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.arguments import shown
from edgellm_runtime.errors import OptionError, StateError
from edgellm_runtime.spec import StateSpec

__all__ = ["FORMAT", "check_lengths", "header_of", "read_arrays", "shape_of_used", "source_of", "write_arrays"]

FORMAT = 1
_MOST_TOKENS = 1 << 30  # of a row: more would overflow the graph's whole numbers
_MAX_HEADER = 10_000  # bytes of what NumPy writes before an array


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a file for :func:`read_arrays`. Where that fails, as on a full disk, what was there before stays.

    Raises:
        OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():  # a device or a pipe, whose place none can take
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        return
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("wb") as file:  # given a name, numpy would append .npz to it
            np.savez(file, allow_pickle=False, **arrays)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """What ``numpy.savez`` wrote: name to array.

    An archive may unpack to a thousand times its size, and an array may say that it has more elements than there are
    bytes: neither is written by :meth:`edgellm_runtime.state.State.save`, and both are refused before memory is taken.

    Raises:
        Exception: of any kind that NumPy or the reader of archives has; ValueError for what is refused here.
    """
    import zipfile  # a tenth of this package's time to import, for what few programs do

    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        members, left = archive.infolist(), path.stat().st_size
        for member in members:
            left -= member.file_size
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or left < 0:
                raise ValueError(f"{member.filename!r} unpacks to more than it takes")
            with archive.open(member) as data:
                _check_size(data, member.file_size)
        if len({member.filename for member in members}) < len(members):
            raise ValueError("two arrays have one name")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}


def header_of(specs: Sequence[StateSpec], about: dict[str, Any]) -> str:
    """What a file says of itself.

    Args:
        specs: of its states.
        about: what is written beside them.

    Raises:
        OptionError: something that JSON has not.
    """
    header = {"format": FORMAT, "specs": [s.to_json() for s in specs]}
    try:
        return json.dumps(header | ({"about": about} if about else {}), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"about is {shown(about)}; it must be a dict of JSON's types") from error


def source_of(specs: Any) -> int | None:
    """The length of the sources that a saved state was made of, as its header says; None: of none.

    Raises:
        Exception: of any kind, where the header says something else.
    """
    found = {spec.get("source") for spec in specs} - {None}
    (source,) = found or {None}
    if source is not None and (type(source) is not int or not 0 < source <= _MOST_TOKENS):
        raise ValueError(f"sources of {shown(source)} tokens")
    return source


def check_lengths(path: Path, lengths: NDArray[Any], written: NDArray[Any]) -> None:
    """See that a file's rows have as many tokens as rows may have.

    Args:
        path: the file.
        lengths: of its rows.
        written: what its rings were written with.

    Raises:
        StateError: they have not.
    """
    if (
        lengths.dtype != np.int32
        or lengths.ndim != 1
        or not len(lengths)
        or not (0 <= lengths.min() <= lengths.max() <= _MOST_TOKENS)
    ):
        raise StateError(f"{path}: its lengths are damaged; read the prompt again")
    if written.dtype != np.int32 or written.shape != lengths.shape or (written < lengths).any():
        raise StateError(f"{path}: what its rings were written with is damaged; read the prompt again")


def _check_size(data: Any, size: int) -> None:
    """Refuse an array that would take more or less memory than it has bytes."""
    version = np.lib.format.read_magic(data)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"an array of version {version}")
    shape, _, dtype = read(data, max_header_size=_MAX_HEADER)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != size - data.tell():
        raise ValueError(f"an array of {dtype} {shape} in {size - data.tell()} bytes")


def shape_of_used(spec: StateSpec, batch: int, tokens: int) -> tuple[int, ...]:
    """That of a tensor's slots in use."""
    shape, axis = spec.resolve(batch, tokens), spec.axis
    return shape if axis is None else (*shape[:axis], min(tokens, shape[axis]), *shape[axis + 1 :])
