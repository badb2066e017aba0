"""Tokens chosen on the GPU by engines: the host's own choice, a few numbers over the bus, and bundles without them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorrt_bundles import MAX_BATCH, MODELS, begun, both, machine_with_gpu, made
from tiny_bundles import edit_manifest, sign

from edgellm_runtime import BackendError, BundleError, load, open_session
from edgellm_runtime.backends.tensorrt_choice import Choice
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.generation.sampling import Sampler, SamplingOptions

OPTIONS: list[dict[str, Any]] = [
    {}, {"temperature": 0.8, "top_k": 5, "seed": 3}, {"temperature": 1.5, "top_k": 1, "seed": 3},
    {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 4}, {"temperature": 1.0, "seed": 5},
    {"repetition_penalty": 1.3}, {"temperature": 1.0, "top_k": 63, "seed": 6},
    {"temperature": 1.0, "top_k": 64, "seed": 6},
]  # fmt: skip


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    return machine_with_gpu(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made("attention"), tmp_path / "b"))


def choosers(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "manifest.json").read_text())["choosers"]


# --- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_generation_says_what_the_host_says(options: dict[str, Any], gpu: Any) -> None:
    on_gpu, on_cpu = load(made("attention")), load(made("attention"), device="cpu", threads=1)
    assert on_gpu.session.candidates == 64
    prompts = [[5, 9, 2], [40, 8, 7, 13, 1], [3]]
    found, expected = (m.generate(prompts, max_new_tokens=20, ignore_eos=True, **options) for m in (on_gpu, on_cpu))
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]


@pytest.mark.parametrize("name", MODELS)
def test_the_best_are_those_of_the_logits_and_the_state_goes_on(name: str, gpu: Any) -> None:
    host, device = both(name)
    states = [begun(session, 2, 20) for session in (host, device)]
    for session, state in zip((host, device), states, strict=True):
        session.step(np.array([[5, 9, 2], [40, 8, 7]]), state)
    tokens = np.array([[4], [11]])
    for count in (1, 2, 6, device.candidates, 1, 1, 6):
        logits = host.step(tokens, states[0])[:, 0]
        found = device.best(tokens, states[1], count)
        np.testing.assert_array_equal(found.ids, np.argsort(-logits, axis=1, kind="stable")[:, :count])
        np.testing.assert_array_equal(found.logits, np.take_along_axis(logits, found.ids, axis=1))
        np.testing.assert_array_equal(found.everything(), logits)
        tokens = found.ids[:, :1]
    for spec in host.signature.state:
        np.testing.assert_array_equal(*(state.read(spec.name) for state in states))


def test_greedy_and_few_candidates_fetch_no_logits(gpu: Any) -> None:
    _, session = both("attention")
    state = session.new_state(2, 20)
    session.step(np.array([[1, 2], [3, 4]]), state)
    for count, expected in ((1, 3 * 256), (6, 2 * 64 * 8 + 2 * 64 * 4 + 256)):  # ids, values and sums, each aligned
        for _ in range(3):
            before = gpu.cuda.downloads, gpu.cuda.device_to_host_bytes
            session.best(np.array([[4], [5]]), state, count)
            assert gpu.cuda.downloads - before[0] == 1
            assert gpu.cuda.device_to_host_bytes - before[1] == expected < 2 * session.width * 4


def test_a_step_and_its_choice_are_launched_as_one_recorded_graph(gpu: Any) -> None:
    _, session = both("attention")
    state = session.new_state(1, 30)
    session.step(np.array([[1, 2, 3]]), state)
    launched = []
    for count in (1, 1, 1, 6, 6, 1):
        session.best(np.array([[4]]), state, count)
        launched.append(gpu.cuda.launches)
    assert launched == [0, 1, 2, 2, 3, 4], "the first run of each may allocate and is not recorded"


@pytest.mark.parametrize("chosen", [False, True])
def test_a_step_that_fails_where_it_is_waited_for_leaves_the_state(
    chosen: bool, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, device = both("recurrent")
    states = [session.new_state(1, 20) for session in (host, device)]
    tokens = np.array([[4]])
    for session, state in zip((host, device), states, strict=True):
        session.step(np.array([[5, 9, 2]]), state)
    with monkeypatch.context() as patch:
        patch.setattr(gpu.cuda, "cudaStreamSynchronize", lambda stream: (700,))
        with pytest.raises(BackendError, match=r"cudaStreamSynchronize failed: .*700"):
            device.best(tokens, states[1], 1) if chosen else device.step(tokens, states[1])
    expected = host.step(tokens, states[0])
    np.testing.assert_array_equal(device.step(tokens, states[1]), expected)


def chosen(logits: np.ndarray, options: SamplingOptions) -> tuple[list[int], list[int]]:
    """What is drawn from the best that an engine chose, and from all logits."""
    _, session = both("attention")
    backend: Any = session._backend
    rows, vocab = logits.shape
    from_best, from_all = (Sampler(options, rows=rows, vocab_size=vocab) for _ in range(2))
    assert from_best.deciding
    there = backend._cuda.empty((rows, 1, vocab), "float32")
    backend._cuda.upload(there, logits[:, None])
    count = min(n for n in backend._choosers if n >= from_best.deciding)
    choice = Choice(backend._cuda, backend._choosers[count], count, there)
    choice.place()
    choice.engine.enqueue(0)
    ids, values = (found[:, : from_best.deciding] for found in choice.read())
    picked = from_best.among(ids, values, range(rows), lambda: logits)
    return picked.tolist(), from_all(logits).tolist()


def test_ties_are_broken_as_the_host_breaks_them(gpu: Any) -> None:
    coarse = np.random.default_rng(0).integers(-3, 4, (3, 292)).astype(np.float32)
    for options in (SamplingOptions(), *(SamplingOptions(temperature=1.0, top_k=7, seed=n) for n in range(5))):
        found, expected = chosen(coarse, options)
        assert found == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(temperature=1.0, top_k=3)], ids=str)
def test_logits_that_are_no_numbers_are_an_error_there_too(bad: float, options: SamplingOptions, gpu: Any) -> None:
    logits = np.random.default_rng(1).normal(size=(2, 292)).astype(np.float32)
    logits[1, 250] = bad
    with pytest.raises(BackendError, match="best logit is"):
        chosen(logits, options)


# --- bundles without, or with others --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "candidates", "why"),
    [
        (lambda entries: entries.clear(), 0, "no engine that chooses the best token; edgellm build makes it"),
        (lambda entries: entries.pop(1), 1, ""),
        (lambda entries: entries.pop(0), 0, "no engine that chooses the best token"),  # of a sort it is any of equals
        (lambda entries: [e.update(library="tensorrt") for e in entries], 0, r"choose-64\.engine is for tensorrt"),
        (lambda entries: [e.update(library_version="1.6") for e in entries], 0, "choose-64.engine was built by"),
        (lambda entries: [e.update(compute_capabilities=["9.0"]) for e in entries], 0, "for compute capability 9.0"),
        (lambda entries: [e.update(graph_sha256="0" * 64) for e in entries], 0, "built from another graph"),
        (lambda entries: [e.update(precision="float16") for e in entries], 0, "computes in float16"),
        (lambda entries: entries[1].update(library_version="1.6"), 1, ""),
    ],
)  # fmt: skip
def test_without_engines_for_it_logits_are_fetched_and_the_answer_is_the_same(
    change: Callable[[Any], Any], candidates: int, why: str, gpu: Any, folder: Path
) -> None:
    entries = choosers(folder)
    change(entries)
    edit_manifest(folder, choosers=entries)
    model = load(folder)
    backend: Any = model.session._backend
    assert model.session.candidates == candidates
    assert (backend.fetches == "") == (why == "")
    if why:
        assert re.search(why, backend.fetches)
    for options in ({}, {"temperature": 0.9, "top_k": 9, "seed": 3}):
        found = model.generate([5, 9, 2], max_new_tokens=8, ignore_eos=True, **options)
        on_cpu = load(folder, device="cpu", threads=1)
        assert found.tokens == on_cpu.generate([5, 9, 2], max_new_tokens=8, ignore_eos=True, **options).tokens


OUTPUT = {"mode": "OUTPUT", "dtype": "FLOAT"}


@pytest.mark.parametrize(
    ("changed", "profile", "says"),
    [
        ({"values": {**OUTPUT, "shape": [-1, 1, 4096]}}, {}, "does not choose 64 of 292 tokens"),
        ({"ids": {**OUTPUT, "shape": [-1, 1, 64]}}, {}, "does not choose 64"),
        ({"more": {**OUTPUT, "shape": [-1, 1, 64]}}, {}, "does not choose 64"),
        ({"logits": {"mode": "INPUT", "dtype": "FLOAT", "shape": [-1, 1, 9]}}, {}, "does not choose 64"),
        ({}, {"max": [MAX_BATCH - 1, 1, 292]}, "other numbers of rows than 1 to 3"),
        ({}, {"min": [2, 1, 292]}, "other numbers of rows than 1 to 3"),
    ],
)
def test_an_engine_of_other_tensors_gets_no_address(
    changed: dict[str, Any], profile: dict[str, Any], says: str, gpu: Any, folder: Path
) -> None:
    file = folder / "choose-64.engine"
    description = json.loads(file.read_text())
    description["changed"] = changed
    description["profile"]["logits"] |= profile
    file.write_text(json.dumps(description))
    sign(folder, file.name)
    with pytest.raises(BackendError, match=rf"choose-64\.engine: .*{says}.*; build the engine again"):
        open_session(Bundle(folder))


@pytest.mark.parametrize(
    "change",
    [
        {"count": 0}, {"count": 293}, {"count": 4000}, {"count": True}, {"count": "64"}, {"role": "decode"},
        {"file": "absent.engine"}, {"file": "../b/choose-64.engine"}, {"library": "os"}, {"compute_capabilities": []},
        {"profile": {"logits": {"min": [1, 1, 0], "opt": [1, 1, 292], "max": [3, 1, 292]}}},
    ],
    ids=str,
)  # fmt: skip
def test_a_choice_that_cannot_be_is_refused(change: dict[str, Any], folder: Path) -> None:
    entries = choosers(folder)
    entries[1].update(change)
    edit_manifest(folder, choosers=entries)
    with pytest.raises(BundleError, match="damaged"):
        Bundle(folder)


def test_choosers_without_graphs_are_refused(folder: Path) -> None:
    edit_manifest(folder, graphs={}, engines=[], capacity=None)
    with pytest.raises(BundleError, match="damaged"):
        Bundle(folder)


def test_choosers_survive_the_manifest_and_an_old_reader_ignores_them(folder: Path) -> None:
    manifest = Bundle(folder).manifest
    assert [chooser.to_json() for chooser in manifest.choosers] == choosers(folder)
    assert manifest.engine_files == {"prefill.engine", "decode.engine", "choose-1.engine", "choose-64.engine"}
    assert {engine.role for engine in manifest.engines} == {"prefill", "decode"}
