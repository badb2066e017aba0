"""``edgellm export``: from a checkpoint to a bundle."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.cli.budget import budget_of, with_rates
from edgellm.cli.calibration import calibration_of, tuning_of
from edgellm.cli.checkpoints import read_checkpoint, road_options
from edgellm.cli.defaults import options_text
from edgellm.cli.engine import EngineFlags, building_options
from edgellm.cli.progress import stages
from edgellm.cli.quantization_text import cache_rows
from edgellm.cli.receipt import summary_row, text_for_export
from edgellm.cli.standard_streams import print_json
from edgellm.cli.threads import threads_option
from edgellm.models.registry import foreign_names

if TYPE_CHECKING:
    from edgellm.checkpoints import Checkpoint
    from edgellm_exporters.export import Exported

_NO_FLAGS = EngineFlags()
__all__ = ["export", "export_checkpoint", "print_summary"]


_HELP = f"""Turn CHECKPOINT into a bundle that runs without PyTorch, and prove that it computes the same.

CHECKPOINT is a folder that 'edgellm train' wrote, a Hugging Face folder ({", ".join(foreign_names("huggingface"))}), or
a .gguf file ({", ".join(foreign_names("gguf"))}). The bundle appears only when it is complete and equal to PyTorch
within the stated bounds.
"""


@click.command(context_settings={"show_default": True}, help=_HELP)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the new bundle.")
@click.option(
    "--target", default="cpu",
    help="What it is for: cpu (ONNX Runtime's fused kernels), onnx (standard operators only), cuda (ONNX Runtime's "
    "fused kernels on NVIDIA GPUs) or tensorrt (engines for NVIDIA GPUs).",
)  # fmt: skip
@click.option("--dtype", default=None, show_default=False, help="Precision of activations and of weights that are not "
              "quantized: float32, or for cuda float16 or bfloat16, for tensorrt float16, bfloat16 or float32.  "
              "[default: the first of the target's]")  # fmt: skip
@click.option("--quantize", default="none", help="Weights: none (float), int8, int4 (embedding and vocabulary "
              "projection in 8 bits), w8a8 (integer products, for the fastest prompts), keep (what the checkpoint "
              "rounded is not rounded again), auto (one for each, within --max-kl and --max-size-mb), or one format "
              "for all, BITS:BLOCK, such as 4:32:asymmetric or 3:64:asymmetric; :scales8 after it, or after keep, "
              "makes blocks' scales 8 bits instead of 16. Of these, cuda has none, int8 and int4; tensorrt has "
              "none, int8, w8a8 and int4, and fp8 (8-bit floats).")  # fmt: skip
@click.option("--kv-cache", default="float32", help="What attention keeps keys and values in: float32, float16 "
              "(half of the memory of long contexts; meant for edgellm's own kernels, without which each step takes "
              "longer), or int8 (a quarter). What no kernel holds so stays float32, and the summary names "
              "it.")  # fmt: skip
@click.option("--hidden", is_flag=True, help="Let steps give the model's last hidden states, too: embeddings need "
              "them. A step that does not ask for them costs no more.")  # fmt: skip
@click.option("--drafter", type=click.Path(path_type=Path), default=None, metavar="DIR", help="Put a drafter into the "
              "bundle that 'edgellm train --drafter' made; implies --hidden.")  # fmt: skip
@click.option("--calibrate", type=click.Path(path_type=Path), metavar="FILE", help="UTF-8 text like the model's work: "
              "weights of fewer than 8 bits are then chosen with GPTQ instead of rounded to nearest.")  # fmt: skip
@click.option("--tune", type=float, default=None, metavar="MINUTES", show_default=False, help="With --calibrate: after "
              "that, learn codes and scales against what the float model computes, layer after layer, then all layers "
              "together, for at most so long. A run that was stopped goes on with its finished layers, which are kept "
              "in OUTPUT.tuning until the bundle is there.")  # fmt: skip
@click.option("--text", "receipt", type=click.Path(path_type=Path), metavar="FILE", show_default=False,
              help="UTF-8 text that the finished bundle is measured on beside the model: KL divergence with a 95% "
              "interval, top-1 and perplexity on 1,024 of its tokens go into the bundle's receipt.  [default: "
              "--calibrate's text, behind what is calibrated with]")  # fmt: skip
@click.option("--no-receipt", is_flag=True, help="Measure no receipt, which takes a second for each 200 million "
              "weights or so.")  # fmt: skip
@click.option("--max-kl", type=float, default=None, metavar="NATS", show_default=False, help="With --quantize auto: "
              "how far the bundle may be from the float model, as mean KL divergence on a part of --calibrate that "
              "nothing was chosen with. 0.01 is hard to notice, 0.1 is about what 4-bit weights cost a small model. "
              "The bundle is refused if it is missed.  [default: 0.02]")  # fmt: skip
@click.option("--max-size-mb", type=float, default=None, metavar="MB", help="With --quantize auto: the most the bundle "
              "may take, in 1,000,000 bytes.")  # fmt: skip
@click.option("--prefer", type=click.Choice(["decode", "prefill", "size", "quality"]), default=None,
              show_default=False, help="With --quantize auto: what to make best within the limits: the time of each "
              "new token, the time to read a prompt, the size, or the quality, for which all of the size is used.  "
              "[default: quality with --max-size-mb, else decode]")  # fmt: skip
@click.option("--rates", default=None, metavar="[measured|table|FILE]", show_default=False, help="With --quantize auto "
              "and --prefer decode: what formats take for a token. They are measured on this processor in under a "
              "second, with edgellm's own kernels if EDGELLM_KERNELS=own; or those of a table, or those that another "
              "bundle's manifest.json has, so that an export comes out the same again.  [default: measured for "
              "--target cpu, else table]")  # fmt: skip
@building_options
@click.option("--max-context", type=int, default=None, metavar="TOKENS", show_default=False, help="Engines: the most "
              "tokens of a row; their memory is set aside for each.  [default: the model's context]")  # fmt: skip
@click.option("--no-engine", is_flag=True, help="Engines: leave them to 'edgellm build' on the device.")
@click.option("--adapter", "adapters", multiple=True, metavar="[NAME=]DIR", help="Merge this LoRA adapter in PEFT's "
              "layout into the weights or, with a NAME, leave it apart to be chosen by that name when the bundle runs; "
              "may be given several times.")  # fmt: skip
@click.option("--check", type=click.Choice(["transformers"]), default=None, show_default=False, help="First compare "
              "the loaded model with the one that transformers loads, where that is installed, and export nothing if "
              "their logits differ.  [default: no comparison]")  # fmt: skip
@click.option(
    "--name", default="", help="What the bundle calls itself.  [default: the output's name]", show_default=False
)
@click.option("--force", is_flag=True, help="Replace the bundle that is at the output. Files of others, there or "
              "beside a bundle, are never replaced.")  # fmt: skip
@road_options
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def export(
    checkpoint: Path, output: Path, target: str, dtype: str | None, quantize: str, kv_cache: str,
    hidden: bool, drafter: Path | None, calibrate: Path | None, tune: float | None, receipt: Path | None,
    no_receipt: bool, max_kl: float | None, max_size_mb: float | None, prefer: str | None, rates: str | None,
    max_batch: int | None,
    compute_capability: str, workspace_mb: int | None, max_context: int | None, no_engine: bool, name: str,
    force: bool, road: str, trust_remote_code: bool, threads: int | None, check: str | None,
    adapters: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """See :data:`_HELP`."""
    engine = EngineFlags(
        max_batch=max_batch, max_context=max_context, compute_capability=compute_capability, workspace_mb=workspace_mb,
        no_engine=no_engine,
    )  # fmt: skip
    if check is not None and adapters:
        raise click.UsageError("--check compares a checkpoint as it is; leave it out with --adapter.")
    if receipt is not None and no_receipt:
        raise click.UsageError("--text is for the receipt; leave it or --no-receipt out.")
    if tune is not None and calibrate is None:
        raise click.UsageError("--tune learns from real text; add --calibrate FILE, UTF-8 text like the model's work.")
    with stages() as tell:
        result = export_checkpoint(
            checkpoint, output, target=target, dtype=dtype, quantize=quantize, calibrate=calibrate, max_kl=max_kl,
            max_size_mb=max_size_mb, prefer=prefer, kv_cache=kv_cache, hidden=hidden, drafter=drafter, engine=engine,
            name=name, force=force, check=check, adapters=adapters, road=road, trust_remote_code=trust_remote_code,
            receipt_text=receipt, receipt=not no_receipt, tune=tune, rates=rates, tell=tell,
        )  # fmt: skip
    if as_json:
        print_json(result)
    else:
        print_summary(result)


def export_checkpoint(
    checkpoint: Path, output: Path, *, target: str, dtype: str | None = None, quantize: str,
    calibrate: Path | None = None, max_kl: float | None = None, max_size_mb: float | None = None,
    prefer: str | None = None, kv_cache: str = "float32", hidden: bool = False, drafter: Path | None = None,
    engine: EngineFlags = _NO_FLAGS, name: str = "", force: bool = False, check: str | None = None,
    adapters: Sequence[str | Path] = (), road: str = "auto", trust_remote_code: bool = False,
    receipt_text: Path | None = None, receipt: bool = True, tune: float | None = None, rates: str | None = None,
    tell: Any,
) -> dict[str, Any]:  # fmt: skip
    """Read, export and sum up; the keys are those of ``--json``."""
    from edgellm.torch_threads import let_torch_wait, limit_torch_threads

    let_torch_wait()
    from edgellm_exporters.atomic import check_destination
    from edgellm_exporters.export import ExportOptions
    from edgellm_exporters.graph.targets import find_target
    from edgellm_exporters.weights.memory import give_back_large_blocks

    start = time.perf_counter()
    budget = with_rates(budget_of(quantize, calibrate, max_kl, max_size_mb, prefer), rates, target)
    dtype = dtype or find_target(target).dtypes[0]
    options = ExportOptions(
        target=target, dtype=dtype, quantize=quantize, kv_cache=kv_cache, name=name, budget=budget,
        engine=engine.options(), hidden=hidden or drafter is not None,
    )  # fmt: skip
    check_destination(output, force=force)
    tell("importing PyTorch", 0.0)
    give_back_large_blocks()
    limit_torch_threads()
    from edgellm.checkpoints import adapted, checkpoint_directory, switchable
    from edgellm_exporters.export import export as run

    tell("reading the checkpoint", 0.0)
    loaded = read_checkpoint(checkpoint, road=road, trust_remote_code=trust_remote_code)
    merged, apart = _adapters(adapters)
    for adapter in merged:
        loaded = adapted(loaded, adapter)
    loaded = switchable(loaded, apart) if apart else loaded
    compared = {}
    if check is not None:
        from edgellm.cli.transformers_check import check_transformers

        tell("comparing with transformers", 0.0)
        compared = {"transformers": check_transformers(checkpoint_directory(checkpoint), loaded)}
    there = 0
    if calibrate is not None:
        tell("reading the calibration text", 0.0)
        read = calibration_of(calibrate, loaded, divided=budget is not None)
        there = len(read.tokens)
        options = dataclasses.replace(options, calibration=read.windows, held_out=read.held_out)
        if tune is not None:
            options = dataclasses.replace(options, tuning=tuning_of(tune, read, output))
    if drafter is not None:
        from edgellm.draft_head import load_draft_head

        options = dataclasses.replace(options, drafter=load_draft_head(drafter))
    options = dataclasses.replace(options, generation=loaded.generation)
    if receipt:
        options = dataclasses.replace(options, receipt=text_for_export(loaded, receipt_text, calibrate, options, there))
    provenance = {"source": loaded.source, "architecture": loaded.architecture}
    exported = run(
        loaded.model, output, weights=loaded.weights, options=options, text=text_of(loaded),  # type: ignore[arg-type]
        provenance=provenance, force=force, progress=tell,
    )  # fmt: skip
    summary = _summary(exported, loaded, options.target, dtype, quantize)
    return summary | compared | {"seconds": round(time.perf_counter() - start, 2)}


def _adapters(given: Sequence[str | Path]) -> tuple[list[Path], dict[str, Path]]:
    """Folders of adapters to merge, and of those to leave apart by name; a path with = in it is given as ./PATH."""
    merged, apart = [], dict[str, Path]()
    for one in given:
        name, equals, path = str(one).partition("=")
        if isinstance(one, Path) or not equals or "/" in name:
            merged.append(Path(one))
        elif name in apart:
            raise click.UsageError(f"--adapter {name} was given twice; give each a name of its own.")
        else:
            apart[name] = Path(path)
    return merged, apart


def text_of(loaded: Checkpoint) -> Any:
    """What the bundle needs for text, or None if the checkpoint has no tokenizer."""
    from edgellm_exporters.export import TextAssets

    if loaded.tokenizer_json is None:
        return None
    return TextAssets(
        tokenizer_json=loaded.tokenizer_json, chat_template=loaded.chat_template, bos_token_id=loaded.bos_token_id,
        eos_token_ids=loaded.eos_token_ids, add_bos=loaded.add_bos, task=loaded.task,
        special_tokens=loaded.special_tokens, add_eos=loaded.add_eos,
    )  # fmt: skip


def _summary(exported: Exported, loaded: Checkpoint, target: str, dtype: str, quantize: str) -> dict[str, Any]:
    from edgellm_runtime.checks.memory import peak_rss_mb

    parity, said = exported.parity, exported.bundle.manifest.quantization
    return {
        "bundle": str(exported.bundle.path),
        "target": target,
        "dtype": dtype,
        "quantize": quantize,
        "parameters": exported.parameters,
        "bytes": exported.bundle.nbytes,
        "bits_per_weight": round(8 * exported.weight_bytes / exported.parameters, 3),
        "parity": {
            "tokens": parity.tokens, "logits": parity.logits, "kl_mean": parity.kl, "top1_agreement": parity.top1,
            "state": parity.state, "greedy": parity.greedy,
        },
        "checks": [
            {"name": c.name, "ok": c.ok, "value": c.value, "bound": c.bound, "what": c.what}
            for c in exported.verification.checks
        ],
        "receipt": exported.bundle.manifest.receipt,
        "generation": dict(loaded.generation),
        "tokenizer": exported.bundle.manifest.tokenizer is not None,
        "notes": [*loaded.notes, *exported.notes],
        "peak_rss_mb": peak_rss_mb(),
        **{key: said[key] for key in _TOLD if key in said},
    }  # fmt: skip


_TOLD = ("cache", "cache_dtype", "cache_left", "budget", "predicted_kl", "held_out")  # of the manifest's quantization


def _generation(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The options that the bundle sets, where it sets any."""
    return [("generates with", options_text(result["generation"]))] if result["generation"] else []


