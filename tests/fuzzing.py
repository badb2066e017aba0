"""Tiny bundles, states and checkpoints spoiled at random, and used as a program uses them, in a process of its own.

Each case is made from its number alone. The process says when a case begins and how it ended, so that the one that
watches it knows which case crashed, hung, took too much or raised what nobody expects. Run as a program: SOURCE FOLDER
FIRST COUNT.
"""

from __future__ import annotations

import json
import os
import queue
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzzing_bundles
import fuzzing_checkpoints
from tiny_files import sign

from edgellm.errors import ModelError
from edgellm_runtime import RuntimeFault
from edgellm_runtime.checks.memory import peak_rss_mb

ADDRESSES = 8 << 30  # bytes of a process's address space, of which PyTorch alone takes some
RESIDENT = 1 << 30  # bytes of memory that a case may have filled
SECONDS = 2.0  # of the processor's time that a case may take
HANGS, SILENT = 20.0, 600  # of the processor's time, and of the clock's, after which a silent process is ended
_FOREIGN = "checkpoint"  # how the names of sources begin that are no bundles
_SHARE, _WHOLE = 0.4, 0.3  # of checkpoints among cases, and of bundles that are verified whole
_UNSIGNED = ("manifest.json", fuzzing_bundles.STATE)


def spoiled(source: Path, folder: Path, number: int) -> Callable[[], None]:
    """Case ``number``: a copy of one of ``source`` with one file, sometimes two, of another content; gives its use."""
    draw = random.Random(number)
    foreign = draw.random() < _SHARE
    original = draw.choice([path for path in sorted(source.iterdir()) if path.name.startswith(_FOREIGN) == foreign])
    spoilers = (fuzzing_checkpoints if foreign else fuzzing_bundles).SPOILERS
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    there = [name for name in spoilers if (folder / name).is_file()]
    for name in draw.sample(there, min(len(there), draw.choice([1, 1, 1, 2]))):
        (folder / name).write_bytes(draw.choice(spoilers[name])(draw, (folder / name).read_bytes()))
        if not foreign and name not in _UNSIGNED and draw.random() < 0.95:
            with suppress(ValueError, TypeError, KeyError, AttributeError):  # the manifest may be none by now
                sign(folder, name)
    whole = draw.random() < _WHOLE
    if foreign:
        return lambda: fuzzing_checkpoints.use_checkpoint(folder, attempt)
    return lambda: fuzzing_bundles.use_bundle(folder, attempt, whole=whole)


def attempt(function: Callable[[], Any]) -> Any:
    """What a part of a use gives; None where it is refused in a sentence, so that the next part has its turn."""
    try:
        return function()
    except (RuntimeFault, ModelError) as fault:
        said = str(fault).strip()
    if not 0 < len(said) < 2000:
        raise AssertionError(f"a fault of {len(said)} characters: {said[:200]}")
    return None


def child(source: Path, folder: Path, first: int, count: int) -> None:
    """Run cases; one line before each, one after. Ends early once a case has filled too much memory."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    _settle(source, folder)
    for number in range(first, first + count):
        print("begin", number, flush=True)
        try:
            use, start = spoiled(source, folder, number), time.process_time()
            use()
            took, filled = time.process_time() - start, int((peak_rss_mb() or 0) * 2**20)
            assert took <= SECONDS, f"took {took:.1f} s of the processor's time"
            assert filled <= RESIDENT, f"filled {filled >> 20} MB"
            said = "ok"
        except BaseException as error:
            said = json.dumps(f"{type(error).__name__}: {error}"[:300] + "\n" + traceback.format_exc()[-3000:])
        print("end", number, said, flush=True)
        if (peak_rss_mb() or 0) * 2**20 > RESIDENT:
            return


def _settle(source: Path, folder: Path) -> None:
    """Use each source as it is, so that no case is charged with what libraries do once."""
    import onnxruntime
    import torch

    onnxruntime.set_default_logger_severity(4)
    torch.set_num_threads(1)
    for original in sorted(source.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        if original.name.startswith(_FOREIGN):
            fuzzing_checkpoints.use_checkpoint(folder, lambda function: function())
        else:
            fuzzing_bundles.use_bundle(folder, lambda function: function(), whole=True)


@dataclass(frozen=True)
class Failure:
    """A case that did something else than work or be refused."""

    number: int
    what: str


def run_cases(source: Path, scratch: Path, first: int, count: int) -> Iterator[Failure]:
    """Cases in as few processes as it takes: a new one after each crash and each case that takes too long."""
    number, end = first, first + count
    while number < end:
        process = subprocess.Popen(
            [sys.executable, __file__, str(source), str(scratch / "case"), str(number), str(end - number)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_ARENA_MAX": "2"},
        )  # fmt: skip
        lines: queue.Queue[str] = queue.Queue()
        errors: list[str] = []
        assert process.stdout is not None and process.stderr is not None
        readers = [
            threading.Thread(target=_pass_on, args=(process.stdout, lines.put), daemon=True),
            threading.Thread(target=_pass_on, args=(process.stderr, errors.append), daemon=True),
        ]
        for reader in readers:
            reader.start()
        begun = 0
        while number < end:
            line = _next_line(lines, process.pid)
            if line is None:
                yield Failure(number, f"said nothing for {HANGS:g} s of the processor's time, or {SILENT} s")
                number += 1
                break
            kind, _, rest = line.partition(" ")
            if not kind:
                if begun > 0 and process.wait() == 0 and number > begun:
                    break  # it ended on purpose, after a case that was told of
                yield Failure(number, f"ended its process ({process.wait()}): {''.join(errors)[-2000:]}")
                number += 1
                break
            if kind == "begin":
                begun = int(rest)
            elif kind == "end":
                said = rest.partition(" ")[2].strip()
                if said != "ok":
                    yield Failure(number, json.loads(said))
                number += 1
        process.kill()
        for reader in readers:
            reader.join()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def _next_line(lines: queue.Queue[str], process: int) -> str | None:
    """What a process says next; None if it hangs. A busy machine may give it little of its time."""
    start, spent = time.monotonic(), _spent(process)
    while time.monotonic() - start < SILENT and _spent(process) - spent < HANGS:
        with suppress(queue.Empty):
            return lines.get(timeout=5)
    return None


def _spent(process: int) -> float:
    """Seconds of the processor's time that a process has had; 0 where it has ended."""
    with suppress(OSError):
        user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _pass_on(stream: Any, put: Callable[[str], Any]) -> None:
    for line in stream:
        put(line)
    put("")


def make_source(folder: Path) -> Path:
    """What is spoiled."""
    fuzzing_bundles.make_bundles(folder)
    fuzzing_checkpoints.make_checkpoints(folder)
    return folder


if __name__ == "__main__":
    child(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
