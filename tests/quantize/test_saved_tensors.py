"""What autograd saves is out of memory between forward and backward, and gradients have the same bits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, make
from torch import Tensor, nn

from edgellm import streaming
from edgellm.streaming import OwnWeights, resident
from edgellm_exporters.auto import saved_tensors
from edgellm_exporters.auto.fisher import Gathered, Record, _backward, _recording, gather
from edgellm_exporters.auto.saved_tensors import SavedTensors
from edgellm_exporters.quantize.tuning.layer_stream import shell_of
from edgellm_exporters.weights.scratch_file import ScratchFile

WINDOWS = torch.randint(0, VOCAB, (3, 24), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_tensors, "_LEAST", 1)
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 4096)  # the vocabulary's tables are read by rows


class Held:
    """Records in memory."""

    def __init__(self) -> None:
        self.parts: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, name: str, first: Tensor, second: Tensor) -> None:
        self.parts.setdefault(name, []).append((first, second))


def gathered_in_memory(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The reference: autograd as it is, records as they come."""
    products, lookups, generator = Held(), Held(), torch.Generator().manual_seed(0)
    with _recording(model, products, lookups):  # type: ignore[arg-type]
        for window in WINDOWS:
            _backward(model, window, generator)
    found = [(name, parts) for held in (products, lookups) for name, parts in held.parts.items()]
    return {
        f"{number}:{name}": (torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts]))
        for number, (name, parts) in enumerate(found)
    }


def all_of(found: Gathered) -> dict[str, tuple[Tensor, Tensor]]:
    every = [(name, record) for records in (found.products, found.lookups) for name, record in records.items()]
    return {f"{number}:{name}": (record.read(), record.gradients()) for number, (name, record) in enumerate(every)}


class Counted:
    """Weights that count how often each is read."""

    def __init__(self, model: nn.Module) -> None:
        self._weights, self.reads = OwnWeights(model), Counter[str]()

    def read(self, name: str) -> Tensor:
        self.reads[name] += 1
        return self._weights.read(name).clone()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        self.reads[f"{name} by rows"] += 1
        return self._weights.rows(name, start, stop).clone()


@pytest.mark.parametrize("family", ["decoder", "decoder untied with biases", "mixed"])
def test_gradients_with_all_of_it_out_of_memory_have_the_bits_of_those_with_it_in_memory(
    family: str, tmp_path: Path
) -> None:
    model = make(family)
    expected = gathered_in_memory(model)
    found = all_of(gather(model, OwnWeights(model), WINDOWS, tmp_path))
    assert expected.keys() == found.keys() and len(found) > 4
    for name, pair in expected.items():
        for one, other in zip(pair, found[name], strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert not list(tmp_path.iterdir())  # the files have no names


@pytest.mark.parametrize("family", ["decoder", "decoder untied with biases"])
def test_a_model_that_reads_its_weights_reads_them_again_for_the_gradient_and_keeps_none(
    family: str, tmp_path: Path
) -> None:
    model: Any = make(family)
    shell, weights = shell_of(model), Counted(model)
    saved, kept = SavedTensors(shell, weights, tmp_path), list[Tensor]()
    pack = saved._pack

    def noted(tensor: Tensor) -> Any:
        again = pack(tensor)
        held = [cell.cell_contents for cell in getattr(again, "__closure__", None) or ()]
        kept.extend(each for each in held if isinstance(each, Tensor))
        torch.testing.assert_close(again(), tensor, rtol=0, atol=0)
        assert again().stride() == tensor.stride()
        return again

    saved._pack = noted  # type: ignore[method-assign]
    with resident(shell, saved), saved.out_of_memory(), torch.enable_grad():
        hidden = torch.randn(1, 5, 96, requires_grad=True, generator=torch.Generator().manual_seed(1))
        y = shell.layers[0].mlp(hidden)
        before = weights.reads.copy()
        (gradient,) = torch.autograd.grad(y.square().sum(), hidden)
    wanted = torch.autograd.grad(model.layers[0].mlp(hidden).square().sum(), hidden)[0]
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=0)
    matrices = [name for name in weights.reads if name.startswith("layers.0.mlp.") and name.endswith("proj.weight")]
    assert len(matrices) == 3
    assert all(weights.reads[name] > before[name] for name in matrices)
    assert not any(tensor.numel() >= 96 * 160 for tensor in kept)


