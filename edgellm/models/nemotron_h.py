"""Nemotron-H: a layer is one thing: a state space, attention without positions, an MLP, or a mixture of experts.

NVIDIA 2025, arXiv:2504.03624; the experts of Nemotron 3. Embedding -> N layers, each a norm and that one thing beside a
residual -> norm -> head. MLPs have no gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.models.layers import MLP, Block, Stack
from edgellm.models.layers.experts import mixture
from edgellm.models.nemotron_h_files import HUGGING_FACE
from edgellm.models.registry import Architecture
from edgellm.models.shapes import PatternShape
from edgellm.models.state_spaces import HybridShape

__all__ = ["ARCHITECTURE", "PRESETS", "NemotronHConfig", "RoutedExperts", "nemotron_h"]


@dataclass(frozen=True, kw_only=True)
class NemotronHConfig(PatternShape, HybridShape):
    """The shape of a Nemotron-H.

    Args:
        least_step: what no dt of a state space is below.
        mlp_bias: whether the projections of MLPs have a bias.
        activation: of MLPs.
        num_experts: experts of a mixture.
        num_chosen: how many of them a token has.
        expert_width: hidden features of an expert.
        shared_width: hidden features of the expert that every token has.
        latent_width: features that experts read and give; None for those between layers.
        num_sets: sets of neighbouring experts, which are chosen first; divides ``num_experts``.
        sets_chosen: how many of them.
        normalised: whether the weights of the chosen experts sum to 1.
        share_scale: factor on these weights.
    """

    KINDS = ("space", "attention", "mlp", "experts")
    least_step: float = 0.001
    mlp_bias: bool = False
    activation: str = "relu2"
    num_experts: int = 1
    num_chosen: int = 1
    expert_width: int = 1
    shared_width: int = 1
    latent_width: int | None = None
    num_sets: int = 1
    sets_chosen: int = 1
    normalised: bool = True
    share_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        within = self.num_experts // self.num_sets * self.sets_chosen
        alone = self.num_sets > 1 and self.num_experts < 2 * self.num_sets  # a set ranks by its two best
        if self.num_experts % self.num_sets or self.sets_chosen > self.num_sets or self.num_chosen > within or alone:
            raise ConfigError(
                f"num_chosen {self.num_chosen}: of {self.num_experts} experts in {self.num_sets} sets, {within} are in "
                f"the {self.sets_chosen} that are chosen"
            )


PRESETS: Mapping[str, NemotronHConfig] = {
    "tiny": NemotronHConfig(
        vocab_size=1024, width=128, pattern=("space", "mlp", "attention", "experts"), num_heads=4, num_kv_heads=2,
        head_dim=32, mlp_width=512, max_context=512, space_heads=8, space_head_dim=32, state_size=32, num_groups=2,
        num_experts=4, num_chosen=2, expert_width=128, shared_width=256,
    ),
}  # fmt: skip


class RoutedExperts(nn.Module):
    """Experts chosen by sigmoids with an offset each, set by set (DeepSeek-V3, arXiv:2412.19437), and one for all."""

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        self.config = c = config
        inside = c.latent_width or c.width
        self.router = nn.Linear(c.width, c.num_experts, bias=False)
        self.offsets = nn.Parameter(torch.zeros(c.num_experts))
        self.experts = nn.ModuleList(
            MLP(inside, c.expert_width, bias=False, activation=c.activation) for _ in range(c.num_experts)
        )
        self.shared = MLP(c.width, c.shared_width, bias=c.mlp_bias, activation=c.activation)
        self.latent_in = nn.Linear(c.width, inside, bias=c.mlp_bias) if c.latent_width else None
        self.latent_out = nn.Linear(inside, c.width, bias=c.mlp_bias) if c.latent_width else None

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) to the same shape."""
        shares = self._shares(self.router(x).sigmoid())
        every: Tensor = self.shared(x)
        if self.latent_in is None or self.latent_out is None:
            return mixture(self.experts, x, shares) + every
        y: Tensor = self.latent_out(mixture(self.experts, self.latent_in(x), shares)) + every
        return y

    def _shares(self, scores: Tensor) -> Tensor:
        """What each expert counts for, (batch, time, num_experts): 0 for one that is not chosen."""
        c, ranks = self.config, scores + self.offsets
        if c.num_sets > 1:
            sets = ranks.reshape(*ranks.shape[:-1], c.num_sets, -1)  # (batch, time, sets, experts of one)
            best = sets.topk(2, dim=-1).values.sum(-1).topk(c.sets_chosen, dim=-1).indices
            chosen = torch.zeros_like(sets[..., 0]).scatter(-1, best, 1.0)
            ranks = sets.masked_fill(chosen[..., None] == 0, -torch.inf).flatten(-2)
        which = ranks.topk(c.num_chosen, dim=-1).indices
        shares = scores * torch.zeros_like(scores).scatter(-1, which, 1.0)
        if c.normalised:
            shares = shares / (shares.sum(-1, keepdim=True) + 1e-20)
        return shares * c.share_scale


def nemotron_h(config: NemotronHConfig) -> Stack:
    """The model with fresh weights."""
    c = config

    def block(kind: str) -> Block:
        if kind in ("space", "attention"):
            mixer = c.state_space(least_step=c.least_step) if kind == "space" else c.attention()
            return Block(c.width, c.norm_eps, {kind: mixer})
        mlp = MLP(c.width, c.mlp_width, bias=c.mlp_bias, activation=c.activation)
        return Block(c.width, c.norm_eps, {}, mlp if kind == "mlp" else RoutedExperts(c))

    return Stack(c, map(block, c.pattern))


ARCHITECTURE = Architecture(
    name="nemotron_h", config=NemotronHConfig, build=nemotron_h, presets=PRESETS, huggingface=HUGGING_FACE
)
