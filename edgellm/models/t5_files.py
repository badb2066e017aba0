"""How other people's checkpoints of T5 are read: their keys and names."""

from __future__ import annotations

from edgellm.models.foreign import (
    MAX_CONTEXT,
    MAX_LAYERS,
    REQUIRED,
    Fields,
    HuggingFace,
    Names,
    Stacks,
    Values,
    Variant,
    neutral,
    positive,
    refuse,
    usual_keys,
    whole,
)

__all__ = ["HUGGING_FACE"]

_FORWARD = {"relu": (False, "relu"), "gated-gelu": (True, "gelu_tanh"), "gated-silu": (True, "silu"),
            "gelu": (False, "gelu"), "gelu_new": (False, "gelu_tanh"), "silu": (False, "silu")}  # fmt: skip


def _feed_forward(name: str, values: Values, fields: Fields) -> None:
    said = values.get(name, "relu")
    if not isinstance(said, str) or said not in _FORWARD:
        raise refuse(name, said)
    fields["gated"], fields["activation"] = _FORWARD[said]


def _start(name: str, values: Values, fields: Fields) -> None:
    """The token that decoders begin with: padding, unless the file says another."""
    start = values.get(name, values.get("pad_token_id", 0))
    if type(start) is not int or start < 0:
        raise refuse(name, start)
    fields["start_tokens"] = (start,)


def _output_scale(name: str, values: Values, fields: Fields) -> None:
    """Older files say it by tied embeddings."""
    said = values.get(name, fields["tie_embeddings"])
    if type(said) is not bool:
        raise refuse(name, said)
    fields["scale_output"] = said


_LAYER = {
    "attention_norm": "layer.0.layer_norm",
    **{f"attention.{n}_proj": f"layer.0.SelfAttention.{n}" for n in "qkvo"},
}


def _mlp(at: int) -> dict[str, str]:
    dense = f"layer.{at}.DenseReluDense"
    return {
        "mlp_norm": f"layer.{at}.layer_norm", "mlp.fc1": f"{dense}.wi", "mlp.fc2": f"{dense}.wo",
        "mlp.gate_proj": f"{dense}.wi_0", "mlp.up_proj": f"{dense}.wi_1", "mlp.down_proj": f"{dense}.wo",
    }  # fmt: skip


def _stack(name: str) -> dict[str, str]:
    table = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return {
        f"{name}.embedding": f"{name}.embed_tokens", f"{name}.norm": f"{name}.final_layer_norm",
        f"{name}.relative_bias": table,
    }  # fmt: skip


_ENCODER = {
    **_LAYER, **_mlp(1), "embedding": "shared", "head": "lm_head", **_stack("encoder"), **_stack("decoder"),
}  # fmt: skip
_DECODER = {
    **_LAYER, "cross_norm": "layer.1.layer_norm",
    **{f"cross.{n}_proj": f"layer.1.EncDecAttention.{n}" for n in "qkvo"}, **_mlp(2),
}  # fmt: skip

HUGGING_FACE = HuggingFace(
    types={"t5": Variant()},
    keys={
        **usual_keys(vocab_size=REQUIRED, tie_embeddings=True),
        "d_model": whole("width"),
        "num_layers": whole("encoder_layers", limit=MAX_LAYERS),
        "num_decoder_layers": whole(
            "decoder_layers", default=lambda fields: fields["encoder_layers"], limit=MAX_LAYERS
        ),
        "num_heads": whole("num_heads"),
        "d_kv": whole("head_dim"),
        "d_ff": whole("mlp_width"),
        "n_positions": whole("max_source", default=512, limit=MAX_CONTEXT),
        "relative_attention_num_buckets": whole("num_buckets", default=32),
        "relative_attention_max_distance": whole("max_distance", default=128),
        "layer_norm_epsilon": positive("norm_eps", default=1e-6),
        "feed_forward_proj": _feed_forward,
        "scale_decoder_outputs": _output_scale,
        "decoder_start_token_id": _start,
        "is_encoder_decoder": neutral(True, None),
    },
    names=Stacks(
        (
            Names(_ENCODER, layers="encoder.block", ours="encoder.layers"),
            Names(_DECODER, layers="decoder.block", ours="decoder.layers"),
        )
    ),
    unread=("is_gated_act", "dense_act_fn", "dropout_rate", "initializer_factor", "output_past"),
    ignored=("EncDecAttention.relative_attention_bias.weight",),  # of the first checkpoints, and read by nobody
)
