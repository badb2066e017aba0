"""Mamba-2: a state space with one decay a head, which depends on the token; no attention and no positions.

Dao and Gu 2024, arXiv:2405.21060. Embedding -> N layers, each a norm and a mixer beside a residual -> norm -> head.
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
    refuse,
    rows_of,
    whole,
)
from edgellm.models.foreign.keys import checked_whole
from edgellm.models.layers import Block, Stack, StateSpaceMixer
from edgellm.models.registry import Architecture
from edgellm.models.state_spaces import gguf_decay, mixer_parts, no_step_limit

__all__ = ["ARCHITECTURE", "PRESETS", "Mamba2Config", "mamba2"]


@dataclass(frozen=True)
class Mamba2Config(Shape):
    """The shape of a Mamba-2.

    Args:
        vocab_size: tokens.
        width: features between layers.
        num_layers: layers.
        num_heads: heads of the state space.
        head_dim: features of x in one head.
        state_size: features of B and C.
        num_groups: how many B and C there are, each shared by neighbouring heads; divides ``num_heads``.
        conv_taps: tokens that the convolution sees.
        conv_bias: whether the convolution has a bias.
        bias: whether the projections have one.
        norm_eps: added to the mean square in the norms.
        tie_embeddings: whether the vocabulary projection is the embedding.
        max_context: the most tokens that a row may hold; the model itself has no limit, and its state does not grow.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int = 1
    conv_taps: int = 4
    conv_bias: bool = True
    bias: bool = False
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_context: int = 2**20

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
    return Stack(
        c,
        (
            Block(c.width, c.norm_eps, {
                "mixer": StateSpaceMixer(
                    c.width, c.num_heads, c.head_dim, c.state_size, num_groups=c.num_groups, conv_taps=c.conv_taps,
                    conv_bias=c.conv_bias, bias=c.bias, output_bias=c.bias, norm_eps=c.norm_eps,
                )
            })
            for _ in range(c.num_layers)
        ),
    )  # fmt: skip


def _expand(name: str, values: Values, fields: Fields) -> None:
    if fields["width"] * checked_whole(name, values.get(name, 2)) != fields["num_heads"] * fields["head_dim"]:
        raise refuse(name, values.get(name))


HUGGING_FACE = HuggingFace(
    types={"mamba2": Variant()},
    keys={
        "vocab_size": whole("vocab_size", default=32768),
        "hidden_size": whole("width", default=4096),
        "num_hidden_layers": whole("num_layers", default=64, limit=MAX_LAYERS),
        "num_heads": whole("num_heads", default=128),
        "head_dim": whole("head_dim", default=64),
        "expand": _expand,
        "state_size": whole("state_size", default=128),
        "n_groups": whole("num_groups", default=8),
        "conv_kernel": whole("conv_taps", default=4),
        "use_conv_bias": flag("conv_bias", default=True),
        "use_bias": flag("bias", default=False),
        "layer_norm_epsilon": positive("norm_eps", default=1e-5),
        "tie_word_embeddings": flag("tie_embeddings", default=False),
        "hidden_act": neutral("silu", "swish"),
        "time_step_limit": no_step_limit,
        # of training, of kernels, and of precisions below the one that everything is computed in here
        **dict.fromkeys(("time_step_rank", "time_step_min", "time_step_max", "time_step_floor"), METADATA),
        **dict.fromkeys(("rescale_prenorm_residual", "chunk_size", "residual_in_fp32"), METADATA),
    },
    names=Names(
        {
            "embedding": "backbone.embeddings",
            "norm": "backbone.norm_f",
            "head": "lm_head",
            "mixer_norm": "norm",
            **mixer_parts("mixer", "mixer"),
        },
        layers="backbone.layers",
    ),
)


def _gguf_heads(name: str, values: Values, fields: Fields) -> None:
    """As many heads as dt has features, which share the inner features."""
    fields["num_heads"] = checked_whole(name, values.get(name))
    inner = checked_whole("ssm.inner_size", values.get("ssm.inner_size"))
    if inner % fields["num_heads"]:
        raise refuse("ssm.inner_size", inner)
    fields["head_dim"] = inner // fields["num_heads"]


GGUF_FILES = GGUF(
    types={"mamba2": Variant()},
    keys={
        "block_count": whole("num_layers", limit=MAX_LAYERS),
        "context_length": whole("max_context", limit=MAX_CONTEXT),
        "embedding_length": whole("width"),
        "ssm.time_step_rank": _gguf_heads,
        "ssm.inner_size": METADATA,  # read with the heads
        "ssm.state_size": whole("state_size"),
        "ssm.group_count": whole("num_groups", default=1),
        "ssm.conv_kernel": whole("conv_taps"),
        "attention.layer_norm_rms_epsilon": positive("norm_eps"),
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
            "mixer.dt_offset": "ssm_dt.bias",
            "mixer.a_log": "ssm_a",
            "mixer.d": "ssm_d",
            "mixer.norm": "ssm_norm.weight",
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
    reshaped=("mixer.conv.weight", "mixer.a_log", "mixer.d", "mixer.norm"),
)

ARCHITECTURE = Architecture(
    name="mamba2", config=Mamba2Config, build=mamba2, presets=PRESETS, huggingface=HUGGING_FACE, gguf=GGUF_FILES
)
