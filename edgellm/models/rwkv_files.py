"""How other people's checkpoints of RWKV, version 4, are read: their keys and names."""

from __future__ import annotations

from edgellm.models.foreign import (
    MAX_CONTEXT,
    MAX_LAYERS,
    Fields,
    HuggingFace,
    Names,
    Values,
    Variant,
    positive,
    refuse,
    usual_keys,
    whole,
)

__all__ = ["HUGGING_FACE"]


def _halved(name: str, values: Values, fields: Fields) -> None:
    every = values.get(name, 6)
    if type(every) is not int:
        raise refuse(name, every)
    fields["halved_every"] = every if every > 0 else MAX_LAYERS


_PARTS = {
    "embedding": "rwkv.embeddings",
    "embedding_norm": "rwkv.blocks.0.pre_ln",
    "norm": "rwkv.ln_out",
    "head": "head",
    "time_norm": "ln1",
    "channel_norm": "ln2",
    **{f"time.shift.{x}": f"attention.time_mix_{x}" for x in ("key", "value", "receptance")},
    "time.k_proj": "attention.key",
    "time.v_proj": "attention.value",
    "time.r_proj": "attention.receptance",
    "time.decay": "attention.time_decay",
    "time.first": "attention.time_first",
    "time.out_proj": "attention.output",
    **{f"channel.shift.{x}": f"feed_forward.time_mix_{x}" for x in ("key", "receptance")},
    "channel.k_proj": "feed_forward.key",
    "channel.r_proj": "feed_forward.receptance",
    "channel.v_proj": "feed_forward.value",
}

HUGGING_FACE = HuggingFace(
    types={"rwkv": Variant()},
    keys={
        **usual_keys(vocab_size=50277, width=4096, num_layers=32, tie_embeddings=False),
        "attention_hidden_size": whole("mixed_width", default=lambda fields: fields["width"]),
        "intermediate_size": whole("hidden", default=lambda fields: 4 * fields["width"]),
        "rescale_every": _halved,
        "context_length": whole("max_context", default=1024, limit=MAX_CONTEXT),
        "layer_norm_epsilon": positive("norm_eps", default=1e-5),
    },
    names=Names(_PARTS, layers="rwkv.blocks"),
)
