"""OpenAI's older ``/v1/completions``: plain prompts, as texts or token ids, several in one request."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import Response

from edgellm_runtime.errors import BusyError
from edgellm_runtime.generation.answer import Chunk, Generation
from edgellm_runtime.generation.logprobs import TokenLogprobs
from edgellm_runtime.generation.options import OptionKeywords
from edgellm_runtime.server.answering import completed, streamed
from edgellm_runtime.server.asking import Asked, ask
from edgellm_runtime.server.call import Call, Frames, JsonText, event
from edgellm_runtime.server.faults import ApiError
from edgellm_runtime.server.fields import Fields
from edgellm_runtime.server.host import Hosted
from edgellm_runtime.server.openai_shared import reason_of, texts_of, usage_of, wants_usage
from edgellm_runtime.server.sampling_fields import openai_options
from edgellm_runtime.text.tokenizer import Tokenizer

__all__ = ["completions"]

_MOST_LOGPROBS = 20
_MOST_PROMPTS = 256
_DEFAULT_TOKENS = 16  # OpenAI's, of texts that are gone on with


async def completions(call: Call) -> Response:
    """Go on from prompts, or answer them, where that is what the model does."""
    hosted = call.host.find(call.fields.need("model"))
    call.model = hosted.name
    options, answers, stream, usage = _wanted(call.fields, hosted)
    prompts = texts_of(call.fields, "prompt", _MOST_PROMPTS)
    call.fields.done()
    _check_room(hosted, len(prompts))
    for prompt in prompts:
        call.asked.append(await _asked(call, hosted, prompt, answers, options))
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
        "model": hosted.name, "system_fingerprint": hosted.fingerprint,
    }  # fmt: skip
    if stream:
        return streamed(call, _events(call, hosted, head, answers, usage=usage))
    choices = [
        {"index": i, "text": a.text, "logprobs": _whole_logprobs(hosted.model.tokenizer, a, asked),
         "finish_reason": reason_of(a.finish_reason)}
        for i, (asked, a) in enumerate((asked, a) for asked in await _all(call) for a in asked.found)
    ]  # fmt: skip
    return JsonText({**head, "choices": choices, "usage": usage_of(call.asked)})


def _check_room(hosted: Hosted, prompts: int) -> None:
    """See that all prompts may wait, before the first is asked for nothing."""
    most = hosted.scheduler.options.queue
    if prompts > most:
        raise ApiError(f"There are {prompts} prompts, but {most} may wait; send fewer.", param="prompt",
                       code="too_many_prompts")  # fmt: skip
    if hosted.scheduler.load.waiting + prompts > most:
        raise BusyError(f"{prompts} prompts find no place among {most} that may wait; try again later")


async def _asked(call: Call, hosted: Hosted, prompt: Any, answers: int, options: OptionKeywords) -> Asked:
    try:
        told = options.get("logprobs") if options.get("echo") else None  # the echo's too
        return await ask(
            hosted, lambda: _in_form(hosted, prompt), answers=answers, timeout=call.options.timeout, options=options,
            prompt_logprobs=told,
        )  # fmt: skip
    except BaseException:  # those before it need not go on
        call.leave()
        raise


def _in_form(hosted: Hosted, prompt: Any) -> Any:
    """A text as a model that was trained for a task is asked with it; token ids and other models' texts stay."""
    return hosted.task.prompt(prompt) if hosted.task is not None and isinstance(prompt, str) else prompt


def _tokens_unasked(hosted: Hosted) -> int:
    """How many tokens an answer may have that does not say: a translation is not to end in its middle."""
    if hosted.task is not None:
        return hosted.task.spec.max_new_tokens
    return hosted.model.session.max_context if hosted.answers else _DEFAULT_TOKENS


