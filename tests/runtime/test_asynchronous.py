"""The asyncio twins give what their originals give, hold no event loop up, and end when their task is cancelled."""

from __future__ import annotations

import asyncio
import threading

import pytest
from generation_fakes import fake_model

from edgellm_runtime import AsyncStream, OptionError


@pytest.fixture
def model(tmp_path):
    return fake_model(tmp_path, max_context=300)


class Gate:
    """Holds one step of a session up until it is opened."""

    def __init__(self, model, at: int) -> None:
        self.reached, self.opened, self.steps = threading.Event(), threading.Event(), 0
        step = model.session.step

        def held(*arguments, **keywords):
            self.steps += 1
            if self.steps == at:
                self.reached.set()
                assert self.opened.wait(60)
            return step(*arguments, **keywords)

        model.session.step = held


OPTIONS = {"max_new_tokens": 12, "ignore_eos": True, "temperature": 0.9, "seed": 5}


def test_twins_give_what_their_originals_give(model):
    async def answers():
        alone, many, several = await asyncio.gather(
            model.agenerate("hello", **OPTIONS),
            model.agenerate(["hello", "the world"], **OPTIONS),
            model.agenerate("hello", n=2, **OPTIONS),
        )
        async with model.astream("hello", **OPTIONS) as stream:
            assert repr(stream) == "<AsyncStream, open>"
            text = "".join([chunk.text async for chunk in stream])
        assert repr(stream) == "<AsyncStream, length>"
        return alone, many, several, text, stream.generation

    alone, many, several, text, streamed = asyncio.run(answers())
    plain = model.generate("hello", **OPTIONS)
    assert alone.tokens == plain.tokens == streamed.tokens and text == plain.text
    assert [a.tokens for a in many] == [a.tokens for a in model.generate(["hello", "the world"], **OPTIONS)]
    assert [a.tokens for a in several] == [a.tokens for a in model.generate("hello", n=2, **OPTIONS)]


def test_the_loop_goes_on_while_a_step_runs(model):
    gate = Gate(model, at=3)

    async def meanwhile():
        task = asyncio.create_task(model.agenerate("hello", **OPTIONS))
        await asyncio.to_thread(gate.reached.wait, 60)
        assert not task.done()  # the step is held, and this line runs
        gate.opened.set()
        return await task

    assert len(asyncio.run(meanwhile()).tokens) == 12


def test_a_cancelled_task_ends_its_answer_at_the_next_token(model):
    gate = Gate(model, at=4)

    async def cancelled():
        task = asyncio.create_task(model.agenerate("hello", **OPTIONS))
        await asyncio.to_thread(gate.reached.wait, 60)
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()  # what runs on the state is waited for, however often it is cancelled
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert gate.steps == 4


def test_a_cancelled_stream_is_closed_and_its_state_goes_on(model):
    whole = model.generate("hello", **OPTIONS | {"temperature": 0}).tokens
    gate = Gate(model, at=4)

    async def cancelled() -> AsyncStream:
        stream = model.astream("hello", state=model.new_state(), **OPTIONS | {"temperature": 0})

        async def read():
            return [chunk async for chunk in stream]

        task = asyncio.create_task(read())
        await asyncio.to_thread(gate.reached.wait, 60)
        task.cancel()
        gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        return stream

    stream = asyncio.run(cancelled())
    answer = stream.generation
    assert gate.steps == 4 and answer.finish_reason == "cancelled"
    assert answer.tokens == whole[: len(answer.tokens)] and len(answer.tokens) >= 3
    rest = model.generate("", state=answer.state, max_new_tokens=12 - len(answer.tokens), ignore_eos=True)
    assert answer.tokens + rest.tokens == whole


def test_an_async_stream_is_left_and_cancelled_like_a_stream(model):
    async def left():
        async with model.astream("hello", **OPTIONS) as stream:
            await anext(stream)
        cancelled = model.astream("hello", **OPTIONS)
        await anext(cancelled)
        cancelled.cancel()
        return stream.generation, [chunk async for chunk in cancelled]

    answer, chunks = asyncio.run(left())
    assert len(answer.tokens) == 1 and answer.finish_reason == "cancelled"
    assert [chunk.finish_reason for chunk in chunks] == ["cancelled"]


def test_errors_come_through(model):
    def fails(tokens, logits):
        raise ZeroDivisionError("mine")

    async def run(call):
        return await call()

    with pytest.raises(ZeroDivisionError, match="mine"):
        asyncio.run(run(lambda: model.agenerate("hello", logits_processors=[fails])))
    with pytest.raises(OptionError, match="top_k"):
        model.astream("hello", top_k=-1)
    with pytest.raises(OptionError, match="top_k"):
        asyncio.run(run(lambda: model.agenerate("hello", top_k=-1)))
