"""Codec ``kivi``: what sealing keeps of a strip, its bytes in both paths, and attention on sealed and open blocks."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tests.support.kv_world import World, make_spec
from tests.support.native import instructions, supported_isas
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec, PageFormat
from elbowroom.errors import IntegrityError, PlanError
from elbowroom.kernels import LayerStrips, StripStep, Tail, attention, reference
from elbowroom.kernels.base import PLAIN, AttentionKernels
from elbowroom.kv import KVPlan
from elbowroom.kv.base import KVHandle

SPEC = LayerSpec(num_q_heads=8, num_kv_heads=2, head_dim=64, v_head_dim=64, scale=0.125, rope=None)
PLANS = ("kivi(2,2,64)", "kivi(2,2,32)", "kivi(4,4,32)", "kivi(k=4,v=2,g=64)", "kivi(k=2,v=4,g=32)")
native = pytest.mark.skipif(
    importlib.util.find_spec("elbowroom._native") is None, reason="elbowroom._native was not built (ELBOWROOM_NATIVE=0)"
)


def sealed(plan: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[Hkv, 64, D]`` after sealing."""
    spec = dataclasses.replace(SPEC, num_kv_heads=k.shape[0], head_dim=k.shape[2], v_head_dim=v.shape[2])
    bound = KVPlan.parse(plan).bind([spec], "float32")
    strip = torch.full((bound.formats[0].strip_bytes,), 0x55, dtype=torch.uint8)
    bound.plan.codec.store(strip, bound.formats[0], torch.arange(STRIP_TOKENS), k, v)
    return bound.plan.codec.open(strip, bound.formats[0])


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (128, 64), (20, 40), (80, 96), (4, 8)])
def test_every_value_is_within_half_a_step_of_its_group(plan: str, dim: int, v_dim: int) -> None:
    """Keys by channel and token group, values by token and channel group; float16 scales cost a little more."""
    codec = KVPlan.parse(plan).codec
    bits_k, bits_v, group = (int(getattr(codec, name)) for name in "kvg")
    k, v = draw(1, 2, 64, dim) * draw(2, 2, 1, dim).exp() + 3, draw(3, 2, 64, v_dim) * draw(4, 2, 64, 1).exp() - 1
    made_k, made_v = sealed(plan, k, v)

    for start in range(0, 64, group):
        tokens = slice(start, start + group)
        span = k[:, tokens].amax(1) - k[:, tokens].amin(1)
        error = (made_k - k)[:, tokens].abs().amax(1)
        assert (error <= span / (2**bits_k - 1) * 0.51 + 0.002 * k.abs().amax()).all()
    for start in range(0, v_dim, group):
        channels = slice(start, start + group)
        span = v[..., channels].amax(2) - v[..., channels].amin(2)
        error = (made_v - v)[..., channels].abs().amax(2)
        assert (error <= span / (2**bits_v - 1) * 0.51 + 0.002 * v.abs().amax()).all()


def test_a_large_channel_costs_the_keys_of_others_nothing() -> None:
    """Scales of keys belong to channels, those of values to tokens: the reason for the codec."""
    k, v = draw(1, 1, 64, 64), draw(2, 1, 64, 64)
    plain_k, plain_v = sealed("kivi(2,2,64)", k, v)
    k[:, :, 5] *= 100
    v[:, 7] *= 100
    made_k, made_v = sealed("kivi(2,2,64)", k, v)
    channels, tokens = torch.arange(64) != 5, torch.arange(64) != 7
    assert torch.equal(made_k[..., channels], plain_k[..., channels])
    assert torch.equal(made_v[:, tokens], plain_v[:, tokens])


def test_constant_groups_are_exact_and_what_is_not_finite_is_not_hidden() -> None:
    k, v = torch.full((1, 64, 64), 1.5), torch.zeros(1, 64, 64)
    made_k, made_v = sealed("kivi", k, v)
    assert torch.equal(made_k, k)
    assert torch.equal(made_v, v)
    for bad in (torch.nan, torch.inf, -torch.inf, 1e30):
        k[0, 3, 4] = v[0, 3, 4] = bad
        made_k, made_v = sealed("kivi", k, v)
        assert not made_k[0, :32, 4].isfinite().any()
        assert not made_v[0, 3, :32].isfinite().any()
        assert made_k[0, 32:].isfinite().all()
        assert made_v[0, 4:].isfinite().all()


@pytest.mark.parametrize(("plan", "bits"), [("kivi(2,2,64)", 2.5), ("kivi(2,2,32)", 3), ("kivi(4,4,32)", 5)])
def test_a_sealed_strip_has_the_bits_that_the_codec_names(plan: str, bits: float) -> None:
    """``bits + 32 / g`` an element, and the tail's strip the model's own."""
    bound = KVPlan.parse(plan).bind([SPEC], "bfloat16")
    elements = 2 * 64 * 2 * 64
    assert bound.formats[0].strip_bytes == elements * bits / 8
    assert bound.tail_bytes == elements * 2


