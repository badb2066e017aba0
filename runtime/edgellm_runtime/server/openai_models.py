"""Which models there are, in OpenAI's form and in Anthropic's."""

from __future__ import annotations

import time
from typing import Any

from starlette.responses import Response

from edgellm_runtime.server.call import Call, JsonText
from edgellm_runtime.server.host import Hosted

__all__ = ["list_models", "show_model"]


async def list_models(call: Call) -> Response:
    """All models."""
    entries = [_entry(call, hosted) for hosted in call.host]
    if call.dialect == "anthropic":
        return JsonText(
            {"data": entries, "has_more": False, "first_id": entries[0]["id"], "last_id": entries[-1]["id"]}
        )
    return JsonText({"object": "list", "data": entries})


async def show_model(call: Call) -> Response:
    """One of them."""
    return JsonText(_entry(call, call.host.find(call.request.path_params["model"])))


def _entry(call: Call, hosted: Hosted) -> dict[str, Any]:
    if call.dialect == "anthropic":
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(hosted.created))
        return {"type": "model", "id": hosted.name, "display_name": hosted.name, "created_at": created}
    return {"id": hosted.name, "object": "model", "created": hosted.created, "owned_by": "edgellm"}
