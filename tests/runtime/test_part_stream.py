"""An answer taken apart while it comes: its pieces, joined, are the parts that are found in the whole."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_runtime.text.answer_parts import CALL_MARKS, answer_parts
from edgellm_runtime.text.part_stream import PartStream

CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
BITS = ["<think>", "</think>", CALL, '{"name": "f", "arguments": {}}', "[f(a=1)]", *CALL_MARKS, " ", "\n", "Five", "<",
        "[", "{x}", "</tool_call>", "th", "ink>"]  # fmt: skip


def pieces(texts: list[str], **options: object) -> tuple[str, str, list[str]]:
    """Thinking and content, joined, and the kinds in their order."""
    stream, found = PartStream(**options), []
    for text in texts:
        found += stream.push(text)
    rest, parts = stream.finish()
    found += rest
    assert parts == answer_parts(
        "".join(texts), tools=options.get("tools", ()), thinking=options.get("thinking", False)
    )
    joined = {kind: "".join(p.text for p in found if p.kind == kind) for kind in ("reasoning", "content")}
    if parts.tool_calls:  # what had gone out before the call was known keeps its space
        assert joined["content"].strip() == parts.content
    else:
        assert joined["content"] == parts.content
    assert joined["reasoning"] == (parts.reasoning or "")
    assert all(piece.text for piece in found)
    return joined["reasoning"], joined["content"], [piece.kind for piece in found]


@given(bits=st.lists(st.sampled_from(BITS), max_size=8), cuts=st.lists(st.integers(0, 200), max_size=6),
       thinking=st.booleans(), tools=st.sampled_from([(), ("f",), ("g",)]))  # fmt: skip
@settings(deadline=None, max_examples=300)
def test_pieces_joined_are_the_parts_of_the_whole(
    bits: list[str], cuts: list[int], thinking: bool, tools: object
) -> None:
    text = "".join(bits)
    at = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces([text[a:b] for a, b in pairwise(at)], thinking=thinking, tools=tools)
    pieces(list(text), thinking=thinking, tools=tools)


@pytest.mark.parametrize(
    ("text", "tools", "first"),
    [
        ("Hello", (), "H"), ("<b>Hello", ("f",), "<"), ("It is [1] of {2}.", ("f",), "I"), ("  Hello", (), " "),
        ("<think>Hm.</think> Five", (), "H"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_mark_goes_out_at_once(text: str, tools: tuple[str, ...], first: str) -> None:
    stream = PartStream(tools=tools)
    sent = [piece.text for character in text for piece in stream.push(character)]
    assert sent[0][0] == first
    assert sent[-1][-1] == text[-1] and len(sent) > 3


def test_thinking_comes_before_content_and_a_call_comes_as_neither() -> None:
    found = pieces(list(f"<think>\nI could {CALL}\n</think>\n\nLet me see. {CALL}"), tools=["f"])
    assert found[:2] == (f"I could {CALL}", "Let me see.")
    assert found[2] == sorted(found[2], reverse=True)
    assert pieces(list("so it is</think>Yes"), thinking=True)[:2] == ("so it is", "Yes")
