"""GGUF files of every family, in parts and in every type: written as llama.cpp's converter does, from transformers."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from test_checkpoints_gguf import TOKENS as TINY_TOKENS
from test_checkpoints_gguf import tiny, write
from test_families_huggingface import CONTEXT, GEMMA2, LFM2, MAMBA, MAMBA2, VOCAB, scrambled

from edgellm.checkpoints import load_checkpoint, open_checkpoint
from edgellm.checkpoints.gguf_file import GGUFSource
from edgellm.errors import CheckpointError

TOKENS = torch.arange(40).reshape(2, 20) % VOCAB
ARCHITECTURES = {"Gemma2": "gemma2", "Lfm2": "lfm2", "Mamba2": "mamba2", "Mamba": "mamba"}


def attention(c) -> dict:
    return {
        "context_length": CONTEXT, "embedding_length": c.hidden_size, "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size, "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
    }  # fmt: skip


def space(c) -> dict:
    return {
        "context_length": 2**20, "embedding_length": c.hidden_size, "block_count": c.num_hidden_layers,
        "feed_forward_length": 0, "attention.head_count": 0, "ssm.conv_kernel": c.conv_kernel,
        "ssm.state_size": c.state_size, "attention.layer_norm_rms_epsilon": c.layer_norm_epsilon,
    }  # fmt: skip


def metadata(name: str, c) -> dict:
    """What the converter writes of a configuration."""
    if name == "Gemma2":
        return attention(c) | {
            "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "attention.key_length": c.head_dim,
            "attention.value_length": c.head_dim, "attn_logit_softcapping": c.attn_logit_softcapping,
            "final_logit_softcapping": c.final_logit_softcapping, "attention.sliding_window": c.sliding_window,
        }  # fmt: skip
    if name == "Lfm2":
        heads = [c.num_key_value_heads if kind != "conv" else 0 for kind in c.layer_types]
        width = 8 * math.ceil(int(2 * c.intermediate_size / 3) / 8)
        return attention(c) | {
            "attention.layer_norm_rms_epsilon": c.norm_eps, "attention.head_count_kv": heads,
            "feed_forward_length": width, "vocab_size": VOCAB, "shortconv.l_cache": c.conv_L_cache,
            "rope.freq_base": float(c.rope_parameters["rope_theta"]),
        }  # fmt: skip
    if name == "Mamba2":
        heads = c.num_heads
        return space(c) | {
            "ssm.inner_size": heads * c.head_dim, "ssm.time_step_rank": heads, "ssm.group_count": c.n_groups
        }  # fmt: skip
    return space(c) | {"ssm.inner_size": c.intermediate_size, "ssm.time_step_rank": int(c.time_step_rank)}


def converted(name: str, model) -> dict[str, np.ndarray]:
    """Its tensors by the names and in the shapes that the converter gives them."""
    names = gguf.get_tensor_name_map(
        next(kind for kind, said in gguf.MODEL_ARCH_NAMES.items() if said == ARCHITECTURES[name]),
        model.config.num_hidden_layers,
    )
    tied, found = model.config.tie_word_embeddings, {}
    for own, tensor in model.state_dict().items():
        if own == "lm_head.weight" and tied:
            continue
        value = tensor.float()
        key = own.replace(".dt_bias", ".dt_proj.bias") if name == "Mamba2" else own
        if name == "Gemma2" and own.endswith("norm.weight"):
            value = value + 1
        if own.endswith(("conv1d.weight", "conv.conv.weight")):
            value = value.squeeze(1)
        if own.endswith("A_log"):
            value = -value.exp()
        if name == "Mamba2" and own.endswith(("A_log", ".D")):
            value = value[:, None]
        if name == "Mamba2" and own.endswith("mixer.norm.weight"):
            value = value.reshape(model.config.n_groups, -1)
        found[names.get_name(key, (".weight", ".bias"))] = value.numpy()
    return found


def save(path: Path, architecture: str, values: dict, tensors: dict[str, np.ndarray], **options) -> None:
    writer = gguf.GGUFWriter(path, architecture, **options)
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
    for key, value in values.items():
        adders.get(type(value), writer.add_array)(f"{architecture}.{key}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Gemma2", GEMMA2 | {"query_pre_attn_scalar": 10}),
        ("Gemma2", GEMMA2 | {"query_pre_attn_scalar": 10, "sliding_window": 3, "num_key_value_heads": 6}),
        ("Lfm2", LFM2),
        ("Lfm2", LFM2 | {"conv_bias": True, "conv_L_cache": 4, "tie_word_embeddings": False}),
        ("Mamba2", MAMBA2),
        ("Mamba2", MAMBA2 | {"n_groups": 4, "use_bias": True, "use_conv_bias": False, "conv_kernel": 2}),
        ("Mamba", MAMBA),
        ("Mamba", MAMBA | {"time_step_rank": 5, "use_conv_bias": False, "tie_word_embeddings": False}),
    ],
)
def test_a_familys_gguf_file_has_the_logits_of_transformers(tmp_path, name, options):
    model = scrambled(name, options)
    save(tmp_path / "m.gguf", ARCHITECTURES[name], metadata(name, model.config), converted(name, model))
    loaded = load_checkpoint(tmp_path / "m.gguf")
    with torch.inference_mode():
        expected, found = model(TOKENS).logits, loaded.model(TOKENS)[0]
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert loaded.source == f"GGUF F32, {ARCHITECTURES[name]}"


def test_the_largest_gemma_divides_scores_by_its_widths_share_of_a_head(tmp_path):
    from edgellm.models.gemma2_files import GGUF_FILES

    c = {"block_count": 46, "context_length": 8192, "embedding_length": 4608, "feed_forward_length": 36864,
         "attention.head_count": 32, "attention.head_count_kv": 16, "attention.key_length": 128,
         "attention.layer_norm_rms_epsilon": 1e-6}  # fmt: skip
    values = {f"gemma2.{key}": value for key, value in c.items()} | {"general.architecture": "gemma2"}
    fields = GGUF_FILES.read(values, {"token_embd.weight": (256000, 4608)}, lambda name: ())
    assert fields["score_divisor"] == 144 and fields["windows"] == (4096, 0) * 23
    fields = GGUF_FILES.read(
        values | {"gemma2.block_count": 42}, {"token_embd.weight": (256000, 4608)}, lambda name: ()
    )
    assert fields["score_divisor"] == 128


def test_a_tensor_in_another_shape_is_refused_unless_it_holds_as_many_numbers(tmp_path):
    model = scrambled("Mamba2", MAMBA2)
    tensors = converted("Mamba2", model)
    tensors["blk.1.ssm_norm.weight"] = tensors["blk.1.ssm_norm.weight"][:, :5]
    save(tmp_path / "m.gguf", "mamba2", metadata("Mamba2", model.config), tensors)
    with pytest.raises(CheckpointError, match=r"tensor blk\.1\.ssm_norm\.weight has shape \(1, 5\)"):
        open_checkpoint(tmp_path / "m.gguf")


READ = sorted(kind.name for kind in gguf.quants._type_traits)


@pytest.mark.parametrize("kind", READ)
def test_every_type_that_gguf_dequantizes_is_read_whole_and_by_rows(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("edgellm.checkpoints.gguf_file._CHUNK", 512)
    quant_type = gguf.GGMLQuantizationType[kind]
    length, size = gguf.GGML_QUANT_SIZES[quant_type]
    random = np.random.default_rng(0)
    drawn = random.integers(0, 256, (4096, size), dtype=np.uint8)  # some are no numbers in some types
    with np.errstate(all="ignore"):
        wide = gguf.quants.dequantize(drawn, quant_type).reshape(len(drawn), -1)
    sound = drawn[(np.abs(np.nan_to_num(wide, nan=np.inf)).max(-1) < 1e4)][:32]
    assert len(sound) == 32
    stored = sound.reshape(8, -1)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", stored, raw_dtype=quant_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GGUFSource(tmp_path / "m.gguf")
    expected = torch.from_numpy(np.array(gguf.quants.dequantize(stored, quant_type)).reshape(8, 4 * length))
    assert torch.equal(source.read("w"), expected) and source.quantization == kind
    assert torch.equal(source.read("w", (3, 6)), expected[3:6])


def test_double_precision_is_read_as_single(tmp_path):
    numbers = np.random.default_rng(0).normal(size=(4, 8))
    save(tmp_path / "m.gguf", "llama", {}, {"w": numbers})
    source = GGUFSource(tmp_path / "m.gguf")
    assert torch.equal(source.read("w"), torch.from_numpy(numbers).float()) and source.quantization == "F64"


def test_tensors_of_several_types_are_read_each_by_its_own(tmp_path):
    model, random = tiny(), np.random.default_rng(1)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            kind = gguf.GGMLQuantizationType[random.choice(["Q8_0", "Q4_1", "F16", "BF16", "Q5_0"])]
            stored = gguf.quants.quantize(parameter.detach().numpy(), kind)
            parameter.data = torch.from_numpy(np.array(gguf.quants.dequantize(stored, kind), dtype=np.float32))
    found = load_checkpoint(write(tmp_path / "m.gguf", model)).model
    with torch.inference_mode():
        assert torch.equal(found(TINY_TOKENS)[0], model(TINY_TOKENS)[0])


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    """A small Mamba in three parts, and the same whole."""
    model = scrambled("Mamba", MAMBA)
    values, tensors = metadata("Mamba", model.config), converted("Mamba", model)
    save(tmp_path / "whole.gguf", "mamba", values, tensors)
    save(tmp_path / "small.gguf", "mamba", values, tensors, split_max_tensors=math.ceil(len(tensors) / 3))
    found = sorted(tmp_path.glob("small-*.gguf"))
    assert len(found) == 3
    return found


def test_a_file_in_parts_is_the_whole_file_whichever_part_is_named(parts):
    whole = load_checkpoint(parts[0].with_name("whole.gguf"))
    for part in parts:
        found = load_checkpoint(part)
        assert found.model.config == whole.model.config and found.source == whole.source
        for (name, a), (_, b) in zip(found.model.named_parameters(), whole.model.named_parameters(), strict=True):
            assert torch.equal(a, b), name


def test_a_missing_strange_or_cut_part_is_told_by_name(parts):
    away = parts[1].rename(parts[1].with_suffix(".away"))
    with pytest.raises(CheckpointError, match=r"small-00002-of-00003\.gguf of its 3 parts not beside it"):
        open_checkpoint(parts[0])
    shutil.copy(parts[2], parts[1])
    with pytest.raises(CheckpointError, match=r"small-00002-of-00003\.gguf is part 2 and not 1"):
        open_checkpoint(parts[0])
    parts[1].write_bytes(away.read_bytes()[:-4096])
    with pytest.raises(CheckpointError, match=r"small-00002-of-00003\.gguf"):
        load_checkpoint(parts[0])
    with pytest.raises(CheckpointError, match="give them their names back"):
        open_checkpoint(Path(shutil.move(parts[0], parts[0].with_name("m.gguf"))))
