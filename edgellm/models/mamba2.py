"""Mamba-2: a state space with one decay a head, which depends on the token; no attention and no positions.

Dao and Gu 2024, arXiv:2405.21060. Embedding -> N layers, each a norm and a mixer beside a residual -> norm -> head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgellm.errors import ConfigError
from edgellm.models.foreign import (
    METADATA,
    Fields,
    HuggingFace,
    Names,
    Values,
    Variant,
    checked_whole,
    refuse,
    usual_keys,
    whole,
)
from edgellm.models.layers import Block, Stack, StateSpaceMixer
from edgellm.models.registry import Architecture
from edgellm.models.shapes import EndlessShape
from edgellm.models.state_spaces_files import BACKBONE_KEYS, BACKBONE_PARTS, mixer_parts, no_step_limit, space_gguf

__all__ = ["ARCHITECTURE", "PRESETS", "Mamba2Config", "mamba2"]


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(EndlessShape):
    """The shape of a Mamba-2.

    Args:
        num_heads: heads of the state space.
        head_dim: features of x in one head.
        state_size: features of B and C.
        num_groups: how many B and C there are, each shared by neighbouring heads; divides ``num_heads``.
        conv_taps: tokens that the convolution sees.
        conv_bias: whether the convolution has a bias.
        bias: whether the projections have one.
    """

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int = 1
    conv_taps: int = 4
    conv_bias: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads % self.num_groups or self.conv_taps < 2:
            raise ConfigError(
                f"num_heads {self.num_heads} must be a multiple of num_groups {self.num_groups}, and conv_taps "
                f"{self.conv_taps} at least 2"
            )


PRESETS: Mapping[str, Mamba2Config] = {
    "tiny": Mamba2Config(
        vocab_size=1024, width=128, num_layers=4, num_heads=8, head_dim=32, state_size=32, tie_embeddings=True
    ),
}


def mamba2(config: Mamba2Config) -> Stack:
    """The model with fresh weights."""
    c = config

    def mixer() -> StateSpaceMixer:
        return StateSpaceMixer(
            c.width, c.num_heads, c.head_dim, c.state_size, num_groups=c.num_groups, conv_taps=c.conv_taps,
            conv_bias=c.conv_bias, bias=c.bias, output_bias=c.bias, norm_eps=c.norm_eps,
        )  # fmt: skip

    return Stack(c, (Block(c.width, c.norm_eps, {"mixer": mixer()}) for _ in range(c.num_layers)))


def _expand(name: str, values: Values, fields: Fields) -> None:
    if fields["width"] * checked_whole(name, values.get(name, 2)) != fields["num_heads"] * fields["head_dim"]:
        raise refuse(name, values.get(name))


_UNREAD = (  # of training, of kernels, and of precisions below the one that everything is computed in here
    "time_step_rank", "time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual", "chunk_size",
    "residual_in_fp32",
)  # fmt: skip

HUGGING_FACE = HuggingFace(
    types={"mamba2": Variant()},
    keys={
        **usual_keys(vocab_size=32768, width=4096, num_layers=64, head_dim=64, tie_embeddings=False),
        "num_heads": whole("num_heads", default=128),
        "expand": _expand,
        **BACKBONE_KEYS,
        "state_size": whole("state_size", default=128),
        "n_groups": whole("num_groups", default=8),
        "time_step_limit": no_step_limit,
    },
    names=Names({**BACKBONE_PARTS, **mixer_parts("mixer", "mixer")}, layers="backbone.layers"),
    unread=_UNREAD,
)


def _gguf_heads(name: str, values: Values, fields: Fields) -> None:
    """As many heads as dt has features, which share the inner features."""
    fields["num_heads"] = checked_whole(name, values.get(name))
    inner = checked_whole("ssm.inner_size", values.get("ssm.inner_size"))
    if inner % fields["num_heads"]:
        raise refuse("ssm.inner_size", inner)
    fields["head_dim"] = inner // fields["num_heads"]


GGUF_FILES = space_gguf(
    "mamba2",
    {
        "ssm.time_step_rank": _gguf_heads,
        "ssm.inner_size": METADATA,  # read with the heads
        "ssm.group_count": whole("num_groups", default=1),
    },
    reshaped=("mixer.conv.weight", "mixer.a_log", "mixer.d", "mixer.norm"),
)

ARCHITECTURE = Architecture(
    name="mamba2", config=Mamba2Config, build=mamba2, presets=PRESETS, huggingface=HUGGING_FACE, gguf=GGUF_FILES
)
