"""From a bundle's path to something that runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_runtime.arguments import check_flag, check_instance, check_integer, check_path, check_text
from edgellm_runtime.bundle.engine_info import LIBRARIES
from edgellm_runtime.errors import BackendError, BundleError
from edgellm_runtime.kernel_choice import chosen_kernels
from edgellm_runtime.threads import thread_count

if TYPE_CHECKING:
    from edgellm_runtime.backends import Backend
    from edgellm_runtime.backends.own_kernels import OwnKernels
    from edgellm_runtime.bundle import Bundle
    from edgellm_runtime.generation.prefix_cache import PrefixCache
    from edgellm_runtime.model import Model
    from edgellm_runtime.session import Session

__all__ = ["DEVICES", "device_of", "load", "open_profiled", "open_session", "session_of", "unchecked_session"]

DEVICES = ("auto", "cpu", "cuda", "tensorrt")
_VERSION = re.compile(r"[0-9]{1,5}(\.[0-9]{1,9}){0,3}")
_CPU_CHUNK = 256  # tokens of a prompt in one step: more are no faster, and take more memory for attention's weights


def load(
    path: str | Path, *, device: str = "auto", threads: int | None = None, checksums: bool = True,
    isolate: bool = False, max_memory: int | None = None, shrink_context: bool = False,
    prefix_cache: PrefixCache | None = None, trusted_keys: Sequence[str | Path] | None = None,
    kernels: str | None = None,
) -> Model:  # fmt: skip
    """Open a bundle, ready to generate.

    Args:
        path: the bundle's directory.
        device: ``cpu``, ``cuda`` or ``tensorrt``; ``auto`` is the one that the bundle was exported for. Where that is
            not there, an error says what it takes; no other device steps in. ``model.device`` says which one runs.
        threads: CPU threads for one step; None for what ``EDGELLM_THREADS`` says, else for every core that this process
            may use: the smaller of its affinity and its control groups' CPU quota. Loading takes no more either.
        checksums: whether to read and compare every file's checksum first; leave it on for bundles from elsewhere.
        isolate: load it first in a process of its own with limits on memory and time, render its template there and run
            two steps, so that what crashes or hangs does so there; Linux, on the CPU. See docs/security.md for what
            that is worth.
        max_memory: bytes that weights and the state of one row of the model's whole context may take, as
            ``Model.memory`` predicts them; what would take more is refused before a graph is loaded.
        shrink_context: shorten the context to what ``max_memory`` leaves room for, instead of refusing the model; who
            then asks for more is told why it is shorter.
        prefix_cache: keeps what prompts begin with from call to call; models may share one, and ``model.prefix_cache``
            may be set later.
        trusted_keys: files of public keys, of which one must have signed the bundle; None for those that the variable
            ``EDGELLM_TRUSTED_KEYS`` names, or for any bundle where it is not set. Engines are then those of signed
            bundles only. Needs model-signing (extra ``sign``).
        kernels: ``own`` puts those of the package edgellm-kernels in the place of ONNX Runtime's where they can run,
            ``onnxruntime`` does not; None for what the variable ``EDGELLM_KERNELS`` says, else ``onnxruntime``. Where
            they are asked for and cannot run, a line is logged and ONNX Runtime's run.

    Returns:
        A model with ``generate``, ``stream``, ``chat`` and ``conversation``. Its tokenizer is parsed with the first
        text, and a file that is none is refused then; nothing is read from the folder any more.

    Raises:
        BundleError: the bundle is missing, damaged, foreign or newer than this runtime.
        BackendError: no library can run it here, or the device is not there.
        OptionError: an argument of the wrong kind, ``isolate`` where there is no such process, or a model that takes
            more than ``max_memory``.
    """
    from edgellm_runtime.bundle import Bundle

    path, checksums = check_path("path", path), check_flag("checksums", checksums)
    _check_trust(Path(path), trusted_keys)
    threads = thread_count(threads)
    max_memory = None if max_memory is None else check_integer("max_memory", max_memory, 1)
    if prefix_cache is not None:
        from edgellm_runtime.generation.prefix_cache import PrefixCache

        check_instance("prefix_cache", prefix_cache, PrefixCache, "PrefixCache() makes one")
    if check_flag("isolate", isolate):
        from edgellm_runtime.isolation import rehearse

        rehearse(path, device=device, checksums=checksums, kernels=kernels)
    shrinks, context = check_flag("shrink_context", shrink_context), None
    # The weights are compared from here on, so what takes long to import is imported below.
    with Bundle.while_checking(path, checksums=checksums, beside=threads > 1) as bundle:
        if max_memory is not None:
            from edgellm_runtime.state.memory_need import context_within_memory

            context = context_within_memory(bundle.manifest, device_of(bundle, device), max_memory, shrinks=shrinks)
        session = unchecked_session(bundle, device=device, threads=threads, kernels=kernels)
        import edgellm_runtime.model  # noqa: F401  while the weights' checksums are still compared
    if context is not None and context < session.max_context:
        session.shorten(context, f"shortened, since max_memory is {max_memory:,} bytes")
    model = _model(session, bundle)
    model.prefix_cache = prefix_cache
    return model


def _model(session: Session, bundle: Bundle) -> Model:
    """A model with its text, read while the folder is there."""
    from edgellm_runtime.model import Model
    from edgellm_runtime.text.tokenizer import Tokenizer, check_info

    info = bundle.manifest.tokenizer
    if info is None:
        return Model(session, None, bundle)
    file = bundle.file("tokenizer.json")
    check_info(file, info, session.vocab_size)
    data = bundle.read("tokenizer.json")  # by the first text the folder may be gone, or the file another
    template = bundle.read("chat_template.jinja") if info.has_chat_template else None
    # Parsed with the first text: for a vocabulary of 50,000 that takes 0.1 s and 40 MB, which token ids need not pay.
    return Model(session, lambda: Tokenizer(file, info, vocab_size=session.vocab_size, data=data), bundle, template)


def open_session(
    bundle: Bundle, *, device: str = "auto", threads: int | None = None, kernels: str | None = None
) -> Session:
    """Steps of an opened bundle, without text; arguments and errors as :func:`load`."""
    from edgellm_runtime.bundle import Bundle

    check_instance("bundle", bundle, Bundle, "edgellm_runtime.bundle.Bundle(path) opens one")
    _check_trust(bundle.path, None)
    return unchecked_session(bundle, device=device, threads=threads, kernels=kernels)


def open_profiled(
    bundle: Bundle, notes: Path, *, device: str = "auto", threads: int | None = None, kernels: str | None = None
) -> tuple[Session, Any]:
    """Steps of an opened bundle for whoever wants to know what each kernel takes, and the backend, which tells it.

    Args:
        bundle: as for :func:`open_session`.
        notes: how the names of ONNX Runtime's profiles begin, which its backends write from now on.
        device: as for :func:`load`.
        threads: likewise.
        kernels: likewise.
    """
    _check_trust(bundle.path, None)
    backend = _backend(bundle, device_of(bundle, device), thread_count(threads), chosen_kernels(kernels), notes)
    return session_of(bundle, backend), backend


def _check_trust(path: Path, keys: Sequence[str | Path] | None) -> None:
    """Hold a bundle to the policy, if there is one."""
    from edgellm_runtime.bundle.signature import check_signature, policy

    if (trusted := policy(keys)) is not None:
        check_signature(path, trusted)


def unchecked_session(
    bundle: Bundle, *, device: str = "auto", threads: int | None = None, kernels: str | None = None
) -> Session:
    """Steps of an opened bundle, whoever signed it: of one's own making, or held to the policy before."""
    if check_text("device", device) not in DEVICES:
        raise BackendError(f"unknown device {device!r}; this runtime has {', '.join(DEVICES)}")
    threads, kernels = thread_count(threads), chosen_kernels(kernels)
    return session_of(bundle, _backend(bundle, device_of(bundle, device), threads, kernels))


