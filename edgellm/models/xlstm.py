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
from edgellm.models.layers import Block, GatedMLP, Stack
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.models.shapes import EndlessShape
from edgellm.models.xlstm_files import HUGGING_FACE
from edgellm.ops import linear_attention, running_max
from edgellm_runtime.spec import BATCH, StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "MatrixMemory", "XLSTMConfig", "xlstm"]

_SHUT = -30000.0  # log of an input gate that lets nothing in; 16 bits hold it


@dataclass(frozen=True, kw_only=True)
class XLSTMConfig(EndlessShape):
    """The shape of an xLSTM.

    Args:
        num_heads: memories of a layer.
        key_width: features of all its queries, and of all its keys.
        value_width: features of all its values.
        mlp_width: hidden features of the gated MLP.
        gate_cap: what goes into the gates of a memory, x, becomes cap * tanh(x / cap).
        logit_cap: the same for logits.
        memory_eps: added to what a memory's output is divided by.
    """

    num_heads: int
    key_width: int
    value_width: int
    mlp_width: int
    gate_cap: float = 15.0
    logit_cap: float = 30.0
    memory_eps: float = 1e-6
    norm_eps: float = 1e-6

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


ARCHITECTURE = Architecture(name="xlstm", config=XLSTMConfig, build=xlstm, presets=PRESETS, huggingface=HUGGING_FACE)
