"""Gemma 2: a window in every other layer, soft caps on scores and logits, norms on both sides of each part.

Gemma team 2024, arXiv:2408.00118. Embedding, scaled -> N layers of attention and a gated MLP, each behind a norm and
before another, beside a residual -> norm -> head -> soft cap. A norm multiplies by 1 + w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.models.gemma2_files import GGUF_FILES, HUGGING_FACE
from edgellm.models.layers import GatedMLP, RotaryTable, Stack
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.models.shapes import RotaryShape
from edgellm_runtime.spec import StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "Gemma2", "Gemma2Config"]


@dataclass(frozen=True, kw_only=True)
class Gemma2Config(RotaryShape):
    """The shape of a :class:`Gemma2`.

    Args:
        windows: of each layer, first to last, how many tokens up to itself a token sees; 0 for all.
        score_divisor: scores are divided by its square root.
        score_cap: scores s become cap * tanh(s / cap); 0 for no cap.
        logit_cap: the same for logits.
    """

    windows: Sequence[int]
    score_divisor: float = 256.0
    score_cap: float = 50.0
    logit_cap: float = 30.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.windows or any(type(window) is not int or window < 0 for window in self.windows):
            raise ConfigError(f"windows is {self.windows}; it has a whole number for each layer, 0 for no window")
        for name in ("score_cap", "logit_cap"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be a positive number, or 0 for no cap")


PRESETS: Mapping[str, Gemma2Config] = {
    "tiny": Gemma2Config(
        vocab_size=1024, width=128, windows=(128, 0, 128, 0), num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=352,
        max_context=512, score_divisor=32,
    ),
}  # fmt: skip


class Norm(nn.Module):
    """An RMS norm whose gain is 1 + weight."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(config.width)), config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape."""
        return F.rms_norm(x, self.weight.shape, 1 + self.weight, self.eps)


class Layer(nn.Module):
    """Attention and MLP, each between two norms and beside a residual."""

    def __init__(self, config: Gemma2Config, window: int) -> None:
        super().__init__()
        c = config
        self.attention_norm, self.attention_post_norm, self.mlp_norm, self.mlp_post_norm = (Norm(c) for _ in range(4))
        self.attention = c.attention(scale=c.score_divisor**-0.5, softcap=c.score_cap, window=window, ring=False)
        self.mlp = GatedMLP(c.width, c.mlp_width, activation="gelu_tanh")

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """K and V."""
        return self.attention.state_specs(prefix, dtype)

    def forward(
        self, x: Tensor, state: State, prefix: str, step: Step, rotary: RotaryTable
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        y, present = self.attention(self.attention_norm(x), state, prefix, step, rotary)
        x = x + self.attention_post_norm(y)
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x))), present


class Gemma2(Stack):
    """See the module's description; follows :class:`edgellm.models.protocol.LanguageModel`."""

    def __init__(self, config: Gemma2Config) -> None:
        c = config
        super().__init__(
            c, (Layer(c, window) for window in c.windows), rotary=c.rotary(), embedding_scale=c.width**0.5,
            logit_cap=c.logit_cap, norm=Norm(c),
        )  # fmt: skip


ARCHITECTURE = Architecture(
    name="gemma2", config=Gemma2Config, build=Gemma2, presets=PRESETS, huggingface=HUGGING_FACE, gguf=GGUF_FILES
)