@pytest.mark.parametrize(("plan", "found"), [("kivi(k=3)", "k=3"), ("kivi(g=16)", "g=16"), ("kivi(v=8)", "v=8")])
def test_errors_name_what_can_be_had(plan: str, found: str) -> None:
    with pytest.raises(PlanError, match=found) as error:
        KVPlan.parse(plan)
    assert "from" in str(error.value.hint)


class Layer:
    """One layer of two sequences with sealed strips and tails, scattered, for one backend."""

    def __init__(self, plan: str, spec: LayerSpec, dtype: str, lengths: list[int]) -> None:
        bound = KVPlan.parse(plan).bind([spec], dtype)
        self.spec, self.codec, self.lengths = spec, bound.plan.codec, lengths
        self.done = [0] * len(lengths)
        blocks = -(-max(lengths) // STRIP_TOKENS)
        self.fmt, self.tail_fmt = bound.formats[0], bound.tails[0]
        order = np.random.default_rng(0).permutation(len(lengths) * blocks).reshape(len(lengths), blocks)
        self.table, self.tails = (place(order, fmt) for fmt in (self.fmt, self.tail_fmt))
        self.base = torch.full((order.size * self.fmt.strip_bytes,), 0x55, dtype=torch.uint8)
        self.tail_base = torch.full((order.size * self.tail_fmt.strip_bytes,), 0x55, dtype=torch.uint8)

    def strips(self, counts: list[int]) -> LayerStrips:
        """The next step, which appends ``counts``."""
        step = StripStep.of_runs(list(zip(self.done, counts, strict=True)))
        self.done = [done + count for done, count in zip(self.done, counts, strict=True)]
        first = np.array([done - count for done, count in zip(self.done, counts, strict=True)]) // STRIP_TOKENS
        full = [(s, b) for s, done in enumerate(self.done) for b in range(int(first[s]), done // STRIP_TOKENS)]
        columns = np.minimum(first[:, None] + np.arange(self.tails.shape[1]), self.tails.shape[1] - 1)
        tail = Tail(
            table=np.take_along_axis(self.tails, columns, axis=1),
            first_blocks=first,
            base=self.tail_base,
            fmt=self.tail_fmt,
            full=np.array([self.tails[place] for place in full], dtype=np.uint32),
            sealed=np.array([self.table[place] for place in full], dtype=np.uint32),
        )
        return LayerStrips(step, self.table, self.base, self.fmt, self.codec, tail)


Made = tuple[tuple[Tensor, ...], Tensor, Tensor]
"""What attention gives, and the bytes of sealed strips and of tails behind it."""


def steps(plan: str, spec: LayerSpec, dtype: str, backend: AttentionKernels | None) -> Iterator[Made]:
    """Decode steps, short and long chunks of two sequences."""
    layer = Layer(plan, spec, dtype, [331, 203])
    for seed, counts in enumerate([[60, 130], [4, 1], [1, 60], [200, 1], [1, 11], [65, 0]]):
        widths = (spec.num_q_heads, spec.head_dim), (2, spec.head_dim), (2, spec.v_head_dim)
        q, k, v = (draw(seed + more, sum(counts), *width) for more, width in zip((0, 50, 90), widths, strict=True))
        strips = layer.strips(counts)
        attention.append(strips, k.to(getattr(torch, dtype)), v.to(getattr(torch, dtype)), backend=backend)
        yield attention.attend(strips, spec, q, backend=backend), layer.base, layer.tail_base


def place(order: np.ndarray, fmt: PageFormat) -> np.ndarray:
    return (order * (fmt.strip_bytes // 64)).astype(np.uint32)


@native
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("group", "dim", "v_dim", "window", "softcap"),
    [(4, 64, 64, None, None), (1, 20, 40, 100, None), (12, 128, 80, None, 3.0), (5, 96, 256, 70, None)],
)
def test_native_code_seals_the_same_bytes_and_attends_alike(
    plan: str, dtype: str, group: int, dim: int, v_dim: int, window: int | None, softcap: float | None
) -> None:
    """Decode steps, short and long chunks; the integer products differ from the decoded ones by rounding alone."""
    spec = make_spec(2 * group, 2, dim, v_dim, window=window, softcap=softcap)
    readable = [
        (outs, base.clone(), tails.clone()) for outs, base, tails in steps(plan, spec, dtype, reference.KERNELS)
    ]
    for isa in supported_isas():  # in one test: reading in torch is what takes time
        with instructions(isa):
            for (outs, *bases), (expected, *read) in zip(steps(plan, spec, dtype, None), readable, strict=True):
                for ours, theirs in zip(bases, read, strict=True):
                    assert torch.equal(ours, theirs), isa
                for ours, theirs in zip(outs, expected, strict=True):
                    assert float((ours - theirs).norm()) < 0.015 * float(theirs.norm()), isa


@native
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("plan", ["kivi(2,2,64)", "kivi(2,2,32)", "kivi(4,4,32)"])
@pytest.mark.parametrize("token", [3, 40])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e6])
def test_what_is_not_finite_is_not_hidden_by_integer_products(plan: str, token: int, bad: float) -> None:
    for part in range(2):
        layer = Layer(plan, SPEC, "float32", [70])
        strips = layer.strips([70])
        rows = [draw(1, 70, 2, 64), draw(2, 70, 2, 64)]
        rows[part][token, 1, 4] = bad
        attention.append(strips, *rows)
        out, _ = attention.attend(strips, SPEC, draw(3, 70, 8, 64))
        assert out[:, :4].isfinite().all()
        assert not out[64:, 4:, 4 if part else 0].isfinite().any()


@native
def test_a_row_gives_the_same_bits_alone_and_in_a_batch() -> None:
    """Few query vectors and many take the same arithmetic; cuts are at fixed places."""
    outs = []
    for counts in ([2500, 0], [2499, 0]):
        layer = Layer("kivi(2,2,32)", SPEC, "bfloat16", [2500, 64])
        q, k, v = (draw(seed, 2500, heads, 64).bfloat16() for seed, heads in ((1, 8), (2, 2), (3, 2)))
        strips, count = layer.strips(counts), counts[0]
        attention.append(strips, k[:count], v[:count])
        out, _ = attention.attend(strips, SPEC, q[:count])
        if count < 2500:
            strips = layer.strips([1, 0])
            attention.append(strips, k[count:], v[count:])
            out, _ = attention.attend(strips, SPEC, q[count:])
        outs.append(out[-1])
    torch.testing.assert_close(outs[0].float(), outs[1].float(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=native)])
def test_a_tail_is_refused_without_sealed_strips_and_sealed_strips_without_a_tail(backend: str) -> None:
    kernels = attention.BACKENDS.get(backend)
    layer = Layer("kivi(2,2,64)", SPEC, "float32", [70])
    strips = layer.strips([70])
    plain = dataclasses.replace(strips, fmt=layer.tail_fmt, table=layer.tails, base=layer.tail_base, layout=PLAIN)
    rows = [draw(seed, 70, 2, 64) for seed in (1, 2)]
    before = layer.base.clone(), layer.tail_base.clone()

    for wrong, message in (
        (dataclasses.replace(strips, tail=None), "format kivi is sealed whole: its new tokens need a tail"),
        (plain, "format plain takes tokens itself: it has no tail"),
    ):
        with pytest.raises(ValueError, match=message):
            attention.append(wrong, *rows, backend=kernels)
        with pytest.raises(ValueError, match=message):
            attention.attend(wrong, SPEC, draw(3, 70, 8, 64), backend=kernels)
    assert torch.equal(layer.base, before[0])
    assert torch.equal(layer.tail_base, before[1])
    attention.append(strips, *rows, backend=kernels)
    assert not torch.equal(layer.base, before[0])


def open_blocks(world: World, handle: KVHandle) -> list[int]:
    """Blocks in the tail and in staging."""
    table, layers = world.store._sequences[handle.id].table, len(world.layers)
    return [int((table[row] != 0xFFFFFFFF).sum()) for row in (layers, 2 * layers)]


def test_only_the_unfinished_block_stays_open() -> None:
    """A prompt passes through staging; decoding seals a block in the step that fills it."""
    world = World([make_spec(), make_spec()], plan="kivi")
    handle = world.open()
    step = world.append_step((handle, 300))
    assert world.store.reserve(step) is None
    assert open_blocks(world, handle) == [1, 4]
    world.run(step)
    assert open_blocks(world, handle) == [1, 0]
    for _ in range(20):
        world.append((handle, 1))
        world.check()
    assert open_blocks(world, handle) == [0, 0]
    assert world.store.report().num_strips == 2 * 5


@pytest.mark.parametrize("call", ["fork", "truncate", "overwrite", "export_span"])
def test_going_back_into_a_sealed_block_is_refused_with_the_way_out(call: str) -> None:
    world = World([make_spec()], plan="kivi")
    handle = world.open(200)
    before = world.state()
    arguments = {"overwrite": (np.array([70]),), "export_span": (0, 70)}.get(call, (70,))
    with pytest.raises(IntegrityError, match="tokens 64 to 127 are sealed by codec 'kivi'") as error:
        getattr(world.store, call)(handle, *arguments)
    assert "go back to token 64" in str(error.value.hint)
    assert world.state() == before
    world.fork(handle, 64)
    world.truncate(handle, 128)
    world.append((handle, 3))
    world.check()


@pytest.mark.parametrize("start", [10, 62, 63, 64, 120])
def test_a_speculative_step_can_be_taken_back_to_its_first_token(start: int) -> None:
    """Tokens move across a border, and the block that they fill again is sealed anew."""
    world = World([make_spec(dim=32), make_spec(dim=32, window=80)], plan="kivi")
    handle = world.open(start)
    world.append((handle, 9))
    world.fork(handle)
    world.accept(handle, start, [start, start + 2, start + 5, start + 7])
    world.check()
    world.append((handle, 1), (world.fork(handle), 70))
    world.check()


def test_a_layer_that_is_read_later_keeps_its_own_staging() -> None:
    """Layers of one shape share what they use one after the other, but not with one that others read again."""
    shape = make_spec(dim=32)
    world = World([shape, shape, dataclasses.replace(shape, kv_source=0)], plan="kivi")
    world.open(300)
    world.check()
