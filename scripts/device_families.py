"""Small models of every family on a device: each exported in float16, its checks run there.

    python scripts/device_families.py                      # on a machine with a GPU
    python scripts/device_families.py --target tensorrt    # engines, built there: needs TensorRT for that GPU
    python scripts/device_families.py --device cpu         # the same graphs on the CPU's kernels

Models, among them those that answer sources, are exported side by side, with float and with int4 weights. A line for
each says what ``verify`` found, and whether its steps are captured; the exit status is 1 if one does not hold.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from families import FAMILIES, make
from source_models import SOURCE_FAMILIES

from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import open_session
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.verify import verify

__all__ = ["main"]

_ANY = {"top1": 0.0}  # random weights have no favourite token among thousands


def build(family: str, method: str, folder: str, target: str, engines: bool) -> str:
    """Export one; what went wrong, or nothing."""
    import torch

    torch.set_num_threads(1)
    try:
        answers = family in SOURCE_FAMILIES
        export(
            SOURCE_FAMILIES[family]() if answers else make(family), folder,
            options=ExportOptions(
                target=target, dtype="float16", quantize=method, bounds=_ANY if answers else {},
                engine=EngineOptions(build=engines) if target == "tensorrt" else None,
            ),
        )  # fmt: skip
    except Exception as error:  # one family's fault must not cost the minutes of the others
        return f"not exported: {type(error).__name__}: {str(error)[:300]}"
    return ""


def check(folder: str, device: str) -> tuple[bool, str]:
    """Whether a bundle holds on a device, and what was found."""
    try:
        bundle = Bundle(folder)
        session = open_session(bundle, device=device)
        found = verify(bundle, session)
    except Exception as error:
        return False, f"{type(error).__name__}: {str(error)[:300]}"
    told = [c for c in found.checks if not c.ok] or [c for c in found.checks if c.name in ("logits", "kl", "state")]
    captures = getattr(session._backend, "captures", None)
    how = "" if captures is None else ", captured" if captures else ", not captured"
    return found.ok, "; ".join(f"{c.name} {c.value:.3g} (bound {c.bound:.3g})" for c in told) + how


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=("cuda", "tensorrt"), default="cuda")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto: the target's")
    parser.add_argument("--minutes", type=float, default=3.0, help="after which no further one is checked")
    parser.add_argument(
        "families", nargs="*", help="of those in tests/families.py and tests/source_models.py; all where none is named"
    )
    given = parser.parse_args(arguments)
    names, end = given.families or [*FAMILIES, *SOURCE_FAMILIES], time.monotonic() + 60 * given.minutes
    good = every = 0
    workers = max(1, (os.cpu_count() or 1) - 2)
    with (
        tempfile.TemporaryDirectory() as root,
        ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        rows = [(name, method, f"{root}/{i}-{method}") for method in ("none", "int4") for i, name in enumerate(names)]
        made = [pool.submit(build, *row, given.target, given.device != "cpu") for row in rows]
        for (name, method, folder), future in zip(rows, made, strict=True):
            if time.monotonic() > end:
                print(f"{name} {method}: out of time", flush=True)
                future.cancel()
                continue
            wrong = future.result()
            ok, what = (False, wrong) if wrong else check(folder, given.device)
            good, every = good + ok, every + 1
            print(f"{name} {method}: {'holds' if ok else 'DOES NOT HOLD'}: {what}", flush=True)
    where = given.target if given.device == "auto" else "cpu"
    print(f"{good} of {every} hold on {where}; {len(rows) - every} were not checked")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
