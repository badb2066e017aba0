"""Sessions in which edgellm's own kernels are tried."""

from __future__ import annotations

from typing import Any

from edgellm_runtime.backends.ort import library
from edgellm_runtime.backends.own_kernels import find

__all__ = ["trial_session"]


def trial_session(graph: bytes, *, threads: int = 1) -> Any:
    """A session of ONNX Runtime over a graph with nodes of these kernels, which are to be tried.

    Args:
        graph: serialized, with its weights.
        threads: that the session computes with.

    Raises:
        BackendError: ONNX Runtime is missing.
        Unusable: the kernels cannot run here.
    """
    ort = library()
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    find(ort).add_to(options)
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
