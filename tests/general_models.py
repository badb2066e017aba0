"""Tiny models of transformers with odd sizes and scrambled weights, for the general road."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

VOCAB, CONTEXT, WINDOW = 96, 96, 10
COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
HEADS = {"head_dim": 16}
GPT = {
    "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    "num_key_value_heads": 4,
}  # fmt: skip
# What each adds to the others: see the names.
FOREIGN: Mapping[str, Mapping[str, Any]] = {
    "llama": COMMON | HEADS,
    "qwen3": COMMON | HEADS,  # norms of each head
    "gemma2": COMMON | HEADS | {"sliding_window": WINDOW},  # windows, caps, gains of 1 + w
    "gemma3_text": COMMON | HEADS | {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": COMMON | HEADS | {"no_rope_layers": [1, 0]},  # a layer without positions
    "phi": COMMON | HEADS,  # part of a head rotated, biases, layer norms, attention beside the MLP
    "gptj": GPT | {"rotary_dim": 4},  # neighbouring pairs rotated
    "gpt_neox": COMMON | {"num_key_value_heads": 4},  # part of a head, queries, keys and values of one projection
    "glm": COMMON | HEADS,  # neighbouring pairs of half a head
    "cohere": COMMON | HEADS,  # neighbouring pairs, from a table of neighbours
    "gpt2": GPT,  # learned positions, Conv1D
    "mixtral": COMMON | HEADS | EXPERTS,
    "deepseek_v3": COMMON | LATENT | EXPERTS | {
        "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_routed_experts": 4,
    },  # values narrower than keys
    "gpt_oss": COMMON | HEADS | EXPERTS | {"sliding_window": WINDOW},  # sinks, windows, experts with biases
    "deepseek_v2": COMMON | LATENT | EXPERTS | {
        "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_routed_experts": 4,
    },  # rotation by complex numbers
    "llama4_text": COMMON | HEADS | EXPERTS | {
        "intermediate_size_mlp": 56, "attention_chunk_size": WINDOW, "num_experts_per_tok": 1,
    },  # that, and attention in chunks
    "bloom": {"vocab_size": VOCAB, "hidden_size": 36, "n_layer": 2, "n_head": 4, "seq_length": CONTEXT},  # ALiBi
    "gpt_neo": {
        "vocab_size": VOCAB, "hidden_size": 36, "num_layers": 2, "num_heads": 4, "max_position_embeddings": CONTEXT,
        "attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "bos_token_id": 1, "eos_token_id": 2,
    },  # a table of who sees whom
    "falcon": {
        "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2,
    },  # one key for all heads, attention of its own
    "diffllama": COMMON | HEADS,  # attends twice
    "deepseek_v32": COMMON | LATENT | EXPERTS | {
        "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_routed_experts": 4,
        "index_topk": 7, "index_n_heads": 24, "index_head_dim": 16,
    },  # each token attends to seven that a second set of keys chooses
    "mbart": {
        "vocab_size": VOCAB, "d_model": 36, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 56, "decoder_ffn_dim": 56, "is_decoder": True,
        "max_position_embeddings": CONTEXT,
    },  # positions counted from what its cache holds
    "hunyuan_v1_dense": COMMON | HEADS,  # a norm of each head after its rotation
    "openai-gpt": GPT,  # no cache at all
    "granite": COMMON | HEADS | {
        "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1, "logits_scaling": 8.0,
    },
}  # fmt: skip


def build(kind: str, **changes: Any) -> nn.Module:
    """A model of transformers in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**FOREIGN.get(kind, COMMON), **changes})
    return scrambled(AutoModelForCausalLM.from_config(config))


def scrambled(model: Any) -> nn.Module:
    """With weights that hide nothing: gains are not 1, biases not 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 if parameter.dim() > 1 else parameter + noise * 0.1)
    if getattr(model.config, "tie_word_embeddings", False):
        model.tie_weights()
    eager: nn.Module = model.float().eval()
    return eager
