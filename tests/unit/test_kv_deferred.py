"""Policies in front of a codec that seals: what is chosen, sealed and read, against plain tensors."""

from __future__ import annotations

import collections
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from tests.support.kv_world import assert_close, dense, make_spec
from tests.support.policies import TaperingPolicy, live_randomly
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec
from elbowroom.errors import IntegrityError
from elbowroom.kernels import attention, reference
from elbowroom.kv import KVHandle, KVPlan, KVStore, PagedStore, Want
from elbowroom.kv.base import KVStep, PromptPart
from elbowroom.kv.codecs.kivi import KiviCodec
from elbowroom.kv.policies import LayerView
from elbowroom.memory import Arena, Budget, HostTier, Ledger

SPEC = make_spec(q_heads=4, kv_heads=2, dim=8, v_dim=4)
LAYERS = [SPEC, make_spec(q_heads=2, window=50), SPEC]
PLANS = (
    KVPlan.parse("streaming(130,sinks=3) | kivi"),
    KVPlan.parse("snapkv(tokens=150,w=20) | kivi(2,2,32)"),
    KVPlan(KiviCodec(2, 4, 64), TaperingPolicy()),
)
NONE, PART, END, CHOICE = PromptPart


@dataclass
class Held:
    """One sequence: of each layer, keys and values ``[Hkv, m, D]`` as they are read, and how many are sealed."""

    k: list[Tensor]
    v: list[Tensor]
    sealed: list[int]
    num_tokens: int = 0
    waits: bool = False
    chose: list[bool] = field(default_factory=lambda: [False] * len(LAYERS))

    def copy(self) -> Held:
        return Held([*self.k], [*self.v], [*self.sealed], self.num_tokens, self.waits)


