"""The mixer of Qwen3-Next: a memory under the gated delta rule, with its projections, convolution and gated norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellm.models.layers.convolution import CausalConv
from edgellm.models.protocol import State, Step
from edgellm.ops import gated_delta
from edgellm_runtime.spec import BATCH, StateSpec

__all__ = ["GatedDeltaMixer"]

_LENGTH_EPS = 1e-6  # added to the squared length of a query or a key before it is made 1


class GatedDeltaMixer(nn.Module):
    """out(norm(memory(q, k, v)) * silu(z)), with q, k and v passed through one convolution, q and k of length 1.

    Args:
        width: features of its input and output.
        num_heads: heads of the memory.
        num_groups: queries and keys, each shared by neighbouring heads; divides ``num_heads``.
        key_dim: features of a query and a key.
        value_dim: features of a value.
        conv_taps: tokens that the convolution sees.
        packed: whether q, k, v and z are one projection and the two gates another; otherwise they are four.
        norm_eps: added to the mean square in the norm.
    """

    def __init__(
        self, width: int, num_heads: int, num_groups: int, key_dim: int, value_dim: int, *, conv_taps: int = 4,
        packed: bool = True, norm_eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_heads, self.num_groups, self.key_dim, self.value_dim = num_heads, num_groups, key_dim, value_dim
        keys, values = num_groups * key_dim, num_heads * value_dim
        self.sizes, self.packed = [keys, keys, values], packed
        projections = {"qkv_proj": sum(self.sizes), "z_proj": values, "beta_proj": num_heads, "decay_proj": num_heads}
        if packed:
            projections = {"qkvz_proj": sum(self.sizes) + values, "gates_proj": 2 * num_heads}
        self.projections = tuple(projections)
        for name, features in projections.items():
            self.add_module(name, nn.Linear(width, features, bias=False))
        self.conv = CausalConv(2 * keys + values, conv_taps, bias=False)
        self.dt_offset = nn.Parameter(torch.rand(num_heads).mul(4.6).sub(6.9).exp().expm1().log())  # 0.001 to 0.1
        self.a_log = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        self.norm = nn.RMSNorm(value_dim, eps=norm_eps)
        self.out_proj = nn.Linear(values, width, bias=False)

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """The memory of each head, and the state of the convolution."""
        shape = (BATCH, self.num_heads, self.key_dim, self.value_dim)
        return [StateSpec(f"{prefix}.s", shape, dtype, "replace"), *self.conv.state_specs(prefix, dtype)]

    def forward(self, x: Tensor, state: State, prefix: str, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        mixed, z, beta, dt = self._projected(x)
        mixed, present = self.conv(mixed, state, prefix, step)
        q, k, v = torch.split(F.silu(mixed), self.sizes, dim=-1)
        valid = (torch.arange(x.shape[1], device=x.device) < step.lengths[:, None])[:, :, None]
        beta = torch.sigmoid(beta) * valid  # (batch, time, heads); padding corrects nothing and fades nothing
        decay = -F.softplus(dt + self.dt_offset) * self.a_log.exp() * valid
        y, s = gated_delta(
            self._of_length(q, self.key_dim**-0.5), self._of_length(k, 1.0), v, decay, beta, state.get(f"{prefix}.s"),
            num_heads=self.num_heads, num_groups=self.num_groups,
        )  # fmt: skip
        heads = self.norm(y.reshape(*y.shape[:2], self.num_heads, self.value_dim)).flatten(2)
        out: Tensor = self.out_proj(heads * F.silu(z))
        return out, present | {f"{prefix}.s": s} if state else {}

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of q, k and v together, of z, and what beta and the decay are made of."""
        found: list[Tensor] = [getattr(self, name)(x) for name in self.projections]
        if not self.packed:
            return tuple(found)
        mixed, z = torch.split(found[0], [sum(self.sizes), self.sizes[2]], dim=-1)
        return mixed, z, *found[1].chunk(2, dim=-1)

    def _of_length(self, x: Tensor, length: float) -> Tensor:
        """Each query or key of a group, made as long as that: an RMS norm."""
        vectors = x.reshape(*x.shape[:2], self.num_groups, self.key_dim)
        gain = torch.full((self.key_dim,), length * self.key_dim**-0.5, dtype=x.dtype, device=x.device)
        return F.rms_norm(vectors, (self.key_dim,), gain, _LENGTH_EPS / self.key_dim).flatten(2)
