"""A PyTorch model read row by row with the outputs of its layers, as a bundle is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgellm.models.protocol import LanguageModel, Step, empty_state
from edgellm_exporters.graph.layers import layers_recorded

__all__ = ["torch_reader"]

Array = NDArray[Any]


def torch_reader(model: LanguageModel) -> Any:
    """A :data:`edgellm_runtime.checks.divergence.Read` of a model.

    Args:
        model: with weights in memory; it is put in evaluation mode.
    """
    assert isinstance(model, nn.Module)
    model.eval()

    @torch.no_grad()
    def read(row: Array) -> tuple[Array, Mapping[str, Array], Mapping[str, Array]]:
        tokens = torch.from_numpy(np.array(row, dtype=np.int64))[None]
        with layers_recorded(model) as layers:
            logits, state = model(tokens, empty_state(model, 1, len(row)), Step.whole(tokens))
        used = {spec.name: state[spec.name][spec.used(len(row))][0] for spec in model.state_specs()}
        return (
            logits[0].float().numpy(),
            {path: tensor[0].float().numpy() for path, tensor in layers.items()},
            {name: tensor.float().numpy() for name, tensor in used.items()},
        )

    return read
