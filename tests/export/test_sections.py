"""A graph that is run in sections gives the bits that it gives whole, and one section's weights are in memory."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from families import make
from onnx import TensorProto, helper, numpy_helper

from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.graph.capture import signature_of
from edgellm_exporters.proof import opened, parity, section_backend
from edgellm_exporters.proof.parity import compare
from edgellm_exporters.proof.section_backend import SectionBackend
from edgellm_exporters.proof.sections import sections_of
from edgellm_exporters.proof.torch_backend import TorchBackend
from edgellm_runtime.backends.ort import OrtBackend
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.far import float_session
from edgellm_runtime.checks.layers import LAYER, tapped
from edgellm_runtime.errors import BackendError
from edgellm_runtime.loading import session_of, unchecked_session
from edgellm_runtime.session import Session

MOST = 20_000  # bytes: a few sections of each small model


def exported(family: str, method: str, folder: Path) -> Bundle:
    return export(make(family), folder / "bundle", options=ExportOptions(quantize=method)).bundle


def no_room() -> tuple[int, int]:
    return 1, 1


def in_sections(bundle: Bundle, **more: Any) -> tuple[Session, SectionBackend]:
    more = {"memory": no_room, **more}
    backend = SectionBackend(bundle.file("model.onnx"), bundle.manifest.signature, MOST, threads=1, **more)
    assert len(backend.sections) > 2
    return session_of(bundle, backend), backend


def steps(session: Session) -> list[Any]:
    """Logits and state of a chunk and of single tokens after it, and of rows of unequal lengths."""
    tokens = np.random.default_rng(0).integers(0, 30, (2, 9))
    alone, found = session.new_state(1, 16), list[Any]()
    found.append(session.step(tokens[:1], alone, logits="all").copy())
    found += [session.step(tokens[1:, i : i + 1], alone).copy() for i in range(3)]
    both = session.new_state(2, 16)
    found.append(session.step(tokens, both, lengths=np.array([9, 5], dtype=np.int32)).copy())
    found.append(session.step(tokens[:, :1], both).copy())
    return found + [np.array(state.read(spec.name)) for state in (alone, both) for spec in state.specs]


def assert_same_bits(one: list[Any], other: list[Any]) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("decoder", "none"), ("decoder", "int4"), ("decoder", "w8a8"), ("decoder", "3:32:asymmetric"),
        ("mixed", "none"), ("windows and soft caps", "int4"),
    ],
)  # fmt: skip
def test_sections_give_the_bits_of_the_whole_graph(family: str, method: str, tmp_path: Path) -> None:
    bundle = exported(family, method, tmp_path)
    whole = unchecked_session(bundle, device="cpu", threads=1, kernels="onnxruntime")
    assert_same_bits(steps(in_sections(bundle)[0]), steps(whole))


@pytest.mark.parametrize("method", ["int4", "w8a8"])
def test_sections_whose_products_read_floats_give_the_bits_of_the_whole_graph(method: str, tmp_path: Path) -> None:
    bundle = exported("decoder", method, tmp_path)
    assert_same_bits(steps(in_sections(bundle, float_inputs=True)[0]), steps(float_session(bundle, 1)))


def test_a_weight_that_is_larger_than_a_section_is_in_several(tmp_path: Path) -> None:
    bundle, most, name = exported("decoder", "int4", tmp_path), 6000, "layers.0.mlp.gate_proj+up_proj.weight.codes"
    backend = SectionBackend(bundle.file("model.onnx"), bundle.manifest.signature, most, threads=1, memory=no_room)
    assert bundle.manifest.signature.logits.name in backend.sections[-1].outputs
    graphs = [onnx.ModelProto.FromString(section.model).graph for section in backend.sections]
    parts = [sum(tensor.name.startswith(name) for tensor in graph.initializer) for graph in graphs]
    assert sum(map(bool, parts)) > 1
    whole = unchecked_session(bundle, device="cpu", threads=1, kernels="onnxruntime")
    assert_same_bits(steps(session_of(bundle, backend)), steps(whole))


def test_a_state_that_a_section_wrote_is_read_by_a_later_one(tmp_path: Path) -> None:
    bundle = exported("decoder", "none", tmp_path)
    signature = bundle.manifest.signature
    model = onnx.load(bundle.file("model.onnx"), load_external_data=False)
    made = next(node for node in model.graph.node if signature.logits.name in node.output)
    made.output[list(made.output).index(signature.logits.name)] = "before"
    model.graph.node.append(helper.make_node("ReduceMax", [signature.state[0].present_name], ["largest"], keepdims=0))
    model.graph.node.append(helper.make_node("Add", ["before", "largest"], [signature.logits.name]))
    graph = bundle.path / "more.onnx"
    onnx.save(model, graph)
    backend = SectionBackend(graph, signature, MOST, threads=1, memory=no_room)
    assert signature.state[0].present_name in backend.sections[-1].inputs
    whole = session_of(bundle, OrtBackend(graph, signature, threads=1))
    assert_same_bits(steps(session_of(bundle, backend)), steps(whole))


def test_a_graph_with_other_inputs_or_outputs_than_its_signature_is_refused(tmp_path: Path) -> None:
    bundle = exported("decoder", "none", tmp_path)
    signature, graph = bundle.manifest.signature, bundle.file("model.onnx")
    renamed = dataclasses.replace(signature.outputs[0], name="others")
    with pytest.raises(BackendError, match="the graph's outputs are not those of the manifest"):
        SectionBackend(graph, dataclasses.replace(signature, outputs=(renamed, *signature.outputs[1:])), MOST)
    with pytest.raises(BackendError, match=rf"asks for \['{signature.state[0].past_name}'\], which the manifest"):
        SectionBackend(graph, dataclasses.replace(signature, state=signature.state[1:]), MOST)


def test_sections_give_the_outputs_of_layers(tmp_path: Path) -> None:
    bundle = exported("decoder", "int4", tmp_path)
    paths, row = list(bundle.manifest.layers), np.arange(7)
    session, backend = in_sections(bundle, fetch=[f"{LAYER}{path}" for path in paths])
    _, expected, _ = tapped(bundle, paths, threads=1).read(row)
    session.step(row[None], session.new_state(1, 7))
    assert len(paths) > 1
    for path in paths:
        np.testing.assert_array_equal(backend.fetched[f"{LAYER}{path}"][0], expected[path])


def test_one_section_is_in_memory_at_a_time_and_none_after_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = exported("decoder", "int4", tmp_path)
    session, backend = in_sections(bundle)
    load, alive, at_once = section_backend.load_graph, list[weakref.ref[Any]](), list[int]()

    def counted(*given: Any) -> Any:
        found = load(*given)
        alive.append(weakref.ref(found))
        at_once.append(sum(each() is not None for each in alive))
        return found

    monkeypatch.setattr(section_backend, "load_graph", counted)
    session.step(np.arange(5)[None], session.new_state(1, 5))
    gc.collect()
    assert at_once == [1] * len(backend.sections)
    assert not any(each() is not None for each in alive)
    total = sum(section.nbytes for section in backend.sections)
    assert max(section.nbytes for section in backend.sections) < total / 2


class Process:
    """One that may hold so many bytes, of which each loaded session takes four sections'."""

    def __init__(self, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.limit, self.besides, self.loaded = limit, 0, list[bytes]()
        self._load, self._alive = section_backend.load_graph, list[weakref.ref[Any]]()
        monkeypatch.setattr(section_backend, "load_graph", self.load)

    def load(self, model: bytes, *given: Any) -> Any:
        session = self._load(model, *given)
        self.loaded.append(model)
        self._alive.append(weakref.ref(session))
        return session

    def memory(self) -> tuple[int, int]:
        return self.besides + 4 * MOST * sum(each() is not None for each in self._alive), self.limit


def test_sections_stay_loaded_while_the_process_holds_less_than_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it held as much as makes room for two of them."""
    bundle = exported("decoder", "int4", tmp_path)
    expected = steps(unchecked_session(bundle, device="cpu", threads=1, kernels="onnxruntime"))
    process = Process(19 * MOST, monkeypatch)
    session, backend = in_sections(bundle, memory=process.memory)
    assert_same_bits(steps(session), expected)
    models = [section.model for section in backend.sections]
    assert process.loaded[: 3 * len(models) - 2] == models * 2 + models[2:]


def test_sections_that_stay_loaded_go_where_another_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, row = exported("decoder", "int4", tmp_path), np.arange(5)[None]
    process = Process(19 * MOST, monkeypatch)
    session, backend = in_sections(bundle, memory=process.memory)
    models, found = [section.model for section in backend.sections], list[Any]()
    for process.besides, loaded in [(0, models), (0, models), (4 * MOST, models[2:]), (0, models[1:])]:
        process.loaded.clear()
        found.append(session.step(row, session.new_state(1, 5)).copy())
        assert process.loaded == loaded
    assert_same_bits(found[1:], found[:1] * 3)


def test_no_section_is_loaded_while_pytorch_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the comparison is that of the whole graph."""
    bundle, model, rows = exported("decoder", "int4", tmp_path), make("decoder"), [[1, 2, 3], [4, 5, 6, 7]]
    process, held = Process(999 * MOST, monkeypatch), list[int]()
    session, _ = in_sections(bundle, memory=process.memory)
    whole = compare(model, unchecked_session(bundle, device="cpu", threads=1, kernels="onnxruntime"), rows)
    for _ in range(2):  # from the second step on all stay
        session.step(np.arange(5)[None], session.new_state(1, 5))
    assert process.memory()[0] > 0
    model.register_forward_pre_hook(lambda *_: held.append(process.memory()[0]))
    assert compare(model, session, rows) == whole
    assert held == [0, 0]


def test_logits_of_a_row_are_gone_when_the_next_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own, and what iterates over them, hold what a generator gave last unless care is taken."""
    model, given, alive, look = make("decoder"), list[weakref.ref[Any]](), list[bool](), parity._parts

    def noted(session: Session, state: Any, reference: Any) -> Any:
        given.append(weakref.ref(reference.logits))
        return look(session, state, reference)

    monkeypatch.setattr(parity, "_parts", noted)
    model.register_forward_pre_hook(lambda *_: alive.append(any(each() is not None for each in given)))
    backend = TorchBackend(make("decoder"))
    session = Session(backend, signature_of(model), max_context=model.config.max_context, ragged_chunks=True)
    compare(model, session, [[1, 2, 3], [4, 5, 6, 7], [8, 9]])
    assert alive == [False] * 3 and len(given) == 3


def test_an_export_in_sections_is_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, model = ExportOptions(quantize="int4", name="same"), make("decoder")
    one = export(model, tmp_path / "whole", options=options).bundle
    made = list[SectionBackend]()

    class Counted(SectionBackend):
        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **more)
            made.append(self)

    monkeypatch.setattr(opened, "SectionBackend", Counted)
    monkeypatch.setattr(opened, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(opened, "_SECTION_BYTES", MOST)
    other = export(model, tmp_path / "cut", options=options).bundle
    assert made and all(len(backend.sections) > 2 for backend in made)
    for name in ("model.onnx", "model.onnx.data", "goldens.json"):
        assert one.manifest.files[name] == other.manifest.files[name]
    ours, theirs = (json.loads((bundle.path / "manifest.json").read_text()) for bundle in (one, other))
    assert {**ours, "provenance": {}} == {**theirs, "provenance": {}}  # which has the day


def chain(*, unknown: int | None = None) -> onnx.ModelProto:
    """Five products, one in a branch that reads what is around it; each weight comes from a constant that is cast."""
    weights = [numpy_helper.from_array(np.eye(8, dtype=np.float16) * (i + 1), f"w{i}") for i in range(5)]
    weights.append(numpy_helper.from_array(np.array(True), "yes"))
    nodes = []
    for i in range(5):
        nodes.append(helper.make_node("Cast", [f"w{i}"], [f"wide{i}"], to=TensorProto.FLOAT))
        product = helper.make_node("MatMul", [f"x{i}", f"wide{i}"], [f"x{i + 1}" if i != 2 else "inner"])
        if i == 2:
            inner = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
            body = helper.make_graph([product], "body", [], [inner])
            product = helper.make_node("If", ["yes"], ["x3"], then_branch=body, else_branch=body)
        nodes.append(product)
    first, last = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 8]) for name in ("x0", "x5"))
    graph = helper.make_graph(nodes, "chain", [first], [last], initializer=weights)
    found = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    if unknown is not None:  # an operator that nothing is known of in the place of a product
        product = found.graph.node[2 * unknown + 1]
        product.op_type, product.domain = "Unknown", "somewhere"
        found.opset_import.append(helper.make_opsetid("somewhere", 1))
    return found


def test_each_section_makes_the_constants_that_it_reads() -> None:
    found = sections_of(chain().SerializeToString(), 1)
    assert [(s.inputs, s.outputs) for s in found] == [((f"x{i}",), (f"x{i + 1}",)) for i in range(5)]
    for i, section in enumerate(found):
        graph = onnx.ModelProto.FromString(section.model).graph
        assert f"w{i}" in {tensor.name for tensor in graph.initializer}
        assert [node.op_type for node in graph.node] == ["Cast", "If" if i == 2 else "MatMul"]


def test_no_cut_falls_where_a_type_is_unknown() -> None:
    found = sections_of(chain(unknown=3).SerializeToString(), 1)
    assert [s.outputs[-1] for s in found] == ["x1", "x2", "x3", "x5"]


def test_where_a_type_is_unknown_the_cut_falls_at_the_first_place_after_it() -> None:
    found = sections_of(chain(unknown=1).SerializeToString(), 1)
    assert [s.outputs[-1] for s in found] == ["x1", "x3", "x4", "x5"]


def test_a_small_graph_is_one_section() -> None:
    assert [(s.inputs, s.outputs) for s in sections_of(chain().SerializeToString(), 1 << 20)] == [(("x0",), ("x5",))]


def test_a_value_that_is_fetched_is_given() -> None:
    found = sections_of(chain().SerializeToString(), 1 << 20, ("x2",))
    assert found[0].outputs == ("x2", "x5")
