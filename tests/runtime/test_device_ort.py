"""ONNX Runtime on a device, its code run by the CPU's kernels: the same numbers, bound once, chosen where they are."""

from __future__ import annotations

import gc
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tiny_bundles import attention_bundle, device_session, recurrent_bundle

from edgellm_runtime import BackendError, load, open_session
from edgellm_runtime.backends import cuda, ort_device
from edgellm_runtime.backends.ort_choice import Chooser
from edgellm_runtime.backends.ort_memory import Kernels
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.generation.sampling import Sampler, SamplingOptions
from edgellm_runtime.model import Model
from edgellm_runtime.session import Session

BUNDLES = {
    "attention": attention_bundle,
    "standard operators": lambda: attention_bundle("onnx"),
    "recurrent": recurrent_bundle,
    "16 bits": lambda: attention_bundle("cuda"),
    "16 bits, recurrent": lambda: recurrent_bundle("cuda"),
}
KERNELS = Kernels(onnxruntime, ["CPUExecutionProvider"], "cpu")


@pytest.fixture(autouse=True)
def the_same_kernels_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the host's backend asks for attention in one piece, which rounds otherwise; here the device gets it too."""
    monkeypatch.setenv("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")


def both(name: str) -> tuple[Session, Session]:
    bundle = Bundle(BUNDLES[name]())
    return open_session(bundle, device="cpu", threads=1), device_session(bundle)


@pytest.mark.parametrize("name", BUNDLES)
def test_a_device_gives_the_very_bits_that_the_host_gives(name: str) -> None:
    host, device = both(name)
    rng = np.random.default_rng(0)
    states = [session.new_state(2, 8) for session in (host, device)]
    for time, lengths in ((5, [5, 3]), (1, None), (1, None), (9, None), (1, None)):
        tokens = rng.integers(0, host.vocab_size, (2, time))
        for wanted in ("last", "all") if time == 1 else ("all",):
            found = [
                session.step(
                    tokens, state, lengths=None if lengths is None else np.array(lengths), logits=wanted
                ).copy()
                for session, state in zip((host, device), states, strict=True)
            ]
            np.testing.assert_array_equal(*found)
    for spec in host.signature.state:
        np.testing.assert_array_equal(*(state.read(spec.name) for state in states))


@pytest.mark.parametrize(
    "options",
    [
        {}, {"temperature": 0.8, "top_k": 5, "seed": 3}, {"temperature": 1.5, "top_k": 1, "seed": 3},
        {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 4},
        {"temperature": 1.0, "seed": 5}, {"repetition_penalty": 1.3}, {"temperature": 1.0, "top_k": 64, "seed": 6},
    ],
    ids=str,
)  # fmt: skip
def test_generation_on_a_device_says_what_the_host_says(options: dict[str, Any]) -> None:
    host, session = load(attention_bundle(), threads=1), device_session(Bundle(attention_bundle()))
    device = Model(session, host.tokenizer, host.bundle)
    prompts = [[5, 9, 2], [40, 8, 7, 13, 1], [3]]
    expected = host.generate(prompts, max_new_tokens=20, ignore_eos=True, **options)
    found = device.generate(prompts, max_new_tokens=20, ignore_eos=True, **options)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]


def test_greedy_and_few_candidates_fetch_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    host, session = load(attention_bundle(), threads=1), device_session(Bundle(attention_bundle()))
    model = Model(session, host.tokenizer, host.bundle)
    fetched: list[tuple[int, ...]] = []
    backend = session._backend
    kept = backend._here
    monkeypatch.setattr(backend, "_here", lambda value: fetched.append(tuple(value.shape())) or kept(value))
    for options in ({}, {"temperature": 1.0, "top_k": 8, "seed": 1}):
        fetched.clear()
        model.generate([4, 5, 6], max_new_tokens=12, ignore_eos=True, **options)
        assert fetched == [(1, 1, session.vocab_size)], "only the prompt's own choice is made here"


