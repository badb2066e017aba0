"""How other people's checkpoints of BART and Marian are read: their types, keys and names."""

from __future__ import annotations

from edgellm.models.foreign import (
    MAX_LAYERS,
    METADATA,
    REQUIRED,
    Fields,
    HuggingFace,
    Names,
    Stacks,
    Values,
    Variant,
    flag,
    hidden_act,
    neutral,
    refuse,
    usual_keys,
    whole,
)
from edgellm.models.foreign.marian import TRANSFORMER, Marian, in_layer

__all__ = ["HUGGING_FACE", "MARIAN"]


def _start(name: str, values: Values, fields: Fields) -> None:
    """The token that decoders begin with and, where one is forced to follow, that."""
    first, forced = values.get(name), values.get("forced_bos_token_id")
    for key, token in ((name, first), ("forced_bos_token_id", first if forced is None else forced)):
        if type(token) is not int:
            raise refuse(key, token)
    fields["start_tokens"] = (first,) if forced is None else (first, forced)


_LAYER = {
    **{f"attention.{n}_proj": f"self_attn.{n}_proj" for n in "qkv"},
    "attention.o_proj": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    **{f"cross.{n}_proj": f"encoder_attn.{n}_proj" for n in "qkv"},
    "cross.o_proj": "encoder_attn.out_proj",
    "cross_norm": "encoder_attn_layer_norm",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "mlp_norm": "final_layer_norm",
}
_PARTS = {"embedding": "embed_tokens", "positions": "embed_positions", "embedding_norm": "layernorm_embedding"}
_STACKS = {f"{s}.{ours}": f"model.{s}.{theirs}" for s in ("encoder", "decoder") for ours, theirs in _PARTS.items()}
_WAVES = Variant(
    keys={"share_encoder_decoder_embeddings": neutral(True), "decoder_vocab_size": METADATA},
    fields={"learned_positions": False, "norm_embedding": False},
)

_FIRST = {**_LAYER, **_STACKS, "embedding": "model.shared", "head": "lm_head", "logits_bias": "final_logits_bias"}
_UNREAD = (
    "static_position_embeddings", "normalize_embedding", "extra_pos_embeddings", "force_bos_token_to_be_generated",
    "activation_dropout", "dropout", "encoder_layerdrop", "decoder_layerdrop", "init_std", "classif_dropout",
    "num_hidden_layers", "num_attention_heads", "gradient_checkpointing",
)  # fmt: skip

HUGGING_FACE = HuggingFace(
    types={"bart": Variant(), "marian": _WAVES},
    keys={
        **usual_keys(vocab_size=REQUIRED, max_context=REQUIRED),
        "d_model": whole("width"),
        "encoder_layers": whole("encoder_layers", limit=MAX_LAYERS),
        "decoder_layers": whole("decoder_layers", limit=MAX_LAYERS),
        "encoder_attention_heads": whole("encoder_heads"),
        "decoder_attention_heads": whole("decoder_heads"),
        "encoder_ffn_dim": whole("encoder_mlp_width"),
        "decoder_ffn_dim": whole("decoder_mlp_width"),
        "activation_function": hidden_act(default="gelu"),
        "scale_embedding": flag("scale_embedding", default=False),
        "decoder_start_token_id": _start,
        "tie_word_embeddings": neutral(True, None),
        "is_encoder_decoder": neutral(True, None),
        # what some files say of variants that these are not
        "normalize_before": neutral(False, None),
        "add_final_layer_norm": neutral(False, None),
        "add_bias_logits": neutral(False, None),
    },
    names=Stacks(
        (
            Names(_FIRST, layers="model.encoder.layers", ours="encoder.layers"),
            Names(_LAYER, layers="model.decoder.layers", ours="decoder.layers"),
        )
    ),
    unread=_UNREAD,
    ignored=("embed_positions.weight",),  # of Marian, where they are computed here
)


def _marian(name: str) -> str:
    """What Marian's own files call a parameter of ours."""
    side, _, within = name.partition(".layers.")
    if not within:
        return "decoder_ff_logit_out_b" if name == "logits_bias" else "Wemb"
    return in_layer(side, within)


_ACTIVATIONS = {word: {"activation": ours} for word, ours in (("swish", "silu"), ("relu", "relu"), ("gelu", "gelu"))}

MARIAN = Marian(
    fields={
        "dim-emb": "width",
        "enc-depth": "encoder_layers",
        "dec-depth": "decoder_layers",
        "transformer-heads": ("encoder_heads", "decoder_heads"),
        "transformer-dim-ffn": ("encoder_mlp_width", "decoder_mlp_width"),
    },
    words={"transformer-ffn-activation": _ACTIVATIONS},
    fixed={"learned_positions": False, "norm_embedding": False, "scale_embedding": True, "max_context": 512},
    needed={
        **TRANSFORMER,
        "transformer-decoder-autoreg": "self-attention",
        "transformer-postprocess-emb": "d",
    },
    name=_marian,
    starts_apart=True,
)
