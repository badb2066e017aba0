"""One operator of PyTorch's as the operators that it is made of, when nothing else is known of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

__all__ = ["decomposed", "writes"]


@functools.cache
def _table() -> Mapping[Any, Callable[..., Any]]:
    """PyTorch's own decompositions; those that :mod:`torch.export` goes by come first."""
    from torch._decomp import decomposition_table

    return {**decomposition_table, **dict(torch.export.default_decompositions())}


def decomposed(node: torch.fx.Node) -> tuple[torch.fx.GraphModule, list[torch.fx.Node]] | None:
    """A call as a graph of simpler calls, and what to put in the place of that graph's inputs.

    Args:
        node: a call in a traced program.

    Returns:
        None if PyTorch takes the operator for one that cannot be divided.
    """
    target: Any = node.target
    function = _table().get(target)
    if function is None:
        return None
    leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
    inputs = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, torch.fx.Node)))
    places = {leaf: i for i, leaf in enumerate(inputs)}

    def call(*given: Any) -> Any:
        filled = [given[places[leaf]] if isinstance(leaf, torch.fx.Node) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(filled, structure)
        return function(*args, **kwargs)

    values = [leaf.meta["val"] for leaf in inputs]
    mode = detect_fake_mode([v for v in values if isinstance(v, torch.Tensor)]) or _mode_of(node)
    with mode or nullcontext():
        graph = make_fx(call, tracing_mode="real", _allow_non_fake_inputs=True)(*values)
    if not _write_nothing(graph.graph) or _same(graph.graph.nodes, target):
        return None
    return graph, inputs


def _write_nothing(graph: torch.fx.Graph) -> bool:
    """Let each call that writes into a tensor give a new one, in place; False where a view would see the difference."""
    for node in filter(writes, list(graph.nodes)):
        name, _, overload = node.target.__name__.partition(".")
        functional = getattr(getattr(torch.ops.aten, name.removesuffix("_"), None), overload or "default", None)
        written = node.args[0]
        if functional is None or functional is node.target or any(map(_is_view, (written, *written.users))):
            return False
        written.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user is not node and user > node)
        node.target = functional
    return True


def _is_view(node: torch.fx.Node) -> bool:
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    return not writes(node) and any(r.alias_info is not None for r in returns)


def writes(node: torch.fx.Node) -> bool:
    """Whether a call writes into what it is given."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _mode_of(node: torch.fx.Node) -> Any:
    """The mode that a program was traced in, for a call that takes no tensors."""
    return next((mode for n in node.graph.nodes if (mode := detect_fake_mode([n.meta.get("val")]))), None)


def _same(nodes: Sequence[torch.fx.Node] | Any, target: Any) -> bool:
    """Whether a decomposition is the call itself again."""
    calls = [node.target for node in nodes if node.op == "call_function"]
    return calls == [target]
