"""The general road: models of transformers that edgellm knows nothing of, taken over through public interfaces."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from general_models import CONTEXT, FOREIGN, VOCAB, WINDOW, build, scrambled
from torch import nn

from edgellm.cli import run
from edgellm.cli.checkpoints import read_checkpoint
from edgellm.errors import CheckpointError
from edgellm.general.model import GeneralModel
from edgellm.general.open import load_general
from edgellm.general.recognise import replace_norms
from edgellm.models.protocol import Step, empty_state
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import load

LENGTH = 3 * WINDOW
KINDS = tuple(FOREIGN)


def tokens(rows: int = 1, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def wanted(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_a_model_of_transformers_taken_over_computes_what_it_computed(kind: str, fused: bool) -> None:
    theirs = build(kind)
    expected = wanted(theirs, tokens())
    ours = GeneralModel(copy.deepcopy(theirs), fused=fused).eval()
    torch.testing.assert_close(ours(tokens())[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_chunks_and_ragged_rows_equal_the_whole(kind: str) -> None:
    ours, ids = GeneralModel(build(kind)).eval(), tokens(2)
    whole = ours(ids)[0]
    state: Any = empty_state(ours, 2, CONTEXT)
    held, found = torch.zeros(2, dtype=torch.int32), [[], []]
    for lengths in ((5, 3), (1, 1), (9, 2), (LENGTH - 15, LENGTH - 6)):  # the last takes each row to its end
        time = max(lengths)
        chunk = torch.zeros(2, time, dtype=torch.int64)
        for row, (count, at) in enumerate(zip(lengths, held.tolist(), strict=True)):
            chunk[row, :count] = ids[row, at : at + count]
        every = torch.arange(time).expand(2, time)
        logits, state = ours(chunk, state, Step(held, torch.tensor(lengths, dtype=torch.int32), every))
        for row, count in enumerate(lengths):
            found[row].append(logits[row, :count])
        held = held + torch.tensor(lengths, dtype=torch.int32)
    assert held.tolist() == [LENGTH, LENGTH]
    for row in range(2):
        torch.testing.assert_close(torch.cat(found[row]), whole[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("llama", 2),
        ("qwen3", 2),
        ("gemma2", 2),
        ("gemma3_text", 2),
        ("smollm3", 1),
        ("phi", 2),
        ("gptj", 2),
        ("gpt_neox", 2),
        ("glm", 2),
        ("cohere", 2),
        ("deepseek_v3", 0),
    ],
)
def test_rotations_go_into_attention_where_it_has_the_same(kind: str, layers: int) -> None:
    assert GeneralModel(build(kind)).rotating == layers


def test_windows_and_caps_are_found() -> None:
    found = [(layer.window, layer.softcap) for layer in GeneralModel(build("gemma2")).layers]
    assert found == [(WINDOW, 50.0), (0, 50.0)]


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("gemma2", "cpu"),
        ("qwen3", "cpu"),
        ("gpt2", "onnx"),
        ("mixtral", "onnx"),
        ("deepseek_v3", "cpu"),
        ("gpt_oss", "cpu"),
        ("gpt_oss", "onnx"),
        ("deepseek_v2", "onnx"),
        ("bloom", "cpu"),
        ("hunyuan_v1_dense", "cpu"),
        ("gpt_neo", "onnx"),
        ("openai-gpt", "cpu"),
    ],
)
def test_an_export_by_the_general_road_runs_and_says_what_transformers_says(
    kind: str, target: str, tmp_path: Path
) -> None:
    theirs = build(kind)
    bundle = tmp_path / "bundle"
    export(GeneralModel(copy.deepcopy(theirs)).eval(), bundle, options=ExportOptions(target=target))
    model, ids = load(bundle), tokens()
    found = model.session.step(ids.numpy(), model.session.new_state(batch=1), logits="all")[0]
    torch.testing.assert_close(torch.from_numpy(found.copy()), wanted(theirs, ids)[0], rtol=1e-3, atol=1e-3)


def test_a_folder_takes_the_general_road_where_no_file_knows_it_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs: Any = build("gpt2")
    theirs.save_pretrained(tmp_path / "gpt2")
    assert run(["export", str(tmp_path / "gpt2"), "-o", str(tmp_path / "bundle"), "--target", "onnx"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "gpt2 took the general road through transformers" in said
    assert run(["export", str(tmp_path / "gpt2"), "-o", str(tmp_path / "no"), "--road", "native"]) == 1
    assert "unknown architecture 'gpt2'" in capsys.readouterr().err
    assert run(["verify", str(tmp_path / "bundle"), "--against", str(tmp_path / "gpt2")]) == 0


def test_a_setting_that_the_native_road_refuses_takes_the_general_one(tmp_path: Path) -> None:
    theirs: Any = build("smollm3", sliding_window=WINDOW, use_sliding_window=True)
    theirs.save_pretrained(tmp_path / "m")
    found = read_checkpoint(tmp_path / "m", in_memory=True)
    assert isinstance(found.model, GeneralModel)
    assert [layer.window for layer in found.model.layers] == [0, WINDOW]
    with torch.no_grad():
        torch.testing.assert_close(found.model(tokens())[0], wanted(theirs, tokens()), rtol=1e-4, atol=1e-4)


class _Scaled(nn.Module):
    """An RMS norm under another name, with an epsilon of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.tiny = nn.Parameter(torch.randn(size)), 3e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.tiny) * self.weight


