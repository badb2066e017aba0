"""Tiny checkpoints spoiled at random, and read as an export reads them.

Kinds: edgellm's own folder, a Hugging Face folder with a LoRA adapter, one that ``torch.save`` wrote, and GGUF files in
float and in blocks. What a file's header counts, sizes and places is what is mostly changed.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzzing_files import Spoiler, as_json, changed_bytes, changed_json

WHOLE_NUMBERS = [0, 1, 2, 3, 7, 31, 64, 255, 65_536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of GGUF's scalars, by type id
_STRING, _ARRAY = 8, 9


def gguf_fields(data: bytes) -> list[tuple[int, str]]:
    """Where a GGUF header has whole numbers that say how to read on, and their form for struct."""
    found: list[tuple[int, str]] = [(4, "<I"), (8, "<Q"), (16, "<Q")]
    tensors, pairs = struct.unpack_from("<QQ", data, 8)
    at = 24

    def number(form: str) -> int:
        nonlocal at
        found.append((at, form))
        (value,) = struct.unpack_from(form, data, at)
        at += struct.calcsize(form)
        return int(value)

    def text() -> None:
        nonlocal at
        length = number("<Q")
        at += length

    for _ in range(pairs):
        text()
        kind, count = number("<I"), 1
        if kind == _ARRAY:
            kind, count = number("<I"), number("<Q")
        for _ in range(count if kind == _STRING else 0):
            text()
        if kind in _SIZES:
            if count == 1 and _SIZES[kind] >= 4:
                found.append((at, "<Q" if _SIZES[kind] == 8 else "<I"))
            at += _SIZES[kind] * count
    for _ in range(tensors):
        text()
        for _ in range(number("<I")):
            number("<Q")
        number("<I")  # type
        number("<Q")  # offset
    return found


def as_gguf(draw: random.Random, data: bytes) -> bytes:
    """A count, length, type, size or offset becomes another."""
    made, fields = bytearray(data), gguf_fields(data)
    for _ in range(draw.choice([1, 1, 2])):
        at, form = draw.choice(fields)
        (old,) = struct.unpack_from(form, made, at)
        new = draw.choice([*WHOLE_NUMBERS, old + 1, old - 1, old * 2, old ^ 1 << draw.randrange(64)])
        struct.pack_into(form, made, at, new % (1 << 8 * struct.calcsize(form)))
    return bytes(made)


def as_safetensors(draw: random.Random, data: bytes) -> bytes:
    """The header's length, or its shapes, dtypes and offsets, become others."""
    (length,) = struct.unpack_from("<Q", data)
    if draw.random() < 0.2:
        return struct.pack("<Q", draw.choice([*WHOLE_NUMBERS, length + 1, length - 1, len(data)])) + data[8:]
    header = json.loads(data[8 : 8 + length])
    for _ in range(draw.choice([1, 1, 3])):
        header = changed_json(draw, header)
    made = json.dumps(header).encode()
    return struct.pack("<Q", len(made) if draw.random() < 0.95 else length) + made + data[8 + length :]


SPOILERS: dict[str, list[Spoiler]] = {
    "model.gguf": [as_gguf, as_gguf, as_gguf, changed_bytes],
    "model.safetensors": [as_safetensors, as_safetensors, changed_bytes],
    "pytorch_model.bin": [changed_bytes],
    "config.json": [as_json, as_json, as_json, changed_bytes],
    "edgellm.json": [as_json, as_json, as_json, changed_bytes],
    "generation_config.json": [as_json],
    "tokenizer_config.json": [as_json, changed_bytes],
    "tokenizer.json": [as_json, changed_bytes],
    "adapter/adapter_config.json": [as_json, as_json, changed_bytes],
    "adapter/adapter_model.safetensors": [as_safetensors, as_safetensors, changed_bytes],
}


