"""The most bytes that a batch will hold, if each sequence generates so many tokens more (Gong et al., ASPLOS 2025).

All sequences decode in step and free everything at their end, so the peak lies just before one of them ends. With a
cost of one byte a token this is the paper's ``max_j (R_j + j l_j)``; here each sequence has the prices of its KV plan.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from elbowroom.core import STRIP_TOKENS
from elbowroom.engine.admission.base import Outlook, Tokens


def future_peak(outlooks: Sequence[Outlook], num_more: Tokens) -> int:
    """Return the peak in bytes, the highest one where there are several guesses.

    Args:
        outlooks: of n sequences.
        num_more: int64 ``[n]`` or ``[guesses, n]``, tokens that each of them will still generate, 0 or more.
    """
    if not outlooks:
        return 0
    more = np.atleast_2d(num_more)
    ends = np.sort(more, axis=1)
    alive = more[:, :, None] >= ends[:, None, :]
    held = np.zeros(ends.shape, dtype=np.int64)
    for members, group in _by_prices(outlooks):
        rows = alive if len(group) == len(outlooks) else alive[:, members]
        held += (_bytes_at(group, ends) * rows).sum(axis=1)
    return int(held.max())


def bytes_over(outlooks: Sequence[Outlook], num_more: Tokens) -> npt.NDArray[np.int64]:
    """Return the bytes that each sequence pays once all have so many tokens more, int64 ``[n, times]``.

    Args:
        outlooks: of n sequences.
        num_more: int64 ``[times]``.
    """
    held = np.empty((len(outlooks), num_more.size), dtype=np.int64)
    for members, group in _by_prices(outlooks):
        held[members] = _bytes_at(group, num_more[None])[0]
    return held


def _by_prices(outlooks: Sequence[Outlook]) -> list[tuple[list[int], list[Outlook]]]:
    """Return the sequences of each KV plan: their places in ``outlooks``, and themselves."""
    groups: dict[int, list[int]] = {}
    for place, outlook in enumerate(outlooks):
        groups.setdefault(id(outlook.prices), []).append(place)
    return [(places, [outlooks[place] for place in places]) for places in groups.values()]


def _bytes_at(group: Sequence[Outlook], ends: Tokens) -> npt.NDArray[np.int64]:
    """Return what sequences of one plan pay at each end, int64 ``[guesses, members, ends]``, had they not ended."""
    prices = group[0].prices
    facts = np.asarray([(each.num_tokens, each.most_bytes, each.spared_bytes) for each in group], dtype=np.int64)
    tokens, most, spared = facts.T[:, None, :, None]
    blocks = (tokens + (STRIP_TOKENS - 1) + ends[:, None, :]) // STRIP_TOKENS
    held = prices[np.minimum(blocks, prices.size - 1)]
    if any(each.most_bytes < prices[-1] for each in group):
        held = np.minimum(held, most)
    paid: npt.NDArray[np.int64] = np.maximum(held - spared, 0) if spared.any() else held
    return paid
