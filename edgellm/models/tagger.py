"""A tagger: a label for each token of a row, which is read both ways in one pass.

Embedding -> N blocks, each a norm and one mixer (self-attention over the whole row, or a recurrence each way) with a
residual, and a norm and a gated MLP with a residual -> norm -> projection to the labels. Bidirectional recurrences:
Schuster and Paliwal 1997; as taggers: Huang et al. 2015, arXiv:1508.01991.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.models.layers import RotaryTable
from edgellm.models.layers.both_ways import BlockShape, EncoderBlock
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.ops import source_mask, take_positions
from edgellm_runtime.spec import StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "Tagger", "TaggerConfig"]


@dataclass(frozen=True, kw_only=True)
class TaggerConfig(BlockShape):
    """The shape of a :class:`Tagger`.

    Args:
        num_labels: how many labels the logits are over; another number than tokens.
        pattern: one mixer a block; each of rnn_tanh, rnn_relu, lstm, gru, attention.
    """

    num_labels: int = 2
    pattern: Sequence[str] = ("lstm", "attention")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_mixers("pattern")
        if self.num_labels == self.vocab_size:
            raise ConfigError(f"num_labels is {self.num_labels}, as many as tokens; logits must be over one of the two")

    @property
    def one_pass(self) -> bool:
        """See :class:`edgellm.models.protocol.OnePassConfig`."""
        return True


PRESETS: Mapping[str, TaggerConfig] = {
    "tiny": TaggerConfig(vocab_size=1024, width=128, recurrent_width=192, mlp_width=256),
    "recurrent": TaggerConfig(vocab_size=1024, width=128, pattern=("lstm", "lstm"), recurrent_width=192, mlp_width=256),
}


class Tagger(nn.Module):
    """See the module's description; follows :class:`edgellm.models.protocol.LanguageModel`, with no state."""

    def __init__(self, config: TaggerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(EncoderBlock(config, mixer) for mixer in config.pattern)
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.num_labels, bias=False)
        self.rotary = RotaryTable(config.head_dim, config.max_context, config.rope_theta)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)

    def state_specs(self) -> list[StateSpec]:
        """None: nothing is carried from one row to another."""
        return []

    def forward(
        self, tokens: Tensor, state: State | None = None, step: Step | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (batch, time) to logits (batch, count, num_labels), and no state."""
        step = step or Step.whole(tokens)
        mask = source_mask(tokens, step.lengths)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.dropout(self.embedding(tokens))  # (batch, time, width)
        for block in self.blocks:
            x = block(x, step.lengths, mask, positions, self.rotary)
        return self.head(take_positions(self.norm(x), step.logit_positions)), {}


ARCHITECTURE = Architecture(name="tagger", config=TaggerConfig, build=Tagger, presets=PRESETS)
