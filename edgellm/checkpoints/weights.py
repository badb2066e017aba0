"""A checkpoint's tensors by the names of our parameters, each read and checked when it is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from edgellm.codes import CodedWeights, CodeFormat, StoredCodes
from edgellm.errors import CheckpointError

__all__ = ["CheckpointWeights", "Layout", "TensorSource"]

_NAMED = 3  # of the tensors with a fault; the others are counted


class TensorSource(Protocol):
    """Named tensors in a file or several."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        ...

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor in a floating-point dtype, or the rows from one index up to another.

        Nothing of the file stays in memory but what is returned.

        Raises:
            CheckpointError: it cannot be read, or holds something other than floating-point numbers.
        """
        ...


def _same(name: str) -> str:
    return name


def _as_stored(_name: str, tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Layout:
    """How a source stores an architecture's tensors.

    Args:
        name: our parameter name to the source's tensor name.
        tensor: our parameter name and a tensor as stored, to the tensor in our layout and of the same shape; where the
            two do not differ, the very tensor it was given.
        ignored: whether a tensor of that name means nothing to the model.
        reshaped: whether our parameter of that name is stored as the same numbers in another shape.
        adapters: whether adapters are stored as the source is, and not as we do.
    """

    name: Callable[[str], str] = _same
    tensor: Callable[[str, Tensor], Tensor] = _as_stored
    ignored: Callable[[str], bool] = lambda _: False
    reshaped: Callable[[str], bool] = lambda _: False
    adapters: bool = False


class CheckpointWeights:
    """Reads a model's tensors one by one, or by rows; holds none.

    Args:
        groups: the model's names for its tensors, those of one and the same tensor together.
        shapes: of each name's tensor in the model.
        source: the tensors.
        layout: how the source stores them.
        dtype: what they are read as.
        path: the checkpoint, for messages.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape, as far as the files' headers say.
    """

    def __init__(
        self, groups: Sequence[Sequence[str]], shapes: Mapping[str, tuple[int, ...]], source: TensorSource,
        layout: Layout, *, dtype: torch.dtype, path: Path,
    ) -> None:  # fmt: skip
        self._source, self._layout, self._dtype, self._path = source, layout, dtype, path
        self._shapes = shapes
        found = source.shapes
        self._stored: dict[str, list[str]] = {}
        for group in groups:
            stored = [name for name in group if layout.name(name) in found]
            self._stored |= dict.fromkeys(group, stored)
        faults = [
            *self._missing(groups),
            *self._misshaped(groups, found),
            *_superfluous(found, {layout.name(name) for group in groups for name in group}, layout),
        ]
        if faults:
            raise CheckpointError(f"{path}: {'; '.join(faults)}")
        self._sound: set[str] = set()  # stored names that were read whole and found to be finite

    def _missing(self, groups: Sequence[Sequence[str]]) -> list[str]:
        absent = [
            f"tensor {self._layout.name(group[0])} of shape {self._shapes[group[0]]}"
            for group in groups
            if not self._stored[group[0]]
        ]
        return [f"{_some(absent)} {_are(absent)} missing, so the checkpoint is incomplete"] if absent else []

    def _misshaped(self, groups: Sequence[Sequence[str]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
        wrong = [
            f"tensor {stored} has shape {found[stored]}, its configuration says {self._shapes[group[0]]}"
            for group in groups
            for stored in map(self._layout.name, self._stored[group[0]])
            if found[stored] != self._shapes[group[0]] and not self._is_reshaped(group[0], found[stored])
        ]
        return [f"{_some(wrong)}, so the two do not belong together"] if wrong else []

    @property
    def dtype(self) -> torch.dtype:
        """What tensors are read as."""
        return self._dtype

    def read(self, name: str) -> Tensor:
        """One tensor, in our layout.

        Args:
            name: what the model calls it.

        Raises:
            CheckpointError: it cannot be read, is not finite, or differs under two names that mean one tensor.
        """
        first, *others = self._stored[name]
        tensor = self._whole(first)
        if first not in self._sound:
            for other in others:
                self._check_equal(tensor, self._whole(other), name)
        tensor = tensor.to(self._dtype)
        if first not in self._sound:
            self._check_finite(tensor, first)
            self._sound.add(first)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor, without the others if the file stores rows as we do.

        Args:
            name: what the model calls it.
            start: the first row.
            stop: one past the last.

        Raises:
            CheckpointError: as :meth:`read`.
        """
        first, *others = self._stored[name]
        if not all(self._is_stored_by_rows(n) for n in (first, *others)):
            return self.read(name)[start:stop]
        tensor = self._source.read(self._layout.name(first), (start, stop))
        if first not in self._sound:
            for other in others:
                self._check_equal(tensor, self._source.read(self._layout.name(other), (start, stop)), name)
        tensor = tensor.to(self._dtype)
        if first not in self._sound:
            self._check_finite(tensor, first)
        return tensor

    def in_layout(self, name: str, change: Tensor) -> Tensor:
        """What an adapter has for one tensor, with the tensor's rows, in our layout."""
        return self._layout.tensor(name, change) if self._layout.adapters else change

    def code_format(self, name: str) -> CodeFormat | None:
        """As :class:`edgellm.codes.CodedWeights`; none of a tensor that two names store, or that we order otherwise."""
        first, *others = self._stored[name]
        twice = any(self._layout.name(other) != self._layout.name(first) for other in others)
        if twice or not isinstance(self._source, CodedWeights) or not self._is_stored_by_rows(first):
            return None
        return self._source.code_format(self._layout.name(first))

    def codes(self, name: str) -> StoredCodes:
        """See :class:`edgellm.codes.CodedWeights`."""
        assert isinstance(self._source, CodedWeights)
        return self._source.codes(self._layout.name(self._stored[name][0]))

    def _whole(self, name: str) -> Tensor:
        stored = self._source.read(self._layout.name(name)).reshape(self._shapes[name])
        return self._layout.tensor(name, stored)

    def _is_reshaped(self, name: str, shape: tuple[int, ...]) -> bool:
        return self._layout.reshaped(name) and math.prod(shape) == math.prod(self._shapes[name])

    def _is_stored_by_rows(self, name: str) -> bool:
        if self._layout.reshaped(name):
            return False
        probe = torch.empty(self._shapes[name], device="meta")
        return self._layout.tensor(name, probe) is probe

    def _check_equal(self, one: Tensor, other: Tensor, name: str) -> None:
        if not torch.equal(one, other):
            names = " and ".join(self._layout.name(n) for n in self._stored[name])
            raise CheckpointError(
                f"{self._path}: tensors {names} differ, its configuration says that they are one; correct the "
                "configuration"
            )

    def _check_finite(self, tensor: Tensor, name: str) -> None:
        low_and_high = torch.stack(tensor.aminmax())  # NaN if any is; needs no second tensor of that size
        if not bool(low_and_high.isfinite().all()):
            raise CheckpointError(
                f"{self._path}: tensor {self._layout.name(name)} is not finite as {self._dtype}; use sound weights"
            )


def _superfluous(found: Collection[str], expected: Collection[str], layout: Layout) -> list[str]:
    others = sorted(name for name in found if name not in expected and not layout.ignored(name))
    where = "no place in the model that its configuration describes; use a checkpoint of that model"
    return [f"tensors {_some(others)} have {where}"] if others else []


def _some(things: Sequence[str]) -> str:
    more = f" and {len(things) - _NAMED} more" if len(things) > _NAMED else ""
    return f"{', '.join(things[:_NAMED])}{more}"


def _are(things: Sequence[str]) -> str:
    return "is" if len(things) == 1 else "are"
