"""What a foreign model's layers do, found by one look: heads, windows, caps, and how queries and keys are rotated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgellm.errors import CheckpointError
from edgellm.general.calls import Call, Mask, inputs_of, strange, under_way

__all__ = ["FOREIGN_FAULTS", "Layer", "Seen", "probe", "told", "window_of"]

# What a model that wants another kind of cache runs into.
FOREIGN_FAULTS = (AttributeError, TypeError, LookupError, RuntimeError, ValueError)
_SEQUENCE = 12  # tokens of the look


@dataclass(frozen=True)
class Layer:
    """One layer's attention.

    Args:
        num_heads: query heads.
        num_kv_heads: key and value heads.
        key_dim: features of a head's query and key.
        value_dim: features of a head's value.
        scale: factor on the scores.
        window: tokens that a token sees, its own among them; 0 for all.
        softcap: a bound that scores approach; 0 for none.
        index_dim: features of the keys by which it chooses the tokens that it attends to; 0: it attends to all.
    """

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int
    softcap: float
    index_dim: int = 0


@dataclass(frozen=True)
class Seen:
    """What one look at a layer showed.

    Args:
        layer: its attention.
        q: its queries (batch, heads, time, head_dim), as they came to the attention.
        k: its keys.
    """

    layer: Layer
    q: Tensor
    k: Tensor


class _Look(Call):
    """Answers with the values themselves, which no rotation touches, so that two looks see the same inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Seen] = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None, keywords: Mapping[str, Any]
    ) -> Tensor:
        window, softcap = window_of(mask, keywords), float(keywords.get("softcap") or 0.0)
        sinks = keywords.get("s_aux")
        if sinks is not None and sinks.shape != q.shape[1:2]:
            raise CheckpointError(
                f"its attention has sinks (s_aux) of shape {tuple(sinks.shape)}, and only one for each of its "
                f"{q.shape[1]} heads has a form here"
            )
        if keywords.get("is_causal") is False:
            raise CheckpointError("its attention looks ahead (is_causal is false); only causal models can be exported")
        if other := strange(keywords, "softcap", "sliding_window", "s_aux"):
            raise CheckpointError(f"its attention is given {', '.join(other)}, which is not understood here")
        self.seen[layer] = Seen(
            Layer(
                q.shape[1], k.shape[1], k.shape[3], v.shape[3],
                float(q.shape[3] ** -0.5 if scale is None else scale), window, softcap,
            ),
            q, k,
        )  # fmt: skip
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).transpose(1, 2).contiguous()


def window_of(mask: Any, keywords: Mapping[str, Any]) -> int:
    """How far a token sees, from what its layer says and from the mask that it would have; 0 for all the way."""
    said = int(keywords.get("sliding_window") or 0)
    if mask is None:
        return said
    if not isinstance(mask, Mask):
        raise CheckpointError("it makes its own attention masks, which no export can follow; it has no form here")
    far = 1 << 20
    if not _sees(mask, 0, 0) or _sees(mask, 0, 1):
        raise CheckpointError("its attention is not causal; only causal models can be exported")
    if _sees(mask, far, 0):
        return said
    low, high = 1, far  # a token sees itself, and not what is so far away
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _sees(mask, far, far - middle + 1) else (low, middle)
    # the next tokens see as far; those of a chunk would see one token more each
    if all(_sees(mask, at, at - low + 1) and not _sees(mask, at, at - low) for at in (far + 1, far + 2, 2 * far)):
        return low
    raise CheckpointError("its attention sees in chunks or other patterns, not in a window; it has no form here")


def _sees(mask: Mask, query: int, key: int) -> bool:
    none = torch.tensor(0)
    return bool(mask.sees(none, none, torch.tensor(query), torch.tensor(key)))


@torch.no_grad()
def probe(model: nn.Module, layers: int) -> list[Seen]:
    """Run a model once and see what its layers hand to their attention.

    Args:
        model: of transformers, with our attention set.
        layers: how many its configuration says that it has.

    Raises:
        CheckpointError: it does not go through transformers' interfaces, or its attention has no form here.
    """
    look = _Look()
    tokens = torch.arange(_SEQUENCE)[None] % 7 + 1
    with under_way(look):
        try:
            model(**inputs_of(model, tokens, torch.arange(_SEQUENCE)[None], layers))
        except FOREIGN_FAULTS as error:
            raise told(error) from error
    if look.waiting or sorted(look.seen) != list(range(layers)):
        absent = sorted(set(range(layers)) - look.seen.keys())
        raise CheckpointError(
            f"its layers {absent[:4]} do not go through transformers' attention interface, so what they keep is "
            "unknown; it is recurrent, or its attention is the module's own"
        )
    return [look.seen[index] for index in range(layers)]


def told(error: Exception) -> CheckpointError:
    """What a model that wants another cache or another attention ran into, as one sentence."""
    why = " ".join(str(error).split())[:200]
    return CheckpointError(f"it does not follow transformers' cache and attention interfaces ({why})")
