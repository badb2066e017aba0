"""A drafter put into a bundle: its graph beside the model's, with goldens of its own."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellm.draft_head import DraftHead
from edgellm_exporters.errors import ExportError, ParityError
from edgellm_exporters.graph.capture_drafter import capture_drafter
from edgellm_exporters.graph.lower import lower_to, prepare
from edgellm_exporters.graph.targets import Target
from edgellm_exporters.graph.write import Progress, write_graphs
from edgellm_exporters.proof.traces import Trace
from edgellm_exporters.quantize.methods import fitted
from edgellm_exporters.quantize.plan import Plan, Scheme
from edgellm_exporters.quantize.planning import Uses
from edgellm_exporters.quantize.rtn import round_to_nearest
from edgellm_runtime.backends.draft_graph import DraftGraph
from edgellm_runtime.bundle import Bundle, Manifest
from edgellm_runtime.bundle.draft_info import DRAFTER, LOOSEST, DraftInfo
from edgellm_runtime.checks.draft import DRAFTED, draft_difference, draft_goldens
from edgellm_runtime.checks.goldens import GOLDENS
from edgellm_runtime.checks.verify import MARGIN

__all__ = ["check_drafter", "write_drafter"]

_TARGETS = ("cpu", "onnx")
_WEIGHTS = "drafter.onnx.data"
_PLACES, _AHEAD, _READ = 4, 4, 3  # of the goldens: where drafts begin, how long they are, and tokens read at once
_FLOOR = {False: 1e-3, True: 0.05}  # of the bound, by whether weights are rounded
_SCHEME = Scheme(4, 32, symmetric=False)  # a draft is read token by token, and takes the time that its bytes take


def check_drafter(head: DraftHead, target: str, vocab_size: int, *, hidden: bool) -> None:
    """See that a drafter can go into a bundle, before any work.

    Raises:
        ExportError: it cannot.
    """
    if target not in _TARGETS:
        raise ExportError(f"target {target} has no form of drafters yet; {' and '.join(_TARGETS)} have one")
    if head.config.vocab_size != vocab_size:
        raise ExportError(
            f"the drafter was trained for {head.config.vocab_size} tokens, and the model has {vocab_size}; train one "
            "for this model"
        )
    if not hidden:
        raise ExportError("a drafter reads hidden states; export with --hidden too")


def write_drafter(
    head: DraftHead, target: Target, directory: Path, manifest: Manifest, trace: Trace, progress: Progress, *,
    rounds: bool, write_manifest: Callable[[Path, Manifest], Manifest],
) -> Manifest:  # fmt: skip
    """Write a drafter's graph and its goldens into a bundle, and prove it.

    Args:
        head: in eval mode.
        target: the bundle's.
        directory: of the bundle, whose goldens are written.
        manifest: of it.
        trace: of a row of the model, with hidden states.
        progress: told what is written.
        rounds: whether its weights are rounded to 4 bits.
        write_manifest: writes one and gives it with the files' checksums.

    Returns:
        The manifest with the drafter.

    Raises:
        ExportError: it was trained for hidden states of another size.
        ParityError: the graph does not propose what PyTorch does.
    """
    assert trace.hidden is not None
    if (features := trace.hidden.shape[-1]) != head.config.features:
        raise ExportError(
            f"the drafter reads {head.config.features} features, and the model gives {features}; train one for it"
        )
    captured = prepare(capture_drafter(head), target)
    graph = lower_to(captured, target, _plan(Uses(captured)) if rounds else Plan())
    write_graphs({DRAFTER: graph}, directory, progress, weights=_WEIGHTS)
    goldens = json.loads((directory / GOLDENS).read_text(encoding="utf-8"))
    goldens[DRAFTED] = _goldens(_rounded(head) if rounds else head, trace)
    (directory / GOLDENS).write_text(json.dumps(goldens, allow_nan=False), encoding="utf-8")
    files = {name: info for name, info in manifest.files.items() if name != GOLDENS}
    info = DraftInfo(DRAFTER, head.config.state, LOOSEST)
    manifest = write_manifest(directory, dataclasses.replace(manifest, files=files, drafter=info))
    found = max(
        draft_difference(
            DraftGraph(directory / DRAFTER, features, head.config.state, threads=threads),
            draft_goldens(Bundle(directory, checksums=False)),
        )
        for threads in (1, 2)
    )
    bound = max(MARGIN * found, _FLOOR[rounds])
    if not bound <= LOOSEST:
        raise ParityError(f"the drafter's graph is {found:.3g} from PyTorch's drafter; report this, or leave it out")
    return write_manifest(directory, dataclasses.replace(manifest, drafter=dataclasses.replace(info, bound=bound)))


def _plan(uses: Uses) -> Plan:
    """Few bits for each matrix that blocks fit."""
    found = {name: fitted(_SCHEME, columns) for name, (_, columns) in uses.shapes.items()}
    schemes = {name: scheme for name, scheme in found.items() if scheme is not None}
    return Plan(schemes, lambda _, weight, scheme: round_to_nearest(weight, scheme), by_rows=frozenset(schemes))


@torch.no_grad()
def _rounded(head: DraftHead) -> DraftHead:
    """The same head with the numbers that its matrices have in the graph."""
    found = copy.deepcopy(head)
    for parameter in found.parameters():
        if parameter.ndim == 2 and (scheme := fitted(_SCHEME, parameter.shape[1])) is not None:
            rounded = round_to_nearest(parameter.numpy(), scheme).dequantize()
            parameter.copy_(torch.from_numpy(rounded))
    return found


@torch.no_grad()
def _goldens(head: DraftHead, trace: Trace) -> list[dict[str, Any]]:
    """What PyTorch drafts behind some places of a row, several of them read at once; at every second from a state."""
    assert trace.hidden is not None
    found = []
    for place, at in enumerate(np.linspace(0, len(trace.tokens) - 1 - _READ, _PLACES).astype(int).tolist()):
        state, first, past = torch.zeros(1, head.config.state), torch.ones(1, 1), dict[str, Any]()
        if place % 2:
            *_, state = head(*_told(trace, max(at - _READ, 0), at), first, state)
            past = {"past": state[0].tolist()}
        hidden, token = _told(trace, at, at + 1 + place % _READ)
        given, told = hidden[0].tolist(), token[0].tolist()
        drafted, chances = [], []
        for _ in range(_AHEAD):
            following, chance, state = head(hidden, token, first, state)
            hidden, token, first = hidden[:, -1:], following[:, None], torch.zeros(1, 1)
            drafted.append(int(following))
            chances.append(float(chance))
        found.append({"hidden": given, "token": told, "next": drafted, "chance": chances} | past)
    return found


def _told(trace: Trace, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Hidden states (1, places, features), and the tokens (1, places) after them."""
    assert trace.hidden is not None
    return trace.hidden[begin:end].float()[None], torch.tensor([trace.tokens[begin + 1 : end + 1]])
