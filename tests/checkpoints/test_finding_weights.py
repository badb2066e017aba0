"""Weights in other wrappings: files of torch.save, prefixes of wrappers; and hints for paths that are no checkpoint."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoints import logits as own_logits
from test_checkpoints import save, tiny
from test_checkpoints_huggingface import folder, logits, write_json  # noqa: F401  a fixture

from edgellm.checkpoints import load_checkpoint, open_checkpoint
from edgellm.errors import CheckpointError


def unpack(folder: Path) -> dict[str, torch.Tensor]:  # noqa: F811
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    return tensors


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_of_torch_save_is_read(folder, wrapper, zipped):  # noqa: F811
    expected, tensors = logits(folder), unpack(folder)
    saved = tensors if wrapper is None else {wrapper: tensors, "epoch": 3}
    torch.save(saved, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert torch.equal(logits(folder), expected)
    assert load_checkpoint(folder).source == "Hugging Face float32, llama"


def test_parts_of_torch_save_are_read(folder):  # noqa: F811
    expected, tensors = logits(folder), unpack(folder)
    where = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(tensors)}
    for part in set(where.values()):
        torch.save({name: tensors[name] for name in tensors if where[name] == part}, folder / part)
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": where})
    assert torch.equal(logits(folder), expected)
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": {"a": "../pytorch_model-0.bin"}})
    with pytest.raises(CheckpointError, match="does not say which files beside it"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["weights.pt", "final.pth", "epoch3.ckpt", "consolidated.00.bin"])
def test_the_only_file_of_torch_save_is_read_whatever_its_name(folder, name):  # noqa: F811
    expected, tensors = logits(folder), unpack(folder)
    torch.save({"state_dict": tensors}, folder / name)
    torch.save({}, folder / "optimizer.pt")
    assert torch.equal(logits(folder), expected)
    torch.save(tensors, folder / "other.pt")
    with pytest.raises(CheckpointError, match=f"several files of weights .*{name}.*; name one pytorch_model.bin"):
        load_checkpoint(folder)


class Code:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"model.norm.weight": Code()}, "without running its code"),
        ([torch.ones(1)], "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
        ({}, "holds no state dict"),
    ],
)
def test_what_torch_saved_besides_tensors_is_refused_and_not_run(folder, saved, message, monkeypatch):  # noqa: F811
    monkeypatch.chdir(folder)
    unpack(folder)
    torch.save(saved, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("kept", [0, 3, 200, -1])
def test_a_damaged_file_of_torch_save_is_refused(folder, kept):  # noqa: F811
    torch.save(unpack(folder), folder / "pytorch_model.bin")
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_checkpoint(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(folder, tmp_path, prefix):  # noqa: F811
    expected, tensors = logits(folder), unpack(folder)
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert torch.equal(logits(folder), expected)
    assert torch.equal(open_checkpoint(folder).weights.rows("norm.weight", 2, 5), tensors["model.norm.weight"][2:5])
    save(tmp_path / "own", tiny())
    own = load_file(tmp_path / "own" / "model.safetensors")
    save_file({prefix + name: tensor.clone() for name, tensor in own.items()}, tmp_path / "own" / "model.safetensors")
    assert torch.equal(own_logits(load_checkpoint(tmp_path / "own").model), own_logits(tiny()))


def test_a_prefix_of_some_names_only_is_not_a_wrappers(folder):  # noqa: F811
    tensors = unpack(folder)
    save_file(tensors | {"module.model.norm.weight": tensors.pop("model.norm.weight")}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .*is missing"):
        load_checkpoint(folder)


def test_a_run_is_told_which_of_its_checkpoints_to_name(tmp_path):
    save(tmp_path / "run" / "last", tiny())
    with pytest.raises(CheckpointError, match=r"it is a run of edgellm train, so use its checkpoint .*run/last"):
        load_checkpoint(tmp_path / "run")
    save(tmp_path / "run" / "best", tiny())
    with pytest.raises(CheckpointError, match=r"so use its checkpoint .*run/best"):
        load_checkpoint(tmp_path / "run")


def test_a_trainers_folder_is_told_which_checkpoint_is_the_latest(tmp_path):
    for step in (500, 1000, 99, 2000):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (500, 1000, 99):
        write_json(tmp_path / f"checkpoint-{step}" / "config.json", {})
    with pytest.raises(CheckpointError, match=r"of which .*/checkpoint-1000 is the latest, so use that"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "pytorch_model.bin", "weights.safetensors"])
def test_weights_alone_are_told_where_they_belong(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"it holds weights only, so put it as .* beside their config\.json"):
        load_checkpoint(tmp_path / name)


def test_saved_weights_have_the_mode_of_their_neighbours(tmp_path):
    before = os.umask(0o026)
    try:
        save(tmp_path / "m", tiny())
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "m").iterdir()}
    assert modes == {0o640}
