"""What was published as a weakness of readers of checkpoints, tried here; docs/security.md has the table."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing_checkpoints import gguf_fields, make_checkpoints
from generation_fakes import byte_level

from edgellm.checkpoints import adapted, load_checkpoint, open_checkpoint
from edgellm.cli.checkpoints import read_checkpoint
from edgellm.errors import CheckpointError, ModelError
from edgellm_exporters.errors import ExportError
from edgellm_exporters.proof.text import check_text
from edgellm_runtime.bundle import TokenizerInfo


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weaknesses")
    make_checkpoints(folder)
    return folder


class Executed(Exception):
    """Somebody else's code has run."""


def executed(*_: Any, **__: Any) -> Any:
    raise Executed


TENSORS, PAIRS, FIRST_KEY = 8, 16, 24
HUGE = 2**64 - 1


def at(data: bytes, number: int) -> int:
    """Where the field is that comes so many places from the header's end: the last tensor's are type and offset."""
    return gguf_fields(data)[number][0]


def put(form: str, place: Callable[[bytes], int], value: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        made = bytearray(data)
        struct.pack_into(form, made, place(data), value)
        return bytes(made)

    return change


def of_array(data: bytes) -> int:
    """Where the first list of the metadata says how many items it has."""
    marker = struct.pack("<II", 9, 8)  # a list, of texts
    return data.index(marker) + len(marker)


def with_alignment(value: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        key = b"general.alignment"
        pair = struct.pack("<Q", len(key)) + key + struct.pack("<II", 4, value)
        (pairs,) = struct.unpack_from("<Q", data, PAIRS)
        return data[:PAIRS] + struct.pack("<Q", pairs + 1) + pair + data[FIRST_KEY:]

    return change


def twice(data: bytes) -> bytes:
    """The first pair of the metadata comes twice."""
    (length,) = struct.unpack_from("<Q", data, FIRST_KEY)
    kind = FIRST_KEY + 8 + length
    assert struct.unpack_from("<I", data, kind) == (8,)  # a text
    (size,) = struct.unpack_from("<Q", data, kind + 4)
    pair = data[FIRST_KEY : kind + 12 + size]
    (pairs,) = struct.unpack_from("<Q", data, PAIRS)
    return data[:PAIRS] + struct.pack("<Q", pairs + 1) + pair + data[FIRST_KEY:]


GGUF: dict[str, Callable[[bytes], bytes]] = {
    "CVE-2024-21836 llama.cpp count of tensors": put("<Q", lambda _: TENSORS, HUGE),
    "CVE-2024-23605 llama.cpp count of pairs": put("<Q", lambda _: PAIRS, HUGE),
    "CVE-2024-23496 llama.cpp length of a text": put("<Q", lambda _: FIRST_KEY, HUGE),
    "CVE-2024-21825 llama.cpp length of a list": put("<Q", of_array, HUGE // 8 + 1),
    "CVE-2024-21802 llama.cpp count of dimensions": put("<I", lambda data: at(data, -4), 2**31 - 1),
    "CVE-2025-53630 llama.cpp offsets that overflow": put("<Q", lambda data: at(data, -1), HUGE - 31),
    "CVE-2026-27940 llama.cpp sizes that overflow": put("<Q", lambda data: at(data, -3), 2**62),
    "CVE-2026-33298 llama.cpp dimensions that overflow": put("<Q", lambda data: at(data, -3), 2**63 + 1),
    "CVE-2026-7482 ollama dimensions beyond the file": put("<Q", lambda data: at(data, -3), 1 << 20),
    "llama.cpp #19856 negative type": put("<i", lambda data: at(data, -2), -1),
    "llama.cpp #19856 unknown type": put("<I", lambda data: at(data, -2), 10_000),
    "llama.cpp #19856 alignment of 0": with_alignment(0),
    "llama.cpp #19856 key twice": twice,
    "dimension of 0": put("<Q", lambda data: at(data, -3), 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("name", GGUF)
def test_a_gguf_header_that_lies_is_refused_in_a_sentence(source: Path, tmp_path: Path, name: str, kind: str) -> None:
    data = (source / f"checkpoint-gguf-{kind}/model.gguf").read_bytes()
    changed = GGUF[name](data)
    assert changed != data
    (tmp_path / "model.gguf").write_bytes(changed)
    with pytest.raises(CheckpointError) as refusal:
        load_checkpoint(tmp_path / "model.gguf")
    assert len(str(refusal.value)) < 2000


def copied_folder(source: Path, name: str, to: Path) -> Path:
    return Path(shutil.copytree(source / name, to / "c"))


REMOTE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "CVE-2026-22807 vLLM auto_map": lambda c: c | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
    "CVE-2025-66448 vLLM auto_map of a part": lambda c: c | {"text_config": {"auto_map": {"AutoConfig": "evil.C"}}},
    "custom_pipelines": lambda c: c | {"custom_pipelines": {"text-generation": {"impl": "evil.Pipe"}}},
}  # fmt: skip


@pytest.mark.parametrize("road", ["native", "general"])
@pytest.mark.parametrize("name", REMOTE)
def test_code_that_a_folder_brings_does_not_run(
    source: Path, tmp_path: Path, name: str, road: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied_folder(source, "checkpoint-foreign", tmp_path)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nModel = Config = Pipe = object\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(REMOTE[name](config)))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    if road == "general":
        pytest.importorskip("transformers")
    with contextlib.suppress(ModelError):
        read_checkpoint(folder, road=road)
    assert not (tmp_path / "ran").exists()


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return executed, ()


PICKLES: dict[str, Callable[[Path], None]] = {
    "pickle in pytorch_model.bin": lambda path: torch.save({"w": Payload()}, path),
    "CVE-2025-32434 torch.save in the old format": lambda path: torch.save(
        {"w": Payload()}, path, _use_new_zipfile_serialization=False
    ),
    "bare pickle": lambda path: path.write_bytes(pickle.dumps({"w": Payload()}, 2)) and None,
}  # fmt: skip


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt"])
@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_read_without_running_it(source: Path, tmp_path: Path, name: str, file: str) -> None:
    folder = copied_folder(source, "checkpoint-torch", tmp_path)
    (folder / "pytorch_model.bin").unlink()
    PICKLES[name](folder / file)
    with pytest.raises(CheckpointError, match="without running its code"):
        load_checkpoint(folder)


def header(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[bytes], bytes]:
    def spoil(data: bytes) -> bytes:
        (length,) = struct.unpack_from("<Q", data)
        made = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
        return struct.pack("<Q", len(made)) + made + data[8 + length :]

    return spoil


def moved(tensors: dict[str, Any], by: int) -> dict[str, Any]:
    """The second tensor begins elsewhere."""
    _, second, *_ = sorted((n for n in tensors if n != "__metadata__"), key=lambda n: tensors[n]["data_offsets"])
    start, end = tensors[second]["data_offsets"]
    return tensors | {second: {**tensors[second], "data_offsets": [start + by, end + by]}}


def enlarged(tensors: dict[str, Any]) -> dict[str, Any]:
    name = next(n for n in tensors if n != "__metadata__")
    return tensors | {name: {**tensors[name], "shape": [2**32, 2**32]}}


SAFETENSORS: dict[str, Callable[[bytes], bytes]] = {
    "header longer than the file": lambda data: struct.pack("<Q", len(data) * 2) + data[8:],
    "header of 2**63 bytes": lambda data: struct.pack("<Q", 1 << 63) + data[8:],
    "header beyond 100 MB": lambda data: struct.pack("<Q", 200 << 20) + data[8:],
    "tensors that overlap": header(lambda tensors: moved(tensors, -16)),
    "hole between tensors": header(lambda tensors: moved(tensors, 16)),
    "shape that overflows": header(enlarged),
    "bytes behind the tensors": lambda data: data + bytes(64),
    "header nested deeply": lambda data: struct.pack("<Q", 20_000) + b"[" * 10_000 + b"]" * 10_000,
}  # fmt: skip


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_safetensors_header_that_lies_is_refused(source: Path, tmp_path: Path, name: str) -> None:
    folder = copied_folder(source, "checkpoint-foreign", tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(SAFETENSORS[name](file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_checkpoint(folder)


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", "a/../../x.safetensors"])
def test_an_index_names_files_beside_it_only(source: Path, tmp_path: Path, place: str) -> None:
    folder = copied_folder(source, "checkpoint-foreign", tmp_path)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": place}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a file beside the index"):
        load_checkpoint(folder)


def test_an_adapters_expression_is_no_program_cve_2025_2099_transformers(source: Path, tmp_path: Path) -> None:
    folder = copied_folder(source, "checkpoint-foreign", tmp_path)
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    slow = {"alpha_pattern": {"(a+)+$": 2}, "rank_pattern": {"(" * 500: 2}, "target_modules": "(.*)*$" * 40}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config | slow))
    with pytest.raises(CheckpointError, match="alpha_pattern"):
        adapted(open_checkpoint(folder), folder / "adapter")


def test_a_template_in_a_gguf_is_refused_before_it_is_in_a_bundle_cve_2024_34359(source: Path, tmp_path: Path) -> None:
    data = (source / "checkpoint-gguf-F32/model.gguf").read_bytes()
    plain = open_checkpoint(source / "checkpoint-gguf-F32/model.gguf").chat_template
    assert plain is not None
    evil = "{{ cycler.__init__.__globals__.os.system('true') }}".ljust(len(plain.encode()))
    (tmp_path / "model.gguf").write_bytes(data.replace(plain.encode(), evil.encode()))
    (tmp_path / "tokenizer.json").write_text(byte_level().to_str())
    (tmp_path / "chat_template.jinja").write_text(open_checkpoint(tmp_path / "model.gguf").chat_template or "")
    assert "cycler" in (tmp_path / "chat_template.jinja").read_text()
    with pytest.raises(ExportError, match="chat template cannot be used"):
        check_text(tmp_path, TokenizerInfo(None, (2,), False, True), None, 1000)


FOUND: dict[str, tuple[str, str, tuple[str, ...], Any]] = {
    "a head whose table would take gigabytes": ("checkpoint-foreign", "config.json", ("head_dim",), 1 << 24),
    "a base that no float holds": ("checkpoint-own", "edgellm.json", ("config", "rope_theta"), 10**400),
    "an epsilon that is none": ("checkpoint-hybrid", "edgellm.json", ("config", "norm_eps"), {"a": 1}),
    "a size beyond 64 bits": ("checkpoint-hybrid", "edgellm.json", ("config", "recurrent_width"), 1 << 63),
    "a context whose table would be as large": ("checkpoint-own", "edgellm.json", ("config", "max_context"), 1 << 30),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_numbers_that_fuzzing_found_are_refused_before_anything_is_made_of_them(
    source: Path, tmp_path: Path, name: str
) -> None:
    kind, file, keys, value = FOUND[name]
    folder = copied_folder(source, kind, tmp_path)
    data = json.loads((folder / file).read_text())
    place = data
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / file).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=keys[-1]) as refusal:
        open_checkpoint(folder)
    assert len(str(refusal.value)) < 2000


def test_an_adapters_factor_that_no_float_holds_is_refused(source: Path, tmp_path: Path) -> None:
    folder = copied_folder(source, "checkpoint-foreign", tmp_path)
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 10**400}))
    with pytest.raises(CheckpointError, match="lora_alpha"):
        adapted(open_checkpoint(folder), folder / "adapter")
