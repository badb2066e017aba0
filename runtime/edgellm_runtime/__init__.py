"""Run exported language models without PyTorch.

>>> from edgellm_runtime import load
>>> model = load("bundle")
>>> model.generate("Once upon a time").text

Importing this package is cheap: ONNX Runtime, tokenizers and jinja2 load with the first bundle.
"""

from typing import TYPE_CHECKING, Any

from edgellm_runtime.errors import (
    BackendError,
    BundleError,
    BusyError,
    ContextError,
    OptionError,
    RuntimeFault,
    StateError,
)
from edgellm_runtime.generation.processors import LogitsProcessor
from edgellm_runtime.loading import load, open_session
from edgellm_runtime.spec import Signature, StateSpec, TensorSpec

if TYPE_CHECKING:
    from edgellm_runtime.batching.scheduler import Scheduler, Ticket
    from edgellm_runtime.generation.answer import Generation
    from edgellm_runtime.generation.conversation import Conversation
    from edgellm_runtime.generation.prefix_cache import PrefixCache
    from edgellm_runtime.generation.scoring import Score
    from edgellm_runtime.generation.stream import AsyncStream, Stream
    from edgellm_runtime.generation.text_state import TextState
    from edgellm_runtime.model import Model

__all__ = [
    "AsyncStream",
    "BackendError",
    "BundleError",
    "BusyError",
    "ContextError",
    "Conversation",
    "Generation",
    "LogitsProcessor",
    "Model",
    "OptionError",
    "PrefixCache",
    "RuntimeFault",
    "Scheduler",
    "Score",
    "Signature",
    "StateError",
    "StateSpec",
    "Stream",
    "TensorSpec",
    "TextState",
    "Ticket",
    "load",
    "open_session",
]


_WITH_NUMPY = {  # where the names are that load more than this package
    "AsyncStream": "generation.stream", "Conversation": "generation.conversation", "Generation": "generation.answer",
    "Model": "model", "PrefixCache": "generation.prefix_cache", "Scheduler": "batching.scheduler",
    "Score": "generation.scoring", "Stream": "generation.stream", "TextState": "generation.text_state",
    "Ticket": "batching.scheduler",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """What costs something to have, looked up when it is asked for; ``__version__`` is the distribution's."""
    if name in _WITH_NUMPY:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_WITH_NUMPY[name]}"), name)
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("edgellm")
    except PackageNotFoundError:
        return "unknown"  # run from its source, uninstalled
