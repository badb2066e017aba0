"""RecurrentGemma: gated linear recurrences, and attention to a window in every third layer; no state grows.

Botev et al. 2024, arXiv:2404.07839; Griffin, De et al. 2024, arXiv:2402.19427. Embedding, scaled -> N layers, each a
norm and a mixer, then a norm and a gated MLP, each beside a residual -> norm -> head -> soft cap. A recurrence

    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t

has its own a and i for each feature of each token. Norms multiply by 1 + w in the files, and by w here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.models.layers import Block, CausalConv, GatedMLP, Stack
from edgellm.models.protocol import State, Step
from edgellm.models.recurrent_gemma_files import HUGGING_FACE
from edgellm.models.registry import Architecture
from edgellm.models.shapes import ConvShape, PartlyRotaryShape, PatternShape
from edgellm.ops import token_by_token
from edgellm_runtime.spec import BATCH, StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "GatedRecurrence", "RecurrentGemmaConfig", "recurrent_gemma"]


@dataclass(frozen=True, kw_only=True)
class RecurrentGemmaConfig(PatternShape, ConvShape, PartlyRotaryShape):
    """The shape of a RecurrentGemma.

    Args:
        recurrent_width: features of a recurrence, in ``num_heads`` blocks that gates do not mix.
        window: tokens that a token attends to, itself among them.
        attention_bias: whether queries, keys and values have a bias.
        logit_cap: logits x become cap * tanh(x / cap).
    """

    KINDS = ("recurrent", "attention")
    recurrent_width: int
    window: int
    attention_bias: bool = False
    logit_cap: float = 30.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recurrent_width % self.num_heads:
            raise ConfigError(
                f"recurrent_width {self.recurrent_width} must be a multiple of num_heads {self.num_heads}"
            )


PRESETS: Mapping[str, RecurrentGemmaConfig] = {
    "tiny": RecurrentGemmaConfig(
        vocab_size=1024, width=128, pattern=("recurrent", "recurrent", "attention"), recurrent_width=128, num_heads=4,
        num_kv_heads=1, head_dim=32, rotated=16, window=128, mlp_width=352, max_context=512,
    ),
}  # fmt: skip


class GatedRecurrence(nn.Module):
    """out(gelu(gate(x)) * recurrence(conv(in(x)))): a real-gated linear recurrent unit (RG-LRU) within."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__()
        width, hidden, self.blocks = config.width, config.recurrent_width, config.num_heads
        size = hidden // self.blocks
        self.gate_proj, self.in_proj = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.conv = CausalConv(hidden, config.conv_taps, bias=True)
        self.input_weight, self.fading_weight = (
            nn.Parameter(torch.randn(self.blocks, size, size) * size**-0.5) for _ in range(2)
        )
        self.input_bias, self.fading_bias = (nn.Parameter(torch.zeros(self.blocks, size)) for _ in range(2))
        self.fading = nn.Parameter(torch.empty(hidden).uniform_(0.9, 0.999).log().neg().expm1().log())
        self.out_proj = nn.Linear(hidden, width)

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """h, and the state of the convolution."""
        h = StateSpec(f"{prefix}.h", (BATCH, self.conv.width), dtype, "replace")
        return [h, *self.conv.state_specs(prefix, dtype)]

    def forward(self, x: Tensor, state: State, prefix: str, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        gate = F.gelu(self.gate_proj(x), approximate="tanh")
        x, present = self.conv(self.in_proj(x), state, prefix, step)
        places = torch.arange(x.shape[1], device=x.device)
        valid = (places < step.lengths[:, None])[:, :, None]
        log_a = -8.0 * torch.sigmoid(self._mixed(x, self.fading_weight, self.fading_bias)) * F.softplus(self.fading)
        share = (-torch.tanh(log_a) * (1 + (2 * log_a).exp())).sqrt()  # of 1 - a^2, which loses no digits near a = 1
        first = (places + step.past_lengths[:, None] == 0)[:, :, None]  # a row's first token is taken in whole
        new = x * torch.sigmoid(self._mixed(x, self.input_weight, self.input_bias)) * torch.where(first, 1.0, share)
        past = state[f"{prefix}.h"] if state else torch.zeros_like(x[:, 0])
        h, y = token_by_token(_step, [past], [(log_a * valid).exp(), new * valid])  # padding changes nothing
        out: Tensor = self.out_proj(gate * y)
        return out, present | {f"{prefix}.h": h} if state else {}

    def _mixed(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Each block of features (batch, time, blocks * size) by its own matrix."""
        blocks = x.reshape(*x.shape[:2], self.blocks, -1).transpose(1, 2)  # (batch, blocks, time, size)
        return (blocks @ weight + bias[:, None]).transpose(1, 2).flatten(2)


def _step(h: Tensor, a: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    h = a * h + new
    return h, h


def recurrent_gemma(config: RecurrentGemmaConfig) -> Stack:
    """The model with fresh weights."""
    c = config

    def block(kind: str) -> Block:
        mlp = GatedMLP(c.width, c.mlp_width, bias=True, activation="gelu_tanh")
        mixer = (
            GatedRecurrence(c)
            if kind == "recurrent"
            else c.attention(bias=c.attention_bias, output_bias=True, window=c.window)
        )
        return Block(c.width, c.norm_eps, {"mixer": mixer}, mlp)

    scale = float(torch.tensor(c.width**0.5, device="cpu").bfloat16())  # as the weights were trained with
    return Stack(c, map(block, c.pattern), rotary=c.rotary(), embedding_scale=scale, logit_cap=c.logit_cap)


ARCHITECTURE = Architecture(
    name="recurrent_gemma", config=RecurrentGemmaConfig, build=recurrent_gemma, presets=PRESETS,
    huggingface=HUGGING_FACE,
)  # fmt: skip
