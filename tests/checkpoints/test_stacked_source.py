"""A tensor of several matrices or modules is read as each of them, and nothing else of it is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edgellm.checkpoints.packed_source import PackedSource
from edgellm.checkpoints.stacked_source import StackedSource

TENSORS = {
    "a.experts.weight": torch.arange(24.0).reshape(2, 3, 4),
    "a.other.weight": torch.arange(24.0).reshape(2, 3, 4) + 100,
    "a.norm.weight": torch.arange(3.0),
}


class Source:
    """Tensors that say which rows were asked for."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.asked: list[tuple[str, tuple[int, int] | None]] = []

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        self.asked.append((name, rows))
        return TENSORS[name] if rows is None else TENSORS[name][rows[0] : rows[1]]


def test_each_matrix_has_a_name_and_is_read_by_itself() -> None:
    base = Source({name: tuple(tensor.shape) for name, tensor in TENSORS.items()})
    source = StackedSource(base, (".experts.weight",))
    assert source.shapes == {
        "a.experts.0.weight": (3, 4), "a.experts.1.weight": (3, 4), "a.other.weight": (2, 3, 4), "a.norm.weight": (3,),
    }  # fmt: skip
    assert torch.equal(source.read("a.experts.1.weight"), TENSORS["a.experts.weight"][1])
    assert torch.equal(source.read("a.experts.0.weight", (1, 3)), TENSORS["a.experts.weight"][0, 1:3])
    assert torch.equal(source.read("a.norm.weight", (1, 2)), TENSORS["a.norm.weight"][1:2])
    assert base.asked == [("a.experts.weight", (1, 2)), ("a.experts.weight", (0, 1)), ("a.norm.weight", (1, 2))]


def test_a_header_that_says_millions_of_matrices_is_not_believed() -> None:
    base = Source({"a.experts.weight": (10**9, 0, 4)})
    assert list(StackedSource(base, (".experts.weight",)).shapes) == ["a.experts.weight"]


def test_rows_of_several_modules_are_read_as_each_of_them() -> None:
    base = Source({"a.norm.weight": (3,), "a.other.weight": (2, 3, 4), "a.experts.weight": (2, 3, 4)})
    source = PackedSource(base, {"other": {"left": 1, "right": 1}, "experts": {"all": 3}})
    assert source.shapes == {
        "a.norm.weight": (3,), "a.left.weight": (1, 3, 4), "a.right.weight": (1, 3, 4), "a.experts.weight": (2, 3, 4),
    }  # fmt: skip
    assert torch.equal(source.read("a.right.weight"), TENSORS["a.other.weight"][1:])
    assert torch.equal(source.read("a.right.weight", (0, 1)), TENSORS["a.other.weight"][1:])
    assert torch.equal(source.read("a.norm.weight", (1, 2)), TENSORS["a.norm.weight"][1:2])
    assert base.asked == [("a.other.weight", (1, 2)), ("a.other.weight", (1, 2)), ("a.norm.weight", (1, 2))]
    assert source.code_format("a.left.weight") is None
