"""Whatever is done with a state, its rows have read what they have read: on ONNX Runtime, over real bundles."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from state_fakes import APPENDED, REPLACED, STATIC, ExactBackend, exact_session, ring
from tiny_bundles import (
    CONTEXT,
    attention_bundle,
    device_session,
    half_bundle,
    memory_bundle,
    recurrent_bundle,
    window_bundle,
)

from edgellm_runtime import BackendError, ContextError, OptionError, StateError, StateSpec, load, open_session
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.session import Session
from edgellm_runtime.state import State

OWN = "attention over 16 bits, own kernels"
BUNDLES: dict[str, Callable[[], Path]] = {
    "attention": attention_bundle,
    "attention, standard operators": lambda: attention_bundle("onnx"),
    "recurrent": recurrent_bundle,
    "window": window_bundle,
    "window, standard operators": lambda: window_bundle("onnx"),
    "window, graphs of fixed sizes": lambda: window_bundle("tensorrt", "float32"),
    "memory": memory_bundle,
    "memory, graphs of fixed sizes": lambda: memory_bundle("tensorrt", "float32"),
    "attention over 16 bits": half_bundle,
    OWN: lambda: half_bundle("int8"),
}
BUNDLES |= {f"{name}, state on a device": bundle for name, bundle in BUNDLES.items() if "," not in name}
EXACT: dict[str, tuple[StateSpec, ...]] = {
    "a ring of its window": (ring(8, 8),),
    "a ring with room": (ring(16, 5),),
    "a ring of one token": (ring(1, 1),),
    "rings beside a cache": (APPENDED, ring(8, 3, "a"), ring(12, 12, "b")),
    "static": (STATIC, APPENDED),
    "static alone": (STATIC,),
    "no state": (),
    "all updates": (APPENDED, ring(8, 8), REPLACED, STATIC),
}
SESSIONS = [*BUNDLES, *EXACT]


@cache
def session_of(name: str) -> Session:
    if name in EXACT:
        return exact_session(*EXACT[name], max_context=CONTEXT)
    if name == OWN:
        pytest.importorskip("edgellm_kernels", reason="edgellm-kernels is not built; make kernels builds it")
    bundle = Bundle(BUNDLES[name]())
    if name == OWN:
        return open_session(bundle, device="cpu", threads=1, kernels="own")
    return device_session(bundle) if name.endswith("on a device") else open_session(bundle, device="cpu", threads=1)


def nearness(name: str) -> float:
    """How near to each other two ways of reading a row are, of the largest logit.

    ONNX Runtime's attention sees the tokens of one step in float32, and those of earlier ones as the cache has them.
    Our own kernels see all tokens so, and give the same bits however they come.
    """
    return 0.0 if name == OWN else 2e-3 if "16 bits" in name else 1e-4


def read(session: Session, row: list[int]) -> np.ndarray:
    """The last token's logits when a row is read at once."""
    return session.step(np.array([row]), session.new_state(1, len(row)))[0, 0].copy()


