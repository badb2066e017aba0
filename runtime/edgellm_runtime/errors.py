"""Every error the runtime raises on purpose.

RuntimeFault
├── BundleError      a bundle that is missing, damaged, foreign or newer than this runtime
├── BackendError     no execution library, or a device that is not there
├── StateError       a state used with another model, or beyond what it can do (rewinding what is overwritten)
├── ContextError     more tokens than the model's context holds
├── BusyError        as many requests wait as may
└── OptionError      a generation option outside its range (also a ValueError)
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "BundleError",
    "BusyError",
    "ContextError",
    "OptionError",
    "RuntimeFault",
    "StateError",
    "first_line",
]


class RuntimeFault(Exception):
    """Base of the runtime's errors; its text is one sentence with the thing, the value and the remedy."""


class BundleError(RuntimeFault):
    """The bundle cannot be used: missing, damaged, foreign, or written by a newer edgellm."""


class BackendError(RuntimeFault):
    """The library or the device that should run the graph is not there or refused."""


class StateError(RuntimeFault):
    """A state that does not belong to this model or cannot do what was asked."""


class ContextError(RuntimeFault):
    """The tokens do not fit into the model's context."""


class BusyError(RuntimeFault):
    """A request is not taken, since as many wait as may; it may come again."""


class OptionError(RuntimeFault, ValueError):
    """An option's value is outside what it may be."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without its length of a page."""
    said = str(error).strip() or type(error).__name__
    return said.splitlines()[0][:300]
