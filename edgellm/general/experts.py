"""Transformers' mixtures of experts, which hold all experts' matrices in one tensor, as one module for each expert.

Its interface for other forms of them tells how the tensors are laid out; what stands between an expert's two matrices
is recognised by numbers. So are modules that follow no interface and read a block of rows for each expert, zeros where
a token has not chosen it. A layer of its own is quantized, calibrated and skipped like any other.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgellm.general.recognise import put
from edgellm.general.stored import Converted
from edgellm.models.layers.experts import mixture
from edgellm.ops.activations import ACTIVATIONS
from edgellm.ops.expert import between

__all__ = ["Apart", "Mixture", "Part", "replace_experts"]

_CLOSE = 1e-5
_WIDE = 6.0  # of numbers that a gate is tried on: some are beyond the limits that gates have
_KEPT = 2  # stacked tensors that are held while experts are read out of them: the first matrices and the last


@dataclass(frozen=True)
class Part:
    """Where one expert's parameter is.

    Args:
        stored: the tensor of all experts.
        number: the expert.
        turned: whether its matrix is stored by columns.
        woven: whether rows of the gate and of what it multiplies take turns; here the gate's come first.
    """

    stored: str
    number: int
    turned: bool
    woven: bool

    def of(self, tensor: Tensor) -> Tensor:
        """The parameter, out of the expert's part of the stored tensor."""
        found = tensor.T if self.turned else tensor
        return torch.cat([found[0::2], found[1::2]]) if self.woven else found


