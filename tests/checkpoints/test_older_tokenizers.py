"""Tokenizers of the time before tokenizer.json: built, they encode as their tools do; else the export says so."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_checkpoints_huggingface import CONFIG, edit, folder, write_json  # noqa: F401  a fixture
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from edgellm.checkpoints import load_checkpoint
from edgellm.checkpoints.huggingface_text import read_text_files
from edgellm.checkpoints.sentencepiece_model import read_sentencepiece
from edgellm.errors import CheckpointError

CORPUS = (Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt").read_text(encoding="utf-8")[:60_000]
TEXTS = [
    "Before we proceed any further, hear me speak.", "  two  spaces and\ttab\n\nlines ", "naïve café 東京 🙂",
    "don't I'LL 3,141", "", " ", "a", "e\u0301 \u00a0 1234567", "<s> is no token here",
]  # fmt: skip
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def sentencepiece_file(directory: Path, **options: object) -> None:
    library = pytest.importorskip("sentencepiece")
    usual = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
             "remove_extra_whitespaces": False}  # fmt: skip
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()), model_prefix=str(directory / "tokenizer"), vocab_size=600,
        minloglevel=2, **(usual | options),
    )  # fmt: skip
    (directory / "tokenizer.vocab").unlink()
    write_json(directory / "tokenizer_config.json", {**SPECIAL, "tokenizer_class": "LlamaTokenizer"})


def byte_pair_files(directory: Path, kind: str, special: str = "<|endoftext|>") -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[special], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    write_json(directory / "vocab.json", model["vocab"])
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": kind, "eos_token": special})


def theirs(directory: Path):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(directory)


def ours(directory: Path) -> Tokenizer:
    found = read_text_files(directory, CONFIG)
    assert found.tokenizer_json is not None
    return Tokenizer.from_str(found.tokenizer_json)


ANY = st.text(st.characters(exclude_categories=("Cs", "Co", "Cn")), max_size=30)


@pytest.mark.parametrize("kind", ["tokenizer.model", "GPT2Tokenizer", "Qwen2Tokenizer"])
def test_it_encodes_as_the_tool_that_it_was_made_with_and_decodes_back(folder: Path, kind: str) -> None:  # noqa: F811
    if kind == "tokenizer.model":
        sentencepiece_file(folder)
        library = pytest.importorskip("sentencepiece")
        reference = library.SentencePieceProcessor(str(folder / "tokenizer.model")).encode
    else:
        byte_pair_files(folder, kind)
        reference = partial(theirs(folder).encode, add_special_tokens=False)
    mine = ours(folder)
    mine.encode_special_tokens = True  # in a text, their names are the characters they are

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.one_of(st.sampled_from(TEXTS), ANY))
    def same(text: str) -> None:
        assert mine.encode(text, add_special_tokens=False).ids == reference(text), repr(text)

    same()
    for text in TEXTS[:4]:
        assert mine.decode(mine.encode(text, add_special_tokens=False).ids) == text
    (note,) = load_checkpoint(folder).notes
    assert note.startswith("the tokenizer was built from ")


def test_text_that_begins_with_no_space_is_encoded_as_transformers_does(folder: Path) -> None:  # noqa: F811
    sentencepiece_file(folder)  # with one, transformers puts no space before it, and parts from sentencepiece
    mine, reference = ours(folder), theirs(folder)
    for text in TEXTS:
        if not text.startswith((" ", "<s>")):
            assert mine.encode(text, add_special_tokens=False).ids == reference.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("flag", [..., True, False])
def test_beside_a_built_tokenizer_the_flag_decides_the_begin_token(folder: Path, flag: object) -> None:  # noqa: F811
    sentencepiece_file(folder)
    edit(folder / "tokenizer_config.json", add_bos_token=flag)
    found = read_text_files(folder, CONFIG)
    begins = theirs(folder)("Hear me").input_ids[0] == 1
    assert (found.add_bos, found.bos_token_id) == (begins, 1)
    assert begins is (flag is True)


def test_added_tokens_have_their_own_ids(folder: Path) -> None:  # noqa: F811
    byte_pair_files(folder, "Qwen2Tokenizer")
    size = len(json.loads((folder / "vocab.json").read_text()))
    added = {str(size): {"content": "<|im_start|>", "special": True}, str(size + 1): {"content": "<tool>"}}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=added)
    text = "<|im_start|>user <tool>"
    assert ours(folder).encode(text).ids == theirs(folder).encode(text)
    assert {size, size + 1} < set(ours(folder).encode(text).ids)
    edit(folder / "tokenizer_config.json", added_tokens_decoder={str(size + 5): {"content": "<far>"}})
    with pytest.raises(CheckpointError, match="token '<far>' should be"):
        ours(folder)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "is no byte-pair encoding"),
        ({"normalization_rule_name": "nmt_nfkc"}, "rewrites characters or spaces"),
        ({"remove_extra_whitespaces": True}, "rewrites characters or spaces"),
    ],
)
def test_what_cannot_be_built_is_said_and_the_model_is_read(folder, options, reason) -> None:  # noqa: F811
    sentencepiece_file(folder, **options)
    loaded = load_checkpoint(folder)
    assert loaded.tokenizer_json is None
    (note,) = loaded.notes
    assert note.startswith(f"no tokenizer could be built, because tokenizer.model {reason}")


def test_an_unknown_splitting_is_said(folder: Path) -> None:  # noqa: F811
    byte_pair_files(folder, "RobertaTokenizer")
    (note,) = load_checkpoint(folder).notes
    assert "vocab.json and merges.txt do not say how text is split, and tokenizer_class is 'RobertaTokenizer'" in note


def test_a_damaged_sentencepiece_file_is_refused_whatever_the_damage(tmp_path: Path) -> None:
    sentencepiece_file(tmp_path)
    file = tmp_path / "tokenizer.model"
    good = file.read_bytes()
    assert len(read_sentencepiece(file).pieces) == 600
    for bad in (b"", b"\x08", b"PK\x03\x04" * 9, good[:-1], good[:5000], b"\xff" * 40, b"\x0a\x02\x08\x01", b"\x0b"):
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match="is no sentencepiece model"):
            read_sentencepiece(file)


@pytest.mark.parametrize("ids", [{"a": 0, "b": 2}, {"a": 0, "b": 0}, {"a": "0"}, {"a": True}])
def test_a_vocabulary_that_is_not_numbered_is_refused(folder: Path, ids: dict) -> None:  # noqa: F811
    byte_pair_files(folder, "GPT2Tokenizer")
    write_json(folder / "vocab.json", ids)
    with pytest.raises(CheckpointError, match="does not number its tokens"):
        load_checkpoint(folder)
