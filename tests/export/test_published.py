"""What export publishes, a loader takes: text and numbers that one would refuse are refused before they are written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_fakes import TEMPLATE, byte_level
from refusals import only, refusal
from tiny_bundles import attention_bundle, attention_model, recurrent_model, text_assets

from edgellm.checkpoints import save_checkpoint
from edgellm.cli import run
from edgellm_exporters.errors import ExportError, ParityError
from edgellm_exporters.export import TextAssets, export
from edgellm_exporters.proof.samples import golden_rows
from edgellm_runtime import open_session
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.verify import read_goldens, verify
from edgellm_runtime.task_spec import Segment, TaskSpec

SIZE = byte_level().get_vocab_size()


def with_tokens(*names: str) -> str:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(list(names))
    return str(tokenizer.to_str())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"eos_token_ids": (1, 999)},
            rf"the eos token 999 is outside the model's vocabulary of {SIZE}; correct eos_token_id in the checkpoint",
        ),
        ({"bos_token_id": SIZE}, rf"the bos token {SIZE} is outside the model's vocabulary of {SIZE}; correct bos_tok"),
        (
            {"tokenizer_json": with_tokens("<extra>", "<more>")},
            rf"the tokenizer has 2 tokens that the model, of {SIZE}, has no row for, such as '<extra>' \({SIZE}\), ",
        ),
        ({"tokenizer_json": "{}"}, "the checkpoint's tokenizer cannot be used: not a tokenizer"),
        ({"chat_template": "{% for"}, "the checkpoint's chat template cannot be used: the chat template failed"),
        ({"chat_template": "{{ messages[7].content }}"}, "the checkpoint's chat template cannot be used: "),
        ({"chat_template": "{{ raise_exception('tools only') }}"}, r"refuses a plain question \(.*tools only"),
        ({"chat_template": ""}, "cannot be used: the chat template failed .what it writes has no tokens."),
        (
            {"task": TaskSpec(name="generation", prompt=(Segment("token", "<|ask|>"),))},
            r"the tokenizer lacks \['<\|ask\|>'\], which prompts of the task need",
        ),
    ],
)
def test_text_that_a_loader_refuses_is_refused_before_any_work(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    text = dataclasses.replace(text_assets(), **changes)
    told: list[str] = []
    with pytest.raises(ExportError, match=message):
        export(attention_model(), tmp_path / "out", text=text, progress=lambda what, _: told.append(what))  # type: ignore[arg-type]
    assert told in ([], ["capturing"])
    only(tmp_path)


def test_template_that_wants_a_system_message_is_taken(tmp_path: Path) -> None:
    picky = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + TEMPLATE
    text = dataclasses.replace(text_assets(), chat_template=picky)
    assert export(attention_model(), tmp_path / "out", text=text).verification.ok  # type: ignore[arg-type]


def test_end_token_of_a_checkpoint_outside_its_vocabulary(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_checkpoint(
        tmp_path / "c", attention_model(), architecture="decoder", tokenizer_json=text_assets().tokenizer_json,
        eos_token_ids=(1, 999),
    )  # fmt: skip
    message = refusal(capsys, "export", str(tmp_path / "c"), "-o", str(tmp_path / "out"))
    assert message.startswith("the eos token 999 is outside the model's vocabulary of ")
    only(tmp_path, "c")


def test_goldens_are_text_and_where_they_are_not_the_summary_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    encoded = byte_level().encode("The lighthouse keeper wrote a letter", add_special_tokens=False).ids
    (golden, _) = read_goldens(Bundle(attention_bundle()))
    assert golden.tokens.tolist()[:20] == encoded[:20]
    assert golden_rows(byte_level().to_str(), SIZE, 96).note == ""
    save_checkpoint(tmp_path / "c", recurrent_model(), architecture="hybrid", tokenizer_json=None)
    assert run(["export", str(tmp_path / "c"), "-o", str(tmp_path / "out")]) == 0
    note = "goldens are random token ids and no text, for there is no tokenizer"
    printed = capsys.readouterr().out
    assert f"Note: {note}." in printed
    assert printed.splitlines()[-1] == f"Next: edgellm verify {tmp_path / 'out'}"  # a text would be refused
    assert run(["export", str(tmp_path / "c"), "-o", str(tmp_path / "out"), "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == [note]


def test_tokenizer_that_knows_no_english_is_told_too() -> None:
    silent = json.loads(byte_level().to_str())
    silent["normalizer"] = {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
    found = golden_rows(json.dumps(silent), SIZE, 96)
    assert found.note.endswith("the tokenizer makes no tokens of English sentences")
    assert all(0 <= token < SIZE for row in found.rows for token in row)


def spoiled(factor: float) -> Any:
    model: Any = attention_model()
    with torch.no_grad():
        model.norm.weight.mul_(factor)  # before the output's product
    return model


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (0.0, "PyTorch computes logits that are all 0, which choose nothing and prove nothing; train the model on"),
        (3e38, "PyTorch computes no finite logits at token 0 of a row; train the model on, or repair its weights"),
    ],
)
def test_logits_that_prove_nothing_are_one_sentence(tmp_path: Path, factor: float, message: str) -> None:
    with pytest.raises(ParityError, match=message):
        export(spoiled(factor), tmp_path / "out", text=TextAssets(tokenizer_json=byte_level().to_str()))
    only(tmp_path)


def test_logits_that_overflow_on_the_device_are_said_to_in_one_sentence(tmp_path: Path) -> None:
    bundle = Bundle(attention_bundle())
    session = open_session(bundle, threads=1)
    step = session.step

    def overflowing(*arguments: Any, **options: Any) -> Any:
        found = step(*arguments, **options).copy()
        found[:, 0] = float("inf")
        return found

    session.step = overflowing  # type: ignore[method-assign]
    found = verify(bundle, session)
    wrong, *others = (check for check in found.checks if not check.ok)
    assert (wrong.name, wrong.bound) == ("finite", 0.0)
    assert wrong.what.startswith("logits that are no finite numbers or all 0")
    assert {check.name for check in others} == bundle.manifest.bounds.keys()
    assert all(check.what.endswith(": no number came out") for check in others)
    session.step = lambda *arguments, **options: step(*arguments, **options) * 0  # type: ignore[method-assign]
    assert next(check.name for check in verify(bundle, session).checks if not check.ok) == "finite"
