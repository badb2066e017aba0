"""Gemma 2: a window in every other layer, soft caps on scores and logits, norms on both sides of each part.

Gemma team 2024, arXiv:2408.00118. Embedding, scaled -> N layers of attention and a gated MLP, each behind a norm and
before another, beside a residual -> norm -> head -> soft cap. A norm multiplies by 1 + w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.models.config import Shape, check_heads
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
    lacks,
    neutral,
    positive,
    refuse,
    rotary,
    rows_of,
    same_as,
    whole,
)
from edgellm.models.foreign.keys import checked_positive, checked_whole
from edgellm.models.layers import GatedMLP, RotaryTable, SelfAttention, Stack
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm_runtime.spec import StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "Gemma2", "Gemma2Config"]


@dataclass(frozen=True)
class Gemma2Config(Shape):
    """The shape of a :class:`Gemma2`.

    Args:
        vocab_size: tokens.
        width: features between layers.
        windows: of each layer, first to last, how many tokens up to itself a token sees; 0 for all.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides ``num_heads``.
        head_dim: features of one head.
        mlp_width: hidden features of the gated MLP.
        max_context: the most tokens that a row may hold.
        score_divisor: scores are divided by its square root.
        score_cap: scores s become cap * tanh(s / cap); 0 for no cap.
        logit_cap: the same for logits.
        rope_theta: base of the rotary frequencies.
        rope_factors: (head_dim / 2,), each frequency is divided by its own; empty: by none.
        rope_amplitude: factor on the cosines and sines of the rotation.
        norm_eps: added to the mean square in the norms.
        tie_embeddings: whether the vocabulary projection is the embedding.
    """

    vocab_size: int
    width: int
    windows: Sequence[int]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_context: int
    score_divisor: float = 256.0
    score_cap: float = 50.0
    logit_cap: float = 30.0
    rope_theta: float = 10000.0
    rope_factors: Sequence[float] = ()
    rope_amplitude: float = 1.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.windows or any(type(window) is not int or window < 0 for window in self.windows):
            raise ConfigError(f"windows is {self.windows}; it has a whole number for each layer, 0 for no window")
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)
        for name in ("score_cap", "logit_cap"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be a positive number, or 0 for no cap")


PRESETS: Mapping[str, Gemma2Config] = {
    "tiny": Gemma2Config(
        vocab_size=1024, width=128, windows=(128, 0, 128, 0), num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=352,
        max_context=512, score_divisor=32,
    ),
}  # fmt: skip


class Norm(nn.Module):
    """An RMS norm whose gain is 1 + weight."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(config.width)), config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape."""
        return F.rms_norm(x, self.weight.shape, 1 + self.weight, self.eps)


class Layer(nn.Module):
    """Attention and MLP, each between two norms and beside a residual."""

    def __init__(self, config: Gemma2Config, window: int) -> None:
        super().__init__()
        c = config
        self.attention_norm, self.attention_post_norm, self.mlp_norm, self.mlp_post_norm = (Norm(c) for _ in range(4))
        self.attention = SelfAttention(
            c.width, c.num_heads, c.num_kv_heads, c.head_dim, bias=False, scale=c.score_divisor**-0.5,
            softcap=c.score_cap, window=window, ring=False,
        )  # fmt: skip
        self.mlp = GatedMLP(c.width, c.mlp_width, activation="gelu_tanh")

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """K and V."""
        return self.attention.state_specs(prefix, dtype)

    def forward(
        self, x: Tensor, state: State, prefix: str, step: Step, rotary: RotaryTable
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        y, present = self.attention(self.attention_norm(x), state, prefix, step, rotary)
        x = x + self.attention_post_norm(y)
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x))), present


class Gemma2(Stack):
    """See the module's description; follows :class:`edgellm.models.protocol.LanguageModel`."""

    def __init__(self, config: Gemma2Config) -> None:
        c = config
        table = RotaryTable(c.head_dim, c.max_context, c.rope_theta, factors=c.rope_factors, amplitude=c.rope_amplitude)
        layers = (Layer(c, window) for window in c.windows)
        super().__init__(c, layers, rotary=table, embedding_scale=c.width**0.5, logit_cap=c.logit_cap, norm=Norm(c))


