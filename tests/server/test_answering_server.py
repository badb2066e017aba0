"""Translators and their like on a server: /v1/completions answers a text, many at once, in the form of their task."""

from __future__ import annotations

import functools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from served import serving
from source_models import text_bundle
from task_models import bundle, make, spec_of, tokenizer

from edgellm.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from edgellm_runtime import Model, load

TEXTS = ["the cat sat on the mat", "a dog", "the old tree near our house and the bird in it"]


@functools.cache
def translator() -> Path:
    """Of the preset with an encoder, with a task's prompts and tokenizer."""
    import torch

    torch.manual_seed(0)
    config = EncoderDecoderConfig(
        vocab_size=tokenizer().get_vocab_size(), width=32, encoder=("gru",), decoder=("lstm", "attention"), num_heads=2,
        recurrent_width=32, mlp_width=48, max_context=40, max_source=40, tie_embeddings=False,
    )  # fmt: skip
    model = EncoderDecoder(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return bundle(Path(tempfile.mkdtemp()), model, spec_of("translation")).bundle.path


@functools.cache
def summarizer() -> Path:
    """A language model that reads a text as a prefix."""
    return bundle(Path(tempfile.mkdtemp()), make(), spec_of("summarization")).bundle.path


def asked(model: Model, text: str, **options: Any) -> Any:
    return model.generate(model.task.prompt(text), max_new_tokens=model.task.spec.max_new_tokens, **options)


@pytest.mark.parametrize("path", [translator, summarizer])
def test_completions_answer_texts_as_the_task_does(path: Any) -> None:
    model = load(path(), threads=1)
    expected = [asked(model, text) for text in TEXTS]
    one = model.translate if model.task.spec.name == "translation" else model.summarize
    assert [a.text.strip() for a in expected] == [a.text for a in one(TEXTS, beams=1)]
    with serving({"it": path()}) as served:

        def ask(prompt: Any, **more: Any) -> dict[str, Any]:
            return served.post("/v1/completions", {"model": "it", "prompt": prompt, **more}).json()

        with ThreadPoolExecutor(len(TEXTS)) as pool:
            found = list(pool.map(ask, TEXTS))
        assert [f["choices"][0]["text"] for f in found] == [a.text for a in expected]
        assert [f["usage"]["prompt_tokens"] for f in found] == [a.prompt_tokens for a in expected]
        together = ask(TEXTS)  # several texts in one request
        assert [c["text"] for c in together["choices"]] == [a.text for a in expected]
        short = ask(TEXTS[0], max_tokens=2)["choices"][0]
        assert (short["finish_reason"], short["text"]) == ("length", asked_short(model, TEXTS[0]))
        tokens = model.task.prompt(TEXTS[0])
        assert ask(tokens)["choices"][0]["text"] == expected[0].text  # ids are taken as they are
        drawn = ask(TEXTS[1], temperature=1, seed=3, n=2)["choices"]
        assert [c["text"] for c in drawn] == [asked(model, TEXTS[1], temperature=1.0, seed=3 + i).text for i in (0, 1)]
        refused = served.post("/v1/completions", {"model": "it", "prompt": "   "})
        assert refused.status_code == 400


def asked_short(model: Model, text: str) -> str:
    return model.generate(model.task.prompt(text), max_new_tokens=2).text


def test_a_checkpoint_that_answers_sources_needs_no_task() -> None:
    model = load(text_bundle(), threads=1)
    with serving({"it": text_bundle()}) as served:
        found = served.post("/v1/completions", {"model": "it", "prompt": "Hello there"}).json()
        expected = model.generate("Hello there", max_new_tokens=model.session.max_context)
        assert found["choices"][0]["text"] == expected.text
        assert found["usage"]["prompt_tokens"] == expected.prompt_tokens
        lines = served.post("/v1/completions", {"model": "it", "prompt": "Hello", "stream": True}).text
        assert lines.rstrip().endswith("data: [DONE]")
        chat = {"model": "it", "messages": [{"role": "user", "content": "Hello"}]}
        assert "no chat template" in served.post("/v1/chat/completions", chat).json()["error"]["message"]
        for more, message in (({"echo": True}, "echo"), ({"prompt": [4] * 99}, "99 tokens")):
            wrong = served.post("/v1/completions", {"model": "it", "prompt": "Hello", **more})
            assert wrong.status_code == 400 and message in wrong.json()["error"]["message"]
