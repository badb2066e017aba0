"""A text is rewound to any length, from snapshots of bounded memory, and goes on from there as a fresh one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import VOCAB
from family_bundles import model_of
from hypothesis import given, settings
from hypothesis import strategies as st
from state_fakes import APPENDED, REPLACED, STATIC, exact_session, ring
from state_fakes import VOCAB as EXACT

from edgellm_runtime import StateError
from edgellm_runtime.generation import trail as module
from edgellm_runtime.generation.trail import Trail, read_text

KINDS = ["attention", "local", "lstm", "gru", "short convolutions and attention", "state space", "mixed", "memory"]
CARRIED = [(REPLACED,), (ring(8, 8),), (ring(12, 8),), (APPENDED, REPLACED, ring(8, 5, "near"), STATIC), (APPENDED,)]


@pytest.fixture(autouse=True)
def _close_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 4)
    monkeypatch.setattr(module, "EVERY", 8)


def counted(session: Any, tokens: list[int]) -> Any:
    """Tokens that a session's backend reads from now on are added up in the list."""
    run = session._backend.run

    def noted(given: Any, *rest: Any) -> Any:
        tokens.append(given.shape[1])
        return run(given, *rest)

    session._backend.run = noted
    return functools.partial(session._backend.__dict__.pop, "run")


@pytest.mark.parametrize("specs", CARRIED, ids=lambda specs: "+".join(s.name for s in specs))
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_reading_and_rewinding_in_any_order_leaves_a_fresh_row(specs: tuple[Any, ...], data: st.DataObject) -> None:
    session = exact_session(*specs, max_context=400)
    state, trail, held = session.new_state(), Trail(specs, data.draw(st.integers(1, 4))), list[int]()
    for _ in range(data.draw(st.integers(1, 6))):
        more = data.draw(st.lists(st.integers(0, EXACT - 1), min_size=1, max_size=40))
        if data.draw(st.booleans()):
            read_text(session, more, state, trail)
        else:
            for token in more:
                session.step(np.array([[token]]), state)
                trail.note(state)
        held += more
        assert len(trail.lengths) <= 4 and list(trail.lengths) == sorted(trail.lengths)
        wanted = data.draw(st.integers(0, len(held)))
        left = trail.rewind(state, wanted)
        assert left <= wanted and (left == wanted or specs != (APPENDED,))
        held = held[:left]
        last = data.draw(st.integers(0, EXACT - 1))
        found = session.step(np.array([[last]]), state)
        held.append(last)
        assert np.array_equal(found, session.step(np.array([held]), session.new_state()))


def test_a_snapshot_is_what_the_row_was_and_only_of_what_steps_overwrite() -> None:
    session = exact_session(APPENDED, REPLACED, ring(8, 5), STATIC, max_context=100)
    state = session.new_state(capacity=64)
    session.step(np.array([list(range(20))]), state)
    snapshot = state.snapshot()
    assert snapshot.arrays.keys() == {"hash", "last"} and snapshot.length == 20
    assert snapshot.nbytes == REPLACED.nbytes(1, 64) + ring(8, 5).nbytes(1, 64)
    expected = session.step(np.array([[5]]), state.fork())
    session.step(np.array([list(range(30))]), state)
    state.restore(snapshot)
    assert state.lengths.tolist() == [20] and np.array_equal(session.step(np.array([[5]]), state), expected)


def test_a_snapshot_of_something_else_is_refused() -> None:
    session, other = exact_session(REPLACED, max_context=100), exact_session(APPENDED, max_context=100)
    state = session.new_state()
    session.step(np.array([[1, 2, 3]]), state)
    snapshot = state.snapshot()
    with pytest.raises(StateError, match="the snapshot is not of this state"):
        other.new_state().restore(snapshot)
    with pytest.raises(StateError, match="cannot go back to 3 tokens in a row of 0"):
        session.new_state().restore(snapshot)
    with pytest.raises(StateError, match="cannot take a snapshot of 2 rows; name"):
        session.new_state(2).snapshot()


