"""What a run found: the arithmetic behind its figures, what a result must hold, and its rows for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["check_result", "copies_in_profile", "decode_bytes", "roofline_share", "rows_of"]

_SCHEMA: Mapping[str, type | tuple[type, ...]] = {
    "machine": dict, "date": str, "command": str, "quick": bool, "copy_gb_s": (int, float), "parity": list,
    "speed": list, "copies": list, "engines": list, "not_run": list, "seconds": (int, float),
}  # fmt: skip
_SPEED: Mapping[str, type | tuple[type, ...]] = {
    "model": str, "runner": str, "precision": str, "batch": int, "prompt": int, "ttft_ms": (int, float),
    "prefill_tokens_s": (int, float), "decode_tokens_s": (int, float), "roofline": (int, float, type(None)),
    "memory_mb": (int, float, type(None)),
}  # fmt: skip


def decode_bytes(
    weight_bytes: int, token_bytes: int, fixed_bytes: int, batch: int, context: int
) -> int:  # fmt: skip
    """Bytes that a decode step must move: weights once, each row's cache as it is read, what is replaced both ways.

    Args:
        weight_bytes: of all weights that a step reads.
        token_bytes: of the cache for one token of one row.
        fixed_bytes: of the state of one row that does not grow.
        batch: rows.
        context: tokens that each row holds.
    """
    return weight_bytes + batch * (context * token_bytes + 2 * fixed_bytes)


def roofline_share(moved: int, seconds: float, copy_gb_s: float) -> float:
    """How much of the measured copy bandwidth (GB/s, reads and writes) a step's bytes come to."""
    return moved / seconds / (copy_gb_s * 1e9)


def copies_in_profile(events: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Copies between device and host in ONNX Runtime's profile: op name to how many."""
    found: dict[str, int] = {}
    for event in events:
        op = str(event.get("args", {}).get("op_name", ""))
        if op.startswith("Memcpy"):
            found[op] = found.get(op, 0) + 1
    return found


def check_result(result: Any) -> None:
    """Make sure that a result has what readers expect.

    Raises:
        ValueError: a key is missing or of another type.
    """
    for where, schema, values in (
        ("result", _SCHEMA, [result]), ("speed", _SPEED, result.get("speed", []) if isinstance(result, dict) else []),
    ):  # fmt: skip
        for value in values:
            for key, kind in schema.items():
                if not isinstance(value, dict) or key not in value or not isinstance(value[key], kind):
                    raise ValueError(f"{where}: {key} is missing or not of type {kind}")


def rows_of(result: Mapping[str, Any]) -> str:
    """A result as a section of docs/gpu-results.md."""
    machine, lines = result["machine"], []
    named = ", ".join(f"{name} {value}" for name, value in machine.items())
    lines += [f"## {result['date']}: {machine['gpu']}", "", named + f"; copy bandwidth {result['copy_gb_s']:.0f} GB/s.",
              f"Command: `{result['command']}`.", ""]  # fmt: skip
    lines += ["| precision | logits, largest relative difference | top-1 agreement | holds |", "|---|---|---|---|"]
    lines += [
        f"| {p['precision']} | {p['logits']:.2g} | {100 * p['top1']:.1f}% | {'yes' if p['ok'] else 'NO'} |"
        for p in result["parity"]
    ]
    columns = "model | runner | precision | batch | TTFT ms | prefill tok/s | decode tok/s | roofline | memory MB"
    lines += ["", f"| {columns} |", "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for s in result["speed"]:
        share = "" if s["roofline"] is None else f"{100 * s['roofline']:.0f}%"
        memory = "" if s["memory_mb"] is None else f"{s['memory_mb']:.0f}"
        lines.append(
            f"| {s['model']} | {s['runner']} | {s['precision']} | {s['batch']} | {s['ttft_ms']:.1f} | "
            f"{s['prefill_tokens_s']:.0f} | {s['decode_tokens_s']:.1f} | {share} | {memory} |"
        )
    lines += ["", *(f"- copies in a decode step of {c['model']}: {c['copies'] or 'none'}" for c in result["copies"])]
    lines += [f"- engines: {e['what']}" for e in result["engines"]]
    lines += [f"- not run: {what}" for what in result["not_run"]]
    return "\n".join(lines) + "\n"
