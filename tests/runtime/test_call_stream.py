"""Calls of tools as they are written: their pieces, joined, are the calls of the whole answer."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_answer_parts import JSON, NOW, VALUES, WEATHER, WRITTEN

from edgellm_runtime.text.answer_parts import CALL_MARKS, answer_parts
from edgellm_runtime.text.json_prefix import JsonPrefix
from edgellm_runtime.text.part_stream import PartStream, Piece

NAMES = ("weather", "time.now")
AT_ONCE = ("tagged", "tagged twice, with words", "tagged, cut short by the last tag", "parameters in tags",
           "objects with semicolons", "a list after a mark", "name and arguments apart", "a list after another mark",
           "fences", "no fences")  # fmt: skip


def joined(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Names and arguments of the calls."""
    found: list[list[str]] = []
    for piece in pieces:
        if piece.kind == "call":
            found.append([piece.text, ""])
        elif piece.kind == "arguments":
            found[-1][1] += piece.text
    return [(name, arguments) for name, arguments in found]


def streamed(texts: list[str], **options: Any) -> tuple[PartStream, list[Piece], list[Piece]]:
    """What had come before the end, and what came with it."""
    stream = PartStream(**{"tools": NAMES, **options})
    early = [piece for text in texts for piece in stream.push(text)]
    return stream, early, stream.finish()[0]


def parses(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def check(texts: list[str], **options: Any) -> None:
    """Whole calls are those of the whole text; what else began to go out is no JSON."""
    stream, early, late = streamed(texts, **options)
    calls = answer_parts("".join(texts), tools=options.get("tools", NAMES)).tool_calls
    made = [(name, json.loads(text)) for name, text in joined([*early, *late]) if parses(text)]
    assert made == [(call.name, call.arguments) for call in calls]
    assert stream.unfinished == (len(joined([*early, *late])) > len(calls))


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_pieces_joined_are_the_calls_of_the_whole(name: str, size: int) -> None:
    text = WRITTEN[name][0]
    check([text[at : at + size] for at in range(0, len(text), size)])
    check([text[at : at + size] for at in range(0, len(text), size)], certain=True)


@pytest.mark.parametrize("name", AT_ONCE)
def test_arguments_go_out_as_they_are_written_all_but_their_last_brace(name: str) -> None:
    text, calls, _ = WRITTEN[name]
    stream, found = PartStream(tools=NAMES), []
    end = text.index("true") + len("true")
    for character in text[:end]:
        found += stream.push(character)
    ((called, arguments),) = joined(found)
    assert called == calls[0].name and len(found) >= (3 if name == "parameters in tags" else 30)
    assert json.loads(arguments.rstrip(", ").removesuffix(', "now":') + "}").items() >= {"city": "Zürich's"}.items()
    assert parses(joined([*found, *stream.push(text[end:]), *stream.finish()[0]])[0][1])


def test_a_call_is_whole_once_its_mark_is_closed_and_the_next_begins() -> None:
    one = f'<tool_call>{{"name": "weather", "arguments": {JSON}}}'
    stream = PartStream(tools=NAMES)
    assert not parses(joined(stream.push(one))[0][1])
    assert [piece.text for piece in stream.push("</tool_call>")] == ["}"]
    assert [p.text for p in stream.push('<tool_call>{"name": "time.now", "arguments": {}}')] == ["time.now", "{"]
    assert [piece.text for piece in stream.push("</tool_call>")] == ["}"]
    assert stream.finish()[0] == [] and not stream.unfinished


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "other", "arguments": {"a": 1}}</tool_call>', '{"name": "weather", "arguments": {}} is it',
        '<tool_call>{"name": "weather", "arguments": ["a"]}</tool_call>', "<|python_tag|>weather.print(1)",
        '<tool_call>{"arguments": {"a": {"name": "weather", "arguments": {"b": 2}}}, "name": "other"}</tool_call>',
        '[1, 2] {"name": "weather", "arguments": {}}',
        "<tool_call>" + "x" * 3000 + ' {"name": "weather", "arguments": {',
    ],
)  # fmt: skip
def test_of_what_is_no_call_nothing_goes_out_as_one(text: str) -> None:
    stream, early, late = streamed(list(text))
    assert joined([*early, *late]) == [] and not stream.unfinished
    assert "".join(piece.text for piece in [*early, *late]) == text


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ('<tool_call>{"name": "weather", "arguments": {"a": 1, b: 2}}</tool_call>', '{"a": 1, '),
        ('<tool_call>{"name": "weather", "arguments": {"a": "x', '{"a": "x'),
        ('<tool_call>{"name": "weather", "arguments": {"a": 1}} and more</tool_call>', '{"a": 1'),
        ('<tool_call>{"name": "weather", "arguments": {"a": NaN}}</tool_call>', '{"a": '),
        ('<tool_call>{"name": "weather", "arguments": {"a": "</tool_call>"}}</tool_call>', '{"a": "</tool_call>"'),
        ("<tool_call><function=weather><parameter=a>1</parameter>", '{"a": 1'),
        ('[TOOL_CALLS][{"name": "weather", "arguments": {"a": 1}}, {"name": "other", "arguments": {}}]', '{"a": 1'),
    ],
)
def test_a_call_that_goes_wrong_stays_open_and_is_told_as_text(text: str, sent: str) -> None:
    stream, early, late = streamed(list(f"Ok. {text}"))
    assert joined([*early, *late]) == [("weather", sent)] and stream.unfinished
    assert "".join(p.text for p in [*early, *late] if p.kind == "content") == f"Ok. {text}"


