"""Attention over strips in torch: the oracle of the other backends, and what runs where nothing native was built.

Strips are read in tiles of 16 and rows in blocks of 64, so beside q and out a call holds at most: 1024 slots of K and
V in the stored dtype and in float32, and a few float32 ``[64, Hq, 1024]`` score blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec, PageFormat
from elbowroom.kernels import progressive
from elbowroom.kernels.base import (
    PLAIN,
    LayerStrips,
    Progress,
    Selection,
    StripLayout,
    StripStep,
    StripTable,
    Tail,
    strip_at,
)
from elbowroom.kernels.digest import write_digest
from elbowroom.kernels.extras import slot_bias

TILE_STRIPS = 16
TILE_ROWS = 64


class ReferenceKernels:
    """Loops over sequences, blocks of rows and tiles of strips; the softmax is merged from tile to tile."""

    def append(self, strips: LayerStrips, k: Tensor, v: Tensor) -> None:
        """Copy each run of rows that shares a strip into it; encode full strips where they are sealed."""
        opened, step = _open_part(strips), strips.step
        positions = step.positions.tolist()
        for sequence, start, end in _row_blocks(step, TILE_ROWS):
            row = start
            while row < end:
                block = positions[row] // STRIP_TOKENS
                stop = row + 1
                while stop < end and positions[stop] // STRIP_TOKENS == block:
                    stop += 1
                slots = step.positions[row:stop] % STRIP_TOKENS
                rows = (x[row:stop].transpose(0, 1) for x in (k, v))
                opened.layout.store(opened.strip(sequence, block), opened.fmt, slots, *rows)
                row = stop
        if opened.fmt.digest_bytes:
            _digest(opened, step)
        if strips.tail is not None:
            _seal(strips, strips.tail)

    def attend(self, strips: LayerStrips, spec: LayerSpec, q: Tensor, out: Tensor) -> Tensor:
        """Write attention to ``out`` and return lse, float32 ``[N, Hq]``."""
        lse, step, opened = torch.empty(q.shape[:2], dtype=torch.float32), strips.step, _open_part(strips)
        sealed = None if strips.tail is None else _Part(strips.table, None, strips.base, strips.fmt, strips.layout)
        for sequence, start, end in _row_blocks(step, TILE_ROWS):
            low, high = _visible(step, sequence, start, end, spec.window)
            selection = strips.selection
            if isinstance(selection, Progress) and selection.rows[sequence]:
                progressive.attend_row(strips, spec, sequence, q[start], out[start], lse[start])
                continue
            merged = _Softmax(q[start:end], spec, strips.open_fmt)
            read, readers = None, None
            if strips.tail is not None and strips.tail.places is not None:
                readers = torch.from_numpy(strips.tail.places[sequence] >= 0)
            selection = strips.selection
            if isinstance(selection, Selection) and selection.rows[sequence] and not _waits(strips, sequence, high):
                read = _selected(sealed or opened, sequence, q[start], low, high, selection.num_blocks)
            if sealed is not None:
                first = step.positions[start:end] // STRIP_TOKENS
                if strips.tail is not None and strips.tail.open_from is not None:
                    first = first.clamp(max=int(strips.tail.open_from[sequence]))
                _add_tiles(merged, sealed, sequence, low, torch.minimum(high, first * STRIP_TOKENS - 1), read, readers)
                low = torch.maximum(low, first * STRIP_TOKENS)
            _add_tiles(merged, opened, sequence, low, high, read, readers)
            merged.write(out[start:end], lse[start:end])
        return lse


@dataclass(frozen=True, slots=True)
class _Part:
    """Strips of one format."""

    table: StripTable
    first_blocks: npt.NDArray[np.int64] | None
    base: Tensor
    fmt: PageFormat
    layout: StripLayout

    def strip(self, sequence: int, block: int) -> Tensor:
        """Return the bytes of a block of a sequence."""
        column = block - (0 if self.first_blocks is None else int(self.first_blocks[sequence]))
        if not 0 <= column < self.table.shape[1]:
            raise ValueError(f"block {block} is not in the table of its strips")
        return strip_at(self.base, self.fmt, int(self.table[sequence, column]))

    def tile(self, sequence: int, slot: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return K ``[Hkv, stop - slot, Dk]``, V and biases of scores, of the given slots, in float32."""
        first, last = slot // STRIP_TOKENS, (stop - 1) // STRIP_TOKENS
        strips = [self.strip(sequence, block) for block in range(first, last + 1)]
        pairs = [self.layout.open(strip, self.fmt) for strip in strips]
        inner = slice(slot - first * STRIP_TOKENS, stop - first * STRIP_TOKENS)
        k, v = (torch.cat(parts, dim=1)[:, inner] for parts in zip(*pairs, strict=True))
        biases = [bias for strip in strips if (bias := slot_bias(strip, self.fmt)) is not None]
        return k.float(), v.float(), torch.cat(biases, dim=1)[:, inner] if biases else None


