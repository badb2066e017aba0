"""How much the model's words depend on each layer's outputs: gradients of sampled words, token by token.

To second order, KL(p || q) of a small change is half the expected square of its effect on log p(y), y drawn from the
model itself (the Fisher information). So one backward pass over some text tells what any change of a layer costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgellm.streaming import Weights, resident
from edgellm_exporters.auto.saved_tensors import SavedTensors
from edgellm_exporters.weights.scratch_file import Reader, ScratchFile
from edgellm_runtime.freed_pages import trim

__all__ = ["Gathered", "Record", "gather"]

_STORED = torch.bfloat16  # squares of thousands of them are averaged: 8 bits of each are enough, and halve the memory


class Record:
    """What one module read, and the gradients of what it gave, token by token; on disk.

    Args:
        file: where.
    """

    def __init__(self, file: ScratchFile) -> None:
        self._file = file
        self._parts: list[tuple[Reader, Reader]] = []

    def add(self, read: Tensor, gradients: Tensor) -> None:
        """Put further tokens behind those that are there.

        Args:
            read: (tokens, ...).
            gradients: (tokens, columns), of which some columns can be read alone.
        """
        one, other = self._file.write(read.contiguous()), self._file.write(gradients.T.contiguous())
        assert one is not None and other is not None
        self._parts.append((one, other))

    def read(self) -> Tensor:
        """What the module read, (tokens, ...)."""
        return torch.cat([read() for read, _ in self._parts])

    def gradients(self, columns: tuple[int, int] | None = None) -> Tensor:
        """Of all columns, or of those from one to before another: (tokens, columns)."""
        return torch.cat([lying(columns) for _, lying in self._parts], dim=1).T


class Records(Mapping[str, Record]):
    """Records by name.

    Args:
        file: where they are.
    """

    def __init__(self, file: ScratchFile) -> None:
        self._file, self._found = file, dict[str, Record]()

    def add(self, name: str, read: Tensor, gradients: Tensor) -> None:
        """Put further tokens behind those of a name."""
        self._found.setdefault(name, Record(self._file)).add(read, gradients)

    def __getitem__(self, name: str) -> Record:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


@dataclass(frozen=True)
class Gathered:
    """Inputs and output gradients of layers, by the first of the model's names for their weights.

    Args:
        products: of each linear layer: what it read (tokens, columns), and the gradients of what it gave
            (tokens, rows).
        lookups: of each embedding: token ids (tokens,), and the gradients of their rows (tokens, columns).
        tokens: how many were read.
    """

    products: Mapping[str, Record]
    lookups: Mapping[str, Record]
    tokens: int


def gather(
    model: nn.Module, weights: Weights, windows: Sequence[Sequence[int]], scratch: Path | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> Gathered:  # fmt: skip
    """Run text forward and sampled words backward, window by window.

    What autograd saves is kept out of memory, and so is what is gathered, but for one window's inputs in 16 bits and
    the last weights that were read.

    Args:
        model: in eval mode; may be on the meta device.
        weights: where its parameters are read from.
        windows: rows of token ids, each read from an empty state.
        scratch: a directory for what is kept on disk; None for where temporary files are.
        progress: told the share that is done.
    """
    file, saved = ScratchFile(scratch), SavedTensors(model, weights, scratch)
    products, lookups = Records(file), Records(file)
    generator = torch.Generator().manual_seed(0)
    with resident(model, saved), _recording(model, products, lookups):
        for number, window in enumerate(windows):
            with saved.out_of_memory():
                _backward(model, window, generator)
            progress((number + 1) / len(windows))
    return Gathered(products, lookups, sum(map(len, windows)))


def _backward(model: nn.Module, window: Sequence[int], generator: torch.Generator) -> None:
    with torch.enable_grad():
        logits = model(torch.tensor([list(window)]))[0].float()  # (1, time, vocab)
    # of the sum of -log p(y): p less one at y, which takes a third of the memory that autograd would
    gradient = logits.detach()[0].log_softmax(-1).exp_()
    gradient.scatter_add_(1, torch.multinomial(gradient, 1, generator=generator), torch.full((len(gradient), 1), -1.0))
    logits.backward(gradient[None])


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
            into = products
        elif isinstance(module, nn.Embedding):
            into = lookups
        else:
            continue
        handles.append(module.register_forward_hook(partial(_record, partial(into.add, names[id(module.weight)]))))
    for parameter in needed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in needed:
            parameter.requires_grad_(True)


def _record(add: Callable[[Tensor, Tensor], None], module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    if not output.requires_grad:
        output = output.detach().requires_grad_()
    read = inputs[0].detach().flatten()
    if isinstance(module, nn.Linear):
        read = read.reshape(-1, inputs[0].shape[-1]).to(_STORED)

    def keep(gradient: Tensor) -> None:
        add(read, gradient.reshape(-1, gradient.shape[-1]).to(_STORED))
        trim()

    output.register_hook(keep)  # type: ignore[no-untyped-call]
    trim()
    return output
