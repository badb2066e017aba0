"""A small recurrent head that drafts for a model: it reads the model's last hidden states and the tokens after them.

It foretells the model's next hidden state, and reads what it foretold in the place of the model's as a draft goes on.
Its memory is a matrix that is told, for each place, what came after the place before: where a text comes back to what
it had, the memory gives what followed there. The matrix is written by the delta rule (Schlag et al. 2021,
arXiv:2102.11174), so that many places are read at once (Yang et al. 2024, arXiv:2406.06484). A recurrent head that is
checked is the idea of ReDrafter (Cheng et al. 2024, arXiv:2403.09919), the foretold hidden states that of EAGLE (Li et
al. 2024, arXiv:2401.15077), the short list of frequent tokens that of FR-Spec (Zhao et al. 2025, arXiv:2502.14856).
What it gives is only ever checked by the model, so that it may be wrong at any time. It is kept as a folder of its own.
Nothing here knows an architecture.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellm.errors import CheckpointError, ConfigError

__all__ = [
    "DRAFT_FILES", "DraftHead", "DraftHeadConfig", "Notes", "entries", "load_draft_head", "save_draft_head", "solved",
]  # fmt: skip

_RECORD, _WEIGHTS = "drafter.json", "drafter.safetensors"
DRAFT_FILES = (_RECORD, _WEIGHTS)
_FORMAT = 3


@dataclass(frozen=True)
class DraftHeadConfig:
    """The shape of a :class:`DraftHead`.

    Args:
        features: of the model's last hidden state.
        vocab_size: the model's tokens.
        listed: how many of them it can propose.
        width: of what it bends between reading and foretelling.
        token_width: of what it reads of a token.
        keys: of what a place is known by in its memory.
        values: of what the memory gives for a place.
    """

    features: int
    vocab_size: int
    listed: int
    width: int = 768
    token_width: int = 128
    keys: int = 64
    values: int = 128

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or not 0 < value < 2**31:
                raise ConfigError(f"{field.name} is {value!r}; it must be a positive whole number")
        if self.listed > self.vocab_size:
            raise ConfigError(f"listed is {self.listed}, of {self.vocab_size} tokens; list no more than there are")

    @property
    def state(self) -> int:
        """Numbers that are carried from token to token: the memory, the last key and the foretold hidden state."""
        return self.keys * self.values + self.keys + self.features


class Notes(NamedTuple):
    """What of places goes into a memory.

    Args:
        key: (..., keys), by which the next place is found again, of length 1.
        value: (..., values), what is to be found under the key before.
        rate: (..., 1), how far what is found there moves to that, from 0 to 1.
    """

    key: Tensor
    value: Tensor
    rate: Tensor


class DraftHead(nn.Module):
    """Proposes a token after another, from hidden states and from what it foretells of them.

    Args:
        config: its shape.
    """

    ids: Tensor  # (listed,) int64: the tokens that it can propose
    shift: Tensor  # (features,): hidden states are read and foretold less this,
    scale: Tensor  # (features,): in parts of this

    def __init__(self, config: DraftHeadConfig) -> None:
        super().__init__()
        c = self.config = config
        self.register_buffer("ids", torch.arange(c.listed))
        self.register_buffer("shift", torch.zeros(c.features))
        self.register_buffer("scale", torch.ones(c.features))
        self.embedding = nn.Embedding(c.vocab_size, c.token_width)
        self.embedding.weight.requires_grad_(False)  # a model's own table, made narrow: too large to be learned again
        reads = c.features + c.token_width
        self.notes = nn.Linear(reads, c.keys + c.values + 1)
        self.up = nn.Linear(reads + c.values, c.width)
        self.down = nn.Linear(c.width + reads + c.values, c.features)
        self.head = nn.Linear(c.features, c.listed)
        self.rest = nn.Linear(c.features, 1)  # for all tokens that are not listed

    def normal(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., features) as they are read and foretold."""
        return (hidden - self.shift) / self.scale

    def reads(self, given: Tensor, tokens: Tensor) -> Tensor:
        """What is read (..., features + token_width): a normal hidden state (..., features) and the token after it."""
        return torch.cat([given, self.embedding(tokens)], dim=-1)

    def note(self, read: Tensor) -> Notes:
        """What of a place goes into the memory."""
        keys, values = self.config.keys, self.config.values
        key, value, rate = torch.split(self.notes(read).float(), [keys, values, 1], dim=-1)
        return Notes(key * (key.square().sum(dim=-1, keepdim=True) + 1e-6).rsqrt(), value, rate.sigmoid())

    def foretell(self, read: Tensor, recalled: Tensor) -> Tensor:
        """The next normal hidden state (..., features), by what was read last and what the memory gives for it."""
        known = torch.cat([read, recalled], dim=-1)
        found: Tensor = self.down(torch.cat([F.silu(self.up(known)), known], dim=-1))
        return found

    def logits(self, foretold: Tensor, places: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Of the listed tokens and, behind them, of all others together.

        Args:
            foretold: (..., features).
            places: (columns,), of the listed tokens those that count; None: all.
            shift: (columns,), is added to their logits.

        Returns:
            (..., columns + 1).
        """
        if places is None:
            return torch.cat([self.head(foretold), self.rest(foretold)], dim=-1)
        bias = self.head.bias[places]
        listed = F.linear(foretold, self.head.weight[places], bias if shift is None else bias + shift)
        return torch.cat([listed, self.rest(foretold)], dim=-1)

    def forward(self, hidden: Tensor, token: Tensor, first: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Some tokens read, and one drafted.

        Args:
            hidden: (batch, time, features), what each token was chosen from; without meaning for a drafted one.
            token: (batch, time) int64, at most 8 of them.
            first: (batch, 1), 1 where the model has chosen the tokens, and 0 where the only one was drafted.
            state: (batch, state), from the token before; zeros where a text begins.

        Returns:
            The token after the last (batch,), how probable it is to be right (batch,), and the new state.
        """
        c = self.config
        memory, before, foretold = torch.split(state, [c.keys * c.values, c.keys, c.features], dim=-1)
        memory, by = memory.reshape(-1, c.keys, c.values), first[:, None]
        read = self.reads(by * self.normal(hidden) + (1 - by) * foretold[:, None], token)
        notes = self.note(read)
        keys = torch.cat([before[:, None], notes.key], dim=1)[:, :-1]  # of the place before each
        memory = memory + keys.transpose(1, 2) @ entries(notes, keys, keys @ memory, _few_solved)
        last = notes.key[:, -1:]  # (batch, 1, keys)
        foretold = self.foretell(read[:, -1], (last @ memory)[:, 0])
        chances = self.logits(foretold).softmax(dim=-1)
        best, at = chances[:, :-1].max(dim=-1)
        state = torch.cat([memory.flatten(1), last[:, 0], foretold], dim=-1)
        return self.ids.index_select(0, at), best, state

    @torch.no_grad()
    def start_from(self, table: Tensor, head: Tensor, shift: Tensor, scale: Tensor) -> None:
        """Begin with what a model knows: its table of tokens made narrow, and its projection to the listed tokens.

        Args:
            table: (vocab_size, any), what the model reads of each token.
            head: (vocab_size, features), what it projects its last hidden state with.
            shift: (features,) the mean of a hidden state.
            scale: (features,) its deviation from that.
        """
        narrow = table @ _directions(table, self.config.token_width)
        self.embedding.weight.zero_()
        self.embedding.weight[:, : narrow.shape[1]] = narrow / narrow.std().clamp_min(1e-6)
        self.shift.copy_(shift)
        self.scale.copy_(scale)
        rows = head[self.ids]
        self.head.weight.copy_(rows * scale)
        self.head.weight.requires_grad_(False)  # what is foretold is to be the model's own hidden state
        self.head.bias.copy_(rows @ shift)
        self.head.bias.requires_grad_(False)
        self.rest.weight.zero_()
        self.rest.bias.copy_(self.head.bias.mean())
        self.notes.weight[-1].zero_()
        self.notes.bias[-1] = 1.0


def entries(notes: Notes, keys: Tensor, known: Tensor, solve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What places add to a memory under their keys, each by what those before it have left there.

    Args:
        notes: of the places (batch, time).
        keys: (batch, time, keys), that each one's value goes under.
        known: (batch, time, values), what the memory gave for these before the first place.
        solve: gives X of ``(1 + A) X = B`` for A (batch, time, time), which is 0 on and above its diagonal.

    Returns:
        (batch, time, values).
    """
    overlap = (notes.rate * (keys @ keys.transpose(1, 2))).tril(-1)
    return solve(overlap, notes.rate * (notes.value - known))


def solved(overlap: Tensor, wanted: Tensor) -> Tensor:
    """X of ``(1 + overlap) X = wanted``, for any number of places."""
    found: Tensor = torch.linalg.solve_triangular(overlap, wanted, upper=False, unitriangular=True)
    return found


def _few_solved(overlap: Tensor, wanted: Tensor) -> Tensor:
    """The same by products alone, for graphs: ``1/(1 + A) = (1 - A) (1 + A^2) (1 + A^4)`` for 8 places, as A^8 is 0."""
    square = overlap @ overlap
    found = wanted + square @ (square @ wanted)
    found = found + square @ found
    return found - overlap @ found


def _directions(rows: Tensor, most: int) -> Tensor:
    """Directions (features, at most ``most``) in which rows are largest."""
    _, vectors = torch.linalg.eigh((rows.T @ rows).double())
    found: Tensor = vectors.flip(1)[:, :most].float()
    return found


def save_draft_head(head: DraftHead, directory: Path, about: dict[str, Any]) -> None:
    """Write a head into a folder, the record last.

    Args:
        head: which.
        directory: is made if it is not there.
        about: of how it was trained, for people.
    """
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    pending = directory / f"{_WEIGHTS}.tmp"
    save_file({name: tensor.contiguous() for name, tensor in head.state_dict().items()}, pending)
    pending.replace(directory / _WEIGHTS)
    record = {"format": _FORMAT, "config": dataclasses.asdict(head.config), "about": about}
    pending = directory / f"{_RECORD}.tmp"
    pending.write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")
    pending.replace(directory / _RECORD)


def load_draft_head(directory: Path) -> DraftHead:
    """Read what :func:`save_draft_head` wrote.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    from safetensors.torch import load_file

    record = directory / _RECORD
    if not record.is_file():
        raise CheckpointError(f"{directory} holds no drafter; 'edgellm train --drafter' writes such a folder")
    try:
        data = json.loads(record.read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise ValueError(f"format {data['format']!r}, not {_FORMAT}")
        head = DraftHead(DraftHeadConfig(**data["config"]))
        head.load_state_dict(load_file(directory / _WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ConfigError) as error:
        raise CheckpointError(f"{directory}: no drafter that can be read ({error}); train it again") from error
    vocab, finite = head.config.vocab_size, all(bool(p.isfinite().all()) for p in head.parameters())
    if not finite or not 0 <= int(head.ids.min()) <= int(head.ids.max()) < vocab:
        raise CheckpointError(f"{directory}: its weights or tokens are none; train it again")
    return head.eval()
