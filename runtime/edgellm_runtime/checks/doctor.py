"""What is wrong here, or slow, or other than it seems: each finding has a code, and a remedy.

Every code has a paragraph in docs/doctor.md. A finding is an ``error`` where something cannot run or is wrong, a
``warning`` where it runs worse than it could, and a ``note`` where it is good to know.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from edgellm_runtime.bundle import GRAPH, Bundle
from edgellm_runtime.checks.machine import cached_share, free_disk, free_memory, processor_flags
from edgellm_runtime.errors import BundleError, RuntimeFault, first_line
from edgellm_runtime.threads import VARIABLE as THREADS
from edgellm_runtime.threads import available_cores, chosen_threads

__all__ = ["CODES", "Finding", "diagnose"]

Level = Literal["error", "warning", "note"]
OLDEST = (1, 30)  # of ONNX Runtime
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn")
_LITTLE_DISK = 256 << 20
_COLD, _WORTH_TELLING = 0.5, 32 << 20

CODES: dict[str, tuple[Level, str]] = {
    "EDGE001": ("error", "ONNX Runtime is missing or does not import"),
    "EDGE002": ("error", "several packages of ONNX Runtime are installed over one another"),
    "EDGE003": ("error", "ONNX Runtime is too old"),
    "EDGE004": ("error", "the GPU that the bundle needs is not used"),
    "EDGE005": ("warning", "more threads are asked for than there are cores"),
    "EDGE006": ("note", "a quota leaves fewer cores than the machine has"),
    "EDGE007": ("warning", "the processor lacks instructions that the quantized kernels want"),
    "EDGE008": ("warning", "telemetry of ONNX Runtime is on"),
    "EDGE009": ("error", "the bundle is damaged, foreign or newer than this runtime"),
    "EDGE010": ("error", "tokenizer and model do not fit"),
    "EDGE011": ("note", "the bundle has no chat template"),
    "EDGE012": ("error", "the engines are not for this machine"),
    "EDGE013": ("error", "memory does not hold the model"),
    "EDGE014": ("note", "the weights are not in memory yet"),
    "EDGE015": ("warning", "nothing can be kept in the user's caches"),
    "EDGE016": ("error", "a kernel computes wrong numbers on this processor"),
    "EDGE017": ("warning", "memory does not hold the model's whole context"),
    "EDGE018": ("warning", "edgellm's own kernels are asked for and cannot run"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Args:
        code: a key of :data:`CODES`.
        what: what is the matter, with the values that were found.
        remedy: what to do.
    """

    code: str
    what: str
    remedy: str

    @property
    def level(self) -> Level:
        """``error``, ``warning`` or ``note``."""
        return CODES[self.code][0]


def diagnose(path: str | Path | None = None, *, device: str = "auto", root: Path = Path("/")) -> list[Finding]:
    """Look at this environment and, if one is given, at a bundle in it; runs no model.

    Args:
        path: the bundle's directory, or None.
        device: on which it is to run, as :func:`edgellm_runtime.load` takes it.
        root: where ``proc`` and ``sys`` are.
    """
    found = [finding for look in (_library, _threads, _caches, _own_kernels) for finding in look(root)]
    found += _processor(root)
    if path is None:
        return found
    try:
        bundle = Bundle(path)
    except RuntimeFault as error:
        return [*found, Finding("EDGE009", str(error), "copy it again, or export the model again")]
    looks: list[Callable[[Bundle, str, Path], Iterator[Finding]]] = [_text, _memory, _weights]
    if not any(finding.code == "EDGE001" for finding in found):
        looks = [_device, *looks, _kernels]
    for look_at in looks:
        found += look_at(bundle, device, root)
    return found


def _installed() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _onnxruntime() -> Any:
    from edgellm_runtime.backends.ort import library

    return library()