class Rows:
    """A state beside what its rows should have read."""

    def __init__(self, session: Session, rows: int, near: float = 1e-4) -> None:
        self.session, self.state, self.near = session, session.new_state(rows), near
        self.read: list[list[int]] = [[] for _ in range(rows)]
        self.held: list[dict[str, dict[int, int]]] = [{} for _ in range(rows)]  # which token each slot of a ring holds

    def write(self, row: int, tokens: list[int]) -> None:
        """What a step does to a row."""
        for spec in self.session.signature.state:
            if spec.update == "ring":
                slots = spec.resolve(1, 1)[spec.axis or 0]
                for position in range(len(self.read[row]), len(self.read[row]) + len(tokens)):
                    self.held[row].setdefault(spec.name, {})[position % slots] = position
        self.read[row] = self.read[row] + tokens

    def holds(self, row: int, length: int) -> bool:
        """Whether the states still have what a row was when it had that length."""
        for spec in self.session.signature.state:
            if spec.update == "replace" and 0 < length < len(self.read[row]):
                return False
            if spec.update == "ring" and length:
                slots, held = spec.resolve(1, 1)[spec.axis or 0], self.held[row].get(spec.name, {})
                visible = range(max(0, length + 1 - (spec.window or 0)), length)  # beside the next token itself
                if any(held.get(position % slots) != position for position in visible):
                    return False
        return True

    def step(self, data: st.DataObject) -> None:
        room = CONTEXT - max(map(len, self.read))
        if room < 1:
            return
        most = min(room, data.draw(st.sampled_from([9, 9, 30])))
        lengths = data.draw(st.lists(st.integers(1, most), min_size=len(self.read), max_size=len(self.read)))
        width = max(lengths) + data.draw(st.integers(0, 2))  # columns of nothing but padding too
        tokens = np.array(
            data.draw(st.lists(
                st.lists(st.integers(0, self.session.vocab_size - 1), min_size=width, max_size=width),
                min_size=len(lengths), max_size=len(lengths),
            ))
        )  # fmt: skip
        logits = self.session.step(tokens, self.state, lengths=np.array(lengths)).copy()
        for i, n in enumerate(lengths):
            self.write(i, tokens[i, :n].tolist())
            close(logits[i, 0], read(self.session, self.read[i]), self.near)

    def check(self) -> None:
        """The state says of each row how many tokens it holds, and how far it goes back."""
        assert self.state.lengths.tolist() == [len(row) for row in self.read]
        for row, earliest in enumerate(self.state.earliest.tolist()):
            lengths = range(1, len(self.read[row]) + 1)
            assert [self.holds(row, n) for n in lengths] == [n >= earliest for n in lengths]

    def take(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, len(self.read) - 1), min_size=1, max_size=3))
        self.state, self.read = self.state.take(rows), [self.read[row] for row in rows]
        self.held = [{name: dict(slots) for name, slots in self.held[row].items()} for row in rows]

    def fork(self, data: st.DataObject) -> None:
        """Go on with the copy; what it does must not show in the original, nor the other way round."""
        other = self.state.fork()
        tokens = np.zeros((len(self.read), 1), dtype=np.int64)
        if max(map(len, self.read)) < CONTEXT:
            self.session.step(tokens, self.state)
        self.state = other

    def rewind(self, data: st.DataObject) -> None:
        near = [st.integers(max(0, len(row) - 12), len(row)) for row in self.read]
        lengths = [
            data.draw(st.one_of(st.just(0), st.integers(0, len(r)), n)) for r, n in zip(self.read, near, strict=True)
        ]
        before = self.state.lengths.tolist()
        if not all(self.holds(row, n) for row, n in enumerate(lengths)):
            with pytest.raises(StateError, match=r"cannot be rewound.* fork\(\)"):
                self.state.rewind(lengths)
            assert self.state.lengths.tolist() == before
            return
        self.state.rewind(lengths)
        self.read = [row[:n] for row, n in zip(self.read, lengths, strict=True)]
        self.held = [held if n else {} for held, n in zip(self.held, lengths, strict=True)]

    def put(self, data: st.DataObject) -> None:
        row, source = (data.draw(st.integers(0, len(self.read) - 1)) for _ in range(2))
        self.state.put(row, self.state.take([source]))
        self.read[row], self.held[row] = self.read[source], {n: dict(s) for n, s in self.held[source].items()}

    def save_and_load(self, data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.state.save(Path(folder) / "state")
            self.state = State.load(Path(folder) / "state", self.session.signature.state, self.session.storage)


def close(found: np.ndarray, expected: np.ndarray, near: float = 1e-4) -> None:
    np.testing.assert_allclose(found, expected, rtol=near, atol=near * float(np.abs(expected).max()))


@pytest.mark.parametrize("name", SESSIONS)
def test_any_life_of_a_state_gives_the_logits_of_reading_at_once(name: str) -> None:
    session = session_of(name)

    @settings(max_examples=40, deadline=None)
    @given(data=st.data(), rows=st.integers(1, 3))
    def check(data: st.DataObject, rows: int) -> None:
        life = Rows(session, rows, nearness(name))
        life.step(data)
        life.check()
        actions = [Rows.step, Rows.step, Rows.take, Rows.fork, Rows.rewind, Rows.put, Rows.save_and_load]
        for act in data.draw(st.lists(st.sampled_from(actions), max_size=6)):
            act(life, data)
            life.check()
        life.step(data)

    check()


@pytest.mark.parametrize("name", SESSIONS)
def test_long_prompt_in_many_chunks_equals_one(name: str) -> None:
    session, near = session_of(name), nearness(name)
    row = np.random.default_rng(3).integers(0, session.vocab_size, CONTEXT)
    whole = session.step(row[None], session.new_state(), logits="all").copy()
    before, session.chunk = session.chunk, 7
    try:
        close(session.step(row[None], session.new_state(), logits="all"), whole, near)
        close(session.step(row[None], session.new_state())[0, 0], whole[0, -1], near)
        two = np.stack([row, row[::-1]])
        lengths = np.array([CONTEXT, 30])
        close(session.step(two, session.new_state(2), lengths=lengths)[0, 0], whole[0, -1], near)
    finally:
        session.chunk = before


@pytest.mark.parametrize("name", SESSIONS)
def test_full_context_is_refused_and_changes_nothing(name: str) -> None:
    session = session_of(name)
    state = session.new_state()
    session.step(np.ones((1, CONTEXT - 1), dtype=np.int64), state)
    with pytest.raises(ContextError, match=f"{CONTEXT + 1} tokens do not fit into the model's context of {CONTEXT}"):
        session.step(np.ones((1, 2), dtype=np.int64), state)
    last = session.step(np.ones((1, 1), dtype=np.int64), state)[0, 0]
    close(last, read(session, [1] * CONTEXT), nearness(name))


@pytest.mark.parametrize(
    ("tokens", "lengths", "error", "message"),
    [
        ([[-1]], None, OptionError, "token -1 is outside the vocabulary of 61"),
        ([[0, 61]], None, OptionError, "token 61 is outside the vocabulary of 61; use the bundle's tokenizer"),
        ([[]], None, OptionError, "at least one of each"),
        ([1], None, OptionError, "must be \\(rows, tokens\\)"),
        ([[1], [1]], None, StateError, "tokens for 2 rows, but the state has 1"),
        ([[1, 1]], [0], OptionError, "each must be 1 to 2"),
        ([[1, 1]], [3], OptionError, "each must be 1 to 2"),
        ([[1, 1]], [1, 1], OptionError, "for 1 rows"),
        ([[0.5]], None, OptionError, "whole numbers"),
        ([["a"]], None, OptionError, "whole numbers"),
        ([[2**70]], None, OptionError, "whole numbers"),
        ([[1], [1, 2]], None, OptionError, "whole numbers"),
    ],
)
def test_impossible_step_is_an_error_and_changes_nothing(tokens, lengths, error, message) -> None:  # type: ignore[no-untyped-def]
    session = session_of("recurrent")
    state = session.new_state()
    with pytest.raises(error, match=message):
        session.step(tokens, state, lengths=lengths)
    assert state.lengths.tolist() == [0]


@pytest.mark.parametrize("lengths", [-1, 4, [1, 1]])
def test_impossible_rewind_is_an_error(lengths: int | list[int]) -> None:
    session = session_of("attention")
    state = session.new_state()
    session.step(np.ones((1, 3), dtype=np.int64), state)
    with pytest.raises(StateError, match="cannot rewind"):
        state.rewind(lengths)
    assert state.lengths.tolist() == [3]


def test_an_overwritten_ring_says_how_far_it_goes_back_and_what_to_do() -> None:
    session = exact_session(ring(8, 5, "window.k"), max_context=CONTEXT)
    state = session.new_state(2)
    session.step(np.ones((2, 20), dtype=np.int64), state, lengths=np.array([20, 8]))
    assert state.earliest.tolist() == [20 - 8 + 5 - 1, 0]
    with pytest.raises(
        StateError,
        match=r"row 0 of 20 tokens cannot be rewound to 15: window.k, a ring, has overwritten .* goes back to 16; "
        r"rewind to 0 and read the row again, or fork\(\)",
    ):
        state.rewind([15, 8])
    assert state.lengths.tolist() == [20, 8]
    state.rewind([16, 1])
    state.rewind([0, 1])
    assert state.earliest.tolist() == [0, 0]


def test_a_conversation_over_a_window_answers_as_a_fresh_one_and_an_edited_one_is_read_from_where_they_part() -> None:
    model = load(window_bundle(), device="cpu", threads=1)
    conversation = model.conversation()
    for said in ("Hello", "And then?", "Why?"):
        answer = conversation.say(said, max_new_tokens=3, ignore_eos=True)
        fresh = model.chat(conversation.messages[:-1], max_new_tokens=3, ignore_eos=True)
        assert answer.tokens == fresh.tokens
    assert conversation.reused_tokens > 12, "what goes on from the state is not read again, though the ring is full"
    conversation.edit([{"role": "user", "content": "Good bye"}, *conversation.messages[1:]])
    answer = conversation.say("What?", max_new_tokens=3, ignore_eos=True)
    assert conversation.reused_tokens == 0, "they part before the first snapshot, and the ring has lost what was there"
    assert answer.tokens == model.chat(conversation.messages[:-1], max_new_tokens=3, ignore_eos=True).tokens


def test_a_static_state_is_what_the_first_token_made_of_it_however_long_the_row() -> None:
    session = session_of("memory")
    one, other = session.new_state(2), session.new_state(1)
    session.step(np.array([[5], [9]]), one)
    made = {name: one.read(name).copy() for name in ("memory.k", "memory.v")}
    assert all(np.abs(rows[0] - rows[1]).max() > 0.1 for rows in made.values())
    session.step(np.array([[5, *[7] * 30]]), other)
    for state in (one.take([0]), other):
        session.step(np.full((1, 20), 8), state)
        state.rewind(3 if state.lengths[0] > 25 else 1)
        for name, rows in made.items():
            np.testing.assert_allclose(state.read(name)[0], rows[0], atol=1e-6)
    one.rewind([0, 1])
    session.step(np.array([[9], [1]]), one)
    for name, rows in made.items():
        np.testing.assert_allclose(one.read(name), rows[[1, 1]], atol=1e-6)


def test_a_state_that_a_backend_cannot_keep_is_refused_by_name() -> None:
    class Plain(ExactBackend):
        updates = ("append", "replace")

    exact_session(APPENDED, REPLACED, max_context=8, backend=Plain)
    with pytest.raises(
        BackendError, match=r"cpu keeps no state of update 'ring', which last is; .*test_bundle_state.py"
    ):
        exact_session(APPENDED, ring(4, 4), max_context=8, backend=Plain)
    with pytest.raises(BackendError, match=r"no state of update 'static', which first is"):
        exact_session(STATIC, max_context=8, backend=Plain)


@pytest.mark.parametrize("written", [np.array([2], np.int32), np.array([9, 9], np.int32), np.array([9]), None])
def test_a_saved_ring_without_what_it_was_written_with_is_an_error(written: np.ndarray | None, tmp_path: Path) -> None:
    session = exact_session(ring(4, 3), max_context=CONTEXT)
    state = session.new_state()
    session.step(np.ones((1, 9), dtype=np.int64), state)
    state.save(tmp_path / "s")
    with np.load(tmp_path / "s") as data:
        arrays = {name: data[name] for name in data.files if name != "__written__"}
    with (tmp_path / "s").open("wb") as file:
        np.savez(file, **arrays, **({} if written is None else {"__written__": written}))
    with pytest.raises(StateError, match="read the prompt again"):
        State.load(tmp_path / "s", session.signature.state)


@pytest.mark.parametrize("rows", [[], [1], [-1]])
def test_taking_rows_that_are_not_there_is_an_error(rows: list[int]) -> None:
    with pytest.raises(StateError, match="of a state of 1 rows"):
        session_of("attention").new_state().take(rows)


def test_state_too_large_for_memory_is_an_error_with_its_size() -> None:
    spec = StateSpec("k", ("batch", 2**30, "capacity", 2**30), "float32", "append")
    with pytest.raises(StateError, match=r"k for 1 rows of 4 tokens, \d+\.\d GB of float32"):
        State([spec], 1, 4)


def test_state_that_cannot_grow_stays_what_it_was() -> None:
    state = session_of("attention").new_state()
    state.lengths[:] = 1
    with pytest.raises(StateError, match="ask for fewer"):
        state.reserve(2**50)
    assert state.capacity == next(iter(state.tensors.values())).shape[2]


def saved() -> bytes:
    session = session_of("recurrent")
    state = session.new_state()
    session.step(np.ones((1, 3), dtype=np.int64), state)
    with tempfile.TemporaryDirectory() as folder:
        state.save(Path(folder) / "state.npz")
        return (Path(folder) / "state.npz").read_bytes()


def test_state_of_another_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(saved())
    with pytest.raises(StateError, match="the state of another model; read the prompt again"):
        State.load(tmp_path / "s", session_of("attention").signature.state)


def test_missing_state_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="not a saved state"):
        State.load(tmp_path / "nothing", session_of("attention").signature.state)


