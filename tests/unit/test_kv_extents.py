"""Extents: free groups as runs, against a set of taken ones; and how long the runs of sequences stay."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from elbowroom.errors import IntegrityError
from elbowroom.kv.extents import Ask, Extents

GROUPS = 40


def test_growth_goes_on_behind_the_last_group() -> None:
    """What a sequence expects is kept free for it while there is other room, and used up in place."""
    extents = Extents(100)
    first = extents.take(Ask(4, -1, 20))
    other = extents.take(Ask(10))
    assert (first, other) == ([0, 1, 2, 3], list(range(20, 30)))
    assert extents.take(Ask(16, 3)) == list(range(4, 20))
    assert extents.take(Ask(2, 19)) == [30, 31]


def test_claims_are_split_from_the_far_end_of_the_longest_when_nothing_else_is_left() -> None:
    """Every free group can be taken, however much is claimed."""
    extents = Extents(20)
    assert extents.take(Ask(1, -1, 14)) == [0]
    assert extents.take(Ask(1, -1, 6)) == [14]
    assert extents.num_free == 18
    assert extents.take(Ask(3)) == [11, 12, 13]
    assert extents.take(Ask(2, 0)) == [1, 2]
    assert sorted(extents.take(Ask(13))) == [*range(3, 11), *range(15, 20)]
    with pytest.raises(IntegrityError, match="used up"):
        extents.take(Ask(1))


def test_run_that_fits_best_is_taken_and_free_neighbours_are_joined() -> None:
    """The shortest free run that holds what is expected is begun; what comes back is one run again."""
    extents = Extents(60)
    runs = [extents.take(Ask(size)) for size in (10, 1, 5, 1, 20, 23)]
    for index in (0, 2, 4):
        extents.give(runs[index])
    assert extents.take(Ask(2, -1, 4)) == runs[2][:2]
    assert extents.take(Ask(12)) == runs[4][:12]
    extents.give(runs[2][:2])
    extents.give(runs[4][:12])
    extents.give(runs[1])
    extents.give(runs[3])
    assert extents.take(Ask(37)) == list(range(37))


def test_groups_that_were_used_come_before_fresh_ones() -> None:
    """A free run of the length that is wanted is preferred to pages that were never touched."""
    extents = Extents(100)
    run = extents.take(Ask(8))
    extents.give(run)
    assert extents.take(Ask(6, -1, 8)) == run[:6]
    assert extents.fresh == 8


def run_length(seed: int, hint: bool) -> float:
    """Return blocks for each run after a churn of 3,000 sequences of 90 blocks on average, 60 at a time."""
    rng, extents = random.Random(seed), Extents(6000)
    live: list[tuple[int, list[int]]] = []
    blocks, runs, free = 0, 0, 6000
    for number in range(3000):
        size = max(1, int(rng.expovariate(1 / 90)))
        while free < size or len(live) >= 60:
            length, groups = live.pop(rng.randrange(len(live)))
            for block in range(len(groups), length):
                groups += extents.take(Ask(1, groups[-1], length - block if hint else 2 * block))
            if number > 1000:
                blocks, runs = (
                    blocks + length,
                    runs + 1 + sum(b != a + 1 for a, b in itertools.pairwise(groups)),
                )
            extents.give(sorted(groups))
            free += length
        prompt = -(-size * 4 // 5)
        live.append((size, extents.take(Ask(prompt, -1, size if hint else 2 * prompt))))
        free -= size
    return blocks / runs


def test_runs_stay_long_after_churn() -> None:
    """A pool that is full most of the time and never has more room gives runs of 15 blocks and more."""
    assert run_length(1, hint=False) > 15
    assert run_length(1, hint=True) > 40


class ExtentsMachine(RuleBasedStateMachine):
    """Free groups beside the set of taken ones, in sequences that grow, shrink and end."""

    def __init__(self) -> None:
        super().__init__()
        self.extents = Extents(GROUPS)
        self.sequences: list[list[int]] = []

    @property
    def taken(self) -> list[int]:
        return [group for groups in self.sequences for group in groups]

    @rule(count=st.integers(1, 9), expected=st.integers(0, 30), data=st.data())
    def take(self, count: int, expected: int, data: st.DataObject) -> None:
        grown = data.draw(st.sampled_from([None, *range(len(self.sequences))]))
        if grown is None:
            self.sequences.append([])
            grown = len(self.sequences) - 1
        groups = self.sequences[grown]
        ask = Ask(count, groups[-1] if groups else -1, expected)
        if count > GROUPS - len(self.taken):
            with pytest.raises(IntegrityError):
                self.extents.take(ask)
            return
        trial = self.extents.copy().take(ask)
        made = self.extents.take(ask)
        assert made == trial
        assert len(made) == count
        groups += made

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sets(st.sampled_from(self.taken), min_size=1))
        self.sequences = [[group for group in groups if group not in chosen] for groups in self.sequences]
        self.extents.give(sorted(chosen))

    @invariant()
    def agrees(self) -> None:
        taken, extents = self.taken, self.extents
        assert len(set(taken)) == len(taken)
        assert extents.num_free == GROUPS - len(taken)
        assert sorted([*taken, *extents.free_groups(), *range(extents.fresh, GROUPS)]) == list(range(GROUPS))
        assert len(extents.free_groups()) == extents.num_used_free
        starts = sorted(extents._length)
        assert all(a + extents._length[a] < b for a, b in itertools.pairwise(starts)), "not joined"
        assert extents._by_length == sorted((length, start) for start, length in extents._length.items())


ExtentsMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestExtentsMachine = ExtentsMachine.TestCase
