"""LFM2: gated short convolutions, and attention with norms of queries and keys in a few of the layers.

Liquid AI 2025, arXiv:2511.23404. Embedding -> N layers, each a norm and a mixer beside a residual, then a norm and a
gated MLP beside a residual -> norm -> head. A convolution mixes y = C * conv(B * x), with B, C and x projected from its
input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.models.config import Shape, check_heads
from edgellm.models.foreign import (
    GGUF,
    GGUF_PARTS,
    HUGGING_FACE_PARTS,
    MAX_CONTEXT,
    MAX_LAYERS,
    METADATA,
    Fields,
    HuggingFace,
    Names,
    Values,
    Variant,
    flag,
    lacks,
    positive,
    refuse,
    rotary,
    rows_of,
    same_as,
    whole,
)
from edgellm.models.foreign.keys import checked_positive, checked_whole
from edgellm.models.layers import Block, CausalConv, GatedMLP, RotaryTable, SelfAttention, Stack
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm_runtime.spec import StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "LFM2Config", "lfm2"]

MIXERS = ("conv", "attention")


@dataclass(frozen=True)
class LFM2Config(Shape):
    """The shape of an LFM2.

    Args:
        vocab_size: tokens.
        width: features between layers.
        pattern: one mixer a layer, first to last; each ``conv`` or ``attention``.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides ``num_heads``.
        head_dim: features of one head.
        mlp_width: hidden features of the gated MLP.
        max_context: the most tokens that a row may hold.
        conv_taps: tokens that a convolution sees.
        conv_bias: whether convolutions and their projections have a bias.
        rope_theta: base of the rotary frequencies.
        rope_factors: (head_dim / 2,), each frequency is divided by its own; empty: by none.
        rope_amplitude: factor on the cosines and sines of the rotation.
        norm_eps: added to the mean square in the norms.
        tie_embeddings: whether the vocabulary projection is the embedding.
    """

    vocab_size: int
    width: int
    pattern: Sequence[str]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_context: int
    conv_taps: int = 3
    conv_bias: bool = False
    rope_theta: float = 1000000.0
    rope_factors: Sequence[float] = ()
    rope_amplitude: float = 1.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pattern or any(mixer not in MIXERS for mixer in self.pattern) or self.conv_taps < 2:
            raise ConfigError(
                f"pattern is {self.pattern}, conv_taps {self.conv_taps}; a pattern has {' or '.join(MIXERS)} for each "
                "layer, and a convolution at least 2 taps"
            )
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)


PRESETS: Mapping[str, LFM2Config] = {
    "tiny": LFM2Config(
        vocab_size=1024, width=128, pattern=("conv", "conv", "attention", "conv"), num_heads=4, num_kv_heads=2,
        head_dim=32, mlp_width=352, max_context=512,
    ),
}  # fmt: skip


class ShortConv(nn.Module):
    """A convolution over a few tokens, with a gate before it and one after."""

    def __init__(self, config: LFM2Config) -> None:
        super().__init__()
        width, bias = config.width, config.conv_bias
        self.in_proj = nn.Linear(width, 3 * width, bias=bias)
        self.conv = CausalConv(width, config.conv_taps, bias=bias)
        self.out_proj = nn.Linear(width, width, bias=bias)

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """That of its convolution."""
        return self.conv.state_specs(prefix, dtype)

    def forward(self, x: Tensor, state: State, prefix: str, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        b, c, x = self.in_proj(x).chunk(3, dim=-1)
        y, present = self.conv(b * x, state, prefix, step)
        out: Tensor = self.out_proj(c * y)
        return out, present


def lfm2(config: LFM2Config) -> Stack:
    """The model with fresh weights."""
    c = config

    def block(kind: str) -> Block:
        mixer = (
            ShortConv(c)
            if kind == "conv"
            else SelfAttention(
                c.width, c.num_heads, c.num_kv_heads, c.head_dim, bias=False, qk_norm=True, norm_eps=c.norm_eps
            )
        )
        return Block(c.width, c.norm_eps, {"mixer": mixer}, GatedMLP(c.width, c.mlp_width))

    table = RotaryTable(c.head_dim, c.max_context, c.rope_theta, factors=c.rope_factors, amplitude=c.rope_amplitude)
    return Stack(c, map(block, c.pattern), rotary=table)


_UNREAD = (  # by transformers; the rest of the file says the same, or they are of training
    "block_dim", "block_mlp_init_scale", "block_norm_eps", "block_out_init_scale", "block_use_swiglu",
    "block_use_xavier_init", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads", "theta", "use_pos_enc",
)  # fmt: skip


def _pattern(name: str, values: Values, fields: Fields) -> None:
    """Each layer's mixer: by ``layer_types``, or by the numbers of those with attention."""
    count = checked_whole("num_hidden_layers", values.get("num_hidden_layers", 32), MAX_LAYERS)
    kinds, attentive = values.get(name), values.get("full_attn_idxs")
    if kinds is None:
        attentive = range(count) if attentive is None else attentive
        kinds = ["full_attention" if i in attentive else "conv" for i in range(count)]
    if len(kinds) != count or (other := [kind for kind in kinds if kind not in ("conv", "full_attention")]):
        raise refuse(name, other[0] if len(kinds) == count else kinds)
    fields["pattern"] = tuple("conv" if kind == "conv" else "attention" for kind in kinds)


