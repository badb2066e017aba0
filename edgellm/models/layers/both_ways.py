"""Blocks of an encoder, whose tokens see those before and after them: attention to all, or a recurrence each way."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from edgellm.models.layers.mlp import GatedMLP
from edgellm.models.layers.recurrent import RecurrentMixer
from edgellm.models.layers.rotary import RotaryTable
from edgellm.models.layers.source_attention import SourceAttention
from edgellm.models.protocol import Step

__all__ = ["BlockShape", "BothWays", "EncoderBlock", "NormedBlock"]


class BlockShape(Protocol):
    """What a block asks of a model's configuration."""

    @property
    def width(self) -> int:
        """Features between blocks."""
        ...

    @property
    def num_heads(self) -> int:
        """Attention heads."""
        ...

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        ...

    @property
    def recurrent_width(self) -> int:
        """Hidden features of each recurrence."""
        ...

    @property
    def mlp_width(self) -> int:
        """Hidden features of the MLPs."""
        ...

    @property
    def norm_eps(self) -> float:
        """Added to the mean square in the norms."""
        ...

    @property
    def dropout(self) -> float:
        """Probability in training."""
        ...


class BothWays(nn.Module):
    """A recurrence over a source from its first token, and one from its last; their outputs are added."""

    def __init__(self, kind: str, width: int, hidden: int) -> None:
        super().__init__()
        self.forwards, self.backwards = (RecurrentMixer(kind, width, hidden) for _ in range(2))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(batch, source, width), of which ``lengths`` (batch,) int32 are valid, to the same shape."""
        steps = torch.arange(x.shape[1], device=x.device)[None]
        last = lengths.long()[:, None] - 1
        turned = torch.where(steps <= last, last - steps, steps)[:, :, None].expand_as(x)  # padding stays where it is
        step = Step(torch.zeros_like(lengths), lengths, steps)
        there, _ = self.forwards(x, {}, "source", step)
        back, _ = self.backwards(x.gather(1, turned), {}, "source", step)
        y: Tensor = there + back.gather(1, turned)
        return y


class NormedBlock(nn.Module):
    """What blocks share: a mixer's norm, an MLP with its norm, dropout."""

    def __init__(self, config: BlockShape) -> None:
        super().__init__()
        c = config
        self.norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.mlp_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.mlp = GatedMLP(c.width, c.mlp_width)
        self.dropout = nn.Dropout(c.dropout)

    def finish(self, x: Tensor) -> Tensor:
        """The MLP with its residual."""
        y: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return y


class EncoderBlock(NormedBlock):
    """One mixer over the whole source, and an MLP."""

    def __init__(self, config: BlockShape, mixer: str) -> None:
        super().__init__(config)
        c = config
        self.mixer: SourceAttention | BothWays = (
            SourceAttention(c.width, c.num_heads, c.head_dim)
            if mixer == "attention"
            else BothWays(mixer, c.width, c.recurrent_width)
        )

    def forward(self, x: Tensor, lengths: Tensor, mask: Tensor, positions: Tensor, table: RotaryTable) -> Tensor:
        """(batch, source, width) to the same shape."""
        y = self.norm(x)
        if isinstance(self.mixer, SourceAttention):
            y = self.mixer(y, *self.mixer.keys(y, positions, table), mask, None, positions, table)
        else:
            y = self.mixer(y, lengths)
        return self.finish(x + self.dropout(y))
