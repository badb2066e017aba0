"""OpenAI's own Python client, unmodified, against a bundle that is served."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
from served import Served, serving
from tiny_bundles import attention_bundle, hidden_bundle, recurrent_bundle

from edgellm_runtime import Model

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving({"tiny": attention_bundle(), "ids": recurrent_bundle(), "vectors": hidden_bundle()}) as found:
        yield found


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_a_chat_is_what_the_model_says(served: Served, client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_completion_tokens=12)
    alone = served.model.model.chat(MESSAGES, max_new_tokens=12)
    (choice,) = found.choices
    assert choice.message.content == alone.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == ("length" if alone.finish_reason == "length" else "stop")
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (alone.prompt_tokens, len(alone.tokens))


def test_a_stream_is_the_same_in_pieces(served: Served, client: openai.OpenAI) -> None:
    alone = served.model.model.chat(MESSAGES, max_new_tokens=12, temperature=1.0, seed=3)
    with client.chat.completions.create(
        model="tiny", messages=MESSAGES, seed=3, max_tokens=12, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == alone.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(alone.tokens)
    assert len({c.id for c in chunks}) == 1


def test_several_choices_have_a_seed_each(served: Served, client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="tiny", messages=MESSAGES, n=3, seed=5, max_tokens=6)
    alone = [served.model.model.chat(MESSAGES, max_new_tokens=6, temperature=1.0, seed=5 + i) for i in range(3)]
    assert [c.message.content for c in found.choices] == [a.text for a in alone]
    assert [c.index for c in found.choices] == [0, 1, 2]


def test_log_probabilities_are_the_models(served: Served, client: openai.OpenAI) -> None:
    alone = served.model.model.chat(MESSAGES, max_new_tokens=5, logprobs=2, ignore_eos=True)
    assert alone.logprobs is not None
    asked = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 5, "logprobs": True,
             "top_logprobs": 2, "extra_body": {"ignore_eos": True}}  # fmt: skip
    content = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert [round(p.logprob, 5) for p in content] == [round(p.logprob, 5) for p in alone.logprobs]
    assert [len(p.top_logprobs) for p in content] == [2] * 5
    assert b"".join(bytes(p.bytes) for p in content).decode(errors="replace") == alone.text
    with client.chat.completions.create(**asked, stream=True) as stream:
        pieces = [p for c in stream if c.choices[0].logprobs for p in c.choices[0].logprobs.content]
    assert [p.logprob for p in pieces] == [p.logprob for p in content]


def test_options_reach_the_model(served: Served, client: openai.OpenAI) -> None:
    model = served.model.model
    alone = model.chat(MESSAGES, max_new_tokens=20)
    stop = alone.text[3:5]
    stopped = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=20, stop=[stop, "zzz"]
    )
    assert stopped.choices[0].message.content == alone.text[: alone.text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    first = alone.tokens[0]
    biased = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=20, logit_bias={str(first): -100},
        presence_penalty=0.5, frequency_penalty=0.25, top_p=0.9, extra_body={"top_k": 4, "repetition_penalty": 1.1},
    )  # fmt: skip
    expected = model.chat(
        MESSAGES, max_new_tokens=20, logit_bias={first: -100}, presence_penalty=0.5, frequency_penalty=0.25,
        repetition_penalty=1.1,
    )  # fmt: skip
    assert biased.choices[0].message.content == expected.text


def test_completions_take_texts_and_ids_alone_and_several(served: Served, client: openai.OpenAI) -> None:
    model = served.model.model
    ids = model.tokenizer.encode("hello")
    for prompt in ("hello", ids):
        found = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=8)
        assert found.choices[0].text == model.generate(prompt, max_new_tokens=8).text
    several = client.completions.create(
        model="tiny", prompt=["hello", "the world"], temperature=0, max_tokens=8, echo=True
    )
    assert [c.text for c in several.choices] == [
        model.generate(p, max_new_tokens=8, echo=True).text for p in ("hello", "the world")
    ]
    assert [c.index for c in several.choices] == [0, 1]
    with client.completions.create(
        model="tiny", prompt=[ids, ids], temperature=0, max_tokens=8, n=2, stream=True, logprobs=1
    ) as stream:
        texts = [""] * 4
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [model.generate(ids, max_new_tokens=8).text] * 4


def test_log_probabilities_of_completions_say_where_tokens_begin(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt="hello", temperature=0, max_tokens=4, logprobs=3)
    places = found.choices[0].logprobs
    assert places.text_offset == [sum(map(len, places.tokens[:i])) for i in range(len(places.tokens))]
    assert [len(top) for top in places.top_logprobs] == [3] * len(places.tokens)


def test_models_are_listed_by_name(served: Served, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "ids", "vectors"]
    assert client.models.retrieve("ids").object == "model"
    found = client.completions.create(model="ids", prompt=[5, 6, 7], temperature=0, max_tokens=4)
    assert found.choices[0].text == ""  # a bundle without a tokenizer
    assert found.usage is not None and found.usage.completion_tokens == 4


def test_responses_are_what_the_model_says_whole_and_in_pieces(served: Served, client: openai.OpenAI) -> None:
    items = [
        {"role": "user", "content": "hello"}, {"role": "assistant", "content": "the world"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "and the user"}]},
    ]  # fmt: skip
    plain = [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "the world"}, {"role": "user", "content": "and the user"},
    ]  # fmt: skip
    alone = served.model.model.chat(plain, max_new_tokens=9)
    asked = {"model": "tiny", "instructions": "be brief", "input": items, "temperature": 0, "max_output_tokens": 9}
    found = client.responses.create(**asked)
    assert found.output_text == alone.text
    assert found.status == ("incomplete" if alone.finish_reason == "length" else "completed")
    assert found.usage is not None and found.usage.output_tokens == len(alone.tokens)
    with client.responses.create(**asked, stream=True) as stream:
        events = list(stream)
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == alone.text
    assert events[-1].response.output_text == alone.text
    again = client.responses.create(model="tiny", input=[*items, *found.output, *items[:1]], max_output_tokens=2)
    assert again.output_text is not None
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="tiny", input="hello", previous_response_id=found.id)


def test_many_at_once_get_what_each_gets_alone(served: Served) -> None:
    model = served.model.model
    prompts = [f"the user said {word}" for word in ["hello", "to", "the", "assistant", "and", "the", "world"]] * 2

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0) as client:
            found = await asyncio.gather(
                *(
                    client.completions.create(model="tiny", prompt=p, max_tokens=20, seed=i)
                    for i, p in enumerate(prompts)
                )
            )
        return [f.choices[0].text for f in found]

    alone = [model.generate(p, max_new_tokens=20, temperature=1.0, seed=i).text for i, p in enumerate(prompts)]
    assert asyncio.run(all_at_once()) == alone


def test_what_is_not_there_yet_is_refused_by_name(client: openai.OpenAI) -> None:
    for extra in ({"modalities": ["text", "audio"]}, {"reasoning_effort": "low"}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=MESSAGES, **extra)
        assert caught.value.code == "unsupported_parameter"
        assert caught.value.param == next(iter(extra))
    with pytest.raises(openai.BadRequestError, match="takes parts of type 'text'"):
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
        )


def test_embeddings_are_the_models(served: Served, client: openai.OpenAI) -> None:
    model = served.host.find("vectors").model
    texts = ["hello", "a longer text"]
    expected = model.embed(texts)
    many = client.embeddings.create(model="vectors", input=texts)  # which asks for base64
    np.testing.assert_allclose([entry.embedding for entry in many.data], expected, atol=1e-6)
    assert [entry.index for entry in many.data] == [0, 1]
    tokens = model.text_tokens(texts)
    assert (many.usage.prompt_tokens, many.usage.total_tokens) == (sum(map(len, tokens)),) * 2
    for given in ("hello", tokens[0], [tokens[0]]):
        one = client.embeddings.create(model="vectors", input=given, encoding_format="float")
        np.testing.assert_allclose(one.data[0].embedding, expected[0], atol=1e-6)


def test_embeddings_that_cannot_be_had_are_refused_with_the_reason(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="export its bundle with --hidden") as none:
        client.embeddings.create(model="tiny", input="hello")
    assert none.value.code == "no_embeddings"
    with pytest.raises(openai.BadRequestError, match="'dimensions' is not supported"):
        client.embeddings.create(model="vectors", input="hello", dimensions=8)
    with pytest.raises(openai.BadRequestError, match=r"[Tt]ext 1 has .* tokens"):
        client.embeddings.create(model="vectors", input=["short", "long " * 400])
    with pytest.raises(openai.BadRequestError, match="'input'"):
        client.embeddings.create(model="vectors", input=[])
    with pytest.raises(openai.BadRequestError, match="float or base64"):
        client.embeddings.create(model="vectors", input="hello", encoding_format="int8")  # type: ignore[arg-type]


def test_errors_are_those_the_client_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello " * 200}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body={"tempreature": 1})
    assert unknown.value.code == "unknown_parameter"
    assert "tempreature" in str(unknown.value)
    for wrong in ({"temperature": 3}, {"max_tokens": 0}, {"n": 99}, {"top_logprobs": 2}, {"logit_bias": {"x": 1}}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=MESSAGES, **wrong)
        assert caught.value.param == next(iter(wrong))
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="ids", messages=MESSAGES)


def test_an_echo_has_the_prompts_log_probabilities(served: Served, client: openai.OpenAI) -> None:
    model = served.model.model
    ids = model.tokenizer.encode("the user said hello to the world")
    asked = {"model": "tiny", "prompt": [ids, ids[:5]], "echo": True, "logprobs": 2, "temperature": 0}
    for most in (0, 1):
        found = client.completions.create(**asked, max_tokens=most)
        for choice, prompt in zip(found.choices, (ids, ids[:5]), strict=True):
            (score,) = model.score([(prompt[:1], prompt[1:])])
            made = [] if most == 0 else model.generate(prompt, max_new_tokens=1, logprobs=2).logprobs
            expected = [*score.logprobs, *(place.logprob for place in made)]
            places = choice.logprobs
            assert places.token_logprobs[0] is None and places.top_logprobs[0] is None
            assert places.token_logprobs[1:] == pytest.approx(expected, abs=1e-5)
            assert [max(top.values()) == p for top, p in zip(places.top_logprobs[1:], places.token_logprobs[1:],
                    strict=True)][: len(prompt) - 1].count(True) == _greedy(model, prompt)  # fmt: skip
            assert len(places.tokens) == len(prompt) + len(made)
            assert choice.text.startswith(model.tokenizer.decode(prompt))
    with pytest.raises(openai.BadRequestError, match="in a stream"):
        client.completions.create(**asked, stream=True)


def _greedy(model: Model, prompt: list[int]) -> int:
    """How many tokens of a prompt are the most probable at their place."""
    return sum(model.score([(prompt[:at], prompt[at : at + 1])])[0].greedy for at in range(1, len(prompt)))


def test_texts_become_tokens_and_tokens_texts(served: Served) -> None:
    tokenizer = served.model.model.tokenizer
    text = "the world<|im_end|>"

    def post(path: str, **body: Any) -> Any:
        return served.post(path, {"model": "tiny", **body}).json()

    found = post("/tokenize", prompt=text, add_special_tokens=False)
    assert found["tokens"] == tokenizer.encode(text, special=True) and found["tokens"][-1] == 2
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 96)
    assert post("/detokenize", tokens=found["tokens"])["prompt"] == text
    assert post("/tokenize", messages=MESSAGES)["tokens"] == served.model.model.chat_template.encode(MESSAGES)
    info = httpx.get(f"{served.address}/tokenizer_info", params={"model": "tiny"}).json()
    assert (info["eos_token"], info["chat_template"]) == ("<|im_end|>", served.model.model.chat_template.source)
    assert post("/tokenize", prompt="a", messages=MESSAGES)["error"]["code"] == "missing_required_parameter"
    assert post("/tokenize", model=None, prompt="a")["error"]["message"].endswith("it is one of tiny, ids, vectors.")
    assert post("/detokenize", tokens=[10**6])["error"]["message"].startswith("Token id 1000000 is outside")
    assert post("/tokenize", model="ids", prompt="a")["error"]["code"] == "no_tokenizer"
