"""Who may call: keys, names, web pages, how often and how much."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request

from edgellm_runtime.server.faults import ApiError
from edgellm_runtime.server.options import ServerOptions, is_loopback

__all__ = ["Limits", "read_body"]

_CALLERS = 10_000  # that are remembered; the one that was silent longest is forgotten first
_BODY_S = 60.0  # a body that takes longer is not waited for


class Limits:
    """Checks each request before anything is done for it.

    Args:
        options: of the server.
        clock: tells seconds.
    """

    def __init__(self, options: ServerOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self._options, self._clock = options, clock
        self._keys = [key.encode() for key in options.api_keys]
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # caller to requests left, and when

    def check_page(self, request: Request) -> None:
        """See that a request names this machine, and comes from no foreign web page.

        Without the first, a web page could have its own name lead here (DNS rebinding) and read what is answered.

        Raises:
            ApiError: 403.
        """
        headers, o = request.headers, self._options
        name = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        if is_loopback(o.host) and not (is_loopback(name) or name in o.allow_hosts):
            raise ApiError(f"This server is not known as {name[:100]!r}; name it with --allow-host.", 403,
                           code="unknown_host")  # fmt: skip
        origin = headers.get("origin")
        if origin is not None and origin not in o.allow_origins and urlsplit(origin).netloc != headers.get("host"):
            raise ApiError(f"Pages of {origin[:100]!r} may not call this server; name it with --allow-origin.", 403,
                           code="unknown_origin")  # fmt: skip

    def check(self, request: Request) -> None:
        """See that a request may be answered.

        Raises:
            ApiError: 401, 403 or 429.
        """
        self.check_page(request)
        key = _key_of(request.headers)
        if self._keys and not sum(hmac.compare_digest(key, known) for known in self._keys):  # all, at one pace
            said = "Incorrect API key provided." if key else "No API key provided."
            raise ApiError(f"{said} Send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'.", 401,
                           code="invalid_api_key")  # fmt: skip
        address = request.client.host if request.client is not None else ""
        self._count(key.decode() if self._keys else address)

    def _count(self, caller: str) -> None:
        """Take one of the requests that a caller has left; they come back evenly."""
        rate = self._options.rate
        if not rate:
            return
        now = self._clock()
        left, since = self._left.pop(caller, (float(rate), now))
        left = min(left + (now - since) * rate / 60, float(rate))
        while len(self._left) >= _CALLERS:
            self._left.popitem(last=False)
        self._left[caller] = (left - 1 if left >= 1 else left, now)
        if left < 1:
            wait = max(1, round((1 - left) * 60 / rate))
            raise ApiError(f"Rate limit reached: {rate} requests a minute; try again in {wait} s.", 429,
                           code="rate_limit_exceeded", retry_after=wait, retry=True)  # fmt: skip


def _key_of(headers: Mapping[str, str]) -> bytes:
    bearer = headers.get("authorization", "")
    key = bearer[7:].strip() if bearer[:7].lower() == "bearer " else headers.get("x-api-key", "")
    return key.encode(errors="replace")


async def read_body(request: Request, most: int) -> bytes:
    """A request's JSON body, no more of it than it may have.

    Raises:
        ApiError: 413, 415, or 408 for one that does not come.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # a foreign page may send the others without asking
        raise ApiError(f"The body is {kind[:100] or 'of no type'!r}; send it as application/json.", 415)
    said = request.headers.get("content-length", "0")
    if not said.isdecimal() or len(said) > 18 or int(said) > most:
        raise _too_large(most)
    parts, size = list[bytes](), 0
    try:
        async with asyncio.timeout(_BODY_S):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise _too_large(most)
                parts.append(part)
    except TimeoutError:
        raise ApiError(f"The body did not come within {_BODY_S:.0f} s.", 408) from None
    except ClientDisconnect:
        raise ApiError("The client has gone.", 499) from None
    return b"".join(parts)


def _too_large(most: int) -> ApiError:
    return ApiError(f"The body is larger than {most} bytes; shorten it.", 413, code="request_too_large")