def _compared(result: dict[str, Any]) -> list[tuple[str, str]]:
    if "transformers" not in result:
        return []
    found = result["transformers"]
    return [(f"logits of transformers, {found['tokens']} tokens", f"{found['logits']:.1e} apart, of the largest")]


def _held_out(result: dict[str, Any]) -> list[tuple[str, str]]:
    if "held_out" not in result:
        return []
    found, budget = result["held_out"], result["budget"]
    rates = [("formats were timed with kernels of", budget["rates"]["kernels"])] if "rates" in budget else []
    return [
        (f"KL on {found['tokens']} held-out tokens", f"{found['kl']:.2e} nats, at most {budget['max_kl']:g}"),
        *rates,
    ]


def print_summary(result: dict[str, Any]) -> None:
    """The table at the end of an export."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    held = sum(c["ok"] for c in result["checks"])
    table = Table(title=escape(result["bundle"]), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    parity = result["parity"]
    for row in (
        ("target", f"{result['target']}, {result['dtype']}, quantize {result['quantize']}"),
        ("parameters", f"{result['parameters']:,}"),
        ("size", f"{result['bytes'] / 1e6:.1f} MB, {result['bits_per_weight']:.2f} bits a weight"),
        (f"KL from PyTorch, {parity['tokens']} tokens", f"{parity['kl_mean']:.2e} nats"),
        ("same most likely token", f"{parity['top1_agreement']:.1%}"),
        *cache_rows(result),
        *_compared(result),
        *_held_out(result),
        *summary_row(result["receipt"]),
        *_generation(result),
        ("checks that hold", f"{held} of {len(result['checks'])}"),
        ("took", f"{result['seconds']:.1f} s, {result['peak_rss_mb'] or 0:.0f} MiB"),
    ):
        table.add_row(*row)
    Console().print(table)
    for note in result["notes"]:
        click.echo(f"Note: {note}.")
    following = 'generate {} "Once upon a time"' if result["tokenizer"] else "verify {}"
    click.echo(f"Next: edgellm {following.format(result['bundle'])}")
