"""Everything that needs a GPU, in a few minutes: is it right, is it fast, does anything cross the bus that should not.

    python scripts/gpu_check.py                      # on a machine with a GPU; `make gpu-check` adds --write
    python scripts/gpu_check.py --device cpu --quick # the same code at tiny sizes on the CPU, so that it does not rot

Without a GPU it says so, checks nothing and exits with 0. Models have random weights: speed does not depend on them,
and parity is against the same model in PyTorch. What does not fit into the time is listed as not run: nothing is begun
after its end, nor what took longer than is left when it was last done for the same model.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_checks.measure import Check
from gpu_checks.report import check_result, rows_of

__all__ = ["main"]

MINUTES = 8.0
RESULTS = Path("docs/gpu-results.md")
MARK = "<!-- rows -->"
NOTHING_YET = "No run on a GPU has been recorded yet; the first one replaces this sentence.\n\n"


def machine_of(device: str) -> dict[str, str]:
    """What it ran on, with versions."""
    import platform

    import torch

    import edgellm
    from edgellm_runtime.backends.ort import library

    gpu, driver = "none", "none"
    if device == "cuda":
        gpu = torch.cuda.get_device_name()
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        driver = asked.stdout.strip().splitlines()[0] if asked.stdout.strip() else "unknown"
    return {"gpu": gpu, "driver": driver, "torch": torch.__version__, "onnxruntime": library().__version__,
            "edgellm": edgellm.__version__, "python": platform.python_version()}  # fmt: skip


def has_gpu() -> bool:
    """Whether PyTorch sees a GPU."""
    import torch

    return bool(torch.cuda.is_available())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; the exit status is 1 if parity does not hold or a state is copied."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a dry run of the same code")
    parser.add_argument("--quick", action="store_true", help="tiny models and few tokens")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="after which nothing runs, as far as that can be foreseen"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/gpu-check.json"), help="the result as JSON")
    parser.add_argument("--write", action="store_true", help=f"add the rows to {RESULTS}")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not has_gpu():
        print("gpu-check: no GPU here; nothing was checked")
        return 0
    if options.write and (options.device != "cuda" or options.quick):
        parser.error(f"--write adds measurements of a GPU to {RESULTS}; leave --device cpu and --quick out")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    told = {
        "machine": machine_of(options.device), "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", "scripts/gpu_check.py", *(arguments or sys.argv[1:])]),
    }  # fmt: skip

    def note(found: dict[str, Any]) -> None:
        options.output.write_text(json.dumps({**found, **told}, indent=1, allow_nan=False) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        result = Check(options.device, options.quick, options.minutes, note).run(Path(folder)) | told
    check_result(result)
    note(result)
    print(rows_of(result))
    if options.write:
        text = RESULTS.read_text(encoding="utf-8").replace(NOTHING_YET, "")
        RESULTS.write_text(text.replace(MARK, f"{MARK}\n\n{rows_of(result)}", 1), encoding="utf-8")
    wrong = [p["precision"] for p in result["parity"] if not p["ok"]]
    return 1 if wrong or not result["parity"] else 0


if __name__ == "__main__":
    sys.exit(main())
