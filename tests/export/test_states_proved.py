"""A state's word is proved with the numbers: a spec that promises what the model does not keep makes no bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make
from memory_model import MemoryModel

from edgellm.models.hybrid import Hybrid
from edgellm_exporters.errors import ParityError
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import StateSpec


class Forgetful(Hybrid):
    """Says that a token sees three tokens of the ring, and looks at nine: rewound, it reads what is overwritten."""

    def state_specs(self) -> list[StateSpec]:
        return [dataclasses.replace(spec, window=3) for spec in super().state_specs()]


class Restless(MemoryModel):
    """Writes its static memory anew in every step."""

    def _memory(self, x: Any, state: Any, step: Any) -> Any:
        return super()._memory(x, {}, step)


class Impatient(MemoryModel):
    """Writes its memory from the whole first chunk, though a first step may hold one token alone."""

    def _memory(self, x: Any, state: Any, step: Any) -> Any:
        seen = torch.arange(x.shape[1])[None, :, None] < step.lengths[:, None, None]
        return super()._memory((x * seen).sum(1, keepdim=True), state, step)


@pytest.mark.parametrize(
    ("kind", "like"), [(Forgetful, "local"), (Restless, "memory"), (Impatient, "memory")],
    ids=["a larger window than it says", "a static state that changes", "a static state of several tokens"],
)  # fmt: skip
def test_a_state_that_is_not_what_it_says_is_not_exported(kind: Any, like: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kind(make(like).config).eval()
    model.load_state_dict(make(like).state_dict())
    with pytest.raises(ParityError, match=r"split is \d"):
        export(model, tmp_path / "b", options=ExportOptions(target="onnx"))
    assert list(tmp_path.iterdir()) == []
