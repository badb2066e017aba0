"""The quantizations that ``--quantize`` names. A new method is a new value here and a file beside this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from edgellm.ops.canonical import DOMAIN
from edgellm_exporters.quantize.plan import Plan, Quantize, Scheme
from edgellm_exporters.quantize.rtn import round_to_nearest

__all__ = ["METHODS", "Method", "plan_for", "quantizable"]

_OPS = frozenset({"Linear", "Embedding", "LSTM", "GRU", "RNN"})


@dataclass(frozen=True)
class Method:
    """One way to quantize a whole model."""

    summary: str
    scheme: Scheme | None = None
    quantize: Quantize | None = None


METHODS: Mapping[str, Method] = {
    "none": Method("float weights"),
    "int8": Method(
        "8-bit weights in blocks of 32, rounded to nearest; activations as the target's kernels take them",
        Scheme(bits=8, block=32), round_to_nearest,
    ),
}  # fmt: skip


def plan_for(method: str, graph: ir.Model) -> Plan:
    """The plan that a method makes for a captured graph whose passes are done.

    Args:
        method: a name in :data:`METHODS`.
        graph: of canonical ops.
    """
    chosen = METHODS[method]
    if chosen.scheme is None:
        return Plan()
    return Plan(dict.fromkeys(quantizable(graph), chosen.scheme), chosen.quantize)


def quantizable(graph: ir.Model) -> list[str]:
    """Names of the matrices that canonical ops multiply with or look up in."""
    found: dict[str, None] = {}
    for node in graph.graph:
        if node.domain == DOMAIN and node.op_type in _OPS:
            for value in node.inputs:
                if (
                    value is not None
                    and value.name
                    and value.const_value is not None
                    and len(value.const_value.shape) == 2
                ):
                    found[value.name] = None
    return list(found)
