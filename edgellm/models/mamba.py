"""Mamba: a selective state space in every layer; no attention, no MLP and no positions.

Gu and Dao 2023, arXiv:2312.00752. Embedding -> N layers, each a norm and a mixer beside a residual -> norm -> head.
Falcon Mamba (arXiv:2410.05355) has norms of dt, B and C besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgellm.errors import ConfigError
from edgellm.models.foreign import (
    Fields,
    HuggingFace,
    Names,
    Values,
    Variant,
    flag,
    positive,
    usual_keys,
    whole,
)
from edgellm.models.layers import Block, SelectiveMixer, Stack
from edgellm.models.registry import Architecture
from edgellm.models.shapes import EndlessShape
from edgellm.models.state_spaces_files import (
    BACKBONE_KEYS,
    BACKBONE_PARTS,
    inner_features,
    mixer_parts,
    space_gguf,
    time_step_rank,
)

__all__ = ["ARCHITECTURE", "PRESETS", "MambaConfig", "mamba"]


@dataclass(frozen=True, kw_only=True)
class MambaConfig(EndlessShape):
    """The shape of a Mamba.

    Args:
        inner: features of a mixer, each with a state of its own.
        state_size: numbers in a state.
        rank: features that steps dt are made of.
        conv_taps: tokens that the convolution sees.
        conv_bias: whether the convolution has a bias.
        bias: whether the projections in and out of a mixer have one.
        mixer_norms: whether dt, B and C pass a norm, which has no gains.
        mixer_norm_eps: added to the mean square in it.
    """

    inner: int
    state_size: int
    rank: int
    conv_taps: int = 4
    conv_bias: bool = True
    bias: bool = False
    mixer_norms: bool = False
    mixer_norm_eps: float = 1e-6
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conv_taps < 2:
            raise ConfigError(f"conv_taps is {self.conv_taps}; it must be at least 2")


PRESETS: Mapping[str, MambaConfig] = {
    "tiny": MambaConfig(vocab_size=1024, width=128, num_layers=4, inner=256, state_size=16, rank=8),
}


def mamba(config: MambaConfig) -> Stack:
    """The model with fresh weights."""
    c = config

    def mixer() -> SelectiveMixer:
        return SelectiveMixer(
            c.width, c.inner, c.state_size, rank=c.rank, conv_taps=c.conv_taps, conv_bias=c.conv_bias,
            bias=c.bias, norms="plain" if c.mixer_norms else "none", norm_eps=c.mixer_norm_eps,
        )  # fmt: skip

    return Stack(c, (Block(c.width, c.norm_eps, {"mixer": mixer()}) for _ in range(c.num_layers)))


_UNREAD = (  # of training, of kernels, of older code, and of precisions below the one that is computed in here
    "time_step_min", "time_step_max", "time_step_floor", "time_step_scale", "time_step_init_scheme",
    "rescale_prenorm_residual", "residual_in_fp32", "use_mambapy", "use_associative_scan", "use_falcon_mambapy",
    "fused_add_norm", "intermediate_size", "d_inner", "d_model", "n_layer", "ssm_cfg", "rms_norm",
    "pad_vocab_size_multiple",
)  # fmt: skip

HUGGING_FACE = HuggingFace(
    types={
        "mamba": Variant(),
        "falcon_mamba": Variant(
            fields={"mixer_norms": True}, keys={"mixer_rms_eps": positive("mixer_norm_eps", default=1e-6)}
        ),
    },
    keys={
        **usual_keys(vocab_size=50280, width=768, num_layers=32, tie_embeddings=True),
        "expand": inner_features,
        **BACKBONE_KEYS,
        "state_size": whole("state_size", default=16),
        "time_step_rank": time_step_rank,
    },
    names=Names({**BACKBONE_PARTS, **mixer_parts("mixer", "mixer")}, layers="backbone.layers"),
    unread=_UNREAD,
)


def _gguf_norms(name: str, values: Values, fields: Fields) -> None:
    flag("mixer_norms", default=False)(name, values, fields)
    fields["mixer_norm_eps"] = fields["norm_eps"]  # the file has one for all


GGUF_FILES = space_gguf(
    "mamba",
    {
        "ssm.inner_size": whole("inner"),
        "ssm.time_step_rank": whole("rank"),
        "ssm.dt_b_c_rms": _gguf_norms,
    },
    reshaped=("mixer.conv.weight",),
)

ARCHITECTURE = Architecture(
    name="mamba", config=MambaConfig, build=mamba, presets=PRESETS, huggingface=HUGGING_FACE, gguf=GGUF_FILES
)
