"""edgellm's own checkpoints: what is written is read back, and nothing half written or damaged is."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from edgellm import checkpoints
from edgellm.checkpoints import checkpoint_directory, load_checkpoint, native, save_checkpoint
from edgellm.errors import CheckpointError
from edgellm.models import registry

TOKENIZER = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])).to_str()


def tiny(architecture: str = "decoder", *, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    found = registry.find(architecture)
    return found.build(found.presets["tiny"]).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(24).reshape(2, 12))[0]


def save(path: Path, model: torch.nn.Module, **options) -> None:
    save_checkpoint(path, model, **({"architecture": "decoder", "tokenizer_json": TOKENIZER} | options))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "model", tiny())
    return tmp_path / "model"


def test_exports_are_the_public_names():
    assert {
        "Checkpoint", "CheckpointWeights", "adapted", "checkpoint_directory", "load_checkpoint", "open_checkpoint",
        "save_checkpoint", "switchable",
    } == set(checkpoints.__all__)  # fmt: skip


@pytest.mark.parametrize("architecture", ["decoder", "hybrid"])
def test_round_trip(tmp_path, architecture):
    model = tiny(architecture)
    save(
        tmp_path / "new" / "model", model, architecture=architecture, chat_template="{{ 1 }}\r\n", bos_token_id=1,
        eos_token_ids=(2, 0), add_bos=True,
    )  # fmt: skip
    loaded = load_checkpoint(tmp_path / "new" / "model")
    assert torch.equal(logits(loaded.model), logits(model))
    assert loaded.model.config == model.config
    assert loaded.architecture == architecture
    assert loaded.tokenizer_json == TOKENIZER
    assert loaded.chat_template == "{{ 1 }}\r\n"
    assert (loaded.bos_token_id, loaded.eos_token_ids, loaded.add_bos) == (1, (2, 0), True)
    assert loaded.model.head.weight is loaded.model.embedding.weight
    assert not loaded.model.training
    assert all(p.requires_grad and p.is_leaf and p.device.type == "cpu" for p in loaded.model.parameters())


def test_a_configuration_without_a_key_that_came_later_is_read(saved):
    config = json.loads((saved / "edgellm.json").read_text())
    assert config["config"].pop("qk_norm") is False
    (saved / "edgellm.json").write_text(json.dumps(config))
    assert torch.equal(logits(load_checkpoint(saved).model), logits(tiny()))


def test_nothing_optional_is_needed(tmp_path):
    save(tmp_path / "m", tiny(), tokenizer_json=None)
    loaded = load_checkpoint(tmp_path / "m")
    assert (loaded.tokenizer_json, loaded.chat_template, loaded.bos_token_id, loaded.eos_token_ids) == (
        None,
        None,
        None,
        (),
    )


def test_tied_tensors_are_stored_once(saved):
    assert not {"head.weight", "embedding.weight"} <= load_file(saved / "model.safetensors").keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_what_was_asked_for(saved, dtype):
    model = load_checkpoint(saved, dtype=dtype).model
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.rotary.cos.dtype == torch.float32
    assert logits(model).isfinite().all()


def test_loading_initialises_no_weight(saved, monkeypatch):
    def forbidden(tensor, *args, **kwargs):
        assert tensor.device.type == "meta"
        return tensor

    for name in ("normal_", "kaiming_uniform_", "uniform_"):
        monkeypatch.setattr(torch.nn.init, name, forbidden)
    load_checkpoint(saved)


def test_a_loaded_model_can_be_saved_over_its_own_files(saved):
    loaded = load_checkpoint(saved)
    expected = logits(loaded.model)
    save(saved, loaded.model)
    assert torch.equal(logits(loaded.model), expected)
    assert torch.equal(logits(load_checkpoint(saved).model), expected)


def test_extra_files_appear_with_the_checkpoint(tmp_path):
    def extra(directory: Path) -> None:
        assert not (tmp_path / "m").exists()
        (directory / "trainer").mkdir()
        (directory / "trainer" / "step.txt").write_text("7")

    save(tmp_path / "m", tiny(), extra=extra)
    assert (tmp_path / "m" / "trainer" / "step.txt").read_text() == "7"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_failure_before_the_end_leaves_the_old_checkpoint(saved):
    def fail(_: Path) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        save(saved, tiny(seed=1), extra=fail)
    assert torch.equal(logits(load_checkpoint(saved).model), logits(tiny()))
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("survived", range(6))
def test_a_crash_at_any_rename_leaves_a_whole_checkpoint(saved, monkeypatch, survived):
    """Stops dead, as a crash does: after so many renames and removals nothing more happens, not even cleaning up."""
    left = survived

    def counted(real):
        def step(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(native.Path, "rename", counted(Path.rename))
        patch.setattr(native.shutil, "rmtree", counted(native.shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            save(saved, tiny(seed=1))
    found = logits(load_checkpoint(saved).model)
    assert any(torch.equal(found, logits(tiny(seed=seed))) for seed in (0, 1))
    save(saved, tiny(seed=2))
    assert torch.equal(logits(load_checkpoint(saved).model), logits(tiny(seed=2)))
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_an_interrupted_replacement_is_found(saved):
    previous = saved.rename(saved.with_name(".model.previous"))
    assert checkpoint_directory(saved) == previous
    assert torch.equal(logits(load_checkpoint(saved).model), logits(tiny()))


def test_what_is_not_a_checkpoint_is_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(CheckpointError, match="choose another path"):
        save(tmp_path / "photos", tiny())
    assert (tmp_path / "photos" / "cat.jpg").exists()
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", tiny())
    load_checkpoint(tmp_path / "empty")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path / "m", tiny())


def edit(path: Path, **changes) -> None:
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format 2, this edgellm reads up to 1; update edgellm"),
        ({"format": "1"}, "format '1'"),
        ({"format": ...}, "format None"),
        ({"architecture": "mambo"}, "unknown architecture 'mambo'"),
        ({"architecture": ...}, "has no 'architecture'"),
        ({"config": ...}, "has no 'config'"),
        ({"config": {"vocab_size": 3}}, "missing"),
        ({"config": {"colour": 3}}, "colour"),
        ({"config": [1]}, "edgellm.json"),
        ({"bos_token_id": "<s>"}, "bos_token_id is '<s>'"),
        ({"eos_token_ids": [1, -2]}, "eos_token_ids is"),
    ],
)
def test_a_bad_manifest_is_refused(saved, changes, message):
    edit(saved / "edgellm.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\ud800".encode("utf-8", "surrogatepass"), "[" * 100_000])
def test_a_manifest_that_is_no_json_object_is_refused(saved, text):
    (saved / "edgellm.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"edgellm\.json"):
        load_checkpoint(saved)


@pytest.mark.parametrize("kept", [0, 4, 8, 60, 5_000, -1])
def test_damaged_weights_are_refused(saved, kept):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_checkpoint(saved)


def with_tensors(path: Path, **changes) -> None:
    tensors = load_file(path / "model.safetensors") | changes
    save_file({name: t.clone() for name, t in tensors.items() if t is not None}, path / "model.safetensors")


NAN, INF = torch.full((128,), float("nan")), torch.full((128,), float("inf"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.weight": None}, r"tensor norm.weight of shape \(128,\) is missing"),
        ({"norm.weight": torch.ones(64)}, r"tensor norm.weight has shape \(64,\), its configuration says \(128,\)"),
        ({"norm.weight": torch.ones(128, 1)}, r"shape \(128, 1\)"),
        ({"norm.weight": NAN}, "norm.weight is not finite"),
        ({"norm.weight": INF}, "norm.weight is not finite"),
        ({"norm.weight": torch.ones(128, dtype=torch.int32)}, "norm.weight is torch.int32"),
        ({"more.weight": torch.ones(1)}, "tensors more.weight have no place"),
        ({f"x{i}": torch.ones(1) for i in range(5)}, "tensors x0, x1, x2 and 2 more have no place"),
        ({"head.weight": torch.ones(1024, 128)}, "embedding.weight and head.weight differ"),
    ],
)
def test_weights_that_do_not_fit_are_refused(saved, changes, message):
    with_tensors(saved, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved)


def test_a_value_too_large_for_the_dtype_is_refused(saved):
    with_tensors(saved, **{"norm.weight": torch.full((128,), 1e6)})
    load_checkpoint(saved)
    with pytest.raises(CheckpointError, match=r"not finite as torch\.float16"):
        load_checkpoint(saved, dtype=torch.float16)


@pytest.mark.parametrize("text", ["", "{}", "not json"])
def test_a_bad_tokenizer_is_refused(saved, text):
    (saved / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        load_checkpoint(saved)


def test_missing_weights_are_refused(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="0 safetensors files"):
        load_checkpoint(saved)


def test_what_is_no_checkpoint_is_refused_with_what_is(tmp_path):
    (tmp_path / "file.txt").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for name, message in {"absent": "does not exist", "file.txt": "is no checkpoint", "empty": "no checkpoint"}.items():
        with pytest.raises(CheckpointError, match=f"{message}.*a .gguf or .pth file"):
            load_checkpoint(tmp_path / name)
