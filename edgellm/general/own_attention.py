"""Models whose attention is their modules' own, past transformers' attention interface.

They hand keys and values to the cache all the same, and take from it those of all tokens. So the cache gives them the
whole context as a batch padded at the left would have it: every row's newest token in the last slot, and a mask over
slots that hold none. Biases by distance, by slot or by row are then what they are in such a batch. It is slower than
attention with a kernel, for every step looks at every slot of the context.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgellm.errors import CheckpointError
from edgellm.general.calls import Call, inputs_of, under_way
from edgellm.general.probe import FOREIGN_FAULTS, Layer, told
from edgellm.models.protocol import State, Step

__all__ = ["OwnRun", "probe_own"]


class OwnRun(Call):
    """One step of such a model.

    Args:
        state: keys and values by name; none means that nothing came before and nothing is kept.
        step: of the rows.
        time: new tokens of a row.
        context: slots that each step looks at.
    """

    def __init__(self, state: State, step: Step, time: int, context: int) -> None:
        super().__init__()
        self._state, self._step, self._time = state, step, time
        self._slots = context if state else time
        self.present: dict[str, Tensor] = {}
        self.shapes: dict[int, tuple[torch.Size, torch.Size]] = {}
        self.chosen_by: dict[int, int] = {}  # features of the keys by which a layer chooses tokens

    def attend(self, layer: int, q: Tensor, *_: Any, **__: Any) -> Tensor:
        raise CheckpointError("it attends by its own modules in some layers and through transformers in others")

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values (batch, heads, slots, head_dim), the newest last."""
        if k.dim() != 4 or v.dim() != 4:
            raise CheckpointError(f"its keys have {k.dim()} dimensions; only (batch, heads, time, head_dim) has a form")
        self.shapes[layer] = k.shape, v.shape
        return self._all(f"layers.{layer}.k", k), self._all(f"layers.{layer}.v", v)

    def update_index(self, layer: int, k: Tensor) -> Tensor:
        self.chosen_by[layer] = k.shape[2]
        return self._all(f"layers.{layer}.index", k[:, None])[:, 0]

    def kept(self) -> int:
        return self._slots - self._time

    def slots(self, time: int) -> int:
        return self._slots

    def mask(self, sees: Any, dtype: torch.dtype) -> Tensor:
        """What is added to scores (batch, heads, time, slots)."""
        slots = self._in_slots()[:, None, None]  # (batch, 1, 1, slots)
        own, none = self._positions()[:, None, :, None], torch.zeros((), dtype=torch.int64)
        visible = (slots >= 0) & (slots <= own) & sees(none, none, own, slots)
        least = torch.full((), torch.finfo(dtype).min, dtype=dtype)
        return torch.where(visible, torch.zeros((), dtype=dtype), least)

    def _positions(self) -> Tensor:
        """(batch, time): of the new tokens in their rows."""
        return self._step.past_lengths[:, None].long() + torch.arange(self._time)

    def _in_slots(self) -> Tensor:
        """(batch, slots): the position whose token is in each slot; below 0 where there is none."""
        return self._step.past_lengths[:, None].long() + (torch.arange(self._slots) - self.kept())

    def _all(self, name: str, new: Tensor) -> Tensor:
        past = self._state.get(name)
        if past is None:
            return new
        present = past.scatter(2, self._positions()[:, None, :, None].expand_as(new), new)
        self.present[name] = present
        places = self._in_slots().clamp(min=0)[:, None, :, None]
        return present.gather(2, places.expand(-1, present.shape[1], -1, present.shape[3]))


@torch.no_grad()
def probe_own(model: Any, layers: int) -> list[Layer]:
    """Run a model once and see what its layers hand to their cache.

    Args:
        model: of transformers, with our masks set.
        layers: how many its configuration says that it has.

    Raises:
        CheckpointError: a layer hands nothing to it, or the model cannot be run so.
    """
    tokens = torch.arange(12)[None] % 7 + 1
    run = OwnRun({}, Step.whole(tokens), tokens.shape[1], tokens.shape[1])
    with under_way(run):
        try:
            model(**inputs_of(model, tokens, torch.arange(tokens.shape[1])[None], layers))
        except FOREIGN_FAULTS as error:
            raise told(error) from error
    if absent := sorted(set(range(layers)) - run.shapes.keys()):
        raise CheckpointError(
            f"its layers {absent[:4]} give no keys and values to transformers' cache, so what they keep is unknown; it "
            "is recurrent, or has a cache of its own"
        )
    return [
        Layer(
            num_heads=k[1],
            num_kv_heads=k[1],
            key_dim=k[3],
            value_dim=v[3],
            scale=1.0,
            window=0,
            softcap=0.0,
            index_dim=run.chosen_by.get(i, 0),
        )
        for i, (k, v) in ((i, run.shapes[i]) for i in range(layers))
    ]
