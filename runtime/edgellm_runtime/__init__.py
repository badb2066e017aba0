"""Run exported language models without PyTorch.

>>> from edgellm_runtime import load
>>> model = load("bundle")
>>> model.generate("Once upon a time").text

Importing this package is cheap: ONNX Runtime, tokenizers and jinja2 load with the first bundle.
"""

from typing import Any

from edgellm_runtime.errors import BackendError, BundleError, ContextError, OptionError, RuntimeFault, StateError
from edgellm_runtime.generation.processors import LogitsProcessor
from edgellm_runtime.loading import load, open_session
from edgellm_runtime.spec import Signature, StateSpec, TensorSpec

__all__ = [
    "BackendError",
    "BundleError",
    "ContextError",
    "LogitsProcessor",
    "OptionError",
    "RuntimeFault",
    "Signature",
    "StateError",
    "StateSpec",
    "TensorSpec",
    "load",
    "open_session",
]


def __getattr__(name: str) -> Any:
    """``__version__``: of the distribution ``edgellm``, looked up when it is asked for."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("edgellm")
    except PackageNotFoundError:
        return "unknown"  # run from its source, uninstalled
