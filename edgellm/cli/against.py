"""The checkpoint that ``--against`` names: read, and seen to be one that the bundle can be compared with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgellm_runtime.session import Session

__all__ = ["read_reference"]


def read_reference(checkpoint: Path, bundle: Path, session: Session, longest: int) -> Any:
    """The checkpoint's model.

    Args:
        checkpoint: its path.
        bundle: the path of what it is compared with, for messages.
        session: of the bundle.
        longest: tokens of the longest row that both are to read.

    Raises:
        OptionError: it has another vocabulary, other outputs, another state, or a shorter context than the comparison
            needs.
    """
    from edgellm.cli.checkpoints import read_checkpoint
    from edgellm_exporters.proof.torch_backend import torch_session
    from edgellm_runtime import OptionError
    from edgellm_runtime.spec import ADAPTER

    model: Any = read_checkpoint(checkpoint, in_memory=True).model  # torch_session checks what it follows
    own = torch_session(model)
    for what, here, there in (
        ("a vocabulary", own.vocab_size, session.vocab_size), ("logits", own.width, session.width),
    ):  # fmt: skip
        if here != there:
            raise OptionError(
                f"{checkpoint}: has {what} of {here}, and {bundle} has one of {there}; compare a bundle with the "
                "checkpoint that it was exported from, or one of the same vocabulary"
            )
    shapes, of_bundle = (
        {spec.name: spec.shape for spec in found.signature.state if spec.name != ADAPTER} for found in (own, session)
    )  # a checkpoint may have merged what the bundle switches
    if shapes != of_bundle:
        raise OptionError(
            f"{checkpoint}: carries another state than {bundle}, so it is another model; compare a bundle with the "
            "checkpoint that it was exported from, or one of the same shape"
        )
    if own.max_context < longest:
        raise OptionError(
            f"{checkpoint}: takes {own.max_context} tokens, and the comparison has rows of {longest}; give a smaller "
            "--window, or another checkpoint"
        )
    return model
