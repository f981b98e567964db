"""LengthModel: how long answers get, learned from those that ended and those that still run.

A running sequence is a censored observation: its answer is longer than what it has. The survival function is that of
Kaplan and Meier (1958); with finished sequences alone, as published (Gong et al., ASPLOS 2025), the first ones to end
are the short ones, and long answers are underestimated until the window has filled.

Answers to prompts of one tenant are like one another, those to prompts of its about that size even more (on the Azure
conversation trace the size of the prompt explains 60 % of the variance of answers; the paper has one distribution for
all). So hazards are estimated for all, for each tenant and for each of a tenant's prompt sizes, and each estimate is
drawn towards the one above it as if that were a few answers more (the mean of a beta process, Hjort 1990).
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]
WINDOW = 1000
"""Answers that are remembered."""
_CELLS = 128
"""Lengths are rounded up to so many: each one while they are few, else at most some percent apart."""
_GUESSES = 32
_SIZES = 2
"""Classes of prompts per doubling of their size."""


class Kind(NamedTuple):
    """What is known of a request before it is answered."""

    tenant: str
    size: int
    """Class of the prompt's size."""

    @classmethod
    @functools.lru_cache(maxsize=1 << 14)
    def of(cls, tenant: str, num_prompt_tokens: int) -> Kind:
        """Return the kind of a request."""
        return cls(tenant, int(_SIZES * math.log2(max(num_prompt_tokens, 1))))


@dataclass(slots=True)
class LengthModel:
    """Lengths of the newest answers, in tokens.

    Before anything is known, lengths are taken to be anything up to the limit, equally likely on a logarithmic scale;
    that counts as ``prior`` answers and is soon outvoted.
    """

    prior: float = 0.0
    strength: float = 3.0
    """Answers that what is known of all counts as for a tenant, and what is known of a tenant for a size."""
    limit: int = 1
    """Longest answer that is thought of."""
    finished: deque[tuple[Kind, int]] = field(default_factory=deque)
    _edges: Counts = field(default_factory=lambda: np.ones(1, dtype=np.int64))
    """The lengths that are told apart, ascending, int64 ``[cells]``."""
    _ended: dict[tuple[object, ...], Weights] = field(default_factory=dict)
    """How many of the answers remembered ended in each cell, float64 ``[cells]``: of (), (tenant,), (tenant, size)."""

    def add(self, kind: Kind, num_tokens: int) -> None:
        """Note an answer that ended."""
        self.allow(num_tokens)
        self.finished.append((kind, num_tokens))
        self._count(kind, num_tokens, 1.0)
        if len(self.finished) > WINDOW:
            self._count(*self.finished.popleft(), -1.0)

    def allow(self, num_tokens: int) -> None:
        """Note that an answer may have so many."""
        if num_tokens <= self.limit:
            return
        self.limit = num_tokens
        few = num_tokens <= _CELLS
        self._edges = np.arange(1, num_tokens + 1) if few else _spread(num_tokens, _CELLS)
        self._ended = {}
        for kind, length in self.finished:
            self._count(kind, length, 1.0)

    def survival(self, kinds: Sequence[Kind], running: Sequence[Kind], has: Counts) -> tuple[Counts, Weights]:
        """Return lengths, ascending, int64 ``[cells]``, and the shares of answers that are longer, ``[kinds, cells]``.

        Args:
            kinds: of the answers that are asked about.
            running: kinds of unfinished answers.
            has: int64, tokens that unfinished answers have; they are longer than that.
        """
        # An unfinished answer was at risk at each length that it has.
        cells = self._edges.searchsorted(has, side="right")
        deaths, at_risk = self._level([()], [()] * len(running), cells)
        if self.prior:
            guesses = np.bincount(self._edges.searchsorted(_spread(self.limit, _GUESSES)), minlength=self._edges.size)
            ended = guesses * (self.prior / guesses.sum())
            deaths, at_risk = deaths + ended, at_risk + ended[::-1].cumsum()[::-1]
        hazards: Weights = deaths / np.maximum(at_risk, 1e-9)
        for depth in (1, 2):
            names = [kind[:depth] for kind in kinds]
            deaths, at_risk = self._level(names, [kind[:depth] for kind in running], cells)
            hazards = (deaths + self.strength * hazards) / (at_risk + self.strength)
        share: Weights = np.cumprod(np.maximum(1.0 - hazards, 0.0), axis=1, dtype=np.float64)
        return self._edges, share

    def chances(self, kinds: Sequence[Kind], has: Counts, limits: Counts, num_running: int, steps: Counts) -> Weights:
        """Return how likely answers still run after so many tokens more, float64 ``[n, steps]``.

        Args:
            kinds: of n answers, those that run first.
            has: int64 ``[n]``, tokens that they have.
            limits: int64 ``[n]``, tokens that they may have.
            num_running: how many of them run.
            steps: int64 ``[n, steps]``, tokens that each would have generated by then.
        """
        unique = {kind: place for place, kind in enumerate(dict.fromkeys(kinds))}
        rows = np.asarray([unique[kind] for kind in kinds])
        lengths, survival = self.survival(list(unique), kinds[:num_running], has[:num_running])
        alive = np.concatenate([np.ones((len(unique), 1)), survival], axis=1)
        now = alive[rows, lengths.searchsorted(has, side="right")][:, None]
        then = alive[rows[:, None], lengths.searchsorted(has[:, None] + steps - 1, side="right")]
        # Of answers longer than any that is known, nothing is known: they go on.
        share = np.where(now > 0, then / np.maximum(now, 1e-300), 1.0)
        within: Weights = np.where(has[:, None] + steps <= limits[:, None], np.minimum(share, 1.0), 0.0)
        return within

    def _level(
        self, names: Sequence[tuple[object, ...]], running: Sequence[tuple[object, ...]], cells: Counts
    ) -> tuple[Weights, Weights]:
        """Return how many ended in each cell and how many were at risk there, float64 ``[names, cells]`` each."""
        nobody = np.zeros(self._edges.size)
        deaths = np.stack([self._ended.get(name, nobody) for name in names])
        places = {name: place for place, name in enumerate(dict.fromkeys(names))}
        width = self._edges.size + 1
        spots = [
            places[name] * width + cell for name, cell in zip(running, cells.tolist(), strict=True) if name in places
        ]
        until = np.bincount(np.asarray(spots, dtype=np.int64), minlength=len(places) * width).reshape(-1, width)
        exposed = until[:, ::-1].cumsum(axis=1)[:, -2::-1][[places[name] for name in names]]
        return deaths, deaths[:, ::-1].cumsum(axis=1)[:, ::-1] + exposed

    def _count(self, kind: Kind, num_tokens: int, times: float) -> None:
        cell = int(self._edges.searchsorted(num_tokens))
        for depth in range(3):
            name = kind[:depth]
            ended = self._ended.setdefault(name, np.zeros(self._edges.size))
            ended[cell] += times
            if not ended.any():
                del self._ended[name]


def _spread(most: int, count: int) -> Counts:
    """Return lengths from 1 to ``most``, evenly on a logarithmic scale, int64 ``[<= count]``."""
    return np.unique(np.rint(np.geomspace(1, most, count)).astype(np.int64))
