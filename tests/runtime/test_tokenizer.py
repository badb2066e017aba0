from __future__ import annotations

import json

import pytest
from generation_fakes import byte_level
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_kinds import metaspace, sentencepiece, suffixed, word_level, word_piece
from tokenizers import Tokenizer as Library

from edgellm_runtime.bundle import TokenizerInfo
from edgellm_runtime.errors import BundleError, OptionError
from edgellm_runtime.text.tokenizer import Tokenizer

# not the mark either, which sentencepiece's kind does not tell from a space
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=60)
INFO = TokenizerInfo(None, (2,), False, False)
quick = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def load(library: Library, path, *, vocab_size: int | None = None, info: TokenizerInfo = INFO) -> Tokenizer:
    library.save(str(path))
    return Tokenizer(path, info, vocab_size=vocab_size or library.get_vocab_size())


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte-level": load(byte_level(), folder / "bytes.json"),
        "sentencepiece": load(sentencepiece(True), folder / "llama.json"),
        "sentencepiece, no strip": load(sentencepiece(False), folder / "gemma.json"),
    }


KINDS = ["byte-level", "sentencepiece", "sentencepiece, no strip"]


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.stream()
    return [*(decoder.push(i) for i in ids), decoder.finish()]


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
@quick
def test_stream_gives_the_text_back_and_no_half_characters(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == text == tokenizer.decode(ids)
    assert tokenizer._library.decode(ids, skip_special_tokens=True) == text
    assert "\ufffd" in text or not any("\ufffd" in p for p in pieces)
    assert pieces[-1] == ""


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT, cut=st.integers(0, 80))
@quick
def test_a_cut_stream_holds_back_the_half_character(tokenizers, kind, text, cut):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)[:cut]
    *shown, last = stream(tokenizer, ids)
    assert text.startswith("".join(shown))
    assert last in ("", "\ufffd")


@given(ids=st.lists(st.integers(0, 280), max_size=40))
@quick
def test_byte_level_decodes_nonsense_as_the_library_does(tokenizers, ids):
    tokenizer = tokenizers["byte-level"]
    assert tokenizer.decode(ids) == tokenizer._library.decode(ids, skip_special_tokens=True)


def test_the_cost_of_a_token_does_not_grow(tokenizers, monkeypatch):
    tokenizer = tokenizers["byte-level"]
    monkeypatch.setattr(type(tokenizer._pieces), "window", lambda *_: pytest.fail("decoded again"))
    assert len("".join(stream(tokenizer, tokenizer.encode("the world ") * 2000))) == 20000


@pytest.mark.parametrize("make", [word_piece, word_level, suffixed, metaspace])
def test_other_decoders_stream_what_the_library_decodes(make, tmp_path):
    library = make()
    tokenizer = load(library, tmp_path / "t.json", info=TokenizerInfo())
    for text in (
        "hello",
        "hello world",
        "hello worlds , hello hello worlds world hello hello world hello there",
        "world",
    ):
        ids = tokenizer.encode(text)
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == library.decode(ids)


def test_names_of_special_tokens_are_plain_text_unless_asked(tokenizers):
    tokenizer = tokenizers["byte-level"]
    text = "hello<|im_end|>"
    assert 2 not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text, special=True)[-1] == 2
    assert 2 not in tokenizer.encode(text)  # asking once leaves nothing behind


def test_bos_comes_first_when_asked(tmp_path):
    tokenizer = load(byte_level(), tmp_path / "t.json", info=TokenizerInfo(1, (2,), True, False))
    assert tokenizer.encode("hello", bos=True) == [1, *tokenizer.encode("hello")]
    assert tokenizer.add_bos


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path):
    library = byte_level()
    library.enable_truncation(2)
    library.enable_padding(length=50)
    assert (
        load(library, tmp_path / "t.json").decode(load(library, tmp_path / "t.json").encode("the world!"))
        == "the world!"
    )


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[]", b'{"model": {"type": "Nope"}}'])
def test_a_file_that_is_no_tokenizer_is_a_bundle_error(tmp_path, content):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(BundleError, match="not a tokenizer"):
        Tokenizer(tmp_path / "t.json", INFO, vocab_size=10)
    with pytest.raises(BundleError, match="not a tokenizer"):
        Tokenizer(tmp_path / "absent.json", INFO, vocab_size=10)


def test_ids_that_the_model_does_not_have_are_refused(tmp_path):
    tokenizer = load(byte_level(), tmp_path / "t.json", vocab_size=100)
    with pytest.raises(BundleError, match="outside the model's vocabulary of 100"):
        tokenizer.encode("ÿ hello")
    with pytest.raises(OptionError, match="use 0 to 99"):
        tokenizer.decode([100])
    for info in (TokenizerInfo(100), TokenizerInfo(None, (1, 100))):
        with pytest.raises(BundleError, match="token id 100"):
            load(byte_level(), tmp_path / "t.json", vocab_size=100, info=info)


def test_a_damaged_decoder_is_a_bundle_error_or_falls_back(tmp_path):
    byte_level().save(str(tmp_path / "t.json"))
    data = json.loads((tmp_path / "t.json").read_text())
    data["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Fuse"}]}
    (tmp_path / "t.json").write_text(json.dumps(data))
    assert Tokenizer(tmp_path / "t.json", INFO, vocab_size=400).decode([70, 71])


def test_half_a_surrogate_pair_is_refused(tokenizers):
    with pytest.raises(OptionError, match="surrogate pair at character 1"):
        tokenizers["byte-level"].encode("a\ud83d")


def test_unknown_ids_below_the_vocabulary_size_have_no_text(tmp_path):
    tokenizer = load(byte_level(), tmp_path / "t.json", vocab_size=1000)  # a vocabulary padded for the hardware
    assert tokenizer.decode([999, *tokenizer.encode("hello"), 999]) == "hello"
