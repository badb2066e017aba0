"""Weights as the whole numbers that a checkpoint stores for them, so that nobody need round them a second time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["CodeFormat", "CodedWeights", "StoredCodes"]


@dataclass(frozen=True)
class CodeFormat:
    """How a weight's rows are stored as whole numbers.

    Args:
        bits: of one code.
        group: how many neighbours in a row share a scale; the columns, where all do.
        symmetric: whether every zero is the middle code, 2 ** (bits - 1).
        groups: of each column, (columns,), where a group's columns are no neighbours; else None.
    """

    bits: int
    group: int
    symmetric: bool
    groups: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)

    @property
    def ordered(self) -> bool:
        """Whether a group's columns are neighbours."""
        return self.groups is None

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group}{'' if self.ordered else ' in an order of their own'}"


@dataclass(frozen=True, eq=False)
class StoredCodes:
    """A weight: (code - zero) * scale, the last two those of the column's group.

    Args:
        format: what of it is known without its numbers.
        codes: (rows, columns), each below 2 ** bits.
        scales: (rows, groups).
        zeros: (rows, groups).
    """

    format: CodeFormat
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8]

    def dequantize(self) -> NDArray[np.float32]:
        """The float32 weight, (rows, columns)."""
        groups = self.format.groups
        of = np.arange(self.codes.shape[1]) // self.format.group if groups is None else groups
        wide = self.codes.astype(np.float32)
        np.subtract(wide, self.zeros.astype(np.float32)[:, of], out=wide)
        return np.multiply(wide, self.scales[:, of], out=wide)


@runtime_checkable
class CodedWeights(Protocol):
    """Weights of which some are stored as codes; names as :class:`edgellm.streaming.Weights` has them."""

    def code_format(self, name: str) -> CodeFormat | None:
        """How one weight is stored, or None where it is stored as numbers."""
        ...

    def codes(self, name: str) -> StoredCodes:
        """The codes of one weight that has a format."""
        ...
