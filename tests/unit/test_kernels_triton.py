"""The Triton backend, interpreted on the CPU: dense attention, what is shared read once, and who shares what."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.strip_cache import Cache, filled, make_spec

from elbowroom.core import STRIP_TOKENS
from elbowroom.kernels import LayerStrips, StripStep, append, attention
from elbowroom.kernels.base import AttentionKernels
from elbowroom.kernels.shared_reads import PIECE, ReadPlan, plan_reads
from elbowroom.kernels.token_major import BY_TOKEN

REFERENCE = attention.BACKENDS.get("reference")


@pytest.fixture(scope="module")
def triton() -> Iterator[AttentionKernels]:
    """The backend; programs are interpreted where the variable was set when they were first imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install 'elbowroom[triton]')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield attention.BACKENDS.get("triton")


MIXED = StripStep.of_runs([(199, 1), (64, 70), (0, 5), (127, 1)])
MIXED_LENGTHS = [200, 134, 5, 128]


@pytest.mark.parametrize(
    ("stored", "computed"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float32")],
)
def test_every_dtype_equals_dense_attention(triton: AttentionKernels, stored: str, computed: str) -> None:
    cache = filled(REFERENCE, make_spec(dim=40), stored, MIXED_LENGTHS)

    cache.check(triton, MIXED, getattr(torch, computed))


@pytest.mark.parametrize(
    "shape", [{"group": 3, "dim": 20, "v_dim": 12}, {"group": 70, "dim": 8}, {"window": 65}, {"softcap": 5.0}]
)
def test_heads_widths_windows_and_softcaps(triton: AttentionKernels, shape: dict[str, int]) -> None:
    step = StripStep.of_runs([(199, 1), (130, 4), (0, 5), (127, 1)])

    filled(REFERENCE, make_spec(**shape), "float32", MIXED_LENGTHS).check(triton, step)


def test_expired_strips_are_never_touched(triton: AttentionKernels) -> None:
    cache = filled(REFERENCE, make_spec(window=100), "float32", [400, 300])
    step = StripStep.of_runs([(399, 1), (290, 10)], first_slots=[256, 130])
    cache.table[0, :4] = 0xFFFFFFFF
    cache.table[1, :2] = 0xFFFFFFFF
    cache.table[1, 5:] = 0xFFFFFFFF

    cache.check(triton, step)


def test_rows_are_written_to_their_slots_and_nowhere_else(triton: AttentionKernels) -> None:
    """Strided rows, rounded as torch rounds, in any order."""
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    step = dataclasses.replace(StripStep.of_runs([(0, 100)]), positions=order)
    caches = [Cache(make_spec(dim=24), "bfloat16", [100]) for _ in range(2)]
    for cache, backend in zip(caches, (triton, REFERENCE), strict=True):
        k, v = torch.cat([cache.rows(step, cache.k), cache.rows(step, cache.v)], dim=1).split(2, dim=1)
        append(LayerStrips(step, cache.table, cache.base, cache.fmt), k, v, backend=backend)

    assert torch.equal(caches[0].base, caches[1].base)


def test_forks_of_several_levels_equal_dense_attention(triton: AttentionKernels) -> None:
    """Two families, one of them with a branch, one stranger; a chunk among them, and one that ends in the prefix."""
    lengths = [1400, 1300, 1290, 700, 650, 1281, 300, 200]
    cache = Cache(make_spec(group=4, dim=16), "float16", lengths)
    for fork in ((1, 0, 20), (2, 1, 20), (5, 2, 18), (4, 3, 5), (6, 0, 4)):
        cache.share(*fork)
    cache.append(REFERENCE, StripStep.of_runs([(0, length) for length in lengths]))
    runs = [(length - 1, 1) for length in lengths]
    runs[1], runs[2], runs[5] = (1200, 100), (1285, 5), (150, 1)

    cache.check(triton, StripStep.of_runs(runs))


def test_a_strip_outside_the_range_is_refused(triton: AttentionKernels) -> None:
    cache = Cache(make_spec(), "float32", [10])
    cache.table[0, 0] = 0xFFFFFFFF
    step = StripStep.of_runs([(9, 1)])

    with pytest.raises(ValueError, match="bytes of its range"):
        cache.attend(triton, step, torch.zeros(1, 4, 16))
    with pytest.raises(ValueError, match="bytes of its range"):
        cache.append(triton, step)


def test_what_it_cannot_read_is_refused(triton: AttentionKernels) -> None:
    cache = filled(REFERENCE, make_spec(), "float32", [10])
    cache.fmt = dataclasses.replace(cache.fmt, codec="int8")

    with pytest.raises(ValueError, match="reads plain strips"):
        cache.attend(triton, StripStep.of_runs([(9, 1)]), torch.zeros(1, 4, 16))
    cache.fmt = dataclasses.replace(cache.fmt, codec="plain")
    by_token = LayerStrips(StripStep.of_runs([(9, 1)]), cache.table, cache.base, cache.fmt, BY_TOKEN)
    with pytest.raises(ValueError, match="contiguous store"):
        attention.attend(by_token, cache.spec, torch.zeros(1, 4, 16), backend=triton)


def test_a_step_without_rows_does_nothing(triton: AttentionKernels) -> None:
    filled(REFERENCE, make_spec(), "float32", [10]).check(triton, StripStep.of_runs([(10, 0)]))


def plan(table: list[list[int]], runs: list[tuple[int, int]], tile: int = 4, shares: bool = True) -> ReadPlan:
    step = StripStep.of_runs(runs)
    high = step.positions.numpy().astype(np.int32)
    return plan_reads(step, np.asarray(table, dtype=np.uint32), np.zeros_like(high), high, tile, shares=shares)


def items(made: ReadPlan) -> list[tuple[list[int], int, int]]:
    """Rows, first block and end of each item."""
    rows = [[row for row in each if row >= 0] for each in made.rows.tolist()]
    return sorted((own, *bounds) for own, bounds in zip(rows, made.blocks.tolist(), strict=True))


def test_a_prefix_is_read_once_for_its_group_on_every_level() -> None:
    """Blocks 0 and 1 belong to all four, block 2 to the first two; the rest is everybody's own."""
    table = [[1, 2, 3, 10], [1, 2, 3, 11], [1, 2, 4, 12], [1, 2, 5, 13]]
    made = plan(table, [(255, 1)] * 4)

    assert items(made) == [
        ([0], 3, 4),
        ([0, 1], 2, 3),
        ([0, 1, 2, 3], 0, 2),
        ([1], 3, 4),
        ([2], 2, 4),
        ([3], 2, 4),
    ]
    assert items(plan(table, [(255, 1)] * 4, shares=False)) == [([row], 0, 4) for row in range(4)]


def test_a_group_larger_than_a_tile_is_read_once_for_each_tile() -> None:
    assert [own for own, _, _ in items(plan([[7]] * 10, [(60, 1)] * 10))] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_chunks_read_alone_and_long_rows_in_pieces() -> None:
    blocks = 2 * PIECE + 3
    made = plan([list(range(blocks))] * 2, [(64 * blocks - 1, 1), (64, 10)])

    assert items(made) == [
        ([0], 0, PIECE),
        ([0], PIECE, 2 * PIECE),
        ([0], 2 * PIECE, blocks),
        ([1, 2, 3, 4], 0, 2),
        ([5, 6, 7, 8], 0, 2),
        ([9, 10], 0, 2),
    ]


@settings(max_examples=200, deadline=None, database=None)
@given(data=st.data())
def test_every_row_reads_each_of_its_blocks_once(data: st.DataObject) -> None:
    """Random tables with repeated entries: what a row reads together is what its sequence holds, once."""
    count, blocks = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 40))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    table = random.integers(0, 3, (count, blocks)) * 100 + np.arange(blocks)
    ends = random.integers(1, blocks * STRIP_TOKENS + 1, count)
    rows = np.minimum(random.integers(0, 7, count), ends)
    step = StripStep.of_runs(list(zip((ends - rows).tolist(), rows.tolist(), strict=True)))
    high = step.positions.numpy().astype(np.int32)
    low = np.maximum(high - random.integers(0, 2000), 0).astype(np.int32)
    made = plan_reads(step, table.astype(np.uint32), low, high, 4, shares=data.draw(st.booleans()))
    owners = np.repeat(np.arange(count), rows)
    read: dict[int, list[int]] = {row: [] for row in range(step.num_rows)}
    for item, (first, end) in enumerate(made.blocks.tolist()):
        assert end - first <= PIECE or (made.rows[item] >= 0).sum() == 0 or rows[made.sequences[item]] > 4
        for row in made.rows[item][made.rows[item] >= 0].tolist():
            leader = made.sequences[item]
            assert (table[owners[row], first:end] == table[leader, first:end]).all()
            read[row] += range(first, end)
    for row, taken in read.items():
        needed = range(int(low[row]) // STRIP_TOKENS, int(high[row]) // STRIP_TOKENS + 1)
        assert len(taken) == len(set(taken))
        assert set(needed) <= set(taken)
        parts = sorted(made.numbers[made.rows == row].tolist())
        assert parts == list(range(made.part_starts[row], made.part_starts[row + 1]))
    assert made.num_parts == (made.rows >= 0).sum() == (made.numbers >= 0).sum()
