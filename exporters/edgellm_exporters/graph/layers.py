"""The layers of a model, in PyTorch and in its graph, so that the two can be compared one by one.

A layer is an item of an outermost ``nn.ModuleList``. Its output keeps a name of its own from the trace to the written
graph, as long as no pass does away with the value. Nothing here knows an architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgellm_runtime.checks.layers import LAYER

__all__ = ["layer_modules", "layer_nodes", "layers_recorded"]

_AXES = 3  # of a layer's output: (batch, time, width)


def layer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """A model's layers by their paths, first to last."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{path}.") for path in found):
            found |= {f"{name}.{number}": child for number, child in module.named_children()}
    return found


def layer_nodes(graph: torch.fx.Graph, layers: Mapping[str, nn.Module], prefix: str) -> dict[torch.fx.Node, str]:
    """The node of each layer's output in a traced program, with the name that its value gets.

    That is the last of its nodes whose result another module reads; what only becomes state is none.

    Args:
        graph: traced, with the modules that each node comes from.
        layers: of the model.
        prefix: of its paths in the program.
    """
    paths = {f"{prefix}{path}": path for path in layers}
    inside = {node: _layer_of(node, paths) for node in graph.nodes}
    found: dict[str, torch.fx.Node] = {}
    for node, path in inside.items():
        value = node.meta.get("val")
        if path is None or not isinstance(value, Tensor) or value.dim() != _AXES or not value.is_floating_point():
            continue
        if any(inside[user] != path and user.op != "output" for user in node.users):
            found[path] = node
    return {node: f"{LAYER}{path}" for path, node in found.items()}


def _layer_of(node: torch.fx.Node, paths: Mapping[str, str]) -> str | None:
    stack = node.meta.get("nn_module_stack") or {}
    return next((paths[path] for path, _ in stack.values() if path in paths), None)


@contextmanager
def layers_recorded(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What each layer gave when the model last ran, (batch, time, width), by path; filled as it runs."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            given = output if isinstance(output, tuple) else (output,)
            tensor = next((t for t in given if isinstance(t, Tensor) and t.dim() == _AXES), None)
            if tensor is not None:
                found[path] = tensor

        return hook

    hooks = [module.register_forward_hook(keep(path)) for path, module in layer_modules(model).items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
