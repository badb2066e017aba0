"""Adapters in PEFT's layout: what is merged computes what PEFT computes, and the rest is refused by name."""

import json
import shutil
from functools import reduce
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_checkpoints_huggingface import TOKENS, edit, logits, transformers_model

from edgellm.checkpoints import adapted as merge
from edgellm.checkpoints import load_checkpoint, open_checkpoint, save_checkpoint
from edgellm.checkpoints.assemble import fill
from edgellm.cli.export import export
from edgellm.errors import CheckpointError
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.loading import open_session

pytestmark = pytest.mark.filterwarnings("default")  # the warnings here are transformers' and PEFT's own
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(path: Path, *, tie: bool = False, dtype: torch.dtype = torch.float32, **options) -> torch.Tensor:
    """A model and an adapter with weights that matter in one folder; the logits that PEFT gives them."""
    peft = pytest.importorskip("peft")
    base = transformers_model("Llama", tie_word_embeddings=tie).to(dtype)
    base.save_pretrained(path)
    model = peft.get_peft_model(base.float(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    with torch.inference_mode():
        return model.merge_and_unload().eval()(TOKENS).logits


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 8, "lora_alpha": 4, "target_modules": ALL, "use_rslora": True},
        {"r": 4, "target_modules": ALL, "alpha_pattern": {"k_proj": 32, "layers.0.mlp.up_proj": 2, "q.proj": 12}},
        {"r": 4, "target_modules": ALL, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 9}},
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"r": 4, "target_modules": ["q_proj", "lm_head"], "lora_alpha": 6},
        {"r": 4, "target_modules": ["o_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.1},
    ],
)
def test_logits_equal_peft(tmp_path, options):
    expected = adapted(tmp_path, **options)
    got = logits(tmp_path)
    assert (got - expected).abs().amax() <= 2e-6 * expected.abs().amax()
    without = tmp_path / "without"
    shutil.copytree(tmp_path, without, ignore=shutil.ignore_patterns("adapter*", "without"))
    assert (logits(without) - expected).abs().amax() > 0.1 * expected.abs().amax()  # it does matter
    (note,) = load_checkpoint(tmp_path).notes
    assert note.startswith("the adapter beside the weights was merged into ")


def test_transformers_loads_the_same_model_from_the_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    adapted(tmp_path, dtype=torch.bfloat16, r=4, target_modules=ALL)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(TOKENS).logits
    assert (logits(tmp_path) - expected).abs().amax() <= 4e-6 * expected.abs().amax()


def test_rows_read_alone_are_those_of_the_whole(tmp_path):
    adapted(tmp_path, r=4, target_modules=ALL, modules_to_save=["lm_head"])
    whole, opened = load_checkpoint(tmp_path).model, open_checkpoint(tmp_path)
    for name, parameter in whole.named_parameters():
        assert opened.weights is not None
        torch.testing.assert_close(opened.weights.rows(name, 3, 9), parameter[3:9], rtol=0, atol=1e-6)


def test_an_adapter_that_torch_saved_is_read(tmp_path):
    adapted(tmp_path, r=4, target_modules=ALL)
    expected = logits(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    assert torch.equal(logits(tmp_path), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True, which edgellm cannot merge"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices is \[3\]"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is"),
        ({"lora_alpha": None}, "lora_alpha is None; it must be a positive number"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "alpha_pattern has .*no plain name"),
        ({"invented_later": {"a": 1}}, "invented_later is"),
    ],
)
def test_what_cannot_be_merged_is_refused(tmp_path, changes, message):
    adapted(tmp_path, r=4, target_modules=["q_proj"])
    edit(tmp_path / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {message}"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
def test_a_change_of_a_tied_tensor_is_refused(tmp_path, options):
    adapted(tmp_path, tie=True, r=4, **({"target_modules": ["q_proj"]} | options))
    with pytest.raises(CheckpointError, match=r"lm_head|embed_tokens"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", (4, 31), r"has shape \(4, 31\)"),
        (
            "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight",
            (4, 32),
            r"1 of 3 modules .*layers\.9.* no modules of the model",
        ),
        ("base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight", (32, 4), "has no lora_A.weight beside it"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", (4, 96), "nothing that edgellm can merge"),
        ("model.layers.0.self_attn.o_proj.lora_A.weight", (4, 32), "1 of 3 modules that it changes, such as model"),
    ],
)
def test_adapter_tensors_that_do_not_fit_are_refused(tmp_path, name, shape, message):
    adapted(tmp_path, r=4, target_modules=["q_proj"])
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {name: torch.zeros(shape)}, file)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def test_an_adapter_without_its_weights_is_refused(tmp_path):
    adapted(tmp_path, r=4, target_modules=["q_proj"])
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"needs adapter_model\.safetensors"):
        load_checkpoint(tmp_path)