@settings(max_examples=30, deadline=None)
@given(most=st.integers(1, 6), length=st.integers(1, 600))
def test_snapshots_are_bounded_and_lie_evenly(most: int, length: int) -> None:
    session = exact_session(REPLACED, max_context=1000)
    state, trail = session.new_state(), Trail((REPLACED,), most)
    read_text(session, [1] * length, state, trail)
    assert len(trail.lengths) <= most and trail.nbytes == len(trail.lengths) * REPLACED.nbytes(1, 1)
    gaps = np.diff([0, *trail.lengths, length])
    assert gaps[-1] <= 4  # the last snapshot is at the last multiple of a block
    assert most < 3 or max(gaps) <= max(8, 3 * length / most + 8)


def test_a_model_that_only_appends_has_no_snapshots() -> None:
    session = exact_session(APPENDED, STATIC, max_context=100)
    state, trail = session.new_state(), Trail(session.signature.state)
    steps: list[int] = []
    restored = counted(session, steps)
    read_text(session, list(range(50)), state, trail)
    trail.mark(state)
    restored()
    assert steps == [50] and trail.lengths == () and not trail.on


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5, deadline=None)
@given(data=st.data(), prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30))
def test_a_text_rewound_anywhere_goes_on_as_a_fresh_one(kind: str, data: st.DataObject, prompt: list[int]) -> None:
    model = model_of(kind)
    state = model.generate(prompt, max_new_tokens=14, state=model.new_state()).state
    assert state is not None
    fork, before = state.fork(), state.tokens
    keep = data.draw(st.integers(0, len(state)))
    state.rewind(keep)
    answer = model.generate([7], max_new_tokens=3, state=state)
    assert answer.tokens == model.generate([*before[:keep], 7], max_new_tokens=3).tokens
    state.rewind(min(keep, 1))  # the fork's snapshots are its own
    fork.rewind(max(len(fork) - 5, 1))
    left = before[: max(len(before) - 5, 1)]
    assert (
        model.generate([7], max_new_tokens=3, state=fork).tokens == model.generate([*left, 7], max_new_tokens=3).tokens
    )


def test_a_rewind_reads_again_less_than_lies_between_two_snapshots() -> None:
    model = model_of("lstm")
    state = model.read(list(range(50)))
    assert state.nbytes > model.new_state().nbytes
    state.rewind(45)
    steps: list[int] = []
    restored = counted(model.session, steps)
    answer = model.generate([7], max_new_tokens=1, state=state)
    restored()
    assert sum(steps) <= 8
    assert answer.tokens == model.generate([*range(45), 7], max_new_tokens=1).tokens


def test_snapshots_are_saved_with_a_text_and_spoiled_ones_are_refused(tmp_path: Path) -> None:
    model = model_of("lstm")
    model.read(list(range(50))).save(tmp_path / "text.state")
    state = model.load_state(tmp_path / "text.state")
    assert state.trail().lengths == model.read(list(range(50))).trail().lengths != ()
    state.rewind(45)
    assert state.read_tokens == 40
    assert (
        model.generate([7], max_new_tokens=5, state=state).tokens
        == model.generate([*range(45), 7], max_new_tokens=5).tokens
    )
    with np.load(tmp_path / "text.state") as arrays:
        whole = {name: arrays[name] for name in arrays.files}
    lengths = whole["__snapshots__"]
    name = next(n for n in whole if n.startswith("__snapshot__."))
    for change in (
        {"__snapshots__": lengths.astype(np.int64)}, {"__snapshots__": lengths[::-1]}, {"__snapshots__": lengths + 50},
        {"__snapshots__": lengths[:1]}, {name: whole[name][..., :1]}, {name: whole[name].astype(np.float64)},
    ):  # fmt: skip
        with (tmp_path / "spoiled").open("wb") as file:
            np.savez(file, **whole | change)
        with pytest.raises(StateError, match="its snapshots are damaged"):
            model.load_state(tmp_path / "spoiled")
    del whole[name]
    with (tmp_path / "spoiled").open("wb") as file:
        np.savez(file, **whole)
    with pytest.raises(StateError, match="its snapshots are damaged"):
        model.load_state(tmp_path / "spoiled")
