"""A weight that two products share is dequantized for each, with the same numbers; others stay as they are."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgellm_exporters.lowering.separate_dequantize import SeparateDequantize


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def test_two_products_of_one_weight_have_a_dequantization_each_of_the_same_codes() -> None:
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(-127, 128, (4, 3)).astype(np.int8), rng.random(3).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], axis=1),
            helper.make_node("MatMul", ["a", "w"], ["y"]),
            helper.make_node("MatMul", ["b", "w"], ["z"]),
            helper.make_node("Transpose", ["w"], ["t"]),
        ],
        "shared",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in "ab"],
        [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, shape)
            for n, shape in (("y", [2, 3]), ("z", [2, 3]), ("t", [3, 4]))
        ],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")],
    )
    before = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model = ir.from_proto(before)
    SeparateDequantize()(model)
    after = ir.to_proto(model)
    onnx.checker.check_model(after)
    assert [node.op_type for node in model.graph].count("DequantizeLinear") == 2
    assert len(model.graph.initializers) == 4  # of which each pair is one storage in a bundle
    storages = {tensor_of(value).metadata_props["edgellm.storage"] for value in model.graph.initializers.values()}
    assert storages == {"codes", "scales"}
    given = {name: rng.random((2, 4)).astype(np.float32) for name in "ab"}
    for one, other in zip(*(ReferenceEvaluator(m).run(None, given) for m in (before, after)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not SeparateDequantize()(model).modified
