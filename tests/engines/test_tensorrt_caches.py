"""What TensorRT times and what TensorRT for RTX makes of an engine, kept for the next process; no GPU.

The real libraries do neither without one, so recorded stand-ins do: they make a kernel for each engine and for each
shape that it has not run yet, unless their cache says that it was made before.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorrt_bundles import machine_with_gpu, made
from tensorrt_fakes import FakeRuntimeCache, FakeRuntimeConfig
from tiny_bundles import sign

from edgellm_exporters.engines.timing_cache import TIMING_API, TimingCache
from edgellm_runtime import load, open_session
from edgellm_runtime.backends import caches
from edgellm_runtime.backends.caches import VARIABLE
from edgellm_runtime.backends.tensorrt_kernels import RTX_API
from edgellm_runtime.bundle import Bundle


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    return machine_with_gpu(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache directory, not made yet."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "caches"))
    caches._log_once.cache_clear()
    return tmp_path / "caches"


def used(gpu: Any, bundle: Path | None = None, rows: int = 1) -> list[str]:
    """The kernels that a new process makes to load a bundle and say a few tokens."""
    gpu.library.made.clear()
    session = open_session(Bundle(bundle or made("attention")))
    state = session.new_state(rows, 20)
    session.step(np.full((rows, 3), 4), state)
    for _ in range(3):
        session.best(np.full((rows, 1), 5), state, 1)
    del session, state
    gc.collect()
    return list(gpu.library.made)


# --- kernels of TensorRT for RTX ------------------------------------------------------------------------------------


def test_the_second_load_makes_no_kernel(gpu: Any, folder: Path) -> None:
    first = used(gpu)
    assert len(first) == 4 + 3  # each engine as it is loaded, and the three that ran
    assert used(gpu) == []
    assert len(list(folder.iterdir())) == 4
    assert not [path for path in made("attention").iterdir() if path.suffix == ".cache"]


def test_caches_are_saved_after_the_first_run_and_when_the_engines_go(gpu: Any, folder: Path) -> None:
    session = open_session(Bundle(made("attention")))
    assert not folder.exists(), "loading alone has not made all"
    state = session.new_state(1, 20)
    session.step(np.full((1, 3), 4), state)
    assert len(list(folder.iterdir())) == 1
    session.best(np.array([[5]]), state, 1)
    assert len(list(folder.iterdir())) == 3
    session.step(np.full((2, 3), 4), session.new_state(2, 8))  # a shape that comes later
    made_before = [*gpu.library.made]
    del session, state
    gc.collect()
    assert len(list(folder.iterdir())) == 4
    gpu.library.made.clear()
    assert used(gpu, rows=1) == [] and made_before
    held = open_session(Bundle(made("attention")))
    held.step(np.full((2, 3), 4), held.new_state(2, 8))
    assert gpu.library.made == []


def test_a_process_that_ends_saves_what_it_has(tmp_path: Path) -> None:
    code = """
import sys
sys.path[:0] = [sys.argv[1]]
import numpy as np, pytest
from tensorrt_bundles import machine_with_gpu, made
from edgellm_runtime import open_session
from edgellm_runtime.backends.tensorrt_kernels import RTX_API
from edgellm_runtime.bundle import Bundle
with pytest.MonkeyPatch.context() as patch:
    gpu = machine_with_gpu(patch)
    session = open_session(Bundle(sys.argv[2]))
