"""Hidden states are PyTorch's own, whatever the target; vectors are made of them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundles import (
    CONTEXT,
    HIDDEN_KINDS,
    attention_bundle,
    copied,
    device_session,
    edit_manifest,
    hidden_bundle,
    sign,
)

from edgellm.cli import cli
from edgellm.models.protocol import Step, with_hidden
from edgellm_exporters.errors import CaptureError
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import BundleError, ContextError, OptionError, load
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.verify import verify
from edgellm_runtime.generation import embedding
from edgellm_runtime.loading import open_session

LONG = 80


def in_pytorch(kind: str, row: list[int]) -> np.ndarray:
    """The last hidden states of a row read at once, (time, features)."""
    tokens = torch.tensor([row])
    with torch.no_grad():
        _, hidden = with_hidden(HIDDEN_KINDS[kind][0](), tokens, {}, Step.whole(tokens))
    assert hidden is not None
    return hidden[0].numpy()


def rows_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 61, n).tolist() for n in lengths]


@pytest.mark.parametrize("kind", HIDDEN_KINDS)
@pytest.mark.parametrize("target", ["cpu", "onnx"])
def test_hidden_states_are_pytorchs_in_any_steps(kind: str, target: str) -> None:
    session = open_session(Bundle(hidden_bundle(kind, target)), threads=1)
    (row,) = rows_of([LONG])
    state, parts = session.new_state(1, LONG), []
    for start, end in ((0, 30), (30, 31), (31, LONG)):
        logits, hidden = session.step_hidden(np.array([row[start:end]]), state)
        parts.append(hidden[0])
    np.testing.assert_allclose(np.concatenate(parts), in_pytorch(kind, row), atol=2e-5)
    plain = session.new_state(1, LONG)
    np.testing.assert_allclose(session.step(np.array([row]), plain), logits, atol=2e-5)


@pytest.mark.parametrize(("target", "device"), [("tensorrt", "cpu"), ("cuda", "fake")])
def test_other_targets_graphs_give_them_in_float32(target: str, device: str) -> None:
    bundle = Bundle(hidden_bundle("attention", target))
    session = open_session(bundle, device="cpu", threads=1) if device == "cpu" else device_session(bundle)
    (row,) = rows_of([40])
    state = session.new_state(1, 40)
    _, hidden = session.step_hidden(np.array([row]), state)
    _, one = session.step_hidden(np.array([[7]]), state)
    assert hidden.dtype == one.dtype == np.float32
    np.testing.assert_allclose(np.concatenate([hidden[0], one[0]]), in_pytorch("attention", [*row, 7]), atol=0.02)


def test_ragged_rows_have_what_they_have_alone() -> None:
    session = open_session(Bundle(hidden_bundle("window")), threads=1)
    rows = rows_of([5, 17, 2])
    padded = np.zeros((3, 17), dtype=np.int64)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = row
    lengths, state = np.array([5, 17, 2]), session.new_state(3, 40)
    for read in range(2):  # the second is over a filled cache, row by row
        _, hidden = session.step_hidden(padded, state, lengths=lengths)
        for at, row in enumerate(rows):
            expected = in_pytorch("window", row * (read + 1))[-len(row) :]
            np.testing.assert_allclose(hidden[at, : len(row)], expected, atol=2e-5)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, CONTEXT), min_size=1, max_size=9), pooling=st.sampled_from(["mean", "last"]))
@pytest.mark.parametrize("kind", ["attention", "recurrent"])
def test_vectors_are_pooled_hidden_states(kind: str, lengths: list[int], pooling: Any) -> None:
    model, rows = load(hidden_bundle(kind), threads=1), rows_of(lengths, seed=len(lengths))
    states = [in_pytorch(kind, row) for row in rows]
    expected = np.array([x.mean(axis=0) if pooling == "mean" else x[-1] for x in states])
    found = model.embed(rows, pooling=pooling, normalize=False)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    unit = model.embed(rows, pooling=pooling)
    np.testing.assert_allclose(unit, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=2e-5)
    np.testing.assert_allclose(model.embed(rows[0], pooling=pooling), unit[0], atol=2e-5)


def test_small_batches_and_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = load(hidden_bundle(), threads=1), rows_of([9, 60, 3, 30, 1, 9])
    whole = model.embed(rows)
    monkeypatch.setattr(embedding, "_TOGETHER", 20)
    model.session.chunk = 16
    np.testing.assert_allclose(model.embed(rows), whole, atol=2e-5)


def test_asyncio_has_the_same() -> None:
    model = load(hidden_bundle(), threads=1)
    np.testing.assert_array_equal(asyncio.run(model.aembed(["hello", "you"])), model.embed(["hello", "you"]))


def test_wrong_texts_are_refused_in_a_sentence() -> None:
    model = load(hidden_bundle(), threads=1)
    with pytest.raises(OptionError, match="gives no hidden states; export the model again with --hidden"):
        load(attention_bundle(), threads=1).embed("hello")
    with pytest.raises(ContextError, match="text 1 has 97 tokens, but the model's context holds 96"):
        model.embed([[1], [2] * (CONTEXT + 1)])
    np.testing.assert_array_equal(model.embed([2] * (CONTEXT + 1), truncate=True), model.embed([2] * CONTEXT))
    for texts, said in ((5, "texts is 5"), ([["a"]], "text"), ([""], "is empty"), ([[999]], "outside the model")):
        with pytest.raises(OptionError, match=said):
            model.embed(texts)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="pooling"):
        model.embed("hello", pooling="max")  # type: ignore[arg-type]
    assert model.embed([]).shape == (0, model.session.hidden_width)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_goldens_prove_them(quantize: str, tmp_path: Path) -> None:
    path = copied(hidden_bundle("attention", "cpu", quantize), tmp_path)
    bundle = Bundle(path)
    checks = {c.name: c for c in verify(bundle, open_session(bundle, threads=1)).checks}
    names = {"hidden"} if quantize == "none" else {"hidden", "exact.hidden"}
    assert all(checks[name].ok for name in names) and "hidden" in bundle.manifest.bounds
    goldens = json.loads((path / "goldens.json").read_text())
    key = "traces" if quantize == "none" else "exact"
    goldens[key][0]["hidden"]["values"][0] += 1.0
    (path / "goldens.json").write_text(json.dumps(goldens))
    sign(path, "goldens.json")
    bundle = Bundle(path)
    spoiled = {c.name for c in verify(bundle, open_session(bundle, threads=1)).checks if not c.ok}
    assert spoiled == {"hidden" if quantize == "none" else "exact.hidden"}


def test_a_plain_bundle_says_nothing_of_them() -> None:
    manifest = Bundle(attention_bundle()).manifest
    assert manifest.signature.hidden is None and "hidden" not in manifest.bounds
    assert "hidden" not in (attention_bundle() / "goldens.json").read_text()


@pytest.mark.parametrize(
    "change", [{"name": "other"}, {"dtype": "float16"}, {"shape": ["batch", "time", "x"]}, {"shape": ["batch", 4]}]
)
def test_a_manifest_with_another_output_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = copied(hidden_bundle(), tmp_path)
    signature = Bundle(path).manifest.to_json()["signature"]
    signature["outputs"][1].update(change)
    edit_manifest(path, signature=signature)
    with pytest.raises(BundleError, match="further output"):
        Bundle(path)


def test_a_model_that_takes_positions_otherwise_is_told_how(tmp_path: Path) -> None:
    model = HIDDEN_KINDS["attention"][0]()

    class Own(type(model)):  # type: ignore[misc]
        def forward(self, tokens: Any, state: Any = None, step: Any = None) -> Any:
            step = step or Step.whole(tokens)
            again = step._replace(logit_positions=step.logit_positions + 0)
            return super().forward(tokens, state, again)

    model.__class__ = Own
    with pytest.raises(CaptureError, match="take_positions"):
        export(model, tmp_path / "bundle", options=ExportOptions(hidden=True))
    assert dataclasses.replace(ExportOptions(hidden=True), hidden=False) == ExportOptions()


def test_command_prints_a_line_for_each_text(tmp_path: Path) -> None:
    bundle = str(hidden_bundle())
    (tmp_path / "texts").write_text("you\nme\n")
    arguments = ["embed", bundle, "hello", "-", "--file", str(tmp_path / "texts"), "--pooling", "last"]
    found = CliRunner().invoke(cli, arguments, input="one\ntwo\n", catch_exceptions=False)
    lines = [json.loads(line) for line in found.output.splitlines()]
    assert [line["text"] for line in lines] == ["hello", "one", "two", "you", "me"]
    expected = load(bundle, threads=1).embed([line["text"] for line in lines], pooling="last")
    np.testing.assert_allclose([line["embedding"] for line in lines], expected, atol=1e-6)
    whole = CliRunner().invoke(cli, ["embed", bundle, "hello", "--json"], catch_exceptions=False)
    assert json.loads(whole.output)["embeddings"][0]["text"] == "hello"
    assert CliRunner().invoke(cli, ["embed", bundle]).exit_code == 2
