"""The encoder-decoder of edgellm's own: an encoder that reads both ways, a recurrent or attentive decoder.

Encoder: embedding -> N blocks, each a norm and one mixer (self-attention over the whole source, or a recurrence each
way) with a residual, and a norm and a gated MLP with a residual -> norm. Decoder: as the hybrid model, with a norm and
attention to the encoder's output between mixer and MLP (Bahdanau et al. 2014, arXiv:1409.0473; Vaswani
et al. 2017, arXiv:1706.03762).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgellm.models.layers import RecurrentMixer, RotaryTable, SelfAttention, SourceAttention, SourceStack
from edgellm.models.layers.both_ways import BlockShape, EncoderBlock, NormedBlock
from edgellm.models.layers.pointer import Pointer
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.ops import source_mask, take_positions
from edgellm_runtime.spec import StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "EncoderDecoder", "EncoderDecoderConfig"]


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(BlockShape):
    """The shape of an :class:`EncoderDecoder`; sources and answers are of the same tokens.

    Args:
        encoder: one mixer a block of the encoder; each of rnn_tanh, rnn_relu, lstm, gru, attention.
        decoder: likewise of the decoder.
        max_source: the most tokens of a source.
        tie_embeddings: whether the vocabulary projection is the embedding.
        start_tokens: what every answer begins with.
        copies: whether words of the source may be pointed at, and so copied.
    """

    encoder: Sequence[str] = ("attention",) * 3
    decoder: Sequence[str] = ("gru", "attention")
    max_source: int = 512
    tie_embeddings: bool = True
    start_tokens: Sequence[int] = (0,)
    copies: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_mixers("encoder")
        self.check_mixers("decoder")


PRESETS: Mapping[str, EncoderDecoderConfig] = {
    "tiny": EncoderDecoderConfig(
        vocab_size=1024, width=128, encoder=("attention",) * 2, recurrent_width=192, mlp_width=256
    ),
    "recurrent": EncoderDecoderConfig(
        vocab_size=1024, width=128, encoder=("lstm",), decoder=("lstm",) * 2, recurrent_width=192, mlp_width=256
    ),
}


class DecoderBlock(NormedBlock):
    """One mixer over the answer so far, attention to the source, and an MLP."""

    def __init__(self, config: EncoderDecoderConfig, mixer: str) -> None:
        super().__init__(config)
        c = config
        self.mixer: SelfAttention | RecurrentMixer = (
            SelfAttention(c.width, c.num_heads, c.num_heads, c.head_dim, bias=False)
            if mixer == "attention"
            else RecurrentMixer(mixer, c.width, c.recurrent_width)
        )
        self.cross_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.cross = SourceAttention(c.width, c.num_heads, c.head_dim)

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """What its mixer carries, and its keys and values of the source."""
        return [*self.mixer.state_specs(prefix, dtype), *self.cross.state_specs(prefix, dtype)]

    def forward(
        self, x: Tensor, state: State, prefix: str, step: Step, carried: State, table: RotaryTable
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this block's part of the new state."""
        y = self.norm(x)
        if isinstance(self.mixer, SelfAttention):
            y, present = self.mixer(y, carried, prefix, step, table)
        else:
            y, present = self.mixer(y, carried, prefix, step)
        x = x + self.dropout(y)
        x = x + self.dropout(self.cross.answer(self.cross_norm(x), state, prefix))
        return self.finish(x), present


class EncoderDecoder(SourceStack):
    """See the module's description; follows :class:`edgellm.models.protocol.SourceModel`."""

    place = "blocks"

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.encoder = nn.ModuleList(EncoderBlock(config, mixer) for mixer in config.encoder)
        self.encoder_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.decoder = nn.ModuleList(DecoderBlock(config, mixer) for mixer in config.decoder)
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.pointer = Pointer(config.width) if config.copies else None
        self.rotary = RotaryTable(config.head_dim, max(config.max_context, config.max_source), config.rope_theta)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def answering(self) -> nn.ModuleList:
        """The decoder's blocks."""
        return self.decoder

    def state_specs(self) -> list[StateSpec]:
        """What each block's mixer carries, its keys and values of the source, and what is pointed at."""
        return super().state_specs() + ([] if self.pointer is None else self.pointer.state_specs(self.dtype))

    def encode(self, source: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """The mask of sources (batch, source), and each decoder block's keys and values of them."""
        mask = source_mask(source, lengths)
        positions = torch.arange(source.shape[1], device=source.device).expand_as(source)
        x = self.dropout(self.embedding(source))  # (batch, source, width)
        for block in self.encoder:
            x = block(x, lengths, mask, positions, self.rotary)
        x = self.encoder_norm(x)
        made = self.read(x, mask)
        return made if self.pointer is None else made | self.pointer.states(source, x)

    def forward(self, tokens: Tensor, state: State, step: Step | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (batch, time) to logits (batch, count, vocab_size) and the new state."""
        step = step or Step.whole(tokens)
        encoded = {spec.name for spec in self.state_specs() if spec.encoded}
        carried = {name: t for name, t in state.items() if name not in encoded}
        x = self.dropout(self.embedding(tokens))  # (batch, time, width)
        x, present = self.answered(x, state, step, carried, self.rotary)
        x = take_positions(self.norm(x), step.logit_positions)  # (batch, count, width)
        logits = self.head(x)
        return logits if self.pointer is None else self.pointer(x, logits, state), present


ARCHITECTURE = Architecture(
    name="encoder_decoder", config=EncoderDecoderConfig, build=EncoderDecoder, presets=PRESETS
)  # fmt: skip
