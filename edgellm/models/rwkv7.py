"""RWKV, version 7: a memory that fades feature by feature, and from which each token takes a part of what a key holds.

Peng et al. 2025, arXiv:2503.14456. Embedding -> norm -> N layers, each a norm and a time mixing, then a norm and a
channel mixing, each beside a residual -> norm -> head. The memory S (value, key) of a head becomes
S diag(w) - S k k^T diag(a) + v k~^T: what it holds of the normed key k is lessened by a, and the value is written under
the token's own key k~. Values of later layers mix with those of the first. No state grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.models.layers import Stack
from edgellm.models.layers.shift import Shift
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.models.rwkv7_files import HUGGING_FACE, TENSORS, USES
from edgellm.models.shapes import EndlessShape
from edgellm.ops import take_positions, token_by_token
from edgellm_runtime.spec import BATCH, StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "RWKV7", "RWKV7Config", "TimeMixing7"]

_FADES = -0.6065306597126334  # -exp(-1/2), the logarithm of the least that is left of the memory at a token


@dataclass(frozen=True, kw_only=True)
class RWKV7Config(EndlessShape):
    """The shape of an :class:`RWKV7`; ``width`` is a multiple of ``head_dim``.

    Args:
        head_dim: features of a head's keys and values, whose norm has so many times ``norm_eps``.
        hidden: features within a channel mixing.
        decay_rank: rank of what decays are made by, and so those of the shares of the key, the value and the gate.
        share_rank: see ``decay_rank``.
        value_rank: see ``decay_rank``.
        gate_rank: see ``decay_rank``.
    """

    head_dim: int
    hidden: int
    decay_rank: int = 64
    share_rank: int = 64
    value_rank: int = 32
    gate_rank: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.head_dim:
            raise ConfigError(f"width {self.width} is no multiple of head_dim {self.head_dim}")


PRESETS: Mapping[str, RWKV7Config] = {
    "tiny": RWKV7Config(
        vocab_size=1024, width=128, num_layers=4, head_dim=32, hidden=512, decay_rank=16, share_rank=16, value_rank=16,
        gate_rank=32,
    ),
}  # fmt: skip


class LowRank(nn.Module):
    """up(activation(down(x))), with a bias or without."""

    def __init__(self, width: int, rank: int, *, bias: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=bias)


class TimeMixing7(nn.Module):
    """out(gate * (norm(read(memory)) + (r . bonus k) v))."""

    def __init__(self, config: RWKV7Config, number: int) -> None:
        super().__init__()
        c, self.first = config, number == 0
        self.head_dim, self.num_heads = c.head_dim, c.width // c.head_dim
        self.shift = Shift(c.width, USES)
        self.r_proj, self.k_proj, self.v_proj = (nn.Linear(c.width, c.width, bias=False) for _ in range(3))
        self.decay, self.share = (LowRank(c.width, rank, bias=True) for rank in (c.decay_rank, c.share_rank))
        self.value = None if self.first else LowRank(c.width, c.value_rank, bias=True)
        self.gate = LowRank(c.width, c.gate_rank, bias=False)
        self.key_gain, self.key_share = nn.Parameter(torch.ones(c.width)), nn.Parameter(torch.ones(c.width))
        self.bonus = nn.Parameter(torch.zeros(self.num_heads, c.head_dim))
        self.norm = nn.GroupNorm(self.num_heads, c.width, eps=c.head_dim * c.norm_eps)
        self.out_proj = nn.Linear(c.width, c.width, bias=False)

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """The memories of the heads, and the token before."""
        shape = (BATCH, self.num_heads, self.head_dim, self.head_dim)
        memory = StateSpec(f"{prefix}.memory", shape, dtype, "replace")
        return [memory, *self.shift.state_specs(f"{prefix}.before", dtype)]

    def forward(
        self, x: Tensor, first: Tensor | None, state: State, prefix: str, step: Step
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, the first layer's values, and this layer's part of the new state."""
        (xr, xw, xk, xv, xa, xg), present = self.shift(x, state, f"{prefix}.before", step)
        r, k, v = self.r_proj(xr), self.k_proj(xk), self.v_proj(xv)
        left = torch.exp(_FADES * torch.sigmoid(self.decay.up(torch.tanh(self.decay.down(xw)))))
        a = torch.sigmoid(self.share.up(self.share.down(xa)))
        if self.value is None or first is None:
            first = v
        else:
            v = v + (first - v) * torch.sigmoid(self.value.up(self.value.down(xv)))
        key = F.normalize(self._heads(k * self.key_gain), dim=-1)
        k = k * (1 + (a - 1) * self.key_share)
        r, k, v, left, a = (self._heads(t) for t in (r, k, v, left, a))  # (batch, time, heads, head_dim)
        memory = state[f"{prefix}.memory"] if state else torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None])
        valid = (torch.arange(x.shape[1], device=x.device) < step.lengths[:, None])[:, :, None, None, None]
        memory, y = token_by_token(_step, [memory], [r, left, k, v, key, key * a, valid])
        y = self.norm(y.reshape(-1, x.shape[2])).reshape(x.shape)
        bonus = (r * k * self.bonus).sum(-1, keepdim=True) * v
        out: Tensor = self.out_proj((y + bonus.flatten(2)) * self.gate.up(torch.sigmoid(self.gate.down(xg))))
        return out, first, present | {f"{prefix}.memory": memory} if state else {}

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim)