def _mlp_width(name: str, values: Values, fields: Fields) -> None:
    """Two thirds of what the file says, by a factor, rounded up to a multiple; unless it asks for the very number."""
    size = checked_whole(name, values.get("block_ff_dim", values.get(name, 12288)))
    if values.get("block_auto_adjust_ff_dim", True):
        size = int(2 * size / 3)
        if (factor := values.get("block_ffn_dim_multiplier", 1.0)) is not None:
            multiple = checked_whole("block_multiple_of", values.get("block_multiple_of", 256))
            size = -(-int(checked_positive("block_ffn_dim_multiplier", factor) * size) // multiple) * multiple
    fields["mlp_width"] = size


def _tied(name: str, values: Values, fields: Fields) -> None:
    flag("tie_embeddings", default=True)("tie_embedding" if "tie_embedding" in values else name, values, fields)


HUGGING_FACE = HuggingFace(
    types={"lfm2": Variant()},
    keys={
        "vocab_size": whole("vocab_size", default=65536),
        "hidden_size": whole("width", default=2560),
        "layer_types": _pattern,
        "num_attention_heads": whole("num_heads", default=32),
        "num_key_value_heads": whole("num_kv_heads", default=8),
        "head_dim": whole("head_dim", default=lambda fields: fields["width"] // fields["num_heads"]),
        "intermediate_size": _mlp_width,
        "max_position_embeddings": whole("max_context", default=128000, limit=MAX_CONTEXT),
        "conv_L_cache": whole("conv_taps", default=3),
        "conv_bias": flag("conv_bias", default=False),
        **rotary(theta=1000000.0),
        "norm_eps": positive("norm_eps", default=1e-5),
        "tie_word_embeddings": _tied,
        **dict.fromkeys(("num_hidden_layers", "full_attn_idxs", "tie_embedding", "block_ff_dim"), METADATA),
        **dict.fromkeys(("block_auto_adjust_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of"), METADATA),
        **dict.fromkeys(_UNREAD, METADATA),
    },
    names=Names(
        {
            **HUGGING_FACE_PARTS,
            "norm": "model.embedding_norm",
            "mixer_norm": "operator_norm",
            "mixer.in_proj": "conv.in_proj",
            "mixer.conv": "conv.conv",
            "mixer.out_proj": "conv.out_proj",
            "mixer.q_proj": "self_attn.q_proj",
            "mixer.k_proj": "self_attn.k_proj",
            "mixer.v_proj": "self_attn.v_proj",
            "mixer.o_proj": "self_attn.out_proj",
            "mixer.q_norm": "self_attn.q_layernorm",
            "mixer.k_norm": "self_attn.k_layernorm",
            "mlp_norm": "ffn_norm",
            "mlp.gate_proj": "feed_forward.w1",
            "mlp.up_proj": "feed_forward.w3",
            "mlp.down_proj": "feed_forward.w2",
        },
        layers="model.layers",
    ),
)


def _gguf_pattern(name: str, values: Values, fields: Fields) -> None:
    """A number of key and value heads for each layer: 0 of those with a convolution."""
    heads, count = values.get(name), checked_whole("block_count", values.get("block_count"), MAX_LAYERS)
    if not isinstance(heads, list) or len(heads) != count or any(type(n) is not int or n < 0 for n in heads):
        raise refuse(name, heads)
    if len(kinds := {n for n in heads if n}) > 1:
        raise refuse(name, heads)
    fields["num_kv_heads"] = kinds.pop() if kinds else fields["num_heads"]
    fields["pattern"] = tuple("attention" if n else "conv" for n in heads)


GGUF_FILES = GGUF(
    types={"lfm2": Variant()},
    keys={
        "context_length": whole("max_context", limit=MAX_CONTEXT),
        "embedding_length": whole("width"),
        "feed_forward_length": whole("mlp_width"),
        "attention.head_count": whole("num_heads"),
        "attention.head_count_kv": _gguf_pattern,
        "block_count": METADATA,  # read with the pattern
        "attention.key_length": whole("head_dim", default=lambda fields: fields["width"] // fields["num_heads"]),
        "attention.value_length": same_as("head_dim"),
        "rope.dimension_count": same_as("head_dim"),
        "rope.freq_base": positive("rope_theta", default=1000000.0),
        "attention.layer_norm_rms_epsilon": positive("norm_eps"),
        "shortconv.l_cache": whole("conv_taps"),
    },
    names=Names(
        {
            **{ours.replace("attention.", "mixer."): name for ours, name in GGUF_PARTS.items()},
            "norm": "token_embd_norm",
            "mixer_norm": "attn_norm",
            "mixer.in_proj": "shortconv.in_proj",
            "mixer.conv": "shortconv.conv",
            "mixer.out_proj": "shortconv.out_proj",
        },
        layers="blk",
    ),
    tensors={
        "vocab_size": rows_of("token_embd.weight"),
        "tie_embeddings": lacks("output.weight"),
        "conv_bias": lambda shapes: any(name.endswith("shortconv.in_proj.bias") for name in shapes),
    },
    reshaped=("mixer.conv.weight",),
)

ARCHITECTURE = Architecture(
    name="lfm2", config=LFM2Config, build=lfm2, presets=PRESETS, huggingface=HUGGING_FACE, gguf=GGUF_FILES
)
