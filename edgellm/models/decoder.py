"""The Llama-style transformer decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

By configuration norms of each head's query and key, biases, windows, layers that do not turn, heads that turn in part,
and factors on what is added.

Llama: Touvron et al. 2023, arXiv:2302.13971. How other people's checkpoints are read stands in ``decoder_files.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.models.config import Shape, check_heads
from edgellm.models.decoder_files import GGUF_FILES, HUGGING_FACE
from edgellm.models.layers import GatedMLP, RotaryTable, SelfAttention
from edgellm.models.layers.mlp import ACTIVATIONS
from edgellm.models.layers.stack import scaled
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.ops import take_positions
from edgellm_runtime.spec import StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "Decoder", "DecoderConfig"]


@dataclass(frozen=True)
class DecoderConfig(Shape):
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
        qk_norm: whether each head's query and key pass an RMS norm before their rotation.
        output_bias: whether attention's output projection has a bias.
        mlp_bias: whether the MLP's projections have a bias.
        activation: of the MLP's gate; one of :data:`edgellm.models.layers.mlp.ACTIVATIONS`.
        attention_scale: factor on attention's scores; None: 1 / sqrt(head_dim).
        rotated: how many features of a head turn with the position; None for all. Others lie as
            :func:`edgellm.models.layers.rotary.order_of_part` has them.
        rope_factors: (rotated / 2,), each rotary frequency is divided by its own; empty: by none.
        rope_amplitude: factor on the rotary cosines and sines.
        unturned: layers, from 0, whose attention does not turn at all.
        windows: of each layer, how many tokens up to itself a token sees, 0 for all; empty: all in every layer.
        embedding_scale: factor on embeddings.
        residual_scale: factor on what attention and MLP add.
        logit_scale: factor on logits.
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
    qk_norm: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    attention_scale: float | None = None
    rotated: int | None = None
    rope_factors: Sequence[float] = ()
    rope_amplitude: float = 1.0
    unturned: Sequence[int] = ()
    windows: Sequence[int] = ()
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation is {self.activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
        if self.turning % 2 or not 0 < self.turning <= self.head_dim:
            raise ConfigError(f"rotated is {self.rotated!r}; it must be even and at most head_dim {self.head_dim}")
        if self.rope_factors and len(self.rope_factors) != self.turning // 2:
            raise ConfigError(
                f"rope_factors has {len(self.rope_factors)} numbers; {self.turning} features of a head turn, with "
                f"{self.turning // 2} frequencies"
            )
        layers = range(self.num_layers)
        if self.windows and (
            len(self.windows) != len(layers) or any(type(w) is not int or w < 0 for w in self.windows)
        ):
            raise ConfigError(f"windows is {self.windows}; it has a whole number for each layer, 0 for no window")
        if any(layer not in layers for layer in self.unturned):
            raise ConfigError(f"unturned is {self.unturned}; it must name layers from 0 to {self.num_layers - 1}")
        numbers = {name: getattr(self, name) for name in _FACTORS} | {"attention_scale": self.attention_scale or 1.0}
        for name, number in (*numbers.items(), *(("rope_factors", factor) for factor in self.rope_factors)):
            if type(number) not in (int, float) or not 0 < number < math.inf:
                raise ConfigError(f"{name} has {number!r}; it must be a positive number")

    @property
    def turning(self) -> int:
        """Features of a head that turn with the position."""
        return self.head_dim if self.rotated is None else self.rotated


_FACTORS = ("rope_amplitude", "embedding_scale", "residual_scale", "logit_scale")
PRESETS: Mapping[str, DecoderConfig] = {
    "tiny": DecoderConfig(
        vocab_size=1024, width=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=352,
        max_context=512,
    ),
}  # fmt: skip


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: DecoderConfig, number: int) -> None:
        super().__init__()
        c = config
        self.turns, self.residual_scale = number not in c.unturned, c.residual_scale
        self.attention_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.attention = SelfAttention(
            c.width, c.num_heads, c.num_kv_heads, c.head_dim, bias=c.attention_bias,
            output_bias=c.output_bias, scale=c.attention_scale, qk_norm=c.qk_norm, norm_eps=c.norm_eps,
            window=c.windows[number] if c.windows else 0, ring=False,
        )  # fmt: skip
        self.mlp_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.mlp = GatedMLP(c.width, c.mlp_width, bias=c.mlp_bias, activation=c.activation)

    def forward(
        self, x: Tensor, state: State, prefix: str, step: Step, rotary: RotaryTable
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        turned = rotary if self.turns else None
        y, present = self.attention(self.attention_norm(x), state, prefix, step, turned)
        x = x + scaled(y, self.residual_scale)
        return x + scaled(self.mlp(self.mlp_norm(x)), self.residual_scale), present


class Decoder(nn.Module):
    """See the module's description; follows :class:`edgellm.models.protocol.LanguageModel`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.rotary = RotaryTable(
            config.turning, config.max_context, config.rope_theta, factors=config.rope_factors,
            amplitude=config.rope_amplitude, still=config.head_dim - config.turning,
        )  # fmt: skip
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def state_specs(self) -> list[StateSpec]:
        """K and V of each layer."""
        dtype = str(self.embedding.weight.dtype).removeprefix("torch.")
        mixers = [layer.attention for layer in self.layers if isinstance(layer, Layer)]
        return [spec for i, mixer in enumerate(mixers) for spec in mixer.state_specs(f"layers.{i}", dtype)]

    def forward(
        self, tokens: Tensor, state: State | None = None, step: Step | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (batch, time) to logits (batch, count, vocab_size) and the new state."""
        state, step = state or {}, step or Step.whole(tokens)
        x = scaled(self.embedding(tokens), self.config.embedding_scale)  # (batch, time, width)
        present: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            x, new = layer(x, state, f"layers.{i}", step, self.rotary)
            present |= new
        logits = self.head(take_positions(self.norm(x), step.logit_positions))
        return scaled(logits, self.config.logit_scale), present


ARCHITECTURE = Architecture(
    name="decoder", config=DecoderConfig, build=Decoder, presets=PRESETS, huggingface=HUGGING_FACE, gguf=GGUF_FILES
)
