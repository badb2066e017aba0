"""Models that read rows in one pass: a graph without a past, on every target, rows of unequal length included."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tagger_models import CONTEXT, LABELS, VOCAB, rows, tagger
from torch import nn

import edgellm_runtime
from edgellm.errors import ConfigError
from edgellm.models.layers.both_ways import MIXERS
from edgellm.models.protocol import Step
from edgellm.models.tagger import TaggerConfig
from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.errors import CaptureError
from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.graph.write import WEIGHTS_FILE
from edgellm_exporters.proof.torch_backend import torch_session
from edgellm_runtime import OptionError, StateError, open_session
from edgellm_runtime.bundle import MANIFEST, Bundle
from edgellm_runtime.checks.verify import verify, verify_quickly
from edgellm_runtime.session import Session
from edgellm_runtime.spec import StateSpec

# Bounds of a graph in 16 bits are those of the cuda and tensorrt tests.
TARGETS: dict[str, tuple[ExportOptions, float]] = {
    "onnx": (ExportOptions(target="onnx"), 2e-6),
    "cpu": (ExportOptions(target="cpu"), 2e-6),
    "cuda": (ExportOptions(target="cuda", dtype="float16"), 3e-3),
    "tensorrt": (ExportOptions(target="tensorrt", dtype="float16", engine=EngineOptions(build=False)), 3e-3),
}


def batch(session: Session, given: list[list[int]]) -> list[Any]:
    """What each token of each row gets in one batch, the padding filled with any token."""
    lengths = np.array([len(row) for row in given], dtype=np.int32)
    padded = np.full((len(given), int(lengths.max())), 7, dtype=np.int64)
    for into, row in zip(padded, given, strict=True):
        into[: len(row)] = row
    found = session.step(padded, session.new_state(len(given)), lengths=lengths, logits="all")
    return [logits[:length].copy() for logits, length in zip(found, lengths, strict=True)]


@torch.no_grad()
def far(model: nn.Module, session: Session, given: list[list[int]]) -> float:
    """The largest difference from PyTorch with each row alone, relative to the largest logit."""
    expected = [model(torch.tensor([row]))[0][0].numpy() for row in given]
    pairs = zip(batch(session, given), expected, strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs) / max(float(np.abs(e).max()) for e in expected)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_padding_changes_nothing_and_every_token_sees_all_others(mixer: str) -> None:
    model = tagger(mixer).double()
    given, others = rows([11, 4, 1]), rows([11, 4, 1], seed=4)
    padded = torch.full((3, 11), 9)
    for into, row in zip(padded, given, strict=True):
        into[: len(row)] = torch.tensor(row)
    step = Step.whole(padded)._replace(lengths=torch.tensor([11, 4, 1], dtype=torch.int32))
    together = model(padded, {}, step)[0]
    for row, logits in zip(given, together, strict=True):
        alone = model(torch.tensor([row]))[0][0]
        assert (logits[: len(row)] - alone).abs().max() < 1e-12
        for at in (0, len(row) - 1) if len(row) > 1 else ():
            changed = [*row]
            changed[at] = others[0][0] if row[at] != others[0][0] else others[0][1]
            assert ((model(torch.tensor([changed]))[0][0] - alone).abs().amax(1) > 1e-7).all()


@pytest.mark.parametrize("target", TARGETS)
def test_a_bundle_gives_a_ragged_batch_what_pytorch_gives_each_row_on_every_target(target: str, tmp_path: Path) -> None:
    (options, bound), model = TARGETS[target], tagger("gru", "attention", context=64)
    made = export(model, tmp_path / "b", options=options)
    assert made.verification.ok
    checks = {check.name for check in made.verification.checks}
    assert "batch" in checks and not checks & {"split", "greedy"}
    session = open_session(made.bundle, device="cpu", threads=1)
    assert session.one_pass and not session.signature.state
    assert far(model, session, rows([64, 1, 23])) < bound


@pytest.mark.parametrize(("target", "method"), [("cpu", "int8"), ("cpu", "w8a8"), ("onnx", "int4"), ("cpu", "int4")])
def test_a_quantized_bundle_computes_what_pytorch_does_with_its_numbers(
    target: str, method: str, tmp_path: Path
) -> None:
    options = ExportOptions(target=target, quantize=method, bounds={"top1": 0.0})  # random weights have no favourite
    made = export(tagger("lstm", "attention", context=64), tmp_path / "b", options=options)
    checks = {check.name: check for check in verify(made.bundle, open_session(made.bundle, threads=1)).checks}
    assert {"exact.logits", "exact.kl", "batch"} <= checks.keys()
    assert all(check.ok for check in checks.values())
    assert sum(made.bundle.manifest.quantization["weights"].values()) >= 12


def test_rows_longer_than_a_step_are_read_whole_and_none_goes_on(tmp_path: Path) -> None:
    model = tagger()
    made = export(model, tmp_path / "b")
    session = open_session(made.bundle, threads=1)
    assert far(model, session, rows([CONTEXT, 270])) < 2e-6
    assert verify_quickly(made.bundle, session).ok
    assert json.loads((tmp_path / "b" / MANIFEST).read_text())["format"] == 2  # readers of 1 would cut such rows
    assert [t.name for t in made.bundle.manifest.signature.inputs] == ["tokens", "lengths", "logit_positions"]
    for one in (session, torch_session(model)):
        state = one.new_state()
        one.step(np.array([[1, 2]]), state)
        with pytest.raises(StateError, match=r"reads rows in one pass.*give whole rows to a new state"):
            one.step(np.array([[3]]), state)
    loaded = edgellm_runtime.load(tmp_path / "b", threads=1, isolate=True)
    with pytest.raises(OptionError, match="labels words and writes no text"):
        loaded.generate([1, 2, 3], max_new_tokens=2)


def test_a_wrong_number_in_such_a_bundle_is_found(tmp_path: Path) -> None:
    export(tagger(context=64), tmp_path / "b")
    weights = tmp_path / "b" / WEIGHTS_FILE
    spoiled = bytearray(weights.read_bytes())
    half = len(spoiled) // 8 * 4
    spoiled[half:] = (1.05 * np.frombuffer(bytes(spoiled[half:]), np.float32)).tobytes()
    weights.write_bytes(spoiled)
    bundle = Bundle(tmp_path / "b", checksums=False)
    assert not verify(bundle, open_session(bundle, threads=1)).ok


def test_a_state_in_one_pass_is_refused(tmp_path: Path) -> None:
    model: Any = tagger(context=64)
    model.state_specs = lambda: [StateSpec("h", ("batch", 4), "float32", "replace")]
    with pytest.raises(CaptureError, match=r"declares what no graph can have: state h, .* one pass, which carries"):
        export(model, tmp_path / "no")


def test_shapes_that_no_tagger_has_are_refused() -> None:
    good = TaggerConfig(vocab_size=VOCAB, num_labels=LABELS)
    for change, words in (
        ({"pattern": ("tree",)}, r"pattern has \['tree'\]"), ({"pattern": ()}, "no block"),
        ({"num_labels": VOCAB}, "as many as tokens"), ({"num_heads": 3}, "multiple of num_heads"),
        ({"dropout": 1.0}, "dropout is 1.0"), ({"num_labels": 0}, "num_labels is 0"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            dataclasses.replace(good, **change)  # type: ignore[arg-type]
