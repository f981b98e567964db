"""kvmerger before the rotation: sets, weights and keys against a plain oracle, and positions that are not known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.support.kv_world import make_spec
from torch import Tensor

from elbowroom.core import RopeSpec
from elbowroom.errors import PlanError
from elbowroom.kernels.rope import RopeTable, inverse_frequencies, rotate, turned
from elbowroom.kv import KVPlan, PagedStore, Want
from elbowroom.kv.base import KVStep, PromptPart
from elbowroom.kv.policies import LayerView
from elbowroom.kv.policies.base import Merged
from elbowroom.kv.policies.kvmerger import KVMergerPolicy
from elbowroom.memory import Arena, Budget, HostTier, Ledger

SPEC = make_spec(q_heads=4, kv_heads=2, dim=32, v_dim=16, rope=RopeSpec())
NONE, PART, END, _ = PromptPart


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotated(x: Tensor, places: Tensor) -> Tensor:
    """Rotate ``x [n, ..., D]`` to ``places [n]`` as complex numbers, in float64."""
    half = x.shape[-1] // 2
    steps = 10_000.0 ** (-2 * torch.arange(half, dtype=torch.float64) / x.shape[-1])
    turns = torch.polar(torch.ones((), dtype=torch.float64), places.double()[:, None] * steps)
    z = torch.complex(x[..., :half].double(), x[..., half:].double())
    z = z * turns.view(len(places), *[1] * (x.dim() - 2), half)
    return torch.cat([z.real, z.imag], dim=-1)


def view_of(keys: Tensor, queries: Tensor, **known: int) -> LayerView:
    """Return a view of keys ``[n, Hkv, D]``."""
    return LayerView(0, SPEC, queries, lambda head: keys[:, head].float(), keys.shape[0], **known)


class OneLayer:
    """A store of one layer and a sequence; remembers what the policy was shown and said."""

    def __init__(self, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[LayerView, Merged]] = []
        merge = KVMergerPolicy.merge

        def spy(policy: KVMergerPolicy, view: LayerView, count: int) -> Merged:
            self.seen.append((view, merge(policy, view, count)))
            held = torch.stack([view.keys(head) for head in range(SPEC.num_kv_heads)])
            self.seen[-1] = (replace(view, keys=lambda head: held[head]), self.seen[-1][1])
            return self.seen[-1][1]

        monkeypatch.setattr(KVMergerPolicy, "merge", spy)
        self.bound = KVPlan.parse(plan).bind([SPEC], "float32")
        self.store = PagedStore(self.bound, Arena(HostTier(), Ledger(Budget({}))), 2**24)
        self.handle = self.store.open()

    def run(self, part: PromptPart, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        count, start = q.shape[0], self.store.num_tokens(self.handle)
        rows = np.array([0, count], dtype=np.int32), np.arange(start, start + count), np.array([part], dtype=np.int8)
        step = KVStep((self.handle,), *rows)
        assert self.store.reserve(step) is None
        out = self.store.attend(0, q, k, v, step, Want()).out
        self.store.end_layer(0, step)
        self.store.end_step(step)
        self.store.check_integrity()
        return out

    def slots(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of sealed blocks, ``[Hkv, m, D]``."""
        sequence, pool = self.store._sequences[self.handle.id], self.store._pools.main[0].pool
        strips = [pool.strip(int(sequence.table[0, block])) for block in range(first, end)]
        parts = [self.bound.plan.layout.open(strip, pool.fmt) for strip in strips]
        return torch.cat([k for k, _ in parts], dim=1), torch.cat([v for _, v in parts], dim=1)


@pytest.mark.parametrize("spec", [RopeSpec(), RopeSpec(kind="yarn", factor=4.0, original_max_positions=64)])
def test_a_key_moves_to_any_place(spec: RopeSpec) -> None:
    """Wherever it was: also with a factor on cos and sin, which it keeps."""
    table, x = RopeTable(spec, 32), draw(1, 50, 1, 32)
    here, there = (rotate(x, *table.cos_sin(torch.arange(50) + start, torch.float32))[:, 0] for start in (3, 1000))
    assert torch.allclose(turned(here, torch.full((50,), 997), spec), there, atol=1e-3)
    assert torch.equal(turned(here, torch.zeros(50, dtype=torch.int64), spec), here)


