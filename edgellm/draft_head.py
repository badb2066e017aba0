"""A small recurrent head that drafts for a model: a GRU over its last hidden states and the tokens after them.

It foretells the model's next hidden state, and reads what it foretold in the place of the model's as a draft goes on.
ReDrafter (Cheng et al. 2024, arXiv:2403.09919) is the idea, the foretold hidden states that of EAGLE (Li et al. 2024,
arXiv:2401.15077), the short list of frequent tokens that of FR-Spec (Zhao et al. 2025, arXiv:2502.14856). What it gives
is only ever checked by the model, so that it may be wrong at any time. It is kept as a folder of its own. Nothing here
knows an architecture.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellm.errors import CheckpointError, ConfigError

__all__ = ["DRAFT_FILES", "DraftHead", "DraftHeadConfig", "load_draft_head", "save_draft_head"]

_RECORD, _WEIGHTS = "drafter.json", "drafter.safetensors"
DRAFT_FILES = (_RECORD, _WEIGHTS)
_FORMAT = 2


@dataclass(frozen=True)
class DraftHeadConfig:
    """The shape of a :class:`DraftHead`.

    Args:
        features: of the model's last hidden state.
        vocab_size: the model's tokens.
        listed: how many of them it can propose.
        width: of its memory.
        token_width: of what it reads of a token.
    """

    features: int
    vocab_size: int
    listed: int
    width: int = 384
    token_width: int = 128

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or not 0 < value < 2**31:
                raise ConfigError(f"{field.name} is {value!r}; it must be a positive whole number")
        if self.listed > self.vocab_size:
            raise ConfigError(f"listed is {self.listed}, of {self.vocab_size} tokens; list no more than there are")

    @property
    def state(self) -> int:
        """Numbers that are carried from token to token: the memory, and the foretold hidden state."""
        return self.width + self.features


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
        self.read = nn.Linear(reads, 3 * c.width)
        self.keep = nn.Linear(c.width, 3 * c.width)
        self.up = nn.Linear(c.width + reads, c.width)
        self.down = nn.Linear(c.width + reads, c.features)
        self.head = nn.Linear(c.features, c.listed)
        self.rest = nn.Linear(c.features, 1)  # for all tokens that are not listed

    def normal(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., features) as they are read and foretold."""
        return (hidden - self.shift) / self.scale

    def reads(self, given: Tensor, tokens: Tensor) -> Tensor:
        """What is read (..., features + token_width): a normal hidden state (..., features) and the token after it."""
        return torch.cat([given, self.embedding(tokens)], dim=-1)

    def advance(self, memory: Tensor, news: Tensor) -> Tensor:
        """The memory (batch, width) after news of what was read; a GRU's, with the reset gate behind the product."""
        read, kept = news.chunk(3, dim=-1), self.keep(memory).chunk(3, dim=-1)
        update = (read[1] + kept[1]).sigmoid()
        new = (read[2] + (read[0] + kept[0]).sigmoid() * kept[2]).tanh()
        found: Tensor = update * memory + (1 - update) * new
        return found

    def foretell(self, memory: Tensor, read: Tensor) -> Tensor:
        """The next normal hidden state (..., features), by the memory that has read and by what it read last."""
        bent = F.silu(self.up(torch.cat([memory, read], dim=-1)))
        found: Tensor = self.down(torch.cat([bent, read], dim=-1))
        return found

    def logits(self, foretold: Tensor) -> Tensor:
        """(..., listed + 1), of the listed tokens and of all others together."""
        return torch.cat([self.head(foretold), self.rest(foretold)], dim=-1)

    def forward(self, hidden: Tensor, token: Tensor, first: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token read, and one drafted.

        Args:
            hidden: (batch, features), what the token was chosen from; without meaning for a drafted one.
            token: (batch,) int64.
            first: (batch, 1), 1 where the model has chosen the token, and 0 where it was drafted.
            state: (batch, width + features), from the token before; zeros where a text begins.

        Returns:
            The token after it (batch,), how probable it is to be right (batch,), and the new state.
        """
        memory, foretold = state[:, : self.config.width], state[:, self.config.width :]
        read = self.reads(first * self.normal(hidden) + (1 - first) * foretold, token)
        memory = self.advance(memory, self.read(read))
        foretold = self.foretell(memory, read)
        chances = self.logits(foretold).softmax(dim=-1)
        best, at = chances[:, :-1].max(dim=-1)
        return self.ids.index_select(0, at), best, torch.cat([memory, foretold], dim=-1)

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
        self.rest.weight.zero_()
        self.rest.bias.copy_(self.head.bias.mean())


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
