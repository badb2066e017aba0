"""The doctor: one fault of each code is made, and found; a sound environment has none of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_bundles import attention_bundle

from edgellm.cli import run
from edgellm_runtime.backends import kernel_test, ort
from edgellm_runtime.checks import doctor
from edgellm_runtime.checks.doctor import CODES, diagnose
from edgellm_runtime.checks.machine import cached_share, free_memory

FLAGS = "flags\t\t: fpu sse2 avx2 avx512_vnni"
Break = Callable[[pytest.MonkeyPatch, Path, Path], None]  # told the bundle and the root of proc and sys


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(attention_bundle(), tmp_path / "bundle"))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with memory, cores and instructions enough, and a cache folder."""
    monkeypatch.setenv("EDGELLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "free_disk", lambda path: 1 << 40)
    monkeypatch.setattr(os, "cpu_count", lambda: len(os.sched_getaffinity(0)))
    monkeypatch.setattr(doctor, "_installed", lambda: {"onnxruntime": "1.32.0"})
    proc = tmp_path / "root" / "proc"
    proc.mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:  100000000 kB\nMemAvailable:   50000000 kB\n")
    (proc / "cpuinfo").write_text(f"processor\t: 0\n{FLAGS}\n\nprocessor\t: 1\n")
    return proc.parent


def no_library(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    patch.setitem(sys.modules, "onnxruntime", None)


def two_packages(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    patch.undo()
    patch.setenv("EDGELLM_CACHE_DIR", str(root / "cache"))
    versions = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.30.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    patch.setattr(metadata, "version", version)


def old_library(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    patch.setattr(doctor, "_onnxruntime", lambda: SimpleNamespace(__version__="1.22.0"))


def for_cuda(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    patch.setattr(ort.library(), "get_available_providers", lambda: ["CPUExecutionProvider"])
    edit_manifest(bundle, lambda m: m["target"].update(name="cuda"))


def cuda_falls_back(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    """The package has the kernels, and the library loads none of them."""
    fake = SimpleNamespace(
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"], __version__="1.32.0",
        SessionOptions=SimpleNamespace,
        InferenceSession=lambda *_, **__: SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"]),
    )  # fmt: skip
    patch.setattr(doctor, "_onnxruntime", lambda: fake)
    edit_manifest(bundle, lambda m: m["target"].update(name="cuda"))


def many_threads(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    patch.setenv("EDGELLM_THREADS", "60")
    patch.setattr(doctor, "available_cores", lambda root: 2)
    patch.setattr(os, "cpu_count", lambda: 2)


def quota(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    patch.setattr(os, "cpu_count", lambda: 64)


def old_processor(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    (root / "proc/cpuinfo").write_text("flags\t\t: fpu sse2 ssse3\n")


def no_vnni(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    (root / "proc/cpuinfo").write_text("flags\t\t: fpu sse2 avx2\n")


def old_arm(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    (root / "proc/cpuinfo").write_text("Features\t: fp asimd crc32\n")


def telemetry(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    patch.setenv("ORT_DISABLE_TELEMETRY", "0")


def damage(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    data = bytearray((bundle / "model.onnx.data").read_bytes())
    data[7] ^= 1
    (bundle / "model.onnx.data").write_bytes(data)


def foreign_tokenizer(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    edit_manifest(bundle, lambda m: m["tokenizer"].update(eos_token_ids=[100_000]))


def no_template(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    def drop(manifest: dict) -> None:
        manifest["tokenizer"]["has_chat_template"] = False
        del manifest["files"]["chat_template.jinja"]

    (bundle / "chat_template.jinja").unlink()
    edit_manifest(bundle, drop)


def no_engines(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    from edgellm_runtime.backends import tensorrt
    from edgellm_runtime.errors import BundleError

    def refuse(_: object) -> None:
        raise BundleError("decode.engine was built for GPUs of compute capability 8.6, here is 9.0")

    patch.setattr(tensorrt, "open_engines", refuse)
    shutil.rmtree(bundle)
    shutil.copytree(attention_bundle("tensorrt"), bundle)


def little_memory(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    (root / "proc/meminfo").write_text("MemAvailable:   10 kB\n")


def memory_for_little(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    edit_manifest(bundle, lambda m: m.update(max_context=1 << 20))
    (root / "proc/meminfo").write_text("MemAvailable:   4000 kB\n")


def cold(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    patch.setattr(doctor, "cached_share", lambda path: 0.25)
    patch.setattr(doctor, "_WORTH_TELLING", 1 << 10)


def no_caches(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    patch.setenv("EDGELLM_CACHE_DIR", "")


def no_room(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    patch.setattr(doctor, "free_disk", lambda path: 3 << 20)


def wrong_kernel(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    form = kernel_test.KernelForm("MatMulNBits", 4, 32, level=4, zeros=True)
    right = kernel_test.packed_codes
    patch.setattr(kernel_test, "forms_in", lambda model: {form})
    patch.setattr(kernel_test, "packed_codes", lambda codes, bits: right(codes[:, ::-1], bits))


def no_own_kernels(patch: pytest.MonkeyPatch, bundle: Path, root: Path) -> None:
    patch.setitem(sys.modules, "edgellm_kernels", None)
    patch.setenv("EDGELLM_KERNELS", "own")


FAULTS: list[tuple[str, Break, str]] = [
    ("EDGE001", no_library, "ONNX Runtime is not installed"),
    ("EDGE002", two_packages, r"onnxruntime 1\.32\.0 and onnxruntime-gpu 1\.30\.0 write into one folder"),
    ("EDGE003", old_library, r"ONNX Runtime is 1\.22\.0"),
    ("EDGE004", for_cuda, "the bundle is for CUDA, and this ONNX Runtime has CPUExecutionProvider"),
    ("EDGE004", cuda_falls_back, "falls back to the CPU"),
    ("EDGE005", many_threads, "EDGELLM_THREADS is 60, and this process may use 2 cores"),
    ("EDGE006", quota, r"this process may use \d+ of 64 cores"),
    ("EDGE007", old_processor, "no AVX2"),
    ("EDGE007", no_vnni, "no VNNI"),
    ("EDGE007", old_arm, "no dot-product"),
    ("EDGE008", telemetry, "ORT_DISABLE_TELEMETRY is '0'"),
    ("EDGE009", damage, "model.onnx.data: checksum"),
    ("EDGE010", foreign_tokenizer, "token id 100000 is outside the model's vocabulary"),
    ("EDGE011", no_template, "has no chat template"),
    ("EDGE012", no_engines, "compute capability 8.6, here is 9.0"),
    ("EDGE013", little_memory, "96 tokens take .* and 10,240 bytes are free"),
    ("EDGE014", cold, "of the bundle are read from disk"),
    ("EDGE015", no_caches, "EDGELLM_CACHE_DIR is set to nothing"),
    ("EDGE015", no_room, "has 3 MiB free"),
    ("EDGE016", wrong_kernel, r"MatMulNBits of 4 bits in asymmetric blocks of 32 is off by \d+%"),
    ("EDGE017", memory_for_little, "the whole context takes"),
    ("EDGE018", no_own_kernels, "edgellm-kernels is not installed .*; ONNX Runtime's kernels run instead"),
]


def test_nothing_is_found_where_nothing_is_wrong(bundle: Path, root: Path) -> None:
    assert diagnose(bundle, root=root) == diagnose(root=root) == []


@pytest.mark.parametrize(("code", "broken", "said"), FAULTS, ids=[f"{c} {b.__name__}" for c, b, _ in FAULTS])
def test_a_fault_is_found_and_no_other(
    code: str, broken: Break, said: str, bundle: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, bundle, root)
    found = [f for f in diagnose(bundle, root=root) if f.code != "EDGE007" or code == "EDGE007"]
    assert [f.code for f in found if f.code == code] == [code]
    finding = next(f for f in found if f.code == code)
    assert re.search(said, finding.what) and finding.remedy and "\n" not in finding.what
    allowed = {code, "EDGE006"} if broken is two_packages else {code}
    assert {f.code for f in found} <= allowed


def test_every_code_has_a_fault_and_a_paragraph() -> None:
    assert {code for code, _, _ in FAULTS} == set(CODES)
    text = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    said = re.findall(r"^\*\*(EDGE\d+)\*\* \((\w+)\): ", text, re.MULTILINE)
    assert said == [(code, level) for code, (level, _) in CODES.items()]
    flat = " ".join(text.split())
    assert [code for code, (_, what) in CODES.items() if what.removesuffix(".") not in flat] == []


def test_the_command_says_what_to_do_and_ends_with_1_for_an_error(
    bundle: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(monkeypatch, bundle, root)
    assert run(["doctor", str(bundle)]) == 1
    assert "EDGE009 error: " in (out := capsys.readouterr().out) and "\n  copy it again" in out


def test_memory_of_a_control_group_counts(root: Path) -> None:
    group = root / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("100\n")
    assert free_memory(root) == 50_000_000 * 1024
    (group / "memory.max").write_text("1100\n")
    assert free_memory(root) == 1000


def test_a_file_just_written_is_in_memory(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(1 << 20))
    assert cached_share(tmp_path / "f") in (1.0, None)
    (tmp_path / "empty").touch()
    assert cached_share(tmp_path / "empty") is None
