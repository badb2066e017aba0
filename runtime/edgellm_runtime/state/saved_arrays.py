"""What a saved state's file says, of which nothing is believed before it was looked at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.arguments import shown
from edgellm_runtime.errors import OptionError, StateError, first_line
from edgellm_runtime.spec import StateSpec
from edgellm_runtime.state.array_file import ArrayFile, read_arrays
from edgellm_runtime.state.snapshot import Snapshot, unpacked
from edgellm_runtime.state.storage import host_dtype

__all__ = ["Saved", "header_of", "read_saved"]

FORMAT = 1
_MOST_TOKENS = 1 << 30  # of a row: more would overflow the graph's whole numbers


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


@dataclass(frozen=True, eq=False)
class Saved:
    """A file that is what a model's state was saved as.

    Args:
        file: the arrays; each one of a state has at least the slots in use.
        lengths: tokens of each row.
        written: the most that each has held since it was empty.
        about: what was written beside them, believed by nobody yet.
        snapshots: of the only row.
        source: the tokens of the longest source; None: of none.
    """

    file: ArrayFile
    lengths: NDArray[np.int32]
    written: NDArray[np.int32]
    about: dict[str, Any]
    snapshots: tuple[Snapshot, ...]
    source: int | None

    @property
    def used(self) -> int:
        """Slots of the longest row, at least one."""
        return max(int(self.lengths.max()), 1)


def read_saved(path: Path, specs: Sequence[StateSpec], threads: int) -> Saved:
    """Read what ``State.save`` wrote.

    Args:
        path: the file.
        specs: of the model that will go on from it.
        threads: that look at checksums.

    Raises:
        StateError: not such a file, or a damaged one, or of another model.
    """
    ringed = any(spec.update == "ring" for spec in specs)
    try:
        file = read_arrays(path, threads)
        data = file.arrays
        header = json.loads(str(data["__header__"]))
        source = _source_of(header["specs"])
        known = header["format"] == FORMAT and header["specs"] == [s.of_source(source).to_json() for s in specs]
        lengths, arrays = data["__lengths__"], {spec.name: data[spec.name] for spec in specs if known}
        written = data["__written__"] if known and ringed else lengths
        about = dict(header.get("about", {}))
    except Exception as error:  # NumPy and the reader of archives have many kinds
        raise StateError(f"{path}: not a saved state ({first_line(error)}); read the prompt again") from error
    if not known:
        raise StateError(f"{path}: the state of another model; read the prompt again with this one")
    _check_lengths(path, lengths, written)
    try:
        snapshots = unpacked(data, specs, int(lengths[0]) if len(lengths) == 1 else 0)
    except (ValueError, KeyError) as error:
        raise StateError(f"{path}: its snapshots are damaged ({error}); read the prompt again") from error
    saved = Saved(file, lengths.copy(), written.copy(), about, snapshots, source)
    for spec in specs:
        _check_array(path, spec, arrays[spec.name], saved)
    return saved


def _source_of(specs: Any) -> int | None:
    """The length of the sources that a saved state was made of, as its header says; None: of none.

    Raises:
        Exception: of any kind, where the header says something else.
    """
    found = {spec.get("source") for spec in specs} - {None}
    (source,) = found or {None}
    if source is not None and (type(source) is not int or not 0 < source <= _MOST_TOKENS):
        raise ValueError(f"sources of {shown(source)} tokens")
    return source


def _check_lengths(path: Path, lengths: NDArray[Any], written: NDArray[Any]) -> None:
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


def _check_array(path: Path, spec: StateSpec, found: NDArray[Any], saved: Saved) -> None:
    """See that an array has the slots in use; it may have more, which are not looked at."""
    expected, axis = spec.of_source(saved.source).resolve(len(saved.lengths), saved.used), spec.axis
    if axis is not None:
        expected = (*expected[:axis], min(saved.used, expected[axis]), *expected[axis + 1 :])
    grows = spec.capacity_axis
    enough = grows is not None and found.ndim == len(expected) and found.shape[grows] > expected[grows]
    shape = (
        (*found.shape[:grows], expected[grows], *found.shape[grows + 1 :])
        if enough and grows is not None
        else found.shape
    )
    if shape != expected or found.dtype != host_dtype(spec.dtype):
        raise StateError(f"{path}: {spec.name} is {found.dtype} {found.shape}, not {spec.dtype} {expected}")