def oracle(keys: Tensor, values: Tensor, mass: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the tokens of each slot one by one, in float64: keys, values and the pivots of one KV head."""
    merged, place = [], torch.arange(len(slots))
    for slot in range(int(slots.max()) + 1):
        mine = place[slots == slot]
        pivot = mine[mass[mine].argmax()]
        moved = torch.stack([rotated(keys[i][None], pivot[None] - i)[0] for i in mine])
        far = (moved - keys[pivot].double()).norm(dim=1)
        sigma = float(far.sum()) / max(len(mine) - 1, 1) / math.sqrt(2)
        raw = torch.exp(-(far**2) / (2 * sigma**2)) if len(mine) > 1 else torch.ones(1, dtype=torch.float64)
        share = raw / raw.sum()
        merged.append((share @ moved, share @ values[mine].double(), pivot))
    k, v, pivots = zip(*merged, strict=True)
    return torch.stack(k), torch.stack(v), torch.stack(pivots)


def test_keys_are_merged_where_the_most_looked_at_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the strips hold is what a plain loop over complex numbers makes of each slot."""
    world = OneLayer("kvmerger(256,protect=5,space=pre) | plain", monkeypatch)
    plain = draw(1, 112, 2, 32).repeat_interleave(4, dim=0) + 0.2 * draw(2, 448, 2, 32)
    q, k, v = draw(3, 448, 4, 32), rotated(plain, torch.arange(448)).float(), draw(4, 448, 2, 16)
    world.run(END, q, k, v)
    ((view, merged),) = world.seen
    made_keys, made_values = world.slots(3, 7)
    for head in range(2):
        weights = view.window_attention(head).sum((0, 1)).double()
        mass = torch.nn.functional.avg_pool1d(weights[None], 5, stride=1, padding=2)[0]
        keys, values, _ = oracle(k[:, head], v[:, head], mass, merged.slots[head])
        assert torch.bincount(merged.slots[head]).max() > 2
        assert torch.allclose(made_keys[head].double(), keys, atol=1e-4)
        assert torch.allclose(made_values[head].double(), values, atol=1e-5)


def test_likeness_is_that_of_the_chosen_space() -> None:
    """Equal words at different places are alike before the rotation; keys that are equal behind it are not."""
    same, queries = torch.zeros(300, 2, 32), draw(2, 64, 4, 32)
    same[..., [0, 16]] = 1.0  # the pair that turns by a radian a token, whose cosine is 0.54
    turning = rotated(same, torch.arange(300)).float()
    for keys, alike in ((turning, "pre"), (same, "post")):
        for space in ("pre", "post"):
            merged = KVMergerPolicy(256, protect=1, space=space).merge(view_of(keys, queries), 172)
            shared = int(max(torch.bincount(row[row >= 0]).max() for row in merged.slots))
            assert (merged.slots >= 0).all() == (space == alike)
            assert (shared > 1) == (space == alike)
            assert (merged.moves is None) == (space == "post")


def test_tokens_whose_distance_is_not_known_stay_alone() -> None:
    """Of 300 equal words the newest 200 follow each other; others may have lost what stood between them."""
    keys = rotated(draw(1, 1, 2, 32).repeat(300, 1, 1), torch.arange(300)).float()
    view = view_of(keys, draw(2, 64, 4, 32), num_adjacent=200)
    merged = KVMergerPolicy(256, protect=1, space="pre").merge(view, 236)
    assert merged.moves is not None
    for slots, moves in zip(merged.slots, merged.moves, strict=True):
        assert torch.bincount(slots[:100]).max() == 1
        assert torch.bincount(slots).max() > 1
        assert (moves[:100] == 0).all()
        assert moves.abs().max() < 8


@pytest.mark.parametrize("parts", [[700, 700, 100, 300], [1700, 64], [1200]])
def test_what_counts_as_adjacent_is(parts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys tell their positions: in what is merged, the adjacent ones go up by one. Prompts in parts, then another."""
    world, start = OneLayer("kvmerger(256,space=pre) | plain", monkeypatch), 0

    def feed(part: PromptPart, count: int) -> int:
        k = draw(start, count, 2, 32)
        k[..., 0] = torch.arange(start, start + count)[:, None]
        world.run(part, draw(1, count, 4, 32) / 100, k, draw(2, count, 2, 16))
        return start + count

    for prompt in (parts, [900, 300], [400]):
        for number, count in enumerate(prompt):
            start = feed(END if number == len(prompt) - 1 else PART, count)
        view, _ = world.seen[-1]
        assert view.num_adjacent is not None
        assert view.num_adjacent >= min(view.num_held, prompt[-1])
        for head in range(2):
            places = view.keys(head)[-view.num_adjacent :, 0]
            assert int(places[-1]) == start - 1
            assert (places.diff() == 1).all()
        for _ in range(30):
            start = feed(NONE, 1)
    assert len(world.seen) == 3


def test_without_a_rotation_there_is_nothing_before_it() -> None:
    with pytest.raises(PlanError) as caught:
        KVPlan.parse("kvmerger(space=pre)").bind([replace(SPEC, rope=None)], "float32")
    assert "does not rotate" in caught.value.message
    assert "leave out space=pre" in str(caught.value.hint)
    KVPlan.parse("kvmerger(space=pre)").bind([SPEC, replace(SPEC, rope=None)], "float32")
    with pytest.raises(PlanError, match="space=both"):
        KVPlan.parse("kvmerger(space=both)")


def test_frequencies_of_the_oracle_are_those_of_models() -> None:
    expected = 10_000.0 ** (-2 * torch.arange(16, dtype=torch.float64) / 32)
    assert torch.allclose(inverse_frequencies(RopeSpec(), 32)[0].double(), expected, rtol=1e-6)