def repacked(**changes: object) -> bytes:
    with np.load(io.BytesIO(saved())) as data:
        arrays = {name: data[name] for name in data.files}
    file = io.BytesIO()
    np.savez(file, **{**arrays, **changes})  # type: ignore[arg-type]
    return file.getvalue()


@pytest.mark.parametrize(
    "changes",
    [
        {"__lengths__": np.array([-1], dtype=np.int32)},
        {"__lengths__": np.array([], dtype=np.int32)},
        {"__lengths__": np.array(3, dtype=np.int32)},
        {"__lengths__": np.array([0.5])},
        {"__lengths__": np.array([3, 3], dtype=np.int32)},
        {"__header__": np.array("[]")},
        {"__header__": np.array(json.dumps({"format": 2, "specs": []}))},
        {"blocks.0.h": np.zeros((1, 5), dtype=np.float32)},
        {"blocks.0.h": np.zeros((1, 32), dtype=np.complex64)},
        {"blocks.0.h": np.array([object()])},
    ],
)
def test_wrong_saved_state_is_an_error(changes: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(repacked(**changes))
    with pytest.raises(StateError):
        State.load(tmp_path / "s", session_of("recurrent").signature.state)


def test_damaged_saved_state_is_an_error(tmp_path: Path) -> None:
    data, specs = saved(), session_of("recurrent").signature.state

    @settings(max_examples=60, deadline=None)
    @given(cut=st.integers(0, len(data)), at=st.integers(0, len(data) - 1), bit=st.integers(0, 7))
    def check(cut: int, at: int, bit: int) -> None:
        spoiled = bytearray(data)
        spoiled[at] ^= 1 << bit
        (tmp_path / "s").write_bytes(spoiled[:cut])
        with suppress(StateError):  # a flipped bit in a name or a date may do no harm
            State.load(tmp_path / "s", specs)

    check()


@pytest.mark.parametrize("room", [1, 64, 65, 300])
def test_a_fork_with_room_is_the_state_with_room_and_goes_its_own_way(room: int, tmp_path: Path) -> None:
    specs = [
        StateSpec("kv", ("batch", 2, "capacity", 3), "float32", "append"),
        StateSpec("h", ("batch", 4), "float32", "replace"),
    ]
    state, rng = State(specs, 2, 70), np.random.default_rng(0)
    for each in (state.tensors, state.spares):
        for array in each.values():
            array[...] = rng.standard_normal(array.shape)
    state.lengths[:] = (70, 66)
    state.save(tmp_path / "state")
    loaded = State.load(tmp_path / "state", specs)
    for one in (state, loaded):
        fork = one.fork(room)
        assert fork.capacity >= max(room, 70) and fork.lengths.tolist() == [70, 66]
        assert np.array_equal(fork.tensors["kv"][:, :, :70], state.tensors["kv"][:, :, :70])
        assert np.array_equal(fork.tensors["h"], state.tensors["h"])
        for name in ("kv", "h"):
            assert not np.shares_memory(fork.tensors[name], one.tensors[name])
        assert not np.shares_memory(fork.spares["h"], one.spares["h"])
        fork.lengths[0] = 3
        assert one.lengths[0] == 70
