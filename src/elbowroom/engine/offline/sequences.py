"""How many sequences an offline job runs at once."""

from __future__ import annotations

MOST, FEWEST = 512, 64
_SHARE = 32
"""Logits and what sampling makes of them may take this part of the budget."""


def offline_sequences(vocab_size: int, budget_bytes: int) -> int:
    """Return the most sequences to run at once: bytes of KV cache are the limit, as long as logits stay small beside.

    A server bounds the batch for the sake of latency; here every token of a larger batch is won (memory-centric
    batching of BatchLLM, arXiv 2412.03594).
    """
    count = MOST
    while count > FEWEST and 2 * 4 * count * vocab_size > budget_bytes // _SHARE:
        count //= 2
    return count
