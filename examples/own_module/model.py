"""A language model that edgellm knows nothing of: token shift, gated retention, and one attention layer at the end.

Token shift: each feature is mixed with the one of the token before (RWKV, Peng et al. 2023, arXiv:2305.13048).
Retention: a matrix a head that decays and takes in each token's key and value (RetNet, Sun et al. 2023,
arXiv:2307.08621), here with a decay that depends on the token (GLA, Yang et al. 2023, arXiv:2312.06635).

Plain PyTorch but for ``attention`` and ``take_positions``. The first is an op because targets have kernels for it; the
second because only the positions that a caller asks for should be projected to the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellm.models.protocol import Step
from edgellm.ops import attention, take_positions
from edgellm_runtime.spec import BATCH, CAPACITY, StateSpec

__all__ = ["Retention", "RetentionConfig", "RetentionModel", "TailAttention"]

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class RetentionConfig:
    """The shape of a :class:`RetentionModel`. edgellm reads ``vocab_size`` and ``max_context``; the rest is ours."""

    vocab_size: int
    max_context: int = 512
    width: int = 96
    num_heads: int = 3
    num_layers: int = 3

    def to_json(self) -> dict[str, Any]:  # the trainer keeps it in the checkpoints that it writes
        return dataclasses.asdict(self)


class Retention(nn.Module):
    """y_t = q_t S_t, where S_t = a_t S_{t-1} + k_t v_t^T and 0 < a_t < 1; one matrix S a head."""

    def __init__(self, config: RetentionConfig, name: str) -> None:
        super().__init__()
        self.name, self.heads = name, config.num_heads
        self.width, self.head_dim = config.width, config.width // config.num_heads
        self.shift = nn.Parameter(torch.full((config.width,), 0.5))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.width, config.width, bias=False) for _ in range(4)
        )
        self.decay = nn.Linear(config.width, config.num_heads)
        nn.init.constant_(self.decay.bias, 4.0)  # a_t starts near 0.98: remember by default

    def state_specs(self) -> list[StateSpec]:
        """S of each head, and the last token's input; both are replaced by each step."""
        matrix = (BATCH, self.heads, self.head_dim, self.head_dim)
        return [
            StateSpec(f"{self.name}.s", matrix, "float32", "replace"),
            StateSpec(f"{self.name}.last", (BATCH, self.width), "float32", "replace"),
        ]

    def forward(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's new state."""
        batch, time, _ = x.shape
        s, last = (state[n] if n in state else x.new_zeros(spec.resolve(batch, 1)) for n, spec in self._named())
        before = torch.cat([last[:, None], x], dim=1)[:, :time]  # each token's predecessor
        mixed = x + (before - x) * self.shift
        q, k, v = (self._heads(p(mixed)) for p in (self.q_proj, self.k_proj, self.v_proj))
        k = k * self.head_dim**-0.5
        # Padding must leave no trace: it adds no key, and the state does not decay over it.
        valid = torch.arange(time, device=x.device) < step.lengths[:, None]  # (batch, time)
        k = k * valid[:, None, :, None]
        decay = F.logsigmoid(self.decay(mixed)).transpose(1, 2) * valid[:, None]  # (batch, heads, time), log a_t
        total = decay.cumsum(dim=2)

        y = self._read(q, k, v, s, total)
        left = (total[:, :, -1:] - total).exp()[..., None]  # what of each token is left at the end
        s = total[:, :, -1, None, None].exp() * s + (k * left).transpose(2, 3) @ v
        last = take_positions(x, (step.lengths - 1).long()[:, None])[:, 0]
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, time, self.width))
        return out, {f"{self.name}.s": s, f"{self.name}.last": last}

    def _read(self, q: Tensor, k: Tensor, v: Tensor, s: Tensor, total: Tensor) -> Tensor:
        """What each token reads: from the chunk's tokens up to itself, and from what the state held before."""
        places = torch.arange(q.shape[2], device=q.device)
        earlier = places <= places[:, None]  # (time, time)
        between = (total[..., :, None] - total[..., None, :]).masked_fill(~earlier, -torch.inf).exp()
        return ((q @ k.transpose(2, 3)) * between) @ v + total.exp()[..., None] * (q @ s)

    def _named(self) -> list[tuple[str, StateSpec]]:
        return [(spec.name, spec) for spec in self.state_specs()]

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.heads, self.head_dim).transpose(1, 2)  # (batch, heads, time, head_dim)


class TailAttention(nn.Module):
    """Exact attention over all that came before; order comes from the retention layers below it."""

    def __init__(self, config: RetentionConfig, name: str) -> None:
        super().__init__()
        self.name, self.heads, self.head_dim = name, config.num_heads, config.width // config.num_heads
        self.qkv_proj = nn.Linear(config.width, 3 * config.width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def state_specs(self) -> list[StateSpec]:
        """Keys and values: one slot more for each token."""
        shape = (BATCH, self.heads, CAPACITY, self.head_dim)
        return [StateSpec(f"{self.name}.{n}", shape, "float32", "append") for n in ("k", "v")]

    def forward(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's new state."""
        q, k, v = self.qkv_proj(x).chunk(3, dim=-1)
        y, k, v = attention(
            q, k, v, state.get(f"{self.name}.k"), state.get(f"{self.name}.v"), step.past_lengths, step.lengths,
            None, None, num_heads=self.heads, num_kv_heads=self.heads, scale=self.head_dim**-0.5,
        )  # fmt: skip
        out: Tensor = self.o_proj(y)
        return out, {} if k is None or v is None else {f"{self.name}.k": k, f"{self.name}.v": v}


class Block(nn.Module):
    """A mixer and an MLP, each behind a LayerNorm and beside a residual."""

    def __init__(self, config: RetentionConfig, mixer: Retention | TailAttention) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm, self.mlp_norm = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )

    def forward(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this block's new state."""
        y, present = self.mixer(self.norm(x), state, step)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), present


class RetentionModel(nn.Module):
    """Retention layers, then one attention layer. This is all that edgellm asks of a model."""

    def __init__(self, config: RetentionConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        mixers = [Retention(config, f"layers.{i}") for i in range(config.num_layers - 1)]
        blocks = [Block(config, mixer) for mixer in mixers]
        blocks.append(Block(config, TailAttention(config, f"layers.{config.num_layers - 1}")))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def state_specs(self) -> list[StateSpec]:
        """Everything that the model carries from step to step."""
        return [spec for block in self.blocks for spec in block.mixer.state_specs()]  # type: ignore[operator, union-attr]

    def forward(
        self, tokens: Tensor, state: State | None = None, step: Step | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (batch, time) to logits (batch, count, vocab_size) and the new state."""
        state, step = state or {}, step or Step.whole(tokens)
        x = self.embedding(tokens)  # (batch, time, width)
        present: dict[str, Tensor] = {}
        for block in self.blocks:
            x, new = block(x, state, step)
            present |= new
        return self.head(take_positions(self.norm(x), step.logit_positions)), present
