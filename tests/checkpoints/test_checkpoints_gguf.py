"""GGUF files, written here as llama.cpp's converter does: the model is the one they were written from."""

import contextlib
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from edgellm.checkpoints import load_checkpoint, open_checkpoint
from edgellm.errors import CheckpointError
from edgellm.models.decoder import ARCHITECTURE, Decoder, DecoderConfig

TOKENS = torch.arange(40).reshape(2, 20)
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


def tiny(**options) -> Decoder:
    config = {
        "vocab_size": 96, "width": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
        "mlp_width": 96, "max_context": 64, "rope_theta": 500.0, "tie_embeddings": False,
        "norm_eps": 2.0**-17,  # exact in the float32 that GGUF stores
    }  # fmt: skip
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(**(config | options))).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """The converter's LlamaModel.permute."""
    split = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)


def quantized(model: Decoder, kind: str) -> dict[str, np.ndarray]:
    """Each matrix as GGUF stores it; the model is given what that stands for."""
    stored = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if kind == "F32" or values.ndim == 1:
            stored[name] = values
            continue
        quant_type = gguf.GGMLQuantizationType[kind]
        stored[name] = gguf.quants.quantize(values, quant_type)
        parameter.data = torch.from_numpy(np.array(gguf.quants.dequantize(stored[name], quant_type)))
    return stored


def write(
    path: Path, model: Decoder, *, kind: str = "F32", architecture: str = "llama", changes: dict | None = None,
    tensors: dict | None = None, edit=None,
) -> Path:  # fmt: skip
    """A GGUF file of the model; ``changes`` are metadata under the architecture's name, None leaves a key out."""
    c = model.config
    values = {
        "block_count": c.num_layers, "context_length": c.max_context, "embedding_length": c.width,
        "feed_forward_length": c.mlp_width, "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads, "attention.layer_norm_rms_epsilon": c.norm_eps,
        "rope.freq_base": c.rope_theta, "rope.dimension_count": c.head_dim, "attention.key_length": c.head_dim,
    } | (changes or {})  # fmt: skip
    writer = gguf.GGUFWriter(path, architecture)
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
    for key, value in values.items():
        if value is not None:
            adders.get(type(value), writer.add_array)(f"{architecture}.{key}", value)
    stored = {ARCHITECTURE.gguf.names(name): array for name, array in quantized(model, kind).items()}
    for name, heads in (("attn_q", c.num_heads), ("attn_k", c.num_kv_heads)):
        for key in stored if architecture == "llama" else ():
            if f".{name}." in key:
                stored[key] = permuted(stored[key], heads)
    for name, array in (stored | (tensors or {})).items():
        if array is not None:
            is_block = array.dtype == np.uint8
            writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind] if is_block else None)
    if edit is not None:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS)[0]


@pytest.mark.parametrize("kind", TYPES)
def test_logits_are_those_of_the_dequantized_weights(tmp_path, kind):
    model = tiny()
    loaded = load_checkpoint(write(tmp_path / "m.gguf", model, kind=kind))
    assert loaded.model.config == model.config
    assert torch.equal(logits(loaded.model), logits(model))
    assert loaded.source == f"GGUF {kind}, llama"
    assert loaded.tokenizer_json is None
    assert not loaded.model.training


@pytest.mark.parametrize("kind", TYPES)
def test_rows_read_alone_are_those_of_the_whole(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("edgellm.checkpoints.gguf_file._CHUNK", 128)  # so that chunks end within tensors
    path = write(tmp_path / "m.gguf", tiny(), kind=kind)
    whole, opened = load_checkpoint(path).model, open_checkpoint(path)
    for name, parameter in whole.named_parameters():  # q_proj and k_proj are stored in another order
        assert opened.weights is not None
        assert torch.equal(opened.weights.rows(name, 5, 21), parameter[5:21])
        assert torch.equal(opened.weights.read(name), parameter)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"tie_embeddings": True}),
        ("llama", {"num_kv_heads": 4}),
        ("llama", {"head_dim": 32, "num_kv_heads": 1}),
        ("llama", {"attention_bias": True}),
        ("llama", {"output_bias": True, "mlp_bias": True}),
        ("qwen2", {"attention_bias": True}),
        ("qwen2", {"attention_bias": True, "tie_embeddings": True}),
        ("qwen3", {"qk_norm": True}),
        ("qwen3", {"qk_norm": True, "head_dim": 32, "tie_embeddings": True}),
    ],
)
def test_shapes_and_architectures(tmp_path, architecture, options):
    model = tiny(**options)
    loaded = load_checkpoint(write(tmp_path / "m.gguf", model, kind="Q8_0", architecture=architecture))
    assert loaded.model.config == model.config
    assert torch.equal(logits(loaded.model), logits(model))


