"""Marian's own checkpoints, .npz: the model and the tokens that transformers' conversion of the same weights has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from marian_files import OTHERS, SENTENCES, pieces
from source_models import ragged
from tokenizers import Tokenizer

from edgellm.checkpoints import load_checkpoint
from edgellm.checkpoints.marian_npz import read_vocabulary
from edgellm.checkpoints.sentencepiece_model import read_sentencepiece
from edgellm.errors import CheckpointError
from edgellm_exporters.export import ExportOptions, TextAssets, export
from edgellm_runtime import load

WIDTH, HEADS, HIDDEN, LAYERS = 48, 4, 64, 2
SETTINGS = {
    "type": "transformer", "transformer-decoder-autoreg": "self-attention", "dec-cell": "gru", "dim-emb": WIDTH,
    "enc-depth": LAYERS, "dec-depth": LAYERS, "transformer-heads": HEADS, "transformer-dim-ffn": HIDDEN,
    "transformer-ffn-activation": "swish", "tied-embeddings-all": "true", "transformer-preprocess": '""',
    "transformer-postprocess": "dan", "transformer-postprocess-emb": "d", "layer-normalization": "false",
}  # fmt: skip
NAMES = {  # transformers' in a layer, and Marian's
    "self_attn": "self", "encoder_attn": "context", "q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o",
    "fc1": "1", "fc2": "2",
}  # fmt: skip
NORMS = {"self_attn_layer_norm": "self_Wo", "encoder_attn_layer_norm": "context_Wo", "final_layer_norm": "ffn_ffn"}


def theirs(tokens: int) -> Any:
    """A model of transformers as its conversion makes it: padding behind the vocabulary, of no embedding."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MarianConfig(
        vocab_size=tokens + 1, decoder_vocab_size=tokens + 1, d_model=WIDTH, encoder_layers=LAYERS,
        decoder_layers=LAYERS, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=HIDDEN,
        decoder_ffn_dim=HIDDEN, activation_function="swish", pad_token_id=tokens, eos_token_id=0, scale_embedding=True,
        max_position_embeddings=512, decoder_start_token_id=tokens, forced_eos_token_id=None,
    )  # fmt: skip
    model = transformers.MarianMTModel(config).eval()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:
                drawn = torch.randn(parameter.shape, generator=noise)
                parameter.copy_(0.15 * drawn if parameter.dim() > 1 else parameter + 0.1 * drawn)
        model.final_logits_bias.normal_(std=0.3, generator=noise)
        model.model.shared.weight[-1] = 0
        model.final_logits_bias[0, -1] = 0
    return model


