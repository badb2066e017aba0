"""What foreign modules compute, recognised by numbers: RMS norms, and tables of rotary positions.

A module that is recognised is replaced, in this one instance of the model, by one that says the same in canonical ops.
What is not recognised stays as it is: slower, and still right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Norm", "Rotation", "Tables", "find_rotations", "replace_norms"]

_CLOSE = 1e-5


class Norm(nn.Module):
    """An RMS norm over the last axis.

    Args:
        weight: the module's own parameter, under its own name.
        plus_one: whether the gain is 1 + weight.
        eps: added to the mean square.
    """

    def __init__(self, weight: nn.Parameter, plus_one: bool, eps: float) -> None:
        super().__init__()
        self.weight, self.plus_one, self.eps = weight, plus_one, eps

    def forward(self, x: Tensor) -> Tensor:
        gain = 1.0 + self.weight if self.plus_one else self.weight
        return F.rms_norm(x, x.shape[-1:], gain, self.eps)


@torch.no_grad()
def replace_norms(model: nn.Module) -> int:
    """Put a :class:`Norm` in the place of every module that is one; how many there were."""
    found = 0
    for name, module in list(model.named_modules()):
        norm = _as_norm(module)
        if norm is not None:
            put(model, name, norm)
            found += 1
    return found


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a submodule by name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _as_norm(module: nn.Module) -> Norm | None:
    own = dict(module.named_parameters(recurse=False))
    weight = own.get("weight")
    if list(own) != ["weight"] or weight is None or weight.dim() != 1 or list(module.children()):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, weight.shape[0], generator=generator)
    try:
        large, small = module(x), module(1e-3 * x)  # small inputs tell the epsilon
    except Exception:
        return None
    if not isinstance(large, Tensor) or large.shape != x.shape:
        return None
    stated = {float(value) for value in vars(module).values() if isinstance(value, float) and 0 < value < 1e-2}
    for eps in sorted(stated):
        for plus_one in (False, True):
            norm = Norm(weight, plus_one, eps)
            if all(torch.allclose(norm(a), b, rtol=_CLOSE, atol=_CLOSE) for a, b in ((x, large), (1e-3 * x, small))):
                return norm
    return None


@dataclass(frozen=True)
class Rotation:
    """One table of a rotary module.

    Args:
        name: the module's.
        key: what it was called with besides a tensor and positions.
        cos: (positions, width), an angle for each feature that turns or for each pair of them.
        sin: as ``cos``.
        sine_first: whether the module gives the sines before the cosines.
    """

    name: str
    key: tuple[Any, ...]
    cos: Tensor
    sin: Tensor
    sine_first: bool = False


class Tables(nn.Module):
    """In the place of a rotary module: its tables, looked up; or (1, 0), where attention rotates.

    Args:
        rotations: by what the module is called with besides a tensor and positions.
        theirs: the module, of which a model may read other things.
        idle: whether to give (1, 0).
    """

    def __init__(
        self, rotations: Mapping[tuple[Any, ...], Rotation], theirs: nn.Module | None = None, *, idle: bool = False
    ) -> None:
        super().__init__()
        self.__dict__["theirs"] = theirs  # not as a part of this one
        self.idle, self._index = idle, {key: i for i, key in enumerate(rotations)}
        self._sine_first = [rotation.sine_first for rotation in rotations.values()]
        for i, rotation in enumerate(rotations.values()):
            self.register_buffer(f"cos{i}", rotation.cos, persistent=False)
            self.register_buffer(f"sin{i}", rotation.sin, persistent=False)
            self.register_buffer(f"one{i}", torch.ones_like(rotation.cos[None, :1]), persistent=False)
            self.register_buffer(f"zero{i}", torch.zeros_like(rotation.sin[None, :1]), persistent=False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            theirs = self.__dict__.get("theirs")
            if theirs is None:
                raise
            return getattr(theirs, name)

    def forward(self, x: Tensor, position_ids: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """As the module's."""
        i = self._index[_key(rest, named)]
        if self.idle:
            cos, sin = getattr(self, f"one{i}"), getattr(self, f"zero{i}")
        else:
            cos, sin = getattr(self, f"cos{i}"), getattr(self, f"sin{i}")
            at = position_ids.clamp(max=cos.shape[0] - 1)  # padding may point past the table; its result is not used
            cos, sin = cos[at], sin[at]
        return (sin, cos) if self._sine_first[i] else (cos, sin)


def _key(rest: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*rest, *sorted(named.items()))


@torch.no_grad()
def find_rotations(model: nn.Module, run: Any, context: int) -> tuple[dict[str, dict[tuple[Any, ...], Rotation]], int]:
    """The rotary modules of a model, and the context that their tables hold for.

    A rotary module has no parameters and gives a pair of tensors (batch, time, head_dim) for a tensor and positions.
    Some change their angles with the length of the text; the context is then cut to where they do not.

    Args:
        model: of transformers.
        run: runs it once.
        context: the most positions.

    Returns:
        By module's name, its rotations by what it was called with besides; and the context.
    """
    calls: dict[str, dict[tuple[Any, ...], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]] = {}
    handles = []
    for name, module in model.named_modules():
        if name and not list(module.parameters()):
            handles.append(module.register_forward_hook(_recorder(name, calls), with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, dict[tuple[Any, ...], Rotation]] = {}
    for name, by_key in calls.items():
        for key, (module, rest, named) in by_key.items():
            cos, sin, context = _table(module, rest, named, context)
            swapped = not cos[0].any() and bool(sin[0].any())  # no angle at position 0: its cosine is not 0
            cos, sin = (sin, cos) if swapped else (cos, sin)
            found.setdefault(name, {})[key] = Rotation(name, key, cos, sin, swapped)
    return {
        name: {k: Rotation(name, k, r.cos[:context], r.sin[:context], r.sine_first) for k, r in by_key.items()}
        for name, by_key in found.items()
    }, context


def _recorder(name: str, calls: dict[str, Any]) -> Any:
    def record(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        named = dict(named)
        positions = args[1] if len(args) > 1 else named.pop("position_ids", None)
        pair = isinstance(out, tuple) and len(out) == 2 and all(isinstance(t, Tensor) and t.dim() == 3 for t in out)
        if not pair or not isinstance(positions, Tensor) or positions.dim() != 2 or not isinstance(args[0], Tensor):
            return
        if out[0].shape != out[1].shape or out[0].shape[1] != positions.shape[1]:
            return
        rest = args[2:]
        if all(isinstance(value, str | int | float | bool | None) for value in (*rest, *named.values())):
            calls.setdefault(name, {}).setdefault(_key(rest, named), (module, rest, named))

    return record


def _table(module: nn.Module, rest: tuple[Any, ...], named: dict[str, Any], context: int) -> tuple[Tensor, Tensor, int]:
    """The angles of every position, and for how many of them a short text has the same."""

    def read(count: int) -> tuple[Tensor, Tensor]:
        cos, sin = module(torch.zeros(1, count, 1), torch.arange(count)[None], *rest, **named)
        return cos[0].float(), sin[0].float()

    few = min(8, context)  # fewer than any family changes its angles at
    short = read(few)

    def same(count: int) -> bool:
        return all(torch.equal(a, b[:few]) for a, b in zip(short, read(count), strict=True))

    low, high = few, context + 1  # the longest text that leaves the angles as they are
    if same(context):
        low = context
    while low < context and high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if same(middle) else (low, middle)
    read(few)  # some remember the longest text that they have seen
    return *read(low), low
