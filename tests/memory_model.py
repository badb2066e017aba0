"""A model with a static state: keys and values of a memory that a row's first token writes and every token reads.

Its cross-attention is plain PyTorch, as a user would write it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgellm.models.layers import RotaryTable, SelfAttention
from edgellm.models.protocol import State, Step
from edgellm.ops import take_positions
from edgellm_runtime.spec import BATCH, StateSpec


@dataclass(frozen=True)
class MemoryConfig:
    """The shape of a :class:`MemoryModel`; the memory has ``slots``, and so much whatever the context."""

    vocab_size: int
    max_context: int
    width: int = 64
    heads: int = 4
    slots: int = 6


class MemoryModel(nn.Module):
    """Self-attention, then cross-attention to a memory; follows :class:`edgellm.models.protocol.LanguageModel`."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config, self.head_dim = config, config.width // config.heads
        width, heads = config.width, config.heads
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.norm, self.cross_norm, self.last_norm = (nn.RMSNorm(width, eps=1e-5) for _ in range(3))
        self.attention = SelfAttention(width, heads, heads, self.head_dim, bias=False)
        self.rotary = RotaryTable(self.head_dim, config.max_context, 10000.0)
        self.write = nn.Linear(width, 2 * config.slots * width)
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, config.vocab_size)

    def state_specs(self) -> list[StateSpec]:
        """The self-attention's cache, and the memory."""
        shape = (BATCH, self.config.heads, self.config.slots, self.head_dim)
        memory = [StateSpec(f"memory.{name}", shape, "float32", "static") for name in ("k", "v")]
        return [*self.attention.state_specs("attention", "float32"), *memory]

    def forward(
        self, tokens: Tensor, state: State | None = None, step: Step | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (batch, time) to logits (batch, count, vocab_size) and the new state."""
        state, step = state or {}, step or Step.whole(tokens)
        x = self.embedding(tokens)  # (batch, time, width)
        k, v = self._memory(x, state, step)
        y, present = self.attention(self.norm(x), state, "attention", step, self.rotary)
        x = x + y
        q = self.query(self.cross_norm(x)).unflatten(2, (self.config.heads, -1)).transpose(1, 2)
        shares = (q @ k.transpose(2, 3) * self.head_dim**-0.5).softmax(-1)  # (batch, heads, time, slots)
        x = x + self.out((shares @ v).transpose(1, 2).flatten(2))
        logits: Tensor = self.head(take_positions(self.last_norm(x), step.logit_positions))
        return logits, present | ({"memory.k": k, "memory.v": v} if state else {})

    def _memory(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, Tensor]:
        """What the first token writes, or what it has written, (batch, heads, slots, head_dim) each."""
        parts = self.write(x[:, :1]).unflatten(2, (2, self.config.heads, self.config.slots, self.head_dim))
        k, v = parts.squeeze(1).unbind(1)
        if not state:
            return k, v
        begun = (step.past_lengths > 0)[:, None, None, None]
        return torch.where(begun, state["memory.k"], k), torch.where(begun, state["memory.v"], v)
