"""The contiguous store: pages, rows, prices, and what only it does."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
import torch
from tests.support.kv_world import FULL, MIXED, NOTHING, ContiguousWorld, World, make_spec

from elbowroom.core import LayerSpec
from elbowroom.engine.accounting import KVPricing, num_blocks
from elbowroom.engine.stores import KV_STORES, check_store, make_stores
from elbowroom.errors import ConfigError, IntegrityError, OutOfBudget, PlanError, RequestError
from elbowroom.kv import ContiguousStore, KVHandle, KVPlan, KVStep, Shortfall
from elbowroom.kv.capacity import Capacity
from elbowroom.memory import Arena, Budget, DeviceTier, HostTier, Ledger
from elbowroom.memory.meter import rss_bytes

PAGE = HostTier.page_bytes
THIN = make_spec(q_heads=2, kv_heads=1, dim=16, v_dim=16)  # 128 bytes a token: 32 in a page


def test_pages_come_with_tokens() -> None:
    """A layer holds the pages that its tokens reach into, and no more while it is short."""
    world = ContiguousWorld([THIN, THIN])
    handle = world.open()
    for count, pages in ((1, 1), (31, 1), (1, 2), (31, 2), (1, 3)):
        world.append((handle, count))
        assert world.store.report().live_bytes == 2 * pages * PAGE
    assert world.truncate(handle, 64) == 2 * PAGE
    assert world.close(handle) == 2 * 2 * PAGE


def test_waste_is_bounded_at_every_length() -> None:
    """Committed bytes stay within 2 % of live ones and a page a layer, however a sequence grew."""
    world, rng = ContiguousWorld([FULL, THIN]), random.Random(4)
    token_bytes = 64 + 128
    for _ in range(4):
        handle = world.store.open()
        while (held := world.store.num_tokens(handle)) < 800:
            count = rng.choice((1, 1, 1, 7, 64, 200))
            step = KVStep((handle,), np.array([0, count], dtype=np.int32), np.arange(held, held + count))
            assert world.store.reserve(step) is None
            world.store.end_step(step)
            live = (held + count) * token_bytes
            assert live <= world.store.report().live_bytes <= 1.02 * (live + 2 * PAGE)
        world.store.close(handle)


def test_fork_is_a_copy_and_pays_for_all_of_it() -> None:
    """A fork takes as many bytes as its tokens, at once, and neither sees what the other writes."""
    world = ContiguousWorld([FULL, FULL])
    parent = world.open(130)
    held = world.store.report().live_bytes
    child = world.fork(parent)
    assert world.store.report().live_bytes == 2 * held
    assert world.store.report().num_shared_strips == 0
    world.append((parent, 3), (child, 9))
    world.check()


@pytest.mark.parametrize("bound", ["capacity", "ledger"])
def test_fork_that_does_not_fit_changes_nothing(bound: str) -> None:
    """Without room for the copy, the fork is refused as out of budget and nothing is open on top."""
    layers, room = [FULL, make_spec(window=100)], 12 * PAGE
    world = ContiguousWorld(layers, capacity=room) if bound == "capacity" else ContiguousWorld(layers, limit=room)
    parent = world.open(250)
    before = world.state()
    with pytest.raises(OutOfBudget, match="a copy of 250 tokens needs"):
        world.store.fork(parent)
    assert world.state() == before
    world.check()


def test_rows_are_given_with_the_first_token_and_run_out_like_memory() -> None:
    """Sequences without tokens take no row; with all rows taken, a step falls short and changes nothing."""
    world = ContiguousWorld([THIN])
    handles = [world.open() for _ in range(12)]
    world.append(*((handle, 1) for handle in handles[:8]))
    before = world.state()
    shortfall = world.store.reserve(world.append_step((handles[8], 1)))
    assert isinstance(shortfall, Shortfall)
    assert shortfall.available_bytes < shortfall.needed_bytes
    assert world.state() == before
    world.close(handles[0])
    world.append((handles[8], 1))
    world.check()


def test_sequence_longer_than_a_row_falls_short() -> None:
    """A row ends somewhere: what is longer is refused before anything is taken."""
    world = ContiguousWorld([THIN])
    handle = world.open(1000)
    before = world.state()
    assert isinstance(world.store.reserve(world.append_step((handle, 25))), Shortfall)
    assert world.state() == before
    world.append((handle, 24))
    world.check()


def test_next_sequence_gets_the_row_that_fits_best() -> None:
    """Of rows that were left, the one with the fewest resident pages that suffice: nothing is committed anew."""
    world = ContiguousWorld([THIN])
    handles = [world.open(count) for count in (900, 200, 500)]
    rows = [world.store._sequences[handle.id].row for handle in handles]
    for handle in handles:
        world.close(handle)
    free = world.store.report().free_bytes
    chosen = []
    for count in (300, 100, 100):
        handle = world.open(count)
        chosen.append(rows.index(world.store._sequences[handle.id].row))
    assert chosen == [2, 1, 0]
    live = world.store.report().live_bytes
    assert world.store.report().free_bytes == free - live, "pages were taken that nobody had before"
    world.arena.trim(0)
    assert world.store.report().free_bytes == 0
    world.check()


def test_bytes_of_a_burst_leave_the_process() -> None:
    """What a burst held goes back to the operating system when its pages are trimmed, and only then."""
    spec = make_spec(q_heads=4, kv_heads=4, dim=64, v_dim=64)  # 2 KiB a token
    world = ContiguousWorld([spec] * 8, capacity=2**30)
    handles = [world.store.open() for _ in range(8)]
    start = rss_bytes()
    for handle in handles:
        step = world.make_step([(handle, range(512))])
        assert world.store.reserve(step) is None
        k = torch.ones(512, 4, 64)
        for layer in range(8):
            world.store.attend(layer, k, k, k, step, NOTHING)
        world.store.end_step(step)
    total = world.store.report().live_bytes
    assert rss_bytes() - start > 0.95 * total
    for handle in handles:
        world.store.close(handle)
    assert world.store.report().free_bytes == total
    full = rss_bytes()
    assert world.arena.trim(0) == total
    assert full - rss_bytes() > 0.95 * total


@pytest.mark.parametrize("layers", [[FULL, THIN], MIXED], ids=["full", "windows"])
def test_spans_are_those_of_the_paged_store(layers: list[LayerSpec]) -> None:
    """Both stores export the same bytes, and each takes those of the other."""
    worlds = [World(layers), ContiguousWorld(layers)]
    spans = []
    for world in worlds:
        handle = world.open(200)
        world.append((handle, 70))
        spans.append(world.store.export_span(handle, 0, 270))
    assert spans[0] == spans[1]
    for world, span in zip(worlds[::-1], spans, strict=True):
        twin = world.store.open()
        assert world.store.import_span(twin, span) == 270
        assert world.store.export_span(twin, 0, 270) == span


@pytest.mark.parametrize("layers", [[FULL, THIN], MIXED], ids=["full", "windows"])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_store_never_commits_more_than_the_scheduler_charged(layers: list[LayerSpec], chunk: int) -> None:
    """Prices by blocks of 64 tokens cover the pages at every length, and the transient those of a running step."""
    world = ContiguousWorld(layers)
    pricing = KVPricing.contiguous(world.store.plan, 1024, 100, PAGE)
    handles = [world.store.open() for _ in range(3)]
    while (held := world.store.num_tokens(handles[0])) + chunk <= 900:
        for handle in handles:
            start = world.store.num_tokens(handle)
            step = world.make_step([(handle, range(start, start + chunk))])
            paid = sum(pricing.price(num_blocks(world.store.num_tokens(each) + chunk)) for each in handles)
            assert world.store.reserve(step) is None
            assert world.store.report().live_bytes <= paid + pricing.transient_bytes
            world.store.end_step(step)
            assert world.store.report().live_bytes <= paid
    assert held > 700
    assert not pricing.can_share


@pytest.mark.parametrize("text", ["int8", "kivi(4,4,64)", "snapkv(128)", "quest(256)", "fp8"])
def test_plans_that_are_not_plain_are_refused(text: str) -> None:
    """The error names the plan and both ways out."""
    specs = [make_spec(q_heads=4, kv_heads=2, dim=64, v_dim=64)] * 4
    plan = KVPlan.parse(text).bind(specs, "float32")
    with pytest.raises(PlanError, match=r"cannot be kept in the contiguous store[\s\S]*--kv-store paged"):
        ContiguousStore(plan, Arena(HostTier(), Ledger(Budget({}))), 2**20)


def test_stores_are_chosen_by_name() -> None:
    """Unknown names, and several plans where there is room for one, are refused with the fix."""
    plans = [KVPlan.parse(text).bind([FULL], "float32") for text in ("plain", "plain(bf16)")]
    with pytest.raises(RequestError, match="paged, static, contiguous"):
        check_store("heap", plans[:1])
    for name in KV_STORES[1:]:
        with pytest.raises(PlanError, match="one plan"):
            check_store(name, plans)
    for name in KV_STORES:
        check_store(name, plans[:1])


def test_static_store_takes_its_pages_at_the_start() -> None:
    """All bytes are charged and resident before the first token, and stay behind the last."""
    ledger, before = Ledger(Budget({"host": 2**24})), rss_bytes()
    plan = KVPlan.parse("plain").bind([FULL], "float32")
    capacity = Capacity(2**24)
    (store,) = make_stores("static", [plan], Arena(HostTier(), ledger), capacity, max_tokens=512, max_sequences=2)
    assert ledger.total("host") > 2**24 - 3 * PAGE
    assert rss_bytes() - before > 0.9 * 2**24
    handle = store.open()
    assert store.reserve(KVStep((handle,), np.array([0, 64], dtype=np.int32), np.arange(64))) is None
    store.close(handle)
    store.check_integrity()
    assert ledger.total("host") > 2**24 - 3 * PAGE
    store.close_all()
    assert ledger.total("host") == 0


def test_rows_committed_at_once_are_never_given_back() -> None:
    """Static rows: as many as the capacity holds; growth and ends change no charge."""
    arena = Arena(HostTier(), Ledger(Budget({})))
    plan = KVPlan.parse("plain").bind([FULL, make_spec(window=64)], "float32")
    row_bytes = 2 * 512 * 64
    store = ContiguousStore(plan, arena, 3 * row_bytes + 5, num_rows=9, row_tokens=512, static=True)
    assert store.report().live_bytes == 3 * row_bytes
    handles = [store.open() for _ in range(4)]
    for handle, fits in zip(handles, (True, True, True, False), strict=True):
        step = KVStep((handle,), np.array([0, 500], dtype=np.int32), np.arange(500))
        assert (store.reserve(step) is None) == fits
        if fits:
            store.end_step(step)
    assert store.close(handles[0]) == 0
    assert store.report().live_bytes == 3 * row_bytes
    store.check_integrity()


def test_tier_that_gives_no_single_pages_is_refused() -> None:
    """On device memory the error names the paged store."""
    plan = KVPlan.parse("plain").bind([FULL], "float32")
    with pytest.raises(ConfigError, match="--kv-store paged"):
        ContiguousStore(plan, Arena(DeviceTier("cpu"), Ledger(Budget({}))), 2**20)


@pytest.mark.parametrize("damage", ["row", "pages", "ledger"])
def test_integrity_check_sees_damage(damage: str) -> None:
    """A row that two sequences have, a lost page and a missing charge are each reported."""
    world = ContiguousWorld([FULL])
    first, second = world.open(100), world.open(100)
    sequences = world.store._sequences
    if damage == "row":
        sequences[first.id].row = sequences[second.id].row
    elif damage == "pages":
        sequences[first.id].end -= 1
    else:
        world.ledger.release("kv", "host", PAGE)
    with pytest.raises(IntegrityError):
        world.store.check_integrity()


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_keep_their_bytes_while_others_come_and_go(seed: int) -> None:
    """300 random admissions, steps, preemptions, forks and cuts: the checksum of every row holds behind each."""
    rng, world = random.Random(seed), ContiguousWorld([FULL, THIN], capacity=60 * PAGE)
    sums: dict[KVHandle, bytes] = {}
    spans: list[tuple[int, bytes]] = []
    for _ in range(300):
        _stress(rng, world, spans)
        world.arena.trim(rng.choice((0.0, 10.0)))
        world.store.check_integrity()
        touched = {handle for handle in world.refs if sums.get(handle) != _checksum(world, handle)}
        assert len(touched) <= 3
        for handle in touched:
            for layer in range(2):
                for held, wanted in zip(world.store.tensors(handle, layer), _kept(world, handle, layer), strict=True):
                    assert torch.equal(held, wanted)
        sums = {handle: _checksum(world, handle) for handle in world.refs}
    world.check()


def _stress(rng: random.Random, world: ContiguousWorld, spans: list[tuple[int, bytes]]) -> None:
    """Do one thing to the store."""
    handles = list(world.refs)
    what = rng.choice(("open", "step", "step", "step", "preempt", "resume", "fork", "cut", "close"))
    if what == "open" and len(handles) < 7:
        world.open()
    elif what == "resume" and spans and len(handles) < 7:
        _, span = spans.pop()
        _resume(world, span)
    elif not handles:
        return
    elif what == "step":
        rows = [(handle, rng.choice((1, 1, 40, 130))) for handle in rng.sample(handles, min(2, len(handles)))]
        if all(world.refs[handle].num_tokens + count <= 1024 for handle, count in rows):
            step = world.append_step(*rows)
            if world.store.reserve(step) is None:
                world.run(step)
    else:
        _change(rng, world, spans, what, rng.choice(handles))


def _change(
    rng: random.Random, world: ContiguousWorld, spans: list[tuple[int, bytes]], what: str, handle: KVHandle
) -> None:
    count = world.refs[handle].num_tokens
    if what == "preempt" and count:
        spans.append((count, world.store.export_span(handle, 0, count)))
        world.close(handle)
    elif what == "fork" and len(world.refs) < 7:
        try:
            world.fork(handle, rng.randint(0, count))
        except OutOfBudget:
            world.store.check_integrity()
    elif what == "cut":
        world.truncate(handle, rng.randint(0, count))
    elif what == "close":
        world.close(handle)


def _resume(world: ContiguousWorld, span: bytes) -> None:
    handle = world.open()
    try:
        world.store.import_span(handle, span)
    except OutOfBudget:
        world.close(handle)
        return
    ref = world.refs[handle]
    for layer in range(len(world.layers)):
        ref.k[layer], ref.v[layer] = (part.clone() for part in world.store.tensors(handle, layer))
    assert world.store.export_span(handle, 0, ref.num_tokens) == span


def _kept(world: ContiguousWorld, handle: KVHandle, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    return world.refs[handle].k[layer], world.refs[handle].v[layer]


def _checksum(world: ContiguousWorld, handle: KVHandle) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for layer in range(len(world.layers)):
        for part in world.store.tensors(handle, layer):
            digest.update(part.contiguous().numpy().tobytes())
    return digest.digest()
