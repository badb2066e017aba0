"""The library of edgellm's own kernels: where it is, and whether this processor can run it. It imports nothing else."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

__all__ = ["INTERFACE", "__version__", "form", "library"]

__version__ = "0.5.0"
INTERFACE = 5  # of the operators; edgellm asks for the one that it was written for


def library() -> Path:
    """The shared library, which ONNX Runtime registers.

    Raises:
        FileNotFoundError: the package was installed without it.
    """
    folder = Path(__file__).parent
    for suffix in (".so", ".dylib"):
        if (path := folder / f"libedgellm_kernels{suffix}").is_file():
            return path
    raise FileNotFoundError(f"{folder} has no library; install edgellm-kernels again")


@functools.cache
def form() -> str:
    """The form of the kernels that this processor runs, such as ``avx512-vnni``; empty where there is none.

    Raises:
        OSError: the library does not load here.
    """
    loaded = ctypes.CDLL(str(library()))
    loaded.edgellm_form.restype = ctypes.c_char_p
    found: bytes = loaded.edgellm_form()
    return found.decode()
