"""``edgellm verify``: does a bundle still compute what PyTorch computed?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.cli.device import device_option
from edgellm.cli.progress import stages
from edgellm.cli.standard_streams import print_json
from edgellm.cli.threads import threads_option

if TYPE_CHECKING:
    from edgellm_runtime.bundle import Bundle
    from edgellm_runtime.checks.verify import Check
    from edgellm_runtime.session import Session

__all__ = ["verify", "verify_bundle"]


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), metavar="CHECKPOINT",
              help="Also compare with this checkpoint in PyTorch, if it is installed.")  # fmt: skip
@click.option("--key", "keys", type=click.Path(path_type=Path), multiple=True, metavar="FILE",
              help="Public key; one of those given must have signed BUNDLE (extra sign).")  # fmt: skip
@click.option("--quick", is_flag=True, help="One golden in one step: what an application may look at before each use.")
@device_option
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def verify(
    bundle: Path, against: Path | None, keys: tuple[Path, ...], quick: bool, device: str, threads: int | None,
    as_json: bool,
) -> int:  # fmt: skip
    """Check BUNDLE on this device; the exit status is 0 only if every check holds.

    Files are compared with their checksums, and the traces that the exporter took from PyTorch are run again. Needs no
    PyTorch, unless --against is given.
    """
    if keys:
        from edgellm_runtime.bundle.signature import check_signature

        signed = check_signature(bundle, keys)
        if not as_json:
            click.echo(f"Signed by {signed}, and unchanged since.")
    with stages() as tell:
        if quick and against is not None:
            raise click.UsageError("--quick goes without --against, which takes minutes")
        checks = verify_bundle(bundle, against, quick=quick, device=device, threads=threads, tell=tell)
    ok = all(c.ok for c in checks)
    if as_json:
        rows = [{"name": c.name, "ok": c.ok, "value": c.value, "bound": c.bound, "what": c.what} for c in checks]
        print_json({"ok": ok, "checks": rows})
    else:
        _print(bundle, checks)
    return 0 if ok else 1


def verify_bundle(
    path: Path,
    against: Path | None = None,
    *,
    quick: bool = False,
    device: str = "auto",
    threads: int | None = None,
    tell: Any,
) -> list[Check]:
    """Every check of a bundle, and those against a checkpoint if one is given."""
    from edgellm_runtime import open_session
    from edgellm_runtime.bundle import Bundle
    from edgellm_runtime.checks.verify import verify as run
    from edgellm_runtime.checks.verify import verify_quickly

    tell("checking files", 0.0)
    bundle = Bundle(path)
    session = open_session(bundle, device=device, threads=threads)
    if quick:
        return list(verify_quickly(bundle, session).checks)
    checks = list(run(bundle, session, lambda what: tell(what, 0.0)).checks)
    return checks + (_against(bundle, session, against, tell) if against is not None else [])


def _against(bundle: Bundle, session: Session, checkpoint: Path, tell: Any) -> list[Check]:
    from dataclasses import replace

    from edgellm.torch_threads import limit_torch_threads

    limit_torch_threads()
    from edgellm.cli.against import read_reference
    from edgellm_exporters.proof.parity import compare
    from edgellm_runtime.checks.verify import read_goldens

    tell("reading the checkpoint", 0.0)
    rows = [golden.tokens.tolist() for golden in read_goldens(bundle)]
    model = read_reference(checkpoint, bundle.path, session, max(map(len, rows)))
    prompts = [row[: len(row) // 2] for row in rows]
    report = compare(model, session, rows, greedy_prompts=prompts, progress=lambda s: tell("comparing", s))
    return [replace(c, name=f"{c.name} (against)") for c in report.checks(dict(bundle.manifest.bounds))]


def _print(bundle: Path, checks: list[Check]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from edgellm_runtime.checks.verify import AT_LEAST

    table = Table("", "check", "found", "bound", "what", title=escape(str(bundle)))
    for c in checks:
        sign = "≥" if c.name.split(" ")[0] in AT_LEAST else "≤"
        mark = "[green]✓[/]" if c.ok else "[red]✗[/]"
        table.add_row(mark, c.name, f"{c.value:.3g}", f"{sign} {c.bound:.3g}", c.what)
    Console().print(table)
