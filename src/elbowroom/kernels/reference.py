"""Attention over strips in torch: the oracle of the other backends, and what runs where nothing native was built.

Strips are read in tiles of 16 and rows in blocks of 64, so beside q and out a call holds at most: 1024 slots of K and
V in the stored dtype and in float32, and a few float32 ``[64, Hq, 1024]`` score blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec, PageFormat
from elbowroom.kernels.base import UNIT_BYTES, StripLayout, StripStep, StripTable

TILE_STRIPS = 16
TILE_ROWS = 64


class ReferenceKernels:
    """Loops over sequences, blocks of rows and tiles of strips; the softmax is merged from tile to tile."""

    def append(
        self,
        step: StripStep,
        table: StripTable,
        base: Tensor,
        fmt: PageFormat,
        layout: StripLayout,
        k: Tensor,
        v: Tensor,
    ) -> None:
        """Copy each run of rows that shares a strip into it."""
        positions = step.positions.tolist()
        for sequence, start, end in _row_blocks(step, TILE_ROWS):
            row = start
            while row < end:
                block = positions[row] // STRIP_TOKENS
                stop = row + 1
                while stop < end and positions[stop] // STRIP_TOKENS == block:
                    stop += 1
                slots = step.positions[row:stop] % STRIP_TOKENS
                strip = _strip(base, fmt, int(table[sequence, block]))
                layout.store(strip, fmt, slots, k[row:stop].transpose(0, 1), v[row:stop].transpose(0, 1))
                row = stop

    def attend(
        self,
        step: StripStep,
        table: StripTable,
        base: Tensor,
        fmt: PageFormat,
        layout: StripLayout,
        spec: LayerSpec,
        q: Tensor,
        out: Tensor,
    ) -> Tensor:
        """Write attention to ``out`` and return lse, float32 ``[N, Hq]``."""
        lse = torch.empty(q.shape[:2], dtype=torch.float32)
        for sequence, start, end in _row_blocks(step, TILE_ROWS):
            low, high = _visible(step, sequence, start, end, spec.window)
            merged = _Softmax(q[start:end], spec, fmt)
            first, last = int(low.min()), int(high.max())
            for block in range(first // STRIP_TOKENS, last // STRIP_TOKENS + 1, TILE_STRIPS):
                slot = max(first, block * STRIP_TOKENS)
                stop = min(last + 1, (block + TILE_STRIPS) * STRIP_TOKENS)
                k, v = _tile(base, fmt, layout, table[sequence], slot, stop)
                merged.add(k, v, torch.arange(slot, stop), low, high)
            merged.write(out[start:end], lse[start:end])
        return lse


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

    def add(self, k_HSD: Tensor, v_HSD: Tensor, slots_S: Tensor, low_B: Tensor, high_B: Tensor) -> None:
        """Merge one tile of slots; row b reads the slots ``low[b] .. high[b]``."""
        scores = self._q @ k_HSD.transpose(1, 2)
        if self._spec.softcap is not None:
            scores = torch.tanh(scores / self._spec.softcap) * self._spec.softcap
        hidden = (slots_S < low_B[:, None]) | (slots_S > high_B[:, None])
        scores.masked_fill_(hidden.repeat_interleave(self._spec.group_size, dim=0), -math.inf)
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


def _strip(base: Tensor, fmt: PageFormat, unit: int) -> Tensor:
    """Return the bytes of the strip at ``unit``."""
    start = unit * UNIT_BYTES
    if start + fmt.strip_bytes > base.numel():
        raise ValueError(f"strip at byte {start} ends after the {base.numel()} bytes of its range")
    return base[start : start + fmt.strip_bytes]


def _tile(
    base: Tensor, fmt: PageFormat, layout: StripLayout, units: StripTable, slot: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Return K ``[Hkv, stop - slot, Dk]`` and V of the given slots in float32; other slots may hold garbage."""
    first, last = slot // STRIP_TOKENS, (stop - 1) // STRIP_TOKENS
    strips = [layout.open(_strip(base, fmt, int(unit)), fmt) for unit in units[first : last + 1]]
    inner = slice(slot - first * STRIP_TOKENS, stop - first * STRIP_TOKENS)
    k, v = (torch.cat(parts, dim=1)[:, inner] for parts in zip(*strips, strict=True))
    return k.float(), v.float()


KERNELS = ReferenceKernels()
