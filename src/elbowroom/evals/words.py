"""English words for keys and lists, out of the held-out text: lower case, 4 to 10 letters."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from functools import cache

import numpy as np

from elbowroom.evals.heldout import heldout_texts

_WORD = re.compile(r"(?<!\w)[a-z]{4,10}(?!\w)")


@cache
def heldout_words() -> tuple[str, ...]:
    """Return all words, sorted."""
    return tuple(sorted({word for text in heldout_texts() for word in _WORD.findall(text)}))


def word_pairs(rng: np.random.Generator) -> Iterator[str]:
    """Yield two words with a hyphen between them, each pair once."""
    words, seen = heldout_words(), set[str]()
    while True:
        first, second = rng.integers(len(words), size=2).tolist()
        pair = f"{words[first]}-{words[second]}"
        if pair not in seen:
            seen.add(pair)
            yield pair


def uuids(rng: np.random.Generator) -> Iterator[str]:
    """Yield random UUIDs (version 4)."""
    while True:
        yield str(uuid.UUID(bytes=rng.bytes(16), version=4))


def numbers(rng: np.random.Generator, digits: int) -> Iterator[str]:
    """Yield random numbers of exactly ``digits`` digits, each once; there must be enough of them."""
    seen = set[int]()
    while True:
        number = int(rng.integers(10 ** (digits - 1), 10**digits))
        if number not in seen:
            seen.add(number)
            yield str(number)