def arrays_of(model: Any, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The file's arrays: the inverse of the conversion."""
    found = {"Wemb": model.model.shared.weight[:-1], "decoder_ff_logit_out_b": model.final_logits_bias[:, :-1]}
    for side in ("encoder", "decoder"):
        for number, layer in enumerate(getattr(model.model, side).layers):
            for name, parameter in layer.named_parameters():
                *parts, kind = name.split(".")
                if parts[-1] in NORMS:
                    stored = f"{NORMS[parts[-1]]}_ln_{'scale' if kind == 'weight' else 'bias'}"
                else:
                    group = NAMES[parts[0]] if len(parts) > 1 else "ffn"
                    stored = f"{group}_{'W' if kind == 'weight' else 'b'}{NAMES[parts[-1]]}"
                found[f"{side}_l{number + 1}_{stored}"] = parameter.T if parameter.dim() > 1 else parameter[None]
    text = "".join(f"{key}: {value}\n" for key, value in settings.items()) + "dim-vocabs:\n  - 9\n  - 9\n"
    plain = {name: tensor.detach().numpy().copy() for name, tensor in found.items()}
    return plain | {"special:model.yml": np.frombuffer(text.encode() + b"\0", np.int8)}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    options = {"eos_id": -1, "bos_id": -1, "pad_id": -1, "unk_id": 0, "character_coverage": 1.0}
    found = {"</s>": 0, "<unk>": 1}
    for name, said in (("source", SENTENCES), ("target", OTHERS)):
        for piece in read_sentencepiece(pieces(folder, name, said, 80, **options)).pieces:
            found.setdefault(piece, len(found))
    lines = [f"{json.dumps(token, ensure_ascii=False)}: {number}\n" for token, number in found.items()]
    (folder / "opus.vocab.yml").write_text("".join(lines), encoding="utf-8")
    (folder / "decoder.yml").write_text(
        "relative-paths: true\nmodels:\n  - opus.npz\nvocabs:\n  - opus.vocab.yml\n  - opus.vocab.yml\nbeam-size: 6\n"
    )
    return folder


def folder_of(texts: Path, to: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    to.mkdir()
    for file in texts.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    np.savez(to / "opus.npz", **arrays)  # type: ignore[arg-type]
    return to


@torch.inference_mode()
def test_logits_and_tokens_are_those_of_transformers_conversion(texts: Path, tmp_path: Path) -> None:
    tokens = len(read_vocabulary(texts / "opus.vocab.yml"))
    model = theirs(tokens)
    found = load_checkpoint(folder_of(texts, tmp_path / "m", arrays_of(model, SETTINGS)))
    assert found.architecture == "bart" and found.eos_token_ids == (0,) and found.add_eos
    assert found.model.config.start_tokens == (tokens,)
    source, lengths = ragged()
    source, there = source % tokens, torch.arange(source.shape[1]) < lengths[:, None]
    rows = torch.cat(
        [torch.full((3, 1), tokens), torch.randint(2, tokens, (3, 7), generator=torch.Generator().manual_seed(2))], 1
    )
    expected = model(input_ids=source, attention_mask=there.long(), decoder_input_ids=rows).logits
    ours = found.model(rows, found.model.encode(source, lengths))[0]
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    assert found.tokenizer_json is not None
    tokenizer = Tokenizer.from_str(found.tokenizer_json)
    numbers = read_vocabulary(texts / "opus.vocab.yml")
    assert tokenizer.get_vocab_size() == tokens + 1
    ids = tokenizer.encode(SENTENCES[0], add_special_tokens=False).ids
    assert ids and all(numbers.get(tokenizer.id_to_token(i)) == i for i in ids)
    said = TextAssets(tokenizer_json=found.tokenizer_json, eos_token_ids=found.eos_token_ids, add_eos=True)
    export(found.model, tmp_path / "b", options=ExportOptions(generation=found.generation), text=said)
    bundle = load(tmp_path / "b", threads=1)
    answer = bundle.generate(SENTENCES[0], max_new_tokens=12, ignore_eos=True)
    assert answer.prompt_tokens == len(ids) + 1 and tokens not in answer.tokens


def test_what_is_no_such_file_or_another_model_is_refused_by_name(texts: Path, tmp_path: Path) -> None:
    arrays = arrays_of(theirs(len(read_vocabulary(texts / "opus.vocab.yml"))), SETTINGS)
    table = arrays["Wemb"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({**arrays, "Wemb": table[:-1]}, "embeddings and its vocabulary"),
        ({**arrays, "Wpos": table}, "tensors Wpos have no place"),
        ({k: v for k, v in arrays.items() if k != "encoder_l2_ffn_W1"}, "encoder_l2_ffn_W1"),
        ({**arrays, "a": np.array([None], dtype=object)}, "holds object"),
    ]
    for settings, words in (
        ({"layer-normalization": "true"}, "layer-normalization is 'true'"),
        ({"transformer-ffn-activation": "sine"}, "transformer-ffn-activation is 'sine'"),
        ({"transformer-decoder-autoreg": "average-attention"}, "unknown architecture 'average-attention'"),
    ):
        changed = arrays_of(theirs(len(table)), {**SETTINGS, **settings})
        cases.append((changed, words))
    for number, (given, words) in enumerate(cases):
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(folder_of(texts, tmp_path / str(number), given))
    packed = folder_of(texts, tmp_path / "packed", {})
    np.savez_compressed(packed / "opus.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="is compressed"):
        load_checkpoint(packed)
    (packed / "opus.npz").write_bytes(b"PK\x03\x04" + bytes(90))
    with pytest.raises(CheckpointError, match="no whole file of Marian's"):
        load_checkpoint(packed)


def test_a_vocabulary_is_read_as_yaml_writes_tokens(tmp_path: Path) -> None:
    path = tmp_path / "v.yml"
    path.write_text('"</s>": 0\n\'it\'\'s\': 1\n"\\"": 2\n▁the: 3\n":": 4\n', encoding="utf-8")
    assert read_vocabulary(path) == {"</s>": 0, "it's": 1, '"': 2, "▁the": 3, ":": 4}
    for wrong in ("a: b\n", "a: 1\na: 2\n", "a\n", '"a: 1\n'):
        path.write_text(wrong, encoding="utf-8")
        with pytest.raises(CheckpointError, match="no vocabulary of Marian's"):
            read_vocabulary(path)