def _wanted(fields: Fields, hosted: Hosted) -> tuple[OptionKeywords, int, bool, bool]:
    """Options, answers to each prompt, whether they are streamed and whether with usage."""
    fields.refuse(suffix=("",))
    fields.ignore("user", "metadata")
    options = openai_options(fields, hosted)
    most = fields.integer("max_tokens", 0, 2**31 - 1)
    options["max_new_tokens"] = _tokens_unasked(hosted) if most is None else most
    answers = fields.integer("n", 1, hosted.scheduler.options.rows) or 1
    if (best := fields.integer("best_of", 1, 2**31 - 1)) is not None and best != answers:
        raise ApiError("'best_of' other than 'n' is not supported by this server; leave it out.", param="best_of",
                       code="unsupported_parameter")  # fmt: skip
    logprobs = fields.integer("logprobs", 0, _MOST_LOGPROBS)
    if logprobs is not None:
        options["logprobs"] = logprobs
    if fields.flag("echo"):
        options["echo"] = True
    stream = fields.flag("stream")
    if stream and logprobs is not None and "echo" in options:
        raise ApiError("'echo' with 'logprobs' is not supported by this server in a stream; leave one of them out.",
                       param="echo", code="unsupported_parameter")  # fmt: skip
    return options, answers, stream, wants_usage(fields, stream=stream)


async def _events(
    call: Call, hosted: Hosted, head: dict[str, Any], answers: int, *, usage: bool
) -> AsyncIterator[bytes]:
    """All answers as events, as they come."""
    head = {**head, **({"usage": None} if usage else {})}
    frames, offsets = Frames(head, "choices"), dict[int, int]()
    # what comes of one prompt needs no task that hands it on
    found = call.asked[0].chunks() if len(call.asked) == 1 else _merged(call.asked, answers)
    async for index, chunk in found:
        call.token_came()
        at = offsets.get(index, 0)
        logprobs = None if chunk.logprobs is None else _logprobs(hosted.model.tokenizer, [chunk.logprobs], at)
        offsets[index] = at + len(chunk.text)
        if chunk.text or logprobs or chunk.finish_reason:
            made = {"index": index, "text": chunk.text, "logprobs": logprobs,
                    "finish_reason": reason_of(chunk.finish_reason)}  # fmt: skip
            yield frames.event([made])
    if usage:
        yield event({**head, "choices": [], "usage": usage_of(call.asked)})
    yield event("[DONE]")


async def _merged(asked: Sequence[Asked], answers: int) -> AsyncIterator[tuple[int, Chunk]]:
    """The chunks of all prompts' answers, as they come."""
    merged: asyncio.Queue[Any] = asyncio.Queue(1)

    async def hand_on(place: int, each: Asked) -> None:
        try:
            async for index, chunk in each.chunks():
                await merged.put((place * answers + index, chunk))
            await merged.put(None)
        except Exception as error:
            await merged.put(error)

    tasks = [asyncio.create_task(hand_on(place, each)) for place, each in enumerate(asked)]
    try:
        going = len(tasks)
        while going:
            found = await merged.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                going -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()


async def _all(call: Call) -> list[Asked]:
    """All that was asked, answered."""
    await completed(call)
    return call.asked


def _whole_logprobs(tokenizer: Tokenizer | None, answer: Generation, asked: Asked) -> dict[str, Any] | None:
    """An answer's log-probabilities, after those of its prompt where it begins with that; the first token has none."""
    found = answer.prompt_logprobs
    if found is None or answer.logprobs is None:
        return _logprobs(tokenizer, answer.logprobs, 0)
    first = TokenLogprobs(asked.prompt[0], 0.0, ())
    made = _logprobs(tokenizer, [first, *found, *answer.logprobs], 0)
    if made is not None:
        made["token_logprobs"][0] = None
        if made["top_logprobs"]:
            made["top_logprobs"][0] = None
    return made


def _logprobs(tokenizer: Tokenizer | None, found: Sequence[TokenLogprobs] | None, offset: int) -> dict[str, Any] | None:
    """Log-probabilities as completions have them; of tokens with one text the most probable is named."""
    if found is None or tokenizer is None:
        return None
    texts = [tokenizer.token_bytes(place.token).decode(errors="replace") for place in found]
    offsets = list(itertools.accumulate(map(len, texts), initial=offset))[:-1]
    top = [
        {tokenizer.token_bytes(token).decode(errors="replace"): logprob for token, logprob in reversed(place.top)}
        for place in found
    ]
    return {
        "tokens": texts, "token_logprobs": [place.logprob for place in found],
        "top_logprobs": top if any(top) else None, "text_offset": offsets,
    }  # fmt: skip
