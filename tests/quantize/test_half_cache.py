"""Keys and values in 16 bits: what is stored, how near it is to float32, and that edgellm's own kernels read it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import VOCAB, make
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundles import attention_bundle, half_bundle

from edgellm.cli.quantization_text import cache_rows
from edgellm.models.protocol import LanguageModel, Step, empty_state
from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.proof.parity import compare
from edgellm_exporters.quantize.cache import half_caches
from edgellm_runtime import Model, PrefixCache, load, open_session
from edgellm_runtime.generation.trail import BLOCK
from edgellm_runtime.graphs.own_attention import ATTENTIONS
from edgellm_runtime.graphs.own_operators import with_own_operators
from edgellm_runtime.session import Session
from edgellm_runtime.state.state import State

HALVES = ExportOptions(kv_cache="float16")
WINDOW = np.random.default_rng(1).integers(0, VOCAB, 60)


@pytest.mark.parametrize(
    "family", ["attention", "decoder with q/k norm", "mixed", "windows and soft caps", "local and mixed"]
)
def test_a_16_bit_cache_is_next_to_float32_at_half_of_the_memory(family: str, tmp_path: Path) -> None:
    model = make(family)
    made = export(model, tmp_path / "b", options=HALVES)
    assert made.verification.ok
    said, specs = made.bundle.manifest.quantization, made.bundle.manifest.signature.state
    assert {spec.name for spec in specs if spec.dtype == "float16"} == set(said["cache"]) != set()
    assert said["cache_dtype"] == "float16"
    assert all(spec.dtype == "float16" for spec in specs if spec.update == "append")
    assert cache_rows(said)[0][0] == "keys and values in 16 bits"
    report = compare(model, open_session(made.bundle, threads=1), [WINDOW.tolist()])
    assert report.kl < 1e-6
    assert report.logits < 2e-3
    assert report.state < 1e-3
    bounds = made.bundle.manifest.bounds
    assert {name: bounds[name] for name in ("kl", "state", "logits")} == {"kl": 1e-4, "state": 0.01, "logits": 0.02}


def step_by_step(session: Session, tokens: np.ndarray, cuts: list[int], state: State) -> np.ndarray:
    pieces = zip([0, *cuts], [*cuts, len(tokens)], strict=True)
    return np.concatenate([session.step(tokens[None, a:b], state, logits="all")[0].copy() for a, b in pieces])


@pytest.mark.parametrize("family", ["attention", "decoder with q/k norm"])
@pytest.mark.parametrize("method", ["none", "int8"])
def test_own_kernels_read_it_as_it_lies(family: str, method: str, tmp_path: Path) -> None:
    pytest.importorskip("edgellm_kernels", reason="edgellm-kernels is not built; make kernels builds it")
    made = export(make(family), tmp_path / "b", options=ExportOptions(quantize=method, kv_cache="float16"))
    _, nodes = with_own_operators((made.bundle.path / "model.onnx").read_bytes())
    assert [node.op for node in nodes].count(ATTENTIONS["float16"]) == len(
        made.bundle.manifest.quantization["cache"]
    ) // 2
    ours = open_session(made.bundle, threads=2, kernels="own")
    whole = step_by_step(ours, WINDOW, [], ours.new_state(1))
    if method == "none":
        theirs = open_session(made.bundle, threads=1, kernels="onnxruntime")
        expected = step_by_step(theirs, WINDOW, [], theirs.new_state(1))
        np.testing.assert_allclose(whole, expected, rtol=0, atol=2e-3 * np.abs(expected).max())
    else:  # products of float weights are ONNX Runtime's, which depend on how many rows there are
        np.testing.assert_array_equal(step_by_step(ours, WINDOW, [3, 4, 40], ours.new_state(1)), whole)


def test_a_16_bit_cache_is_saved_and_gone_on_with(tmp_path: Path) -> None:
    made = export(make("decoder"), tmp_path / "b", options=HALVES)
    session = open_session(made.bundle, threads=1)
    state = session.new_state(1)
    first = step_by_step(session, WINDOW[:30], [], state)
    state.save(tmp_path / "saved")
    again = State.load(tmp_path / "saved", session.signature.state)
    np.testing.assert_array_equal(
        step_by_step(session, WINDOW[30:], [], again), step_by_step(session, WINDOW[30:], [], state)
    )
    assert np.isfinite(first).all()


def prefixed(model: Model) -> Model:
    other = Model(model.session, model.tokenizer, model.bundle)
    other.prefix_cache = PrefixCache()
    return other


@settings(max_examples=6, deadline=None)
@given(shared=st.integers(1, 70), left=st.integers(1, 20), right=st.integers(1, 20), seed=st.integers(0, 9))
def test_beginnings_that_were_kept_give_the_answers_that_reading_them_gives(
    shared: int, left: int, right: int, seed: int
) -> None:
    pytest.importorskip("edgellm_kernels", reason="edgellm-kernels is not built; make kernels builds it")
    model = load(half_bundle("int8"), threads=1, kernels="own")
    draw, kept = np.random.default_rng(seed), prefixed(model)
    stem, *ends = (draw.integers(3, VOCAB, size).tolist() for size in (shared, left, right))
    for i, end in enumerate(ends):
        answer = kept.generate([*stem, *end], max_new_tokens=5, ignore_eos=True)
        assert answer.tokens == model.generate([*stem, *end], max_new_tokens=5, ignore_eos=True).tokens
        assert i == 0 or answer.cached_tokens >= shared // BLOCK * BLOCK


def test_a_beginning_that_was_kept_takes_half_of_the_bytes() -> None:
    tokens = np.random.default_rng(0).integers(3, VOCAB, 70).tolist()
    kept = [prefixed(load(folder, threads=1)) for folder in (half_bundle(), attention_bundle())]
    for model in kept:
        model.generate(tokens, max_new_tokens=1)
        assert model.generate(tokens, max_new_tokens=1).cached_tokens == 2 * BLOCK
    half, whole = (model.prefix_cache.counts for model in kept if model.prefix_cache is not None)
    slots = {spec.nbytes(1, BLOCK) for spec in kept[1].session.signature.state}
    assert half.blocks == whole.blocks == 2
    assert whole.nbytes - half.nbytes == len(kept[1].session.signature.state) * slots.pop()  # of two blocks, half


def test_numbers_that_float16_does_not_hold_are_refused(tmp_path: Path) -> None:
    model = make("decoder")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "v_proj" in name).mul_(1e7)
    with pytest.raises(QuantizeError, match=r"keys or values of up to \d+, and float16 holds up to 65504"):
        export(model, tmp_path / "b", options=HALVES)


def largest(model: LanguageModel, name: str, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model(tokens, empty_state(model, *tokens.shape), Step.whole(tokens))[1][name].abs().max())


@pytest.mark.parametrize(("most", "held"), [(50_000, True), (55_000, False), (70_000, False)])
def test_the_largest_number_that_was_seen_is_told_where_a_quarter_more_is_too_much(most: float, held: bool) -> None:
    model, rows = make("decoder"), [WINDOW.tolist()]
    tokens = torch.tensor(rows)
    with torch.no_grad():
        weight = next(p for name, p in model.named_parameters() if "layers.0." in name and "v_proj" in name)
        weight.mul_(most / largest(model, "layers.0.v", tokens))
    seen = largest(model, "layers.0.v", tokens)
    if held:
        assert half_caches(model, ["layers.0.v"], {}, rows) == {"layers.0.v"}
        return
    with pytest.raises(QuantizeError, match=rf"keys or values of up to {seen:.0f}, .* 65504, .* 1.25 times as much"):
        half_caches(model, ["layers.0.v"], {}, rows)
