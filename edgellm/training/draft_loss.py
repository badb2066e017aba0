"""How well a drafter foretells a model, and the loss that makes it do so."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edgellm.draft_head import DraftHead
from edgellm.training.draft_rows import DraftRows

__all__ = ["AHEAD", "Listing", "acceptance", "draft_loss"]

AHEAD = 3  # drafted tokens that are learned at each place
_DECAY = 0.8  # how much less the next one counts
_HARD = 0.5  # of the loss: the likeliest token alone; the rest of it is its probabilities


class Listing:
    """From tokens to their places among those that a drafter lists; all others have the place behind the last.

    Args:
        ids: (listed,) the tokens.
        vocab_size: of the model.
    """

    def __init__(self, ids: Tensor, vocab_size: int) -> None:
        self._places = torch.full((vocab_size,), len(ids), dtype=torch.int64)
        self._places[ids] = torch.arange(len(ids))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Places of tokens of any shape."""
        return self._places[tokens.long()]


def draft_loss(
    head: DraftHead, listing: Listing, rows: DraftRows, row: NDArray[np.int64], at: NDArray[np.int64]
) -> Tensor:
    """The mean cross-entropy of what the model says after some places, one, two and more tokens further on.

    Args:
        head: that drafts.
        listing: of its tokens.
        rows: the model's words.
        row: (batch,) of the places.
        at: (batch,) token in the row; ``AHEAD`` tokens follow.
    """
    state, total, weight = head.begin(_float(rows.hidden[row, at])), torch.zeros(()), 1.0
    for step in range(1, AHEAD + 1):
        state = head.advance(state, torch.from_numpy(rows.tokens[row, at + step]).long())
        logs = F.log_softmax(head.logits(state), dim=-1)
        places = listing(torch.from_numpy(rows.ids[row, at + step]))  # (batch, choices)
        chances = _float(rows.chances[row, at + step])
        soft = chances / chances.sum(dim=-1, keepdim=True)
        found = logs.gather(-1, places)
        total = total - weight * (_HARD * found[:, 0] + (1 - _HARD) * (soft * found).sum(dim=-1)).mean()
        weight *= _DECAY
    return total


@torch.no_grad()
def acceptance(head: DraftHead, rows: DraftRows, ahead: int = AHEAD) -> list[float]:
    """The share of places where the first, the first two, ... drafted tokens are what the model says greedily.

    Args:
        head: that drafts.
        rows: the model's words, greedy ones.
        ahead: drafted tokens at most.
    """
    count, time = rows.tokens.shape
    row, at = (grid.reshape(-1) for grid in np.meshgrid(np.arange(count), np.arange(time - ahead), indexing="ij"))
    state = head.begin(_float(rows.hidden[row, at]))
    right, found = torch.ones(len(row), dtype=torch.bool), []
    for step in range(1, ahead + 1):
        state = head.advance(state, torch.from_numpy(rows.tokens[row, at + step]).long())
        drafted = head.ids[head.logits(state)[:, :-1].argmax(dim=-1)]
        right &= drafted == torch.from_numpy(rows.ids[row, at + step, 0]).long()
        found.append(float(right.float().mean()))
    return found


def _float(array: NDArray[np.float16]) -> Tensor:
    return torch.from_numpy(array).float()
