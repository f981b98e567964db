"""PagedStore against plain tensors: attention, sharing, expiry, repair, trees, spans, and the bytes of all of it."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import itertools
import json
import struct
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from elbowroom.core import LayerSpec
from elbowroom.errors import IntegrityError, OutOfBudget
from elbowroom.kv import AttnOut, KVHandle, KVPlan, KVStep, PagedStore, Shortfall, Want
from elbowroom.kv.pool import ABSENT
from elbowroom.memory import Arena, Budget, DeviceTier, HostTier, Ledger
from elbowroom.memory.meter import rss_bytes

BLOCK = 64
NOTHING = Want()


def make_spec(q_heads: int = 2, kv_heads: int = 1, dim: int = 8, v_dim: int = 8, **options: float | None) -> LayerSpec:
    base = LayerSpec(
        num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=dim, v_head_dim=v_dim, scale=dim**-0.5, rope=None
    )
    return dataclasses.replace(base, **options)


FULL = make_spec()  # a strip is exactly one page
MIXED = [
    make_spec(),
    make_spec(kv_heads=2, q_heads=4, dim=4, window=40),  # strips that share pages
    make_spec(q_heads=3, kv_source=0, window=70),
    make_spec(window=100, softcap=2.0, q_heads=1),
    make_spec(kv_heads=2, q_heads=2, dim=4, kv_source=1, window=20),
]


@dataclasses.dataclass
class Reference:
    """One sequence as plain tensors: for each layer all keys and values ``[n, Hkv, D]``, expired or not."""

    k: list[Tensor]
    v: list[Tensor]
    expired: list[int]
    """For each layer, leading blocks that must be gone."""

    @property
    def num_tokens(self) -> int:
        return self.k[0].shape[0]

    def prefix(self, count: int) -> Reference:
        return Reference([k[:count].clone() for k in self.k], [v[:count].clone() for v in self.v], list(self.expired))


def dense(spec: LayerSpec, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return out ``[n, Hq, Dv]``, lse ``[n, Hq]`` and probabilities ``[n, Hq, S]`` in float64."""
    k, v = (x.double().repeat_interleave(spec.group_size, dim=1) for x in (k, v))
    scores = torch.einsum("nhd,shd->nhs", q.double(), k) * spec.scale
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    distance = positions[:, None] - torch.arange(k.shape[0])[None, :]
    hidden = (distance < 0) | (distance >= (spec.window or 10**9))
    scores = scores.masked_fill(hidden[:, None, :], -torch.inf)
    probs = scores.softmax(dim=-1)
    return torch.einsum("nhs,shd->nhd", probs, v), scores.logsumexp(dim=-1), probs


