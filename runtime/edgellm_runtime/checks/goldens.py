"""The goldens of a bundle: what PyTorch computed for a few rows of tokens, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.bundle import MANIFEST, Bundle
from edgellm_runtime.bundle.limits import limit_of, read_json
from edgellm_runtime.checks.layers import LayerGolden, layer_goldens
from edgellm_runtime.errors import BundleError, first_line
from edgellm_runtime.spec import HIDDEN

__all__ = ["ADAPTERS", "EXACT", "GOLDENS", "Golden", "goldens_file", "parse_golden", "read_goldens"]

GOLDENS = "goldens.json"
ADAPTERS = "adapters"  # goldens of each adapter, by its name
EXACT = "exact"  # goldens of the same numbers, beside the float model's
_MAX_TRACES = 256
_MAX_TOKENS = 1 << 12  # of a golden; an export writes fewer than 100
Array = NDArray[Any]


@dataclass(frozen=True)
class Golden:
    """What PyTorch computed for one row of tokens; every array is a sample, the largest logits first."""

    tokens: Array  # (time,)
    top_ids: Array  # (time, k)
    top_logits: Array  # (time, k)
    logsumexp: Array  # (time,)
    greedy: Array  # (new,): what PyTorch says next
    state: Mapping[str, tuple[Array, Array]]  # flat indices into the row's state (slots in use), and the values there
    source: Array | None = None  # (source tokens,): what the row answers; None: it goes on with nothing
    hidden: LayerGolden | None = None  # samples of the last hidden states; None: the bundle gives none

    @property
    def sources(self) -> list[Array] | None:
        """As a session's new state takes them."""
        return None if self.source is None else [self.source]


def goldens_file(bundle: Bundle) -> dict[str, Any]:
    """What the file of goldens holds, of which nothing is believed yet.

    Raises:
        BundleError: there is none, or it is no JSON.
    """
    file = bundle.file(GOLDENS)
    try:
        return dict(read_json(file, limit_of(GOLDENS)))
    except (ValueError, TypeError) as error:
        raise BundleError(f"{file}: not goldens of this model ({first_line(error)}); export the model again") from error


def read_goldens(bundle: Bundle, key: str = "traces", adapter: str | None = None) -> list[Golden]:
    """The goldens of a bundle, checked against its signature.

    Args:
        bundle: that has them.
        key: ``traces``, the float model's, :data:`EXACT` or :data:`ADAPTERS`.
        adapter: of the last, whose.

    Raises:
        BundleError: there are none, or they do not fit the signature.
    """
    file = bundle.file(GOLDENS)
    vocab = int(bundle.manifest.signature.outputs[0].shape[-1])
    try:
        traces = read_json(file, limit_of(GOLDENS))[key]
        traces = traces if adapter is None else traces[adapter]
        if len(traces) > _MAX_TRACES:
            raise ValueError(f"{len(traces)} rows, of at most {_MAX_TRACES}")
        goldens = [parse_golden(trace, vocab, bundle.manifest.encoder is not None) for trace in traces]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise BundleError(f"{file}: not goldens of this model ({first_line(error)}); export the model again") from error
    if not goldens:
        raise BundleError(f"{file}: holds no trace; export the model again")
    if (longest := max(len(g.tokens) + len(g.greedy) for g in goldens)) > bundle.manifest.max_context:
        raise BundleError(
            f"{file}: a row of {longest} tokens, of which {MANIFEST} says that {bundle.manifest.max_context} fit; "
            "export the model again"
        )
    return goldens


def parse_golden(trace: Any, vocab: int, sourced: bool = False) -> Golden:
    """One golden as a file has it.

    Raises:
        ValueError: it is none of a model with so many logits.
    """

    def array(value: Any, dtype: type, dims: int) -> Array:
        made: Array = np.asarray(value, dtype=dtype)
        if made.ndim != dims or not np.isfinite(made).all():
            raise ValueError(f"an array of {made.ndim} axes instead of {dims}, or not finite")
        return made

    tokens, ids = array(trace["tokens"], np.int64, 1), array(trace["top_ids"], np.int64, 2)
    logits, sums = array(trace["top_logits"], np.float64, 2), array(trace["logsumexp"], np.float64, 1)
    if (length := max(len(tokens), len(trace["greedy"]))) > _MAX_TOKENS:
        raise ValueError(f"a row of {length} tokens, of at most {_MAX_TOKENS}")
    if not (len(tokens) == len(ids) == len(logits) == len(sums) > 1) or ids.shape != logits.shape:
        raise ValueError("arrays of unequal length")
    if not logits.any():
        raise ValueError("all logits are 0")
    if ids.min() < 0 or ids.max() >= vocab:
        raise ValueError(f"token ids outside the vocabulary of {vocab}")
    state = {
        str(name): (array(s["index"], np.int64, 1), array(s["values"], np.float64, 1))
        for name, s in trace["state"].items()
    }
    if any(len(index) != len(values) for index, values in state.values()):
        raise ValueError("state samples of unequal length")
    source = None if trace.get("source") is None else array(trace["source"], np.int64, 1)
    if (source is not None) != sourced or (source is not None and not 0 < len(source) <= _MAX_TOKENS):
        raise ValueError("a row with a source where the model has no encoder, the other way round, or one too long")
    hidden = layer_goldens({HIDDEN: trace[HIDDEN]})[HIDDEN] if HIDDEN in trace else None
    return Golden(tokens, ids, logits, sums, array(trace["greedy"], np.int64, 1), state, source, hidden)
