"""Every model that the parametrised tests run: one entry joins them all.

Families made of layers that others have too stand in :data:`FURTHER`: in every run they join the tests of models, and
two exports each. With ``FURTHER_FAMILIES=1``, as ``make test-families`` has it, they take the others' place in all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import onnxruntime
import torch
from memory_model import MemoryConfig, MemoryModel
from torch import nn

from edgellm.models.bamba import BambaConfig, bamba
from edgellm.models.decoder import Decoder, DecoderConfig
from edgellm.models.falcon_h1 import FalconH1Config, falcon_h1
from edgellm.models.gemma2 import Gemma2, Gemma2Config
from edgellm.models.granitemoehybrid import GraniteMoeHybridConfig, granitemoehybrid
from edgellm.models.hybrid import Hybrid, HybridConfig
from edgellm.models.jamba import JambaConfig, jamba
from edgellm.models.lfm2 import LFM2Config, lfm2
from edgellm.models.mamba import MambaConfig, mamba
from edgellm.models.mamba2 import Mamba2Config, mamba2
from edgellm.models.nemotron_h import NemotronHConfig, nemotron_h
from edgellm.models.qwen3_next import Qwen3NextConfig, qwen3_next
from edgellm.models.recurrent_gemma import RecurrentGemmaConfig, recurrent_gemma
from edgellm.models.rwkv import RWKV, RWKVConfig
from edgellm.models.rwkv7 import RWKV7, RWKV7Config
from edgellm.models.xlstm import XLSTMConfig, xlstm
from edgellm.models.zamba2 import Zamba2, Zamba2Config

VOCAB, CONTEXT = 101, 64


def hybrid(
    *pattern: str, rotary: bool = True, tie: bool = False, mlp_width: int = 0, window: int = 9
) -> Callable[[], nn.Module]:
    config = HybridConfig(
        vocab_size=VOCAB, width=64, pattern=pattern, num_heads=4, num_kv_heads=2, recurrent_width=96,
        mlp_width=mlp_width, max_context=CONTEXT, rotary=rotary, tie_embeddings=tie, window=window,
    )  # fmt: skip
    return lambda: Hybrid(config)


def decoder(*, kv_heads: int, tie: bool, bias: bool, qk_norm: bool = False, **options: Any) -> Callable[[], nn.Module]:
    config = DecoderConfig(
        vocab_size=VOCAB, width=96, num_layers=2, num_heads=4, num_kv_heads=kv_heads, head_dim=32, mlp_width=160,
        max_context=CONTEXT, tie_embeddings=tie, attention_bias=bias, qk_norm=qk_norm, **options,
    )  # fmt: skip
    return lambda: Decoder(config)


def gemma2(*windows: int, score_cap: float, logit_cap: float, tie: bool) -> Callable[[], nn.Module]:
    config = Gemma2Config(
        vocab_size=VOCAB, width=96, windows=windows, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=160,
        max_context=CONTEXT, score_divisor=20, score_cap=score_cap, logit_cap=logit_cap, tie_embeddings=tie,
    )  # fmt: skip
    return lambda: Gemma2(config)


def convolutions(*pattern: str, bias: bool) -> Callable[[], nn.Module]:
    config = LFM2Config(
        vocab_size=VOCAB, width=96, pattern=pattern, num_heads=3, num_kv_heads=1, head_dim=32, mlp_width=160,
        max_context=CONTEXT, conv_bias=bias,
    )  # fmt: skip
    return lambda: lfm2(config)


def fading(*, groups: int, bias: bool) -> Callable[[], nn.Module]:
    config = Mamba2Config(
        vocab_size=VOCAB, width=64, num_layers=2, num_heads=4, head_dim=24, state_size=16, num_groups=groups, bias=bias,
        tie_embeddings=True, max_context=CONTEXT,
    )  # fmt: skip
    return lambda: mamba2(config)


def side_by_side(*, norm: str, bias: bool) -> Callable[[], nn.Module]:
    config = FalconH1Config(
        vocab_size=VOCAB, width=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=80,
        max_context=CONTEXT, space_heads=4, space_head_dim=10, state_size=12, num_groups=2, space_norm=norm,
        space_bias=bias, attention_bias=bias, mlp_bias=bias, embedding_scale=2.0, logit_scale=0.5,
    )  # fmt: skip
    return lambda: falcon_h1(config)


SPACE: dict[str, Any] = {
    "vocab_size": VOCAB, "width": 48, "pattern": ("space", "attention"), "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 16, "mlp_width": 64, "max_context": CONTEXT, "space_heads": 4, "space_head_dim": 20, "state_size": 12,
}  # fmt: skip


def spaces_and_experts() -> nn.Module:
    return granitemoehybrid(
        GraniteMoeHybridConfig(
            **SPACE, score_scale=0.3, num_experts=4, num_chosen=2, shared_width=40, embedding_scale=2.0,
            logit_scale=0.5, norm_eps=0.1,
        )
    )  # fmt: skip


def one_thing_a_layer() -> nn.Module:
    return nemotron_h(
        NemotronHConfig(
            **SPACE | {"pattern": ("space", "experts", "attention", "mlp")}, num_experts=6, num_chosen=4, num_sets=3,
            sets_chosen=2, expert_width=24, shared_width=44, latent_width=32, norm_eps=0.1,
        )
    )  # fmt: skip


def shared_blocks() -> nn.Module:
    model = Zamba2(
        Zamba2Config(
            **SPACE | {"pattern": ("shared", "space", "shared", "shared"), "num_kv_heads": 4}, num_blocks=2, rank=6,
            attention_changes=True, rotates=True, mlp_bias=True,
        )
    )  # fmt: skip
    with torch.no_grad():  # as large beside what layers add to it as training makes it: 8 bits of those are no more
        model.embedding.weight *= 8
    return model


def scans_and_experts() -> nn.Module:
    return jamba(
        JambaConfig(
            vocab_size=VOCAB, width=48, pattern=("space", "attention"), num_heads=4, num_kv_heads=2, head_dim=16,
            mlp_width=64, max_context=CONTEXT, inner=80, state_size=10, rank=5, experts=(0,), num_experts=4,
            num_chosen=2,
            norm_eps=0.1,  # norms of what is all but 0 magnify rounding until another expert is chosen in 16 bits
        )
    )  # fmt: skip


def selective() -> Callable[[], nn.Module]:
    config = MambaConfig(
        vocab_size=VOCAB, width=48, num_layers=2, inner=80, state_size=10, rank=5, bias=True, mixer_norms=True,
        max_context=CONTEXT,
    )  # fmt: skip
    return lambda: mamba(config)


def delta(*pattern: str) -> Callable[[], nn.Module]:
    config = Qwen3NextConfig(
        vocab_size=VOCAB, width=64, pattern=pattern, num_heads=4, num_kv_heads=2, head_dim=32, rotated=16,
        delta_heads=4, delta_groups=2, delta_key_dim=16, delta_value_dim=24, mlp_width=96, max_context=CONTEXT,
        norm_eps=1e-3,  # 16 bits are too few for a norm over what a memory has just begun to hold
    )  # fmt: skip
    return lambda: qwen3_next(config)


def gated(*pattern: str) -> Callable[[], nn.Module]:
    config = RecurrentGemmaConfig(
        vocab_size=VOCAB, width=64, pattern=pattern, recurrent_width=96, num_heads=4, num_kv_heads=2, head_dim=32,
        rotated=16, window=9, mlp_width=96, max_context=CONTEXT, logit_cap=12.0,
    )  # fmt: skip
    return lambda: recurrent_gemma(config)


def averages() -> Callable[[], nn.Module]:
    config = RWKVConfig(
        vocab_size=VOCAB, width=64, num_layers=2, mixed_width=96, hidden=128, halved_every=1, max_context=CONTEXT
    )

    def make() -> RWKV:
        model = RWKV(config)
        for layer in model.layers:
            layer.time.decay.data.clamp_(min=-1.0)  # the largest exponent falls by this: 16 bits hold no slow fall
        return model

    return make


def matrices() -> Callable[[], nn.Module]:
    config = XLSTMConfig(
        vocab_size=VOCAB, width=64, num_layers=2, num_heads=4, key_width=64, value_width=96, mlp_width=96,
        gate_cap=3.0, logit_cap=12.0, max_context=CONTEXT, norm_eps=0.1,  # of memories that hold little
    )  # fmt: skip
    return lambda: xlstm(config)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "rnn_tanh": hybrid("rnn_tanh", "rnn_tanh"),
    "lstm": hybrid("lstm", "lstm"),
    "gru alone": hybrid("gru"),
    "gru": hybrid("gru", "gru", mlp_width=128),
    "attention": hybrid("attention", "attention", mlp_width=128),
    "mixed": hybrid("lstm", "attention", "gru", "attention", "rnn_tanh", tie=True, mlp_width=128),
    "local": hybrid("local", "local", mlp_width=128),
    "local and mixed": hybrid("local", "gru", "attention", "local", rotary=False, tie=True, window=11),
    "memory": lambda: MemoryModel(MemoryConfig(VOCAB, CONTEXT)),
    "decoder": decoder(kv_heads=2, tie=True, bias=False),
    "decoder untied with biases": decoder(kv_heads=4, tie=False, bias=True),
    "decoder with q/k norm": decoder(kv_heads=2, tie=True, bias=False, qk_norm=True),
    "windows and soft caps": gemma2(9, 0, score_cap=5.0, logit_cap=12.0, tie=True),
    "short convolutions and attention": convolutions("conv", "attention", bias=False),
    "state space": fading(groups=1, bias=False),
    "selective state space": selective(),
    "gated delta rule and attention": delta("delta", "attention"),
}
FURTHER: dict[str, Callable[[], nn.Module]] = {
    "rnn_relu": hybrid("rnn_relu", "rnn_relu"),
    "attention without positions": hybrid("attention", "lstm", rotary=False),
    "windows without caps": gemma2(0, 9, score_cap=0, logit_cap=0, tie=False),
    "short convolutions with biases": convolutions("conv", bias=True),
    "state space of two groups with biases": fading(groups=2, bias=True),
    "selective state space, attention, experts": scans_and_experts,
    "state space and attention that turns half": lambda: bamba(BambaConfig(**SPACE, rotated=8, mlp_bias=True)),
    "state space, attention, experts": spaces_and_experts,
    "gated linear recurrence and windows": gated("recurrent", "attention"),
    "fading averages": averages(),
    "memories corrected and fading by feature": lambda: RWKV7(
        RWKV7Config(
            vocab_size=VOCAB,
            width=48,
            num_layers=2,
            head_dim=16,
            hidden=72,
            decay_rank=7,
            share_rank=5,
            value_rank=6,
            gate_rank=9,
            max_context=CONTEXT,
        )
    ),
    "matrix memories": matrices(),
    "state space, attention, MLP or experts": one_thing_a_layer,
    "decoder that turns in part, with windows and factors": decoder(
        kv_heads=2,
        tie=True,
        bias=False,
        rotated=16,
        unturned=(1,),
        windows=(9, 0),
        embedding_scale=2.0,
        residual_scale=0.6,
        logit_scale=0.5,
    ),
    "state space and shared attention": shared_blocks,
    "state space beside attention": side_by_side(norm="before the gate", bias=True),
}
EVERY = FAMILIES | FURTHER
if os.environ.get("FURTHER_FAMILIES"):
    FAMILIES = FURTHER
# Of these the first draw has two tokens, on the rows of the proof, between which 16 bits decide by chance; see
# ``test_no_draw_has_tokens_that_16_bits_cannot_tell_apart``.
DRAWS = {
    "memory": 2,
    "memories corrected and fading by feature": 3,
    "state space and attention that turns half": 2,
}
# Families whose layers are plain PyTorch rather than canonical ops: their graphs hold what PyTorch's operators become.
PLAIN = frozenset({
    "memory", "windows and soft caps", "short convolutions and attention", "state space", "selective state space",
    "gated delta rule and attention", *(set(FURTHER) - {"rnn_relu", "attention without positions"}),
})  # fmt: skip


def cpu_targets() -> list[str]:
    """Targets whose bundles are made for this machine, in float32."""
    from edgellm_exporters.graph.targets import TARGETS

    return [name for name, target in TARGETS.items() if target.device == "cpu"]


def make(family: str, seed: int = 0) -> nn.Module:
    """A model with fresh weights, large enough that a wrong sign or gate shows in the logits."""
    torch.manual_seed(seed + DRAWS.get(family, 0))
    model = EVERY[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:  # zero at first, which would hide a bias that is dropped or misplaced
                parameter.normal_(std=0.2)
            elif parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))  # around what it is made with: gains of 1, of 1 + w
    return model


def planned(model: nn.Module, target: str, method: str, calibration: Sequence[Sequence[int]] = ()) -> tuple[Any, Any]:
    """The graph before lowering, and the plan, that an export of this model without text makes."""
    from edgellm_exporters.graph.capture import capture
    from edgellm_exporters.graph.lower import prepare
    from edgellm_exporters.graph.targets import find_target
    from edgellm_exporters.proof.samples import golden_rows
    from edgellm_exporters.quantize.methods import find_method
    from edgellm_exporters.quantize.planning import make_plan

    graph = prepare(capture(model), find_target(target))
    return graph, make_plan(
        find_method(method, find_target(target).methods),
        graph,
        model,
        golden_rows(None, VOCAB, CONTEXT).rows,
        calibration,
    )


def as_written() -> Any:
    """Session options that run a graph as it is: some products of whole numbers otherwise become other kernels."""
    options = _SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


_SessionOptions = onnxruntime.SessionOptions  # before any test puts another in its place
