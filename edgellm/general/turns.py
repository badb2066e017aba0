"""Rotations as attention has them inside: two halves of a head, after its features are put in another order.

Families rotate all features of a head or its first ones, and pair a feature with the one half a turn away or with its
neighbour. One order of features, the same for queries and keys, leaves every score as it is and makes each of these
the rotation of two halves; features that do not turn have angles of 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgellm.general.recognise import Rotation

__all__ = ["Turn", "find_turn"]


@dataclass(frozen=True, eq=False)
class Turn:
    """A way to turn heads by a table.

    Args:
        rotation: the table.
        columns: of the table, one for each pair of features.
        order: which feature of a head comes at each place; the first half's are paired with the second half's.
    """

    rotation: Rotation
    columns: slice
    order: tuple[int, ...]

    def tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the first positions, (positions, head_dim / 2)."""
        cos, sin = (table[:positions, self.columns] for table in (self.rotation.cos, self.rotation.sin))
        still = (cos.shape[0], len(self.order) // 2 - cos.shape[1])
        return torch.cat([cos, torch.ones(still)], dim=1), torch.cat([sin, torch.zeros(still)], dim=1)

    def turned(self, x: Tensor) -> Tensor:
        """X (batch, heads, time, head_dim) turned, in the order that it came in."""
        cos, sin = self.tables(x.shape[2])
        first, second = x[..., list(self.order)].chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        back = torch.tensor(self.order).argsort()
        return turned[..., back]

    @property
    def key(self) -> tuple[object, ...]:
        """What two turns that are the same agree in."""
        return self.rotation.name, self.rotation.key, self.columns.start, self.columns.step, self.order

    @property
    def reorders(self) -> bool:
        """Whether features change their places at all."""
        return self.order != tuple(range(len(self.order)))


def find_turn(pairs: Sequence[tuple[Tensor, Tensor]], every: Sequence[Rotation], close: float) -> Turn | None:
    """The first turn that makes the second of each pair of the first.

    Args:
        pairs: tensors (batch, heads, time, head_dim), before and after.
        every: tables that there are.
        close: largest difference.
    """
    for rotation in every:
        for turn in _turns(rotation, pairs[0][0].shape[-1]):
            if all(torch.allclose(turn.turned(a), b, rtol=0, atol=close) for a, b in pairs):
                return turn
    return None


def _turns(rotation: Rotation, head_dim: int) -> Iterator[Turn]:
    """Every turn of a head's first features by a table."""
    width = rotation.cos.shape[1]
    tables = (rotation.cos, rotation.sin)
    if head_dim % 2 or width > head_dim:
        return
    layouts = [(slice(0, width, 1), width)]  # of angles: each once, twice as two halves, or twice as neighbours
    if width % 2 == 0 and all(torch.equal(t[:, : width // 2], t[:, width // 2 :]) for t in tables):
        layouts.append((slice(0, width // 2, 1), width // 2))
    if width % 2 == 0 and all(torch.equal(t[:, ::2], t[:, 1::2]) for t in tables):
        layouts.append((slice(0, width, 2), width // 2))
    for columns, count in layouts:
        if 2 * count > head_dim:
            continue
        for first, second in (
            (range(count), range(count, 2 * count)),
            (range(0, 2 * count, 2), range(1, 2 * count, 2)),
        ):
            still = range(2 * count, head_dim)
            middle = len(still) // 2
            yield Turn(rotation, columns, (*first, *still[:middle], *second, *still[middle:]))
