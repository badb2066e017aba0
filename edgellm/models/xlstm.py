"""xLSTM: a matrix that forgets and takes in by exponential gates in every layer; no attention and no positions.

Beck et al. 2024, arXiv:2405.04517; in this shape: Beck et al. 2025, arXiv:2503.13427. Embedding -> N layers, each a
norm and a mixer, then a norm and a gated MLP, each beside a residual -> norm -> head -> soft cap. For each head,

    C_t = f_t C_{t-1} + i_t k_t v_t^T    n_t = f_t n_{t-1} + i_t k_t
    y_t = q_t C_t / (max(|q_t n_t|, 1) + eps exp(m_t))    m_t = max(log f_t + m_{t-1}, log i_t)

a fading memory in which n is one more feature of v. It is kept divided by the largest exp(i) so far, so that no
exponential grows too large; the paper divides by exp(m), which falls with every token, by less than 16 bits hold.
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
    Key,
    Names,
    Values,
    Variant,
    flag,
    neutral,
    positive,
    refuse,
    whole,
)
from edgellm.models.foreign.keys import checked_positive, checked_whole
from edgellm.models.layers import Block, GatedMLP, Stack
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.ops import linear_attention, running_max
from edgellm_runtime.spec import BATCH, StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "MatrixMemory", "XLSTMConfig", "xlstm"]

_SHUT = -30000.0  # log of an input gate that lets nothing in; 16 bits hold it


@dataclass(frozen=True)
class XLSTMConfig(Shape):
    """The shape of an xLSTM.

    Args:
        vocab_size: tokens.
        width: features between layers.
        num_layers: layers.
        num_heads: memories of a layer.
        key_width: features of all its queries, and of all its keys.
        value_width: features of all its values.
        mlp_width: hidden features of the gated MLP.
        gate_cap: what goes into the gates of a memory, x, becomes cap * tanh(x / cap).
        logit_cap: the same for logits.
        memory_eps: added to what a memory's output is divided by.
        norm_eps: added to the mean square in the norms.
        tie_embeddings: whether the vocabulary projection is the embedding.
        max_context: the most tokens that a row may hold; the model itself has no limit, and its state does not grow.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    key_width: int
    value_width: int
    mlp_width: int
    gate_cap: float = 15.0
    logit_cap: float = 30.0
    memory_eps: float = 1e-6
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    max_context: int = 2**20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key_width % self.num_heads or self.value_width % self.num_heads:
            raise ConfigError(
                f"key_width {self.key_width} and value_width {self.value_width} must be multiples of num_heads "
                f"{self.num_heads}"
            )


PRESETS: Mapping[str, XLSTMConfig] = {
    "tiny": XLSTMConfig(
        vocab_size=1024, width=128, num_layers=4, num_heads=4, key_width=64, value_width=128, mlp_width=384,
        tie_embeddings=True,
    ),
}  # fmt: skip


