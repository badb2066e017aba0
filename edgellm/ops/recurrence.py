"""The three classic recurrences, each as one op that takes and gives its hidden state.

Elman 1990: h_t = f(W x_t + U h_{t-1} + b). LSTM: Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al.
2000. GRU: Cho et al. 2014, arXiv:1406.1078, in the form with the reset gate after the product (as cuDNN and PyTorch).
Weights are laid out as PyTorch's: gates stacked along the first axis, LSTM in the order i, f, g, o, GRU in r, z, n.

The ``*_reference`` loops are the definition; the ops take PyTorch's fused kernels where rows are not ragged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from edgellm.ops.canonical import capturing
from edgellm.ops.schema import REQUIRED, Op

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "RecurrentWeights",
    "elman",
    "elman_reference",
    "gru",
    "gru_reference",
    "lstm",
    "lstm_reference",
]


class RecurrentWeights(NamedTuple):
    """One layer's parameters: gates is 1 for Elman, 4 for LSTM, 3 for GRU."""

    input: Tensor  # (gates * hidden, features)
    hidden: Tensor  # (gates * hidden, hidden)
    input_bias: Tensor  # (gates * hidden,)
    hidden_bias: Tensor  # (gates * hidden,)


def elman(
    x: Tensor, h: Tensor, weights: RecurrentWeights, lengths: Tensor | None, *, activation: str
) -> tuple[Tensor, Tensor]:
    """h_t = f(W x_t + U h_{t-1} + b) over a chunk.

    Args:
        x: (batch, time, features).
        h: (batch, hidden), what the chunk before left.
        weights: the layer's parameters.
        lengths: (batch,) int32, valid tokens in each row; None when all are.
        activation: ``tanh`` or ``relu``.

    Returns:
        Every step's h (batch, time, hidden), and h after each row's last valid token.
    """
    if capturing():
        y, h = RNN.emit(x=x, h=h, **_named(weights), lengths=lengths, activation=activation)
        return y, h
    if RNN.otherwise or (lengths is not None and bool((lengths != x.shape[1]).any())):
        y, h = RNN(x, h, *weights, lengths, activation=activation)
        return y, h
    kernel = torch.rnn_tanh if activation == "tanh" else torch.rnn_relu
    y, last = kernel(x, h.unsqueeze(0), list(weights), True, 1, 0.0, torch.is_grad_enabled(), False, True)
    return y, last.squeeze(0)


