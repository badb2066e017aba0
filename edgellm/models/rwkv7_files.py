"""How other people's checkpoints of RWKV, version 7, are read: their keys, names and layouts."""

from __future__ import annotations

import re

from torch import Tensor

from edgellm.models.foreign import (
    Fields,
    HuggingFace,
    Names,
    TensorFile,
    Values,
    Variant,
    alike,
    checked_positive,
    checked_whole,
    neutral,
    positive,
    refuse,
    rows_of,
    usual_keys,
    whole,
)
from edgellm.models.foreign.gguf import Shapes

__all__ = ["HUGGING_FACE", "TENSORS", "USES"]

USES = ("r", "w", "k", "v", "a", "g")  # of a token, by a time mixing
_LOW_RANK = {"decay": "w", "share": "a", "value": "v", "gate": "g"}


def _hidden(name: str, values: Values, fields: Fields) -> None:
    given = values.get(name)
    ratio = values.get("hidden_ratio")
    ratio = 4 if ratio is None else checked_positive("hidden_ratio", ratio)
    usual = -(-int(fields["width"] * ratio) // 32) * 32
    fields["hidden"] = usual if given is None else checked_whole(name, given)


def _as_ours(_config: object, _values: Values, name: str, tensor: Tensor) -> Tensor:
    """Shares between tokens are numbers of what the token has here, and of what differs from the one before there."""
    return 1 - tensor if ".shift." in name else tensor


_UNREAD = (
    "num_heads", "value_dim",  # tensors of another width are refused by their shapes
    "attn_mode", "hidden_ratio", "fuse_norm", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp",
)  # fmt: skip
_PARTS = {
    "embedding": "model.embeddings",
    "embedding_norm": "model.layers.0.pre_norm",
    "norm": "model.norm",
    "head": "lm_head",
    "time_norm": "attn_norm",
    "channel_norm": "ffn_norm",
    **{f"time.shift.{use}": f"attn.x_{use}" for use in USES},
    **alike("time", "attn", "r_proj", "k_proj", "v_proj"),
    "time.out_proj": "attn.o_proj",
    "time.norm": "attn.g_norm",
    "time.key_gain": "attn.k_k",
    "time.key_share": "attn.k_a",
    "time.bonus": "attn.r_k",
    **{f"time.{ours}.down": f"attn.{letter}_lora.lora.0" for ours, letter in _LOW_RANK.items()},
    **{f"time.{ours}.up": f"attn.{letter}_lora.lora.2" for ours, letter in _LOW_RANK.items()},
    "channel.shift.key": "ffn.x_k",
    "channel.k_proj": "ffn.key",
    "channel.v_proj": "ffn.value",
}

HUGGING_FACE = HuggingFace(
    types={"rwkv7": Variant(), "rwkv7_fla": Variant()},
    keys={
        **usual_keys(vocab_size=32000, width=2048, num_layers=24, head_dim=64, max_context=2048, tie_embeddings=False),
        "intermediate_size": _hidden,
        "decay_low_rank_dim": whole("decay_rank", default=64),
        "a_low_rank_dim": whole("share_rank", default=64),
        "v_low_rank_dim": whole("value_rank", default=16),
        "gate_low_rank_dim": whole("gate_rank", default=128),
        "norm_eps": positive("norm_eps", default=1e-5),
        "norm_first": neutral(True),
        "norm_bias": neutral(True),
        "hidden_act": neutral("sqrelu"),
        "attn": neutral(None),
    },
    names=Names(_PARTS, layers="model.layers"),
    unread=_UNREAD,
    tensor=_as_ours,
)


def _sizes(shapes: Shapes) -> Fields:
    """What the shapes of the authors' tensors say; the norm of heads has one epsilon there, which is of 64 features."""
    heads, size = shapes["blocks.0.att.r_k"] if len(shapes["blocks.0.att.r_k"]) == 2 else (0, 0)
    if size != 64:
        raise refuse("blocks.0.att.r_k", shapes["blocks.0.att.r_k"])
    second = "blocks.1.att.v1"  # the first layer's values mix with none
    sizes = {
        "hidden": ("blocks.0.ffn.key.weight", 0), "decay_rank": ("blocks.0.att.w1", 1),
        "share_rank": ("blocks.0.att.a1", 1), "gate_rank": ("blocks.0.att.g1", 1),
        **({"value_rank": (second, 1)} if second in shapes else {}),
    }  # fmt: skip
    return {
        "vocab_size": rows_of("emb.weight")(shapes), "width": heads * size, "head_dim": size,
        "num_layers": 1 + max(int(n.split(".")[1]) for n in shapes if re.match(r"blocks\.\d{1,4}\.", n)),
        **{field: shapes.get(name, (0, 0))[axis] for field, (name, axis) in sizes.items()},
    }  # fmt: skip


_TENSOR_PARTS = {
    "embedding": "emb",
    "embedding_norm": "blocks.0.ln0",
    "norm": "ln_out",
    "head": "head",
    "time_norm": "ln1",
    "channel_norm": "ln2",
    **{f"time.shift.{use}": f"att.x_{use}" for use in USES},
    **{f"time.{letter}_proj": f"att.{part}" for part in ("receptance", "key", "value") for letter in part[0]},
    "time.out_proj": "att.output",
    "time.norm": "att.ln_x",
    "time.key_gain": "att.k_k",
    "time.key_share": "att.k_a",
    "time.bonus": "att.r_k",
    **{f"time.{ours}.down.weight": f"att.{letter}1" for ours, letter in _LOW_RANK.items()},
    **{f"time.{ours}.up.weight": f"att.{letter}2" for ours, letter in _LOW_RANK.items()},
    **{f"time.{ours}.up.bias": f"att.{letter}0" for ours, letter in _LOW_RANK.items()},
    "channel.shift.key": "ffn.x_k",
    "channel.k_proj": "ffn.key",
    "channel.v_proj": "ffn.value",
}

TENSORS = TensorFile(
    mark="blocks.0.att.r_k",
    sizes=_sizes,
    names=Names(_TENSOR_PARTS, layers="blocks"),
    tensor=lambda name, tensor: _as_ours(None, {}, name, tensor),
    reshaped=(".up.bias", ".key_gain", ".key_share", *(f".shift.{use}" for use in (*USES, "key"))),
    by_columns=tuple(f".{ours}.{part}.weight" for ours in _LOW_RANK for part in ("down", "up")),
    ignored=tuple(f"blocks.0.att.v{i}" for i in range(3)),
    end=0,
)
