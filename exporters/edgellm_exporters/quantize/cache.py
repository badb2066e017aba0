"""The key/value cache in 8 bits: one scale for each feature of each head, found on real text.

Keys are cached after their rotation, so what is seen in the state is what will be stored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from edgellm.models.protocol import LanguageModel, Step, empty_state
from edgellm.ops.schema import views
from edgellm_exporters.errors import QuantizeError

__all__ = ["cache_scales", "cached_states", "narrow_caches"]

_HEADROOM = 1.25  # what the text did not show: larger values are cut off
_CODES = 127


def cached_states(graph: ir.Model) -> list[str]:
    """Names of the states that attention keeps keys and values in."""
    values = [value for view in views(graph.graph) for value in view.all(view.op.caches)]
    return [str(v.name).removeprefix("past.") for v in values if v is not None and v.is_graph_input()]


@torch.no_grad()
def cache_scales(
    model: LanguageModel, names: Sequence[str], rows: Sequence[Sequence[int]]
) -> Mapping[str, NDArray[np.float32]]:
    """The scale of each feature of each head.

    Args:
        model: in eval mode; able to run.
        names: of its states (batch, heads, capacity, head_dim).
        rows: token ids of one length, each read from an empty state.

    Returns:
        By state name, (heads * head_dim,).

    Raises:
        QuantizeError: there is no cache, or it holds something that is not finite.
    """
    if not names:
        raise QuantizeError("the model keeps no keys and values; leave the cache's precision out")
    tokens = torch.tensor([list(row) for row in rows])
    state: Mapping[str, Any] = empty_state(model, *tokens.shape)
    last = Step.whole(tokens)._replace(logit_positions=torch.full((len(tokens), 1), tokens.shape[1] - 1))
    _, state = model(tokens, state, last)
    found: dict[str, NDArray[np.float32]] = {}
    for name in names:
        largest = state[name].float().abs().amax(dim=(0, 2)).reshape(-1).numpy()  # (heads * head_dim,)
        if not np.isfinite(largest).all():
            raise QuantizeError(f"{name}: real text gives NaN or infinite keys or values; check the checkpoint")
        found[name] = np.maximum(largest * _HEADROOM / _CODES, 1e-8).astype(np.float32)
    return found


def narrow_caches(graph: ir.Model, names: Collection[str]) -> None:
    """Declare those states of a lowered graph as 8-bit integers. In place."""
    ends = {f"past.{name}" for name in names} | {f"present.{name}" for name in names}
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        if value.name in ends:
            value.type = ir.TensorType(ir.DataType.INT8)