def _step(
    memory: Tensor, r: Tensor, left: Tensor, k: Tensor, v: Tensor, key: Tensor, lessened: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: the memory (batch, heads, values, keys), valid (batch, 1, 1, 1), the rest (batch, heads, head_dim)."""
    held = memory @ key[..., None]  # (batch, heads, values, 1)
    new = memory * left[..., None, :] - held * lessened[..., None, :] + v[..., None] * k[..., None, :]
    return torch.where(valid, new, memory), (new @ r[..., None]).squeeze(-1)


class ChannelMixing7(nn.Module):
    """value(relu(key(x))^2)."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.shift = Shift(config.width, ("key",))
        self.k_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor, state: State, prefix: str, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        (k,), present = self.shift(x, state, f"{prefix}.channel", step)
        y: Tensor = self.v_proj(self.k_proj(k).relu().square())
        return y, present


class Layer(nn.Module):
    """Both mixings, each behind a norm and beside a residual."""

    def __init__(self, config: RWKV7Config, number: int) -> None:
        super().__init__()
        self.time_norm, self.channel_norm = (nn.LayerNorm(config.width, eps=config.norm_eps) for _ in range(2))
        self.time, self.channel = TimeMixing7(config, number), ChannelMixing7(config)

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """Those of both."""
        before = self.channel.shift.state_specs(f"{prefix}.channel", dtype)
        return [*self.time.state_specs(prefix, dtype), *before]


class RWKV7(Stack):
    """See the module's description; follows :class:`edgellm.models.protocol.LanguageModel`."""

    def __init__(self, config: RWKV7Config) -> None:
        c = config
        embedding_norm, norm = (nn.LayerNorm(c.width, eps=c.norm_eps) for _ in range(2))
        layers = (Layer(c, number) for number in range(c.num_layers))
        super().__init__(c, layers, embedding_norm=embedding_norm, norm=norm)

    def forward(
        self, tokens: Tensor, state: State | None = None, step: Step | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (batch, time) to logits (batch, count, vocab_size) and the new state."""
        state, step = state or {}, step or Step.whole(tokens)
        x, first = self.embedded(tokens), None  # (batch, time, width)
        present: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            y, first, new = layer.time(layer.time_norm(x), first, state, f"layers.{i}", step)
            x = x + y
            y, more = layer.channel(layer.channel_norm(x), state, f"layers.{i}", step)
            x, present = x + y, present | new | more
        return self.head(take_positions(self.norm(x), step.logit_positions)), present


ARCHITECTURE = Architecture(
    name="rwkv7", config=RWKV7Config, build=RWKV7, presets=PRESETS, huggingface=HUGGING_FACE, tensors=TENSORS
)
