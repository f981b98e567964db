"""Sums whose working grows with their difficulty: the task of the small model that thinks.

``A3B8C5`` asks for 3 + 8 + 5. The working names every term and the sum so far (``A003B011C016``, four tokens a term),
the answer is the whole sum. Digits are single, so that every step is easy and only their number is hard.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_TERMS = len(LABELS)
STEP_TOKENS = 4
"""Tokens of the working for one term: its letter and three digits."""
INSTRUCTION = (
    "add the digits behind the letters. think first: after every letter write the sum so far in three digits. "
    "then answer with the sum."
)
"""A system prompt that the model has seen; the same for all questions, so that a prefix cache can share it."""


@dataclass(frozen=True, slots=True)
class Sum:
    """One question with its working and its answer."""

    question: str
    working: str
    answer: str


def random_sum(rng: np.random.Generator, num_terms: int) -> Sum:
    """Return a sum of ``num_terms`` digits from 1 to 9; ``num_terms`` is from 1 to 26."""
    digits = rng.integers(1, 10, size=num_terms).tolist()
    labels = LABELS[:num_terms]
    totals = np.cumsum(digits).tolist()
    question = "".join(f"{label}{digit}" for label, digit in zip(labels, digits, strict=True))
    working = "".join(f"{label}{total:03d}" for label, total in zip(labels, totals, strict=True))
    return Sum(question, working, str(totals[-1]))
