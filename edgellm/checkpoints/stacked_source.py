"""Tensors that hold one matrix for each of several modules, such as experts, read as so many matrices."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from edgellm.checkpoints.weights import TensorSource

__all__ = ["StackedSource"]

_MOST = 4096  # matrices of one tensor; what says that it has more stays one, and is refused as unknown


class StackedSource:
    """A source in which ``a.weight`` of shape (count, rows, columns) is ``a.0.weight`` to ``a.<count - 1>.weight``.

    Args:
        base: the tensors.
        endings: of the names of those that are read so.
    """

    def __init__(self, base: TensorSource, endings: tuple[str, ...]) -> None:
        self._base = base
        self._places: dict[str, tuple[str, int]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in base.shapes.items():
            if name.endswith(endings) and len(shape) == 3 and shape[0] <= _MOST:
                stem, _, last = name.rpartition(".")
                each = {f"{stem}.{i}.{last}": (name, i) for i in range(shape[0])}
                self._places |= each
                self._shapes |= dict.fromkeys(each, shape[1:])
            else:
                self._shapes[name] = shape

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        return self._shapes

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor, or some of its rows; of a tensor that holds several, no other is read."""
        if name not in self._places:
            return self._base.read(name, rows)
        stored, number = self._places[name]
        matrix = self._base.read(stored, (number, number + 1))[0]
        return matrix if rows is None else matrix[rows[0] : rows[1]]
