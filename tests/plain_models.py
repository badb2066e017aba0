"""Language models of plain PyTorch, without one canonical op: what somebody writes on the first day."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellm.models.protocol import State, Step
from edgellm_runtime.spec import BATCH, CAPACITY, StateSpec

__all__ = ["PlainConfig", "PlainGemma"]


@dataclass(frozen=True)
class PlainConfig:
    """The shape of a :class:`PlainGemma`."""

    vocab_size: int = 101
    max_context: int = 64
    width: int = 64
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    mlp_width: int = 128
    window: int = 8
    soft_cap: float = 50.0
    logit_cap: float = 30.0


class Norm(nn.Module):
    """An RMS norm whose gain is 1 + weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Attention(nn.Module):
    """Grouped queries over a cache, with rotary positions and a soft cap, over a window in every other layer."""

    def __init__(self, config: PlainConfig, name: str, window: int) -> None:
        super().__init__()
        self.config, self.name, self.window = config, name, window
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.width, heads * dim, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(config.width, kv_heads * dim, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(heads * dim, config.width, bias=False)

    def state_specs(self) -> list[StateSpec]:
        """Keys and values."""
        shape = (BATCH, self.config.num_kv_heads, CAPACITY, self.config.head_dim)
        return [StateSpec(f"{self.name}.{n}", shape, "float32", "append") for n in "kv"]

    def forward(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's new state."""
        batch, time, _ = x.shape
        c = self.config
        places = step.past_lengths[:, None] + torch.arange(time)  # (batch, time)
        q = self.rotated(self.q_proj(x).view(batch, time, c.num_heads, c.head_dim).transpose(1, 2), places)
        k = self.rotated(self.k_proj(x).view(batch, time, c.num_kv_heads, c.head_dim).transpose(1, 2), places)
        v = self.v_proj(x).view(batch, time, c.num_kv_heads, c.head_dim).transpose(1, 2)
        slots = places[:, None, :, None].long().expand_as(k)
        past_k, past_v = (
            state.get(f"{self.name}.{n}", x.new_zeros(batch, c.num_kv_heads, time, c.head_dim)) for n in "kv"
        )
        k, v = past_k.scatter(2, slots, k), past_v.scatter(2, slots, v)
        keys, values = (t.repeat_interleave(c.num_heads // c.num_kv_heads, dim=1) for t in (k, v))
        scores = q @ keys.transpose(2, 3) * c.head_dim**-0.5  # (batch, heads, time, capacity)
        scores = c.soft_cap * torch.tanh(scores / c.soft_cap)
        seen = torch.arange(k.shape[2])
        visible = (seen <= places[..., None]) & (seen > places[..., None] - self.window)
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
        y = scores.softmax(dim=-1) @ values
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, time, -1))
        return out, {f"{self.name}.k": k, f"{self.name}.v": v} if state else {}

    def rotated(self, x: Tensor, places: Tensor) -> Tensor:
        """Rotary positions by hand."""
        half = x.shape[-1] // 2
        angles = places[..., None] * 10000.0 ** -(torch.arange(half) / half)  # (batch, time, half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):
    """Attention and an MLP, each between two norms and beside a residual."""

    def __init__(self, config: PlainConfig, index: int) -> None:
        super().__init__()
        window = config.window if index % 2 == 0 else config.max_context
        self.attention = Attention(config, f"layers.{index}", window)
        self.norms = nn.ModuleList(Norm(config.width) for _ in range(4))
        self.gate, self.up = (nn.Linear(config.width, config.mlp_width, bias=False) for _ in range(2))
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this block's new state."""
        y, present = self.attention(self.norms[0](x), state, step)
        x = x + self.norms[1](y)
        y = self.norms[2](x)
        return x + self.norms[3](self.down(F.gelu(self.gate(y), approximate="tanh") * self.up(y))), present


class PlainGemma(nn.Module):
    """In the shape of Gemma 2: windows, soft caps, norms before and after, a tied and scaled table."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.config = config
        self.table = nn.Parameter(torch.randn(config.vocab_size, config.width) * 0.05)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = Norm(config.width)

    def state_specs(self) -> list[StateSpec]:
        """Keys and values of each layer."""
        return [spec for block in self.blocks for spec in block.attention.state_specs()]  # type: ignore[operator, union-attr]

    def forward(self, tokens: Tensor, state: State | None = None, step: Step | None = None) -> Any:
        """Tokens (batch, time) to logits (batch, count, vocab_size) and the new state."""
        state, step = state or {}, step or Step.whole(tokens)
        x = self.table[tokens] * self.config.width**0.5
        present: dict[str, Tensor] = {}
        for block in self.blocks:
            x, new = block(x, state, step)
            present |= new
        x = self.norm(x)
        x = x.gather(1, step.logit_positions[:, :, None].expand(-1, -1, self.config.width))
        logits = F.linear(x, self.table)
        return self.config.logit_cap * torch.tanh(logits / self.config.logit_cap), present
