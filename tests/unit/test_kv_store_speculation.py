"""Repair and token trees in PagedStore: positions written again, accepted or taken back."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support.kv_world import BOTH, FULL, MIXED, World, make_spec

from elbowroom.errors import IntegrityError, OutOfBudget


@BOTH
def test_overwrite_allows_exactly_the_announced_positions_once(kind: type[World]):
    """Announced positions can be written in the next step only, and no others."""
    world = kind([FULL])
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


@BOTH
@pytest.mark.parametrize("positions", [[-1], [100], [5, 100]])
def test_overwrite_of_what_is_not_stored_is_refused(kind: type[World], positions: list[int]):
    """Only stored positions can be announced."""
    world = kind([FULL])
    handle = world.open(100)
    with pytest.raises(IntegrityError, match="not all stored"):
        world.store.overwrite(handle, np.array(positions))


@BOTH
def test_overwrite_needs_the_window_of_what_it_writes(kind: type[World]):
    """A position whose own window was dropped cannot be computed again, even if its slot is still there."""
    world = kind([make_spec(window=40)])
    handle = world.open(64)
    world.append((handle, 67))
    world.append((handle, 1))
    with pytest.raises(IntegrityError, match="sliding window"):
        world.store.overwrite(handle, np.array([102]))
    world.store.overwrite(handle, np.array([103]))
    step = world.make_step([(handle, [103])])
    assert world.store.reserve(step) is None
    world.run(step)


@BOTH
@pytest.mark.parametrize("start", [10, 60, 64, 120])
@pytest.mark.parametrize("kept", [[], [0], [0, 1, 2], [1, 3, 6], [0, 5], [7]])
def test_accepted_tokens_move_to_where_the_step_began(kind: type[World], start: int, kept: list[int]):
    """Kept positions become consecutive from the step's start, across block borders; the rest is gone."""
    world = kind([FULL, make_spec(kv_heads=2)])
    handle = world.open(start)
    world.append((handle, 8))
    world.accept(handle, start, [start + each for each in kept])
    world.check()
    world.append((handle, 2))
    world.check()


@BOTH
@pytest.mark.parametrize("kept", [[9, 10], [10, 18], [12, 11], [11, 11]])
def test_accept_takes_only_ascending_positions_of_the_last_step(kind: type[World], kept: list[int]):
    """Positions before the step, behind it, or out of order are refused and nothing moves."""
    world = kind([FULL])
    handle = world.open(10)
    world.append((handle, 8))
    before = world.state()
    with pytest.raises(IntegrityError, match=r"no ascending positions of 10\.\.17"):
        world.store.accept(handle, np.array(kept))
    assert world.state() == before


@BOTH
def test_accept_does_not_write_into_blocks_shared_since_the_step(kind: type[World]):
    """A fork taken between step and accept keeps the tree's tokens."""
    world = kind(MIXED)
    handle = world.open(60)
    world.append((handle, 8))
    world.fork(handle)
    world.accept(handle, 60, [61, 66, 67])
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


@BOTH
@pytest.mark.parametrize("window", [1, 40, 64, 100, 128])
def test_a_speculative_step_can_always_be_taken_back(kind: type[World], window: int):
    """At every position, a step of up to 64 tokens can be rolled back to its start, windows or not."""
    world = kind([FULL, make_spec(window=window)])
    handle = world.open(150)
    for count in [1, 8, 17, 64, 5, 64, 33, 64, 64]:
        start = world.refs[handle].num_tokens
        world.append((handle, count))
        world.truncate(handle, start)
        world.append((handle, count))
        world.accept(handle, start, range(start, start + count, 2))
        world.check()
