"""Captured, passed and lowered graphs, one step of the pipeline at a time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.reference
import onnx_ir as ir
import pytest
import torch
from families import FAMILIES, PLAIN, VOCAB, make, planned

from edgellm.models.protocol import empty_state
from edgellm.ops.canonical import DOMAIN
from edgellm_exporters.errors import LoweringError
from edgellm_exporters.graph import capture as capture_module
from edgellm_exporters.graph.capture import INPUTS, capture
from edgellm_exporters.graph.lower import clean, lower_to, prepare
from edgellm_exporters.graph.targets import TARGETS, find_target
from edgellm_exporters.graph.write import write_graph
from edgellm_exporters.passes.add_rms_norm import FuseAddRMSNorm
from edgellm_exporters.passes.merge_linears import MergeLinears
from edgellm_exporters.passes.split_sequence import SplitSequence
from edgellm_exporters.quantize.plan import Plan


def lowered(family: str, target: str, method: str = "none") -> ir.Model:
    graph, plan = planned(make(family), target, method)
    return lower_to(graph, find_target(target), plan)


def feeds(model: torch.nn.Module, batch: int, time: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, VOCAB, (batch, time))
    return {
        "tokens": tokens,
        "past_lengths": np.zeros(batch, np.int32),
        "lengths": np.full(batch, time, np.int32),
        "logit_positions": np.tile(np.arange(time), (batch, 1)),
        **{f"past.{k}": v.numpy() for k, v in empty_state(model, batch, time).items()},
    }


@pytest.mark.parametrize("method", ["none", "int8", "w8a8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_standard_graph_passes_the_checker_and_the_reference_evaluator(
    family: str, method: str, tmp_path: Path
) -> None:
    write_graph(lowered(family, "onnx", method), tmp_path, lambda what, share: None)
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    graph = onnx.load(tmp_path / "model.onnx")
    assert {o.domain for o in graph.opset_import} == {""}
    if family == "rnn_relu" and method == "none":
        return  # the evaluator's RNN knows tanh only
    model = make(family)
    inputs = feeds(model, 1, 6)  # its LSTM, GRU and RNN know no sequence lengths, so rows are whole
    names = {i.name for i in graph.graph.input}
    found = onnx.reference.ReferenceEvaluator(graph).run(["logits"], {k: v for k, v in inputs.items() if k in names})
    with torch.no_grad():
        expected = model(torch.from_numpy(inputs["tokens"]))[0].numpy()
    tolerance = 1e-4 if method == "none" else 0.1
    assert np.abs(found[0] - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in PLAIN])
def test_capture_keeps_canonical_ops_whole_and_dimensions_named(family: str) -> None:
    model = make(family)
    graph = capture(model)
    clean(graph)
    assert [i.name for i in graph.graph.inputs[: len(INPUTS)]] == [t.name for t in INPUTS]
    assert [i.name for i in graph.graph.inputs[len(INPUTS) :]] == [s.past_name for s in model.state_specs()]
    tokens = graph.graph.inputs[0]
    assert [str(d) for d in tokens.shape or ()] == ["batch", "time"]
    kinds = {n.op_type for n in graph.graph if n.domain == DOMAIN}
    assert {"Embedding", "Linear", "RMSNorm", "TakePositions"} <= kinds
    assert not {n.op_type for n in graph.graph} & {"MatMul", "Gemm", "Identity"}


def numbered(graph: ir.Model) -> list[tuple[object, ...]]:
    """Each node with its attributes, what it reads and what it gives; values by the order in which they are met."""
    clean(graph)
    numbers: dict[ir.Value, object] = {}

    def number(value: ir.Value | None) -> object:
        if value is None:
            return None
        return numbers.setdefault(value, len(numbers) if value.producer() else value.name)

    return [
        (
            node.domain, node.op_type, [number(v) for v in node.inputs],
            {name: attribute.value for name, attribute in node.attributes.items()},
            # PyTorch's exporter tells no shape of a Sigmoid within SiLU
            [(number(v), v.dtype, str(v.shape)) for v in node.outputs if node.op_type != "Sigmoid"],
        )
        for node in graph.graph
    ]  # fmt: skip


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in PLAIN])
def test_the_translation_is_that_of_pytorchs_exporter(family: str) -> None:
    ours, theirs = captured_twice(make(family))
    assert numbered(ours) == numbered(theirs)
    for mine, other in ((ours.graph.inputs, theirs.graph.inputs), (ours.graph.outputs, theirs.graph.outputs)):
        assert [(v.name, str(v.shape), v.dtype) for v in mine] == [(v.name, str(v.shape), v.dtype) for v in other]
    assert ours.graph.initializers.keys() == theirs.graph.initializers.keys()
    assert ours.opset_imports == theirs.opset_imports


def captured_twice(model: Any) -> tuple[ir.Model, ir.Model]:
    """By the translator, and by PyTorch's own exporter, which it is held against."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", None)  # it is not asked
        ours = capture(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture_module, "translated", by_pytorch)
        return ours, capture(model)


