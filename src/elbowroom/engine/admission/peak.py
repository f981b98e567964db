"""The most bytes that a batch will hold, if each sequence generates so many tokens more (Gong et al., ASPLOS 2025).

All sequences decode in step and free everything at their end, so the peak lies just before one of them ends. With a
cost of one byte a token this is the paper's ``max_j (R_j + j l_j)``; here each sequence has the prices of its KV plan.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elbowroom.engine.admission.base import Outlook, Tokens


def future_peak(outlooks: Sequence[Outlook], num_more: Tokens) -> int:
    """Return the peak in bytes.

    Args:
        outlooks: of n sequences.
        num_more: int64 ``[n]``, tokens that each of them will still generate, 0 or more.
    """
    if not outlooks:
        return 0
    ends = np.unique(num_more)
    held = np.zeros(ends.size, dtype=np.int64)
    for outlook, more in zip(outlooks, num_more, strict=True):
        alive = np.searchsorted(ends, more, side="right")
        held[:alive] += outlook.bytes_at(ends[:alive])
    return int(held.max())
