"""Workspace: scratch buffers that are charged once, at start, and never grow."""

from __future__ import annotations

import pytest
import torch

from elbowroom.errors import IntegrityError, OutOfBudget
from elbowroom.memory import Arena, Budget, HostTier, Ledger, Workspace

PAGE = HostTier.page_bytes


def make_arena(limit: int | None = None) -> Arena:
    return Arena(HostTier(), Ledger(Budget({} if limit is None else {"host": limit})))


def test_all_buffers_are_charged_at_start_and_given_back_by_close():
    """The ledger shows the pages of all buffers from the start on, and nothing after close."""
    arena = make_arena()
    workspace = Workspace(arena, {"q": 100, "logits": 3 * PAGE})
    assert workspace.num_bytes == arena.ledger.held("workspace", "host") == 4 * PAGE
    workspace.take("logits", (3 * PAGE,), torch.uint8).fill_(1)
    assert arena.ledger.total("host") == 4 * PAGE
    workspace.close()
    assert arena.ledger.total("host") == 0


def test_buffers_of_any_sizes_do_not_overlap_and_are_aligned():
    """Writing one buffer to its last byte leaves all others alone; each starts on 64 bytes."""
    sizes = {"a": 1, "b": 64, "c": 65, "d": 130, "e": 7}
    workspace = Workspace(make_arena(), sizes)
    buffers = {name: workspace.take(name, (size,), torch.uint8) for name, size in sizes.items()}
    for number, buffer in enumerate(buffers.values()):
        buffer.fill_(number + 1)
    for number, buffer in enumerate(buffers.values()):
        assert set(buffer.tolist()) == {number + 1}
        assert buffer.data_ptr() % 64 == 0


def test_take_gives_the_shape_and_dtype_asked_and_the_same_memory_each_time():
    """A buffer can be viewed in any dtype and shape that fits; taking it allocates nothing."""
    workspace = Workspace(make_arena(), {"x": 24 * 4})
    first = workspace.take("x", (2, 3, 4), torch.float32)
    again = workspace.take("x", (12, 4), torch.bfloat16)
    assert (first.shape, first.dtype, first.is_contiguous()) == ((2, 3, 4), torch.float32, True)
    assert first.data_ptr() == again.data_ptr()


def test_larger_use_than_planned_is_refused_with_both_sizes():
    """One element too many is an IntegrityError that names the buffer, what it holds and what was asked."""
    workspace = Workspace(make_arena(), {"x": 40})
    workspace.take("x", (10,), torch.float32)
    with pytest.raises(IntegrityError, match="'x' holds 40 bytes, the step needs 44"):
        workspace.take("x", (11,), torch.float32)


def test_unknown_buffer_is_refused_with_the_names_there_are():
    """A name that was not planned is refused and the planned ones are listed."""
    workspace = Workspace(make_arena(), {"q": 8, "k": 8})
    with pytest.raises(IntegrityError, match="no workspace buffer 'v'; there are: q, k"):
        workspace.take("v", (1,), torch.float32)


def test_workspace_that_does_not_fit_holds_nothing():
    """A refused workspace leaves no charge and no range behind."""
    arena = make_arena(limit=2 * PAGE)
    with pytest.raises(OutOfBudget, match="workspace asked for"):
        Workspace(arena, {"big": 3 * PAGE})
    assert arena.ledger.total("host") == 0
    assert Workspace(arena, {"small": 2 * PAGE}).num_bytes == 2 * PAGE


def test_empty_workspace_works():
    """No buffers at all, or a buffer of no bytes, is no error."""
    assert Workspace(make_arena(), {}).num_bytes == PAGE
    assert Workspace(make_arena(), {"none": 0}).take("none", (0, 4), torch.float32).shape == (0, 4)
