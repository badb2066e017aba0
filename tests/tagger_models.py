"""Taggers of random weights, which tests share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgellm.models.tagger import Tagger, TaggerConfig

VOCAB, LABELS, CONTEXT = 101, 7, 300  # a context that is longer than a step of a model that goes on with texts


def tagger(*pattern: str, vocab: int = VOCAB, labels: int = LABELS, context: int = CONTEXT) -> nn.Module:
    torch.manual_seed(2)
    config = TaggerConfig(
        vocab_size=vocab, num_labels=labels, width=32, pattern=pattern or ("lstm", "attention"), num_heads=2,
        recurrent_width=32, mlp_width=64, max_context=context,
    )  # fmt: skip
    model = Tagger(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.head.weight.mul_(3)  # so that some labels are likelier than others
    return model


def rows(lengths: Sequence[int], seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]
