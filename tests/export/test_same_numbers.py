"""Goldens of a quantized bundle's own numbers: they hold to rounding, and what is changed shows."""

from __future__ import annotations

import dataclasses
import json
import platform
from functools import partial
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import pytest
import torch
from families import CONTEXT, VOCAB, make, planned
from mutations import HARMFUL, made, outcomes
from tiny_files import copied, edit_manifest, sign

from edgellm import streaming
from edgellm.checkpoints import open_checkpoint, save_checkpoint
from edgellm.streaming import OwnWeights, resident
from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.passes.merge_linears import parts_of
from edgellm_exporters.proof.samples import golden_rows
from edgellm_exporters.proof.traces import traces
from edgellm_exporters.quantize import codes_on_disk
from edgellm_exporters.quantize import plan as plan_module
from edgellm_exporters.quantize.quantized_model import quantized_model, quantized_stream, same_numbers
from edgellm_exporters.quantize.rounded_products import round_blocks
from edgellm_exporters.quantize.tuning.layer_stream import shell_of
from edgellm_runtime import open_session
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.verify import Check, verify
from edgellm_runtime.errors import BundleError


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("int4", tmp_path_factory.mktemp("int4") / "source")


def checked(path: Path, threads: int = 1) -> dict[str, Check]:
    bundle = Bundle(path)
    return {check.name: check for check in verify(bundle, open_session(bundle, threads=threads)).checks}


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("int8", "decoder"), ("int4", "decoder"), ("2:32", "decoder"), ("w8a8", "decoder"), ("keep", "decoder"),
        ("4:32:shifted", "decoder with q/k norm"), ("int4", "lstm"), ("2:32", "gru"), ("int4", "rnn_relu"),
        ("4:32:shifted", "lstm"), ("int4", "windows and soft caps"),
    ],
)  # fmt: skip
def test_a_quantized_bundle_equals_pytorch_with_its_numbers_far_closer_than_the_float_model(
    method: str, family: str, tmp_path: Path
) -> None:
    path = made(method, tmp_path / "source", family)
    distance = Bundle(path).manifest.measured["kl"]
    for threads in (1, 2, 3):
        found = checked(path, threads)
        assert all(check.ok for check in found.values())
        assert found["exact.kl"].value < 0.3 * distance
        assert found["exact.kl"].bound < HARMFUL


@pytest.mark.parametrize("family", ["decoder", "windows and soft caps"])
def test_a_cache_in_8_bits_equals_pytorchs_that_holds_the_same_codes(family: str, tmp_path: Path) -> None:
    exported = export(make(family), tmp_path / "b", options=ExportOptions(kv_cache="int8"))
    assert exported.bundle.manifest.measured["kl"] > 1e-6
    found = checked(exported.bundle.path, 2)
    assert all(check.ok for check in found.values())
    assert found["exact.logits"].value < 1e-5
    assert found["exact.kl"].bound < HARMFUL


def test_wide_8_bit_recurrences_round_what_they_read_and_narrow_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The narrow ones are widened when a graph is loaded; where none is, all go through the kernel's own products."""
    for most in (plan_module._SMALL, 0):
        monkeypatch.setattr(plan_module, "_SMALL", most)
        path = made("int8", tmp_path / f"most-{most}", "lstm")
        scans = b"Scan" in (path / "model.onnx").read_bytes()
        assert scans == (most == 0)
        assert checked(path)["exact.kl"].value < 0.1 * Bundle(path).manifest.measured["kl"]


def test_standard_operators_on_rounded_weights_are_exact(tmp_path: Path) -> None:
    exported = export(make("mixed"), tmp_path / "b", options=ExportOptions(target="onnx", quantize="int4"))
    assert exported.bundle.manifest.exact_bounds == {"logits": 1e-4, "kl": 1e-6, "state": 1e-4}
    assert checked(exported.bundle.path)["exact.logits"].value < 1e-5


@pytest.mark.parametrize("method", ["int4", "2:32"])
def test_changes_that_the_float_models_goldens_let_pass_are_found(method: str, tmp_path: Path) -> None:
    found = list(outcomes(made(method, tmp_path / "source"), method, [0], tmp_path))
    harmful = [one for one in found if one.kl > HARMFUL]
    assert len(harmful) >= 5
    assert [one.kind for one in harmful if not one.found] == []
    assert sum(one.distance for one in harmful) < len(harmful)  # what this test is for


def test_a_change_of_nothing_is_not_found(int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutations, "KINDS", {"nothing": lambda numbers, draw: None})
    (only,) = outcomes(int4, "int4", [0], tmp_path)
    assert only.kl == pytest.approx(0, abs=1e-12)
    assert not only.found


