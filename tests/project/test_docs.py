"""The documents do what they say: their commands run, their links lead somewhere, their tables name what there is.

A code block in README.md, CONTRIBUTING.md or docs/ that has ``<!-- tested -->`` on the line above is run, in order, in
one empty folder with a copy of the data; one that is not says why: ``<!-- not tested: reason -->``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgellm.models import registry
from edgellm.models.decoder import Decoder, DecoderConfig
from edgellm.models.protocol import LanguageModel
from edgellm.ops import schema
from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.graph.capture import capture
from edgellm_exporters.graph.lower import prepare
from edgellm_exporters.graph.targets import TARGETS
from edgellm_exporters.lowering.context import Lowering
from edgellm_exporters.quantize.methods import METHODS

REPOSITORY = Path(__file__).parents[2]
README = REPOSITORY / "README.md"
DOCUMENTS = [
    *(REPOSITORY / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")),
    *sorted(REPOSITORY.glob("docs/*.md")),
]
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)
# The documents' commands are for people; the tests take the same ones with less work.
LESS_WORK = {
    "edgellm train": "--steps 3 --batch-size 2 --context 32 --vocab-size 300 --device cpu",
    "edgellm generate": "--max-new-tokens 8 --seed 0",
    "edgellm bench": "--prompt-tokens 16 --new-tokens 8 --rounds 1",
}


def blocks(document: Path) -> Iterator[tuple[str, str, str]]:
    """Mark, language and code of each block."""
    for found in BLOCK.finditer(document.read_text(encoding="utf-8")):
        yield found["mark"] or "", found["language"], found["code"]


def with_less_work(code: str) -> str:
    lines = []
    for line in code.splitlines():
        extra = [options for command, options in LESS_WORK.items() if line.startswith(command)]
        lines.append(" ".join([line, *extra]))
    return "\n".join(lines)


@pytest.mark.parametrize("document", [README, REPOSITORY / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_every_block_is_tested_or_says_why_not(document: Path) -> None:
    for mark, language, code in blocks(document):
        assert mark.startswith(("tested", "not tested: ")), f"{language} block without a mark:\n{code}"


@pytest.mark.slow
def test_readme_runs_from_top_to_bottom(tmp_path: Path) -> None:
    data = tmp_path / "examples/data"
    data.mkdir(parents=True)
    text = (REPOSITORY / "examples/data/tinyshakespeare.txt").read_text(encoding="utf-8")
    (data / "tinyshakespeare.txt").write_text(text[:100_000], encoding="utf-8")
    here = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ran = []
    for mark, language, code in blocks(README):
        if mark != "tested":
            continue
        program = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-W", "error", "-c"]
        done = subprocess.run(
            [*program, with_less_work(code)], cwd=tmp_path, env=here, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip()
        ran.append(language)
    assert ran == ["sh", "python"]
    assert (tmp_path / "runs/shakespeare-int8/manifest.json").is_file()


def test_less_work_is_of_commands_that_the_readme_has() -> None:
    (commands,) = (code for mark, language, code in blocks(README) if mark == "tested" and language == "sh")
    lines = commands.splitlines()
    assert [shlex.split(line)[:2] for line in lines] == [
        ["edgellm", c] for c in ("train", "export", "verify", "generate", "bench")
    ]
    assert all(any(line.startswith(command) for line in lines) for command in LESS_WORK)


def test_the_model_in_contributing_is_one_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (code for mark, _, code in blocks(REPOSITORY / "CONTRIBUTING.md") if mark == "tested: model")
    (tmp_path / "echo.py").write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("echo", tmp_path / "echo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "echo", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setitem(registry.ENTRIES, "echo", registry.Entry(module="echo", about="GRU", presets=("tiny",)))
    architecture = registry.find("echo")
    torch.manual_seed(0)
    model = architecture.build(architecture.config(vocab_size=50, width=32, max_context=64)).eval()
    assert isinstance(model, LanguageModel)
    for quantize in ("none", "int8"):
        assert export(model, tmp_path / quantize, options=ExportOptions(quantize=quantize)).verification.ok
    assert architecture.config.from_json(model.config.to_json()) == model.config


def test_the_op_in_contributing_is_one_with_and_without_its_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {mark: code for mark, _, code in blocks(REPOSITORY / "CONTRIBUTING.md")}
    module = ModuleType("soft_cap")
    monkeypatch.setitem(sys.modules, "soft_cap", module)
    (tmp_path / "soft_cap.py").write_text(found["tested: op"], encoding="utf-8")
    exec(compile(found["tested: op"], str(tmp_path / "soft_cap.py"), "exec"), module.__dict__)
    lowering = ModuleType("lowering")
    lowering.__dict__.update(Lowering=Lowering, View=schema.View, Sequence=Sequence, ir=ir, np=np)
    exec("from __future__ import annotations\n" + found["tested: rule"], lowering.__dict__)
    try:
        torch.manual_seed(0)
        model = Decoder(DecoderConfig(vocab_size=50, width=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16,
                                      mlp_width=32, max_context=32)).eval()  # fmt: skip
        model.norm.register_forward_hook(lambda layer, inputs, y: module.soft_cap(y, cap=0.5))
        for rules in ({}, {"SoftCap": lowering.soft_cap}):
            target = dataclasses.replace(TARGETS["cpu"], rules={**TARGETS["cpu"].rules, **rules})
            monkeypatch.setitem(TARGETS, "cpu", target)
            graph = prepare(capture(model), target)
            assert [node.op_type for node in graph.graph].count("SoftCap") == len(rules)
            assert export(model, tmp_path / f"b{len(rules)}").verification.ok
    finally:
        schema.OPS.pop("SoftCap", None)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def test_files_that_the_code_refers_to_exist() -> None:
    named = {
        name
        for root in ("edgellm", "exporters", "runtime")
        for path in (REPOSITORY / root).rglob("*.py")
        for name in re.findall(r"(?<![/\w])docs/[\w-]+\.md", path.read_text(encoding="utf-8"))
    }
    assert "docs/cli.md" in named
    assert not [name for name in sorted(named) if not (REPOSITORY / name).is_file()]


def test_tables_name_everything_there_is() -> None:
    text = README.read_text(encoding="utf-8")
    names = {*TARGETS, *METHODS, *(dtype for target in TARGETS.values() for dtype in target.dtypes)}
    for name, entry in registry.ENTRIES.items():
        names |= {name, *entry.huggingface, *entry.gguf}
    rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    assert not sorted(name for name in names if f"`{name}`" not in rows)


def test_each_published_weakness_in_the_table_has_a_test_that_names_it() -> None:
    """And each that a test names is in the table."""
    numbers = re.compile(r"CVE-\d{4}-\d+")
    table, _, rest = (REPOSITORY / "docs/security.md").read_text().partition("Does not arise")
    tests = [path.read_text() for path in sorted(REPOSITORY.glob("tests/*/test_public_weaknesses*.py"))]
    assert len(tests) == 2
    named = "\n".join(tests).replace("cve_", "CVE-")
    named = re.sub(r"(CVE-\d{4})_", r"\1-", named)
    assert set(numbers.findall(table)) == set(numbers.findall(named))
    assert rest


def test_make_has_every_command_that_documents_name() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = {
        name for document in DOCUMENTS
        for name in re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(encoding="utf-8"), re.MULTILINE)
    }  # fmt: skip
    assert {"demo", "test"} <= named <= targets
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    assert set(phony[1].split()) == targets


def test_ci_runs_the_command_of_the_readme() -> None:
    script = (REPOSITORY / ".ci/run").read_text(encoding="utf-8")
    assert "\nmake test " in script
    assert "\nmake test\n" in README.read_text(encoding="utf-8")
    assert os.access(REPOSITORY / ".ci/run", os.X_OK)
