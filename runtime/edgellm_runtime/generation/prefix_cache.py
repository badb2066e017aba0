"""What prompts have in common is read once: states of their beginnings, kept by their content from call to call.

A text is cut into blocks of so many tokens. A block's key is a digest of the model, of all tokens before it and of its
own, so whoever begins alike finds the same blocks, and two texts that begin alike share them. A block holds the slots
of its tokens in the caches that grow and, where one was taken at its end, a snapshot of recurrences and rings; a model
that has those goes on from the last block with a snapshot. The memory has a limit; what was not asked for the longest
goes first, a text's end before its beginning.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.arguments import check_integer, check_path
from edgellm_runtime.generation.prefix_files import BlockFiles
from edgellm_runtime.generation.trail import BLOCK, Trail
from edgellm_runtime.session import Session
from edgellm_runtime.spec import ADAPTER
from edgellm_runtime.state import State
from edgellm_runtime.state.blocks import filled, slots_of
from edgellm_runtime.state.snapshot import Snapshot, overwritten

__all__ = ["CacheCounts", "PrefixCache", "Prefixes"]

_OVERHEAD = 512  # bytes of a block that holds nothing, about
_LEAST = 1 << 16


@dataclass(frozen=True)
class CacheCounts:
    """What a cache has been worth.

    Args:
        hits: prompts of which a beginning was there.
        misses: prompts of which none was.
        reused_tokens: that were not read.
        read_tokens: of those prompts, that were.
        blocks: that are held in memory.
        nbytes: that they take.
        evicted: blocks that went for want of room.
    """

    hits: int
    misses: int
    reused_tokens: int
    read_tokens: int
    blocks: int
    nbytes: int
    evicted: int


@dataclass(frozen=True, eq=False)
class _Block:
    """So many tokens of a text, with what reading them left."""

    slots: Mapping[str, NDArray[Any]]
    snapshot: Snapshot | None

    @property
    def nbytes(self) -> int:
        kept = 0 if self.snapshot is None else self.snapshot.nbytes
        return _OVERHEAD + kept + sum(array.nbytes for array in self.slots.values())


class PrefixCache:
    """Keeps what prompts begin with. Any thread may use it, and several models may share one.

    Args:
        max_bytes: of memory.
        directory: where blocks are kept for other processes and the next start, for this user alone; None: nowhere.
        max_disk_bytes: of that directory.

    Raises:
        OptionError: no such numbers, or no path.
        StateError: the directory cannot be made, or other users may write to it.
    """

    def __init__(
        self, max_bytes: int = 256 << 20, *, directory: str | Path | None = None, max_disk_bytes: int = 4 << 30
    ) -> None:
        self.max_bytes = check_integer("max_bytes", max_bytes, _LEAST)
        check_integer("max_disk_bytes", max_disk_bytes, _LEAST)
        path = None if directory is None else check_path("directory", directory)
        self._files = None if path is None else BlockFiles(path, max_disk_bytes)
        self._lock = threading.Lock()
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()  # the one asked for the longest ago comes first
        self._nbytes = self._hits = self._misses = self._reused = self._read = self._evicted = 0

    def __repr__(self) -> str:
        c, most = self.counts, self.max_bytes
        return f"<PrefixCache: {c.blocks} blocks, {c.nbytes} of {most} bytes, {c.hits} hits, {c.misses} misses>"

    @property
    def counts(self) -> CacheCounts:
        """What it has been worth so far."""
        with self._lock:
            return CacheCounts(
                self._hits, self._misses, self._reused, self._read, len(self._blocks), self._nbytes, self._evicted
            )

    def clear(self) -> None:
        """Forget everything in memory; what lies in the directory stays there."""
        with self._lock:
            self._blocks.clear()
            self._nbytes = 0

    def chain(self, keys: Sequence[bytes], specs: Any) -> list[_Block]:
        """The blocks of a text's beginning, as many as are there without a gap.

        Args:
            keys: of its blocks.
            specs: of the model's states, for what comes from the directory.
        """
        found: list[_Block] = []
        for at, key in enumerate(keys):
            with self._lock:
                block = self._blocks.get(key)
            if block is None and self._files is not None:
                kept = self._files.read(key, specs, (at + 1) * BLOCK)
                block = None if kept is None else _Block(*kept)
                if block is not None:
                    self._put(key, block)
            if block is None:
                break
            found.append(block)
        self.touch(keys[: len(found)])
        return found

    def touch(self, keys: Sequence[bytes]) -> None:
        """Note that a text was asked for: its end first, so that it goes before its beginning."""
        with self._lock:
            for key in reversed(keys):
                if key in self._blocks:
                    self._blocks.move_to_end(key)

    def missing(self, keys: Sequence[bytes], snapshots: Mapping[int, Snapshot]) -> list[int]:
        """Which blocks of a text are not there, or without a snapshot that there is now.

        Args:
            keys: of its blocks.
            snapshots: by the number of the block that they are at the end of.
        """
        with self._lock:
            there = [self._blocks.get(key) for key in keys]
        return [at for at, b in enumerate(there) if b is None or (b.snapshot is None and at in snapshots)]

    def keep(self, key: bytes, slots: Mapping[str, NDArray[Any]], snapshot: Snapshot | None) -> None:
        """Keep a block; what is there of it already stays."""
        with self._lock:
            there = self._blocks.get(key)
        block = _Block(slots, snapshot) if there is None else replace(there, snapshot=there.snapshot or snapshot)
        self._put(key, block)
        if self._files is not None:
            self._files.write(key, block.slots, block.snapshot)

    def count(self, reused: int, read: int) -> None:
        """Note what a prompt found."""
        with self._lock:
            self._hits += reused > 0
            self._misses += reused == 0
            self._reused += reused
            self._read += read

    def _put(self, key: bytes, block: _Block) -> None:
        with self._lock:
            old = self._blocks.pop(key, None)
            self._nbytes += block.nbytes - (0 if old is None else old.nbytes)
            self._blocks[key] = block
            while self._nbytes > self.max_bytes:
                _, gone = self._blocks.popitem(last=False)
                self._nbytes -= gone.nbytes
                self._evicted += 1


class Prefixes:
    """A cache as one model uses it.

    Args:
        cache: of any models.
        session: steps this one.
        fingerprint: of the model's bundle.
    """

    def __init__(self, cache: PrefixCache, session: Session, fingerprint: str) -> None:
        self._cache, self._session = cache, session
        self._specs = session.signature.state
        self._fingerprint = fingerprint
        told = "" if session.adapter is None else f" {session.adapter}"
        self._root = hashlib.sha256(f"{fingerprint} {session.device} {BLOCK}{told}".encode()).digest()
        # a static state may be made of more than tokens; that of an adapter is, and the session has it
        self._on = all(spec.update != "static" or spec.name == ADAPTER for spec in self._specs)
        self._overwrites = bool(overwritten(self._specs))

    def of(self, session: Session) -> Prefixes:
        """The same cache for another adapter of the model."""
        return self if session.adapter == self._session.adapter else Prefixes(self._cache, session, self._fingerprint)

    def resume(self, tokens: Sequence[int], state: State, trail: Trail) -> tuple[int, list[int]]:
        """Fill an empty row with the longest beginning of a text that is there.

        Args:
            tokens: of the text, of which one more than these is to be read.
            state: of one row that holds nothing, with room for all.
            trail: takes over snapshots.

        Returns:
            How many tokens the row holds, and where a reading should pause for a snapshot: where another text parted
            from this one, a third may.
        """
        if not self._on:
            return 0, []
        keys = self._keys(tokens)
        blocks = self._cache.chain(keys, self._specs)
        known = len(blocks)
        if self._overwrites:
            while blocks and blocks[-1].snapshot is None:
                blocks.pop()
        length = len(blocks) * BLOCK
        if blocks:
            filled(state, [block.slots for block in blocks], length, blocks[-1].snapshot)
            trail.adopt(block.snapshot for block in blocks if block.snapshot is not None)
        self._cache.count(length, len(tokens) + 1 - length)
        return length, [known * BLOCK] if known > len(blocks) else []

    def keep(self, tokens: Sequence[int], state: State, trail: Trail) -> None:
        """Keep what a text's reading left.

        Args:
            tokens: that the row has read.
            state: of one row.
            trail: its snapshots.
        """
        if not self._on:
            return
        keys = self._keys(tokens)
        snapshots = {n // BLOCK - 1: trail.at(n) for n in trail.lengths if n % BLOCK == 0 and n <= len(tokens)}
        taken = {at: snapshot for at, snapshot in snapshots.items() if snapshot is not None}
        if self._overwrites:
            keys = keys[: max(taken, default=-1) + 1]  # from what is behind the last snapshot nobody can go on
        wanted = self._cache.missing(keys, taken)
        pieces = slots_of(state, [(at * BLOCK, (at + 1) * BLOCK) for at in wanted])
        for at, slots in zip(wanted, pieces, strict=True):
            self._cache.keep(keys[at], slots, taken.get(at))
        self._cache.touch(keys)

    def _keys(self, tokens: Sequence[int]) -> list[bytes]:
        """Of a text's whole blocks."""
        ids = np.asarray(tokens, dtype="<i4")
        keys, key = [], self._root
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            key = hashlib.sha256(key + ids[start : start + BLOCK].tobytes()).digest()
            keys.append(key)
        return keys
