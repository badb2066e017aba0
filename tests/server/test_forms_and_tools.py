"""Answers of a form and calls of tools, through OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from generation_fakes import TEMPLATE
from served import Served, serving
from tiny_bundles import attention_bundle
from tiny_files import copied, sign

MESSAGES = [{"role": "user", "content": "the"}]
SCHEMA = {
    "type": "object", "required": ["ok", "n"], "additionalProperties": False,
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
}  # fmt: skip
FORM = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}


def tool(name: str, schema: dict[str, Any] = SCHEMA) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": schema}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One whose template tells of tools, and one whose template does not."""
    folder = copied(attention_bundle(), tmp_path_factory.mktemp("tools"))
    text = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + TEMPLATE
    text = text.replace(
        "m['content']", "(m['tool_calls'][0].function.arguments.n | string if m['tool_calls'] else m['content'])"
    )
    (folder / "chat_template.jinja").write_text(text)
    sign(folder, "chat_template.jinja")
    with serving({"tools": folder, "plain": attention_bundle()}) as found:
        yield found


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0) as found:
        yield found


def of_schema(text: str) -> bool:
    found = json.loads(text)
    return found.keys() == {"ok", "n"} and type(found["ok"]) is bool and 0 <= found["n"] <= 99


def test_an_answer_is_json_of_the_schema(client: openai.OpenAI) -> None:
    for seed in range(3):
        found = client.chat.completions.create(model="plain", messages=MESSAGES, response_format=FORM, seed=seed)
        assert found.choices[0].finish_reason == "stop" and of_schema(found.choices[0].message.content)
    with client.chat.completions.create(
        model="plain", messages=MESSAGES, response_format=FORM, seed=2, stream=True
    ) as stream:
        assert "".join(c.choices[0].delta.content or "" for c in stream) == found.choices[0].message.content
    anything = client.chat.completions.create(
        model="plain", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=4
    )
    assert anything.choices[0].message.content.startswith("{")
    text = {"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA}}
    assert of_schema(client.responses.create(model="plain", input="hello", text=text).output_text)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "b"}}])
def test_a_call_that_is_required_is_made(client: openai.OpenAI, choice: Any) -> None:
    asked = {"model": "tools", "messages": MESSAGES, "tools": [tool("a"), tool("b")], "tool_choice": choice, "seed": 1}
    (found,) = client.chat.completions.create(**asked).choices
    assert found.finish_reason == "tool_calls" and found.message.content is None
    (call,) = found.message.tool_calls
    assert call.function.name in ("a", "b") if choice == "required" else call.function.name == "b"
    assert of_schema(call.function.arguments) and call.id.startswith("call_")
    with client.chat.completions.create(**asked, stream=True) as stream:
        deltas = [c.choices[0] for c in stream]
    assert "".join(d.delta.content or "" for d in deltas) == ""
    first, *more = [each for d in deltas for each in d.delta.tool_calls or []]
    assert (first.function.name, first.function.arguments) == (call.function.name, "") and first.id.startswith("call_")
    assert {(each.id, each.function.name, each.index) for each in more} == {(None, None, 0)} and len(more) > 3
    assert json.loads("".join(each.function.arguments for each in more)) == json.loads(call.function.arguments)
    assert deltas[-1].finish_reason == "tool_calls"


def test_where_a_call_is_not_required_what_is_none_stays_text(client: openai.OpenAI, served: Served) -> None:
    asked = {"model": "tools", "messages": MESSAGES, "tools": [tool("a")], "temperature": 0, "max_tokens": 12}
    (found,) = client.chat.completions.create(**asked).choices
    assert found.message.tool_calls is None and found.finish_reason in ("stop", "length")
    with client.chat.completions.create(**asked, stream=True) as stream:
        assert "".join(c.choices[0].delta.content or "" for c in stream) == found.message.content


def test_the_template_is_told_of_tools_calls_and_results(client: openai.OpenAI) -> None:
    def read(messages: list[Any], **more: Any) -> int:
        return client.chat.completions.create(
            model="tools", messages=messages, max_tokens=1, **more
        ).usage.prompt_tokens

    called = {"id": "call_1", "type": "function", "function": {"name": "a", "arguments": '{"ok": true, "n": 3}'}}
    talk = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "call_1", "content": "3 it is"}]  # fmt: skip
    plain = read(MESSAGES)
    assert read(MESSAGES, tools=[tool("a")]) > plain
    assert read(MESSAGES, tools=[tool("a")], tool_choice="none") == plain
    assert read(talk) > plain + 8


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"model": "plain", "tools": [tool("a")]}, "whose chat template does not mention them"),
        ({"tools": [{"type": "function", "function": {}}]}, "Invalid value for 'tools.0..function.name'"),
        ({"tools": [{"type": "search"}]}, "must be of type function"),
        ({"tools": "a"}, "a list of at most 128 functions"),
        ({"tool_choice": "required"}, "'tool_choice' needs 'tools'"),
        ({"tools": [tool("a")], "tool_choice": {"function": {"name": "b"}}}, "required, or one of a"),
        ({"response_format": {"type": "xml"}}, "it must be text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, "Missing required parameter: 'response_format.schema'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strange"}}}}, "strange"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "is for the assistant's messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}]},
         "a JSON object, as a string"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told(client: openai.OpenAI, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        client.chat.completions.create(**{"model": "tools", "messages": MESSAGES, **asked}, max_tokens=2)
