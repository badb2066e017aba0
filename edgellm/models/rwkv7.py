"""RWKV, version 7: a memory that fades feature by feature, and from which each token takes a part of what a key holds.

Peng et al. 2025, arXiv:2503.14456. Embedding -> norm -> N layers, each a norm and a time mixing, then a norm and a
channel mixing, each beside a residual -> norm -> head. The memory S (value, key) of a head becomes
S diag(w) - S k k^T diag(a) + v k~^T: what it holds of the normed key k is lessened by a, and the value is written under
the token's own key k~. Values of later layers mix with those of the first. No state grows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
    TensorFile,
    Values,
    Variant,
    flag,
    neutral,
    positive,
    refuse,
    rows_of,
    whole,
)
from edgellm.models.foreign.gguf import Shapes
from edgellm.models.foreign.keys import checked_whole
from edgellm.models.layers import Stack
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.models.rwkv import Shift
from edgellm.ops import take_positions, token_by_token
from edgellm_runtime.spec import BATCH, StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "RWKV7", "RWKV7Config", "TimeMixing7"]

_FADES = -0.6065306597126334  # -exp(-1/2), the logarithm of the least that is left of the memory at a token
_USES = ("r", "w", "k", "v", "a", "g")


@dataclass(frozen=True)
class RWKV7Config(Shape):
    """The shape of an :class:`RWKV7`.

    Args:
        vocab_size: tokens.
        width: features between layers; a multiple of ``head_dim``.
        num_layers: layers.
        head_dim: features of a head's keys and values.
        hidden: features within a channel mixing.
        decay_rank: rank of what decays are made by, and so those of the shares of the key, the value and the gate.
        share_rank: see ``decay_rank``.
        value_rank: see ``decay_rank``.
        gate_rank: see ``decay_rank``.
        norm_eps: added to the variance in the norms; ``head_dim`` times as much in that of a head.
        tie_embeddings: whether the vocabulary projection is the embedding.
        max_context: the most tokens that a row may hold; the model itself has no limit.
    """

    vocab_size: int
    width: int
    num_layers: int
    head_dim: int
    hidden: int
    decay_rank: int = 64
    share_rank: int = 64
    value_rank: int = 32
    gate_rank: int = 128
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_context: int = 2**20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.head_dim:
            raise ConfigError(f"width {self.width} is no multiple of head_dim {self.head_dim}")


PRESETS: Mapping[str, RWKV7Config] = {
    "tiny": RWKV7Config(
        vocab_size=1024, width=128, num_layers=4, head_dim=32, hidden=512, decay_rank=16, share_rank=16, value_rank=16,
        gate_rank=32,
    ),
}  # fmt: skip


class LowRank(nn.Module):
    """up(activation(down(x))), with a bias or without."""

    def __init__(self, width: int, rank: int, *, bias: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=bias)


class TimeMixing7(nn.Module):
    """out(gate * (norm(read(memory)) + (r . bonus k) v))."""

    def __init__(self, config: RWKV7Config, number: int) -> None:
        super().__init__()
        c, self.first = config, number == 0
        self.head_dim, self.num_heads = c.head_dim, c.width // c.head_dim
        self.shift = Shift(c.width, _USES)
        self.r_proj, self.k_proj, self.v_proj = (nn.Linear(c.width, c.width, bias=False) for _ in range(3))
        self.decay, self.share = (LowRank(c.width, rank, bias=True) for rank in (c.decay_rank, c.share_rank))
        self.value = None if self.first else LowRank(c.width, c.value_rank, bias=True)
        self.gate = LowRank(c.width, c.gate_rank, bias=False)
        self.key_gain, self.key_share = nn.Parameter(torch.ones(c.width)), nn.Parameter(torch.ones(c.width))
        self.bonus = nn.Parameter(torch.zeros(self.num_heads, c.head_dim))
        self.norm = nn.GroupNorm(self.num_heads, c.width, eps=c.head_dim * c.norm_eps)
        self.out_proj = nn.Linear(c.width, c.width, bias=False)

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """The memories of the heads, and the token before."""
        shape = (BATCH, self.num_heads, self.head_dim, self.head_dim)
        memory = StateSpec(f"{prefix}.memory", shape, dtype, "replace")
        return [memory, *self.shift.state_specs(f"{prefix}.before", dtype)]

    def forward(
        self, x: Tensor, first: Tensor | None, state: State, prefix: str, step: Step
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, the first layer's values, and this layer's part of the new state."""
        (xr, xw, xk, xv, xa, xg), present = self.shift(x, state, f"{prefix}.before", step)
        r, k, v = self.r_proj(xr), self.k_proj(xk), self.v_proj(xv)
        left = torch.exp(_FADES * torch.sigmoid(self.decay.up(torch.tanh(self.decay.down(xw)))))
        a = torch.sigmoid(self.share.up(self.share.down(xa)))
        if self.value is None or first is None:
            first = v
        else:
            v = v + (first - v) * torch.sigmoid(self.value.up(self.value.down(xv)))
        key = F.normalize(self._heads(k * self.key_gain), dim=-1)
        k = k * (1 + (a - 1) * self.key_share)
        r, k, v, left, a = (self._heads(t) for t in (r, k, v, left, a))  # (batch, time, heads, head_dim)
        memory = state[f"{prefix}.memory"] if state else torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None])
        valid = (torch.arange(x.shape[1], device=x.device) < step.lengths[:, None])[:, :, None, None, None]
        memory, y = token_by_token(_step, [memory], [r, left, k, v, key, key * a, valid])
        y = self.norm(y.reshape(-1, x.shape[2])).reshape(x.shape)
        bonus = (r * k * self.bonus).sum(-1, keepdim=True) * v
        out: Tensor = self.out_proj((y + bonus.flatten(2)) * self.gate.up(torch.sigmoid(self.gate.down(xg))))
        return out, first, present | {f"{prefix}.memory": memory} if state else {}

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim)


