"""Text that a model makes up itself, to learn from besides the text that is given.

It covers what the model can say, which one text does not. Liu et al. 2023 (LLM-QAT), arXiv:2305.17888: the first token
is any of the vocabulary, the next few are the likeliest, the others are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from edgellm.models.protocol import Step, answers_sources, empty_state, logit_width, reads_in_one_pass
from edgellm_exporters.quantize.tuning.held import HeldWeights
from edgellm_exporters.quantize.tuning.reading import Reading

__all__ = ["ROWS", "has_words", "own_words"]

ROWS = 32  # that are written at once: each has a state, and logits over the vocabulary
_LIKELIEST = 3  # tokens after the first


def has_words(model: Any) -> bool:
    """Whether a model can go on from its own tokens, one after the other."""
    return (
        hasattr(model, "state_specs") and not answers_sources(model) and not reads_in_one_pass(model.config)
        and logit_width(model.config) == model.config.vocab_size
    )  # fmt: skip


@torch.no_grad()
def own_words(
    shell: nn.Module, held: HeldWeights, rows: int, time: int, generator: torch.Generator,
    progress: Callable[[float], None] = lambda share: None, *, enough: Callable[[], bool] = lambda: False,
) -> Tensor:  # fmt: skip
    """Rows of text, (rows, time), or the first of them.

    Args:
        shell: the model, its parameters on the meta device.
        held: its weights.
        rows: how many; :data:`ROWS` of them at once.
        time: tokens of each.
        generator: of first tokens and of what is drawn.
        progress: told the share of what is done.
        enough: asked after each :data:`ROWS` whether to end there.
    """
    found = list[Tensor]()
    for start in range(0, rows, ROWS):
        count = min(ROWS, rows - start)

        def tell(share: float, start: int = start, count: int = count) -> None:
            progress((start + count * share) / rows)

        found.append(_written_together(shell, held, count, time, generator, tell))
        if enough():
            break
    return torch.cat(found)


def _written_together(
    shell: nn.Module, held: HeldWeights, rows: int, time: int, generator: torch.Generator,
    progress: Callable[[float], None],
) -> Tensor:  # fmt: skip
    """Some of these rows."""
    model: Any = shell
    tokens = torch.randint(0, model.config.vocab_size, (rows, 1), generator=generator)
    state, found = empty_state(model, rows, time), [tokens]
    one = torch.ones(rows, dtype=torch.int32)
    with Reading(held):
        for past in range(time - 1):
            step = Step(one * past, one, torch.zeros(rows, 1, dtype=torch.int64))
            logits, state = model(tokens, state, step)
            last = logits[:, 0].float()
            if past < _LIKELIEST:
                tokens = last.argmax(-1, keepdim=True)
            else:
                noise = torch.empty_like(last).exponential_(generator=generator)
                tokens = last.softmax(-1).div_(noise).argmax(-1, keepdim=True)  # a draw from the softmax
            found.append(tokens)
            progress((past + 1) / time)
    return torch.cat(found, 1)