def lstm(
    x: Tensor, h: Tensor, c: Tensor, weights: RecurrentWeights, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A long short-term memory over a chunk.

    Args:
        x: (batch, time, features).
        h: (batch, hidden), the output that the chunk before left.
        c: (batch, hidden), the cell that the chunk before left.
        weights: the layer's parameters.
        lengths: (batch,) int32, valid tokens in each row; None when all are.

    Returns:
        Every step's h (batch, time, hidden), and h and c after each row's last valid token.
    """
    if capturing():
        y, h, c = LSTM.emit(x=x, h=h, c=c, **_named(weights), lengths=lengths)
        return y, h, c
    if LSTM.otherwise or (lengths is not None and bool((lengths != x.shape[1]).any())):
        y, h, c = LSTM(x, h, c, *weights, lengths)
        return y, h, c
    past = [h.unsqueeze(0), c.unsqueeze(0)]
    y, h, c = torch.lstm(x, past, list(weights), True, 1, 0.0, torch.is_grad_enabled(), False, True)
    return y, h.squeeze(0), c.squeeze(0)


def gru(x: Tensor, h: Tensor, weights: RecurrentWeights, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """A gated recurrent unit over a chunk; arguments and results as :func:`elman`."""
    if capturing():
        y, h = GRU.emit(x=x, h=h, **_named(weights), lengths=lengths)
        return y, h
    if GRU.otherwise or (lengths is not None and bool((lengths != x.shape[1]).any())):
        y, h = GRU(x, h, *weights, lengths)
        return y, h
    y, last = torch.gru(x, h.unsqueeze(0), list(weights), True, 1, 0.0, torch.is_grad_enabled(), False, True)
    return y, last.squeeze(0)


Product = Callable[[Tensor, Tensor, Tensor], Tensor]  # of x (batch, columns), W (rows, columns) and b: X W^T + b


def elman_reference(
    x: Tensor, h: Tensor, weights: RecurrentWeights, lengths: Tensor | None, product: Product = F.linear, *,
    activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`elman`, one token at a time; ``product`` is how its products are computed."""
    f = torch.tanh if activation == "tanh" else torch.relu

    def cell(gates_x: Tensor, gates_h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (f(gates_x + gates_h),)

    y, (h,) = _loop(cell, x, (h,), weights, lengths, product)
    return y, h


def lstm_reference(
    x: Tensor, h: Tensor, c: Tensor, weights: RecurrentWeights, lengths: Tensor | None, product: Product = F.linear
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`lstm`, one token at a time; ``product`` is how its products are computed."""

    def cell(gates_x: Tensor, gates_h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        i, f, g, o = (gates_x + gates_h).chunk(4, dim=-1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    y, (h, c) = _loop(cell, x, (h, c), weights, lengths, product)
    return y, h, c


def gru_reference(
    x: Tensor, h: Tensor, weights: RecurrentWeights, lengths: Tensor | None, product: Product = F.linear
) -> tuple[Tensor, Tensor]:
    """:func:`gru`, one token at a time; ``product`` is how its products are computed."""

    def cell(gates_x: Tensor, gates_h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (rx, zx, nx), (rh, zh, nh) = gates_x.chunk(3, dim=-1), gates_h.chunk(3, dim=-1)
        r, z = torch.sigmoid(rx + rh), torch.sigmoid(zx + zh)
        n = torch.tanh(nx + r * nh)
        return ((1 - z) * n + z * state[0],)

    y, (h,) = _loop(cell, x, (h,), weights, lengths, product)
    return y, h


Cell = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _loop(
    cell: Cell, x: Tensor, state: tuple[Tensor, ...], weights: RecurrentWeights, lengths: Tensor | None,
    product: Product,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    outputs = []
    for t in range(x.shape[1]):
        gates_x = product(x[:, t], weights.input, weights.input_bias)
        gates_h = product(state[0], weights.hidden, weights.hidden_bias)
        new = cell(gates_x, gates_h, state)
        if lengths is None:
            state = new
        else:  # a row whose tokens are used up keeps what it had
            valid = (t < lengths)[:, None]
            state = tuple(torch.where(valid, n, s) for n, s in zip(new, state, strict=True))
        outputs.append(new[0])
    return torch.stack(outputs, dim=1), state


def _named(weights: RecurrentWeights) -> dict[str, Tensor]:
    return dict(zip(_WEIGHTS, weights, strict=True))


def _rnn(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, lengths: Tensor | None = None, *,
    activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return elman_reference(x, h, RecurrentWeights(w_ih, w_hh, b_ih, b_hh), lengths, activation=activation)


def _lstm(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return lstm_reference(x, h, c, RecurrentWeights(w_ih, w_hh, b_ih, b_hh), lengths)


def _gru(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return gru_reference(x, h, RecurrentWeights(w_ih, w_hh, b_ih, b_hh), lengths)


_WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh")  # as RecurrentWeights has them


def _steps(x: Tensor, h: Tensor) -> tuple[torch.dtype, tuple[int, int, int]]:
    return x.dtype, (x.shape[0], x.shape[1], h.shape[1])


RNN = Op(
    name="RNN",
    inputs=("x", "h", *_WEIGHTS, "lengths"),
    outputs=("y", "present_h"),
    attributes={"activation": REQUIRED},
    matrices=("w_ih", "w_hh"),
    states={"h": "present_h"},
    like=lambda x, h, **_: [_steps(x, h), h],
    reference=_rnn,
)
LSTM = Op(
    name="LSTM",
    inputs=("x", "h", "c", *_WEIGHTS, "lengths"),
    outputs=("y", "present_h", "present_c"),
    matrices=("w_ih", "w_hh"),
    states={"h": "present_h", "c": "present_c"},
    like=lambda x, h, c, **_: [_steps(x, h), h, c],
    reference=_lstm,
)
GRU = Op(
    name="GRU",
    inputs=("x", "h", *_WEIGHTS, "lengths"),
    outputs=("y", "present_h"),
    matrices=("w_ih", "w_hh"),
    states={"h": "present_h"},
    like=lambda x, h, **_: [_steps(x, h), h],
    reference=_gru,
)
