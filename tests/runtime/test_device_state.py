"""A state on a device holds what the same state in this process's memory holds, whatever is done with it."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_runtime import StateError, StateSpec
from edgellm_runtime.backends.ort_memory import DeviceStorage, Kernels
from edgellm_runtime.spec import DTYPE_BYTES
from edgellm_runtime.state import State
from edgellm_runtime.state.storage import HOST, host_dtype, narrowed, widened

KERNELS = Kernels(onnxruntime, ["CPUExecutionProvider"], "cpu")
DTYPES = ("float32", "float16", "bfloat16", "int8")


def specs_of(dtype: str) -> tuple[StateSpec, ...]:
    return (
        StateSpec("keys", ("batch", 2, "capacity", 3), dtype, "append"),
        StateSpec("flat", ("batch", "capacity"), dtype, "append"),
        StateSpec("hidden", ("batch", 5), dtype, "replace"),
        StateSpec("window", ("batch", 2, 48, 3), dtype, "ring", axis=2, window=40),
        StateSpec("memory", ("batch", 3, 2), dtype, "static"),
    )


class Pair:
    """One state in each kind of memory; every action is done to both."""

    def __init__(self, dtype: str, batch: int) -> None:
        self.specs, self.storage = specs_of(dtype), DeviceStorage(KERNELS)
        self.rng = np.random.default_rng(0)
        self.both = [State(self.specs, batch, 64, storage) for storage in (HOST, self.storage)]

    def fill(self, data: st.DataObject) -> None:
        """As a step does: new slots, and what replaces a state beside it."""
        more = data.draw(st.integers(1, 40))
        lengths = np.minimum(self.both[0].lengths + more, 200)
        for state in self.both:
            state.reserve(int(lengths.max()))
        for spec in self.specs:
            shape = spec.resolve(self.both[0].batch, int(lengths.max()))
            new = narrowed((self.rng.normal(size=shape) * 50).astype(np.float32), spec.dtype)
            for state in self.both:
                place = state.tensors if spec.in_place else state.spares
                state.storage.write(spec, place[spec.name], new)
        for state in self.both:
            state.swap()
            state.lengths = lengths.astype(np.int32)

    def take(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, self.both[0].batch - 1), min_size=1, max_size=3))
        self.both = [state.take(rows) for state in self.both]

    def fork(self, data: st.DataObject) -> None:
        others = [state.fork() for state in self.both]
        self.fill(data)  # must not show in the copies
        self.both = others

    def put(self, data: st.DataObject) -> None:
        row, source = (data.draw(st.integers(0, self.both[0].batch - 1)) for _ in range(2))
        more = data.draw(st.sampled_from([0, 64, 128]))
        for state in self.both:
            alone = state.take([source])
            alone.reserve(state.capacity + more if more else 1)
            state.put(row, alone)

    def put_into_larger(self, data: st.DataObject) -> None:
        for state in self.both:
            alone = state.take([0])
            state.reserve(state.capacity + 1)
            state.put(0, alone)

    def clear(self, data: st.DataObject) -> None:
        for state in self.both:
            state.rewind(0)

    def save_and_load(self, data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / str(i) for i in range(2)]
            for state, file in zip(self.both, files, strict=True):
                state.save(file)
            assert files[0].read_bytes() == files[1].read_bytes()
            self.both = [State.load(f, self.specs, s.storage) for f, s in zip(files, self.both, strict=True)]

    def compare(self) -> None:
        host, device = self.both
        assert host.lengths.tolist() == device.lengths.tolist()
        assert device.capacity >= host.lengths.max()
        assert device.capacity % 64 == 0  # small sizes are all one, so that buffers fit again
        assert host.nbytes == sum(a.nbytes for a in (*host.tensors.values(), *host.spares.values()))
        values = (*device.tensors.values(), *device.spares.values())
        assert device.nbytes == sum(value.tensor_size_in_bytes() for value in values)
        used = int(host.lengths.max())
        for spec in self.specs:
            slots = spec.used(used)
            np.testing.assert_array_equal(host.read(spec.name)[slots], device.read(spec.name)[slots])


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_life_of_a_state_is_the_same_in_both_memories(dtype: str) -> None:
    @settings(max_examples=25, deadline=None)
    @given(data=st.data(), batch=st.integers(1, 3))
    def check(data: st.DataObject, batch: int) -> None:
        pair = Pair(dtype, batch)
        pair.fill(data)
        actions = [Pair.fill, Pair.take, Pair.fork, Pair.put, Pair.put_into_larger, Pair.clear, Pair.save_and_load]
        for act in data.draw(st.lists(st.sampled_from(actions), max_size=6)):
            act(pair, data)
            pair.compare()

    check()


def test_buffers_of_a_state_that_is_gone_serve_the_next_of_its_size() -> None:
    specs, storage = specs_of("float32"), DeviceStorage(KERNELS)
    state = State(specs, 2, 64, storage)
    storage.write(specs[2], state.tensors["hidden"], np.ones((2, 5), np.float32))
    state.attachments["bound"] = "to these addresses"
    places = {tensor.data_ptr() for tensor in (*state.tensors.values(), *state.spares.values())}
    copy = state.fork()
    assert places.isdisjoint(tensor.data_ptr() for tensor in (*copy.tensors.values(), *copy.spares.values()))
    assert not copy.attachments
    del state
    gc.collect()
    again = State(specs, 2, 64, storage)
    assert {tensor.data_ptr() for tensor in (*again.tensors.values(), *again.spares.values())} == places
    assert again.attachments == {"bound": "to these addresses"}
    assert not again.read("hidden").any(), "a recurrence begins at zero"
    other = State(specs, 1, 64, storage)
    assert not other.attachments


def test_no_more_than_two_sets_of_buffers_wait() -> None:
    specs, storage = specs_of("float32"), DeviceStorage(KERNELS)
    states = [State(specs, batch, 64, storage) for batch in (1, 2, 3, 4)]
    del states
    gc.collect()
    assert len(storage._pool) == 2


def test_a_state_that_the_device_cannot_hold_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(shape, dtype):
        raise RuntimeError("Failed to allocate memory for requested buffer of size 12")

    kernels = Kernels(onnxruntime, ["CPUExecutionProvider"], "cpu")
    monkeypatch.setattr(kernels, "empty", no_memory)
    message = r"keys for 9 rows of 64 tokens, 0\.0 GB of float16, cannot be made on the cpu device .*ask for fewer rows"
    with pytest.raises(StateError, match=message):
        State(specs_of("float16"), 9, 64, DeviceStorage(kernels))


def test_bfloat16_is_rounded_to_the_nearest_even() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=4096), rng.normal(size=64) * 1e38, [0.0, -0.0, np.inf, -np.inf, 1e-40]])
    values = values.astype(np.float32)
    expected = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(narrowed(values, "bfloat16"), expected.view(np.uint16))
    np.testing.assert_array_equal(widened(narrowed(values, "bfloat16"), "bfloat16"), expected.astype(np.float32))
    assert np.isnan(widened(narrowed(np.array([np.nan], np.float32), "bfloat16"), "bfloat16")).all()


def test_every_dtype_has_a_form_in_this_process() -> None:
    assert {name: host_dtype(name).itemsize for name in DTYPE_BYTES} == dict(DTYPE_BYTES)
