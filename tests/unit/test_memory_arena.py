"""Arena and Range: page-exact charges, trimming, and the RSS that shows them; against a per-page oracle."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from elbowroom.errors import IntegrityError, OutOfBudget
from elbowroom.memory import Arena, Budget, DeviceTier, HostTier, Ledger, MemoryTier, Range
from elbowroom.memory.arena import FREE_OWNER
from elbowroom.memory.malloc import limit_malloc_caching
from elbowroom.memory.meter import rss_bytes

PAGE = HostTier.page_bytes
MIB = 2**20


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_arena(limit: int | None = None, clock: Clock | None = None, tier: MemoryTier | None = None) -> Arena:
    tier = tier or HostTier()
    return Arena(tier, Ledger(Budget({} if limit is None else {tier.name: limit})), clock or Clock())


def at(*starts: int) -> np.ndarray:
    return np.asarray(starts, dtype=np.int64)


def charges(arena: Arena) -> dict[str, int]:
    """Bytes of every owner that holds some."""
    tier = arena.tier.name
    return {o: t[tier]["current_bytes"] for o, t in arena.ledger.snapshot().items() if t[tier]["current_bytes"]}


def test_address_space_costs_nothing_until_committed():
    """A terabyte can be reserved; only committed pages are charged."""
    arena = make_arena(limit=4 * PAGE)
    made = arena.reserve(2**40, "kv")
    assert charges(arena) == {}
    made.commit(at(2**39), PAGE)
    assert charges(arena) == {"kv": PAGE}
    made.close()


def test_extents_that_share_a_page_pay_for_it_once_and_free_it_last():
    """A page is charged with the first extent on it and freed with the last."""
    arena = make_arena()
    made = arena.reserve(8 * PAGE, "kv")
    made.commit(at(0, PAGE // 2), PAGE // 2)  # page 0 twice
    made.commit(at(PAGE - 64), 128)  # pages 0 and 1
    assert charges(arena) == {"kv": 2 * PAGE}
    assert made.decommit(at(0, PAGE // 2), PAGE // 2) == 0
    assert charges(arena) == {"kv": 2 * PAGE}
    assert made.decommit(at(PAGE - 64), 128) == 2 * PAGE
    assert charges(arena) == {FREE_OWNER: 2 * PAGE}


def test_cost_is_what_commit_adds_to_the_live_pages():
    """Range.cost counts each page that is not live once, resident or not."""
    arena = make_arena()
    made = arena.reserve(16 * PAGE, "kv")
    made.commit(at(0, 2 * PAGE), PAGE)
    made.decommit(at(2 * PAGE), PAGE)
    asked = at(0, 64, 2 * PAGE, 5 * PAGE, 5 * PAGE + 64)
    before = made.live_bytes
    cost = made.cost(asked, PAGE)  # pages 0 (live), 1, 2 (free), 5, 6
    made.commit(asked, PAGE)
    assert cost == 4 * PAGE == made.live_bytes - before


def test_freed_pages_stay_charged_to_arena_free_until_idle():
    """trim(idle_s) gives back exactly the pages that have been free for that long."""
    clock = Clock()
    arena = make_arena(clock=clock)
    made = arena.reserve(8 * PAGE, "kv")
    made.commit(at(0), 4 * PAGE)
    made.decommit(at(0), 4 * PAGE)
    made.commit(at(0), 2 * PAGE)  # taken over again: free time starts anew below
    clock.now += 0.4
    made.decommit(at(0), 2 * PAGE)
    clock.now += 0.2
    assert charges(arena) == {FREE_OWNER: 4 * PAGE}
    assert arena.trim(0.5) == 2 * PAGE
    assert charges(arena) == {FREE_OWNER: 2 * PAGE}
    assert arena.trim(0.5) == 0
    clock.now += 0.3
    assert arena.trim(0.5) == 2 * PAGE
    assert (charges(arena), arena.free_bytes()) == ({}, 0)


def test_pressure_gives_free_pages_back_before_a_charge_is_refused():
    """At the bound, free pages of any range make room for a commit elsewhere."""
    arena = make_arena(limit=4 * PAGE)
    first, second = arena.reserve(8 * PAGE, "a"), arena.reserve(8 * PAGE, "b")
    first.commit(at(0), 3 * PAGE)
    first.decommit(at(0), 3 * PAGE)
    second.commit(at(0), 4 * PAGE)
    assert charges(arena) == {"b": 4 * PAGE}


def test_pressure_keeps_the_free_pages_that_the_commit_is_about_to_use():
    """Free pages under the committed extents are taken over, not given back and paid again."""
    arena = make_arena(limit=4 * PAGE)
    made = arena.reserve(16 * PAGE, "a")
    made.commit(at(0), 4 * PAGE)
    made.base[:PAGE] = 7
    made.decommit(at(0), 4 * PAGE)
    made.commit(at(0, 8 * PAGE), PAGE)  # page 0 is free, page 8 absent
    assert charges(arena)["a"] == 2 * PAGE
    assert bool((made.base[:PAGE] == 7).all())
    assert arena.ledger.total("host") <= 4 * PAGE


def test_refused_commit_changes_nothing():
    """A commit that cannot fit leaves owners, free pages and residency as they were."""
    arena = make_arena(limit=4 * PAGE)
    made = arena.reserve(16 * PAGE, "a")
    made.commit(at(0), 3 * PAGE)
    other = arena.reserve(PAGE, "b")
    other.commit(at(0), PAGE)
    other.decommit(at(0), PAGE)
    before = charges(arena)
    with pytest.raises(OutOfBudget, match="a asked for"):
        made.commit(at(0, 8 * PAGE, 9 * PAGE), PAGE)
    assert charges(arena) == before == {"a": 3 * PAGE, FREE_OWNER: PAGE}
    made.check(at(0, PAGE, 2 * PAGE), PAGE)


def test_refused_commit_counts_free_pages_that_it_needs_itself():
    """Free pages that the commit takes over cannot also make room for its absent ones."""
    arena = make_arena(limit=4 * PAGE)
    made = arena.reserve(16 * PAGE, "a")
    made.commit(at(0), 4 * PAGE)
    made.decommit(at(0), 4 * PAGE)
    made.commit(at(0), 2 * PAGE)
    with pytest.raises(OutOfBudget):
        made.commit(at(2 * PAGE, 3 * PAGE, 10 * PAGE), PAGE)
    assert charges(arena) == {"a": 2 * PAGE, FREE_OWNER: 2 * PAGE}


def test_decommit_of_what_is_not_held_changes_nothing():
    """Giving back an extent that is not committed is refused before any count moves."""
    arena = make_arena()
    made = arena.reserve(8 * PAGE, "a")
    made.commit(at(0), PAGE)
    with pytest.raises(IntegrityError, match="does not hold"):
        made.decommit(at(0, PAGE), PAGE)
    with pytest.raises(IntegrityError, match="does not hold"):
        made.decommit(at(0, 0), PAGE)
    made.check(at(0), PAGE)
    assert charges(arena) == {"a": PAGE}


@pytest.mark.parametrize(("start", "size"), [(-1, 64), (8 * PAGE - 63, 64), (0, 0), (0, 9 * PAGE)])
def test_extents_outside_the_range_are_refused(start: int, size: int):
    """Extents that are empty or leave the range are refused."""
    made = make_arena().reserve(8 * PAGE, "a")
    with pytest.raises(IntegrityError, match="outside"):
        made.commit(at(start), size)


def test_close_gives_everything_back_once():
    """A closed range holds nothing, takes nothing, and may be closed again."""
    arena = make_arena()
    made = arena.reserve(8 * PAGE, "a")
    made.commit(at(0), 4 * PAGE)
    made.commit(at(0), PAGE)
    made.decommit(at(0), PAGE)
    made.close()
    made.close()
    assert charges(arena) == {}
    with pytest.raises(IntegrityError):
        made.commit(at(0), PAGE)
    assert arena.trim(0) == 0


def test_neighbours_of_trimmed_pages_keep_their_content():
    """Trimming every second page leaves the bytes of the live ones alone, and the trimmed ones read as zero."""
    arena = make_arena()
    made = arena.reserve(64 * PAGE, "a")
    starts = np.arange(64, dtype=np.int64) * PAGE
    made.commit(starts, PAGE)
    pages = made.base.view(64, PAGE)
    pages[:] = torch.arange(1, 65, dtype=torch.uint8)[:, None]
    made.decommit(starts[::2], PAGE)
    assert arena.trim(0) == 32 * PAGE
    assert bool((pages[1::2] == torch.arange(2, 65, 2, dtype=torch.uint8)[:, None]).all())
    made.commit(starts[::2], PAGE)
    assert int(pages[::2].sum()) == 0


def test_rss_follows_the_ledger():
    """Touching 96 MiB raises VmRSS by as much, and trimming two thirds lowers it by 64 MiB (2 % or 1 MiB each)."""
    arena = make_arena()
    made = arena.reserve(256 * MIB, "a")
    tolerance = 2 * MIB
    gc.collect()
    start = rss_bytes()
    made.commit(at(0), 96 * MIB)
    assert abs(rss_bytes() - start) < tolerance  # charged before it is touched
    made.base[: 96 * MIB] = 1
    grown = rss_bytes() - start
    assert abs(grown - 96 * MIB) < tolerance
    made.commit(at(32 * MIB), MIB)  # a second extent: this MiB stays live
    made.decommit(at(0), 96 * MIB)
    assert abs(rss_bytes() - start - grown) < tolerance  # free pages stay resident
    assert arena.trim(0) == 95 * MIB
    assert abs(rss_bytes() - start - MIB) < tolerance
    assert bool((made.base[32 * MIB : 33 * MIB] == 1).all())
    made.close()
    assert abs(rss_bytes() - start) < tolerance


def test_one_touched_byte_is_one_resident_page():
    """Sparse touches of a large range cost a page each: no huge page hides behind the ledger's back."""
    arena = make_arena()
    made = arena.reserve(512 * MIB, "a")
    starts = np.arange(256, dtype=np.int64) * 2 * MIB
    made.commit(starts, 64)
    before = rss_bytes()
    made.base[:: 2 * MIB] = 1
    assert charges(arena) == {"a": 256 * PAGE}
    assert rss_bytes() - before < 256 * PAGE + 2 * MIB
    made.close()


