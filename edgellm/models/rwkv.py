"""RWKV, version 4: each feature an average of what came before, that fades, and mixes with the token before.

Peng et al. 2023, arXiv:2305.13048. Embedding -> norm -> N layers, each a norm and a time mixing, then a norm and a
channel mixing, each beside a residual -> norm -> head. A time mixing averages values with the weights exp(k); the
numerator, the denominator and the largest exponent, by which both are divided, are its state. No state grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgellm.models.foreign import MAX_LAYERS
from edgellm.models.layers import Stack
from edgellm.models.layers.shift import Shift
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.models.rwkv_files import HUGGING_FACE
from edgellm.models.shapes import EndlessShape
from edgellm.ops import token_by_token
from edgellm_runtime.spec import BATCH, StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "RWKV", "RWKVConfig", "TimeMixing"]

_NONE = -30000.0  # the largest exponent of no token at all; 16 bits hold it
_LAST_NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class RWKVConfig(EndlessShape):
    """The shape of an :class:`RWKV`.

    Args:
        mixed_width: features that are averaged.
        hidden: features within a channel mixing.
        halved_every: after so many layers transformers halves the features, which norms undo but for their eps.
    """

    mixed_width: int
    hidden: int
    halved_every: int = MAX_LAYERS

    def eps(self, layer: int, eps: float) -> float:
        """Of a layer's norms: that of features which were halved, for such as were not."""
        return eps * 4.0 ** (layer // self.halved_every)


PRESETS: Mapping[str, RWKVConfig] = {
    "tiny": RWKVConfig(vocab_size=1024, width=128, num_layers=4, mixed_width=128, hidden=512, tie_embeddings=True),
}


class TimeMixing(nn.Module):
    """out(sigmoid(r) * average(k, v))."""

    def __init__(self, config: RWKVConfig) -> None:
        super().__init__()
        width, self.mixed_width = config.width, config.mixed_width
        self.shift = Shift(width, ("key", "value", "receptance"))
        self.k_proj, self.v_proj, self.r_proj = (nn.Linear(width, self.mixed_width, bias=False) for _ in range(3))
        self.decay = nn.Parameter(torch.linspace(-5.0, 3.0, self.mixed_width))
        self.first = nn.Parameter(torch.randn(self.mixed_width) * 0.5)  # what a token's own value has in addition
        self.out_proj = nn.Linear(self.mixed_width, width, bias=False)

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """Numerator, denominator and largest exponent, and the token before."""
        names = [f"{prefix}.{name}" for name in ("num", "den", "top")]
        specs = [StateSpec(name, (BATCH, self.mixed_width), dtype, "replace") for name in names]
        return [*specs, *self.shift.state_specs(f"{prefix}.before", dtype)]

    def forward(self, x: Tensor, state: State, prefix: str, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        (k, v, r), present = self.shift(x, state, f"{prefix}.before", step)
        k, v = self.k_proj(k), self.v_proj(v)
        valid = (torch.arange(x.shape[1], device=x.device) < step.lengths[:, None])[:, :, None]
        names = [f"{prefix}.{name}" for name in ("num", "den", "top")]
        num, den, top = (state[name] for name in names) if state else (torch.zeros_like(k[:, 0]),) * 3
        top = torch.where(den > 0, top, _NONE)
        *new, y = token_by_token(_average, [num, den, top], [k, v, valid], [-self.decay.exp(), self.first])
        out: Tensor = self.out_proj(torch.sigmoid(self.r_proj(r)) * y)
        return out, present | dict(zip(names, new, strict=True)) if state else {}


def _average(
    num: Tensor, den: Tensor, top: Tensor, k: Tensor, v: Tensor, valid: Tensor, decay: Tensor, first: Tensor
) -> tuple[Tensor, ...]:
    """One token: the states and k, v (batch, features), valid (batch, 1); the average comes last."""
    own = k + first
    most = torch.maximum(top, own)
    past, now = (top - most).exp(), (own - most).exp()
    y = (past * num + now * v) / (past * den + now)
    most = torch.maximum(top + decay, k)
    past, now = (top + decay - most).exp(), (k - most).exp()
    new = (past * num + now * v, past * den + now, most)
    return (*(torch.where(valid, n, o) for n, o in zip(new, (num, den, top), strict=True)), y)


class ChannelMixing(nn.Module):
    """sigmoid(r) * value(relu(k)^2)."""

    def __init__(self, config: RWKVConfig) -> None:
        super().__init__()
        self.shift = Shift(config.width, ("key", "receptance"))
        self.k_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.r_proj = nn.Linear(config.width, config.width, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.width, bias=False)

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """The token before."""
        return self.shift.state_specs(f"{prefix}.channel", dtype)

    def forward(self, x: Tensor, state: State, prefix: str, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        (k, r), present = self.shift(x, state, f"{prefix}.channel", step)
        y: Tensor = torch.sigmoid(self.r_proj(r)) * self.v_proj(self.k_proj(k).relu().square())
        return y, present


class Layer(nn.Module):
    """Both mixings, each behind a norm and beside a residual."""

    def __init__(self, config: RWKVConfig, number: int) -> None:
        super().__init__()
        eps = config.eps(number, config.norm_eps)
        self.time_norm, self.channel_norm = (nn.LayerNorm(config.width, eps=eps) for _ in range(2))
        self.time, self.channel = TimeMixing(config), ChannelMixing(config)

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """Those of both."""
        return [*self.time.state_specs(prefix, dtype), *self.channel.state_specs(prefix, dtype)]

    def forward(
        self, x: Tensor, state: State, prefix: str, step: Step, _rotary: None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        y, present = self.time(self.time_norm(x), state, prefix, step)
        x = x + y
        y, more = self.channel(self.channel_norm(x), state, prefix, step)
        return x + y, present | more


class RWKV(Stack):
    """See the module's description; follows :class:`edgellm.models.protocol.LanguageModel`."""

    def __init__(self, config: RWKVConfig) -> None:
        c = config
        super().__init__(
            c, (Layer(c, number) for number in range(c.num_layers)),
            embedding_norm=nn.LayerNorm(c.width, eps=c.norm_eps),
            norm=nn.LayerNorm(c.width, eps=c.eps(c.num_layers, _LAST_NORM_EPS)),
        )  # fmt: skip


ARCHITECTURE = Architecture(name="rwkv", config=RWKVConfig, build=RWKV, presets=PRESETS, huggingface=HUGGING_FACE)
