"""Answers taken apart: thinking, calls of tools in the ways that models write them, and what is left for a reader."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_runtime import OptionError
from edgellm_runtime.text.answer_parts import ToolCall, answer_parts

WEATHER = ToolCall("weather", {"city": "Zürich's", "days": [1, 2.5, None], "now": True})
NOW = ToolCall("time.now", {})
JSON = json.dumps(WEATHER.arguments, ensure_ascii=False)


def mark(words: str) -> str:
    return f"<\uff5ctool\u2581{words.replace(' ', chr(0x2581))}\uff5c>"


WRITTEN: dict[str, tuple[str, list[ToolCall], str]] = {
    "tagged": (f'<tool_call>\n{{"name": "weather", "arguments": {JSON}}}\n</tool_call>', [WEATHER], ""),
    "tagged twice, with words": (
        f'Let me see.\n<tool_call>{{"name": "weather", "arguments": {JSON}}}</tool_call>\n'
        '<tool_call>{"name": "time.now", "arguments": {}}</tool_call> Done.',
        [WEATHER, NOW], "Let me see.\n\n Done.",
    ),
    "tagged, cut short by the last tag": (f'<tool_call>{{"name": "weather", "arguments": {JSON}}}', [WEATHER], ""),
    "arguments as a text": (
        f'<tool_call>{{"name": "weather", "arguments": {json.dumps(JSON)}}}</tool_call>', [WEATHER], "",
    ),
    "parameters in tags": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nZürich's\n</parameter>\n<parameter=days>\n[1, 2.5, null]\n"
        "</parameter>\n<parameter=now>\ntrue\n</parameter>\n</function>\n</tool_call>", [WEATHER], "",
    ),
    "bare object": (f'{{"name": "weather", "parameters": {JSON}}}', [WEATHER], ""),
    "bare list": (f'[{{"name": "weather", "arguments": {JSON}}}, {{"name": "time.now", "arguments": {{}}}}]',
                  [WEATHER, NOW], ""),
    "objects with semicolons": (
        f'<|python_tag|>{{"name": "weather", "parameters": {JSON}}}; {{"name": "time.now", "parameters": {{}}}}',
        [WEATHER, NOW], "",
    ),
    "a list after a mark": (f'Sure. [TOOL_CALLS] [{{"name": "weather", "arguments": {JSON}}}]', [WEATHER], "Sure."),
    "name and arguments apart": (
        f"[TOOL_CALLS]weather[ARGS]{JSON}[TOOL_CALLS]time.now[ARGS]{{}}", [WEATHER, NOW], "",
    ),
    "a list after another mark": (f'<|tool_call|>[{{"name": "weather", "arguments": {JSON}}}]', [WEATHER], ""),
    "python": (
        '<|tool_call_start|>[weather(city="Zürich\'s", days=[1, 2.5, None], now=True), time.now()]<|tool_call_end|>ok',
        [WEATHER, NOW], "ok",
    ),
    "bare python": ('[weather(city="Zürich\'s", days=[1, 2.5, None], now=True)]', [WEATHER], ""),
    "fences": (
        f"{mark('calls begin')}{mark('call begin')}function{mark('sep')}weather\n```json\n{JSON}\n```{mark('call end')}"
        f"{mark('calls end')}", [WEATHER], "",
    ),
    "no fences": (f"{mark('call begin')}weather{mark('sep')}{JSON}{mark('call end')}", [WEATHER], ""),
    "functions in a list": (f'[{{"type": "function", "function": {{"name": "weather", "arguments": {JSON}}}}}]',
                            [WEATHER], ""),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_calls_are_found_in_every_way_of_writing_them(name: str) -> None:
    text, calls, content = WRITTEN[name]
    for tools in (None, ["weather", "time.now"]):
        found = answer_parts(text, tools=tools)
        assert list(found.tool_calls) == calls
        assert (found.content, found.reasoning) == (content, None)
    other = answer_parts(text, tools=["another"])
    assert (other.content, other.tool_calls) == (text, ())
    assert json.loads(calls[0].json_arguments) == calls[0].arguments


@pytest.mark.parametrize(
    "text",
    [
        "The answer is {x}.", '{"name": "Ada", "age": 36}', "[1, 2, 3]", "<tool_call>weather in Zürich?</tool_call>",
        '<tool_call>{"name": "weather"}</tool_call>', '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"a": 1e400}}</tool_call>', "[f(1)]", "[f(x=g())]", "[f(x={1})]",
        "[__import__('os').system('x')]", "[f(**{})]", "[TOOL_CALLS]", "<|python_tag|>print(1)", "  spaced  ", "",
        "[" * 5000, "{" * 5000, "[f(x=" * 2000, '{"name": "f", "arguments": 3}',
    ],
)  # fmt: skip
def test_what_only_looks_like_a_call_stays_text(text: str) -> None:
    found = answer_parts(text)
    assert (found.content, found.reasoning, found.tool_calls) == (text, None, ())


@pytest.mark.parametrize(
    ("text", "thinking", "reasoning", "content"),
    [
        ("<think>\nhm\n</think>\n\nFive.", False, "hm", "Five."), ("hm\n</think>\nFive.", True, "hm", "Five."),
        ("<think>so", False, "so", ""), ("so", True, "so", ""), ("Five </think> six", False, None, "Five </think> six"),
        ("<think></think>Five.", False, "", "Five."),
    ],
)  # fmt: skip
def test_thinking_is_told_from_the_answer(text: str, thinking: bool, reasoning: str | None, content: str) -> None:
    found = answer_parts(text, thinking=thinking)
    assert (found.reasoning, found.content) == (reasoning, content)


def test_a_call_after_thinking_is_found_and_one_within_it_is_not() -> None:
    call = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    found = answer_parts(f"<think>I could {call}</think>{call}")
    assert found.tool_calls == (ToolCall("weather", {}),)
    assert found.reasoning == f"I could {call}"
    assert answer_parts(f"<think>{call}").tool_calls == ()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8,
)  # fmt: skip


@given(arguments=st.dictionaries(st.text(min_size=1, max_size=8), VALUES, max_size=4), before=st.text(max_size=20))
@settings(deadline=None, max_examples=100)
def test_whatever_arguments_a_tagged_call_has_come_back(arguments: dict[str, Any], before: str) -> None:
    written = json.dumps({"name": "f", "arguments": arguments})
    if "<" in before or "</tool_call>" in written:
        return
    found = answer_parts(f"{before}<tool_call>{written}</tool_call>")
    assert found.tool_calls == (ToolCall("f", arguments),)


@given(text=st.text(alphabet="<>/[]{}()\"':,=|\uff5c\u2581toolcalARGSCL_S \nname1", max_size=120))
@settings(deadline=None, max_examples=200)
def test_no_text_makes_it_fail_or_lose_anything(text: str) -> None:
    found = answer_parts(text)
    assert found.tool_calls or found.reasoning is not None or found.content == text


def test_wrong_kinds_are_refused() -> None:
    with pytest.raises(OptionError, match="text is 3"):
        answer_parts(3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="tools"):
        answer_parts("a", tools=[3])  # type: ignore[list-item]