def _windows(name: str, values: Values, fields: Fields) -> None:
    """Each layer's window; where the file names no kinds, every other layer has one, from the first."""
    count = checked_whole("num_hidden_layers", values.get("num_hidden_layers", 26), MAX_LAYERS)
    window = values.get("sliding_window", 4096)
    window = 0 if window is None else checked_whole("sliding_window", window)
    kinds = values.get(name) or [("sliding_attention", "full_attention")[i % 2] for i in range(count)]
    if len(kinds) != count or (other := [k for k in kinds if k not in ("sliding_attention", "full_attention")]):
        raise refuse(name, other[0] if len(kinds) == count else kinds)
    fields["windows"] = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _cap(into: str, default: float) -> Key:
    """A soft cap; null means none."""

    def take(name: str, values: Values, fields: Fields) -> None:
        value = values.get(name, default)
        fields[into] = 0.0 if value is None else checked_positive(name, value)

    return take


HUGGING_FACE = HuggingFace(
    types={"gemma2": Variant()},
    keys={
        "vocab_size": whole("vocab_size", default=256000),
        "hidden_size": whole("width", default=2304),
        "num_hidden_layers": METADATA,
        "sliding_window": METADATA,
        "layer_types": _windows,
        "num_attention_heads": whole("num_heads", default=8),
        "num_key_value_heads": whole("num_kv_heads", default=4),
        "head_dim": whole("head_dim", default=256),
        "intermediate_size": whole("mlp_width", default=9216),
        "max_position_embeddings": whole("max_context", default=8192, limit=MAX_CONTEXT),
        "query_pre_attn_scalar": positive("score_divisor", default=256.0),
        "attn_logit_softcapping": _cap("score_cap", 50.0),
        "final_logit_softcapping": _cap("logit_cap", 30.0),
        **rotary(),
        "rms_norm_eps": positive("norm_eps", default=1e-6),
        "tie_word_embeddings": flag("tie_embeddings", default=True),
        "hidden_activation": neutral("gelu_pytorch_tanh", None),
        "hidden_act": METADATA,  # what counts is the key before
        "use_bidirectional_attention": neutral(False, None),
        "cache_implementation": METADATA,
    },
    names=Names(
        {
            **HUGGING_FACE_PARTS,
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        },
        layers="model.layers",
    ),
)


def _gguf_windows(name: str, values: Values, fields: Fields) -> None:
    """A window in every other layer, from the first."""
    count = checked_whole(name, values.get(name), MAX_LAYERS)
    window = checked_whole("attention.sliding_window", values.get("attention.sliding_window", 4096))
    fields["windows"] = tuple((window, 0)[i % 2] for i in range(count))


def _gguf_divisor(name: str, values: Values, fields: Fields) -> None:
    """What scores are divided by has no key: it is the head's features, but for the largest of these models."""
    whole("head_dim")(name, values, fields)
    largest = len(fields["windows"]) == _LARGEST
    fields["score_divisor"] = float(fields["width"] // fields["num_heads"] if largest else fields["head_dim"])


def _gguf_tensor(_config: Gemma2Config, _metadata: Values, name: str, tensor: Tensor) -> Tensor:
    """The file has 1 + w of each norm."""
    return tensor - 1 if name.endswith("norm.weight") else tensor


_LARGEST = 46  # layers
GGUF_FILES = GGUF(
    types={"gemma2": Variant()},
    keys={
        "block_count": _gguf_windows,
        "context_length": whole("max_context", limit=MAX_CONTEXT),
        "embedding_length": whole("width"),
        "feed_forward_length": whole("mlp_width"),
        "attention.head_count": whole("num_heads"),
        "attention.head_count_kv": whole("num_kv_heads", default=lambda fields: fields["num_heads"]),
        "attention.key_length": _gguf_divisor,
        "attention.value_length": same_as("head_dim"),
        "rope.dimension_count": same_as("head_dim"),
        "rope.freq_base": positive("rope_theta", default=10000.0),
        "attention.layer_norm_rms_epsilon": positive("norm_eps"),
        "attention.sliding_window": METADATA,  # read with the layers
        "attn_logit_softcapping": positive("score_cap", default=0.0),
        "final_logit_softcapping": positive("logit_cap", default=0.0),
    },
    names=Names(
        {**GGUF_PARTS, "attention_post_norm": "post_attention_norm", "mlp_post_norm": "post_ffw_norm"}, layers="blk"
    ),
    tensors={"vocab_size": rows_of("token_embd.weight"), "tie_embeddings": lacks("output.weight")},
    tensor=_gguf_tensor,
)

ARCHITECTURE = Architecture(
    name="gemma2", config=Gemma2Config, build=Gemma2, presets=PRESETS, huggingface=HUGGING_FACE, gguf=GGUF_FILES
)
