"""RMS norms of each head's query and key, written before attention, inside it."""

from __future__ import annotations

import onnx_ir as ir

from edgellm.ops import ATTENTION, RMS_NORM
from edgellm.ops.schema import View, view_of, views

__all__ = ["HeadNorms"]


class HeadNorms(ir.passes.InPlacePass):
    """``Reshape -> RMSNorm -> Reshape -> Attention`` of both query and key becomes Attention with norms.

    Before: a captured graph without neutral nodes. After: no Attention without norms reads a query and a key that were
    each split into heads, normed over a head's features with one epsilon, and joined again.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Move every pair, in place."""
        changed = False
        for attention in list(views(model.graph, ATTENTION)):
            norms = _norms(attention)
            if norms is None:
                continue
            q, k = norms
            given = {name: getattr(attention, name) for name in (*ATTENTION.inputs, *ATTENTION.attributes)}
            given |= {"q": _source(q), "k": _source(k), "q_norm": q.weight, "k_norm": k.weight, "epsilon": q.epsilon}
            node = ATTENTION.node(ir.node, **given)
            old = attention.node.outputs
            for new, before in zip(node.outputs, old, strict=True):
                new.shape, new.type = before.shape, before.type
            ir.convenience.replace_nodes_and_values(
                model.graph, attention.node, [attention.node], [node], old, node.outputs
            )  # fmt: skip
            changed = True
        return ir.passes.PassResult(model, changed)


def _norms(attention: View) -> tuple[View, View] | None:
    if attention.q_norm is not None or attention.k_norm is not None:
        return None
    q, k = (_norm_of(value) for value in (attention.q, attention.k))
    if q is None or k is None or q.epsilon != k.epsilon:
        return None
    return q, k


def _norm_of(joined: ir.Value) -> View | None:
    """The norm of each head that a value is, with nothing else between it and a split into heads."""
    join = joined.producer()
    if join is None or join.domain or join.op_type != "Reshape" or join.inputs[0] is None:
        return None
    norm = view_of(join.inputs[0].producer())
    if norm is None or norm.op is not RMS_NORM:
        return None
    split = norm.x.producer()
    if split is None or split.domain or split.op_type != "Reshape" or split.inputs[0] is None:
        return None
    heads, whole = norm.x.shape, split.inputs[0].shape
    fits = heads is not None and whole is not None and len(heads) == 4 and len(whole) == 3 and whole == joined.shape
    return norm if fits and list(heads)[:2] == list(whole)[:2] else None


def _source(norm: View) -> ir.Value:
    found: ir.Value = norm.x.producer().inputs[0]
    return found
