"""The libraries that execute a graph, behind one interface."""

from edgellm_runtime.backends.base import Backend, Candidates

__all__ = ["Backend", "Candidates"]
