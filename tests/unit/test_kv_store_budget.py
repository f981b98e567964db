"""The bytes of PagedStore: shortfalls, capacity, report, integrity, and what the process gives back."""

from __future__ import annotations

import dataclasses
import gc

import numpy as np
import pytest
from tests.support.kv_world import FULL, World, make_spec

from elbowroom.errors import IntegrityError
from elbowroom.kv import KVPlan, KVStep, PagedStore, Shortfall
from elbowroom.memory import Arena, Budget, DeviceTier, Ledger
from elbowroom.memory.meter import rss_bytes


def test_shortfall_names_bytes_and_changes_nothing():
    """A step that does not fit reports needed above available, and tables, charges and counts stay as they were."""
    world = World([FULL, FULL], capacity=4 * 2 * 4096)
    a, b = world.open(100), world.open(10)
    before = world.state()
    step = world.append_step((a, 30), (b, 120))
    assert world.store.reserve(step) == Shortfall(needed_bytes=3 * 2 * 4096, available_bytes=2 * 4096)
    assert step.prepared is None
    assert world.state() == before
    world.append((a, 28), (b, 54))  # what fits still runs
    world.check()


def test_shortfall_by_the_ledger_counts_free_pages_once():
    """Free pages that a step would take over cannot also pay for its absent ones (two pools, mixed windows)."""
    page = 4096
    world = World([FULL, make_spec(window=64)], limit=9 * page)
    world.ledger.charge("weights", "host", 4 * page)
    a = world.open(64)  # 2 pages live
    b = world.open(64)  # 2 more; one page is left
    world.close(b)  # 2 free
    before = world.state()
    assert world.store.reserve(world.append_step((a, 128))) == Shortfall(4 * page, 3 * page)
    assert world.state() == before
    world.append((a, 64))
    world.check()


def test_capacity_counts_free_pages_that_become_live_again():
    """Pages freed and not yet trimmed are charged against the capacity when they are taken over."""
    world = World([FULL], capacity=2 * 4096)
    a, b = world.open(64), world.open(64)
    world.close(b)
    assert world.store.reserve(world.append_step((a, 128))) == Shortfall(2 * 4096, 4096)
    assert world.store.report().live_bytes == 4096


def test_step_that_needs_no_block_runs_above_a_lowered_budget():
    """After capacity and budget were lowered below what is held, tokens still go into blocks that are there."""
    world = World([FULL], limit=10 * 4096)
    a = world.open(70)
    assert world.store.resize(4096) == 4096
    world.ledger.budget.set("host", 4096)
    world.append((a, 58))
    assert world.store.reserve(world.append_step((a, 1))) == Shortfall(4096, 0)


def test_two_stores_on_one_arena_have_a_capacity_each():
    """The bytes of another store do not count against a store's own capacity."""
    world = World([FULL], capacity=2 * 4096)
    other = PagedStore(KVPlan.parse("plain").bind([FULL], "float32"), world.arena, 2 * 4096)
    world.open(128)
    step = KVStep((other.open(),), np.array([0, 128], dtype=np.int32), np.arange(128))
    assert other.reserve(step) is None
    assert other.report().live_bytes == world.store.report().live_bytes == 2 * 4096
    other.check_integrity()


def test_report_counts_what_is_there():
    """Tokens count for each sequence, strips once, and bf16_bytes is the plain cost without sharing."""
    world = World([FULL, dataclasses.replace(FULL, kv_source=0)])
    parent = world.open(100)
    world.fork(parent, 64)
    world.close(world.open(64))
    report = world.store.report()
    assert (report.num_sequences, report.num_tokens, report.num_strips, report.num_shared_strips) == (2, 164, 2, 1)
    assert (report.live_bytes, report.free_bytes) == (2 * 4096, 4096)
    assert report.bf16_bytes == 164 * (8 + 8) * 2


@pytest.mark.parametrize("damage", ["table", "refs", "ledger", "expired"])
def test_integrity_check_sees_damage(damage: str):
    """A lost entry, a wrong count, a missing charge and a wrong expiry are each reported."""
    world = World([FULL, make_spec(window=64)])
    handle = world.open(200)
    world.store.check_integrity()
    sequence = world.store._sequences[handle.id]
    if damage == "table":
        sequence.table[0, 1] = sequence.table[0, 0]
    elif damage == "refs":
        world.store._pools.pools[0]._refs[0, 0] = 2
    elif damage == "ledger":
        world.ledger.release("kv", "host", 4096)
    else:
        sequence.expired_blocks[1] = 0
    with pytest.raises(IntegrityError):
        world.store.check_integrity()


def test_store_on_a_static_tier_fits_its_capacity():
    """On device memory full and windowed layers share the capacity; steps run until it is used up, then fall short."""
    tier = DeviceTier("cpu")
    strip = tier.page_bytes
    spec = make_spec(q_heads=1, dim=128, v_dim=128)  # 64 x 256 float32: one page a strip
    ledger = Ledger(Budget({"device": 4 * strip}))
    bound = KVPlan.parse("plain").bind([spec, dataclasses.replace(spec, window=4000)], "float32")
    store = PagedStore(bound, Arena(tier, ledger), 4 * strip)
    assert ledger.total("device") == 4 * strip
    handle = store.open()
    step = KVStep((handle,), np.array([0, 128], dtype=np.int32), np.arange(128))
    assert store.reserve(step) is None
    store.end_step(step)
    more = KVStep((handle,), np.array([0, 1], dtype=np.int32), np.array([128]))
    assert store.reserve(more) is not None
    assert store.truncate(handle, 64) == 2 * strip
    store.check_integrity()
    store.close_all()
    assert ledger.total("device") == 0


def test_closed_sequences_leave_the_process():
    """Closing every second of 32 interleaved sequences gives back >= 90 % of its bytes to RSS, closing all >= 98 %."""
    spec = make_spec(q_heads=4, kv_heads=4, dim=32, v_dim=32)  # 64 KiB a strip
    layers, blocks = [spec] * 4, 8
    source = World(layers)
    handle = source.store.open()
    for block in range(blocks):
        step = source.make_step([(handle, range(64 * block, 64 * block + 64))])
        assert source.store.reserve(step) is None
        source.store.end_step(step)
    spans = [source.store.export_span(handle, 64 * block, 64 * block + 64) for block in range(blocks)]
    source.store.close_all()
    world = World(layers, capacity=2**28)
    gc.collect()
    start = rss_bytes()
    handles = [world.store.open() for _ in range(32)]
    for span in spans:
        for each in handles:
            world.store.import_span(each, span)
    total = 32 * blocks * 4 * 65536
    assert world.ledger.held("kv", "host") == total
    full = rss_bytes()
    assert full - start > 0.98 * total
    freed = sum(world.store.close(each) for each in handles[::2])
    assert freed == total // 2 == world.arena.trim(0)
    assert full - rss_bytes() >= 0.9 * freed
    for each in handles[1::2]:
        world.store.close(each)
    world.arena.trim(0)
    assert full - rss_bytes() >= 0.98 * total
    world.store.check_integrity()
