"""The cuda target, held honest without a GPU: its very graphs on the CPU's kernels, and ONNX Runtime's own list of
CUDA kernels for what only a GPU could show, that every node has one and that nothing is copied to the host."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from families import CONTEXT, EVERY, FAMILIES, VOCAB, make, planned
from source_models import bart_model, own_model, t5_model
from tiny_bundles import attention_bundle, device_session

from edgellm_exporters.errors import ExportError, LoweringError, QuantizeError
from edgellm_exporters.export import Exported, ExportOptions, export
from edgellm_exporters.graph.capture_encoder import Graphs, capture_graphs
from edgellm_exporters.graph.lower import lower_to, prepare
from edgellm_exporters.graph.targets import TARGETS
from edgellm_exporters.lowering.in_float32 import compute_in_float32
from edgellm_exporters.proof.parity import compare
from edgellm_exporters.proof.samples import golden_rows
from edgellm_exporters.proof.stand_in import check_types
from edgellm_exporters.quantize.methods import find_method
from edgellm_exporters.quantize.plan import Plan
from edgellm_exporters.quantize.planning import make_plan
from edgellm_exporters.quantize.quantized_model import quantized_model
from edgellm_runtime import BackendError, load, open_session
from edgellm_runtime.backends import ort_memory
from edgellm_runtime.backends.ort_choice import Chooser
from edgellm_runtime.backends.ort_memory import Kernels
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.graphs import token_choice as choosing

TABLE = json.loads((Path(__file__).parents[1] / "data" / "cuda_kernels.json").read_text())
CUDA = TARGETS["cuda"]
SOME = ("gru", "decoder")


def exported(family: str, dtype: str, method: str, folder: Path) -> tuple[Any, Exported]:
    model = make(family)
    options = ExportOptions(target="cuda", dtype=dtype, quantize=method)
    return model, export(model, folder / "b", options=options)


def windows() -> list[list[int]]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, VOCAB, n).tolist() for n in (CONTEXT, CONTEXT, CONTEXT, CONTEXT, 17, 2)]


# It has two such tokens, and other draws have two experts between which fewer bits decide by chance, which moves more.
TIED = "state space, attention, experts"


@pytest.mark.parametrize("family", sorted({*EVERY} - {TIED}))
@torch.no_grad()
def test_no_draw_has_tokens_that_16_bits_cannot_tell_apart(family: str) -> None:
    """Where two tokens are as good as equal in PyTorch, an export in 16 bits would fail or hold by chance.

    A family that fails here, because its layers are drawn in another order, needs another draw in ``DRAWS``: float16
    moves the difference of two logits by 0.6 to 1.9 thousandths of their spread.
    """
    logits, _ = make(family)(torch.tensor(golden_rows(None, VOCAB, CONTEXT).rows))
    best = logits.topk(2, dim=-1).values  # (rows, time, 2)
    assert ((best[..., 0] - best[..., 1]) / logits.std(-1)).min() > 1.4e-3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_float16_computes_what_pytorch_computes(family: str, tmp_path: Path) -> None:
    model, made = exported(family, "float16", "none", tmp_path)
    assert made.verification.ok
    session = open_session(made.bundle, device="cpu", threads=1)
    report = compare(model, session, windows(), greedy_prompts=[windows()[-2]], greedy_count=16)
    assert report.top1 >= 0.99
    assert report.logits < 0.003
    assert report.state < 0.003
    assert report.kl < 2e-6
    row = np.array([windows()[0]])
    ours = session.step(row, session.new_state(), logits="all")[0].astype(np.float64)
    theirs = model(torch.from_numpy(row))[0][0].double().numpy()
    cosine = (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
    assert cosine.min() >= 0.9999


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("family", SOME)
@torch.no_grad()
def test_quantized_float16_computes_what_pytorch_computes_with_the_same_numbers(
    family: str, method: str, tmp_path: Path
) -> None:
    model, made = exported(family, "float16", method, tmp_path)
    rounded = quantized_model(model, planned(model, "cuda", method)[1], integer_products=False)
    report = compare(rounded, open_session(made.bundle, device="cpu", threads=1), windows())
    assert report.top1 >= 0.99
    assert report.logits < 0.003
    assert report.state < 0.003
    assert report.kl < 5e-6


@pytest.mark.parametrize(("family", "method"), [("lstm", "none"), ("decoder", "int4")])
def test_bfloat16_is_proved_in_float32_with_its_own_weights_and_says_so(
    family: str, method: str, tmp_path: Path
) -> None:
    _, made = exported(family, "bfloat16", method, tmp_path)
    manifest = made.bundle.manifest
    assert manifest.provenance["proved_on"] == "ONNX Runtime on CPU, in float32 with weights rounded to bfloat16"
    assert made.verification.ok
    if method == "none":
        assert 1e-3 < made.parity.logits < 0.02, "weights of 8 digits differ from those of 24, and by no more"
        assert made.parity.top1 >= 0.97
    assert {spec.dtype for spec in manifest.signature.state} == {"bfloat16"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "the stand-in is not kept"
    with pytest.raises(BackendError, match=r"bfloat16, which ONNX Runtime's CPU kernels do not; use device 'cuda'"):
        open_session(made.bundle, device="cpu")


def test_the_manifest_says_what_the_graph_takes_and_where_it_was_proved() -> None:
    bundle = Bundle(attention_bundle("cuda"))
    manifest = bundle.manifest
    assert manifest.target == {"name": "cuda", "requires": {"onnxruntime": "1.30"}}
    assert manifest.provenance["proved_on"] == "ONNX Runtime on CPU, in float16"
    assert [(t.name, t.dtype, t.shape) for t in manifest.signature.inputs][-1] == ("total_length", "int32", ())
    assert {spec.dtype for spec in manifest.signature.state} == {"float16"}
    assert manifest.signature.outputs[0].dtype == "float32"
    assert load(bundle.path, device="cpu").device == "cpu"


def test_a_cuda_bundle_runs_on_cuda_or_says_what_it_takes() -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("the installed package has CUDA")
    for device in ("auto", "cuda"):
        with pytest.raises(BackendError, match=r"pip uninstall -y onnxruntime onnxruntime-gpu && pip install"):
            load(attention_bundle("cuda"), device=device)


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_bundle_of_another_target_is_refused_by_name(device: str) -> None:
    with pytest.raises(BackendError, match=rf"target cpu, which does not run on {device}; .* --target {device}"):
        load(attention_bundle(), device=device)


def test_what_the_target_has_no_form_for_is_refused_before_any_work() -> None:
    with pytest.raises(ExportError, match=r"target cuda has no dtype 'float32'; it has float16, bfloat16"):
        ExportOptions(target="cuda")
    for method in ("w8a8", "keep", "2:32"):
        with pytest.raises(QuantizeError, match=r"it has none, int8, int4"):
            ExportOptions(target="cuda", dtype="float16", quantize=method)
    with pytest.raises(ExportError, match=r"keeps keys and values in float32, not 'int8'"):
        ExportOptions(target="cuda", dtype="float16", kv_cache="int8")


def test_a_captured_step_over_all_slots_gives_the_bits_of_one_over_the_slots_in_use() -> None:
    """What is captured holds for every length: the kernel prepares for all slots, and attends to those in use."""
    bundle = Bundle(attention_bundle("cuda"))
    captured, plain = device_session(bundle), device_session(bundle, capture=False)
    states = [session.new_state(2, 60) for session in (captured, plain)]
    tokens = np.random.default_rng(0).integers(0, plain.vocab_size, (2, 12))
    for session, state in zip((captured, plain), states, strict=True):
        session.step(tokens[:, :5], state, lengths=np.array([5, 2]))
    for at in range(5, 12):
        found = [
            s.step(tokens[:, at : at + 1], state).copy() for s, state in zip((captured, plain), states, strict=True)
        ]
        np.testing.assert_array_equal(*found)
    (binding,) = [b for b in states[0].attachments.values() if b.graph_id > 0]
    assert int(binding._total) == 64


def graphs(model: ir.Model) -> Iterator[ir.Graph]:
    def nested(graph: ir.Graph) -> Iterator[ir.Graph]:
        yield graph
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH:
                    yield from nested(attribute.as_graph())

    yield from nested(model.graph)


planned_once = functools.cache(lambda family, target, method: planned(make(family), target, method))


def lowered(family: str, dtype: str, method: str) -> ir.Model:
    graph, plan = planned_once(family, "cuda", method)
    return lower_to(graph.clone(), CUDA, plan, dtype=dtype)


NUMPY = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "INT64": "int64", "INT32": "int32",
         "UINT8": "uint8", "BOOL": "bool"}  # fmt: skip


def without_kernel(op: str, domain: str, dtype: str) -> str | None:
    kinds = TABLE["first_input"][domain].get(op)
    return f"{op} of {dtype}" if kinds is None or dtype not in kinds else None


@functools.cache
def answering(kind: str, method: str) -> tuple[Graphs, Plan]:
    """The graphs of a model that answers sources."""
    model = {"t5": t5_model, "bart": bart_model, "own": lambda: own_model("gru")}[kind]()
    found = capture_graphs(model)
    for graph in found.all:
        prepare(graph, CUDA)
    chosen = find_method(method, CUDA.methods)
    return found, make_plan(chosen, found.step, model, [[4, 5]], encoder=found.encoder)


@pytest.mark.parametrize("dtype", CUDA.dtypes)
@pytest.mark.parametrize("method", ["none", "int4"])
def test_every_node_has_a_cuda_kernel(dtype: str, method: str) -> None:
    missing = set()
    # every op that any of them has
    models = [lowered(f, dtype, method) for f in ("mixed", "decoder untied with biases", "decoder with q/k norm")]
    for kind in ("t5", "bart", "own"):
        found, plan = answering(kind, method)
        models += [lower_to(graph.clone(), CUDA, plan, dtype=dtype) for graph in found.all]
    for model in models:
        for graph in graphs(model):
            for node in graph:
                first = node.inputs[node.op_type == "Where"]  # that op's first input is the condition
                kind = NUMPY[first.dtype.name] if first is not None and first.dtype is not None else dtype
                kind = "float32" if node.op_type in CUDA.wide.get(dtype, ()) else kind
                kind = "int64" if node.op_type in ("Less", "LessOrEqual", "ReduceMax") else kind  # of positions
                missing.add(without_kernel(node.op_type, node.domain, kind))
    assert missing == {None}


def copies_to_host(model: ir.Model) -> set[str]:
    """Inputs that a CUDA kernel reads on the host and that a kernel on the GPU makes."""
    on_host = {value.name for value in model.graph.initializers.values()} | {"total_length"}
    found = set()
    for node in model.graph:
        inputs = [v for v in node.inputs if v is not None]
        if node.op_type in ("Shape", "Size") or all(v.name in on_host for v in inputs):
            on_host |= {v.name for v in node.outputs}
            continue
        for index in TABLE["host_inputs"].get(node.op_type, []):
            if index < len(node.inputs) and node.inputs[index] is not None and node.inputs[index].name not in on_host:
                found.add(f"{node.op_type}.{index}")
    return found


@pytest.mark.parametrize(
    ("family", "method"),
    [("attention", "none"), ("decoder", "int8"), ("decoder", "int4"), ("decoder with q/k norm", "none")],
)
def test_attention_alone_copies_nothing_to_the_host_and_has_no_loop(family: str, method: str) -> None:
    """So ONNX Runtime can capture its steps: it refuses graphs with loops and with copies."""
    model = lowered(family, "float16", method)
    assert copies_to_host(model) == set()
    assert not [node for node in model.graph if node.op_type in ("Loop", "Scan", "If")]


@pytest.mark.parametrize(("kind", "copies"), [("t5", {"Range.1", "Slice.2"}), ("bart", set())])
def test_what_steps_of_an_answer_copy_to_the_host_is_known(kind: str, copies: set[str]) -> None:
    """T5's attention, with biases by distance, looks at as many slots as the longest row has: so it is not captured."""
    found, plan = answering(kind, "none")
    model = lower_to(found.step.clone(), CUDA, plan, dtype="float16")
    assert copies_to_host(model) == copies
    assert not [node for node in model.graph if node.op_type in ("Loop", "Scan", "If")]


