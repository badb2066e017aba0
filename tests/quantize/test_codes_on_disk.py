"""Codes that are read in several passes are computed once, and are the same each time."""

from __future__ import annotations

import resource
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm_exporters.quantize import plan
from edgellm_exporters.quantize.codes_on_disk import ChosenCodes, CodesOnDisk
from edgellm_exporters.quantize.plan import Codes, Scheme, pack, unpack
from edgellm_exporters.quantize.rtn import round_to_nearest

SCHEMES = [
    Scheme(2), Scheme(4, symmetric=False), Scheme(4, 64, symmetric=False, shifted=True), Scheme(8), Scheme(8, 0),
    Scheme(8, 0, floating=True),
]  # fmt: skip


def _codes(scheme: Scheme) -> Codes:
    return round_to_nearest(np.random.default_rng(0).standard_normal((1024, 320), dtype=np.float32), scheme)


def _never() -> Codes:
    raise AssertionError("codes that are kept are not computed again")


def _same(a: Codes, b: Codes) -> bool:
    arrays = all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("codes", "scales", "zeros"))
    return arrays and (a.columns, a.floating) == (b.columns, b.floating)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_kept_codes_are_those_that_were_computed(scheme: Scheme, tmp_path: Path) -> None:
    kept, codes = CodesOnDisk(tmp_path), _codes(scheme)
    for key in ("first", "second"):
        assert kept.get(key, scheme.bits, lambda: codes) is codes
    assert _same(kept.get("first", scheme.bits, _never), codes)
    some = kept.get("first", scheme.bits, _never, (300, 517))
    assert _same(some, codes.of_rows(300, 517))
    assert list(tmp_path.iterdir()) == []  # a file without a name, which no bundle can hold


def test_a_few_rows_are_computed_each_time(tmp_path: Path) -> None:
    kept, asked = CodesOnDisk(tmp_path), list[int]()
    few = round_to_nearest(np.ones((2, 64), dtype=np.float32), Scheme(4))
    for _ in range(2):
        kept.get("rows", 4, lambda: asked.append(1) or few)  # type: ignore[func-returns-value]
    assert len(asked) == 2


def test_a_full_disk_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    kept, codes, asked = CodesOnDisk(tmp_path), _codes(Scheme(4)), list[int]()
    for _ in range(2):
        assert kept.get("all", 4, lambda: asked.append(1) or codes) is codes  # type: ignore[func-returns-value]
    assert len(asked) == 2


@contextmanager
def room_for(nbytes: int) -> Iterator[None]:
    """No file of this process grows beyond that meanwhile, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_was_kept_before_the_disk_was_full_is_read_again_and_the_rest_is_held(tmp_path: Path) -> None:
    """The last bytes of the second weight are what there is no room for."""
    codes = {name: _codes(Scheme(4)) for name in ("first", "second", "third")}
    nbytes = sum(part.nbytes for part in (pack(codes["first"].codes, 4), codes["first"].scales, codes["first"].zeros))
    kept = ChosenCodes(tmp_path)
    with room_for(2 * nbytes - 10):
        for name, each in codes.items():
            kept.add(name, [each], 4)
        assert [kept._disk.has((name, 0)) for name in codes] == [True, False, False]
        assert all(_same(kept[name], each) for name, each in codes.items())
        assert all(_same(kept.rows(name, 5, 9), each.of_rows(5, 9)) for name, each in codes.items())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [1, 7, 64])
def test_unpacked_codes_are_those_that_were_packed(bits: int, columns: int) -> None:
    codes = np.random.default_rng(1).integers(0, 2**bits, (3, columns), dtype=np.uint8)
    assert np.array_equal(unpack(pack(codes, bits), bits, columns), codes)


@pytest.mark.parametrize("bits", [2, 4])
def test_packing_takes_little_memory_besides_what_it_gives(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_PACKED_BYTES", 1 << 14)
    codes = np.random.default_rng(0).integers(0, 1 << bits, (2048, 512), dtype=np.uint8)
    tracemalloc.start()
    try:
        packed = pack(codes, bits)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(unpack(packed, bits, codes.shape[1]), codes)
    assert packed.nbytes < peak < packed.nbytes + codes.nbytes / 10
