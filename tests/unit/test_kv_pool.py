"""StripPool: groups of strips, reference counts and pages; against lists of holders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from elbowroom.core import PageFormat
from elbowroom.errors import IntegrityError, OutOfBudget
from elbowroom.kv.pool import ABSENT, StripPool
from elbowroom.memory import Arena, Budget, DeviceTier, HostTier, Ledger

PAGE = HostTier.page_bytes
Entries = np.ndarray


def make_format(strip_bytes: int) -> PageFormat:
    return PageFormat(
        codec="plain", dtype="float32", num_kv_heads=1, head_dim=1, v_head_dim=1, payload_bytes=strip_bytes
    )


def make_pool(strip_bytes: int, layers: int, groups: int, limit: int | None = None) -> tuple[StripPool, Arena]:
    arena = Arena(HostTier(), Ledger(Budget({} if limit is None else {"host": limit})))
    return StripPool(arena, "kv", make_format(strip_bytes), layers, groups * layers * strip_bytes), arena


def test_strips_of_a_group_lie_side_by_side():
    """The strips of one token block over all layers are one contiguous run."""
    pool, _ = make_pool(192, layers=3, groups=4)
    starts = pool.take(2).astype(np.int64) * 64
    assert starts.T.tolist() == [[0, 192, 384], [576, 768, 960]]


def test_taken_strips_do_not_overlap():
    """Each strip keeps what was written to it while all others are written."""
    pool, _ = make_pool(128, layers=3, groups=5)
    entries = pool.take(5).reshape(-1).tolist()
    for number, entry in enumerate(entries):
        pool.strip(entry).fill_(number)
    assert [set(pool.strip(entry).tolist()) for entry in entries] == [{number} for number in range(15)]


def test_recently_freed_groups_are_taken_first():
    """A freed group comes back before a fresh one, since its pages are resident."""
    pool, _ = make_pool(PAGE, layers=2, groups=8)
    entries = pool.take(4)
    pool.release(entries[:, 1:3])
    free = pool.free_bytes
    again = pool.take(2)
    assert sorted(again[0].tolist()) == entries[0, 1:3].tolist()
    assert (free, pool.free_bytes) == (4 * PAGE, 0)


def test_shared_strips_are_freed_by_the_last_holder():
    """Release returns page bytes only when nobody holds the strips any more."""
    pool, arena = make_pool(PAGE, layers=2, groups=4)
    entries = pool.take(2)
    pool.share(entries)
    assert (pool.num_strips, pool.num_shared_strips, pool.is_shared(entries)) == (4, 4, True)
    assert pool.release(entries) == 0
    assert not pool.is_shared(entries)
    assert pool.release(entries) == 4 * PAGE
    assert arena.ledger.held("kv", "host") == 0


def test_layers_of_a_group_can_be_freed_one_at_a_time():
    """A strip's pages go with it; the group is handed out again only when all its layers are gone."""
    pool, _ = make_pool(PAGE, layers=2, groups=1)
    entries = pool.take(1)
    assert pool.release(entries[:1]) == PAGE
    assert pool.num_free_groups == 0
    with pytest.raises(IntegrityError, match="used up"):
        pool.take(1)
    assert pool.release(entries[1:]) == PAGE
    assert pool.num_free_groups == 1


def test_absent_entries_are_passed_over():
    """Expired entries can be shared, released and counted without effect."""
    pool, _ = make_pool(PAGE, layers=1, groups=2)
    absent = np.full((1, 3), ABSENT)
    pool.share(absent)
    assert pool.release(absent) == 0
    assert not pool.is_shared(absent)
    pool.check(absent)


def test_releasing_what_is_not_held_changes_nothing():
    """One release too many is refused before any count moves, in one call or two."""
    pool, _ = make_pool(PAGE, layers=1, groups=4)
    entries = pool.take(2)
    with pytest.raises(IntegrityError, match="more often"):
        pool.release(np.concatenate([entries, entries[:, :1]], axis=1))
    pool.check(entries)
    pool.release(entries)
    with pytest.raises(IntegrityError, match="more often"):
        pool.release(entries[:, :1])
    pool.check(np.empty(0, dtype=np.uint32))


def test_refused_take_takes_nothing():
    """When the pages do not fit, groups, counts and charges stay as they were."""
    pool, arena = make_pool(PAGE, layers=2, groups=8, limit=5 * PAGE)
    entries = pool.take(2)
    with pytest.raises(OutOfBudget):
        pool.take(1)
    pool.check(entries)
    assert (pool.num_free_groups, arena.ledger.total("host")) == (6, 4 * PAGE)


