"""What real text puts into each linear layer: what calibrated methods weigh errors with.

Statistics live no longer than the layer they are for: all windows pass the model together, at once where they are few
and the model is small, otherwise layer by layer (see :mod:`.calibrate_layers`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgellm.models.protocol import logit_width, read_rows
from edgellm.streaming import OwnWeights, Weights, resident
from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.quantize.calibrate_layers import GROUP_TOKENS, Factors, calls_of, quantize_by_layers
from edgellm_exporters.quantize.codes_on_disk import ChosenCodes
from edgellm_exporters.quantize.gptq import gptq
from edgellm_exporters.quantize.in_range import in_range
from edgellm_exporters.quantize.named_weights import is_parametrized, named_weights
from edgellm_exporters.quantize.plan import Codes, Scheme
from edgellm_runtime.freed_pages import trim

__all__ = ["MIN_TOKENS", "check_windows", "largest_inputs", "quantize_in_turn"]

MIN_TOKENS = 2048
_WHOLE_BYTES = 64 << 20  # of what all windows together put into the widest layer, to be run at once
_WEIGHT_BYTES = 256 << 20  # of the largest weight in floats, likewise
Array = NDArray[np.float32]
Progress = Callable[[float], None]
Visit = Callable[[str, nn.Linear, Tensor], None]


def check_windows(windows: Sequence[Sequence[int]]) -> None:
    """Make sure that there is enough text to learn from.

    Raises:
        QuantizeError: fewer than :data:`MIN_TOKENS` tokens.
    """
    if (found := sum(map(len, windows))) < MIN_TOKENS:
        raise QuantizeError(f"the calibration text has {found} tokens, and needs {MIN_TOKENS}; give a longer text")


def largest_inputs(
    model: nn.Module, windows: Sequence[Sequence[int]], progress: Progress = lambda _: None,
    weights: Weights | None = None,
) -> dict[str, Array]:  # fmt: skip
    """The largest magnitude in each column of what a linear layer reads, by the name of its weight.

    Args:
        model: in eval mode.
        windows: rows of token ids, each read from an empty state.
        progress: told the share that is done.
        weights: where the parameters of a model on the meta device are read.

    Raises:
        QuantizeError: a layer read something that is not finite.
    """
    found: dict[str, Array] = {}

    def visit(name: str, _module: nn.Linear, x: Tensor) -> None:
        found[name] = np.maximum(x.abs().amax(0).numpy(), found.get(name, np.float32(0)))
        if not np.isfinite(found[name]).all():
            raise QuantizeError(f"{name}: real text gives it NaN or infinite inputs; check the checkpoint")

    # a block that is run at several places reads something else at each
    with resident(model, weights or OwnWeights(model)):
        for number, some in enumerate(groups := _grouped(_even(windows))):
            _visit(model, some, visit, None, lambda _: None)
            progress((number + 1) / len(groups))
    return found


def _even(windows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows as long as the first: those of another length would need padding, and are left out."""
    return [list(window) for window in windows if len(window) == len(windows[0])]


