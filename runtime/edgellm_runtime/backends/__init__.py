"""The libraries that execute a graph, behind one interface."""

from edgellm_runtime.backends.base import Backend, Candidates, check_updates

__all__ = ["Backend", "Candidates", "check_updates"]
