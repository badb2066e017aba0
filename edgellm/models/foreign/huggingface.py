"""How a family reads Hugging Face's ``config.json`` and names its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgellm.models.foreign.keys import METADATA, Fields, Key, Values, Variant, neutral, read_keys
from edgellm.models.foreign.names import Names, Stacks

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HuggingFace"]

_METADATA = frozenset({
    "model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path",
    "_commit_hash", "initializer_range", "use_cache", "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id",
    "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id", "decoder_start_token_id", "attention_dropout",
    "attention_probs_dropout_prob", "hidden_dropout", "hidden_dropout_prob", "resid_pdrop", "residual_dropout",
    "embd_pdrop", "embedding_dropout", "attn_pdrop", "classifier_dropout", "output_attentions", "output_hidden_states",
    "output_scores", "return_dict", "return_dict_in_generate", "id2label", "label2id", "num_labels", "problem_type",
    "task_specific_params", "tokenizer_class", "prefix", "torchscript", "use_bfloat16", "tf_legacy_loss",
    "chunk_size_feed_forward", "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "_flash_attn_2_enabled", "experts_implementation", "gradient_checkpointing", "finetuning_task",
    "max_sequence_length", "original_max_position_embeddings", "unsloth_fixed", "unsloth_version",
    "transformers.js_config", "tie_last_hidden_states",
})  # fmt: skip
_GENERATION = frozenset({  # once part of every configuration; transformers reads generation_config.json
    "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id",
})  # fmt: skip

# What changes the model wherever it is more than this, unless a family reads it.
_MEANING: Mapping[str, Key] = {
    "is_causal": neutral(True),
    "auto_map": neutral(None, {}),
    "quantization_config": neutral(None),
    "compression_config": neutral(None),
    "per_layer_config": neutral(None, {}),
    "pruned_heads": neutral(None, {}),
    "is_encoder_decoder": neutral(False, None),
    "is_decoder": neutral(False, True, None),
    "add_cross_attention": neutral(False, None),
    "cross_attention_hidden_size": neutral(None),
    "tie_encoder_decoder": neutral(False, None),
    "vision_config": neutral(None),
    "text_config": neutral(None),
    "audio_config": neutral(None),
    "mlp_bias": neutral(False, None),
    "attention_bias": neutral(False, None),
    "use_bias": neutral(False, None),
    "rope_interleaved": neutral(False, None),
    "partial_rotary_factor": neutral(1, None),
    "rope_local_base_freq": neutral(None),
    "no_rope_layers": neutral(None, []),
    "attn_logit_softcapping": neutral(None),
    "final_logit_softcapping": neutral(None),
    "logit_scale": neutral(1, None),
    "logits_scaling": neutral(1, None),
    "embedding_multiplier": neutral(1, None),
    "residual_multiplier": neutral(1, None),
    "attention_multiplier": neutral(None),
    "query_pre_attn_scalar": neutral(None),
    "clip_qkv": neutral(None),
    "qk_layernorm": neutral(False, None),
    "use_qk_norm": neutral(False, None),
    "num_local_experts": neutral(None, 0, 1),
    "num_experts": neutral(None, 0, 1),
    "n_routed_experts": neutral(None, 0),
    "use_sliding_window": neutral(False, None),
    "sliding_window": neutral(None),
    "attention_chunk_size": neutral(None),
    "layer_types": neutral(None),
}


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """How a family reads Hugging Face folders.

    Args:
        types: each ``model_type`` and what it has for itself.
        keys: of ``config.json``, read in this order; a key may use the fields that were read before it. Keys of
            every configuration that change nothing (``use_cache``), or that must not be set unless the family reads
            them (``is_causal``), need not be listed.
        unread: keys of the family that change nothing: of training, of kernels, of older code, or said elsewhere.
        names: our parameter names to the file's.
        tensor: from our configuration, the ``config.json``, our parameter name and the tensor as stored, the tensor of
            the same shape in our layout; where the two do not differ, the very tensor it was given. None: all are
            stored as we do.
        stacked: how the names of tensors end that hold a matrix for each of several modules; ``a.weight`` is read as
            ``a.0.weight`` and so on.
        packed: from our configuration, the modules of the file that stand for several, see
            :class:`edgellm.checkpoints.packed_source.PackedSource`. None: there are no such.
        ignored: the ends of names of tensors that mean nothing to the model, such as tables that are computed here.
    """

    types: Mapping[str, Variant]
    keys: Mapping[str, Key]
    names: Names | Stacks
    unread: tuple[str, ...] = ()
    tensor: Callable[[Any, Values, str, Tensor], Tensor] | None = None
    stacked: tuple[str, ...] = ()
    packed: Callable[[Any], Mapping[str, Mapping[str, int]]] | None = None
    ignored: tuple[str, ...] = ()

    def read(self, values: Values) -> tuple[Fields, list[str]]:
        """The fields of our configuration, and the keys that are not understood.

        Args:
            values: a ``config.json`` of one of these types.

        Raises:
            CheckpointError: as :func:`read_keys`.
        """
        variant = self.types[values["model_type"]]
        keys: dict[str, Any] = {**self.keys, **variant.keys}
        for more in (dict.fromkeys(self.unread, METADATA), _MEANING, dict.fromkeys(_METADATA | _GENERATION, METADATA)):
            keys |= {name: key for name, key in more.items() if name not in keys}
        fields, unknown = read_keys(keys, values)
        return fields | dict(variant.fields), unknown
