"""How sequences move between memory and disk after churn: by blocks, by runs, meanwhile, and only what is new.

Rows for ``serve-fair``. Blocks of 16 tokens, moved one by one, are how others did it.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from elbowroom.core import STRIP_TOKENS, LayerSpec
from elbowroom.engine.executors.transfers import Transfers
from elbowroom.engine.types import KVOp, Moved
from elbowroom.kv.base import KVHandle, KVStep
from elbowroom.kv.paged import PagedStore
from elbowroom.kv.plan import KVPlan
from elbowroom.memory.arena import Arena
from elbowroom.memory.disk import DiskTier
from elbowroom.memory.ledger import Budget, Ledger
from elbowroom.memory.tiers import HostTier

BLOCK_TOKENS = 16
_ADDED_TOKENS = 3 * STRIP_TOKENS
"""What a turn adds before the second save."""


@dataclass(frozen=True, slots=True)
class SwapRow:
    """One way to move sequences: medians over them."""

    way: str
    num_bytes: float
    """Of a save."""
    num_copies: float
    bytes_per_copy: float
    save_s: float
    load_s: float
    stall_s: float
    """Seconds of a save for which no step could run."""
    save_gb_per_s: float
    load_gb_per_s: float


class Churned:
    """A store whose sequences have come and gone for a while, of the lengths given, one token block at a time.

    Args:
        lengths: prompt and output tokens of each sequence.
        num_live: most at once.
        num_layers: of the model: 2 KV heads of 64 channels each.
    """

    def __init__(self, lengths: Sequence[tuple[int, int]], num_live: int, num_layers: int = 12) -> None:
        spec = LayerSpec(num_q_heads=2, num_kv_heads=2, head_dim=64, v_head_dim=64, scale=0.125, rope=None)
        self.num_layers = num_layers
        plan = KVPlan.parse("plain(bf16)").bind([spec] * num_layers, "bfloat16")
        longest = max(prompt + output for prompt, output in lengths)
        capacity = num_live * -(-longest // STRIP_TOKENS) * plan.block_bytes
        self.store = PagedStore(plan, Arena(HostTier(), Ledger(Budget({}))), capacity)
        self._lengths, self._num_live = iter(lengths), num_live
        self._live: list[tuple[KVHandle, int]] = []

    def run(self) -> list[KVHandle]:
        """Let all sequences live; return those that are alive in the end."""
        while self._admit():
            for handle, end in self._live:
                self.grow(handle, min(self.store.num_tokens(handle) + BLOCK_TOKENS, end))
            for each in [each for each in self._live if self.store.num_tokens(each[0]) == each[1]]:
                self._live.remove(each)
                self.store.close(each[0])
        return [handle for handle, _ in self._live]

    def grow(self, handle: KVHandle, num_tokens: int) -> None:
        """Lengthen a sequence; its new pages are touched."""
        start = self.store.num_tokens(handle)
        if num_tokens == start:
            return
        positions = np.arange(start, num_tokens)
        step = KVStep((handle,), np.asarray([0, positions.size], dtype=np.int32), positions)
        if self.store.reserve(step) is not None:
            raise MemoryError("the store is too small for the lengths")
        self.store.end_step(step)
        for block in self.store.lend(handle, num_tokens):
            if not block.is_full(start):
                for view in block.views:
                    np.frombuffer(view, dtype=np.uint8)[:] = block.block % 251

    def _admit(self) -> bool:
        """Begin as many sequences as there is room for; False: none are left to begin."""
        for prompt, output in islice(self._lengths, self._num_live - len(self._live)):
            handle = self.store.open()
            self.grow(handle, prompt)
            self._live.append((handle, prompt + output))
        return len(self._live) == self._num_live


def swap_rows(
    lengths: Sequence[tuple[int, int]], num_live: int = 24, directory: Path | None = None, num_samples: int = 8
) -> list[SwapRow]:
    """Return a row for each way to move sequences of the given lengths.

    Args:
        lengths: prompt and output tokens of each sequence.
        num_live: sequences at once.
        directory: on the disk to measure.
        num_samples: sequences that are moved.
    """
    churned = Churned(lengths, num_live)
    handles = random.Random(1).sample(churned.run(), num_samples)
    with tempfile.TemporaryDirectory(dir=directory) as path:
        tier = DiskTier(path, 1 << 40)
        mover = Transfers(churned.store, tier)
        rows = [_row(f"blocks of {BLOCK_TOKENS}, sync", _by_block(churned, handles, Path(path)))]
        rows.append(_row("runs, sync", _by_run(churned, mover, handles, is_async=False)))
        rows.append(_row("runs, async", _by_run(churned, mover, handles, is_async=True)))
        rows.append(_row("runs, async, only what is new", _again(churned, mover, handles)))
        mover.reset()
        tier.close()
    return rows


def rows_as_json(rows: Sequence[SwapRow]) -> list[dict[str, object]]:
    """Return rows as plain data."""
    return [asdict(row) for row in rows]


_Sample = tuple[Moved, float, Moved]
"""Of one sequence: its save, the seconds for which steps stood still, and its load."""


def _by_block(churned: Churned, handles: Sequence[KVHandle], directory: Path) -> Iterator[_Sample]:
    """Write and read 16 tokens of the keys or values of one layer at a time, one behind the other.

    Pieces have the size of those, wherever in the strip they lie: that is what a copy costs.
    """
    store = churned.store
    for handle in handles:
        tokens = store.num_tokens(handle)
        views = [view for block in store.lend(handle, tokens) for view in block.views]
        size = sum(view.nbytes for view in views) // len(_pieces_of(store, handle, churned.num_layers))
        pieces = [view[start : start + size] for view in views for start in range(0, view.nbytes, size)]
        total = sum(view.nbytes for view in views)
        file = os.open(directory / "blocks", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            saved_s = _each(file, pieces, os.pwritev)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            loaded_s = _each(file, pieces, os.preadv)
        finally:
            os.close(file)
        saved = Moved("save", 0, "", tokens, saved_s, total, len(pieces))
        yield saved, saved_s, saved._replace(kind="load", seconds=loaded_s)


def _pieces_of(store: PagedStore, handle: KVHandle, num_layers: int) -> range:
    """Return as many numbers as there are (16 tokens, layer, keys or values) in the blocks of a sequence."""
    blocks = -(-store.num_tokens(handle) // STRIP_TOKENS)
    return range(blocks * (STRIP_TOKENS // BLOCK_TOKENS) * 2 * num_layers)


def _each(file: int, pieces: Sequence[memoryview], call: Callable[[int, list[memoryview], int], int]) -> float:
    """Move each piece by a call of its own; return the seconds."""
    started, offset = time.perf_counter(), 0
    for piece in pieces:
        offset += call(file, [piece], offset)
    return time.perf_counter() - started


def _by_run(churned: Churned, mover: Transfers, handles: Sequence[KVHandle], is_async: bool) -> Iterator[_Sample]:
    """Save each sequence whole and load it into another one."""
    for slot, handle in enumerate(handles):
        mover.handles[slot] = handle
        mover.apply(KVOp("forget", -1, key=str(slot)))
        saved, stall_s = _save(churned, mover, slot, is_async)
        yield saved, stall_s, _load(churned, mover, slot, saved.num_tokens)


def _again(churned: Churned, mover: Transfers, handles: Sequence[KVHandle]) -> Iterator[_Sample]:
    """Save each sequence once more when a turn has been added to it."""
    for slot, handle in enumerate(handles):
        churned.grow(handle, churned.store.num_tokens(handle) + _ADDED_TOKENS)
        saved, stall_s = _save(churned, mover, slot, is_async=True)
        yield saved, stall_s, _load(churned, mover, slot, saved.num_tokens)


def _save(churned: Churned, mover: Transfers, slot: int, is_async: bool) -> tuple[Moved, float]:
    """Save a slot; return what ended, and the seconds until the next step could begin."""
    tokens = churned.store.num_tokens(mover.handles[slot])
    started = time.perf_counter()
    mover.apply(KVOp("save", slot, num_tokens=tokens, key=str(slot), is_async=is_async))
    stall_s = time.perf_counter() - started
    return _ended(mover), stall_s


def _load(churned: Churned, mover: Transfers, slot: int, tokens: int) -> Moved:
    """Load an object into a slot of its own and close that again."""
    mover.apply(KVOp("load", -1, num_tokens=tokens, key=str(slot)))
    moved = _ended(mover)
    mover.before(KVOp("close", -1))
    churned.store.close(mover.handles.pop(-1))
    return moved


def _ended(mover: Transfers) -> Moved:
    while not (ended := mover.take_ended(waits=True)):
        pass
    if ended[0].error is not None:
        raise OSError(ended[0].error)
    return ended[0]


def _row(way: str, samples: Iterator[_Sample]) -> SwapRow:
    found = list(samples)
    num_bytes = sum(moved.num_bytes for moved, _, _ in found)
    copies = sum(moved.num_copies for moved, _, _ in found)
    loads = [loaded for _, _, loaded in found]
    return SwapRow(
        way=way,
        num_bytes=statistics.median(moved.num_bytes for moved, _, _ in found),
        num_copies=statistics.median(moved.num_copies for moved, _, _ in found),
        bytes_per_copy=num_bytes / max(copies, 1),
        save_s=statistics.median(moved.seconds for moved, _, _ in found),
        load_s=statistics.median(loaded.seconds for loaded in loads),
        stall_s=statistics.median(stall_s for _, stall_s, _ in found),
        save_gb_per_s=num_bytes / sum(moved.seconds for moved, _, _ in found) / 1e9,
        load_gb_per_s=sum(loaded.num_bytes for loaded in loads) / sum(loaded.seconds for loaded in loads) / 1e9,
    )
