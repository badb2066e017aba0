from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from tiny_bundles import attention_bundle, copied, edit_manifest, hidden_bundle, recurrent_bundle

from edgellm_runtime import BackendError, BundleError, load
from edgellm_runtime import loading as loading_module
from edgellm_runtime.backends.ort import load_graph, session_options
from edgellm_runtime.bundle import Bundle, sha256_of
from edgellm_runtime.bundle import bundle as bundle_module
from edgellm_runtime.graphs.onnx_file import nodes_of, read_model
from edgellm_runtime.text import tokenizer as tokenizer_module

WEIGHTS = "model.onnx.data"
PATIENCE = 30  # seconds after which a test has failed


def spoil(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)


def test_weights_are_compared_while_the_session_is_made_and_all_else_before(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = attention_bundle()  # before anything waits: it may still have to be made
    done: list[str] = []
    making, seen = threading.Event(), list[str]()

    def slowly(file: Path) -> str:
        if file.name == WEIGHTS:
            assert making.wait(PATIENCE), "the session waits for the weights' checksum"
        return sha256_of(file)

    def compare(self: Bundle, name: str, digest: str) -> None:
        done.append(name)
        told(self, name, digest)

    def making_session(*args, **options):
        seen.extend(done)
        making.set()
        return open_session(*args, **options)

    open_session, told = loading_module.unchecked_session, Bundle._compare
    monkeypatch.setattr(bundle_module, "sha256_of", slowly)
    monkeypatch.setattr(Bundle, "_compare", compare)
    monkeypatch.setattr(loading_module, "unchecked_session", making_session)
    model = load(bundle, threads=2)
    assert sorted(seen) == sorted(model.bundle.manifest.files.keys() - {WEIGHTS})
    assert seen[0] == "model.onnx"  # before it is asked what the weights are
    assert sorted(done) == sorted(model.bundle.manifest.files)


def test_for_one_thread_weights_are_compared_by_the_one_that_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, compared = attention_bundle(), list[str]()

    def comparing(file: Path) -> str:
        compared.append(threading.current_thread().name)
        return sha256_of(file)

    monkeypatch.setattr(bundle_module, "sha256_of", comparing)
    load(bundle, threads=1)
    assert set(compared) == {threading.current_thread().name}
    load(bundle, threads=2)
    assert "edgellm-checksums" in compared


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux lists them")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_process_that_loads_and_steps_has_the_threads_that_were_asked_for(threads: int) -> None:
    code = f"""if True:
        import os
        import numpy as np
        from edgellm_runtime import load
        model = load({str(attention_bundle())!r}, threads={threads})
        model.session.step(np.array([[1]]), model.session.new_state())
        print(len(os.listdir("/proc/self/task")))
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= threads


@pytest.mark.parametrize("threads", [1, 2])
def test_loading_imports_no_kernels_that_nobody_asks_for(threads: int) -> None:
    bundle = hidden_bundle(quantize="int4")
    code = f"""if True:
        import sys, threading
        from edgellm_runtime import load
        load({str(bundle)!r}, threads={threads}, kernels="onnxruntime")
        print("edgellm_runtime.model" in sys.modules, "edgellm_runtime.backends.kernel_test" in sys.modules)
        print([name for name in sys.modules if name.startswith("edgellm_runtime.backends.own_")])
        print(threading.active_count())
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True True", "[]", "1"]


def test_a_session_runs_the_nodes_that_all_of_the_library_s_optimizers_leave(tmp_path: Path) -> None:
    graph = hidden_bundle(quantize="int4") / "model.onnx"
    usual = session_options(1)
    usual.optimized_model_filepath = str(tmp_path / "usual.onnx")
    usual.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(graph), usual, providers=["CPUExecutionProvider"])
    ours = session_options(1)
    ours.optimized_model_filepath = str(tmp_path / "ours.onnx")
    ours.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    load_graph(str(graph), graph, ours)
    nodes = [
        sorted(node["op_type"] for node in nodes_of(read_model((tmp_path / name).read_bytes())))
        for name in ("usual.onnx", "ours.onnx")
    ]
    assert nodes[0] == nodes[1]
    assert b"MatMulNBits" in nodes[0]


