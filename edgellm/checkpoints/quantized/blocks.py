"""Weights with a scale for each block of them: of all, of a row, of neighbours in a row, or of a rectangle."""

from __future__ import annotations

import torch
from torch import Tensor

from edgellm.errors import CheckpointError

__all__ = ["Block", "block_of", "scaled"]

Block = tuple[int, int]  # rows and columns that share a scale


def block_of(name: str, shape: tuple[int, ...], scale: tuple[int, ...], said: Block | None) -> Block:
    """How many rows and columns of a matrix share each of its scales.

    Args:
        name: of the weight, for the message.
        shape: of the weight.
        scale: of its scales.
        said: what the configuration says of rectangles, whose last ones may be cut off.

    Raises:
        CheckpointError: the two do not belong together.
    """
    if len(shape) == 2:
        rows, columns = shape
        if scale in ((), (1,), (1, 1)):
            return rows, columns
        if scale in ((rows,), (rows, 1)):
            return 1, columns
        if len(scale) == 2 and said is not None and scale == (-(-rows // said[0]), -(-columns // said[1])):
            return said
        if len(scale) == 2 and scale[0] == rows and columns % scale[1] == 0:
            return 1, columns // scale[1]
    raise CheckpointError(f"tensor {name} has shape {shape}, but its scales {scale}; copy the checkpoint again")


def scaled(
    weight: Tensor, scale: Tensor, block: Block, start: int = 0, zero: Tensor | None = None
) -> Tensor:  # fmt: skip
    """(weight - zero) * scale in float32.

    Args:
        weight: (rows, columns), some rows of a matrix.
        scale: of each block of the whole matrix.
        block: see :data:`Block`.
        start: where the rows begin.
        zero: of each block too, or None.
    """
    rows = (torch.arange(len(weight)) + start) // block[0]
    columns = torch.arange(weight.shape[1]) // block[1]
    blocks = (int(rows[-1]) + 1 if len(rows) else 1, int(columns[-1]) + 1 if len(columns) else 1)

    def spread(of: Tensor) -> Tensor:
        grid = of.float().reshape(-1, blocks[1])
        return grid[rows][:, columns] if blocks[1] > 1 else grid[rows]

    wide = weight.float()
    return (wide if zero is None else wide - spread(zero)) * spread(scale)
