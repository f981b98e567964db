"""ReclaimerLadder: rungs are asked in order, for what is still missing, and no further than needed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from elbowroom.memory import ReclaimerLadder


class Holder:
    """Gives up its bytes in whole units; lossy bytes only when allowed."""

    def __init__(self, name: str, held: int, unit: int = 1, lossy: int = 0) -> None:
        self.name, self.held, self.unit, self.lossy = name, held, unit, lossy
        self.asked: list[tuple[int, bool]] = []

    def reclaimable(self) -> int:
        return self.held

    def reclaim(self, num_bytes: int, lossless_only: bool) -> int:
        self.asked.append((num_bytes, lossless_only))
        room = self.held - (self.lossy if lossless_only else 0)
        freed = min(-(-num_bytes // self.unit) * self.unit, room)
        self.held -= freed
        return freed


def make_ladder(*holders: Holder) -> ReclaimerLadder:
    ladder = ReclaimerLadder()
    for holder in holders:
        ladder.add(holder)
    return ladder


def test_later_rungs_are_asked_only_for_what_is_missing():
    """The first rung is asked for all, the next for the rest, and the third not at all."""
    first, second, third = Holder("a", 30), Holder("b", 100), Holder("c", 100)
    assert make_ladder(first, second, third).relieve(50) == {"a": 30, "b": 20}
    assert (first.asked, second.asked, third.asked) == ([(50, True)], [(20, True)], [])


def test_lossy_bytes_are_given_up_only_when_allowed():
    """lossless_only reaches the rungs, and is the default."""
    holder = Holder("kv", 100, lossy=90)
    ladder = make_ladder(holder)
    assert ladder.relieve(50) == {"kv": 10}
    assert ladder.relieve(50, lossless_only=False) == {"kv": 50}


def test_nothing_is_asked_for_nothing():
    """Zero or negative bytes wake nobody."""
    holder = Holder("a", 10)
    assert make_ladder(holder).relieve(0) == make_ladder(holder).relieve(-5) == {}
    assert holder.asked == []


def test_rungs_of_one_name_are_added_up():
    """Two stores with the same name do not hide each other's bytes."""
    ladder = make_ladder(Holder("kv", 10), Holder("kv", 15))
    assert ladder.reclaimable() == {"kv": 25}
    assert ladder.relieve(20) == {"kv": 20}


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 8)), max_size=5), st.integers(0, 200))
def test_relieve_frees_enough_or_all(holdings: list[tuple[int, int]], wanted: int):
    """What was freed reaches what was wanted unless everything is gone, and reports what really went."""
    holders = [Holder(str(n), held, unit) for n, (held, unit) in enumerate(holdings)]
    ladder = make_ladder(*holders)
    before = sum(ladder.reclaimable().values())
    freed = sum(ladder.relieve(wanted).values())
    assert before - sum(ladder.reclaimable().values()) == freed
    assert freed >= wanted or freed == before
