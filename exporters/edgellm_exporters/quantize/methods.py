"""The quantizations that ``--quantize`` names. A new method is a new value here and a file beside this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgellm.ops.canonical import DOMAIN
from edgellm_exporters.passes.merge_linears import parts_of
from edgellm_exporters.quantize.calibrate import Calibration
from edgellm_exporters.quantize.gptq import gptq
from edgellm_exporters.quantize.plan import Codes, Plan, Quantizer, Scheme
from edgellm_exporters.quantize.rtn import round_to_nearest

__all__ = ["METHODS", "Method", "plan_for", "quantizable", "quantizer"]

_OPS = frozenset({"Linear", "Embedding", "LSTM", "GRU", "RNN"})


@dataclass(frozen=True)
class Method:
    """One way to quantize a whole model.

    Args:
        summary: for help texts.
        layers: the format of weights between the embedding and the logits, or None for floats.
        ends: that of the embedding and of the projection to the vocabulary.
        bounds: what a bundle must hold to, against the float model; see :mod:`edgellm_runtime.verify`.
    """

    summary: str
    layers: Scheme | None
    ends: Scheme | None
    bounds: Mapping[str, float]


# Float graphs differ from PyTorch by rounding alone; the bounds of the others hold with a margin for the models in
# docs/benchmarks.md and fail for a wrong graph.
METHODS: Mapping[str, Method] = {
    "none": Method(
        "float weights", None, None,
        {"logits": 1e-4, "kl": 1e-6, "top1": 1.0, "state": 1e-4, "split": 1e-4, "batch": 1e-4, "greedy": 1.0},
    ),
    "int8": Method(
        "8-bit weights", Scheme(8), Scheme(8), {"kl": 0.02, "top1": 0.9, "state": 0.15, "split": 0.1, "batch": 0.1}
    ),
    "int4": Method(
        "4-bit weights, the embedding and the projection to the vocabulary in 8", Scheme(4, symmetric=False), Scheme(8),
        {"kl": 0.6, "top1": 0.5, "split": 0.15, "batch": 0.15},  # no bound on state: a key of SmolLM2 was 88% off
    ),
}  # fmt: skip


def plan_for(method: str, graph: ir.Model, calibration: Calibration | None = None) -> Plan:
    """The plan that a method makes for a captured graph whose passes are done.

    Args:
        method: a name in :data:`METHODS`.
        graph: of canonical ops.
        calibration: weights of fewer than 8 bits are then quantized with GPTQ.
    """
    chosen = METHODS[method]
    if chosen.layers is None or chosen.ends is None:
        return Plan()
    ends = _ends(graph)
    schemes = {name: chosen.ends if name in ends else chosen.layers for name in quantizable(graph)}
    return Plan(schemes, quantizer(calibration))


def quantizer(calibration: Calibration | None = None) -> Quantizer:
    """GPTQ where calibration knows a weight's inputs and codes are few, rounding to nearest elsewhere."""

    def quantize(name: str, weight: NDArray[np.float32], scheme: Scheme) -> Codes:
        hessian = calibration.find(parts_of(name)) if calibration is not None and scheme.bits < 8 else None
        return round_to_nearest(weight, scheme) if hessian is None else gptq(weight, hessian, scheme)

    return quantize


def quantizable(graph: ir.Model) -> list[str]:
    """Names of the matrices that canonical ops multiply with or look up in."""
    found: dict[str, None] = {}
    for node in graph.graph:
        if node.domain == DOMAIN and node.op_type in _OPS:
            for value in node.inputs:
                tensor = value.const_value if value is not None else None
                if value is not None and value.name and tensor is not None and len(tensor.shape) == 2:
                    found[value.name] = None
    return list(found)


def _ends(graph: ir.Model) -> set[str]:
    """Weights that an Embedding reads, or whose product is the logits."""
    nodes = [n for n in graph.graph if n.domain == DOMAIN]
    found = {n.inputs[0] for n in nodes if n.op_type == "Embedding"}
    found |= {n.inputs[1] for n in nodes if n.op_type == "Linear" and n.outputs[0].is_graph_output()}
    return {value.name for value in found if value is not None and value.name}
