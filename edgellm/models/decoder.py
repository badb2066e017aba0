"""The Llama-style transformer decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU; optionally norms of
each head's query and key.

Llama: Touvron et al. 2023, arXiv:2302.13971. Foreign names of configuration and tensors are translated here, once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from edgellm.errors import CheckpointError, ConfigError
from edgellm.models.layers import GatedMLP, RotaryTable, SelfAttention
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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (type(value) is not int or value < 1):
                raise ConfigError(f"{field.name} is {value!r}; it must be a positive whole number")
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ConfigError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}, and head_dim "
                f"{self.head_dim} even"
            )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

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
            qk_norm=c.qk_norm, norm_eps=c.norm_eps,
        )  # fmt: skip
        self.mlp_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.mlp = GatedMLP(c.width, c.mlp_width)

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
        self.rotary = RotaryTable(config.head_dim, config.max_context, config.rope_theta)
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


_FOREIGN_PARTS = {  # ours: (Hugging Face, GGUF)
    "embedding": ("model.embed_tokens", "token_embd"),
    "norm": ("model.norm", "output_norm"),
    "head": ("lm_head", "output"),
    "attention_norm": ("input_layernorm", "attn_norm"),
    "attention.q_proj": ("self_attn.q_proj", "attn_q"),
    "attention.k_proj": ("self_attn.k_proj", "attn_k"),
    "attention.v_proj": ("self_attn.v_proj", "attn_v"),
    "attention.o_proj": ("self_attn.o_proj", "attn_output"),
    "attention.q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "attention.k_norm": ("self_attn.k_norm", "attn_k_norm"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "mlp.gate_proj": ("mlp.gate_proj", "ffn_gate"),
    "mlp.up_proj": ("mlp.up_proj", "ffn_up"),
    "mlp.down_proj": ("mlp.down_proj", "ffn_down"),
}

# What a foreign configuration may say without changing what is computed here; any other value is refused by name.
_HF_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "qk_layernorm": (False,),
    "use_qk_norm": (False,),
    "num_local_experts": (None, 0, 1),
}
_GGUF_READ = frozenset({
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base", "tensor_data_layout",
})  # fmt: skip
_GGUF_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
}


# Far above any real model: a damaged file must give an error, not hours of building layers or gigabytes of angles.
MAX_LAYERS, MAX_CONTEXT = 1024, 2**21


def _refuse(key: str, value: Any) -> CheckpointError:
    return CheckpointError(f"{key} is {value!r}, which the decoder model cannot represent; use another checkpoint")


def _whole(data: Mapping[str, Any], key: str, default: int | None = None, *, limit: int = 2**31) -> int:
    value = data.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 1 <= value <= limit:
        raise CheckpointError(f"{key} is {value!r}; it must be a positive whole number of at most {limit}")
    return value


def _positive(data: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value: Any = data.get(key)
    if value is None and default is not None:
        return default
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise CheckpointError(f"{key} is {value!r}; it must be a positive number")
    return float(value)


def _hf_rope_theta(data: Mapping[str, Any]) -> float:
    scaling = data.get("rope_scaling") or {}  # before transformers 5; "rope_parameters" since
    rope = data.get("rope_parameters") or {}
    for name, found in (("rope_scaling", scaling), ("rope_parameters", rope)):
        if not isinstance(found, Mapping) or any(isinstance(value, Mapping) for value in found.values()):
            raise _refuse(name, found)
        kind = found.get("rope_type", found.get("type", "default"))
        if kind not in ("default", None) or found.get("partial_rotary_factor", 1) != 1:
            raise _refuse(name, dict(found))
    return _positive({"rope_theta": rope.get("rope_theta", data.get("rope_theta"))}, "rope_theta", 10000.0)


def _hf_check_window(data: Mapping[str, Any], max_context: int) -> None:
    kind, window = data["model_type"], data.get("sliding_window")
    if kind == "mistral" and "sliding_window" not in data:
        window = 4096  # what transformers takes when the file does not say
    if kind in ("qwen2", "qwen3") and not data.get("use_sliding_window", False):
        window = None
    if window is not None and not (type(window) is int and window >= max_context):
        raise _refuse("sliding_window", window)
    if other := [t for t in data.get("layer_types") or () if t != "full_attention"]:
        raise _refuse("layer_types", other[0])


def _config_from_hf(data: Mapping[str, Any]) -> DecoderConfig:
    for key, neutral in _HF_NEUTRAL.items():
        if key in data and data[key] not in neutral:
            raise _refuse(key, data[key])
    kind = data["model_type"]
    if data.get("attention_bias", False) and kind != "qwen2":  # to which the key means nothing
        raise _refuse("attention_bias", data["attention_bias"])  # it puts a bias on the output projection too
    width, heads = _whole(data, "hidden_size"), _whole(data, "num_attention_heads")
    max_context = _whole(data, "max_position_embeddings", limit=MAX_CONTEXT)
    _hf_check_window(data, max_context)
    return DecoderConfig(
        vocab_size=_whole(data, "vocab_size"),
        width=width,
        num_layers=_whole(data, "num_hidden_layers", limit=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=_whole(data, "num_key_value_heads", heads if kind == "llama" else None),
        head_dim=_whole(data, "head_dim", 128 if kind == "qwen3" else width // heads),  # transformers' defaults
        mlp_width=_whole(data, "intermediate_size"),
        max_context=max_context,
        rope_theta=_hf_rope_theta(data),
        norm_eps=_positive(data, "rms_norm_eps", 1e-6),
        tie_embeddings=bool(data.get("tie_word_embeddings", False)),
        attention_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
    )


def _gguf_check(values: Mapping[str, Any], head_dim: int) -> None:
    for key, value in values.items():
        if key in _GGUF_READ or value in _GGUF_NEUTRAL.get(key, ()):
            continue
        if key.startswith("rope.scaling.") and values.get("rope.scaling.type") == "none":
            continue
        raise _refuse(key, value)
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.get(key, head_dim) != head_dim:
            raise _refuse(key, values[key])


def _config_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    prefix = f"{metadata['general.architecture']}."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    width, heads = _whole(values, "embedding_length"), _whole(values, "attention.head_count")
    head_dim = _whole(values, "attention.key_length", width // heads)
    _gguf_check(values, head_dim)
    embedding = shapes.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError("tensor token_embd.weight is missing; convert the model again")
    return DecoderConfig(
        vocab_size=embedding[0],
        width=width,
        num_layers=_whole(values, "block_count", limit=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=_whole(values, "attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_width=_whole(values, "feed_forward_length"),
        max_context=_whole(values, "context_length", limit=MAX_CONTEXT),
        rope_theta=_positive(values, "rope.freq_base", 10000.0),
        norm_eps=_positive(values, "attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in shapes,
        attention_bias="blk.0.attn_q.bias" in shapes,
        qk_norm=metadata["general.architecture"] == "qwen3",
    )


def _foreign_name(name: str, which: int, layers: str) -> str:
    part, suffix = name.rsplit(".", 1)
    if part.startswith("layers."):
        _, index, part = part.split(".", 2)
        return f"{layers}.{index}.{_FOREIGN_PARTS[part][which]}.{suffix}"
    return f"{_FOREIGN_PARTS[part][which]}.{suffix}"


def _hf_name(name: str) -> str:
    return _foreign_name(name, 0, "model.layers")


def _gguf_name(name: str) -> str:
    return _foreign_name(name, 1, "blk")


def _gguf_tensor(config: DecoderConfig, metadata: Mapping[str, Any], name: str, tensor: Tensor) -> Tensor:
    """Rows of q and k from neighbouring pairs, as llama.cpp rotates this one architecture, to the two halves."""
    if metadata["general.architecture"] != "llama" or (".q_proj." not in name and ".k_proj." not in name):
        return tensor
    pairs = tensor.reshape(-1, config.head_dim // 2, 2, *tensor.shape[1:])  # (heads, head_dim / 2, 2, ...)
    return pairs.transpose(1, 2).reshape(tensor.shape)


ARCHITECTURE = Architecture(
    name="decoder",
    config=DecoderConfig,
    build=Decoder,
    presets=PRESETS,
    hf_model_types=("llama", "mistral", "qwen2", "qwen3"),
    gguf_architectures=("llama", "qwen2", "qwen3"),
    config_from_hf=_config_from_hf,
    config_from_gguf=_config_from_gguf,
    hf_name=_hf_name,
    gguf_name=_gguf_name,
    gguf_tensor=_gguf_tensor,
)