def test_dtype_is_what_was_asked_for(tmp_path):
    loaded = load_checkpoint(write(tmp_path / "m.gguf", tiny()), dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_the_model_outlives_its_file(tmp_path):
    model = tiny()
    path = write(tmp_path / "m.gguf", model)
    loaded = load_checkpoint(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(logits(loaded.model), logits(model))


@pytest.mark.parametrize(
    "changes",
    [
        {"attention.key_length": None, "rope.dimension_count": None},
        {"attention.value_length": 16, "vocab_size": 96},
        {"rope.scaling.type": "none", "rope.scaling.factor": 8.0},
        {"rope.scaling.factor": 1.0, "expert_count": 0, "expert_used_count": 0},
    ],
)
def test_what_changes_nothing_is_accepted(tmp_path, changes):
    model = tiny()
    assert torch.equal(logits(load_checkpoint(write(tmp_path / "m.gguf", model, changes=changes)).model), logits(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'"),
        ({"rope.scaling.factor": 4.0}, "rope.scaling.factor is 4.0"),
        ({"rope.dimension_count": 8}, "rope.dimension_count is 8"),
        ({"attention.value_length": 8}, "attention.value_length is 8"),
        ({"attention.sliding_window": 32}, "attention.sliding_window is 32"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"expert_count": 8}, "expert_count is 8"),
        ({"logit_scale": 0.5}, "logit_scale is 0.5"),
        ({"attention.head_count": [4, 2]}, r"attention.head_count is \[4, 2\]"),
        ({"attention.head_count": 0}, "attention.head_count is 0"),
        ({"block_count": None}, "block_count is None"),
        ({"block_count": 2**31}, "block_count is 2147483648; .* at most 1024"),
        ({"context_length": 2**31}, "context_length is 2147483648"),
        ({"attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is None"),
        ({"rope.freq_base": float("inf")}, "rope.freq_base is inf"),
        ({"block_count": 3}, "blk.2.* are missing"),
        ({"block_count": 1}, "tensors blk.1.* have no place"),
        ({"feed_forward_length": 64}, r"ffn_gate.weight has shape \(96, 64\), its configuration says \(64, 64\)"),
    ],
)
def test_what_cannot_be_represented_is_refused(tmp_path, changes, message):
    path = write(tmp_path / "m.gguf", tiny(), changes=changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"rope_freqs.weight": np.ones(7, np.float32)}, "rope_factors has 7 numbers; 16 features"),
        ({"rope_freqs.weight": np.zeros(8, np.float32)}, "rope_factors has 0.0"),
        ({"rope_freqs.weight": np.ones((8, 8), np.float32)}, r"rope_freqs.weight has shape \(8, 8\)"),
        ({"blk.1.attn_output.bias": np.ones(64, np.float32)}, "tensors blk.1.attn_output.bias have no place"),
        ({"token_embd.weight": None}, "token_embd.weight is missing"),
        ({"output_norm.weight": None}, "output_norm.weight of shape .* is missing"),
        ({"output_norm.weight": np.full(64, np.nan, np.float32)}, "output_norm.weight is not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, tensors, message):
    path = write(tmp_path / "m.gguf", tiny(), tensors=tensors)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_factors_of_the_rotary_frequencies_are_read(tmp_path):
    """As the converter writes them for scaled positions; each frequency is divided by its own."""
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    model = tiny(rope_factors=factors.tolist())
    path = write(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": factors})
    loaded = load_checkpoint(path)
    assert loaded.model.config == model.config
    assert torch.equal(logits(loaded.model), logits(model))
    assert (logits(loaded.model) - logits(tiny())).abs().max() > 1e-3


def test_norms_of_queries_and_keys_must_be_where_they_are_used_and_nowhere_else(tmp_path):
    with pytest.raises(CheckpointError, match=r"attn_k_norm.weight of shape .* is missing"):
        load_checkpoint(
            write(tmp_path / "a.gguf", tiny(qk_norm=True), architecture="qwen3",
                  tensors={"blk.1.attn_k_norm.weight": None})
        )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"attn_\w_norm.weight.* have no place"):
        load_checkpoint(write(tmp_path / "b.gguf", tiny(qk_norm=True)))


def test_an_unknown_architecture_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="unknown architecture 'mambo'; edgellm loads gemma2, lfm2, llama"):
        load_checkpoint(write(tmp_path / "m.gguf", tiny(), architecture="mambo"))


def test_the_other_byte_order_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="other byte order"):
        load_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("kept", [0, 3, 4, 20, 24, 40, 100, 400, 700, 2_000, 20_000, -1])
def test_a_file_cut_short_is_refused(tmp_path, kept):
    path = write(tmp_path / "m.gguf", tiny())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="is not a whole GGUF file"):
        load_checkpoint(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(CheckpointError, match="is not a whole GGUF file"):
        load_checkpoint(tmp_path / "m.gguf")


def test_flipped_bytes_in_the_header_raise_nothing_else(tmp_path):
    """Every error is ours, whatever byte of the header is wrong, huge counts included."""
    path = write(tmp_path / "m.gguf", tiny(num_layers=1))
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.permutation(2_000)[:150]:
        damaged = bytearray(good)
        damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):  # some bytes, such as a name's, do no harm
            load_checkpoint(path)
