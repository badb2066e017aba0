"""Bamba: state spaces of Mamba-2, attention in a few of the layers, each before a gated MLP.

IBM, Princeton, CMU and UIUC 2024, huggingface.co/blog/bamba. Embedding -> N layers, each a norm and a mixer, then a
norm and an MLP, each beside a residual -> norm -> head. Half of each head of attention turns with the position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from edgellm.errors import ConfigError
from edgellm.models.foreign import (
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
    hidden_act,
    positive,
    refuse,
    rotary,
    whole,
)
from edgellm.models.foreign.keys import checked_whole
from edgellm.models.layers import Block, GatedMLP, Stack
from edgellm.models.layers.rotary import order_of_part
from edgellm.models.registry import Architecture
from edgellm.models.state_spaces import HybridShape, check_pattern, mixer_keys, mixer_parts

__all__ = ["ARCHITECTURE", "PRESETS", "BambaConfig", "bamba"]


@dataclass(frozen=True, kw_only=True)
class BambaConfig(HybridShape):
    """The shape of a Bamba.

    Args:
        pattern: one mixer a layer, first to last; each ``space`` or ``attention``.
        rotated: how many features of a head of attention turn with the position.
        mlp_bias: whether the projections of the MLP have a bias.
        activation: of the MLP.
    """

    pattern: Sequence[str]
    rotated: int
    mlp_bias: bool = False
    activation: str = "silu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern(self.pattern, ("space", "attention"))
        if self.rotated % 2 or self.rotated > self.head_dim:
            raise ConfigError(f"rotated is {self.rotated}; it must be even and at most head_dim {self.head_dim}")


PRESETS: Mapping[str, BambaConfig] = {
    "tiny": BambaConfig(
        vocab_size=1024, width=128, pattern=("space", "space", "attention", "space"), num_heads=4, num_kv_heads=2,
        head_dim=32, rotated=16, mlp_width=352, max_context=512, space_heads=8, space_head_dim=32, state_size=32,
    ),
}  # fmt: skip


def bamba(config: BambaConfig) -> Stack:
    """The model with fresh weights."""
    c = config

    def block(kind: str) -> Block:
        mixer = c.state_space() if kind == "space" else c.attention()
        mlp = GatedMLP(c.width, c.mlp_width, bias=c.mlp_bias, activation=c.activation)
        return Block(c.width, c.norm_eps, {kind: mixer}, mlp)

    return Stack(c, map(block, c.pattern), rotary=c.rotary(rotated=c.rotated))


def _pattern(name: str, values: Values, fields: Fields) -> None:
    count = checked_whole(name, values.get(name, 32), MAX_LAYERS)
    attentive = values.get("attn_layer_indices") or ()
    fields["pattern"] = tuple("attention" if i in attentive else "space" for i in range(count))


def _half(name: str, values: Values, fields: Fields) -> None:
    """What turns is half of a head, whatever else a file might say."""
    if 2 * fields["rotated"] != fields["head_dim"]:
        raise refuse(name, fields["rotated"] / fields["head_dim"])


def _tensor(config: BambaConfig, _values: Values, name: str, tensor: Tensor) -> Tensor:
    """Features of queries and keys in the order that attention turns."""
    if ".attention.q_proj." not in name and ".attention.k_proj." not in name:
        return tensor
    order = order_of_part(config.head_dim, config.rotated)
    return tensor.reshape(-1, config.head_dim, *tensor.shape[1:])[:, order].flatten(0, 1)


HUGGING_FACE = HuggingFace(
    types={"bamba": Variant()},
    keys={
        "vocab_size": whole("vocab_size", default=128000),
        "hidden_size": whole("width", default=4096),
        "num_hidden_layers": _pattern,
        "num_attention_heads": whole("num_heads", default=32),
        "num_key_value_heads": whole("num_kv_heads", default=8),
        "head_dim": whole("head_dim", default=lambda fields: fields["width"] // fields["num_heads"]),
        "intermediate_size": whole("mlp_width", default=14336),
        "max_position_embeddings": whole("max_context", default=262144, limit=MAX_CONTEXT),
        **mixer_keys(),
        **rotary(share=0.5),
        "partial_rotary_factor": _half,
        "rms_norm_eps": positive("norm_eps", default=1e-5),
        "tie_word_embeddings": flag("tie_embeddings", default=False),
        "hidden_act": hidden_act(),
        "attention_bias": flag("attention_bias", default=False),
        "mlp_bias": flag("mlp_bias", default=False),
        **dict.fromkeys(
            ("attn_layer_indices", "attn_rotary_emb", "num_logits_to_keep", "z_loss_coefficient"), METADATA
        ),
    },
    names=Names(
        {
            **HUGGING_FACE_PARTS,
            **mixer_parts("space", "mamba"),
            "norm": "model.final_layernorm",
            "mixer_norm": "input_layernorm",
            "mlp_norm": "pre_ff_layernorm",
            **{f"mlp.{part}": f"feed_forward.{part}" for part in ("gate_proj", "up_proj", "down_proj")},
        },
        layers="model.layers",
    ),
    tensor=_tensor,
)

ARCHITECTURE = Architecture(name="bamba", config=BambaConfig, build=bamba, presets=PRESETS, huggingface=HUGGING_FACE)
