"""Encoders as engines, without a GPU: sources of unequal lengths, rows that join, beams, and what is refused."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorrt_bundles import SOURCES, begun, both, machine_with_gpu, made
from tiny_bundles import edit_manifest, sign

from edgellm_runtime import BackendError, BundleError, StateError, load, open_session
from edgellm_runtime.batching.rows import CopiedRows
from edgellm_runtime.bundle import Bundle

NAMES = ("answers", "shortlist")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    return machine_with_gpu(monkeypatch)


def start(session: Any, rows: int = 1) -> np.ndarray:
    return np.repeat([session.encoder.start], rows, axis=0)


@pytest.mark.parametrize("name", NAMES)
def test_answers_and_beams_are_those_of_the_graphs(name: str, gpu: Any) -> None:
    on_gpu, on_cpu = load(made(name)), load(made(name), device="cpu", threads=1)
    assert on_gpu.device == "tensorrt"
    for options in ({}, {"beams": 3}, {"temperature": 0.9, "top_k": 9, "seed": 3}):
        sources = SOURCES[:1] if "beams" in options else SOURCES
        answers = [m.generate(sources, max_new_tokens=9, ignore_eos=True, **options) for m in (on_gpu, on_cpu)]
        assert [a.tokens for a in answers[0]] == [a.tokens for a in answers[1]]


@pytest.mark.parametrize("name", NAMES)
def test_rows_whose_sources_have_unequal_lengths_join_and_leave(name: str, gpu: Any) -> None:
    host, session = both(name)
    rows, alone = CopiedRows(session), []
    for source in reversed(SOURCES):  # each longer one widens those before
        joins, own = (each.new_state(sources=[source]) for each in (session, host))
        for each, state in ((session, joins), (host, own)):
            each.step(start(each), state)
        alone.append(own)
        rows.add(joins, 20)
    for token in (5, 71, 33):
        expected = np.concatenate([host.step(np.array([[token]]), own) for own in alone])
        (part,) = rows.parts()
        found = session.step(np.full((len(alone), 1), token), part)
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * np.abs(expected).max())
        rows.remove(0)
        alone = [*alone[-1:], *alone[1:-1]] if len(alone) > 1 else []


def test_a_source_is_read_once_and_stays_on_the_gpu(gpu: Any) -> None:
    _, session = both("answers")
    encoder, ran = session._backend._encoder.engine, []
    enqueue = encoder.enqueue
    encoder.enqueue = lambda stream: (ran.append(gpu.cuda.downloads), enqueue(stream))[1]
    state = begun(session, 2, 8)
    session.step(start(session, 2), state)
    for _ in range(3):
        session.best(np.full((2, 1), 4), state, 1)
    assert ran == [0], "nothing was fetched before the encoder ran, and it ran once"
    assert gpu.cuda.launches == 2, "the first single token is not recorded"


def test_steps_over_sources_of_other_lengths_are_recorded_after_a_run_of_those(gpu: Any) -> None:
    """Two rows in turn: every single token is over other sizes than the last, which no recording may begin with."""
    host, session = both("answers")
    states = [[each.new_state(sources=[source]) for source in SOURCES[:2]] for each in (host, session)]
    for token in (7, 5, 71, 33):
        for of_host, of_gpu in zip(*states, strict=True):
            found = [each.step(np.array([[token]]), s).copy() for each, s in ((host, of_host), (session, of_gpu))]
            np.testing.assert_array_equal(*found)
    assert session._backend.captures, session._backend.refusal
    assert gpu.cuda.launches == 4  # two rows' last two tokens


def test_memory_of_sources_is_given_back(gpu: Any) -> None:
    _, session = both("answers")
    for source in SOURCES:
        session.step(start(session), session.new_state(sources=[source]))
    gc.collect()
    session.storage._pool.clear()
    del session
    gc.collect()
    assert gpu.cuda.memory == {}


# --- what is refused ------------------------------------------------------------------------------------------------


def test_more_sources_than_the_profile_are_refused_with_the_command(gpu: Any) -> None:
    _, session = both("answers")
    with pytest.raises(StateError, match=r"4 sources of 2 tokens, .* up to 3 of 24; .* --max-batch 4"):
        session.new_state(sources=[[4, 5]] * 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"source": {"mode": "INPUT", "dtype": "INT32", "shape": [-1, -1]}}, r"\['source'\] differ from"),
        ({"more": {"mode": "OUTPUT", "dtype": "FLOAT", "shape": [-1]}}, r"\['more'\] differ"),
        (
            {"present.layers.1.cross_v": {"mode": "OUTPUT", "dtype": "HALF", "shape": [-1, 2, -1, 32]}},
            r"present.layers.1.cross_v has \[2, -1, 32\] for each row, the manifest says \[2, -1, 16\]",
        ),
    ],
)
def test_an_encoder_of_other_tensors_gets_no_address(changed: dict, message: str, gpu: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made("answers"), tmp_path / "b"))
    description = json.loads((folder / "encode.engine").read_text()) | {"changed": changed}
    (folder / "encode.engine").write_text(json.dumps(description))
    sign(folder, "encode.engine")
    with pytest.raises(BackendError, match=message):
        open_session(Bundle(folder))


def test_an_engine_that_does_not_read_an_encoded_state_has_no_bounds_for_its_sources(gpu: Any) -> None:
    _, session = both("answers")
    backend, state = session._backend, begun(session, 2, 8)
    role = backend._roles.choose(1)
    engine = backend._engines[role.name]
    names = {spec.past_name for spec in state.specs if spec.encoded}
    assert names <= engine.inputs
    for name in names:
        engine.profile[name] = ((0,), (0,), (0,))
    with pytest.raises(StateError, match=f"but the {role.name} engine was built for others"):
        backend._check_shape(engine, role, (2, 1), state)
    engine.inputs -= names
    for name in names:
        del engine.profile[name]
    backend._check_shape(engine, role, (2, 1), state)


def test_an_engine_for_shorter_sources_than_it_says_is_refused(gpu: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made("answers"), tmp_path / "b"))
    description = json.loads((folder / "encode.engine").read_text())
    description["profile"]["source"]["max"] = [3, 23]
    (folder / "encode.engine").write_text(json.dumps(description))
    sign(folder, "encode.engine")
    with pytest.raises(BackendError, match=r"built for sources of 1 to 23 tokens, the manifest says 1 to 24"):
        open_session(Bundle(folder))


def test_a_bundle_without_the_encoders_engine_says_how_to_build_it(gpu: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made("answers"), tmp_path / "b"))
    engines = json.loads((folder / "manifest.json").read_text())["engines"]
    edit_manifest(folder, engines=[e for e in engines if e["role"] != "encode"])
    (folder / "encode.engine").unlink()
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit_manifest(folder, files={n: f for n, f in files.items() if n != "encode.engine"})
    with pytest.raises(BundleError, match=r"needs an engine of role encode for tensorrt_rtx, but holds none; build it"):
        open_session(Bundle(folder))


def _no_range(engines: list[dict[str, Any]]) -> None:
    for engine in engines:
        engine["profile"].pop("source", None)


def _no_range_of_states(engines: list[dict[str, Any]]) -> None:
    for engine in engines:
        engine["profile"].pop("past.layers.0.cross_k", None)


def _shorter(engines: list[dict[str, Any]]) -> None:
    for engine in engines:
        if engine["role"] == "decode":
            engine["profile"]["past.source.mask"] = {"min": [1, 1], "opt": [1, 1], "max": [3, 23]}


def _no_small_ones(engines: list[dict[str, Any]]) -> None:
    for engine in engines:
        if engine["role"] == "encode":
            engine["profile"]["source"] = {"min": [1, 2], "opt": [1, 2], "max": [3, 24]}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_range, "'encode.engine' has no range of shapes for source"),
        (_no_range_of_states, r"'\w+.engine' has no range of shapes for past.layers.0.cross_k"),
        (_shorter, "'decode.engine' takes sources of 1 to 23 tokens, and not of 1 to 24"),
        (_no_small_ones, "'encode.engine' takes sources of 2 to 24 tokens, and not of 1 to 24"),
    ],
)
def test_a_manifest_whose_engines_do_not_take_its_sources_is_refused(
    spoil: Callable[[list[dict[str, Any]]], None], message: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made("answers"), tmp_path / "b"))
    engines = json.loads((folder / "manifest.json").read_text())["engines"]
    spoil(engines)
    edit_manifest(folder, engines=engines)
    with pytest.raises(BundleError, match=message):
        Bundle(folder)


def test_a_manifest_of_texts_with_an_encoders_engine_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made("attention"), tmp_path / "b"))
    engines = json.loads((folder / "manifest.json").read_text())["engines"]
    engines[0]["role"] = "encode"
    edit_manifest(folder, engines=engines)
    with pytest.raises(BundleError, match="an engine of role 'encode' without an encoder"):
        Bundle(folder)


def test_an_encoder_in_the_file_of_a_step_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made("answers"), tmp_path / "b"))
    encoder = json.loads((folder / "manifest.json").read_text())["encoder"]
    edit_manifest(folder, encoder=encoder | {"file": "decode.onnx"})
    with pytest.raises(BundleError, match=r"an encoder in 'decode\.onnx', which is not a further one"):
        Bundle(folder)
