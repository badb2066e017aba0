"""Try every family of transformers at tiny size on the CPU's targets, and write docs/families.md.

python scripts/families.py              # every row, for the better part of an hour
python scripts/families.py llama gpt2   # these rows; the page keeps the others
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

from family_checks.check import TARGETS, try_row
from family_checks.rows import CONTEXT, ROWS, VOCAB, WINDOW
from family_checks.table import Row, read, refusals, render

_ROOT = Path(__file__).parents[1]
_PAGE, _REFUSED = _ROOT / "docs" / "families.md", _ROOT / "edgellm" / "general" / "refused.json"


def main() -> int:
    """Try rows, write the page after each; 1 if one is wrong or ended in a traceback."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", help="rows; all where there are none")
    parser.add_argument("--page", type=Path, default=_PAGE, help="what to write")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in ROWS]:
        parser.error(f"no rows {', '.join(unknown)}; see scripts/family_checks/rows.py")
    os.environ["HF_HUB_OFFLINE"] = "1"
    _quiet()
    rows = {name: row for name, row in read(options.page).items() if name in ROWS}
    for name in options.names or ROWS:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = try_row(name, Path(folder))
        gc.collect()
        _tell(name, rows[name], time.monotonic() - start)
        ordered = {name: rows[name] for name in ROWS if name in rows}
        options.page.write_text(render(ordered, vocab=VOCAB, context=CONTEXT, window=WINDOW), encoding="utf-8")
    if options.page == _PAGE:
        _REFUSED.write_text(
            json.dumps(refusals(rows), indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
        )
    good = {"works", "refused"}
    return int(any(outcome.word not in good for _, outcomes in rows.values() for outcome in outcomes.values()))


def _tell(name: str, row: Row, seconds: float) -> None:
    said = "; ".join(f"{target} {row[1][target].word} ({row[1][target].more})" for target in TARGETS)
    print(f"{name}: {row[0]}: {said}; {seconds:.1f} s", flush=True)


def _quiet() -> None:
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
