"""Strips whose keys have fewer channels or whose slots stand for several tokens: think and kvmerger, in real bytes."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from tests.support.kv_world import make_spec
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec
from elbowroom.errors import IntegrityError, PlanError
from elbowroom.kernels.base import PLAIN
from elbowroom.kernels.extras import key_channels, slot_bias, slot_tokens
from elbowroom.kv import KVHandle, KVPlan, PagedStore, Want
from elbowroom.kv.base import KVStep, PromptPart
from elbowroom.kv.policies import LayerView
from elbowroom.kv.policies.kvmerger import KVMergerPolicy, gaussian_weights, join_neighbours, most_looked_at
from elbowroom.kv.policies.think import ThinKPolicy
from elbowroom.memory import Arena, Budget, HostTier, Ledger

SPEC = make_spec(q_heads=4, kv_heads=2, dim=32, v_dim=16)
WINDOW = make_spec(q_heads=2, dim=32, v_dim=32, window=50)
NONE, PART, END, CHOICE = PromptPart
PLANS = (
    "think(0.5) | plain",
    "think(0.25) | int8",
    "think(0.5) | kivi(4,4,32)",
    "snapkv(200) | think(0.5) | bfp(n=16)",
    "kvmerger(200) | plain",
    "kvmerger(200) | int8",
    "kvmerger(300) | think(0.5) | kivi(2,2,32)",
    "streaming(200) | think | plain(bf16)",
)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Reader:
    """A store of some layers; what its strips hold is read back and attended to in plain torch."""

    def __init__(self, plan: str, layers: list[LayerSpec], capacity: int = 2**24) -> None:
        self.layers = layers
        self.bound = KVPlan.parse(plan).bind(layers, "float32")
        self.ledger = Ledger(Budget({}))
        self.store = PagedStore(self.bound, Arena(HostTier(), self.ledger), capacity)
        self.random = torch.Generator().manual_seed(3)
        self.handles: list[KVHandle] = []

    def rand(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def held(self, handle: KVHandle, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and biases ``[Hkv, m]`` of a layer, in the order of its slots."""
        sequence, pools = self.store._sequences[handle.id], self.store._pools
        number = pools.number_of[layer]
        main, tail = pools.main[number].pool, pools.tails[number].pool
        parts = []
        first = int(sequence.expired_blocks[layer])
        for block in range(first, -(-sequence.num_tokens // STRIP_TOKENS)):
            if sequence.holds(layer + len(self.layers), block):
                strip = tail.strip(int(sequence.table[layer + len(self.layers), block]))
                parts.append((*PLAIN.open(strip, tail.fmt), None))
            else:
                strip = main.strip(int(sequence.table[layer, block]))
                parts.append((*self.bound.plan.layout.open(strip, main.fmt), slot_bias(strip, main.fmt)))
        heads = self.layers[layer].num_kv_heads
        biases = [torch.zeros(heads, STRIP_TOKENS) if bias is None else bias for *_, bias in parts]
        count = sequence.num_tokens - first * STRIP_TOKENS
        k, v = (torch.cat([part[i].float() for part in parts], dim=1)[:, :count] for i in (0, 1))
        return k, v, torch.cat(biases, dim=1)[:, :count]

    def run(
        self, *rows: tuple[KVHandle, int, PromptPart], data: list[tuple[Tensor, ...]] | None = None
    ) -> list[Tensor]:
        """Append tokens; a decoding step is checked against what the strips hold."""
        starts = np.cumsum([0, *(count for _, count, _ in rows)]).astype(np.int32)
        before = [self.store.num_tokens(handle) for handle, *_ in rows]
        positions = [np.arange(count) + start for (_, count, _), start in zip(rows, before, strict=True)]
        parts = np.array([part for *_, part in rows], dtype=np.int8)
        step = KVStep(tuple(handle for handle, *_ in rows), starts, np.concatenate(positions), parts)
        assert self.store.reserve(step) is None
        outs, count = [], int(starts[-1])
        for layer, spec in enumerate(self.layers):
            if data is not None:
                q, k, v = data[layer]
            else:
                q = self.rand(count, spec.num_q_heads, spec.head_dim)
                k, v = (self.rand(count, spec.num_kv_heads, width) for width in (spec.head_dim, spec.v_head_dim))
            seen = []
            if all(part is NONE for *_, part in rows):
                seen = [self.held(handle, layer) for handle, *_ in rows]
            outs.append(self.store.attend(layer, q, k, v, step, Want()).out)
            for row, (old_keys, old_values, bias) in enumerate(seen):
                keys = torch.cat([old_keys, k[row][:, None]], dim=1)
                values = torch.cat([old_values, v[row][:, None]], dim=1)
                if spec.window is None:
                    expected = attention(spec, q[row], keys, values, torch.nn.functional.pad(bias, (0, 1)))
                    assert float((outs[-1][row] - expected).abs().max()) <= self.tolerance
            self.store.end_layer(layer, step)
        self.store.end_step(step)
        self.store.check_integrity()
        return outs

    @property
    def tolerance(self) -> float:
        """Native products with packed codes round queries and weights to 8 bits."""
        fmt = self.bound.formats[0]
        return {"float32": 1e-4, "bfloat16": 5e-3}.get(fmt.dtype, 0.05)

    def close(self) -> None:
        self.store.close_all()
        assert self.ledger.held("kv", "host") == 0


def attention(spec: LayerSpec, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention ``[Hq, Dv]`` of one query on keys ``[Hkv, m, D]``."""
    rows = []
    for head in range(spec.num_q_heads):
        source = head // spec.group_size
        scores = k[source] @ q[head] * spec.scale + bias[source]
        rows.append(scores.softmax(0) @ v[source])
    return torch.stack(rows)


@pytest.mark.parametrize("plan", PLANS)
def test_attention_reads_what_the_strips_say(plan: str) -> None:
    """Several prompts and turns of two sequences, with decoding between; every decoded token is checked."""
    rng = random.Random(1)
    world = Reader(plan, [SPEC, WINDOW, SPEC])
    first, second = world.store.open(), world.store.open()
    for chunks in ([130, 300], [20], [170], [64]):
        for number, count in enumerate(chunks):
            world.run((first, count, END if number == len(chunks) - 1 else PART))
        world.run((second, rng.choice([30, 64, 200]), END))
        for _ in range(12):
            world.run((first, 1, NONE), (second, 1, NONE))
    twin = world.store.fork(first)
    for _ in range(70):
        world.run((first, 1, NONE), (twin, 1, NONE))
    world.close()


def test_dropped_channels_are_those_with_the_smallest_share_of_the_scores() -> None:
    """The packed product is that of keys whose dropped channels are 0, and the strip is smaller by them."""
    world, count = Reader("think(cut=0.5,w=8) | plain", [SPEC]), 200
    handle = world.store.open()
    q, k, v = (
        draw(1, count, 4, 32) * draw(4, 32).exp(),
        draw(2, count, 2, 32) * draw(5, 32).exp(),
        draw(3, count, 2, 16),
    )
    world.run((handle, count, END), data=[(q, k, v)])
    expected = k.transpose(0, 1).clone()
    for head in range(2):
        norms = [
            float(q[-8:, 2 * head : 2 * head + 2, i].square().mean() * k[:, head, i].square().mean()) for i in range(32)
        ]
        dropped = sorted(range(32), key=lambda i: norms[i])[:16]
        expected[head, :192, dropped] = 0.0
    keys, values, _ = world.held(handle, 0)
    assert torch.equal(keys, expected)
    assert torch.equal(values, v.transpose(0, 1))
    plain = KVPlan.parse("plain").bind([SPEC], "float32").formats[0].strip_bytes
    assert plain - world.bound.formats[0].strip_bytes == 2 * 64 * 16 * 4 - 2 * 16 // 64 * 64 - 64
    world.close()


def test_generated_blocks_lose_the_channels_of_their_prompt() -> None:
    world = Reader("think(0.5) | plain", [SPEC])
    handle = world.store.open()
    world.run((handle, 130, END))
    for _ in range(70):
        world.run((handle, 1, NONE))
    sequence, pool = world.store._sequences[handle.id], world.store._pools.main[0].pool
    lists = [key_channels(pool.strip(int(sequence.table[0, block])), pool.fmt) for block in range(3)]
    assert torch.equal(lists[0], lists[1])
    assert torch.equal(lists[1], lists[2])
    assert (lists[0].long().diff(dim=1) > 0).all()
    world.run((handle, 200, END))  # other queries, other channels
    assert not torch.equal(lists[0], key_channels(pool.strip(int(sequence.table[0, 4])), pool.fmt))
    world.close()


def test_a_short_prompt_leaves_the_largest_channels_to_what_is_generated() -> None:
    world = Reader("think(0.5) | plain", [SPEC])
    handle = world.store.open()
    world.run((handle, 30, END))
    for _ in range(80):
        world.run((handle, 1, NONE))
    world.close()


def test_channels_are_not_guessed() -> None:
    """Without a word on where the prompt ends, nothing is sealed; the sequence stays usable."""
    world = Reader("think | plain", [SPEC])
    handle = world.store.open()
    with pytest.raises(IntegrityError, match="chooses channels where a prompt ends"):
        world.run((handle, 100, NONE))
    world.run((handle, 100, END))
    world.close()


# kvmerger


def test_equal_tokens_that_share_a_slot_weigh_what_they_weighed() -> None:
    """With the log of their number nothing changes; without it something does."""
    k, v, q = (
        draw(1, 2, 150, 32).repeat_interleave(2, dim=1),
        draw(2, 2, 150, 16).repeat_interleave(2, dim=1),
        draw(3, 301, 4, 32),
    )
    k, v = torch.cat([k, draw(4, 2, 1, 32)], dim=1), torch.cat([v, draw(5, 2, 1, 16)], dim=1)
    expected = attention(SPEC, q[-1], k, v, torch.zeros(2, 301))
    errors = []
    for bias in ("on", "off"):
        world = Reader(f"kvmerger(tokens=256,longest=2,bias={bias}) | plain", [SPEC])
        handle = world.store.open()
        rows = [x[:, :300].transpose(0, 1).contiguous() for x in (k, v)]
        world.run((handle, 300, END), data=[(q[:300], *rows)])
        assert world.store.report().num_dropped == 64
        made = world.run((handle, 1, NONE), data=[(q[300:], k[:, 300][None], v[:, 300][None])])[0][0]
        errors.append(float((made - expected).abs().max()))
        world.close()
    assert errors[0] < 1e-5
    assert errors[1] > 1e-3


def test_slots_count_their_tokens() -> None:
    world = Reader("kvmerger(256,protect=1) | plain", [SPEC])
    handle = world.store.open()
    base = draw(1, 100, 2, 32).repeat_interleave(4, dim=0) + 0.1 * draw(2, 400, 2, 32)
    world.run((handle, 400, END), data=[(draw(3, 400, 4, 32), base, draw(4, 400, 2, 16))])
    sequence, pool = world.store._sequences[handle.id], world.store._pools.main[0].pool
    entries = [int(entry) for entry in sequence.table[0] if entry != 0xFFFFFFFF]
    counts = torch.cat([slot_tokens(pool.strip(entry), pool.fmt).long() for entry in entries], dim=1)
    held, opened = 400 - world.store.report().num_dropped, 400 % 64
    assert counts.shape[1] == held - opened
    assert ((counts >= 1) & (counts <= 8)).all()
    # All tokens are in some slot: nothing had to be dropped.
    assert (counts.sum(1) + opened == 400).all()
    world.close()


def test_weights_fall_with_the_distance_to_the_token_that_is_looked_at_most() -> None:
    """Of a pair the other one has e^-1 of the pivot's weight; equal tokens share evenly; a token alone has all."""
    k, slots = draw(1, 6, 32), torch.tensor([0, 0, 1, 2, 2, 2])
    k[4] = k[5] = k[3]
    pivots = most_looked_at(torch.tensor([1.0, 2.0, 0.1, 0.5, 0.5, 0.4]), slots)
    assert pivots.tolist() == [1, 1, 2, 4, 4, 4]
    weights = gaussian_weights(k, pivots, slots)
    pair = math.exp(-1) / (1 + math.exp(-1))
    assert torch.allclose(weights, torch.tensor([pair, 1 - pair, 1.0, 1 / 3, 1 / 3, 1 / 3]))


@pytest.mark.parametrize("wanted", [0, 1, 17, 60, 150])
def test_neighbours_join_up_to_what_is_wanted(wanted: int) -> None:
    keys = draw(1, 50, 16).repeat_interleave(4, dim=0) + 0.2 * draw(2, 200, 16)
    alone = torch.arange(200) % 37 == 0
    joined = join_neighbours(keys, alone, wanted, 4)
    assert int(joined.sum()) <= wanted
    if wanted <= 60:
        assert int(joined.sum()) == wanted
    assert not (joined & (alone[1:] | alone[:-1])).any()
    run = 1
    for joins in joined.tolist():
        run = run + 1 if joins else 1
        assert run <= 4


def test_nothing_similar_is_dropped_not_merged() -> None:
    """Tokens with the least attention go where no neighbours are alike."""
    keys = draw(1, 2, 300, 32)
    view = LayerView(0, SPEC, draw(2, 64, 4, 32), lambda head: keys[head], 300)
    merged = KVMergerPolicy(tokens=256).merge(view, 200)
    assert (merged.slots.max(1).values == 199).all()
    assert ((merged.slots < 0).sum(1) == 100).all()
    assert (merged.slots[:, -64:] == torch.arange(136, 200)).all()


@pytest.mark.parametrize(
    ("text", "found", "fix"),
    [
        ("think(0.95) | plain", "cut=0.95", "from 0.1 to 0.8"),
        ("think(a)", "cut=a", "from 0.1 to 0.8"),
        ("think | think", "two channel policies", "parts joined"),
        ("think | fp8", "codec 'fp8' does not know", "int8, bfp or kivi"),
        ("kvmerger | fp8", "codec 'fp8' does not know", "int8, bfp or kivi"),
        ("kvmerger(w=20)", "w=20", "from 64"),
        ("kvmerger(bias=maybe)", "bias=maybe", "bias=on or bias=off"),
        ("kvmerger(100)", "cannot keep 100 tokens", "tokens=128"),
        ("snapkv | kvmerger", "two policies", "parts joined"),
    ],
)
def test_plans_that_cannot_work_name_the_way_out(text: str, found: str, fix: str) -> None:
    with pytest.raises(PlanError) as caught:
        KVPlan.parse(text)
    assert found in caught.value.message
    assert fix in str(caught.value.hint)


def test_plans_have_one_spelling() -> None:
    plan = KVPlan.parse("int8|think(0.30)|snapkv(256)")
    assert plan.text == "snapkv(tokens=256,w=32,kernel=5,every=0) | think(cut=0.3,w=32) | int8()"
    assert KVPlan.parse(plan.text) == plan
    assert ThinKPolicy("0.3") == ThinKPolicy(0.3)


@pytest.mark.parametrize(
    ("plan", "found"), [("think(0.5) | int8", "names channels"), ("kvmerger(200) | int8", "no token")]
)
def test_spans_with_other_channels_or_counts_are_refused(plan: str, found: str) -> None:
    """A checksum can be made by anyone; nothing of such a span is taken."""
    world = Reader(plan, [SPEC])
    handle = world.store.open()
    world.run((handle, 400, END))
    sequence, pool = world.store._sequences[handle.id], world.store._pools.main[0].pool
    strip = pool.strip(next(int(entry) for entry in sequence.table[0] if entry != 0xFFFFFFFF))
    if pool.fmt.key_channels:
        key_channels(strip, pool.fmt)[1, -1] = 32
    else:
        slot_tokens(strip, pool.fmt)[0, 3] = 0
    span, twin = world.store.export_span(handle, 0, 400), world.store.open()
    held = world.store.report().num_strips
    with pytest.raises(IntegrityError, match=found):
        world.store.import_span(twin, span)
    assert world.store.report().num_strips == held
    world.store.close(twin)
    world.close()


@pytest.mark.parametrize("plan", ["think | kivi", "snapkv(150) | kivi"])
def test_a_span_that_ends_before_a_waiting_prompt_is_whole(plan: str) -> None:
    world = Reader(plan, [SPEC])
    handle = world.store.open()
    world.run((handle, 130, END))
    for _ in range(130):
        world.run((handle, 1, NONE))
    world.run((handle, 100, PART))
    twin = world.store.open()
    world.store.import_span(twin, world.store.export_span(handle, 0, 192))
    for _ in range(70):
        world.run((twin, 1, NONE))
    world.close()
