"""Granite 4: state spaces of Mamba-2, attention in a few of the layers, a mixture of experts and a shared one after it.

IBM 2025. Embedding, scaled -> N layers, each a norm and a mixer, then a norm and the experts, each beside a residual ->
norm -> head, scaled. What its files multiply residuals by is in the weights here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.models.foreign import (
    HUGGING_FACE_PARTS,
    Fields,
    HuggingFace,
    Names,
    Values,
    Variant,
    as_many_heads,
    checked_positive,
    checked_whole,
    choice,
    hidden_act,
    inverse,
    positive,
    rotary,
    usual_keys,
    whole,
    width_by_heads,
)
from edgellm.models.layers import Block, Experts, PackedMLP, Stack
from edgellm.models.registry import Architecture
from edgellm.models.shapes import PatternShape
from edgellm.models.state_spaces import HybridShape
from edgellm.models.state_spaces_files import mixer_keys, mixer_parts, pattern_key

__all__ = ["ARCHITECTURE", "PRESETS", "GraniteMoeHybridConfig", "granitemoehybrid"]

_THEIRS = {"linear_attention": "space", "full_attention": "attention", "mamba": "space", "attention": "attention"}


@dataclass(frozen=True, kw_only=True)
class GraniteMoeHybridConfig(PatternShape, HybridShape):
    """The shape of a Granite hybrid; ``mlp_width`` is the hidden features of one expert.

    Args:
        score_scale: factor on the scores of attention.
        rotates: whether attention turns by the position.
        num_experts: experts of a layer; 0 for the shared one alone.
        num_chosen: how many of them a token has.
        shared_width: hidden features of the shared one.
        activation: of all of them.
        embedding_scale: factor on embeddings.
        logit_scale: factor on logits.
    """

    KINDS = ("space", "attention")
    score_scale: float
    rotates: bool = False
    num_experts: int | None = None
    num_chosen: int = 1
    shared_width: int
    activation: str = "silu"
    embedding_scale: float = 1.0
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts is not None and not 1 <= self.num_chosen <= self.num_experts:
            raise ConfigError(f"num_chosen is {self.num_chosen}, of num_experts {self.num_experts}")


PRESETS: Mapping[str, GraniteMoeHybridConfig] = {
    "tiny": GraniteMoeHybridConfig(
        vocab_size=1024, width=128, pattern=("space", "space", "attention", "space"), num_heads=4, num_kv_heads=2,
        head_dim=32, score_scale=32**-0.5, mlp_width=96, max_context=512, space_heads=8, space_head_dim=32,
        state_size=32, num_experts=4, num_chosen=2, shared_width=192,
    ),
}  # fmt: skip


def granitemoehybrid(config: GraniteMoeHybridConfig) -> Stack:
    """The model with fresh weights."""
    c = config

    def block(kind: str) -> Block:
        mixer = c.state_space() if kind == "space" else c.attention(scale=c.score_scale)
        return Block(c.width, c.norm_eps, {kind: mixer}, _mlp(c))

    return Stack(
        c, map(block, c.pattern), rotary=c.rotary() if c.rotates else None, embedding_scale=c.embedding_scale,
        logit_scale=c.logit_scale,
    )  # fmt: skip


def _mlp(c: GraniteMoeHybridConfig) -> nn.Module:
    if c.num_experts is None:
        return PackedMLP(c.width, c.shared_width, activation=c.activation)
    return Experts(
        c.width, c.mlp_width, c.num_experts, c.num_chosen, shared_hidden=c.shared_width, shared_gated=False,
        packed=True, activation=c.activation,
    )  # fmt: skip


def _num_experts(name: str, values: Values, fields: Fields) -> None:
    given = values.get(name, 8)
    fields["num_experts"] = None if given == 0 else checked_whole(name, given)


def _positive(name: str, values: Values, _fields: Fields) -> None:
    checked_positive(name, values.get(name, 1.0))


def _with_residual(_config: GraniteMoeHybridConfig, values: Values, name: str, tensor: Tensor) -> Tensor:
    """What is added to a residual, times what the file multiplies it by."""
    scale = float(values.get("residual_multiplier", 1.0))
    ends = name.rpartition(".")[0].endswith((".o_proj", ".out_proj"))
    return tensor * scale if ends and scale != 1 else tensor


_PARTS = {
    **HUGGING_FACE_PARTS,
    **mixer_parts("space", "mamba"),
    "mlp.in_proj": "shared_mlp.input_linear",
    "mlp.out_proj": "shared_mlp.output_linear",
    "mlp.router": "block_sparse_moe.router.layer",
    "mlp.shared.in_proj": "shared_mlp.input_linear",
    "mlp.shared.out_proj": "shared_mlp.output_linear",
    "mlp.experts.*.in_proj": "block_sparse_moe.input_linear.*",
    "mlp.experts.*.out_proj": "block_sparse_moe.output_linear.*",
}

_SIZES = usual_keys(
    vocab_size=32000, width=4096, num_heads=32, num_kv_heads=as_many_heads, head_dim=width_by_heads,
    mlp_width=11008, max_context=2048, norm_eps=1e-6, tie_embeddings=False, attention_bias=False,
)  # fmt: skip
_UNREAD = (  # of training, of kernels, of older code, or said by other keys
    "num_hidden_layers", "output_router_logits", "router_aux_loss_coef", "init_method", "normalization_function",
    "num_experts", "n_routed_experts", "moe_intermediate_size",
)  # fmt: skip

HUGGING_FACE = HuggingFace(
    types={"granitemoehybrid": Variant()},
    keys={
        **_SIZES,
        "layer_types": pattern_key(_THEIRS),
        "shared_intermediate_size": whole("shared_width", default=1024),
        "num_local_experts": _num_experts,
        "num_experts_per_tok": whole("num_chosen", default=2),
        **mixer_keys(),
        **rotary(),
        "position_embedding_type": choice("rotates", {"rope": True, "nope": False}, default=False),
        "hidden_act": hidden_act(),
        "attention_multiplier": positive("score_scale", default=1.0),
        "embedding_multiplier": positive("embedding_scale", default=1.0),
        "residual_multiplier": _positive,
        "logits_scaling": inverse("logit_scale"),
    },
    names=Names(_PARTS, layers="model.layers"),
    unread=_UNREAD,
    tensor=_with_residual,
    stacked=("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
)

ARCHITECTURE = Architecture(
    name="granitemoehybrid", config=GraniteMoeHybridConfig, build=granitemoehybrid, presets=PRESETS,
    huggingface=HUGGING_FACE,
)  # fmt: skip