def test_only_the_first_call_goes_out_where_one_is_allowed() -> None:
    text = WRITTEN["tagged twice, with words"][0]
    _, early, late = streamed(list(text), single=True)
    assert [name for name, _ in joined([*early, *late])] == ["weather"]
    _, early, late = streamed(list(WRITTEN["bare list"][0]), single=True)
    assert [name for name, _ in joined([*early, *late])] == ["weather"]


BITS = [
    '{"name": "weather", "arguments": ', JSON, '{"a": [1, {"b": "}"}]}', "}", "{", "[", "]", ", ", "</tool_call>", "\n",
    "weather[ARGS]", "<function=weather>", "<parameter=a>", "</parameter>", "</function>", "words", '"', *CALL_MARKS,
    '<tool_call>{"name": "weather", "arguments": {"a": 1}}</tool_call>',
]  # fmt: skip


@given(bits=st.lists(st.sampled_from(BITS), max_size=9), cuts=st.lists(st.integers(0, 400), max_size=6),
       certain=st.booleans())  # fmt: skip
@settings(deadline=None, max_examples=300)
def test_whatever_is_written_only_whole_calls_parse(bits: list[str], cuts: list[int], certain: bool) -> None:
    text = "".join(bits)
    at = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    check([text[a:b] for a, b in pairwise(at)], certain=certain)
    check(list(text), certain=certain)


@given(value=st.dictionaries(st.text(max_size=6), VALUES, max_size=4), indent=st.sampled_from([None, 1]),
       ascii_only=st.booleans(), after=st.sampled_from(["", "}", " x", '"']))  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_an_object_is_read_to_its_end_and_no_further(value: Any, indent: Any, ascii_only: bool, after: str) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    read, end = JsonPrefix(3), 3 + len(text)
    for at in range(len(text)):
        read.read("abc" + text[:at])
        assert not read.ended and not read.wrong
    read.read("abc" + text + after)
    assert read.ended and read.at == end and not read.wrong


@given(text=st.text(alphabet='{}[]:,"\\u01-.eEtruefalsn \x01', max_size=14))
@settings(deadline=None, max_examples=400)
def test_it_says_wrong_where_the_standard_reader_does(text: str) -> None:
    text = "{" + text
    read = JsonPrefix(0)
    for at in range(len(text) + 1):
        read.read(text[:at])
    assert read.ended == parses(text[: read.at])
    if parses(text):
        assert read.ended and not read.wrong


def test_deep_objects_and_endless_numbers_do_no_harm() -> None:
    deep = '{"name": "weather", "arguments": ' + '{"a":' * 5000 + "1" + "}" * 5000 + "}"
    digits = '{"name": "weather", "arguments": {"a": ' + "1" * 5000 + "}}"
    for text in (deep, digits):
        stream, early, late = streamed([f"<tool_call>{text}</tool_call>"])
        assert stream.unfinished and len(joined([*early, *late])) == 1
    assert NOW.arguments == {} and WEATHER.name in NAMES
