"""How other people's checkpoints of xLSTM are read: their keys and names."""

from __future__ import annotations

from edgellm.models.foreign import (
    MAX_LAYERS,
    Fields,
    HuggingFace,
    Key,
    Names,
    Values,
    Variant,
    checked_positive,
    checked_whole,
    neutral,
    positive,
    refuse,
    usual_keys,
    whole,
)

__all__ = ["HUGGING_FACE"]


def _same(into: str, other: str, default: int, limit: int = 2**31) -> Key:
    """A number that the file may have under two names."""

    def take(name: str, values: Values, fields: Fields) -> None:
        found = values.get(name) or values.get(other) or default
        fields[into] = checked_whole(name, found, limit)
        if (values.get(other) or found) != found:
            raise refuse(other, values[other])

    return take


def _share(into: str, default: float) -> Key:
    """A part of the width."""

    def take(name: str, values: Values, fields: Fields) -> None:
        fields[into] = int(fields["width"] * checked_positive(name, values.get(name, default)))

    return take


def _mlp_width(name: str, values: Values, fields: Fields) -> None:
    """A multiple of the width, rounded up."""
    multiple = checked_whole("ffn_round_up_to_multiple_of", values.get("ffn_round_up_to_multiple_of", 64))
    wanted = fields["width"] * checked_positive(name, values.get(name, 2.667))
    fields["mlp_width"] = int((wanted + multiple - 1) // multiple * multiple)


_UNREAD = (  # said by other keys, of kernels, and of precisions below the one that everything is computed in here
    "embedding_dim", "num_blocks", "ffn_round_up_to_multiple_of", "add_out_norm", "chunkwise_kernel",
    "sequence_kernel", "step_kernel", "mode", "chunk_size", "return_last_states", "autocast_kernel_dtype",
    "inference_state_dtype", "norm_reduction_force_float32", "max_inference_chunksize",
)  # fmt: skip
_PARTS = {
    "embedding": "backbone.embeddings",
    "norm": "backbone.out_norm",
    "head": "lm_head",
    "mixer_norm": "norm_mlstm",
    **{f"mixer.{x}_proj": f"mlstm_layer.{x}" for x in "qkv"},
    "mixer.gate_proj": "mlstm_layer.ogate_preact",
    "mixer.input_proj": "mlstm_layer.igate_preact",
    "mixer.forget_proj": "mlstm_layer.fgate_preact",
    "mixer.norm": "mlstm_layer.multihead_norm.weight",
    "mixer.out_proj": "mlstm_layer.out_proj",
    "mlp_norm": "norm_ffn",
    "mlp.gate_proj": "ffn.proj_up_gate",
    "mlp.up_proj": "ffn.proj_up",
    "mlp.down_proj": "ffn.proj_down",
}

HUGGING_FACE = HuggingFace(
    types={"xlstm": Variant()},
    keys={
        **usual_keys(vocab_size=50304, tie_embeddings=False),
        "hidden_size": _same("width", "embedding_dim", 4096),
        "num_hidden_layers": _same("num_layers", "num_blocks", 32, MAX_LAYERS),
        "num_heads": whole("num_heads", default=8),
        "qk_dim_factor": _share("key_width", 0.5),
        "v_dim_factor": _share("value_width", 1.0),
        "ffn_proj_factor": _mlp_width,
        "gate_soft_cap": positive("gate_cap", default=15.0),
        "output_logit_soft_cap": positive("logit_cap", default=30.0),
        "eps": positive("memory_eps", default=1e-6),
        "norm_eps": positive("norm_eps", default=1e-6),
        "use_bias": neutral(False),
        "weight_mode": neutral("single"),
    },
    names=Names(_PARTS, layers="backbone.blocks"),
    unread=_UNREAD,
)
