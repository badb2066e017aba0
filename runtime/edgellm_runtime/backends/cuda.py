"""Why CUDA does not come up on this machine, and what to do about it. Asks the driver itself; loads no framework."""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from edgellm_runtime.backends.faults import first_line
from edgellm_runtime.errors import BackendError

__all__ = ["CUDA", "check_gpu", "check_package", "count_gpus", "not_running", "preload"]

CUDA = "CUDAExecutionProvider"
_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_INSTALL = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu>=1.30'"
_CPU_INSTEAD = "or run a bundle of the cpu target with --device cpu"


def check_package(ort: Any) -> None:
    """Make sure that the installed ONNX Runtime was built with CUDA; before anything is loaded.

    Raises:
        BackendError: it is the CPU's package, or both are installed and the CPU's files are on top.
    """
    if CUDA in ort.get_available_providers():
        return
    if len(found := _installed()) > 1:
        raise BackendError(
            f"{' and '.join(found)} are both installed and overwrite each other's files, so ONNX Runtime has no CUDA; "
            f"{_INSTALL}"
        )
    raise BackendError(
        f"the installed ONNX Runtime {ort.__version__} is the package without CUDA; {_INSTALL} {_CPU_INSTEAD}"
    )


def _installed() -> list[str]:
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return found


def preload(ort: Any) -> None:
    """Load CUDA's libraries from pip's packages, where they are; the library is quiet about what it does not find."""
    if hasattr(ort, "preload_dlls"):  # since 1.21
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            ort.preload_dlls()


def count_gpus() -> int:
    """NVIDIA GPUs that the driver shows this process.

    Raises:
        BackendError: there is no driver, or it does not start.
    """
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError as error:
        raise BackendError(
            f"no NVIDIA driver ({_DRIVER} is not there); install the driver, or in a container start it with "
            f"--gpus all, {_CPU_INSTEAD}"
        ) from error
    code = driver.cuInit(0)
    if code == _NO_DEVICE:
        return 0
    if code:
        raise BackendError(
            f"the NVIDIA driver does not start (cuInit gives {code}); check that nvidia-smi works, and restart the "
            "machine after a driver update"
        )
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value


def check_gpu() -> None:
    """Make sure that there is a GPU, before a library that would put the CPU in its place is asked for one.

    Raises:
        BackendError: no driver, or no GPU that this process may use.
    """
    if count_gpus() == 0:
        raise BackendError(
            f"no NVIDIA GPU that this process may use; check nvidia-smi and CUDA_VISIBLE_DEVICES, {_CPU_INSTEAD}"
        )


def not_running(ort: Any) -> BackendError:
    """The error of a session that was asked for CUDA and runs on the CPU though there is a GPU."""
    missing = _missing_library(ort)
    return BackendError(
        f"ONNX Runtime {ort.__version__} does not start CUDA{f' ({missing})' if missing else ''}; install CUDA's "
        "libraries with pip install 'onnxruntime-gpu[cuda,cudnn]>=1.30', in the major version that the package asks for"
    )


def _missing_library(ort: Any) -> str:
    """What the loader says of ONNX Runtime's CUDA library; empty if it loads."""
    name = "onnxruntime_providers_cuda.dll" if sys.platform == "win32" else "libonnxruntime_providers_cuda.so"
    for file in Path(ort.__file__).parent.glob(f"capi/{name}"):
        try:
            ctypes.CDLL(str(file))
        except OSError as error:
            return first_line(error)
    return ""