def test_it_costs_no_reading_to_ask_whether_something_was_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("decoder")
    reads, read = list[Any](), ScratchFile._read
    monkeypatch.setattr(ScratchFile, "_read", lambda *given: reads.append(given) or read(*given))
    found = gather(model, OwnWeights(model), WINDOWS, tmp_path)
    reads.clear()
    assert "layers.0.mlp.up_proj.weight" in found.products and "layers.0.mlp.up_proj.weight" not in found.lookups
    assert not reads
    found.products["layers.0.mlp.up_proj.weight"].read()
    assert len(reads) == len(WINDOWS)


def test_gradients_of_some_columns_are_those_of_all(tmp_path: Path) -> None:
    record, given = Record(ScratchFile(tmp_path)), torch.randn(9, 7).bfloat16()
    for some in (slice(0, 4), slice(4, 9)):
        record.add(torch.arange(9)[some], given[some])
    assert torch.equal(record.read(), torch.arange(9)) and torch.equal(record.gradients(), given)
    assert torch.equal(record.gradients((2, 5)), given[:, 2:5])


def test_rows_are_read_alone_even_where_an_axis_of_one_has_any_stride(tmp_path: Path) -> None:
    numbers = torch.arange(9.0).view(1, 9).T
    assert numbers.is_contiguous() and numbers.stride() == (1, 9)
    for tensor in (numbers, torch.arange(18).view(9, 2)):
        read = ScratchFile(tmp_path).write(tensor)
        assert read is not None
        assert torch.equal(read(), tensor) and torch.equal(read((2, 5)), tensor[2:5])


def test_what_lies_in_another_order_comes_back_as_it_lay_and_what_does_not_lie_is_refused(tmp_path: Path) -> None:
    file = ScratchFile(tmp_path)
    some = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(2))
    for tensor in (some, some.transpose(0, 2), some.permute(1, 2, 0), some.to(torch.bfloat16), torch.zeros(0, 3)):
        read = file.write(tensor)
        assert read is not None
        again = read()
        assert (again.dtype, again.stride()) == (tensor.dtype, tensor.stride()) or not tensor.numel()
        torch.testing.assert_close(again, tensor, rtol=0, atol=0)
    assert file.write(torch.ones(3, 1).expand(3, 4)) is None
    assert file.write(some[:, ::2]) is None


def test_a_file_holds_one_windows_tensors_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = make("decoder"), list[int]()
    clear = ScratchFile.clear

    def noted(file: ScratchFile) -> None:
        sizes.append(file._end)
        clear(file)
        assert file._end == 0

    monkeypatch.setattr(ScratchFile, "clear", noted)
    gather(model, OwnWeights(model), WINDOWS, tmp_path)
    assert len(sizes) == len(WINDOWS) and len(set(sizes)) == 1 and sizes[0] > 0


def test_a_product_with_a_table_by_rows_has_the_gradients_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own product is the reference; the table is read once forward and once backward."""
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 4 * 16 * 5)
    torch.manual_seed(0)
    table, bias, x, gradient = (torch.randn(*shape) for shape in ((23, 16), (23,), (2, 3, 16), (2, 3, 23)))
    read: list[tuple[int, int]] = []

    def rows(start: int, stop: int) -> torch.Tensor:
        read.append((start, stop))
        return table[start:stop]

    parted, whole = (x.clone().requires_grad_() for _ in range(2))
    found, expected = streaming._product(rows, parted, table, bias), torch.nn.functional.linear(whole, table, bias)
    torch.testing.assert_close(found, expected)
    found.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(parted.grad, whole.grad)
    assert read[:5] == [(0, 5), (5, 10), (10, 15), (15, 20), (20, 23)] and read[5:] == read[4::-1]