def test_bundles_without_such_goldens_are_verified_as_before(int4: Path, tmp_path: Path) -> None:
    path = copied(int4, tmp_path)
    goldens = json.loads((path / "goldens.json").read_text())
    del goldens["exact"]
    (path / "goldens.json").write_text(json.dumps(goldens))
    sign(path, "goldens.json")
    with pytest.raises(BundleError, match="goldens"):
        checked(path)  # bounds without goldens
    edit_manifest(path, exact_bounds={})
    found = checked(path)
    assert all(check.ok for check in found.values())
    assert not any("exact" in name for name in found)


def test_a_bound_without_a_figure_fails(int4: Path, tmp_path: Path) -> None:
    path = copied(int4, tmp_path)
    edit_manifest(path, exact_bounds={"median": 1.0})
    assert not checked(path)["exact.median"].ok


def test_another_kind_of_processor_is_not_held_to_them_and_verify_says_so(
    int4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    only = checked(int4)["exact"]
    assert only.ok
    assert "not held here" in only.what
    assert "riscv64" in only.what


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("decoder", {"quantize": "int8", "target": "cuda", "dtype": "float16"}, "target cuda"),
    ],
)
def test_a_bundle_says_why_it_has_the_float_models_goldens_alone(
    family: str, options: dict[str, Any], why: str, tmp_path: Path
) -> None:
    exported = export(make(family), tmp_path / "b", options=ExportOptions(**options))
    manifest = exported.bundle.manifest
    assert not manifest.exact_bounds
    assert why in manifest.quantization["float_reference_only"]
    assert any(why in note for note in exported.notes)


def test_float_bundles_have_one_reference_and_nothing_to_say(tmp_path: Path) -> None:
    exported = export(make("decoder"), tmp_path / "b")
    assert not exported.bundle.manifest.exact_bounds
    assert "float_reference_only" not in exported.bundle.manifest.quantization


@pytest.mark.parametrize(
    ("method", "family"), [("int4", "decoder"), ("w8a8", "decoder"), ("4:32:shifted", "mixed")]
)  # fmt: skip
def test_numbers_that_are_read_one_by_one_are_those_of_the_whole_model(
    method: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 4096)  # so that the vocabulary's table is read by rows
    model, rows = make(family), golden_rows(None, VOCAB, CONTEXT).rows
    plan = planned(model, "cpu", method)[1]
    architecture = "hybrid" if family == "mixed" else "decoder"
    save_checkpoint(tmp_path / "c", model, architecture=architecture, tokenizer_json=None)
    opened = open_checkpoint(tmp_path / "c")
    rounds = method == "4:32:shifted"  # whose sums of inputs need what was read with the weights
    whole: Any = quantized_model(model, plan, block_products=rounds, integer_products=False)
    make_stream = partial(quantized_stream, block_products=rounds, integer_products=False)
    streamed, numbers = make_stream(opened.model, opened.weights, plan)  # type: ignore[arg-type]
    assert all(p.is_meta for p in streamed.parameters())
    with resident(streamed, numbers):
        found: Any = list(traces(streamed, rows))  # type: ignore[arg-type]
    for one, other in zip(traces(whole, rows), found, strict=True):
        torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["4:32:asymmetric", "4:32:shifted"])
@pytest.mark.parametrize("kept", [False, True])
def test_rows_of_a_table_whose_codes_were_chosen_whole_hold_no_more_than_themselves(
    method: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lookup reads each token's row by itself: a view would keep a whole table for each of them."""
    monkeypatch.setattr(codes_on_disk, "_LEAST", 1)
    model: Any = make("decoder untied with biases")
    plan = dataclasses.replace(planned(model, "cpu", method)[1], by_rows=frozenset())
    shell, scratch = shell_of(model), tmp_path if kept else None
    stream = same_numbers(shell, OwnWeights(model), plan, rounds=False, noise=lambda x: x, scratch=scratch).weights
    names = sorted(part for name in plan.schemes for part in parts_of(name))
    assert len(names) > 4
    for name in names:
        first = stream.rows(name, 3, 4)  # when nothing is kept yet
        whole = stream.read(name)
        torch.testing.assert_close(first, whole[3:4], rtol=0, atol=0)
        some = stream.rows(name, 5, 7)
        torch.testing.assert_close(some, whole[5:7], rtol=0, atol=0)
        assert some.untyped_storage().nbytes() == some.nbytes < whole.nbytes


def test_rounding_blocks_keeps_the_largest_and_moves_the_rest_by_half_a_step_at_most() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 5, 64)).astype(np.float32))
    blocks, rounded = x.reshape(3, 5, 4, 16), round_blocks(x, block=16).reshape(3, 5, 4, 16)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    assert ((blocks - rounded).abs() <= step * 0.501).all()
    torch.testing.assert_close(rounded.abs().amax(-1), blocks.abs().amax(-1))
