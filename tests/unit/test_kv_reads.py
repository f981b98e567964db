"""Read policy ``quest``: digests bound the keys that are read, and decoding tokens read the blocks that these name."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.kv_world import BLOCK, World, assert_close, assert_nearly, dense, make_spec
from torch import Tensor

from elbowroom.core import LayerSpec
from elbowroom.engine.llm import LLM
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.errors import IntegrityError
from elbowroom.kernels import LayerStrips, StripStep, attention, reference
from elbowroom.kernels.base import AttentionKernels, Selection
from elbowroom.kernels.digest import read_digest, write_digest
from elbowroom.kv import KVHandle, KVPlan, KVStep, PagedStore, Want
from elbowroom.kv.base import AttnOut, PromptPart
from elbowroom.kv.codecs import token_codec
from elbowroom.memory import Arena, Budget, HostTier, Ledger

SPEC = LayerSpec(num_q_heads=6, num_kv_heads=2, head_dim=32, v_head_dim=48, scale=0.2, rope=None)
CODECS = ("plain(fp32)", "plain(bf16)", "plain(fp16)", "int8", "fp8", "bfp(n=16)", "bfp(k=8,v=4,n=16)", "planes")
HAS_NATIVE = importlib.util.find_spec("elbowroom._native") is not None


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["reference", "baseline", "avx2", "avx512", "emulated512"])
def backend(request: pytest.FixtureRequest) -> Iterator[AttentionKernels]:
    """The reference, and the native backend with each instruction set that runs here."""
    if request.param == "reference":
        yield reference.KERNELS
        return
    if not HAS_NATIVE:
        pytest.skip("elbowroom._native was not built (ELBOWROOM_NATIVE=0)")
    native = importlib.import_module("elbowroom._native")
    if request.param not in native.supported_isas():
        pytest.skip(f"this CPU or build has no {request.param}")
    before = native.isa()
    native.set_isa(request.param)
    yield attention.BACKENDS.get("native")
    native.set_isa(before)


# Bounds


@settings(max_examples=60, deadline=None)
@given(
    keys=st.lists(st.floats(width=32) | st.sampled_from([65504.0, -7e4, 1e-9, -0.0]), min_size=8, max_size=8),
    later=st.lists(st.floats(width=32), min_size=4, max_size=4),
)
def test_digests_hold_every_key_that_was_written(keys: list[float], later: list[float]) -> None:
    """Whatever the numbers: overflow of float16, subnormals, and what is not finite."""
    spec = make_spec(dim=4, v_dim=4)
    fmt = KVPlan.parse("quest(192,skip=0)").bind([spec], "float32").formats[0]
    strip, stored = torch.full((fmt.strip_bytes,), 0x55, dtype=torch.uint8), torch.full((1, 64, 4), torch.nan)
    every = torch.tensor([*keys, *later]).view(1, 3, 4)
    stored[:, :3] = every
    write_digest(strip, fmt, stored, 0, 2, 2)
    write_digest(strip, fmt, stored, 2, 3, 3)
    low, high = (bound[:, 0] for bound in read_digest(strip, fmt))
    finite = every.isfinite().all(1)
    held = (every >= low[:, None]) & (every <= high[:, None])
    assert held.all(1)[finite].all()
    assert (low.isneginf() & high.isposinf())[~finite].all()
    largest = every.abs().amax(1)
    near = finite & (largest < 6e4)
    assert ((high - every.amax(1))[near] <= (largest * 2e-3 + 1e-7)[near]).all()


class Cache:
    """Sequences in strips of one layer with digests."""

    def __init__(self, plan: str, lengths: Sequence[int], spec: LayerSpec = SPEC) -> None:
        bound = KVPlan.parse(f"quest(192,skip=0,run=16) | {plan}").bind([spec], "float32")
        self.spec, self.fmt, self.codec = spec, bound.formats[0], token_codec(bound.plan.codec)
        blocks = -(-max(lengths) // BLOCK) + 1
        units = self.fmt.strip_bytes // 64
        places = np.random.default_rng(1).permutation(len(lengths) * blocks)
        self.table = (places.reshape(len(lengths), blocks) * units).astype(np.uint32)
        self.base = torch.full((len(lengths) * blocks * self.fmt.strip_bytes,), 0x55, dtype=torch.uint8)

    def strips(self, step: StripStep, selection: Selection | None = None) -> LayerStrips:
        return LayerStrips(step, self.table, self.base, self.fmt, self.codec, None, selection)

    def append(self, backend: AttentionKernels, runs: list[tuple[int, int]], seed: int) -> None:
        step = StripStep.of_runs(runs)
        k = draw(seed, step.num_rows, 2, self.spec.head_dim) * draw(seed + 1, 1, 2, self.spec.head_dim).exp()
        attention.append(self.strips(step), k, draw(seed + 2, step.num_rows, 2, self.spec.v_head_dim), backend=backend)

    def strip(self, sequence: int, block: int) -> Tensor:
        start = int(self.table[sequence, block]) * 64
        return self.base[start : start + self.fmt.strip_bytes]


@pytest.mark.parametrize("plan", CODECS)
def test_bounds_are_those_of_the_keys_as_they_read_back(plan: str, backend: AttentionKernels) -> None:
    """Written whole and token by token; every backend writes the same bytes."""
    cache, oracle = Cache(plan, [300, 100]), Cache(plan, [300, 100])
    for seed, runs in enumerate([[(0, 70), (0, 1)], [(70, 1), (1, 1)], [(71, 150), (2, 61)], [(221, 1), (63, 2)]]):
        for each, kernels in ((cache, backend), (oracle, reference.KERNELS)):
            each.append(kernels, runs, 10 * seed)
        assert torch.equal(cache.base, oracle.base)
    for sequence, length in enumerate((222, 65)):
        for block in range(-(-length // BLOCK)):
            strip = cache.strip(sequence, block)
            every = cache.codec.open(strip, cache.fmt)[0][:, : length - block * BLOCK].float()
            low, high = cache.codec.bounds(strip, cache.fmt)
            for run, keys in enumerate(every.split(16, dim=1)):
                assert (keys >= low[:, run, None]).all()
                assert (keys <= high[:, run, None]).all()
                slack = 1e-3 * keys.abs().amax(1) + 1e-7  # rounded to float16
                assert ((high[:, run] - keys.amax(1)) <= slack).all()
                assert ((keys.amin(1) - low[:, run]) <= slack).all()


def test_repair_of_a_first_slot_keeps_the_bounds_of_the_others(backend: AttentionKernels) -> None:
    cache = Cache("int8", [64])
    cache.append(backend, [(0, 60)], 1)
    before = cache.codec.bounds(cache.strip(0, 0), cache.fmt)
    step = StripStep(
        row_starts=torch.tensor([0, 1], dtype=torch.int32),
        positions=torch.tensor([0]),
        lengths=torch.tensor([60]),
        first_slots=torch.tensor([0]),
    )
    attention.append(cache.strips(step), torch.zeros(1, 2, 32), torch.zeros(1, 2, 48), backend=backend)
    keys = cache.codec.open(cache.strip(0, 0), cache.fmt)[0][:, :16]
    low, high = cache.codec.bounds(cache.strip(0, 0), cache.fmt)
    assert (keys >= low[:, :1]).all()
    assert (keys <= high[:, :1]).all()
    assert (high[:, 0] <= before[1][:, 0].clamp(min=0)).all()
    assert torch.equal(high[:, 1:], before[1][:, 1:])


# Reading


def poison_unread(cache: Cache, read: Tensor, sequence: int) -> None:
    """Fill keys and values of heads that do not read a block with what would show up; digests stay."""
    for block in range(read.shape[1]):
        fields: list[Tensor] = list(cache.codec.fields(cache.strip(sequence, block), cache.fmt))
        for field in fields:
            field[~read[:, block]] = 0xFF


@pytest.mark.parametrize("plan", CODECS)
def test_what_is_not_selected_is_not_read(plan: str, backend: AttentionKernels) -> None:
    """A decoding row and a prompt's row beside each other; NaN in what is unread changes no bit."""
    cache = Cache(plan, [900, 500])
    cache.append(backend, [(0, 880), (0, 490)], 5)
    step = StripStep.of_runs([(880, 1), (490, 1)])
    q = draw(7, 2, 6, 32)
    selection = Selection(4, np.array([1, 0], dtype=np.uint8))
    cache.append(backend, [(880, 1), (490, 1)], 6)
    out, lse = attention.attend(cache.strips(step, selection), SPEC, q, backend=backend)
    whole, _ = attention.attend(cache.strips(step), SPEC, q, backend=backend)
    assert torch.equal(out[1], whole[1])
    assert not torch.allclose(out[0], whole[0], rtol=0.01, atol=0.001)
    part = reference._Part(cache.table, None, cache.base, cache.fmt, cache.codec)
    read = reference._selected(part, 0, q[0], torch.tensor([0]), torch.tensor([880]), 4)
    assert read is not None
    assert (read.sum(1) == 4).all()
    assert read[:, [0, -1]].all()
    poison_unread(cache, read, 0)
    again, again_lse = attention.attend(cache.strips(step, selection), SPEC, q, backend=backend)
    assert torch.equal(again, out)
    assert torch.equal(again_lse, lse)


