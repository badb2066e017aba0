"""Manifests, goldens and saved states that mean harm: one sentence, before memory or time is spent on them."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refusal
from tiny_bundles import attention_bundle, copied, edit_manifest, recurrent_bundle, sign

from edgellm.cli import run
from edgellm_runtime import BundleError, StateError, load, open_session
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.verify import read_goldens, verify
from edgellm_runtime.state import State


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return copied(recurrent_bundle(), tmp_path)


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("depth", [33, 600, 100_000])
def test_manifest_nested_deeply_is_refused(capsys: pytest.CaptureFixture[str], bundle: Path, depth: int) -> None:
    text = (bundle / "manifest.json").read_text()
    provenance = "[" * depth + "]" * depth
    (bundle / "manifest.json").write_text(text.replace('"provenance": {', f'"x": {provenance}, "provenance": {{', 1))
    message = refusal(capsys, "inspect", str(bundle))
    assert "manifest.json: not JSON (nested " in message


@pytest.mark.parametrize("version", ["9" * 5000, "1." + "9" * 5000, "", "1.x", "²", 1.3, None, ["1"]])
def test_version_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], bundle: Path, version: Any) -> None:
    edit_manifest(bundle, target={"name": "cpu", "requires": {"onnxruntime": version}})
    message = refusal(capsys, "verify", str(bundle))
    assert "which is none; export the model again" in message
    assert len(message) < 300


@pytest.mark.parametrize("width", [2**31 - 1, (1 << 22) + 1])
def test_logits_of_impossible_width_are_refused(capsys: pytest.CaptureFixture[str], bundle: Path, width: int) -> None:
    signature = json.loads((bundle / "manifest.json").read_text())["signature"]
    signature["outputs"][0]["shape"][-1] = width
    edit_manifest(bundle, signature=signature)
    assert f"logits over {width}, of at most 4194304" in refusal(capsys, "verify", str(bundle))


def test_large_manifest_is_shown_in_little_time(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    edit_manifest(bundle, provenance={"note": "a b " * 200_000}, measured={f"figure {i}": 1.0 for i in range(5000)})
    started = time.process_time()
    assert run(["inspect", str(bundle)]) == 0
    assert time.process_time() - started < 5
    assert "(in full with --json)" in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize("name", ["goldens.json", "tokenizer.json", "chat_template.jinja", "model.onnx", "other.bin"])
def test_file_of_gigabytes_is_refused_unread(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    bundle = copied(attention_bundle(), tmp_path)
    with (bundle / name).open("ab") as file:
        file.truncate(8 << 30)  # a hole: nothing is stored
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    edit_manifest(bundle, files=files | {name: {"bytes": 8 << 30, "sha256": "0" * 64}})
    assert f"{name}: 8589934592 bytes, of at most " in refusal(capsys, "verify", str(bundle))


def spoil_goldens(bundle: Path, change: Callable[[Any], Any]) -> Bundle:
    file = bundle / "goldens.json"
    goldens = json.loads(file.read_text())
    change(goldens)
    file.write_text(json.dumps(goldens))
    sign(bundle, "goldens.json")
    return Bundle(bundle)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda g: g["traces"][0].update(top_logits=np.zeros_like(g["traces"][0]["top_logits"]).tolist()), "are 0"),
        (lambda g: g["traces"][0].update(greedy=[1] * 5000), "a row of 5000 tokens"),
        (lambda g: g.update(traces=g["traces"] * 300), "rows, of at most 256"),
        (lambda g: g["traces"][0].update(tokens=nested(600)), "nested more than 32 deep"),
        (lambda g: g["traces"][0].update(top_ids=[[]] * len(g["traces"][0]["tokens"])), "goldens.json: not goldens"),
        (lambda g: g["traces"][0].update(logsumexp=[1e999] * len(g["traces"][0]["tokens"])), "not finite"),
    ],
)
def test_goldens_that_no_model_gave_are_refused(bundle: Path, change: Any, said: str) -> None:
    opened = spoil_goldens(bundle, change)
    with pytest.raises(BundleError, match=said):
        read_goldens(opened)


def test_goldens_of_ids_that_are_all_0_fail_verification(bundle: Path) -> None:
    def zero(goldens: Any) -> None:
        for trace in goldens["traces"]:
            trace["tokens"] = [0] * len(trace["tokens"])
            trace["top_ids"] = np.zeros_like(trace["top_ids"]).tolist()

    opened = spoil_goldens(bundle, zero)
    assert not verify(opened, open_session(opened, threads=1)).ok


def test_logits_that_are_all_0_fail_verification(bundle: Path) -> None:
    np.zeros_like(np.fromfile(bundle / "model.onnx.data", dtype=np.float32)).tofile(bundle / "model.onnx.data")
    sign(bundle, "model.onnx.data")
    opened = Bundle(bundle)
    checks = {c.name: c for c in verify(opened, open_session(opened, threads=1)).checks}
    assert not checks["logits"].ok
    assert not checks["split"].ok
    assert not checks["batch"].ok


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    session = load(recurrent_bundle(), threads=1).session
    state = session.new_state()
    session.step(np.array([[1, 2, 3]]), state)
    state.save(tmp_path / "state")
    return tmp_path / "state"


def members_of(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_members(file: Path, members: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def load_fault(file: Path) -> str:
    specs = Bundle(recurrent_bundle(), checksums=False).manifest.signature.state
    with pytest.raises(StateError) as caught:
        State.load(file, specs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def header(shape: tuple[int, ...]) -> bytes:
    made = io.BytesIO()
    np.lib.format.write_array_header_1_0(made, {"shape": shape, "fortran_order": False, "descr": "<f4"})
    return made.getvalue()


def test_saved_state_that_unpacks_to_gigabytes_is_refused(saved: Path) -> None:
    members = members_of(saved)
    write_members(saved, members | {"more.npy": header((1 << 28,)) + bytes(1 << 28)}, zipfile.ZIP_DEFLATED)
    assert saved.stat().st_size < 1 << 20
    assert "unpacks to more than it takes" in load_fault(saved)


def test_saved_array_that_says_it_has_more_than_its_bytes_is_refused(saved: Path) -> None:
    members = members_of(saved)
    name = next(n for n in members if not n.startswith("__"))
    write_members(saved, members | {name: header((1 << 40, 1 << 20))})
    assert "an array of float32 (1099511627776, 1048576) in 0 bytes" in load_fault(saved)


@pytest.mark.parametrize("lengths", [[2**31 - 1], [(1 << 30) + 1], [-1], []])
def test_saved_lengths_that_would_overflow_are_refused(saved: Path, lengths: list[int]) -> None:
    made = io.BytesIO()
    np.save(made, np.array(lengths, dtype=np.int32))
    write_members(saved, members_of(saved) | {"__lengths__.npy": made.getvalue()})
    assert "its lengths are damaged" in load_fault(saved)


def test_saved_pickle_is_refused(saved: Path) -> None:
    made = io.BytesIO()
    np.save(made, np.array([{}], dtype=object), allow_pickle=True)
    write_members(saved, members_of(saved) | {"__lengths__.npy": made.getvalue()})
    assert "not a saved state" in load_fault(saved)
