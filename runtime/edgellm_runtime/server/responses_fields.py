"""The input of ``/v1/responses``, in the form that a chat template is given: messages, calls, results and reasoning."""

from __future__ import annotations

from typing import Any

from edgellm_runtime.arguments import shown
from edgellm_runtime.server.faults import ApiError
from edgellm_runtime.server.fields import Fields
from edgellm_runtime.server.messages_fields import MOST_MESSAGES, messages_of, text_of
from edgellm_runtime.server.tools import arguments_of, call_of

__all__ = ["input_messages"]

_ROLES = ("system", "developer", "user", "assistant")
_OF_ITEMS = ("type", "id", "status", "phase")  # what an item of an earlier response has besides its message


def input_messages(fields: Fields) -> list[dict[str, Any]]:
    """A text, or items. What the assistant thought, said and called, one after another, is one turn of its.

    Raises:
        ApiError: another form, or an item of a type that is not taken.
    """
    given = fields.need("input")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not 0 < len(given) <= MOST_MESSAGES:
        raise fields.wrong("input", given, "a string or a list of items")
    turns = _Turns()
    for i, item in enumerate(given):
        where = f"input[{i}]"
        if not isinstance(item, dict):
            raise ApiError(f"Invalid value for '{where}': {shown(item)}; it must be an object.", param=where)
        turns.add(item, where)
    return turns.found


class _Turns:
    """Messages as items make them."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def add(self, item: dict[str, Any], where: str) -> None:
        """Take the next item."""
        own = Fields(item, f"{where}.")
        kind = item.get("type", "message")
        if kind == "message":
            self._message({k: v for k, v in item.items() if k not in _OF_ITEMS})
        elif kind == "function_call":
            own.ignore("type", "id", "status", "caller", "namespace")
            name, call_id = str(own.need("name")), str(own.need("call_id"))
            made = call_of(call_id, name, arguments_of(own, own.text("arguments") or "{}"))
            own.done()
            self._assistant().setdefault("tool_calls", []).append(made)
        elif kind == "function_call_output":
            own.ignore("type", "id", "status", "caller")
            output = own.need("output")
            text = "" if output == "" else text_of(output, f"{where}.output")
            self.found.append({"role": "tool", "tool_call_id": str(own.need("call_id")), "content": text})
            own.done()
        elif kind == "reasoning":
            self._reasoning(own)
        else:
            raise ApiError(
                f"'{where}' is of type {shown(kind)}; this server takes messages, function calls, their outputs and "
                "reasoning.", param=where, code="unsupported_content",
            )  # fmt: skip

    def _message(self, plain: dict[str, Any]) -> None:
        (made,) = messages_of([plain], roles=_ROLES)
        last = self.found[-1] if self.found else {}
        if made["role"] == "assistant" and last.get("role") == "assistant" and not last["content"]:
            last["content"] = made["content"]  # which it had thought about, or says beside its calls
        else:
            self.found.append(made)

    def _reasoning(self, own: Fields) -> None:
        own.ignore("type", "id", "status", "encrypted_content")
        parts = [*(own.get("content") or []), *(own.get("summary") or [])]
        texts = [part.get("text") for part in parts if isinstance(part, dict)]
        own.done()
        if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
            raise own.wrong("content", parts, "a list of parts with texts")
        if texts:
            self.found.append({"role": "assistant", "content": "", "reasoning_content": "\n".join(map(str, texts))})

    def _assistant(self) -> dict[str, Any]:
        """The turn of the assistant's that goes on."""
        if not self.found or self.found[-1]["role"] != "assistant":
            self.found.append({"role": "assistant", "content": ""})
        return self.found[-1]
