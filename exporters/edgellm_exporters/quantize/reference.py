"""Quantized models in PyTorch: the reference that quantized graphs are compared with."""

from __future__ import annotations

import copy

import torch
from torch import nn

from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.quantize.methods import METHODS

__all__ = ["round_weights"]


def round_weights(model: nn.Module, method: str) -> nn.Module:
    """A copy whose matrices hold the values that the quantized graph computes with.

    Args:
        model: any model; it is left as it was.
        method: a name in :data:`edgellm_exporters.quantize.methods.METHODS`.

    Raises:
        QuantizeError: the method quantizes nothing.
    """
    chosen = METHODS[method]
    if chosen.scheme is None or chosen.quantize is None:
        raise QuantizeError(f"{method!r} leaves weights as they are; compare with the model itself")
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.dim() == 2:
                codes = chosen.quantize(parameter.float().numpy(), chosen.scheme)
                parameter.copy_(torch.from_numpy(codes.dequantize()))
    return rounded
