"""Sorted channels of keys: the same products, smaller errors where channels differ, stores that keep their order."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from elbowroom.bench.random_model import random_calibration
from elbowroom.core import LayerSpec
from elbowroom.errors import IntegrityError, PlanError
from elbowroom.kernels import LayerStrips, StripStep, attention, reference
from elbowroom.kv import KVPlan, KVStep, PagedStore, Want
from elbowroom.kv.calibration import Calibration
from elbowroom.kv.codecs.ordered import OrderedCodec
from elbowroom.kv.codecs.plain import PlainCodec
from elbowroom.kv.plan import BoundPlan
from elbowroom.memory import Arena, Budget, HostTier, Ledger

SPEC = LayerSpec(num_q_heads=4, num_kv_heads=2, head_dim=64, v_head_dim=64, scale=0.125, rope=None)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def magnitudes(seed: int, spec: LayerSpec = SPEC) -> Tensor:
    """Channels ``[Hkv, D]`` of log-normal size, six of them 8 to 24 times as large: another six in each head."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (0.5 * torch.randn(spec.num_kv_heads, spec.head_dim, generator=generator)).exp()
    for head in sizes:
        head[torch.randperm(spec.head_dim, generator=generator)[:6]] *= 8 + 16 * torch.rand(6, generator=generator)
    return sizes


def measured(*seeds: int) -> Calibration:
    """Return a calibration of layers whose keys have these magnitudes."""
    rms = tuple(tuple(tuple(head.tolist()) for head in magnitudes(seed)) for seed in seeds)
    return dataclasses.replace(random_calibration([SPEC] * len(seeds)), key_rms=rms)


def bound(plan: str, *seeds: int) -> BoundPlan:
    return KVPlan.parse(plan).bind([SPEC] * max(len(seeds), 1), "float32", measured(*seeds) if seeds else None)


