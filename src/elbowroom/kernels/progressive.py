"""Rows that read keys plane by plane, and values where they matter, in torch: the oracle of the native code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec, PageFormat
from elbowroom.kernels.base import LayerStrips, Progress, StripLayout, strip_at


class PlanesLayout(StripLayout, Protocol):
    """The layout of codec ``planes``."""

    def open_high(self, strip: Tensor, fmt: PageFormat) -> Tensor:
        """Return keys as the high plane of a strip says, float32 ``[Hkv, 64, Dk]``."""


def attend_row(
    strips: LayerStrips, spec: LayerSpec, sequence: int, q_HD: Tensor, out_HD: Tensor, lse_H: Tensor
) -> None:
    """Write the attention of the only row of a sequence, and count what it reads.

    Args:
        strips: with a ``Progress``.
        spec: of the layer.
        sequence: whose row it is.
        q_HD: its query ``[Hq, Dk]``.
        out_HD: ``[Hq, Dv]``.
        lse_H: float32 ``[Hq]``.
    """
    progress, row = cast("Progress", strips.selection), _Row(strips, spec, sequence)
    queries = q_HD.float().view(spec.num_kv_heads, spec.group_size, -1) * spec.scale
    scores = row.scores(queries, row.high())
    refetched = needs_low(scores, progress.tau)
    if refetched.any():
        scores = torch.where(refetched[:, None, None], row.scores(queries, row.keys()), scores)
    weights = scores.softmax(-1)
    blocks = -(-weights.shape[-1] // STRIP_TOKENS)
    padded = torch.nn.functional.pad(weights, (0, blocks * STRIP_TOKENS - weights.shape[-1]))
    read = values_read(torch.unflatten(padded, -1, (blocks, STRIP_TOKENS)).sum(-1).amax(1), progress.eps)
    kept = read.repeat_interleave(STRIP_TOKENS, dim=1)[:, None, : weights.shape[-1]]
    values = row.values().masked_fill(~kept.transpose(1, 2), 0.0)
    out_HD.copy_((weights.masked_fill(~kept, 0.0) @ values).view(out_HD.shape))
    lse_H.copy_(scores.logsumexp(-1).view(-1))
    if strips.tally is not None:
        heads, low = spec.num_kv_heads, int(refetched.sum())
        for index, count in enumerate((heads, low, heads * blocks, low * blocks, int(read.sum()))):
            strips.tally[index] += count


def needs_low(scores: Tensor, tau: float) -> Tensor:
    """Return which KV heads read the low plane, bool ``[Hkv]``, with ``scores [Hkv, G, slots]`` of the high one."""
    if tau >= 1 or tau == 0:
        return torch.full(scores.shape[:1], tau > 0)
    return ~(scores.softmax(-1).amax(-1) >= tau).all(1)


def values_read(masses: Tensor, eps: float) -> Tensor:
    """Return which blocks' values are read, bool ``[Hkv, blocks]``, of which ``masses`` says the probability."""
    if eps == 0:
        return torch.ones(masses.shape, dtype=torch.bool)
    ranked, order = masses.sort(dim=1, stable=True)
    left_out = (ranked.cumsum(1) <= eps) & masses.isfinite().all(1, keepdim=True)
    return ~torch.zeros(masses.shape, dtype=torch.bool).scatter_(1, order, left_out)


@dataclass(frozen=True, slots=True)
class _Row:
    """What a row may read."""

    strips: LayerStrips
    spec: LayerSpec
    sequence: int

    def high(self) -> Tensor:
        """Return keys ``[Hkv, slots, Dk]`` as the high plane says."""
        layout = cast("PlanesLayout", self.strips.layout)
        return self._seen([layout.open_high(strip, self.strips.fmt) for strip in self._strips()])

    def keys(self) -> Tensor:
        """Return keys as both planes say."""
        return self._seen([self.strips.layout.open(strip, self.strips.fmt)[0] for strip in self._strips()])

    def values(self) -> Tensor:
        """Return values ``[Hkv, slots, Dv]``."""
        return self._seen([self.strips.layout.open(strip, self.strips.fmt)[1] for strip in self._strips()])

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return scores ``[Hkv, G, slots]``."""
        scores = queries @ keys.transpose(1, 2)
        if self.spec.softcap is not None:
            scores = torch.tanh(scores / self.spec.softcap) * self.spec.softcap
        return scores

    def _strips(self) -> list[Tensor]:
        first, last = self._slots()
        blocks = range(first // STRIP_TOKENS, last // STRIP_TOKENS + 1)
        table = self.strips.table[self.sequence]
        return [strip_at(self.strips.base, self.strips.fmt, int(table[block])) for block in blocks]

    def _seen(self, strips: list[Tensor]) -> Tensor:
        first, last = self._slots()
        skipped = first // STRIP_TOKENS * STRIP_TOKENS
        return torch.cat(strips, dim=1)[:, first - skipped : last + 1 - skipped].float()

    def _slots(self) -> tuple[int, int]:
        step = self.strips.step
        position = int(step.positions[int(step.row_starts[self.sequence])])
        return int(step.first_slots[self.sequence]), min(position, int(step.lengths[self.sequence]) - 1)
