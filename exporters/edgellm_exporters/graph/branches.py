"""Operators of PyTorch's that take graphs: what runs as it stands, branches and loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch

from edgellm_exporters.graph.values import typed

if TYPE_CHECKING:
    from edgellm_exporters.graph.making import Making

__all__ = ["BRANCHES"]

_HIGHER = torch.ops.higher_order


def _as_it_stands(places: slice, graph_at: int) -> Callable[..., Any]:
    """An operator that runs its graph once, on the arguments from a place on."""

    def form(made: Making, node: torch.fx.Node, *args: Any, **_: Any) -> Any:
        return made.inline(made.values[args[graph_at]].graph, args[places])

    return form


def _autocast(made: Making, node: torch.fx.Node, *args: Any, **_: Any) -> Any:
    device, _dtype, enabled, _cache, graph, *inputs = args
    if enabled:
        raise made.refuse(node, f"the forward turns on autocast for {device}; cast what it computes with .to() instead")
    return made.inline(made.values[graph].graph, inputs)


def _cond(made: Making, node: torch.fx.Node, *args: Any, **_: Any) -> Any:
    condition, yes, no, inputs = (*args, ()) if len(args) == 3 else args
    sides = {
        name: _graph(made, made.values[side].graph, inputs, f"{node.name}.{name}")
        for name, side in (("then_branch", yes), ("else_branch", no))
    }
    return made.ops("If", made.value(condition), like=_several(node), **sides)


def _graph(made: Making, graph: torch.fx.Graph, inputs: Sequence[Any], name: str) -> ir.Graph:
    nodes, results = made.branch(graph, inputs)
    return ir.Graph([], results, nodes=nodes, name=name)


def _while(made: Making, node: torch.fx.Node, *_: Any, **__: Any) -> Any:
    raise made.refuse(
        node, "a loop that runs until a value ends it may not stand in a bundle; run a fixed number of steps, or "
        "torch.scan over a tensor",
    )  # fmt: skip


def _scan(made: Making, node: torch.fx.Node, body: Any, first: Any, rows: Any, more: Any = (), **_: Any) -> Any:
    states, inputs = [made.value(x) for x in first], [made.value(x) for x in rows]
    inside = [_new(made, value) for value in states]
    each = [_new(made, value, row=True) for value in inputs]
    nodes, results = made.branch(made.values[body].graph, [*inside, *each, *more])
    graph = ir.Graph([*inside, *each], results, nodes=nodes, name=f"{node.name}.body")
    return made.ops("Scan", *states, *inputs, like=_several(node), body=graph, num_scan_inputs=len(inputs))


def _several(node: torch.fx.Node) -> Sequence[Any]:
    like: Sequence[Any] = node.meta["val"]
    return like


def _new(made: Making, like: ir.Value, *, row: bool = False) -> ir.Value:
    from edgellm_exporters.graph.function_library import Symbol

    value = typed(Symbol(name=made.fresh()), like)
    if row and like.shape is not None:
        value.shape = ir.Shape(like.shape[1:])
    return value


def _known(forms: Mapping[str, Callable[..., Any]]) -> Mapping[Any, Callable[..., Any]]:
    """By operator; a name that this version of PyTorch does not have is left out."""
    return {getattr(_HIGHER, name): form for name, form in forms.items() if hasattr(_HIGHER, name)}


BRANCHES: Mapping[Any, Callable[..., Any]] = _known(
    {
        "cond": _cond,
        "while_loop": _while,
        "scan": _scan,
        "wrap_with_autocast": _autocast,
        "wrap_with_set_grad_enabled": _as_it_stands(slice(2, None), 1),
        "invoke_subgraph": _as_it_stands(slice(2, None), 0),
        "tag_activation_checkpoint": _as_it_stands(slice(1, None), 0),
        "wrap": _as_it_stands(slice(1, None), 0),
    }
)
