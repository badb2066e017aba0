"""The forward pass of a batch: the model and, where rows answer sources, its encoder before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Forward"]


class Forward(nn.Module):
    """Runs a model over whole rows; one module, so that several processes exchange the gradients of all of it.

    Args:
        model: follows :class:`edgellm.models.protocol.LanguageModel`, or ``SourceModel`` where batches have sources.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, sources: Tensor | None = None, source_lengths: Tensor | None = None) -> Tensor:
        """Logits (rows, time, width) of inputs (rows, time), which answer sources (rows, source) if there are any."""
        model: Any = self.model
        given = () if sources is None else (model.encode(sources, source_lengths),)
        logits: Tensor = model(inputs, *given)[0]
        return logits
