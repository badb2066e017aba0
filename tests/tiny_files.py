"""A bundle's files changed by hand; nothing here needs PyTorch."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any


def copied(bundle: Path, folder: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(bundle, folder / "bundle"))


def edit_manifest(bundle: Path, **changes: Any) -> None:
    file = bundle / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def sign(bundle: Path, *names: str) -> None:
    """Make the manifest say what the files now are, as someone who means harm would."""
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    for name in names:
        data = (bundle / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    file.write_text(json.dumps(manifest))
