"""A mixture of experts as the cpu target has it, with weights of any format, for tests of its forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgellm.ops import EXPERT
from edgellm_exporters.graph.lower import lower_to
from edgellm_exporters.graph.targets import TARGETS
from edgellm_exporters.quantize.plan import Plan, Scheme
from edgellm_exporters.quantize.rtn import round_to_nearest

WIDTH, HIDDEN = 128, 64


def mixture_model(
    schemes: Sequence[Scheme | None], *, seed: int = 0, packed: bool = True, form: Mapping[str, object] | None = None
) -> ir.Model:
    """Experts one after another, as a capture leaves them: inputs total, x and shares, output sum.

    Args:
        schemes: of each expert's weights.
        seed: of their numbers.
        packed: whether gate and what it multiplies are one matrix.
        form: attributes of the experts.
    """
    draw = np.random.default_rng(seed)
    total, x, shares = (
        _value(name, ["batch", "time", size])
        for name, size in (("total", WIDTH), ("x", WIDTH), ("shares", len(schemes)))
    )
    split = ir.node("Split", [shares], attributes={"axis": -1, "num_outputs": len(schemes)}, num_outputs=len(schemes))
    nodes, weights, sum_ = [split], list[ir.Value](), total
    for i, share in enumerate(split.outputs):
        share.shape, share.type = ir.Shape(["batch", "time", 1]), ir.TensorType(ir.DataType.FLOAT)
        sizes = {"up": (2 * HIDDEN if packed else HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)}
        sizes |= {} if packed else {"gate": (HIDDEN, WIDTH)}
        own = {name: _weight(f"experts.{i}.{name}.weight", size, draw) for name, size in sizes.items()}
        node = EXPERT.node(ir.node, total=sum_, x=x, share=share, **own, packed=packed, **(form or {}))
        (sum_,) = node.outputs
        sum_.name, sum_.shape, sum_.type = f"sum.{i}", total.shape, total.type
        nodes.append(node)
        weights += own.values()
    opsets = {"": 23, "edgellm": 1}
    graph = ir.Graph([total, x, shares], [sum_], nodes=nodes, initializers=weights, opset_imports=opsets, name="g")
    return ir.Model(graph, ir_version=10)


def mixture_graph(
    schemes: Sequence[Scheme | None], *, seed: int = 0, form: Mapping[str, object] | None = None
) -> bytes:
    """The same, lowered and serialized."""
    chosen = {f"experts.{i}.{n}.weight": s for i, s in enumerate(schemes) if s is not None for n in ("up", "down")}
    plan = Plan(schemes=chosen, quantize=lambda name, weight, scheme: round_to_nearest(weight, scheme))
    model = lower_to(mixture_model(schemes, seed=seed, form=form), TARGETS["cpu"], plan)
    return ir.to_proto(model).SerializeToString()


def tokens(batch: int, time: int, experts: int, chosen: int, seed: int = 1) -> dict[str, NDArray[np.float32]]:
    """Numbers for the inputs: every token has a share of so many experts."""
    draw = np.random.default_rng(seed)
    total, x = draw.standard_normal((2, batch, time, WIDTH)).astype(np.float32)
    ranks = draw.permuted(np.tile(np.arange(experts), (batch, time, 1)), axis=-1)
    shares = np.where(ranks < chosen, draw.uniform(0.1, 1, ranks.shape), 0).astype(np.float32)
    return {"total": total, "x": x, "shares": shares}


def _value(name: str, shape: Sequence[str | int]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(list(shape)), type=ir.TensorType(ir.DataType.FLOAT))


def _weight(name: str, shape: tuple[int, int], draw: np.random.Generator) -> ir.Value:
    numbers = (draw.standard_normal(shape) / shape[1] ** 0.5).astype(np.float32)
    tensor = ir.tensor(numbers, name=name)
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
