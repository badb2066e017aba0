"""Models that answer sources on targets for GPUs, as far as that goes without one."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marian_files import bergamot
from source_models import VOCAB, bart_model, own_model, t5_model
from tiny_bundles import device_session

from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.proof.parity import compare
from edgellm_exporters.proof.torch_backend import torch_session
from edgellm_runtime import load, open_session
from edgellm_runtime.batching.rows import CopiedRows
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.verify import verify
from edgellm_runtime.graphs.graph_rules import check_rules
from edgellm_runtime.graphs.onnx_file import read_model

MODELS = {"t5": t5_model, "bart": bart_model, "own": functools.partial(own_model, "gru")}
SOURCES = [[9, 8, 7, 6, 5, 4, 9, 9, 31], [12], [50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61]]
# Random weights have no favourite token: which one is likeliest says nothing of a graph in 16 bits.
ANY = {"top1": 0.0}


@functools.cache
def cuda_bundle(kind: str, dtype: str = "float16", method: str = "none") -> Path:
    options = ExportOptions(target="cuda", dtype=dtype, quantize=method, bounds=ANY)
    return export(MODELS[kind](), Path(tempfile.mkdtemp()) / "b", options=options).bundle.path


@pytest.mark.parametrize("kind", MODELS)
def test_float16_answers_as_pytorch_does(kind: str) -> None:
    bundle = Bundle(cuda_bundle(kind))
    states = {s.name: s.dtype for s in bundle.manifest.signature.state}
    assert states.pop("source.mask") == "bool"
    assert set(states.values()) == {"float16"}
    rows = [[*bundle.manifest.encoder.start, *row] for row in ([5, 6, 7, 8], [30, 31])]  # type: ignore[union-attr]
    report = compare(MODELS[kind](), open_session(bundle, device="cpu", threads=1), rows, sources=SOURCES[:2])
    assert report.logits < 0.02 and report.kl < 1e-4 and report.state < 0.01
    assert verify(bundle, open_session(bundle, device="cpu", threads=1)).ok


@pytest.mark.parametrize("kind", MODELS)
def test_the_code_of_cuda_reads_ragged_sources_and_lets_their_rows_join(kind: str) -> None:
    """Encoder, states and steps on a device, here the CPU's: a row's logits are those of its source alone."""
    session, reference = device_session(Bundle(cuda_bundle(kind))), torch_session(MODELS[kind]())
    start = np.array([session.encoder.start])  # type: ignore[union-attr]
    together, rows, alone = session.new_state(sources=SOURCES), CopiedRows(session), []
    session.step(np.repeat(start, 3, axis=0), together)
    for source in SOURCES:
        own, joins = reference.new_state(sources=[source]), session.new_state(sources=[source])
        reference.step(start, own)
        session.step(start, joins)
        alone.append(own)
        rows.add(joins, 30)
    for token in (5, 71, 33):
        tokens = np.full((3, 1), token)
        expected = np.concatenate([reference.step(tokens[:1], own).copy() for own in alone])
        (part,) = rows.parts()
        for state in (together, part):
            np.testing.assert_allclose(
                session.step(tokens, state), expected, rtol=0, atol=0.02 * np.abs(expected).max()
            )


@pytest.mark.parametrize("kind", MODELS)
def test_bfloat16_and_four_bits_are_proved_and_in_the_lists(kind: str) -> None:
    for dtype, method in (("bfloat16", "none"), ("float16", "int4")):
        bundle = Bundle(cuda_bundle(kind, dtype, method))
        assert dtype in bundle.manifest.provenance["proved_on"]
        for name in ("model.onnx", "encoder.onnx"):
            check_rules(read_model((bundle.path / name).read_bytes()), "cuda")


def test_a_bundle_for_cuda_answers_texts_on_the_cpu_too() -> None:
    model: Any = load(cuda_bundle("t5"), device="cpu", threads=1)
    answers = model.generate(SOURCES, max_new_tokens=6)
    assert [len(a.tokens) for a in answers] == [6, 6, 6]
    assert all(0 <= token < VOCAB for a in answers for token in a.tokens)


@pytest.mark.parametrize("target", ["cuda", "tensorrt"])
def test_ids_of_a_shortlist_stay_whole_in_16_bits(target: str, tmp_path: Path) -> None:
    """Of 5,000 words float16 holds the first 2,048 exactly."""
    model: Any = bergamot(vocab=5000, listed=3)
    engine = EngineOptions(build=False) if target == "tensorrt" else None
    options = ExportOptions(target=target, dtype="float16", bounds=ANY, engine=engine)
    session = open_session(export(model, tmp_path / "b", options=options).bundle, device="cpu", threads=1)
    state = session.new_state(sources=[list(range(4000, 4020))])
    found = state.read("source.words")[0]
    assert found.max() > 4096
    np.testing.assert_array_equal(found, model.words[4000:4020].int().numpy())
