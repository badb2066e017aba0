"""Large saved states: pages of the file that are had as memory, and never written to."""

from __future__ import annotations

import gc
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_runtime import StateError
from edgellm_runtime.spec import StateSpec
from edgellm_runtime.state import State, file_pages
from edgellm_runtime.state.array_file import read_arrays
from edgellm_runtime.state.file_pages import PAGE

SPECS = (
    StateSpec("keys", ("batch", 2, "capacity", 256), "float32", "append"),  # 1 kB a slot
    StateSpec("codes", ("batch", 1, "capacity", 1024), "int8", "append"),
    StateSpec("odd", ("batch", 1, "capacity", 300), "float32", "append"),  # whose slots never end with a page
    StateSpec("hidden", ("batch", 5), "float32", "replace"),
)
TOKENS = 70


def write(state: State, tokens: int, seed: int = 1) -> None:
    """Read tokens into every row, as a step would: slots and recurrences get the seed's numbers."""
    state.reserve(int(state.lengths.max()) + tokens)
    for row in range(state.batch):
        at = int(state.lengths[row])
        for spec in SPECS:
            where = (row, slice(None), slice(at, at + tokens)) if spec.update == "append" else (row,)
            part = state.tensors[spec.name][where]
            part[...] = (np.arange(part.size).reshape(part.shape) * 31 + 7 * row + seed) % 113
    state.lengths += np.int32(tokens)


def made(batch: int = 1, tokens: int = TOKENS) -> State:
    state = State(SPECS, batch, 1)
    write(state, tokens)
    return state


def reloaded(state: State, path: Path) -> State:
    state.save(path)
    return State.load(path, SPECS)


def same(one: State, other: State) -> None:
    """Every number in use."""
    assert one.lengths.tolist() == other.lengths.tolist()
    for row, length in enumerate(one.lengths.tolist()):
        for spec in SPECS:
            a, b = one.read(spec.name)[row], other.read(spec.name)[row]
            assert np.array_equal(a[:, :length], b[:, :length]) if spec.update == "append" else np.array_equal(a, b)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


def test_large_tensors_begin_at_a_page_and_numpy_reads_the_file(path: Path) -> None:
    state = made(2)
    state.save(path)
    starts = read_arrays(path).starts
    assert starts["keys"] % PAGE == starts["codes"] % PAGE == 0
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        assert np.array_equal(arrays["keys"][:, :, :TOKENS], state.tensors["keys"][:, :, :TOKENS])
        assert not arrays["keys"][:, :, TOKENS:].any()
        assert arrays["odd"].shape == (2, 1, TOKENS, 300)


@pytest.mark.skipif(os.name != "posix", reason="no pages of files at places of one's own")
def test_a_loaded_state_is_the_files_pages_and_writes_to_none_of_them(path: Path) -> None:
    state = reloaded(made(), path)
    before, origin = path.read_bytes(), state.buffers.origin
    assert origin is not None and origin.slots == TOKENS
    fork, longer = state.fork(), state.fork(500)
    assert fork.buffers.origin is not None and longer.buffers.origin is not None
    for seed, each in enumerate((state, fork, longer)):
        write(each, 9, seed)
    assert len({each.tensors["keys"][0, 0, TOKENS, 0].item() for each in (state, fork, longer)}) == 3
    assert path.read_bytes() == before


@pytest.mark.parametrize("batch", [1, 3])
def test_whatever_is_done_to_a_loaded_state_gives_what_it_gives_without_a_file(batch: int, path: Path) -> None:
    first = made(batch)
    first.save(path)
    steps = st.sampled_from(["write", "fork", "room", "reserve", "rewind", "empty", "put", "first", "save"])

    @settings(max_examples=40, deadline=None)
    @given(todo=st.lists(st.tuples(steps, st.integers(1, 90)), max_size=7))
    def check(todo: list[tuple[str, int]]) -> None:
        plain, loaded = first.fork(), State.load(path, SPECS)
        for what, number in todo:
            plain = done(plain, what, number, path.with_name("plain"))
            loaded = done(loaded, what, number, path.with_name("loaded"))
        same(plain, loaded)
        same(plain, loaded.fork())
        same(plain, loaded.fork(600))
        same(first, State.load(path, SPECS))

    check()


