"""Answers of a form: what a request says of it, and the grammar that makes them so."""

from __future__ import annotations

import asyncio
from typing import Any

from edgellm_runtime.generation.grammar import Grammar
from edgellm_runtime.server.faults import ApiError
from edgellm_runtime.server.fields import Fields
from edgellm_runtime.server.host import Hosted

__all__ = ["grammar_for", "wanted_schema"]

_ANY_OBJECT = {"type": "object"}


def wanted_schema(form: Fields | None, where: str) -> Any:
    """The JSON schema that answers are to be of; None: they are texts.

    Args:
        form: what the request says: of type ``text``, ``json_object`` or ``json_schema``.
        where: the field's name, for messages.

    Raises:
        ApiError: another type, or no schema.
    """
    if form is None:
        return None
    kind = form.need("type")
    if kind == "json_schema":
        inner = form.object("json_schema") or form  # OpenAI's chats have it a level deeper than its responses
        inner.ignore("name", "description", "strict")
        schema = inner.need("schema")
        inner.done()
        form.done()
        return schema
    if kind not in ("text", "json_object"):
        raise ApiError(f"Invalid value for '{where}.type': {kind!r}; it must be text, json_object or json_schema.",
                       param=f"{where}.type", code="invalid_value")  # fmt: skip
    form.done()
    return _ANY_OBJECT if kind == "json_object" else None


async def grammar_for(hosted: Hosted, schema: Any) -> Grammar:
    """The grammar of a schema, made in a thread of its own: that takes time.

    Raises:
        RuntimeFault: it is no schema, or the server has no library for it.
    """
    return await asyncio.to_thread(lambda: hosted.model.grammar(json_schema=schema))
