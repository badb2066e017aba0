"""How much memory a bundle will take, told from its manifest before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_runtime.arguments import check_integer
from edgellm_runtime.bundle.manifest import TEXT_FILES, Manifest
from edgellm_runtime.errors import OptionError
from edgellm_runtime.state.storage import GROWTH

__all__ = ["MemoryNeed", "context_within_memory", "memory_need"]

_MOST = 2**31 - 1  # rows or tokens


@dataclass(frozen=True)
class MemoryNeed:
    """Predicted bytes of a model's weights and state.

    Scratch memory of a step, copies that kernels make of weights in an order of their own, and the libraries themselves
    come on top; ``edgellm bench`` measures those.

    Args:
        context: tokens that each row holds.
        rows: of the state.
        weights: bytes of the files with weights.
        state_per_token: bytes that a row's state grows by with each token.
        state_fixed: bytes of a row's state for any number of tokens; what an encoder makes, of the longest source.
        slots: for tokens, that are set aside in each row: somewhat more than the context.
    """

    context: int
    rows: int
    weights: int
    state_per_token: int
    state_fixed: int
    slots: int

    @property
    def state(self) -> int:
        """Bytes of the state."""
        return self.rows * (self.state_fixed + self.slots * self.state_per_token)

    @property
    def total(self) -> int:
        """Bytes of weights and state."""
        return self.weights + self.state

    def __str__(self) -> str:
        return (
            f"{self.total:,} bytes: weights {self.weights:,}, state {self.state:,} for {self.rows} x {self.context:,} "
            f"tokens ({self.state_per_token:,} a token, {self.state_fixed:,} fixed)"
        )


def memory_need(manifest: Manifest, device: str, context: int | None = None, rows: int = 1) -> MemoryNeed:
    """What a bundle will take.

    Args:
        manifest: the bundle's.
        device: where it will run.
        context: tokens in each row; None: as many as the model's context holds.
        rows: of the state.

    Raises:
        OptionError: a context that is longer than the model's, or no row.
    """
    context = manifest.max_context if context is None else check_integer("context", context, 1, manifest.max_context)
    rows = check_integer("rows", rows, 1, _MOST)
    longest = None if manifest.encoder is None else manifest.encoder.max_source
    specs = [spec.of_source(longest) for spec in manifest.signature.state]
    # what a step cannot write where it reads is there twice
    bytes_of = {slots: sum(s.nbytes(1, slots) * (1 if s.in_place else 2) for s in specs) for slots in (1, 2)}
    per_token = bytes_of[2] - bytes_of[1]
    engines = manifest.engine_files
    files = engines if device == "tensorrt" and engines else manifest.files.keys() - engines - set(TEXT_FILES)
    slots = manifest.capacity or -(-context // GROWTH) * GROWTH
    weights = sum(manifest.files[name].bytes for name in files)
    return MemoryNeed(context, rows, weights, per_token, bytes_of[1] - per_token, slots)


def context_within_memory(manifest: Manifest, device: str, most: int, *, shrinks: bool) -> int:
    """The longest context with which a bundle takes no more than so many bytes.

    Args:
        manifest: the bundle's.
        device: where it will run.
        most: bytes, of weights and of one row's state.
        shrinks: whether less than the model's own context will do.

    Raises:
        OptionError: there is none, or a shorter one will not do.
    """
    whole = memory_need(manifest, device)
    if whole.total <= most:
        return manifest.max_context
    low, high = 0, manifest.max_context - 1
    while low < high:  # the greatest that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if memory_need(manifest, device, middle).total <= most else (low, middle - 1)
    if low and shrinks:
        return low
    fitting = f"; a context of {low:,} tokens fits: shrink_context=True takes that" if low else ""
    raise OptionError(
        f"max_memory is {most}, but {manifest.name} takes {whole}{fitting}; give it more, or export it with smaller "
        "weights or a shorter context"
    )