@pytest.mark.parametrize("error", [BackendError("strange numbers"), None])
def test_damaged_weights_are_the_error_whatever_the_session_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    spoiled = copied(recurrent_bundle(), tmp_path)
    spoil(spoiled, WEIGHTS)

    def making_session(*args, **options):
        if error:
            raise error
        return object()

    monkeypatch.setattr(loading_module, "unchecked_session", making_session)
    with pytest.raises(BundleError, match=f"{WEIGHTS}: checksum .* copy it again"):
        load(spoiled)


@pytest.mark.parametrize("name", ["model.onnx", "goldens.json", "tokenizer.json", "chat_template.jinja"])
def test_no_session_is_made_when_anything_but_weights_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spoiled = copied(attention_bundle(), tmp_path)
    spoil(spoiled, name)
    monkeypatch.setattr(loading_module, "unchecked_session", lambda *_, **__: pytest.fail("a session was made"))
    with pytest.raises(BundleError, match=f"{name}: checksum"):
        load(spoiled)


def test_a_session_error_over_sound_weights_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def making_session(*args, **options):
        raise BackendError("no such device")

    monkeypatch.setattr(loading_module, "unchecked_session", making_session)
    with pytest.raises(BackendError, match="no such device"):
        load(recurrent_bundle())


def test_without_checksums_no_file_is_read_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "sha256_of", lambda file: pytest.fail(f"{file} was read"))
    assert Bundle(recurrent_bundle(), checksums=False).manifest.name
    assert load(recurrent_bundle(), threads=1, checksums=False).session.vocab_size


def test_no_thread_is_left(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    load(recurrent_bundle(), threads=1)
    spoiled = copied(recurrent_bundle(), tmp_path)
    spoil(spoiled, WEIGHTS)
    with pytest.raises(BundleError):
        load(spoiled, threads=1)
    assert set(threading.enumerate()) <= before


def test_the_tokenizer_is_parsed_with_the_first_text_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    library = tokenizer_module._read

    def reading(path: Path, data: bytes | None):
        assert data == path.read_bytes()
        read.append(path)
        return library(path, data)

    monkeypatch.setattr(tokenizer_module, "_read", reading)
    model = load(attention_bundle(), threads=1)
    assert model.has_chat_template
    assert read == []
    first = model.generate("hello", max_new_tokens=2)
    assert model.generate("hello", max_new_tokens=2).text == first.text
    assert len(read) == 1
    assert model.tokenizer is model.tokenizer


@pytest.mark.parametrize("ids", [{"bos_token_id": 10_000}, {"eos_token_ids": [10_000]}])
def test_ids_that_the_model_does_not_have_are_refused_at_once(tmp_path: Path, ids: dict) -> None:
    spoiled = copied(attention_bundle(), tmp_path)
    tokenizer = {"bos_token_id": None, "eos_token_ids": [2], "add_bos": False, "has_chat_template": False} | ids
    edit_manifest(spoiled, tokenizer=tokenizer)
    with pytest.raises(BundleError, match="token id 10000 is outside the model's vocabulary"):
        load(spoiled, threads=1)


@pytest.mark.parametrize("own", [None, "0"])
def test_the_kernels_of_attention_are_made_without_blocks_unless_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    name, seen = "ORT_GQA_DISABLE_FLASH_ATTENTION", []
    monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv(name, own)
    real = onnxruntime.InferenceSession

    def made(*args: Any, **more: Any) -> Any:
        seen.append(os.environ.get(name))
        return real(*args, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", made)
    load(attention_bundle(), device="cpu")
    assert seen == [own or "1"]
    assert os.environ.get(name) == own  # what the program had is back
