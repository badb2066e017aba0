"""Marian's files: Bergamot folders, and pairs of sentencepiece models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from marian_files import COMMONEST, LISTED, OTHERS, SENTENCES, SETTINGS, bergamot, pieces, write_folder
from source_models import ragged
from tokenizers import Tokenizer

from edgellm.checkpoints import load_checkpoint, open_checkpoint
from edgellm.checkpoints.unigram_tokenizer import pair_tokenizer, unigram_tokenizer
from edgellm.errors import CheckpointError
from edgellm.models.protocol import Step, empty_state
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import load

ODD = [
    "  two   spaces ",
    "",
    "日本 Mary",
    "ﬁne ½ \N{FULLWIDTH LATIN CAPITAL LETTER A}",
    "a\tb\nc",
    "▁sign",
    "Mary's boat… (really?)",
    "emoji 😀 here",
    "...!",
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"eos_id": 0, "unk_id": 1, "bos_id": -1, "pad_id": -1, "character_coverage": 1.0}
    return pieces(tmp_path_factory.mktemp("v"), "vocab", [*SENTENCES, *OTHERS], 101, **options)


@pytest.mark.parametrize("coded", [False, True])
@torch.inference_mode()
def test_a_bergamot_folder_gives_the_model_that_was_written(coded: bool, vocabulary: Path, tmp_path: Path) -> None:
    model: Any = bergamot(listed=LISTED)
    folder = write_folder(tmp_path / "m", model, coded=coded)
    (folder / "vocab.spm").write_bytes(vocabulary.read_bytes())
    found = load_checkpoint(folder)
    assert found.architecture == "bergamot" and found.add_eos and found.eos_token_ids == (0,)
    assert found.model.config == model.config
    source, lengths = ragged()
    rows = torch.randint(0, 101, (3, 9), generator=torch.Generator().manual_seed(1))
    theirs = model(rows, model.encode(source, lengths))[0]
    ours = found.model(rows, found.model.encode(source, lengths))[0]
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_codes_of_eight_bits_are_kept_as_they_are(vocabulary: Path, tmp_path: Path) -> None:
    model: Any = bergamot(listed=LISTED)
    folder = write_folder(tmp_path / "m", model, coded=True)
    (folder / "vocab.spm").write_bytes(vocabulary.read_bytes())
    found = open_checkpoint(folder)
    weights: Any = found.weights
    coded = {name for name, p in found.model.named_parameters() if weights.code_format(name) is not None}
    assert coded == {name for name, p in model.named_parameters() if p.dim() == 2}  # the table, which two read, too
    for name in coded:
        stored = weights.codes(name)
        assert stored.format == weights.code_format(name)
        assert np.abs(stored.dequantize() - weights.read(name).numpy()).max() < 1e-6
        assert (stored.scales == stored.scales[0, 0]).all()
    made = export(
        found.model, tmp_path / "b", weights=weights, options=ExportOptions(quantize="keep", bounds={"top1": 0.0})
    )  # fmt: skip
    assert made.bundle.manifest.quantization["kept"] == len(coded)


def shorter(data: bytes) -> bytes:
    return data[:-300]


def test_damaged_and_foreign_files_are_refused_by_name(vocabulary: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", bergamot(listed=LISTED))
    with pytest.raises(CheckpointError, match=r"names 'vocab\.spm', which is no file beside it"):
        load_checkpoint(folder)
    (folder / "vocab.spm").write_bytes(vocabulary.read_bytes())
    good = {name: (folder / name).read_bytes() for name in ("model.bin", "lex.bin")}
    count = int(np.frombuffer(good["model.bin"], "<u8", 2)[1])
    assert count > 40
    for name, change, words in (
        ("model.bin", shorter, r"model\.bin is no whole file of Marian's"),
        ("model.bin", lambda d: b"\x02" + d[1:], "version 2"),
        ("model.bin", lambda d: d.replace(b"decoder_l1_rnn_Wf", b"decoder_l1_rnn_Wg"), "rnn_Wf .*missing.*rnn_Wg"),
        ("lex.bin", shorter, r"lex\.bin is no shortlist"), ("lex.bin", lambda d: d[:-4] + b"\xff" * 4, "outside it"),
    ):  # fmt: skip
        (folder / name).write_bytes(change(good[name]))
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(folder)
        (folder / name).write_bytes(good[name])
    head = np.frombuffer(good["lex.bin"], "<u8", 6).copy()
    vocab = int(head[4]) - 1
    head[5] = many = 5000  # words for the first token alone, and as many columns for each other
    starts = np.array([0] + [many] * vocab, "<u8")
    (folder / "lex.bin").write_bytes(head.tobytes() + starts.tobytes() + np.zeros(many, "<u4").tobytes())
    with pytest.raises(CheckpointError, match="lists 5000 words for one token; at most 1024"):
        load_checkpoint(folder)
    (folder / "lex.bin").write_bytes(good["lex.bin"])
    for key, value in (("dec-cell", "gru"), ("transformer-postprocess", "da"), ("transformer-ffn-activation", "swish")):
        write_folder(folder, bergamot(listed=LISTED), settings=SETTINGS | {key: value})
        with pytest.raises(CheckpointError, match=f"{key} is '{value}'|unknown architecture 'gru'"):
            load_checkpoint(folder)


@torch.inference_mode()
def test_answers_are_of_listed_words_in_steps_as_at_once_whatever_the_padding() -> None:
    model: Any = bergamot(listed=LISTED).double()
    source, lengths = ragged(longest=20)
    tokens = torch.randint(0, 101, (3, 11), generator=torch.Generator().manual_seed(2))
    whole = model(tokens, model.encode(source, lengths))[0]
    state = {
        **empty_state(model, 3, 11),
        **model.encode(source.masked_fill(torch.arange(20) >= lengths[:, None], 7), lengths),
    }
    past = torch.zeros(3, dtype=torch.int32)
    for at in range(11):
        one = tokens[:, at : at + 1]
        logits, present = model(one, state, Step.whole(one)._replace(past_lengths=past))
        assert (logits[:, 0] - whole[:, at]).abs().max() < 1e-12 * whole.abs().max()
        state, past = state | present, past + 1
    for row, length in enumerate(lengths.tolist()):
        allowed = {*range(COMMONEST), *model.words[source[row, :length]].flatten().int().tolist()}
        listed = (whole[row] > whole[row].amax(-1, keepdim=True) - 50).nonzero()[:, 1].unique().tolist()
        more = sorted(set(listed) - allowed)
        assert len(listed) % 8 == 0 and more == [i for i in range(101) if i not in allowed][: len(more)]


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_bergamot_bundle_answers_a_ragged_batch_as_pytorch(quantize: str, tmp_path: Path) -> None:
    model: Any = bergamot(listed=LISTED)
    options = ExportOptions(quantize=quantize, bounds={} if quantize == "none" else {"top1": 0.0})
    made = export(model, tmp_path / "b", options=options)
    assert made.verification.ok
    if quantize != "none":
        return
    source, lengths = ragged(longest=20)
    sources = [row[:length].tolist() for row, length in zip(source, lengths, strict=True)]
    answers = load(tmp_path / "b", threads=1).generate(sources, max_new_tokens=8, ignore_eos=True)
    with torch.inference_mode():
        rows = torch.zeros(3, 1, dtype=torch.int64)
        for _ in range(8):
            said = model(rows, model.encode(source, lengths))[0][:, -1].argmax(-1, keepdim=True)
            rows = torch.cat([rows, said], 1)
    assert [list(answer.tokens) for answer in answers] == rows[:, 1:].tolist()


def test_one_vocabulary_encodes_and_decodes_as_sentencepiece(vocabulary: Path) -> None:
    theirs, ours = (
        sentencepiece.SentencePieceProcessor(str(vocabulary)),
        Tokenizer.from_str(unigram_tokenizer(vocabulary)),
    )
    for text in [*SENTENCES, *OTHERS, *ODD]:
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False).ids == ids, text
        if 1 not in ids:
            assert ours.decode(ids) == theirs.decode(ids), text


def test_a_pair_of_models_encodes_and_decodes_as_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path
    models = [
        sentencepiece.SentencePieceProcessor(str(pieces(folder, name, texts, size, character_coverage=1.0)))
        for name, texts, size in (("source", SENTENCES, 90), ("target", OTHERS, 80))
    ]
    numbers = {"</s>": 0, "<unk>": 1}
    for model in models:
        for i in range(3, model.vocab_size()):
            numbers.setdefault(model.id_to_piece(i), len(numbers))
    numbers |= {">>spa<<": len(numbers), "<pad>": len(numbers) + 1}
    (folder / "vocab.json").write_text(json.dumps(numbers))
    settings = {"source_lang": "en", "target_lang": "es", "tokenizer_class": "MarianTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="sacremoses"):
        theirs = transformers.MarianTokenizer.from_pretrained(str(folder))
    text, notes = pair_tokenizer(folder, settings)
    ours = Tokenizer.from_str(text)
    assert "source.spm" in notes[0] and len(notes) == 1
    for sentence in [*SENTENCES, *ODD, ">>spa<< Mary saw the dog.", "Nobody saw ñ."]:
        assert ours.encode(sentence).ids == theirs(sentence)["input_ids"], sentence
    for sentence in OTHERS:
        ids = [numbers[piece] for piece in models[1].encode(sentence, out_type=str)]
        assert ours.decode(ids) == theirs.decode(ids) == sentence
    numbers["Q"] = len(numbers) + 5
    (folder / "vocab.json").write_text(json.dumps(numbers))
    with pytest.raises(CheckpointError, match="does not number its tokens from 0"):
        pair_tokenizer(folder, settings)