def attend(codec: OrderedCodec | PlainCodec, plan: BoundPlan, k: Tensor, q: Tensor, native: bool = False) -> Tensor:
    fmt = plan.formats[0]
    table = (np.arange(3, dtype=np.uint32) * (fmt.strip_bytes // 64)).astype(np.uint32)[None]
    base = torch.zeros(3 * fmt.strip_bytes, dtype=torch.uint8)
    strips = LayerStrips(StripStep.of_runs([(0, len(k))]), table, base, fmt, codec)
    backend = None if native else reference.KERNELS
    attention.append(strips, k, draw(9, len(k), 2, 64), backend=backend)
    return attention.attend(strips, SPEC, q, backend=backend)[0]


def test_products_of_permuted_queries_and_keys_are_the_same() -> None:
    """In float32 the order of channels changes nothing but the order of a sum."""
    plan = KVPlan.parse("plain(fp32)").bind([SPEC], "float32")
    order = torch.stack([torch.randperm(64), torch.randperm(64)]).to(torch.int16)
    k, q = draw(1, 150, 2, 64), draw(2, 150, 4, 64)
    made = attend(OrderedCodec(PlainCodec(), order), plan, k, q)
    torch.testing.assert_close(made, attend(PlainCodec(), plan, k, q), rtol=1e-6, atol=1e-6)


def logit_error(plan: str, seed: int = 3) -> float:
    """Relative error of ``q . k`` for queries that are small where keys are large, as models have them."""
    sizes = magnitudes(seed)
    found = bound(plan, seed)
    codec = OrderedCodec(found.plan.codec, torch.tensor(found.orders[0])) if found.orders else found.plan.codec
    k, q = draw(4, 2, 64, 64) * sizes[:, None], draw(5, 2, 32, 64) / sizes[:, None]
    strip = torch.zeros(found.formats[0].strip_bytes, dtype=torch.uint8)
    codec.store(strip, found.formats[0], torch.arange(64), k, torch.zeros(2, 64, 64))
    exact = q @ k.transpose(1, 2)
    made = q @ codec.open(strip, found.formats[0])[0].transpose(1, 2)
    return float((made - exact).norm() / exact.norm())


def test_sorting_helps_where_large_channels_get_blocks_of_their_own() -> None:
    """As in the paper: more, the smaller the blocks; nothing where a block is the whole head."""
    assert logit_error("bfp(n=32,sort=on)") < 0.85 * logit_error("bfp(n=32)")
    assert logit_error("bfp(n=16,sort=on)") < 0.75 * logit_error("bfp(n=16)")
    assert logit_error("bfp(n=64,sort=on)") == pytest.approx(logit_error("bfp(n=64)"), rel=1e-5)


def test_the_order_is_descending_and_of_each_layer_and_head() -> None:
    plan = bound("bfp(sort=on)", 1, 2)
    for seed, order in zip((1, 2), plan.orders, strict=True):
        sizes = magnitudes(seed)
        for head, channels in enumerate(order):
            assert sorted(channels) == list(range(64))
            assert (sizes[head][list(channels)].diff() <= 0).all()
    assert bound("bfp").orders == ()


def test_what_was_not_measured_is_refused_with_the_way_out() -> None:
    with pytest.raises(PlanError, match="cannot sort") as error:
        KVPlan.parse("bfp(sort=on)").bind([SPEC], "float32")
    assert "elbowroom calibrate MODEL" in str(error.value.hint)
    other = dataclasses.replace(SPEC, head_dim=32)
    with pytest.raises(PlanError, match="in the calibration"):
        KVPlan.parse("bfp(sort=on)").bind([other], "float32", measured(1))
    assert KVPlan.parse("bfp(sort=on)").needs_calibration
    with pytest.raises(PlanError, match="cannot sort"):
        KVPlan.parse("think(0.5) | bfp(sort=on)")
    with pytest.raises(PlanError, match="sort=maybe"):
        KVPlan.parse("bfp(sort=maybe)")


class Store:
    """A store of one sequence, and what it was given."""

    def __init__(self, plan: BoundPlan) -> None:
        self.plan = plan
        self.store = PagedStore(plan, Arena(HostTier(), Ledger(Budget({}))), 2**24)
        self.handle = self.store.open()
        self.length = 0

    def step(self, count: int, scaled: bool = True) -> list[Tensor]:
        """Append tokens to both layers and return attention with its column sums."""
        positions = np.arange(self.length, self.length + count)
        step = KVStep((self.handle,), np.asarray([0, count], dtype=np.int32), positions)
        assert self.store.reserve(step) is None
        found = []
        for layer in range(2):
            sizes = magnitudes(layer + 1) if scaled else torch.ones(2, 64)
            seed = 10 * self.length + layer
            k = draw(seed, count, 2, 64) * sizes
            q = draw(seed + 3, count, 4, 64) / sizes.repeat_interleave(2, dim=0)
            out = self.store.attend(layer, q, k, draw(seed + 5, count, 2, 64), step, Want(colsum=True))
            assert out.colsum is not None
            found += [out.out, out.colsum[0]]
        self.store.end_step(step)
        self.length += count
        return found


def test_a_store_attends_in_the_order_of_each_layer() -> None:
    """Blocks of 8 bits: sorted or not, the answer and its statistics are nearly those of float32."""
    plans = [KVPlan.parse("plain").bind([SPEC] * 2, "float32"), bound("bfp(8,8,16,sort=on)", 1, 2)]
    for exact, made in zip(*([Store(plan).step(n) for n in (100,)] for plan in plans), strict=True):
        for one, other in zip(exact, made, strict=True):
            assert float((one - other).norm()) < 0.03 * float(one.norm())


def test_spans_go_to_stores_of_the_same_order_only() -> None:
    first, twin, other = (Store(bound("bfp(sort=on)", *seeds)) for seeds in ((1, 2), (1, 2), (1, 3)))
    first.step(130)
    span = first.store.export_span(first.handle, 0, 130)
    assert twin.store.import_span(twin.handle, span) == 130
    twin.length = 130
    for one, again in zip(first.step(3), twin.step(3), strict=True):
        assert torch.equal(one, again)
    with pytest.raises(IntegrityError, match="another model or KV plan"):
        other.store.import_span(other.handle, span)


def test_tokens_that_move_take_their_bounds_along() -> None:
    """Digests hold channels where the model has them, also behind a span and behind accepted tokens."""
    plan = KVPlan.parse("quest(256,skip=0) | bfp(n=16,sort=on)").bind([SPEC] * 2, "float32", measured(1, 2))
    store = Store(plan)
    store.step(70)
    store.step(9)
    store.store.accept(store.handle, np.asarray([70, 72, 75]))
    twin = Store(plan)
    twin.store.import_span(twin.handle, store.store.export_span(store.handle, 0, 73))
    for each in (store, twin):
        for layer in range(2):
            lane = each.store._pools.main[each.store._pools.number_of[layer]]
            strip = lane.pool.strip(int(each.store._sequences[each.handle.id].table[layer, 1]))
            codec = each.store._codecs[layer]
            keys, (least, greatest) = codec.open(strip, lane.pool.fmt)[0][:, :9], codec.bounds(strip, lane.pool.fmt)
            torch.testing.assert_close(least.amin(1), keys.amin(1), rtol=2e-3, atol=1e-3)
            torch.testing.assert_close(greatest.amax(1), keys.amax(1), rtol=2e-3, atol=1e-3)
