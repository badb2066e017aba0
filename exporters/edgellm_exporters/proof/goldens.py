"""Goldens: what PyTorch computes for a few rows of tokens, sampled small enough to travel in the bundle."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgellm_exporters.proof.far_row import FarRow
from edgellm_exporters.proof.traces import Continuation, Trace, check_finite
from edgellm_runtime.checks.far import FAR, FLOAT_INPUTS
from edgellm_runtime.checks.goldens import Golden, parse_golden
from edgellm_runtime.checks.layers import LAYERS, sampled_layer
from edgellm_runtime.checks.meaning import MEANING
from edgellm_runtime.checks.verify import ADAPTERS, GOLDENS
from edgellm_runtime.json_text import finite
from edgellm_runtime.spec import HIDDEN

__all__ = ["GREEDY", "golden_of", "write_goldens"]

GREEDY = 16  # tokens that PyTorch says after a row
_TOP, _STATE_SAMPLES = 8, 16


def write_goldens(
    traces: Sequence[Trace], said: Sequence[Continuation], directory: Path, exact: Sequence[Trace] = (),
    meaning: Mapping[str, Any] | None = None, layers: Collection[str] = (), far: FarRow | None = None,
    adapters: Mapping[str, Sequence[Trace]] | None = None, *, hidden: bool = False,
) -> None:  # fmt: skip
    """Write samples of what PyTorch computed.

    Args:
        traces: of rows of at least two tokens.
        said: what PyTorch says after each.
        directory: of the bundle.
        exact: of PyTorch with the bundle's own numbers, where there are such.
        layers: paths of those whose outputs the bundle's graph names; samples are of the first row.
        far: a row that begins far into the context.
        adapters: traces of rows with each adapter, by its name.
        meaning: of the bundle's tokens and texts, as its loader has it.
        hidden: whether the bundle gives hidden states.
    """
    sampled = [_sampled(trace, after, hidden=hidden) for trace, after in zip(traces, said, strict=True)]
    same = {"exact": [_sampled(trace, Continuation((), 1.0), hidden=hidden) for trace in exact]} if exact else {}
    told = {MEANING: finite(meaning)} if meaning is not None else {}
    data: dict[str, Any] = {"format": 1, "traces": sampled, **same, **told, **_layers((exact or traces)[0], layers)}
    if adapters:
        none = Continuation((), 1.0)
        data[ADAPTERS] = {name: [_sampled(trace, none) for trace in made] for name, made in adapters.items()}
    if far is not None:
        sampled_far = _sampled(far.trace, Continuation((), 1.0))
        del sampled_far["greedy"]
        floats = {FLOAT_INPUTS: True} if far.float_inputs else {}
        data[FAR] = {"past": far.start.past, "scales": dict(far.start.scales), **floats, **sampled_far}
    (directory / GOLDENS).write_text(json.dumps(data, allow_nan=False))


def golden_of(trace: Trace) -> Golden:
    """The golden that a row's trace becomes, as the runtime reads it."""
    sampled = _sampled(trace, Continuation((), 1.0), hidden=trace.hidden is not None)
    return parse_golden(sampled, trace.logits.shape[-1], trace.source is not None)


def _sampled(trace: Trace, after: Continuation, *, hidden: bool = False) -> dict[str, Any]:
    check_finite(trace.logits.float().numpy(), 0)
    tops = [row.double().topk(min(_TOP, len(row))) for row in trace.logits]  # row by row: a vocabulary is long
    generator = np.random.default_rng(0)
    samples = {}
    for name, tensor in trace.state.items():
        flat = tensor.reshape(-1).double()
        index = np.sort(generator.choice(len(flat), size=min(_STATE_SAMPLES, len(flat)), replace=False))
        samples[name] = {"index": index.tolist(), "values": flat[torch.from_numpy(index)].tolist()}
    return {
        **({} if trace.source is None else {"source": trace.source}),
        "tokens": trace.tokens,
        "top_ids": [top.indices.tolist() for top in tops],
        "top_logits": [top.values.tolist() for top in tops],
        "logsumexp": [float(row.double().logsumexp(-1)) for row in trace.logits],
        "greedy": list(after.tokens),
        "state": samples,
        **({HIDDEN: _layer_samples(trace.hidden)} if hidden and trace.hidden is not None else {}),
    }


def _layers(trace: Trace, paths: Collection[str]) -> dict[str, Any]:
    """Samples of what each layer gave for one row."""
    if not paths:
        return {}
    found = {}
    for path in paths:
        found[path] = _layer_samples(trace.layers[path])
    return {LAYERS: {"tokens": trace.tokens, "layers": found}}


def _layer_samples(output: torch.Tensor) -> dict[str, Any]:
    golden = sampled_layer(output.float().numpy())
    return {
        "norms": [float(f"{x:.7g}") for x in golden.norms], "index": golden.index.tolist(),
        "values": golden.values.tolist(),
    }  # fmt: skip
