"""Mamba: a selective state space in every layer; no attention, no MLP and no positions.

Gu and Dao 2023, arXiv:2312.00752. Embedding -> N layers, each a norm and a mixer beside a residual -> norm -> head.
Falcon Mamba (arXiv:2410.05355) has norms of dt, B and C besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgellm.errors import ConfigError
from edgellm.models.config import Shape
from edgellm.models.foreign import (
    GGUF,
    MAX_CONTEXT,
    MAX_LAYERS,
    METADATA,
    Fields,
    HuggingFace,
    Names,
    Values,
    Variant,
    flag,
    has,
    lacks,
    neutral,
    positive,
    rows_of,
    whole,
)
from edgellm.models.foreign.keys import checked_whole
from edgellm.models.layers import Block, SelectiveMixer, Stack
from edgellm.models.registry import Architecture
from edgellm.models.state_spaces import gguf_decay

__all__ = ["ARCHITECTURE", "PRESETS", "MambaConfig", "mamba", "time_step_rank"]


@dataclass(frozen=True)
class MambaConfig(Shape):
    """The shape of a Mamba.

    Args:
        vocab_size: tokens.
        width: features between layers.
        num_layers: layers.
        inner: features of a mixer, each with a state of its own.
        state_size: numbers in a state.
        rank: features that steps dt are made of.
        conv_taps: tokens that the convolution sees.
        conv_bias: whether the convolution has a bias.
        bias: whether the projections in and out of a mixer have one.
        mixer_norms: whether dt, B and C pass a norm, which has no gains.
        mixer_norm_eps: added to the mean square in it.
        norm_eps: the same in the norms of layers.
        tie_embeddings: whether the vocabulary projection is the embedding.
        max_context: the most tokens that a row may hold; the model itself has no limit, and its state does not grow.
    """

    vocab_size: int
    width: int
    num_layers: int
    inner: int
    state_size: int
    rank: int
    conv_taps: int = 4
    conv_bias: bool = True
    bias: bool = False
    mixer_norms: bool = False
    mixer_norm_eps: float = 1e-6
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    max_context: int = 2**20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conv_taps < 2:
            raise ConfigError(f"conv_taps is {self.conv_taps}; a convolution has at least 2")


PRESETS: Mapping[str, MambaConfig] = {
    "tiny": MambaConfig(vocab_size=1024, width=128, num_layers=4, inner=256, state_size=16, rank=8),
}


def mamba(config: MambaConfig) -> Stack:
    """The model with fresh weights."""
    c = config
    return Stack(
        c,
        (
            Block(c.width, c.norm_eps, {
                "mixer": SelectiveMixer(
                    c.width, c.inner, c.state_size, rank=c.rank, conv_taps=c.conv_taps, conv_bias=c.conv_bias,
                    bias=c.bias, norms="plain" if c.mixer_norms else "none", norm_eps=c.mixer_norm_eps,
                )
            })
            for _ in range(c.num_layers)
        ),
    )  # fmt: skip


def time_step_rank(name: str, values: Values, fields: Fields) -> None:
    """Features of dt; a sixteenth of the width where the file leaves it to the code."""
    rank = values.get(name, "auto")
    fields["rank"] = -(-fields["width"] // 16) if rank == "auto" else checked_whole(name, rank)


def _inner(name: str, values: Values, fields: Fields) -> None:
    fields["inner"] = fields["width"] * checked_whole(name, values.get(name, 2))


HUGGING_FACE = HuggingFace(
    types={
        "mamba": Variant(),
        "falcon_mamba": Variant(
            fields={"mixer_norms": True}, keys={"mixer_rms_eps": positive("mixer_norm_eps", default=1e-6)}
        ),
    },
    keys={
        "vocab_size": whole("vocab_size", default=50280),
        "hidden_size": whole("width", default=768),
        "num_hidden_layers": whole("num_layers", default=32, limit=MAX_LAYERS),
        "expand": _inner,
        "state_size": whole("state_size", default=16),
        "time_step_rank": time_step_rank,
        "conv_kernel": whole("conv_taps", default=4),
        "use_conv_bias": flag("conv_bias", default=True),
        "use_bias": flag("bias", default=False),
        "layer_norm_epsilon": positive("norm_eps", default=1e-5),
        "tie_word_embeddings": flag("tie_embeddings", default=True),
        "hidden_act": neutral("silu", "swish"),
        # of training, of kernels, of older code, and of precisions below the one that everything is computed in here
        **dict.fromkeys(("time_step_min", "time_step_max", "time_step_floor", "time_step_scale"), METADATA),
        **dict.fromkeys(("time_step_init_scheme", "rescale_prenorm_residual", "residual_in_fp32"), METADATA),
        **dict.fromkeys(("use_mambapy", "use_associative_scan", "use_falcon_mambapy", "fused_add_norm"), METADATA),
        **dict.fromkeys(("intermediate_size", "d_inner", "d_model", "n_layer", "ssm_cfg", "rms_norm"), METADATA),
        "pad_vocab_size_multiple": METADATA,
    },
    names=Names(
        {
            "embedding": "backbone.embeddings",
            "norm": "backbone.norm_f",
            "head": "lm_head",
            "mixer_norm": "norm",
            "mixer.in_proj": "mixer.in_proj",
            "mixer.conv": "mixer.conv1d",
            "mixer.x_proj": "mixer.x_proj",
            "mixer.dt_proj": "mixer.dt_proj",
            "mixer.a_log": "mixer.A_log",
            "mixer.d": "mixer.D",
            "mixer.out_proj": "mixer.out_proj",
        },
        layers="backbone.layers",
    ),
)


def _gguf_norms(name: str, values: Values, fields: Fields) -> None:
    flag("mixer_norms", default=False)(name, values, fields)
    fields["mixer_norm_eps"] = fields["norm_eps"]  # the file has one for all


GGUF_FILES = GGUF(
    types={"mamba": Variant()},
    keys={
        "block_count": whole("num_layers", limit=MAX_LAYERS),
        "context_length": whole("max_context", limit=MAX_CONTEXT),
        "embedding_length": whole("width"),
        "ssm.inner_size": whole("inner"),
        "ssm.state_size": whole("state_size"),
        "ssm.time_step_rank": whole("rank"),
        "ssm.conv_kernel": whole("conv_taps"),
        "attention.layer_norm_rms_epsilon": positive("norm_eps"),
        "ssm.dt_b_c_rms": _gguf_norms,
        **dict.fromkeys(("feed_forward_length", "attention.head_count", "attention.head_count_kv"), neutral(0)),
    },
    names=Names(
        {
            "embedding": "token_embd",
            "norm": "output_norm",
            "head": "output",
            "mixer_norm": "attn_norm",
            "mixer.in_proj": "ssm_in",
            "mixer.conv": "ssm_conv1d",
            "mixer.x_proj": "ssm_x",
            "mixer.dt_proj": "ssm_dt",
            "mixer.a_log": "ssm_a",
            "mixer.d": "ssm_d",
            "mixer.out_proj": "ssm_out",
        },
        layers="blk",
    ),
    tensors={
        "vocab_size": rows_of("token_embd.weight"),
        "tie_embeddings": lacks("output.weight"),
        "conv_bias": has("blk.0.ssm_conv1d.bias"),
        "bias": has("blk.0.ssm_in.bias"),
    },
    tensor=gguf_decay,
    reshaped=("mixer.conv.weight",),
)

ARCHITECTURE = Architecture(
    name="mamba", config=MambaConfig, build=mamba, presets=PRESETS, huggingface=HUGGING_FACE, gguf=GGUF_FILES
)
