"""KV heads that go behind a first prompt: which ones, that their bytes go, and that nobody reads them."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from tests.support.kv_world import make_spec
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec, PageFormat
from elbowroom.errors import IntegrityError, PlanError
from elbowroom.kernels import attention
from elbowroom.kernels.attention import BACKENDS
from elbowroom.kernels.base import PLAIN
from elbowroom.kernels.extras import kept_heads, slot_bias
from elbowroom.kernels.native import is_native
from elbowroom.kv import KVHandle, KVPlan, PagedStore, Want
from elbowroom.kv.base import KVStep, PromptPart
from elbowroom.kv.heads import HeadRun, places_of
from elbowroom.memory import Arena, Budget, HostTier, Ledger

SPEC = make_spec(q_heads=8, kv_heads=4, dim=32, v_dim=16)
WINDOW = make_spec(q_heads=8, kv_heads=4, dim=32, v_dim=16, window=50)
LAYERS = [SPEC, WINDOW, SPEC, SPEC]
NONE, PART, END, _ = PromptPart
CODECS = ("plain", "plain(bf16)", "int8", "bfp(n=16)", "kivi(4,4,32)", "kivi(2,2,32)")
PLANS = (
    "heads(0.5,skip=1) | plain(bf16)",
    "heads(0.5,skip=1) | kivi(2,2,32)",
    "heads(0.75,last=0.25,skip=0) | plain",
    "heads(0.5,rank=layer) | int8",
    "snapkv(200) | heads(0.5) | kivi",
    "streaming(200) | heads(0.25,skip=0) | bfp(n=16)",
    "heads(0.5) | think(0.5) | plain",
    "kvmerger(256) | heads(0.75,last=0.5,skip=0) | think(0.5) | int8",
)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Reader:
    """A store of some layers; what its strips hold is read back and attended to in plain torch."""

    def __init__(self, plan: str, layers: list[LayerSpec] = LAYERS, capacity: int = 2**24) -> None:
        self.layers = layers
        self.bound = KVPlan.parse(plan).bind(layers, "float32")
        self.ledger = Ledger(Budget({}))
        self.store = PagedStore(self.bound, Arena(HostTier(), self.ledger), capacity)
        self.random = torch.Generator().manual_seed(3)
        self.checked, self.checks = 0, plan != "plain"

    def rand(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def strips(self, handle: KVHandle, layer: int) -> list[tuple[Tensor, PageFormat]]:
        """Sealed strips and the open one, in the order of their slots."""
        sequence, pools = self.store._sequences[handle.id], self.store._pools
        number = pools.number_of[layer]
        main, tail = pools.main[number].pool, pools.tails[number].pool
        found = []
        for block in range(int(sequence.expired_blocks[layer]), -(-sequence.num_tokens // STRIP_TOKENS)):
            row = layer + len(self.layers)
            if sequence.holds(row, block):
                found.append((tail.strip(int(sequence.table[row, block])), tail.fmt))
            else:
                found.append((main.strip(int(sequence.table[layer, block])), main.fmt))
        return found

    def alive(self, handle: KVHandle, layer: int) -> list[int]:
        """KV heads that sealed strips of a layer say they hold; they must agree."""
        sealed = [(strip, fmt) for strip, fmt in self.strips(handle, layer) if fmt.sealed]
        if not sealed or not sealed[0][1].kept_heads:
            return list(range(self.layers[layer].num_kv_heads))
        lists = {tuple(kept_heads(strip, fmt).tolist()) for strip, fmt in sealed}
        assert len(lists) == 1
        return list(lists.pop())

    def step(self, *rows: tuple[KVHandle, int, PromptPart]) -> KVStep:
        """Return a reserved step that appends tokens."""
        starts = np.cumsum([0, *(count for _, count, _ in rows)]).astype(np.int32)
        before = [self.store.num_tokens(handle) for handle, *_ in rows]
        positions = [np.arange(count) + start for (_, count, _), start in zip(rows, before, strict=True)]
        parts = np.array([part for *_, part in rows], dtype=np.int8)
        step = KVStep(tuple(handle for handle, *_ in rows), starts, np.concatenate(positions), parts)
        assert self.store.reserve(step) is None
        return step

    def run(
        self, *rows: tuple[KVHandle, int, PromptPart], data: list[tuple[Tensor, ...]] | None = None
    ) -> list[Tensor]:
        """Append tokens; a decoding step is checked against what the strips hold."""
        step = self.step(*rows)
        parts = np.array([part for *_, part in rows], dtype=np.int8)
        outs, count = [], len(step.positions)
        for layer, spec in enumerate(self.layers):
            q = self.rand(count, spec.num_q_heads, spec.head_dim)
            k, v = (self.rand(count, spec.num_kv_heads, width) for width in (spec.head_dim, spec.v_head_dim))
            q, k, v = (q, k, v) if data is None else data[layer]
            got = self.store.attend(layer, q, k, v, step, Want())
            outs.append(got.out)
            decodes = self.checks and spec.window is None and bool((parts == NONE).all())
            for row, (handle, *_) in enumerate(rows) if decodes else ():
                if 2 <= self.store.num_tokens(handle) % STRIP_TOKENS < 62 and step.positions[0] % 8:
                    continue
                self.check(handle, layer, q[row], k[row], v[row], got.out[row], got.lse[row])
            self.store.end_layer(layer, step)
        self.store.end_step(step)
        self.store.check_integrity()
        return outs

    def check(self, handle: KVHandle, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """A decoded token's attention is that on what the strips hold, its own included, for heads that are alive."""
        spec, layout = self.layers[layer], self.bound.plan.layout
        places = self.store._sequences[handle.id].places
        alive = np.flatnonzero(places[layer] >= 0).tolist() if places else list(range(spec.num_kv_heads))
        keys, values, biases = [], [], []
        for strip, fmt in self.strips(handle, layer):
            opened, bias = (
                (layout.open(strip, fmt), slot_bias(strip, fmt)) if fmt.sealed else (PLAIN.open(strip, fmt), None)
            )
            keys.append(opened[0].float())
            values.append(opened[1].float())
            biases.append(torch.zeros(spec.num_kv_heads, STRIP_TOKENS) if bias is None else bias)
        sequence = self.store._sequences[handle.id]
        held = sequence.num_tokens - STRIP_TOKENS * int(sequence.expired_blocks[layer])
        whole_k, whole_v = (torch.cat(parts, dim=1)[:, :held] for parts in (keys, values))
        whole_k, whole_v = torch.cat([whole_k, k[:, None]], dim=1), torch.cat([whole_v, v[:, None]], dim=1)
        bias = torch.nn.functional.pad(torch.cat(biases, dim=1)[:, :held], (0, 1))
        fmt = self.bound.formats[layer]
        tolerance = {"float32": 1e-5, "bfloat16": 5e-3}.get(fmt.dtype, 0.05)
        gone = torch.ones(spec.num_kv_heads, dtype=torch.bool).index_fill_(0, torch.tensor(alive), value=False)
        out, lse, queries = (x.view(spec.num_kv_heads, spec.group_size, -1) for x in (out, lse, q))
        assert not out[gone].any()
        assert (lse[gone] == -torch.inf).all()
        scores = queries @ whole_k.transpose(1, 2) * spec.scale + bias[:, None]
        assert float((out - scores.softmax(-1) @ whole_v)[~gone].abs().max()) <= tolerance
        assert float((lse[..., 0] - scores.logsumexp(-1))[~gone].abs().max()) <= tolerance
        self.checked += len(alive)

    def close(self) -> None:
        self.store.close_all()
        assert self.ledger.held("kv", "host") == 0


