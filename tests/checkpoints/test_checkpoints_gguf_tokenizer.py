"""Tokenizers from GGUF metadata."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from edgellm.checkpoints.gguf_tokenizer import adds_bos, build_tokenizer
from edgellm.errors import CheckpointError

PATH = Path("m.gguf")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
LINES = [
    "", "hello world", "don't WE'LL", "a 1234567 b", "x=12.5;  y", "tab\t\n\n  end ", "naïve 中文 🙂 ½", "e\u0301",
    "<e>ab<u>",
]  # fmt: skip


def byte_level(pre: str | None = "gpt-2", **changes) -> dict:
    merges = ["h e", "l l", "he ll", "1 2", "12 3", "Ġ w", "a b"]
    tokens = [*BYTES, *(m.replace(" ", "") for m in merges), "<e>", "<u>", "123456"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*[1] * (len(tokens) - 3), 3, 4, 1],
        "tokenizer.ggml.merges": merges,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def sentencepiece(**changes) -> dict:
    pieces = ["▁", "a", "b", "▁a", "ab", "▁ab", "ba"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, "<u>"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4],
        "tokenizer.ggml.scores": [0.0] * 259 + [-9.0, -9.0, -9.0, -3.0, -1.0, -2.0, -4.0, 0.0],
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def build(metadata: dict) -> Tokenizer:
    text = build_tokenizer(metadata, PATH)
    assert text is not None
    return Tokenizer.from_str(text)


def cut(pre: str | None, text: str) -> list[str]:
    """The pieces that a pre-tokenizer makes, with GPT-2's visible space."""
    return [piece for piece, _ in build(byte_level(pre)).pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "it's 1234, ok", ["it", "'s", "Ġ1234", ",", "Ġok"]),
        ("smollm", "it's 1234, ok", ["it", "'s", "Ġ", "1", "2", "3", "4", ",", "Ġok"]),
        ("llama-bpe", "it'S 1234, ok", ["it", "'S", "Ġ", "123", "4", ",", "Ġok"]),
        ("qwen2", "it'S 12, ok", ["it", "'S", "Ġ", "1", "2", ",", "Ġok"]),
        ("default", "a1234 (b)", ["a", "123", "4", "Ġ", "(", "b", ")"]),
        (None, "a1234 (b)", ["a", "123", "4", "Ġ", "(", "b", ")"]),
    ],
)
def test_pre_tokenizers(pre, text, expected):
    assert cut(pre, text) == expected


def test_smollm_and_gpt2_cut_as_the_tokenizers_they_are_named_after():
    digits = pre_tokenizers.Digits(individual_digits=True)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    named = {"smollm": pre_tokenizers.Sequence([digits, plain]), "gpt-2": plain}
    for pre, reference in named.items():
        for line in LINES:
            assert cut(pre, line) == [piece for piece, _ in reference.pre_tokenize_str(line)]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "default"])
def test_byte_level_decodes_to_what_was_encoded(pre):
    tokenizer = build(byte_level(pre))
    for line in LINES:
        assert tokenizer.decode(tokenizer.encode(line).ids, skip_special_tokens=False) == line


def test_qwen2_composes_characters_first():
    assert build(byte_level("qwen2")).encode("e\u0301").ids == build(byte_level("qwen2")).encode("é").ids


def test_llama_bpe_takes_whole_tokens_before_merging():
    assert build(byte_level("llama-bpe")).encode("12").tokens == ["12"]
    assert build(byte_level("llama-bpe", merges=["1 2"])).encode("he").tokens == ["he"]
    assert build(byte_level("gpt-2", merges=["1 2"])).encode("he").tokens == ["h", "e"]


def test_control_tokens_are_special_and_user_defined_ones_are_not():
    tokenizer = build(byte_level())
    encoded = tokenizer.encode("ab<e>ab<u>")
    assert encoded.tokens == ["ab", "<e>", "ab", "<u>"]
    assert tokenizer.decode(encoded.ids) == "abab<u>"
    assert tokenizer.get_vocab_size() == len(byte_level()["tokenizer.ggml.tokens"])


def test_sentencepiece_joins_by_score():
    tokenizer = build(sentencepiece())
    assert tokenizer.encode("ab a").tokens == ["▁ab", "▁a"]
    assert tokenizer.encode("bab").tokens == ["▁", "b", "ab"]  # "ab" scores better than "ba"
    assert tokenizer.decode(tokenizer.encode("ab a").ids) == "ab a"


def test_sentencepiece_falls_back_to_bytes():
    tokenizer = build(sentencepiece())
    assert tokenizer.encode("é").tokens == ["▁", "<0xC3>", "<0xA9>"]
    for line in LINES:
        assert tokenizer.decode(tokenizer.encode(line).ids, skip_special_tokens=False) == line


def test_sentencepiece_prefix_can_be_switched_off():
    tokenizer = build(sentencepiece(add_space_prefix=False))
    assert tokenizer.encode("ab").tokens == ["ab"]
    assert tokenizer.decode(tokenizer.encode(" ab").ids) == " ab"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (byte_level("gpt-2"), False),
        (byte_level("llama-bpe"), True),
        (byte_level("llama-bpe", add_bos_token=False), False),
        (byte_level("gpt-2", add_bos_token=True), True),
        (sentencepiece(), True),
        (sentencepiece(add_bos_token=False), False),
        ({}, False),
    ],
)
def test_add_bos(metadata, expected):
    assert adds_bos(metadata) is expected


def test_no_tokenizer_is_none():
    assert build_tokenizer({}, PATH) is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_level("tekken"), "unknown pre-tokenizer 'tekken'; edgellm knows default, gpt-2"),
        (byte_level(model="bert"), "unknown tokenizer 'bert'; edgellm reads gpt2, llama"),
        (byte_level(tokens=None), "tokens are missing"),
        (byte_level(tokens=["a", "a"], token_type=[1, 1]), "repeated"),
        (byte_level(token_type=[1]), "without their types"),
        (byte_level(merges=["h e l"]), "does not hold together"),
        (byte_level(merges=["h q"]), "does not hold together"),
        (sentencepiece(scores=[0.0]), "have 1 scores"),
        (sentencepiece(scores=None), "have 0 scores"),
    ],
)
def test_bad_tables_are_refused(metadata, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        build_tokenizer(metadata, PATH)
    assert str(caught.value).startswith("m.gguf: ")
