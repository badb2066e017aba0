"""T5: an encoder and a decoder of pre-norm transformer layers whose only positions are biases by distance.

Raffel et al. 2020, arXiv:1910.10683; the gated form of version 1.1, Shazeer 2020, arXiv:2002.05202. What other people's
checkpoints of such models say stands below the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.models.config import Shape
from edgellm.models.foreign import (
    MAX_CONTEXT,
    MAX_LAYERS,
    METADATA,
    Fields,
    HuggingFace,
    Names,
    Stacks,
    Values,
    Variant,
    flag,
    neutral,
    positive,
    refuse,
    whole,
)
from edgellm.models.layers import MLP, GatedMLP, SelfAttention, SourceAttention, mask_spec
from edgellm.models.layers.mlp import ACTIVATIONS
from edgellm.models.layers.source_attention import SOURCE_MASK
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.ops import source_mask, take_positions
from edgellm_runtime.spec import StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "T5", "T5Config"]


@dataclass(frozen=True)
class T5Config(Shape):
    """The shape of a :class:`T5`.

    Args:
        vocab_size: tokens.
        width: features between layers.
        encoder_layers: layers of the encoder.
        decoder_layers: layers of the decoder.
        num_heads: attention heads.
        head_dim: features of one head.
        mlp_width: hidden features of the feed-forward layers.
        max_context: the most tokens of an answer; the model itself has no limit.
        max_source: the most tokens of a source; likewise.
        num_buckets: rows of the tables of biases.
        max_distance: tokens further apart than this share a bucket.
        gated: whether feed-forward layers are gated.
        activation: of the feed-forward layers.
        norm_eps: added to the mean square in the norms.
        tie_embeddings: whether the vocabulary projection is the embedding.
        scale_output: whether what is projected to the vocabulary is divided by the square root of ``width``.
        start_tokens: what every answer begins with.
    """

    vocab_size: int
    width: int
    encoder_layers: int
    decoder_layers: int
    num_heads: int
    head_dim: int
    mlp_width: int
    max_context: int = 512
    max_source: int = 512
    num_buckets: int = 32
    max_distance: int = 128
    gated: bool = False
    activation: str = "relu"
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    scale_output: bool = True
    start_tokens: Sequence[int] = (0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation is {self.activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
        if self.num_buckets < 4 or self.max_distance <= self.num_buckets // 2:
            raise ConfigError(
                f"num_buckets {self.num_buckets} must be at least 4, and max_distance {self.max_distance} over half of "
                "them"
            )


PRESETS: Mapping[str, T5Config] = {
    "tiny": T5Config(
        vocab_size=1024, width=128, encoder_layers=3, decoder_layers=3, num_heads=4, head_dim=32, mlp_width=352,
        gated=True, activation="gelu_tanh",
    ),
}  # fmt: skip


def buckets(distance: Tensor, *, count: int, most: int, both_ways: bool) -> Tensor:
    """The row of a table for each distance from a query to a key: one each while near, then ever more share one.

    Args:
        distance: whole numbers, positive for keys that come later.
        count: rows of the table.
        most: from which on all share the last row.
        both_ways: whether keys may come later, which then have the table's second half.
    """
    count = count // 2 if both_ways else count
    far = (distance > 0).long() * count if both_ways else torch.zeros_like(distance)
    distance = distance.abs() if both_ways else (-distance).clamp(min=0)
    exact = count // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(most / exact)
    shared = (exact + (ratio * (count - exact)).long()).clamp(max=count - 1)
    return far + torch.where(distance < exact, distance, shared)


class T5Stack(nn.Module):
    """The layers of the encoder or of the decoder, and the norm after them.

    Args:
        config: of the model.
        embedding: the model's own.
        decodes: whether it is the decoder.
    """

    rows: Tensor  # (distances,): the table's row for each distance, nearest first or, both ways, from the earliest key

    def __init__(self, config: T5Config, embedding: nn.Embedding, *, decodes: bool) -> None:
        super().__init__()
        c = config
        count = c.decoder_layers if decodes else c.encoder_layers
        self.embedding, self.most = embedding, c.max_distance
        self.layers = nn.ModuleList(Layer(c, decodes=decodes) for _ in range(count))
        self.norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.relative_bias = nn.Parameter(torch.zeros(c.num_buckets, c.num_heads))
        near = torch.arange(0, -c.max_distance - 1, -1, device="cpu")
        distances = near if decodes else torch.arange(-c.max_distance, c.max_distance + 1, device="cpu")
        rows = buckets(distances, count=c.num_buckets, most=c.max_distance, both_ways=not decodes)
        self.register_buffer("rows", rows, persistent=False)

    def distances(self) -> Tensor:
        """The bias for each distance, (distances, num_heads)."""
        return self.relative_bias[self.rows]

    def bias(self, time: int) -> Tensor:
        """The bias between all tokens of a source, (1, num_heads, time, time)."""
        at = torch.arange(time, device=self.rows.device)
        back = (at[None] - at[:, None]).clamp(-self.most, self.most) + self.most
        return self.distances()[back].permute(2, 0, 1)[None]


class Layer(nn.Module):
    """Self-attention, in a decoder attention to the source, and an MLP, each behind a norm and beside a residual."""

    def __init__(self, config: T5Config, *, decodes: bool) -> None:
        super().__init__()
        c = config
        self.attention_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.attention: SelfAttention | SourceAttention = (
            SelfAttention(c.width, c.num_heads, c.num_heads, c.head_dim, bias=False, scale=1.0)
            if decodes
            else SourceAttention(c.width, c.num_heads, c.head_dim, scale=1.0)
        )
        self.cross_norm = nn.RMSNorm(c.width, eps=c.norm_eps) if decodes else None
        self.cross = SourceAttention(c.width, c.num_heads, c.head_dim, scale=1.0) if decodes else None
        self.mlp_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.mlp = (
            GatedMLP(c.width, c.mlp_width, activation=c.activation)
            if c.gated
            else MLP(c.width, c.mlp_width, bias=False, activation=c.activation)
        )

    def encode(self, x: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        """(batch, source, width) to the same shape."""
        assert isinstance(self.attention, SourceAttention)
        y = self.attention_norm(x)
        x = x + self.attention(y, *self.attention.keys(y), mask, bias)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out

    def decode(
        self, x: Tensor, state: State, prefix: str, step: Step, distances: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        assert self.cross is not None and self.cross_norm is not None
        y, present = self.attention(self.attention_norm(x), state, prefix, step, None, distances)
        x = x + y
        x = x + self.cross.answer(self.cross_norm(x), state, prefix)
        return x + self.mlp(self.mlp_norm(x)), present


class T5(nn.Module):
    """See the module's description; follows :class:`edgellm.models.protocol.SourceModel`."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.encoder = T5Stack(config, self.embedding, decodes=False)
        self.decoder = T5Stack(config, self.embedding, decodes=True)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=1.0 if config.scale_output else config.width**-0.5)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def state_specs(self) -> list[StateSpec]:
        """K and V of each layer, and those of the source."""
        dtype = str(self.embedding.weight.dtype).removeprefix("torch.")
        specs = [mask_spec()]
        for i, layer in enumerate(self._layers()):
            assert isinstance(layer.attention, SelfAttention) and layer.cross is not None
            specs += layer.attention.state_specs(f"layers.{i}", dtype) + layer.cross.state_specs(f"layers.{i}", dtype)
        return specs

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.decoder.layers if isinstance(layer, Layer)]

    def encode(self, source: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """The mask of sources (batch, source), and each decoder layer's keys and values of them."""
        mask, bias = source_mask(source, lengths), self.encoder.bias(source.shape[1])
        x = self.embedding(source)
        for layer in self.encoder.layers:
            assert isinstance(layer, Layer)
            x = layer.encode(x, mask, bias)
        x = self.encoder.norm(x)  # (batch, source, width)
        made = {SOURCE_MASK: mask}
        for i, layer in enumerate(self._layers()):
            assert layer.cross is not None
            made |= layer.cross.states(x, f"layers.{i}")
        return made

    def forward(self, tokens: Tensor, state: State, step: Step | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (batch, time) to logits (batch, count, vocab_size) and the new state."""
        step = step or Step.whole(tokens)
        x, distances = self.embedding(tokens), self.decoder.distances()
        present: dict[str, Tensor] = {}
        for i, layer in enumerate(self._layers()):
            x, new = layer.decode(x, state, f"layers.{i}", step, distances)
            present |= new
        x = take_positions(self.decoder.norm(x), step.logit_positions)
        return self.head(x * self.config.width**-0.5 if self.config.scale_output else x), present


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


HUGGING_FACE = HuggingFace(
    types={"t5": Variant()},
    keys={
        "vocab_size": whole("vocab_size"),
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
        "tie_word_embeddings": flag("tie_embeddings", default=True),
        "scale_decoder_outputs": _output_scale,
        "decoder_start_token_id": _start,
        "is_encoder_decoder": neutral(True, None),
        **dict.fromkeys(
            ("is_gated_act", "dense_act_fn", "dropout_rate", "initializer_factor", "output_past"), METADATA
        ),
    },
    names=Stacks((
        Names(
            {**_LAYER, **_mlp(1), "embedding": "shared", "head": "lm_head", **_stack("encoder"), **_stack("decoder")},
            layers="encoder.block", ours="encoder.layers",
        ),
        Names(
            {
                **_LAYER, "cross_norm": "layer.1.layer_norm",
                **{f"cross.{n}_proj": f"layer.1.EncDecAttention.{n}" for n in "qkvo"}, **_mlp(2),
            },
            layers="decoder.block", ours="decoder.layers",
        ),
    )),
    ignored=("EncDecAttention.relative_attention_bias.weight",),  # of the first checkpoints, and read by nobody
)  # fmt: skip

ARCHITECTURE = Architecture(name="t5", config=T5Config, build=T5, presets=PRESETS, huggingface=HUGGING_FACE)
