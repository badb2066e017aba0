"""The search for formats goes by what they take here, and by what was recorded where it is to come out the same."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import click
import pytest

from edgellm.cli.budget import with_rates
from edgellm_exporters.auto.budget import Budget
from edgellm_exporters.auto.formats import MEASURED, FormatChoices, decode_ns
from edgellm_exporters.auto.rates import Rates, measured_rates, read_rates
from edgellm_exporters.auto.search import search, table_of
from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.quantize.plan import Scheme
from edgellm_runtime.backends.kernel_test import KernelForm
from edgellm_runtime.backends.product_rates import product_rates

EIGHT, FOUR = Scheme(8, 32), Scheme(4, 32, symmetric=False)
WEIGHT = FormatChoices("w", (128, 64), (EIGHT, FOUR))
QUICK_EIGHT = Rates({"8:32": 0.01, "4:32": 0.05}, "a processor of its own kind")


def test_the_quickest_format_here_is_taken_and_not_that_of_the_table() -> None:
    kl = {"w": {EIGHT: 0.001, FOUR: 0.001}}
    chosen = [search(table_of([WEIGHT], kl, "decode", rates), 1.0) for rates in (None, QUICK_EIGHT)]
    assert [choice.schemes["w"] for choice in chosen if choice is not None] == [FOUR, EIGHT]


def test_a_format_that_was_not_measured_is_modelled() -> None:
    other = Scheme(4, 16, symmetric=False)
    assert decode_ns(WEIGHT, other, QUICK_EIGHT) == decode_ns(WEIGHT, other)
    assert decode_ns(WEIGHT, EIGHT, QUICK_EIGHT) == 128 * 64 * 0.01
    assert decode_ns(dataclasses.replace(WEIGHT, role="table"), EIGHT, QUICK_EIGHT) == 0


def test_every_format_of_products_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGELLM_KERNELS", raising=False)
    monkeypatch.setattr("edgellm_runtime.backends.product_rates._CACHE_BYTES", 1 << 10)
    found = measured_rates(MEASURED)
    assert all(rate is not None and 0 < rate < 1000 for rate in map(found.of, MEASURED))
    assert found.kernels.startswith("onnxruntime ")


def test_of_several_rounds_the_quickest_counts_and_time_ends_them() -> None:
    """A clock that gives a second a look: after the fewest rounds there is no other."""
    seconds = itertools.count()
    looks: list[int] = []

    def clock() -> float:
        looks.append(next(seconds))
        return float(looks[-1])

    form = KernelForm("MatMulNBits", 4, 32, 4, zeros=True)
    found = product_rates([form], threads=1, clock=clock)
    assert found == {form: pytest.approx(1e9 / (2560 * 1536))}
    assert len(looks) == 1 + 3 * 2 + 1


def test_recorded_rates_are_read_from_a_manifest(tmp_path: Path) -> None:
    rates = {"decode": {"8:32": 0.01, "4:32": 0.05}, "kernels": "a processor of its own kind"}
    whole, alone = tmp_path / "manifest.json", tmp_path / "rates.json"
    whole.write_text(json.dumps({"quantization": {"budget": {"max_kl": 0.02, "rates": rates}}}))
    alone.write_text(json.dumps(rates))
    assert read_rates(whole) == read_rates(alone) == QUICK_EIGHT
    assert with_rates(Budget(), str(whole), "cpu") == Budget(rates=QUICK_EIGHT)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"decode": {"8:32": -1}, "kernels": ""}', '{"decode": 3, "kernels": ""}']
)
def test_a_file_without_rates_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (file := tmp_path / "rates.json").write_text(text)
    with pytest.raises(QuantizeError, match=r"rates\.json"):
        read_rates(file)


def test_rates_are_for_a_search_that_goes_by_the_time_of_a_token() -> None:
    assert with_rates(Budget(prefer="size"), None, "cpu") == Budget(prefer="size")
    assert with_rates(Budget(), "table", "cpu") == with_rates(Budget(), None, "onnx") == Budget()
    for budget in (None, Budget(prefer="quality")):
        with pytest.raises(click.UsageError, match="--prefer decode"):
            with_rates(budget, "table", "cpu")
