"""What must stay true of the whole tree: what an import costs, what is public, who knows whom, what is shipped."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgellm_runtime
from edgellm.models import registry

REPOSITORY = Path(__file__).parents[2]
PACKAGES = {
    "edgellm": REPOSITORY / "edgellm",
    "edgellm_exporters": REPOSITORY / "exporters/edgellm_exporters",
    "edgellm_runtime": REPOSITORY / "runtime/edgellm_runtime",
}
HEAVY = {"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "transformers", "tokenizers", "jinja2", "edgellm",
         "edgellm_exporters"}  # fmt: skip
FAMILIES = {"llama", "mistral", "qwen", "gemma", "phi", "falcon", "mamba", "rwkv", "gpt2", "gptneox", "smollm", "bloom"}
ELSEWHERE = {"edgellm.harness": "lm_eval"}  # modules that need an extra which the tests' environment need not have
LIMIT = 400  # lines in a file
SKIPPED = {".git", "runs", "build", "dist", "__pycache__", ".hypothesis"}


FAMILY_LIMIT = 150  # lines that half of the families' files stay under


def sources(*packages: str) -> list[Path]:
    found = [path for package in packages for path in sorted(PACKAGES[package].rglob("*.py"))]
    assert len(found) > 10
    return found


def in_a_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_runtime_is_light_and_quick() -> None:
    code = (
        "import sys, time; start = time.process_time(); import edgellm_runtime\n"
        f"print(time.process_time() - start, *sorted({HEAVY!r} & sys.modules.keys()))"
    )
    runs = [in_a_process(code).split() for _ in range(3)]
    assert [loaded for _, *loaded in runs] == [[], [], []]
    assert min(float(seconds) for seconds, *_ in runs) < 1.0


def test_importing_edgellm_is_light() -> None:
    code = f"import sys, edgellm, edgellm.cli; print(*sorted({HEAVY - {'edgellm'}!r} & sys.modules.keys()))"
    assert in_a_process(code).split() == []


def test_importing_sets_no_environment_and_no_logger() -> None:
    code = (
        "import os, logging; before = dict(os.environ), list(logging.root.handlers)\n"
        "import edgellm_runtime, edgellm.cli, edgellm.models.registry, edgellm_exporters.export\n"
        "after = {k: v for k, v in os.environ.items() if not k.startswith(('KMP_', 'TORCH'))}\n"
        "assert after == {k: v for k, v in before[0].items() if k in after}, after.keys() - before[0].keys()\n"
        "assert logging.root.handlers == before[1]"
    )
    in_a_process(code)


def test_public_names_are_those_the_readme_lists() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    listed = re.search(r"public\s+names\s+of\s+`edgellm_runtime`\s+are\s+(.*?)\.\n", readme, re.DOTALL)
    assert listed, "README.md no longer lists the public names of edgellm_runtime"
    assert sorted(re.findall(r"`(\w+)`", listed[1])) == sorted(edgellm_runtime.__all__)


def test_every_public_name_is_there_and_described() -> None:
    for path in sources(*PACKAGES):
        root = PACKAGES[next(p for p, folder in PACKAGES.items() if path.is_relative_to(folder))].parent
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if name in ELSEWHERE and importlib.util.find_spec(ELSEWHERE[name]) is None:
            continue
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            value = getattr(module, public)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert inspect.getdoc(value), f"{name}.{public} has no docstring"


def names_in(path: Path) -> Iterator[tuple[int, str]]:
    """Imports and string constants of a file, docstrings left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {id(n.body[0].value) for n in ast.walk(tree)
                  if isinstance(n, documented) and n.body and isinstance(n.body[0], ast.Expr)}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", "") or ""
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def test_exporters_and_runtime_name_no_architecture() -> None:
    ours = set(registry.ENTRIES)
    foreign = {name for entry in registry.ENTRIES.values() for name in (*entry.huggingface, *entry.gguf)}
    assert {"hybrid", "decoder"} <= ours
    assert "llama" in foreign
    word = re.compile(rf"(?<![a-z])({'|'.join(sorted(ours | foreign | FAMILIES))})(?![a-z])", re.IGNORECASE)
    found = [
        f"{path.relative_to(REPOSITORY)}:{line}: {text!r}"
        for path in sources("edgellm_exporters", "edgellm_runtime")
        for line, text in names_in(path)
        if word.search(text) and not text.startswith("tokenizers.")
    ]
    assert not found, "what differs between architectures is a StateSpec or an op, never a name:\n" + "\n".join(found)


def test_imports_point_one_way() -> None:
    program = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([program, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_file_has_outgrown_its_purpose() -> None:
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*PACKAGES)}
    assert not {str(p.relative_to(REPOSITORY)): n for p, n in sizes.items() if n > LIMIT}
    assert not [path for path in sizes if path.stem in {"utils", "helpers", "misc", "common"}]


def test_no_file_knows_a_machine() -> None:
    # in pieces, so that this file does not find itself
    places = re.compile(
        "|".join(["/" + "work/", "/" + "root/", "/" + r"home/\w", "/" + "Users/[a-z]+/", "/opt/" + "pypi"])
    )
    ends = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".cfg", ".json", ".sh", ""}
    found = []
    for path in sorted(REPOSITORY.rglob("*")):
        parts = path.relative_to(REPOSITORY).parts
        if SKIPPED & set(parts) or any(p.endswith("_cache") or p.startswith(".venv") for p in parts):
            continue
        if path.is_file() and path.suffix in ends and path.stat().st_size < 1 << 20:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            found += [f"{path.relative_to(REPOSITORY)}:{i}" for i, line in enumerate(lines, 1) if places.search(line)]
    assert not found


@pytest.mark.wheel
@pytest.mark.slow
def test_wheel_holds_exactly_the_three_packages(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(REPOSITORY)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)
    files = ((n, p) for n in PACKAGES for ends in ("*.py", "*.html", "*.json") for p in PACKAGES[n].rglob(ends))
    shipped = {str(p.relative_to(PACKAGES[n].parent)) for n, p in files}
    shipped |= {f"{n}/py.typed" for n in PACKAGES} | {"edgellm_runtime/server/page.html"}
    assert names - metadata == shipped


def test_half_of_the_families_files_are_short() -> None:
    folder = PACKAGES["edgellm"] / "models"
    models = [folder / f"{entry.module.rpartition('.')[2]}.py" for entry in registry.ENTRIES.values()]
    beside = [path for model in models if (path := model.with_name(f"{model.stem}_files.py")).exists()]
    assert len(beside) > 10
    for files in (models, models + beside):
        assert statistics.median(len(path.read_text(encoding="utf-8").splitlines()) for path in files) < FAMILY_LIMIT


def test_what_reads_a_familys_files_knows_no_model() -> None:
    for path in (PACKAGES["edgellm"] / "models").glob("*_files.py"):
        model = path.stem.removesuffix("_files")
        assert not re.search(rf"\bedgellm\.models\.{model}\b", path.read_text(encoding="utf-8")), path