def _library(root: Path) -> Iterator[Finding]:
    packages = _installed()
    if len(packages) > 1:
        both = " and ".join(f"{name} {version}" for name, version in packages.items())
        yield Finding(
            "EDGE002", f"{both} write into one folder, so which of them runs is chance",
            f"pip uninstall -y {' '.join(packages)}, then install one of them",
        )  # fmt: skip
    telemetry = os.environ.get("ORT_DISABLE_TELEMETRY")
    if telemetry is not None and telemetry.strip().lower() in ("0", "", "false", "off", "no"):
        yield Finding(
            "EDGE008", f"ORT_DISABLE_TELEMETRY is {telemetry!r}: ONNX Runtime writes a device id and asks for hosts",
            "unset it: edgellm turns telemetry off",
        )  # fmt: skip
    try:
        version = str(_onnxruntime().__version__)
    except Exception as error:  # a broken library raises what it likes
        yield Finding("EDGE001", first_line(error), "pip install onnxruntime, or onnxruntime-gpu for CUDA")
        return
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if numbers < OLDEST:
        least = ".".join(map(str, OLDEST))
        yield Finding("EDGE003", f"ONNX Runtime is {version}, and edgellm needs {least}",
                      f"pip install 'onnxruntime>={least}'")  # fmt: skip


def _threads(root: Path) -> Iterator[Finding]:
    cores = available_cores(root)
    machine = os.cpu_count() or 1
    try:
        asked = chosen_threads()
    except RuntimeFault as error:
        yield Finding("EDGE005", str(error), f"unset {THREADS}")
        return
    if asked is not None and asked > cores:
        yield Finding(
            "EDGE005", f"{THREADS} is {asked}, and this process may use {cores} cores; more threads are slower",
            f"unset {THREADS}, or set it to at most {cores}",
        )  # fmt: skip
    if cores < machine:
        yield Finding("EDGE006", f"this process may use {cores} of {machine} cores",
                      "raise its CPU quota or affinity if it is to be faster")  # fmt: skip


def _processor(root: Path) -> Iterator[Finding]:
    flags = processor_flags(root)
    if flags is None:
        return
    x86, arm = "sse2" in flags, "asimd" in flags
    if x86 and "avx2" not in flags:
        yield Finding("EDGE007", "the processor has no AVX2, so products run in code for any x86-64 processor",
                      "use a newer processor, or expect a fraction of the documented speed")  # fmt: skip
    elif x86 and not flags & {"avx512_vnni", "avx_vnni"}:
        yield Finding("EDGE007", "the processor has no VNNI instructions, so 8-bit products take about twice as long",
                      "compare --quantize int4 and none on it with edgellm bench")  # fmt: skip
    elif arm and "asimddp" not in flags:
        yield Finding("EDGE007", "the processor has no dot-product instructions, so 8-bit products are slow",
                      "compare --quantize none on it with edgellm bench")  # fmt: skip


def _caches(root: Path) -> Iterator[Finding]:
    from edgellm_runtime.backends.caches import VARIABLE, CacheFile

    cache = CacheFile("doctor", "probe")
    if not cache.on:
        why = cache.fault or f"{VARIABLE} is set to nothing"
        yield Finding("EDGE015", why, f"set {VARIABLE} to a directory of your own")
        return
    assert cache.path is not None
    free = free_disk(cache.path)
    cache.write(b"can be written")
    if cache.fault:
        yield Finding("EDGE015", cache.fault, f"set {VARIABLE} to a directory of your own")
    elif free is not None and free < _LITTLE_DISK:
        yield Finding("EDGE015", f"{cache.path.parent} has {free >> 20} MiB free", "make room on that disk")
    if cache.path.exists():
        cache.path.unlink()


def _own_kernels(root: Path) -> Iterator[Finding]:
    from edgellm_runtime.backends.own_kernels import Unusable, find
    from edgellm_runtime.kernel_choice import VARIABLE, chosen_kernels

    try:
        if chosen_kernels() == "own":
            find(_onnxruntime())
    except (RuntimeFault, Unusable) as error:
        yield Finding("EDGE018", f"{first_line(error)}; ONNX Runtime's kernels run instead", f"unset {VARIABLE}")


def _device(bundle: Bundle, device: str, root: Path) -> Iterator[Finding]:
    from edgellm_runtime.loading import device_of

    try:
        where = device_of(bundle, device)
        if where == "tensorrt":
            from edgellm_runtime.backends.tensorrt import open_engines

            open_engines(bundle)
        elif where == "cuda":
            yield from _cuda(bundle)
    except BundleError as error:
        yield Finding("EDGE012", str(error), f"on this machine: edgellm build {bundle.path}")
    except RuntimeFault as error:
        yield Finding("EDGE004", str(error), "set the GPU up for it, or export the model again with --target cpu")


