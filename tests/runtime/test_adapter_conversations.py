"""Conversations and chats that switch adapters: what one adapter has read is never another's."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
from adapter_bundles import NAMES, adapter_bundle
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.cli.chat import chat
from edgellm.cli.inspect import inspect
from edgellm_runtime import Model, OptionError, StateError, load
from edgellm_runtime.generation.conversation import Conversation
from edgellm_runtime.generation.prefix_cache import PrefixCache


@functools.cache
def model() -> Model:
    return load(adapter_bundle(), threads=1)


@functools.cache
def caching() -> Model:
    return load(adapter_bundle(), threads=1, prefix_cache=PrefixCache(1 << 22))


def said_anew(conversation: Conversation, text: str, **options: Any) -> str:
    """What a conversation of the same history, with the same adapter from its beginning, answers."""
    fresh = model().with_adapter(conversation.adapter).conversation()
    fresh.edit(conversation.messages)
    return fresh.say(text, **options).text


def test_the_adapters_answer_differently() -> None:
    conversations = (model().with_adapter(name).conversation() for name in (None, *NAMES))
    assert len({conversation.say("hello", max_new_tokens=6).text for conversation in conversations}) == 3


moves = st.one_of(
    st.sampled_from(["say", "say again", "fork", "rewind", "save"]),
    st.sampled_from([("switch", n) for n in (None, *NAMES)]),
)


@settings(max_examples=12, deadline=None)
@given(st.lists(moves, min_size=3, max_size=9), st.booleans())
def test_each_answer_is_that_of_a_conversation_that_had_its_adapter_all_along(script: list[Any], cached: bool) -> None:
    start = caching() if cached else model()
    conversation = start.conversation()
    for number, move in enumerate([*script, "say"]):
        if move in ("say", "say again"):
            text = "the world" if move == "say" else f"hello {number}"
            expected = said_anew(conversation, text, max_new_tokens=3)
            assert conversation.say(text, max_new_tokens=3).text == expected
        elif move == "fork":
            conversation = conversation.fork()
        elif move == "rewind":
            conversation.rewind(min(1, len(conversation.messages)))
        elif move == "save":
            with tempfile.TemporaryDirectory() as folder:
                conversation.save(Path(folder) / "c")
                conversation = start.with_adapter(conversation.adapter).load_conversation(Path(folder) / "c")
        else:
            conversation.switch(move[1])
            assert conversation.adapter == move[1]


def test_a_switch_reads_the_history_anew_and_none_to_itself_does_not() -> None:
    conversation = model().conversation()
    conversation.say("hello", max_new_tokens=3)
    held, before = conversation.held_tokens, conversation.messages
    conversation.switch(None)
    assert conversation.held_tokens == held
    conversation.switch("red")
    assert (conversation.held_tokens, conversation.messages) == (0, before)
    conversation.say("hello", max_new_tokens=3)
    assert conversation.reused_tokens == 0
    conversation.say("hello", max_new_tokens=3)
    assert conversation.reused_tokens > 0


def test_a_switch_ends_an_open_answer_and_a_wrong_one_changes_nothing() -> None:
    conversation = model().with_adapter("red").conversation()
    stream = conversation.stream("hello", max_new_tokens=20)
    first = next(stream).text
    conversation.switch("blue")
    assert list(stream) == [] and conversation.messages[-1] == {"role": "assistant", "content": first}
    with pytest.raises(OptionError, match="no adapter 'green'; this one has red, blue"):
        conversation.switch("green")
    with pytest.raises(OptionError, match=r"switch it with conversation\.switch\(name\)"):
        conversation.say("hello", adapter="red")
    assert conversation.adapter == "blue"


def test_a_saved_conversation_is_of_the_adapter_that_it_had_last(tmp_path: Path) -> None:
    conversation = model().with_adapter("red").conversation()
    conversation.say("hello", max_new_tokens=3)
    conversation.switch("blue")
    conversation.save(tmp_path / "unread")
    conversation.say("hello", max_new_tokens=3)
    conversation.save(tmp_path / "read")
    for file in ("unread", "read"):
        assert model().with_adapter("blue").load_conversation(tmp_path / file).messages
        for name in (None, "red"):
            with pytest.raises(StateError, match="the state of another adapter"):
                model().with_adapter(name).load_conversation(tmp_path / file)


def test_chat_begins_with_an_adapter_and_switches() -> None:
    lines = "hello\n/adapter\n/adapter blue\nhello\n/adapter -\nhello\n/adapter green\n/adapter red\n/reset\nhello\n"
    options = {"max_new_tokens": 4}
    given = [str(adapter_bundle()), "--adapter", "red", "--max-new-tokens", "4", "--threads", "1"]
    result = CliRunner().invoke(chat, given, input=lines, catch_exceptions=False)
    assert result.exit_code == 0
    conversation = model().with_adapter("red").conversation()
    expected = []
    for name in ("red", "blue", None):
        conversation.switch(name)
        expected.append(conversation.say("hello", **options).text)
    assert result.stdout == "".join(f"{text}\n" for text in (*expected, expected[0]))
    for told in ("* red\n  blue\n  - (none)", "with the adapter blue", "no adapter 'green'", "without an adapter"):
        assert told in result.stderr


def test_inspect_lists_the_adapters() -> None:
    assert "red, blue" in CliRunner().invoke(inspect, [str(adapter_bundle())], catch_exceptions=False).output
