"""The page to chat at: one file, which may load nothing, and of which only its own script runs."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from edgellm_runtime.server.faults import ApiError

__all__ = ["page"]


async def page(request: Request) -> Response:
    """The page; it wants no key, for it holds none of anyone's data."""
    try:
        request.app.state.limits.check_page(request)
    except ApiError as error:
        return Response(error.message, status_code=error.status, media_type="text/plain")
    text, policy = _page()
    return Response(
        text, media_type="text/html",
        headers={
            "content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        },
    )  # fmt: skip


@cache
def _page() -> tuple[str, str]:
    """The file, and what a browser may do with it: run its style and script, known by their sums, and call here."""
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    def sums(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    rules = {
        "default-src": "'none'", "script-src": sums("script"), "style-src": sums("style"), "connect-src": "'self'",
        "img-src": "data:", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
    }  # fmt: skip
    return text, "; ".join(f"{name} {value}" for name, value in rules.items())
