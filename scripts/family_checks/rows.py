"""The rows: a type of transformers, and the configuration that makes it tiny. Sizes are odd where they may be.

A name is the type, in brackets what is set otherwise than usual; one type may have several rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["CONTEXT", "ENCODED", "ROWS", "VOCAB", "WINDOW"]

Config = Mapping[str, Any]

VOCAB, CONTEXT, WINDOW = 131, 120, 16
SPECIAL: Config = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON: Config = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, **SPECIAL,
}  # fmt: skip
HEADS = {"head_dim": 16}
EQUAL = {"num_key_value_heads": 4}
GPT: Config = {
    "vocab_size": VOCAB, "n_embd": 36, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "n_routed_experts": 4,
}  # fmt: skip
GROUPS = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
LATENT = EQUAL | {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
}  # fmt: skip
BERT: Config = {
    "vocab_size": VOCAB, "hidden_size": 36, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT, "is_decoder": True, **SPECIAL,
}  # fmt: skip
# A decoder that was made to stand behind an encoder, alone.
BEHIND: Config = {
    "vocab_size": VOCAB, "d_model": 36, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 56, "decoder_ffn_dim": 56, "max_position_embeddings": CONTEXT,
    "is_decoder": True, **SPECIAL,
}  # fmt: skip
CHOSEN = {
    "index_topk": 12,
    "index_n_heads": 24,
    "index_head_dim": 16,
}  # each token attends to 12; heads enough for no ties
SLIDING = {"sliding_window": WINDOW}
BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


LLAMA: Mapping[str, Config] = {
    "llama": COMMON,
    "llama(tied)": COMMON | {"tie_word_embeddings": True},
    "llama(MQA)": COMMON | {"num_key_value_heads": 1},
    "llama(MHA)": COMMON | EQUAL,
    "llama(head_dim 32)": COMMON | {"head_dim": 32},
    "llama(head_dim 8)": COMMON | {"head_dim": 8},
    "llama(head_dim 20)": COMMON | {"head_dim": 20},
    "llama(attention_bias)": COMMON | {"attention_bias": True},
    "llama(mlp_bias)": COMMON | {"mlp_bias": True},
    "llama(rope llama3)": COMMON
    | _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    "llama(rope linear)": COMMON | _rope("linear", factor=2.0),
    "llama(rope dynamic)": COMMON | _rope("dynamic", factor=2.0),
    "llama(rope yarn)": COMMON | _rope("yarn", factor=2.0, original_max_position_embeddings=64),
    "mistral": COMMON | HEADS | {"sliding_window": None},
    "mistral(window 16)": COMMON | HEADS | SLIDING,
    "mistral(window=context)": COMMON | HEADS | {"sliding_window": CONTEXT},
    "ministral": COMMON | HEADS | SLIDING,
    "ministral3": COMMON | HEADS,
    "mixtral": COMMON | EXPERTS,
    "qwen2": COMMON,
    "qwen2(use_sliding_window)": COMMON | SLIDING | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": COMMON | EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3": COMMON | HEADS,
    "qwen3_moe": COMMON | HEADS | EXPERTS,
    "gemma": COMMON | HEADS,
    "gemma2": COMMON | HEADS | SLIDING,
    "gemma3_text": COMMON | HEADS | SLIDING | BOTH,
    "gemma3n_text": COMMON
    | HEADS
    | BOTH
    | {
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB,
        "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [88, 88],
    },
    "gemma4_text": COMMON
    | HEADS
    | BOTH
    | {
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0,
        "global_head_dim": 16,
    },
    "vaultgemma": COMMON | HEADS | SLIDING,
    "phi": COMMON,
    "phi3": COMMON | {"original_max_position_embeddings": CONTEXT},
    "phi3(longrope)": COMMON
    | {"original_max_position_embeddings": 100}
    | _rope("longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8, original_max_position_embeddings=100),
    "phimoe": COMMON | EXPERTS,
    "olmo": COMMON,
    "olmo2": COMMON,
    "olmo3": COMMON | SLIDING,
    "olmoe": COMMON | EXPERTS,
    "flex_olmo": COMMON | EXPERTS,
    "granite": COMMON
    | {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1, "logits_scaling": 8.0},
    "granitemoe": COMMON | EXPERTS,
    "granitemoeshared": COMMON | EXPERTS | {"shared_intermediate_size": 24},
    "granite_swa": COMMON | SLIDING | BOTH,
    "granitemoe_swa": COMMON | SLIDING | BOTH | EXPERTS,
    "smollm3": COMMON | {"no_rope_layers": [1, 0]},
    "nanochat": COMMON,
    "internlm3": COMMON | HEADS,
}  # fmt: skip

GPT_LIKE: Mapping[str, Config] = {
    "gpt2": GPT,
    "gpt-sw3": GPT,
    "gptj": GPT | {"n_embd": 64, "rotary_dim": 8},
    "gpt_bigcode": GPT,
    "codegen": GPT | {"n_embd": 64, "rotary_dim": 8},
    "gpt_neo": {
        "vocab_size": VOCAB, "hidden_size": 36, "num_layers": 2, "num_heads": 4, "max_position_embeddings": CONTEXT,
        "attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "bos_token_id": 1, "eos_token_id": 2,
    },
    "gpt_neox": COMMON | EQUAL,
    "gpt_neox_japanese": COMMON | EQUAL,
    "openai-gpt": GPT,
    "ctrl": GPT | {"dff": 56},
    "opt": {
        "vocab_size": VOCAB, "hidden_size": 36, "ffn_dim": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT, "word_embed_proj_dim": 36, **SPECIAL,
    },
    "bloom": {"vocab_size": VOCAB, "hidden_size": 36, "n_layer": 2, "n_head": 4, "seq_length": CONTEXT, **SPECIAL},
    "falcon": {
        "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2,
    },
    "falcon(alibi)": {
        "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True,
        "max_position_embeddings": CONTEXT, "new_decoder_architecture": False, "multi_query": False,
        "parallel_attn": False, "bias": True, "bos_token_id": 1, "eos_token_id": 2,
    },
    "mpt": {"vocab_size": VOCAB, "d_model": 36, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT},
    "xglm": {
        "vocab_size": VOCAB, "d_model": 36, "ffn_dim": 56, "num_layers": 2, "attention_heads": 4,
        "max_position_embeddings": CONTEXT, **SPECIAL,
    },
    "biogpt": {k: v for k, v in COMMON.items() if k != "num_key_value_heads"},
    "persimmon": COMMON | EQUAL,
    "stablelm": COMMON,
    "starcoder2": COMMON,
    "nemotron": COMMON,
    "jais2": COMMON,
    "xlm": {"vocab_size": VOCAB, "emb_dim": 36, "n_layers": 2, "n_heads": 4, "causal": True, "n_langs": 1},
    "xlnet": {"vocab_size": VOCAB, "d_model": 36, "n_layer": 2, "n_head": 4, "d_inner": 56},
    "reformer": {
        "vocab_size": VOCAB, "hidden_size": 36, "attn_layers": ["local", "local"], "axial_pos_embds": False,
        "num_attention_heads": 2, "attention_head_size": 18, "feed_forward_size": 56, "is_decoder": True,
        "local_attn_chunk_length": 8, "max_position_embeddings": CONTEXT,
    },
}  # fmt: skip

LATER: Mapping[str, Config] = {
    "afmoe": COMMON | HEADS | EXPERTS | SLIDING | {"num_dense_layers": 1, "num_shared_experts": 1},
    "apertus": COMMON,
    "apertus1p5_text": COMMON,
    "arcee": COMMON,
    "aria_text": COMMON | EXPERTS | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": COMMON | LATENT | EXPERTS | GROUPS,
    "axk2": COMMON | LATENT | EXPERTS | GROUPS | CHOSEN,
    "beam": COMMON | HEADS | EXPERTS,
    "bitnet": COMMON,
    "cohere": COMMON | HEADS,
    "cohere2": COMMON | HEADS | SLIDING | BOTH,
    "cohere2_moe": COMMON | HEADS | SLIDING | BOTH | EXPERTS,
    "cwm": COMMON | HEADS | SLIDING | BOTH,
    "dbrx": {
        "vocab_size": VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": COMMON | LATENT | EXPERTS | GROUPS,
    "deepseek_v3": COMMON | LATENT | EXPERTS | GROUPS,
    "deepseek_v32": COMMON | LATENT | EXPERTS | GROUPS | CHOSEN,
    "deepseek_v4": COMMON | EXPERTS | HEADS,
    "diffllama": COMMON,
    "doge": COMMON | HEADS,
    "dots1": COMMON | HEADS | EXPERTS | GROUPS,
    "ernie4_5": COMMON | HEADS,
    "ernie4_5_moe": COMMON | EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "exaone": COMMON,
    "exaone4": COMMON | SLIDING,
    "exaone_moe": COMMON | HEADS | EXPERTS | GROUPS | SLIDING,
    "flint": COMMON | HEADS,
    "glm": COMMON | HEADS,
    "glm4": COMMON | HEADS,
    "glm4_moe": COMMON | HEADS | EXPERTS | GROUPS,
    "glm4_moe_lite": COMMON | LATENT | EXPERTS | GROUPS,
    "glm_moe_dsa": COMMON | LATENT | EXPERTS | GROUPS | CHOSEN,
    "gpt_oss": COMMON | HEADS | SLIDING | BOTH | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": COMMON | HEADS,
    "hrm_text": COMMON | HEADS,
    "hunyuan_v1_dense": COMMON | HEADS,
    "hunyuan_v1_moe": COMMON | HEADS | EXPERTS,
    "hy_v3": COMMON | HEADS | EXPERTS | GROUPS,
    "hy_v4": COMMON | HEADS | EXPERTS | GROUPS,
    "hyperclovax": COMMON | HEADS,
    "iquestcoder": COMMON | HEADS,
    "jetmoe": COMMON | EXPERTS | {"kv_channels": 16},
    "kolibri1": COMMON | HEADS | EXPERTS,
    "laguna": COMMON | HEADS | EXPERTS | SLIDING,
    "llama4_text": COMMON
    | HEADS
    | EXPERTS
    | {"intermediate_size_mlp": 88, "attention_chunk_size": 256, "num_experts_per_tok": 1},
    "llama4_text(chunks of 16)": COMMON
    | HEADS
    | EXPERTS
    | {"intermediate_size_mlp": 88, "attention_chunk_size": 16, "num_experts_per_tok": 1},
    "longcat_flash": COMMON
    | LATENT
    | EXPERTS
    | {"num_layers": 1, "head_dim": 8, "ffn_hidden_size": 88, "expert_ffn_hidden_size": 24}
    | {"zero_expert_num": 1, "moe_topk": 2},
    "mellum": COMMON | HEADS | EXPERTS | SLIDING,
    "mimo_v2_flash": COMMON | HEADS | EXPERTS | SLIDING,
    "minicpm3": COMMON | LATENT,
    "minimax_m2": COMMON | HEADS | EXPERTS,
    "minimax_m3_vl_text": COMMON | HEADS | EXPERTS,
    "modernbert-decoder": COMMON | {"local_attention": WINDOW, "cls_token_id": 1, "sep_token_id": 2},
    "moshi": COMMON | HEADS,
    "sarvam_mla": COMMON | LATENT | EXPERTS | GROUPS,
    "sarvam_moe": COMMON | HEADS | EXPERTS | GROUPS,
    "seed_oss": COMMON | HEADS,
    "solar_open": COMMON | HEADS | EXPERTS | GROUPS,
    "youtu": COMMON | LATENT,
    "zaya": COMMON | HEADS | EXPERTS | {"num_experts_per_tok": 1},
}  # fmt: skip

RECURRENT: Mapping[str, Config] = {
    "bamba": COMMON | {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "bailing_hybrid": COMMON | HEADS | EXPERTS | GROUPS,
    "falcon_h1": COMMON
    | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    "falcon_mamba": {"vocab_size": VOCAB, "hidden_size": 36, "num_hidden_layers": 2, "state_size": 8},
    "granitemoehybrid": COMMON
    | EXPERTS
    | {
        "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8,
        "shared_intermediate_size": 24,
    },
    "jamba": COMMON
    | EXPERTS
    | {
        "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "use_mamba_kernels": False,
    },
    "kimi_linear": COMMON | HEADS | EXPERTS,
    "lfm2": COMMON | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 56},
    "lfm2_moe": COMMON | EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": COMMON | HEADS,
    "mamba": {"vocab_size": VOCAB, "hidden_size": 36, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": {
        "vocab_size": VOCAB, "hidden_size": 36, "num_hidden_layers": 2, "state_size": 8, "num_heads": 9, "head_dim": 8,
        "n_groups": 1, "chunk_size": 16,
    },
    "minimax": COMMON | HEADS | EXPERTS | {"layer_types": ["linear_attention", "full_attention"]},
    "nemotron_h": COMMON
    | {
        "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8,
        "n_groups": 1, "head_dim": 16,
    },
    "olmo_hybrid": COMMON | HEADS | DELTA,
    "qwen3_5_text": COMMON | HEADS | DELTA,
    "qwen3_5_moe_text": COMMON | HEADS | DELTA | EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3_next": COMMON | HEADS | DELTA | EXPERTS | {"shared_expert_intermediate_size": 24},
    "recurrent_gemma": COMMON | {"lru_width": 64, "attention_window_size": WINDOW, "num_hidden_layers": 3},
    "rwkv": {
        "vocab_size": VOCAB, "hidden_size": 36, "num_hidden_layers": 2, "context_length": CONTEXT,
        "attention_hidden_size": 36, "intermediate_size": 56,
    },
    "xlstm": {
        # transformers' own cache of it needs widths of queries, keys and values that are multiples of 64
        "vocab_size": VOCAB, "hidden_size": 128, "embedding_dim": 128, "num_hidden_layers": 2, "num_blocks": 2,
        "num_heads": 4, "chunkwise_kernel": "chunkwise--native_autograd", "sequence_kernel": "native_sequence__native",
        "step_kernel": "native",
    },
    "xlstm(width 128)": {
        # transformers' own cache of it needs widths of queries, keys and values that are multiples of 64
        "vocab_size": VOCAB, "hidden_size": 128, "embedding_dim": 128, "num_hidden_layers": 2, "num_blocks": 2,
        "num_heads": 4, "chunkwise_kernel": "chunkwise--native_autograd", "sequence_kernel": "native_sequence__native",
        "step_kernel": "native",
    },
    "zamba2": COMMON
    | {
        "layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_ngroups": 1,
        "num_mem_blocks": 1,
    },
}  # fmt: skip

DECODERS: Mapping[str, Config] = {
    "bert(decoder)": BERT,
    "bert-generation(decoder)": BERT,
    "electra(decoder)": BERT | {"embedding_size": 20},
    "ernie(decoder)": BERT,
    "megatron-bert(decoder)": BERT,
    "rembert(decoder)": BERT | {"input_embedding_size": 20, "output_embedding_size": 20},
    "roberta(decoder)": BERT,
    "roformer(decoder)": BERT | {"hidden_size": 64, "embedding_size": 64},
    "blenderbot(decoder)": BEHIND,
    "mbart(decoder)": BEHIND,
    "mvp(decoder)": BEHIND,
    "pegasus(decoder)": BEHIND,
    "plbart(decoder)": BEHIND,
    "trocr(decoder)": BEHIND,
    "whisper(decoder)": BEHIND | {"max_target_positions": CONTEXT},
}

ENCODED: Mapping[str, Config] = {
    "t5": {
        "vocab_size": VOCAB, "d_model": 36, "d_ff": 56, "num_layers": 2, "num_heads": 4, "d_kv": 9, "pad_token_id": 0,
        "eos_token_id": 1, "decoder_start_token_id": 0,
    },
    "t5(gated, untied)": {
        "vocab_size": VOCAB, "d_model": 36, "d_ff": 56, "num_layers": 2, "num_heads": 4, "d_kv": 9,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False, "pad_token_id": 0,
        "eos_token_id": 1, "decoder_start_token_id": 0,
    },
    "bart": {k: v for k, v in BEHIND.items() if k != "is_decoder"},
    "marian": {k: v for k, v in BEHIND.items() if k != "is_decoder"} | {"decoder_start_token_id": 0, "eos_token_id": 1},
}  # fmt: skip

ROWS: Mapping[str, Config] = {**LLAMA, **GPT_LIKE, **LATER, **RECURRENT, **DECODERS, **ENCODED}
