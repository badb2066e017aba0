"""How other people's checkpoints of Qwen3-Next and Qwen3.5 are read: their types, keys, names and layouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgellm.models.foreign import (
    ATTENTION_PARTS,
    HUGGING_FACE_PARTS,
    MAX_LAYERS,
    METADATA,
    MLP_PARTS,
    Fields,
    HuggingFace,
    Key,
    Names,
    Values,
    Variant,
    alike,
    checked_kinds,
    checked_whole,
    flag,
    neutral,
    rotary,
    usual_keys,
    whole,
)
from edgellm.models.layers.rotary import heads_in_order, order_of_part

__all__ = ["HUGGING_FACE"]

_MIXERS = {"linear_attention": "delta", "full_attention": "attention"}  # transformers' names and ours


def _pattern(layers: int) -> Key:
    """Each layer's mixer; where the file names none, every fourth is attention.

    Args:
        layers: how many there are where the file does not say.
    """

    def take(name: str, values: Values, fields: Fields) -> None:
        count = checked_whole("num_hidden_layers", values.get("num_hidden_layers", layers), MAX_LAYERS)
        every = checked_whole("full_attention_interval", values.get("full_attention_interval", 4))
        kinds = values.get(name) or [[*_MIXERS][(i + 1) % every == 0] for i in range(count)]
        fields["pattern"] = tuple(_MIXERS[kind] for kind in checked_kinds(name, kinds, _MIXERS, count))

    return take


def _sparse(name: str, values: Values, fields: Fields) -> None:
    """Which layers have experts."""
    step, plain = checked_whole(name, values.get(name, 1)), values.get("mlp_only_layers") or ()
    fields["experts"] = tuple(i for i in range(len(fields["pattern"])) if i not in plain and (i + 1) % step == 0)


def _tensor(config: Any, _values: Values, name: str, tensor: Tensor) -> Tensor:
    """Norms by 1 + w, features of a head in the order that attention turns, and what was interleaved apart."""
    c, part = config, name.rpartition(".mixer.")[2].rpartition(".")[0]
    if ".mixer." in name and c.pattern[int(name.split(".")[1])] == "attention":
        return _of_attention(c, part, tensor)
    if name == "norm.weight" or name.endswith("_norm.weight"):
        return 1 + tensor.float()
    if part in ("qkvz_proj", "gates_proj"):
        shared = c.delta_heads // c.delta_groups
        keys, values = c.delta_key_dim, shared * c.delta_value_dim
        groups = tensor.reshape(c.delta_groups, -1, tensor.shape[1])
        sizes = [keys, keys, values, values] if part == "qkvz_proj" else [shared, shared]
        return torch.cat([x.flatten(0, 1) for x in torch.split(groups, sizes, dim=1)])
    return tensor


def _of_attention(c: Any, part: str, tensor: Tensor) -> Tensor:
    order = order_of_part(c.head_dim, c.rotated)
    if part == "q_proj":
        heads = tensor.reshape(c.num_heads, 2, c.head_dim, *tensor.shape[1:])  # a query and a gate for each
        return torch.cat([heads[:, 0, order].flatten(0, 1), heads[:, 1].flatten(0, 1)])
    if part == "k_proj":
        return heads_in_order(tensor, c.head_dim, c.rotated)
    return 1 + tensor[order].float() if part in ("q_norm", "k_norm") else tensor


def _experts(count: int, chosen: int) -> dict[str, Key]:
    """The keys of mixtures of experts.

    Args:
        count: experts where the file does not say.
        chosen: of them, a token's.
    """
    return {
        "num_experts": whole("num_experts", default=count),
        "num_experts_per_tok": whole("num_chosen", default=chosen),
        "moe_intermediate_size": whole("expert_width", default=512),
        "shared_expert_intermediate_size": whole("shared_width", default=512),
        **dict.fromkeys(("router_aux_loss_coef", "output_router_logits"), METADATA),  # of training
        **dict.fromkeys(("num_local_experts", "n_routed_experts"), METADATA),  # the same number again
    }


_SIZES = usual_keys(
    vocab_size=151936, width=2048, num_heads=16, num_kv_heads=2, head_dim=256, mlp_width=5632, max_context=32768,
    norm_eps=1e-6, tie_embeddings=False, attention_bias=False,
)  # fmt: skip
_PARTS = {
    **HUGGING_FACE_PARTS,
    **alike("mixer", "self_attn", *ATTENTION_PARTS),
    **alike("mixer", "linear_attn", "norm", "out_proj"),
    **{f"mixer.{part}_proj": f"linear_attn.in_proj_{part}" for part in ("qkvz", "qkv", "z")},
    "mixer.gates_proj": "linear_attn.in_proj_ba",
    "mixer.beta_proj": "linear_attn.in_proj_b",
    "mixer.decay_proj": "linear_attn.in_proj_a",
    "mixer.conv": "linear_attn.conv1d",
    "mixer.dt_offset": "linear_attn.dt_bias",
    "mixer.a_log": "linear_attn.A_log",
    "mlp.router": "mlp.gate",
    "mlp.shared_gate": "mlp.shared_expert_gate",
    **alike("mlp.experts.*", "mlp.experts.*", *MLP_PARTS),
    **alike("mlp.shared", "mlp.shared_expert", *MLP_PARTS),
}

HUGGING_FACE = HuggingFace(
    types={
        "qwen3_next": Variant(
            keys={
                **_experts(512, 10),
                "mlp_only_layers": METADATA,  # read with the next
                "decoder_sparse_step": _sparse,
                "norm_topk_prob": flag("normalised", default=True),
            }
        ),
        "qwen3_5_moe_text": Variant(
            fields={"packed": False},
            keys={
                "vocab_size": whole("vocab_size", default=248320),
                "layer_types": _pattern(40),
                **_experts(256, 8),
                "decoder_sparse_step": _sparse,  # every layer, for the file does not say
                "intermediate_size": whole("mlp_width", default=1),  # of no layer
            },
        ),
        "qwen3_5_text": Variant(
            fields={"packed": False},
            keys={
                "vocab_size": whole("vocab_size", default=248320),
                "hidden_size": whole("width", default=4096),
                "layer_types": _pattern(32),
                "num_key_value_heads": whole("num_kv_heads", default=4),
                "intermediate_size": whole("mlp_width", default=12288),
            },
        ),
    },
    keys={
        **_SIZES,
        "layer_types": _pattern(48),
        "linear_num_value_heads": whole("delta_heads", default=32),
        "linear_num_key_heads": whole("delta_groups", default=16),
        "linear_key_head_dim": whole("delta_key_dim", default=128),
        "linear_value_head_dim": whole("delta_value_dim", default=128),
        "linear_conv_kernel_dim": whole("conv_taps", default=4),
        **rotary(share=0.25, without_effect=("mrope_section", "mrope_interleaved")),  # of pictures' positions
        "hidden_act": neutral("silu", "swish"),
    },
    names=Names(_PARTS, layers="model.layers"),
    unread=("num_hidden_layers", "full_attention_interval"),  # read with the layers
    tensor=_tensor,
)
