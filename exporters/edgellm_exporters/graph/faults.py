"""What is wrong with a model that cannot be traced as one graph: one sentence, with what to change in it."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from edgellm_exporters.errors import CaptureError

__all__ = [
    "check_keeps_nothing",
    "is_about_sizes",
    "kept_tensors",
    "let_interrupt_through",
    "quiet",
    "reason",
    "writes_to",
]

_SIZES, _VALUES = ("specialized it to be a constant", "Constraints violated"), ("data-dependent", "unbacked")


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back PyTorch's chatter about torchvision, deprecations and what an error will say anyway."""
    log = logging.getLogger("torch")  # whose level those of its parts that matter here follow
    level, printed = log.level, io.StringIO()
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(printed):
            warnings.simplefilter("ignore")
            yield
    except BaseException:
        printed = io.StringIO()  # the graph up to the line that failed
        raise
    finally:
        log.setLevel(level)
        sys.stderr.write(printed.getvalue())  # what the model's own forward had to say


def let_interrupt_through(error: BaseException | None) -> None:
    """Ctrl-C that falls into PyTorch's C++ comes out as an error of another kind, with its name in the text."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or "KeyboardInterrupt" in str(error):
            raise KeyboardInterrupt from error
        error = error.__cause__ or error.__context__


def is_about_sizes(error: BaseException) -> bool:
    """Whether tracing failed because a size that should be free was not."""
    said = str(error)
    return any(sign in said for sign in _SIZES) and not any(sign in said for sign in _VALUES)


def reason(ran: Collection[tuple[str, nn.Module]], error: Exception) -> str:
    """What to change in the model; PyTorch's own words follow, for they name the line or the dimension.

    Args:
        ran: PyTorch's own recurrent modules that the forward called, with their names.
        error: what :func:`torch.export.export` raised.
    """
    said = " ".join(str(error).split())
    if any(sign in said for sign in _VALUES):
        return f"the forward branches on a tensor's value{_branch(said)}; compute both sides, choose with torch.where"
    if not is_about_sizes(error):
        return said[:400]
    for name, module in ran:
        kind = type(module).__name__
        op = {"LSTM": "lstm", "GRU": "gru"}.get(kind.removesuffix("Cell"), "elman")
        return (
            f"{name} is an nn.{kind}, which PyTorch unrolls over the example's tokens; call edgellm.ops.{op} with "
            "its weights as RecurrentWeights and step.lengths instead"
        )
    advice = "the forward fixes a size that must stay free; loop over no tokens, take sizes from x.shape without int()"
    return f"{advice} ({said[:300]})"


def _branch(said: str) -> str:
    """The comparison that decides, and the line it stands on, as far as PyTorch tells them."""
    where = re.search(r"Caused by: \((?:.*/)?([^/()]+\.py:\d+) in ([a-z]\w*)\)", said)
    return f" at {where[1]} in {where[2]}, as by .item() or if" if where else ", as by .item() or if"


Kept = dict[tuple[str, str], torch.Tensor | None]


def kept_tensors(model: nn.Module) -> Kept:
    """The tensors that modules hold besides their parameters, by module and attribute."""
    found: Kept = {}
    for path, module in model.named_modules():
        plain = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
        found |= {(path, name): value for name, value in {**module._buffers, **plain}.items()}
    return found


def check_keeps_nothing(model: nn.Module, before: Kept) -> None:
    """Make sure that a forward put no tensor on a module.

    Args:
        model: after its forward; what it put there is taken off again.
        before: its :func:`kept_tensors` before.

    Raises:
        CaptureError: it did: the next step would read it, and a graph has nowhere to keep it.
    """
    after = kept_tensors(model)
    changed = [key for key in after if key not in before or after[key] is not before[key]]
    for path, name in changed:
        setattr(model.get_submodule(path), name, before.get((path, name)))
    if changed:
        raise writes_to(".".join(filter(None, changed[0])))


def writes_to(name: str) -> CaptureError:
    """An error for a forward that changes a tensor of a module."""
    return CaptureError(
        f"the forward writes to {name}, but a graph keeps nothing on a module from step to step; declare it in "
        "state_specs(), take it from the state and give the new one back, or compute it in __init__"
    )
