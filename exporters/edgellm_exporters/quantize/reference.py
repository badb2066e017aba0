"""Quantized models in PyTorch: the reference that quantized graphs are compared with."""

from __future__ import annotations

import copy

import torch
from torch import nn

from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.quantize.methods import METHODS
from edgellm_exporters.quantize.rtn import round_to_nearest

__all__ = ["round_weights"]


def round_weights(model: nn.Module, method: str, vocab_size: int) -> nn.Module:
    """A copy whose matrices hold the values that the quantized graph computes with.

    Args:
        model: any model; it is left as it was.
        method: a name in :data:`edgellm_exporters.quantize.methods.METHODS`.
        vocab_size: tells the projection to the vocabulary from the other layers.

    Raises:
        QuantizeError: the method quantizes nothing.
    """
    chosen = METHODS[method]
    if chosen.layers is None or chosen.ends is None:
        raise QuantizeError(f"{method!r} leaves weights as they are; compare with the model itself")
    rounded = copy.deepcopy(model)
    ends = {id(m.weight) for m in rounded.modules() if isinstance(m, nn.Embedding)}
    ends |= {id(m.weight) for m in rounded.modules() if isinstance(m, nn.Linear) and m.out_features == vocab_size}
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.dim() == 2:
                scheme = chosen.ends if id(parameter) in ends else chosen.layers
                codes = round_to_nearest(parameter.float().numpy(), scheme)
                parameter.copy_(torch.from_numpy(codes.dequantize()))
    return rounded
