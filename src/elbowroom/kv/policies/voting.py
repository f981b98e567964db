"""Voting: the newest queries of some heads choose which older tokens stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elbowroom.kv.policies.base import LayerView


def vote(view: LayerView, heads: Sequence[int], count: int, window: int, kernel: int) -> Tensor:
    """Return the tokens that stay for all heads alike, int64 ``[1, count]``: what ``heads`` look at, and the newest.

    Keys are decoded only of the KV heads that some of ``heads`` read, attention computed only of these.

    Args:
        view: the layer.
        heads: query heads that vote; each counts the same.
        count: tokens that stay.
        window: newest tokens that stay in any case.
        kernel: width of the average pooling of the scores; odd.
    """
    group = view.spec.group_size
    older = view.num_held - min(window, view.num_held)
    scores = torch.zeros(older)
    for kv_head in sorted({head // group for head in heads}):
        members = [head % group for head in heads if head // group == kv_head]
        scores += view.window_attention(kv_head, members)[..., :older].sum((0, 1))
    return best_and_newest((scores / len(heads))[None], view.num_held, count, kernel)


def best_and_newest(scores: Tensor, num_held: int, count: int, kernel: int) -> Tensor:
    """Return the best tokens of each row of ``scores [H, older]``, smoothed, and all newer ones, ``[H, count]``."""
    older = scores.shape[1]
    smooth = torch.nn.functional.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    best = smooth.topk(count - (num_held - older), dim=1).indices.sort(dim=1).values
    newest = torch.arange(older, num_held).expand(best.shape[0], -1)
    return torch.cat([best, newest], dim=1)