@pytest.mark.parametrize("plan", PLANS)
def test_heads_that_are_gone_read_nothing_and_others_what_the_strips_say(plan: str) -> None:
    """Prompts in parts, turns, decoding over the ends of blocks, forks and spans; every decoded token is checked."""
    world = Reader(plan)
    first, second = world.store.open(), world.store.open()
    world.run((first, 130, PART))
    world.run((first, 170, END))
    world.run((second, 30, END))  # nothing of it is sealed, but its heads are chosen
    for _ in range(40):
        world.run((first, 1, NONE), (second, 1, NONE))
    world.run((first, 20, PART), (second, 150, END))
    world.run((first, 60, END))
    twin = world.store.fork(first)
    for _ in range(10):
        world.run((first, 1, NONE), (twin, 1, NONE))
    copy, count = world.store.open(), world.store.num_tokens(twin)
    world.store.import_span(copy, world.store.export_span(twin, 0, count))
    data = [(draw(1, 1, 8, 32), draw(2, 1, 4, 32), draw(3, 1, 4, 16)) for _ in LAYERS]
    assert all(
        torch.equal(a, b)
        for a, b in zip(world.run((twin, 1, NONE), data=data), world.run((copy, 1, NONE), data=data), strict=True)
    )
    world.store.truncate(copy, count)
    for _ in range(30):
        world.run((copy, 1, NONE))
    gone = [4 - kept for kept in world.bound.kept_heads]
    assert [4 - len(world.alive(first, layer)) for layer in range(4)] == gone
    assert [4 - len(world.alive(second, layer)) for layer in range(4)] == gone
    assert sum(gone) > 0
    assert world.checked > 50
    world.close()


