"""The general road holds no weights: each is read when its module runs, as transformers' own loader converts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from general_models import CONTEXT, VOCAB, build
from safetensors.torch import load_file, save_file
from torch import nn

from edgellm.checkpoints import Checkpoint
from edgellm.errors import CheckpointError
from edgellm.general import load_general, open_general
from edgellm.general import open as opening
from edgellm.streaming import Weights
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import load

# Some files call tensors otherwise than the modules do, and hold experts one by one.
CONVERTED = ("gpt2", "mixtral", "deepseek_v3", "gpt_oss", "gpt_neox", "gemma3_text")


def saved(kind: str, folder: Path, **changes: Any) -> Any:
    theirs: Any = build(kind, **changes)
    theirs.save_pretrained(folder)
    return theirs


@torch.no_grad()
def wanted(theirs: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = theirs(input_ids=ids, use_cache=False).logits
    return logits


IDS = torch.randint(3, VOCAB, (1, CONTEXT // 2), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", CONVERTED)
@torch.no_grad()
def test_what_is_read_one_by_one_is_what_transformers_loads(kind: str, tmp_path: Path) -> None:
    theirs = saved(kind, tmp_path)
    opened = open_general(tmp_path)
    assert opened.weights is not None
    assert all(p.is_meta for p in opened.model.parameters())
    torch.testing.assert_close(load_general(tmp_path).model(IDS)[0], wanted(theirs, IDS), rtol=1e-4, atol=1e-4)


class _Counted:
    """Weights that note how many numbers of a model are in memory whenever one more tensor is read."""

    def __init__(self, weights: Weights, model: nn.Module, most: list[int]) -> None:
        self._weights, self._model, self._most = weights, model, most

    def _count(self, more: torch.Tensor) -> torch.Tensor:
        held = {id(p): p.numel() for p in self._model.parameters() if not p.is_meta}
        self._most[0] = max(self._most[0], sum(held.values()) + more.numel())
        return more

    def read(self, name: str) -> torch.Tensor:
        return self._count(self._weights.read(name))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._count(self._weights.rows(name, start, stop))


@pytest.mark.parametrize("kind", ["qwen3", "mixtral"])
def test_no_more_than_one_modules_weights_are_ever_in_memory(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, most = saved(kind, tmp_path / "folder"), [0]
    before = opening.resident

    @contextmanager
    def counting(model: nn.Module, weights: Weights, **named: Any) -> Iterator[None]:
        with before(model, _Counted(weights, model, most), **named):
            yield

    monkeypatch.setattr(opening, "resident", counting)
    opened = open_general(tmp_path / "folder")
    model: Any = opened.model
    assert opened.weights is not None
    weights = _Counted(opened.weights, model, most)
    export(model, tmp_path / "bundle", weights=weights, options=ExportOptions(target="cpu"))
    assert all(p.is_meta for p in model.parameters())
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in theirs.modules())
    assert 0 < most[0] <= 2 * largest < sum(p.numel() for p in theirs.parameters())
    ran = load(tmp_path / "bundle")
    found = ran.session.step(IDS.numpy(), ran.session.new_state(batch=1), logits="all")[0]
    torch.testing.assert_close(torch.from_numpy(found.copy()), wanted(theirs, IDS)[0], rtol=1e-3, atol=1e-3)


def changed(path: Path, **tensors: torch.Tensor | None) -> None:
    file = path / "model.safetensors"
    kept = {name: t for name, t in {**load_file(file), **tensors}.items() if t is not None}
    save_file(kept, file, metadata={"format": "pt"})


def test_missing_misshaped_and_further_tensors_are_all_told_at_once(tmp_path: Path) -> None:
    saved("gpt2", tmp_path)
    changed(
        tmp_path,
        **{"transformer.ln_f.bias": None, "transformer.ln_f.weight": torch.ones(7), "transformer.more": torch.ones(3)},
    )
    with pytest.raises(CheckpointError) as told:
        open_general(tmp_path)
    said = str(told.value)
    assert "tensor transformer.ln_f.bias of shape (32,) is missing" in said
    assert "tensor transformer.ln_f.weight has shape (7,), its configuration says (32,)" in said
    assert "tensors transformer.more have no place in the model" in said


def test_tensors_without_their_wrappers_name_and_tied_ones_are_found(tmp_path: Path) -> None:
    theirs = saved("gpt2", tmp_path)  # its projection is its embedding
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    bare = {name.removeprefix("transformer."): t.contiguous() for name, t in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened: Checkpoint = load_general(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(opened.model(IDS)[0], wanted(theirs, IDS), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_followed_tensor_by_tensor_is_loaded_by_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = saved("mixtral", tmp_path)

    def fails(*args: Any, **keywords: Any) -> None:
        raise opening.CannotStream("a conversion that is not understood")

    monkeypatch.setattr(opening, "weights_of", fails)
    opened = open_general(tmp_path)
    assert opened.weights is None
    with torch.no_grad():
        torch.testing.assert_close(opened.model(IDS)[0], wanted(theirs, IDS), rtol=1e-4, atol=1e-4)
    changed(tmp_path, **{"model.norm.weight": None})
    with pytest.raises(CheckpointError, match=r"tensor model.norm.weight .* missing"):
        open_general(tmp_path)
