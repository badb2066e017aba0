"""Families against transformers: from a folder that it saved, equal logits, whole and in steps."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edgellm.checkpoints import load_checkpoint
from edgellm.errors import CheckpointError
from edgellm.models.protocol import Step, empty_state

VOCAB, CONTEXT = 101, 64
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
DECODER = HEADS | {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
MULTIPLIERS = {
    "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 0.5,
}  # fmt: skip


def rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **numbers}}


LONG = {"short_factor": [1.0, 1.3, 1.7, 2.0], "long_factor": [2.0] * 4}
GEMMA2 = HEADS | {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "head_dim": 10, "sliding_window": 7,
    "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
}  # fmt: skip
LFM2 = HEADS | {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "block_multiple_of": 8,
    "layer_types": ["conv", "full_attention", "conv", "conv"],
}  # fmt: skip
MAMBA2 = {
    "hidden_size": 48, "num_hidden_layers": 3, "state_size": 10, "num_heads": 8, "head_dim": 12, "n_groups": 1,
    "chunk_size": 16,
}  # fmt: skip
JAMBA = HEADS | {
    "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 4, "attn_layer_period": 3, "attn_layer_offset": 1,
    "num_experts": 5, "num_experts_per_tok": 2, "mamba_d_state": 10, "mamba_dt_rank": 7,
    "rms_norm_eps": 0.1,  # norms of what is all but 0 would magnify what either side rounds
}  # fmt: skip
BART = {
    "vocab_size": 61, "max_position_embeddings": 64, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80,
}  # fmt: skip
MAMBA = {"hidden_size": 48, "num_hidden_layers": 3, "state_size": 10, "expand": 3}
BAMBA = HEADS | {
    "hidden_size": 48, "head_dim": 12, "intermediate_size": 80, "num_hidden_layers": 3, "attn_layer_indices": [1],
    "mamba_n_heads": 8, "mamba_d_state": 10, "mamba_n_groups": 2, "mamba_chunk_size": 16,
}  # fmt: skip
GRANITE = HEADS | {
    "hidden_size": 48, "intermediate_size": 40, "shared_intermediate_size": 36, "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_local_experts": 5,
    "num_experts_per_tok": 2, "mamba_n_heads": 8, "mamba_d_state": 10, "mamba_chunk_size": 16, "rms_norm_eps": 0.1,
    "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2, "logits_scaling": 2.0,
}  # fmt: skip
NEMOTRON_H = HEADS | {
    "hidden_size": 48, "head_dim": 10, "intermediate_size": 80, "ssm_state_size": 10, "mamba_num_heads": 8,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "mamba_head_dim": 6, "n_groups": 2,
    "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "chunk_size": 16,
    "moe_shared_expert_intermediate_size": 30, "time_step_min": 0.5, "layer_norm_epsilon": 0.1,
    "routed_scaling_factor": 1.5,
}  # fmt: skip
ZAMBA2 = {
    "hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 4, "max_position_embeddings": CONTEXT,
    "layers_block_type": ["hybrid", "mamba", "hybrid"], "num_hidden_layers": 3, "mamba_d_state": 10,
    "n_mamba_heads": 8, "adapter_rank": 5, "chunk_size": 16, "time_step_min": 0.5, "rms_norm_eps": 0.1,
}  # fmt: skip
FALCON_H1 = HEADS | {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "mamba_d_ssm": 40, "mamba_n_heads": 8,
    "mamba_d_state": 10, "mamba_chunk_size": 16, "embedding_multiplier": 3.0, "lm_head_multiplier": 0.3,
    "rms_norm_eps": 0.01,
    "attention_in_multiplier": 0.7, "attention_out_multiplier": 1.3, "key_multiplier": 0.4, "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.6, "mlp_multipliers": [0.8, 1.4], "ssm_multipliers": [0.9, 1.2, 0.7, 1.1, 0.5],
}  # fmt: skip
QWEN3_5 = HEADS | {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "head_dim": 12, "linear_num_key_heads": 2,
    "linear_num_value_heads": 6, "linear_key_head_dim": 10, "linear_value_head_dim": 7,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    "rms_norm_eps": 1e-3,
}  # fmt: skip
RECURRENT_GEMMA = HEADS | {
    "hidden_size": 48, "intermediate_size": 160, "num_hidden_layers": 4, "lru_width": 60, "attention_window_size": 7,
}  # fmt: skip
RWKV = {"hidden_size": 48, "num_hidden_layers": 3, "attention_hidden_size": 40, "intermediate_size": 80}
XLSTM = {"hidden_size": 48, "num_hidden_layers": 2, "num_heads": 4, "embedding_dim": 48, "num_blocks": 2}
QWEN3_NEXT = QWEN3_5 | {
    "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16,
}  # fmt: skip

CASES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", DECODER | rope("dynamic", factor=2.5)),
    ("Mistral", DECODER | {"sliding_window": 7}),
    (
        "Ministral",
        DECODER
        | {"sliding_window": 7, "head_dim": 12, "layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"num_hidden_layers": 4},
    ),
    ("Qwen2", DECODER | {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}),
    ("Qwen3", DECODER | {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2, "head_dim": 12}),
    ("Granite", DECODER | MULTIPLIERS),
    ("Granite", DECODER | MULTIPLIERS | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("SmolLM3", DECODER | {"no_rope_layers": [1, 0, 1]}),
    ("SmolLM3", DECODER | {"no_rope_layer_interval": 2, "tie_word_embeddings": False, "attention_bias": True}),
    ("SeedOss", DECODER | {"head_dim": 10, "attention_out_bias": True, "mlp_bias": True}),
    ("Phi3", DECODER),
    ("Phi3", DECODER | {"sliding_window": 7} | rope("default", partial_rotary_factor=0.5)),
    ("Phi3", DECODER | rope("longrope", **LONG) | {"original_max_position_embeddings": 48}),
    (
        "Phi3",
        DECODER
        | rope("longrope", **{name: n[:2] for name, n in LONG.items()}, partial_rotary_factor=0.5)
        | {"original_max_position_embeddings": 48, "tie_word_embeddings": True},
    ),
    ("Gemma2", GEMMA2),
    ("Gemma2", GEMMA2 | {"attn_logit_softcapping": None, "num_key_value_heads": 6}),
    ("Gemma2", GEMMA2 | {"final_logit_softcapping": None, "tie_word_embeddings": False}),
    ("Gemma2", GEMMA2 | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
    ("Gemma2", GEMMA2 | {"sliding_window": 1}),
    ("Gemma2", GEMMA2 | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}),
    ("Lfm2", LFM2),
    ("Lfm2", LFM2 | {"conv_bias": True, "conv_L_cache": 4, "tie_word_embeddings": False}),
    ("Lfm2", LFM2 | {"layer_types": None, "full_attn_idxs": [2], "block_auto_adjust_ff_dim": False}),
    ("Mamba2", MAMBA2),
    ("Mamba2", MAMBA2 | {"n_groups": 4, "use_bias": True, "use_conv_bias": False, "conv_kernel": 2}),
    ("Mamba2", MAMBA2 | {"tie_word_embeddings": True, "hidden_size": 24, "expand": 4}),
    ("Mamba", MAMBA),
    ("Mamba", MAMBA | {"time_step_rank": 5, "use_bias": True, "use_conv_bias": False, "conv_kernel": 2}),
    ("Bamba", BAMBA),
    (
        "Bamba",
        BAMBA
        | {"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True, "mamba_conv_bias": False}
        | {"num_key_value_heads": 6, "mamba_d_conv": 3, "tie_word_embeddings": True},
    ),
    ("GraniteMoeHybrid", GRANITE),
    ("GraniteMoeHybrid", GRANITE | {"num_local_experts": 0, "position_embedding_type": "rope", "attention_bias": True}),
    ("GraniteMoeHybrid", GRANITE | {"tie_word_embeddings": True, "num_experts_per_tok": 1, "mamba_n_groups": 4}),
    ("NemotronH", NEMOTRON_H),
    ("NemotronH", NEMOTRON_H | {"n_group": 3, "topk_group": 2, "norm_topk_prob": False, "mlp_hidden_act": "silu"}),
    (
        "NemotronH",
        NEMOTRON_H
        | {"moe_latent_size": 24, "mlp_bias": True, "use_bias": True, "use_conv_bias": False, "conv_kernel": 3}
        | {"num_experts_per_tok": 6, "tie_word_embeddings": True},
    ),
    ("Zamba2", ZAMBA2),
    ("Zamba2", ZAMBA2 | {"num_mem_blocks": 2, "use_shared_attention_adapter": True, "use_mem_rope": True}),
    (
        "Zamba2",
        ZAMBA2
        | {
            "num_mem_blocks": 1,
            "num_key_value_heads": 2,
            "mamba_ngroups": 4,
            "mamba_d_conv": 3,
            "add_bias_linear": True,
        },
    ),
    ("FalconH1", FALCON_H1),
    (
        "FalconH1",
        FALCON_H1 | {"mamba_rms_norm": True, "mamba_n_groups": 4, "tie_word_embeddings": True, "mlp_bias": True},
    ),
    (
        "FalconH1",
        FALCON_H1
        | {
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "mamba_proj_bias": True,
            "projectors_bias": True,
            "attention_bias": True,
            "mamba_conv_bias": False,
            "mamba_d_conv": 3,
            "head_dim": 10,
            "mamba_d_ssm": None,
        },
    ),
    ("Jamba", JAMBA),
    (
        "Jamba",
        JAMBA
        | {"num_experts_per_tok": 5, "expert_layer_period": 3, "expert_layer_offset": 0, "tie_word_embeddings": True},
    ),
    (
        "Jamba",
        JAMBA
        | {"num_experts": 1, "num_experts_per_tok": 1, "mamba_proj_bias": True, "mamba_conv_bias": False}
        | {"mamba_dt_rank": "auto", "mamba_d_conv": 3, "mamba_expand": 3},
    ),
    ("FalconMamba", MAMBA | {"mixer_rms_eps": 0.1, "tie_word_embeddings": False}),
    ("Qwen3_5", QWEN3_5),
    ("Qwen3_5", QWEN3_5 | {"attention_bias": True, "tie_word_embeddings": True, "linear_conv_kernel_dim": 2}),
    ("Qwen3Next", QWEN3_NEXT),
    ("Qwen3Next", QWEN3_NEXT | {"mlp_only_layers": [1], "norm_topk_prob": False, "linear_num_value_heads": 2}),
    ("Qwen3Next", QWEN3_NEXT | {"decoder_sparse_step": 2, "layer_types": None, "num_hidden_layers": 4}),
    ("Qwen3_5Moe", {name: value for name, value in QWEN3_NEXT.items() if name != "intermediate_size"}),
    ("RecurrentGemma", RECURRENT_GEMMA),
    (
        "RecurrentGemma",
        RECURRENT_GEMMA | {"block_types": ["attention", "recurrent"], "attention_bias": True, "conv1d_width": 2},
    ),
    ("RecurrentGemma", RECURRENT_GEMMA | {"logits_soft_cap": 2.0, "lru_width": None, "tie_word_embeddings": False}),
    ("Rwkv", RWKV),
    ("Rwkv", RWKV | {"rescale_every": 1, "tie_word_embeddings": True, "attention_hidden_size": None}),
    ("Rwkv", RWKV | {"rescale_every": 0, "layer_norm_epsilon": 0.01, "intermediate_size": None}),
    ("xLSTM", XLSTM),
    ("xLSTM", XLSTM | {"gate_soft_cap": 2.0, "output_logit_soft_cap": 1.5, "eps": 0.1, "qk_dim_factor": 0.75}),
]


# A norm over what a memory has just begun to hold: transformers' own float32 is 7e-6 from float64 there.
CLOSE = {"Qwen3_5": 2e-5, "Qwen3_5Moe": 2e-5, "Qwen3Next": 2e-5}
CONFIGS = {
    "Qwen3_5": "Qwen3_5TextConfig",
    "Qwen3_5Moe": "Qwen3_5MoeTextConfig",
}  # of models whose configuration has another name


def scrambled(kind: str, options: dict[str, Any]) -> Any:
    """A small model of transformers in which no weight is what it is made with."""
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, CONFIGS.get(kind, f"{kind}Config"))(vocab_size=VOCAB, pad_token_id=0, **options)
    )
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=noise)
            parameter.copy_(
                0.15 * drawn if parameter.dim() == 2 else parameter + (0.4 if "conv" in name else 0.1) * drawn
            )
    return model.float().eval()


@pytest.mark.parametrize(("kind", "options"), CASES)
@torch.inference_mode()
def test_logits_equal_transformers_whole_and_in_steps(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = scrambled(kind, options)
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(0, VOCAB, (3, 41), generator=torch.Generator().manual_seed(1))  # longer than the windows
    expected = theirs(tokens, use_cache=False).logits
    model = load_checkpoint(tmp_path).model
    close = CLOSE.get(kind, 5e-6) * float(expected.abs().max())
    assert (model(tokens)[0] - expected).abs().max() < close
    for cuts in ([*range(1, 41)], [3, 4, 20]):
        state, past, pieces = empty_state(model, 3, CONTEXT), torch.zeros(3, dtype=torch.int32), []
        for start, stop in itertools.pairwise([0, *cuts, 41]):
            step = Step.whole(tokens[:, start:stop])._replace(past_lengths=past)
            logits, state = model(tokens[:, start:stop], state, step)
            pieces.append(logits)
            past = past + (stop - start)
        assert (torch.cat(pieces, 1) - expected).abs().max() < close


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("Llama", rope("dynamic", factor=0), "rope_parameters.factor is 0"),
        ("Mistral", {"sliding_window": -1}, "sliding_window is -1"),
        ("Ministral", {"layer_types": ["full_attention"]}, "layer_types is of 1 layers, but the model has 4; make"),
        ("Ministral", {"sliding_window": None}, "layer_types is 'sliding_attention'"),
        ("Llama", rope("yarn", factor=2.0, rope_theta=1), "config.json: it is malformed"),
        ("Granite", {"residual_multiplier": 0.0}, "residual_multiplier is 0.0"),
        ("Granite", {"logits_scaling": 0}, "logits_scaling is 0"),
        ("Qwen2", {"max_window_layers": -1}, "max_window_layers is -1"),
        ("SmolLM3", {"no_rope_layers": [1]}, r"no_rope_layers is \[1\]"),
        ("SmolLM3", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("Phi3", {"intermediate_size": 81}, "mlp.gate_proj.weight of shape .81, 48. .*are missing"),
        (
            "Phi3",
            rope("longrope", short_factor=[1.0], long_factor=[1.0]),
            r"short_factor is \[1.0\]; it must be a list",
        ),
        ("Phi3", rope("default", partial_rotary_factor=1e308), "config.json: it is malformed"),
        ("Phi3", rope("default", partial_rotary_factor=0.4), "partial_rotary_factor is 0.4"),
        (
            "Gemma2",
            {"layer_types": ["full_attention"] * 2 + ["chunked_attention"]},
            "layer_types is 'chunked_attention'",
        ),
        ("Gemma2", {"layer_types": ["full_attention"]}, "layer_types is of 1 layers, but the model has 3; make"),
        ("Gemma2", {"sliding_window": -1}, "sliding_window is -1"),
        ("Gemma2", {"attention_bias": True}, "attention_bias is True"),
        ("Gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("Gemma2", {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ("Gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping is 0"),
        ("Gemma2", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("Lfm2", {"layer_types": ["conv", "linear_attention", "conv", "conv"]}, "layer_types is 'linear_attention'"),
        ("Gemma2", {"layer_types": "full_attention"}, "layer_types is 'full_attention'"),
        ("Gemma2", {"layer_types": [["full_attention"]] * 3}, r"layer_types is \['full_attention'\]"),
        ("Lfm2", {"layer_types": ["conv"] * 3}, "layer_types is of 3 layers, but the model has 4; make them agree"),
        ("Lfm2", {"block_ff_dim": "80"}, "block_ff_dim is '80'"),
        ("Lfm2", {"block_ffn_dim_multiplier": 1e308}, "config.json: it is malformed"),
        ("Lfm2", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("Lfm2", {"conv_L_cache": 1}, "conv_taps is 1; it must be at least 2"),
        ("Lfm2", {"block_multiple_of": 0}, "block_multiple_of is 0"),
        ("Mamba2", {"expand": 3}, "expand is 3"),
        ("Mamba2", {"time_step_limit": [0.0, 0.1]}, r"time_step_limit is \[0.0, 0.1\]"),
        ("Mamba2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("Mamba2", {"n_groups": 3}, "num_groups 3"),
        ("Bamba", {"mamba_n_heads": 7}, "mamba_d_head is 12"),
        ("Bamba", {"rope_parameters": {"partial_rotary_factor": 1.0}}, "partial_rotary_factor is 1.0"),
        ("GraniteMoeHybrid", {"layer_types": ["mamba", "moe", "mamba"]}, "layer_types is 'moe'"),
        ("GraniteMoeHybrid", {"layer_types": ["mamba"]}, "layer_types is of 1 layers, but the model has 3; make"),
        ("GraniteMoeHybrid", {"num_experts_per_tok": 6}, "num_chosen is 6; it must be from 1 to num_experts 5"),
        ("GraniteMoeHybrid", {"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
        ("GraniteMoeHybrid", {"num_local_experts": 4}, "block_sparse_moe.router.layer.weight has shape"),
        ("NemotronH", {"layers_block_type": ["mamba", "conv"]}, "layers_block_type is 'conv'"),
        (
            "NemotronH",
            {"layers_block_type": None, "hybrid_override_pattern": ["M", "*"]},
            r"hybrid_override_pattern is \['M', '\*'\]",
        ),
        ("NemotronH", {"layers_block_type": None, "hybrid_override_pattern": "MX"}, "hybrid_override_pattern is 'X'"),
        ("NemotronH", {"n_group": 3, "topk_group": 1, "num_experts_per_tok": 3}, "num_chosen 3: of 6 experts"),
        ("NemotronH", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1"),
        ("Zamba2", {"layers_block_type": ["mamba", "attention"]}, "layers_block_type is 'attention'"),
        ("Zamba2", {"n_mamba_heads": 7}, "n_mamba_heads is 7"),
        ("Zamba2", {"use_long_context": True}, "use_long_context is True"),
        ("FalconH1", {"mamba_d_head": 6}, "mamba_d_head is 6"),
        ("FalconH1", {"mamba_d_ssm": 48.0}, "mamba_d_ssm is 48.0; it must be a positive whole number"),
        ("FalconH1", {"mamba_rms_norm": "no"}, "mamba_rms_norm is 'no'; it must be true or false"),
        ("FalconH1", {"mamba_norm_before_gate": 1}, "mamba_norm_before_gate is 1; it must be true or false"),
        ("FalconH1", {"ssm_multipliers": [1.0, 2.0]}, r"ssm_multipliers is \[1.0, 2.0\]; it must be 5 finite numbers"),
        ("FalconH1", {"key_multiplier": float("nan")}, "key_multiplier is nan"),
        ("FalconH1", {"time_step_limit": [0.0, 0.1]}, r"time_step_limit is \[0.0, 0.1\]"),
        ("Jamba", {"attn_layer_offset": 3}, "attn_layer_offset is 3"),
        ("Jamba", {"num_experts_per_tok": 6}, "num_chosen is 6; it must be at most num_experts 5"),
        ("Jamba", {"sliding_window": 8}, "sliding_window is 8"),
        ("Mamba", {"expand": 0}, "expand is 0"),
        ("Mamba", {"time_step_rank": "half"}, "time_step_rank is 'half'"),
        ("Mamba", {"conv_kernel": 1}, "conv_taps is 1; it must be at least 2"),
        ("Qwen3_5", {"layer_types": ["conv"] * 3}, "layer_types is 'conv'"),
        ("Qwen3_5", {"layer_types": ["full_attention"]}, "layer_types is of 1 layers, but the model has 3; make them"),
        ("Qwen3_5", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("Qwen3_5", {"linear_num_key_heads": 4}, "delta_groups 4"),
        ("Qwen3_5", {"num_experts": 4}, "num_experts is 4"),
        ("Qwen3_5", {"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.3}}, "factor is 0.3"),
        ("Qwen3Next", {"num_experts_per_tok": 6}, "num_chosen is 6; it must be at most num_experts 5"),
        ("RecurrentGemma", {"block_types": ["recurrent", "conv"]}, "block_types is 'conv'"),
        ("RecurrentGemma", {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ("RecurrentGemma", {"lru_width": 50}, "recurrent_width 50"),
        ("Rwkv", {"rescale_every": 1.5}, "rescale_every is 1.5"),
        ("xLSTM", {"weight_mode": "fused"}, "weight_mode is 'fused'"),
        ("xLSTM", {"use_bias": True}, "use_bias is True"),
        ("xLSTM", {"num_blocks": 3}, "num_blocks is 3"),
        ("xLSTM", {"qk_dim_factor": 1e308}, "config.json: it is malformed"),
        ("xLSTM", {"num_heads": 7}, "num_heads 7"),
    ],
)
def test_what_a_family_cannot_represent_is_refused_by_name(
    kind: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    first = dict(reversed(CASES))  # of each kind
    scrambled(kind, first[kind]).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("rwkv7", {"hidden_ratio": float("inf")}, "hidden_ratio is inf; it must be a positive number"),
        ("rwkv7", {"hidden_ratio": True}, "hidden_ratio is True; it must be a positive number"),
        ("rwkv7", {"hidden_ratio": 1e308}, "it is malformed"),
        ("bart", BART | {"decoder_start_token_id": "2"}, "decoder_start_token_id is '2'"),
        ("bart", BART | {"decoder_start_token_id": 2, "forced_bos_token_id": [0]}, r"forced_bos_token_id is \[0\]"),
    ],
)
def test_a_configuration_alone_is_refused_by_name(kind: str, values: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} | values), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"config.json: {said}"):
        load_checkpoint(tmp_path)
