"""The feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.ops.activations import ACTIVATIONS

__all__ = ["ACTIVATIONS", "MLP", "GatedMLP", "PackedMLP", "activation_of"]


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name in :data:`ACTIVATIONS`.

    Raises:
        ConfigError: there is none.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation is {name!r}; it must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class MLP(nn.Module):
    """fc2(activation(fc1(x))).

    Args:
        width: features of its input and output.
        hidden: features between.
        bias: whether both have a bias.
        activation: one of :data:`ACTIVATIONS`.

    Raises:
        ConfigError: an unknown activation.
    """

    def __init__(self, width: int, hidden: int, *, bias: bool, activation: str) -> None:
        super().__init__()
        self.activation, self.kind = activation_of(activation), activation
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) to the same shape."""
        y: Tensor = self.fc2(self.activation(self.fc1(x)))
        return y

    def parts(self) -> dict[str, Any]:
        """Itself as an expert: the weights and attributes of :data:`edgellm.ops.EXPERT`."""
        up, down = self.fc1, self.fc2
        return {"up": up.weight, "down": down.weight, "up_bias": up.bias, "down_bias": down.bias,
                "activation": self.kind}  # fmt: skip


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), SwiGLU with ``silu``, Shazeer 2020, arXiv:2002.05202.

    Args:
        width: features of its input and output.
        hidden: features between.
        bias: whether the three projections have a bias.
        activation: one of :data:`ACTIVATIONS`.

    Raises:
        ConfigError: an unknown activation.
    """

    def __init__(self, width: int, hidden: int, *, bias: bool = False, activation: str = "silu") -> None:
        super().__init__()
        self.activation, self.kind = activation_of(activation), activation
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) to the same shape."""
        y: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return y

    def parts(self) -> dict[str, Any]:
        """Itself as an expert: the weights and attributes of :data:`edgellm.ops.EXPERT`."""
        up, down, gate = self.up_proj, self.down_proj, self.gate_proj
        return {"up": up.weight, "down": down.weight, "gate": gate.weight, "up_bias": up.bias, "down_bias": down.bias,
                "gate_bias": gate.bias, "activation": self.kind}  # fmt: skip


class PackedMLP(nn.Module):
    """A :class:`GatedMLP` whose gate and up projections are one, the gate's rows first; arguments as its own."""

    def __init__(self, width: int, hidden: int, *, bias: bool = False, activation: str = "silu") -> None:
        super().__init__()
        self.activation, self.kind = activation_of(activation), activation
        self.in_proj = nn.Linear(width, 2 * hidden, bias=bias)
        self.out_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) to the same shape."""
        gate, up = self.in_proj(x).chunk(2, dim=-1)
        y: Tensor = self.out_proj(self.activation(gate) * up)
        return y

    def parts(self) -> dict[str, Any]:
        """Itself as an expert: the weights and attributes of :data:`edgellm.ops.EXPERT`."""
        up, down = self.in_proj, self.out_proj
        return {"up": up.weight, "down": down.weight, "up_bias": up.bias, "down_bias": down.bias,
                "activation": self.kind, "packed": True}  # fmt: skip
