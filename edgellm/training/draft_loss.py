"""How well a drafter foretells a model, and the loss that makes it do so."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edgellm.draft_head import DraftHead, entries, solved
from edgellm.training.draft_rows import DraftRows

__all__ = ["AHEAD", "Columns", "Listing", "acceptance", "draft_loss"]

AHEAD = 3  # drafted tokens that are learned
_DECAY = 0.6  # how much less the next one counts
_PLACES, _FURTHER = 64, 4  # of a row in one update; of so many one is followed beyond the first drafted token
_BEGINNINGS = 0.6  # the part of a row in which its memory may begin, as drafts begin within a text
_OFTEN, _OTHERS = 512, 512  # listed tokens that each update projects to: the most frequent, and some of the others
_PIECE = 32  # rows whose acceptance is looked at together


class Columns:
    """Listed tokens that an update projects to.

    Args:
        places: (columns,) of these among the listed ones, each once.
        shift: (columns,) added to their logits: one that stands for several that were not drawn counts as these.
        listed: how many there are.
    """

    def __init__(self, places: Tensor, shift: Tensor, listed: int) -> None:
        self.places, self.shift = places, shift
        self._columns = torch.full((listed + 1,), len(places), dtype=torch.int64)
        self._columns[places] = torch.arange(len(places))

    def __call__(self, places: Tensor) -> Tensor:
        """Columns of places among the listed tokens; all tokens that are not listed have the one behind the last."""
        return self._columns[places]


class Listing:
    """From tokens to their places among those that a drafter lists; all others have the place behind the last.

    Args:
        ids: (listed,) the tokens.
        counts: (vocab_size,) how frequent each is.
    """

    def __init__(self, ids: Tensor, counts: NDArray[np.float64]) -> None:
        self._places = torch.full((len(counts),), len(ids), dtype=torch.int64)
        self._places[ids] = torch.arange(len(ids))
        order = torch.from_numpy(np.argsort(-counts[ids.numpy()], kind="stable").copy())
        self._often, self._others, self._listed = order[:_OFTEN], order[_OFTEN:], len(ids)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Places of tokens of any shape."""
        return self._places[tokens.long()]

    def columns(self, wanted: Tensor, rng: np.random.Generator) -> Columns:
        """Tokens for one update: the frequent ones, those that are right somewhere, and some of all others.

        Args:
            wanted: places of the right ones.
            rng: draws the others.
        """
        drawn = self._others[torch.from_numpy(rng.permutation(len(self._others))[:_OTHERS])]
        shift = torch.full((self._listed + 1,), math.log(max(len(self._others), 1) / max(len(drawn), 1)))
        shift[self._often], shift[wanted] = 0.0, 0.0
        places = torch.unique(torch.cat([self._often, drawn, wanted.flatten()]))
        places = places[places < self._listed]
        return Columns(places, shift[places], self._listed)


class _Drafts:
    """Drafts that begin at places of rows, all of them at once.

    Args:
        head: that drafts.
        read: (batch, time, reads), what it reads at each place of the rows.
        begins: (batch,) the place that each row's memory begins with; before it, and there, it knows nothing.
        at: (batch, places), where drafts begin.
    """

    def __init__(self, head: DraftHead, read: Tensor, begins: Tensor, at: Tensor) -> None:
        notes, places = head.note(read), torch.arange(read.shape[1])
        keys = F.pad(notes.key[:, :-1], (0, 0, 1, 0)).masked_fill((places <= begins[:, None])[..., None], 0.0)
        self._keys, self._added = keys, entries(notes, keys, torch.zeros_like(notes.value), solved)
        self._head, self._own = head, list[tuple[Tensor, Tensor]]()  # what drafts have added: keys and entries
        self.at, self.foretold = at, read
        self._key, self._read = _at(notes.key, at), _at(read, at)

    def keep(self, count: int) -> None:
        """Go on with so many of each row's places."""
        self.at, self._key, self._read, self.foretold = (
            x[:, :count] for x in (self.at, self._key, self._read, self.foretold)
        )

    def foretell(self) -> Tensor:
        """The next normal hidden state at each place, (batch, places, features)."""
        self.foretold = self._head.foretell(self._read, self._recall(self._key))
        return self.foretold

    def go_on(self, tokens: Tensor) -> None:
        """Read what was foretold, and the tokens (batch, places) after it."""
        self._read = self._head.reads(self.foretold.float(), tokens)
        notes = self._head.note(self._read)
        self._own.append((self._key, notes.rate * (notes.value - self._recall(self._key))))
        self._key = notes.key

    def _recall(self, key: Tensor) -> Tensor:
        """What the memories give for keys (batch, places, keys)."""
        seen = torch.arange(self._keys.shape[1]) <= self.at[..., None]
        found: Tensor = (key @ self._keys.transpose(1, 2) * seen) @ self._added
        for own, added in self._own:
            found = found + (key * own).sum(dim=-1, keepdim=True) * added
        return found


