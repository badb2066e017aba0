"""Bundles of models that answer sources: equal to transformers, and to their own numbers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from families import cpu_targets
from source_models import CONTEXT, VOCAB, bart_bundle, bart_model, foreign, own_model, ragged, t5_bundle, t5_model
from tiny_bundles import attention_model

from edgellm.cli import run
from edgellm_exporters.auto.budget import Budget
from edgellm_exporters.errors import CaptureError, ExportError
from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.proof.parity import compare
from edgellm_exporters.quantize.quantized_model import quantized_model
from edgellm_runtime import load, open_session
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.verify import verify

NEW = 12


@pytest.mark.parametrize(("name", "target"), [("t5", "cpu"), ("bart", "onnx"), ("marian", "cpu")])
def test_greedy_answers_to_a_ragged_batch_equal_transformers(name: str, target: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    theirs, (source, lengths) = foreign(name, tmp_path / "model"), ragged()
    theirs.generation_config.eos_token_id = None  # ours has no tokenizer, and so knows none
    there = torch.arange(source.shape[1]) < lengths[:, None]
    with torch.inference_mode():
        said = theirs.generate(
            input_ids=source, attention_mask=there.long(), max_new_tokens=NEW, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert run(["export", str(tmp_path / "model"), "-o", str(tmp_path / "b"), "--target", target]) == 0
    model = load(tmp_path / "b", threads=1)
    sources = [row[:length].tolist() for row, length in zip(source, lengths, strict=True)]
    answers = model.generate(sources, max_new_tokens=NEW, ignore_eos=True)
    rows = said.sequences[:, 1:].tolist()
    assert [list(answer.tokens) for answer in answers] == rows
    assert len({tuple(row) for row in rows}) > 1
    state = model.session.new_state(capacity=NEW, sources=sources)
    found = model.session.step(said.sequences[:, :-1].numpy(), state, logits="all")
    expected = torch.stack(said.logits, 1).numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("target", "method"), [*itertools.product(cpu_targets(), ["int8", "int4"]), ("cpu", "w8a8")]
)  # fmt: skip
def test_a_quantized_bundle_computes_what_pytorch_does_with_its_numbers(
    target: str, method: str, tmp_path: Path
) -> None:
    model = {"int8": t5_model, "int4": bart_model, "w8a8": lambda: own_model("lstm", copies=True)}[method]()
    options = ExportOptions(target=target, quantize=method, bounds={"top1": 0.0})  # random weights have no favourite
    made = export(model, tmp_path / "b", options=options)
    checks = {check.name: check for check in verify(made.bundle, open_session(made.bundle, threads=1)).checks}
    assert {"exact.logits", "exact.kl", "exact.state", "split", "batch"} <= checks.keys()
    assert all(check.ok for check in checks.values())
    if target == "onnx":
        assert checks["exact.logits"].value < 1e-5
    codes = made.bundle.manifest.quantization["weights"]
    assert sum(codes.values()) > 15  # of the encoder's and the decoder's


def test_the_encoders_weights_are_quantized_with_the_decoders_and_shared_ones_once(tmp_path: Path) -> None:
    from edgellm_exporters.graph.capture_encoder import capture_graphs
    from edgellm_exporters.graph.lower import prepare
    from edgellm_exporters.graph.targets import find_target
    from edgellm_exporters.quantize.methods import find_method
    from edgellm_exporters.quantize.planning import make_plan

    model, target = bart_model(), find_target("onnx")
    graphs = capture_graphs(model)
    for graph in graphs.all:
        prepare(graph, target)
    plan = make_plan(find_method("int4", target.methods), graphs.step, model, [[4, 5]], encoder=graphs.encoder)
    for part in ("encoder.layers.0.attention.q_proj", "decoder.layers.1.cross.k_proj", "decoder.layers.0.cross.q_proj"):
        assert f"{part}.weight" in plan.schemes
    export(model, tmp_path / "b", options=ExportOptions(target="onnx", quantize="int4"))
    kept = [onnx.load(tmp_path / "b" / name, load_external_data=False) for name in ("model.onnx", "encoder.onnx")]
    places = [{t.name: [e.value for e in t.external_data] for t in graph.graph.initializer} for graph in kept]
    shared = places[0].keys() & places[1].keys()
    assert "head.weight.codes" in shared  # the table that both look rows up in
    assert all(places[0][name] == places[1][name] for name in shared)
    assert all(name.startswith(("head.", "const.")) for name in shared)
    rounded = quantized_model(model, plan, integer_products=False)
    report = compare(
        rounded, open_session(Bundle(tmp_path / "b"), threads=1), [[2, *range(20, 30)]], sources=[[*range(40, 60)]]
    )  # fmt: skip
    assert report.logits < 1e-5


def test_calibration_reaches_encoder_and_decoder(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(4, VOCAB, (96, 24)).tolist()
    made = export(
        bart_model(), tmp_path / "b", options=ExportOptions(target="cpu", quantize="int4", calibration=rows)
    )  # fmt: skip
    assert made.bundle.manifest.quantization["rounding"] == "GPTQ"
    assert all(check.ok for check in verify(made.bundle, open_session(made.bundle, threads=1)).checks)


@pytest.mark.parametrize("bundle", [t5_bundle, bart_bundle])
def test_steps_read_states_of_sources_and_give_none(bundle: Any) -> None:
    graph = onnx.load(bundle() / "model.onnx", load_external_data=False).graph
    encoder = onnx.load(bundle() / "encoder.onnx", load_external_data=False).graph
    state = Bundle(bundle()).manifest.signature.state
    encoded, carried = ({s.name for s in state if s.encoded is wanted} for wanted in (True, False))
    assert encoded and carried
    assert {o.name for o in graph.output} == {"logits"} | {f"present.{name}" for name in carried}
    assert {f"past.{name}" for name in encoded} <= {i.name for i in graph.input}
    assert {o.name for o in encoder.output} == {f"present.{name}" for name in encoded}
    assert {i.name for i in encoder.input} == {"source", "source_lengths"}


def test_goldens_have_sources_of_unequal_lengths() -> None:
    goldens = json.loads((t5_bundle() / "goldens.json").read_text())["traces"]
    lengths = {len(golden["source"]) for golden in goldens}
    assert len(lengths) == len(goldens) and max(lengths) <= 24
    assert all(golden["tokens"][:2] == [3, 0] for golden in goldens)


class WithoutEncode(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = t5_model()
        self.config = self.inner.config

    def state_specs(self) -> Any:
        return self.inner.state_specs()

    def forward(self, *given: Any) -> Any:
        return self.inner(*given)


class OtherStates(WithoutEncode):
    def encode(self, source: Any, lengths: Any) -> Any:
        made = self.inner.encode(source, lengths)
        made.pop("layers.1.cross_v")
        return made


def test_what_has_no_form_is_refused_in_a_sentence(tmp_path: Path) -> None:
    for options, words in (
        (ExportOptions(target="cpu", kv_cache="int8"), "a cache in int8 looks at models that go on with texts"),
        (ExportOptions(target="cpu", quantize="auto", budget=Budget(max_kl=1.0)), "a search of formats looks at"),
    ):
        with pytest.raises(ExportError, match=words):
            export(t5_model(), tmp_path / "b", options=options)
    with pytest.raises(CaptureError, match="it has no encode"):
        export(WithoutEncode().eval(), tmp_path / "b")
    with pytest.raises(CaptureError, match=r"encode\(\) gives or leaves out \['layers.1.cross_v'\]"):
        export(OtherStates().eval(), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_model_that_goes_on_with_texts_has_no_encoder(tmp_path: Path) -> None:
    made = export(attention_model(), tmp_path / "b")
    assert made.bundle.manifest.encoder is None and "encoder.onnx" not in made.bundle.manifest.files
    assert CONTEXT > 0