@pytest.mark.parametrize("family", sorted(PLAIN & FAMILIES.keys()))
def test_the_translation_of_plain_pytorch_computes_what_pytorchs_exporters_does(family: str) -> None:
    """Both write the same operators in their own way."""
    import onnxruntime as ort

    def results(graph: ir.Model) -> list[np.ndarray]:
        lower_to(prepare(graph, TARGETS["onnx"]), TARGETS["onnx"], Plan())
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), options, ["CPUExecutionProvider"])
        given = feeds(make(family), 2, 6)
        return list(session.run(None, {i.name: given[i.name] for i in session.get_inputs()}))

    for ours, theirs in zip(*map(results, captured_twice(make(family))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def by_pytorch(
    program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], *, opset: int, named: Any
) -> ir.Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            program, (), dynamo=True, opset_version=opset, optimize=False, verbose=False, input_names=inputs,
            output_names=outputs,
        )  # fmt: skip
    assert exported is not None
    return exported.model


def test_an_interrupt_that_pytorch_turns_into_an_error_is_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise TypeError("it failed to unpack") from TypeError('error "KeyboardInterrupt: <EMPTY MESSAGE>" in C++')

    monkeypatch.setattr(torch.export, "export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        capture(make("decoder"))


def test_capture_leaves_the_model_as_it_was() -> None:
    model = make("mixed").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    capture(model)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_lowering_names_the_node_it_has_no_form_for() -> None:
    graph = ir.Model(ir.Graph([], [], nodes=[ir.node("Mystery", [], domain=DOMAIN)], name="g"), ir_version=10)
    with pytest.raises(LoweringError, match="no form of Mystery"):
        lower_to(graph, TARGETS["onnx"], Plan())


def test_the_fused_graph_has_the_nodes_of_a_hand_written_one() -> None:
    graph = lowered("decoder", "cpu", "int8")
    counts: dict[str, int] = {}
    for node in graph.graph:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    layers = 2
    assert counts["MatMulNBits"] == 4 * layers + 1  # packed qkv, o, packed gate and up, down; the head
    assert counts["GroupQueryAttention"] == layers
    assert counts["SkipSimplifiedLayerNormalization"] == 2 * layers
    assert counts["SimplifiedLayerNormalization"] == 1
    assert counts["GatherBlockQuantized"] == 1


def test_only_attention_with_norms_carries_them() -> None:
    def nodes(family: str) -> list[ir.Node]:
        return [node for node in capture(make(family)).graph if node.op_type == "Attention"]

    for i, node in enumerate(nodes("decoder with q/k norm")):
        gains = [f"layers.{i}.attention.{name}_norm.weight" for name in "qk"]
        assert [value.name for value in node.inputs[9:] if value is not None] == gains
        assert node.attributes["epsilon"].as_float() == pytest.approx(1e-5)
    for node in nodes("decoder"):
        assert len(node.inputs) == 9
        assert "epsilon" not in node.attributes


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_norms_before_the_kernel_have_the_form_that_onnxruntime_takes_into_it(target: str) -> None:
    """What its GroupQueryAttentionPreNormFusion asks for, where it has a kernel with norms inside."""
    graph = lowered("decoder with q/k norm", target)
    attentions = [node for node in graph.graph if node.op_type == "GroupQueryAttention"]
    assert len(attentions) == 2
    for node in attentions:
        assert node.attributes["do_rotary"].as_int() == 1
        gains = []
        for value, features in zip(node.inputs[:2], (128, 64), strict=True):
            assert value is not None
            outer = value.producer()
            norm = outer.inputs[0].producer()
            inner = norm.inputs[0].producer()
            kinds = [n.op_type for n in (outer, norm, inner, inner.inputs[0].producer())]
            assert kinds == ["Reshape", "SimplifiedLayerNormalization", "Reshape", "Split"]
            sizes = [list(n.inputs[1].const_value.numpy()) for n in (outer, inner)]
            assert sizes == [[0, 0, features], [0, 0, features // 32, 32]]
            assert norm.attributes["axis"].as_int() == -1
            assert all(len(list(n.outputs[0].uses())) == 1 for n in (outer, norm, inner))
            gains.append(norm.inputs[1])
        assert [gain.is_initializer() and tuple(gain.shape) for gain in gains] == [(32,), (32,)]
    others = [node for node in graph.graph if node.op_type == "SimplifiedLayerNormalization"]
    assert len(others) == 2 * len(attentions) + 1


def test_the_kernel_on_cpu_takes_no_norms_of_its_own() -> None:
    """The reason for the nodes before it; when this fails they can go."""
    import onnxruntime as ort

    graph, plan = planned(make("decoder with q/k norm"), "cpu", "none")
    model = lower_to(graph, find_target("cpu"), plan)
    for node in [n for n in model.graph if n.op_type == "GroupQueryAttention"]:
        norms = [node.inputs[i].producer().inputs[0].producer() for i in range(2)]
        for i, norm in enumerate(norms):
            node.replace_input_with(i, norm.inputs[0].producer().inputs[0])
        node.resize_inputs(16)
        for i, norm in enumerate(norms):
            node.replace_input_with(14 + i, norm.inputs[1])
    clean(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    with pytest.raises(Exception, match="q_norm_weight / k_norm_weight inputs are not supported"):
        session.run(["logits"], feeds(make("decoder with q/k norm"), 1, 6))


@pytest.mark.parametrize("method", ["int8", "int4", "w8a8", "2:32", "4:32:shifted"])
def test_no_product_of_blocks_misses_its_kernel(method: str) -> None:
    products = [node for node in lowered("decoder", "cpu", method).graph if node.op_type == "MatMulNBits"]
    assert products
    assert {node.attributes["accuracy_level"].as_int() for node in products} == {4}


# --- passes: each on a graph of a few nodes, by its numbers ---------------------------------------------------------

RULES_ONLY = TARGETS["cpu"].rules


def tensor(name: str, *shape: int) -> ir.Value:
    array = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)
    return ir.Value(
        name=name, const_value=ir.tensor(array), shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT)
    )


def small_graph(nodes: list[ir.Node], x: ir.Value, outputs: list[ir.Value], weights: list[ir.Value]) -> ir.Model:
    for value in outputs:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=weights, opset_imports={"": 23, DOMAIN: 1}, name="g")
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    import onnxruntime as ort

    lower_to(model, TARGETS["cpu"], Plan())
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


def residual_graph() -> ir.Model:
    x = ir.Value(name="x", shape=ir.Shape([2, 3, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    weight, gamma = tensor("w", 8, 8), tensor("gamma", 8)
    linear = ir.node("Linear", [x, weight], domain=DOMAIN)
    linear.outputs[0].shape = ir.Shape([2, 3, 8])
    add = ir.node("Add", [x, linear.outputs[0]])
    add.outputs[0].shape = ir.Shape([2, 3, 8])
    norm = ir.node("RMSNorm", [add.outputs[0], gamma], attributes={"epsilon": 1e-5}, domain=DOMAIN)
    last = ir.node("Add", [norm.outputs[0], add.outputs[0]])
    return small_graph([linear, add, norm, last], x, [norm.outputs[0], last.outputs[0]], [weight, gamma])


def merge_graph(bias: bool) -> ir.Model:
    x = ir.Value(name="x", shape=ir.Shape([2, 3, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    weights = [tensor(f"l.{n}.weight", rows, 8) for n, rows in (("q", 8), ("k", 4), ("v", 4))]
    biases = [tensor(f"l.{n}.bias", rows) for n, rows in (("q", 8), ("k", 4), ("v", 4))] if bias else []
    nodes = [
        ir.node("Linear", [x, w, *biases[i : i + 1]], domain=DOMAIN) for i, w in enumerate(weights)
    ]  # fmt: skip
    return small_graph(nodes, x, [n.outputs[0] for n in nodes], [*weights, *biases])


X = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)


def test_residual_and_norm_become_one_node_with_the_same_numbers() -> None:
    before, after = residual_graph(), residual_graph()
    result = FuseAddRMSNorm()(after)
    assert result.modified
    assert [n.op_type for n in after.graph] == ["Linear", "AddRMSNorm", "Add"]
    for a, b in zip(run(before, X), run(after, X), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_sum_that_broadcasts_is_not_fused() -> None:
    graph = residual_graph()
    add = next(n for n in graph.graph if n.op_type == "Add")
    assert add.inputs[1] is not None
    add.inputs[1].shape = ir.Shape([1, 1, 8])
    assert not FuseAddRMSNorm()(graph).modified


@pytest.mark.parametrize("bias", [False, True])
def test_linears_of_one_tensor_become_one_with_the_same_numbers(bias: bool) -> None:
    before, after = merge_graph(bias), merge_graph(bias)
    assert MergeLinears()(after).modified
    assert [n.op_type for n in after.graph] == ["Linear", "Split"]
    assert "l.q+k+v.weight" in after.graph.initializers
    for a, b in zip(run(before, X), run(after, X), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_weight_used_twice_is_not_merged() -> None:
    graph = merge_graph(bias=False)
    nodes = list(graph.graph)
    nodes[1].replace_input_with(1, nodes[2].inputs[1])
    assert not any(n.op_type == "Linear" and len(n.outputs) > 1 for n in MergeLinears()(graph).model.graph)
    assert sum(n.op_type == "Linear" for n in graph.graph) == 3


def sequence_graph(split: list[int] | int, at: list[int], axis: int = 2) -> ir.Model:
    """Members of a sequence of parts of x, each less one."""
    x = ir.Value(name="x", shape=ir.Shape([2, 3, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    numbers = {f"n{i}": i for i in at} | {"split": split}
    values = {
        name: ir.Value(
            name=name, const_value=ir.tensor(np.array(n, dtype=np.int64)), type=ir.TensorType(ir.DataType.INT64)
        )
        for name, n in numbers.items()
    }
    parts = ir.node("SplitToSequence", [x, values["split"]], attributes={"axis": axis})
    members = [ir.node("SequenceAt", [parts.outputs[0], values[f"n{i}"]]) for i in at]
    ends = [ir.node("Neg", [member.outputs[0]]) for member in members]
    return small_graph([parts, *members, *ends], x, [end.outputs[0] for end in ends], list(values.values()))


@pytest.mark.parametrize(
    ("split", "at", "axis"),
    [([3, 5], [0, 1], 2), (4, [0, 1], 2), (3, [0, 1, 2], 2), ([2, 4, 2], [2, 0], -1), ([1, 2], [-1], 1)],
)
def test_members_of_a_sequence_become_outputs_of_a_split(split: list[int] | int, at: list[int], axis: int) -> None:
    before, after = sequence_graph(split, at, axis), sequence_graph(split, at, axis)
    assert SplitSequence()(after).modified
    assert [node.op_type for node in after.graph] == ["Split", *["Neg"] * len(at)]
    for a, b in zip(run(before, X), run(after, X), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_sequence_whose_parts_are_not_known_is_left_alone() -> None:
    graph = sequence_graph(3, [0, 1])
    graph.graph.inputs[0].shape = ir.Shape([2, 3, "free"])
    assert not SplitSequence()(graph).modified
