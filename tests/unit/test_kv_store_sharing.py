"""Forks in PagedStore: what is shared, when it is copied, and when its bytes are freed."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support.kv_world import BOTH, FULL, MIXED, World


@BOTH
@pytest.mark.parametrize("at", [0, 1, 63, 64, 65, 130])
@pytest.mark.parametrize("writer", ["parent", "child"])
def test_writing_one_side_of_a_fork_leaves_the_other_alone(kind: type[World], at: int, writer: str):
    """Copy-on-write: whichever side appends, the other keeps every bit."""
    world = kind([FULL, FULL])
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


@BOTH
def test_all_sharers_writing_in_one_step_keep_their_own_copies(kind: type[World]):
    """A parent and its forks that write the same shared block in the same step do not see each other."""
    world = kind(MIXED)
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