class MatrixMemory(nn.Module):
    """The memory (mLSTM) with its projections, gates and norm."""

    def __init__(self, config: XLSTMConfig) -> None:
        super().__init__()
        self.config = c = config
        self.q_proj, self.k_proj = (nn.Linear(c.width, c.key_width, bias=False) for _ in range(2))
        self.v_proj, self.gate_proj = (nn.Linear(c.width, c.value_width, bias=False) for _ in range(2))
        self.input_proj, self.forget_proj = (nn.Linear(c.width, c.num_heads) for _ in range(2))
        self.norm = nn.Parameter(torch.ones(c.value_width))
        self.out_proj = nn.Linear(c.value_width, c.width, bias=False)
        nn.init.constant_(self.input_proj.bias, -10.0)
        self.forget_proj.bias = nn.Parameter(torch.linspace(3.0, 6.0, c.num_heads))

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """C with n as its last column, the largest log i, and m, of each head."""
        c, heads = self.config, self.config.num_heads
        shape = (BATCH, heads, c.key_width // heads, c.value_width // heads + 1)
        return [
            StateSpec(f"{prefix}.c", shape, dtype, "replace"),
            *(StateSpec(f"{prefix}.{name}", (BATCH, heads), dtype, "replace") for name in ("top", "m")),
        ]

    def forward(self, x: Tensor, state: State, prefix: str, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        c, (batch, time) = self.config, x.shape[:2]
        valid = (torch.arange(time, device=x.device) < step.lengths[:, None])[:, :, None]
        log_f = F.logsigmoid(self._capped(self.forget_proj(x))) * valid  # (batch, time, heads); padding forgets nothing
        log_i = torch.where(valid, self._capped(self.input_proj(x)), _SHUT)  # and lets nothing in
        none = torch.zeros_like(log_f[:, 0])
        past, top = state.get(f"{prefix}.m", none), state.get(f"{prefix}.top", none)
        tops = running_max(log_i, top)
        decay = log_f + torch.cat([top[:, None], tops[:, :-1]], 1) - tops
        fallen = log_f.cumsum(1)
        m = fallen + running_max(log_i - fallen, past)
        v = self.v_proj(x).reshape(batch, time, c.num_heads, -1)
        v = F.pad(v, (0, 1), value=1.0) * (log_i - tops).exp()[..., None]  # (batch, time, heads, value_dim + 1)
        y, memory = linear_attention(
            self.q_proj(x) * (c.key_width // c.num_heads) ** -0.5, self.k_proj(x), v.flatten(2), decay,
            state.get(f"{prefix}.c"), num_heads=c.num_heads, num_groups=c.num_heads,
        )  # fmt: skip
        y = y.reshape(v.shape)
        least, eps = (-tops).exp(), c.memory_eps * (m - tops).exp()
        y = y[..., :-1] / (torch.maximum(y[..., -1:].abs(), least[..., None]) + eps[..., None])
        heads = F.layer_norm(y, y.shape[-1:], eps=c.norm_eps).flatten(2) * self.norm
        out: Tensor = self.out_proj(torch.sigmoid(self.gate_proj(x)) * heads)
        return out, {f"{prefix}.c": memory, f"{prefix}.top": tops[:, -1], f"{prefix}.m": m[:, -1]} if state else {}

    def _capped(self, x: Tensor) -> Tensor:
        return self.config.gate_cap * (x / self.config.gate_cap).tanh()


def xlstm(config: XLSTMConfig) -> Stack:
    """The model with fresh weights."""
    c = config
    blocks = (
        Block(c.width, c.norm_eps, {"mixer": MatrixMemory(c)}, GatedMLP(c.width, c.mlp_width))
        for _ in range(c.num_layers)
    )
    return Stack(c, blocks, logit_cap=c.logit_cap)


def _same(into: str, other: str, default: int, limit: int = 2**31) -> Key:
    """A number that the file may have under two names."""

    def take(name: str, values: Values, fields: Fields) -> None:
        found = values.get(name) or values.get(other) or default
        fields[into] = checked_whole(name, found, limit)
        if (values.get(other) or found) != found:
            raise refuse(other, values[other])

    return take


def _share(into: str, default: float) -> Key:
    """A part of the width."""

    def take(name: str, values: Values, fields: Fields) -> None:
        fields[into] = int(fields["width"] * checked_positive(name, values.get(name, default)))

    return take


def _mlp_width(name: str, values: Values, fields: Fields) -> None:
    """A multiple of the width, rounded up."""
    multiple = checked_whole("ffn_round_up_to_multiple_of", values.get("ffn_round_up_to_multiple_of", 64))
    wanted = fields["width"] * checked_positive(name, values.get(name, 2.667))
    fields["mlp_width"] = int((wanted + multiple - 1) // multiple * multiple)


HUGGING_FACE = HuggingFace(
    types={"xlstm": Variant()},
    keys={
        "vocab_size": whole("vocab_size", default=50304),
        "hidden_size": _same("width", "embedding_dim", 4096),
        "num_hidden_layers": _same("num_layers", "num_blocks", 32, MAX_LAYERS),
        "num_heads": whole("num_heads", default=8),
        "qk_dim_factor": _share("key_width", 0.5),
        "v_dim_factor": _share("value_width", 1.0),
        "ffn_proj_factor": _mlp_width,
        "gate_soft_cap": positive("gate_cap", default=15.0),
        "output_logit_soft_cap": positive("logit_cap", default=30.0),
        "eps": positive("memory_eps", default=1e-6),
        "norm_eps": positive("norm_eps", default=1e-6),
        "tie_word_embeddings": flag("tie_embeddings", default=False),
        "use_bias": neutral(False),
        "weight_mode": neutral("single"),
        **dict.fromkeys(("embedding_dim", "num_blocks", "ffn_round_up_to_multiple_of", "add_out_norm"), METADATA),
        # of kernels, and of precisions below the one that everything is computed in here
        **dict.fromkeys(("chunkwise_kernel", "sequence_kernel", "step_kernel", "mode", "chunk_size"), METADATA),
        **dict.fromkeys(("return_last_states", "autocast_kernel_dtype", "inference_state_dtype"), METADATA),
        **dict.fromkeys(("norm_reduction_force_float32", "max_inference_chunksize"), METADATA),
    },
    names=Names(
        {
            "embedding": "backbone.embeddings",
            "norm": "backbone.out_norm",
            "head": "lm_head",
            "mixer_norm": "norm_mlstm",
            **{f"mixer.{x}_proj": f"mlstm_layer.{x}" for x in "qkv"},
            "mixer.gate_proj": "mlstm_layer.ogate_preact",
            "mixer.input_proj": "mlstm_layer.igate_preact",
            "mixer.forget_proj": "mlstm_layer.fgate_preact",
            "mixer.norm": "mlstm_layer.multihead_norm.weight",
            "mixer.out_proj": "mlstm_layer.out_proj",
            "mlp_norm": "norm_ffn",
            "mlp.gate_proj": "ffn.proj_up_gate",
            "mlp.up_proj": "ffn.proj_up",
            "mlp.down_proj": "ffn.proj_down",
        },
        layers="backbone.blocks",
    ),
)

ARCHITECTURE = Architecture(name="xlstm", config=XLSTMConfig, build=xlstm, presets=PRESETS, huggingface=HUGGING_FACE)
