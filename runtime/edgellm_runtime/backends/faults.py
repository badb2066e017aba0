"""What a library's failure means for the one who asked: memory that ran out, or something else, in one sentence."""

from __future__ import annotations

import re

from edgellm_runtime.errors import BackendError, first_line

__all__ = ["first_line", "is_out_of_memory", "load_fault", "step_fault"]

# What ONNX Runtime, CUDA and TensorRT say when memory runs out; they have no common kind of error.
_MEMORY = re.compile(
    r"out of memory|failed to allocate|bad_alloc|memoryallocation|cannot allocate|BFCArena|allocation failed|OOM\b",
    re.IGNORECASE,
)

_STATUS = re.compile(r"^\[\w+\] : \d+ : \w+ : ")
_UNKNOWN = re.compile(r"Could not find an implementation for (\S+) node with name '([^']*)'")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a library's error says that memory ran out."""
    return isinstance(error, MemoryError) or bool(_MEMORY.search(str(error)))


def step_fault(library: str, error: BaseException) -> BackendError:
    """The error of a step that failed."""
    if is_out_of_memory(error):
        return BackendError(
            f"the device has no memory left for this step ({library}: {_said(error)}); use fewer rows or a "
            "shorter context, or close other programs on the device"
        )
    return BackendError(f"{library} failed in a step: {_said(error)}")


def load_fault(library: str, graph: object, error: BaseException) -> BackendError:
    """The error of a graph or an engine that could not be loaded."""
    if is_out_of_memory(error):
        return BackendError(
            f"{graph}: the device has no memory for the model ({library}: {_said(error)}); close other programs "
            "on the device, or export the model again with --quantize int4"
        )
    return BackendError(f"{graph}: {library} refuses the graph: {_said(error)}")


def _said(error: BaseException) -> str:
    """What the library says, without the number that it gives to the fault."""
    said = _STATUS.sub("", first_line(error))
    return _UNKNOWN.sub(r"it has no kernel for \1 in this precision (node \2)", said)