def test_an_adapter_alone_is_told_where_it_belongs(tmp_path):
    adapted(tmp_path, r=4, target_modules=["q_proj"])
    (tmp_path / "config.json").unlink()
    edit(tmp_path / "adapter_config.json", base_model_name_or_path="some/base")
    with pytest.raises(
        CheckpointError, match=r"it is an adapter, so name its base model, some/base, and this folder with --adapter"
    ):
        load_checkpoint(tmp_path)


def apart(folder: Path, name: str = "adapter") -> Path:
    """The adapter of a folder in a folder of its own."""
    there = folder.parent / name
    there.mkdir()
    for file in folder.glob("adapter*"):
        file.rename(there / file.name)
    return there


def model_of(checkpoint) -> torch.Tensor:
    with torch.inference_mode():
        return fill(checkpoint.model, checkpoint.weights)(TOKENS)[0]


def test_an_adapter_in_a_folder_of_its_own_counts_as_one_beside_the_weights(tmp_path):
    expected = adapted(tmp_path / "base", r=4, target_modules=ALL, modules_to_save=["lm_head"])
    adapter = apart(tmp_path / "base")
    merged = merge(open_checkpoint(tmp_path / "base"), adapter)
    assert merged.notes == ("the adapter adapter was merged into 15 tensors",)
    assert (model_of(merged) - expected).abs().amax() <= 2e-6 * expected.abs().amax()
    name = "layers.1.mlp.down_proj.weight"
    assert torch.equal(merged.weights.rows(name, 3, 9), merged.weights.read(name)[3:9])


def test_two_adapters_count_together(tmp_path):
    adapted(tmp_path / "base", r=4, target_modules=["q_proj"])
    first = apart(tmp_path / "base", "first")
    adapted(tmp_path / "other", r=2, target_modules=["q_proj", "v_proj"])
    second = apart(tmp_path / "other", "second")
    name = "layers.0.attention.q_proj.weight"
    plain, one, two = (
        reduce(merge, adapters, open_checkpoint(tmp_path / "base")).weights.read(name)
        for adapters in ([], [first], [second])
    )
    both = reduce(merge, [first, second], open_checkpoint(tmp_path / "base")).weights.read(name)
    assert torch.allclose(both, one + two - plain, atol=1e-6)


def test_an_adapter_is_merged_into_a_checkpoint_of_edgellms_own(tmp_path):
    expected = adapted(tmp_path / "base", r=4, target_modules=ALL)
    adapter = apart(tmp_path / "base")
    own = load_checkpoint(tmp_path / "base")
    save_checkpoint(tmp_path / "own", own.model, architecture="decoder", tokenizer_json=None)
    found = model_of(merge(open_checkpoint(tmp_path / "own"), adapter))
    assert (found - expected).abs().amax() <= 2e-6 * expected.abs().amax()


def test_an_adapter_of_another_base_is_refused_by_what_it_changes(tmp_path):
    adapted(tmp_path / "base", r=4, target_modules=["q_proj"])
    adapter = apart(tmp_path / "base")
    file = adapter / "adapter_model.safetensors"
    moved = {name.replace("self_attn", "attn"): tensor for name, tensor in load_file(file).items()}
    save_file(moved, file)
    edit(adapter / "adapter_config.json", base_model_name_or_path="some/other")
    with pytest.raises(CheckpointError, match=r"2 of 2 modules .* made for some/other; use the adapter's own base"):
        merge(open_checkpoint(tmp_path / "base"), adapter)
    with pytest.raises(CheckpointError, match=r"base has no adapter_config\.json; name the folder of an adapter"):
        merge(open_checkpoint(tmp_path / "base"), tmp_path / "base")


def test_the_command_merges_what_it_is_given(tmp_path):
    expected = adapted(tmp_path / "base", r=4, target_modules=["o_proj", "up_proj"])
    adapter = apart(tmp_path / "base")
    call = [str(tmp_path / "base"), "-o", str(tmp_path / "bundle"), "--adapter", str(adapter), "--json"]
    said = CliRunner().invoke(export, call, catch_exceptions=False)
    assert "the adapter adapter was merged into 4 tensors" in json.loads(said.stdout)["notes"]
    session = open_session(Bundle(tmp_path / "bundle"))
    found = session.step(TOKENS.numpy(), session.new_state(2, 32), logits="all")
    assert abs(torch.from_numpy(found) - expected).amax() <= 1e-5 * expected.abs().amax()
    assert CliRunner().invoke(export, [*call, "--check", "transformers"]).exit_code == 2
