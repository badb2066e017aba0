"""What real text puts into each linear layer: the statistics that calibrated methods weigh errors with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgellm_exporters.errors import QuantizeError

__all__ = ["MIN_TOKENS", "Calibration", "calibrate"]

MIN_TOKENS = 2048


class Calibration:
    """Sums of x x^T over the inputs x of each linear layer.

    Args:
        hessians: by the name of the layer's weight.
    """

    def __init__(self, hessians: dict[str, Tensor]) -> None:
        self._hessians = hessians

    def find(self, names: Sequence[str]) -> Tensor | None:
        """The statistics for a weight, or for several that read the same tensor and were merged."""
        return next((self._hessians[name] for name in names if name in self._hessians), None)


@torch.no_grad()
def calibrate(
    model: nn.Module, windows: Sequence[Sequence[int]], progress: Callable[[float], None] = lambda _: None
) -> Calibration:
    """Run a model over text and gather what its linear layers read.

    Args:
        model: in eval mode; weights that are tied share their statistics.
        windows: rows of token ids, each read from an empty state.
        progress: told the share that is done.

    Raises:
        QuantizeError: fewer than :data:`MIN_TOKENS` tokens.
    """
    if (found := sum(map(len, windows))) < MIN_TOKENS:
        raise QuantizeError(f"the calibration text has {found} tokens, and needs {MIN_TOKENS}; give a longer text")
    sums: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(_gather(sums, f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        for number, window in enumerate(windows):
            model(torch.tensor([list(window)]))
            progress((number + 1) / len(windows))
    finally:
        for hook in hooks:
            hook.remove()
    shared = {id(p): sums[n] for n, p in model.named_parameters(remove_duplicate=False) if n in sums}
    every = model.named_parameters(remove_duplicate=False)
    return Calibration({name: shared[id(p)] for name, p in every if id(p) in shared})


def _gather(sums: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, inputs: Any) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        sums[name] = sums[name].addmm_(x.T, x) if name in sums else x.T @ x

    return hook
