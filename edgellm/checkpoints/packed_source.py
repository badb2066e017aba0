"""Tensors whose rows are those of several matrices, such as queries, keys and values, read as each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from edgellm.checkpoints.weights import TensorSource
from edgellm.codes import CodedWeights, CodeFormat, StoredCodes

__all__ = ["PackedSource"]


class PackedSource:
    """A source in which ``a.qkv.weight`` of shape (rows, columns) is ``a.q.weight``, ``a.k.weight`` and so on.

    Args:
        base: the tensors.
        packed: by the last parts of a module's name, the last parts of the modules that it stands for, first to last,
            and how many rows each has. A tensor of another number of rows stays as it is, and is refused as unknown.
    """

    def __init__(self, base: TensorSource, packed: Mapping[str, Mapping[str, int]]) -> None:
        self._base = base
        self._places: dict[str, tuple[str, int, int]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in base.shapes.items():
            module, _, last = name.rpartition(".")
            ending = next((ending for ending in packed if module == ending or module.endswith(f".{ending}")), None)
            if ending is None or not shape or shape[0] != sum(packed[ending].values()):
                self._shapes[name] = shape
                continue
            start = 0
            for part, rows in packed[ending].items():
                own = f"{module.removesuffix(ending)}{part}.{last}"
                self._places[own], self._shapes[own] = (name, start, start + rows), (rows, *shape[1:])
                start += rows

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        return self._shapes

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor, or some of its rows; of a tensor that holds several, no other is read."""
        if name not in self._places:
            return self._base.read(name, rows)
        stored, start, stop = self._places[name]
        return self._base.read(stored, (start, stop) if rows is None else (start + rows[0], start + rows[1]))

    def code_format(self, name: str) -> CodeFormat | None:
        """As :class:`edgellm.codes.CodedWeights`."""
        if not isinstance(self._base, CodedWeights):
            return None
        return self._base.code_format(self._places[name][0] if name in self._places else name)

    def codes(self, name: str) -> StoredCodes:
        """See :class:`edgellm.codes.CodedWeights`."""
        assert isinstance(self._base, CodedWeights)
        if name not in self._places:
            return self._base.codes(name)
        stored, start, stop = self._places[name]
        whole, rows = self._base.codes(stored), slice(start, stop)
        return replace(whole, codes=whole.codes[rows], scales=whole.scales[rows], zeros=whole.zeros[rows])
