"""OpenAI's ``/v1/embeddings``: texts or token ids as vectors of length 1, for bundles that give hidden states."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response

from edgellm_runtime.errors import BusyError
from edgellm_runtime.server.call import Call, JsonText, until_gone
from edgellm_runtime.server.faults import ApiError
from edgellm_runtime.server.host import Hosted
from edgellm_runtime.server.openai_shared import texts_of

__all__ = ["Turns", "embeddings"]

_MOST_TEXTS = 2048  # OpenAI's


class Turns:
    """One request at a time: whoever comes waits, as long as few enough do."""

    def __init__(self) -> None:
        self._lock, self._waiting = asyncio.Lock(), 0

    @asynccontextmanager
    async def one(self, most: int) -> AsyncIterator[None]:
        """A turn.

        Raises:
            BusyError: so many wait already.
        """
        if self._waiting >= most:
            raise BusyError(f"{self._waiting} requests wait already, as many as may; try again later")
        self._waiting += 1
        try:
            await self._lock.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._lock.release()


async def embeddings(call: Call) -> Response:
    """Texts as vectors: the mean of the last hidden states, of length 1."""
    hosted = call.host.find(call.fields.need("model"))
    call.model = hosted.name
    given = texts_of(call.fields, "input", _MOST_TEXTS)
    form = call.fields.text("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise call.fields.wrong("encoding_format", form, "float or base64")
    call.fields.refuse(dimensions=())
    call.fields.ignore("user")
    call.fields.done()
    if not (width := hosted.model.session.hidden_width):
        raise ApiError(f"The model '{hosted.name}' gives no embeddings; export its bundle with --hidden.",
                       code="no_embeddings", param="model")  # fmt: skip
    async with call.request.app.state.turns.one(hosted.scheduler.options.queue):
        rows = await asyncio.to_thread(hosted.model.text_tokens, given)
        vectors = await _vectors(call, hosted, rows)
    assert vectors.shape == (len(rows), width)
    call.token_came()
    data = [
        {"object": "embedding", "index": i, "embedding": _written(vector, form)} for i, vector in enumerate(vectors)
    ]
    read = sum(map(len, rows))
    usage = {"prompt_tokens": read, "total_tokens": read}
    return JsonText({"object": "list", "data": data, "model": hosted.name, "usage": usage})


async def _vectors(call: Call, hosted: Hosted, rows: list[list[int]]) -> NDArray[np.float32]:
    """The vectors of rows of tokens; a client that goes away is not worked for."""
    work = asyncio.ensure_future(hosted.model.aembed(rows))
    gone = asyncio.create_task(until_gone(call.request.receive))
    gone.add_done_callback(lambda _: work.cancel())
    try:
        return await asyncio.wait_for(work, call.options.timeout)
    except TimeoutError:
        raise ApiError("The answer took longer than this server's limit.", 504, code="timeout") from None
    except asyncio.CancelledError:
        if not gone.done():
            raise
        raise ApiError("The request was ended.", 503, code="cancelled") from None
    finally:
        gone.cancel()


def _written(vector: NDArray[np.float32], form: str) -> Any:
    """A vector as numbers, or as OpenAI's clients ask for it: its float32 numbers, little-endian, in base64."""
    if form == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
