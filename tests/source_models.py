"""Tiny models that answer sources: of transformers, with scrambled weights, and bundles of them that tests share."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from marian_files import bergamot
from tiny_bundles import text_assets
from torch import nn

from edgellm.models.bart import Bart, BartConfig
from edgellm.models.encoder_decoder import PRESETS, EncoderDecoder, EncoderDecoderConfig
from edgellm.models.t5 import T5, T5Config
from edgellm_exporters.export import ExportOptions, export

VOCAB, CONTEXT = 101, 40
T5_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB, "d_model": 48, "d_ff": 64, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 3,
    "d_kv": 16, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "pad_token_id": 0,
    "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
BART_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB, "d_model": 48, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 64, "decoder_ffn_dim": 80, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 1, "decoder_start_token_id": 2,
}  # fmt: skip
FOREIGN: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "t5": ("t5", T5_SIZES),
    "t5, gated": ("t5", T5_SIZES | {"feed_forward_proj": "gated-gelu"}),
    "t5, an output that is not scaled": ("t5", T5_SIZES | {"tie_word_embeddings": False}),
    "bart": ("bart", BART_SIZES | {"scale_embedding": True, "activation_function": "gelu"}),
    "marian": ("marian", BART_SIZES | {"activation_function": "swish", "decoder_start_token_id": 0}),
}


def foreign(name: str, folder: Path) -> Any:
    """A model of transformers in which no weight is what it is made with, saved in a folder."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    kind, sizes = FOREIGN[name]
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **sizes))
    _scramble(model, 0.15)
    if "final_logits_bias" in dict(model.named_buffers()):
        model.final_logits_bias.normal_(std=0.3, generator=torch.Generator().manual_seed(5))
    model.generation_config.forced_eos_token_id = None
    model.float().eval().save_pretrained(folder)
    return model


def _scramble(model: nn.Module, size: float) -> None:
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embed_positions" in name and not p.requires_grad:
                continue  # waves
            drawn = torch.randn(p.shape, generator=noise)
            p.copy_(size * drawn if p.dim() >= 2 else p + 0.1 * drawn)


def ragged(count: int = 3, longest: int = 26) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources (count, longest), and their lengths, all unequal."""
    drawn = torch.randint(4, VOCAB, (count, longest), generator=torch.Generator().manual_seed(1))
    return drawn, torch.tensor([longest - 9 * i for i in range(count)], dtype=torch.int32)


def t5_model(vocab_size: int = VOCAB, size: float = 0.15) -> nn.Module:
    torch.manual_seed(4)
    config = T5Config(
        vocab_size=vocab_size, width=48, encoder_layers=1, decoder_layers=2, num_heads=2, head_dim=16, mlp_width=64,
        max_context=CONTEXT, max_source=24, num_buckets=8, max_distance=12, gated=True, start_tokens=(3, 0),
    )  # fmt: skip
    model = T5(config).eval()
    _scramble(model, size)
    return model


def own_model(kind: str, *, copies: bool = False, size: float = 0.3) -> nn.Module:
    """edgellm's own: an encoder of ``kind``, and a decoder of a recurrence and attention."""
    torch.manual_seed(4)
    config = EncoderDecoderConfig(
        vocab_size=VOCAB, width=32, encoder=(kind, "attention"), decoder=("lstm", "attention"), num_heads=2,
        recurrent_width=24, mlp_width=48, max_context=CONTEXT, max_source=30, tie_embeddings=False,
        copies=copies,
    )  # fmt: skip
    model = EncoderDecoder(config).eval()
    _scramble(model, size)
    return model


@functools.cache
def own_bundle(target: str = "cpu") -> Path:
    """A recurrence each way in the encoder, a recurrence and attention in the decoder; token ids only."""
    return _made(own_model("gru"), target)


def bart_model(**changes: Any) -> nn.Module:
    torch.manual_seed(4)
    config = BartConfig(
        vocab_size=VOCAB, width=64, encoder_layers=1, decoder_layers=2, encoder_heads=2, decoder_heads=4,
        encoder_mlp_width=64, decoder_mlp_width=64, max_context=CONTEXT, **changes,
    )  # fmt: skip
    model = Bart(config).eval()
    _scramble(model, 0.15)
    return model


def preset_model(name: str) -> nn.Module:
    """A preset of edgellm's own, of random weights."""
    torch.manual_seed(5)
    model = EncoderDecoder(PRESETS[name]).eval()
    _scramble(model, 0.07)
    return model


# Rows of the table of engines, beside the families that go on with texts. Weights are large enough that a source read
# backwards shows (a cosine of 0.995 at most, which fp8's bound of 0.99 alone would let pass:
# ``test_quantized_graphs_equal_pytorch_with_the_same_numbers`` would not), and no larger: with 0.3 for the last row,
# rounding to codes of 8 bits in PyTorch alone leaves a cosine of 0.70, and such a model says nothing about the 16 bits
# of a graph.
SOURCE_FAMILIES: Mapping[str, Callable[[], nn.Module]] = {
    "T5": functools.partial(t5_model, size=0.07),
    "BART": bart_model,
    "Marian": functools.partial(bart_model, learned_positions=False, norm_embedding=False, scale_embedding=True),
    "Bergamot with a shortlist": functools.partial(bergamot, listed=3),
    "encoder_decoder, preset tiny": functools.partial(preset_model, "tiny"),
    "encoder_decoder, preset recurrent": functools.partial(preset_model, "recurrent"),
    "encoder of recurrences and attention": functools.partial(own_model, "gru", size=0.15),
}


@functools.cache
def t5_bundle(target: str = "cpu") -> Path:
    """Biases by distance; token ids only; sources of 24 tokens at most; every answer begins with 3, 0."""
    return _made(t5_model(), target)


@functools.cache
def bart_bundle(target: str = "cpu") -> Path:
    """Learned positions, and heads that the kernel of attention takes; token ids only."""
    return _made(bart_model(), target)


@functools.cache
def text_bundle() -> Path:
    """As the first, with a tokenizer, whose plain sources end with token 2."""
    from dataclasses import replace

    from generation_fakes import byte_level

    assets = replace(text_assets(), chat_template=None, add_eos=True)
    return _made(t5_model(byte_level().get_vocab_size()), "cpu", assets)


def _made(model: Any, target: str, text: Any = None) -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    export(model, folder / "bundle", options=ExportOptions(target=target), text=text)
    return folder / "bundle"
