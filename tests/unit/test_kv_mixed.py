"""Sequences of several plans in one store: each is as if alone, and one that goes over is as if it had begun there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.support.kv_world import WIDE, make_spec

from elbowroom.core import LayerSpec
from elbowroom.errors import IntegrityError, OutOfBudget, PlanError
from elbowroom.kv import KVHandle, KVPlan, KVStep, PagedStore, Want
from elbowroom.kv.capacity import Capacity
from elbowroom.kv.mixed import MixedStore
from elbowroom.memory import Arena, Budget, HostTier, Ledger

LAYERS = [make_spec(q_heads=4, kv_heads=2, dim=32, v_dim=32, window=window) for window in (None, 100, None)]
TEXTS = "plain", "plain(bf16)", "int8", "fp8", "bfp", "kivi(4,4,32)", "kivi(2,2,32)", "quest(192) | int8"


class Batch:
    """A store of some plans, and sequences whose keys and values depend on position and name only."""

    def __init__(self, texts: tuple[str, ...], layers: list[LayerSpec] = LAYERS, capacity_bytes: int = 2**24) -> None:
        self.layers, capacity = layers, Capacity(capacity_bytes)
        arena = Arena(HostTier(), Ledger(Budget({})))
        plans = [KVPlan.parse(text).bind(layers, "float32") for text in texts]
        self.store = MixedStore([PagedStore(plan, arena, capacity) for plan in plans])

    def step(self, handles: list[KVHandle], counts: list[int], names: list[int]) -> torch.Tensor:
        """Append ``counts`` tokens to the sequences; return what attention gives in the last layer."""
        starts = [self.store.num_tokens(handle) for handle in handles]
        positions = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])
        step = KVStep(tuple(handles), np.cumsum([0, *counts]).astype(np.int32), positions.astype(np.int64))
        assert self.store.reserve(step) is None
        out = torch.empty(0)
        for index, spec in enumerate(self.layers):
            rows = zip(names, starts, counts, strict=True)
            drawn = [draw(spec, name, index, start, count) for name, start, count in rows]
            q, k, v = (torch.cat(parts) for parts in zip(*drawn, strict=True))
            assert len(set(names)) < 2 or self.store.strips(index, step) is None or len({h.plan for h in handles}) == 1
            out = self.store.attend(index, q, k, v, step, Want()).out
            self.store.end_layer(index, step)
        self.store.end_step(step)
        self.store.check_integrity()
        return out


def draw(spec: LayerSpec, name: int, layer: int, start: int, count: int) -> list[torch.Tensor]:
    """Return queries, keys and values of tokens."""
    shapes = (spec.num_q_heads, spec.head_dim), (spec.num_kv_heads, spec.head_dim), (spec.num_kv_heads, spec.v_head_dim)
    made = []
    for part, shape in enumerate(shapes):
        generator = torch.Generator().manual_seed(1000 * name + 10 * layer + part)
        made.append(torch.randn(start + count, *shape, generator=generator)[start:])
    return made


def test_rows_of_several_plans_are_as_if_alone() -> None:
    together = Batch(TEXTS)
    handles = [together.store.open(plan) for plan in range(len(TEXTS))]
    names = list(range(len(TEXTS)))
    alone = [Batch((text,)) for text in TEXTS]
    own = [each.store.open() for each in alone]
    for counts in ([150 + 3 * i for i in names], [1] * len(TEXTS), [40] * len(TEXTS), [1] * len(TEXTS)):
        out = together.step(handles, counts, names).split(counts)
        for name in names:
            torch.testing.assert_close(out[name], alone[name].step([own[name]], [counts[name]], [name]))
    live = together.store.report().live_bytes
    assert live == sum(store.report().live_bytes for store in together.store.stores)
    assert together.store.report().num_sequences == len(TEXTS)


@pytest.mark.parametrize("target", TEXTS[1:])
@pytest.mark.parametrize("count", [1, 64, 700])
def test_a_sequence_that_goes_over_is_as_if_it_had_begun_there(target: str, count: int) -> None:
    batch = Batch(("plain", target))
    handles = [batch.store.open(0), batch.store.open(1)]
    batch.step(handles, [count, count], [7, 7])
    before = batch.store.report()
    handles[0] = batch.store.convert(handles[0], 1)
    after = batch.store.report()
    assert (after.num_sequences, after.num_tokens) == (before.num_sequences, before.num_tokens)
    assert after.live_bytes <= before.live_bytes or count <= 64  # a short one has a tail on top
    for more in (1, 90, 1):
        first, second = batch.step(handles, [more, more], [7, 7]).split(more)
        torch.testing.assert_close(first, second)
    for handle in handles:
        batch.store.close(handle)
    assert batch.store.report().live_bytes == 0


def test_layers_that_read_others_and_windows_go_over_too() -> None:
    batch = Batch(("plain", "int8"), WIDE)
    handles = [batch.store.open(0), batch.store.open(1)]
    batch.step(handles, [333, 333], [3, 3])
    handles[0] = batch.store.convert(handles[0], 1)
    first, second = batch.step(handles, [5, 5], [3, 3]).split(5)
    torch.testing.assert_close(first, second)


def test_what_others_share_stays_as_it_is() -> None:
    batch = Batch(("plain", "kivi(2,2,32)"))
    parent = batch.store.open()
    batch.step([parent], [200], [1])
    twin = batch.store.fork(parent, 192)
    other = batch.store.convert(parent, 1)
    kept = Batch(("plain",))
    own = kept.store.open()
    kept.step([own], [192], [1])
    torch.testing.assert_close(batch.step([twin], [9], [1]), kept.step([own], [9], [1]))
    assert batch.store.num_tokens(other) == 200


def test_hardly_more_is_held_on_the_way() -> None:
    """A store that is nearly full can turn a long sequence into a smaller plan."""
    batch = Batch(("plain", "int8"), LAYERS[:1], capacity_bytes=2**21)
    block_bytes = batch.store.stores[0].plan.block_bytes
    handle = batch.store.open()
    batch.step([handle], [2**21 // block_bytes * 64 - 320], [1])
    assert batch.store.report().live_bytes > 0.85 * 2**21
    handle = batch.store.convert(handle, 1)
    assert batch.store.report().live_bytes < 0.4 * 2**21


def test_without_room_to_begin_with_nothing_changes() -> None:
    batch = Batch(("plain", "int8"), capacity_bytes=2**20)
    handle = batch.store.open()
    batch.step([handle], [600], [1])
    batch.store.resize(batch.store.report().live_bytes)
    with pytest.raises(OutOfBudget, match="raise memory"):
        batch.store.convert(handle, 1)
    assert batch.store.num_tokens(handle) == 600
    batch.store.resize(2**20)
    batch.step([handle], [3], [1])


def test_a_step_that_does_not_fit_takes_nothing_under_any_plan() -> None:
    batch = Batch(("plain", "int8"), capacity_bytes=2**20)
    handles = [batch.store.open(0), batch.store.open(1)]
    batch.step(handles, [100, 100], [1, 2])
    before = batch.store.report()
    counts = [128, 5000]
    positions = np.concatenate([np.arange(100, 100 + count) for count in counts]).astype(np.int64)
    step = KVStep(tuple(handles), np.cumsum([0, *counts]).astype(np.int32), positions)
    missing = batch.store.reserve(step)
    assert missing is not None
    assert missing.needed_bytes > missing.available_bytes
    assert batch.store.report().live_bytes == before.live_bytes
    batch.store.check_integrity()
    batch.step(handles, [10, 10], [1, 2])


def test_rows_of_a_plan_that_lie_apart_are_refused() -> None:
    batch = Batch(("plain", "int8"))
    handles = tuple(batch.store.open(plan) for plan in (0, 1, 0))
    step = KVStep(handles, np.arange(4, dtype=np.int32), np.zeros(3, dtype=np.int64))
    with pytest.raises(IntegrityError, match="order the rows by their plan"):
        batch.store.reserve(step)


@pytest.mark.parametrize(
    ("source", "target", "match"),
    [
        ("snapkv(256) | int8", "int8", "chooses when a prompt ends"),
        ("plain", "think(0.5) | int8", "chooses when a prompt ends"),
        ("int8", "int8", "no relief from itself"),
    ],
)
def test_plans_that_choose_are_not_gone_over_to(source: str, target: str, match: str) -> None:
    batch = Batch((source, target))
    handle = batch.store.open()
    with pytest.raises(PlanError, match=match):
        batch.store.convert(handle, 1)


def test_a_store_of_one_plan_has_no_other() -> None:
    store = Batch(("plain",)).store.stores[0]
    with pytest.raises(IntegrityError, match="one plan"):
        store.open(1)
    with pytest.raises(IntegrityError, match="one plan"):
        store.convert(store.open(), 1)