def test_static_tier_charges_its_whole_range_at_once():
    """Device memory is charged when reserved, moves between free and owner, and is given back by close."""
    tier = DeviceTier("cpu")
    page = tier.page_bytes
    arena = make_arena(limit=8 * page, tier=tier)
    made = arena.reserve(8 * page - 1, "kv")
    assert (made.base.numel(), made.base.dtype, charges(arena)) == (8 * page, torch.uint8, {FREE_OWNER: 8 * page})
    made.commit(at(0), 3 * page)
    assert charges(arena) == {"kv": 3 * page, FREE_OWNER: 5 * page}
    made.decommit(at(0), 3 * page)
    assert arena.trim(0) == 0
    assert charges(arena) == {FREE_OWNER: 8 * page}
    with pytest.raises(OutOfBudget):
        arena.reserve(1, "more")
    made.close()
    assert charges(arena) == {}
    assert made.base.numel() == 0


def test_failed_allocation_of_a_static_tier_is_not_charged():
    """When the device refuses the memory, nothing stays charged."""

    class Full(DeviceTier):
        def allocate(self, virtual_bytes: int):
            raise MemoryError(virtual_bytes)

    arena = make_arena(tier=Full("cpu"))
    with pytest.raises(MemoryError):
        arena.reserve(1000, "kv")
    assert charges(arena) == {}


