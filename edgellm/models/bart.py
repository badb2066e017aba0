"""BART and Marian: an encoder and a decoder of post-norm transformer layers with positions that are added.

BART: Lewis et al. 2019, arXiv:1910.13461; Marian: Junczys-Dowmunt et al. 2018, arXiv:1804.00344. What other people's
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
    hidden_act,
    neutral,
    refuse,
    whole,
)
from edgellm.models.foreign.marian import Marian
from edgellm.models.layers import MLP, SelfAttention, SourceAttention, mask_spec
from edgellm.models.layers.mlp import ACTIVATIONS
from edgellm.models.layers.source_attention import SOURCE_MASK
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.ops import source_mask, take_positions
from edgellm_runtime.spec import StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "Bart", "BartConfig"]

_BEFORE = 2  # rows of a learned table of positions that no position has


@dataclass(frozen=True)
class BartConfig(Shape):
    """The shape of a :class:`Bart`.

    Args:
        vocab_size: tokens.
        width: features between layers.
        encoder_layers: layers of the encoder.
        decoder_layers: layers of the decoder.
        encoder_heads: attention heads of the encoder; divides ``width``.
        decoder_heads: those of the decoder; likewise.
        encoder_mlp_width: hidden features of the encoder's feed-forward layers.
        decoder_mlp_width: those of the decoder.
        max_context: positions that there are, in a source and in an answer.
        learned_positions: whether these are learned; otherwise sines and cosines.
        norm_embedding: whether the sum of token and position is normed.
        scale_embedding: whether embeddings are multiplied by the square root of ``width``.
        activation: of the feed-forward layers.
        start_tokens: what every answer begins with.
    """

    vocab_size: int
    width: int
    encoder_layers: int
    decoder_layers: int
    encoder_heads: int
    decoder_heads: int
    encoder_mlp_width: int
    decoder_mlp_width: int
    max_context: int
    learned_positions: bool = True
    norm_embedding: bool = True
    scale_embedding: bool = False
    activation: str = "gelu"
    start_tokens: Sequence[int] = (2,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation is {self.activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
        if self.width % self.encoder_heads or self.width % self.decoder_heads or self.width % 2:
            raise ConfigError(
                f"width {self.width} must be even and a multiple of encoder_heads {self.encoder_heads} and "
                f"decoder_heads {self.decoder_heads}"
            )

    @property
    def max_source(self) -> int:
        """The most tokens of a source."""
        return self.max_context


PRESETS: Mapping[str, BartConfig] = {
    "tiny": BartConfig(
        vocab_size=1024, width=128, encoder_layers=3, decoder_layers=3, encoder_heads=4, decoder_heads=4,
        encoder_mlp_width=512, decoder_mlp_width=512, max_context=512, learned_positions=False, norm_embedding=False,
        scale_embedding=True, activation="silu", start_tokens=(0,),
    ),
}  # fmt: skip


class Waves(nn.Module):
    """Positions as sines and, in the second half of the features, cosines; computed, never stored in a checkpoint."""

    table: Tensor  # (positions, width)

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
        angles = torch.arange(positions, dtype=torch.float64, device="cpu")[:, None] * frequencies
        self.register_buffer("table", torch.cat([angles.sin(), angles.cos()], dim=1).float(), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """Positions (...) to (..., width)."""
        return self.table[positions]


class Layer(nn.Module):
    """Self-attention, in a decoder attention to the source, and an MLP; each sum with what came before is normed."""

    def __init__(self, config: BartConfig, *, decodes: bool) -> None:
        super().__init__()
        width = config.width
        heads = config.decoder_heads if decodes else config.encoder_heads
        hidden = config.decoder_mlp_width if decodes else config.encoder_mlp_width
        self.attention: SelfAttention | SourceAttention = (
            SelfAttention(width, heads, heads, width // heads, bias=True, output_bias=True)
            if decodes
            else SourceAttention(width, heads, width // heads, bias=True)
        )
        self.attention_norm = nn.LayerNorm(width)
        self.cross = SourceAttention(width, heads, width // heads, bias=True) if decodes else None
        self.cross_norm = nn.LayerNorm(width) if decodes else None
        self.mlp = MLP(width, hidden, bias=True, activation=config.activation)
        self.mlp_norm = nn.LayerNorm(width)

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """(batch, source, width) to the same shape."""
        assert isinstance(self.attention, SourceAttention)
        x = self.attention_norm(x + self.attention(x, *self.attention.keys(x), mask))
        y: Tensor = self.mlp_norm(x + self.mlp(x))
        return y

    def decode(self, x: Tensor, state: State, prefix: str, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        assert self.cross is not None and self.cross_norm is not None
        y, present = self.attention(x, state, prefix, step, None)
        x = self.attention_norm(x + y)
        x = self.cross_norm(x + self.cross.answer(x, state, prefix))
        return self.mlp_norm(x + self.mlp(x)), present


class BartStack(nn.Module):
    """The layers of the encoder or of the decoder, over embeddings with positions.

    Args:
        config: of the model.
        embedding: the model's own.
        decodes: whether it is the decoder.
    """

    def __init__(self, config: BartConfig, embedding: nn.Embedding, *, decodes: bool) -> None:
        super().__init__()
        self.embedding, self.last = embedding, config.max_context - 1
        self.before = _BEFORE if config.learned_positions else 0
        self.scale = math.sqrt(config.width) if config.scale_embedding else 1.0
        self.positions: nn.Module = (
            nn.Embedding(config.max_context + _BEFORE, config.width)
            if config.learned_positions
            else Waves(config.max_context, config.width)
        )
        count = config.decoder_layers if decodes else config.encoder_layers
        self.layers = nn.ModuleList(Layer(config, decodes=decodes) for _ in range(count))
        self.embedding_norm = nn.LayerNorm(config.width) if config.norm_embedding else None

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens (batch, time) at positions (batch, time) to (batch, time, width)."""
        positions = positions.clamp(max=self.last)  # padding may point past the table; its result is not used
        x: Tensor = self.embedding(tokens) * self.scale + self.positions(positions + self.before)
        return x if self.embedding_norm is None else self.embedding_norm(x)