def session_of(bundle: Bundle, backend: Backend) -> Session:
    """Steps of an opened bundle with a backend that was made for it."""
    from edgellm_runtime.backends.draft_graph import DraftGraph
    from edgellm_runtime.backends.graph_roles import GraphRoles
    from edgellm_runtime.session import Session

    manifest = bundle.manifest
    sizes: dict[str, Any] = {"chunk": _CPU_CHUNK} if backend.device == "cpu" else {}
    if manifest.graphs:
        sizes = {"chunk": GraphRoles.of(manifest).longest, "capacity": manifest.capacity}
    drafter, hidden = None, manifest.signature.hidden
    if manifest.drafter is not None and hidden is not None:
        file, width = bundle.file(manifest.drafter.file), manifest.drafter.width
        # on one thread: a second pool of threads would spin beside the model's
        kernels: OwnKernels | None = getattr(backend, "kernels", None)
        drafter = DraftGraph(file, int(hidden.shape[-1]), width, threads=1, kernels=kernels)
    return Session(
        backend, manifest.signature, max_context=manifest.max_context, ragged_chunks=manifest.ragged_chunks,
        vocab_size=manifest.vocab_size or None, encoder=manifest.encoder, drafter=drafter, adapters=manifest.adapters,
        **sizes,
    )  # fmt: skip


