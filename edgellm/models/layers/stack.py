"""The frame of a causal language model: embedding -> blocks -> norm -> head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, cast

from torch import Tensor, nn

from edgellm.models.layers.attention import SelfAttention
from edgellm.models.layers.rotary import RotaryTable
from edgellm.models.protocol import State, Step
from edgellm.ops import take_positions
from edgellm_runtime.spec import StateSpec

__all__ = ["Block", "Stack", "StackConfig", "scaled"]


class StackConfig(Protocol):
    """What a :class:`Stack` reads of a configuration."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_context(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def tie_embeddings(self) -> bool: ...


class Stacked(Protocol):
    """What a :class:`Stack` asks of a layer."""

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """Those of its mixers."""
        ...


class Block(nn.Module):
    """Mixers behind a norm, summed, and what works on each token alone behind another, each beside a residual.

    Args:
        width: features of its input and output.
        norm_eps: added to the mean square in the norms.
        mixers: by the names that parameters have; none for a block that mixes nothing. Their states share the block's
            prefix.
        mlp: a module of one token's features; None for none.
    """

    def __init__(
        self, width: int, norm_eps: float, mixers: Mapping[str, nn.Module], mlp: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.mixers = tuple(mixers)
        self.mixer_norm = nn.RMSNorm(width, eps=norm_eps) if mixers else None
        for name, mixer in mixers.items():
            self.add_module(name, mixer)
        self.mlp_norm = nn.RMSNorm(width, eps=norm_eps) if mlp is not None else None
        self.mlp = mlp

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """Those of its mixers."""
        return [spec for name in self.mixers for spec in getattr(self, name).state_specs(prefix, dtype)]

    def forward(
        self, x: Tensor, state: State, prefix: str, step: Step, rotary: RotaryTable | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this block's part of the new state."""
        present: dict[str, Tensor] = {}
        if self.mixers:
            y, present = self.mixed(x, state, prefix, step, rotary)
            x = x + y
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, present

    def mixed(
        self, x: Tensor, state: State, prefix: str, step: Step, rotary: RotaryTable | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the mixers, of which there is one at least, make of x behind the norm, without the residual."""
        assert self.mixer_norm is not None
        before, total = self.mixer_norm(x), None
        present: dict[str, Tensor] = {}
        for name in self.mixers:
            mixer = getattr(self, name)
            turned = (rotary,) if isinstance(mixer, SelfAttention) else ()
            y, new = mixer(before, state, prefix, step, *turned)
            total, present = y if total is None else total + y, present | new
        assert total is not None
        return total, present


class Stack(nn.Module):
    """Follows :class:`edgellm.models.protocol.LanguageModel`.

    Args:
        config: of the model.
        blocks: first to last: :class:`Block`, or what is called as one and has state specs.
        rotary: positions that every attention turns by; None for none.
        embedding_scale: factor on embeddings.
        logit_scale: factor on logits.
        logit_cap: logits x become cap * tanh(x / cap); 0 for no cap.
        embedding_norm: of embeddings; None for none.
        norm: the last one; None for an RMS norm.
    """

    def __init__(
        self, config: StackConfig, blocks: Iterable[nn.Module], *, rotary: RotaryTable | None = None,
        embedding_scale: float = 1.0, logit_scale: float = 1.0, logit_cap: float = 0.0,
        embedding_norm: nn.Module | None = None, norm: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.embedding_scale = config, embedding_scale
        self.logit_scale, self.logit_cap = logit_scale, logit_cap
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.embedding_norm = embedding_norm
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps) if norm is None else norm
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.rotary = rotary
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def state_specs(self) -> list[StateSpec]:
        """Those of every block."""
        dtype = str(self.embedding.weight.dtype).removeprefix("torch.")
        blocks = enumerate(cast(Iterable[Stacked], self.layers))
        return [spec for i, block in blocks for spec in block.state_specs(f"layers.{i}", dtype)]

    def embedded(self, tokens: Tensor) -> Tensor:
        """(batch, time) to (batch, time, width)."""
        x = scaled(self.embedding(tokens), self.embedding_scale)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def forward(
        self, tokens: Tensor, state: State | None = None, step: Step | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (batch, time) to logits (batch, count, vocab_size) and the new state."""
        state, step = state or {}, step or Step.whole(tokens)
        x = self.embedded(tokens)
        present: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            x, new = layer(x, state, f"layers.{i}", step, self.rotary)
            present |= new
        logits = self.head(take_positions(self.norm(x), step.logit_positions))
        logits, cap = scaled(logits, self.logit_scale), self.logit_cap
        return logits if not cap else cap * (logits / cap).tanh(), present


def scaled(x: Tensor, factor: float) -> Tensor:
    """X times a factor, where there is one."""
    return x if factor == 1 else x * factor
