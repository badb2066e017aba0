"""The small translators of the Bergamot project: a transformer reads the source, a simple recurrence writes the answer.

Encoder: embedding with positions added -> N post-norm layers of attention and a feed-forward part. Decoder: the same
embedding, each token's place one further on and nothing in the first one's -> layers of a simple recurrent unit (SSRU:
Kim et al. 2019, aclanthology.org/D19-5632), attention to the source and a feed-forward part, each sum with what came
before normed. An answer is made of words that some source token may stand for, and of the commonest: the *shortlist*.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.models.bergamot_files import MARIAN
from edgellm.models.config import Shape
from edgellm.models.layers import MLP, DecoderLayer, EncoderLayer, SourceAttention, SourceStack
from edgellm.models.layers.simple_recurrence import SimpleRecurrence
from edgellm.models.layers.waves import Waves
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.ops import source_mask, take_positions
from edgellm_runtime.spec import BATCH, SOURCE, StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "Bergamot", "BergamotConfig"]

_WORDS = "source.words"  # the state that says which words source tokens may stand for
_UNLISTED = -60.0  # added to the logits of words that are on no list: e^-60 of their probability is left
_EPS = 1e-6
_EIGHT = 8  # lists of words are filled up to a multiple of it


@dataclass(frozen=True, kw_only=True)
class BergamotConfig(Shape):
    """The shape of a :class:`Bergamot`.

    Args:
        vocab_size: tokens, of sources and of answers.
        width: features between layers.
        encoder_layers: layers of the encoder.
        decoder_layers: layers of the decoder.
        num_heads: attention heads; divides ``width``.
        mlp_width: hidden features of the feed-forward parts.
        max_context: the most tokens of an answer, its start among them.
        max_source: the most tokens of a source.
        listed: the most words that a source token may stand for, of a model with a shortlist; 0: answers are made of
            any words.
        commonest: how many tokens, the first ones, answers may hold whatever the source.
        start_tokens: what every answer begins with; the first one's embedding is not used.
    """

    ZERO = ("listed", "commonest")
    vocab_size: int
    width: int = 256
    encoder_layers: int = 6
    decoder_layers: int = 2
    num_heads: int = 8
    mlp_width: int = 1536
    max_context: int = 512
    max_source: int = 512
    listed: int = 0
    commonest: int = 0
    start_tokens: Sequence[int] = (0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.num_heads or self.width % 2:
            raise ConfigError(f"width {self.width} must be even and a multiple of num_heads {self.num_heads}")
        for name in ("listed", "commonest"):
            if (found := getattr(self, name)) > self.vocab_size:
                raise ConfigError(f"{name} is {found}; it must be a whole number up to vocab_size")


PRESETS: Mapping[str, BergamotConfig] = {
    "tiny": BergamotConfig(vocab_size=1024, width=128, encoder_layers=2, num_heads=4, mlp_width=256),
}


def _layer(c: BergamotConfig, *, decodes: bool) -> nn.Module:
    def across() -> SourceAttention:
        return SourceAttention(c.width, c.num_heads, c.width // c.num_heads, bias=True)

    norm = functools.partial(nn.LayerNorm, c.width, eps=_EPS)
    parts: dict[str, nn.Module] = {"mlp": MLP(c.width, c.mlp_width, bias=True, activation="relu")}
    if not decodes:
        return EncoderLayer(parts | {"attention": across()}, norm, first=False)
    parts |= {"recurrence": SimpleRecurrence(c.width), "cross": across()}
    return DecoderLayer(parts, norm, first=False, mixer="recurrence")


class Bergamot(SourceStack):
    """See the module's description; follows :class:`edgellm.models.protocol.SourceModel`."""

    words: Tensor  # (vocab_size, listed), which words each source token may stand for, in float32; 0 fills up

    def __init__(self, config: BergamotConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.most = max(config.max_context, config.max_source)
        self.places = Waves(self.most, config.width, slowest=True)
        self.encoder = nn.ModuleList(_layer(config, decodes=False) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(_layer(config, decodes=True) for _ in range(config.decoder_layers))
        self.head = nn.Linear(config.width, config.vocab_size)
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        self.head.weight = self.embedding.weight
        if config.listed:
            self.register_buffer("words", torch.zeros(config.vocab_size, config.listed))

    def answering(self) -> nn.ModuleList:
        """The decoder's layers."""
        return self.decoder

    def state_specs(self) -> list[StateSpec]:
        """Each layer's memory, its keys and values of the source, and the words that the source asks for."""
        mask, *specs = super().state_specs()
        listed = self.config.listed
        return [mask, *([StateSpec(_WORDS, (BATCH, SOURCE, listed), "int32", "static")] if listed else []), *specs]

    def _embedded(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens) * math.sqrt(self.config.width)
        return x

    def encode(self, source: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """The mask of sources (batch, source), the words they may stand for, and each layer's keys and values."""
        mask = source_mask(source, lengths)
        x = self._embedded(source) + self.places(torch.arange(source.shape[1], device=source.device))
        for layer in self.encoder:
            x = layer(x, mask)
        made = self.read(x, mask)
        if self.config.listed:
            made[_WORDS] = torch.where(mask[:, :, None], self.words.to(torch.int32)[source], 0)
        return made

    def forward(self, tokens: Tensor, state: State, step: Step | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (batch, time) to logits (batch, count, vocab_size) and the new state."""
        step = step or Step.whole(tokens)
        places = step.past_lengths.long()[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        x = torch.where(places[:, :, None] > 0, self._embedded(tokens), 0.0)
        x = x + self.places(places.clamp(max=self.most - 1))  # padding may point past the table; nobody reads that
        x, present = self.answered(x, state, step)
        logits: Tensor = self.head(take_positions(x, step.logit_positions))
        if self.config.listed:
            logits = logits + self._unlisted(state[_WORDS])[:, None]
        return logits, present

    def _unlisted(self, words: Tensor) -> Tensor:
        """What is added to logits (batch, vocab_size), of lists (batch, source, listed)."""
        size = self.config.vocab_size
        common = (torch.arange(size, device=words.device) < self.config.commonest).float()
        listed = common.expand(words.shape[0], size).scatter(1, words.long().flatten(1), 1.0)
        # as many more as make the list a multiple of eight, the commonest first
        lacking = torch.remainder(-listed.sum(1, keepdim=True), _EIGHT)
        listed = torch.where((1.0 - listed).cumsum(1) <= lacking, 1.0, listed)
        return (1.0 - listed) * _UNLISTED


ARCHITECTURE = Architecture(name="bergamot", config=BergamotConfig, build=Bergamot, presets=PRESETS, marian=MARIAN)
