"""Moving: bytes of sequences where they lie, from one store into another, windows and shared strips included."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.kv_world import BOTH, FULL, MIXED, WIDE, ContiguousWorld, World

from elbowroom.bench.swap_runs import rows_as_json, swap_rows
from elbowroom.errors import IntegrityError, OutOfBudget
from elbowroom.kv import KVHandle
from elbowroom.kv.moving import count_copies
from elbowroom.memory import DiskTier
from elbowroom.memory.swap_cost import measure_swap_cost


def moved(world: World, handle: KVHandle, num_tokens: int) -> KVHandle:
    """Copy a sequence byte by byte through ``lend`` and ``admit``."""
    content = [b"".join(each.views) for each in world.store.lend(handle, num_tokens)]
    twin = world.store.admit(num_tokens)
    targets = world.store.lend(twin, num_tokens)
    for data, target in zip(content, targets, strict=True):
        offset = 0
        for view in target.views:
            view[:] = data[offset : offset + view.nbytes]
            offset += view.nbytes
        assert offset == len(data)
    world.refs[twin] = world.refs[handle].prefix(num_tokens)
    world.expire(twin, num_tokens)
    return twin


@pytest.mark.parametrize(
    ("kind", "plan"),
    [(World, "plain"), (World, "int8"), (World, "kivi(k=4,v=4,g=32)"), (ContiguousWorld, "plain")],
)
def test_what_was_lent_makes_the_same_sequence(kind: type[World], plan: str) -> None:
    """Layers with windows and without, tails and sealed strips: bit by bit, and it goes on from there."""
    world = kind(WIDE if plan != "plain" else MIXED, plan=plan)
    handle = world.open(300)
    world.append((handle, 5))
    fork = world.store.fork(handle)
    world.refs[fork] = world.refs[handle].prefix(305)
    twin = moved(world, fork, 305)
    world.check()
    world.append((twin, 70), (handle, 3))
    world.check()


def test_sequences_lie_in_few_runs_and_shared_strips_are_not_torn() -> None:
    """A new sequence is one run; one that copied a shared block has that elsewhere."""
    world = World([FULL, FULL])
    handle = world.open(640)
    assert count_copies(world.store.lend(handle, 640)) == 1
    world.open(100)
    fork = world.store.fork(handle, 600)
    world.refs[fork] = world.refs[handle].prefix(600)
    world.append((fork, 1))
    assert count_copies(world.store.lend(fork, 601)) == 2
    assert count_copies(world.store.lend(handle, 640)) == 1


def test_rows_lie_in_one_run_a_layer_that_ends_with_their_tokens() -> None:
    """Nothing grows for it: sequences are saved when there is no room."""
    world = ContiguousWorld([FULL, FULL])
    handle = world.open(333)
    before = world.state()
    lent = world.store.lend(handle, 333)
    assert world.state() == before
    assert count_copies(lent) == 2
    assert len(lent) == 2 * 6
    assert [each.num_bytes * 64 for each in lent[4:6]] == [64 * lent[0].num_bytes, 13 * lent[0].num_bytes]
    world.check()
    twin = moved(world, handle, 300)
    world.append((twin, 5))
    world.check()


@BOTH
def test_what_cannot_be_lent_or_admitted_changes_nothing(kind: type[World]) -> None:
    """A sequence that is too short and a store that is too full are refused."""
    world = kind([FULL], capacity=3 * 4096)
    handle = world.open(100)
    before = world.state()
    with pytest.raises(IntegrityError, match="no prefix of 101"):
        world.store.lend(handle, 101)
    with pytest.raises(OutOfBudget, match="a span of 200 tokens"):
        world.store.admit(200)
    assert world.state() == before


def test_cost_of_a_disk_is_measured(tmp_path: Path) -> None:
    """Rates are above zero and nothing stays on disk."""
    tier = DiskTier(tmp_path, 1 << 24)
    cost = measure_swap_cost(tier, 1 << 20, repeats=1)
    assert min(cost.write_bytes_per_s, cost.read_bytes_per_s) > 1e6
    assert cost.write_seconds(2e6, 0) > cost.write_seconds(1e6, 0) > 0
    assert tier.usage().num_objects == 0
    tier.close()


def test_rows_of_the_benchmark(tmp_path: Path) -> None:
    """By run there are far fewer and longer copies than by block, and a second save writes only what is new."""
    lengths = [(60 + 37 * number % 400, 30 + 11 * number % 90) for number in range(60)]
    rows = {str(row["way"]): row for row in rows_as_json(swap_rows(lengths, 6, tmp_path, num_samples=3))}
    block, sync, _, new = rows.values()
    assert float(str(sync["bytes_per_copy"])) > 20 * float(str(block["bytes_per_copy"]))
    assert float(str(new["num_bytes"])) < float(str(sync["num_bytes"])) * 2
    assert all(float(str(row["load_gb_per_s"])) > 0 for row in rows.values())
