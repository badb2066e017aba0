"""The table of angles that rotary positions turn by (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellm.errors import ConfigError

__all__ = ["RotaryTable", "heads_in_order", "order_of_part"]

_MOST_NUMBERS = 1 << 28  # 1 GB as float32: a context of a million tokens with heads of 256


class RotaryTable(nn.Module):
    """cos and sin of position x frequency; computed, never stored in a checkpoint.

    Args:
        head_dim: features of one head that turn.
        max_context: how many positions.
        theta: the base of the frequencies.
        factors: (head_dim / 2,), each frequency is divided by its own; empty: by none.
        amplitude: factor on cos and sin.
        still: features of one head that do not turn; they lie as :func:`order_of_part` has them.
    """

    cos: Tensor  # (max_context, (head_dim + still) / 2)
    sin: Tensor

    def __init__(
        self, head_dim: int, max_context: int, theta: float, *, factors: Sequence[float] = (), amplitude: float = 1.0,
        still: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if max_context * (head_dim + still) > _MOST_NUMBERS:
            raise ConfigError(
                f"max_context {max_context} and head_dim {head_dim + still} make a table of angles of over "
                f"{_MOST_NUMBERS} numbers; correct one of them"
            )
        # Angles are float32 products, as models are trained with them and as a target computes them again: the product
        # is rounded, its cosine only once. So are plain frequencies, every step of them; divided ones are rounded once.
        # On the CPU even while weights are on "meta".
        divided = any(factor != 1 for factor in factors)
        dtype = torch.float64 if divided else torch.float32
        frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=dtype, device="cpu") / head_dim)
        if divided:
            frequencies = (frequencies / torch.tensor(factors, dtype=dtype, device="cpu")).float()
        angles = torch.arange(max_context, dtype=torch.float32, device="cpu")[:, None] * frequencies
        angles = angles.double()
        for name, table, value in (("cos", angles.cos(), 1.0), ("sin", angles.sin(), 0.0)):
            whole = F.pad(table * amplitude, (0, still // 2), value=value)
            self.register_buffer(name, whole.float(), persistent=False)


def order_of_part(head_dim: int, turning: int) -> list[int]:
    """Which feature of a head lies where, so that turning its two halves turns the first ``turning`` features only.

    Of a head whose first features turn, half against half, and whose others stay, attention turns the whole instead,
    by a table with angles of 0 at the end: each half begins with half of what turns. Queries and keys are in the same
    order, so that their products stay what they were.
    """
    first, rest = turning // 2, (head_dim - turning) // 2
    halves = [
        [*range(i * first, (i + 1) * first), *range(turning + i * rest, turning + (i + 1) * rest)] for i in (0, 1)
    ]
    return [*halves[0], *halves[1]]


def heads_in_order(tensor: Tensor, head_dim: int, turning: int) -> Tensor:
    """The rows of a projection to queries or keys, (heads * head_dim, ...), in that order; the same shape."""
    heads = tensor.reshape(-1, head_dim, *tensor.shape[1:])
    return heads[:, order_of_part(head_dim, turning)].flatten(0, 1)
