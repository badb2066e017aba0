"""A pointer to the source: the next word may be one of its words, copied (See et al. 2017, arXiv:1704.04368)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgellm.models.layers.source_attention import SOURCE_MASK
from edgellm.models.protocol import State
from edgellm_runtime.spec import BATCH, SOURCE, StateSpec

__all__ = ["Pointer"]

_POINTED = ("pointer.tokens", "pointer.k")  # states that words are copied by
_FAR, _LEAST = -1e4, 1e-8  # a score of padding; a probability that no word falls below


class Pointer(nn.Module):
    """Points at tokens of the source: the next one is, with a probability of its own, one of those."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.gate = nn.Linear(width, 1)

    def state_specs(self, dtype: str) -> list[StateSpec]:
        """The source's tokens, and what they are pointed at by."""
        width = self.k_proj.out_features
        return [
            StateSpec(_POINTED[0], (BATCH, SOURCE), "int32", "static"),
            StateSpec(_POINTED[1], (BATCH, SOURCE, width), dtype, "static"),
        ]

    def states(self, source: Tensor, x: Tensor) -> dict[str, Tensor]:
        """What :meth:`state_specs` declares, of sources (batch, source) and what the encoder gave."""
        return dict(zip(_POINTED, (source.to(torch.int32), self.k_proj(x)), strict=True))

    def forward(self, x: Tensor, logits: Tensor, state: State) -> Tensor:
        """Log-probabilities (batch, count, vocab_size) of x (batch, count, width) and the words' own logits."""
        tokens, keys = (state[name] for name in _POINTED)
        scores = self.q_proj(x) @ keys.transpose(1, 2) * x.shape[-1] ** -0.5  # (batch, count, source)
        wide = torch.promote_types(scores.dtype, torch.float32)  # probabilities of 16 bits are too coarse
        shares = scores.to(wide).masked_fill(~state[SOURCE_MASK][:, None], _FAR).softmax(-1)
        gate, own = self.gate(x).to(wide).sigmoid(), logits.to(wide).softmax(-1)
        where = tokens.long()[:, None].expand_as(shares)
        copied = torch.zeros_like(own).scatter_add(-1, where, gate * shares)
        mixed: Tensor = ((1.0 - gate) * own + copied + _LEAST).log().to(logits.dtype)
        return mixed
