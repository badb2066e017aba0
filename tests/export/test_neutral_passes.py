"""Graphs of foreign modules: what changes nothing is dropped, norms of heads go into attention, and both roads meet."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from general_models import build

from edgellm.checkpoints import load_checkpoint
from edgellm.general.open import load_general
from edgellm.ops import ATTENTION, LINEAR
from edgellm.ops.schema import views
from edgellm_exporters.graph.capture import capture
from edgellm_exporters.graph.lower import clean, lower_to, prepare
from edgellm_exporters.graph.targets import find_target
from edgellm_exporters.lowering.context import lower
from edgellm_exporters.passes.drop_neutral import DropNeutral
from edgellm_exporters.passes.fold_constants import FoldConstants
from edgellm_exporters.passes.fold_orders import FoldOrders
from edgellm_exporters.passes.head_norms import HeadNorms
from edgellm_exporters.quantize.plan import Plan

X = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
Made = list[tuple[str, list[Any], dict[str, Any], list[int]]]


def graph_of(steps: Made) -> ir.Model:
    """A chain from x (2, 3, 8): each step's operator, further inputs (arrays), attributes, and the shape it gives."""
    x = ir.Value(name="x", shape=ir.Shape([2, 3, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, weights, value = [], [], x
    for op, arrays, attributes, shape in steps:
        inputs: list[ir.Value] = []
        for array in arrays:
            tensor = ir.tensor(np.asarray(array))
            weights.append(
                ir.Value(
                    name=f"c{len(weights)}", const_value=tensor, shape=ir.Shape(tensor.shape),
                    type=ir.TensorType(tensor.dtype),
                )
            )  # fmt: skip
            inputs.append(weights[-1])
        node = ir.node(op, [value, *inputs], attributes=attributes)
        node.outputs[0].shape, node.outputs[0].type = ir.Shape(shape), x.type
        nodes.append(node)
        value = node.outputs[0]
    last = ir.node("Neg", [value])
    last.outputs[0].shape, last.outputs[0].type, last.outputs[0].name = value.shape, x.type, "y"
    graph = ir.Graph(
        [x], [last.outputs[0]], nodes=[*nodes, last], initializers=weights, opset_imports={"": 23}, name="g"
    )
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": X})[0]
    return found


ONE, NOUGHT = np.ones((1, 1, 8), np.float32), np.zeros((1, 1, 8), np.float32)
SHAPES = [np.array([0, 0, 2, 4]), np.array([0, 0, 8])]


@pytest.mark.parametrize(
    "steps",
    [
        [("Mul", [ONE], {}, [2, 3, 8])],
        [("Add", [NOUGHT], {}, [2, 3, 8])],
        [("Transpose", [], {"perm": [0, 2, 1]}, [2, 8, 3]), ("Transpose", [], {"perm": [0, 2, 1]}, [2, 3, 8])],
        [("Transpose", [], {}, [8, 3, 2]), ("Transpose", [], {}, [2, 3, 8])],
        [("Reshape", [SHAPES[0]], {}, [2, 3, 2, 4]), ("Reshape", [SHAPES[1]], {}, [2, 3, 8])],
        [
            ("Reshape", [SHAPES[0]], {}, [2, 3, 2, 4]), ("Transpose", [], {"perm": [0, 2, 1, 3]}, [2, 2, 3, 4]),
            ("Mul", [ONE[:, :, :4][None]], {}, [2, 2, 3, 4]),
            ("Transpose", [], {"perm": [0, 2, 1, 3]}, [2, 3, 2, 4]), ("Reshape", [SHAPES[1]], {}, [2, 3, 8]),
        ],
    ],
)  # fmt: skip
def test_what_changes_nothing_is_dropped(steps: Made) -> None:
    before, after = run(graph_of(steps)), graph_of(steps)
    clean(after)
    assert [n.op_type for n in after.graph] == ["Neg"]
    np.testing.assert_array_equal(run(after), before)


@pytest.mark.parametrize(
    "steps",
    [
        [("Mul", [2 * ONE], {}, [2, 3, 8])],
        [("Mul", [np.ones((4, 1, 1, 1), np.float32)], {}, [4, 2, 3, 8])],  # it repeats x
        [("Add", [np.zeros((4, 1, 1, 1), np.float32)], {}, [4, 2, 3, 8])],
        [("Transpose", [], {"perm": [1, 0, 2]}, [3, 2, 8]), ("Transpose", [], {"perm": [0, 2, 1]}, [3, 8, 2])],
        [("Reshape", [SHAPES[0]], {}, [2, 3, 2, 4]), ("Reshape", [np.array([2, 2, 3, 4])], {}, [2, 2, 3, 4])],
    ],
)
def test_what_changes_something_stays(steps: Made) -> None:
    before, after = run(graph_of(steps)), graph_of(steps)
    clean(after)
    assert len(list(after.graph)) == len(steps) + 1
    np.testing.assert_array_equal(run(after), before)


def test_a_rotation_by_nothing_is_dropped_whatever_it_turns() -> None:
    model = graph_of([("Mul", [ONE], {}, [2, 3, 8])])
    graph, x = model.graph, model.graph.inputs[0]
    turned = ir.node("Neg", [x])
    zero = ir.Value(
        name="zero", const_value=ir.tensor(NOUGHT), shape=ir.Shape([1, 1, 8]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    graph.register_initializer(zero)
    times = ir.node("Mul", [turned.outputs[0], zero])
    kept = next(iter(graph))
    add = ir.node("Add", [kept.outputs[0], times.outputs[0]])
    for node in (turned, times, add):
        node.outputs[0].shape, node.outputs[0].type = ir.Shape([2, 3, 8]), x.type
    graph.insert_after(kept, [turned, times, add])
    list(graph)[-1].replace_input_with(0, add.outputs[0])
    before = run(model)
    DropNeutral()(model)
    clean(model)
    assert [n.op_type for n in model.graph] == ["Neg"]
    np.testing.assert_array_equal(run(model), before)


def slices(*bounds: tuple[int, int]) -> ir.Model:
    """Slices of x's last axis, put together."""
    model = graph_of([])
    graph, x, last = model.graph, model.graph.inputs[0], next(iter(model.graph))
    parts = []
    for start, end in bounds:
        numbers = [
            ir.Value(name=f"{start}_{end}_{i}", const_value=ir.tensor(np.array([n])), shape=ir.Shape([1]),
                     type=ir.TensorType(ir.DataType.INT64))
            for i, n in enumerate((start, end, 2))
        ]  # fmt: skip
        for value in numbers:
            graph.register_initializer(value)
        parts.append(ir.node("Slice", [x, *numbers]))
    whole = ir.node("Concat", [part.outputs[0] for part in parts], {"axis": -1})
    size = sum(min(end, 8) - start for start, end in bounds)
    for node, width in [*((p, min(e, 8) - s) for p, (s, e) in zip(parts, bounds, strict=True)), (whole, size)]:
        node.outputs[0].shape, node.outputs[0].type = ir.Shape([2, 3, width]), x.type
    graph.insert_before(last, [*parts, whole])
    last.replace_input_with(0, whole.outputs[0])
    last.outputs[0].shape = whole.outputs[0].shape
    return model


@pytest.mark.parametrize(
    ("bounds", "left"),
    [
        (((0, 3), (3, 8)), 1), (((0, 2), (2, 5), (5, 99)), 1),
        (((3, 8), (0, 3)), 4), (((0, 3), (4, 8)), 4), (((0, 3), (3, 7)), 4), (((1, 3), (3, 8)), 4),
    ],
)  # fmt: skip
def test_all_slices_of_a_value_in_order_are_the_value(bounds: tuple[tuple[int, int], ...], left: int) -> None:
    before, after = run(slices(*bounds)), slices(*bounds)
    clean(after)
    assert len(list(after.graph)) == left
    np.testing.assert_array_equal(run(after), before)


def ordered(order: list[int], *, again: bool) -> ir.Model:
    """A layer whose features are taken in another order and, with ``again``, read in their own order too."""
    model, numbers = graph_of([]), np.random.default_rng(1)
    graph, x, last = model.graph, model.graph.inputs[0], next(iter(model.graph))
    given: dict[str, ir.Value] = {}
    arrays = {"weight": numbers.normal(size=(6, 8)), "bias": numbers.normal(size=6)}
    for name, array in {**{n: a.astype(np.float32) for n, a in arrays.items()}, "order": np.array(order)}.items():
        tensor = ir.tensor(array)
        given[name] = ir.Value(
            name=name, const_value=tensor, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype)
        )
        graph.register_initializer(given[name])
    layer = LINEAR.node(ir.node, x=x, weight=given["weight"], bias=given["bias"])
    nodes = [layer, ir.node("Gather", [layer.outputs[0], given["order"]], {"axis": 2})]
    if again:
        nodes.append(ir.node("Add", [nodes[1].outputs[0], layer.outputs[0]]))
    for node in (*nodes, last):
        node.outputs[0].shape, node.outputs[0].type = ir.Shape([2, 3, 6]), x.type
    graph.insert_before(last, nodes)
    last.replace_input_with(0, nodes[-1].outputs[0])
    return model


@pytest.mark.parametrize(
    ("order", "again", "left"),
    [([2, 0, 1, 5, 3, 4], False, 0), ([2, 0, 1, 5, 3, 4], True, 1), ([2, 0, 1, 5, 3, 3], False, 1)],
)
def test_an_order_of_a_layers_features_is_an_order_of_its_rows(order: list[int], again: bool, left: int) -> None:
    before, after = ordered(order, again=again), ordered(order, again=again)
    FoldOrders()(after)
    FoldConstants()(after)
    assert [n.op_type for n in after.graph].count("Gather") == left
    for model in (before, after):
        lower(model, find_target("onnx").rules, Plan())
    np.testing.assert_allclose(run(after), run(before), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["phi", "gptj", "glm", "cohere"])
def test_what_a_rotation_inside_attention_leaves_behind_is_gone(kind: str) -> None:
    from edgellm.general.model import GeneralModel

    graph = prepare(capture(GeneralModel(build(kind)).eval()), find_target("onnx"))
    kinds = {node.op_type for node in graph.graph}
    assert "Attention" in kinds and not kinds & {"Gather", "Slice", "Concat", "Neg", "Transpose", "Cos"}


def test_norms_of_heads_go_into_attention_only_if_query_and_key_have_the_same() -> None:
    from edgellm.general.model import GeneralModel

    theirs: Any = build("qwen3")
    graph = capture(GeneralModel(theirs).eval())
    clean(graph)
    assert all(v.q_norm is not None and v.k_norm is not None for v in views(graph.graph, ATTENTION))
    theirs = build("qwen3")
    for layer in theirs.model.layers:
        layer.self_attn.k_norm.variance_epsilon = 1e-3
    graph = capture(GeneralModel(theirs).eval())
    clean(graph)
    assert all(v.q_norm is None for v in views(graph.graph, ATTENTION))
    assert not HeadNorms()(graph).modified


@pytest.mark.parametrize("target", ["cpu", "onnx", "cuda"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_both_roads_give_one_graph(kind: str, target: str, tmp_path: Path) -> None:
    theirs: Any = build(kind)
    theirs.save_pretrained(tmp_path / kind)

    def operators(model: Any) -> dict[str, int]:
        made = find_target(target)
        graph = lower_to(prepare(capture(model.eval()), made), made, Plan(), dtype=made.dtypes[0])
        return dict(collections.Counter(f"{n.domain}::{n.op_type}" for n in graph.graph))

    native, general = load_checkpoint(tmp_path / kind).model, load_general(tmp_path / kind).model
    tokens = torch.arange(20)[None] + 3
    with torch.no_grad():
        torch.testing.assert_close(general(tokens)[0], native(tokens)[0], rtol=1e-4, atol=1e-4)
    assert operators(general) == operators(native)
