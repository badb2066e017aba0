"""What an operator's form may ask of the graph that is being made: a translation's face, without its walk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import onnx_ir as ir
import torch

from edgellm_exporters.errors import CaptureError

__all__ = ["Making"]


class Making(Protocol):
    """Followed by :class:`edgellm_exporters.graph.translate.Translation`, which says what each does."""

    values: dict[torch.fx.Node, Any]

    def op(self, kind: str, *inputs: ir.Value | None, like: Any = None, **attributes: Any) -> ir.Value: ...

    def ops(self, kind: str, *inputs: ir.Value | None, like: Sequence[Any], **attributes: Any) -> list[ir.Value]: ...

    def constant(self, content: Any) -> ir.Value: ...

    def integers(self, *numbers: int) -> ir.Value: ...

    def vector(self, sizes: Sequence[Any]) -> ir.Value: ...

    def value(self, given: Any) -> ir.Value: ...

    def fresh(self) -> str: ...

    def refuse(self, node: torch.fx.Node, what: str) -> CaptureError: ...

    def branch(self, graph: torch.fx.Graph, inputs: Sequence[Any]) -> tuple[list[ir.Node], list[ir.Value]]: ...

    def inline(self, graph: torch.fx.Graph, inputs: Sequence[Any]) -> list[Any]: ...
