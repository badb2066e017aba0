"""A row that begins near the end of the context finds what short rows cannot see."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from families import CONTEXT, make
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import KINDS, Numbers
from tiny_files import copied

from edgellm.ops.attention import attention_reference
from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.proof.far_row import far_row, far_start
from edgellm_exporters.proof.traces import traces
from edgellm_runtime import open_session
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.far import (
    FAR,
    FLOAT_INPUTS,
    far_distances,
    far_golden,
    far_outputs,
    float_session,
    made_up,
    page_by_page,
    slots_filled,
)
from edgellm_runtime.checks.goldens import goldens_file
from edgellm_runtime.checks.verify import Check, distance, verify
from edgellm_runtime.spec import StateSpec

CACHE = StateSpec("layers.0.k", ("batch", 2, "capacity", 4), "float32", "append")


def checked(path: Path, threads: int = 1) -> dict[str, Check]:
    bundle = Bundle(path)
    session = open_session(bundle, device="cpu", threads=threads)
    return {check.name: check for check in verify(bundle, session).checks}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("local and mixed", ExportOptions()), ("state space", ExportOptions(quantize="int4")),
        ("decoder", ExportOptions(kv_cache="int8")), ("memory", ExportOptions(target="onnx", quantize="int8")),
        ("decoder", ExportOptions(target="cuda", dtype="float16")),
    ],
)  # fmt: skip
def test_a_bundle_holds_near_the_end_of_its_context(family: str, options: ExportOptions, tmp_path: Path) -> None:
    export(make(family), tmp_path / "b", options=options)
    found = checked(tmp_path / "b", threads=2)
    assert all(check.ok for check in found.values())
    assert "far.logits" in found
    assert f"after {CONTEXT - 12} made-up tokens" in found["far.kl"].what


def test_the_far_end_of_a_rotary_table_is_tried(tmp_path: Path) -> None:
    export(make("decoder"), tmp_path / "source", options=ExportOptions(quantize="int8"))
    numbers = Numbers(copied(tmp_path / "source", tmp_path))
    table = numbers.get("rotary.cos")
    table[CONTEXT - 8 :] *= -1
    numbers.put("rotary.cos", table)
    numbers.write()
    wrong = {name for name, check in checked(tmp_path / "bundle").items() if not check.ok}
    assert wrong == {"far.logits", "far.kl", "far.state"}


@pytest.mark.parametrize("quantize", ["int4", "w8a8"])
def test_products_round_nothing_at_the_far_row_so_that_it_is_held_as_floats_are(quantize: str, tmp_path: Path) -> None:
    bundle = export(make("decoder"), tmp_path / "b", options=ExportOptions(quantize=quantize)).bundle
    data, session = goldens_file(bundle)[FAR], open_session(bundle, threads=1)
    assert data[FLOAT_INPUTS]
    assert bundle.manifest.far["kl"] == 1e-6  # what sums in another order cost, and no more
    far = far_golden(data, session.width, session)
    as_it_is, floats = (
        distance(far.golden, *far_outputs(reader, far, "whole")) for reader in (session, float_session(bundle, 1))
    )
    assert floats["kl"] < 1e-7 < 1e-6 < as_it_is["kl"]


def test_codes_of_a_cache_are_rounded_at_the_far_row_too(tmp_path: Path) -> None:
    options = ExportOptions(quantize="int4", kv_cache="int8")
    bundle = export(make("decoder"), tmp_path / "b", options=options).bundle
    assert FLOAT_INPUTS not in goldens_file(bundle)[FAR]
    assert all(check.ok for check in checked(bundle.path).values())


@pytest.mark.parametrize(
    ("method", "kinds"),
    [
        ("int8", ["codes of a block at random"]), ("int4", ["one scale doubled", "other zeros"]),
        ("w8a8", ["codes of a block at random"]),
    ],
)  # fmt: skip
def test_recurrences_round_nothing_at_the_far_row_either_so_that_small_changes_of_them_are_found(
    method: str, kinds: list[str], tmp_path: Path
) -> None:
    """Each moves the KL by little more than 1e-4, within what inputs rounded beside it may move a row."""
    source = export(make("mixed"), tmp_path / "source", options=ExportOptions(quantize=method)).bundle
    assert goldens_file(source)[FAR][FLOAT_INPUTS]
    assert source.manifest.far == {"logits": 1e-4, "kl": 1e-6, "state": 1e-4}
    assert checked(source.path)["far.logits"].value < 1e-5
    for kind in kinds:
        (folder := tmp_path / kind).mkdir()
        numbers = Numbers(copied(source.path, folder))
        KINDS[kind](numbers, np.random.default_rng(1))
        assert "mixer.weight_" in numbers.changed[0]
        numbers.write()
        found = checked(folder / "bundle")
        assert found["far.logits"].value > 10 * found["far.logits"].bound


def test_a_far_row_beside_a_nearer_one_is_what_it_is_alone(tmp_path: Path) -> None:
    bundle = export(make("local and mixed"), tmp_path / "b").bundle
    session = open_session(bundle, threads=1)
    far = far_golden(goldens_file(bundle)[FAR], session.width, session)
    alone, beside = (far_outputs(session, far, form)[0] for form in ("single", "ragged"))
    np.testing.assert_allclose(alone[: len(beside)], beside, atol=1e-4)
    assert len(beside) == 4
    assert len(far_distances(session, far)) == 3


def test_a_made_up_past_is_the_same_wherever_it_is_made() -> None:
    where, numbers = made_up(CACHE, 5, 2.0)
    assert numbers.shape == (1, 2, 5, 4)
    assert np.zeros((1, 2, 9, 4))[where].shape == numbers.shape
    np.testing.assert_array_equal(numbers.reshape(-1)[:4], FIRST)
    assert not np.array_equal(
        made_up(StateSpec("h", ("batch", 4), "float32", "replace"), 5, 1.0)[1][0], numbers[0, 0, 0]
    )


FIRST = [1.53125, -1.4375, 0.125, -1.78125]


@given(st.integers(1, 5000))
@settings(max_examples=50, deadline=None)
def test_slots_are_filled_to_the_end_of_the_past_and_never_beyond(past: int) -> None:
    slots = slots_filled(past)
    assert slots[-1] == past - 1
    assert slots[0] == 0
    assert len(slots) == min(past, len(slots)) <= 64


def test_a_past_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    bundle = export(make("decoder"), tmp_path / "b").bundle
    data, session = goldens_file(bundle)[FAR], open_session(bundle)
    for changed in ({"past": CONTEXT}, {"past": 0}, {"scales": {}}, {"past": 1 << 40}):
        with pytest.raises(ValueError, match=r"past|scale"):
            far_golden({**data, **changed}, session.width, session)


def test_a_past_of_mostly_nothing_takes_memory_for_what_it_holds() -> None:
    """Of 16 MB, a page for each of 64 numbers that lie apart."""
    past = page_by_page((4096, 1024), np.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    past[::64, 0] = 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before >= 64
    assert past.sum() == 64
    assert past.flags.writeable


def test_pytorch_keeps_of_a_far_past_what_its_tokens_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what attention that gives whole caches has written there."""
    model = make("decoder")
    trace = next(iter(traces(model, [list(range(1, 13))])))
    start = far_start(model, trace, CONTEXT)
    assert start is not None
    found = far_row(model, start)
    monkeypatch.setattr("edgellm_exporters.proof.far_row._only_written", lambda past, start: attention_reference)
    whole = far_row(model, start)
    assert found is not None
    assert whole is not None
    assert found.trace.state.keys() == whole.trace.state.keys() != set()
    for name, tensor in whole.trace.state.items():
        torch.testing.assert_close(found.trace.state[name], tensor, rtol=0, atol=0)
