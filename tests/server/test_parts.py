"""Thinking, content and calls on every route, through the official clients, of answers that are written beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import numpy as np
import openai
import pytest
from served import Served, serving
from tiny_bundles import CALL_TOKENS, attention_bundle, talking_bundle

from edgellm_runtime import load
from edgellm_runtime.server.thinking import ThinkingBudget, closing_tokens

TALK = [{"role": "user", "content": "the"}]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"],
          "additionalProperties": False}  # fmt: skip
WRITTEN = ('{"name": "a", "arguments": {"n": 3}}', '{"name": "b", "arguments": {}}')
CALLS = "Ok. " + "".join(call.join(CALL_TOKENS) for call in WRITTEN)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """One that can think and call, and one that can do neither."""
    with serving({"thinks": talking_bundle(), "plain": attention_bundle()}) as found:
        yield found


@pytest.fixture
def says(served: Served, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[list[int]]]:
    """Makes the model that thinks say a text, and then end; gives the prompts that it is asked."""

    def script(text: str) -> list[list[int]]:
        tokenizer, submit, prompts = served.model.model.tokenizer, served.model.scheduler.submit, list[list[int]]()
        tokens = [*tokenizer.encode(text, special=True), tokenizer.eos_token_id]

        def scripted(prompt: Any, **options: Any) -> Any:
            prompts.append(prompt)
            return submit(prompt, **{**options, "forced_tokens": tokens, "max_new_tokens": len(tokens)})

        monkeypatch.setattr(served.model.scheduler, "submit", scripted)
        return prompts

    return script


@pytest.fixture
def chats(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture
def messages(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.address, api_key="none", max_retries=0) as found:
        yield found


def nested(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA}}


def flat(name: str) -> dict[str, Any]:
    return {"type": "function", "name": name, "parameters": SCHEMA}


def claude(name: str) -> dict[str, Any]:
    return {"name": name, "description": "d", "input_schema": SCHEMA}


def test_a_chat_has_reasoning_and_calls_apart_from_its_content(chats: openai.OpenAI, says: Any, served: Served) -> None:
    text = f"<think>Hm, hm.</think>\n\n{CALLS}"
    says(text)
    asked = {"model": "thinks", "messages": TALK, "tools": [nested("a"), nested("b")]}
    found = chats.chat.completions.create(**asked)
    said = found.choices[0].message
    assert (said.reasoning_content, said.content, found.choices[0].finish_reason) == ("Hm, hm.", "Ok.", "tool_calls")
    assert [(c.function.name, c.function.arguments) for c in said.tool_calls] == [("a", '{"n": 3}'), ("b", "{}")]
    thought = len(served.model.model.tokenizer.encode("<think>Hm, hm.</think>"))
    assert abs(found.usage.completion_tokens_details.reasoning_tokens - thought) <= 1  # its last token may go on
    deltas = [c.choices[0].delta for c in chats.chat.completions.create(**asked, stream=True)]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "Hm, hm."
    assert "".join(d.content or "" for d in deltas) == "Ok."
    calls = [c for d in deltas for c in d.tool_calls or []]
    assert [(c.index, c.function.name) for c in calls if c.id] == [(0, "a"), (1, "b")]
    assert ["".join(c.function.arguments for c in calls if c.index == i) for i in (0, 1)] == ['{"n": 3}', "{}"]
    with chats.chat.completions.stream(**asked) as stream:  # the client's own bookkeeping of events
        whole = stream.until_done().get_final_completion().choices[0]
    assert whole.finish_reason == "tool_calls"
    assert [(c.function.name, c.function.arguments) for c in whole.message.tool_calls] == [
        ("a", '{"n": 3}'),
        ("b", "{}"),
    ]
    single = chats.chat.completions.create(**asked, parallel_tool_calls=False)
    assert [c.function.name for c in single.choices[0].message.tool_calls] == ["a"]


LONG = json.dumps({"n": 3, "words": "so it is and so it was"})
ONE = f'Ok. <tool_call>{{"name": "a", "arguments": {LONG}}}</tool_call>'


def test_arguments_come_as_they_are_written_on_every_route(
    chats: openai.OpenAI, messages: anthropic.Anthropic, says: Any, served: Served
) -> None:
    says(ONE)
    tokens = len(served.model.model.tokenizer.encode(LONG))
    asked = {"model": "thinks", "messages": TALK}
    deltas = [c.choices[0].delta for c in chats.chat.completions.create(**asked, tools=[nested("a")], stream=True)]
    chat = [c.function.arguments for d in deltas for c in d.tool_calls or [] if not c.id]
    events = list(chats.responses.create(model="thinks", input="the", tools=[flat("a")], stream=True))
    response = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    with messages.messages.stream(**asked, max_tokens=200, tools=[claude("a")]) as stream:
        message = [e.partial_json for e in stream if e.type == "input_json"]
        assert stream.get_final_message().content[1].input == json.loads(LONG)
    for pieces in (chat, response, message):
        assert "".join(pieces) == LONG and len(pieces) > tokens // 2 > 5
        assert pieces[-1] == "}"


@pytest.mark.parametrize("end", ["cut", "wrong"])
def test_a_call_that_is_not_made_in_the_end_is_never_whole(
    end: str, chats: openai.OpenAI, messages: anthropic.Anthropic, says: Any
) -> None:
    text = ONE[:-40] if end == "cut" else ONE.replace("}}</tool", "}} and</tool")
    says(text)
    asked = {"model": "thinks", "messages": TALK}
    (found,) = chats.chat.completions.create(**asked, tools=[nested("a")]).choices
    assert (found.message.content, found.message.tool_calls) == (text, None)
    choices = [c.choices[0] for c in chats.chat.completions.create(**asked, tools=[nested("a")], stream=True)]
    pieces = [c.function.arguments for d in choices for c in d.delta.tool_calls or []]
    assert LONG.startswith("".join(pieces)) and "".join(pieces) != LONG and len(pieces) > 3
    assert choices[-1].finish_reason == "stop" and "".join(c.delta.content or "" for c in choices) == text
    events = list(chats.responses.create(model="thinks", input="the", tools=[flat("a")], stream=True))
    item = next(e.item for e in events if e.type == "response.output_item.done" and e.item.type == "function_call")
    assert (item.status, item.arguments) == ("incomplete", "".join(pieces))
    with messages.messages.stream(**asked, max_tokens=200, tools=[claude("a")]) as stream:
        assert "".join(e.partial_json for e in stream if e.type == "input_json") == "".join(pieces)
        assert stream.get_final_message().stop_reason == "end_turn"


def test_thinking_that_the_template_opens_is_thinking(chats: openai.OpenAI, says: Any, served: Served) -> None:
    prompts = says("Hm.</think>Five")
    for effort, expected in (("high", ("Hm.", "Five")), ("none", (None, "Hm.</think>Five"))):
        said = chats.chat.completions.create(model="thinks", messages=TALK, reasoning_effort=effort).choices[0].message
        assert (getattr(said, "reasoning_content", None), said.content) == expected
    texts = [served.model.model.tokenizer.decode(prompt, skip_special=False) for prompt in prompts]
    assert [text.endswith("<think>") for text in texts] == [True, False]
    with pytest.raises(openai.BadRequestError, match="cannot be told how much to think"):
        chats.chat.completions.create(model="plain", messages=TALK, reasoning_effort="high")


def test_a_form_is_kept_to_even_where_the_template_opens_thinking(chats: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    said = chats.chat.completions.create(
        model="thinks", messages=TALK, response_format=form, reasoning_effort="high", seed=1
    )
    assert 0 <= json.loads(said.choices[0].message.content)["n"] <= 9


def test_a_response_has_items_of_reasoning_text_and_calls(chats: openai.OpenAI, says: Any) -> None:
    says(f"<think>Hm.</think>{CALLS}")
    asked = {"model": "thinks", "input": "the", "tools": [flat("a"), flat("b")]}
    found = chats.responses.create(**asked)
    assert [item.type for item in found.output] == ["reasoning", "message", "function_call", "function_call"]
    assert (found.output[0].content[0].text, found.output_text) == ("Hm.", "Ok.")
    assert [(c.name, c.arguments) for c in found.output[2:]] == [("a", '{"n": 3}'), ("b", "{}")]
    assert found.usage.output_tokens_details.reasoning_tokens > 0
    events = list(chats.responses.create(**asked, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))

    def joined(kind: str) -> str:
        return "".join(e.delta for e in events if e.type == f"response.{kind}.delta")

    assert (joined("reasoning_text"), joined("output_text")) == ("Hm.", "Ok.")
    assert joined("function_call_arguments") == '{"n": 3}{}'
    done = [e.item for e in events if e.type == "response.output_item.done"]
    assert [item.type for item in done] == [item.type for item in events[-1].response.output]
    assert [e.output_index for e in events if e.type == "response.output_item.added"] == [0, 1, 2, 3]
    with chats.responses.stream(**asked) as stream:  # the client's own bookkeeping of events
        final = stream.until_done().get_final_response()
    assert [item.type for item in final.output] == [item.type for item in found.output]


def test_a_responses_calls_and_their_outputs_go_back_to_the_template(
    chats: openai.OpenAI, says: Any, served: Served
) -> None:
    prompts = says(f"<think>Hm.</think>{CALLS}")
    first = chats.responses.create(model="thinks", input="the", tools=[flat("a"), flat("b")])
    call = first.output[2]
    answer = {"type": "function_call_output", "call_id": call.call_id, "output": "4 it is"}
    chats.responses.create(model="thinks", input=[*TALK, *first.output, answer])
    text = served.model.model.tokenizer.decode(prompts[-1], skip_special=False)
    assert f"Hm.a3{call.call_id}b" in text and text.count(call.call_id) == 2
    assert "<|im_start|>assistant\nOk.<|im_end|>" in text and "<|im_start|>tool\n4 it is<|im_end|>" in text


def test_a_message_has_blocks_of_thinking_text_and_tools(messages: anthropic.Anthropic, says: Any) -> None:
    says(f"<think>Hm.</think>{CALLS}")
    asked = {"model": "thinks", "max_tokens": 60, "messages": TALK, "tools": [claude("a"), claude("b")]}
    found = messages.messages.create(**asked)
    assert [block.type for block in found.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert (found.content[0].thinking, found.content[1].text, found.stop_reason) == ("Hm.", "Ok.", "tool_use")
    assert [(b.name, b.input) for b in found.content[2:]] == [("a", {"n": 3}), ("b", {})]
    with messages.messages.stream(**asked) as stream:
        events = list(stream)
        whole = stream.get_final_message()
    assert [(b.type, getattr(b, "input", None)) for b in whole.content] == [
        (b.type, getattr(b, "input", None)) for b in found.content
    ]
    assert (whole.content[0].thinking, whole.content[1].text, whole.stop_reason) == ("Hm.", "Ok.", "tool_use")
    deltas = [e.delta.type for e in events if e.type == "content_block_delta"]
    assert {"thinking_delta", "signature_delta", "text_delta", "input_json_delta"} == set(deltas)
    starts = [e.index for e in events if e.type == "content_block_start"]
    assert starts == [0, 1, 2, 3] == [e.index for e in events if e.type == "content_block_stop"]
    single = messages.messages.create(**asked, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [b.type for b in single.content] == ["thinking", "text", "tool_use"]


def test_a_messages_tools_and_their_results_go_back_to_the_template(
    messages: anthropic.Anthropic, says: Any, served: Served
) -> None:
    prompts = says(f"<think>Hm.</think>{CALLS}")
    asked = {"model": "thinks", "max_tokens": 60, "tools": [claude("a"), claude("b")]}
    first = messages.messages.create(**asked, messages=TALK)
    used = first.content[2]
    results = [{"type": "tool_result", "tool_use_id": used.id, "content": [{"type": "text", "text": "4 it is"}]},
               {"type": "tool_result", "tool_use_id": first.content[3].id, "is_error": True, "content": "none"},
               {"type": "text", "text": "and?"}]  # fmt: skip
    talk = [*TALK, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    messages.messages.create(**asked, messages=talk)
    text = served.model.model.tokenizer.decode(prompts[-1], skip_special=False)
    assert f"abHm.a3{used.id}b" in text
    assert (
        "<|im_start|>tool\n4 it is<|im_end|>\n<|im_start|>tool\nError: none<|im_end|>\n<|im_start|>user\nand?" in text
    )
    counted = messages.messages.count_tokens(model="thinks", tools=asked["tools"], messages=talk)
    assert counted.input_tokens == len(prompts[-1])


def test_thinking_is_asked_of_a_template_that_can_be_told(messages: anthropic.Anthropic, says: Any) -> None:
    says("Hm.</think>Five")
    asked = {"model": "thinks", "max_tokens": 2000, "messages": TALK}
    thought = messages.messages.create(**asked, thinking={"type": "enabled", "budget_tokens": 1024})
    assert [b.type for b in thought.content] == ["thinking", "text"]
    for kind in ("disabled", "adaptive"):
        assert [b.type for b in messages.messages.create(**asked, thinking={"type": kind}).content] == ["text"]
    plain = {**asked, "model": "plain", "max_tokens": 2}
    messages.messages.create(**plain, thinking={"type": "disabled"})
    plain["max_tokens"] = 2000
    with pytest.raises(anthropic.BadRequestError, match="cannot be told how much to think"):
        messages.messages.create(**plain, thinking={"type": "enabled", "budget_tokens": 1024})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("budget", [1, 5])
def test_thinking_ends_when_its_budget_is_used(
    messages: anthropic.Anthropic, budget: int, stream: bool, served: Served
) -> None:
    asked = {"model": "thinks", "max_tokens": 24, "messages": TALK, "extra_body": {"temperature": 0},
             "thinking": {"type": "enabled", "budget_tokens": budget}}  # fmt: skip
    if stream:
        with messages.messages.stream(**asked) as events:
            answer = events.get_final_message()
    else:
        answer = messages.messages.create(**asked)
    thinking, text = answer.content
    assert (thinking.type, text.type) == ("thinking", "text")
    tokenizer = served.model.model.tokenizer
    assert tokenizer is not None
    assert len(tokenizer.encode(thinking.thinking)) <= budget + 1  # the line's end before the mark may be one
    assert answer.usage.output_tokens > budget
    with pytest.raises(anthropic.BadRequestError, match=r"budget_tokens' is 24; it must be less than 'max_tokens', 24"):
        messages.messages.create(**{**asked, "thinking": {"type": "enabled", "budget_tokens": 24}})


def test_a_budget_is_of_the_thinking_alone_and_ends_none_that_has_ended() -> None:
    tokenizer = load(talking_bundle(), threads=1).tokenizer
    assert tokenizer is not None
    close = closing_tokens(tokenizer)

    def forced(prompt: str, said: str, budget: int) -> list[int | None]:
        """The token that is the only possible one after each of what was said; None: it is free."""
        budgeted, tokens = ThinkingBudget(tokenizer, budget), tokenizer.encode(prompt, special=True)
        found = list[int | None]()
        for token in [None, *tokenizer.encode(said, special=True)]:
            tokens = tokens if token is None else [*tokens, token]
            logits = budgeted(np.array(tokens), np.zeros(tokenizer_size, dtype=np.float32))
            possible = np.flatnonzero(np.isfinite(logits)).tolist()
            found.append(possible[0] if len(possible) == 1 else None)
        return found

    tokenizer_size = 1 + max(*close, *tokenizer.encode("the <think></think> abc", special=True), *range(300))
    opened = forced("the<think>", "abcdefgh" * 4, 3)
    assert opened[:3] == [None] * 3 and opened[3 : 3 + len(close)] == close
    assert set(opened[3 + len(close) :]) == {None}
    assert set(forced("the", "abcdefgh" * 4, 3)) == {None}  # which does not think
    assert set(forced("the<think>", "a</think>" + "abcdefgh" * 4, 20)) == {None}
    own = forced("the", "<think>" + "abcdefgh" * 4, 4)
    assert own.index(close[0]) == max(4, len(tokenizer.encode("<think>", special=True)))


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "b"}])
def test_a_tool_that_must_be_used_is_used(chats: openai.OpenAI, messages: anthropic.Anthropic, choice: Any) -> None:
    asked = {"model": "thinks", "max_tokens": 60, "messages": TALK, "tools": [claude("a"), claude("b")]}
    found = messages.messages.create(**asked, tool_choice=choice)
    (block,) = found.content
    assert (block.type, found.stop_reason) == ("tool_use", "tool_use")
    assert block.name in ("a", "b") if choice["type"] == "any" else block.name == "b"
    assert 0 <= block.input["n"] <= 9
    wanted = "required" if choice["type"] == "any" else {"type": "function", "name": "b"}
    response = chats.responses.create(model="thinks", input="the", tools=[flat("a"), flat("b")], tool_choice=wanted)
    (item,) = response.output
    assert item.type == "function_call" and 0 <= json.loads(item.arguments)["n"] <= 9
