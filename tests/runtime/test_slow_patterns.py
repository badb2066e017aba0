"""A tokenizer's regular expressions: what real models use is read, what may try a text for hours is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundles import attention_bundle, copied, sign
from tokenizers import Regex, pre_tokenizers

from edgellm.checkpoints import gguf_tokenizer
from edgellm_runtime import BundleError, load
from edgellm_runtime.text.patterns import slow_part

REAL = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+",
    r"[\p{Han}]+|[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+(?i:'s|'t)?",
    r" ?[^(\s|[.,!?…。、।])]+", r"<\|startoftext\|>|<\|endoftext\|>|'s|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"\A +| +\z", " {2,}", r"\p{N}+", r"[一-龥ࠀ-一가-퟿]+", r"\s?\p{L}+", "[0-9][0-9][0-9]", r"\d+(?:[.,]\d+)*", "", ".",
    r"(?=(\d{3})+(?!\d))", r"[\r\n]", r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ]+", r"(?:abc)+", r"(?#a comment+)x", r"a{,3}b{2}{x}",
]  # fmt: skip
SLOW = [
    r"(a+)+$", r"(a*)*b", r"(a|a)*b", r"(a|ab)*c", r"(a?){1000}b", r"(?:\w+\s?)*$", r"([a-z]+)*\d", r"(.*a){20}",
    r"(a+){2,}", r"(?:(?:a+)b?)+c", r"a*a*b", r"\s*\s*\s*x", r"\w+\d+!", r".*b.*c", r"(a)\1+b", r"(?<n>a|b\g<n>c)+",
    r"a+++b" , r"(?=(a+)+b)a", r"^(\w+)*@", r"(?~a+)b",
]  # fmt: skip


@pytest.mark.parametrize("pattern", REAL)
def test_what_real_tokenizers_do_is_read(pattern: str) -> None:
    assert slow_part(pattern) == ""


def test_what_gguf_files_name_is_read() -> None:
    patterns = {pattern for splitting in gguf_tokenizer.SPLITTINGS.values() for pattern in splitting.patterns}
    assert len(patterns) > 3
    assert [pattern for pattern in patterns if slow_part(pattern)] == []


@pytest.mark.parametrize("pattern", SLOW)
def test_what_tries_a_text_again_and_again_is_not(pattern: str) -> None:
    assert slow_part(pattern) != ""


@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer", "decoder"])
def test_a_tokenizer_that_could_keep_a_text_busy_is_refused_with_its_expression(part: str, tmp_path: Path) -> None:
    pattern = {"Regex": "(a+)+$"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    replace = {"type": "Replace", "pattern": pattern, "content": "b"}
    bundle = copied(attention_bundle(), tmp_path)
    tokenizer = json.loads((bundle / "tokenizer.json").read_text())
    tokenizer[part] = split if part == "pre_tokenizer" else replace
    (bundle / "tokenizer.json").write_text(json.dumps(tokenizer))
    sign(bundle, "tokenizer.json")
    with pytest.raises(BundleError, match=r"busy for hours: \(a\+\)\+ repeats"):
        assert load(bundle, threads=1).tokenizer


@given(st.text(alphabet="ab+*?|(){1,}[]\\^$p.:!=<>&-#", max_size=24))
@settings(max_examples=200, deadline=None)
def test_any_expression_has_an_answer(pattern: str) -> None:
    assert isinstance(slow_part(pattern), str)


@pytest.mark.parametrize("pattern", REAL)
def test_no_match_of_what_is_read_is_given_up(pattern: str) -> None:
    """As the library does after ten million tries, with a panic."""
    for text in ("a" * 3000 + "!", " " * 3000 + "a", "漢" * 3000, "a1" * 1500, "\n " * 1500):
        pieces = pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)
        assert "".join(piece for piece, _ in pieces) == text
