"""How much the model's words depend on each layer's outputs: gradients of sampled words, token by token.

To second order, KL(p || q) of a small change is half the expected square of its effect on log p(y), y drawn from the
model itself (the Fisher information). So one backward pass over some text tells what any change of a layer costs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Gathered", "gather"]

_STORED = torch.bfloat16  # squares of thousands of them are averaged: 8 bits of each are enough, and halve the memory


@dataclass
class Gathered:
    """Inputs and output gradients of layers, by the first of the model's names for their weights.

    Args:
        products: of each linear layer: what it read (tokens, columns), and the gradients of what it gave
            (tokens, rows).
        lookups: of each embedding: token ids (tokens,), and the gradients of their rows (tokens, columns).
        tokens: how many were read.
    """

    products: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    lookups: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tokens: int = 0


def gather(
    model: nn.Module, windows: Sequence[Sequence[int]], progress: Callable[[float], None] = lambda _: None
) -> Gathered:
    """Run text forward and sampled words backward, window by window.

    Autograd keeps the weights that a window used until its backward pass is done: of a model that reads its weights
    from a file, all of them are in memory then.

    Args:
        model: in eval mode, able to run.
        windows: rows of token ids, each read from an empty state.
        progress: told the share that is done.
    """
    products: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    lookups: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    generator = torch.Generator().manual_seed(0)
    with _recording(model, products, lookups):
        for number, window in enumerate(windows):
            _backward(model, window, generator)
            progress((number + 1) / len(windows))
    return Gathered(_joined(products), _joined(lookups), sum(map(len, windows)))


def _backward(model: nn.Module, window: Sequence[int], generator: torch.Generator) -> None:
    with torch.enable_grad():
        logits, _ = model(torch.tensor([list(window)]))
        logs = logits[0].float().log_softmax(-1)  # (time, vocab)
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
        (-logs.gather(1, drawn).sum()).backward()


Records = dict[str, list[tuple[Tensor, Tensor]]]


def _joined(records: Records) -> dict[str, tuple[Tensor, Tensor]]:
    """Each layer's windows as one, which are let go of one layer after another."""
    found = {}
    for name in list(records):
        pairs = records.pop(name)
        found[name] = (torch.cat([first for first, _ in pairs]), torch.cat([second for _, second in pairs]))
    return found


@contextmanager
def _recording(model: nn.Module, products: Records, lookups: Records) -> Iterator[None]:
    """Hooks that record; the first layer's outputs are what gradients are asked for, so that no weight needs one."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    needed = [p for p in model.parameters() if p.requires_grad]
    handles = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            into: Any = products[names[id(module.weight)]]
        elif isinstance(module, nn.Embedding):
            into = lookups[names[id(module.weight)]]
        else:
            continue
        handles.append(module.register_forward_hook(partial(_record, into)))
    for parameter in needed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in needed:
            parameter.requires_grad_(True)


def _record(into: list[tuple[Tensor, Tensor]], module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    if not output.requires_grad:
        output = output.detach().requires_grad_()
    read = inputs[0].detach().flatten()
    if isinstance(module, nn.Linear):
        read = read.reshape(-1, inputs[0].shape[-1]).to(_STORED)

    def keep(gradient: Tensor) -> None:
        into.append((read, gradient.reshape(-1, gradient.shape[-1]).to(_STORED)))

    output.register_hook(keep)  # type: ignore[no-untyped-call]
    return output
