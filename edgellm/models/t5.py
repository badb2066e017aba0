"""T5: an encoder and a decoder of pre-norm transformer layers whose only positions are biases by distance.

Raffel et al. 2020, arXiv:1910.10683; the gated form of version 1.1, Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.models.config import Shape
from edgellm.models.layers import MLP, DecoderLayer, EncoderLayer, GatedMLP, SelfAttention, SourceAttention, SourceStack
from edgellm.models.layers.mlp import ACTIVATIONS
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.models.t5_files import HUGGING_FACE
from edgellm.ops import source_mask, take_positions

__all__ = ["ARCHITECTURE", "PRESETS", "T5", "T5Config"]


@dataclass(frozen=True, kw_only=True)
class T5Config(Shape):
    """The shape of a :class:`T5`.

    Args:
        vocab_size: tokens.
        width: features between layers.
        encoder_layers: layers of the encoder.
        decoder_layers: layers of the decoder.
        num_heads: attention heads.
        head_dim: features of one head.
        mlp_width: hidden features of the feed-forward layers.
        max_context: the most tokens of an answer; the model itself has no limit.
        max_source: the most tokens of a source; likewise.
        num_buckets: rows of the tables of biases.
        max_distance: tokens further apart than this share a bucket.
        gated: whether feed-forward layers are gated.
        activation: of the feed-forward layers.
        norm_eps: added to the mean square in the norms.
        tie_embeddings: whether the vocabulary projection is the embedding.
        scale_output: whether what is projected to the vocabulary is divided by the square root of ``width``.
        start_tokens: what every answer begins with.
    """

    vocab_size: int
    width: int
    encoder_layers: int
    decoder_layers: int
    num_heads: int
    head_dim: int
    mlp_width: int
    max_context: int = 512
    max_source: int = 512
    num_buckets: int = 32
    max_distance: int = 128
    gated: bool = False
    activation: str = "relu"
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    scale_output: bool = True
    start_tokens: Sequence[int] = (0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation is {self.activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
        if self.num_buckets < 4 or self.max_distance <= self.num_buckets // 2:
            raise ConfigError(
                f"num_buckets {self.num_buckets} must be at least 4, and max_distance {self.max_distance} over half of "
                "them"
            )


PRESETS: Mapping[str, T5Config] = {
    "tiny": T5Config(
        vocab_size=1024, width=128, encoder_layers=3, decoder_layers=3, num_heads=4, head_dim=32, mlp_width=352,
        gated=True, activation="gelu_tanh",
    ),
}  # fmt: skip


def buckets(distance: Tensor, *, count: int, most: int, both_ways: bool) -> Tensor:
    """The row of a table for each distance from a query to a key: one each while near, then ever more share one.

    Args:
        distance: whole numbers, positive for keys that come later.
        count: rows of the table.
        most: from which on all share the last row.
        both_ways: whether keys may come later, which then have the table's second half.
    """
    count = count // 2 if both_ways else count
    far = (distance > 0).long() * count if both_ways else torch.zeros_like(distance)
    distance = distance.abs() if both_ways else (-distance).clamp(min=0)
    exact = count // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(most / exact)
    shared = (exact + (ratio * (count - exact)).long()).clamp(max=count - 1)
    return far + torch.where(distance < exact, distance, shared)


class T5Stack(nn.Module):
    """The layers of the encoder or of the decoder, and the norm after them.

    Args:
        config: of the model.
        embedding: the model's own.
        decodes: whether it is the decoder.
    """

    rows: Tensor  # (distances,): the table's row for each distance, nearest first or, both ways, from the earliest key

    def __init__(self, config: T5Config, embedding: nn.Embedding, *, decodes: bool) -> None:
        super().__init__()
        c = config
        count = c.decoder_layers if decodes else c.encoder_layers
        self.embedding, self.most = embedding, c.max_distance
        self.layers = nn.ModuleList(_layer(c, decodes=decodes) for _ in range(count))
        self.norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.relative_bias = nn.Parameter(torch.zeros(c.num_buckets, c.num_heads))
        near = torch.arange(0, -c.max_distance - 1, -1, device="cpu")
        distances = near if decodes else torch.arange(-c.max_distance, c.max_distance + 1, device="cpu")
        rows = buckets(distances, count=c.num_buckets, most=c.max_distance, both_ways=not decodes)
        self.register_buffer("rows", rows, persistent=False)

    def distances(self) -> Tensor:
        """The bias for each distance, (distances, num_heads)."""
        return self.relative_bias[self.rows]

    def bias(self, time: int) -> Tensor:
        """The bias between all tokens of a source, (1, num_heads, time, time)."""
        at = torch.arange(time, device=self.rows.device)
        back = (at[None] - at[:, None]).clamp(-self.most, self.most) + self.most
        return self.distances()[back].permute(2, 0, 1)[None]


def _layer(c: T5Config, *, decodes: bool) -> nn.Module:
    def across() -> SourceAttention:
        return SourceAttention(c.width, c.num_heads, c.head_dim, scale=1.0)

    def mlp() -> nn.Module:
        if c.gated:
            return GatedMLP(c.width, c.mlp_width, activation=c.activation)
        return MLP(c.width, c.mlp_width, bias=False, activation=c.activation)

    norm = functools.partial(nn.RMSNorm, c.width, eps=c.norm_eps)
    if not decodes:
        return EncoderLayer({"attention": across(), "mlp": mlp()}, norm, first=True)
    attention = SelfAttention(c.width, c.num_heads, c.num_heads, c.head_dim, bias=False, scale=1.0)
    return DecoderLayer({"attention": attention, "cross": across(), "mlp": mlp()}, norm, first=True)


class T5(SourceStack):
    """See the module's description; follows :class:`edgellm.models.protocol.SourceModel`."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.encoder = T5Stack(config, self.embedding, decodes=False)
        self.decoder = T5Stack(config, self.embedding, decodes=True)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=1.0 if config.scale_output else config.width**-0.5)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def answering(self) -> nn.ModuleList:
        """The decoder's layers."""
        return self.decoder.layers

    def encode(self, source: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """The mask of sources (batch, source), and each decoder layer's keys and values of them."""
        mask, bias = source_mask(source, lengths), self.encoder.bias(source.shape[1])
        x = self.embedding(source)  # (batch, source, width)
        for layer in self.encoder.layers:
            x = layer(x, mask, bias)
        return self.read(self.encoder.norm(x), mask)

    def forward(self, tokens: Tensor, state: State, step: Step | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (batch, time) to logits (batch, count, vocab_size) and the new state."""
        step = step or Step.whole(tokens)
        x, present = self.answered(self.embedding(tokens), state, step, None, self.decoder.distances())
        x = take_positions(self.decoder.norm(x), step.logit_positions)
        return self.head(x * self.config.width**-0.5 if self.config.scale_output else x), present


ARCHITECTURE = Architecture(name="t5", config=T5Config, build=T5, presets=PRESETS, huggingface=HUGGING_FACE)
