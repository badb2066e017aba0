"""``export --check transformers``: the same model passes, and one that was read as another is not exported."""

import importlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import source_models
import torch
from test_adapters import adapted
from test_checkpoints import save, tiny
from test_checkpoints_gguf import tiny as tiny_decoder
from test_checkpoints_gguf import write
from test_checkpoints_huggingface import LLAMA3, edit, rope, transformers_model
from test_families_huggingface import CASES, CONFIGS, scrambled

from edgellm.checkpoints import open_checkpoint
from edgellm.cli import run
from edgellm.cli.checkpoints import read_checkpoint
from edgellm.cli.transformers_check import check_transformers
from edgellm.errors import CheckpointError
from edgellm.models import registry

pytestmark = pytest.mark.filterwarnings("default")  # the warnings here are transformers' own


def small_model(kind: str, folder: Path):
    """A small model of transformers of one ``model_type``: the first that the tests of reading compare."""
    transformers = pytest.importorskip("transformers")
    if kind in source_models.FOREIGN:
        return source_models.foreign(kind, folder)
    for name, options in CASES:
        if getattr(transformers, CONFIGS.get(name, f"{name}Config")).model_type == kind:
            return scrambled(name, options)
    return transformers_model({"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind])


_NOT_OF_TRANSFORMERS = {"rwkv7", "rwkv7_fla"}  # of its authors' own libraries: test_rwkv7.py has their reference


def test_transformers_has_no_model_of_the_types_that_are_left_out() -> None:
    transformers = pytest.importorskip("transformers")
    assert not _NOT_OF_TRANSFORMERS & set(transformers.CONFIG_MAPPING)


@pytest.mark.parametrize("kind", [k for k in registry.foreign_names("huggingface") if k not in _NOT_OF_TRANSFORMERS])
def test_every_type_that_is_loaded_passes(tmp_path: Path, kind: str) -> None:
    small_model(kind, tmp_path).save_pretrained(tmp_path)
    opened = open_checkpoint(tmp_path)
    assert opened.notes == ()  # no key that transformers writes is unknown
    found = check_transformers(tmp_path, opened)
    assert (found["tokens"], found["top1"]) == (64, 1.0)
    assert found["logits"] < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_gguf_files_pass(tmp_path: Path, architecture: str) -> None:
    own = {"llama": {}, "qwen2": {"attention_bias": True}, "qwen3": {"qk_norm": True, "head_dim": 128}}
    path = write(tmp_path / "m.gguf", tiny_decoder(**own[architecture]), kind="Q8_0", architecture=architecture,
                 changes={"vocab_size": 96})  # fmt: skip
    assert check_transformers(path, open_checkpoint(path))["logits"] < 1e-5


def test_a_checkpoint_that_is_read_as_another_model_is_refused_and_not_exported(tmp_path, monkeypatch, capsys) -> None:
    transformers_model("Llama", **rope("llama3", **LLAMA3)).save_pretrained(tmp_path / "m")
    scaling = importlib.import_module("edgellm.models.foreign.rope")
    monkeypatch.setitem(scaling._FORMS, "llama3", scaling._plain)  # as if the factors were overlooked
    arguments = ["export", str(tmp_path / "m"), "-o", str(tmp_path / "b"), "--target", "onnx", "--json"]
    assert run([*arguments, "--check", "transformers"]) == 1
    assert "transformers computes other logits" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "b").exists()
    monkeypatch.undo()
    assert run([*arguments, "--check", "transformers"]) == 0
    assert json.loads(capsys.readouterr().out)["transformers"]["logits"] < 1e-5


def test_a_merged_adapter_passes_and_an_overlooked_one_does_not(tmp_path: Path) -> None:
    adapted(tmp_path, r=4, target_modules=["q_proj", "up_proj"])
    assert check_transformers(tmp_path, open_checkpoint(tmp_path))["logits"] < 1e-5
    (tmp_path / "adapter_config.json").rename(tmp_path / "aside.json")
    opened = open_checkpoint(tmp_path)
    (tmp_path / "aside.json").rename(tmp_path / "adapter_config.json")
    with pytest.raises(CheckpointError, match="transformers computes other logits"):
        check_transformers(tmp_path, opened)


def test_what_transformers_cannot_load_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "own", tiny())
    with pytest.raises(CheckpointError, match="no checkpoint that transformers can load; leave --check out"):
        check_transformers(tmp_path / "own", open_checkpoint(tmp_path / "own"))
    transformers_model("Llama").save_pretrained(tmp_path / "m")
    opened = open_checkpoint(tmp_path / "m")
    edit(tmp_path / "m" / "config.json", hidden_size=31)
    with pytest.raises(CheckpointError, match="transformers"):
        check_transformers(tmp_path / "m", opened)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match="needs transformers: install the extra hf"):
        check_transformers(tmp_path / "m", opened)


def test_notes_stand_in_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers_model("Llama", vocab_size=96).to(torch.float32).save_pretrained(tmp_path / "m")
    edit(tmp_path / "m" / "config.json", colour="red", aardvark=1)
    assert run(["export", str(tmp_path / "m"), "-o", str(tmp_path / "b"), "--target", "onnx"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Note: config.json has keys edgellm does not know: aardvark, colour." in said


@pytest.mark.parametrize("road", ["auto", "general"])
def test_the_general_road_leaves_neither_code_nor_adapter_aside_without_a_word(tmp_path, monkeypatch, road) -> None:
    transformers_model("Llama").save_pretrained(tmp_path)
    edit(tmp_path / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    with pytest.raises(CheckpointError, match="auto_map says that code of the checkpoint's own computes the model"):
        read_checkpoint(tmp_path, road=road)
    edit(tmp_path / "config.json", auto_map=..., is_causal=False if road == "auto" else ...)
    edit(tmp_path / "adapter_config.json", peft_type="LORA", base_model_name_or_path="x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    with pytest.raises(CheckpointError, match="has an adapter, which transformers loads with PEFT only"):
        read_checkpoint(tmp_path, road=road)


def test_a_model_that_sees_what_comes_after_is_taken_by_no_road(tmp_path) -> None:
    transformers_model("Llama").save_pretrained(tmp_path)
    edit(tmp_path / "config.json", is_causal=False)
    with pytest.raises(CheckpointError, match="its attention is not causal"):
        read_checkpoint(tmp_path)
