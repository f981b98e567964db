"""Cascades: what is dropped in one layer is dropped in deeper ones, as real strips show, and as plain loops choose."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.kv_world import make_spec
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec
from elbowroom.errors import IntegrityError, PlanError
from elbowroom.kv import KVHandle, KVPlan, KVStep, PagedStore, Want
from elbowroom.kv.base import PromptPart
from elbowroom.kv.cascade import CascadeRun, TokenHistory
from elbowroom.kv.policies import NO_LIMIT, Cascade, LayerView
from elbowroom.kv.policies.spatten import SpattenPolicy, falling
from elbowroom.kv.span import pack_span, unpack_span
from elbowroom.memory import Arena, Budget, HostTier, Ledger

NONE, PART, END, CHOICE = PromptPart
FULL = make_spec(q_heads=4, kv_heads=2, dim=8, v_dim=4)
LAYERS = [FULL, FULL, make_spec(q_heads=2, window=50), dataclasses.replace(FULL, softcap=4.0)]
CHOSEN = [0, 1, 3]
PLANS = ("spatten(tokens=180,last=100,w=16)", "spatten(150,last=90,keep=1,w=9,kernel=1)", "spatten(200,last=200,w=40)")


# What is chosen


def test_best_leaves_every_layer_enough_and_has_the_greatest_sum() -> None:
    """Against every possible choice of up to nine tokens."""
    rng = random.Random(0)
    for _ in range(150):
        count = rng.randint(3, 9)
        depths = torch.tensor([rng.randint(1, 3) for _ in range(count)])
        alive = torch.tensor([rng.random() < 0.8 for _ in range(count)])
        held = [depths > layer for layer in range(3)]
        sizes = [int((each & alive).sum()) for each in held]
        keeps = [rng.randint(0, size) for size in sizes]
        keeps = [max(keeps[layer:]) for layer in range(3)]
        if keeps[0] == 0:
            continue
        ranks = torch.tensor([rng.random() for _ in range(count)])
        cascade = Cascade(ranks, alive, tuple((held[layer], keeps[layer]) for layer in (2, 1, 0)))
        made = cascade.best(ranks).tolist()
        allowed = [
            each
            for each in itertools.combinations(alive.nonzero()[:, 0].tolist(), keeps[0])
            if all(int(held[layer][list(each)].sum()) >= keeps[layer] for layer in range(3))
        ]
        assert made in [list(each) for each in allowed]
        assert float(ranks[made].sum()) == pytest.approx(max(float(ranks[list(each)].sum()) for each in allowed))


@pytest.mark.parametrize("num_layers", [1, 2, 6, 32])
@pytest.mark.parametrize(("mean", "last"), [(512, 256), (256, 128), (100, 100), (300, 101)])
def test_budgets_fall_to_the_last_and_keep_to_the_mean(mean: int, last: int, num_layers: int) -> None:
    made = falling(mean, last, num_layers)
    assert sorted(made, reverse=True) == made
    assert mean - STRIP_TOKENS / num_layers < sum(made) / num_layers <= mean
    assert made[-1] == (last if num_layers > 1 else mean)
    assert all((budget - made[-1]) % STRIP_TOKENS == 0 for budget in made)
    steps = np.diff(made)
    assert steps.size == 0 or steps.max() - steps.min() <= 2 * STRIP_TOKENS


def test_layers_that_drop_nothing_have_no_limit() -> None:
    policy = KVPlan.parse("spatten(150,last=100,keep=1)").bind(LAYERS, "float32").policy
    assert policy is not None
    assert [policy.limit(layer, True) for layer in CHOSEN] == [NO_LIMIT, 164, 100]
    assert [policy.limit(layer, False) for layer in CHOSEN] == [NO_LIMIT, 656, 400]


@pytest.mark.parametrize(
    ("text", "found", "fix"),
    [
        ("spatten(80)", "cannot keep 80 tokens", "give tokens=100 or more"),
        ("spatten(512,last=99)", "cannot keep 99 tokens", "give last=100 or more"),
        ("spatten(200,last=201)", "201 tokens in the last layer and only 200", "give last=200 or less"),
        ("spatten(200,last=-1)", "last=-1", "a number above -1"),
        ("spatten(200,rank=head)", "rank=head", "cascade, layer"),
        ("spatten(200,kernel=2)", "kernel=2", "an odd kernel"),
        ("spatten(200,keep=3)", "drops nothing of a model with 3 such layers", "keep=2 or less"),
        ("spatten(200) | snapkv", "two policies", "parts joined"),
        ("spatten(200) | kivi", "'kivi' seals whole blocks", "bfp, int8, fp8 or plain; or the policy snapkv"),
        ("spatten(200,keep=1,rank=layer) | kivi", "layers whole", "bfp, int8, fp8 or plain"),
    ],
)
def test_plans_that_cannot_work_name_the_way_out(text: str, found: str, fix: str) -> None:
    with pytest.raises(PlanError) as caught:
        KVPlan.parse(text).bind(LAYERS, "float32")
    assert found in caught.value.message
    assert fix in str(caught.value.hint)


def test_keys_that_are_read_later_have_no_place_in_a_cascade() -> None:
    layers = [FULL, FULL, dataclasses.replace(FULL, kv_source=0)]
    with pytest.raises(PlanError, match="later layers read the keys of layer 0"):
        KVPlan.parse("spatten").bind(layers, "float32")


def test_a_plan_has_one_spelling() -> None:
    plan = KVPlan.parse("int8|spatten( 256, keep=1 )")
    assert plan.text == "spatten(tokens=256,last=128,keep=1,w=32,sinks=4,kernel=5,rank=cascade,every=0) | int8()"
    assert KVPlan.parse(plan.text) == plan


# The store against plain loops


@dataclass
class Plain:
    """One sequence by plain loops: positions that each layer holds, and what was seen of each of them."""

    keys: list[dict[int, Tensor]] = field(default_factory=lambda: [{} for _ in LAYERS])
    """Of each layer, position -> key ``[Hkv, D]``."""
    mean: dict[int, float] = field(default_factory=dict)
    weight: dict[int, float] = field(default_factory=dict)
    num_tokens: int = 0

    def copy(self) -> Plain:
        return Plain([dict(keys) for keys in self.keys], dict(self.mean), dict(self.weight), self.num_tokens)


def attention(keys: dict[int, Tensor], queries: dict[int, Tensor], spec: LayerSpec) -> dict[int, float]:
    """Return what each position receives of all heads, as the mean over the queries."""
    order = sorted(keys)
    stacked, seen = torch.stack([keys[position] for position in order]).double(), torch.zeros(len(order)).double()
    for position, query in queries.items():
        readable = sum(other <= position for other in order)
        for head in range(spec.num_q_heads):
            scores = stacked[:readable, head // 2] @ query[head].double() * spec.scale
            if spec.softcap is not None:
                scores = torch.tanh(scores / spec.softcap) * spec.softcap
            seen[:readable] += scores.exp() / scores.exp().sum() / len(queries)
    return dict(zip(order, seen.tolist(), strict=True))


def choose(plain: Plain, policy: SpattenPolicy, queries: list[dict[int, Tensor]], part: PromptPart) -> None:
    """Let every layer drop what it drops, token by token: the best first, unless deeper layers then lack some."""
    layers = [layer for layer in CHOSEN if policy.limit(layer, True) < NO_LIMIT]
    counts = {}
    for layer in layers:
        held = len(plain.keys[layer])
        above = held - policy.limit(layer, part is END)
        counts[layer] = held - max(-(-above // STRIP_TOKENS), 0) * STRIP_TOKENS
    if all(counts[layer] == len(plain.keys[layer]) for layer in layers):
        return
    plain.weight = {position: weight / 2 for position, weight in plain.weight.items()}
    held_before = {layer: set(plain.keys[layer]) for layer in layers}
    alive = set(plain.keys[layers[0]])
    for layer in layers:
        newest = dict(sorted(queries[layer].items())[-policy.window :])
        for position, seen in attention(plain.keys[layer], newest, LAYERS[layer]).items():
            weight = plain.weight[position] = plain.weight.get(position, 0.0) + 1
            mean = plain.mean.get(position, 0.0)
            plain.mean[position] = mean + (seen - mean) / weight
        order = sorted(plain.keys[layer])
        older = order[: max(len(order) - policy.window, 0)]
        ranks = dict.fromkeys(order, math.inf)
        half = int(policy.kernel) // 2
        for place, position in enumerate(older[int(policy.sinks) :], int(policy.sinks)):
            near = older[max(place - half, 0) : place + half + 1]
            ranks[position] = sum(plain.mean[other] for other in near) / int(policy.kernel)
        chosen: set[int] = set()
        lacking = {deeper: counts[deeper] for deeper in layers if deeper >= layer}
        for position in sorted(alive & set(order), key=lambda each: -ranks[each]):
            trial = {deeper: count - (position in held_before[deeper]) for deeper, count in lacking.items()}
            if len(chosen) + 1 + max(*trial.values(), 0) <= counts[layer]:
                lacking = trial
                chosen.add(position)
        alive = chosen
        plain.keys[layer] = {position: key for position, key in plain.keys[layer].items() if position in chosen}


class World:
    """A store beside plain loops; channel 0 of a key is its position, which no query looks at."""

    def __init__(self, plan: str, seed: int = 0) -> None:
        bound = KVPlan.parse(plan).bind(LAYERS, "float32")
        assert isinstance(bound.policy, SpattenPolicy)
        self.policy = bound.policy
        self.ledger = Ledger(Budget({}))
        self.store = PagedStore(bound, Arena(HostTier(), self.ledger), 2**24)
        self.plain: dict[KVHandle, Plain] = {}
        self.random = torch.Generator().manual_seed(seed)

    def open(self) -> KVHandle:
        handle = self.store.open()
        self.plain[handle] = Plain()
        return handle

    def fork(self, handle: KVHandle) -> KVHandle:
        twin = self.store.fork(handle)
        self.plain[twin] = self.plain[handle].copy()
        return twin

    def step(self, *rows: tuple[KVHandle, int, PromptPart]) -> KVStep:
        starts = np.cumsum([0, *(count for _, count, _ in rows)]).astype(np.int32)
        positions = [np.arange(count) + self.plain[handle].num_tokens for handle, count, _ in rows]
        parts = np.array([part for *_, part in rows], dtype=np.int8)
        return KVStep(tuple(handle for handle, *_ in rows), starts, np.concatenate(positions), parts)

    def run(self, *rows: tuple[KVHandle, int, PromptPart]) -> None:
        """Append tokens in one step, in the store and by loops, and compare what is held."""
        step = self.step(*rows)
        assert self.store.reserve(step) is None
        queries: list[list[dict[int, Tensor]]] = [[] for _ in rows]
        for layer, spec in enumerate(LAYERS):
            q, k, v = self._tokens(step, spec)
            self.store.attend(layer, q, k, v, step, Want())
            self.store.end_layer(layer, step)
            for row, (handle, _, _) in enumerate(rows):
                mine = range(int(step.row_starts[row]), int(step.row_starts[row + 1]))
                queries[row].append({int(step.positions[token]): q[token] for token in mine})
                self.plain[handle].keys[layer] |= {int(step.positions[token]): k[token] for token in mine}
        self.store.end_step(step)
        for row, (handle, count, part) in enumerate(rows):
            self.plain[handle].num_tokens += count
            if part is not NONE:
                choose(self.plain[handle], self.policy, queries[row], part)
        self.check()

    def _tokens(self, step: KVStep, spec: LayerSpec) -> tuple[Tensor, Tensor, Tensor]:
        shapes = (
            (spec.num_q_heads, spec.head_dim),
            (spec.num_kv_heads, spec.head_dim),
            (spec.num_kv_heads, spec.v_head_dim),
        )
        q, k, v = (torch.randn(step.positions.size, *shape, generator=self.random) for shape in shapes)
        q[..., 0], k[..., 0] = 0.0, torch.from_numpy(step.positions)[:, None].float()
        return q, k, v

    def held(self, handle: KVHandle, layer: int) -> list[int]:
        """Return the positions in the strips of a layer, as both heads have them."""
        sequence, lane = self.store._sequences[handle.id], self.store._pools.main[self.store._pools.number_of[layer]]
        count = sequence.num_tokens - int(sequence.expired_blocks[layer]) * STRIP_TOKENS
        entries = sequence.table[layer][sequence.table[layer] != 0xFFFFFFFF].tolist()
        keys = [self.store._codec.open(lane.pool.strip(entry), lane.pool.fmt)[0][..., 0] for entry in entries]
        positions = torch.cat([torch.empty(2, 0), *keys], dim=1)[:, :count]
        assert torch.equal(positions[0], positions[1])
        return positions[0].int().tolist()

    def check(self) -> None:
        """The strips hold what the loops chose; deeper layers hold subsets."""
        self.store.check_integrity()
        for handle, plain in self.plain.items():
            held = [self.held(handle, layer) for layer in CHOSEN]
            assert held == [sorted(plain.keys[layer]) for layer in CHOSEN]
            assert all(set(deeper) <= set(upper) for upper, deeper in itertools.pairwise(held))

    def close_all(self) -> None:
        for handle in self.plain:
            self.store.close(handle)
        assert self.ledger.held("kv", "host") == 0


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("chunks", [[400], [150, 180, 70], [64, 1, 300], [90], [130, 30]])
def test_a_prompt_leaves_what_loops_choose(plan: str, chunks: list[int]) -> None:
    world = World(plan)
    handle = world.open()
    for number, count in enumerate(chunks):
        world.run((handle, count, END if number == len(chunks) - 1 else PART))
    for layer in CHOSEN:
        limit, count = world.policy.limit(layer, True), len(world.held(handle, layer))
        assert count == sum(chunks) if sum(chunks) <= limit else limit - STRIP_TOKENS < count <= limit
    world.close_all()


@pytest.mark.parametrize("plan", PLANS)
def test_later_prompts_of_a_session_stay_a_cascade(plan: str) -> None:
    """Short and long turns, generated tokens between them, and a fork that goes its own way."""
    world = World(plan, seed=1)
    handle = world.open()
    world.run((handle, 300, END))
    world.run((handle, 1, NONE))
    world.run((handle, 20, END))
    twin = world.fork(handle)
    world.run((handle, 3, END), (twin, 1, NONE))
    world.run((handle, 1, NONE), (twin, 70, END))
    world.run((handle, 150, END), (twin, 40, END))
    world.run((twin, 65, PART))
    world.close_all()


@pytest.mark.parametrize("seed", range(4))
def test_random_lives(seed: int) -> None:
    rng = random.Random(seed)
    world = World(rng.choice(PLANS), seed)
    for _ in range(14):
        action = rng.choice(["open", "run", "run", "run", "decode", "fork", "abandon"])
        handles = list(world.plain)
        if not handles or (action == "open" and len(handles) < 3):
            world.open()
        elif action == "fork" and len(handles) < 4:
            world.fork(rng.choice(handles))
        elif action == "abandon":
            world.store.reserve(world.step((rng.choice(handles), rng.randint(1, 300), END)))
        else:
            rows = rng.sample(handles, rng.randint(1, min(2, len(handles))))
            part = NONE if action == "decode" else rng.choice([PART, END])
            world.run(
                *((handle, 1 if part is NONE else rng.choice([1, 30, 64, 65, 130, 220]), part) for handle in rows)
            )
    world.close_all()


def test_without_a_cascade_a_deeper_layer_keeps_what_another_dropped() -> None:
    """So the tests above can fail."""
    bound = KVPlan.parse("spatten(180,last=100,rank=layer)").bind(LAYERS, "float32")
    assert bound.policy is not None
    draws = torch.Generator().manual_seed(0)
    held = []
    for layer, count in ((0, 180), (1, 120)):
        keys, queries = torch.randn(2, 300, 8, generator=draws), torch.randn(32, 4, 8, generator=draws)
        held.append(bound.policy.select(LayerView(layer, FULL, queries, keys.__getitem__, 300), count)[0].tolist())
    assert not set(held[1]) <= set(held[0])
    assert not bound.cascade_layers


# What is known of tokens


def test_a_span_brings_back_what_was_known() -> None:
    world = World(PLANS[0])
    handle = world.open()
    world.run((handle, 330, END))
    world.run((handle, 20, NONE))
    span = world.store.export_span(handle, 0, 350)
    twin = world.store.open()
    assert world.store.import_span(twin, span) == 350
    assert world.store.export_span(twin, 0, 350) == span
    world.plain[twin] = world.plain[handle].copy()
    world.run((twin, 80, END), (handle, 40, END))
    world.close_all()


@pytest.mark.parametrize("change", [lambda noted: noted[:-1], lambda noted: b"", lambda noted: bytes(len(noted))])
def test_a_span_with_another_history_is_refused(change: Any) -> None:
    world = World(PLANS[0])
    handle = world.open()
    world.run((handle, 330, END))
    span = world.store.export_span(handle, 0, 330)
    _, extent, noted, strips = unpack_span(span, world.store.fingerprint, len(LAYERS))
    assert noted
    other = pack_span(world.store.fingerprint, 0, extent, [np.frombuffer(strips, np.uint8)], change(noted))
    twin = world.store.open()
    before = world.store.report()
    with pytest.raises(IntegrityError, match="the history of"):
        world.store.import_span(twin, other)
    assert world.store.report() == before


def test_a_history_is_small() -> None:
    """10 bytes a token that the first layer holds, whatever the number of layers."""
    world = World(PLANS[0])
    handle = world.open()
    world.run((handle, 330, END))
    history = world.store._sequences[handle.id].history
    assert history is not None
    assert len(history.to_bytes()) == 10 * len(world.held(handle, 0))


def test_newer_choices_weigh_more() -> None:
    run = CascadeRun(TokenHistory(torch.ones(2, dtype=torch.int16), torch.tensor([1.0, 3.0]), torch.ones(2)), [3], [2])
    made = run.note(0, torch.tensor([4.0, 0.0, 0.5]))
    assert made.importance.tolist() == pytest.approx([(0.5 * 1 + 4) / 1.5, 0.5 * 3 / 1.5, 0.5])


def test_what_is_no_cascade_is_refused() -> None:
    with pytest.raises(IntegrityError, match="they must fall"):
        CascadeRun(None, [100, 100], [50, 60])
    run = CascadeRun(None, [5, 5], [4, 2])
    run.note(0, torch.ones(5))
    with pytest.raises(IntegrityError, match="other tokens for one KV head"):
        run.keep(0, torch.tensor([[0, 1, 2, 4], [0, 1, 3, 4]]))
    run.keep(0, torch.tensor([[0, 1, 2, 4]]))
    run.note(1, torch.ones(5))
    with pytest.raises(IntegrityError, match="keeps tokens that the layer before dropped"):
        run.keep(1, torch.tensor([[3, 4]]))
    narrow = CascadeRun(
        TokenHistory(torch.tensor([1, 1, 2], dtype=torch.int16), torch.ones(3), torch.ones(3)), [3, 1], [2, 1]
    )
    with pytest.raises(IntegrityError, match="leaves"):
        narrow.keep(0, torch.tensor([[0, 1]]))
