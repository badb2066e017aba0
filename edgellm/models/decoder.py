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
from edgellm.models.decoder_files import GGUF_FILES, HUGGING_FACE
from edgellm.models.layers import GatedMLP, RotaryTable, Stack
from edgellm.models.layers.mlp import ACTIVATIONS
from edgellm.models.layers.stack import scaled
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.models.shapes import RotaryShape
from edgellm_runtime.spec import StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "Decoder", "DecoderConfig"]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(RotaryShape):
    """The shape of a :class:`Decoder`.

    Args:
        num_layers: layers.
        attention_bias: whether the query, key and value projections have a bias.
        qk_norm: whether each head's query and key pass an RMS norm before their rotation.
        output_bias: whether attention's output projection has a bias.
        mlp_bias: whether the MLP's projections have a bias.
        activation: of the MLP's gate; one of :data:`edgellm.models.layers.mlp.ACTIVATIONS`.
        attention_scale: factor on attention's scores; None: 1 / sqrt(head_dim).
        rotated: how many features of a head turn with the position; None for all. Others lie as
            :func:`edgellm.models.layers.rotary.order_of_part` has them.
        unturned: layers, from 0, whose attention does not turn at all.
        windows: of each layer, how many tokens up to itself a token sees, 0 for all; empty: all in every layer.
        embedding_scale: factor on embeddings.
        residual_scale: factor on what attention and MLP add.
        logit_scale: factor on logits.
    """

    num_layers: int
    tie_embeddings: bool = True
    attention_bias: bool = False
    qk_norm: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    attention_scale: float | None = None
    rotated: int | None = None
    unturned: Sequence[int] = ()
    windows: Sequence[int] = ()
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
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
        self.attention = c.attention(
            bias=c.attention_bias, output_bias=c.output_bias, scale=c.attention_scale, qk_norm=c.qk_norm,
            norm_eps=c.norm_eps, window=c.windows[number] if c.windows else 0, ring=False,
        )  # fmt: skip
        self.mlp_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.mlp = GatedMLP(c.width, c.mlp_width, bias=c.mlp_bias, activation=c.activation)

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """K and V."""
        return self.attention.state_specs(prefix, dtype)

    def forward(
        self, x: Tensor, state: State, prefix: str, step: Step, rotary: RotaryTable
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        turned = rotary if self.turns else None
        y, present = self.attention(self.attention_norm(x), state, prefix, step, turned)
        x = x + scaled(y, self.residual_scale)
        return x + scaled(self.mlp(self.mlp_norm(x)), self.residual_scale), present


class Decoder(Stack):
    """See the module's description; follows :class:`edgellm.models.protocol.LanguageModel`."""

    def __init__(self, config: DecoderConfig) -> None:
        c = config
        super().__init__(
            c, (Layer(c, number) for number in range(c.num_layers)), rotary=c.rotary(),
            embedding_scale=c.embedding_scale, logit_scale=c.logit_scale,
        )  # fmt: skip


ARCHITECTURE = Architecture(
    name="decoder", config=DecoderConfig, build=Decoder, presets=PRESETS, huggingface=HUGGING_FACE, gguf=GGUF_FILES
)
