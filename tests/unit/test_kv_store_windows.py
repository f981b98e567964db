"""Sliding windows in PagedStore: what is freed, and how far a sequence can go back."""

from __future__ import annotations

import pytest
from tests.support.kv_world import BOTH, FULL, World, make_spec

from elbowroom.errors import IntegrityError


@BOTH
def test_sliding_window_frees_bytes_and_pages(kind: type[World]):
    """A windowed layer holds a bounded number of strips, however long the sequence grows, and the arena shrinks."""
    world = kind([make_spec(window=100)])
    handle = world.open(64)
    held = []
    for _ in range(12):
        world.append((handle, 64))
        world.arena.trim(0)
        held.append(world.ledger.total("host"))
    assert held == [2 * 4096] + [3 * 4096] * 11
    world.check()


@BOTH
def test_prompt_longer_than_the_window_leaves_only_the_window(kind: type[World]):
    """After a long prompt in one step, the blocks before window and rollback are gone."""
    world = kind([make_spec(window=64)])
    handle = world.open(640)
    assert world.store.report().live_bytes == 2 * 4096
    assert world.refs[handle].expired == [8]
    world.check()


@BOTH
def test_going_back_beyond_a_window_is_refused_with_the_reason(kind: type[World]):
    """fork and truncate to where a window has dropped tokens name the token and the window, and change nothing."""
    world = kind([FULL, make_spec(window=64)])
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
