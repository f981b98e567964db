"""Steps of PagedStore: what they store and return, their statistics, and the malformed ones that are refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tests.support.kv_world import BOTH, FULL, MIXED, NOTHING, World, make_spec

from elbowroom.errors import IntegrityError
from elbowroom.kv import KVStep, Want


@BOTH
def test_several_sequences_of_different_lengths_share_a_step(kind: type[World]):
    """Prompts, single tokens and block boundaries in one step give the attention that each has alone."""
    world = kind(MIXED)
    a, b, c = world.open(200), world.open(63), world.open()
    for _ in range(3):
        world.append((c, 130), (a, 1), (b, 2))
    world.check()


@BOTH
def test_chunking_does_not_change_what_is_read(kind: type[World]):
    """A prompt in one step and the same prompt in random chunks leave the same bits behind."""
    k, v, q = torch.randn(300, 1, 8), torch.randn(300, 1, 8), torch.randn(300, 2, 8)
    spans, outs = [], []
    for cuts in ([0, 300], [0, 1, 64, 65, 190, 299, 300]):
        world = kind([make_spec(window=90)])
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
    pool = world.store._pools.main[0].pool
    stored = world.store._codec.open(pool.strip(int(world.store._sequences[handle.id].table[0, 0])), pool.fmt)[0]
    dtype = torch.bfloat16 if "bf16" in plan else torch.float16
    assert torch.equal(stored[0, :10], k[:, 0].to(dtype))
    assert pool.strip_bytes == 64 * 16 * 2


@BOTH
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
def test_positions_with_holes_or_out_of_order_are_refused(kind: type[World], positions: list[int], match: str):
    """A step appends exactly behind the tokens there are; anything else changes nothing."""
    world = kind([FULL])
    handle = world.open(10)
    before = world.state()
    with pytest.raises(IntegrityError, match=match):
        world.store.reserve(world.make_step([(handle, positions)]))
    assert world.state() == before


@BOTH
def test_malformed_rows_are_refused(kind: type[World]):
    """A sequence twice in a step, a row without tokens, and a wrong number of rows are refused; nothing changes."""
    world = kind([FULL])
    a, b = world.open(10), world.open(10)
    before = world.state()
    with pytest.raises(IntegrityError, match="two rows"):
        world.store.reserve(world.make_step([(a, [10]), (a, [10])]))
    for starts, positions in [([0, 1, 1], [10]), ([0, 1], [10]), ([0, 1, 3], [10, 10]), ([1, 2, 3], [10, 10, 10])]:
        step = KVStep((a, b), np.array(starts, dtype=np.int32), np.array(positions))
        with pytest.raises(IntegrityError, match="do not divide"):
            world.store.reserve(step)
    assert world.state() == before


@BOTH
def test_steps_and_handles_out_of_turn_are_refused(kind: type[World]):
    """attend and end_step need a reserved step, and a closed sequence is known to nobody."""
    world = kind([FULL])
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


@BOTH
def test_changed_batches_get_their_own_tables(kind: type[World]):
    """Forks, rollbacks, closed members, other orders and crossed blocks are all seen by the next step."""
    world = kind(MIXED)
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


@BOTH
def test_statistics_agree_with_dense_attention(kind: type[World]):
    """colsum and pmax equal those of dense softmax: grouped heads, windows, softcap, shared layers, several rows."""
    world = kind(MIXED)
    a, b = world.open(150), world.open(10)
    for sizes in ((1, 1), (70, 3), (2, 120)):
        step = world.append_step((a, sizes[0]), (b, sizes[1]))
        assert world.store.reserve(step) is None
        for out in world.run(step, Want(colsum=True, pmax=True)):
            assert out.colsum is not None
            assert out.pmax is not None
            assert [sums.shape[1] for sums in out.colsum] == [world.refs[h].num_tokens for h in (a, b)]


@BOTH
def test_statistics_are_made_only_when_wanted(kind: type[World]):
    """Each statistic is None unless it was asked for."""
    world = kind([FULL])
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
