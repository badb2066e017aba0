"""``edgellm build``: engines from the graphs of a bundle, on the device that runs them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from edgellm.cli.engine import EngineFlags, building_options
from edgellm.cli.progress import stages
from edgellm.cli.standard_streams import print_json

__all__ = ["build"]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@building_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def build(
    bundle: Path, max_batch: int | None, compute_capability: str, workspace_mb: int | None, as_json: bool
) -> None:  # fmt: skip
    """Build the engines of BUNDLE anew, from the graphs that it holds.

    For bundles of --target tensorrt, whose engines are bound to one version of the library and one kind of GPU. Needs
    TensorRT or TensorRT for RTX, and no PyTorch. The bundle is replaced when its engines are finished.

    What TensorRT times while it builds is kept for the next build in ~/.cache/edgellm, or in the directory that the
    variable EDGELLM_CACHE_DIR names; set to nothing, it turns caches off.
    """
    flags = EngineFlags(max_batch=max_batch, compute_capability=compute_capability, workspace_mb=workspace_mb)
    start = time.perf_counter()
    from edgellm_exporters.engines.rebuild import build_engines

    with stages() as tell:
        manifest = build_engines(bundle, lambda most: flags.options(max_batch=most), tell)
    engines, choosers = (
        [entry | {"bytes": manifest.files[entry["file"]].bytes} for entry in (info.to_json() for info in infos)]
        for infos in (manifest.engines, manifest.choosers)
    )
    seconds = round(time.perf_counter() - start, 2)
    result = {"bundle": str(bundle), "engines": engines, "choosers": choosers, "seconds": seconds}
    if as_json:
        print_json(result)
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    for engine in (*result["engines"], *result["choosers"]):
        click.echo(
            f"{engine['file']}: {engine['bytes'] / 1e6:.1f} MB, {engine['library']} {engine['library_version']}, "
            f"compute capability {', '.join(engine['compute_capabilities'])}, {engine['precision']}"
        )
    click.echo(f"{result['bundle']}: built in {result['seconds']:.1f} s")