def draft_loss(
    head: DraftHead, listing: Listing, rows: DraftRows, row: NDArray[np.int64], rng: np.random.Generator
) -> Tensor:
    """How far what is foretold one, two and more tokens ahead is from what the model says and from its hidden states.

    Args:
        head: that drafts.
        listing: of its tokens.
        rows: the model's words.
        row: (batch,) rows to learn from.
        rng: picks the places where drafts begin, those where the memory does, and the tokens that are told apart.
    """
    tokens, wanted = torch.from_numpy(rows.tokens[row]).long(), listing(torch.from_numpy(rows.best[row]))
    hidden = head.normal(torch.from_numpy(rows.hidden[row]).float())  # (batch, time, features)
    count = tokens.shape[1] - AHEAD
    at = torch.from_numpy(rng.permuted(np.tile(np.arange(count), (len(row), 1)), axis=1)[:, :_PLACES])
    begins = torch.from_numpy(rng.integers(0, max(int(_BEGINNINGS * count), 1), len(row)))
    further = -(-at.shape[1] // _FURTHER)
    right = [wanted.gather(1, at + 1)] + [wanted.gather(1, at[:, :further] + ahead) for ahead in range(2, AHEAD + 1)]
    columns = listing.columns(torch.cat([places.flatten() for places in right]), rng)
    with torch.autocast("cpu", enabled=False):
        drafts = _Drafts(head, head.reads(hidden[:, :count], tokens[:, 1 : count + 1]), begins, at)
    total, weight = torch.zeros(()), 1.0
    for ahead in range(1, AHEAD + 1):
        if ahead == 2:
            drafts.keep(further)
        if ahead > 1:
            with torch.autocast("cpu", enabled=False):
                drafts.go_on(tokens.gather(1, drafts.at + ahead))
        true = _at(hidden, drafts.at + ahead)
        total = total + weight * _told(head, drafts.foretell(), true, columns, columns(right[ahead - 1]))
        weight *= _DECAY
    return total


def _told(head: DraftHead, foretold: Tensor, true: Tensor, columns: Columns, wanted: Tensor) -> Tensor:
    """How far hidden states are from the true ones: as they are, by the tokens that follow, and by all chances."""
    near, logits = F.smooth_l1_loss(foretold.float(), true), head.logits(foretold, columns.places, columns.shift)
    hard = F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten())
    if head.head.weight.requires_grad:  # it is not the model's own projection, which would say all chances
        return near + hard
    with torch.no_grad():
        chances = head.logits(true, columns.places, columns.shift)[..., :-1].float().softmax(dim=-1)
    soft = -(chances * logits[..., :-1].float().log_softmax(dim=-1)).sum(dim=-1).mean()
    return near + 0.5 * hard + 0.5 * soft


@torch.no_grad()
def acceptance(head: DraftHead, rows: DraftRows, begin: int, ahead: int = AHEAD) -> list[float]:
    """The share of places where the first, the first two, ... drafted tokens are what the model says greedily.

    Args:
        head: that drafts.
        rows: the model's words, greedy ones.
        begin: the first place that counts, by the token that a draft begins after; the memory begins there too.
        ahead: drafted tokens at most.
    """
    pieces = [slice(at, at + _PIECE) for at in range(0, len(rows.tokens), _PIECE)]
    found = torch.cat([_right(head, rows, piece, begin, ahead) for piece in pieces])
    return [float(share) for share in found.float().mean(dim=(0, 1))]


def _right(head: DraftHead, rows: DraftRows, piece: slice, begin: int, ahead: int) -> Tensor:
    """Whether so many drafted tokens are right, (batch, places, ahead)."""
    tokens, best = (torch.from_numpy(x[piece]).long() for x in (rows.tokens, rows.best))
    count = tokens.shape[1] - ahead
    read = head.reads(head.normal(torch.from_numpy(rows.hidden[piece]).float())[:, :count], tokens[:, 1 : count + 1])
    at = torch.arange(begin - 1, count).expand(len(tokens), -1)
    drafts = _Drafts(head, read, torch.full((len(tokens),), begin - 1), at)
    right, found = torch.ones(at.shape, dtype=torch.bool), []
    for step in range(1, ahead + 1):
        if step > 1:
            drafts.go_on(tokens.gather(1, at + step))
        drafted = head.ids[head.logits(drafts.foretell())[..., :-1].argmax(dim=-1)]
        right = right & (drafted == best.gather(1, at + step))
        found.append(right)
    return torch.stack(found, dim=-1)


def _at(rows: Tensor, places: Tensor) -> Tensor:
    """What stands at places (batch, places) of rows (batch, time, any)."""
    return rows.gather(1, places[..., None].expand(-1, -1, rows.shape[-1]))
