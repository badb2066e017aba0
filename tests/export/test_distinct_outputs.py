"""A body that gives one value twice, or what it was given, computes what it says."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from edgellm.ops import token_by_token
from edgellm_exporters.graph.capture import OPSET, traced
from edgellm_exporters.graph.lower import clean
from edgellm_exporters.graph.translate import translated
from edgellm_exporters.passes.distinct_outputs import DistinctOutputs


class Sums(torch.nn.Module):
    """The sum so far after each token, which is also the state; and each token as it came."""

    def forward(self, s: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return token_by_token(_step, [s], [x])


def _step(s: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    s = s + x
    return s, s, x


def test_one_value_in_two_places_and_one_that_was_given_are_computed() -> None:
    s, x = torch.randn(2, 3), torch.randn(2, 4, 3)
    program = traced(Sums(), (s, x), ({0: torch.export.Dim.AUTO}, {1: torch.export.Dim.AUTO}))
    model = translated(program, ["s", "x"], ["last", "sums", "same"], opset=OPSET)
    clean(model)
    body = next(n for n in model.graph if n.op_type == "Scan").attributes["body"].as_graph()
    assert DistinctOutputs()(model).modified
    assert len({id(value) for value in body.outputs}) == 3
    assert not {id(value) for value in body.outputs} & {id(value) for value in body.inputs}
    assert not DistinctOutputs()(model).modified
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"s": s.numpy(), "x": x.numpy()})
    for a, b in zip(found, Sums()(s, x), strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-6)
