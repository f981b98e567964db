"""Sentence BLEU of two lists of words, smoothed so that short texts without long matches do not score zero."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

MAX_ORDER = 4
SMOOTHING = 5
"""The constant K of the smoothing."""


def sentence_bleu(reference: Sequence[str], candidate: Sequence[str]) -> float:
    """Return BLEU-4 with equal weights and the smoothing of Chen and Cherry (2014), method 4.

    An order without a match counts as ``ln(length) / (K 2^i)`` matches for the i-th such order, ``length`` being the
    candidate's words; without a single common word the score is 0.

    Args:
        reference: the right words.
        candidate: the words to judge.
    """
    if not any(word in candidate for word in reference):
        return 0.0
    logs, num_empty = 0.0, 0
    for order in range(1, MAX_ORDER + 1):
        found, total = _matches(reference, candidate, order)
        matches: float = found
        if not found:
            num_empty += 1
            matches = math.log(len(candidate)) / (SMOOTHING * 2**num_empty)
        if not matches:
            return 0.0
        logs += math.log(matches / total) / MAX_ORDER
    return math.exp(min(0.0, 1 - len(reference) / len(candidate)) + logs)


def _matches(reference: Sequence[str], candidate: Sequence[str], order: int) -> tuple[int, int]:
    """Return how many n-grams of ``candidate`` are in ``reference`` (each as often as there), and how many it has."""
    ours, theirs = _ngrams(candidate, order), _ngrams(reference, order)
    return sum(min(count, theirs[gram]) for gram, count in ours.items()), max(1, sum(ours.values()))


def _ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))
