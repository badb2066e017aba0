"""RecurrentGemma: gated linear recurrences, and attention to a window in every third layer; no state grows.

Botev et al. 2024, arXiv:2404.07839; Griffin, De et al. 2024, arXiv:2402.19427. Embedding, scaled -> N layers, each a
norm and a mixer, then a norm and a gated MLP, each beside a residual -> norm -> head -> soft cap. A recurrence

    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t

has its own a and i for each feature of each token. Norms multiply by 1 + w in the files, and by w here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.models.config import Shape, check_heads
from edgellm.models.foreign import (
    MAX_CONTEXT,
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
    rotary,
    whole,
)
from edgellm.models.foreign.keys import checked_whole
from edgellm.models.layers import Block, CausalConv, GatedMLP, RotaryTable, SelfAttention, Stack
from edgellm.models.layers.rotary import order_of_part
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.ops import token_by_token
from edgellm_runtime.spec import BATCH, StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "GatedRecurrence", "RecurrentGemmaConfig", "recurrent_gemma"]

MIXERS = ("recurrent", "attention")


@dataclass(frozen=True)
class RecurrentGemmaConfig(Shape):
    """The shape of a RecurrentGemma.

    Args:
        vocab_size: tokens.
        width: features between layers.
        pattern: one mixer a layer, first to last; each ``recurrent`` or ``attention``.
        recurrent_width: features of a recurrence, in ``num_heads`` blocks that gates do not mix.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides ``num_heads``.
        head_dim: features of one head.
        rotated: how many of them turn with the position.
        window: tokens that a token attends to, itself among them.
        mlp_width: hidden features of the gated MLP.
        max_context: the most tokens that a row may hold.
        conv_taps: tokens that a convolution sees.
        attention_bias: whether queries, keys and values have a bias.
        logit_cap: logits x become cap * tanh(x / cap).
        rope_theta: base of the rotary frequencies.
        rope_factors: (rotated / 2,), each frequency is divided by its own; empty: by none.
        rope_amplitude: factor on the cosines and sines of the rotation.
        norm_eps: added to the mean square in the norms.
        tie_embeddings: whether the vocabulary projection is the embedding.
    """

    vocab_size: int
    width: int
    pattern: Sequence[str]
    recurrent_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotated: int
    window: int
    mlp_width: int
    max_context: int
    conv_taps: int = 4
    attention_bias: bool = False
    logit_cap: float = 30.0
    rope_theta: float = 10000.0
    rope_factors: Sequence[float] = ()
    rope_amplitude: float = 1.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pattern or any(mixer not in MIXERS for mixer in self.pattern) or self.conv_taps < 2:
            raise ConfigError(
                f"pattern is {self.pattern}, conv_taps {self.conv_taps}; a pattern has {' or '.join(MIXERS)} for each "
                "layer, and a convolution at least 2 taps"
            )
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)
        if self.recurrent_width % self.num_heads or self.rotated % 2 or self.rotated > self.head_dim:
            raise ConfigError(
                f"recurrent_width {self.recurrent_width} must be a multiple of num_heads {self.num_heads}, and rotated "
                f"{self.rotated} even and at most head_dim {self.head_dim}"
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

    def mixer(kind: str) -> nn.Module:
        if kind == "recurrent":
            return GatedRecurrence(c)
        return SelfAttention(
            c.width, c.num_heads, c.num_kv_heads, c.head_dim, bias=c.attention_bias, output_bias=True, window=c.window
        )

    def block(kind: str) -> Block:
        mlp = GatedMLP(c.width, c.mlp_width, bias=True, activation="gelu_tanh")
        return Block(c.width, c.norm_eps, {"mixer": mixer(kind)}, mlp)

    table = RotaryTable(
        c.rotated, c.max_context, c.rope_theta, factors=c.rope_factors, amplitude=c.rope_amplitude,
        still=c.head_dim - c.rotated,
    )  # fmt: skip
    scale = float(torch.tensor(c.width**0.5, device="cpu").bfloat16())  # as the weights were trained with
    return Stack(
        c, (block(kind) for kind in c.pattern), rotary=table, embedding_scale=scale, logit_cap=c.logit_cap
    )  # fmt: skip


def _pattern(name: str, values: Values, fields: Fields) -> None:
    """The kinds of a few layers, again and again."""
    count = checked_whole("num_hidden_layers", values.get("num_hidden_layers", 26), MAX_LAYERS)
    kinds = values.get(name) or ("recurrent", "recurrent", "attention")
    if other := [kind for kind in kinds if kind not in MIXERS]:
        raise refuse(name, other[0])
    fields["pattern"] = tuple(kinds[i % len(kinds)] for i in range(count))
    fields["head_dim"] = fields["width"] // fields["num_heads"]


def _mlp_width(name: str, values: Values, fields: Fields) -> None:
    fields["mlp_width"] = checked_whole(name, values.get(name, 7680)) // 2


def _tensor(config: RecurrentGemmaConfig, _values: Values, name: str, tensor: Tensor) -> Tensor:
    """Norms by 1 + w, and features of a head in the order that attention turns."""
    if name == "norm.weight" or name.endswith("_norm.weight"):
        return 1 + tensor.float()
    if ".q_proj." in name or ".k_proj." in name:
        heads = tensor.reshape(-1, config.head_dim, *tensor.shape[1:])
        return heads[:, order_of_part(config.head_dim, config.rotated)].flatten(0, 1)
    return tensor


HUGGING_FACE = HuggingFace(
    types={"recurrent_gemma": Variant()},
    keys={
        "vocab_size": whole("vocab_size", default=256000),
        "hidden_size": whole("width", default=2560),
        "num_attention_heads": whole("num_heads", default=10),
        "num_key_value_heads": whole("num_kv_heads", default=lambda fields: fields["num_heads"]),
        "block_types": _pattern,
        "lru_width": whole("recurrent_width", default=lambda fields: fields["width"]),
        "attention_window_size": whole("window", default=2048),
        "intermediate_size": _mlp_width,
        "max_position_embeddings": whole("max_context", default=8192, limit=MAX_CONTEXT),  # of its training
        "conv1d_width": whole("conv_taps", default=4),
        "attention_bias": flag("attention_bias", default=False),
        "logits_soft_cap": positive("logit_cap", default=30.0),
        **rotary(share=0.5),
        "rms_norm_eps": positive("norm_eps", default=1e-6),
        "tie_word_embeddings": flag("tie_embeddings", default=True),
        "hidden_activation": neutral("gelu_pytorch_tanh"),
        **dict.fromkeys(("num_hidden_layers", "head_dim"), METADATA),  # the latter follows from the heads
        **dict.fromkeys(("w_init_variance_scale", "final_w_init_variance_scale"), METADATA),
        **dict.fromkeys(("_block_types", "layers_block_type", "embeddings_scale_by_sqrt_dim"), METADATA),
    },
    names=Names(
        {
            "embedding": "model.embed_tokens",
            "norm": "model.final_norm",
            "head": "lm_head",
            "mixer_norm": "temporal_pre_norm",
            **{f"mixer.{x}_proj": f"temporal_block.{x}_proj" for x in "qkvo"},
            "mixer.gate_proj": "temporal_block.linear_y",
            "mixer.in_proj": "temporal_block.linear_x",
            "mixer.out_proj": "temporal_block.linear_out",
            "mixer.conv": "temporal_block.conv_1d",
            "mixer.fading": "temporal_block.rg_lru.recurrent_param",
            **{f"mixer.input_{x}": f"temporal_block.rg_lru.input_gate_{x}" for x in ("weight", "bias")},
            **{f"mixer.fading_{x}": f"temporal_block.rg_lru.recurrent_gate_{x}" for x in ("weight", "bias")},
            "mlp_norm": "channel_pre_norm",
            **{f"mlp.{x}_proj": f"mlp_block.{x}_proj" for x in ("gate", "up", "down")},
        },
        layers="model.layers",
    ),
    tensor=_tensor,
)

ARCHITECTURE = Architecture(
    name="recurrent_gemma", config=RecurrentGemmaConfig, build=recurrent_gemma, presets=PRESETS,
    huggingface=HUGGING_FACE,
)  # fmt: skip