def outputs(spec: LayerSpec, q: Tensor, k: Tensor, v: Tensor, window: int) -> list[float]:
    """Sum of the magnitudes of each query head's output over the last queries, the slow way."""
    sums, count = [], q.shape[0]
    for head in range(spec.num_q_heads):
        total, source = 0.0, head // spec.group_size
        for row in range(count - window, count):
            weights = (k[: row + 1, source].double() @ q[row, head].double() * spec.scale).softmax(0)
            total += float((weights @ v[: row + 1, source].double()).abs().sum())
        sums.append(total)
    return sums


@pytest.mark.parametrize(("rank", "length"), [("cascade", 200), ("layer", 200), ("cascade", 40)])
def test_heads_with_the_largest_output_stay(rank: str, length: int) -> None:
    """Sums over the layers so far choose among what the layer before keeps; the first layer only votes."""
    layers = [SPEC, SPEC, SPEC, SPEC]
    world = Reader(f"heads(keep=0.75,last=0.25,skip=1,w=8,rank={rank}) | plain", layers)
    assert world.bound.kept_heads == (4, 3, 2, 1)
    data = []
    for layer in range(4):
        size = draw(70 + layer, 4).exp()
        data.append(
            (
                draw(layer, length, 8, 32),
                draw(10 + layer, length, 4, 32),
                draw(20 + layer, length, 4, 16) * size[:, None],
            )
        )
    handle = world.store.open()
    world.run((handle, length, END), data=data)
    alive, sums, expected = set(range(4)), [0.0] * 4, []
    for layer, kept in enumerate((4, 3, 2, 1)):
        seen = outputs(SPEC, *data[layer], 8)
        pairs = [seen[2 * head] + seen[2 * head + 1] for head in range(4)]
        if rank == "layer":
            alive, sums = set(range(4)), [0.0] * 4
        for head in alive:
            sums[head] += pairs[head]
        alive = set(sorted(alive, key=lambda head: -sums[head])[:kept])
        expected.append(sorted(alive))
    found = [np.flatnonzero(places >= 0).tolist() for places in world.store._sequences[handle.id].places]
    assert found == expected
    if rank == "layer":
        assert any(not set(b) <= set(a) for a, b in itertools.pairwise(found)), "else the test shows nothing"
    world.close()


