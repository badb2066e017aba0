"""Bamba: state spaces of Mamba-2, attention in a few of the layers, each before a gated MLP.

IBM, Princeton, CMU and UIUC 2024, huggingface.co/blog/bamba. Embedding -> N layers, each a norm and a mixer, then a
norm and an MLP, each beside a residual -> norm -> head. Half of each head of attention turns with the position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from edgellm.models.foreign import (
    FEED_FORWARD_PARTS,
    MAX_LAYERS,
    Fields,
    HuggingFace,
    Names,
    Values,
    Variant,
    checked_whole,
    hidden_act,
    refuse,
    rotary,
    usual_keys,
    width_by_heads,
)
from edgellm.models.layers import Block, GatedMLP, Stack
from edgellm.models.layers.rotary import heads_in_order
from edgellm.models.registry import Architecture
from edgellm.models.shapes import PartlyRotaryShape, PatternShape
from edgellm.models.state_spaces import HybridShape
from edgellm.models.state_spaces_files import mixer_keys, mixer_parts

__all__ = ["ARCHITECTURE", "PRESETS", "BambaConfig", "bamba"]


@dataclass(frozen=True, kw_only=True)
class BambaConfig(PatternShape, PartlyRotaryShape, HybridShape):
    """The shape of a Bamba.

    Args:
        mlp_bias: whether the projections of the MLP have a bias.
        activation: of the MLP.
    """

    KINDS = ("space", "attention")
    mlp_bias: bool = False
    activation: str = "silu"


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

    return Stack(c, map(block, c.pattern), rotary=c.rotary())


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
    queries_or_keys = ".attention.q_proj." in name or ".attention.k_proj." in name
    return heads_in_order(tensor, config.head_dim, config.rotated) if queries_or_keys else tensor


_SIZES = usual_keys(
    vocab_size=128000, width=4096, num_heads=32, num_kv_heads=8, head_dim=width_by_heads, mlp_width=14336,
    max_context=262144, norm_eps=1e-5, tie_embeddings=False, attention_bias=False, mlp_bias=False,
)  # fmt: skip

HUGGING_FACE = HuggingFace(
    types={"bamba": Variant()},
    keys={
        **_SIZES,
        "num_hidden_layers": _pattern,
        **mixer_keys(),
        **rotary(share=0.5),
        "partial_rotary_factor": _half,
        "hidden_act": hidden_act(),
    },
    names=Names({**FEED_FORWARD_PARTS, **mixer_parts("space", "mamba")}, layers="model.layers"),
    unread=("attn_layer_indices", "attn_rotary_emb", "num_logits_to_keep", "z_loss_coefficient"),
    tensor=_tensor,
)

ARCHITECTURE = Architecture(name="bamba", config=BambaConfig, build=bamba, presets=PRESETS, huggingface=HUGGING_FACE)
