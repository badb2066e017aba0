"""Whether an engine of a bundle may run here.

An engine is machine code for one kind of GPU and one version of one library, made from a graph of the bundle. It is
never run on trust: where anything differs it is refused, with the command that builds it again from the graph.
"""

from __future__ import annotations

from edgellm_runtime.bundle import Bundle, Manifest
from edgellm_runtime.bundle.engine_info import ENCODE, ChooserInfo, EngineInfo
from edgellm_runtime.errors import BundleError
from edgellm_runtime.graphs.token_choice import choosing_digest

__all__ = ["check_engine", "choosers_here", "current_compute_capability"]


def check_engine(
    bundle: Bundle, role: str, *, library: str, version: str, compute_capability: str
) -> EngineInfo:  # fmt: skip
    """The engine of a role that runs here.

    Args:
        bundle: opened.
        role: ``prefill`` or ``decode``, or ``encode`` of a bundle that has an encoder.
        library: what is installed here, one of :data:`LIBRARIES`.
        version: its version.
        compute_capability: of the GPU here, such as ``8.6``.

    Raises:
        BundleError: there is none for this library, version and GPU, or it was built from another graph; the text says
            what differs and how to build it here.
    """
    manifest, remedy = bundle.manifest, f"build it here: edgellm build {bundle.path}"
    graphs = {name: graph.file for name, graph in manifest.graphs.items()}
    if graphs and manifest.encoder is not None:
        graphs[ENCODE] = manifest.encoder.file
    if role not in graphs:
        raise BundleError(f"{bundle.path}: is for target {manifest.target['name']}, which has no engines; "
                          "export the model with --target tensorrt")  # fmt: skip
    of_role = [engine for engine in manifest.engines if engine.role == role]
    engines = [engine for engine in of_role if engine.library == library]
    if not engines:
        others = sorted({engine.library for engine in of_role})
        had = f"only one for {' and '.join(others)}" if others else "none"
        raise BundleError(f"{bundle.path}: needs an engine of role {role} for {library}, but holds {had}; {remedy}")
    digest = manifest.files[graphs[role]].sha256
    faults = [_fault(engine, digest, manifest.dtype, version, compute_capability) for engine in engines]
    if None in faults:
        return engines[faults.index(None)]
    raise BundleError(f"{bundle.path}: {engines[0].file} {faults[0]}; {remedy}")


def choosers_here(
    manifest: Manifest, *, library: str, version: str, compute_capability: str
) -> tuple[dict[int, ChooserInfo], str]:
    """The engines that choose tokens and run here, by how many they choose.

    Returns:
        Those, and if there is none for the best token alone, nothing and why: several come from a sort, whose order
        among equals is not the host's. A bundle without them runs all the same, and its logits are fetched.
    """
    found: dict[int, ChooserInfo] = {}
    why = "the bundle has no engine that chooses the best token; edgellm build makes it"
    for chooser in manifest.choosers:
        engine = chooser.engine
        fault = f"is for {engine.library}" if engine.library != library else _fault(
            engine, choosing_digest(manifest.width, chooser.count), "float32", version, compute_capability
        )  # fmt: skip
        if fault is None:
            found[chooser.count] = chooser
        else:
            why = f"{engine.file} {fault}"
    return (found, "") if 1 in found else ({}, why)


def _fault(engine: EngineInfo, graph_sha256: str, dtype: str, version: str, capability: str) -> str | None:
    if engine.graph_sha256 != graph_sha256:
        return "was built from another graph than the one beside it"
    if engine.precision != dtype:
        return f"computes in {engine.precision}, the bundle in {dtype}"
    if engine.library_version != version:
        return f"was built by {engine.library} {engine.library_version}, here is {version}"
    if capability not in engine.compute_capabilities:
        return (
            f"was built for compute capability {', '.join(engine.compute_capabilities)}, the GPU here has {capability}"
        )
    return None


def current_compute_capability() -> str | None:
    """That of the first GPU as its driver tells, such as ``8.6``; None where there is no driver or no GPU."""
    import ctypes  # few programs ask

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, found = ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()]
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for number, attribute in zip(found, (75, 76), strict=True):  # the major and the minor number
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
    return f"{found[0].value}.{found[1].value}"