def use_checkpoint(folder: Path, step: Callable[[Callable[[], Any]], Any]) -> None:
    """Open a checkpoint, merge the adapter that lies in it, read every weight, and take one step."""
    import torch

    from edgellm.checkpoints import adapted, open_checkpoint
    from edgellm.checkpoints.assemble import fill

    gguf = folder / "model.gguf"
    opened = step(lambda: open_checkpoint(gguf if gguf.is_file() else folder))
    if opened is None:
        return
    for found in (opened, step(lambda: adapted(opened, folder / "adapter")) if (folder / "adapter").is_dir() else None):
        model = None if found is None else step(lambda found=found: fill(found.model, found.weights))
        if model is not None:
            with torch.inference_mode():
                tokens = torch.tensor([[0, 1, 2], [2, 1, 0]]) % model.config.vocab_size
                step(lambda model=model, tokens=tokens: model(tokens))


def make_checkpoints(folder: Path) -> None:
    """The checkpoints that are spoiled, each a folder of its own."""
    import torch
    from generation_fakes import byte_level
    from safetensors.torch import save_file
    from tiny_bundles import attention_model, recurrent_model, text_assets

    from edgellm.checkpoints import save_checkpoint
    from edgellm.models.decoder import ARCHITECTURE

    model = attention_model()
    save_checkpoint(
        folder / "checkpoint-own", model, architecture="decoder", tokenizer_json=text_assets().tokenizer_json,
        eos_token_ids=(2, 0), generation={"temperature": 0.5},
    )  # fmt: skip
    save_checkpoint(folder / "checkpoint-hybrid", recurrent_model(), architecture="hybrid", tokenizer_json=None)
    reader = ARCHITECTURE.huggingface
    assert reader is not None
    tensors = {reader.names(name): tensor.detach() for name, tensor in model.named_parameters()}
    for name in ("checkpoint-foreign", "checkpoint-torch"):
        _write_foreign(folder / name, model.config, byte_level().to_str())
    save_file(tensors, folder / "checkpoint-foreign/model.safetensors")
    torch.save(tensors, folder / "checkpoint-torch/pytorch_model.bin")
    _write_adapter(folder / "checkpoint-foreign/adapter", tensors)
    for kind in ("F32", "Q8_0"):
        (folder / f"checkpoint-gguf-{kind}").mkdir()
        _write_gguf(folder / f"checkpoint-gguf-{kind}" / "model.gguf", model, kind)


def _write_foreign(folder: Path, c: Any, tokenizer: str) -> None:
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": c.vocab_size,
        "hidden_size": c.width, "intermediate_size": c.mlp_width, "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim,
        "max_position_embeddings": c.max_context, "rms_norm_eps": 1e-5, "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tie_embeddings, "bos_token_id": 1, "eos_token_id": [2, 0], "hidden_act": "silu",
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32},
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "top_k": 5, "eos_token_id": [2]}))
    settings = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(tokenizer)


def _write_adapter(folder: Path, tensors: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    made = {}
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "up_proj.weight")):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            made[f"{module}.lora_A.weight"] = torch.ones(2, tensor.shape[1])
            made[f"{module}.lora_B.weight"] = torch.ones(tensor.shape[0], 2)
    save_file(made, folder / "adapter_model.safetensors")


def _write_gguf(path: Path, model: Any, kind: str) -> None:
    import gguf

    from edgellm.models.decoder import ARCHITECTURE

    c, reader = model.config, ARCHITECTURE.gguf
    assert reader is not None
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (
        ("block_count", c.num_layers), ("context_length", c.max_context), ("embedding_length", c.width),
        ("feed_forward_length", c.mlp_width), ("attention.head_count", c.num_heads),
        ("attention.head_count_kv", c.num_kv_heads), ("attention.key_length", c.head_dim),
    ):  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    _write_gguf_text(writer, c.vocab_size)
    for name, parameter in model.named_parameters():
        numbers, stored = parameter.detach().numpy(), gguf.GGMLQuantizationType[kind]
        if numbers.ndim > 1 and kind != "F32":
            writer.add_tensor(reader.names(name), gguf.quants.quantize(numbers, stored), raw_dtype=stored)
        else:
            writer.add_tensor(reader.names(name), numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_gguf_text(writer: Any, vocab_size: int) -> None:
    from generation_fakes import TEMPLATE, byte_level

    library = byte_level()
    merges = json.loads(library.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([library.id_to_token(token) for token in range(vocab_size)])
    writer.add_token_types([3 if token < 3 else 1 for token in range(vocab_size)])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
