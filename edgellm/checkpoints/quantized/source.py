"""A source whose quantized weights read as floats, under the names that they would have unquantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from edgellm.checkpoints.weights import TensorSource
from edgellm.codes import CodeFormat, StoredCodes
from edgellm.errors import CheckpointError

__all__ = ["PackedWeight", "QuantizedSource", "RawSource", "Rows", "part"]

Rows = tuple[int, int] | None


class RawSource(TensorSource, Protocol):
    """A source that also gives what is no float."""

    def dtype_of(self, name: str) -> str:
        """What a tensor is stored in, as safetensors names it: ``I8``, ``U8``, ``F8_E4M3``."""
        ...

    def raw(self, name: str, rows: Rows = None) -> Tensor:
        """One tensor in whatever dtype it is stored, or the rows from one index up to another.

        Raises:
            CheckpointError: it cannot be read.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """One weight, and the stored tensors that make it.

    Args:
        shape: of the weight.
        parts: names of the stored tensors.
        floats: reads it as floats, or some of its rows; None where ``codes`` says all.
        codes: reads its codes, or those of some rows; None where it has none.
        format: of the codes, looked up without reading them; None with them.
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    floats: Callable[[Rows], Tensor] | None = None
    codes: Callable[[Rows], StoredCodes] | None = None
    format: Callable[[], CodeFormat] | None = None

    def read(self, rows: Rows) -> Tensor:
        """Its numbers in float32, or those of some rows."""
        if self.floats is not None:
            return self.floats(rows)
        assert self.codes is not None
        return torch.from_numpy(self.codes(rows).dequantize())


class QuantizedSource:
    """The tensors of a quantized checkpoint as a float one would have them.

    Args:
        stored: what the files hold.
        weights: by the name of the float tensor.
        ignored: stored tensors that mean nothing to weights, such as scales of what layers read.
    """

    def __init__(self, stored: RawSource, weights: Mapping[str, PackedWeight], ignored: frozenset[str]) -> None:
        self._stored, self._weights = stored, weights
        gone = ignored.union(*(weight.parts for weight in weights.values()))
        self._plain = {name: shape for name, shape in stored.shapes.items() if name not in gone or name in weights}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        return {**self._plain, **{name: weight.shape for name, weight in self._weights.items()}}

    def read(self, name: str, rows: Rows = None) -> Tensor:
        """One tensor as floats, or the rows from one index up to another."""
        weight = self._weights.get(name)
        return self._stored.read(name, rows) if weight is None else weight.read(rows)

    def code_format(self, name: str) -> CodeFormat | None:
        """See :class:`edgellm.codes.CodedWeights`."""
        weight = self._weights.get(name)
        return None if weight is None or weight.format is None else weight.format()

    def codes(self, name: str) -> StoredCodes:
        """See :class:`edgellm.codes.CodedWeights`."""
        read = self._weights[name].codes
        assert read is not None
        return read(None)


def part(stored: RawSource, name: str) -> tuple[int, ...]:
    """The shape of a stored tensor that a weight is made of.

    Raises:
        CheckpointError: it is not there.
    """
    if name not in stored.shapes:
        raise CheckpointError(f"tensor {name} is missing, so the checkpoint is incomplete")
    return stored.shapes[name]
