"""The recurrent + self-attention language model.

Embedding -> N blocks, each a norm and one mixer (Elman RNN, LSTM, GRU, causal self-attention, or self-attention over a
sliding window) with a residual, and optionally a norm and a gated MLP with a residual -> norm -> projection to the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.models.layers import GatedMLP, RecurrentMixer, RotaryTable, SelfAttention
from edgellm.models.layers.both_ways import BlockShape
from edgellm.models.protocol import State, Step, logit_width
from edgellm.models.registry import Architecture
from edgellm.ops import take_positions
from edgellm_runtime.spec import StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "Hybrid", "HybridConfig"]

ATTENTIONS = ("attention", "local")


@dataclass(frozen=True, kw_only=True)
class HybridConfig(BlockShape):
    """The shape of a :class:`Hybrid`; a recurrence is projected back to ``width``, and ``mlp_width`` 0 is no MLP.

    Args:
        pattern: one mixer a block, first to last; each of rnn_tanh, rnn_relu, lstm, gru, attention, local.
        num_kv_heads: key and value heads; divides ``num_heads``.
        rotary: whether attention turns queries and keys by position (without it, order comes from the recurrences).
        tie_embeddings: whether the vocabulary projection is the embedding.
        window: how many tokens a token sees in a block of local attention, itself among them.
        num_labels: when not 0, the model gives each token logits over so many labels in place of the vocabulary.
    """

    MIXERS = (*BlockShape.MIXERS, "local")
    ZERO = ("mlp_width", "num_labels")
    width: int = 512
    pattern: Sequence[str] = ("lstm", "attention") * 3
    num_heads: int = 8
    num_kv_heads: int = 8
    recurrent_width: int = 2048
    mlp_width: int = 0
    max_context: int = 2048
    rotary: bool = True
    tie_embeddings: bool = False
    window: int = 256
    num_labels: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_mixers("pattern")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads is {self.num_heads}; it must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.num_labels and self.tie_embeddings:
            raise ConfigError("tie_embeddings is set, but labels are no words of the vocabulary; leave it false")

    @property
    def turns(self) -> bool:
        """Whether attention turns queries and keys by position."""
        return self.rotary


PRESETS: Mapping[str, HybridConfig] = {
    "reference": HybridConfig(vocab_size=10000),
    "tiny": HybridConfig(
        vocab_size=1024, width=128, pattern=("lstm", "attention") * 2, num_heads=4, num_kv_heads=4,
        recurrent_width=192, mlp_width=256, max_context=512, tie_embeddings=True,
    ),
}  # fmt: skip


class Block(nn.Module):
    """One mixer, and optionally one MLP, each behind a norm and beside a residual."""

    def __init__(self, config: HybridConfig, mixer: str) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mixer: SelfAttention | RecurrentMixer = (
            SelfAttention(
                config.width, config.num_heads, config.num_kv_heads, config.head_dim, bias=False,
                window=config.window if mixer == "local" else 0,
            )
            if mixer in ATTENTIONS
            else RecurrentMixer(mixer, config.width, config.recurrent_width)
        )  # fmt: skip
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps) if config.mlp_width else None
        self.mlp = GatedMLP(config.width, config.mlp_width) if config.mlp_width else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, state: State, prefix: str, step: Step, rotary: RotaryTable | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this block's part of the new state."""
        y = self.norm(x)
        if isinstance(self.mixer, SelfAttention):
            y, present = self.mixer(y, state, prefix, step, rotary)
        else:
            y, present = self.mixer(y, state, prefix, step)
        x = x + self.dropout(y)
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x, present


class Hybrid(nn.Module):
    """See the module's description; follows :class:`edgellm.models.protocol.LanguageModel`."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, mixer) for mixer in config.pattern)
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, logit_width(config), bias=False)
        has_attention = any(mixer in ATTENTIONS for mixer in config.pattern)
        self.rotary = (
            RotaryTable(config.head_dim, config.max_context, config.rope_theta)
            if config.rotary and has_attention
            else None
        )
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def state_specs(self) -> list[StateSpec]:
        """K and V of each attention, h (and c) of each recurrence."""
        dtype = str(self.embedding.weight.dtype).removeprefix("torch.")
        mixers = [block.mixer for block in self.blocks if isinstance(block, Block)]
        return [spec for i, mixer in enumerate(mixers) for spec in mixer.state_specs(f"blocks.{i}", dtype)]

    def forward(
        self, tokens: Tensor, state: State | None = None, step: Step | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (batch, time) to logits (batch, count, vocab_size or num_labels) and the new state."""
        state, step = state or {}, step or Step.whole(tokens)
        x = self.dropout(self.embedding(tokens))  # (batch, time, width)
        present: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            x, new = block(x, state, f"blocks.{i}", step, self.rotary)
            present |= new
        return self.head(take_positions(self.norm(x), step.logit_positions)), present


ARCHITECTURE = Architecture(name="hybrid", config=HybridConfig, build=Hybrid, presets=PRESETS)