@pytest.mark.parametrize("num_blocks", [14, 15, 30])
def test_a_row_with_no_more_blocks_than_it_may_read_reads_them_all(num_blocks: int, backend: AttentionKernels) -> None:
    cache = Cache("int8", [900])
    cache.append(backend, [(0, 881)], 5)
    step, q = StripStep.of_runs([(880, 1)]), draw(7, 1, 6, 32)
    selection = Selection(num_blocks, np.ones(1, dtype=np.uint8))
    assert torch.equal(
        attention.attend(cache.strips(step, selection), SPEC, q, backend=backend)[0],
        attention.attend(cache.strips(step), SPEC, q, backend=backend)[0],
    )


def test_blocks_with_unknown_bounds_are_read(backend: AttentionKernels) -> None:
    """A key that is not finite must show up, not hide behind a bound that cannot be compared."""
    cache, step, q = Cache("plain(fp32)", [900]), StripStep.of_runs([(880, 1)]), draw(7, 1, 6, 32)
    cache.append(backend, [(0, 881)], 5)
    selection = Selection(3, np.ones(1, dtype=np.uint8))
    assert attention.attend(cache.strips(step, selection), SPEC, q, backend=backend)[0].isfinite().all()
    bad = torch.zeros(1, 2, 32)
    bad[:, :, 3] = torch.nan
    row = StripStep(
        row_starts=torch.tensor([0, 1], dtype=torch.int32),
        positions=torch.tensor([400]),
        lengths=torch.tensor([881]),
        first_slots=torch.tensor([0]),
    )
    attention.append(cache.strips(row), bad, torch.zeros(1, 2, 48), backend=backend)
    assert not attention.attend(cache.strips(step, selection), SPEC, q, backend=backend)[0].isfinite().any()