"""
    arguments = [sys.executable, "-c", code, str(Path(__file__).parents[1]), str(made("attention"))]
    environment = {**os.environ, VARIABLE: str(tmp_path / "caches")}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "caches").iterdir())) == 4


@pytest.mark.parametrize("change", ["version", "capability", "engine"])
def test_another_library_gpu_or_engine_has_a_cache_of_its_own(
    change: str, gpu: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used(gpu)
    bundle = Path(shutil.copytree(made("attention"), tmp_path / "b"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    entries = [*manifest["engines"], *manifest["choosers"]]
    if change == "version":
        gpu.library.__version__ = "1.8.0"
        for entry in entries:
            entry["library_version"] = "1.8.0"
    elif change == "capability":
        gpu.cuda.capability = (9, 0)
        for entry in entries:
            entry["compute_capabilities"] = ["9.0"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    if change == "engine":
        file = bundle / "decode.engine"
        file.write_text(file.read_text() + " ")
        sign(bundle, file.name)
    again = used(gpu, bundle)
    assert len(again) == (2 if change == "engine" else 7)
    assert len(list(folder.iterdir())) == (5 if change == "engine" else 8)


def test_without_caches_everything_is_made_each_time(gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "")
    assert len(used(gpu)) == len(used(gpu)) == 7
    assert list(tmp_path.iterdir()) == []


def faults(gpu: Any) -> set[str]:
    backend: Any = open_session(Bundle(made("attention")))._backend
    return {engine.kernels.fault for engine in (*backend._engines.values(), *backend._choosers.values())}


def test_a_damaged_cache_costs_its_kernels_only(gpu: Any, folder: Path) -> None:
    used(gpu)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert len(used(gpu)) == 7
    assert used(gpu) == []


def test_a_cache_that_the_library_refuses_is_dropped_and_made_anew(
    gpu: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used(gpu)
    with monkeypatch.context() as patch:
        patch.setattr(FakeRuntimeCache, "deserialize", lambda cache, data: False)
        assert all("is refused by the library; it is made anew" in fault for fault in faults(gpu))
        assert len(used(gpu)) == 7
    assert used(gpu) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda patch, gpu: setattr(gpu.library, "no_config", "no memory for a configuration"),
        lambda patch, gpu: patch.setattr(FakeRuntimeConfig, "set_runtime_cache", lambda config, cache: False),
        lambda patch, gpu: patch.setattr(FakeRuntimeCache, "serialize", lambda cache: None),
        lambda patch, gpu: patch.setattr(FakeRuntimeCache, "serialize", lambda cache: 1 / 0),
        lambda patch, gpu: patch.setenv(VARIABLE, __file__),
    ],
    ids=["no configuration", "not attached", "nothing serialized", "an error", "no directory"],
)
def test_no_fault_of_a_cache_keeps_a_model_from_running(
    spoil: Callable[[Any, Any], None], gpu: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(made("attention"), device="cpu", threads=1).generate([5, 9, 2], max_new_tokens=6, ignore_eos=True)
    spoil(monkeypatch, gpu)
    model = load(made("attention"))
    assert model.generate([5, 9, 2], max_new_tokens=6, ignore_eos=True).tokens == expected.tokens
    del model
    gc.collect()
    assert not folder.exists() or not list(folder.iterdir())


def documented(api: Mapping[str, Sequence[str]], section: str) -> bool:
    data = json.loads((Path(__file__).parents[1] / "data" / "tensorrt_api.json").read_text())
    assert {source for names in data[section].values() for source in names.values()} <= data["sources"].keys()
    assert not {f"{owner}.{name}" for owner, names in api.items() for name in names} & set(data["removed"])
    return {owner: set(names) for owner, names in api.items()} == {o: set(n) for o, n in data[section].items()}


def test_names_for_kernels_are_in_the_documentation_and_in_the_installed_library() -> None:
    assert documented(RTX_API, "rtx")
    library = pytest.importorskip("tensorrt_rtx")
    missing = [f"{o}.{n}" for o, names in RTX_API.items() for n in names if not hasattr(getattr(library, o, None), n)]
    assert not missing


# --- TensorRT's timing cache ----------------------------------------------------------------------------------------


class FakeTimings:
    def __init__(self, found: list[str]) -> None:
        self.found = found

    def serialize(self) -> bytes:
        return json.dumps({"gpu": "GPU-1", "found": self.found}).encode()


class FakeConfig:
    """``IBuilderConfig`` as far as timings go; it refuses those of another GPU, as the library does."""

    def __init__(self, gpu: str = "GPU-1", breaks: str = "") -> None:
        self.gpu, self.breaks, self.cache = gpu, breaks, None

    def create_timing_cache(self, data: bytes) -> FakeTimings | None:
        if self.breaks == "create":
            raise RuntimeError("no GPU")
        if not data:
            return FakeTimings([])
        said = json.loads(data)
        return FakeTimings(said["found"]) if said["gpu"] == self.gpu else None

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        self.cache = cache
        return self.breaks != "set"

    def get_timing_cache(self) -> Any:
        if self.breaks == "get":
            raise RuntimeError("it is gone")
        return None if self.breaks == "none" else self.cache

    def build(self, layers: list[str]) -> list[str]:
        """The layers that are timed: those of which the cache does not know."""
        known = self.cache.found if self.cache is not None else []
        timed = [layer for layer in layers if layer not in known]
        known += timed
        return timed


def built(
    layers: list[str], config: FakeConfig | None = None, library: str = "tensorrt", version: str = "11.4", *here: str
) -> list[str]:
    config = config or FakeConfig()
    cache = TimingCache(library, version, here or ("8.6",), config)
    timed = config.build(layers)
    cache.keep()
    return timed


def test_the_second_build_times_only_what_is_new(folder: Path) -> None:
    assert built(["a", "b"]) == ["a", "b"]
    assert built(["a", "b", "c"]) == ["c"]
    assert built(["a", "b", "c"]) == []
    assert len(list(folder.iterdir())) == 1


def test_another_version_or_gpu_is_timed_anew(folder: Path) -> None:
    built(["a"])
    assert built(["a"], None, "tensorrt", "11.5") == ["a"]
    assert built(["a"], None, "tensorrt", "11.4", "9.0") == ["a"]
    assert len(list(folder.iterdir())) == 3
    assert built(["a"], FakeConfig(gpu="GPU-2")) == ["a"], "of the same kind, but the library refuses its timings"
    assert len(list(folder.iterdir())) == 3


def test_rtx_is_not_asked_for_timings(folder: Path) -> None:
    """Its names for them do nothing but look for a GPU, of which a build needs none."""
    config = FakeConfig(breaks="create")
    assert built(["a"], config, "tensorrt_rtx", "1.7.1") == ["a"]
    assert config.cache is None and not folder.exists()


@pytest.mark.parametrize("breaks", ["create", "set", "get", "none"])
def test_no_fault_of_the_timings_keeps_an_engine_from_being_built(breaks: str, folder: Path) -> None:
    assert built(["a"], FakeConfig(breaks=breaks)) == ["a"]
    assert not folder.exists()


def test_timings_that_are_damaged_or_switched_off_are_made_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(["a"])
    (path,) = folder.iterdir()
    path.write_bytes(b"damaged")
    assert built(["a"]) == ["a"]
    assert built(["a"]) == []
    monkeypatch.setenv(VARIABLE, "")
    assert built(["a"]) == ["a"]


def test_names_for_timings_are_in_tensorrts_documentation() -> None:
    assert documented(TIMING_API, "timing")
