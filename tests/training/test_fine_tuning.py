"""Fine-tuning a checkpoint on plain text and on chats, adapters as files, somebody's tokenizer, and the range test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_fakes import TEMPLATE, byte_level
from safetensors.torch import load_file
from tiny_bundles import attention_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from training_models import TEXT

from edgellm.checkpoints import load_checkpoint, save_checkpoint
from edgellm.cli.train import train as command
from edgellm.errors import TrainingError
from edgellm.tasks.chats import encode_chats, holds_chats, read_chats, template_of
from edgellm.training.range_test import smoothed, suggestion

QUICK = ("--batch-size", 2, "--context", 48, "--threads", 1, "--device", "cpu", "--steps", 3, "--json")
CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "the world"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "the user"},
]
FORGETS = (  # leaves out what earlier turns of the assistant's thought
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Losses of `--find-lr` with the tiny preset on tinyshakespeare, rates from 1.1e-5 to 1.
WANDERING = [
    7.38, 7.34, 7.38, 7.36, 7.32, 7.38, 7.26, 7.23, 7.18, 7.23, 7.18, 7.15, 7.15, 7.1, 7.09, 7.04, 7.07, 6.93, 6.88,
    6.86, 6.8, 6.85, 6.77, 6.76, 6.73, 6.64, 6.5, 6.51, 6.39, 6.46, 6.38, 6.41, 6.31, 6.29, 6.14, 6.2, 6.15, 6.13, 5.92,
    6.02, 5.93, 5.84, 5.82, 5.65, 5.66, 5.58, 5.6, 5.45, 5.56, 5.5, 5.46, 5.48, 5.45, 5.42, 5.31, 5.33, 5.43, 5.35,
    5.32, 5.17, 5.1, 5.17, 5.26, 4.98, 5.2, 4.92, 4.98, 5.11, 4.96, 5.03, 4.92, 4.98, 4.94, 4.97, 4.78, 4.96, 4.9,
    4.97, 4.89, 4.87, 4.84, 4.87, 4.69, 4.84, 4.86, 4.88, 4.92, 4.76, 4.73, 4.97, 4.65, 4.78, 4.97, 5.14, 5.1, 4.98,
]  # fmt: skip


def call(*arguments: object) -> int:
    status: int | None = command.main([str(a) for a in arguments], standalone_mode=False)
    return status or 0


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint that talks, with random weights."""
    folder = tmp_path / "base"
    save_checkpoint(
        folder, attention_model(), architecture="decoder", tokenizer_json=byte_level().to_str(), chat_template=TEMPLATE,
        eos_token_ids=(2, 0),
    )  # fmt: skip
    return folder


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in load_checkpoint(checkpoint).model.named_parameters()}


def test_plain_text_tunes_a_checkpoint_and_keeps_its_tokenizer_and_template(base: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    assert call(text, "-o", tmp_path / "run", "--init", base, *QUICK) == 0
    before, after = load_checkpoint(base), load_checkpoint(tmp_path / "run" / "best")
    assert (after.tokenizer_json, after.chat_template) == (before.tokenizer_json, before.chat_template)
    assert after.eos_token_ids == before.eos_token_ids
    assert after.architecture == "decoder"
    assert all(not torch.equal(w, weights(base)[n]) for n, w in weights(tmp_path / "run" / "best").items())
    assert call("-o", tmp_path / "run", "--resume", "--steps", 4, "--json") == 0


def test_adapters_are_written_as_peft_has_them_and_add_up_to_the_merged_weights(base: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    assert call(text, "-o", tmp_path / "run", "--init", base, "--lora", 2, "--lora-alpha", 6, "--lr", 0.01, *QUICK) == 0
    folder = tmp_path / "run" / "best" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 2, 6.0, "none")
    stored = load_file(folder / "adapter_model.safetensors")
    shape = attention_model().config
    with torch.device("meta"):
        theirs = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocab_size, hidden_size=shape.width, num_hidden_layers=shape.num_layers,
                num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim,
                intermediate_size=shape.mlp_width,
            )
        )  # fmt: skip
    modules = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in stored}
    assert len(stored) == 2 * len(modules) and {m.rsplit(".", 1)[-1] for m in modules} == set(config["target_modules"])
    before, after, moved = weights(base), weights(tmp_path / "run" / "best"), 0
    for module in modules:
        theirs.get_submodule(module)  # raises where there is none
        a, b = (stored[f"base_model.model.{module}.lora_{kind}.weight"] for kind in "AB")
        last = module.rsplit(".", 1)[-1]
        ours = next(n for n in before if n.endswith(f"{last}.weight") and _layer(n) == _layer(module))
        torch.testing.assert_close(after[ours], before[ours] + 6 / 2 * b @ a)
        moved += bool(b.abs().max() > 0)
    assert moved == len(modules)


def _layer(name: str) -> str:
    return name.split("layers.")[-1].split(".")[0]