class Bart(nn.Module):
    """See the module's description; follows :class:`edgellm.models.protocol.SourceModel`."""

    def __init__(self, config: BartConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.encoder = BartStack(config, self.embedding, decodes=False)
        self.decoder = BartStack(config, self.embedding, decodes=True)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        self.logits_bias = nn.Parameter(torch.zeros(1, config.vocab_size))
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)

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
        mask = source_mask(source, lengths)
        x = self.encoder.embed(source, torch.arange(source.shape[1], device=source.device).expand_as(source))
        for layer in self.encoder.layers:
            assert isinstance(layer, Layer)
            x = layer.encode(x, mask)
        made = {SOURCE_MASK: mask}
        for i, layer in enumerate(self._layers()):
            assert layer.cross is not None
            made |= layer.cross.states(x, f"layers.{i}")
        return made

    def forward(self, tokens: Tensor, state: State, step: Step | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (batch, time) to logits (batch, count, vocab_size) and the new state."""
        step = step or Step.whole(tokens)
        positions = step.past_lengths.long()[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        x = self.decoder.embed(tokens, positions)
        present: dict[str, Tensor] = {}
        for i, layer in enumerate(self._layers()):
            x, new = layer.decode(x, state, f"layers.{i}", step)
            present |= new
        return self.head(take_positions(x, step.logit_positions)) + self.logits_bias, present


def _start(name: str, values: Values, fields: Fields) -> None:
    """The token that decoders begin with and, where one is forced to follow, that."""
    start = [values.get(name), values.get("forced_bos_token_id")]
    if type(start[0]) is not int or (start[1] is not None and type(start[1]) is not int):
        raise refuse(name, start[0])
    fields["start_tokens"] = tuple(token for token in start if token is not None)


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

HUGGING_FACE = HuggingFace(
    types={"bart": Variant(), "marian": _WAVES},
    keys={
        "vocab_size": whole("vocab_size"),
        "d_model": whole("width"),
        "encoder_layers": whole("encoder_layers", limit=MAX_LAYERS),
        "decoder_layers": whole("decoder_layers", limit=MAX_LAYERS),
        "encoder_attention_heads": whole("encoder_heads"),
        "decoder_attention_heads": whole("decoder_heads"),
        "encoder_ffn_dim": whole("encoder_mlp_width"),
        "decoder_ffn_dim": whole("decoder_mlp_width"),
        "max_position_embeddings": whole("max_context", limit=MAX_CONTEXT),
        "activation_function": hidden_act(default="gelu"),
        "scale_embedding": flag("scale_embedding", default=False),
        "decoder_start_token_id": _start,
        "tie_word_embeddings": neutral(True, None),
        "is_encoder_decoder": neutral(True, None),
        # what some files say of variants that these are not
        "normalize_before": neutral(False, None),
        "add_final_layer_norm": neutral(False, None),
        "static_position_embeddings": METADATA,
        "add_bias_logits": neutral(False, None),
        "normalize_embedding": METADATA,
        "extra_pos_embeddings": METADATA,
        "force_bos_token_to_be_generated": METADATA,
        **dict.fromkeys(
            ("activation_dropout", "dropout", "encoder_layerdrop", "decoder_layerdrop", "init_std", "classif_dropout",
             "num_hidden_layers", "num_attention_heads", "gradient_checkpointing"), METADATA,
        ),
    },
    names=Stacks((
        Names(
            {**_LAYER, **_STACKS, "embedding": "model.shared", "head": "lm_head", "logits_bias": "final_logits_bias"},
            layers="model.encoder.layers", ours="encoder.layers",
        ),
        Names(_LAYER, layers="model.decoder.layers", ours="decoder.layers"),
    )),
    ignored=("embed_positions.weight",),  # of Marian, where they are computed here
)  # fmt: skip

_MARIAN_PARTS = {"attention": "self", "cross": "context"}
_NORM = {"weight": "scale", "bias": "bias"}


def _marian(name: str) -> str:
    """What Marian's own files call a parameter of ours."""
    side, _, rest = name.partition(".layers.")
    if not rest:
        return "decoder_ff_logit_out_b" if name == "logits_bias" else "Wemb"
    layer, part, *inner, kind = rest.split(".")
    before, letter = f"{side}_l{int(layer) + 1}", "W" if kind == "weight" else "b"
    if part == "mlp":
        return f"{before}_ffn_{letter}{inner[0][-1]}"
    if part == "mlp_norm":
        return f"{before}_ffn_ffn_ln_{_NORM[kind]}"
    theirs = _MARIAN_PARTS[part.removesuffix("_norm")]
    return (
        f"{before}_{theirs}_Wo_ln_{_NORM[kind]}"
        if part.endswith("_norm")
        else f"{before}_{theirs}_{letter}{inner[0][0]}"
    )


MARIAN = Marian(
    fields={
        "dim-emb": "width", "enc-depth": "encoder_layers", "dec-depth": "decoder_layers",
        "transformer-heads": ("encoder_heads", "decoder_heads"),
        "transformer-dim-ffn": ("encoder_mlp_width", "decoder_mlp_width"),
    },
    words={"transformer-ffn-activation": {w: {"activation": a} for w, a in
                                          {"swish": "silu", "relu": "relu", "gelu": "gelu"}.items()}},
    fixed={"learned_positions": False, "norm_embedding": False, "scale_embedding": True, "max_context": 512},
    needed={
        "type": "transformer", "transformer-decoder-autoreg": "self-attention", "tied-embeddings-all": "true",
        "transformer-ffn-depth": "2", "transformer-preprocess": "", "transformer-postprocess": "dan",
        "transformer-postprocess-emb": "d", "transformer-postprocess-top": "", "transformer-pool": "false",
        "transformer-train-position-embeddings": "false", "transformer-no-projection": "false",
        "layer-normalization": "false", "ulr": "false", "lemma-dim-emb": "0", "output-omit-bias": "false",
        "right-left": "false",
    },
    name=_marian, starts_apart=True,
)  # fmt: skip

ARCHITECTURE = Architecture(
    name="bart", config=BartConfig, build=Bart, presets=PRESETS, huggingface=HUGGING_FACE, marian=MARIAN
)