def test_unused_address_space_costs_no_metadata():
    """Reserving 64 GiB of address space adds less than 4 MiB to RSS, also after a trim."""
    limit_malloc_caching()  # as every engine does; else malloc may recycle (and clear) a freed chunk for the page books
    arena = make_arena()
    before = rss_bytes()
    made = arena.reserve(2**36, "kv")
    made.commit(at(0), PAGE)
    made.decommit(at(0), PAGE)
    arena.trim(0)
    assert rss_bytes() - before < 4 * MIB
    made.close()


NUM_PAGES = 12


class ArenaMachine(RuleBasedStateMachine):
    """Two ranges of an arena beside sets of pages."""

    which = st.integers(0, 1)
    starts = st.lists(st.integers(0, NUM_PAGES * PAGE - 3 * PAGE), min_size=1, max_size=4)
    sizes = st.sampled_from([64, PAGE // 2, PAGE, PAGE + 64, 3 * PAGE])

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.limit = 10 * PAGE
        self.arena = make_arena(self.limit, self.clock)
        self.ranges: list[Range] = [self.arena.reserve(NUM_PAGES * PAGE, owner) for owner in ("a", "b")]
        self.extents: list[list[tuple[tuple[int, ...], int]]] = [[], []]
        self.free: list[dict[int, float]] = [{}, {}]

    def live(self, which: int) -> set[int]:
        return {
            page
            for starts, size in self.extents[which]
            for start in starts
            for page in range(start // PAGE, (start + size - 1) // PAGE + 1)
        }

    def paint(self, which: int) -> None:
        """Write the page number to the first and last byte of every live page."""
        pages = self.ranges[which].base.view(-1, PAGE)
        for page in self.live(which):
            pages[page, :: PAGE - 1] = page + 1

    @rule(which=which, starts=starts, size=sizes)
    def commit(self, which: int, starts: list[int], size: int) -> None:
        extent = (tuple(starts), size)
        self.extents[which].append(extent)
        after = len(self.live(which)) + len(self.live(1 - which))
        self.extents[which].pop()
        before = self.snapshot()
        if after * PAGE > self.limit and self.needs_absent(which, extent):
            with pytest.raises(OutOfBudget):
                self.ranges[which].commit(at(*starts), size)
            assert self.snapshot() == before
            return
        resident = sum(map(len, self.free)) + len(self.live(0)) + len(self.live(1))
        new = self.pages_of(extent) - self.live(which)
        absent = new - self.free[which].keys()
        self.ranges[which].commit(at(*starts), size)
        if (resident + len(absent)) * PAGE > self.limit and absent:  # pressure
            self.free[which] = {page: self.free[which][page] for page in new & self.free[which].keys()}
            self.free[1 - which] = {}
        self.extents[which].append(extent)
        for page in new:
            self.free[which].pop(page, None)
        self.paint(which)

    def pages_of(self, extent: tuple[tuple[int, ...], int]) -> set[int]:
        starts, size = extent
        return {page for start in starts for page in range(start // PAGE, (start + size - 1) // PAGE + 1)}

    def needs_absent(self, which: int, extent: tuple[tuple[int, ...], int]) -> bool:
        return bool(self.pages_of(extent) - self.live(which) - self.free[which].keys())

    def snapshot(self) -> list[int]:
        return [b for r in self.ranges for b in (r.live_bytes, r.free_bytes)] + [self.arena.ledger.total("host")]

    @precondition(lambda self: self.extents[0] or self.extents[1])
    @rule(data=st.data())
    def decommit(self, data: st.DataObject) -> None:
        which, index = data.draw(st.sampled_from([(w, i) for w in (0, 1) for i in range(len(self.extents[w]))]))
        starts, size = self.extents[which].pop(index)
        freed = self.pages_of((starts, size)) - self.live(which)
        assert self.ranges[which].decommit(at(*starts), size) == len(freed) * PAGE
        self.free[which] |= dict.fromkeys(freed, self.clock.now)

    @rule(idle_s=st.sampled_from([0.0, 1.0, 2.0]))
    def trim(self, idle_s: float) -> None:
        gone = [(w, p) for w in (0, 1) for p, since in self.free[w].items() if since <= self.clock.now - idle_s]
        assert self.arena.trim(idle_s) == len(gone) * PAGE
        for which, page in gone:
            del self.free[which][page]

    @rule(seconds=st.sampled_from([0.5, 1.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(pages=st.integers(0, 16))
    def rebudget(self, pages: int) -> None:
        self.limit = pages * PAGE
        self.arena.ledger.budget.set("host", self.limit)

    @invariant()
    def agrees(self) -> None:
        expected: dict[str, int] = {}
        for which, owner in enumerate("ab"):
            made, live = self.ranges[which], self.live(which)
            assert (made.live_bytes, made.free_bytes) == (len(live) * PAGE, len(self.free[which]) * PAGE)
            expected[owner] = len(live) * PAGE
            pages = made.base.view(-1, PAGE)
            assert all(int(pages[page, 0]) == int(pages[page, -1]) == page + 1 for page in live)
        expected[FREE_OWNER] = sum(map(len, self.free)) * PAGE
        assert charges(self.arena) == {owner: held for owner, held in expected.items() if held}
        assert self.arena.ledger.total("host") == sum(expected.values())


ArenaMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)
TestArenaMachine = ArenaMachine.TestCase
