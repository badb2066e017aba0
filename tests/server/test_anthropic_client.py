"""Anthropic's own Python client, unmodified, against a bundle that is served."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import httpx2 as httpx
import pytest
from served import Gate, Served, serving
from tiny_bundles import attention_bundle

KEY = "a-key-of-mine"
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving({"tiny": attention_bundle()}, api_keys=[KEY]) as found:
        yield found


@pytest.fixture
def client(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.address, api_key=KEY, max_retries=0) as found:
        yield found


def test_a_message_is_what_the_model_says(served: Served, client: anthropic.Anthropic) -> None:
    found = client.messages.create(
        model="tiny", max_tokens=12, extra_body={"temperature": 0}, system="be brief", messages=MESSAGES
    )
    alone = served.model.model.chat([{"role": "system", "content": "be brief"}, *MESSAGES], max_new_tokens=12)
    assert [(block.type, block.text) for block in found.content] == [("text", alone.text)]
    assert found.stop_reason == {"length": "max_tokens", "eos": "end_turn"}[alone.finish_reason]
    assert (found.usage.input_tokens, found.usage.output_tokens) == (alone.prompt_tokens, len(alone.tokens))
    counted = client.messages.count_tokens(model="tiny", system="be brief", messages=MESSAGES)
    assert counted.input_tokens == alone.prompt_tokens


def test_a_stream_is_the_same_in_pieces(served: Served, client: anthropic.Anthropic) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    with client.messages.stream(model="tiny", max_tokens=12, extra_body={"temperature": 0}, messages=parts) as stream:
        texts = list(stream.text_stream)
        whole = stream.get_final_message()
    alone = served.model.model.chat(MESSAGES, max_new_tokens=12)
    assert "".join(texts) == whole.content[0].text == alone.text
    assert len(texts) > 1
    assert whole.usage.output_tokens == len(alone.tokens)


def test_a_stop_text_is_named(served: Served, client: anthropic.Anthropic) -> None:
    alone = served.model.model.chat(MESSAGES, max_new_tokens=20)
    stop = alone.text[3:5]
    found = client.messages.create(
        model="tiny", max_tokens=20, extra_body={"temperature": 0}, messages=MESSAGES, stop_sequences=["zzz", stop]
    )
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", stop)
    assert found.content[0].text == alone.text[: alone.text.index(stop)]


def test_what_the_assistant_has_begun_goes_on(served: Served, client: anthropic.Anthropic) -> None:
    model = served.model.model
    begun = "the user <|im_end|>"  # whose name of a token is plain characters
    found = client.messages.create(
        model="tiny",
        max_tokens=8,
        extra_body={"temperature": 0},
        messages=[*MESSAGES, {"role": "assistant", "content": begun}],
    )
    prompt = [*model.chat_template.encode(MESSAGES), *model.tokenizer.encode(begun)]
    assert found.content[0].text == model.generate(prompt, max_new_tokens=8).text


def test_errors_are_those_the_client_knows(served: Served, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="claude", max_tokens=4, messages=MESSAGES)
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="tools"):
        client.messages.create(
            model="tiny", max_tokens=4, messages=MESSAGES, tools=[{"name": "f", "input_schema": {"type": "object"}}]
        )
    with pytest.raises(anthropic.BadRequestError, match="context holds 96"):
        client.messages.create(model="tiny", max_tokens=4, messages=[{"role": "user", "content": "hello " * 99}])
    with anthropic.Anthropic(base_url=served.address, api_key="wrong-key", max_retries=0) as other:
        with pytest.raises(anthropic.AuthenticationError):
            other.messages.create(model="tiny", max_tokens=4, messages=MESSAGES)
        with pytest.raises(anthropic.AuthenticationError):
            other.models.list()
    found = httpx.post(f"{served.address}/v1/messages", json={"model": "tiny"}, headers={"x-api-key": KEY})
    assert found.status_code == 400
    assert found.json()["type"] == "error"
    assert found.json()["request_id"] == found.headers["request-id"]


def test_models_are_listed_in_its_form(client: anthropic.Anthropic) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").type == "model"


def test_an_error_within_a_stream_is_an_event() -> None:
    with serving({"tiny": attention_bundle()}) as served:
        session = served.model.model.session
        gate = Gate(served.model, free=2)
        with anthropic.Anthropic(base_url=served.address, api_key="none", max_retries=0) as client:
            with client.messages.create(model="tiny", max_tokens=20, messages=MESSAGES, stream=True) as stream:
                events = iter(stream)
                assert next(events).type == "message_start"
                assert gate.reached.wait(60)
                waiting, session.step = session.step, _fails
                gate.open.set()
                with pytest.raises(anthropic.APIStatusError, match="the server's log says why"):
                    list(events)
                session.step = waiting
            assert client.messages.create(model="tiny", max_tokens=4, messages=MESSAGES).content


def _fails(*_: object, **__: object) -> None:
    raise MemoryError("none left")