class World:
    """A store and, beside it, the plain tensors of every sequence; each step is checked against them."""

    def __init__(
        self,
        layers: Sequence[LayerSpec] = (FULL, FULL),
        capacity: int = 2**24,
        limit: int | None = None,
        plan: str = "plain",
        model_id: bytes = b"",
    ) -> None:
        self.layers = list(layers)
        self.ledger = Ledger(Budget({} if limit is None else {"host": limit}))
        self.arena = Arena(HostTier(), self.ledger)
        self.store = PagedStore(KVPlan.parse(plan).bind(layers, "float32"), self.arena, capacity, model_id)
        self.refs: dict[KVHandle, Reference] = {}
        self.random = torch.Generator().manual_seed(1)

    def rand(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def open(self, num_tokens: int = 0) -> KVHandle:
        handle = self.store.open()
        empty = [torch.empty(0, spec.num_kv_heads, spec.head_dim) for spec in self.layers]
        empty_v = [torch.empty(0, spec.num_kv_heads, spec.v_head_dim) for spec in self.layers]
        self.refs[handle] = Reference(empty, empty_v, [0] * len(self.layers))
        if num_tokens:
            self.append((handle, num_tokens))
        return handle

    def fork(self, handle: KVHandle, num_tokens: int | None = None) -> KVHandle:
        twin = self.store.fork(handle, num_tokens)
        ref = self.refs[handle]
        self.refs[twin] = ref.prefix(ref.num_tokens if num_tokens is None else num_tokens)
        return twin

    def truncate(self, handle: KVHandle, num_tokens: int) -> int:
        before = self.store.report().live_bytes
        freed = self.store.truncate(handle, num_tokens)
        assert freed == before - self.store.report().live_bytes
        self.refs[handle] = self.refs[handle].prefix(num_tokens)
        return freed

    def close(self, handle: KVHandle) -> int:
        before = self.store.report().live_bytes
        freed = self.store.close(handle)
        assert freed == before - self.store.report().live_bytes
        del self.refs[handle]
        return freed

    def make_step(self, rows: Sequence[tuple[KVHandle, Sequence[int]]]) -> KVStep:
        starts = np.cumsum([0, *(len(positions) for _, positions in rows)]).astype(np.int32)
        flat = np.concatenate([np.asarray(positions, dtype=np.int64) for _, positions in rows])
        return KVStep(tuple(handle for handle, _ in rows), starts, flat)

    def append_step(self, *rows: tuple[KVHandle, int]) -> KVStep:
        sizes = [(handle, self.refs[handle].num_tokens, count) for handle, count in rows]
        return self.make_step([(handle, range(start, start + count)) for handle, start, count in sizes])

    def append(self, *rows: tuple[KVHandle, int]) -> list[AttnOut]:
        """Append tokens to some sequences in one step; everything must fit."""
        step = self.append_step(*rows)
        assert self.store.reserve(step) is None
        return self.run(step)

    def run(self, step: KVStep, want: Want = NOTHING) -> list[AttnOut]:
        """Run a reserved step on random rows and compare all attention with the dense one."""
        held = self.state()
        for row, handle in enumerate(step.handles):
            table, given = self.store._sequences[handle.id].table, step.prepared.tables[:, row]
            assert np.array_equal(given[:, : table.shape[1]], table)
            assert (given[:, table.shape[1] :] == ABSENT).all()
        outs = []
        for layer, spec in enumerate(self.layers):
            count = len(step.positions)
            q = self.rand(count, spec.num_q_heads, spec.head_dim)
            k, v = (self.rand(count, spec.num_kv_heads, dim) for dim in (spec.head_dim, spec.v_head_dim))
            self.write_reference(layer, step, k, v)
            outs.append(self.store.attend(layer, q, k, v, step, want))
            self.compare(layer, step, q, outs[-1])
            self.store.end_layer(layer, step)
        assert self.state() == held, "attend took or freed strips"
        before = {handle: self.store.num_tokens(handle) for handle in step.handles}
        self.store.end_step(step)
        for handle in step.handles:
            self.expire(handle, max(before[handle], self.refs[handle].num_tokens - 64))
        return outs

    def write_reference(self, layer: int, step: KVStep, k: Tensor, v: Tensor) -> None:
        for row, handle in enumerate(step.handles):
            begin, end = int(step.row_starts[row]), int(step.row_starts[row + 1])
            positions = torch.from_numpy(step.positions[begin:end])
            ref = self.refs[handle]
            for stored, new in ((ref.k, k), (ref.v, v)):
                grown = max(stored[layer].shape[0], int(positions[-1]) + 1)
                wider = torch.zeros(grown, *new.shape[1:])
                wider[: stored[layer].shape[0]] = stored[layer]
                wider[positions] = new[begin:end]
                stored[layer] = wider

    def compare(self, layer: int, step: KVStep, q: Tensor, got: AttnOut) -> None:
        spec = self.layers[layer]
        source = layer if spec.kv_source is None else spec.kv_source
        for row, handle in enumerate(step.handles):
            rows = slice(int(step.row_starts[row]), int(step.row_starts[row + 1]))
            ref, positions = self.refs[handle], torch.from_numpy(step.positions[rows])
            out, lse, probs = dense(spec, q[rows], ref.k[source], ref.v[source], positions)
            torch.testing.assert_close(got.out[rows].double(), out, rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(got.lse[rows].double(), lse, rtol=1e-4, atol=2e-5)
            if got.colsum is not None:
                sums = probs.sum(dim=0).view(spec.num_kv_heads, spec.group_size, -1).sum(dim=1)
                torch.testing.assert_close(got.colsum[row].double(), sums, rtol=1e-4, atol=2e-5)
            if got.pmax is not None:
                torch.testing.assert_close(got.pmax[rows].double(), probs.amax(dim=-1), rtol=1e-4, atol=2e-5)

    def expire(self, handle: KVHandle, num_tokens: int) -> None:
        ref = self.refs[handle]
        for layer, spec in enumerate(self.layers):
            if spec.window is not None and spec.kv_source is None:
                ref.expired[layer] = max(ref.expired[layer], max(num_tokens - spec.window + 1, 0) // BLOCK)

    def may_go_back(self, handle: KVHandle, num_tokens: int) -> bool:
        """Whether all layers still hold what tokens from ``num_tokens`` on read."""
        windows = [spec.window if spec.kv_source is None else None for spec in self.layers]
        return all(
            window is None or expired * BLOCK <= max(num_tokens - window + 1, 0)
            for window, expired in zip(windows, self.refs[handle].expired, strict=True)
        )

    def state(self) -> tuple[object, ...]:
        """Everything that a refused call must leave alone."""
        store = self.store
        tables = {number: (seq.table.tolist(), seq.num_tokens) for number, seq in store._sequences.items()}
        refs = [(pool._refs[: pool._fresh].tolist(), sorted(pool._freed)) for pool in store._pools]
        return tables, refs, self.ledger.snapshot()

    def check(self) -> None:
        """Compare every stored token of every sequence bit by bit, the blocks that are gone, and the charges."""
        store = self.store
        store.check_integrity()
        assert self.ledger.held("kv", "host") == store.report().live_bytes
        assert {KVHandle(number) for number in store._sequences} == set(self.refs)
        for handle, ref in self.refs.items():
            assert store.num_tokens(handle) == ref.num_tokens
            table = store._sequences[handle.id].table
            for layer, spec in enumerate(self.layers):
                if spec.kv_source is not None:
                    continue
                gone = ref.expired[layer]
                assert (table[layer, :gone] == ABSENT).all()
                blocks = range(gone, -(-ref.num_tokens // BLOCK))
                pool = store._pools.of_layer(layer)
                opened = [store._codec.open(pool.strip(int(table[layer, block])), pool.fmt) for block in blocks]
                for part, expected in enumerate((ref.k[layer], ref.v[layer])):
                    if opened:
                        held = torch.cat([pair[part] for pair in opened], dim=1).transpose(0, 1)
                        assert torch.equal(held[: ref.num_tokens - gone * BLOCK], expected[gone * BLOCK :])


class StoreMachine(RuleBasedStateMachine):
    """Random life of a store of mixed layers under a tight capacity."""

    capacity = 16 * 4096 * 4

    def __init__(self) -> None:
        super().__init__()
        self.world = World(MIXED, self.capacity)
        self.limit = self.capacity

    def pick(self, data: st.DataObject, at_least: int = 0) -> KVHandle:
        fitting = [handle for handle, ref in self.world.refs.items() if ref.num_tokens >= at_least]
        return data.draw(st.sampled_from(fitting))

    def some_tokens(self) -> bool:
        return any(ref.num_tokens for ref in self.world.refs.values())

    def reserve(self, step: KVStep) -> bool:
        before = self.world.state()
        shortfall = self.world.store.reserve(step)
        if shortfall is not None:
            assert self.world.state() == before
            assert 0 <= shortfall.available_bytes < shortfall.needed_bytes
        return shortfall is None

    @precondition(lambda self: len(self.world.refs) < 6)
    @rule()
    def open(self) -> None:
        self.world.open()

    @precondition(lambda self: self.world.refs)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        handles = data.draw(st.lists(st.sampled_from(list(self.world.refs)), min_size=1, max_size=4, unique=True))
        sizes = st.one_of(st.integers(1, 3), st.sampled_from([1, 62, 63, 64, 65, 130]))
        step = self.world.append_step(*((handle, data.draw(sizes)) for handle in handles))
        if self.reserve(step):
            self.world.run(step, Want(colsum=True, pmax=True) if data.draw(st.booleans()) else NOTHING)

    @precondition(lambda self: self.world.refs)
    @rule(data=st.data())
    def abandon_a_reserved_step(self, data: st.DataObject) -> None:
        self.reserve(self.world.append_step((self.pick(data), data.draw(st.integers(1, 100)))))

    @precondition(lambda self: self.world.refs and len(self.world.refs) < 6)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        handle = self.pick(data)
        count = data.draw(st.one_of(st.none(), st.integers(0, self.world.refs[handle].num_tokens)))
        if count is None or self.world.may_go_back(handle, count):
            self.world.fork(handle, count)
            return
        before = self.world.state()
        with pytest.raises(IntegrityError, match="sliding window"):
            self.world.store.fork(handle, count)
        assert self.world.state() == before

    @precondition(lambda self: self.world.refs)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        handle = self.pick(data)
        count = data.draw(st.integers(0, self.world.refs[handle].num_tokens))
        if self.world.may_go_back(handle, count):
            self.world.truncate(handle, count)
            return
        before = self.world.state()
        with pytest.raises(IntegrityError, match="sliding window"):
            self.world.store.truncate(handle, count)
        assert self.world.state() == before

    @precondition(lambda self: self.world.refs)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        self.world.close(self.pick(data))

    @precondition(lambda self: self.some_tokens())
    @rule(data=st.data())
    def repair(self, data: st.DataObject) -> None:
        world, handle = self.world, self.pick(data, at_least=1)
        ref = world.refs[handle]
        positions = sorted(data.draw(st.sets(st.integers(0, ref.num_tokens - 1), min_size=1, max_size=5)))
        if not world.may_go_back(handle, positions[0]):
            with pytest.raises(IntegrityError, match="sliding window"):
                world.store.overwrite(handle, np.array(positions))
            return
        more = data.draw(st.sampled_from([0, 0, 1, 70]))
        world.store.overwrite(handle, np.array(positions))
        step = world.make_step([(handle, [*positions, *range(ref.num_tokens, ref.num_tokens + more)])])
        if self.reserve(step):
            world.run(step)

    @precondition(lambda self: self.world.refs)
    @rule(data=st.data())
    def accept_part_of_a_step(self, data: st.DataObject) -> None:
        world, handle = self.world, self.pick(data)
        start = world.refs[handle].num_tokens
        count = data.draw(st.sampled_from([1, 4, 9, 70]))
        step = world.append_step((handle, count))
        if not self.reserve(step):
            return
        world.run(step)
        if data.draw(st.booleans()):
            world.fork(handle)
        kept = sorted(data.draw(st.sets(st.integers(start, start + count - 1))))
        before = world.state()
        if not world.may_go_back(handle, start + len(kept)):
            with pytest.raises(IntegrityError, match="sliding window"):
                world.store.accept(handle, np.array(kept, dtype=np.int64))
            assert world.state() == before
            return
        try:
            world.store.accept(handle, np.array(kept, dtype=np.int64))
        except OutOfBudget:  # a fork made a copy necessary
            assert world.state() == before
            return
        ref = world.refs[handle]
        rows = [*range(start), *kept]
        world.refs[handle] = Reference([k[rows] for k in ref.k], [v[rows] for v in ref.v], ref.expired)

    @precondition(lambda self: self.some_tokens() and len(self.world.refs) < 6)
    @rule(data=st.data())
    def export_and_import(self, data: st.DataObject) -> None:
        world, handle = self.world, self.pick(data, at_least=1)
        stop = data.draw(st.integers(1, world.refs[handle].num_tokens))
        if not world.may_go_back(handle, stop):
            with pytest.raises(IntegrityError, match="sliding window"):
                world.store.export_span(handle, 0, stop)
            return
        span = world.store.export_span(handle, 0, stop)
        source = world.refs[handle]
        if data.draw(st.booleans()):
            world.close(handle)  # a swap: the bytes are gone before they come back
        twin = world.open()
        before = world.state()
        try:
            assert world.store.import_span(twin, span) == stop
        except OutOfBudget:
            assert world.state() == before
            return
        assert world.store.export_span(twin, 0, stop) == span
        world.refs[twin] = source.prefix(stop)
        world.expire(twin, stop)

    @rule(idle=st.booleans())
    def trim(self, idle: bool) -> None:
        self.world.arena.trim(0 if idle else 10)

    @rule(share=st.sampled_from([0.2, 0.6, 1.0]))
    def resize(self, share: float) -> None:
        self.limit = int(self.capacity * share)
        held = self.world.store.report().live_bytes
        assert self.world.store.resize(self.limit) == max(held - self.limit, 0)

    @invariant()
    def agrees(self) -> None:
        self.world.check()
        assert self.world.store.report().live_bytes <= self.capacity

    def teardown(self) -> None:
        for handle in list(self.world.refs):
            self.world.close(handle)
        self.world.check()
        assert self.world.ledger.held("kv", "host") == 0
        self.world.store.close_all()
        assert self.world.ledger.total("host") == 0


# Shrinking a failure takes minutes; the first failing run prints all its steps as it is.
StoreMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)
TestStoreMachine = StoreMachine.TestCase


# Steps


def test_several_sequences_of_different_lengths_share_a_step():
    """Prompts, single tokens and block boundaries in one step give the attention that each has alone."""
    world = World(MIXED)
    a, b, c = world.open(200), world.open(63), world.open()
    for _ in range(3):
        world.append((c, 130), (a, 1), (b, 2))
    world.check()


def test_chunking_does_not_change_what_is_read():
    """A prompt in one step and the same prompt in random chunks leave the same bits behind."""
    k, v, q = torch.randn(300, 1, 8), torch.randn(300, 1, 8), torch.randn(300, 2, 8)
    spans, outs = [], []
    for cuts in ([0, 300], [0, 1, 64, 65, 190, 299, 300]):
        world = World([make_spec(window=90)])
        handle = world.open()
        parts = []
        for start, stop in itertools.pairwise(cuts):
            step = world.make_step([(handle, range(start, stop))])
            assert world.store.reserve(step) is None
            parts.append(world.store.attend(0, q[start:stop], k[start:stop], v[start:stop], step, NOTHING).out)
            world.store.end_step(step)
        spans.append(world.store.export_span(handle, 0, 300))
        outs.append(torch.cat(parts))
    assert spans[0] == spans[1]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("plan", ["plain(bf16)", "plain(fp16)"])
def test_short_dtypes_store_rounded_values(plan: str):
    """What is read back is the key rounded to the plan's dtype, and a strip takes half the bytes."""
    world = World([FULL], plan=plan)
    handle = world.open()
    step = world.append_step((handle, 10))
    assert world.store.reserve(step) is None
    k = torch.randn(10, 1, 8)
    world.store.attend(0, torch.randn(10, 2, 8), k, k, step, NOTHING)
    world.store.end_step(step)
    pool = world.store._pools.of_layer(0)
    stored = world.store._codec.open(pool.strip(int(world.store._sequences[handle.id].table[0, 0])), pool.fmt)[0]
    dtype = torch.bfloat16 if "bf16" in plan else torch.float16
    assert torch.equal(stored[0, :10], k[:, 0].to(dtype))
    assert pool.strip_bytes == 64 * 16 * 2


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


@pytest.mark.parametrize(
    ("positions", "match"),
    [
        ([9], "again"),
        ([11], "hole"),
        ([10, 12], "hole"),
        ([10, 10, 12], "order"),
        ([11, 10], "order"),
        ([9, 10], "again"),
    ],
)
def test_positions_with_holes_or_out_of_order_are_refused(positions: list[int], match: str):
    """A step appends exactly behind the tokens there are; anything else changes nothing."""
    world = World([FULL])
    handle = world.open(10)
    before = world.state()
    with pytest.raises(IntegrityError, match=match):
        world.store.reserve(world.make_step([(handle, positions)]))
    assert world.state() == before


def test_malformed_rows_are_refused():
    """A sequence twice in a step, a row without tokens, and a wrong number of rows are refused; nothing changes."""
    world = World([FULL])
    a, b = world.open(10), world.open(10)
    before = world.state()
    with pytest.raises(IntegrityError, match="two rows"):
        world.store.reserve(world.make_step([(a, [10]), (a, [10])]))
    for starts, positions in [([0, 1, 1], [10]), ([0, 1], [10]), ([0, 1, 3], [10, 10]), ([1, 2, 3], [10, 10, 10])]:
        step = KVStep((a, b), np.array(starts, dtype=np.int32), np.array(positions))
        with pytest.raises(IntegrityError, match="do not divide"):
            world.store.reserve(step)
    assert world.state() == before


def test_steps_and_handles_out_of_turn_are_refused():
    """attend and end_step need a reserved step, and a closed sequence is known to nobody."""
    world = World([FULL])
    handle = world.open(5)
    step = world.append_step((handle, 1))
    x = torch.zeros(1, 1, 8)
    with pytest.raises(IntegrityError, match="not reserved"):
        world.store.attend(0, torch.zeros(1, 2, 8), x, x, step, NOTHING)
    world.close(handle)
    for call in (world.store.close, world.store.fork, world.store.num_tokens, lambda h: world.store.truncate(h, 0)):
        with pytest.raises(IntegrityError, match="not open"):
            call(handle)
    with pytest.raises(IntegrityError, match="not open"):
        world.store.reserve(step)


def test_decoding_within_blocks_reuses_the_step_tables():
    """While a batch neither changes nor crosses a block, its padded tables are not built again."""
    world = World(MIXED)
    a, b = world.open(10), world.open(20)
    tables = []
    for _ in range(3):
        step = world.append_step((a, 1), (b, 1))
        assert world.store.reserve(step) is None
        tables.append(step.prepared.tables)
        world.run(step)
    assert tables[0] is tables[1] is tables[2]


def test_changed_batches_get_their_own_tables():
    """Forks, rollbacks, closed members, other orders and crossed blocks are all seen by the next step."""
    world = World(MIXED)
    a, b = world.open(60), world.open(120)
    world.append((a, 1), (b, 1))
    twin = world.fork(a)
    world.append((a, 4), (b, 10))
    world.truncate(b, 125)
    world.append((a, 1), (b, 70))
    world.append((b, 1), (a, 1))
    world.close(a)
    world.append((b, 1), (twin, 30))
    for _ in range(5):
        world.append((b, 60), (twin, 60))
    world.check()


# Sharing


@pytest.mark.parametrize("at", [0, 1, 63, 64, 65, 130])
@pytest.mark.parametrize("writer", ["parent", "child"])
def test_writing_one_side_of_a_fork_leaves_the_other_alone(at: int, writer: str):
    """Copy-on-write: whichever side appends, the other keeps every bit."""
    world = World([FULL, FULL])
    parent = world.open(130)
    child = world.fork(parent, at)
    world.append((parent if writer == "parent" else child, 100))
    world.check()
    world.append((child if writer == "parent" else parent, 100))
    world.check()


def test_fork_costs_nothing_until_it_writes_into_a_shared_block():
    """Whole shared blocks are never copied: a fork's first token costs one block when the last one is not full."""
    world = World([FULL, FULL])
    parent = world.open(130)
    held = world.store.report().live_bytes
    children = [world.fork(parent) for _ in range(3)]
    assert world.store.report().live_bytes == held
    assert world.store.report().num_shared_strips == 6
    world.append((children[0], 1))
    assert world.store.report().live_bytes == held + 2 * 4096
    world.append((world.fork(parent, 128), 1))
    assert world.store.report().live_bytes == held + 2 * 2 * 4096
    world.check()


def test_all_sharers_writing_in_one_step_keep_their_own_copies():
    """A parent and its forks that write the same shared block in the same step do not see each other."""
    world = World(MIXED)
    parent = world.open(70)
    twins = [world.fork(parent, count) for count in (70, 66, 65)]
    world.append((parent, 1), *((twin, 1) for twin in twins))
    world.check()


def test_fork_lives_on_when_its_parent_is_closed():
    """Shared strips stay until the last sequence lets go of them, and only then are bytes freed."""
    world = World([FULL])
    parent = world.open(128)
    child = world.fork(parent)
    assert world.close(parent) == 0
    world.append((child, 1))
    world.check()
    assert world.close(child) == 3 * 4096


def test_repair_of_scattered_shared_blocks_copies_each_once():
    """After blocks 0 and 2 were repaired, block 1 is still shared: a repair there leaves the parent alone too."""
    world = World([FULL])
    parent = world.open(192)
    child = world.fork(parent)
    for positions in ([5, 130], [70], [6, 131]):
        held = world.store.report().live_bytes
        world.store.overwrite(child, np.array(positions))
        step = world.make_step([(child, positions)])
        assert world.store.reserve(step) is None
        world.run(step)
        world.check()
        expected = {5: 2, 70: 1, 6: 0}[positions[0]] * 4096
        assert world.store.report().live_bytes - held == expected


# Repair and trees


def test_overwrite_allows_exactly_the_announced_positions_once():
    """Announced positions can be written in the next step only, and no others."""
    world = World([FULL])
    handle = world.open(100)
    world.store.overwrite(handle, np.array([3, 70]))
    with pytest.raises(IntegrityError, match="again"):
        world.store.reserve(world.make_step([(handle, [3, 4])]))
    with pytest.raises(IntegrityError, match="hole"):
        world.store.reserve(world.make_step([(handle, [3, 101])]))
    step = world.make_step([(handle, [3, 70, 100])])
    assert world.store.reserve(step) is None
    world.run(step)
    assert world.store.num_tokens(handle) == 101
    with pytest.raises(IntegrityError, match="again"):
        world.store.reserve(world.make_step([(handle, [3])]))
    world.check()


@pytest.mark.parametrize("positions", [[-1], [100], [5, 100]])
def test_overwrite_of_what_is_not_stored_is_refused(positions: list[int]):
    """Only stored positions can be announced."""
    world = World([FULL])
    handle = world.open(100)
    with pytest.raises(IntegrityError, match="not all stored"):
        world.store.overwrite(handle, np.array(positions))


def test_overwrite_needs_the_window_of_what_it_writes():
    """A position whose own window was dropped cannot be computed again, even if its slot is still there."""
    world = World([make_spec(window=40)])
    handle = world.open(64)
    world.append((handle, 67))
    world.append((handle, 1))
    with pytest.raises(IntegrityError, match="sliding window"):
        world.store.overwrite(handle, np.array([102]))
    world.store.overwrite(handle, np.array([103]))
    step = world.make_step([(handle, [103])])
    assert world.store.reserve(step) is None
    world.run(step)


@pytest.mark.parametrize("start", [10, 60, 64, 120])
@pytest.mark.parametrize("kept", [[], [0], [0, 1, 2], [1, 3, 6], [0, 5], [7]])
def test_accepted_tokens_move_to_where_the_step_began(start: int, kept: list[int]):
    """Kept positions become consecutive from the step's start, across block borders; the rest is gone."""
    world = World([FULL, make_spec(kv_heads=2)])
    handle = world.open(start)
    world.append((handle, 8))
    positions = np.array([start + each for each in kept], dtype=np.int64)
    world.store.accept(handle, positions)
    ref = world.refs[handle]
    rows = [*range(start), *positions.tolist()]
    world.refs[handle] = Reference([k[rows] for k in ref.k], [v[rows] for v in ref.v], ref.expired)
    world.check()
    world.append((handle, 2))
    world.check()


@pytest.mark.parametrize("kept", [[9, 10], [10, 18], [12, 11], [11, 11]])
def test_accept_takes_only_ascending_positions_of_the_last_step(kept: list[int]):
    """Positions before the step, behind it, or out of order are refused and nothing moves."""
    world = World([FULL])
    handle = world.open(10)
    world.append((handle, 8))
    before = world.state()
    with pytest.raises(IntegrityError, match=r"no ascending positions of 10\.\.17"):
        world.store.accept(handle, np.array(kept))
    assert world.state() == before


def test_accept_does_not_write_into_blocks_shared_since_the_step():
    """A fork taken between step and accept keeps the tree's tokens."""
    world = World(MIXED)
    handle = world.open(60)
    world.append((handle, 8))
    world.fork(handle)
    world.store.accept(handle, np.array([61, 66, 67]))
    rows = [*range(60), 61, 66, 67]
    ref = world.refs[handle]
    world.refs[handle] = Reference([k[rows] for k in ref.k], [v[rows] for v in ref.v], ref.expired)
    world.check()


def test_accept_that_cannot_copy_a_shared_block_changes_nothing():
    """Without room for the copy, accept is refused as out of budget."""
    world = World([FULL], capacity=4096)
    handle = world.open(10)
    world.append((handle, 8))
    world.fork(handle)
    before = world.state()
    with pytest.raises(OutOfBudget, match="copy of shared tokens"):
        world.store.accept(handle, np.array([12]))
    assert world.state() == before
    world.check()


# Sliding windows


def test_sliding_window_frees_bytes_and_pages():
    """A windowed layer holds a bounded number of strips, however long the sequence grows, and the arena shrinks."""
    world = World([make_spec(window=100)])
    handle = world.open(64)
    held = []
    for _ in range(12):
        world.append((handle, 64))
        world.arena.trim(0)
        held.append(world.ledger.total("host"))
    assert held == [2 * 4096] + [3 * 4096] * 11
    world.check()


def test_prompt_longer_than_the_window_leaves_only_the_window():
    """After a long prompt in one step, the blocks before window and rollback are gone."""
    world = World([make_spec(window=64)])
    handle = world.open(640)
    assert world.store.report().live_bytes == 2 * 4096
    assert world.refs[handle].expired == [8]
    world.check()


def test_going_back_beyond_a_window_is_refused_with_the_reason():
    """fork and truncate to where a window has dropped tokens name the token and the window, and change nothing."""
    world = World([FULL, make_spec(window=64)])
    handle = world.open(640)
    before = world.state()
    for call in (world.store.fork, world.store.truncate):
        with pytest.raises(
            IntegrityError, match=r"cannot go back to token 300: tokens before 512 left .* window of 64"
        ):
            call(handle, 300)
    assert world.state() == before
    for count in (-1, 641):
        with pytest.raises(IntegrityError, match="has no prefix"):
            world.store.truncate(handle, count)
    world.truncate(handle, 576)
    world.append((handle, 3))
    world.check()


@pytest.mark.parametrize("window", [1, 40, 64, 100, 128])
def test_a_speculative_step_can_always_be_taken_back(window: int):
    """At every position, a step of up to 64 tokens can be rolled back to its start, windows or not."""
    world = World([FULL, make_spec(window=window)])
    handle = world.open(150)
    for count in [1, 8, 17, 64, 5, 64, 33, 64, 64]:
        start = world.refs[handle].num_tokens
        world.append((handle, count))
        world.truncate(handle, start)
        world.append((handle, count))
        kept = np.arange(start, start + count, 2)
        world.store.accept(handle, kept)
        rows = [*range(start), *kept.tolist()]
        ref = world.refs[handle]
        world.refs[handle] = Reference([k[rows] for k in ref.k], [v[rows] for v in ref.v], ref.expired)
        world.check()


# Statistics


def test_statistics_agree_with_dense_attention():
    """colsum and pmax equal those of dense softmax: grouped heads, windows, softcap, shared layers, several rows."""
    world = World(MIXED)
    a, b = world.open(150), world.open(10)
    for sizes in ((1, 1), (70, 3), (2, 120)):
        step = world.append_step((a, sizes[0]), (b, sizes[1]))
        assert world.store.reserve(step) is None
        for out in world.run(step, Want(colsum=True, pmax=True)):
            assert out.colsum is not None
            assert out.pmax is not None
            assert [sums.shape[1] for sums in out.colsum] == [world.refs[h].num_tokens for h in (a, b)]


def test_statistics_are_made_only_when_wanted():
    """Each statistic is None unless it was asked for."""
    world = World([FULL])
    handle = world.open(5)
    for want in (NOTHING, Want(colsum=True), Want(pmax=True)):
        step = world.append_step((handle, 2))
        assert world.store.reserve(step) is None
        (out,) = world.run(step, want)
        assert (out.colsum is not None, out.pmax is not None) == (want.colsum, want.pmax)


def test_statistics_survive_hidden_scores_that_would_overflow():
    """A later token with an enormous score does not turn earlier rows into NaN."""
    world = World([make_spec(q_heads=1, dim=1, v_dim=1)])
    handle = world.open()
    step = world.append_step((handle, 2))
    assert world.store.reserve(step) is None
    k = torch.tensor([[[0.0]], [[1000.0]]])
    out = world.store.attend(0, torch.ones(2, 1, 1), k, k, step, Want(colsum=True, pmax=True))
    assert out.pmax is not None
    assert out.colsum is not None
    assert out.pmax.tolist() == [[1.0], [1.0]]
    assert out.colsum[0].tolist() == [[1.0, 1.0]]


# Spans


def seal(header: bytes, payload: bytes = b"", magic: bytes = b"ELBKV\x00\x00\x01") -> bytes:
    """Return a span with a valid checksum around any header."""
    body = magic + struct.pack("<I", len(header)) + header + payload
    return body + hashlib.blake2b(body, digest_size=32).digest()


def test_span_round_trip_is_bit_equal():
    """A span imported elsewhere gives the same bits, goes on from there, and exports to the same bytes."""
    world = World(MIXED)
    handle = world.open(300)
    world.append((handle, 5))
    span = world.store.export_span(handle, 0, 305)
    twin = world.open()
    assert world.store.import_span(twin, span) == 305
    world.refs[twin] = world.refs[handle].prefix(305)
    world.expire(twin, 305)
    world.check()
    assert world.store.export_span(twin, 0, 305) == span
    world.append((handle, 70), (twin, 70))
    world.check()


def test_spans_of_consecutive_blocks_make_up_a_sequence():
    """A prefix exported block by block is put together again block by block, windows or not."""
    world = World(MIXED)
    handle = world.open()
    spans = []
    for stop in (64, 192, 256, 300):
        start = world.refs[handle].num_tokens
        world.append((handle, stop - start))
        spans.append(world.store.export_span(handle, start, stop))
    twin = world.open()
    added = []
    for span, stop in zip(spans, (64, 192, 256, 300), strict=True):
        added.append(world.store.import_span(twin, span))
        world.expire(twin, stop)
    assert added == [64, 128, 64, 44]
    world.refs[twin] = dataclasses.replace(world.refs[handle].prefix(300), expired=world.refs[twin].expired)
    world.check()
    world.append((twin, 40))
    world.check()


def test_import_replaces_blocks_of_a_step_that_never_ran():
    """A sequence whose last reserve was abandoned takes a span as if nothing had happened."""
    world = World([FULL])
    source, target = world.open(128), world.open()
    assert world.store.reserve(world.append_step((target, 100))) is None
    world.store.import_span(target, world.store.export_span(source, 0, 128))
    world.refs[target] = world.refs[source].prefix(128)
    world.check()
    assert world.store.report().num_strips == 4


def test_span_holds_nothing_of_other_sequences():
    """Slots behind the end of a span are zero, whatever a recycled strip held before."""
    world = World([FULL])
    world.close(world.open(64))
    handle = world.open(3)
    span = world.store.export_span(handle, 0, 3)
    keys = np.frombuffer(span[-32 - 4096 : -32], dtype=np.float32).reshape(2, 64, 8)
    assert np.count_nonzero(keys[:, :3]) == 2 * 3 * 8
    assert np.count_nonzero(keys[:, 3:]) == 0


@pytest.mark.parametrize(("start", "stop"), [(1, 100), (64, 64), (0, 101), (-64, 64), (128, 100)])
def test_spans_that_are_none_are_refused(start: int, stop: int):
    """A span starts at a block of the sequence and ends inside it."""
    world = World([FULL])
    handle = world.open(100)
    with pytest.raises(IntegrityError, match="no span"):
        world.store.export_span(handle, start, stop)


def test_span_that_has_expired_is_refused():
    """Tokens that a window has dropped cannot be exported any more."""
    world = World([make_spec(window=64)])
    handle = world.open(640)
    with pytest.raises(IntegrityError, match="sliding window"):
        world.store.export_span(handle, 0, 128)


def test_damage_at_any_byte_is_detected():
    """Flipping one bit anywhere in a span, or cutting it anywhere, is found, and the store stays as it was."""
    world = World([make_spec(q_heads=1, dim=1, v_dim=1)])
    handle, twin = world.open(3), world.open()
    span = world.store.export_span(handle, 0, 3)
    before = world.state()
    for place in range(len(span)):
        damaged = bytearray(span)
        damaged[place] ^= 1 << (place % 8)
        with pytest.raises(IntegrityError):
            world.store.import_span(twin, bytes(damaged))
        with pytest.raises(IntegrityError):
            world.store.import_span(twin, span[:place])
    with pytest.raises(IntegrityError):
        world.store.import_span(twin, span + b"\x00")
    assert world.state() == before
    assert world.store.import_span(twin, span) == 3


@pytest.mark.parametrize("change", ["model", "plan", "layers"])
def test_spans_of_another_model_or_plan_are_refused(change: str):
    """Weights, plan and layer shapes must be the ones the span was made with."""
    span_of = World([FULL], model_id=b"one")
    span = span_of.store.export_span(span_of.open(10), 0, 10)
    world = {
        "model": lambda: World([FULL], model_id=b"two"),
        "plan": lambda: World([FULL], model_id=b"one", plan="plain(fp32)"),
        "layers": lambda: World([make_spec(window=4096)], model_id=b"one"),
    }[change]()
    with pytest.raises(IntegrityError, match="another model or KV plan"):
        world.store.import_span(world.open(), span)
    same = World([FULL], model_id=b"one")
    assert same.store.import_span(same.open(), span) == 10


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"7",
        b"null",
        b"[" * 100_000,
        b'{"start": 0, "stop": 3}',
        b'{"fingerprint": "FP", "start": 0, "stop": "3"}',
        b'{"fingerprint": "FP", "start": true, "stop": 3}',
        b'{"fingerprint": "FP", "start": 3, "stop": 0}',
        b'{"fingerprint": "FP", "start": -64, "stop": 3}',
        b'{"fingerprint": "FP", "start": 0, "stop": 1e400}',
        b'{"fingerprint": "FP", "start": 0, "stop": 300000000000000}',
        b'{"fingerprint": ["FP"], "start": 0, "stop": 3}',
    ],
)
def test_garbage_headers_with_a_valid_checksum_are_refused(header: bytes):
    """Whatever the header says, the answer is an IntegrityError and an unchanged store."""
    world = World([FULL])
    twin = world.open()
    before = world.state()
    text = header.replace(b"FP", world.store.fingerprint.hex().encode())
    with pytest.raises(IntegrityError):
        world.store.import_span(twin, seal(text, bytes(4096)))
    assert world.state() == before


def test_header_length_beyond_the_span_and_foreign_files_are_refused():
    """A header that claims more bytes than there are, an empty file and another file type are refused."""
    world = World([FULL])
    twin = world.open()
    body = b"ELBKV\x00\x00\x01" + struct.pack("<I", 2**32 - 1) + b"{}"
    for span in (body + hashlib.blake2b(body, digest_size=32).digest(), b"", b"ELBKV", bytes(100)):
        with pytest.raises(IntegrityError):
            world.store.import_span(twin, span)


def test_span_with_too_few_strips_is_refused_before_anything_is_taken():
    """Header and payload must agree on the number of strips."""
    world = World([FULL])
    twin = world.open()
    before = world.state()
    header = json.dumps({"fingerprint": world.store.fingerprint.hex(), "start": 0, "stop": 65}).encode()
    for size in (0, 4096, 8191, 8193):
        with pytest.raises(IntegrityError, match="bytes of strips"):
            world.store.import_span(twin, seal(header, bytes(size)))
    assert world.state() == before


def test_import_only_continues_a_sequence():
    """A span that starts elsewhere than where the sequence ends is refused."""
    world = World([FULL])
    handle, other = world.open(128), world.open(64)
    tail = world.store.export_span(handle, 64, 128)
    assert world.store.import_span(other, tail) == 64
    for target in (world.open(), world.open(65), handle):
        with pytest.raises(IntegrityError, match="starts at token 64"):
            world.store.import_span(target, tail)


@pytest.mark.parametrize("bound", ["capacity", "ledger"])
def test_import_into_a_tight_budget_leaves_the_sequence_unchanged(bound: str):
    """When one of two pools has no room, nothing is taken from either; after making room the import works."""
    layers = [FULL, make_spec(window=1000)]
    source = World(layers)
    span = source.store.export_span(source.open(192), 0, 192)
    world = World(layers, capacity=10 * 4096) if bound == "capacity" else World(layers, limit=10 * 4096)
    filler, twin = world.open(128), world.open()
    world.open(64)
    before = world.state()
    with pytest.raises(OutOfBudget, match=r"a span of 192 tokens needs 24\.0 KiB of KV memory; 16\.0 KiB could"):
        world.store.import_span(twin, span)
    assert world.state() == before
    world.check()
    world.close(filler)
    assert world.store.import_span(twin, span) == 192


# Bytes


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
        next(iter(world.store._pools))._refs[0, 0] = 2
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
