"""From text to tokens: nothing is lost, the split is as stated, and errors name their place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from training_models import TEXT

from edgellm.errors import ConfigError, TrainingError
from edgellm.models.hybrid import HybridConfig
from edgellm.training import END_OF_TEXT, Corpus, TokenData, parse_settings, prepare_tokens, train_tokenizer
from edgellm.training.corpus import PIECE_BYTES
from edgellm.training.evaluation import unigram_entropy
from edgellm.training.windows import even_offsets, random_offsets, step_seed

TOKENIZER = train_tokenizer([TEXT, "más allá, 世界"], 320)


def write(path: Path, *documents: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def decode(tokens: np.ndarray, tokenizer: Tokenizer = TOKENIZER) -> str:
    text: str = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    return text


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_from_the_tokenizer(text: str) -> None:
    for kept in (text, f"{text}{END_OF_TEXT}{text}"):
        ids = TOKENIZER.encode(kept, add_special_tokens=False).ids
        assert TOKENIZER.decode(ids, skip_special_tokens=False) == kept


def test_same_text_gives_the_same_tokenizer() -> None:
    again = train_tokenizer([TEXT, "más allá, 世界"], 320)
    assert again.to_str() == TOKENIZER.to_str()
    assert TOKENIZER.get_vocab_size() == 320
    assert TOKENIZER.token_to_id(END_OF_TEXT) == 0


def test_vocabulary_that_cannot_hold_every_byte_is_an_error() -> None:
    with pytest.raises(TrainingError, match="at least 257"):
        train_tokenizer([TEXT], 256)


def test_tokenizer_of_no_text_is_an_error() -> None:
    with pytest.raises(TrainingError, match="is empty"):
        train_tokenizer([], 300)


def test_tail_of_plain_text_is_held_out_and_nothing_is_lost(tmp_path: Path) -> None:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    texts = ["ä line\r\n" * 3000, TEXT * 20]  # more than one piece
    assert len(texts[1]) > 2 * PIECE_BYTES
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode())
    tokens = prepare_tokens(Corpus(files=paths, validation_fraction=0.2), TOKENIZER, tmp_path / "data")
    train, held = decode(tokens.train), decode(tokens.validation)
    assert train + held == END_OF_TEXT.join([*texts, ""])
    assert len(held) / len(train + held) == pytest.approx(0.2, abs=0.01)
    assert held.count(END_OF_TEXT) == 1
    assert train.endswith("\n")  # cut at a line's end
    assert tokens.train.dtype == np.uint16


def test_text_without_line_ends_is_split_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("世界" * 40000, encoding="utf-8")
    tokens = prepare_tokens(Corpus(files=[path]), TOKENIZER, tmp_path / "data")
    assert decode(tokens.train) + decode(tokens.validation) == "世界" * 40000 + END_OF_TEXT


def test_every_nth_document_of_jsonl_is_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *(f"document {i}\n" for i in range(1, 12)), "")
    corpus = Corpus(files=[path], validation_fraction=0.2)
    tokens = prepare_tokens(corpus, TOKENIZER, tmp_path / "data")
    assert decode(tokens.validation) == "".join(f"document {i}\n{END_OF_TEXT}" for i in (5, 10))
    assert decode(tokens.train).count(END_OF_TEXT) == 9
    assert tokens.split == corpus.split == "every 5th document"


def test_validation_files_are_all_that_is_held_out(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", "one", "two"), write(tmp_path / "b.jsonl", "three")
    tokens = prepare_tokens(Corpus(files=[first], validation_files=[second]), TOKENIZER, tmp_path / "data")
    assert decode(tokens.train) == f"one{END_OF_TEXT}two{END_OF_TEXT}"
    assert decode(tokens.validation) == f"three{END_OF_TEXT}"


def test_tokens_are_reused_until_something_changes(tmp_path: Path) -> None:
    path, directory = write(tmp_path / "a.jsonl", *["some text"] * 20), tmp_path / "data"
    corpus = Corpus(files=[path])
    first = prepare_tokens(corpus, TOKENIZER, directory)
    written = (directory / "train.bin").stat().st_ino
    assert prepare_tokens(corpus, TOKENIZER, directory).fingerprint == first.fingerprint
    assert (directory / "train.bin").stat().st_ino == written
    (directory / "train.bin").write_bytes(b"cut")  # damaged: made again
    assert prepare_tokens(corpus, TOKENIZER, directory).fingerprint == first.fingerprint
    write(path, *["other text"] * 20)
    assert prepare_tokens(corpus, TOKENIZER, directory).fingerprint != first.fingerprint
    prepare_tokens(corpus, train_tokenizer([TEXT], 300), directory)
    assert json.loads((directory / "data.json").read_text())["vocab_size"] == 300
    assert sorted(p.name for p in directory.iterdir()) == ["data.json", "train.bin", "validation.bin"]


def test_byte_order_marks_are_not_text(tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_bytes(b"\xef\xbb\xbfplain")
    lines.write_bytes(b'\xef\xbb\xbf{"text": "lines"}\n')
    assert [p.text for path in (plain, lines) for p in Corpus(files=[path]).pieces()] == ["plain", "lines"]


@pytest.mark.parametrize(
    "line", ['{"text": 3}', "[1]", '{"title": "x"}', '{"text": "x"', "nonsense", "[" * 100000, '{"text": "\\ud800"}']
)
def test_malformed_line_is_an_error_with_file_and_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(TrainingError, match=r"a\.jsonl:3: "):
        list(Corpus(files=[path]).pieces())


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bytes_that_are_not_utf8_are_an_error_with_their_place(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(TrainingError, match=rf"{name}.*not UTF-8"):
        list(Corpus(files=[path]).pieces())


def test_missing_file_folder_and_nothing_are_errors(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"nowhere\.txt: does not exist"):
        Corpus(files=[tmp_path / "nowhere.txt"])
    with pytest.raises(TrainingError, match="is a folder"):
        Corpus(files=[tmp_path])
    with pytest.raises(TrainingError, match="no text was given"):
        Corpus(files=[])
    with pytest.raises(TrainingError, match=r"validation_fraction is 0\.9"):
        Corpus(files=[tmp_path], validation_fraction=0.9)


def test_empty_and_short_text_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("")
    with pytest.raises(TrainingError, match="the train text is empty"):
        prepare_tokens(Corpus(files=[path]), TOKENIZER, tmp_path / "data").check(8)
    path.write_text("a few words\n" * 10)
    with pytest.raises(TrainingError, match=r"validation text is too short: \d+ tokens for a context of 64"):
        prepare_tokens(Corpus(files=[path]), TOKENIZER, tmp_path / "data").check(64)


def test_unigram_entropy_is_that_of_smoothed_frequencies() -> None:
    data = TokenData(np.array([0, 0, 1], np.uint16), np.array([0, 1, 2, 2], np.uint16), 4)
    expected = -(np.log(3 / 7) + np.log(2 / 7) + 2 * np.log(1 / 7)) / 4
    assert unigram_entropy(data) == pytest.approx(expected)


def test_offsets_are_a_function_of_seed_and_step_and_stay_inside() -> None:
    assert (random_offsets(9, 100, 8, seed=3, step=4) == random_offsets(9, 100, 8, seed=3, step=4)).all()
    assert (random_offsets(9, 100, 8, seed=3, step=4) != random_offsets(9, 100, 8, seed=3, step=5)).any()
    many = random_offsets(5000, 100, 8, seed=0, step=0)
    assert (many.min(), many.max()) == (0, 91)  # the last window takes tokens 91 to 99
    assert random_offsets(5, 9, 8, seed=0, step=0).tolist() == [0] * 5
    assert len({step_seed(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)}) == 27


def test_validation_windows_do_not_overlap() -> None:
    assert even_offsets(100, 33, 8).tolist() == [0, 8, 16, 24]
    assert even_offsets(2, 33, 8).tolist() == [0, 16]


def test_settings_take_the_types_of_the_fields() -> None:
    given = ["width=64", "pattern=gru, attention", "dropout=0.5", "rotary=false"]
    values = parse_settings(HybridConfig, given)
    assert values == {"width": 64, "pattern": ("gru", "attention"), "dropout": 0.5, "rotary": False}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("width", "no '='"),
        ("depth=3", "no setting 'depth'; it has vocab_size"),
        ("width=wide", "width is 'wide'; it must be an int"),
        ("rotary=1", "rotary is '1'; it must be true or false"),
    ],
)
def test_setting_that_does_not_fit_is_an_error(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_settings(HybridConfig, [setting])