class DeferredWorld:
    """A store and what it should hold; attention is checked in every step, bytes behind it."""

    def __init__(self, plan: KVPlan, capacity: int = 2**24) -> None:
        self.plan = plan
        self.ledger = Ledger(Budget({}))
        self.bound = plan.bind(LAYERS, "float32")
        self.store = PagedStore(self.bound, Arena(HostTier(), self.ledger), capacity)
        self.held: dict[KVHandle, Held] = {}
        self.random = torch.Generator().manual_seed(2)

    def rand(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def open(self) -> KVHandle:
        handle = self.store.open()
        empty = [[torch.empty(spec.num_kv_heads, 0, width) for spec in LAYERS] for width in (8, 4)]
        empty[0][1], empty[1][1] = (
            torch.empty(LAYERS[1].num_kv_heads, 0, w) for w in (LAYERS[1].head_dim, LAYERS[1].v_head_dim)
        )
        self.held[handle] = Held(empty[0], empty[1], [0] * len(LAYERS))
        return handle

    def step(self, *rows: tuple[KVHandle, int, PromptPart]) -> KVStep:
        starts = np.cumsum([0, *(count for _, count, _ in rows)]).astype(np.int32)
        positions = [np.arange(count) + self.held[handle].num_tokens for handle, count, _ in rows]
        parts = np.array([part for *_, part in rows], dtype=np.int8)
        return KVStep(tuple(handle for handle, *_ in rows), starts, np.concatenate(positions), parts)

    def run(self, *rows: tuple[KVHandle, int, PromptPart]) -> None:
        step = self.step(*rows)
        assert self.store.reserve(step) is None
        for layer, spec in enumerate(LAYERS):
            count = len(step.positions)
            q = self.rand(count, spec.num_q_heads, spec.head_dim)
            k, v = (self.rand(count, spec.num_kv_heads, width) for width in (spec.head_dim, spec.v_head_dim))
            out = self.store.attend(layer, q, k, v, step, Want()).out
            for row, (handle, _, part) in enumerate(rows):
                mine = slice(int(step.row_starts[row]), int(step.row_starts[row + 1]))
                if spec.window is None:
                    self.extend(layer, self.held[handle], q[mine], k[mine], v[mine], out[mine], part)
            self.store.end_layer(layer, step)
        self.store.end_step(step)
        for handle, count, part in rows:
            held = self.held[handle]
            held.num_tokens += count
            held.waits = part is PART or (part is NONE and held.waits)
        self.check(any(part is not NONE for *_, part in rows))

    def extend(self, layer: int, held: Held, q: Tensor, k: Tensor, v: Tensor, out: Tensor, part: PromptPart) -> None:
        spec = LAYERS[layer]
        keys = torch.cat([held.k[layer], k.transpose(0, 1)], dim=1)
        values = torch.cat([held.v[layer], v.transpose(0, 1)], dim=1)
        count = keys.shape[1]
        positions = torch.arange(count - q.shape[0], count)
        expected, _, _ = dense(spec, q, keys.transpose(0, 1), values.transpose(0, 1), positions)
        assert_close(out, expected)
        if part is not NONE:
            keys, values = self.choose(layer, held, q, keys, values, part)
        held.k[layer], held.v[layer] = keys, values
        if part.settles or (part is NONE and not held.waits):
            while held.sealed[layer] + STRIP_TOKENS <= keys.shape[1]:
                self.seal(layer, held)

    def choose(
        self, layer: int, held: Held, q: Tensor, keys: Tensor, values: Tensor, part: PromptPart
    ) -> tuple[Tensor, Tensor]:
        policy, count, sealed = self.plan.policy, keys.shape[1], held.sealed[layer]
        assert policy is not None
        above = count - policy.limit(layer, part.settles)
        if above <= 0:
            return keys, values
        stay = count - -(-above // STRIP_TOKENS) * STRIP_TOKENS
        newest = q[-policy.window :] if policy.window else q[:0]
        chosen = policy.select(LayerView(layer, SPEC, newest, keys.__getitem__, count), stay).expand(2, -1).tolist()
        open_chosen = [[slot for slot in row if slot >= sealed] for row in chosen]
        number = min((stay - max(map(len, open_chosen))) // STRIP_TOKENS, sealed // STRIP_TOKENS)
        blocks = range(sealed // STRIP_TOKENS)
        marks = collections.Counter(slot // STRIP_TOKENS for row in chosen for slot in row)
        newest_block = max(count - policy.window, 0) // STRIP_TOKENS
        ranks = {block: (block > 0, block < newest_block, -marks[block]) for block in blocks}
        best = sorted(sorted(blocks, key=ranks.__getitem__)[:number])
        slots = [slot for block in best for slot in range(64 * block, 64 * block + 64)]
        rows = []
        for mine in open_chosen:
            others = sorted(set(range(sealed, count)) - set(mine))
            fill = stay - len(slots) - len(mine)
            rows.append(slots + sorted(mine + others[len(others) - fill :]))
        held.sealed[layer] = STRIP_TOKENS * number
        index = torch.tensor(rows)[..., None]
        kept = [x.gather(1, index.expand(-1, -1, x.shape[2])) for x in (keys, values)]
        return kept[0], kept[1]

    def seal(self, layer: int, held: Held) -> None:
        fmt, slots = self.bound.formats[layer], slice(held.sealed[layer], held.sealed[layer] + STRIP_TOKENS)
        strip = torch.zeros(fmt.strip_bytes, dtype=torch.uint8)
        parts = [x[layer][:, slots].contiguous() for x in (held.k, held.v)]
        self.plan.codec.store(strip, fmt, torch.arange(STRIP_TOKENS), *parts)
        for x, rounded in zip((held.k, held.v), self.plan.codec.open(strip, fmt), strict=True):
            x[layer] = x[layer].clone()
            x[layer][:, slots] = rounded
        held.sealed[layer] += STRIP_TOKENS

    def check(self, full: bool) -> None:
        """What should be sealed is, in strips that hold what they should; what is open has strips of its own."""
        self.store.check_integrity()
        for handle, held in self.held.items():
            sequence = self.store._sequences[handle.id]
            for layer in (0, 2):
                pool = self.store._pools.main[self.store._pools.number_of[layer]].pool
                entries = sequence.table[layer][sequence.table[layer] != 0xFFFFFFFF].tolist()
                # Strips of a step that never ran may follow.
                assert len(entries) >= held.sealed[layer] // STRIP_TOKENS
                for number in range(held.sealed[layer] // STRIP_TOKENS) if full else ():
                    k, v = self.plan.codec.open(pool.strip(entries[number]), pool.fmt)
                    slots = slice(64 * number, 64 * number + 64)
                    assert torch.equal(k, held.k[layer][:, slots])
                    assert torch.equal(v, held.v[layer][:, slots])

    def close_all(self) -> None:
        for handle in list(self.held):
            self.store.close(handle)
            del self.held[handle]
        assert self.store.report().num_strips == 0
        assert self.ledger.held("kv", "host") == 0


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that reads sealed strips as they are, without rounding queries."""
    monkeypatch.setattr(attention, "_backend", lambda: reference.KERNELS)


CHUNKS = ([500], [200, 200, 100], [64, 64, 372], [100, 1, 399], [90], [130, 7], [149, 351], [64], [30])


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("chunks", CHUNKS)
def test_a_prompt_is_sealed_at_its_end_within_its_budget(plan: KVPlan, chunks: list[int]) -> None:
    world = DeferredWorld(plan)
    handle = world.open()
    assert plan.policy is not None
    for number, count in enumerate(chunks):
        world.run((handle, count, END if number == len(chunks) - 1 else PART))
        if number < len(chunks) - 1:
            assert world.held[handle].sealed == [0, 0, 0]
    for layer in (0, 2):
        kept, limit = world.held[handle].k[layer].shape[1], plan.policy.limit(layer, True)
        assert kept == sum(chunks) if sum(chunks) <= limit else limit - STRIP_TOKENS < kept <= limit
        assert world.held[handle].sealed[layer] == kept // STRIP_TOKENS * STRIP_TOKENS
    for _ in range(70 if len(chunks) == 2 else 3):
        world.run((handle, 1, NONE))
    world.close_all()


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_later_prompts_drop_sealed_blocks_whole(plan: KVPlan) -> None:
    """Sealed blocks go or stay; nothing is sealed twice."""
    world = DeferredWorld(plan)
    handle = world.open()
    for chunks in ([400], [20], [3], [150, 60], [70], [300, 200]):
        for number, count in enumerate(chunks):
            world.run((handle, count, END if number == len(chunks) - 1 else PART))
        for _ in range(9):
            world.run((handle, 1, NONE))
    world.close_all()


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_rows_that_wait_and_rows_that_do_not_share_a_step(plan: KVPlan) -> None:
    world = DeferredWorld(plan)
    ends, goes_on, short, decodes = (world.open() for _ in range(4))
    world.run((ends, 250, PART), (decodes, 180, END))
    world.run((ends, 90, END), (decodes, 1, NONE), (goes_on, 310, PART), (short, 40, END))
    for _ in range(12):
        world.run((short, 1, NONE), (goes_on, 3, PART), (ends, 1, NONE), (decodes, 1, NONE))
    world.run((goes_on, 80, END), (ends, 1, NONE), (short, 1, NONE), (decodes, 1, NONE))
    world.close_all()


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_span_brings_back_a_prompt_that_waits_and_one_that_ended(plan: KVPlan) -> None:
    world = DeferredWorld(plan)
    handle = world.open()
    for count, part in ((333, END), (10, NONE), (150, PART), (40, END)):
        for _ in range(count if part is NONE else 1):
            world.run((handle, 1 if part is NONE else count, part))
        length = world.held[handle].num_tokens
        span = world.store.export_span(handle, 0, length)
        twin = world.store.open()
        assert world.store.import_span(twin, span) == length
        assert world.store.export_span(twin, 0, length) == span
        world.held[twin] = world.held[handle].copy()
        world.run((twin, 70, END), (handle, 1, PART if part is PART else NONE))
        world.store.close(twin)
        del world.held[twin]
    with pytest.raises(IntegrityError, match="no part that begins at 64"):
        world.store.export_span(handle, 64, length)
    world.close_all()


@pytest.mark.parametrize("seed", range(10))
def test_random_lives(seed: int) -> None:
    rng = random.Random(seed)
    live_randomly(DeferredWorld(rng.choice(PLANS)), rng, 20)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_choices_while_tokens_are_generated_drop_sealed_blocks(plan: KVPlan) -> None:
    """The budget is kept, whatever the place in a block at which a choice comes."""
    world = DeferredWorld(plan)
    handle, other = world.open(), world.open()
    assert plan.policy is not None
    world.run((handle, 100, END), (other, 256, END))
    for number in range(1, 193):  # to the third choice
        part = CHOICE if number % 64 == 0 else NONE
        world.run((handle, 1, part), (other, 1, part))
        for layer in (0, 2) if part is CHOICE else ():
            for each in (handle, other):
                assert world.held[each].k[layer].shape[1] <= plan.policy.limit(layer, True)
    world.close_all()


@pytest.mark.parametrize("call", ["truncate", "fork"])
def test_who_goes_back_before_a_prompt_has_none_that_waits(call: str) -> None:
    """Also where its first tokens share a block with older ones: the block is sealed when it is full."""
    world = DeferredWorld(PLANS[0])
    handle = world.open()
    world.run((handle, 70, END))
    for _ in range(5):
        world.run((handle, 1, NONE))
    world.run((handle, 20, PART))
    before = world.held[handle].copy()
    if call == "fork":
        twin = world.store.fork(handle, 75)
    else:
        world.store.truncate(handle, 80)  # some of the prompt is left, and waits on
        assert world.store._sequences[handle.id].is_open
        world.store.truncate(handle, 75)
        twin = handle
    k, v = ([each[:, :75] for each in part] for part in (before.k, before.v))
    world.held[twin] = Held(k, v, before.sealed, 75)
    for _ in range(60):
        world.run((twin, 1, NONE))
    assert world.held[twin].sealed[0] == 128
    world.close_all()


def test_sealing_natively_and_readably_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of sealed strips do not depend on the backend."""
    stores: list[KVStore] = []
    spans = []
    for native in (True, False):
        if native:
            monkeypatch.undo()
        else:
            monkeypatch.setattr(attention, "_backend", lambda: reference.KERNELS)
        layers: list[LayerSpec] = [SPEC, SPEC]
        store = PagedStore(PLANS[0].bind(layers, "float32"), Arena(HostTier(), Ledger(Budget({}))), 2**24)
        stores.append(store)
        handle = store.open()
        step = KVStep((handle,), np.array([0, 300], np.int32), np.arange(300), np.array([END], np.int8))
        assert store.reserve(step) is None
        draw = torch.Generator().manual_seed(1)
        for layer in range(2):
            q, k, v = (torch.randn(300, *shape, generator=draw) for shape in ((4, 8), (2, 8), (2, 4)))
            store.attend(layer, q, k, v, step, Want())
            store.end_layer(layer, step)
        store.end_step(step)
        spans.append(store.export_span(handle, 0, 300))
    assert spans[0] == spans[1]
