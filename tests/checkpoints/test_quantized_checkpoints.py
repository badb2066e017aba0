"""Checkpoints that others quantized read as the floats that they stand for, and keep their codes where kernels do."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
import quantized_files as files
import torch
from quantized_rows import EVERY, GPTQ, scheme
from safetensors.torch import load_file, save_file

from edgellm.checkpoints import load_checkpoint, open_checkpoint
from edgellm.checkpoints.quantized.find import dequantized
from edgellm.cli.export import export_checkpoint
from edgellm.codes import CodeFormat
from edgellm.errors import CheckpointError
from edgellm.models.decoder import ARCHITECTURE, Decoder, DecoderConfig
from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.passes.merge_linears import parts_of
from edgellm_exporters.quantize.stored import kept
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.loading import open_session

TOKENS = torch.arange(24).reshape(2, 12)
WIDTH, MLP = 128, 256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama in float."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=96, width=WIDTH, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=MLP,
        max_context=64, tie_embeddings=False,
    )  # fmt: skip
    names = ARCHITECTURE.huggingface.names
    path = tmp_path / "model"
    path.mkdir()
    tensors = {names(name): tensor.clone() for name, tensor in Decoder(config).state_dict().items()}
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(
        json.dumps({
            "model_type": "llama", "vocab_size": 96, "hidden_size": WIDTH, "intermediate_size": MLP,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        })
    )  # fmt: skip
    return path


@pytest.mark.parametrize("kind", EVERY)
def test_a_quantized_checkpoint_is_the_floats_that_its_layout_stands_for(folder, tmp_path, kind):
    pack, settings = EVERY[kind]
    files.write(
        folder, tmp_path / "plain", pack, settings, key="quantization" if "MLX" in kind else "quantization_config"
    )
    loaded, plain = load_checkpoint(folder), load_checkpoint(tmp_path / "plain")
    for (name, found), (_, expected) in zip(
        loaded.model.named_parameters(), plain.model.named_parameters(), strict=True
    ):
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9), name
    with torch.inference_mode():
        assert torch.allclose(loaded.model(TOKENS)[0], plain.model(TOKENS)[0], atol=1e-5)
    method = loaded.source.removeprefix("Hugging Face ").removesuffix(", llama")
    assert loaded.notes == (f"7 matrices are stored as {method}, and read as the floats that this stands for",)


@pytest.mark.parametrize("kind", EVERY)
def test_rows_are_those_of_the_whole_weight_and_codes_stand_for_it(folder, tmp_path, kind):
    pack, settings = EVERY[kind]
    files.write(
        folder, tmp_path / "plain", pack, settings, key="quantization" if "MLX" in kind else "quantization_config"
    )
    weights = open_checkpoint(folder).weights
    name = "layers.0.mlp.down_proj.weight"
    whole = weights.read(name)
    assert torch.equal(weights.rows(name, 33, 70), whole[33:70])
    form = weights.code_format(name)
    assert (form is None) == any(word in kind for word in ("floats", "fp8", "NF4", "MLX"))
    if form is not None:
        codes = weights.codes(name)
        assert codes.format == form and codes.codes.max() < 2**form.bits
        assert torch.equal(torch.from_numpy(codes.dequantize()), whole)
        assert form.ordered is ("act-order" not in kind)
        assert form.symmetric is bool((codes.zeros == 2 ** (form.bits - 1)).all())


KEPT = {  # what kernels hold each in
    "gptq": "4-bit block 32", "gptq, asymmetric": "4-bit block 32 asymmetric", "gptq, groups of 128": "4-bit block 128",
    "gptq, a row": "4-bit block 128 asymmetric", "gptq, 8 bits": "8-bit block 64 asymmetric",
    "gptq, 3 bits": "4-bit block 32 asymmetric", "gptq, 2 bits, groups of 16": "4-bit block 16",
    "gptq, second format": "4-bit block 32 asymmetric", "auto-round": "4-bit block 32",
    "awq": "4-bit block 32 asymmetric", "compressed-tensors": "4-bit block 32",
    "compressed-tensors, asymmetric, groups of 64": "4-bit block 64 asymmetric",
    "compressed-tensors, 8 bits, rows": "8-bit block 128",
    "compressed-tensors, 8 bits, asymmetric": "8-bit block 128 asymmetric",
    "compressed-tensors, whole numbers": "8-bit block 128", "bitsandbytes, 8 bits": "8-bit block 128",
}  # fmt: skip


@pytest.mark.parametrize("kind", KEPT)
def test_kept_codes_are_the_checkpoints_own_in_a_format_of_kernels(folder, tmp_path, kind):
    pack, settings = EVERY[kind]
    files.write(folder, tmp_path / "plain", pack, settings)
    weights = open_checkpoint(folder).weights
    graph = {
        "layers.0.attention.q_proj+k_proj+v_proj.weight": (256, WIDTH),
        "layers.0.mlp.down_proj.weight": (WIDTH, MLP),
        "embedding.weight": (96, WIDTH),
    }
    found = kept(weights, graph, {"embedding.weight"}, set(graph))
    row = kind in ("gptq, a row", "compressed-tensors, 8 bits, rows", "compressed-tensors, whole numbers",
                   "bitsandbytes, 8 bits")  # fmt: skip
    wider = KEPT[kind].replace("128", "256") if row else KEPT[kind]
    for name, wanted in zip(list(graph)[:2], (KEPT[kind], wider), strict=True):
        assert str(found.schemes[name]) == wanted
        for part in parts_of(name):
            stored, codes = weights.codes(part), found.codes[part]
            moved = codes.codes.astype(int) - stored.codes
            assert moved.min() == moved.max()  # by one number for all, where a format has more bits
            np.testing.assert_allclose(codes.dequantize(), weights.read(part).numpy(), rtol=2**-10, atol=1e-7)
    assert set(found.schemes) == set(list(graph)[:2]) and not found.left


def put_embedding_on_a_grid(folder: Path) -> str:
    """Give the embedding numbers that 8 bits hold as they are; its name."""
    tensors, name = load_file(folder / "model.safetensors"), "model.embed_tokens.weight"
    whole = torch.randint(-127, 128, tensors[name].shape)
    whole[:, ::32] = 127
    save_file(tensors | {name: whole / 128}, folder / "model.safetensors")
    return name


@pytest.mark.parametrize("target", ["cpu", "onnx"])
@pytest.mark.parametrize("kind", ["gptq, act-order", "awq", "compressed-tensors, 8 bits, asymmetric", "gptq, 3 bits"])
def test_a_bundle_that_keeps_codes_computes_what_the_floats_compute(folder, tmp_path, kind, target):
    held = put_embedding_on_a_grid(folder)  # rows of act-order's groups cannot be looked up
    which = (lambda name: name != held) if "act-order" in kind else lambda name: True  # the tables outside as well
    files.write(folder, tmp_path / "plain", *EVERY[kind], which=which)
    said = export_checkpoint(folder, tmp_path / "kept", target=target, quantize="keep", tell=lambda *_: None)
    count = 8 if "act-order" in kind else 9
    assert f"{count} matrices keep the checkpoint's own codes" in said["notes"]
    with torch.inference_mode():
        expected = load_checkpoint(tmp_path / "plain").model(TOKENS)[0].numpy()
    bundle = Bundle(tmp_path / "kept")
    assert bundle.manifest.quantization["kept"] == count and "left" not in bundle.manifest.quantization
    session = open_session(bundle)
    found = session.step(TOKENS.numpy(), session.new_state(2, 32), logits="all")
    most = {"cpu": 0.05, "onnx": 1e-5}[target]  # on cpu kernels round what they read
    assert np.abs(found - expected).max() <= most * np.abs(expected).max()


def test_the_codes_in_a_bundles_file_are_those_in_the_checkpoints(folder, tmp_path):
    pack, settings = EVERY["gptq, asymmetric"]
    files.write(folder, tmp_path / "plain", pack, settings)
    export_checkpoint(folder, tmp_path / "kept", target="cpu", quantize="keep", tell=lambda *_: None)
    weights, graph = open_checkpoint(folder).weights, onnx.load(tmp_path / "kept" / "model.onnx")
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    (node,) = (n for n in graph.graph.node if n.op_type == "MatMulNBits" and "down_proj" in n.input[1])
    packed, scales, zeros = (stored.get(name) for name in node.input[1:4])
    own = weights.codes("layers.0.mlp.down_proj.weight")
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(own.codes.shape)
    assert (nibbles == own.codes).all()
    assert (np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(own.zeros.shape) == own.zeros).all()
    if scales is None:  # widened when the graph is loaded
        cast = next(n for n in graph.graph.node if node.input[2] in n.output)
        scales = stored[cast.input[0]]
    assert (scales == own.scales).all()


def test_groups_in_an_order_of_their_own_are_gathered_before_the_product(folder, tmp_path):
    files.write(folder, tmp_path / "plain", *EVERY["gptq, act-order"])
    export_checkpoint(folder, tmp_path / "kept", target="cpu", quantize="keep", tell=lambda *_: None)
    graph = onnx.load(tmp_path / "kept" / "model.onnx").graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    (node,) = (n for n in graph.node if n.op_type == "MatMulNBits" and "down_proj" in n.input[1])
    (gather,) = (n for n in graph.node if node.input[0] in n.output)
    own, order = open_checkpoint(folder).weights.codes("layers.0.mlp.down_proj.weight"), stored[gather.input[1]]
    assert gather.op_type == "Gather" and (np.sort(order) == np.arange(MLP)).all()
    assert (own.format.groups[order] == np.arange(MLP) // 32).all()
    packed = stored[node.input[1]]
    assert (np.stack([packed & 15, packed >> 4], axis=-1).reshape(own.codes.shape) == own.codes[:, order]).all()


def test_weights_of_one_input_with_groups_of_different_columns_do_not_keep_their_codes(folder, tmp_path):
    shuffled = partial(files.gptq, symmetric=False, shuffled=True, alike=False)
    files.write(folder, tmp_path / "plain", shuffled, GPTQ | {"desc_act": True})
    said = export_checkpoint(folder, tmp_path / "kept", target="cpu", quantize="keep", tell=lambda *_: None)
    assert "2 matrices keep the checkpoint's own codes" in said["notes"]
    assert any(note.endswith("have groups (g_idx) of different columns") for note in said["notes"])


def test_groups_of_unequal_sizes_have_no_order(folder, tmp_path):
    weights = FakeCoded(CodeFormat(4, 32, True, np.array([0] * 40 + [1] * 24)))
    found = kept(weights, {"w": (8, 64)}, set(), {"w"})
    assert not found.schemes and found.left == {"w": "its groups (g_idx) are of unequal sizes"}
    looked_up = kept(FakeCoded(CodeFormat(4, 32, True, np.arange(64) % 2)), {"w": (8, 64)}, {"w"}, set())
    assert looked_up.left == {"w": "its groups are no neighbours, and rows are looked up"}


class FakeCoded:
    def __init__(self, form: CodeFormat) -> None:
        self._form = form

    def code_format(self, name: str) -> CodeFormat:
        return self._form

    def codes(self, name: str):
        raise AssertionError


def test_a_group_of_eight_is_refused_and_one_of_several_weights_told_of(folder, tmp_path):
    files.write(folder, tmp_path / "plain", partial(files.gptq, group=8), GPTQ | {"group_size": 8})
    with pytest.raises(QuantizeError, match="groups of 8 in rows of 128, and kernels hold multiples of 16"):
        export_checkpoint(folder, tmp_path / "kept", target="cpu", quantize="keep", tell=lambda *_: None)


@pytest.mark.parametrize(("file", "kind"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_settings_of_older_tools_stand_in_a_file_of_their_own(folder, tmp_path, file, kind):
    pack, settings = EVERY[kind]
    files.write(folder, tmp_path / "plain", pack, settings)
    config = json.loads((folder / "config.json").read_text())
    own = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    names = {"group_size": "q_group_size", "bits": "w_bit"} if kind == "awq" else {}
    own = {names.get(name, name): value for name, value in own.items() if name != "quant_method"}
    (folder / file).write_text(json.dumps(own))
    with torch.inference_mode():
        found, plain = (load_checkpoint(path).model(TOKENS)[0] for path in (folder, tmp_path / "plain"))
    assert torch.allclose(found, plain, atol=1e-5)


def test_matrices_that_cannot_be_kept_beside_others_are_told_of(folder, tmp_path):
    files.write(folder, tmp_path / "plain", files.gptq, GPTQ, which=lambda name: "mlp" in name or "q_proj" in name)
    said = export_checkpoint(folder, tmp_path / "kept", target="cpu", quantize="keep", tell=lambda *_: None)
    assert "3 matrices keep the checkpoint's own codes" in said["notes"]
    assert any(note.endswith("do not keep their codes: a part of it is stored as floats") for note in said["notes"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "hqq"}, r"quant_method 'hqq'; edgellm reads gptq, awq"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:llm"}, "with packing_format 'auto_round:llm'"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'; edgellm reads 'gptq', 'gptq_v2'"),
        (GPTQ | {"bits": 5}, "bits 5; edgellm reads 4, 2, 3, 8"),
        (GPTQ | {"rotation": "hadamard"}, "rotation 'hadamard'"),
        (GPTQ | {"colour": "red"}, "colour 'red', a setting that edgellm does not know"),
        (["gptq"], "which says nothing"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "awq", "bits": 4, "zero_point": False}, "zero_point False"),
        (scheme(num_bits=4) | {"transform_config": {"R1": {}}}, "transform_config"),
        (scheme(num_bits=4) | {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "say nothing of weights"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "which are not rows and columns"),
        ({"group_size": 64, "bits": 4, "mode": "nvfp4"}, "mode 'nvfp4'"),
        (GPTQ | {"colour": None, "lm_head": False}, "but no tensor is stored so"),
    ],
)
def test_a_method_or_setting_that_is_not_known_is_refused_by_name(folder, settings, said):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("kind", "spoil", "said"),
    [
        ("gptq", lambda t: t.pop("scales"), r"self_attn\.\w+\.scales is missing"),
        ("gptq", lambda t: t.update(scales=t["scales"][:1]), "do not make a weight of 4 bits"),
        ("gptq", lambda t: t.update(g_idx=t["g_idx"] + 9), "names a group outside the 4 there are"),
        ("awq", lambda t: t.update(qzeros=t["qzeros"][:, :1]), "do not make a weight of 4 bits"),
        ("compressed-tensors", lambda t: t.update(weight_shape=torch.tensor([7, 128])), r"a shape of \(7, 128\)"),
        ("compressed-tensors, whole numbers", lambda t: t.update(weight_scale=t["weight_scale"][:5]), "but its scales"),
        ("bitsandbytes, NF4", lambda t: t.update({"weight.absmax": t["weight.absmax"][:1]}), "do not make a weight"),
        ("bitsandbytes, NF4", lambda t: t["weight.quant_state.bitsandbytes__nf4"].fill_(91), "does not say how"),
        ("fp8", lambda t: t.update(weight_scale_inv=t["weight_scale_inv"][:, :1]), "but its scales"),
        ("MLX", lambda t: t.update(biases=t["biases"][:, :1]), "do not make a weight of 4 bits in groups of 64"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_belong_together_are_refused_by_name(folder, tmp_path, kind, spoil, said):
    pack, settings = EVERY[kind]
    files.write(
        folder, tmp_path / "plain", pack, settings, key="quantization" if "MLX" in kind else "quantization_config"
    )
    tensors = load_file(folder / "model.safetensors")
    module = "model.layers.0.self_attn.o_proj."
    own = {name.removeprefix(module): tensor for name, tensor in tensors.items() if name.startswith(module)}
    spoil(own)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(module)}
    save_file(
        {k: v.contiguous() for k, v in (rest | {module + n: t for n, t in own.items()}).items()},
        folder / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(folder)


def test_every_tensor_at_fault_of_a_quantized_checkpoint_is_told_at_once(folder, tmp_path):
    files.write(folder, tmp_path / "plain", *EVERY["gptq"])
    tensors = load_file(folder / "model.safetensors")
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"model.layers.0.mlp.up_proj.{part}"]
    tensors["model.colour"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight of shape \(256, 128\) is missing.*model\.colour have no place"
    ):
        open_checkpoint(folder)


def test_an_adapter_on_a_quantized_base_is_merged_into_its_floats(folder, tmp_path):
    files.write(folder, tmp_path / "plain", *EVERY["gptq"])
    down, up = torch.randn(4, WIDTH), torch.randn(WIDTH, 4)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file({name.format("A"): down, name.format("B"): up}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    weights = open_checkpoint(folder).weights
    plain = open_checkpoint(tmp_path / "plain").weights.read("layers.0.attention.q_proj.weight")
    assert torch.allclose(weights.read("layers.0.attention.q_proj.weight"), plain + 2 * up @ down, atol=1e-5)
    assert weights.code_format("layers.0.attention.q_proj.weight") is None
    assert weights.code_format("layers.0.attention.k_proj.weight") is not None


def test_experts_in_mxfp4_are_what_transformers_makes_of_them():
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(118, 130, (3, 10, 2), dtype=torch.uint8)

    class Stored:
        shapes: ClassVar = {"experts.up_blocks": tuple(blocks.shape), "experts.up_scales": tuple(scales.shape)}

        def raw(self, name, rows=None):
            found = blocks if name.endswith("blocks") else scales
            return found if rows is None else found[slice(*rows)]

    found = dequantized({"quantization_config": {"quant_method": "mxfp4"}}, Stored()).source
    assert found.shapes == {"experts.up": (3, 64, 10)}
    assert torch.equal(found.read("experts.up"), convert(blocks, scales, dtype=torch.float32))
    assert torch.equal(found.read("experts.up", (1, 3)), found.read("experts.up")[1:3])
