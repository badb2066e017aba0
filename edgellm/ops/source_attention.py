"""Attention to the tokens of a source: by the source itself, in an encoder, or by an answer to it.

softmax(QK^T / sqrt(d_k)) V, Vaswani et al. 2017, arXiv:1706.03762. Nothing is causal and nothing is cached: keys and
values are all there, and a mask says which rows' ends are padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgellm.ops.attention import merge_heads
from edgellm.ops.schema import REQUIRED, Op

__all__ = ["SOURCE_ATTENTION", "source_attention", "source_mask"]

_HIDDEN = -60000.0  # what the score of padding is lowered by beside a bias; float16 holds it


def source_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None = None, *, scale: float
) -> Tensor:
    """See :func:`source_attention`."""
    seen = mask[:, None, None, :]  # (batch, 1, 1, source)
    if bias is not None:
        seen = bias + torch.where(seen, 0.0, _HIDDEN).to(bias.dtype)
    group = q.shape[1] // k.shape[1]
    return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=group > 1))


SOURCE_ATTENTION = Op(
    name="SourceAttention",
    inputs=("q", "k", "v", "mask", "bias"),
    outputs=("y",),
    attributes={"scale": REQUIRED},
    like=lambda q, **_: [(q.dtype, (q.shape[0], q.shape[2], q.shape[1] * q.shape[3]))],
    reference=source_attention_reference,
)


def source_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None = None, *, scale: float
) -> Tensor:
    """Attend from any tokens to those of each row's source.

    Args:
        q: (batch, heads, time, head_dim).
        k: (batch, kv_heads, source, head_dim); ``kv_heads`` divides ``heads``.
        v: as ``k``.
        mask: (batch, source) bool, which tokens of the source are there; at least one in each row.
        bias: (1, heads, time, source), added to the scores, or None.
        scale: factor on the scores, 1 / sqrt(head_dim) in the usual form.

    Returns:
        The attended values (batch, time, heads * head_dim).
    """
    y: Tensor = SOURCE_ATTENTION(q, k, v, mask, bias, scale=scale)
    return y


def source_mask(source: Tensor, lengths: Tensor) -> Tensor:
    """Which tokens of sources (batch, source) are no padding, (batch, source) bool, from lengths (batch,)."""
    return torch.arange(source.shape[1], device=source.device) < lengths[:, None]
