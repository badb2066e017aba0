"""Adapters of blocks that several layers share: each place is changed by itself, as by PEFT, merged and switched."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from test_adapters_on_targets import same_numbers

from edgellm.checkpoints import adapted, load_checkpoint, open_checkpoint, switchable
from edgellm.checkpoints.assemble import fill, shared_names
from edgellm.checkpoints.shared_blocks import separate
from edgellm.cli.export import export as export_command
from edgellm.errors import CheckpointError, TrainingError
from edgellm.models.protocol import Step, empty_state
from edgellm.streaming import resident
from edgellm.training.start import _from_checkpoint
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import load
from edgellm_runtime.spec import ADAPTER

pytestmark = pytest.mark.filterwarnings("default")  # the warnings here are transformers' and PEFT's own
TOKENS = torch.randint(3, 61, (2, 19), generator=torch.Generator().manual_seed(0))
TARGETS = ["q_proj", "o_proj", "gate_up_proj", "down_proj", "in_proj"]


def zamba2() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.Zamba2Config(
        vocab_size=61, hidden_size=32, num_hidden_layers=3,
        layers_block_type=["hybrid", "hybrid", "hybrid"], num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=48, n_mamba_heads=4, mamba_d_state=8, num_mem_blocks=2,
        adapter_rank=4, use_shared_attention_adapter=True, use_mem_rope=True, max_position_embeddings=64,
        pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A base, an adapter in a folder of its own, and the logits that PEFT gives them without merging: its way of that
    adds the changes of every place to the one tensor.
    """
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("shared")
    zamba2().save_pretrained(folder / "base")
    model = peft.get_peft_model(zamba2(), peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "adapter")
    with torch.inference_mode():
        return folder, model(input_ids=TOKENS, use_cache=False).logits


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max())


@torch.inference_mode()
def test_a_merged_adapter_changes_each_place_as_peft_does(made: tuple[Path, torch.Tensor]) -> None:
    folder, wanted = made
    merged = adapted(open_checkpoint(folder / "base"), folder / "adapter")
    # 4 targets in a shared block, and its in_proj in each of three layers
    assert any("merged into 15 tensors" in note for note in merged.notes)
    assert any("4 tensors were doubled" in note for note in merged.notes)
    with resident(merged.model, merged.weights):
        assert near(merged.model(TOKENS)[0], wanted)
    filled = fill(merged.model, merged.weights)
    assert near(filled(TOKENS)[0], wanted)
    groups = {name: group for group in shared_names(filled) for name in group}
    assert groups["layers.2.shared.attention.q_proj.weight"] == ["layers.2.shared.attention.q_proj.weight"]
    assert len(groups["layers.2.shared.attention.k_proj.weight"]) == 2  # what nothing changes stays one
    base = load_checkpoint(folder / "base")
    assert not near(base.model(TOKENS)[0], wanted)


@torch.inference_mode()
def test_an_adapter_beside_the_weights_counts_as_one_in_a_folder_of_its_own(
    made: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    shutil.copytree(made[0] / "base", tmp_path / "both")
    shutil.copytree(made[0] / "adapter", tmp_path / "both", dirs_exist_ok=True)
    read = load_checkpoint(tmp_path / "both")
    assert near(read.model(TOKENS)[0], made[1])
    with pytest.raises(TrainingError, match=r"weights of their own at each place.*train the base"):
        _from_checkpoint(tmp_path / "both")


def test_bundles_have_it_merged_and_to_be_switched(made: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, wanted = made
    for name, given in (("merged", folder / "adapter"), ("apart", f"own={folder / 'adapter'}")):
        call = [str(folder / "base"), "-o", str(tmp_path / name), "--adapter", str(given)]
        said = CliRunner().invoke(export_command, call, catch_exceptions=False)
        assert said.exit_code == 0, said.output
        model = load(tmp_path / name)
        session = model.session if name == "merged" else model.with_adapter("own").session
        found = torch.from_numpy(session.step(TOKENS.numpy(), session.new_state(2), logits="all"))
        assert near(found, wanted)


@torch.inference_mode()
@pytest.mark.parametrize("method", ["int8", "int4"])
def test_quantized_bundles_have_it_merged_and_to_be_switched(
    method: str, made: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    base = zamba2()
    base.get_input_embeddings().weight.mul_(8)  # else all tokens are nearly as likely, and rounding chooses
    base.save_pretrained(tmp_path / "base")
    for name in ("merged", "apart"):
        opened, folder = open_checkpoint(tmp_path / "base"), made[0] / "adapter"
        opened = adapted(opened, folder) if name == "merged" else switchable(opened, {"own": folder})
        done = export(
            opened.model, tmp_path / name, weights=opened.weights, options=ExportOptions(target="onnx", quantize=method)
        )
        reference = same_numbers(fill(opened.model, opened.weights), "onnx", method, done.bundle.manifest.max_context)
        model, own = load(tmp_path / name, threads=1), () if name == "merged" else ("own",)
        for number, adapter in enumerate((None, *own)):
            state = empty_state(reference, *TOKENS.shape)
            chosen = {ADAPTER: torch.full((2, 1), number, dtype=torch.int32)} if own else {}
            wanted = reference(TOKENS, {**state, **chosen}, Step.whole(TOKENS))[0]
            session = model.with_adapter(adapter).session
            found = torch.from_numpy(session.step(TOKENS.numpy(), session.new_state(2), logits="all"))
            assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5, (name, adapter)
    groups = {tensor: group for group in shared_names(reference) for tensor in group}
    assert len(groups["base.layers.2.shared.attention.q_proj.weight"]) == 2  # switched, the base's blocks stay one


@torch.inference_mode()
def test_switched_adapters_share_the_weights_of_the_base(made: tuple[Path, torch.Tensor]) -> None:
    folder, _ = made
    base = open_checkpoint(folder / "base")
    count = len(list(base.model.parameters()))
    both = switchable(base, {"one": folder / "adapter"})
    assert len(list(both.model.parameters())) == count


@torch.inference_mode()
def test_places_apart_compute_the_same(made: tuple[Path, torch.Tensor]) -> None:
    model = load_checkpoint(made[0] / "base").model
    before, names = model(TOKENS)[0], shared_names(model)
    assert model.get_submodule("layers.0.shared") is model.get_submodule("layers.2.shared")
    separate(model)
    assert model.get_submodule("layers.0.shared") is not model.get_submodule("layers.2.shared")
    assert torch.equal(model(TOKENS)[0], before)
    assert shared_names(model) == names


def test_a_table_that_is_the_head_too_is_still_refused(made: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(zamba2(), peft.LoraConfig(r=3, target_modules=["lm_head"])).save_pretrained(tmp_path / "head")
    with pytest.raises(CheckpointError, match=r"head: it changes lm_head\.weight, which is tied"):
        adapted(open_checkpoint(made[0] / "base"), tmp_path / "head")