def test_selections_that_cannot_work_are_refused() -> None:
    cache, pair, step, q = (
        Cache("int8", [200]),
        StripStep.of_runs([(0, 2)]),
        StripStep.of_runs([(0, 1)]),
        draw(7, 2, 6, 32),
    )
    one, windowed = np.ones(1, dtype=np.uint8), dataclasses.replace(SPEC, window=9)
    bare = dataclasses.replace(
        cache.strips(step, Selection(3, one)), fmt=dataclasses.replace(cache.fmt, digest_bytes=0)
    )
    for strips, spec, found in (
        (cache.strips(pair, Selection(3, one)), SPEC, "only sequences with one row"),
        (cache.strips(step, Selection(1, one)), SPEC, "2 blocks or more"),
        (bare, SPEC, "have none"),
        (cache.strips(step, Selection(3, one)), windowed, "a window of 9"),
    ):
        with pytest.raises(ValueError, match=found):
            attention.attend(strips, spec, q[: strips.step.num_rows])


# The store


class ReadingWorld(World):
    """A world whose decoding rows are checked against attention on the blocks that the digests name."""

    def compare(self, layer: int, step: KVStep, q: Tensor, got: AttnOut) -> None:
        bound = self.store.plan
        for row, handle in enumerate(step.handles):
            rows = slice(int(step.row_starts[row]), int(step.row_starts[row + 1]))
            one = dataclasses.replace(step, handles=(handle,), row_starts=np.array([0, rows.stop - rows.start]))
            one.positions = step.positions[rows]
            if bound.selects(layer) and rows.stop - rows.start == 1 and got.colsum is None:
                self.compare_selected(layer, handle, int(one.positions[0]), q[rows.start], got.out[rows.start])
            else:
                super().compare(layer, one, q[rows], AttnOut(got.out[rows], got.lse[rows]))

    def compare_selected(self, layer: int, handle: KVHandle, position: int, q: Tensor, out: Tensor) -> None:
        spec, ref = self.layers[layer], self.refs[handle]
        source, own = layer if spec.kv_source is None else spec.kv_source, position // BLOCK
        sealed = self.sealed(source, ref)
        k, v = ref.k[source][: position + 1].clone(), ref.v[source][: position + 1].clone()
        if sealed is not None:
            k[: own * BLOCK], v[: own * BLOCK] = sealed[0][: own * BLOCK], sealed[1][: own * BLOCK]
        for head in range(spec.num_kv_heads):
            queries = q[head * spec.group_size : (head + 1) * spec.group_size]
            blocks = self.chosen(source, handle, own, head, queries)
            slots = torch.cat([torch.arange(b * BLOCK, min((b + 1) * BLOCK, position + 1)) for b in blocks])
            alone = dataclasses.replace(spec, num_q_heads=spec.group_size, num_kv_heads=1)
            kept = (x[slots][:, head : head + 1] for x in (k, v))
            expected, _, _ = dense(alone, queries[None], *kept, torch.tensor([len(slots) - 1]))
            close = assert_nearly if self.store._codec.name in ("int8", "bfp", "kivi") else assert_close
            close(out[head * spec.group_size : (head + 1) * spec.group_size], expected[0])

    def chosen(self, layer: int, handle: KVHandle, own: int, head: int, queries: Tensor) -> list[int]:
        reads, store = self.store.plan.plan.reads, self.store
        assert reads is not None
        if own + 1 <= reads.num_blocks:
            return list(range(own + 1))
        pool = store._pools.main[store._pools.number_of[layer]].pool
        scores = []
        for block in range(1, own):
            strip = pool.strip(int(store._sequences[handle.id].table[layer, block]))
            low, high = store._codec.bounds(strip, pool.fmt)
            each = zip(low[head], high[head], strict=True)
            scores.append(max(float(torch.maximum(queries * a, queries * b).sum(1).amax()) for a, b in each))
        best = sorted(range(1, own), key=lambda block: -scores[block - 1])[: reads.num_blocks - 2]
        return [0, *sorted(best), own]

    def check(self) -> None:
        super().check()
        store = self.store
        for handle, ref in self.refs.items():
            for layer in range(len(self.layers)):
                fmt = store.plan.formats[layer]
                if not fmt.digest_bytes or self.layers[layer].kv_source is not None:
                    continue
                pool = store._pools.main[store._pools.number_of[layer]].pool
                for block in range(-(-ref.num_tokens // BLOCK)):
                    strip = pool.strip(int(store._sequences[handle.id].table[layer, block]))
                    low, high = store._codec.bounds(strip, fmt)
                    for run, keys in enumerate(ref.k[layer][block * BLOCK : (block + 1) * BLOCK].split(16)):
                        assert (keys >= low[:, run]).all()
                        assert (keys <= high[:, run]).all()


LAYERS = [
    make_spec(q_heads=4, kv_heads=2, dim=32, v_dim=16),
    make_spec(q_heads=2, kv_heads=2, dim=32, v_dim=16, softcap=2.0),
    make_spec(q_heads=2, kv_heads=1, dim=32, v_dim=16, window=70),
    make_spec(q_heads=2, kv_heads=2, dim=32, v_dim=16, kv_source=0),
]


class Lives:
    """Sequences of a world to which things happen."""

    def __init__(self, codec: str) -> None:
        self.rng, self.seals = random.Random(3), codec.startswith("kivi")
        self.world = ReadingWorld(LAYERS, plan=f"quest(192,skip=0) | {codec}")
        self.handles = [self.world.open(300), self.world.open(70)]

    def run(self, handle: KVHandle) -> None:
        self.world.append((handle, self.rng.choice([2, 63, 64, 65])))

    def decode(self, handle: KVHandle) -> None:
        self.world.append(*((each, 1) for each in self.handles))

    def fork(self, handle: KVHandle) -> None:
        if len(self.handles) < 4:
            self.handles.append(self.world.fork(handle))

    def back(self, handle: KVHandle) -> None:
        kept = max(self.world.refs[handle].num_tokens - self.rng.randint(1, 60), 1)
        if self.world.may_go_back(handle, kept):
            self.world.truncate(handle, kept)

    def accept(self, handle: KVHandle) -> None:
        count = self.world.refs[handle].num_tokens
        self.world.append((handle, 5))
        try:
            self.world.accept(handle, count, sorted(self.rng.sample(range(count, count + 5), 3)))
        except IntegrityError:
            assert self.seals

    def repair(self, handle: KVHandle) -> None:
        """Write two positions again, the second one mostly the first of a block."""
        count = self.world.refs[handle].num_tokens
        first = count - 66
        if first > 70 and not self.seals and self.world.may_go_back(handle, first):
            self.world.store.overwrite(handle, np.arange(first, count))
            self.world.run(reserved(self.world, handle, [first, (count - 1) // BLOCK * BLOCK]))


@pytest.mark.parametrize("codec", ["plain", "int8", "bfp(n=16)", "kivi(2,2,32)"])
def test_random_lives_of_sequences(codec: str) -> None:
    """Steps, forks, going back, speculation and repair: bounds hold, and what is read is what they name."""
    lives = Lives(codec)
    for _ in range(12 if lives.seals else 40):
        action = lives.rng.choice(["run", "decode", "decode", "fork", "back", "accept", "repair"])
        getattr(lives, action)(lives.rng.choice(lives.handles))
        lives.world.check()
    for handle in lives.handles:
        lives.world.close(handle)
    assert lives.world.store.report().live_bytes == 0


def reserved(world: World, handle: KVHandle, positions: list[int]) -> KVStep:
    step = world.make_step([(handle, positions)])
    assert world.store.reserve(step) is None
    return step


@pytest.mark.parametrize("codec", ["plain", "int8", "kivi"])
def test_a_span_carries_its_bounds(codec: str) -> None:
    world = ReadingWorld(LAYERS[:2], plan=f"quest(192,skip=0) | {codec}")
    handle = world.open(523)
    world.append((handle, 1))
    span, twin = world.store.export_span(handle, 0, 524), world.open()
    assert world.store.import_span(twin, span) == 524
    assert world.store.export_span(twin, 0, 524) == span
    world.refs[twin] = world.refs[handle].prefix(524)
    world.append((twin, 1), (handle, 1))
    world.check()


def outputs(plan: str, layers: Sequence[LayerSpec], runs: Sequence[tuple[int, PromptPart]]) -> list[Tensor]:
    """Attention of one sequence, run by run and layer by layer."""
    store = PagedStore(KVPlan.parse(plan).bind(layers, "float32"), Arena(HostTier(), Ledger(Budget({}))), 2**26)
    handle, made = store.open(), []
    for seed, (count, part) in enumerate(runs):
        start = store.num_tokens(handle)
        prompts = np.array([part], dtype=np.int8)
        step = KVStep((handle,), np.array([0, count], dtype=np.int32), np.arange(start, start + count), prompts)
        assert store.reserve(step) is None
        for layer, spec in enumerate(layers):
            q = draw(seed, count, spec.num_q_heads, spec.head_dim)
            k, v = (
                draw(seed + n, count, spec.num_kv_heads, w) for n, w in ((50, spec.head_dim), (90, spec.v_head_dim))
            )
            made.append(store.attend(layer, q, k, v, step, Want()).out)
            store.end_layer(layer, step)
        store.end_step(step)
    store.check_integrity()
    return made


RUNS = [(600, PromptPart.PART), (1, PromptPart.PART), (30, PromptPart.END), *[(1, PromptPart.NONE)] * 12]


@pytest.mark.parametrize("plan", ["plain", "int8", "kivi(2,2,64)", "snapkv(256) | fp8", "snapkv(256) | kivi(2,2,64)"])
def test_with_room_for_all_nothing_changes(plan: str) -> None:
    for made, expected in zip(outputs(f"quest(704) | {plan}", LAYERS, RUNS), outputs(plan, LAYERS, RUNS), strict=True):
        assert torch.equal(made, expected)


@pytest.mark.parametrize("plan", ["plain", "kivi(2,2,64)"])
def test_prompts_and_skipped_layers_read_everything(plan: str) -> None:
    """A part of a prompt may be one token long; windows and the first layers select nothing."""
    dense_outs, outs = outputs(plan, LAYERS, RUNS), outputs(f"quest(192,1) | {plan}", LAYERS, RUNS)
    same = [torch.equal(made, expected) for made, expected in zip(outs, dense_outs, strict=True)]
    assert all(same[: 3 * len(LAYERS)])
    for first in range(3 * len(LAYERS), len(same), len(LAYERS)):
        assert same[first : first + len(LAYERS)] == [True, False, True, False]


@pytest.mark.parametrize("codec", ["int8", "kivi(2,2,64)"])
def test_tokens_that_a_policy_kept_are_selected_from(codec: str) -> None:
    """Behind ``snapkv`` the strips it wrote have bounds of their own."""
    plan = "snapkv(tokens=512,w=20) | {}" + codec
    selected, whole = (outputs(plan.format(reads), LAYERS[:2], RUNS) for reads in ("quest(192,0) | ", ""))
    for made, expected in zip(selected[:6], whole[:6], strict=True):
        assert torch.equal(made, expected)
    assert not any(torch.equal(made, expected) for made, expected in zip(selected[6:], whole[6:], strict=True))
    assert all(made.isfinite().all() for made in selected)


def test_selection_finds_the_block_that_matters() -> None:
    """One key among a thousand points where the query does: the row that selects gives what reading all gives."""
    spec = make_spec(q_heads=1, kv_heads=1, dim=16, v_dim=16)
    for plan in ("quest(192,0)", "quest(192,0) | int8", "quest(192,0) | kivi(2,2,64)"):
        store = PagedStore(KVPlan.parse(plan).bind([spec], "float32"), Arena(HostTier(), Ledger(Budget({}))), 2**26)
        handle = store.open()
        k, v, q = draw(1, 1000, 1, 16), draw(2, 1000, 1, 16), draw(3, 1, 1, 16)
        k[417] = 40 * q[0] / q.norm()
        step = KVStep((handle,), np.array([0, 1000], dtype=np.int32), np.arange(1000))
        assert store.reserve(step) is None
        store.attend(0, torch.zeros(1000, 1, 16), k, v, step, Want())
        store.end_step(step)
        step = KVStep((handle,), np.array([0, 1], dtype=np.int32), np.arange(1000, 1001))
        assert store.reserve(step) is None
        out = store.attend(0, q, torch.zeros(1, 1, 16), torch.zeros(1, 1, 16), step, Want()).out
        assert float((out[0] - v[417]).norm()) < 0.5 * float(v[417].norm())


# The engine


@pytest.mark.parametrize("codec", ["int8", "kivi(2,2,64)"])
def test_the_engine_decodes_alike_where_all_fits_and_reads_less_where_it_does_not(codec: str) -> None:
    """Layers run in native code, where they choose by themselves; requests of one batch do not disturb each other."""
    greedy, made = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True), {}
    random = torch.Generator().manual_seed(3)
    prompts = [{"prompt_token_ids": torch.randint(10, 1500, (700,), generator=random).tolist()} for _ in range(2)]
    for kv in (codec, f"quest(768,skip=0) | {codec}", f"quest(192,skip=0) | {codec}"):
        with LLM(memory="96MiB", kv=kv) as llm:
            made[kv] = [tuple(each.outputs[0].token_ids) for each in llm.generate(prompts, greedy)]
            alone = [tuple(llm.generate([prompt], greedy)[0].outputs[0].token_ids) for prompt in prompts]
            assert alone == made[kv]
            llm.engine.check_integrity()
    dense_tokens, roomy, tight = made.values()
    assert roomy == dense_tokens
    assert tight != dense_tokens