def _step(
    memory: Tensor, r: Tensor, left: Tensor, k: Tensor, v: Tensor, key: Tensor, lessened: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: the memory (batch, heads, values, keys), valid (batch, 1, 1, 1), the rest (batch, heads, head_dim)."""
    held = memory @ key[..., None]  # (batch, heads, values, 1)
    new = memory * left[..., None, :] - held * lessened[..., None, :] + v[..., None] * k[..., None, :]
    return torch.where(valid, new, memory), (new @ r[..., None]).squeeze(-1)


class ChannelMixing7(nn.Module):
    """value(relu(key(x))^2)."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.shift = Shift(config.width, ("key",))
        self.k_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor, state: State, prefix: str, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        (k,), present = self.shift(x, state, f"{prefix}.channel", step)
        y: Tensor = self.v_proj(self.k_proj(k).relu().square())
        return y, present


class Layer(nn.Module):
    """Both mixings, each behind a norm and beside a residual."""

    def __init__(self, config: RWKV7Config, number: int) -> None:
        super().__init__()
        self.time_norm, self.channel_norm = (nn.LayerNorm(config.width, eps=config.norm_eps) for _ in range(2))
        self.time, self.channel = TimeMixing7(config, number), ChannelMixing7(config)

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """Those of both."""
        before = self.channel.shift.state_specs(f"{prefix}.channel", dtype)
        return [*self.time.state_specs(prefix, dtype), *before]


class RWKV7(Stack):
    """See the module's description; follows :class:`edgellm.models.protocol.LanguageModel`."""

    def __init__(self, config: RWKV7Config) -> None:
        c = config
        embedding_norm, norm = (nn.LayerNorm(c.width, eps=c.norm_eps) for _ in range(2))
        layers = (Layer(c, number) for number in range(c.num_layers))
        super().__init__(c, layers, embedding_norm=embedding_norm, norm=norm)

    def forward(
        self, tokens: Tensor, state: State | None = None, step: Step | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (batch, time) to logits (batch, count, vocab_size) and the new state."""
        state, step = state or {}, step or Step.whole(tokens)
        x, first = self.embedded(tokens), None  # (batch, time, width)
        present: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            y, first, new = layer.time(layer.time_norm(x), first, state, f"layers.{i}", step)
            x = x + y
            y, more = layer.channel(layer.channel_norm(x), state, f"layers.{i}", step)
            x, present = x + y, present | new | more
        return self.head(take_positions(self.norm(x), step.logit_positions)), present


def _hidden(name: str, values: Values, fields: Fields) -> None:
    given = values.get(name)
    usual = -(-int(fields["width"] * (values.get("hidden_ratio") or 4)) // 32) * 32
    fields["hidden"] = usual if given is None else checked_whole(name, given)


def _as_ours(config: RWKV7Config, values: Values, name: str, tensor: Tensor) -> Tensor:
    """Shares between tokens are numbers of what the token has here, and of what differs from the one before there."""
    return 1 - tensor if ".shift." in name else tensor


_LOW_RANK = {"decay": "w_lora", "share": "a_lora", "value": "v_lora", "gate": "g_lora"}

HUGGING_FACE = HuggingFace(
    types={"rwkv7": Variant(), "rwkv7_fla": Variant()},
    keys={
        "vocab_size": whole("vocab_size", default=32000),
        "hidden_size": whole("width", default=2048),
        "num_hidden_layers": whole("num_layers", default=24, limit=MAX_LAYERS),
        "head_dim": whole("head_dim", default=64),
        "intermediate_size": _hidden,
        "decay_low_rank_dim": whole("decay_rank", default=64),
        "a_low_rank_dim": whole("share_rank", default=64),
        "v_low_rank_dim": whole("value_rank", default=16),
        "gate_low_rank_dim": whole("gate_rank", default=128),
        "max_position_embeddings": whole("max_context", default=2048, limit=MAX_CONTEXT),
        "norm_eps": positive("norm_eps", default=1e-5),
        "norm_first": neutral(True),
        "norm_bias": neutral(True),
        "hidden_act": neutral("sqrelu"),
        "attn": neutral(None),
        "num_heads": METADATA,
        "value_dim": METADATA,  # tensors of another width are refused by their shapes
        "tie_word_embeddings": flag("tie_embeddings", default=False),
        **dict.fromkeys(("attn_mode", "hidden_ratio", "fuse_norm", "fuse_cross_entropy"), METADATA),
        **dict.fromkeys(("fuse_linear_cross_entropy", "use_l2warp"), METADATA),
    },
    names=Names(
        {
            "embedding": "model.embeddings",
            "embedding_norm": "model.layers.0.pre_norm",
            "norm": "model.norm",
            "head": "lm_head",
            "time_norm": "attn_norm",
            "channel_norm": "ffn_norm",
            **{f"time.shift.{use}": f"attn.x_{use}" for use in _USES},
            **{f"time.{part}_proj": f"attn.{part}_proj" for part in "rkv"},
            "time.out_proj": "attn.o_proj",
            "time.norm": "attn.g_norm",
            "time.key_gain": "attn.k_k",
            "time.key_share": "attn.k_a",
            "time.bonus": "attn.r_k",
            **{f"time.{ours}.down": f"attn.{theirs}.lora.0" for ours, theirs in _LOW_RANK.items()},
            **{f"time.{ours}.up": f"attn.{theirs}.lora.2" for ours, theirs in _LOW_RANK.items()},
            "channel.shift.key": "ffn.x_k",
            "channel.k_proj": "ffn.key",
            "channel.v_proj": "ffn.value",
        },
        layers="model.layers",
    ),
    tensor=_as_ours,
)


def _sizes(shapes: Shapes) -> Fields:
    """What the shapes of the authors' tensors say; the norm of heads has one epsilon there, which is of 64 features."""
    heads, size = shapes["blocks.0.att.r_k"] if len(shapes["blocks.0.att.r_k"]) == 2 else (0, 0)
    if size != 64:
        raise refuse("blocks.0.att.r_k", shapes["blocks.0.att.r_k"])
    second = "blocks.1.att.v1"  # the first layer's values mix with none
    sizes = {
        "hidden": ("blocks.0.ffn.key.weight", 0), "decay_rank": ("blocks.0.att.w1", 1),
        "share_rank": ("blocks.0.att.a1", 1), "gate_rank": ("blocks.0.att.g1", 1),
        **({"value_rank": (second, 1)} if second in shapes else {}),
    }  # fmt: skip
    return {
        "vocab_size": rows_of("emb.weight")(shapes), "width": heads * size, "head_dim": size,
        "num_layers": 1 + max(int(n.split(".")[1]) for n in shapes if re.match(r"blocks\.\d{1,4}\.", n)),
        **{field: shapes.get(name, (0, 0))[axis] for field, (name, axis) in sizes.items()},
    }  # fmt: skip


_LETTERS = {"decay": "w", "share": "a", "value": "v", "gate": "g"}
TENSORS = TensorFile(
    mark="blocks.0.att.r_k",
    sizes=_sizes,
    names=Names(
        {
            "embedding": "emb",
            "embedding_norm": "blocks.0.ln0",
            "norm": "ln_out",
            "head": "head",
            "time_norm": "ln1",
            "channel_norm": "ln2",
            **{f"time.shift.{use}": f"att.x_{use}" for use in _USES},
            **{f"time.{letter}_proj": f"att.{part}" for part in ("receptance", "key", "value") for letter in part[0]},
            "time.out_proj": "att.output",
            "time.norm": "att.ln_x",
            "time.key_gain": "att.k_k",
            "time.key_share": "att.k_a",
            "time.bonus": "att.r_k",
            **{f"time.{ours}.down.weight": f"att.{letter}1" for ours, letter in _LETTERS.items()},
            **{f"time.{ours}.up.weight": f"att.{letter}2" for ours, letter in _LETTERS.items()},
            **{f"time.{ours}.up.bias": f"att.{letter}0" for ours, letter in _LETTERS.items()},
            "channel.shift.key": "ffn.x_k",
            "channel.k_proj": "ffn.key",
            "channel.v_proj": "ffn.value",
        },
        layers="blocks",
    ),
    tensor=lambda name, tensor: 1 - tensor if ".shift." in name else tensor,
    reshaped=(".up.bias", ".key_gain", ".key_share", *(f".shift.{use}" for use in (*_USES, "key"))),
    by_columns=tuple(f".{ours}.{part}.weight" for ours in _LETTERS for part in ("down", "up")),
    ignored=tuple(f"blocks.0.att.v{i}" for i in range(3)),
    end=0,
)

ARCHITECTURE = Architecture(
    name="rwkv7", config=RWKV7Config, build=RWKV7, presets=PRESETS, huggingface=HUGGING_FACE, tensors=TENSORS
)
