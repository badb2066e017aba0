"""Streams of one conversation that are left, rebound or overtaken: what is stale never writes."""

from __future__ import annotations

import gc
import weakref

import pytest
from generation_fakes import fake_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgellm_runtime.errors import OptionError, StateError

SETTINGS = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=[True, False], ids=["recurrent", "attention"])
def model(request, tmp_path_factory):
    return fake_model(tmp_path_factory.mktemp("talk"), recurrent=request.param, max_context=2000)


def turn(user: str, said: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": said}]


def check(model, talk, expected) -> None:
    """The messages are these, and the state belongs to them: the next answer is a fresh reading's."""
    assert talk.messages == expected
    answer = talk.say("and now", max_new_tokens=3)
    assert answer.tokens == model.chat([*expected, {"role": "user", "content": "and now"}], max_new_tokens=3).tokens
    assert talk.messages == [*expected, *turn("and now", answer.text)]


def test_closing_a_stream_after_a_later_turn_changes_nothing(model):
    talk = model.conversation()
    stream = talk.stream("banana", max_new_tokens=9)
    first = next(stream).text
    later = talk.say("orange", max_new_tokens=5)
    stream.close()
    assert next(stream, None) is None
    check(model, talk, [*turn("banana", first), *turn("orange", later.text)])


def test_binding_the_name_of_a_stream_anew_keeps_both_turns(model):
    talk = model.conversation()
    stream = talk.stream("banana", max_new_tokens=9)
    first = next(stream).text
    stream = talk.stream("orange", max_new_tokens=4, ignore_eos=True)
    gc.collect()
    second = "".join(chunk.text for chunk in stream)
    check(model, talk, [*turn("banana", first), *turn("orange", second)])


def test_of_two_streams_the_later_one_goes_on(model):
    talk = model.conversation()
    first, second = talk.stream("banana", max_new_tokens=9), talk.stream("orange", max_new_tokens=9, ignore_eos=True)
    said = "".join(next(second).text for _ in range(3))
    assert next(first, None) is None
    said += "".join(chunk.text for chunk in second)
    check(model, talk, turn("orange", said))  # of the first nothing was said


def test_a_turn_begun_within_the_loop_over_another_ends_that_loop(model):
    talk = model.conversation()
    said = []
    for chunk in talk.stream("banana", max_new_tokens=9, ignore_eos=True):
        said.append(chunk.text)
        if len(said) == 2:
            talk.say("orange", max_new_tokens=1)
    assert len(said) == 2
    assert talk.messages[:2] == turn("banana", "".join(said))
    assert len(talk.messages) == 4


def test_a_stream_that_is_dropped_leaves_its_turn(model):
    talk = model.conversation()
    for chunk in talk.stream("banana", max_new_tokens=9, ignore_eos=True):
        said = chunk.text
        break
    assert talk.messages == turn("banana", said)
    check(model, talk, turn("banana", said))


def test_a_conversation_that_is_left_with_its_stream_is_freed_at_once(model):
    talk = model.conversation()
    stream = talk.stream("banana", max_new_tokens=9)
    next(stream)
    gone = weakref.ref(talk)
    gc.disable()
    try:
        del talk, stream
        assert gone() is None
    finally:
        gc.enable()


def test_reset_forgets_the_turn_of_an_open_stream(model):
    talk = model.conversation(system="the")
    stream = talk.stream("banana", max_new_tokens=9)
    next(stream)
    talk.reset()
    stream.close()
    del stream
    gc.collect()
    assert talk.held_tokens == 0
    check(model, talk, [{"role": "system", "content": "the"}])


def test_a_wrong_call_leaves_the_open_stream_open(model):
    talk = model.conversation()
    stream = talk.stream("banana", max_new_tokens=4, ignore_eos=True)
    said = next(stream).text
    with pytest.raises(OptionError, match="temperature"):
        talk.say("orange", temperature=-1)
    said += "".join(chunk.text for chunk in stream)
    check(model, talk, turn("banana", said))


def test_a_turn_from_within_a_step_of_another_is_refused(model, monkeypatch):
    talk = model.conversation()
    step = model.session.step
    monkeypatch.setattr(model.session, "step", lambda *a, **k: talk.say("orange"))
    with pytest.raises(StateError, match="within a step of an answer"):
        talk.say("banana", max_new_tokens=4)
    monkeypatch.setattr(model.session, "step", step)
    check(model, talk, [])


def test_what_messages_gives_cannot_change_the_conversation(model):
    talk = model.conversation()
    answer = talk.say("hello", max_new_tokens=2)
    talk.messages.append({"role": "user", "content": "x"})
    talk.messages[0]["content"] = "y"
    check(model, talk, turn("hello", answer.text))


class Reference:
    """The rule, in lists: one open turn; any other turn writes it down as far as it was said."""

    def __init__(self) -> None:
        self.messages: list[dict[str, str]] = []
        self.open: tuple[int, str, list[str]] | None = None  # number, user's words, what was said

    def settle(self) -> None:
        if self.open is not None and self.open[2]:
            self.messages += turn(self.open[1], "".join(self.open[2]))
        self.open = None


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["open", "next", "next", "finish", "close", "drop", "say", "reset"]), st.integers(0, 3)),
    max_size=14,
)


@given(actions=ACTIONS)
@SETTINGS
def test_any_order_of_streams_and_turns_follows_the_rule(model, actions):
    talk, rule = model.conversation(), Reference()
    streams: dict[int, object] = {}
    opened = 0
    for action, which in actions:
        stream = streams.get(which)
        if action == "open":
            rule.settle()
            opened += 1
            streams[which] = talk.stream(f"user {opened}", max_new_tokens=4, ignore_eos=True)
            rule.open = (which, f"user {opened}", [])
        elif action in ("next", "finish") and stream is not None:
            chunks = list(stream) if action == "finish" else [c for c in [next(stream, None)] if c is not None]
            if rule.open is None or rule.open[0] != which:
                assert chunks == []
                continue
            rule.open[2].extend(c.text for c in chunks)
            if action == "finish" or not chunks:  # it has come to its end, and its turn is written down
                rule.settle()
        elif action in ("close", "drop") and stream is not None:
            stream.close() if action == "close" else None
            streams.pop(which)
            del stream
            gc.collect(0)
            if rule.open is not None and rule.open[0] == which:
                rule.settle()
        elif action == "say":
            rule.settle()
            answer = talk.say("the world", max_new_tokens=2)
            rule.messages += turn("the world", answer.text)
        elif action == "reset":
            talk.reset()
            rule.messages, rule.open = [], None
        if rule.open is None:
            assert talk.messages == rule.messages
    rule.settle()
    expected = model.chat([*rule.messages, {"role": "user", "content": "hello"}], max_new_tokens=3)
    answer = talk.say("hello", max_new_tokens=3)
    assert answer.tokens == expected.tokens
    assert talk.messages == [*rule.messages, *turn("hello", answer.text)]