def test_cost_is_what_take_adds():
    """cost(n) is the growth of the live bytes by take(n), with strips that share pages too."""
    for strip in (192, PAGE // 2, PAGE + 64, 3 * PAGE):
        pool, _ = make_pool(strip, layers=3, groups=16)
        pool.release(pool.take(5)[:, 1:4])
        for count in (0, 1, 4):
            cost, before = pool.cost(count), pool.live_bytes
            pool.take(count)
            assert pool.live_bytes - before == cost


@pytest.mark.parametrize("damage", ["refs", "stack", "pages"])
def test_check_sees_every_kind_of_damage(damage: str):
    """A wrong reference count, a wrong free stack and a wrong page count are each found."""
    pool, _ = make_pool(PAGE, layers=2, groups=4)
    entries = pool.take(3)
    pool.release(entries[:, 2:])
    held = entries[:, :2]
    pool.check(held)
    if damage == "refs":
        pool._refs[0, 0] += 1
    elif damage == "stack":
        pool.extents.give([0])
    else:
        pool._range._covers[1] += 1
    with pytest.raises(IntegrityError):
        pool.check(held)


def test_pool_on_a_static_tier_takes_from_what_it_reserved():
    """On device memory the whole range is charged, and taking strips moves bytes from free to the owner."""
    tier = DeviceTier("cpu")
    ledger = Ledger(Budget({"device": 2 * tier.page_bytes}))
    pool = StripPool(Arena(tier, ledger), "kv", make_format(tier.page_bytes), 1, 2 * tier.page_bytes)
    entries = pool.take(2)
    assert (ledger.held("kv", "device"), ledger.held("arena.free", "device")) == (2 * tier.page_bytes, 0)
    pool.release(entries)
    assert (ledger.held("kv", "device"), ledger.total("device")) == (0, 2 * tier.page_bytes)


class PoolMachine(RuleBasedStateMachine):
    """A pool of tiny strips (many to a page) beside a list of held table columns."""

    layers, groups, strip = 3, 10, 1088

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.arena = make_pool(self.strip, self.layers, self.groups)
        self.held: list[tuple[int, int]] = []
        """(layer row, entry) pairs, one for each hold."""

    @rule(count=st.integers(1, 4))
    def take(self, count: int) -> None:
        used = {entry // (self.layers * self.strip // 64) for _, entry in self.held}
        if count > self.groups - len(used):
            with pytest.raises(IntegrityError):
                self.pool.take(count)
            return
        entries = self.pool.take(count)
        assert not {int(entry) for entry in entries.reshape(-1)} & {entry for _, entry in self.held}
        for row, line in enumerate(entries.tolist()):
            for entry in line:
                self.held.append((row, entry))
                self.pool.strip(entry).fill_(entry % 251)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.held), max_size=4))
        self.pool.share(np.array([entry for _, entry in chosen], dtype=np.uint32))
        self.held += chosen

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        indices = sorted(data.draw(st.sets(st.integers(0, len(self.held) - 1), max_size=6)), reverse=True)
        before = self.pool.live_bytes
        freed = self.pool.release(np.array([self.held.pop(index)[1] for index in indices], dtype=np.uint32))
        assert freed == before - self.pool.live_bytes

    @rule()
    def trim(self) -> None:
        self.arena.trim(0)
        assert self.pool.free_bytes == 0

    @invariant()
    def agrees(self) -> None:
        entries = [entry for _, entry in self.held]
        self.pool.check(np.array(entries, dtype=np.uint32))
        assert self.pool.num_strips == len(set(entries))
        assert self.pool.num_shared_strips == sum(entries.count(entry) > 1 for entry in set(entries))
        pages = {page for e in entries for page in range(e * 64 // PAGE, (e * 64 + self.strip - 1) // PAGE + 1)}
        assert self.arena.ledger.held("kv", "host") == self.pool.live_bytes == len(pages) * PAGE
        assert all(
            torch.equal(strip, torch.full_like(strip, e % 251)) for e in entries for strip in [self.pool.strip(e)]
        )


PoolMachine.TestCase.settings = settings(max_examples=35, stateful_step_count=25, deadline=None)
TestPoolMachine = PoolMachine.TestCase