class _Centred(_Scaled):
    """Not one: it takes the mean away."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


def test_a_norm_is_known_by_what_it_computes() -> None:
    model = nn.Sequential(_Scaled(8), _Centred(8), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    before = model(x)
    assert replace_norms(model) == 1
    torch.testing.assert_close(model(x), before)
    assert isinstance(model[1], _Centred)


def test_a_family_that_nobody_has_heard_of_goes_through(tmp_path: Path) -> None:
    """A class in transformers' manner, with a norm after its attention and a gate of its own kind."""
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.masking_utils import create_causal_mask
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class OwlConfig(PreTrainedConfig):  # type: ignore[misc]
        model_type = "owl-never-heard-of"
        vocab_size: int = VOCAB
        hidden_size: int = 32
        num_hidden_layers: int = 2
        num_attention_heads: int = 2
        max_position_embeddings: int = CONTEXT
        tie_word_embeddings: bool = False

    class OwlLayer(nn.Module):
        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__()
            width = config.hidden_size
            self.config, self.layer_idx, self.is_causal = config, layer_idx, True
            self.heads = config.num_attention_heads
            self.qkv, self.out, self.norm = nn.Linear(width, 3 * width), nn.Linear(width, width), _Scaled(width)
            self.rise, self.fall = nn.Linear(width, 2 * width), nn.Linear(width, width)

        def forward(self, x: Any, mask: Any, cache: Any) -> Any:
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
            if cache is not None:
                k, v = cache.update(k, v, self.layer_idx)
            attend = AttentionInterface().get_interface(self.config._attn_implementation, _eager)
            y, _ = attend(self, q, k, v, mask, scaling=0.2, dropout=0.0)
            x = x + self.norm(self.out(y.flatten(2)))
            a, b = self.rise(x).chunk(2, dim=-1)
            return x + self.fall(a * torch.tanh(b))

    def _eager(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, dropout: float) -> Any:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
        return y.transpose(1, 2), None

    class Owl(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
        config_class = OwlConfig
        _supports_sdpa = _supports_attention_backend = True

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
            self.where = nn.Embedding(config.max_position_embeddings, config.hidden_size)
            self.layers = nn.ModuleList([OwlLayer(config, i) for i in range(config.num_hidden_layers)])
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def get_input_embeddings(self) -> Any:
            return self.embed

        def get_output_embeddings(self) -> Any:
            return self.head

        def forward(
            self, input_ids: Any = None, position_ids: Any = None, past_key_values: Any = None, use_cache: Any = None,
            **keywords: Any,
        ) -> Any:  # fmt: skip
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1])[None]
            x = self.embed(input_ids) + self.where(position_ids)
            mask = create_causal_mask(self.config, x, None, past_key_values, position_ids)
            for layer in self.layers:
                x = layer(x, mask, past_key_values)
            return CausalLMOutputWithPast(logits=self.head(x) * 0.5)

    AutoConfig.register("owl-never-heard-of", OwlConfig, exist_ok=True)
    AutoModelForCausalLM.register(OwlConfig, Owl, exist_ok=True)
    torch.manual_seed(3)
    theirs = scrambled(Owl(OwlConfig()))
    theirs.save_pretrained(tmp_path / "owl")  # type: ignore[operator]
    found = load_general(tmp_path / "owl")
    assert found.model.norms == 2  # type: ignore[union-attr]
    export(found.model, tmp_path / "bundle", options=ExportOptions(target="cpu"))  # type: ignore[arg-type]
    model, ids = load(tmp_path / "bundle"), tokens()
    logits = model.session.step(ids.numpy(), model.session.new_state(batch=1), logits="all")[0]
    torch.testing.assert_close(torch.from_numpy(logits.copy()), wanted(theirs, ids)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("rwkv", {"context_length": CONTEXT, "attention_hidden_size": 48}, "give no keys and values"),
        ("mamba", {"state_size": 8}, "it is recurrent: its layers keep another state"),
        ("jamba", {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1}, "it is recurrent"),
    ],
)  # fmt: skip
def test_what_has_no_form_is_refused_in_a_sentence(kind: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        GeneralModel(build(kind, **changes))


@pytest.mark.parametrize("kind", ["pegasus", "mbart"])
def test_a_model_with_an_encoder_is_refused_before_it_is_loaded(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}", "is_encoder_decoder": true}}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"{kind} has an encoder beside its decoder"):
        read_checkpoint(tmp_path)


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    monkeypatch.setattr("edgellm.general.has_transformers", lambda: False)
    with pytest.raises(CheckpointError, match="install the extra hf"):
        read_checkpoint(tmp_path)


def test_a_folders_own_code_runs_only_when_the_user_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}',
        encoding="utf-8",
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()
