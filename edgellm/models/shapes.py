"""What families' configurations are put together from: sizes with their meaning, checks, and the parts they make.

A family's configuration inherits those that it has, declares what is its own, and another default where it has one.
Every field is given by its name, so that their order means nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from edgellm.errors import ConfigError
from edgellm.models.config import Shape, check_heads
from edgellm.models.layers import RotaryTable, SelfAttention

__all__ = [
    "ConvShape", "EndlessShape", "MixtureShape", "PartlyRotaryShape", "PatternShape", "RotaryShape", "StackShape",
    "TransformerShape",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StackShape(Shape):
    """The sizes of any stack of layers.

    Args:
        vocab_size: tokens.
        width: features between layers.
        max_context: the most tokens that a row may hold.
        norm_eps: added to the mean square, or the variance, in the norms.
        tie_embeddings: whether the vocabulary projection is the embedding.
    """

    vocab_size: int
    width: int
    max_context: int
    norm_eps: float = 1e-5
    tie_embeddings: bool = False


@dataclass(frozen=True, kw_only=True)
class EndlessShape(StackShape):
    """The sizes of layers whose state does not grow; ``max_context`` is no limit of such a model itself.

    Args:
        num_layers: layers.
    """

    num_layers: int
    max_context: int = 2**20


@dataclass(frozen=True, kw_only=True)
class TransformerShape(StackShape):
    """The sizes of attention and MLPs.

    Args:
        num_heads: query heads.
        num_kv_heads: key and value heads; divides ``num_heads``.
        head_dim: features of one head.
        mlp_width: hidden features of an MLP.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)

    def attention(self, **options: Any) -> SelfAttention:
        """A layer's attention, without biases unless options say so; these are :class:`SelfAttention`'s."""
        return SelfAttention(
            self.width, self.num_heads, self.num_kv_heads, self.head_dim, **({"bias": False} | options)
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RotaryShape(TransformerShape):
    """The same, where attention turns by the position.

    Args:
        rope_theta: base of the rotary frequencies.
        rope_factors: (turning / 2,), each frequency is divided by its own; empty: by none.
        rope_amplitude: factor on the cosines and sines of the rotation.
    """

    rope_theta: float = 10000.0
    rope_factors: Sequence[float] = ()
    rope_amplitude: float = 1.0

    @property
    def turning(self) -> int:
        """Features of a head that turn with the position."""
        return self.head_dim

    def rotary(self) -> RotaryTable:
        """Positions."""
        return RotaryTable(
            self.turning, self.max_context, self.rope_theta, factors=self.rope_factors, amplitude=self.rope_amplitude,
            still=self.head_dim - self.turning,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PartlyRotaryShape(RotaryShape):
    """The same, where a part of each head turns; its features lie as :func:`order_of_part` has them.

    Args:
        rotated: how many features of a head turn with the position.
    """

    rotated: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotated % 2 or self.rotated > self.head_dim:
            raise ConfigError(f"rotated is {self.rotated}; it must be even and at most head_dim {self.head_dim}")

    @property
    def turning(self) -> int:
        """Features of a head that turn with the position."""
        return self.rotated


@dataclass(frozen=True, kw_only=True)
class PatternShape(Shape):
    """Layers that are not all of one kind.

    Args:
        pattern: each layer's, first to last; one of :attr:`KINDS`.
    """

    KINDS: ClassVar[Collection[str]]
    pattern: Sequence[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pattern or any(kind not in self.KINDS for kind in self.pattern):
            raise ConfigError(f"pattern is {self.pattern}; it has {' or '.join(self.KINDS)} for each layer")


@dataclass(frozen=True, kw_only=True)
class ConvShape(Shape):
    """Mixers with a short convolution.

    Args:
        conv_taps: tokens that it sees.
    """

    conv_taps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conv_taps < 2:
            raise ConfigError(f"conv_taps is {self.conv_taps}; it must be at least 2")


@dataclass(frozen=True, kw_only=True)
class MixtureShape(Shape):
    """Mixtures of experts in place of some layers' MLPs.

    Args:
        experts: these layers, by their numbers; empty for none.
        num_experts: experts of a mixture.
        num_chosen: how many of them a token has.
    """

    experts: Sequence[int] = ()
    num_experts: int = 1
    num_chosen: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_chosen > self.num_experts:
            raise ConfigError(f"num_chosen is {self.num_chosen}; it must be at most num_experts {self.num_experts}")
