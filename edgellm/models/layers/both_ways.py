"""Blocks of an encoder, whose tokens see those before and after them: attention to all, or a recurrence each way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.models.config import Shape
from edgellm.models.layers.mlp import GatedMLP
from edgellm.models.layers.recurrent import KINDS, RecurrentMixer
from edgellm.models.layers.rotary import RotaryTable
from edgellm.models.layers.source_attention import SourceAttention
from edgellm.models.protocol import Step

__all__ = ["MIXERS", "BlockShape", "BothWays", "EncoderBlock", "NormedBlock"]


MIXERS = (*KINDS, "attention")


@dataclass(frozen=True, kw_only=True)
class BlockShape(Shape):
    """The sizes of blocks of one mixer each, which are trained from scratch.

    Args:
        vocab_size: tokens.
        width: features between blocks.
        num_heads: attention heads; divides ``width``.
        recurrent_width: hidden features of each recurrence, in each direction.
        mlp_width: hidden features of the gated MLPs.
        max_context: the most tokens that a row may hold.
        rope_theta: base of the rotary frequencies of attention.
        dropout: probability in training, after embeddings, mixers and MLPs.
        norm_eps: added to the mean square in the norms.
    """

    MIXERS: ClassVar[Sequence[str]] = MIXERS
    vocab_size: int
    width: int = 256
    num_heads: int = 4
    recurrent_width: int = 256
    mlp_width: int = 704
    max_context: int = 512
    rope_theta: float = 10000.0
    dropout: float = 0.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.num_heads:
            raise ConfigError(f"width is {self.width}; it must be a multiple of num_heads {self.num_heads}")
        if self.turns and self.head_dim % 2:
            raise ConfigError(
                f"head_dim is {self.head_dim}, of width {self.width} and num_heads {self.num_heads}; where positions "
                "turn, it must be even"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; it must be in [0, 1)")

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.width // self.num_heads

    @property
    def turns(self) -> bool:
        """Whether attention turns queries and keys by position."""
        return True

    def check_mixers(self, name: str) -> None:
        """Make sure that a field names a mixer for each block.

        Raises:
            ConfigError: it does not.
        """
        found = getattr(self, name)
        if not found or (unknown := [mixer for mixer in found if mixer not in self.MIXERS]):
            known = ", ".join(self.MIXERS)
            raise ConfigError(f"{name} has {unknown if found else 'no block'}; each is one of {known}")


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