def device_of(bundle: Bundle, device: str) -> str:
    """The device to run on: what was asked for or, if that is ``auto``, what the bundle was exported for."""
    manifest = bundle.manifest
    target = str(manifest.target["name"])
    home = target if target in DEVICES else "cpu"
    if device in ("auto", home):
        return home
    if device != "cpu":
        raise BackendError(
            f"{bundle.path}: was exported for target {target}, which does not run on {device}; export the model again "
            f"with --target {device}, or use device {home!r}"
        )
    if manifest.dtype == "bfloat16":
        raise BackendError(
            f"{bundle.path}: computes in bfloat16, which ONNX Runtime's CPU kernels do not; use device {home!r}, or "
            "export the model again with --dtype float16 or for --target cpu"
        )
    return "cpu"


def _backend(bundle: Bundle, device: str, threads: int | None, kernels: str, notes: Path | None = None) -> Backend:
    """What runs the bundle's graphs there; never another device than that one.

    With ``notes``, what ONNX Runtime notes of each kernel goes to files whose names begin so.
    """
    _check_requirements(bundle, device)
    from edgellm_runtime.bundle import GRAPH

    manifest = bundle.manifest
    encoder = None if manifest.encoder is None else bundle.file(manifest.encoder.file)
    if device == "tensorrt":
        from edgellm_runtime.backends.tensorrt import open_engines

        return open_engines(bundle)
    if device == "cuda":
        from edgellm_runtime.backends.ort_device import OrtDeviceBackend

        return OrtDeviceBackend(
            bundle.file(GRAPH), manifest.signature, max_context=manifest.max_context, capture=notes is None,
            profile=notes, encoder=encoder,
        )  # fmt: skip
    if manifest.graphs:
        from edgellm_runtime.backends.graph_roles import GraphRoles
        from edgellm_runtime.backends.ort_roles import OrtRolesBackend

        return OrtRolesBackend(
            bundle.path, GraphRoles.of(manifest), manifest.signature, threads=threads, encoder=encoder
        )  # fmt: skip
    from edgellm_runtime.backends.ort import OrtBackend

    own, swapped = None, None
    if manifest.quantization.get("method", "none") != "none":
        from edgellm_runtime.backends.kernel_test import check_kernels

        check_kernels(bundle.file(GRAPH), manifest.files[GRAPH].sha256)
        if kernels == "own":
            from edgellm_runtime.backends.own_trial import usable_kernels

            own, swapped = usable_kernels(bundle.file(GRAPH), kernels, bundle.take_graph(GRAPH)) or (None, None)
    fusions = manifest.dtype == "float32"
    return OrtBackend(
        bundle.file(GRAPH), manifest.signature, threads=threads, fusions=fusions, profile=notes, encoder=encoder,
        kernels=own, swapped=swapped,
    )  # fmt: skip


def _check_requirements(bundle: Bundle, device: str) -> None:
    """Compare the libraries that the bundle needs with those installed, before any work."""
    requires = bundle.manifest.target.get("requires", {})
    if not isinstance(requires, dict) or not requires.keys() <= {"onnxruntime", *LIBRARIES}:
        raise BundleError(
            f"{bundle.path}: needs {str(requires)[:200]}, which this runtime does not know; install a newer edgellm"
        )
    if wrong := [v for v in requires.values() if not isinstance(v, str) or not _VERSION.fullmatch(v)]:
        raise BundleError(f"{bundle.path}: needs version {str(wrong[0])[:40]!r}, which is none; export the model again")
    if device == "tensorrt":  # an engine runs on the very version that built it, which is compared with its fingerprint
        return
    if requires and "onnxruntime" not in requires:
        raise BundleError(
            f"{bundle.path}: runs with {' or '.join(requires)}, not with ONNX Runtime; use device 'tensorrt'"
        )
    from edgellm_runtime.backends.ort import library

    found, needed = library().__version__, str(requires.get("onnxruntime", "0"))
    if _numbers(found) < _numbers(needed):
        package = "onnxruntime-gpu" if device == "cuda" else "onnxruntime"
        raise BackendError(
            f"{bundle.path}: needs ONNX Runtime {needed}, here is {found}; pip install '{package}>={needed}'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
