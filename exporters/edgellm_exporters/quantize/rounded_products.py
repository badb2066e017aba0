"""Products and caches that round what they read as a target's kernels do, put into a model in PyTorch.

A layer is given a forward of its own, on a copy of the model; recurrences are computed token by token, since what they
read at one token was rounded at the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edgellm.ops import ATTENTION, GRU, LSTM, RNN, RecurrentWeights
from edgellm.ops.attention import attention_over
from edgellm.ops.recurrence import elman_reference, gru_reference, lstm_reference
from edgellm.ops.schema import computed_by
from edgellm_exporters.quantize.narrow_caches import NarrowCaches
from edgellm_exporters.quantize.plan import Scheme, widens

__all__ = [
    "ProductRounding", "round_blocks", "round_cache", "round_linear", "round_recurrence", "round_rows", "round_whole",
    "rounding_nothing",
]  # fmt: skip

_ROUNDS: ContextVar[bool] = ContextVar("rounds", default=True)


@dataclass(frozen=True)
class ProductRounding:
    """What a product with one weight does to what it reads.

    Args:
        scheme: the weight's.
        rounding: from an input, smoothed, to what the kernel makes of it; None for one that rounds nothing.
        column: what the weight's columns were multiplied with, (columns,).
        row: what its rows were multiplied with, (rows,).
        shifts: gives the shift of each of the weight's blocks, (rows, blocks), where they have such; they meet sums of
            the input's blocks, which are rounded on their own.
        noise: what is read passes it first.
    """

    scheme: Scheme
    rounding: Callable[[Tensor], Tensor] | None
    column: Tensor
    row: Tensor
    shifts: Callable[[], Tensor] | None = None
    noise: Callable[[Tensor], Tensor] = lambda x: x

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """X W^T + b, as the kernel has it."""
        if not _ROUNDS.get():
            return F.linear(x, weight, bias)
        x = self.noise(x)
        if self.rounding is None:
            return F.linear(x, weight, bias)
        smoothed = x / self.column
        rounded = self.rounding(smoothed)
        y = F.linear(rounded * self.column, weight, bias)
        if self.shifts is None:
            return y
        block = self.scheme.block
        sums, left = (t.reshape(*t.shape[:-1], -1, block).sum(-1) for t in (smoothed, rounded))  # (..., blocks)
        padded = F.pad(sums, (0, -sums.shape[-1] % block))
        kept = round_blocks(padded, block=block)[..., : sums.shape[-1]]
        return y + F.linear(kept - left, self.shifts()) / self.row


def round_linear(layer: nn.Linear, rounding: ProductRounding, met: set[str]) -> None:
    """Have a linear layer round what it reads; in place.

    Args:
        layer: of a class of its own, maybe, which computes more than the product: that is found where it asks
            PyTorch's class for it.
        rounding: of its weight.
        met: gets ``weight`` when it was multiplied with.
    """

    def forward(own: nn.Linear, input: Tensor) -> Tensor:
        met.add("weight")
        return rounding.product(input, own.weight, own.bias)

    own = type(layer)
    if own.forward is nn.Linear.forward:
        layer.forward = partial(forward, layer)  # type: ignore[method-assign]
    else:
        product = type("RoundedLinear", (nn.Linear,), {"forward": forward})
        layer.__class__ = type(own.__name__, (own, product), {})


@contextmanager
def rounding_nothing() -> Iterator[None]:
    """Meanwhile products round nothing of what they read, in layers and recurrences alike; caches round as before."""
    token = _ROUNDS.set(False)
    try:
        yield
    finally:
        _ROUNDS.reset(token)


def round_recurrence(module: nn.Module, roundings: Mapping[str, ProductRounding], met: set[str]) -> None:
    """Have the recurrences of a module round what they read, token by token; in place.

    Args:
        module: that owns their weights.
        roundings: by the module's own name of each weight.
        met: gets the names of those that were multiplied with.
    """
    forward = module.forward

    def rounding_of(weight: Tensor) -> ProductRounding | None:
        name = next((n for n in roundings if getattr(module, n) is weight), None)
        if name is None:
            return None
        met.add(name)
        return roundings[name]

    def products(w_ih: Tensor, w_hh: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        found = [rounding_of(weight) for weight in (w_ih, w_hh)]
        if widens(*((None if f is None else f.scheme, w.numel()) for f, w in zip(found, (w_ih, w_hh), strict=True))):
            return F.linear
        return lambda x, weight, bias: (
            F.linear(x, weight, bias)
            if (own := found[0] if weight is w_ih else found[1]) is None
            else own.product(x, weight, bias)
        )

    def rnn(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, lengths: Any = None, *,
            activation: str) -> Any:  # fmt: skip
        weights = RecurrentWeights(w_ih, w_hh, b_ih, b_hh)
        return elman_reference(x, h, weights, lengths, products(w_ih, w_hh), activation=activation)

    def lstm(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor,
             lengths: Any = None) -> Any:  # fmt: skip
        return lstm_reference(x, h, c, RecurrentWeights(w_ih, w_hh, b_ih, b_hh), lengths, products(w_ih, w_hh))

    def gru(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, lengths: Any = None) -> Any:
        return gru_reference(x, h, RecurrentWeights(w_ih, w_hh, b_ih, b_hh), lengths, products(w_ih, w_hh))

    def rounded(*given: Any, **named: Any) -> Any:
        with computed_by({RNN.name: rnn, LSTM.name: lstm, GRU.name: gru}):
            return forward(*given, **named)

    module.forward = rounded


def round_cache(
    model: nn.Module, caches: NarrowCaches, noise: Callable[[Tensor], Tensor] = lambda x: x
) -> None:  # fmt: skip
    """Have attention keep keys and values in 8 bits, as codes with one scale for each feature of each head, or in 16.

    In place.

    Args:
        model: follows :class:`edgellm.models.protocol.LanguageModel`.
        caches: which states.
        noise: what is kept passes it first.
    """
    forward, scales = model.forward, caches.scales

    def of(name: str | None, x: Tensor) -> Tensor:
        if name is None:
            return x
        return _codes_of(noise(x), scales[name]) if name in scales else _half_of(noise(x))

    def rounded(tokens: Tensor, state: Mapping[str, Tensor], *given: Any, **named: Any) -> Any:
        names = {id(tensor): name for name, tensor in state.items() if name in caches.names}

        def attention(q: Tensor, k: Tensor, v: Tensor, past_k: Any, past_v: Any, *rest: Any, **more: Any) -> Any:
            def kept(*new: Tensor) -> tuple[Tensor, Tensor]:
                k, v = (of(names.get(id(past)), x) for x, past in zip(new, (past_k, past_v), strict=True))
                return k, v

            return attention_over(q, k, v, past_k, past_v, *rest, **more, kept=kept)

        with computed_by({ATTENTION.name: attention}):
            return forward(tokens, state, *given, **named)

    model.forward = rounded


def _codes_of(x: Tensor, scale: NDArray[Any]) -> Tensor:
    """What 8 bits hold of x (batch, heads, time, head_dim) with scales (heads * head_dim,)."""
    each = torch.from_numpy(scale).view(x.shape[1], 1, x.shape[3])
    return (x / each).round().clamp(-128, 127) * each


def _half_of(x: Tensor) -> Tensor:
    """What float16 holds of x."""
    return x.half().float()


def round_rows(x: Tensor) -> Tensor:
    """What 8 bits hold of x, with one scale for each row (its last axis)."""
    largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return (x / largest * 127).round() * (largest / 127)


def round_blocks(x: Tensor, *, block: int) -> Tensor:
    """What 8 bits hold of x, with one scale for so many neighbours in a row."""
    return round_rows(x.reshape(*x.shape[:-1], -1, block)).reshape(x.shape)


def round_whole(x: Tensor, *, scale: float, floating: bool) -> Tensor:
    """What 8 bits hold of x with one scale for all of it, as whole numbers or as floats (E4M3); the rest is cut off."""
    if floating:
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale
    return (x / scale).round().clamp(-128, 127) * scale