class Expert(nn.Module):
    """Two matrices and what stands between; follows :class:`edgellm.models.layers.experts.Expert`.

    Args:
        form: the attributes of :data:`edgellm.ops.EXPERT`.
        tensors: its weights and biases by the names that they have here.
    """

    def __init__(self, form: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.form = dict(form)
        self.in_proj, self.out_proj = (
            _linear(tensors[f"{layer}.weight"], tensors.get(f"{layer}.bias")) for layer in ("in_proj", "out_proj")
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out_proj(between(self.in_proj(x), None, **self.form))
        return y

    def parts(self) -> dict[str, Any]:
        """See :class:`edgellm.models.layers.experts.Expert`."""
        up, down = self.in_proj, self.out_proj
        return {
            "up": up.weight, "down": down.weight, "up_bias": up.bias, "down_bias": down.bias, **self.form
        }  # fmt: skip


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    made = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


class Mixture(nn.ModuleList):
    """Experts, in the place of transformers' module."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the chosen experts make of each token, times their weights, summed.

        Args:
            hidden_states: (tokens, width).
            top_k_index: (tokens, chosen), the experts; their number stands for none.
            top_k_weights: (tokens, chosen).
        """
        shares = hidden_states.new_zeros(hidden_states.shape[0], len(self) + 1)
        shares = shares.scatter(-1, top_k_index, top_k_weights.to(shares.dtype))[None, :, :-1]
        return mixture(self, hidden_states[None], shares)[0]


class Blocks(nn.ModuleList):
    """Experts that read rows of their own, in the place of a module without transformers' interface for experts."""

    def forward(self, rows: Tensor) -> Tensor:
        """What each expert makes of its rows; nothing of rows of zeros, which are of tokens that have not chosen it.

        Args:
            rows: (experts * tokens, width).
        """
        blocks = rows.reshape(len(self), 1, -1, rows.shape[-1])  # (experts, 1, tokens, width)
        chosen = (blocks != 0).any(-1, keepdim=True).to(rows.dtype)
        made = [mixture([expert], x, share) for expert, x, share in zip(self, blocks, chosen, strict=True)]
        return torch.cat(made).reshape(rows.shape)


class Apart:
    """A source in which each expert's parameters are tensors of their own; follows :class:`TensorSource`.

    Args:
        base: the tensors of transformers' model.
        parts: where each such parameter is, by its name.
    """

    def __init__(self, base: Converted, parts: Mapping[str, Part]) -> None:
        self._base, self._parts = base, parts
        self._held: dict[str, Tensor] = {}
        gone = {part.stored for part in parts.values()}
        self._shapes = {name: shape for name, shape in base.shapes.items() if name not in gone}
        for name, part in parts.items():
            if part.stored in base.shapes:
                shape = base.shapes[part.stored][1:]
                self._shapes[name] = shape[::-1] if part.turned else shape

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        return self._shapes

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor, or some of its rows."""
        part = self._parts.get(name)
        if part is None:
            return self._base.read(name, rows)
        found = part.of(self._one(part))
        return found if rows is None else found[rows[0] : rows[1]]

    def _one(self, part: Part) -> Tensor:
        """One expert's part of a stored tensor; one that has to be put together is not put together for each."""
        if self._base.stored_whole(part.stored):
            return self._base.read(part.stored, (part.number, part.number + 1))[0]
        if part.stored not in self._held:
            while len(self._held) >= _KEPT:
                self._held.pop(next(iter(self._held)))
            self._held[part.stored] = self._base.read(part.stored)
        return self._held[part.stored][part.number]

    def code_format(self, name: str) -> Any:
        """See :class:`edgellm.codes.CodedWeights`; none of experts."""
        return None if name in self._parts else self._base.code_format(name)

    def codes(self, name: str) -> Any:
        """See :class:`edgellm.codes.CodedWeights`."""
        return self._base.codes(name)


@torch.no_grad()
def replace_experts(model: nn.Module) -> tuple[dict[str, Part], list[str]]:
    """Put a :class:`Mixture` in the place of every module of experts whose form is known.

    Args:
        model: of transformers; its parameters may be on the meta device.

    Returns:
        Where the new parameters are, by their names; and the modules that stay as they are.
    """
    places: dict[str, Part] = {}
    left: list[str] = []
    every = list(model.named_modules(remove_duplicate=False))
    twice = {id(m) for (_, m), (_, other) in itertools.combinations(
        [(n, m) for n, m in every if _is_stacked(m)], 2) if m is other}  # fmt: skip
    for name, module in every:
        blocks = None if _is_stacked(module) else _as_blocks(module)
        if not (blocks or _is_stacked(module)):
            continue
        form = blocks.form if blocks else None if id(module) in twice else _form(module)
        if form is None:
            left.append(name)
            continue
        experts = []
        for number in range(blocks.count if blocks else int(module.num_experts)):
            own = blocks.parts(name, number) if blocks else dict(_parts(name, module, number))
            places |= {f"{name}.{number}.{parameter}": part for parameter, part in own.items()}
            tensors = {p: _one(model.get_parameter(part.stored), part) for p, part in own.items()}
            experts.append(Expert(form, tensors))
        put(model, name, Blocks(experts) if blocks else Mixture(experts))
    return places, left


def _one(stored: nn.Parameter, part: Part) -> Tensor:
    """One expert's parameter; without numbers where they are read later."""
    if not stored.is_meta:
        return part.of(stored[part.number])
    shape = stored.shape[1:]
    return torch.empty(tuple(reversed(shape)) if part.turned else tuple(shape), device="meta")


def _is_stacked(module: Any) -> bool:
    """Whether a module is of transformers' interface for experts."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed") and hasattr(module, "down_proj")


def _parts(path: str, module: Any, number: int) -> Iterator[tuple[str, Part]]:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    woven = module.has_gate and not module.is_concatenated
    for layer, stored, weaves in (("in_proj", first, woven), ("out_proj", "down_proj", False)):
        yield f"{layer}.weight", Part(f"{path}.{stored}", number, bool(module.is_transposed), weaves)
        if module.has_bias:
            yield f"{layer}.bias", Part(f"{path}.{stored}_bias", number, False, weaves)


def _form(module: Any) -> dict[str, Any] | None:
    """The attributes of :data:`edgellm.ops.EXPERT` that say what a module does between its matrices, or None."""
    if module.has_post_expert_norm or module._is_expert_parallel:
        return None
    generator = torch.Generator().manual_seed(0)
    first = module.gate_up_proj if module.has_gate else module.up_proj
    features = first.shape[2 if module.is_transposed else 1]
    z = torch.randn(16, features, generator=generator) * _WIDE
    try:
        wanted = module._apply_gate(z) if module.has_gate else module.act_fn(z)
    except Exception:  # of what needs more than the product
        return None
    if module.has_gate and not module.is_concatenated:
        z = torch.cat([z[:, 0::2], z[:, 1::2]], dim=-1)
    return next((form for form in _forms(module) if _close(between(z, None, **form), wanted)), None)


def _forms(module: Any) -> Iterator[dict[str, Any]]:
    """What may stand between; the numbers of a form are among those that the module holds."""
    plain = {"packed": bool(module.has_gate), "slope": 1.0, "offset": 0.0, "limit": 0.0}
    yield from ({"activation": name, **plain} for name in ACTIVATIONS)
    if not module.has_gate:
        return
    held = sorted({float(v) for v in vars(module).values() if isinstance(v, float | int) and v > 0})
    for slope, offset, limit in itertools.product([1.0, *held], [0.0, 1.0], [0.0, *held]):
        yield {"activation": "silu", "packed": True, "slope": slope, "offset": offset, "limit": limit}


@dataclass(frozen=True)
class _Stack:
    """Two tensors of all experts' matrices, and what stands between.

    Args:
        count: of experts.
        first: the name of the tensor of their first matrices.
        last: of the last ones.
        turned: whether matrices are stored by columns.
        form: the attributes of :data:`edgellm.ops.EXPERT`.
    """

    count: int
    first: str
    last: str
    turned: bool
    form: dict[str, Any]

    def parts(self, path: str, number: int) -> dict[str, Part]:
        """Where one expert's parameters are."""
        names = {"in_proj": self.first, "out_proj": self.last}
        return {f"{layer}.weight": Part(f"{path}.{n}", number, self.turned, False) for layer, n in names.items()}


def _as_blocks(module: nn.Module) -> _Stack | None:
    """The tensors of a module that reads a block of rows for each expert, tried on small numbers; None for others."""
    own = dict(module.named_parameters(recurse=False))
    if len(own) != 2 or len(list(module.parameters())) != 2 or any(p.dim() != 3 for p in own.values()):
        return None
    for (first, last), turned in itertools.product((tuple(own), tuple(own)[::-1]), (True, False)):
        (count, *up), (other, *down) = own[first].shape, own[last].shape
        (width, inner), (hidden, out) = (up, down) if turned else (up[::-1], down[::-1])
        if count == other and width == out and inner in (hidden, 2 * hidden):
            tried = _tried(module, first, last, width, turned=turned, packed=inner != hidden)
            if tried is not None:
                return _Stack(count, first, last, turned, tried)
    return None


def _tried(
    module: nn.Module, first: str, last: str, width: int, *, turned: bool, packed: bool
) -> dict[str, Any] | None:
    """The form of an expert with which a module of two small experts computes what it does, or None."""
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(2, 10 if packed else 5, width, generator=generator) / width**0.5
    down = torch.randn(2, width, 5, generator=generator)
    rows = torch.randn(6, width, generator=generator) * _WIDE
    small: Any = copy.copy(module)  # without its hooks, which give it its own weights
    small._forward_pre_hooks, small._forward_hooks = OrderedDict(), OrderedDict()
    laid = {name: w.mT.contiguous() if turned else w for name, w in ((first, up), (last, down))}
    small._parameters = {name: nn.Parameter(w, requires_grad=False) for name, w in laid.items()}
    try:
        found, nothing = small(rows), small(torch.zeros_like(rows))
    except Exception:  # of whatever takes another input
        return None
    if not isinstance(found, Tensor) or found.shape != rows.shape or bool(nothing.any()):
        return None
    blocks = rows.view(2, 3, width)
    for name in ACTIVATIONS:
        form: dict[str, Any] = {"activation": name, "packed": packed, "slope": 1.0, "offset": 0.0, "limit": 0.0}
        if _close((between(blocks @ up.mT, None, **form) @ down.mT).reshape(rows.shape), found):
            return form
    return None


def _close(found: Tensor, wanted: Tensor) -> bool:
    largest = float(wanted.abs().max())
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=_CLOSE, atol=_CLOSE * largest)
