"""A small recurrent head that drafts for a model: a GRU over its last hidden state and the tokens after it.

ReDrafter (Cheng et al. 2024, arXiv:2403.09919) is the idea, the short list of frequent tokens that of FR-Spec (Zhao et
al. 2025, arXiv:2502.14856). What it gives is only ever checked by the model, so that it may be wrong at any time. It is
kept as a folder of its own. Nothing here knows an architecture.
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
_FORMAT = 1


@dataclass(frozen=True)
class DraftHeadConfig:
    """The shape of a :class:`DraftHead`.

    Args:
        features: of the model's last hidden state.
        vocab_size: the model's tokens.
        listed: how many of them it can propose.
        width: of its own state.
        token_width: of what it reads of a token.
    """

    features: int
    vocab_size: int
    listed: int
    width: int = 256
    token_width: int = 128

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or not 0 < value < 2**31:
                raise ConfigError(f"{field.name} is {value!r}; it must be a positive whole number")
        if self.listed > self.vocab_size:
            raise ConfigError(f"listed is {self.listed}, of {self.vocab_size} tokens; list no more than there are")


class DraftHead(nn.Module):
    """Proposes a token after another: begun from the hidden state that the first was chosen from.

    Args:
        config: its shape.
    """

    ids: Tensor  # (listed,) int64: the tokens that it can propose

    def __init__(self, config: DraftHeadConfig) -> None:
        super().__init__()
        c = self.config = config
        self.register_buffer("ids", torch.arange(c.listed))
        self.embedding = nn.Embedding(c.vocab_size, c.token_width)
        self.embedding.weight.requires_grad_(False)  # a model's own table, made narrow: too large to be learned again
        self.enter = nn.Linear(c.features, c.width)
        self.read = nn.Linear(c.token_width, 3 * c.width)
        self.keep = nn.Linear(c.width, 3 * c.width)
        self.up = nn.Linear(c.width, 2 * c.width)
        self.down = nn.Linear(2 * c.width, c.width)
        self.head = nn.Linear(c.width, c.listed + 1)  # and one for all tokens that are not listed

    def begin(self, hidden: Tensor) -> Tensor:
        """The state before the first token: (..., features) to (..., width)."""
        entered: Tensor = self.enter(hidden * (hidden.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt())
        return entered.tanh()

    def advance(self, state: Tensor, tokens: Tensor) -> Tensor:
        """The state (batch, width) after a token (batch,) more; a GRU's, with the reset gate behind the product."""
        read = self.read(self.embedding(tokens)).chunk(3, dim=-1)
        kept = self.keep(state).chunk(3, dim=-1)
        update = (read[0] + kept[0]).sigmoid()
        new = (read[2] + (read[1] + kept[1]).sigmoid() * kept[2]).tanh()
        found: Tensor = update * state + (1 - update) * new
        return found

    def logits(self, state: Tensor) -> Tensor:
        """(batch, listed + 1), of the listed tokens and of all others together."""
        found: Tensor = self.head(state + self.down(F.silu(self.up(state))))
        return found

    def forward(self, hidden: Tensor, token: Tensor, first: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One drafted token.

        Args:
            hidden: (batch, features), what the token was chosen from; without meaning but for a first one.
            token: (batch,) int64.
            first: (batch, 1), 1 where the token begins a draft, and 0 where it was drafted itself.
            state: (batch, width), from the step before; without meaning for a first one.

        Returns:
            The token after it (batch,), how probable it is to be right (batch,), and the new state.
        """
        state = self.advance(first * self.begin(hidden) + (1 - first) * state, token)
        chances = self.logits(state).softmax(dim=-1)
        best, at = chances[:, :-1].max(dim=-1)
        return self.ids.index_select(0, at), best, state

    @torch.no_grad()
    def start_from(self, table: Tensor, head: Tensor, scale: float) -> None:
        """Begin with what a model knows: its table of tokens made narrow, and its projection to the listed tokens.

        Args:
            table: (vocab_size, any), what the model reads of each token.
            head: (vocab_size, features), what it projects its last hidden state with.
            scale: root mean square of a hidden state.
        """
        config = self.config
        _, directions = _principal(table, config.token_width)
        narrow = table @ directions
        self.embedding.weight.zero_()
        self.embedding.weight[:, : narrow.shape[1]] = narrow / narrow.std().clamp_min(1e-6)
        rows = head[self.ids]
        _, directions = _principal(rows, config.width)
        count = directions.shape[1]
        gain = 0.5  # so that few numbers reach the bend of tanh
        self.enter.weight[:count] = gain * directions.T
        self.enter.bias.zero_()
        self.head.weight[:-1, :count] = rows @ directions * (scale / gain)
        self.head.weight[-1].zero_()
        self.head.bias.zero_()


def _principal(rows: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues and directions (features, at most ``most``) in which rows are largest."""
    values, vectors = torch.linalg.eigh((rows.T @ rows).double())
    return values.flip(0)[:most].float(), vectors.flip(1)[:, :most].float()


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
