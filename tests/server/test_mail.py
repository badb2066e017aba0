"""What a step of the model has for its rows reaches the loop at once, and in order; no ended loop is waited for."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from typing import Any

import pytest
from served import serving
from tiny_bundles import attention_bundle

from edgellm_runtime.batching.job import Event
from edgellm_runtime.generation.answer import Chunk, Generation, Timings
from edgellm_runtime.json_text import json_text
from edgellm_runtime.server.asking import Asked, Mail
from edgellm_runtime.server.call import Frames, event


def said(text: str, *, last: bool = False) -> Event:
    whole = Generation(text=text, tokens=(1,), prompt_tokens=1, finish_reason="length", timings=Timings())
    return Event(0, Chunk(text, (1,), "length" if last else None), whole if last else None)


def test_a_loop_is_woken_once_for_the_events_of_all_rows() -> None:
    async def run() -> tuple[list[list[str]], int]:
        loop, woken = asyncio.get_running_loop(), []
        wake = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *given: woken.append(given) or wake(*given)  # type: ignore
        asked, mail = [Asked(1, threading.Event()) for _ in range(8)], Mail.of(loop)
        assert Mail.of(loop) is mail
        for number in range(3):
            for at, each in enumerate(asked):
                mail.post(each, said(f"{at}.{number}", last=number == 2))
            mail.wake()
            await asyncio.sleep(0)
            mail.wake()  # there is nothing more, so nobody is woken
        return [[chunk.text async for _, chunk in each.chunks()] for each in asked], len(woken)

    texts, woken = asyncio.run(run())
    assert texts == [[f"{at}.{number}" for number in range(3)] for at in range(8)]
    assert woken == 3


def test_a_loop_that_has_ended_has_its_requests_cancelled() -> None:
    async def run() -> tuple[Mail, threading.Event, Asked]:
        cancelled = threading.Event()
        return Mail.of(asyncio.get_running_loop()), cancelled, Asked(1, cancelled)

    mail, cancelled, asked = asyncio.run(run())
    mail.post(asked, said("x"))
    mail.wake()
    assert cancelled.is_set()


def test_a_server_wakes_its_loop_no_oftener_than_its_model_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read = [], Mail._read
    monkeypatch.setattr(Mail, "_read", lambda mail: reads.append(1) or read(mail))
    with serving({"tiny": attention_bundle()}) as served:
        body = {"model": "tiny", "prompt": [[5], [6], [7], [8]], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        assert served.post("/v1/completions", body).status_code == 200
        steps = served.model.scheduler.load.counts["steps"]
    assert 0 < len(reads) <= steps + 4 + 1  # 48 tokens in so many steps, and the four prompts' last pieces


@pytest.mark.parametrize("value", [[{"text": "ü\n", "x": None}], [], 1.5])
@pytest.mark.parametrize("head", [{"id": "a", "n": 1}, {}])
def test_events_of_one_head_are_those_that_are_written_whole(head: dict[str, Any], value: Any) -> None:
    assert Frames(head, "choices").event(value) == event({**head, "choices": value})


def test_what_is_no_number_is_null_wherever_it_stands() -> None:
    data = {"a": [1.0, math.nan], "b": {"c": (math.inf, "t")}}
    assert json.loads(json_text(data)) == {"a": [1.0, None], "b": {"c": [None, "t"]}}
