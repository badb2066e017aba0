"""A checkpoint's tensors by the names of our parameters, each read and checked when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from edgellm.errors import CheckpointError

__all__ = ["CheckpointWeights", "Layout", "TensorSource"]


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
    """

    name: Callable[[str], str] = _same
    tensor: Callable[[str, Tensor], Tensor] = _as_stored
    ignored: Callable[[str], bool] = lambda _: False


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
        _check_no_others(found, {layout.name(name) for group in groups for name in group}, layout, path)
        self._stored: dict[str, list[str]] = {}
        for group in groups:
            stored = [name for name in group if layout.name(name) in found]
            self._check_shapes(group[0], stored, found)
            self._stored |= dict.fromkeys(group, stored)
        self._sound: set[str] = set()  # stored names that were read whole and found to be finite

    def _check_shapes(self, name: str, stored: Sequence[str], found: Mapping[str, tuple[int, ...]]) -> None:
        shape, path, layout = self._shapes[name], self._path, self._layout
        if not stored:
            raise CheckpointError(
                f"{path}: tensor {layout.name(name)} of shape {shape} is missing; the checkpoint is incomplete"
            )
        for other in stored:
            if (there := found[layout.name(other)]) != shape:
                raise CheckpointError(
                    f"{path}: tensor {layout.name(other)} has shape {there}, its configuration says {shape}; the two "
                    "do not belong together"
                )

    def read(self, name: str) -> Tensor:
        """One tensor, in our layout.

        Args:
            name: what the model calls it.

        Raises:
            CheckpointError: it cannot be read, is not finite, or differs under two names that mean one tensor.
        """
        first, *others = self._stored[name]
        tensor = self._layout.tensor(first, self._source.read(self._layout.name(first)))
        if first not in self._sound:
            for other in others:
                self._check_equal(tensor, self._layout.tensor(other, self._source.read(self._layout.name(other))), name)
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

    def _is_stored_by_rows(self, name: str) -> bool:
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


def _check_no_others(found: Collection[str], expected: Collection[str], layout: Layout, path: Path) -> None:
    others = sorted(name for name in found if name not in expected and not layout.ignored(name))
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise CheckpointError(
            f"{path}: tensors {', '.join(others[:3])}{more} have no place in the model that its configuration "
            "describes; use a checkpoint of that model"
        )
