"""The Llama-style transformer decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU; optionally norms of
each head's query and key.

Llama: Touvron et al. 2023, arXiv:2302.13971. What other people's checkpoints of such models say stands below the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.models.foreign import (
    GGUF,
    GGUF_PARTS,
    HUGGING_FACE_PARTS,
    MAX_CONTEXT,
    MAX_LAYERS,
    METADATA,
    Fields,
    HuggingFace,
    Key,
    Names,
    Values,
    Variant,
    flag,
    full_attention,
    has,
    hidden_act,
    lacks,
    no_window,
    positive,
    rotary,
    rows_of,
    same_as,
    whole,
)
from edgellm.models.layers import GatedMLP, RotaryTable, SelfAttention
from edgellm.models.layers.mlp import ACTIVATIONS
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.ops import take_positions
from edgellm_runtime.spec import StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "Decoder", "DecoderConfig"]


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a :class:`Decoder`.

    Args:
        vocab_size: tokens.
        width: features between layers.
        num_layers: layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides ``num_heads``.
        head_dim: features of one head.
        mlp_width: hidden features of the gated MLP.
        max_context: the most tokens that a row may hold.
        rope_theta: base of the rotary frequencies.
        norm_eps: added to the mean square in the norms.
        tie_embeddings: whether the vocabulary projection is the embedding.
        attention_bias: whether the query, key and value projections have a bias.
        qk_norm: whether each head's query and key pass an RMS norm before their rotation.
        output_bias: whether attention's output projection has a bias.
        mlp_bias: whether the MLP's projections have a bias.
        activation: of the MLP's gate; one of :data:`edgellm.models.layers.mlp.ACTIVATIONS`.
        attention_scale: factor on attention's scores; None: 1 / sqrt(head_dim).
        rope_factors: (head_dim / 2,), each rotary frequency is divided by its own; empty: by none.
        rope_amplitude: factor on the rotary cosines and sines.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_context: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    attention_bias: bool = False
    qk_norm: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    attention_scale: float | None = None
    rope_factors: Sequence[float] = ()
    rope_amplitude: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rope_factors", tuple(self.rope_factors))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (type(value) is not int or value < 1):
                raise ConfigError(f"{field.name} is {value!r}; it must be a positive whole number")
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ConfigError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}, and head_dim "
                f"{self.head_dim} even"
            )
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation is {self.activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
        if self.rope_factors and len(self.rope_factors) != self.head_dim // 2:
            raise ConfigError(
                f"rope_factors has {len(self.rope_factors)} numbers; head_dim {self.head_dim} has {self.head_dim // 2} "
                "frequencies"
            )
        numbers = {"attention_scale": self.attention_scale or 1.0, "rope_amplitude": self.rope_amplitude}
        for name, number in (*numbers.items(), *(("rope_factors", factor) for factor in self.rope_factors)):
            if type(number) not in (int, float) or not 0 < number < math.inf:
                raise ConfigError(f"{name} has {number!r}; it must be a positive number")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"rope_factors": list(self.rope_factors)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DecoderConfig:
        """From what :meth:`to_json` gave.

        Raises:
            ConfigError: an unknown key or an impossible value.
        """
        unknown = data.keys() - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"unknown configuration keys {sorted(unknown)} for the decoder model")
        return cls(**data)


PRESETS: Mapping[str, DecoderConfig] = {
    "tiny": DecoderConfig(
        vocab_size=1024, width=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=352,
        max_context=512,
    ),
}  # fmt: skip


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        c = config
        self.attention_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.attention = SelfAttention(
            c.width, c.num_heads, c.num_kv_heads, c.head_dim, bias=c.attention_bias,
            output_bias=c.output_bias, scale=c.attention_scale, qk_norm=c.qk_norm, norm_eps=c.norm_eps,
        )  # fmt: skip
        self.mlp_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.mlp = GatedMLP(c.width, c.mlp_width, bias=c.mlp_bias, activation=c.activation)

    def forward(
        self, x: Tensor, state: State, prefix: str, step: Step, rotary: RotaryTable
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        y, present = self.attention(self.attention_norm(x), state, prefix, step, rotary)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), present


class Decoder(nn.Module):
    """See the module's description; follows :class:`edgellm.models.protocol.LanguageModel`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.rotary = RotaryTable(
            config.head_dim, config.max_context, config.rope_theta, factors=config.rope_factors,
            amplitude=config.rope_amplitude,
        )  # fmt: skip
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def state_specs(self) -> list[StateSpec]:
        """K and V of each layer."""
        dtype = str(self.embedding.weight.dtype).removeprefix("torch.")
        mixers = [layer.attention for layer in self.layers if isinstance(layer, Layer)]
        return [spec for i, mixer in enumerate(mixers) for spec in mixer.state_specs(f"layers.{i}", dtype)]

    def forward(
        self, tokens: Tensor, state: State | None = None, step: Step | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (batch, time) to logits (batch, count, vocab_size) and the new state."""
        state, step = state or {}, step or Step.whole(tokens)
        x = self.embedding(tokens)  # (batch, time, width)
        present: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            x, new = layer(x, state, f"layers.{i}", step, self.rotary)
            present |= new
        return self.head(take_positions(self.norm(x), step.logit_positions)), present


def _same_heads(fields: Fields) -> int:
    return int(fields["num_heads"])


def _divided(fields: Fields) -> int:
    return int(fields["width"] // fields["num_heads"])


def _every_bias(name: str, values: Values, fields: Fields) -> None:
    """Of this type the key means all four projections."""
    flag("attention_bias", default=False)(name, values, fields)
    fields["output_bias"] = fields["attention_bias"]


def _qwen(**keys: Key) -> dict[str, Key]:
    window = no_window(used=lambda values: bool(values.get("use_sliding_window", False)))
    return {"use_sliding_window": METADATA, "sliding_window": window, "max_window_layers": METADATA, **keys}


HUGGING_FACE = HuggingFace(
    types={
        "llama": Variant(
            keys={
                "num_key_value_heads": whole("num_kv_heads", default=_same_heads),
                "attention_bias": _every_bias,
                "mlp_bias": flag("mlp_bias", default=False),
                "is_llama_config": METADATA,
            }
        ),
        "mistral": Variant(keys={"sliding_window": no_window(default=4096)}),  # transformers' default
        "qwen2": Variant(keys=_qwen(attention_bias=METADATA), fields={"attention_bias": True}),
        "qwen3": Variant(
            keys=_qwen(head_dim=whole("head_dim", default=128), attention_bias=_every_bias), fields={"qk_norm": True}
        ),
    },
    keys={
        "vocab_size": whole("vocab_size"),
        "hidden_size": whole("width"),
        "num_hidden_layers": whole("num_layers", limit=MAX_LAYERS),
        "num_attention_heads": whole("num_heads"),
        "num_key_value_heads": whole("num_kv_heads"),
        "head_dim": whole("head_dim", default=_divided),
        "intermediate_size": whole("mlp_width"),
        "max_position_embeddings": whole("max_context", limit=MAX_CONTEXT),
        "sliding_window": no_window(),
        "layer_types": full_attention,
        **rotary(),
        "rms_norm_eps": positive("norm_eps", default=1e-6),
        "tie_word_embeddings": flag("tie_embeddings", default=False),
        "hidden_act": hidden_act(),
    },
    names=Names(HUGGING_FACE_PARTS, layers="model.layers"),
)


def _gguf_tensor(config: DecoderConfig, metadata: Values, name: str, tensor: Tensor) -> Tensor:
    """Rows of q and k from neighbouring pairs, as llama.cpp rotates this one architecture, to the two halves."""
    if metadata["general.architecture"] != "llama" or (".q_proj." not in name and ".k_proj." not in name):
        return tensor
    pairs = tensor.reshape(-1, config.head_dim // 2, 2, *tensor.shape[1:])  # (heads, head_dim / 2, 2, ...)
    return pairs.transpose(1, 2).reshape(tensor.shape)


GGUF_FILES = GGUF(
    types={"llama": Variant(), "qwen2": Variant(), "qwen3": Variant(fields={"qk_norm": True})},
    keys={
        "block_count": whole("num_layers", limit=MAX_LAYERS),
        "context_length": whole("max_context", limit=MAX_CONTEXT),
        "embedding_length": whole("width"),
        "feed_forward_length": whole("mlp_width"),
        "attention.head_count": whole("num_heads"),
        "attention.head_count_kv": whole("num_kv_heads", default=_same_heads),
        "attention.key_length": whole("head_dim", default=_divided),
        "attention.value_length": same_as("head_dim"),
        "rope.dimension_count": same_as("head_dim"),
        "rope.freq_base": positive("rope_theta", default=10000.0),
        "attention.layer_norm_rms_epsilon": positive("norm_eps"),
    },
    names=Names(GGUF_PARTS, layers="blk"),
    tensors={
        "vocab_size": rows_of("token_embd.weight"),
        "tie_embeddings": lacks("output.weight"),
        "attention_bias": has("blk.0.attn_q.bias"),
        "output_bias": has("blk.0.attn_output.bias"),
        "mlp_bias": has("blk.0.ffn_gate.bias"),
    },
    tensor=_gguf_tensor,
    numbers={"rope_factors": "rope_freqs.weight"},
)

ARCHITECTURE = Architecture(
    name="decoder", config=DecoderConfig, build=Decoder, presets=PRESETS, huggingface=HUGGING_FACE, gguf=GGUF_FILES
)