def value(array: np.ndarray) -> Any:
    made = KERNELS.empty(array.shape, str(array.dtype))
    made.update_inplace(array)
    return made


def chosen(logits: np.ndarray, options: SamplingOptions, *, seeds: int = 1) -> list[tuple[list[int], list[int]]]:
    """What is drawn from the best on a device, and from all logits, seed by seed."""
    rows, vocab = logits.shape
    pairs = []
    for seed in range(seeds):
        from_best, from_all = (
            Sampler(SamplingOptions(**{**vars(options), "seed": seed}), rows=rows, vocab_size=vocab) for _ in range(2)
        )
        assert from_best.deciding
        found = Chooser(KERNELS).best(value(logits[:, None]), from_best.deciding, lambda: logits.astype(np.float32))
        picked = from_best.among(found.ids, found.logits, range(rows), found.everything)
        pairs.append((picked.tolist(), from_all(logits.astype(np.float32)).tolist()))
    return pairs


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_ties_are_broken_as_the_host_breaks_them(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    coarse = rng.integers(-3, 4, (4, 500)).astype(dtype)  # a few values, so that ties are everywhere
    for options in (SamplingOptions(), SamplingOptions(temperature=1.0, top_k=7)):
        for found, expected in chosen(coarse, options, seeds=5):
            assert found == expected


def test_candidates_draw_what_all_logits_draw() -> None:
    logits = np.random.default_rng(1).normal(size=(3, 2000)).astype(np.float32) * 3
    for options in (
        SamplingOptions(temperature=0.7, top_k=20), SamplingOptions(temperature=1.3, top_k=63, top_p=0.8, min_p=0.02)
    ):  # fmt: skip
        pairs = chosen(logits, options, seeds=40)
        assert all(found == expected for found, expected in pairs)
        assert len({str(found) for found, _ in pairs}) > 10, "the draws differ, so equality says something"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "options", [SamplingOptions(), SamplingOptions(temperature=1.0, top_k=3)], ids=["best", "some"]
)
def test_logits_that_are_no_numbers_are_an_error_on_a_device_too(bad: float, options: SamplingOptions) -> None:
    logits = np.random.default_rng(1).normal(size=(2, 300)).astype(np.float32)
    logits[1, 250] = bad
    sampler = Sampler(options, rows=2, vocab_size=300)
    found = Chooser(KERNELS).best(value(logits[:, None]), sampler.deciding, lambda: logits)
    with pytest.raises(BackendError, match=r"best logit is"):
        sampler.among(found.ids, found.logits, range(2), found.everything)


