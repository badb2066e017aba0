"""A text's state is a value: going on from it is what one go gives, for every kind of carried state."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from families import CONTEXT, VOCAB, make
from family_bundles import model_of
from generation_fakes import fake_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundles import attention_bundle, half_bundle, recurrent_bundle, window_bundle

from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import ContextError, OptionError, StateError, load
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.generation.text_state import TextState
from edgellm_runtime.model import Model

KINDS = ["attention", "local", "lstm", "memory", "short convolutions and attention", "state space", "mixed"]
REWOUND = ["attention", "memory"]  # to any length
texts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None)
@given(prompt=texts, more=texts, first=st.integers(0, 10), then=st.integers(1, 10))
def test_going_on_is_what_one_go_gives(kind: str, prompt: list[int], more: list[int], first: int, then: int) -> None:
    model = model_of(kind)
    whole = model.generate(prompt, max_new_tokens=first + then)
    begun = model.generate(prompt, max_new_tokens=first, state=model.new_state())
    assert begun.state is not None and begun.state.tokens == (*prompt, *begun.tokens)
    assert begun.state.read_tokens == (len(begun.state) - 1 if first else 0)
    rest = model.generate([], max_new_tokens=then, state=begun.state)
    assert begun.tokens + rest.tokens == whole.tokens
    asked = model.generate(more, max_new_tokens=then, state=begun.state)  # which the answer before left as it was
    assert asked.tokens == model.generate([*prompt, *begun.tokens, *more], max_new_tokens=then).tokens


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5, deadline=None)
@given(prompt=texts, left=texts, right=texts)
def test_a_fork_goes_its_own_way(kind: str, prompt: list[int], left: list[int], right: list[int]) -> None:
    model = model_of(kind)
    state = model.read(prompt)
    fork = state.fork()
    a = model.generate(left, state=state, max_new_tokens=4)
    b = model.generate(right, state=fork, max_new_tokens=4)
    fork.rewind(0)
    assert model.generate(left, state=state, max_new_tokens=4).tokens == a.tokens
    assert a.tokens == model.generate([*prompt, *left], max_new_tokens=4).tokens
    assert b.tokens == model.generate([*prompt, *right], max_new_tokens=4).tokens


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5, deadline=None)
@given(prompt=texts, more=st.integers(1, 16))
def test_a_saved_state_is_the_state(kind: str, prompt: list[int], more: int) -> None:
    model = model_of(kind)
    state = model.generate(prompt, max_new_tokens=more, state=model.new_state()).state
    assert state is not None
    with tempfile.TemporaryDirectory() as folder:
        state.save(Path(folder, "text.state"))
        again = model.load_state(Path(folder, "text.state"))
    assert (again.tokens, again.read_tokens, again.answer_from) == (state.tokens, state.read_tokens, len(prompt))
    assert np.array_equal(next_logits(model, again), next_logits(model, state))


def next_logits(model: Model, state: TextState) -> np.ndarray:
    tokens = state.resumed(model.session, len(state))
    return model.session.step(np.array([state.tokens[state.read_tokens :]]), tokens).copy()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None)
@given(data=st.data(), prompt=texts)
def test_a_rewound_text_is_a_shorter_text(kind: str, data: st.DataObject, prompt: list[int]) -> None:
    model = model_of(kind)
    state = model.generate(prompt, max_new_tokens=14, state=model.new_state()).state
    assert state is not None
    keep = data.draw(st.integers(0, len(state)))
    before = state.tokens
    direct = keep >= state.earliest
    state.rewind(keep)
    assert state.tokens == before[:keep]
    assert not direct or state.read_tokens == max(keep - 1, 0)
    assert direct or keep < 2 or kind not in REWOUND
    answer = model.generate([7], max_new_tokens=3, state=state)
    assert answer.tokens == model.generate([*before[:keep], 7], max_new_tokens=3).tokens


CHILD = """
import json, sys
import numpy as np
from edgellm_runtime import load
model = load(sys.argv[1], threads=1)
state = model.load_state(sys.argv[2])
kept = state.resumed(model.session, len(state))
logits = model.session.step(np.array([state.tokens[state.read_tokens:]]), kept)
print(json.dumps([logits.tobytes().hex(), model.generate([], state=state, max_new_tokens=8).tokens]))
"""


@pytest.mark.parametrize("bundle", [attention_bundle, half_bundle, window_bundle, recurrent_bundle])
def test_another_process_goes_on_bit_by_bit(bundle, tmp_path: Path) -> None:
    model = load(bundle(), threads=1)
    state = model.generate([5, 6, 7, 8], max_new_tokens=20, ignore_eos=True, state=model.new_state()).state
    assert state is not None
    state.save(tmp_path / "text.state")
    command = [sys.executable, "-c", CHILD, str(bundle()), str(tmp_path / "text.state")]
    found, tokens = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert bytes.fromhex(found) == next_logits(model, state).tobytes()
    assert tuple(tokens) == model.generate([], state=state, max_new_tokens=8).tokens


def test_other_models_and_versions_are_refused_by_name(tmp_path: Path) -> None:
    attention, file = model_of("attention"), tmp_path / "text.state"
    attention.read([1, 2, 3]).save(file)
    export(make("attention", seed=1), tmp_path / "newer", options=ExportOptions(target="onnx"))
    newer = load(tmp_path / "newer", threads=1)
    with pytest.raises(StateError, match=r"the state of '.+', another model or another version of it than"):
        newer.load_state(file)
    with pytest.raises(StateError, match="another model or another version"):
        newer.generate([1], state=attention.read([1, 2]))
    with pytest.raises(StateError, match="the state of another model"):
        model_of("lstm").load_state(file)
    attention.session.new_state().save(file)
    with pytest.raises(StateError, match=r"a state without its text, of State\.save"):
        attention.load_state(file)


def test_a_damaged_file_is_refused_or_says_the_same(tmp_path: Path) -> None:
    model, file = model_of("mixed"), tmp_path / "text.state"
    state = model.read([1, 2, 3, 4])
    state.save(file)
    data, expected = file.read_bytes(), next_logits(model, state)
    rng = np.random.default_rng(0)
    refused = 0
    for at in rng.choice(len(data), 150, replace=False):
        file.write_bytes(data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :])
        try:
            again = model.load_state(file)
        except StateError:
            refused += 1
        else:
            assert again.tokens == state.tokens and np.array_equal(next_logits(model, again), expected)
    assert refused > 100
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(StateError, match="not a saved state"):
        model.load_state(file)


@pytest.mark.parametrize(
    "change", [{"tokens": None}, {"tokens": [1]}, {"tokens": [1] * 99}, {"tokens": [1, 2, 3, 10**6]},
               {"tokens": [1.5] * 4}, {"answer_from": 9}, {"answer_from": "0"}],
)  # fmt: skip
def test_a_text_that_cannot_be_the_states_is_refused(change: dict, tmp_path: Path) -> None:
    model, file = model_of("attention"), tmp_path / "text.state"
    about = {"bundle": "x", "fingerprint": model.bundle.fingerprint, "tokens": [1, 2, 3, 4], "answer_from": 4}
    kept = model.session.new_state()
    model.session.step(np.array([[1, 2, 3]]), kept)
    kept.save(file, about=about)
    assert model.load_state(file).tokens == (1, 2, 3, 4)
    kept.save(file, about=about | change)
    with pytest.raises(StateError, match="its text is damaged"):
        model.load_state(file)


def test_text_goes_on_across_the_border(tmp_path: Path) -> None:
    model = fake_model(tmp_path, bos=0, max_context=200)
    whole = model.generate("hello", max_new_tokens=20, ignore_eos=True)
    begun = model.generate("hello", max_new_tokens=7, ignore_eos=True, state=model.new_state())
    read = model.session.read
    rest = model.generate("", max_new_tokens=13, ignore_eos=True, state=begun.state)
    assert model.session.read == read + 13  # nothing a second time
    assert begun.text + rest.text == whole.text
    assert rest.state.tokens == (0, *model.tokenizer.encode("hello"), *whole.tokens)
    asked = model.generate(" world", max_new_tokens=1, state=begun.state)
    assert asked.state.tokens[len(begun.state) : -1] == tuple(model.tokenizer.encode(" world"))  # no second bos
    assert model.generate("hello").state is None


def test_penalties_count_what_the_state_holds(tmp_path: Path) -> None:
    model = fake_model(tmp_path, max_context=200)
    options = {"repetition_penalty": 3.0, "ignore_eos": True}
    whole = model.generate("hello", max_new_tokens=30, **options).tokens
    begun = model.generate("hello", max_new_tokens=12, state=model.new_state(), **options)
    assert begun.tokens + model.generate("", max_new_tokens=18, state=begun.state, **options).tokens == whole


def test_many_answers_to_one_prompt_are_those_of_their_seeds_and_the_prompt_is_read_once() -> None:
    model = model_of("mixed")
    options = {"temperature": 1.0, "max_new_tokens": 6}
    answers = model.generate([1, 2, 3], n=3, seed=5, state=model.new_state(), **options)
    assert [a.tokens for a in answers] == [model.generate([1, 2, 3], seed=5 + i, **options).tokens for i in range(3)]
    for answer in answers:
        assert answer.state.tokens == (1, 2, 3, *answer.tokens)
        on = model.generate([4], state=answer.state, max_new_tokens=3)
        assert on.tokens == model.generate([1, 2, 3, *answer.tokens, 4], max_new_tokens=3).tokens
    rows = model.generate([[1, 2, 3]] * 3, seed=[7, 5, 6], **options)
    assert [r.tokens for r in rows] == [model.generate([1, 2, 3], seed=s, **options).tokens for s in (7, 5, 6)]
    with pytest.raises(OptionError, match="seed has 2 numbers for 3 rows; give one, or one for each"):
        model.generate([[1], [2], [3]], temperature=1, seed=[1, 2])
    with pytest.raises(OptionError, match="a state goes with one prompt, but there is a list of 2"):
        model.generate([[1], [2]], state=model.new_state())


def test_answers_that_end_at_different_times_keep_their_own_states(tmp_path: Path) -> None:
    model = fake_model(tmp_path, max_context=200, eos=tuple(range(2, 200)))
    answers = model.generate("hello", n=6, seed=1, temperature=1.5, max_new_tokens=12, state=model.new_state())
    assert len({len(a.tokens) for a in answers}) > 1
    for a in answers:
        assert a.state.resumed(model.session, 1).read("k")[0, : a.state.read_tokens].tolist() == list(
            a.state.tokens[:-1]
        )


def test_a_stream_that_is_left_has_its_state(tmp_path: Path) -> None:
    model = fake_model(tmp_path, max_context=200)
    whole = model.generate("hello", max_new_tokens=9, ignore_eos=True).tokens
    with model.stream("hello", max_new_tokens=9, ignore_eos=True, state=model.new_state()) as stream:
        for _ in range(4):
            next(stream)
        assert repr(stream) == "<Stream, open>"
    assert repr(stream) == "<Stream, cancelled>" and stream.generation.tokens == whole[:4]
    rest = model.generate("", max_new_tokens=5, ignore_eos=True, state=stream.generation.state)
    assert stream.generation.tokens + rest.tokens == whole


def test_another_thread_cancels_a_stream_between_tokens(tmp_path: Path) -> None:
    model = fake_model(tmp_path, max_context=200)
    stream = model.stream("hello", max_new_tokens=100, ignore_eos=True)
    chunks = [next(stream) for _ in range(3)]
    thread = threading.Thread(target=stream.cancel)
    thread.start()
    thread.join()
    chunks += stream
    assert len(chunks) == 4
    assert chunks[-1].finish_reason == stream.generation.finish_reason == "cancelled"
    assert stream.generation.text == "".join(c.text for c in chunks)


def test_cancelling_ends_a_long_prompt_between_its_pieces() -> None:
    model = model_of("attention")
    session = model.session
    chunk, session.chunk = session.chunk, 8
    try:
        stream = model.stream(list(range(40)), state=model.new_state())
        steps, run = [], session._backend.run

        def counted(tokens, *rest):
            steps.append(tokens.shape[1])
            if len(steps) == 2:
                stream.cancel()
            return run(tokens, *rest)

        session._backend.run = counted
        (last,) = stream
        del session._backend.run
    finally:
        session.chunk = chunk
    assert steps == [8, 8] and last.finish_reason == "cancelled" and stream.generation.tokens == ()
    state = stream.generation.state
    assert state.read_tokens == 16 and len(state) == 40
    assert (
        model.generate([], state=state, max_new_tokens=5).tokens
        == model.generate(list(range(40)), max_new_tokens=5).tokens
    )


def test_the_context_is_that_of_the_whole_text() -> None:
    model = model_of("attention")
    state = model.read(list(range(CONTEXT - 2)))
    assert model.generate([1], state=state).finish_reason == "length"
    with pytest.raises(ContextError, match="the prompt, with the text before it, has 65 tokens"):
        model.generate([1, 2, 3], state=state)


def test_reprs_name_what_they_are() -> None:
    model = model_of("attention")
    assert repr(model).startswith("<Model ") and "on cpu, context 64" in repr(model)
    assert "3 tokens" in repr(model.read([1, 2, 3])) and repr(model.new_state()).endswith("0 tokens, 0 bytes>")


def test_a_manifest_with_numbers_that_are_none_has_a_fingerprint(tmp_path: Path) -> None:
    shutil.copytree(recurrent_bundle(), tmp_path / "bundle")
    file = tmp_path / "bundle" / "manifest.json"
    file.write_text(file.read_text().replace('"quantization": {', '"quantization": {"x": NaN, ', 1))
    assert "NaN" in file.read_text()
    found = Bundle(tmp_path / "bundle").fingerprint
    assert len(found) == 64 and found != Bundle(recurrent_bundle()).fingerprint