def _grouped(windows: Sequence[Sequence[int]]) -> list[Sequence[Sequence[int]]]:
    """Windows, as many together as are run at a time."""
    step = max(1, GROUP_TOKENS // len(windows[0]))
    return [windows[start : start + step] for start in range(0, len(windows), step)]


def quantize_in_turn(
    model: nn.Module, windows: Sequence[Sequence[int]], schemes: Mapping[str, Scheme],
    columns: Mapping[str, Array], rows: Mapping[str, Array], progress: Progress = lambda _: None,
    weights: Weights | None = None, layers: Sequence[str] = (), scratch: Path | None = None,
) -> Mapping[str, Codes]:  # fmt: skip
    """GPTQ, layer after layer; each layer's inputs come from the layers before it as they were quantized.

    A layer that is run at several places is quantized for the inputs of all of them. Those of the first are what the
    layers before it give; those of the others are the float model's, because they come from the layer itself.

    Args:
        model: in eval mode; its weights are the same again afterwards.
        windows: rows of token ids, each read from an empty state.
        schemes: the formats of the weights to quantize, by the model's names for them.
        columns: factors that the weights' columns are smoothed with, by the same names.
        rows: those of their rows.
        progress: told the share that is done.
        weights: where the parameters of a model on the meta device are read.
        layers: paths of the model's layers, of which one is run at a time where all would take much memory.
        scratch: a directory for what is computed meanwhile, and for codes; None for where temporary files are.

    Returns:
        The numbers of each weight, smoothed.
    """
    source, even = weights or OwnWeights(model), _even(windows)
    progress(0.0)
    factors = Factors(columns, rows)
    widest, largest = _largest(model, schemes)
    if 4 * widest * sum(map(len, even)) > _WHOLE_BYTES or 4 * largest > _WEIGHT_BYTES:
        calls = calls_of(model, source, even[0][0], layers, schemes)
        if calls is not None:
            return quantize_by_layers(model, source, even, schemes, factors, calls, scratch, progress)
    with resident(model, source):
        return _quantize_at_once(model, windows, schemes, factors, progress, scratch)


def _largest(model: nn.Module, names: Container[str]) -> tuple[int, int]:
    """The most columns of a linear layer's weight, and the most numbers of one."""
    found = [p for name, p in named_weights(model).items() if name in names]
    return max((p.shape[-1] for p in found), default=0), max((p.numel() for p in found), default=0)


def _quantize_at_once(
    model: nn.Module, windows: Sequence[Sequence[int]], schemes: Mapping[str, Scheme], factors: Factors,
    progress: Progress, scratch: Path | None,
) -> ChosenCodes:  # fmt: skip
    """All windows as one batch, so that the model is passed once: what others are held to, and any model can do."""
    found = ChosenCodes(scratch)
    elsewhere = _inputs_elsewhere(model, windows, set(schemes))

    def visit(name: str, module: nn.Linear, x: Tensor) -> None:
        if name not in schemes:
            return
        column = factors.column(name, x.shape[1])
        row = factors.row(name, 0, module.out_features)
        if name not in found:
            smooth_x = x / column
            hessian = smooth_x.T @ smooth_x
            if name in elsewhere:
                hessian += elsewhere.pop(name) / column / column[:, None]
            weight = in_range(name, (module.weight.detach().float() * column * row).numpy())
            codes = gptq(weight, hessian, schemes[name])
            found.add(name, [codes], schemes[name].kernel_bits)
        if is_parametrized(module):
            return  # what it is made of stays; later layers read what it gives as it is
        module.weight = nn.Parameter(torch.from_numpy(found[name].dequantize()) / column / row, requires_grad=False)

    _visit(model, windows, visit, dict.fromkeys(schemes, 1), progress)
    return found


def _inputs_elsewhere(model: nn.Module, windows: Sequence[Sequence[int]], names: Set[str]) -> dict[str, Tensor]:
    """The sum of x x^T over what the weights that are used at several places read at all of these but the first."""
    places: Counter[str] = Counter()
    _visit(model, [windows[0][:1]], lambda name, *_: places.update([name]), None, lambda _: None)
    several = {name: count for name in names if (count := places[name]) > 1}
    met: Counter[str] = Counter()
    found: dict[str, Tensor] = {}

    def visit(name: str, _module: nn.Linear, x: Tensor) -> None:
        if name in several and met[name]:
            found[name] = found.get(name, 0) + x.T @ x
        met[name] += 1

    if several:
        _visit(model, windows, visit, several, lambda _: None)
    return found


class _Done(Exception):
    """Every layer that mattered was met: the rest of the pass would be for nothing."""


@torch.no_grad()
def _visit(
    model: nn.Module, windows: Sequence[Sequence[int]], visit: Visit, wanted: Mapping[str, int] | None,
    progress: Progress,
) -> None:  # fmt: skip
    """Run the model and call ``visit`` with each linear layer's weight's name, the layer, and all that it reads.

    It is called whenever a layer is run. Where weights are ``wanted``, nothing is run after each of those was met so
    often; otherwise nothing after the layer that gives the logits, once all others were met. Logits are not computed:
    for a long text and vocabulary they would be the largest thing in memory.
    """
    config: Any = getattr(model, "config", None)
    width = None if config is None else logit_width(config)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    linears = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    layers = {m: [f"{path}.weight"] if is_parametrized(m) else names[id(m.weight)] for path, m in linears}
    every = {name for own in layers.values() for name in own}
    left = Counter(
        dict.fromkeys(every, 1) if wanted is None else {n: count for n, count in wanted.items() if n in every}
    )
    total = left.total()

    def hook(module: nn.Module, inputs: Any) -> None:
        assert isinstance(module, nn.Linear)
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        for name in layers[module]:
            visit(name, module, x)
            if left[name]:
                left[name] -= 1
        progress(1 - left.total() / max(total, 1))
        trim()
        if not left.total() and (wanted is not None or module.out_features == width):
            raise _Done

    with _unchanged(layers), _hooked(layers, hook), suppress(_Done):
        read_rows(model, torch.tensor(_even(windows)))


@contextmanager
def _hooked(layers: Mapping[nn.Linear, Any], hook: Any) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _unchanged(layers: Mapping[nn.Linear, Any]) -> Iterator[None]:
    before = {layer: layer.weight for layer in layers if not is_parametrized(layer)}
    try:
        yield
    finally:
        for layer, weight in before.items():
            layer.weight = weight
