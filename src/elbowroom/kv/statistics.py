"""Attention statistics for query-aware policies: what each slot received, and how sharp each query was.

A second, plain pass over the scores with the log-sum-exp already known; only run when a policy asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec
from elbowroom.kernels.base import PLAIN, LayerStrips, strip_at
from elbowroom.kernels.extras import slot_bias
from elbowroom.kv.base import AttnOut, Want


def column_statistics(result: AttnOut, want: Want, q: Tensor, layer: LayerSpec, strips: LayerStrips) -> None:
    """Fill ``result.colsum`` and ``result.pmax`` as ``want`` asks.

    Args:
        result: output of the attention; its ``lse`` normalises the scores.
        want: which statistics.
        q: ``[N, Hq, D]``.
        layer: the layer's shape.
        strips: what was attended to.
    """
    colsum: list[Tensor] = []
    pmax = torch.zeros(q.shape[0], layer.num_q_heads)
    step = strips.step
    for row in range(step.num_sequences):
        begin, end = int(step.row_starts[row]), int(step.row_starts[row + 1])
        sums = torch.zeros(layer.num_kv_heads, int(step.lengths[row]))
        for first, keys, bias, readers in _opened(strips, row, step.positions[begin:end]):
            stop = min(first + STRIP_TOKENS, sums.shape[1])
            rows = torch.arange(begin, end)[readers]
            probs = _probabilities(
                q[rows], keys[:, : stop - first], bias, layer, step.positions[rows], first, result.lse[rows]
            )
            sums[:, first:stop] += probs.sum(dim=(0, 2))
            pmax[rows] = torch.maximum(pmax[rows], probs.amax(dim=-1).reshape(len(rows), -1))
        colsum.append(sums)
    result.colsum = colsum if want.colsum else None
    result.pmax = pmax if want.pmax else None


def _opened(strips: LayerStrips, row: int, positions: Tensor) -> Iterator[tuple[int, Tensor, Tensor | None, Tensor]]:
    """Yield, strip by strip, its first slot, its keys, the bias of its scores and which of the queries read it."""
    own, tail = positions // STRIP_TOKENS, strips.tail
    first_open = own
    if tail is not None and tail.open_from is not None:
        first_open = own.clamp(max=int(tail.open_from[row]))
    blocks = range(int(strips.step.first_slots[row]) // STRIP_TOKENS, int(own.max()) + 1)
    for block in blocks:
        readers = own >= block if tail is None else first_open > block
        if readers.any():
            strip = strip_at(strips.base, strips.fmt, int(strips.table[row, block]))
            yield block * STRIP_TOKENS, strips.layout.open(strip, strips.fmt)[0], slot_bias(strip, strips.fmt), readers
        readers = (own >= block) & (first_open <= block)
        if tail is not None and readers.any():
            place = int(tail.table[row, block - int(tail.first_blocks[row])])
            yield block * STRIP_TOKENS, PLAIN.open(strip_at(tail.base, tail.fmt, place), tail.fmt)[0], None, readers


def _probabilities(
    q: Tensor, keys: Tensor, bias: Tensor | None, layer: LayerSpec, positions: Tensor, first: int, lse: Tensor
) -> Tensor:
    """Return float32 ``[n, Hkv, group, slots]``: attention of each query on the slots from ``first`` on."""
    grouped = q.float().reshape(q.shape[0], layer.num_kv_heads, layer.group_size, layer.head_dim)
    scores = torch.einsum("nhgd,hsd->nhgs", grouped, keys.float()) * layer.scale
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    if bias is not None:
        scores += bias[:, None, : keys.shape[1]]
    distance = positions[:, None] - torch.arange(first, first + keys.shape[1])[None, :]
    seen = distance >= 0
    if layer.window is not None:
        seen &= distance < layer.window
    # Hidden scores can be far above lse: they must be gone before exp, or infinity times 0 would be NaN.
    scores.masked_fill_(~seen[:, None, None, :], -math.inf)
    norm = lse.masked_fill(lse == -math.inf, math.inf)  # a head that reads nothing has no probabilities
    return (scores - norm.view(*grouped.shape[:3], 1)).exp()
