"""Hugging Face folders: the logits are transformers', and what cannot be represented is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, processors

from edgellm.checkpoints import load_checkpoint
from edgellm.errors import CheckpointError
from edgellm.models.decoder import ARCHITECTURE, Decoder, DecoderConfig

CONFIG = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 500.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOKENS = torch.arange(40).reshape(2, 20)


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data))


def edit(path: Path, **changes) -> None:
    data = (json.loads(path.read_text()) if path.exists() else {}) | changes
    write_json(path, {key: value for key, value in data.items() if value is not ...})


def logits(path: Path) -> torch.Tensor:
    with torch.inference_mode():
        return load_checkpoint(path).model(TOKENS)[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = Decoder(
        DecoderConfig(
            vocab_size=96,
            width=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            mlp_width=48,
            max_context=64,
            rope_theta=500.0,
            tie_embeddings=False,
        )
    )
    tensors = {ARCHITECTURE.huggingface.names(name): tensor for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", CONFIG)
    return tmp_path


def transformers_model(kind: str, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = {key: value for key, value in CONFIG.items() if key not in ("model_type", "rope_theta")}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "initializer_range": 0.3}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**(config | options)))
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight", "layernorm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def rope(kind: str, **numbers) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **numbers}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Llama", {"head_dim": 16, "num_key_value_heads": 1}),
        ("Llama", {"num_key_value_heads": None}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"hidden_act": "gelu"}),
        ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
        ("Llama", {"hidden_act": "relu"}),
        ("Llama", rope("linear", factor=2.0)),
        ("Llama", rope("llama3", **LLAMA3)),
        ("Llama", rope("llama3", **LLAMA3) | {"head_dim": 32}),
        ("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
        ("Llama", rope("yarn", factor=4.0, attention_factor=0.7, beta_fast=8.0, beta_slow=2.0, truncate=False)),
        ("Llama", rope("yarn", factor=4.0, mscale=1.0, mscale_all_dim=0.5, original_max_position_embeddings=16)),
        ("Mistral", {"sliding_window": None}),
        ("Mistral", {"sliding_window": 64}),
        ("Qwen2", {}),
        ("Qwen2", {"tie_word_embeddings": True, "sliding_window": 8, "use_sliding_window": False}),
        ("Qwen3", {}),
        ("Qwen3", {"attention_bias": True}),
        ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "sliding_window": 8, "num_key_value_heads": 1}),
    ],
)
def test_logits_equal_transformers(tmp_path, kind, options, dtype):
    model = transformers_model(kind, **options)
    model.to(dtype).save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()  # .float() keeps rounded frequencies
    with torch.inference_mode():
        expected = model(TOKENS).logits
    got = logits(tmp_path)
    assert got.dtype == torch.float32
    assert (got - expected).abs().amax() <= 2e-6 * expected.abs().amax()
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("shard_size", ["10KB", "1GB"])
def test_shards_equal_transformers(tmp_path, shard_size):
    model = transformers_model("Llama")
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "10KB")
    with torch.inference_mode():
        torch.testing.assert_close(logits(tmp_path), model(TOKENS).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mambo"}, "config.json: unknown architecture 'mambo'"),
        ({"model_type": ...}, "unknown architecture ''"),
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ({"mlp_bias": True}, "layers.0.mlp.gate_proj.bias .*are missing"),
        ({"attention_bias": True}, "layers.0.self_attn.q_proj.bias .*are missing"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'; it must be true or false"),
        ({"model_type": "mistral", "mlp_bias": True}, "mlp_bias is True"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor is None"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is None"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "other": 1}}, "rope_scaling is .*other"),
        ({"rope_scaling": {"type": "proportional", "factor": 2.0}}, "rope_scaling is .*proportional"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
            "high_freq_factor 1.0, not above",
        ),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "original_max_position_embeddings is None"),
        ({"is_causal": False}, "is_causal is False"),
        ({"is_causal": None}, "is_causal is None"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}, "auto_map says that code of the checkpoint's own"),
        ({"per_layer_config": {"0": {"num_key_value_heads": 1}}}, "per_layer_config is"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True"),
        ({"logit_scale": 0.5}, "logit_scale is 0.5"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters is"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "factor is 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"sliding_window": 32}, "sliding_window is 32"),
        ({"sliding_window": "32"}, "sliding_window is '32'"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": -8}, "sliding_window is -8"),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": "8"}, "sliding_window is '8'"),
        ({"model_type": "qwen3"}, r"q_proj.weight has shape \(32, 32\), its configuration says \(512, 32\)"),
        ({"model_type": "qwen3", "head_dim": 8}, "self_attn.q_norm.weight .*are missing"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is 'sliding_attention'"),
        ({"layer_types": 3}, "malformed"),
        ({"quantization_config": {"quant_method": "gptq"}}, "GPTQ, 4 bits, groups of 128, but no tensor is stored so"),
        ({"hidden_size": ...}, "hidden_size is None; it must be a positive whole number"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "num_kv_heads 3"),
        ({"model_type": "mistral", "num_key_value_heads": ...}, "num_key_value_heads is None"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id is"),
        ({"vocab_size": 97}, r"embed_tokens.weight has shape \(96, 32\), its configuration says \(97, 32\)"),
        ({"num_hidden_layers": 3}, "model.layers.2.* and 6 more are missing"),
        ({"num_hidden_layers": 1}, "tensors model.layers.1.* and 6 more have no place"),
        ({"tie_word_embeddings": True}, "model.embed_tokens.weight and lm_head.weight differ"),
    ],
)
def test_what_cannot_be_represented_is_refused(folder, changes, message):
    edit(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "silu", "mlp_bias": False, "attention_bias": False, "pretraining_tp": 2},
        {"rope_scaling": None, "sliding_window": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 500}},
        {"rope_theta": ..., "rope_scaling": {"rope_type": "default", "rope_theta": 500}},
        {
            "rope_theta": 9.0,
            "rope_scaling": {"type": "default", "rope_theta": 500},
            "rope_parameters": {"rope_theta": 7},
        },
        {"rope_theta": 9.0, "rope_scaling": {}, "rope_parameters": {"rope_theta": 500}},
        {"rope_scaling": {"rope_type": "linear", "factor": 1.0}},
        {"is_causal": True, "auto_map": {}, "use_cache": False, "torch_dtype": "bfloat16"},
        {"head_dim": None, "num_key_value_heads": 2},
        {"sliding_window": 64, "layer_types": ["full_attention", "full_attention"]},
    ],
)
def test_what_changes_nothing_is_accepted(folder, changes):
    expected = logits(folder)
    edit(folder / "config.json", **changes)
    assert torch.equal(logits(folder), expected)


def test_rotary_frequencies_of_old_files_are_ignored(folder):
    expected = logits(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(logits(folder), expected)


def test_a_tied_head_may_be_stored_under_either_name_or_both(folder):
    edit(folder / "config.json", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors.pop("lm_head.weight")
    found = []
    for names in (["lm_head.weight"], ["model.embed_tokens.weight"], ["lm_head.weight", "model.embed_tokens.weight"]):
        tensors.pop("model.embed_tokens.weight", None)
        tensors.pop("lm_head.weight", None)
        save_file(tensors | {name: embedding.clone() for name in names}, folder / "model.safetensors")
        found.append(logits(folder))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def shard(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in ("part-0.safetensors", "part-1.safetensors"):
        save_file({name: tensors[name] for name in names if where[name] == part}, folder / part)
    write_json(folder / "model.safetensors.index.json", {"weight_map": where})
    return folder / "model.safetensors.index.json"


def test_shards_equal_one_file(folder):
    expected = logits(folder)
    shard(folder)
    assert torch.equal(logits(folder), expected)


def test_bad_shards_are_refused(folder):
    index = shard(folder)
    good = json.loads(index.read_text())["weight_map"]
    first = next(iter(good))
    cases: dict[str, object] = {
        "absent.safetensors is missing": good | {first: "absent.safetensors"},
        "not a file beside the index": good | {first: "../part-0.safetensors"},
        "not a file beside": good | {first: 3},
        "tensor extra is missing": good | {"extra": "part-0.safetensors"},
        f"{first} .* is missing": {name: part for name, part in good.items() if name != first},
        "has no weight_map": [],
    }
    for message, where in cases.items():
        write_json(index, {"weight_map": where})
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(folder)
    write_json(index, {"weight_map": good})
    (folder / "part-1.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"part-1\.safetensors is not a whole safetensors file"):
        load_checkpoint(folder)


def test_missing_extra_and_misshaped_tensors_are_told_at_once(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors |= {"model.layers.0.mlp.up_proj.weight": torch.zeros(47, 32), "model.extra": torch.zeros(1)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert str(caught.value) == (
        f"{folder}: tensor model.norm.weight of shape (32,) is missing, so the checkpoint is incomplete; tensor "
        "model.layers.0.mlp.up_proj.weight has shape (47, 32), its configuration says (48, 32), so the two do not "
        "belong together; tensors model.extra have no place in the model that its configuration describes; use a "
        "checkpoint of that model"
    )


def put_tokenizer(folder: Path, *, adds_bos: bool) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "<s>": 1, "</s>": 2, "<end>": 3}, merges=[]))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<end>")])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("setting", [..., True, False, None])
@pytest.mark.parametrize("in_tokenizer", [False, True])
def test_the_post_processor_decides_whether_texts_begin_with_bos(folder, in_tokenizer, setting):
    transformers = pytest.importorskip("transformers")
    put_tokenizer(folder, adds_bos=in_tokenizer)
    edit(folder / "tokenizer_config.json", add_bos_token=setting, bos_token="<s>", eos_token="</s>")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)("a").input_ids
    assert load_checkpoint(folder).add_bos is (theirs == [1, 0]) is in_tokenizer


def test_the_token_that_a_text_begins_with_is_the_post_processors(folder):
    put_tokenizer(folder, adds_bos=True)
    edit(folder / "config.json", bos_token_id=3)
    loaded = load_checkpoint(folder)
    assert (loaded.bos_token_id, loaded.add_bos) == (1, True)


def test_two_tokens_before_each_text_are_refused(folder):
    put_tokenizer(folder, adds_bos=False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <end> $A", special_tokens=[("<s>", 1), ("<end>", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="begins texts with <s> <end>; edgellm can put one token there"):
        load_checkpoint(folder)


def test_truncation_and_padding_of_the_tokenizers_own_are_left_out(folder):
    put_tokenizer(folder, adds_bos=True)
    plain = load_checkpoint(folder).tokenizer_json
    assert plain == (folder / "tokenizer.json").read_text()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=4096)
    tokenizer.save(str(folder / "tokenizer.json"))
    found = Tokenizer.from_str(load_checkpoint(folder).tokenizer_json)
    assert (found.truncation, found.padding) == (None, None)
    assert found.encode("a" * 50, add_special_tokens=False).ids == [0] * 50
    assert found.to_str() == Tokenizer.from_str(plain).to_str()


def test_every_key_is_read_neutral_refused_or_told_of(folder):
    assert load_checkpoint(folder).notes == ()
    edit(folder / "config.json", colour="red", transformers_version="5", aardvark=None)
    assert load_checkpoint(folder).notes == ("config.json has keys edgellm does not know: aardvark, colour",)


@pytest.mark.parametrize(
    ("kind", "options"), [("Llama", {}), ("Mistral", {}), ("Qwen2", {}), ("Qwen3", {"head_dim": 8})]
)
def test_no_key_that_transformers_itself_writes_is_unknown(tmp_path, kind, options):
    transformers_model(kind, **options).save_pretrained(tmp_path)
    assert load_checkpoint(tmp_path).notes == ()


def test_what_generation_config_asks_for_and_a_bundle_does_not_do_is_told(folder):
    edit(
        folder / "generation_config.json", temperature=0.6, repetition_penalty=1.05, num_beams=2, forced_eos_token_id=3
    )
    loaded = load_checkpoint(folder)
    assert loaded.generation == {"repetition_penalty": 1.05}
    assert loaded.notes[0].startswith("generation_config.json asks for forced_eos_token_id 3, num_beams 2, which")


def test_special_tokens_are_those_of_the_tokenizers_own_files(folder):
    put_tokenizer(folder, adds_bos=False)
    edit(folder / "special_tokens_map.json", bos_token="<old>", pad_token={"content": "<pad>"}, unk_token="<unk>")
    edit(
        folder / "tokenizer_config.json",
        bos_token={"content": "<s>"},
        eos_token="<end>",
        unk_token=None,
        model_max_length=3,
    )
    names = {"bos_token": "<s>", "eos_token": "<end>", "pad_token": "<pad>"}
    assert load_checkpoint(folder).special_tokens == names


@pytest.mark.parametrize(
    ("config", "generation", "settings", "expected"),
    [
        ({}, {}, {}, (1, (2,))),
        ({"eos_token_id": [2, 3, 2]}, {}, {}, (1, (2, 3))),
        ({}, {"eos_token_id": [3, 2], "bos_token_id": 0}, {}, (0, (3, 2))),
        ({"eos_token_id": None, "bos_token_id": ...}, {}, {}, (None, ())),
        ({"eos_token_id": ..., "bos_token_id": None}, {}, {"eos_token": "<end>", "bos_token": {"content": "<s>"}},
         (1, (3,))),
    ],
)  # fmt: skip
def test_special_tokens(folder, config, generation, settings, expected):
    put_tokenizer(folder, adds_bos=False)
    edit(folder / "config.json", **config)
    edit(folder / "generation_config.json", **generation)
    edit(folder / "tokenizer_config.json", **settings)
    loaded = load_checkpoint(folder)
    assert (loaded.bos_token_id, loaded.eos_token_ids) == expected


def test_chat_template_comes_from_the_file_else_the_settings(folder):
    assert load_checkpoint(folder).chat_template is None
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    for setting, expected in ((several, "D"), ("S", "S"), (several[:1], None)):
        edit(folder / "tokenizer_config.json", chat_template=setting)
        assert load_checkpoint(folder).chat_template == expected
    (folder / "chat_template.jinja").write_text("F")
    assert load_checkpoint(folder).chat_template == "F"


def test_source_says_what_was_read(folder):
    assert load_checkpoint(folder).source == "Hugging Face F32, llama"