@pytest.mark.parametrize("method", ["none", "int4"])
def test_recurrences_are_loops(method: str) -> None:
    """ONNX Runtime's own, which are cuDNN's, fail on a GPU; and loops are not captured."""
    model = lowered("mixed", "float16", method)
    assert copies_to_host(model) == set()
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("Scan") == 3
    assert not {"LSTM", "GRU", "RNN"} & {*kinds}


def test_the_length_of_the_longest_row_would_be_copied_if_the_graph_computed_it() -> None:
    graph, plan = planned(make("attention"), "cpu", "none")
    assert "GroupQueryAttention.6" in copies_to_host(lower_to(graph, TARGETS["cpu"], plan))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int64"])
def test_what_moves_states_and_chooses_tokens_has_cuda_kernels(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[Any] = []

    def noting(some: Any, *rest: Any) -> bytes:
        nodes.extend(some)
        return real(some, *rest)

    real = ort_memory.graph_bytes
    monkeypatch.setattr(ort_memory, "graph_bytes", noting)
    monkeypatch.setattr(choosing, "graph_bytes", noting)
    kernels = Kernels(onnxruntime, ["CPUExecutionProvider"], "cpu")
    a, b, long, one = (kernels.empty(shape, dtype) for shape in ((2, 3), (2, 3), (2, 5), (1, 3)))
    kernels.zeros(a)
    kernels.copy(a, b)
    kernels.rows(a, [1, 0], b)
    kernels.fit(a, 1, long)
    kernels.fit(long, 1, a)
    kernels.rows(a, [1], one)
    kernels.put(a, 0, one)
    assert not [n for node in nodes if (n := without_kernel(node.op, "", dtype))]
    nodes.clear()
    if dtype in ("float32", "float16"):
        logits = kernels.empty((1, 1, 8), dtype)
        kernels.zeros(logits)
        for count in (1, 3):
            Chooser(kernels).best(logits, count, lambda: np.zeros(8))
        ints = {"Squeeze", "Range", "ReduceMin"}
        kinds = {"Where": "int64", "Cast": dtype} | dict.fromkeys(ints, "int64")
        assert not [n for node in nodes if (n := without_kernel(node.op, "", kinds.get(node.op, "float32")))]


def test_widening_changes_no_number() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([3]))
    double = ir.node("Add", [x, x])
    out = ir.node("Neg", [double.outputs[0]])
    out.outputs[0].name, out.outputs[0].type, out.outputs[0].shape = "y", x.type, x.shape
    model = ir.Model(ir.Graph([x], out.outputs, nodes=[double, out], opset_imports={"": 23}), ir_version=10)

    def run() -> np.ndarray:
        session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
        return session.run(None, {"x": np.array([1.5, -2.0, 0.1], np.float16)})[0]

    before = run()
    compute_in_float32(model, ["Add"], "float16")
    assert [node.op_type for node in model.graph] == ["Cast", "Cast", "Add", "Cast", "Neg"]
    np.testing.assert_array_equal(run(), before)


def test_a_graph_of_mixed_types_is_caught_though_no_kernel_runs_it(tmp_path: Path) -> None:
    def save(*dtypes: ir.DataType) -> Path:
        values = [ir.Value(name=f"x{i}", type=ir.TensorType(d), shape=ir.Shape([3])) for i, d in enumerate(dtypes)]
        node = ir.node("Add", values)
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", values[0].type, values[0].shape
        graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 23})
        ir.save(ir.Model(graph, ir_version=10), tmp_path / "g.onnx")
        return tmp_path / "g.onnx"

    check_types(save(ir.DataType.BFLOAT16, ir.DataType.BFLOAT16))
    with pytest.raises(LoweringError, match=r"not sound"):
        check_types(save(ir.DataType.BFLOAT16, ir.DataType.FLOAT))
