"""The carried state, and where its tensors live."""

from edgellm_runtime.state.state import State

__all__ = ["State"]
