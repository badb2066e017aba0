"""BART and Marian: an encoder and a decoder of post-norm transformer layers with positions that are added.

BART: Lewis et al. 2019, arXiv:1910.13461; Marian: Junczys-Dowmunt et al. 2018, arXiv:1804.00344.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.models.bart_files import HUGGING_FACE, MARIAN
from edgellm.models.config import Shape
from edgellm.models.layers import MLP, DecoderLayer, EncoderLayer, SelfAttention, SourceAttention, SourceStack
from edgellm.models.layers.mlp import ACTIVATIONS
from edgellm.models.layers.waves import Waves
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.ops import source_mask, take_positions

__all__ = ["ARCHITECTURE", "PRESETS", "Bart", "BartConfig"]

_BEFORE = 2  # rows of a learned table of positions that no position has


@dataclass(frozen=True, kw_only=True)
class BartConfig(Shape):
    """The shape of a :class:`Bart`.

    Args:
        vocab_size: tokens.
        width: features between layers.
        encoder_layers: layers of the encoder.
        decoder_layers: layers of the decoder.
        encoder_heads: attention heads of the encoder; divides ``width``.
        decoder_heads: those of the decoder; likewise.
        encoder_mlp_width: hidden features of the encoder's feed-forward layers.
        decoder_mlp_width: those of the decoder.
        max_context: positions that there are, in a source and in an answer.
        learned_positions: whether these are learned; otherwise sines and cosines.
        norm_embedding: whether the sum of token and position is normed.
        scale_embedding: whether embeddings are multiplied by the square root of ``width``.
        activation: of the feed-forward layers.
        start_tokens: what every answer begins with.
    """

    vocab_size: int
    width: int
    encoder_layers: int
    decoder_layers: int
    encoder_heads: int
    decoder_heads: int
    encoder_mlp_width: int
    decoder_mlp_width: int
    max_context: int
    learned_positions: bool = True
    norm_embedding: bool = True
    scale_embedding: bool = False
    activation: str = "gelu"
    start_tokens: Sequence[int] = (2,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation is {self.activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
        if self.width % self.encoder_heads or self.width % self.decoder_heads or self.width % 2:
            raise ConfigError(
                f"width {self.width} must be even and a multiple of encoder_heads {self.encoder_heads} and "
                f"decoder_heads {self.decoder_heads}"
            )

    @property
    def max_source(self) -> int:
        """The most tokens of a source."""
        return self.max_context


PRESETS: Mapping[str, BartConfig] = {
    "tiny": BartConfig(
        vocab_size=1024, width=128, encoder_layers=3, decoder_layers=3, encoder_heads=4, decoder_heads=4,
        encoder_mlp_width=512, decoder_mlp_width=512, max_context=512, learned_positions=False, norm_embedding=False,
        scale_embedding=True, activation="silu", start_tokens=(0,),
    ),
}  # fmt: skip


class BartStack(nn.Module):
    """The layers of the encoder or of the decoder, over embeddings with positions.

    Args:
        config: of the model.
        embedding: the model's own.
        decodes: whether it is the decoder.
    """

    def __init__(self, config: BartConfig, embedding: nn.Embedding, *, decodes: bool) -> None:
        super().__init__()
        self.embedding, self.last = embedding, config.max_context - 1
        self.before = _BEFORE if config.learned_positions else 0
        self.scale = math.sqrt(config.width) if config.scale_embedding else 1.0
        self.positions: nn.Module = (
            nn.Embedding(config.max_context + _BEFORE, config.width)
            if config.learned_positions
            else Waves(config.max_context, config.width)
        )
        count = config.decoder_layers if decodes else config.encoder_layers
        self.layers = nn.ModuleList(_layer(config, decodes=decodes) for _ in range(count))
        self.embedding_norm = nn.LayerNorm(config.width) if config.norm_embedding else None

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens (batch, time) at positions (batch, time) to (batch, time, width)."""
        positions = positions.clamp(max=self.last)  # padding may point past the table; its result is not used
        x: Tensor = self.embedding(tokens) * self.scale + self.positions(positions + self.before)
        return x if self.embedding_norm is None else self.embedding_norm(x)


def _layer(c: BartConfig, *, decodes: bool) -> nn.Module:
    heads = c.decoder_heads if decodes else c.encoder_heads

    def across() -> SourceAttention:
        return SourceAttention(c.width, heads, c.width // heads, bias=True)

    def mlp() -> MLP:
        return MLP(c.width, c.decoder_mlp_width if decodes else c.encoder_mlp_width, bias=True, activation=c.activation)

    norm = functools.partial(nn.LayerNorm, c.width)
    if not decodes:
        return EncoderLayer({"attention": across(), "mlp": mlp()}, norm, first=False)
    attention = SelfAttention(c.width, heads, heads, c.width // heads, bias=True, output_bias=True)
    return DecoderLayer({"attention": attention, "cross": across(), "mlp": mlp()}, norm, first=False)


class Bart(SourceStack):
    """See the module's description; follows :class:`edgellm.models.protocol.SourceModel`."""

    def __init__(self, config: BartConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.encoder = BartStack(config, self.embedding, decodes=False)
        self.decoder = BartStack(config, self.embedding, decodes=True)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        self.logits_bias = nn.Parameter(torch.zeros(1, config.vocab_size))
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)

    def answering(self) -> nn.ModuleList:
        """The decoder's layers."""
        return self.decoder.layers

    def encode(self, source: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """The mask of sources (batch, source), and each decoder layer's keys and values of them."""
        mask = source_mask(source, lengths)
        x = self.encoder.embed(source, torch.arange(source.shape[1], device=source.device).expand_as(source))
        for layer in self.encoder.layers:
            x = layer(x, mask)
        return self.read(x, mask)

    def forward(self, tokens: Tensor, state: State, step: Step | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (batch, time) to logits (batch, count, vocab_size) and the new state."""
        step = step or Step.whole(tokens)
        positions = step.past_lengths.long()[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        x, present = self.answered(self.decoder.embed(tokens, positions), state, step, None)
        return self.head(take_positions(x, step.logit_positions)) + self.logits_bias, present


ARCHITECTURE = Architecture(
    name="bart", config=BartConfig, build=Bart, presets=PRESETS, huggingface=HUGGING_FACE, marian=MARIAN
)
