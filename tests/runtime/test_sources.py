"""Models that answer sources, on ONNX Runtime: batches, states, beams, and what nobody may say of an encoder."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_models import CONTEXT, VOCAB, bart_bundle, own_bundle, t5_bundle, text_bundle
from tiny_bundles import attention_bundle
from tiny_files import copied, edit_manifest, sign

from edgellm_runtime import BackendError, BundleError, ContextError, OptionError, StateError, load, open_session
from edgellm_runtime.backends.base import HostBackend
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.bench import bench
from edgellm_runtime.checks.evaluate import evaluate
from edgellm_runtime.checks.verify import verify
from edgellm_runtime.generation.beam import beam_search
from edgellm_runtime.session import Session
from edgellm_runtime.spec import SpecError, StateSpec
from edgellm_runtime.state import State

START = [3, 0]
SOURCES = [[9, 8, 7, 6, 5, 4, 9, 9, 31], [12], [50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61]]


@cache
def session(target: str = "cpu") -> Session:
    return open_session(Bundle(t5_bundle(target)), threads=1)


def alone(source: list[int], row: list[int]) -> np.ndarray:
    """The logits after a row that answers a source, read at once."""
    one = session()
    return one.step(np.array([row]), one.new_state(capacity=len(row), sources=[source]))[0, 0].copy()


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() < 1e-5 * np.abs(expected).max())


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_whatever_is_done_with_a_state_its_rows_answer_their_own_sources(data: st.DataObject) -> None:
    one = session()
    state = one.new_state(sources=SOURCES)
    rows = [(source, list[int]()) for source in SOURCES]
    for _ in range(data.draw(st.integers(1, 6))):
        kind = data.draw(st.sampled_from(["step", "take", "rewind", "put", "fork"]))
        if kind == "take":
            index = data.draw(st.lists(st.integers(0, state.batch - 1), min_size=1, max_size=4))
            state, rows = state.take(index), [(rows[i][0], list(rows[i][1])) for i in index]
        elif kind == "rewind":
            kept = [data.draw(st.integers(0, len(row))) for _, row in rows]
            state.rewind(kept)
            rows = [(source, row[:n]) for (source, row), n in zip(rows, kept, strict=True)]
        elif kind == "put":
            at, of = (data.draw(st.integers(0, state.batch - 1)) for _ in range(2))
            state.put(at, state.take([of]))
            rows[at] = (rows[of][0], list(rows[of][1]))
        elif kind == "fork":
            state = state.fork()
        elif max(len(row) for _, row in rows) < CONTEXT - 5:
            drawn = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=len(rows), max_size=len(rows)))
            one.step(np.array(drawn)[:, None], state)
            for (_, row), token in zip(rows, drawn, strict=True):
                row.append(token)
    found = one.step(np.full((len(rows), 1), 7), state)[:, 0]
    for (source, row), logits in zip(rows, found, strict=True):
        assert close(logits, alone(source, [*row, 7]))


@pytest.mark.parametrize("bundle", [t5_bundle, bart_bundle, own_bundle])
def test_a_batch_of_ragged_sources_is_answered_as_each_alone(bundle: Any) -> None:
    model = load(bundle(), threads=1)
    together = model.generate(SOURCES, max_new_tokens=9)
    assert [a.tokens for a in together] == [model.generate(s, max_new_tokens=9).tokens for s in SOURCES]
    assert [a.prompt_tokens for a in together] == [len(s) for s in SOURCES]
    assert len({a.tokens for a in together}) > 1
    stream = model.stream(SOURCES[0], max_new_tokens=9)
    assert [t for chunk in stream for t in chunk.token_ids] == list(together[0].tokens)
    drafted = model.generate(SOURCES[0], max_new_tokens=9, draft="lookup")  # recurrences go back to snapshots
    assert drafted.tokens == together[0].tokens
    several = model.generate(SOURCES[0], n=3, temperature=1.0, seed=4, max_new_tokens=9)
    alone = [model.generate(SOURCES[0], temperature=1.0, seed=4 + i, max_new_tokens=9).tokens for i in range(3)]
    assert [a.tokens for a in several] == alone


def test_answers_go_on_to_the_end_of_the_context_and_the_encoder_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counted = load(t5_bundle(), threads=1), list[int]()
    backend: Any = model.session._backend
    encode = backend.encode
    monkeypatch.setattr(backend, "encode", lambda *given: (counted.append(1), encode(*given))[1])
    answer = model.generate(SOURCES[2], max_new_tokens=1000)
    assert len(answer.tokens) == CONTEXT - len(START) and answer.finish_reason == "length"
    assert len(counted) == 1


def test_a_saved_state_goes_on_in_another_session_and_only_with_its_own_model(tmp_path: Path) -> None:
    one = session()
    state = one.new_state(sources=SOURCES)
    one.step(np.array([START] * 3), state)
    state.save(tmp_path / "state")
    other = open_session(Bundle(t5_bundle()), threads=1)
    again = State.load(tmp_path / "state", other.signature.state, other.storage)
    assert np.array_equal(again.lengths, state.lengths)
    assert np.array_equal(other.step(np.array([[5]] * 3), again), one.step(np.array([[5]] * 3), state))
    with pytest.raises(StateError, match="another model"):
        State.load(tmp_path / "state", open_session(Bundle(bart_bundle()), threads=1).signature.state)
    with pytest.raises(StateError, match="another model's"):
        open_session(Bundle(attention_bundle()), threads=1).step(np.array([[5]] * 3), again)


@pytest.mark.parametrize("source", ["many", 0, -3, 2**70, [4], True])
def test_a_damaged_header_of_a_saved_state_is_refused(source: Any, tmp_path: Path) -> None:
    one = session()
    state = one.new_state(sources=SOURCES)
    state.save(tmp_path / "state.npz")
    arrays = dict(np.load(tmp_path / "state.npz"))
    header = json.loads(str(arrays["__header__"]))
    for spec in header["specs"]:
        if "source" in spec:
            spec["source"] = source
    np.savez(tmp_path / "other", **arrays | {"__header__": np.array(json.dumps(header))})
    with pytest.raises(StateError, match=r"not a saved state|another model"):
        State.load(tmp_path / "other.npz", one.signature.state)


def test_one_beam_is_greedy_and_more_find_answers_at_least_as_likely() -> None:
    one = session()
    greedy = beam_search(one, SOURCES, beams=1, max_new_tokens=7, eos=[5])
    wide = beam_search(one, SOURCES, beams=4, max_new_tokens=7, eos=[5], length_penalty=0.0)
    said = load(t5_bundle(), threads=1).generate(SOURCES, max_new_tokens=7, stop_tokens=[5])
    assert [g.tokens for g in greedy] == [tuple(t for t in a.tokens if t != 5) for a in said]
    for narrow, found in zip(greedy, wide, strict=True):
        assert found.log_probability >= narrow.log_probability - 1e-5
    for source, found in zip(SOURCES, wide, strict=True):  # what it says is what reading it anew gives
        row = [*START, *found.tokens, *([5] if found.ended else [])]
        logits = one.step(np.array([row]), one.new_state(sources=[source]), logits="all")[0].astype(np.float64)
        chosen = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(
            1, keepdims=True
        )  # fmt: skip
        total = sum(chosen[i, token] for i, token in enumerate(row[len(START) :], start=len(START) - 1))
        assert abs(total - found.log_probability) < 1e-3


def test_a_plain_source_ends_as_the_tokenizer_says_and_a_list_is_taken_as_it_is() -> None:
    model = load(text_bundle(), threads=1)
    assert model.tokenizer is not None
    ids = model.tokenizer.encode("Hello there")
    text, plain = (model.generate(p, max_new_tokens=6) for p in ("Hello there", ids))
    ended = model.generate([*ids, 2], max_new_tokens=6)
    assert (text.tokens, text.prompt_tokens) == (ended.tokens, len(ids) + 1)
    assert plain.prompt_tokens == len(ids)
    assert model.generate("", max_new_tokens=2).prompt_tokens == 1  # the end alone


def test_what_a_model_that_answers_sources_is_not_asked_for() -> None:
    model, goes_on = load(t5_bundle(), threads=1), load(attention_bundle(), threads=1)
    for call, error, words in (
        (lambda: model.generate([4] * 25), ContextError, "25 tokens, but the model's context holds 24"),
        (lambda: model.stream([4] * 25), ContextError, "25 tokens"),
        (lambda: model.new_state(), OptionError, "answers sources and goes on with no text"),
        (lambda: model.session.new_state(), OptionError, r"new_state\(sources="),
        (lambda: model.session.new_state(sources=[]), OptionError, "give one source or more"),
        (lambda: model.session.new_state(sources=[[4], []]), OptionError, "none empty"),
        (lambda: model.session.new_state(sources=[[4] * 25]), ContextError, "the model reads 24"),
        (lambda: model.session.new_state(sources=[[VOCAB]]), OptionError, "outside the model's vocabulary"),
        (lambda: model.session.new_state(sources="ab"), OptionError, "sources is 'ab'"),
        (lambda: goes_on.session.new_state(sources=[[4]]), OptionError, "this one has none"),
        (lambda: evaluate(model.session, [[4, 5, 6]]), OptionError, "answers sources"),
        (lambda: model.read([4]), OptionError, "answers sources"),
        (lambda: model.generate([4], draft=model), OptionError, "answers sources"),
    ):
        with pytest.raises(error, match=words):
            call()
    with pytest.raises(OptionError, match="echo is True"):
        load(text_bundle(), threads=1).generate("Hello", echo=True)
    with pytest.raises(StateError, match=r"another number of rows|2 rows"):
        model.session.step(np.array([START] * 2), model.session.new_state(sources=SOURCES))
    with pytest.raises(BackendError, match="runs no encoder"):
        HostBackend().encode(np.zeros((1, 1), np.int64), np.ones(1, np.int32), None)  # type: ignore[arg-type]


def test_memory_is_told_for_the_longest_source_and_bench_measures_an_answer() -> None:
    model = load(t5_bundle(), threads=1)
    need = model.memory(20)
    longest = [[4] * 24]
    assert need.state == model.session.new_state(capacity=20, sources=longest).nbytes
    found = bench(t5_bundle(), prompt_tokens=6, new_tokens=3, rounds=1)
    assert found["prompt_tokens"] == 6 and found["new_tokens"] == 3


def test_a_bundle_verifies_and_loads_isolated(tmp_path: Path) -> None:
    for target in ("cpu", "onnx"):
        bundle = Bundle(t5_bundle(target))
        assert verify(bundle, session(target)).ok
    assert load(t5_bundle(), isolate=True, threads=1).generate([4], max_new_tokens=1).tokens


def test_a_changed_encoder_fails_verification(tmp_path: Path) -> None:
    bundle = copied(t5_bundle(), tmp_path)
    goldens = json.loads((bundle / "goldens.json").read_text())
    for golden in goldens["traces"]:
        golden["source"] = golden["source"][::-1]
    (bundle / "goldens.json").write_text(json.dumps(goldens))
    sign(bundle, "goldens.json")
    opened = Bundle(bundle)
    wrong = {check.name for check in verify(opened, open_session(opened, threads=1)).checks if not check.ok}
    assert {"logits", "state"} <= wrong


ENCODER = {"file": "encoder.onnx", "start": START, "max_source": 24}


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        (None, "one without the other"),
        ({}, "'file'"),
        (ENCODER | {"file": "model.onnx"}, "not a further one"),
        (ENCODER | {"file": "../encoder.onnx"}, "not a further one"),
        (ENCODER | {"file": "model.onnx.data"}, "not named as a graph"),
        (ENCODER | {"file": 3}, "not named as a graph"),
        (ENCODER | {"start": []}, "1 to 16 tokens"),
        (ENCODER | {"start": [0] * 17}, "1 to 16 tokens"),
        (ENCODER | {"start": [VOCAB]}, f"token {VOCAB}, outside the vocabulary"),
        (ENCODER | {"start": [True]}, "token True"),
        (ENCODER | {"start": [-1]}, "token -1"),
        (ENCODER | {"start": "30"}, "begin with '30'"),
        (ENCODER | {"max_source": 0}, "at most 0 tokens"),
        (ENCODER | {"max_source": 2**40}, "tokens; of 1 to"),
        (ENCODER | {"max_source": 24.0}, "at most 24.0"),
        ([ENCODER], "is not a dict"),
    ],
)
def test_what_a_manifest_may_not_say_of_an_encoder(encoder: Any, words: str, tmp_path: Path) -> None:
    bundle = copied(t5_bundle(), tmp_path)
    edit_manifest(bundle, encoder=encoder)
    with pytest.raises(BundleError, match=words):
        Bundle(bundle)


def test_an_encoder_where_no_state_is_of_sources_is_refused(tmp_path: Path) -> None:
    bundle = copied(attention_bundle(), tmp_path)
    edit_manifest(bundle, encoder=ENCODER)
    with pytest.raises(BundleError, match="one without the other"):
        Bundle(bundle)


def test_an_encoders_graph_is_held_to_the_same_rules_as_any(tmp_path: Path) -> None:
    for change in ("swapped", "absent", "foreign"):
        bundle = copied(t5_bundle(), tmp_path / change)
        file = bundle / "encoder.onnx"
        if change == "swapped":
            shutil.copy(bundle / "model.onnx", file)
        elif change == "absent":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes().replace(b"model.onnx.data", b"model.onnx.dat_"))
        if change != "absent":
            sign(bundle, "encoder.onnx")
        with pytest.raises((BundleError, BackendError), match=r"encoder.onnx|of which the graph reads"):
            load(bundle, threads=1)


@pytest.mark.parametrize(
    ("shape", "update", "source"),
    [
        (("batch", "source", "source"), "static", None),
        (("batch", "source", "capacity"), "static", None),
        (("source",), "static", None),
        (("batch", "source"), "replace", None),
        (("batch", "source"), "append", None),
        (("batch", 4), "static", 3),
        (("batch", "source"), "static", 0),
        (("batch", "source"), "static", True),
    ],
)
def test_only_static_states_have_sources_and_once(shape: Any, update: Any, source: Any) -> None:
    with pytest.raises(SpecError):
        StateSpec("s", shape, "float32", update, source=source)
