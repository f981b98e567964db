"""Attention statistics for query-aware policies: what each slot received, and how sharp each query was.

A second, plain pass over the scores with the log-sum-exp already known; only run when a policy asks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec
from elbowroom.kernels.base import StripStep
from elbowroom.kv.base import AttnOut, Want

OpenStrips = Sequence[Sequence[tuple[Tensor, Tensor] | None]]


def column_statistics(
    result: AttnOut, want: Want, q: Tensor, layer: LayerSpec, step: StripStep, strips: OpenStrips
) -> None:
    """Fill ``result.colsum`` and ``result.pmax`` as ``want`` asks.

    Args:
        result: output of the attention; its ``lse`` normalises the scores.
        want: which statistics.
        q: ``[N, Hq, D]``.
        layer: the layer's shape.
        step: rows and positions.
        strips: for each row, the decoded keys and values of its strips, None where expired.
    """
    colsum: list[Tensor] = []
    pmax = torch.zeros(q.shape[0], layer.num_q_heads)
    positions = step.positions
    for row, opened in enumerate(strips):
        begin, end = int(step.row_starts[row]), int(step.row_starts[row + 1])
        sums = torch.zeros(layer.num_kv_heads, int(step.lengths[row]))
        for block, pair in enumerate(opened):
            first = block * STRIP_TOKENS
            if pair is None or first >= sums.shape[1]:
                continue
            keys = pair[0][:, : sums.shape[1] - first]
            probs = _probabilities(q[begin:end], keys, layer, positions[begin:end], first, result.lse[begin:end])
            sums[:, first : first + keys.shape[1]] = probs.sum(dim=(0, 2))
            pmax[begin:end] = torch.maximum(pmax[begin:end], probs.amax(dim=-1).reshape(end - begin, -1))
        colsum.append(sums)
    result.colsum = colsum if want.colsum else None
    result.pmax = pmax if want.pmax else None


def _probabilities(q: Tensor, keys: Tensor, layer: LayerSpec, positions: Tensor, first: int, lse: Tensor) -> Tensor:
    """Return float32 ``[n, Hkv, group, slots]``: attention of each query on the slots from ``first`` on."""
    grouped = q.float().reshape(q.shape[0], layer.num_kv_heads, layer.group_size, layer.head_dim)
    scores = torch.einsum("nhgd,hsd->nhgs", grouped, keys.float()) * layer.scale
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    distance = positions[:, None] - torch.arange(first, first + keys.shape[1])[None, :]
    seen = distance >= 0
    if layer.window is not None:
        seen &= distance < layer.window
    # Hidden scores can be far above lse: they must be gone before exp, or infinity times 0 would be NaN.
    scores.masked_fill_(~seen[:, None, None, :], -math.inf)
    return (scores - lse.view(*grouped.shape[:3], 1)).exp()
