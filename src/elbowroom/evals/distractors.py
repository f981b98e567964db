"""Distractor text for the context tasks: runs of held-out source lines of a wanted number of tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from elbowroom.evals.base import TextTokenizer
from elbowroom.evals.heldout import heldout_texts


@dataclass(frozen=True, slots=True)
class Placed:
    """A context and where each inserted line begins."""

    context: str
    depths: tuple[float, ...]
    """Per inserted line: tokens before it as a share of the context's tokens."""
    num_tokens: int


def split_lines(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the lines of all texts, each with its line break and the blank lines behind it."""
    return tuple(line for text in texts for line in re.findall(r"[^\n]+\n+", text.rstrip("\n") + "\n\n"))


@cache
def heldout_lines() -> tuple[str, ...]:
    """Return the lines of all held-out texts."""
    return split_lines(heldout_texts())


class Distractors:
    """Held-out text cut into lines (each with the blank lines behind it), with their token counts.

    Args:
        tokenizer: the tokenizer in whose tokens lengths are given.
        texts: documents; the held-out standard library files by default.
    """

    def __init__(self, tokenizer: TextTokenizer, texts: Sequence[str] | None = None) -> None:
        self._tokenizer = tokenizer
        self._lines = heldout_lines() if texts is None else split_lines(texts)
        self._counts = np.array([self.count(line) for line in self._lines], dtype=np.int64)
        self._ends = np.cumsum(self._counts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all lines."""
        return int(self._ends[-1]) if self._lines else 0

    def count(self, text: str) -> int:
        """Return the number of tokens of ``text``."""
        return len(self._tokenizer.encode(text))

    def place(self, rng: np.random.Generator, lines: Sequence[str], depths: Sequence[float], budget: int) -> Placed:
        """Return a context of at most ``budget`` tokens (less than a line below it) with ``lines`` inside, in order.

        Args:
            rng: chooses where in the held-out text the context begins.
            lines: lines to insert, without line breaks.
            depths: rising wanted depth of each line in [0, 1].
            budget: tokens.

        Raises:
            ValueError: the inserted lines alone exceed the budget.
        """
        inserts = [line + "\n" for line in lines]
        filler_budget = budget - sum(self.count(line) for line in inserts)
        if filler_budget < 0:
            raise ValueError(f"{len(lines)} facts do not fit into {budget} tokens; ask for a longer context")
        first, stop = self._span(rng, filler_budget)
        while True:
            context, starts = self._join(first, stop, inserts, depths)
            total = self.count(context)
            if total <= budget or stop == first:
                break
            stop -= 1
        return Placed(context, tuple(self.count(context[:start]) / total for start in starts), total)

    def _span(self, rng: np.random.Generator, budget: int) -> tuple[int, int]:
        """Return a random run of lines ``[first, stop)`` of at most ``budget`` tokens."""
        last = int(np.searchsorted(self._ends, self._ends[-1] - budget))
        if last == 0:
            raise ValueError(f"the held-out text has {self._ends[-1]} tokens, {budget} were asked for")
        first = int(rng.integers(last))
        before = self._ends[first] - self._counts[first]
        return first, int(np.searchsorted(self._ends, before + budget, side="right"))

    def _join(self, first: int, stop: int, inserts: Sequence[str], depths: Sequence[float]) -> tuple[str, list[int]]:
        """Return the text of the run with the inserts, and the character offset of each insert."""
        before = self._ends[first:stop] - self._counts[first:stop] - (self._ends[first] - self._counts[first])
        length = float(self._counts[first:stop].sum())
        parts: list[str] = []
        starts: list[int] = []
        done = first
        for insert, depth in zip(inserts, depths, strict=True):
            line = first + int(np.searchsorted(before, depth * length)) if stop > first else first
            parts += self._lines[done:line]
            done = max(done, line)
            starts.append(sum(map(len, parts)))
            parts.append(insert)
        parts += self._lines[done:stop]
        return "".join(parts), starts


@lru_cache(maxsize=1)
def heldout_distractors(tokenizer: TextTokenizer) -> Distractors:
    """Return the held-out text counted with ``tokenizer``; tasks that follow each other share it."""
    return Distractors(tokenizer)
