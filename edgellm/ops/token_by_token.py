"""What a token does depends on what the tokens before it left: one step after the other, a Scan in a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from edgellm.ops.canonical import capturing

__all__ = ["token_by_token"]

Step = Callable[..., Sequence[Tensor]]


def token_by_token(
    step: Step, states: Sequence[Tensor], rows: Sequence[Tensor], weights: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """Take a step for each token of a chunk.

    It is for recurrences that have no form over a whole chunk, or whose form would hold more than the state. A captured
    graph has one ONNX Scan, whose body is the step; otherwise PyTorch loops.

    Args:
        step: takes the states, a token of each of the rows and the weights; gives the new states, then what the token
            gives. It is written in plain tensor arithmetic and reads no other tensors.
        states: each (batch, ...), as the tokens before left them.
        rows: each (batch, time, ...).
        weights: what the step needs of the model.

    Returns:
        The states after the last token, then what the tokens gave, each (batch, time, ...).
    """
    if capturing():
        return _scan(step, states, rows, weights)
    count, given = len(states), []
    for t in range(rows[0].shape[1]):
        states, *results = _split(step(*states, *(row[:, t] for row in rows), *weights), count)
        given.append(results)
    return (*states, *(torch.stack(each, dim=1) for each in zip(*given, strict=True)))


def _split(found: Sequence[Tensor], count: int) -> tuple[Sequence[Tensor], *tuple[Tensor, ...]]:
    return found[:count], *found[count:]


def _scan(
    step: Step, states: Sequence[Tensor], rows: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    def body(*values: Tensor) -> list[Tensor]:
        found = step(*values)  # PyTorch wants no result to be another one, or what was given
        return [*found[: len(states)], *(x.clone() for x in found[len(states) :])]

    found: Sequence[Tensor] = torch.ops.higher_order.scan(
        body, list(states), [x.transpose(0, 1) for x in rows], tuple(weights)
    )
    return (*found[: len(states)], *(x.transpose(0, 1) for x in found[len(states) :]))
