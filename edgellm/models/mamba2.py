"""Mamba-2: a state space with one decay a head, which depends on the token; no attention and no positions.

Dao and Gu 2024, arXiv:2405.21060. Embedding -> N layers, each a norm and a mixer beside a residual -> norm -> head. A
mixer projects to a gate z, to x, B and C, which pass a short convolution, and to a step dt; then, for each head,

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T    y_t = C_t S_t + D x_t

and y is gated by z, normed and projected back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.models.config import Shape
from edgellm.models.foreign import (
    MAX_LAYERS,
    METADATA,
    Fields,
    HuggingFace,
    Names,
    Values,
    Variant,
    flag,
    neutral,
    positive,
    refuse,
    whole,
)
from edgellm.models.foreign.keys import checked_whole
from edgellm.models.layers import CausalConv
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.ops import linear_attention, take_positions
from edgellm_runtime.spec import BATCH, StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "Mamba2", "Mamba2Config"]


@dataclass(frozen=True)
class Mamba2Config(Shape):
    """The shape of a :class:`Mamba2`.

    Args:
        vocab_size: tokens.
        width: features between layers.
        num_layers: layers.
        num_heads: heads of the state space.
        head_dim: features of x in one head.
        state_size: features of B and C.
        num_groups: how many B and C there are, each shared by neighbouring heads; divides ``num_heads``.
        conv_taps: tokens that the convolution sees.
        conv_bias: whether the convolution has a bias.
        bias: whether the projections have one.
        norm_eps: added to the mean square in the norms.
        tie_embeddings: whether the vocabulary projection is the embedding.
        max_context: the most tokens that a row may hold; the model itself has no limit, and its state does not grow.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int = 1
    conv_taps: int = 4
    conv_bias: bool = True
    bias: bool = False
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_context: int = 2**20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads % self.num_groups or self.conv_taps < 2:
            raise ConfigError(
                f"num_heads {self.num_heads} must be a multiple of num_groups {self.num_groups}, and conv_taps "
                f"{self.conv_taps} at least 2"
            )


PRESETS: Mapping[str, Mamba2Config] = {
    "tiny": Mamba2Config(
        vocab_size=1024, width=128, num_layers=4, num_heads=8, head_dim=32, state_size=32, tie_embeddings=True
    ),
}