def test_a_chat_teaches_the_assistants_words_and_how_its_turns_end(tmp_path: Path) -> None:
    library = byte_level()
    template = template_of(TEMPLATE, library.to_str(), tmp_path, bos=None, ends=(2,), vocab_size=320)
    (row,) = encode_chats(template, [CHAT], context=400).rows
    assert row.inputs.tolist() == template.encode(CHAT, add_generation_prompt=False)[:-1]
    learned = [int(t) for t, w in zip(row.targets, row.weights, strict=True) if w]
    text = library.decode(learned, skip_special_tokens=False)
    assert "the world" in text and "the user" in text
    assert "hello" not in text and "again" not in text
    assert learned.count(2) == 2, "the end of each turn"
    assert encode_chats(template, [CHAT], context=10).dropped == 1


def test_a_template_that_forgets_gives_an_example_for_each_turn(tmp_path: Path) -> None:
    template = template_of(FORGETS, byte_level().to_str(), tmp_path, bos=None, ends=(2,), vocab_size=320)
    thinking = [{**m, "content": "hm</think>" + m["content"]} if m["role"] == "assistant" else m for m in CHAT]
    rows = encode_chats(template, [thinking], context=400).rows
    assert [row.inputs.tolist() for row in rows] == [
        template.encode(thinking[:n], add_generation_prompt=False)[:-1] for n in (2, 4)
    ]


def test_chats_tune_a_checkpoint_through_adapters(base: Path, tmp_path: Path) -> None:
    chats = jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 20)
    assert holds_chats([chats])
    assert call(chats, "-o", tmp_path / "run", "--init", base, "--lora", 2, *QUICK, "--context", 96) == 0
    assert load_checkpoint(tmp_path / "run" / "best").chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages": []}', "has no list of messages"),
        ('{"messages": [{"role": "user"}]}', "message 0 is not a role and a content in words"),
        ('{"messages": [{"role": "user", "content": 3}]}', "message 0 is not a role and a content in words"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "nobody speaks as the assistant"),
        ("[", "not JSON"),
    ],
)
def test_a_line_that_is_no_chat_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(TrainingError, match=rf"chats.jsonl:2: .*{said}"):
        read_chats(path)


def test_chats_need_a_checkpoint_that_talks(base: Path, tmp_path: Path) -> None:
    chats = jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 20)
    with pytest.raises(TrainingError, match="name one with --init"):
        call(chats, "-o", tmp_path / "run", *QUICK)
    (base / "chat_template.jinja").unlink()
    with pytest.raises(TrainingError, match="has no chat template"):
        call(chats, "-o", tmp_path / "run", "--init", base, *QUICK)


def test_a_tokenizer_of_the_users_is_taken_without_its_truncation_and_padding(tmp_path: Path) -> None:
    given = Tokenizer(models.BPE())
    given.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    given.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"]))
    given.enable_truncation(16)
    given.enable_padding(length=64)
    given.save(str(tmp_path / "tokenizer.json"))
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    small = ("--set", "width=16", "--set", "pattern=gru", "--set", "recurrent_width=16", "--set", "mlp_width=0")
    assert call(text, "-o", tmp_path / "run", *small, "--tokenizer", tmp_path / "tokenizer.json", *QUICK) == 0
    saved = load_checkpoint(tmp_path / "run" / "best")
    assert saved.tokenizer_json is not None
    mine = Tokenizer.from_str(saved.tokenizer_json)
    assert mine.get_vocab() == given.get_vocab()
    assert mine.truncation is None and mine.padding is None
    assert saved.eos_token_ids == (mine.token_to_id("</s>"),)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    with pytest.raises(TrainingError, match="is not a tokenizer"):
        call(text, "-o", tmp_path / "run", "--tokenizer", tmp_path / "tokenizer.json", *QUICK)
    with pytest.raises(TrainingError, match="cannot be read"):
        call(text, "-o", tmp_path / "run", "--tokenizer", tmp_path / "absent.json", *QUICK)


def rates(count: int) -> list[float]:
    return [1e-5 * 10 ** (5 * i / 99) for i in range(1, count + 1)]


def test_the_range_test_is_not_misled_by_a_plateau_that_wanders() -> None:
    steepest, suggested = suggestion(*smoothed(list(zip(rates(len(WANDERING)), WANDERING, strict=True))))
    assert 2e-3 < suggested < 1e-2, "trained with 3e-3, measured; the lowest point is at 0.35"
    assert steepest <= suggested


def test_the_range_test_keeps_below_where_the_loss_diverges() -> None:
    falling = [7 - 0.04 * max(0, i - 30) for i in range(70)]
    losses = [*falling, *(falling[-1] + 0.5 * i for i in range(1, 8))]
    _, suggested = suggestion(rates(len(losses)), losses)
    assert suggested < rates(70)[-1] / 2


@pytest.mark.parametrize("losses", [[7.0 + 0.01 * (i % 3) for i in range(100)], [7 + 0.02 * i for i in range(100)]])
def test_a_loss_that_never_falls_suggests_nothing(losses: list[float]) -> None:
    with pytest.raises(TrainingError, match="the loss never falls"):
        suggestion(rates(100), losses)
