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

AHEAD = 3  # drafted tokens that are learned
_DECAY = 0.6  # how much less the next one counts
_FURTHER = 4  # of so many places one is followed beyond the first drafted token, which counts most
_BEGINNINGS = 0.05  # of the places: the memory knows nothing from before, as where drafts begin anew
_PIECE = 32  # rows whose acceptance is looked at together


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
    head: DraftHead, listing: Listing, rows: DraftRows, row: NDArray[np.int64], rng: np.random.Generator
) -> Tensor:
    """How far what is foretold one, two and more tokens ahead is from what the model says and from its hidden states.

    Args:
        head: that drafts.
        listing: of its tokens.
        rows: the model's words.
        row: (batch,) rows to learn from, at each place of which a draft begins.
        rng: picks the places where the memory begins anew, and those that are followed further.
    """
    tokens, wanted = torch.from_numpy(rows.tokens[row]).long(), listing(torch.from_numpy(rows.best[row]))
    hidden = head.normal(torch.from_numpy(rows.hidden[row]).float())  # (batch, time, features)
    count = tokens.shape[1] - AHEAD
    read = head.reads(hidden[:, :count], tokens[:, 1 : count + 1])
    anew = torch.from_numpy(rng.random((len(row), count, 1)) < _BEGINNINGS)
    memory = _memories(head, read, anew).flatten(0, 1)
    read, at = read.flatten(0, 1), torch.arange(len(row) * count) % count
    of, total, weight = torch.arange(len(row) * count) // count, torch.zeros(()), 1.0
    foretold = read
    for step in range(1, AHEAD + 1):
        if step == 2:
            kept = torch.from_numpy(rng.permutation(len(at))[: -(-len(at) // _FURTHER)])
            memory, foretold, at, of = memory[kept], foretold[kept], at[kept], of[kept]
        if step > 1:
            read = head.reads(foretold, tokens[of, at + step])
            memory = head.advance(memory, head.read(read))
        foretold = head.foretell(memory, read)
        total = total + weight * (
            F.cross_entropy(head.logits(foretold).float(), wanted[of, at + step])
            + F.smooth_l1_loss(foretold.float(), hidden[of, at + step])
        )
        weight *= _DECAY
    return total


@torch.no_grad()
def acceptance(head: DraftHead, rows: DraftRows, begin: int, ahead: int = AHEAD) -> list[float]:
    """The share of places where the first, the first two, ... drafted tokens are what the model says greedily.

    Args:
        head: that drafts.
        rows: the model's words, greedy ones.
        begin: the first place that counts, by the token that a draft begins after.
        ahead: drafted tokens at most.
    """
    pieces = [slice(at, at + _PIECE) for at in range(0, len(rows.tokens), _PIECE)]
    found = torch.cat([_right(head, rows, piece, begin, ahead) for piece in pieces])
    return [float(share) for share in found.float().mean(dim=0)]


def _right(head: DraftHead, rows: DraftRows, piece: slice, begin: int, ahead: int) -> Tensor:
    """Whether so many drafted tokens are right, (places, ahead)."""
    tokens, best = (torch.from_numpy(x[piece]).long() for x in (rows.tokens, rows.best))
    count = tokens.shape[1] - ahead
    read = head.reads(head.normal(torch.from_numpy(rows.hidden[piece]).float())[:, :count], tokens[:, 1 : count + 1])
    memory, read = (x[:, begin - 1 :].flatten(0, 1) for x in (_memories(head, read), read))
    right, found, foretold = torch.ones(len(memory), dtype=torch.bool), [], read
    for step in range(1, ahead + 1):
        window = slice(begin - 1 + step, count + step)
        if step > 1:
            read = head.reads(foretold, tokens[:, window].flatten())
            memory = head.advance(memory, head.read(read))
        foretold = head.foretell(memory, read)
        drafted = head.ids[head.logits(foretold)[:, :-1].argmax(dim=-1)]
        right = right & (drafted == best[:, window].flatten())
        found.append(right)
    return torch.stack(found, dim=-1)


def _memories(head: DraftHead, read: Tensor, anew: Tensor | None = None) -> Tensor:
    """The memory after each token of rows.

    Args:
        head: whose memory.
        read: (batch, time, reads).
        anew: (batch, time, 1), where it knows nothing from before.

    Returns:
        (batch, time, width).
    """
    memory, found = read.new_zeros(len(read), head.config.width), list[Tensor]()
    for at, news in enumerate(head.read(read).unbind(dim=1)):
        memory = head.advance(memory if anew is None else memory.masked_fill(anew[:, at], 0.0), news)
        found.append(memory)
    return torch.stack(found, dim=1)
