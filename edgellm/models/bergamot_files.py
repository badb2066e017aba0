"""How files of Bergamot's translators are read: their settings and names."""

from __future__ import annotations

from edgellm.models.foreign.marian import TRANSFORMER, Marian, in_layer

__all__ = ["MARIAN"]

_OUTSIDE = {
    "embedding.weight": "Wemb", "head.weight": "Wemb", "head.bias": "decoder_ff_logit_out_b", "words": "shortlist",
}  # fmt: skip


def _stored(name: str) -> str:
    """What files call a parameter of ours."""
    side, _, within = name.partition(".")
    return in_layer(side, within) if side in ("encoder", "decoder") else _OUTSIDE.get(name, name)


MARIAN = Marian(
    fields={
        "dim-emb": "width",
        "enc-depth": "encoder_layers",
        "dec-depth": "decoder_layers",
        "transformer-heads": "num_heads",
        "transformer-dim-ffn": "mlp_width",
    },
    needed={
        **TRANSFORMER,
        "dec-cell": "ssru",
        "transformer-decoder-autoreg": "rnn",
        "dec-cell-base-depth": "2",
        "dec-cell-high-depth": "1",
        "transformer-ffn-activation": "relu",
    },
    name=_stored,
)