def done(state: State, what: str, number: int, path: Path) -> State:
    """A state after one thing was done to it."""
    if what in ("fork", "room"):
        left, state = state, state.fork(0 if what == "fork" else number * 3)
        write(left, 2, seed=99)  # which is nobody's any more, and must not be seen
    elif what == "put":
        state.put(number % state.batch, made(1, number))
    elif what == "first":
        view = state.first(1)
        view.tensors["keys"][:, :, 0] = number
        state.settle(view)
    elif what == "save":
        return reloaded(state, path)
    else:
        actions: dict[str, Callable[[], Any]] = {
            "write": lambda: write(state, number, seed=number),
            "reserve": lambda: state.reserve(number * 4),
            "rewind": lambda: rewind(state, [max(0, n - number) for n in state.lengths.tolist()]),
            "empty": lambda: rewind(state, [0] * state.batch),
        }
        actions[what]()
    return state


def rewind(state: State, lengths: list[int]) -> None:
    """Take tokens back, which a recurrence does not allow but for all of them."""
    state.rewind([0 if 0 < length < held else length for length, held in zip(lengths, state.lengths, strict=True)])


def test_what_is_taken_back_of_pages_is_copied_where_it_is_written_anew(path: Path) -> None:
    specs, plain = SPECS[:3], State(SPECS[:3], 1, 1)
    plain.reserve(TOKENS)
    plain.tensors["keys"][...] = 1
    plain.lengths[:] = TOKENS
    plain.save(path)
    state = State.load(path, specs)
    state.rewind(60)
    state.tensors["keys"][:, :, 60] = 7
    state.lengths += np.int32(10)
    assert state.fork(300).tensors["keys"][0, 0, 59:62, 0].tolist() == [1, 7, 1]
    assert State.load(path, specs).tensors["keys"][0, 0, 60, 0] == 1


def test_tokens_that_were_taken_back_are_not_saved(path: Path) -> None:
    state = State(SPECS[:1], 1, TOKENS)
    state.tensors["keys"][...] = 5
    state.lengths[:] = TOKENS
    state.rewind(65)
    state.save(path)
    assert read_arrays(path).arrays["keys"].shape == (1, 2, 68, 256)
    assert not read_arrays(path).arrays["keys"][:, :, 65:].any()


def test_a_file_that_others_may_write_to_is_copied(path: Path) -> None:
    state = made()
    state.save(path)
    path.chmod(0o664)
    loaded = State.load(path, SPECS)
    assert read_arrays(path).pages is None
    same(loaded, state)
    path.write_bytes(b"")
    same(loaded, state)


def test_without_room_for_more_pieces_of_files_a_state_is_copied(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = made()
    state.save(path)
    monkeypatch.setattr(file_pages, "_MOST", 0)
    loaded = State.load(path, SPECS)
    assert loaded.buffers.origin is None
    same(loaded, state)


def test_a_file_that_is_saved_anew_or_removed_leaves_a_loaded_state_as_it_is(path: Path) -> None:
    state = made()
    loaded = reloaded(state, path)
    made(1, TOKENS + 9).save(path)
    same(loaded.fork(200), state)
    path.unlink()
    same(loaded.fork(300), state)
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("threads", [1, 2])
def test_one_wrong_bit_in_any_tensor_is_refused(threads: int, path: Path) -> None:
    made().save(path)
    data, file = path.read_bytes(), read_arrays(path)
    rng = np.random.default_rng(0)
    for name, array in file.arrays.items():
        for at in rng.integers(0, array.nbytes, 5).tolist():
            spoiled = bytearray(data)
            spoiled[file.starts[name] + at] ^= 1 << int(rng.integers(8))
            path.with_name("spoiled").write_bytes(spoiled)
            with pytest.raises(StateError, match=f"not a saved state .'{name}.npy' has another checksum"):
                State.load(path.with_name("spoiled"), SPECS, threads=threads)


@pytest.mark.skipif(os.name != "posix", reason="no limit on the size of files")
def test_a_disk_that_is_full_halfway_leaves_what_was_saved(path: Path) -> None:
    state = made()
    state.save(path)
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    write(state, 300)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5000, limit[1]))
    try:
        with pytest.raises(StateError, match="cannot be written"):
            state.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["state"]


def open_files() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208  a path of each would follow it


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no list of open files")
def test_files_are_closed_and_pages_given_back_with_the_last_state(path: Path) -> None:
    made().save(path)
    gc.collect()
    before = open_files()
    state = State.load(path, SPECS)
    forks = [state.fork(200) for _ in range(3)]
    assert len(open_files()) > len(before)
    assert path.name in Path("/proc/self/maps").read_text()
    del state, forks
    gc.collect()
    assert open_files() == before
    assert str(path) not in Path("/proc/self/maps").read_text()
