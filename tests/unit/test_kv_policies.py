"""Token policies: what they choose, and that the store keeps exactly that, in real bytes."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tests.support.kv_world import assert_close, dense, make_spec
from tests.support.policies import TAPERING, live_randomly
from torch import Tensor

from elbowroom.bench.random_model import random_calibration
from elbowroom.core import STRIP_TOKENS, LayerSpec
from elbowroom.errors import IntegrityError, PlanError
from elbowroom.kv import KVHandle, KVPlan, KVStep, PagedStore, Want
from elbowroom.kv.base import PromptPart
from elbowroom.kv.policies import LayerView, TokenPolicy
from elbowroom.kv.policies.snapkv import SnapKVPolicy
from elbowroom.kv.policies.streaming import StreamingPolicy
from elbowroom.memory import Arena, Budget, HostTier, Ledger

SPEC = make_spec(q_heads=6, kv_heads=2, dim=8, v_dim=4)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def view(num_held: int, queries: Tensor, spec: LayerSpec = SPEC, seed: int = 0) -> LayerView:
    keys = draw(seed, spec.num_kv_heads, num_held, spec.head_dim)
    return LayerView(0, spec, queries, lambda head: keys[head], num_held)


def test_window_attention_is_that_of_the_newest_queries() -> None:
    """Causal within the window, with scale and softcap."""
    spec = make_spec(q_heads=6, kv_heads=2, dim=8, softcap=3.0)
    seen = view(50, draw(1, 5, 6, 8), spec)
    made = torch.cat([seen.window_attention(head) for head in range(2)])
    keys, positions = torch.stack([seen.keys(head) for head in range(2)], dim=1), torch.arange(45, 50)
    _, _, expected = dense(spec, seen.queries, keys, keys, positions)
    assert_close(made.transpose(0, 1), expected)


def test_streaming_keeps_the_first_and_the_newest() -> None:
    chosen = StreamingPolicy(100, 3).select(view(400, draw(1, 0, 6, 8)), 80)
    assert chosen.tolist() == [[0, 1, 2, *range(323, 400)]]


def test_snapkv_follows_the_queries_of_its_own_group() -> None:
    """Each KV head keeps what its query heads look at; a token that only another group needs goes."""
    policy, count = SnapKVPolicy(tokens=100, w=4, kernel=1), 40
    keys = torch.zeros(2, 300, 8)
    keys[0, 17, 0] = keys[1, 201, 1] = 50.0
    queries = torch.zeros(4, 6, 8)
    queries[:, :3, 0] = queries[:, 3:, 1] = 1.0
    chosen = policy.select(LayerView(0, SPEC, queries, lambda head: keys[head], 300), count)
    assert chosen.shape == (2, count)
    assert (chosen[:, -4:] == torch.arange(296, 300)).all()
    assert 17 in chosen[0].tolist()
    assert 201 in chosen[1].tolist()
    assert 17 not in chosen[1].tolist() or 201 not in chosen[0].tolist()


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_snapkv_agrees_with_a_loop(kernel: int) -> None:
    policy = SnapKVPolicy(tokens=100, w=8, kernel=kernel)
    seen = view(200, draw(3, 8, 6, 8))
    attention, older = torch.cat([seen.window_attention(head) for head in range(2)]), 192
    for head, chosen in enumerate(policy.select(seen, 60).tolist()):
        scores = [float(sum(attention[3 * head + g, :, slot].sum() for g in range(3))) for slot in range(older)]
        around = [range(slot - kernel // 2, slot - kernel // 2 + kernel) for slot in range(older)]
        smooth = [sum(scores[i] for i in near if 0 <= i < older) / kernel for near in around]
        best = sorted(sorted(range(older), key=lambda slot: -smooth[slot])[:52])
        assert chosen == [*best, *range(192, 200)]


@pytest.mark.parametrize(
    ("text", "found", "fix"),
    [
        ("snapkv(tokens=80)", "cannot keep 80 tokens", "tokens=96"),
        ("streaming(tokens=none)", "tokens=none", "a number above 0"),
        ("snapkv | streaming", "two policies", "parts joined"),
        ("snapkv(256) | zip", "unknown KV codec 'zip'", "or a policy: compresskv, kvmerger, snapkv, spatten"),
        ("snapkv(256,kernel=4)", "kernel=4", "an odd kernel"),
        ("snapkv(window=3)", "policy 'snapkv' does not take", "parts joined"),
    ],
)
def test_plans_that_cannot_work_name_the_way_out(text: str, found: str, fix: str) -> None:
    with pytest.raises(PlanError) as caught:
        KVPlan.parse(text)
    assert found in caught.value.message
    assert fix in str(caught.value.hint)


def test_a_plan_with_a_policy_has_one_spelling() -> None:
    plan = KVPlan.parse("int8|snapkv( 256 )")
    assert plan.text == "snapkv(tokens=256,w=32,kernel=5,every=0) | int8()"
    assert KVPlan.parse(plan.text) == plan


# The store


@dataclass
class Held:
    """One sequence as plain tensors: of each layer the keys and values that stay, ``[Hkv, m, D]``."""

    k: list[Tensor]
    v: list[Tensor]
    num_tokens: int = 0
    chosen_at: int = 0

    def copy(self) -> Held:
        return Held([k.clone() for k in self.k], [v.clone() for v in self.v], self.num_tokens, self.chosen_at)


class PolicyWorld:
    """A store with a policy and, beside it, what each sequence should hold; every attention is checked."""

    def __init__(self, plan: str | KVPlan, layers: list[LayerSpec], capacity: int = 2**24) -> None:
        self.layers, self.plan = layers, KVPlan.parse(plan)
        self.ledger = Ledger(Budget({}))
        self.store = PagedStore(
            self.plan.bind(layers, "float32", random_calibration(layers)), Arena(HostTier(), self.ledger), capacity
        )
        self.held: dict[KVHandle, Held] = {}
        self.random = torch.Generator().manual_seed(2)

    @property
    def policy(self) -> TokenPolicy:
        assert self.store.plan.policy is not None
        return self.store.plan.policy

    def rand(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def open(self) -> KVHandle:
        handle = self.store.open()
        empty = [torch.empty(spec.num_kv_heads, 0, spec.head_dim) for spec in self.layers]
        values = [torch.empty(spec.num_kv_heads, 0, spec.v_head_dim) for spec in self.layers]
        self.held[handle] = Held(empty, values)
        return handle

    def step(self, *rows: tuple[KVHandle, int, PromptPart]) -> KVStep:
        starts = np.cumsum([0, *(count for _, count, _ in rows)]).astype(np.int32)
        positions = [np.arange(count) + self.held[handle].num_tokens for handle, count, _ in rows]
        parts = np.array([part for *_, part in rows], dtype=np.int8)
        return KVStep(tuple(handle for handle, *_ in rows), starts, np.concatenate(positions), parts)

    def run(self, *rows: tuple[KVHandle, int, PromptPart]) -> None:
        """Append tokens in one step; everything must fit."""
        step = self.step(*rows)
        assert self.store.reserve(step) is None
        for layer, spec in enumerate(self.layers):
            count = len(step.positions)
            q = self.rand(count, spec.num_q_heads, spec.head_dim)
            k, v = (self.rand(count, spec.num_kv_heads, width) for width in (spec.head_dim, spec.v_head_dim))
            out = self.store.attend(layer, q, k, v, step, Want()).out
            for row, (handle, _, part) in enumerate(rows):
                mine = slice(int(step.row_starts[row]), int(step.row_starts[row + 1]))
                self.extend(layer, handle, q[mine], k[mine], v[mine], out[mine], part)
            self.store.end_layer(layer, step)
        self.store.end_step(step)
        for handle, count, _ in rows:
            held = self.held[handle]
            held.num_tokens += count
            if any(self.dropped(held, layer) for layer in range(len(self.layers))):
                held.chosen_at = max(held.chosen_at, held.num_tokens if self.chose[handle] else 0)
        self.check()

    chose: dict[KVHandle, bool]

    def dropped(self, held: Held, layer: int) -> int:
        return held.num_tokens - held.k[layer].shape[1]

    def extend(
        self, layer: int, handle: KVHandle, q: Tensor, k: Tensor, v: Tensor, out: Tensor, part: PromptPart
    ) -> None:
        held, spec = self.held[handle], self.layers[layer]
        self.chose = getattr(self, "chose", {}) | {handle: False}
        keys, values = (
            torch.cat([old, new.transpose(0, 1)], dim=1) for old, new in ((held.k[layer], k), (held.v[layer], v))
        )
        count = keys.shape[1]
        expected, _, _ = dense(
            spec, q, keys.transpose(0, 1), values.transpose(0, 1), torch.arange(count - q.shape[0], count)
        )
        assert_close(out, expected)
        if part is not PromptPart.NONE and spec.window is None:
            above = count - self.policy.limit(layer, part.settles)
            if above > 0:
                newest = q[-self.policy.window :] if self.policy.window else q[:0]
                stay = count - -(-above // STRIP_TOKENS) * STRIP_TOKENS
                seen = LayerView(layer, spec, newest, keys.__getitem__, count)
                chosen = self.policy.select(seen, stay).expand(spec.num_kv_heads, -1)[..., None]
                keys, values = (x.gather(1, chosen.expand(-1, -1, x.shape[2])) for x in (keys, values))
                self.chose[handle] = True
        held.k[layer], held.v[layer] = keys, values

    def check(self) -> None:
        """What should be held is, bit by bit."""
        self.store.check_integrity()
        for handle, held in self.held.items():
            sequence = self.store._sequences[handle.id]
            for layer, spec in enumerate(self.layers):
                pool = self.store._pools.main[self.store._pools.number_of[layer]].pool
                entries = sequence.table[layer][sequence.table[layer] != 0xFFFFFFFF].tolist()
                if spec.window is not None:
                    continue
                blocks = -(-held.k[layer].shape[1] // STRIP_TOKENS)
                assert len(entries) >= blocks  # those of a step that never ran may follow
                for part, expected in enumerate((held.k[layer], held.v[layer])):
                    opened = [self.store._codec.open(pool.strip(entry), pool.fmt)[part] for entry in entries]
                    if opened:
                        assert torch.equal(torch.cat(opened, dim=1)[:, : expected.shape[1]], expected)

    def close_all(self) -> None:
        for handle in list(self.held):
            self.store.close(handle)
            del self.held[handle]
        assert self.store.report().num_strips == 0
        assert self.ledger.held("kv", "host") == 0


LAYERS = [make_spec(q_heads=4, kv_heads=2, dim=8, v_dim=4), make_spec(q_heads=4, kv_heads=2, dim=8, v_dim=4)]
MIXED = [*LAYERS, make_spec(q_heads=2, window=50)]
PLANS = ("streaming(130,sinks=3)", "snapkv(tokens=150,w=20)", TAPERING, "compresskv(150,heads=1)")
NONE, PART, END, CHOICE = PromptPart


CHUNKS = ([500], [200, 200, 100], [64, 64, 372], [100, 1, 399], [90], [130, 7], [149, 351])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("chunks", CHUNKS)
def test_a_prompt_ends_within_its_budget_however_it_was_cut(plan: str | KVPlan, chunks: list[int]) -> None:
    """Behind its end at most the budget stays, and more than a block less; then tokens are decoded as ever."""
    world = PolicyWorld(plan, MIXED)
    handle = world.open()
    for number, count in enumerate(chunks):
        world.run((handle, count, END if number == len(chunks) - 1 else PART))
    kept = [held.shape[1] for held in world.held[handle].k[:2]]
    for layer in range(2):
        limit = world.policy.limit(layer, True)
        assert kept[layer] == sum(chunks) if sum(chunks) <= limit else limit - STRIP_TOKENS < kept[layer] <= limit
    for _ in range(70):
        world.run((handle, 1, NONE))
    assert [held.shape[1] for held in world.held[handle].k[:2]] == [count + 70 for count in kept]
    strips = [-(-(count + 70) // STRIP_TOKENS) for count in kept]
    table = world.store._sequences[handle.id].table
    assert [int((table[row] != 0xFFFFFFFF).sum()) for row in (0, 1, 3)] == [*strips, 0]
    world.close_all()


@pytest.mark.parametrize("plan", PLANS[1:])
def test_later_prompts_of_a_session_stay_within_the_budget(plan: str | KVPlan) -> None:
    world = PolicyWorld(plan, LAYERS)
    handle = world.open()
    for count in (400, 20, 3, 150):
        world.run((handle, count, END))
        for layer in range(2):
            assert world.held[handle].k[layer].shape[1] <= world.policy.limit(layer, True)
        world.run((handle, 1, NONE))
    world.close_all()


@pytest.mark.parametrize("plan", PLANS[1:])
def test_rows_of_one_step_end_decode_and_go_on(plan: str | KVPlan) -> None:
    """A prompt that ends, one that goes on, one that is short and a decoding row, all in one step."""
    world = PolicyWorld(plan, MIXED)
    ends, goes_on, short, decodes = (world.open() for _ in range(4))
    world.run((ends, 250, PART), (decodes, 180, END))
    world.run((ends, 90, END), (decodes, 1, NONE), (goes_on, 310, PART), (short, 40, END))
    world.run((goes_on, 80, END), (ends, 1, NONE), (short, 1, NONE), (decodes, 1, NONE))
    world.close_all()


def test_one_layer_at_a_time_is_held_in_full() -> None:
    """While a step runs, the blocks that it brings are there once, not once a layer."""
    layers = [LAYERS[0]] * 6
    world = PolicyWorld("streaming(128)", layers)
    handle = world.open()
    step = world.step((handle, 1000, END))
    assert world.store.reserve(step) is None
    held = world.store.report().num_strips
    assert held == 16 + 6 * 2  # staging, and what will stay of each layer
    world.run((handle, 1000, END))
    assert world.store.report().num_strips == 6 * 2
    assert world.store.report().num_dropped == 1000 - 104
    world.close_all()


@pytest.mark.parametrize(("plan", "strips"), [(PLANS[1], 3 + 3), (TAPERING, 2 + 3)])
def test_a_fork_goes_its_own_way(plan: str | KVPlan, strips: int) -> None:
    world = PolicyWorld(plan, LAYERS)
    handle = world.open()
    world.run((handle, 333, END))
    twin = world.store.fork(handle)
    world.held[twin] = world.held[handle].copy()
    assert world.store.report().num_shared_strips == strips
    world.run((handle, 200, END), (twin, 2, NONE))
    world.run((twin, 160, END), (handle, 1, NONE))
    world.close_all()


@pytest.mark.parametrize("call", ["fork", "truncate", "export_span"])
def test_what_the_policy_chose_from_cannot_be_gone_back_to(call: str) -> None:
    world = PolicyWorld(PLANS[0], LAYERS)
    handle = world.open()
    world.run((handle, 300, END))
    world.run((handle, 5, NONE))
    with pytest.raises(IntegrityError, match=r"plan streaming.* chose among all tokens before 300"):
        getattr(world.store, call)(handle, *((0, 299) if call == "export_span" else (299,)))
    world.store.truncate(handle, 302)
    world.held[handle].num_tokens = 302
    for layer in range(2):
        world.held[handle].k[layer] = world.held[handle].k[layer][:, :-3]
        world.held[handle].v[layer] = world.held[handle].v[layer][:, :-3]
    world.run((handle, 3, NONE))
    world.close_all()


@pytest.mark.parametrize("plan", PLANS[1:])
def test_a_span_brings_back_what_stayed(plan: str | KVPlan) -> None:
    world = PolicyWorld(plan, MIXED)
    handle = world.open()
    world.run((handle, 333, END))
    world.run((handle, 40, NONE))
    span = world.store.export_span(handle, 0, 373)
    twin = world.store.open()
    assert world.store.import_span(twin, span) == 373
    assert world.store.export_span(twin, 0, 373) == span
    world.held[twin] = world.held[handle].copy()
    world.run((twin, 1, NONE), (handle, 1, NONE))
    with pytest.raises(IntegrityError, match="no part that begins at 64"):
        world.store.export_span(handle, 64, 374)
    world.close_all()


def test_a_step_that_never_ran_leaves_nothing_behind() -> None:
    world = PolicyWorld(PLANS[1], MIXED)
    handle = world.open()
    for count, part in ((400, END), (300, PART), (20, END)):
        assert world.store.reserve(world.step((handle, count, part))) is None
        world.store.check_integrity()
    world.run((handle, 30, PART))
    assert world.store.reserve(world.step((handle, 700, END))) is None
    world.run((handle, 200, END))
    world.run((handle, 1, NONE))
    world.close_all()


@pytest.mark.parametrize("seed", range(8))
def test_random_lives(seed: int) -> None:
    rng = random.Random(seed)
    live_randomly(PolicyWorld(rng.choice(PLANS), MIXED), rng, 25)


@pytest.mark.parametrize("plan", PLANS)
def test_choices_while_tokens_are_generated_keep_the_budget(plan: str | KVPlan) -> None:
    """Behind each choice at most the budget stays, and more than a block less; in between, what was generated."""
    world = PolicyWorld(plan, MIXED)
    handle, other = world.open(), world.open()
    world.run((handle, 100, END), (other, 250, END))
    for number in range(1, 385):
        choices = [CHOICE if number % every == 0 else NONE for every in (64, 128)]
        world.run(*zip((handle, other), (1, 1), choices, strict=True))
        for each, part in zip((handle, other), choices, strict=True):
            for layer in range(2) if part is CHOICE else ():
                kept, limit = world.held[each].k[layer].shape[1], world.policy.limit(layer, True)
                assert kept <= limit
                assert kept > limit - STRIP_TOKENS or world.held[each].num_tokens == kept
    world.close_all()


@pytest.mark.parametrize("plan", PLANS)
def test_keys_that_are_read_later_are_those_of_their_own_layer(plan: str | KVPlan) -> None:
    """A layer that shares keys reads what its source kept, in the step itself and behind it."""
    shape = LAYERS[0]
    layers = [shape, shape, dataclasses.replace(shape, kv_source=0)]
    bound = KVPlan.parse(plan).bind(layers, "float32", random_calibration(layers))
    store = PagedStore(bound, Arena(HostTier(), Ledger(Budget({}))), 2**24)
    handle = store.open()
    for start, count, part in ((0, 300, END), (300, 1, NONE)):
        parts = np.array([part], dtype=np.int8)
        step = KVStep((handle,), np.array([0, count], dtype=np.int32), np.arange(start, start + count), parts)
        assert store.reserve(step) is None
        q = draw(start, count, 4, 8)
        outs = []
        for layer in range(3):
            k, v = draw(10 * layer + start, count, 2, 8), draw(10 * layer + start + 1, count, 2, 4)
            outs.append(store.attend(layer, q, k, v, step, Want()).out)
            store.end_layer(layer, step)
        store.end_step(step)
        assert torch.equal(outs[0], outs[2])
        assert not torch.equal(outs[0], outs[1])


def test_plans_that_have_nothing_to_choose_are_refused() -> None:
    window = make_spec(window=50)
    with pytest.raises(PlanError, match="every layer reads a sliding window"):
        KVPlan.parse("snapkv").bind([window, window], "float32")
    with pytest.raises(PlanError, match="keys of layer 0 that the window of layer 1 reads"):
        KVPlan.parse("snapkv").bind([make_spec(), make_spec(window=50, kv_source=0)], "float32")
