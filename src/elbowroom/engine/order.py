"""Order of a scheduler's sequences, and the seeds of those that bring none."""

from __future__ import annotations

import bisect

from elbowroom.engine.sequence import SeqState


def decodes_first(running: list[SeqState]) -> list[SeqState]:
    """Return a copy with the sequences that have one token left to compute before those that have more."""
    decodes = [seq for seq in running if len(seq.tokens) - seq.num_computed == 1]
    if len(decodes) < len(running):
        decodes += [seq for seq in running if len(seq.tokens) - seq.num_computed > 1]
    return decodes


def by_rank(seq: SeqState) -> tuple[float, ...]:
    """Return the sequence's place in the order of service."""
    return seq.rank


def insert(ordered: list[SeqState], seq: SeqState) -> None:
    """Put ``seq`` to its place by rank."""
    bisect.insort(ordered, seq, key=by_rank)


def fresh_seed(seed: int, order: int) -> int:
    """Return a reproducible seed for a request that brings none."""
    mixed = (seed * 0x9E3779B97F4A7C15 + (order + 1) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    return mixed ^ (mixed >> 31)