class Mixer(nn.Module):
    """The state space with its projections, convolution and gated norm."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = c = config
        self.inner, self.keys = c.num_heads * c.head_dim, c.num_groups * c.state_size  # features of x, and of B and C
        mixed = self.inner + 2 * self.keys
        self.in_proj = nn.Linear(c.width, self.inner + mixed + c.num_heads, bias=c.bias)
        self.conv = CausalConv(mixed, c.conv_taps, bias=c.conv_bias)
        self.dt_offset = nn.Parameter(torch.rand(c.num_heads).mul(4.6).sub(6.9).exp().expm1().log())  # dt 0.001 to 0.1
        self.a_log = nn.Parameter(torch.arange(1.0, c.num_heads + 1).log())
        self.d = nn.Parameter(torch.ones(c.num_heads))
        self.norm = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, c.width, bias=c.bias)

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """S of each head, and the state of the convolution."""
        shape = (BATCH, self.config.num_heads, self.config.state_size, self.config.head_dim)
        return [StateSpec(f"{prefix}.s", shape, dtype, "replace"), *self.conv.state_specs(prefix, dtype)]

    def forward(self, u: Tensor, state: State, prefix: str, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        c = self.config
        batch, time, _ = u.shape
        z, xbc, dt = torch.split(self.in_proj(u), [self.inner, self.conv.width, c.num_heads], dim=-1)
        xbc, present = self.conv(xbc, state, prefix, step)
        x, b, q = torch.split(F.silu(xbc), [self.inner, self.keys, self.keys], dim=-1)
        valid = torch.arange(time, device=u.device) < step.lengths[:, None]
        dt = F.softplus(dt + self.dt_offset) * valid[:, :, None]  # (batch, time, heads); padding adds and fades nothing
        x = x.reshape(batch, time, c.num_heads, c.head_dim)
        v = (x * dt[..., None]).flatten(2)
        y, s = linear_attention(
            q, b, v, -dt * self.a_log.exp(), state.get(f"{prefix}.s"), num_heads=c.num_heads, num_groups=c.num_groups
        )
        y = (y.reshape(x.shape) + x * self.d[:, None]).flatten(2) * F.silu(z)  # (batch, time, inner)
        out: Tensor = self.out_proj(self._normed(y))
        return out, present | {f"{prefix}.s": s} if state else {}

    def _normed(self, y: Tensor) -> Tensor:
        """The features of each group of heads are normed by themselves."""
        eps, groups = self.config.norm_eps, self.config.num_groups
        if groups == 1:
            return F.rms_norm(y, self.norm.shape, self.norm, eps)
        apart = y.reshape(*y.shape[:-1], groups, -1)  # (batch, time, groups, inner / groups)
        return F.rms_norm(apart, apart.shape[-1:], None, eps).flatten(2) * self.norm


class Layer(nn.Module):
    """A mixer, behind a norm and beside a residual."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mixer = Mixer(config)

    def forward(self, x: Tensor, state: State, prefix: str, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        y, present = self.mixer(self.mixer_norm(x), state, prefix, step)
        return x + y, present


class Mamba2(nn.Module):
    """See the module's description; follows :class:`edgellm.models.protocol.LanguageModel`."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def state_specs(self) -> list[StateSpec]:
        """Each layer's matrix a head and the tail of its convolution."""
        dtype = str(self.embedding.weight.dtype).removeprefix("torch.")
        mixers = [layer.mixer for layer in self.layers if isinstance(layer, Layer)]
        return [spec for i, mixer in enumerate(mixers) for spec in mixer.state_specs(f"layers.{i}", dtype)]

    def forward(
        self, tokens: Tensor, state: State | None = None, step: Step | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (batch, time) to logits (batch, count, vocab_size) and the new state."""
        state, step = state or {}, step or Step.whole(tokens)
        x = self.embedding(tokens)  # (batch, time, width)
        present: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            x, new = layer(x, state, f"layers.{i}", step)
            present |= new
        return self.head(take_positions(self.norm(x), step.logit_positions)), present


def _expand(name: str, values: Values, fields: Fields) -> None:
    if fields["width"] * checked_whole(name, values.get(name, 2)) != fields["num_heads"] * fields["head_dim"]:
        raise refuse(name, values.get(name))


HUGGING_FACE = HuggingFace(
    types={"mamba2": Variant()},
    keys={
        "vocab_size": whole("vocab_size", default=32768),
        "hidden_size": whole("width", default=4096),
        "num_hidden_layers": whole("num_layers", default=64, limit=MAX_LAYERS),
        "num_heads": whole("num_heads", default=128),
        "head_dim": whole("head_dim", default=64),
        "expand": _expand,
        "state_size": whole("state_size", default=128),
        "n_groups": whole("num_groups", default=8),
        "conv_kernel": whole("conv_taps", default=4),
        "use_conv_bias": flag("conv_bias", default=True),
        "use_bias": flag("bias", default=False),
        "layer_norm_epsilon": positive("norm_eps", default=1e-5),
        "tie_word_embeddings": flag("tie_embeddings", default=False),
        "hidden_act": neutral("silu", "swish"),
        "time_step_limit": neutral([0.0, float("inf")], [0.0, {"__float__": "Infinity"}], None),
        # of training, of kernels, and of precisions below the one that everything is computed in here
        **dict.fromkeys(("time_step_rank", "time_step_min", "time_step_max", "time_step_floor"), METADATA),
        **dict.fromkeys(("rescale_prenorm_residual", "chunk_size", "residual_in_fp32"), METADATA),
    },
    names=Names(
        {
            "embedding": "backbone.embeddings",
            "norm": "backbone.norm_f",
            "head": "lm_head",
            "mixer_norm": "norm",
            "mixer.in_proj": "mixer.in_proj",
            "mixer.conv": "mixer.conv1d",
            "mixer.dt_offset": "mixer.dt_bias",
            "mixer.a_log": "mixer.A_log",
            "mixer.d": "mixer.D",
            "mixer.norm": "mixer.norm.weight",
            "mixer.out_proj": "mixer.out_proj",
        },
        layers="backbone.layers",
    ),
)

ARCHITECTURE = Architecture(name="mamba2", config=Mamba2Config, build=Mamba2, presets=PRESETS, huggingface=HUGGING_FACE)
