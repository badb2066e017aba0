"""The TensorRT backend without a GPU: engines whose tensors were recorded from TensorRT for RTX, and which compute."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorrt_bundles import MODELS, begun, both, machine_with_gpu, made
from tensorrt_fakes import SIDECAR, FakeCuda
from tiny_bundles import sign

from edgellm_runtime import BackendError, BundleError, ContextError, StateError, load, open_session
from edgellm_runtime.backends import cuda_memory, tensorrt, tensorrt_library
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.verify import verify
from edgellm_runtime.state import State


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    return machine_with_gpu(monkeypatch)


@pytest.mark.parametrize("name", MODELS)
def test_engines_give_the_bits_of_their_graphs(name: str, gpu: Any) -> None:
    sessions = both(name)
    rng = np.random.default_rng(0)
    states = [begun(session, 2, 8) for session in sessions]
    for time, lengths, wanted in (
        (5, [5, 3], "last"), (1, None, "last"), (1, None, "last"), (9, None, "all"), (1, None, "last"),
        (4, [1, 4], "none"), (1, None, "last"), (1, None, "all"),
    ):  # fmt: skip
        tokens = rng.integers(0, sessions[0].vocab_size, (2, time))
        given = None if lengths is None else np.array(lengths)
        found = [
            session.step(tokens, state, lengths=given, logits=wanted).copy()
            for session, state in zip(sessions, states, strict=True)
        ]
        np.testing.assert_array_equal(*found)
    for spec in sessions[0].signature.state:
        np.testing.assert_array_equal(*(state.read(spec.name) for state in states))
    assert sessions[1].device == "tensorrt"


@pytest.mark.parametrize("name", MODELS)
def test_a_bundle_verifies_itself_on_its_engines(name: str, gpu: Any) -> None:
    bundle = Bundle(made(name))
    checks = verify(bundle, open_session(bundle)).checks  # auto is the device of the target
    assert all(check.ok for check in checks)
    assert {"batch", "split", "logits"} <= {check.name for check in checks}


def test_generation_says_what_the_graphs_say(gpu: Any) -> None:
    on_gpu, on_cpu = load(made("attention")), load(made("attention"), device="cpu", threads=1)
    assert on_gpu.device == "tensorrt"
    prompts = [[5, 9, 2], [40, 8, 7, 13, 1], [3]]
    for options in ({}, {"temperature": 0.9, "top_k": 9, "seed": 3}):
        answers = [m.generate(prompts, max_new_tokens=12, ignore_eos=True, **options) for m in (on_gpu, on_cpu)]
        assert [a.tokens for a in answers[0]] == [a.tokens for a in answers[1]]


def test_single_tokens_are_launched_as_one_recorded_graph(gpu: Any) -> None:
    _, session = both("attention")
    state = session.new_state(1, 20)
    session.step(np.array([[1, 2, 3]]), state)
    launched = []
    for _ in range(4):
        session.step(np.array([[4]]), state)
        launched.append(gpu.cuda.launches)
    assert launched == [0, 1, 2, 3], "the first run may allocate and is not recorded"
    del state
    gc.collect()
    state = session.new_state(1, 20)  # has the memory of the last one, so that its recording holds
    session.step(np.array([[4]]), state)
    assert gpu.cuda.launches == 4


def test_a_step_that_cannot_be_recorded_runs_all_the_same(gpu: Any) -> None:
    host, session = both("attention")
    gpu.cuda.refuses_capture = True
    states = [s.new_state(1, 20) for s in (host, session)]
    for _ in range(3):
        found = [s.step(np.array([[4]]), state).copy() for s, state in zip((host, session), states, strict=True)]
        np.testing.assert_array_equal(*found)
    assert not session._backend.captures
    assert "error 900" in session._backend.refusal


def test_only_logits_come_back_from_the_gpu(gpu: Any) -> None:
    _, session = both("recurrent")
    state = session.new_state(2, 20)
    for time in (3, 1, 1, 1):
        before = gpu.cuda.downloads, gpu.cuda.device_to_host_bytes
        session.step(np.full((2, time), 4), state)
        assert gpu.cuda.downloads - before[0] == 1
        assert gpu.cuda.device_to_host_bytes - before[1] == 2 * session.width * 4


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_copied_saved_and_loaded_on_the_gpu(name: str, gpu: Any, tmp_path: Path) -> None:
    _, session = both(name)
    state = begun(session, 2, 8)
    tokens = np.array([[1, 2, 3], [7, 8, 9]])
    session.step(tokens, state)
    swapped, forked = state.take([1, 0, 1]), state.fork()
    state.save(tmp_path / "state")
    loaded = State.load(tmp_path / "state", session.signature.state, session.storage)
    put = begun(session, 2, 8)
    put.put(1, state.take([0]))
    last = np.array([[4]])
    expected = session.step(np.repeat(last, 2, axis=0), state).copy()
    np.testing.assert_array_equal(session.step(np.repeat(last, 3, axis=0), swapped), expected[[1, 0, 1]])
    np.testing.assert_array_equal(session.step(np.repeat(last, 2, axis=0), forked), expected)
    np.testing.assert_array_equal(session.step(np.repeat(last, 2, axis=0), loaded), expected)
    np.testing.assert_array_equal(session.step(np.repeat(last, 2, axis=0), put)[1], expected[0])


def test_memory_is_given_back(gpu: Any) -> None:
    _, session = both("attention")
    for rows in (1, 2, 3, 1, 2, 3):
        session.step(np.full((rows, 2), 4), session.new_state(rows, 8))
    gc.collect()
    waiting = len(session.storage._pool)
    assert waiting == 2
    session.storage._pool.clear()
    del session
    gc.collect()
    assert gpu.cuda.memory == {}


def test_more_rows_than_the_profile_are_refused_with_the_command(gpu: Any) -> None:
    _, session = both("attention")
    state = session.new_state(4, 8)
    with pytest.raises(StateError, match=r"4 rows, but the prefill engine was built for up to 3; .* --max-batch 4"):
        session.step(np.full((4, 2), 1), state)
    assert state.lengths.tolist() == [0] * 4


def test_a_context_beyond_the_engines_is_refused(gpu: Any) -> None:
    _, session = both("attention")
    with pytest.raises(ContextError, match=r"97 tokens do not fit"):
        session.step(np.full((1, 97), 1), session.new_state())
    with pytest.raises(StateError, match=r"slots a row, but the engines were built for 192; .*--max-context"):
        session.storage.rounded(193)


@pytest.mark.parametrize("said", ["[executionContext.cpp] CUDA error: out of memory", "OutOfMemory: no room"])
def test_memory_that_runs_out_in_a_step_is_one_clear_error(said: str, gpu: Any) -> None:
    _, session = both("attention")
    state = session.new_state(1, 8)
    gpu.library.fails = said
    with pytest.raises(BackendError, match=r"no memory left for this step .*; use fewer rows or a shorter context"):
        session.step(np.array([[1]]), state)
    gpu.library.fails = "myelin: something else"
    with pytest.raises(BackendError, match=r"tensorrt_rtx failed in a step: myelin"):
        session.step(np.array([[1]]), state)


def test_memory_that_does_not_hold_the_engine_or_the_state(gpu: Any) -> None:
    gpu.library.no_context = "CUDA out of memory"
    with pytest.raises(BackendError, match=r"the device has no memory for the model .*--quantize int4"):
        open_session(Bundle(made("attention")))
    gpu.library.no_context = ""
    _, session = both("attention")
    gpu.cuda.room = 0
    with pytest.raises(StateError, match=r"cannot be made on the GPU .*ask for fewer rows"):
        session.new_state(3, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capability": (9, 0)}, r"built for compute capability 8\.6, the GPU here has 9\.0; .*edgellm build"),
        ({"version": "1.8.0"}, r"built by tensorrt_rtx 1\.7\.1\.116, here is 1\.8\.0; .*edgellm build"),
    ],
)
def test_a_foreign_engine_is_refused_with_the_command_that_builds_it(change: dict, message: str, gpu: Any) -> None:
    if "capability" in change:
        gpu.cuda.capability = change["capability"]
    else:
        gpu.library.__version__ = change["version"]
    with pytest.raises(BundleError, match=message):
        load(made("attention"), device="tensorrt")


@pytest.mark.parametrize(
    ("cuda", "message"),
    [
        (FakeCuda(error=35), "no NVIDIA driver, or one that is older"), (FakeCuda(error=100), "no NVIDIA GPU"),
        (FakeCuda(devices=0), "no NVIDIA GPU that this process may use; check nvidia-smi"),
        (FakeCuda(error=999), r"CUDA does not start \(error 999 \(999\)\)"),
    ],
    ids=["no driver", "no device", "none shown", "broken"],
)  # fmt: skip
def test_no_gpu_is_said_before_any_work(cuda: FakeCuda, message: str, gpu: Any) -> None:
    gpu.cuda = cuda
    with pytest.raises(BackendError, match=message):
        load(made("attention"), device="tensorrt")


def test_a_missing_library_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(tensorrt_library, "imported", missing)
    with pytest.raises(BackendError, match=r"TensorRT is not installed; pip install tensorrt-rtx cuda-bindings"):
        load(made("attention"), device="tensorrt")


def test_missing_bindings_are_named_with_the_command(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "bindings", cuda_memory.bindings)
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(BackendError, match=r"pip install 'cuda-bindings>=12.9'"):
        load(made("attention"), device="tensorrt")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": {"mode": "INPUT", "dtype": "INT64", "shape": [-1, 7]}}, "takes 7 tokens and"),
        ({"logits": {"mode": "OUTPUT", "dtype": "HALF", "shape": [-1, 1, 292]}}, r"\['logits'\] differ from"),
        ({"more": {"mode": "OUTPUT", "dtype": "FLOAT", "shape": [-1]}}, r"\['more'\] differ"),
        (
            {"present.layers.1.v": {"mode": "OUTPUT", "dtype": "HALF", "shape": [-1, 1, 192, 32]}},
            r"present.layers.1.v has \[1, 192, 32\] for each row, the manifest says \[1, 192, 16\]",
        ),
    ],
)  # fmt: skip
def test_an_engine_of_other_tensors_gets_no_address(changed: dict, message: str, gpu: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made("attention"), tmp_path / "b"))
    description = json.loads((folder / "decode.engine").read_text()) | {"changed": changed}
    (folder / "decode.engine").write_text(json.dumps(description))
    sign(folder, "decode.engine")
    with pytest.raises(BackendError, match=message):
        open_session(Bundle(folder))


def test_an_engine_that_the_library_refuses_is_one_clear_error(gpu: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made("attention"), tmp_path / "b"))
    (folder / "decode.engine").write_bytes(b"\x00 not an engine")
    sign(folder, "decode.engine")
    with pytest.raises(
        BackendError, match=r"decode.engine: tensorrt_rtx 1.7.1.116 refuses the graph: .*header is damaged"
    ):
        open_session(Bundle(folder))


def test_names_that_the_runtime_uses_are_in_the_installed_library() -> None:
    library = pytest.importorskip("tensorrt_rtx")
    missing = [
        f"{owner}.{name}" for owner, names in tensorrt_library.API.items() for name in names
        if not hasattr(getattr(library, owner, None), name)
    ]  # fmt: skip
    assert not missing


def test_names_that_the_runtime_uses_are_in_cudas_bindings() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    used = {n for n in dir(FakeCuda) if n.startswith("cuda")}
    assert not [name for name in used if not hasattr(runtime, name)]
    assert runtime.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor == 75


def test_the_recorded_tensors_are_those_of_the_graphs_today() -> None:
    library = pytest.importorskip("tensorrt_rtx")
    logger = library.Logger(library.Logger.ERROR)
    for name in MODELS:
        for role, recorded in SIDECAR["networks"][name].items():
            builder = library.Builder(logger)
            network = builder.create_network()
            parser = library.OnnxParser(network, logger)
            beside = made(name).parent if role.startswith("choose") else made(name)
            file = "encoder" if role == "encode" else role
            assert parser.parse_from_file(str(beside / f"{file}.onnx"))
            sides = (
                ("INPUT", [network.get_input(i) for i in range(network.num_inputs)]),
                ("OUTPUT", [network.get_output(i) for i in range(network.num_outputs)]),
            )
            found = {
                t.name: {"mode": mode, "dtype": t.dtype.name, "shape": list(t.shape)} for mode, ts in sides for t in ts
            }
            assert found == recorded