def _cuda(bundle: Bundle) -> Iterator[Finding]:
    ort = _onnxruntime()
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        has = ", ".join(ort.get_available_providers())
        yield Finding("EDGE004", f"the bundle is for CUDA, and this ONNX Runtime has {has}",
                      "pip uninstall -y onnxruntime; pip install onnxruntime-gpu")  # fmt: skip
        return
    from edgellm_runtime.graphs.token_choice import choosing_graph

    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(choosing_graph("float32", 8, 1), options, providers=["CUDAExecutionProvider"])
    if "CUDAExecutionProvider" not in session.get_providers():
        yield Finding("EDGE004", "ONNX Runtime falls back to the CPU, for the CUDA libraries that it needs do not load",
                      "install the CUDA and cuDNN versions that onnxruntime-gpu names")  # fmt: skip


def _text(bundle: Bundle, device: str, root: Path) -> Iterator[Finding]:
    from edgellm_runtime.text.chat import ChatTemplate
    from edgellm_runtime.text.tokenizer import Tokenizer, check_info

    info = bundle.manifest.tokenizer
    if info is None:
        return
    file, vocab = bundle.file("tokenizer.json"), int(bundle.manifest.signature.outputs[0].shape[-1])
    try:
        check_info(file, info, vocab)
        tokenizer = Tokenizer(file, info, vocab_size=vocab, data=bundle.read("tokenizer.json"))
        tokenizer.encode("The quick brown fox, 日本 and 🦊.")
        if info.has_chat_template:
            template = ChatTemplate(bundle.file("chat_template.jinja"), tokenizer, bundle.read("chat_template.jinja"))
            template.encode([{"role": "user", "content": "hello"}])
    except RuntimeFault as error:
        yield Finding("EDGE010", str(error), "export the model with its own tokenizer and template")
    if not info.has_chat_template:
        yield Finding("EDGE011", f"{bundle.manifest.name} answers plain prompts only, for it has no chat template",
                      "export from a folder with chat_template.jinja if the model was trained on chats")  # fmt: skip


def _memory(bundle: Bundle, device: str, root: Path) -> Iterator[Finding]:
    from edgellm_runtime.loading import device_of
    from edgellm_runtime.state.memory_need import memory_need

    free = free_memory(root)
    try:
        where = device_of(bundle, device)
    except RuntimeFault:
        return  # told already
    if free is None or where != "cpu":
        return
    manifest = bundle.manifest
    short, whole = (memory_need(manifest, where, n) for n in (min(512, manifest.max_context), manifest.max_context))
    if short.total > free:
        yield Finding("EDGE013", f"{short.context:,} tokens take {short}, and {free:,} bytes are free",
                      "close other programs, or export with smaller weights")  # fmt: skip
    elif whole.total > free:
        yield Finding("EDGE017", f"the whole context takes {whole}, and {free:,} bytes are free",
                      "keep to shorter texts; max_memory refuses in time what does not fit")  # fmt: skip


def _weights(bundle: Bundle, device: str, root: Path) -> Iterator[Finding]:
    cold = 0
    for name, entry in bundle.manifest.files.items():
        share = cached_share(bundle.path / name)
        if share is not None and share < _COLD:
            cold += int(entry.bytes * (1 - share))
    if cold > _WORTH_TELLING:
        yield Finding("EDGE014", f"{cold >> 20} MiB of the bundle are read from disk when it is loaded first",
                      "nothing: the second load is faster; copy it to a fast disk if the first must be")  # fmt: skip


def _kernels(bundle: Bundle, device: str, root: Path) -> Iterator[Finding]:
    from edgellm_runtime.backends.kernel_test import BOUND, forms_in, kernel_error
    from edgellm_runtime.graphs.onnx_file import read_model

    if bundle.manifest.graphs or GRAPH not in bundle.manifest.files:
        return
    for form in sorted(forms_in(read_model(bundle.read(GRAPH)))):
        try:
            error = kernel_error(form)
        except Exception as fault:  # the library's own
            yield Finding("EDGE016", f"{form} fails: {first_line(fault)}", "install another version of ONNX Runtime")
            continue
        if error > BOUND:
            yield Finding("EDGE016", f"{form} is off by {error:.0%} on this processor",
                          "install another version of ONNX Runtime, or export with --quantize none")  # fmt: skip