def test_a_cascade_remembers_and_never_brings_back() -> None:
    run = HeadRun([SPEC] * 3, (4, 2, 2), cascades=True)
    assert run.choose(0, torch.tensor([4.0, 3.0, 2.0, 1.0])).tolist() == [0, 1, 2, 3]
    assert run.choose(1, torch.tensor([0.0, 0.0, 9.0, 1.0])).tolist() == [0, 2]
    assert run.choose(2, torch.tensor([0.0, 99.0, 1.0, 99.0])).tolist() == [0, 2]
    assert [places.tolist() for places in run.finish()] == [[0, 1, 2, 3], [0, -1, 1, -1], [0, -1, 1, -1]]


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_of_heads_that_go_are_freed_to_the_digit(codec: str) -> None:
    """A strip of half the heads is half a strip and a byte for each; the store holds what the curve says."""
    layers = [SPEC] * 4
    whole = KVPlan.parse(codec).bind(layers, "float32").formats[0]
    world = Reader(f"heads(0.5,skip=2) | {codec}", layers)
    sizes = [fmt.payload_bytes + fmt.overhead_bytes for fmt in world.bound.formats]
    full = whole.payload_bytes + whole.overhead_bytes
    assert sizes == [full, full, full // 2 + 2, full // 2 + 2]
    handle = world.store.open()
    world.run((handle, 400, PART))
    world.run((handle, 52, END))
    strips = [sum(fmt.strip_bytes for _, fmt in world.strips(handle, layer)) for layer in range(4)]
    tail = world.bound.tails[0].strip_bytes
    assert strips == [7 * fmt.strip_bytes + tail for fmt in world.bound.formats]
    priced = world.bound.curve(452, np.array([453])).resident_bytes[0]
    assert sum(strips) == priced
    assert 0 <= world.store.report().live_bytes - sum(strips) <= 2 * 4 * 2 * 4096, "the ends of pages"
    world.close()


def test_packed_heads_attend_as_if_the_others_were_masked() -> None:
    """Logits of a plain store of all heads, with the heads that go set to 0 behind attention."""
    world, plain = Reader("heads(0.5,skip=0) | plain", [SPEC]), Reader("plain", [SPEC])
    data = (draw(1, 300, 8, 32), draw(2, 300, 4, 32), draw(3, 300, 4, 16))
    pair = world.store.open(), plain.store.open()
    made, expected = world.run((pair[0], 300, END), data=[data]), plain.run((pair[1], 300, END), data=[data])
    torch.testing.assert_close(made[0], expected[0], rtol=1e-5, atol=1e-5)  # the prompt itself is read with all heads
    alive = world.alive(pair[0], 0)
    assert len(alive) == 2
    for number in range(25):
        token = draw(100 + number, 1, 8, 32), draw(200 + number, 1, 4, 32), draw(300 + number, 1, 4, 16)
        out = world.run((pair[0], 1, NONE), data=[token])[0]
        wanted = plain.run((pair[1], 1, NONE), data=[token])[0]
        wanted.view(4, 2, 16)[[head for head in range(4) if head not in alive]] = 0.0
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    world.close()
    plain.close()


@pytest.mark.parametrize("codec", CODECS)
def test_a_strip_holds_what_its_codec_makes_of_the_heads_that_stay(codec: str) -> None:
    """As bytes: those of a strip of the same tokens in which these are all heads."""
    world = Reader(f"heads(0.5,skip=0) | {codec}", [SPEC])
    handle, k, v = world.store.open(), draw(2, 130, 4, 32), draw(3, 130, 4, 16)
    world.run((handle, 129, END), data=[(draw(1, 129, 8, 32), k[:129], v[:129])])
    alive, inner = world.alive(handle, 0), KVPlan.parse(codec).codec
    fmt = inner.page_format(make_spec(q_heads=4, kv_heads=2, dim=32, v_dim=16), "float32")
    dtype = getattr(torch, world.bound.tails[0].dtype)
    for number, (strip, _) in enumerate(world.strips(handle, 0)[:2]):
        expected, rows = torch.zeros(fmt.strip_bytes, dtype=torch.uint8), slice(64 * number, 64 * number + 64)
        keys, values = (x[rows, alive].transpose(0, 1).to(dtype) for x in (k, v))
        inner.store(expected, fmt, torch.arange(STRIP_TOKENS), keys, values)
        count = fmt.payload_bytes + fmt.overhead_bytes
        assert torch.equal(strip[:count], expected[:count])
    world.close()


@pytest.mark.parametrize("codec", CODECS)
def test_backends_agree(codec: str) -> None:
    """Rows of three sequences: a long one that is cut into pieces, one without a choice, and one of many rows."""
    if not BACKENDS.names() or not is_native(KVPlan.parse(codec).bind([SPEC], "float32").formats[0]):
        pytest.skip("the codec has one backend")
    world = Reader(f"heads(0.5,skip=0) | {codec}", [SPEC])
    rows = [(world.store.open(), count, part) for count, part in ((1100, END), (90, PART), (200, END))]
    for each in rows:
        world.run(each)
    step = world.step((rows[0][0], 1, NONE), (rows[1][0], 9, PART), (rows[2][0], 40, PART))
    q, k, v = draw(1, 50, 8, 32), draw(2, 50, 4, 32), draw(3, 50, 4, 16)
    world.store.attend(0, q, k, v, step, Want())
    strips = world.store._strips(0, step)
    (out, lse), (slow, slow_lse) = (
        attention.attend(strips, SPEC, q, backend=BACKENDS.get(name)) for name in ("native", "reference")
    )
    tolerance = 1e-5 if codec == "plain" else 0.05
    assert float((out - slow).abs().max()) <= tolerance
    gone = slow_lse == -torch.inf
    assert torch.equal(gone, lse == -torch.inf)
    assert gone.any(1).tolist() == [True] + 9 * [False] + 40 * [True]
    assert not out[gone].any()
    assert float((lse - slow_lse)[~gone].abs().max()) <= tolerance
    world.store.end_layer(0, step)
    world.store.end_step(step)
    world.close()


def test_columns_receive_nothing_from_heads_that_are_gone() -> None:
    world = Reader("heads(0.5,skip=0) | plain", [SPEC])
    handle = world.store.open()
    world.run((handle, 200, END))
    alive, step = world.alive(handle, 0), world.step((handle, 1, NONE))
    got = world.store.attend(
        0, draw(1, 1, 8, 32), draw(2, 1, 4, 32), draw(3, 1, 4, 16), step, Want(colsum=True, pmax=True)
    )
    assert got.colsum is not None
    assert got.pmax is not None
    expected = torch.tensor([2.0 * (head in alive) for head in range(4)])
    torch.testing.assert_close(got.colsum[0].sum(1), expected)
    assert (got.pmax[0].view(4, 2) > 0).all(1).tolist() == [head in alive for head in range(4)]
    world.store.end_step(step)
    world.close()


def test_heads_are_not_guessed() -> None:
    """Without a word on where the prompt ends, nothing is sealed; the sequence stays usable."""
    world = Reader("heads | plain", [SPEC] * 3)
    handle = world.store.open()
    with pytest.raises(IntegrityError, match="chooses KV heads where a prompt ends"):
        world.run((handle, 100, NONE))
    world.run((handle, 100, END))
    with pytest.raises(IntegrityError, match="cannot go back to token 64"):
        world.store.truncate(handle, 64)
    world.close()


def test_spans_that_name_other_heads_are_refused() -> None:
    """A checksum can be made by anyone; nothing of such a span is taken."""
    world = Reader("heads(0.5,skip=0) | int8", [SPEC])
    handle = world.store.open()
    world.run((handle, 200, END))
    strip, fmt = world.strips(handle, 0)[1]
    sequence, heads = world.store._sequences[handle.id], kept_heads(strip, fmt)
    good, places = heads.clone(), sequence.places
    alive = good.tolist()
    other = [head for head in range(4) if head not in alive]
    cases = [
        (alive[::-1], places, "names KV heads"),
        ([alive[0], 4], places, "names KV heads"),
        (other, places, "not those of its sequence"),
        (alive, (places_of(np.array([head in other for head in range(4)])),), "not those of its sequence"),
        (alive, (np.arange(4, dtype=np.int8),), "other numbers of KV heads"),
        (alive, (np.arange(3, dtype=np.int8),), "do not say which"),
        (alive, (), "not those of its sequence"),
    ]
    for named, noted, found in cases:
        heads.copy_(torch.tensor(named))
        sequence.places = noted
        span, twin = world.store.export_span(handle, 0, 200), world.store.open()
        held = world.store.report().num_strips
        with pytest.raises(IntegrityError, match=found):
            world.store.import_span(twin, span)
        assert world.store.report().num_strips == held
        world.store.close(twin)
    heads.copy_(good)
    sequence.places = places
    twin = world.store.open()
    assert world.store.import_span(twin, world.store.export_span(handle, 0, 200)) == 200
    with pytest.raises(IntegrityError, match="start at 0"):
        world.store.export_span(handle, 64, 200)
    world.close()


@pytest.mark.parametrize(
    ("text", "found", "fix"),
    [
        ("heads(0)", "keep=0", "between 0 and 1"),
        ("heads(1.0)", "keep=1.0", "between 0 and 1"),
        ("heads(x)", "keep=x", "between 0 and 1"),
        ("heads(0.5,last=0.6)", "last=0.6", "up to keep"),
        ("heads(skip=-1)", "skip=-1", "above -1"),
        ("heads(rank=best)", "rank=best", "cascade, layer"),
        ("heads | heads", "two head policies", "parts joined"),
        ("heads | fp8", "codec 'fp8' does not know", "int8, bfp or kivi"),
        ("heads | quest | int8", "cannot choose among keys that 'heads' has changed", "leave quest or heads out"),
        ("heads | bfp(sort=on)", "cannot sort channels", "leave out sort=on"),
        (
            "spatten | heads | int8",
            "part 'heads' seals whole blocks",
            "leave heads out of the plan; or the policy snapkv",
        ),
        ("heads(skip=4)", "drops nothing of 4 layers with 4 KV heads", "lower keep or skip"),
        ("heads(0.9)", "drops nothing", "lower keep or skip"),
    ],
)
def test_plans_that_cannot_work_name_the_way_out(text: str, found: str, fix: str) -> None:
    with pytest.raises(PlanError) as caught:
        KVPlan.parse(text).bind([SPEC] * 4, "float32")
    assert found in caught.value.message
    assert fix in str(caught.value.hint)


@pytest.mark.parametrize("changed", [{"num_kv_heads": 2}, {"kv_source": 2}])
def test_a_cascade_needs_layers_that_follow_each_other(changed: dict[str, int]) -> None:
    layers = [SPEC, SPEC, SPEC, dataclasses.replace(SPEC, **changed)]
    with pytest.raises(PlanError) as caught:
        KVPlan.parse("heads").bind(layers, "float32")
    assert "rank=layer" in str(caught.value.hint)
    assert KVPlan.parse("heads(rank=layer)").bind(layers, "float32").kept_heads[2:] in ((2, 1), (2, 4))


def test_a_layer_that_reads_keys_of_another_reads_the_heads_that_stayed_there() -> None:
    """Which the last of them sees off: it reads all of a prompt."""
    world = Reader("heads(0.5,skip=0,rank=layer) | plain", [SPEC, SPEC, dataclasses.replace(SPEC, kv_source=0)])
    world.checks, handle = False, world.store.open()
    assert all(out.any(2).all() for out in world.run((handle, 100, END)))
    outs = world.run((handle, 1, NONE))
    read = [out.view(4, 2, 16).any(2).any(1).nonzero()[:, 0].tolist() for out in outs]
    assert read[:2] == [world.alive(handle, layer) for layer in range(2)]
    assert read[2] == read[0]
    world.close()


def test_plans_have_one_spelling() -> None:
    plan = KVPlan.parse("int8|heads(0.50)|snapkv(256)")
    assert plan.text == (
        "snapkv(tokens=256,w=32,kernel=5,every=0) | heads(keep=0.5,last=0.0,skip=2,w=32,rank=cascade) | int8()"
    )
    assert KVPlan.parse(plan.text) == plan
