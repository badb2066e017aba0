"""What hybrids of state spaces and attention share: sizes, and modules made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgellm.errors import ConfigError
from edgellm.models.layers import SelfAttention, StateSpaceMixer
from edgellm.models.shapes import ConvShape, RotaryShape

__all__ = ["HybridShape"]


@dataclass(frozen=True, kw_only=True)
class HybridShape(RotaryShape, ConvShape):
    """The sizes of a hybrid.

    Args:
        space_heads: heads of the state space.
        space_head_dim: features of one of them.
        state_size: features of B and C.
        num_groups: how many B and C there are, each shared by neighbouring heads; divides ``space_heads``.
        conv_bias: whether the convolution has a bias.
        space_bias: whether the projections of the state space have one.
        attention_bias: whether the projections of attention have one.
    """

    space_heads: int
    space_head_dim: int
    state_size: int
    num_groups: int = 1
    conv_bias: bool = True
    space_bias: bool = False
    attention_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.space_heads % self.num_groups:
            raise ConfigError(
                f"space_heads is {self.space_heads}; it must be a multiple of num_groups {self.num_groups}"
            )

    def attention(self, **options: Any) -> SelfAttention:
        """A layer's attention; options as :class:`SelfAttention`'s."""
        return super().attention(**({"bias": self.attention_bias, "output_bias": self.attention_bias} | options))

    def state_space(self, **options: Any) -> StateSpaceMixer:
        """A layer's state space; options besides as :class:`StateSpaceMixer`'s."""
        given = {"bias": self.space_bias, "output_bias": self.space_bias, "norm_eps": self.norm_eps}
        return StateSpaceMixer(
            self.width, self.space_heads, self.space_head_dim, self.state_size, num_groups=self.num_groups,
            conv_taps=self.conv_taps, conv_bias=self.conv_bias, **(given | options),
        )  # fmt: skip