def _open_part(strips: LayerStrips) -> _Part:
    """Return the strips that take new tokens."""
    tail = strips.tail
    if tail is None:
        return _Part(strips.table, None, strips.base, strips.fmt, strips.layout)
    return _Part(tail.table, tail.first_blocks, tail.base, tail.fmt, PLAIN)


def _seal(strips: LayerStrips, tail: Tail) -> None:
    slots = torch.arange(STRIP_TOKENS)
    for source, target in zip(tail.full.tolist(), tail.sealed.tolist(), strict=True):
        k, v = PLAIN.open(strip_at(tail.base, tail.fmt, source), tail.fmt)
        strips.layout.store(strip_at(strips.base, strips.fmt, target), strips.fmt, slots, k, v)


def _digest(opened: _Part, step: StripStep) -> None:
    """Bring the digests of strips that were written up to date."""
    for sequence, start, end in _row_blocks(step, max(step.num_rows, 1)):
        positions = step.positions[start:end]
        for block in sorted(set((positions // STRIP_TOKENS).tolist())):
            slots = positions[positions // STRIP_TOKENS == block] % STRIP_TOKENS
            held = min(int(step.lengths[sequence]) - block * STRIP_TOKENS, STRIP_TOKENS)
            strip = opened.strip(sequence, block)
            keys, _ = opened.layout.open(strip, opened.fmt)
            write_digest(strip, opened.fmt, keys, int(slots.min()), int(slots.max()) + 1, held)


def _waits(strips: LayerStrips, sequence: int, high: Tensor) -> bool:
    """Return whether a sequence has full blocks that are not sealed yet, so that nothing bounds their keys."""
    tail = strips.tail
    return (
        tail is not None and tail.open_from is not None and int(tail.open_from[sequence]) < int(high[0]) // STRIP_TOKENS
    )


def _selected(part: _Part, sequence: int, q_HD: Tensor, low: Tensor, high: Tensor, num_blocks: int) -> Tensor | None:
    """Return which blocks each KV head of a row reads, bool ``[Hkv, blocks]``; None: all.

    Args:
        part: strips that tell the bounds of all blocks between the first and the newest.
        sequence: whose row it is.
        q_HD: its query.
        low: first slot that it may read, ``[1]``.
        high: the last one.
        num_blocks: how many blocks are read.
    """
    first, own = int(low[0]) // STRIP_TOKENS, int(high[0]) // STRIP_TOKENS
    if own - first < num_blocks:
        return None
    heads = part.fmt.num_kv_heads
    queries = q_HD.float().view(heads, -1, 1, 1, part.fmt.head_dim)
    bounds = [part.layout.bounds(part.strip(sequence, block), part.fmt) for block in range(first + 1, own)]
    least, greatest = (torch.stack(each, dim=1)[:, None] for each in zip(*bounds, strict=True))
    scores = torch.maximum(queries * least, queries * greatest).sum(-1)  # [Hkv, G, blocks, runs]
    scores = scores.nan_to_num(torch.inf, torch.inf, -torch.inf).amax((1, 3))
    best = scores.argsort(dim=1, descending=True, stable=True)[:, : num_blocks - 2] + first + 1
    read = torch.zeros(heads, own + 1, dtype=torch.bool)
    read[:, [first, own]] = True
    return read.scatter_(1, best, True)


def _add_tiles(
    merged: _Softmax,
    part: _Part,
    sequence: int,
    low: Tensor,
    high: Tensor,
    read: Tensor | None = None,
    readers: Tensor | None = None,
) -> None:
    """Merge all slots of a part that any row of a block reads; row b reads ``low[b] .. high[b]``.

    With ``read``, bool ``[Hkv, blocks]``, each KV head reads its own blocks of that; with ``readers``, bool ``[Hkv]``,
    only those heads read.
    """
    first, last = int(low.min()), int(high.max())
    if read is not None:
        for block in range(first // STRIP_TOKENS, last // STRIP_TOKENS + 1):
            slot, stop = max(first, block * STRIP_TOKENS), min(last + 1, (block + 1) * STRIP_TOKENS)
            if slot < stop and read[:, block].any():
                merged.add(*part.tile(sequence, slot, stop), torch.arange(slot, stop), low, high, read[:, block])
        return
    for block in range(first // STRIP_TOKENS, last // STRIP_TOKENS + 1, TILE_STRIPS):
        slot = max(first, block * STRIP_TOKENS)
        stop = min(last + 1, (block + TILE_STRIPS) * STRIP_TOKENS)
        if slot < stop:
            merged.add(*part.tile(sequence, slot, stop), torch.arange(slot, stop), low, high, readers)


class _Softmax:
    """Running maximum, denominator and weighted sum of a block of rows ``[Hkv, B * G]``."""

    def __init__(self, q_BHD: Tensor, spec: LayerSpec, fmt: PageFormat) -> None:
        rows, heads = q_BHD.shape[0], fmt.num_kv_heads
        self._spec, self._rows = spec, rows
        grouped = q_BHD.float().reshape(rows, heads, spec.group_size, fmt.head_dim).transpose(0, 1)
        self._q = grouped.reshape(heads, rows * spec.group_size, fmt.head_dim) * spec.scale
        self._max = torch.full((heads, rows * spec.group_size, 1), -math.inf)
        self._sum = torch.zeros_like(self._max)
        self._out = torch.zeros(heads, rows * spec.group_size, fmt.v_head_dim)

    def add(
        self,
        k_HSD: Tensor,
        v_HSD: Tensor,
        bias_HS: Tensor | None,
        slots_S: Tensor,
        low_B: Tensor,
        high_B: Tensor,
        readers_H: Tensor | None = None,
    ) -> None:
        """Merge one tile of slots; row b reads the slots ``low[b] .. high[b]``, and only heads that are readers."""
        if readers_H is not None:  # what is not read may be anything, and 0 times that not 0
            k_HSD, v_HSD = (x.masked_fill(~readers_H[:, None, None], 0.0) for x in (k_HSD, v_HSD))
        scores = self._q @ k_HSD.transpose(1, 2)
        if self._spec.softcap is not None:
            scores = torch.tanh(scores / self._spec.softcap) * self._spec.softcap
        if bias_HS is not None:
            scores += bias_HS[:, None]
        hidden = (slots_S < low_B[:, None]) | (slots_S > high_B[:, None])
        scores.masked_fill_(hidden.repeat_interleave(self._spec.group_size, dim=0), -math.inf)
        if readers_H is not None:
            scores.masked_fill_(~readers_H[:, None, None], -math.inf)
        # A row that has read nothing yet keeps maximum -inf; 0 stands in for it, so that exp(-inf - 0) is 0, not NaN.
        top = torch.maximum(self._max, scores.amax(dim=2, keepdim=True))
        finite = top.masked_fill(top == -math.inf, 0.0)
        weights, rescale = scores.sub_(finite).exp_(), torch.exp(self._max - finite)
        self._sum = self._sum * rescale + weights.sum(dim=2, keepdim=True)
        self._out = self._out.mul_(rescale).add_(weights @ v_HSD)
        self._max = top

    def write(self, out_BHD: Tensor, lse_BH: Tensor) -> None:
        """Write the normalised rows; a row that read nothing gives 0 and lse -inf."""
        heads, group = self._q.shape[0], self._spec.group_size
        result = self._out / self._sum.masked_fill(self._sum == 0, 1.0)
        out_BHD.copy_(result.view(heads, self._rows, group, -1).transpose(0, 1).reshape(out_BHD.shape))
        lse = (self._max + self._sum.log()).view(heads, self._rows, group)
        lse_BH.copy_(lse.transpose(0, 1).reshape(lse_BH.shape))


def _row_blocks(step: StripStep, num_rows: int) -> Iterator[tuple[int, int, int]]:
    """Yield (sequence, first row, end row), at most ``num_rows`` rows at a time."""
    starts = step.row_starts.tolist()
    for sequence, (start, end) in enumerate(itertools.pairwise(starts)):
        for row in range(start, end, num_rows):
            yield sequence, row, min(end, row + num_rows)


def _visible(step: StripStep, sequence: int, start: int, end: int, window: int | None) -> tuple[Tensor, Tensor]:
    """Return the first and last slot that each row of a block reads."""
    high = step.positions[start:end].clamp(max=int(step.lengths[sequence]) - 1)
    low = torch.zeros_like(high) if window is None else step.positions[start:end] - window + 1
    return low.clamp(min=int(step.first_slots[sequence])), high


KERNELS = ReferenceKernels()
