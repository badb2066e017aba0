"""Tokenizers that mean harm: one sentence, and neither a panic of the library's nor a text without end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_bundles import attention_bundle, copied, sign
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from edgellm_runtime import BundleError, load
from edgellm_runtime.bundle import TokenizerInfo
from edgellm_runtime.model import Model
from edgellm_runtime.text.chat import ChatTemplate
from edgellm_runtime.text.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "hello <|im_end|>"}]


def spoiled(folder: Path, change: Callable[[Any], Any]) -> Model:
    bundle = copied(attention_bundle(), folder)
    tokenizer = json.loads((bundle / "tokenizer.json").read_text())
    change(tokenizer)
    (bundle / "tokenizer.json").write_text(json.dumps(tokenizer))
    sign(bundle, "tokenizer.json")
    return load(bundle, threads=1)


def all_zero(tokenizer: Any) -> None:
    tokenizer["model"]["vocab"] = dict.fromkeys(tokenizer["model"]["vocab"], 0)


def test_tokenizer_whose_ids_are_all_0_is_refused_in_a_chat(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="for a special token, as it does with any text"):
        spoiled(tmp_path, all_zero).chat(MESSAGES, max_new_tokens=1)


def test_template_whose_text_has_no_tokens_is_refused(tmp_path: Path) -> None:
    model = spoiled(tmp_path, lambda t: t.update(model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[]))
    with pytest.raises(BundleError, match="what it writes has no tokens"):
        model.chat([{"role": "user", "content": "hello"}], max_new_tokens=1)


@pytest.mark.parametrize("pattern", [{"String": ""}, {"Regex": ""}])
@pytest.mark.parametrize("within", [False, True])
def test_decoder_that_replaces_nothing_streams_what_it_decodes(
    tmp_path: Path, pattern: dict[str, str], within: bool
) -> None:
    replace = {"type": "Replace", "pattern": pattern, "content": "x"}
    sequence = {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    tokenizer = spoiled(tmp_path, lambda t: t.update(decoder=sequence if within else replace)).tokenizer
    assert tokenizer is not None
    tokens = tokenizer.encode("hello to the world")
    stream = tokenizer.stream()
    assert "".join(map(stream.push, tokens)) + stream.finish() == tokenizer.decode(tokens)


def test_decoder_that_the_library_panics_in_is_a_fault_of_the_bundle(tmp_path: Path) -> None:
    strip = {"type": "Strip", "content": "x", "start": 2**62, "stop": 2**62}
    tokenizer = spoiled(tmp_path, lambda t: t.update(decoder=strip)).tokenizer
    assert tokenizer is not None
    with pytest.raises(BundleError, match="the tokenizer failed"):
        tokenizer.decode(range(200))


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_tokenizer_that_multiplies_texts_is_refused(tmp_path: Path, part: str) -> None:
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
    sequence = {"type": "Sequence", f"{part}s": [replace] * 20}
    with pytest.raises(BundleError, match=r"it makes texts \d+ times as long"):
        assert spoiled(tmp_path, lambda t: t.update({part: sequence})).tokenizer


def test_character_that_no_token_has_is_not_the_name_of_the_unknown_token(tmp_path: Path) -> None:
    library = Library(models.WordLevel({"<unk>": 0, "hello": 1, "there": 2}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["<unk>"])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}hello {{ m.content }}{% endfor %}")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", TokenizerInfo(None, (), False, True), vocab_size=3)
    template = ChatTemplate(tmp_path / "chat_template.jinja", tokenizer)
    assert template.encode([{"role": "user", "content": "there ☃"}]) == [1, 2, 0]
