"""What a checkpoint's makers ask for is what its bundle does, unless somebody says otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from generation_fakes import byte_level
from tiny_files import copied, edit_manifest

from edgellm.checkpoints import load_checkpoint, open_checkpoint, save_checkpoint
from edgellm.checkpoints.generation_defaults import gguf_defaults, huggingface_defaults
from edgellm.cli.export import export_checkpoint
from edgellm.errors import CheckpointError
from edgellm_exporters.errors import ExportError
from edgellm_runtime import BundleError, load
from edgellm_runtime.generation.options import GenerationOptions, with_defaults
from edgellm_runtime.option_ranges import RANGES

PROMPT = [5, 6, 7, 5, 6]
ASKED = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "suppress_tokens": [9, 40], "min_new_tokens": 9,
         "max_new_tokens": 14, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 8, "pad_token_id": 0}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Llama with an opinion of its own, and a tokenizer."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("asked") / "llama"
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.4, bos_token_id=None, eos_token_id=8,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps(ASKED))
    byte_level().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def bundle(folder) -> Path:
    destination = folder.parent / "bundle"
    export_checkpoint(folder, destination, target="cpu", quantize="none", tell=lambda *_: None)
    return destination


def test_a_bundle_says_what_transformers_says_with_the_same_generation_config(folder, bundle):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = theirs.generate(torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long))
    model = load(bundle)
    found = model.generate(PROMPT)
    assert list(found.tokens) == expected[0, len(PROMPT) :].tolist() and len(found.tokens) == 14
    plain = model.generate(PROMPT, repetition_penalty=1.0, no_repeat_ngram=0, banned_tokens=(), min_tokens=0)
    assert plain.tokens != found.tokens
    assert len(model.generate(PROMPT, max_new_tokens=3).tokens) == 3  # fewer than the least that the makers ask for
    assert [chunk.token_ids for chunk in model.stream(PROMPT)] == [(token,) for token in found.tokens]


@pytest.mark.parametrize(
    "asked",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.6, "top_k": 20, "min_p": 0.1},
        {"do_sample": True, "top_k": None, "top_p": 0.5},
    ],
)
def test_sampling_has_the_values_that_transformers_would_use(folder, asked):
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    ))  # fmt: skip
    model.generation_config = transformers.GenerationConfig(**asked)
    theirs, _ = model._prepare_generation_config(None)
    found, notes = huggingface_defaults(asked, Path("generation_config.json"))
    ours = with_defaults(found, {})
    assert (ours.temperature, ours.top_k, ours.top_p, ours.min_p) == (
        theirs.temperature, theirs.top_k, theirs.top_p, theirs.min_p or 0
    )  # fmt: skip
    assert notes == ()


@pytest.mark.parametrize("asked", [{}, {"do_sample": False, "temperature": 0.6}, {"temperature": 0.6}])
def test_without_do_sample_the_most_probable_token_is_taken(asked):
    found, _ = huggingface_defaults(asked | {"top_k": 20}, Path("generation_config.json"))
    assert with_defaults(found, {}).temperature == 0
    assert with_defaults(found, {"temperature": 0.5}).top_k == 20  # as do_sample=True would have it


def test_what_no_option_does_is_told_and_what_is_no_value_refused(folder):
    path = Path("generation_config.json")
    _, (note,) = huggingface_defaults({"num_beams": 4, "typical_p": 0.9, "length_penalty": 1.0}, path)
    assert note.startswith("generation_config.json asks for num_beams 4, typical_p 0.9, which a bundle does not do")
    for wrong in ({"top_p": 7.0}, {"do_sample": True, "temperature": "hot"}, {"do_sample": "yes"}, {"top_k": -1},
                  {"suppress_tokens": [1.5]}, {"stop_strings": [""]}):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"generation_config\.json: "):
            huggingface_defaults(wrong, path)


def test_a_gguf_files_own_sampling_is_carried():
    metadata = {"general.sampling.temp": 0.7, "general.sampling.top_k": 20, "general.sampling.penalty_repeat": 1.1}
    found, (note,) = gguf_defaults(metadata, Path("a.gguf"))
    assert found == {"temperature": 0.7, "top_k": 20} and "penalty_repeat 1.1" in note
    assert gguf_defaults({"general.sampling.temp": -1.0}, Path("a.gguf")) == ({"temperature": 0.0}, ())
    assert gguf.Keys.General.SAMPLING_TEMP == "general.sampling.temp"


def test_a_checkpoint_of_edgellms_own_keeps_them(folder, tmp_path):
    read = load_checkpoint(folder)
    save_checkpoint(tmp_path / "own", read.model, architecture="decoder", tokenizer_json=read.tokenizer_json,
                    generation=read.generation)  # fmt: skip
    found = open_checkpoint(tmp_path / "own").generation
    assert with_defaults(found, {}) == with_defaults(read.generation, {}) and found["max_new_tokens"] == 14
    (tmp_path / "own" / "edgellm.json").write_text(
        (tmp_path / "own" / "edgellm.json").read_text().replace('"top_p": 0.9', '"top_p": 9.0')
    )
    with pytest.raises(CheckpointError, match=r"generation: top_p is 9\.0"):
        open_checkpoint(tmp_path / "own")


def test_a_token_outside_the_vocabulary_is_refused_before_the_export(folder, tmp_path):
    there = copied(folder, tmp_path)
    (there / "generation_config.json").write_text('{"suppress_tokens": [320]}')
    with pytest.raises(ExportError, match="banned_tokens has token 320, outside the vocabulary of 320"):
        export_checkpoint(there, tmp_path / "new", target="cpu", quantize="none", tell=lambda *_: None)


@pytest.mark.parametrize(
    ("generation", "said"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": True}, "temperature is True"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"seed": 3}, "'seed' is no option that a model sets"),
        ({"logits_processors": ["x"]}, "'logits_processors' is no option"),
        ({"banned_tokens": [320]}, "outside the vocabulary of 320"),
        ({"min_tokens": 5, "max_new_tokens": 2}, "above max_new_tokens"),
        ({"stop": [7]}, "stop holds 7"),
        ([], "is not a dict"),
    ],
)
def test_a_loader_believes_no_default_before_it_is_checked(bundle, tmp_path, generation, said):
    spoiled = copied(bundle, tmp_path)
    edit_manifest(spoiled, generation=generation)
    with pytest.raises(BundleError, match=said):
        load(spoiled)


def test_a_stop_text_without_a_tokenizer_is_refused(bundle, tmp_path):
    spoiled = copied(bundle, tmp_path)
    edit_manifest(spoiled, generation={"stop": ["x"]}, tokenizer=None)
    with pytest.raises(BundleError, match="there is no tokenizer"):
        load(spoiled)


def test_what_a_bundle_may_set_are_options_of_generation():
    assert set(RANGES) <= set(GenerationOptions.__dataclass_fields__)
    plain = GenerationOptions()
    for name, check in RANGES.items():
        assert check(name, getattr(plain, name)) == getattr(plain, name)
