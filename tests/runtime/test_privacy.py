"""No telemetry and no network: nothing that edgellm starts writes an id, opens a socket or looks for a host."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tiny_bundles import attention_bundle, attention_model, text_assets

from edgellm.checkpoints import save_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
VARIABLE = "ORT_DISABLE_TELEMETRY"
WATCH = """
    import sys

    def watch(event, arguments):
        if event.startswith("socket."):
            print(event, arguments, file=sys.stderr)

    sys.addaudithook(watch)
"""


def at_home(home: Path, code: str, **environment: str) -> str:
    """What a program prints, and what it writes on standard error, under a fresh home directory."""
    inherited = {k: v for k, v in os.environ.items() if k not in (VARIABLE, "XDG_CACHE_HOME", "EDGELLM_CACHE_DIR")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WATCH) + textwrap.dedent(code)], capture_output=True, text=True,
        check=False, env=inherited | {"HOME": str(home)} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "socket." not in done.stderr
    return done.stdout


def test_running_a_bundle_writes_nothing_into_a_fresh_home_and_opens_no_socket(tmp_path: Path) -> None:
    bundle = str(attention_bundle())
    printed = at_home(tmp_path, f"""
        import os
        from edgellm.cli import run
        assert run(["generate", {bundle!r}, "one", "--max-new-tokens", "2"]) == 0
        assert run(["verify", {bundle!r}]) == 0
        assert run(["bench", {bundle!r}, "--prompt-tokens", "4", "--new-tokens", "4", "--rounds", "1"]) == 0
        print(os.environ[{VARIABLE!r}])
    """)  # fmt: skip
    assert printed.endswith("1\n")
    assert list(tmp_path.rglob("*")) == []


def test_exporting_leaves_no_device_id_and_opens_no_socket(tmp_path: Path) -> None:
    checkpoint, home = tmp_path / "checkpoint", tmp_path / "home"
    home.mkdir()
    save_checkpoint(
        checkpoint, attention_model(), architecture="decoder", tokenizer_json=text_assets().tokenizer_json,
        eos_token_ids=(0,),
    )  # fmt: skip
    at_home(home, f"""
        from edgellm.cli import run
        assert run(["export", {str(checkpoint)!r}, "-o", {str(tmp_path / "bundle")!r}, "--target", "onnx"]) == 0
    """)  # fmt: skip
    assert [p for p in home.rglob("*") if "Microsoft" in p.parts or "onnxruntime" in p.name] == []


def test_what_the_user_has_set_is_kept(tmp_path: Path) -> None:
    code = f"""
        import os
        from edgellm_runtime.backends.ort import library
        library()
        print(os.environ[{VARIABLE!r}])
    """
    assert at_home(tmp_path, code, **{VARIABLE: "0"}) == "0\n"
    assert at_home(tmp_path, code) == "1\n"


@pytest.mark.parametrize("root", ["edgellm", "exporters", "runtime", "scripts", "examples"])
def test_onnxruntime_is_imported_in_one_place(root: str) -> None:
    def imports(file: Path) -> bool:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "onnxruntime" for name in names):
                return True
        return False

    found = [str(f.relative_to(REPOSITORY)) for f in (REPOSITORY / root).rglob("*.py") if imports(f)]
    assert found == (["runtime/edgellm_runtime/backends/ort.py"] if root == "runtime" else [])
