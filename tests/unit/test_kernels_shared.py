"""Attention of rows that share strips: the answer of dense attention, and of each row by itself."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.native import ISAS, instructions
from tests.support.strip_cache import Cache, make_spec

from elbowroom.bench.filled_cache import import_random
from elbowroom.bench.kv_shapes import equal_layers
from elbowroom.core import STRIP_TOKENS
from elbowroom.kernels import StripStep, attention
from elbowroom.kernels.base import AttentionKernels
from elbowroom.kv import KVPlan, KVStep, PagedStore
from elbowroom.memory import Arena, Budget, HostTier, Ledger

HAS_NATIVE = importlib.util.find_spec("elbowroom._native") is not None


@pytest.fixture(params=ISAS)
def backend(request: pytest.FixtureRequest) -> Iterator[AttentionKernels]:
    """The native backend with each instruction set that runs here."""
    with instructions(request.param):
        yield attention.BACKENDS.get("native")


def check(cache: Cache, backend: AttentionKernels, step: StripStep) -> None:
    """Rows together give what dense attention gives, and what each gives by itself up to the order of float32 sums."""
    cache.check(backend, step)
    q = cache.draw(step.num_rows, cache.spec.num_q_heads, cache.spec.head_dim)
    made = (cache.attend(backend, step, q, shares) for shares in (True, False))
    for together, alone in zip(*made, strict=True):
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def forked(backend: AttentionKernels, cache: Cache, *forks: tuple[int, int, int]) -> Cache:
    """Fill a cache whose sequences share strips: reader, holder and number of blocks."""
    for fork in forks:
        cache.share(*fork)
    cache.append(backend, StripStep.of_runs([(0, len(k)) for k in cache.k]))
    return cache


def decode(cache: Cache) -> StripStep:
    return StripStep.of_runs([(len(k) - 1, 1) for k in cache.k])


@pytest.mark.parametrize(
    ("stored", "group", "dim"),
    [("float32", 1, 16), ("bfloat16", 4, 64), ("float16", 3, 24), ("bfloat16", 2, 20), ("float32", 20, 8)],
)
def test_forks_of_several_levels_equal_dense_attention(
    backend: AttentionKernels, stored: str, group: int, dim: int
) -> None:
    """Two families, one of them with a branch, one stranger; shared parts end inside and behind pieces of 16 strips."""
    lengths = [1400, 1300, 1290, 700, 650, 1281, 300, 200]
    cache = Cache(make_spec(group=group, dim=dim), stored, lengths)
    forked(backend, cache, (1, 0, 20), (2, 1, 20), (5, 2, 18), (4, 3, 5), (6, 0, 4))

    check(cache, backend, decode(cache))


@pytest.mark.parametrize("members", [1, 2, 3, 9, 40])
def test_any_number_of_members_fits_into_items(backend: AttentionKernels, members: int) -> None:
    cache = Cache(make_spec(group=4, kv_heads=1, dim=32), "float32", [260 + i for i in range(members)])

    check(forked(backend, cache, *[(i, 0, 4) for i in range(1, members)]), backend, decode(cache))


def test_a_shared_window_is_read_from_where_it_begins(backend: AttentionKernels) -> None:
    """Windows begin at different slots, for the last sequence at another block; expired entries hold anything."""
    cache = Cache(make_spec(window=300), "float32", [600, 590, 600, 520])
    forked(backend, cache, (1, 0, 8), (2, 0, 8), (3, 0, 8))
    step = StripStep.of_runs([(599, 1), (589, 1), (595, 5), (519, 1)], first_slots=[256, 256, 256, 192])
    cache.table[:3, :4], cache.table[3, :3] = 0xFFFFFFFF, 0xFFFFFFFF

    check(cache, backend, step)


def test_short_questions_are_read_together_and_whole_chunks_alone(backend: AttentionKernels) -> None:
    cache = Cache(make_spec(group=2, dim=16), "bfloat16", [400, 390, 420, 520])
    forked(backend, cache, *[(i, 0, 5) for i in range(1, 4)])

    check(cache, backend, StripStep.of_runs([(380, 20), (389, 1), (413, 7), (320, 200)]))


def test_rows_that_end_inside_what_they_share_read_no_further(backend: AttentionKernels) -> None:
    """Equal tables, positions of their own: as after a rollback, or when one token is computed again."""
    cache = Cache(make_spec(), "float32", [500, 500, 500])
    forked(backend, cache, (1, 0, 8), (2, 0, 8))
    step = StripStep.of_runs([(499, 1), (200, 1), (130, 3)])

    check(cache, backend, step)


def test_what_is_shared_is_in_fact_read_together(backend: AttentionKernels) -> None:
    """Nine rows of four query heads make register tiles of what is a product of few vectors for each row."""
    cache = Cache(make_spec(group=4, dim=64), "float32", [400] * 9)
    forked(backend, cache, *[(i, 0, 6) for i in range(1, 9)])
    q = cache.draw(9, 8, 64)

    assert not torch.equal(*(cache.attend(backend, decode(cache), q, shares)[0] for shares in (True, False)))


def test_a_row_that_shares_nothing_keeps_its_bits_beside_those_that_do(backend: AttentionKernels) -> None:
    cache = Cache(make_spec(), "float32", [300, 310, 1500])
    forked(backend, cache, (1, 0, 4))
    q = cache.draw(3, 4, 16)
    beside, _ = cache.attend(backend, decode(cache), q)
    cache.table = cache.table[2:]
    alone, _ = cache.attend(backend, StripStep.of_runs([(1499, 1)]), q[2:])

    assert torch.equal(beside[2:], alone)


@pytest.mark.skipif(not HAS_NATIVE, reason="elbowroom._native was not built")
@settings(max_examples=40, deadline=None, database=None)
@given(data=st.data())
def test_any_forest_of_forks_equals_dense_attention(data: st.DataObject) -> None:
    """Sequences fork from earlier ones at random blocks, then read decode rows and chunks at random positions."""
    count = data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(1, 700), min_size=count, max_size=count))
    spec = make_spec(
        group=data.draw(st.integers(1, 5)),
        kv_heads=data.draw(st.integers(1, 2)),
        dim=data.draw(st.sampled_from([4, 16, 24])),
        window=data.draw(st.none() | st.integers(1, 800)),
        softcap=data.draw(st.none() | st.floats(1.0, 50.0)),
    )
    cache = Cache(spec, data.draw(st.sampled_from(["float32", "bfloat16", "float16"])), lengths, seed=5)
    forks = []
    for reader in range(1, count):
        holder = data.draw(st.integers(0, reader - 1))
        most = min(lengths[reader], lengths[holder]) // STRIP_TOKENS
        forks.append((reader, holder, data.draw(st.integers(0, most))))
    native = attention.BACKENDS.get("native")
    forked(native, cache, *forks)
    rows = [min(length, data.draw(st.sampled_from([0, 1, 1, 2, 7, 40]))) for length in lengths]

    check(cache, native, StripStep.of_runs([(length - n, n) for length, n in zip(lengths, rows, strict=True)]))


@pytest.mark.skipif(not HAS_NATIVE, reason="elbowroom._native was not built")
@pytest.mark.parametrize("plan", ["plain(bf16)", "fp8", "int8", "bfp", "kivi(4,4,32)", "kivi(2,2,32)", "planes"])
def test_forks_of_every_codec_read_the_same_together_and_alone(plan: str) -> None:
    """Codes multiply as integers, each row by itself: what is shared only changes the order of float32 sums."""
    layers = equal_layers(2, 8, 2, 32)
    bound = KVPlan.parse(plan).bind(layers, "float32")
    store = PagedStore(bound, Arena(HostTier(), Ledger(Budget({}))), 2**24)
    parent = store.open()
    import_random(store, parent, bound, store.fingerprint, 384, seed=1)
    handles = [store.fork(parent, 384 - 64 * (i % 2)) for i in range(6)]
    starts = [store.num_tokens(handle) for handle in handles]
    positions = [np.arange(start, start + 1 + i % 3) for i, start in enumerate(starts)]
    rows = np.cumsum([0, *map(len, positions)]).astype(np.int32)
    step = KVStep(tuple(handles), rows, np.concatenate(positions))
    assert store.reserve(step) is None
    random = torch.Generator().manual_seed(2)
    for layer, spec in enumerate(layers):
        strips = store.strips(layer, step)
        assert strips is not None
        assert (strips.table[1:, :5] == strips.table[0, :5]).all()
        q, k, v = (torch.randn(int(rows[-1]), heads, 32, generator=random) for heads in (8, 2, 2))
        attention.append(strips, k, v)
        together, alone = (
            attention.attend(dataclasses.replace(strips, shares=each), spec, q) for each in (True, False)
        )
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