def runs_of(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of the captured graph that each later step runs as; -1: none."""
    backend, ids = session._backend, list[int]()
    real = backend._session.run_with_iobinding

    def noting(binding: Any, options: Any) -> None:
        ids.append(int(options.get_run_config_entry("gpu_graph_id")))
        real(binding, options)

    monkeypatch.setattr(backend, "_session", types.SimpleNamespace(
        run_with_iobinding=noting, io_binding=backend._session.io_binding
    ))  # fmt: skip
    return ids


def decode(session: Session, steps: int, rows: int = 1) -> None:
    state = session.new_state(rows, 40)
    session.step(np.full((rows, 3), 4), state)
    for _ in range(steps):
        session.best(np.full((rows, 1), 5), state, 1)
    del state
    gc.collect()


def test_single_tokens_run_as_one_captured_graph_and_prompts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    session = device_session(Bundle(attention_bundle()))
    ids = runs_of(session, monkeypatch)
    decode(session, 4)
    assert ids == [-1, 1, 1, 1, 1]
    decode(session, 2)
    assert ids[5:] == [-1, 1, 1], "the next answer of this size has the same memory, and the same graph"
    decode(session, 2, rows=2)
    assert ids[8:] == [-1, 2, 2]


def test_a_recurrence_takes_two_graphs_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    session = device_session(Bundle(recurrent_bundle()))
    ids = runs_of(session, monkeypatch)
    decode(session, 4)
    assert ids == [-1, 1, 2, 1, 2]


def test_there_is_an_end_to_captured_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_device, "_CAPTURES", 2)
    session = device_session(Bundle(attention_bundle()))
    ids = runs_of(session, monkeypatch)
    for rows in (1, 2, 3):
        decode(session, 1, rows=rows)
    assert ids == [-1, 1, -1, 2, -1, -1]


def test_many_prompt_lengths_do_not_push_a_captured_graph_out(monkeypatch: pytest.MonkeyPatch) -> None:
    session = device_session(Bundle(attention_bundle()))
    state = session.new_state(1, 64)
    ids = runs_of(session, monkeypatch)
    session.step(np.array([[1]]), state)
    for time in range(2, 9):
        session.step(np.full((1, time), 3), state)
    session.step(np.array([[1]]), state)
    assert ids == [1, *[-1] * 7, 1]
    assert len(state.attachments) <= ort_device._KEPT


def failing_once(session: Session, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    backend, real = session._backend, session._backend._session
    failures = [RuntimeError(message)]

    def run(binding: Any, options: Any) -> None:
        if failures:
            raise failures.pop()
        real.run_with_iobinding(binding, options)

    fake = types.SimpleNamespace(run_with_iobinding=run, io_binding=real.io_binding)
    monkeypatch.setattr(backend, "_session", fake)


def test_a_step_that_cannot_be_captured_runs_uncaptured_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    host, session = both("attention")
    states = [s.new_state(1, 16) for s in (host, session)]
    for s, state in zip((host, session), states, strict=True):
        s.step(np.array([[1, 2, 3]]), state)
    failing_once(session, monkeypatch, "CUDA failure 900: operation not permitted when stream is capturing")
    found = session.step(np.array([[4]]), states[1])
    np.testing.assert_array_equal(found, host.step(np.array([[4]]), states[0]))
    assert not session._backend.captures
    assert "not permitted" in session._backend.refusal


@pytest.mark.parametrize(
    "said", ["CUDA failure 2: out of memory ; GPU=0", "Failed to allocate memory for requested buffer of size 9"]
)
def test_memory_that_runs_out_during_a_step_is_one_clear_error(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session = device_session(Bundle(attention_bundle()))
    state = session.new_state(1, 16)
    failing_once(session, monkeypatch, said)
    with pytest.raises(BackendError, match=r"no memory left for this step .*; use fewer rows or a shorter context"):
        session.step(np.array([[1, 2]]), state)
    assert state.lengths.tolist() == [0]


class FakeOrt:
    """ONNX Runtime as another package, or on a machine with another GPU, shows itself."""

    def __init__(self, providers: list[str], runs: list[str] | Exception, version: str = "1.31.1") -> None:
        self.__version__, self.__file__ = version, __file__
        self._providers, self._runs, self.asked = providers, runs, list[Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)

    def get_available_providers(self) -> list[str]:
        return self._providers

    def preload_dlls(self) -> None:
        print("Failed to load libcublasLt.so.12")

    def InferenceSession(self, graph: str, options: Any, providers: list[Any]) -> Any:
        self.asked.append(providers)
        runs = (
            self._runs.pop(0) if isinstance(self._runs, list) and isinstance(self._runs[0], Exception) else self._runs
        )
        if isinstance(runs, Exception):
            raise runs
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return types.SimpleNamespace(
            get_providers=lambda: runs, get_inputs=session.get_inputs, get_outputs=session.get_outputs
        )


def opened(fake: FakeOrt, monkeypatch: pytest.MonkeyPatch) -> ort_device.OrtDeviceBackend:
    monkeypatch.setattr(ort_device, "library", lambda: fake)
    bundle = Bundle(attention_bundle())
    return ort_device.OrtDeviceBackend(bundle.file("model.onnx"), bundle.manifest.signature, max_context=96)


BOTH = ["CUDAExecutionProvider", "CPUExecutionProvider"]


def test_the_cpu_package_is_named_with_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_installed", lambda: ["onnxruntime 1.32.0"])
    fake = FakeOrt(["CPUExecutionProvider"], BOTH)
    message = r"without CUDA; pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu>=1\.30'"
    with pytest.raises(BackendError, match=message):
        opened(fake, monkeypatch)
    assert fake.asked == [], "said before any work"


def test_two_packages_over_each_other_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_installed", lambda: ["onnxruntime 1.32.0", "onnxruntime-gpu 1.31.1"])
    with pytest.raises(BackendError, match=r"onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are both installed"):
        opened(FakeOrt(["CPUExecutionProvider"], BOTH), monkeypatch)


class FakeDriver:
    def __init__(self, init: int = 0, count: int = 1) -> None:
        self.init, self.count = init, count

    def __call__(self, name: str) -> Any:
        if "cuda" not in name or "providers" in name:
            raise OSError("libcudnn.so.9: cannot open shared object file")
        return self

    def cuInit(self, flags: int) -> int:
        return self.init

    def cuDeviceGetCount(self, place: Any) -> int:
        place._obj.value = self.count
        return 0


def no_driver(name: str) -> Any:
    raise OSError("libcuda.so.1: cannot open shared object file")


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (no_driver, "no NVIDIA driver"),
        (FakeDriver(init=100), "no NVIDIA GPU that this process may use; check nvidia-smi and CUDA_VISIBLE_DEVICES"),
        (FakeDriver(count=0), "no NVIDIA GPU"),
        (FakeDriver(init=803), r"driver does not start \(cuInit gives 803\)"),
        (
            FakeDriver(),
            r"does not start CUDA \(libcudnn\.so\.9: cannot open.*pip install 'onnxruntime-gpu\[cuda,cudnn\]",
        ),
    ],
    ids=["no driver", "no device", "none shown", "broken driver", "library missing"],
)
def test_a_session_that_would_run_on_the_cpu_is_refused_with_the_cause(
    driver: Any, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeOrt(BOTH, ["CPUExecutionProvider"])
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").write_bytes(b"")
    fake.__file__ = str(tmp_path / "__init__.py")
    monkeypatch.setattr(cuda.ctypes, "CDLL", driver)
    with pytest.raises(BackendError, match=message):
        opened(fake, monkeypatch)
    assert capsys.readouterr().out == "", "what the library prints would spoil a command's JSON"
    missing = "does not start CUDA" in message
    assert bool(fake.asked) == missing, "what the driver knows is said before any work"


def test_this_machine_says_what_it_lacks() -> None:
    bundle = Bundle(attention_bundle())
    if cuda.CUDA in onnxruntime.get_available_providers():
        pytest.skip("the installed package has CUDA")
    with pytest.raises(BackendError, match=r"pip uninstall -y onnxruntime onnxruntime-gpu"):
        ort_device.OrtDeviceBackend(bundle.file("model.onnx"), bundle.manifest.signature, max_context=96)


@pytest.mark.parametrize("feature", ["CUDA Graph feature", "graph capture feature"])  # 1.30's and 1.31's words
def test_a_graph_that_cannot_be_captured_is_loaded_without(monkeypatch: pytest.MonkeyPatch, feature: str) -> None:
    refusal = RuntimeError(f"This session cannot use the {feature}: the model has control flow nodes")
    fake = FakeOrt(BOTH, [refusal, *BOTH])  # type: ignore[list-item]
    monkeypatch.setattr(cuda, "count_gpus", lambda: 1)
    backend = opened(fake, monkeypatch)
    assert [asked[0][1]["enable_cuda_graph"] for asked in fake.asked] == ["1", "0"]
    assert not backend.captures
    assert "control flow" in backend.refusal


def test_memory_that_does_not_hold_the_model_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "count_gpus", lambda: 1)
    error = RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 9")
    with pytest.raises(BackendError, match=r"model\.onnx: the device has no memory for the model .*--quantize int4"):
        opened(FakeOrt(BOTH, error), monkeypatch)


def test_prints_of_a_library_do_not_reach_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    cuda.preload(FakeOrt(BOTH, BOTH))
    assert capsys.readouterr().out == ""
