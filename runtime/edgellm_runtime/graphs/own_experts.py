"""A mixture of experts as one node: which branches of a graph edgellm's own operator stands for.

An expert is an If: where any token has a share of it, its gated MLP of those tokens, times the share, is added to the
sum so far; else the sum stays. Neighbours in the chain become one node if their matrices are of one kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edgellm_runtime.graphs.graph_view import GraphView
from edgellm_runtime.graphs.own_attention import DOMAIN
from edgellm_runtime.graphs.stored_weights import stored_weights
from edgellm_runtime.graphs.writer import Attribute, Node

__all__ = ["EXPERTS", "GatedProducts", "Mixture", "own_experts"]

EXPERTS = "ChosenExperts"
_BOOL = 9


@dataclass(frozen=True)
class GatedProducts:
    """A gated MLP.

    Args:
        reads: the value that its first product reads.
        gives: its result.
        constants: names of codes, scales and zeros of both products.
        attributes: of both.
    """

    reads: str
    gives: str
    constants: tuple[str, str, str, str, str, str]
    attributes: Mapping[str, Attribute]


@dataclass(frozen=True)
class Mixture:
    """Experts that become one node.

    Args:
        places: of their Ifs, in order.
        chain: places of nodes that nothing may need any more.
        node: which stands where the last If was.
    """

    places: Sequence[int]
    chain: frozenset[int]
    node: Node


@dataclass(frozen=True)
class _Expert:
    """One If; `total` is the sum so far, `gives` the sum with its part, `number` its place among the shares."""

    place: int
    total: str
    gives: str
    x: str
    shares: str
    number: int
    mlp: GatedProducts
    chain: frozenset[int]

    def follows(self, other: _Expert) -> bool:
        """Whether it may be of one node with the one before."""
        same = (self.x, self.shares, self.mlp.attributes) == (other.x, other.shares, other.mlp.attributes)
        return same and self.total == other.gives and self.number == other.number + 1


def own_experts(view: GraphView, mlp_of: Callable[[GraphView], GatedProducts | None]) -> list[Mixture]:
    """The mixtures of a graph.

    Args:
        view: the graph.
        mlp_of: finds the one MLP with quantized weights of a branch, in which no other product may be.
    """
    runs: list[list[_Expert]] = []
    for place, node in enumerate(view.nodes):
        found = _expert(view, place, mlp_of) if node.op == "If" else None
        if found is None:
            continue
        before = runs[-1][-1] if runs else None
        if before is not None and found.follows(before) and view.inner(before.gives, [place]):
            runs[-1].append(found)
        else:
            runs.append([found])
    return [_mixture(view, run) for run in runs]


def _mixture(view: GraphView, run: Sequence[_Expert]) -> Mixture:
    first, last = run[0], run[-1]
    inputs = [first.total, first.x, first.shares, *(name for expert in run for name in expert.mlp.constants if name)]
    attributes = {**first.mlp.attributes, "first": first.number, "experts": len(run)}
    node = Node(EXPERTS, inputs, [last.gives], attributes, domain=DOMAIN, name=view.node(first.place).name)
    return Mixture([expert.place for expert in run], frozenset().union(*(expert.chain for expert in run)), node)


def _expert(view: GraphView, place: int, mlp_of: Callable[[GraphView], GatedProducts | None]) -> _Expert | None:
    node = view.node(place)
    then, other = view.branch(place, "then_branch"), view.branch(place, "else_branch")
    if view.domain(place) or then is None or other is None or len(node.outputs) != 1 or len(other.nodes) != 1:
        return None
    keeps = other.made_by(other.gives[0], "Identity")
    scatter = then.made_by(then.gives[0], "ScatterND")
    mlp = mlp_of(then)
    if keeps is None or scatter is None or mlp is None or then.attributes(scatter).get("reduction") != "add":
        return None
    total, rows, weighted = then.node(scatter).inputs
    times = then.made_by(weighted, "Mul")
    if times is None or other.node(keeps).inputs != (total,) or mlp.gives not in then.node(times).inputs:
        return None
    y, share_rows = then.node(times).inputs
    share = _gathered(then, share_rows if y == mlp.gives else y, rows)
    x = _gathered(then, mlp.reads, rows)
    made = {name for each in then.nodes for name in each.outputs}  # which nothing outside of the branch can read
    if share is None or x is None or not made.isdisjoint((x, total)) or _places_of(then, rows) != share:
        return None
    asked = _asked(view, node.inputs[0], share)
    if asked is None:
        return None
    shares, number, chain = asked
    stored, before = _stored(view, mlp)
    return _Expert(place, total, node.outputs[0], x, shares, number, stored, frozenset(chain | before))


def _stored(view: GraphView, mlp: GatedProducts) -> tuple[GatedProducts, frozenset[int]]:
    """With weights as they are stored, and the places of the nodes before the branch that make them of these."""
    codes, scales, zeros, *of_down = mlp.constants
    up, down = stored_weights(view, codes, scales), stored_weights(view, *of_down[:2])
    said = {**up.said, **{f"{key}_down": value for key, value in down.said.items()}}
    constants = (up.codes, up.scales, zeros, down.codes, down.scales, of_down[2])
    return GatedProducts(mlp.reads, mlp.gives, constants, {**mlp.attributes, **said}), up.chain | down.chain


def _gathered(view: GraphView, name: str, rows: str) -> str | None:
    """The value of which one is these rows."""
    place = view.made_by(name, "GatherND")
    if place is None or view.node(place).inputs[1:] != (rows,) or view.node(place).numbers.get("batch_dims", 0):
        return None
    return view.node(place).inputs[0]


def _places_of(view: GraphView, rows: str) -> str | None:
    """The value (batch, time, 1) whose numbers but 0 stand at these rows."""
    turned = view.made_by(rows, "Transpose")
    found = None if turned is None else view.made_by(view.node(turned).inputs[0], "NonZero")
    flat = None if found is None else view.made_by(view.node(found).inputs[0], "Squeeze")
    if turned is None or flat is None or view.whole_numbers(turned, "perm") not in ((), (1, 0)):
        return None
    name, *axes = view.node(flat).inputs
    return name if len(axes) == 1 and view.numbers(axes[0]) == (2,) else None


def _asked(view: GraphView, condition: str, share: str) -> tuple[str, int, set[int]] | None:
    """The shares of all experts, an expert's number, and the nodes that ask whether any of its shares is not 0."""
    parts, flags = view.made_by(share, "Split"), view.made_by(condition, "Split")
    if parts is None or flags is None or len(view.node(parts).outputs) != len(view.node(flags).outputs):
        return None
    split, asked = view.node(parts), view.node(flags)
    number, ones = split.outputs.index(share), (1,) * len(split.outputs)
    if asked.outputs[number] != condition or split.numbers.get("axis", 0) not in (2, -1):
        return None
    if asked.numbers.get("axis", 0) != 0 or any(
        len(node.inputs) > 1 and view.numbers(node.inputs[1]) != ones for node in (split, asked)
    ):
        return None
    cast = view.made_by(asked.inputs[0], "Cast")
    reduced = None if cast is None else view.made_by(view.node(cast).inputs[0], "ReduceL1")
    if cast is None or reduced is None or view.node(cast).numbers.get("to") != _BOOL:
        return None
    whole = view.node(reduced)
    if len(whole.inputs) != 2 or view.numbers(whole.inputs[1]) != (0, 1) or whole.numbers.get("keepdims", 1) != 0:
        return None
    return (split.inputs[0], number, {parts, flags, cast, reduced}) if whole.inputs[0] == split.inputs[0] else None
