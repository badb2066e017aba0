"""The table of architectures in docs/models.md, generated: what each reads, its file's length, what its layers run on.

python -m edgellm.cli.models_document docs/models.md
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

__all__ = ["line", "with_table"]

_START, _END = "<!-- generated: python -m edgellm.cli.models_document -->\n", "<!-- end of what is generated -->\n"
# What carries a state from token to token in a graph of the target `cpu`, and is one kernel each.
_KERNELS = ("GroupQueryAttention", "LinearAttention", "LSTM", "GRU", "RNN")
_HEAD = """\
| architecture | what it is | Hugging Face types | GGUF types | lines | state | on `cpu` |
|---|---|---|---|---|---|---|
"""


def line(name: str) -> str:
    """An architecture's line, from the registry and a graph of its smallest preset.

    Args:
        name: in the registry.
    """
    from edgellm.models.registry import ENTRIES

    entry = ENTRIES[name]
    spec = importlib.util.find_spec(entry.module)
    assert spec is not None and spec.origin is not None
    length = len(Path(spec.origin).read_text(encoding="utf-8").splitlines())
    names = (", ".join(f"`{n}`" for n in kind) or "-" for kind in (entry.huggingface, entry.gguf))
    return f"| {' | '.join((f'`{name}`', entry.about, *names, str(length), *_layers(name)))} |\n"


def _layers(name: str) -> tuple[str, str]:
    """What a row's state does, and what the layers that carry it become on the target ``cpu``."""
    import torch

    from edgellm.models.registry import find
    from edgellm_exporters.graph.capture import capture
    from edgellm_exporters.graph.lower import lower_to, prepare
    from edgellm_exporters.graph.targets import find_target
    from edgellm_exporters.quantize.plan import Plan

    architecture, target = find(name), find_target("cpu")
    with torch.device("meta"):
        model: Any = architecture.build(architecture.presets["tiny"]).eval()
    updates = {spec.update for spec in model.state_specs()}
    grows = " and ".join(word for update, word in _STATES.items() if update in updates)
    nodes = lower_to(prepare(capture(model), target), target, Plan()).graph.all_nodes()
    found = {node.op_type for node in nodes}
    kernels = [kernel for kernel in _KERNELS if kernel in found]
    return grows or "none", ", ".join([*kernels, *(["a Scan"] if "Scan" in found else [])]) or "plain operators"


_STATES = {"append": "grows", "ring": "a window", "static": "of the first token", "replace": "of one size"}


def with_table(document: str) -> str:
    """A document with the table of every architecture of edgellm's own between its marks, as it is now."""
    from edgellm.models.registry import ENTRIES

    before, rest = document.split(_START)
    return f"{before}{_START}\n{_HEAD}{''.join(map(line, ENTRIES))}\n{_END}{rest.split(_END)[1]}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
