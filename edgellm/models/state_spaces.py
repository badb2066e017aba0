"""What hybrids of state spaces and attention share: sizes, modules made of them, and words of other files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from edgellm.errors import ConfigError
from edgellm.models.config import Shape, check_heads
from edgellm.models.foreign import MAX_LAYERS, METADATA, Fields, Key, Values, flag, neutral, refuse, whole
from edgellm.models.foreign.keys import checked_whole
from edgellm.models.layers import RotaryTable, SelfAttention, StateSpaceMixer

__all__ = [
    "HybridShape", "check_pattern", "gguf_decay", "mixer_keys", "mixer_parts", "no_step_limit", "pattern_key",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HybridShape(Shape):
    """The sizes of a hybrid.

    Args:
        vocab_size: tokens.
        width: features between layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides ``num_heads``.
        head_dim: features of one head of attention.
        mlp_width: hidden features of the MLP.
        max_context: the most tokens that a row may hold.
        space_heads: heads of the state space.
        space_head_dim: features of one of them.
        state_size: features of B and C.
        num_groups: how many B and C there are, each shared by neighbouring heads; divides ``space_heads``.
        conv_taps: tokens that the convolution sees.
        conv_bias: whether the convolution has a bias.
        space_bias: whether the projections of the state space have one.
        attention_bias: whether the projections of attention have one.
        rope_theta: base of the rotary frequencies.
        rope_factors: each frequency is divided by its own; empty: by none.
        rope_amplitude: factor on the cosines and sines of the rotation.
        norm_eps: added to the mean square in the norms.
        tie_embeddings: whether the vocabulary projection is the embedding.
    """

    vocab_size: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_context: int
    space_heads: int
    space_head_dim: int
    state_size: int
    num_groups: int = 1
    conv_taps: int = 4
    conv_bias: bool = True
    space_bias: bool = False
    attention_bias: bool = False
    rope_theta: float = 10000.0
    rope_factors: Sequence[float] = ()
    rope_amplitude: float = 1.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)
        if self.space_heads % self.num_groups or self.conv_taps < 2:
            raise ConfigError(
                f"space_heads {self.space_heads} must be a multiple of num_groups {self.num_groups}, and conv_taps "
                f"{self.conv_taps} at least 2"
            )

    def attention(self, *, scale: float | None = None) -> SelfAttention:
        """A layer's attention."""
        return SelfAttention(
            self.width, self.num_heads, self.num_kv_heads, self.head_dim, bias=self.attention_bias,
            output_bias=self.attention_bias, scale=scale,
        )  # fmt: skip

    def state_space(self, **options: Any) -> StateSpaceMixer:
        """A layer's state space; options besides as :class:`StateSpaceMixer`'s."""
        given = {"bias": self.space_bias, "output_bias": self.space_bias, "norm_eps": self.norm_eps}
        return StateSpaceMixer(
            self.width, self.space_heads, self.space_head_dim, self.state_size, num_groups=self.num_groups,
            conv_taps=self.conv_taps, conv_bias=self.conv_bias, **(given | options),
        )  # fmt: skip

    def rotary(self, *, rotated: int | None = None) -> RotaryTable:
        """Positions.

        Args:
            rotated: features of a head that turn; None for all.
        """
        turning = self.head_dim if rotated is None else rotated
        return RotaryTable(
            turning, self.max_context, self.rope_theta, factors=self.rope_factors, amplitude=self.rope_amplitude,
            still=self.head_dim - turning,
        )  # fmt: skip


def gguf_decay(_config: Any, _metadata: Values, name: str, tensor: Tensor) -> Tensor:
    """GGUF files have A itself, below 0, and we the logarithm of -A."""
    return (-tensor).log() if name.endswith("a_log") else tensor


def no_step_limit(name: str, values: Values, fields: Fields) -> None:
    """A key that would bound dt, and must leave it free."""
    neutral([0.0, float("inf")], [0.0, {"__float__": "Infinity"}], None)(name, values, fields)


def mixer_keys(*, inner: int | None = None) -> Mapping[str, Key]:
    """The keys of a state space whose names begin with ``mamba_``; the field ``width`` was read before.

    Args:
        inner: features of all its heads, where the file does not say; None for so many widths as it expands to.
    """

    def head_dim(name: str, values: Values, fields: Fields) -> None:
        features, heads = values.get("mamba_d_ssm", inner), fields["space_heads"]
        if features is None:
            features = fields["width"] * checked_whole("mamba_expand", values.get("mamba_expand", 2))
        size = values.get(name, "auto")
        fields["space_head_dim"] = features // heads if size == "auto" else checked_whole(name, size)
        if fields["space_head_dim"] * heads != features:
            raise refuse(name, size)

    return {
        "mamba_n_heads": whole("space_heads", default=128),
        "mamba_d_head": head_dim,
        "mamba_d_state": whole("state_size", default=256),
        "mamba_n_groups": whole("num_groups", default=1),
        "mamba_d_conv": whole("conv_taps", default=4),
        "mamba_conv_bias": flag("conv_bias", default=True),
        "mamba_proj_bias": flag("space_bias", default=False),
        "mamba_expand": METADATA,
        "mamba_chunk_size": METADATA,
        "time_step_limit": no_step_limit,
    }


def check_pattern(pattern: Sequence[str], mixers: Collection[str]) -> None:
    """Make sure that every layer has a mixer that there is.

    Raises:
        ConfigError: one has not, or there is no layer.
    """
    if not pattern or any(mixer not in mixers for mixer in pattern):
        raise ConfigError(f"pattern is {pattern}; it has {' or '.join(mixers)} for each layer")


def pattern_key(kinds: Mapping[str, str], *, count: str = "num_hidden_layers", default: int = 32) -> Key:
    """The layers' mixers, into the field ``pattern``; where the file names none, all have the first.

    Args:
        kinds: from the file's names of them, older ones included, to ours.
        count: the key with the number of layers.
        default: how many there are, where the file does not say.
    """

    def take(name: str, values: Values, fields: Fields) -> None:
        named = values.get(name)
        layers = checked_whole(count, values.get(count, default if named is None else len(named)), MAX_LAYERS)
        named = [next(iter(kinds))] * layers if named is None else named
        if len(named) != layers or (other := [kind for kind in named if kind not in kinds]):
            raise refuse(name, other[0] if len(named) == layers else named)
        fields["pattern"] = tuple(kinds[kind] for kind in named)

    return take


def mixer_parts(ours: str, theirs: str) -> Mapping[str, str]:
    """What a state space's parameters are called.

    Args:
        ours: our name of the mixer.
        theirs: the file's.
    """
    parts = {"conv": "conv1d", "dt_offset": "dt_bias", "a_log": "A_log", "d": "D", "norm": "norm.weight"}
    named = {"in_proj": "in_proj", "out_proj": "out_proj"} | parts
    return {f"{ours}.{part}": f"{theirs}.{name}" for part, name in named.items()}
