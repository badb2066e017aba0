"""What adapters add to parts of one Linear, added in one product before its Split, is the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from edgellm.ops.canonical import DOMAIN
from edgellm_exporters.graph.lower import clean, lower_to
from edgellm_exporters.graph.targets import TARGETS
from edgellm_exporters.passes.merge_low_rank import MergeLowRank
from edgellm_exporters.quantize.plan import Plan

SIZES = {"q": 8, "k": 4, "v": 4}
PLACES = 3


def tensor(name: str, array: np.ndarray) -> ir.Value:
    made = ir.tensor(array)
    return ir.Value(name=name, const_value=made, shape=ir.Shape(array.shape), type=ir.TensorType(made.dtype))


def adapted(*parts: str, second: str = "", of: str = "x") -> ir.Model:
    """A Linear and its Split; to some parts an adapter's product is added, to ``second`` with a choice of its own."""
    draw = np.random.default_rng(0)
    floats = ir.TensorType(ir.DataType.FLOAT)
    x, z = (ir.Value(name=name, shape=ir.Shape([2, 3, 8]), type=floats) for name in "xz")
    chosen = [
        ir.Value(name=name, shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT64)) for name in ("index", "other")
    ]
    weight = tensor("l.weight", draw.standard_normal((sum(SIZES.values()), 8)).astype(np.float32))
    sizes = tensor("sizes", np.array(list(SIZES.values())))
    linear = ir.node("Linear", [x, weight], domain=DOMAIN)
    split = ir.node("Split", [linear.outputs[0], sizes], num_outputs=3, attributes={"axis": -1})
    nodes, weights, results = [linear, split], [weight, sizes], []
    for rank, (part, value) in enumerate(zip(SIZES, split.outputs, strict=True), start=1):
        result = value
        if part in parts:
            stacks = [
                tensor(f"{part}.{name}", draw.standard_normal((PLACES, *shape)).astype(np.float32))
                for name, shape in (("down", (8, rank)), ("up", (rank, SIZES[part])))
            ]
            index = ir.node("Reshape", [chosen[part == second], tensor(f"{part}.flat", np.array([-1]))])
            down, up = (ir.node("Gather", [s, index.outputs[0]], attributes={"axis": 0}) for s in stacks)
            inner = ir.node("MatMul", [x if of == "x" else z, down.outputs[0]])
            outer = ir.node("MatMul", [inner.outputs[0], up.outputs[0]])
            pair = [value, outer.outputs[0]]
            add = ir.node("Add", pair if rank % 2 else pair[::-1])
            nodes += [index, down, up, inner, outer, add]
            weights += [*stacks, index.inputs[1]]
            result = add.outputs[0]
        ends = ir.node("Neg", [result])
        ends.outputs[0].type, ends.outputs[0].shape = floats, ir.Shape([2, 3, SIZES[part]])
        nodes.append(ends)
        results.append(ends.outputs[0])
    graph = ir.Graph(
        [x, z, *chosen], results, nodes=nodes, initializers=weights, opset_imports={"": 23, DOMAIN: 1}, name="g"
    )
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model) -> list[np.ndarray]:
    lower_to(model, TARGETS["cpu"], Plan())
    draw = np.random.default_rng(1)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {name: draw.standard_normal((2, 3, 8)).astype(np.float32) for name in "xz"}
    return list(session.run(None, {**feeds, "index": np.array([2, 0]), "other": np.array([1, 2])}))


def count(model: ir.Model, op: str) -> int:
    clean(model)
    return sum(node.op_type == op for node in model.graph)


@pytest.mark.parametrize("parts", ["qv", "qk", "kv", "qkv"])
def test_products_of_parts_become_one_with_the_same_numbers(parts: str) -> None:
    before, after = adapted(*parts), adapted(*parts)
    assert count(before, "MatMul") == count(before, "Gather") == 2 * len(parts)
    assert MergeLowRank()(after).modified
    assert {op: count(after, op) for op in ("Linear", "Split", "MatMul", "Gather", "Add", "Neg")} == {
        "Linear": 1, "Split": 1, "MatMul": 2, "Gather": 2, "Add": 1, "Neg": 3,
    }  # fmt: skip
    for a, b in zip(run(before), run(after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_no_weight_is_read_before_it_is_written() -> None:
    model, read = adapted(*"qkv"), list[str]()
    for value in model.graph.initializers.values():
        made = value.const_value
        if made is not None and len(made.shape) == 3:
            value.const_value = ir.LazyTensor(
                lambda made=made, name=value.name: read.append(str(name)) or made, dtype=made.dtype, shape=made.shape
            )
    assert MergeLowRank()(model).modified
    assert not read
    for op in ("MatMul", "Gather"):
        assert count(model, op) == 2
    for a, b in zip(run(adapted(*"qkv")), run(model), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert len(set(read)) == 6


def test_a_group_that_is_left_is_told() -> None:
    with pytest.raises(ir.passes.PostconditionError, match="could be merged and was not"):
        MergeLowRank().ensures(adapted("q", "v"))


@pytest.mark.parametrize(
    ("parts", "kept"),
    [("v", {}), ("qv", {"second": "v"}), ("qv", {"of": "z"})],
    ids=["one part", "two choices", "another input"],
)
def test_what_is_no_sum_over_one_input_and_choice_stays(parts: str, kept: dict[str, str]) -> None:
    model, before = adapted(*parts, **kept), run(adapted(*parts, **kept))
    assert not MergeLowRank()(model).modified
    assert count(model, "Add") == len(parts)
    for a, b in zip(before, run(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_of_three_parts_those_with_one_choice_are_merged() -> None:
    before, after = (adapted(*"qkv", second="k") for _ in range(2))
    assert MergeLowRank()(after).modified
    assert count(after, "Add") == 2
    for a, b in zip(run(before), run(after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_split_of_another_axis_stays() -> None:
    model = adapted("q", "v")
    split = next(node for node in model.graph if node.op_type == "Split")
    split.attributes["axis"] = ir.AttrInt64("axis", 1)
    assert not MergeLowRank()(model).modified
