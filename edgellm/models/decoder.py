"""The Llama-style transformer decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Llama: Touvron et al. 2023, arXiv:2302.13971. Foreign names of configuration and tensors are translated here, once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgellm_runtime.spec import StateSpec
from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.models.layers import GatedMLP, RotaryTable, SelfAttention
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.ops import take_positions

__all__ = ["ARCHITECTURE", "PRESETS", "Decoder", "DecoderConfig"]


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a :class:`Decoder`.

    Args:
        vocab_size: tokens.
        width: features between layers.
        num_layers: layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides ``num_heads``.
        head_dim: features of one head.
        mlp_width: hidden features of the gated MLP.
        max_context: the most tokens that a row may hold.
        rope_theta: base of the rotary frequencies.
        norm_eps: added to the mean square in the norms.
        tie_embeddings: whether the vocabulary projection is the embedding.
        attention_bias: whether the query, key and value projections have a bias.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_context: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    attention_bias: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (type(value) is not int or value < 1):
                raise ConfigError(f"{field.name} is {value!r}; it must be a positive whole number")
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ConfigError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}, and head_dim "
                f"{self.head_dim} even"
            )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DecoderConfig:
        """From what :meth:`to_json` gave.

        Raises:
            ConfigError: an unknown key or an impossible value.
        """
        unknown = data.keys() - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"unknown configuration keys {sorted(unknown)} for the decoder model")
        return cls(**data)


PRESETS: Mapping[str, DecoderConfig] = {
    "tiny": DecoderConfig(
        vocab_size=1024, width=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=352,
        max_context=512,
    ),
}  # fmt: skip


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        c = config
        self.attention_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.attention = SelfAttention(c.width, c.num_heads, c.num_kv_heads, c.head_dim, bias=c.attention_bias)
        self.mlp_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.mlp = GatedMLP(c.width, c.mlp_width)

    def forward(
        self, x: Tensor, state: State, prefix: str, step: Step, rotary: RotaryTable
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        y, present = self.attention(self.attention_norm(x), state, prefix, step, rotary)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), present


class Decoder(nn.Module):
    """See the module's description; follows :class:`edgellm.models.protocol.LanguageModel`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.rotary = RotaryTable(config.head_dim, config.max_context, config.rope_theta)
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def state_specs(self) -> list[StateSpec]:
        """K and V of each layer."""
        dtype = str(self.embedding.weight.dtype).removeprefix("torch.")
        return [
            spec for i, layer in enumerate(self.layers) for spec in layer.attention.state_specs(f"layers.{i}", dtype)
        ]

    def forward(
        self, tokens: Tensor, state: State | None = None, step: Step | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (batch, time) to logits (batch, count, vocab_size) and the new state."""
        state, step = state or {}, step or Step.whole(tokens)
        x = self.embedding(tokens)  # (batch, time, width)
        present: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            x, new = layer(x, state, f"layers.{i}", step, self.rotary)
            present |= new
        return self.head(take_positions(self.norm(x), step.logit_positions)), present


ARCHITECTURE = Architecture(name="decoder", config=DecoderConfig, build=Decoder, presets=PRESETS)
