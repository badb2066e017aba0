"""docs/serving.md: its Python runs against a server, and its tables name what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from served import serving
from starlette.routing import Route
from tiny_bundles import attention_bundle, hidden_bundle

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_its_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    with serving({"tiny": hidden_bundle()}) as served:
        known: dict[str, Any] = {"address": served.address, "name": "tiny", "bundle": hidden_bundle()}
        for block in blocks:
            exec(compile(block, "docs/serving.md", "exec"), known)
            known["client"].close()
    assert {mount.path for mount in known["app"].routes} == {"/models"}
    known["anthropic"].close()
    assert capsys.readouterr().out


def test_its_table_has_every_route() -> None:
    with serving({"tiny": attention_bundle()}) as served:
        routes = [r for r in served.server.config.app.routes if isinstance(r, Route)]  # type: ignore[union-attr]
    for route in routes:
        path = route.path.replace("{model:path}", "NAME")
        assert f"{path}`" in PAGE or path == "/", path
